"""Rows as a model sees them: which text, which tokens are learned, how long they are."""

import os
import sys
from collections.abc import Callable

import numpy as np

GREEN, PLAIN = "\033[30;42m", "\033[0m"
OPEN, CLOSE = "⟦", "⟧"  # where there is no colour
BINS, BAR = 10, 40


def shown(data, tokenizer, *, as_learned: Callable, count: int, colour: bool) -> str:
    """The first rows of `TokenizedData`, and how long all of them are.

    Args:
        as_learned: `tasks.Task.shown`.
    """
    marks = (GREEN, PLAIN) if colour else (OPEN, CLOSE)
    rows = [_row(data, i, as_learned, tokenizer, marks=marks) for i in range(min(count, len(data)))]
    return "\n\n".join([*rows, histogram(data.lengths)])


def in_colour() -> bool:
    """Whether what is printed here can have colour (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _row(data, i: int, as_learned: Callable, tokenizer, *, marks: tuple[str, str]) -> str:
    ids, learned, label = as_learned(data.dataset[i])
    what = "and a label" if label else f"{learned.sum()} of them learned"
    head = f"row {data.rows[i] + 1}: {len(ids)} tokens, {what}"
    text = marked(ids.tolist(), learned.tolist(), tokenizer, marks=marks)
    return f"{head}\n{text}" + (f" {marks[0]}{label}{marks[1]}" if label else "")


def marked(ids: list[int], learned: list[bool], tokenizer, *, marks: tuple[str, str]) -> str:
    """The text of a row, the learned parts between marks.

    A part is what the text grows by: decoded alone, many tokenizers drop the space that a part begins with.
    """
    edges = [i for i in range(1, len(ids)) if learned[i] != learned[i - 1]]
    text, parts = "", []
    for start, stop in zip([0, *edges], [*edges, len(ids)], strict=True):
        longer = tokenizer.decode(ids[:stop])
        parts.append(f"{marks[0]}{longer[len(text) :]}{marks[1]}" if learned[start] else longer[len(text) :])
        text = longer
    return "".join(parts)


def histogram(lengths: np.ndarray) -> str:
    """How many rows have how many tokens."""
    width = max(-(-int(lengths.max()) // BINS), 1)
    counts = np.bincount((lengths - 1) // width, minlength=1)
    longest = counts.max()
    return "\n".join(
        f"{i * width + 1:>8,} to {(i + 1) * width:>8,} tokens: {count:>9,} {'█' * round(BAR * count / longest)}"
        for i, count in enumerate(counts)
    )
