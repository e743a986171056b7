"""Text to compare an export on: what its run did not train on, wherever there is such text."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch

from fsdp_utils.core.errors import UserError
from fsdp_utils.data import sources
from fsdp_utils.data.batches import IGNORED
from fsdp_utils.data.layouts import Reading
from fsdp_utils.data.tokens import digest_of, tokenize, training_samples
from fsdp_utils.folders.describe import Run, describe, task_of

MOST_TOKENS = 4096  # their log-probabilities go to disk: 2 GB with a vocabulary of 128k
CONTEXT = 2048
AT_ONCE = 256  # rows that are encoded together

Row = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class HeldOut:
    """Text to compare on.

    Args:
        source: the dataset, and which part of it.
        rows: (ids `[tokens]`, labels, -100 where nothing is asked for, and what else the task's samples have).
        unseen: whether the run, as far as it is known, did not train on it.
    """

    source: str
    rows: list[Row]
    unseen: bool

    @property
    def tokens(self) -> int:
        """How many are asked for."""
        return sum(int((row[1] != IGNORED).sum()) for row in self.rows)


def held_out(run: Run, tokenizer, *, name: str | None, samples: int) -> HeldOut:
    """The first `samples` rows that the run did not train on: of `name`, a validation set or local file; else of what
    the run validated with, of its dataset's validation set, or of the rows that it left unused. Where it left none,
    rows that it trained on. Rows are compared by their ids.

    Raises:
        UserError: it is not known what the run was trained on; as `sources.load_examples`.
    """
    if run.config is None and not name:
        raise UserError(
            f"--fidelity_data: {run.folder} does not say what it was trained on; give a dataset or local file "
            "to compare on, or --fidelity_samples 0 for no report"
        )
    context = run.config.context_length if run.config else CONTEXT
    source, examples = _chosen(run, name)
    reading = Reading.of(run.config) if run.config else Reading()
    how = _how(task_of(run))
    shape = dict(tokenizer=tokenizer, reading=reading, source=source, context_length=context)
    encode = lambda examples: tokenize(examples, **shape, **how)[0]
    seen = _trained_on(run.config, tokenizer, how) if run.config else set()
    found = [] if seen is None else list(islice(_unseen(examples, seen, encode), samples))
    unseen = bool(found)
    if not unseen:
        others = examples if len(examples) else sources.load_examples(run.config)
        why = "what its --init_adapter was trained on is not known" if seen is None else "trained on: no other rows"
        source, found = f"{source} ({why})", encode(others.first(samples))
    rows = list(_that_fit(found))
    if not rows:
        raise UserError(f"--fidelity_data {source}: no row has an answer within {context} tokens; give other text")
    return HeldOut(source, rows, unseen)


def _how(task) -> dict:
    return dict(coder=task.coder, labels=task.labels)


def _that_fit(rows: Iterable[Row]) -> Iterator[Row]:
    left = MOST_TOKENS
    for row in rows:
        asked = int((row[1] != IGNORED).sum())
        if 0 < asked <= left:
            left -= asked
            yield row


def _unseen(examples: sources.Examples, seen: set[bytes], encode) -> Iterator[Row]:
    """Rows of which the run has not seen the ids, as they are asked for."""
    for start in range(0, len(examples), AT_ONCE):
        part = examples.select(range(start, min(start + AT_ONCE, len(examples))))
        asked = (row for row in encode(part) if (row[1] != IGNORED).any())
        yield from (row for row in asked if digest_of(row[0].numpy()) not in seen)


def _trained_on(config, tokenizer, how: dict) -> set[bytes] | None:
    """A digest of the ids of each sample that the run, and those before it, were trained on; None if unknown."""
    seen = set(training_samples(config, tokenizer, **how).digests())
    if not config.init_adapter:
        return seen
    before = describe(config.init_adapter).config
    earlier = _trained_on(before, tokenizer, how) if before else None
    return None if earlier is None else seen | earlier


def _chosen(run: Run, name: str | None) -> tuple[str, sources.Examples]:
    """A source that may hold rows that the run has not seen."""
    reading = Reading.of(run.config) if run.config else Reading()
    if name:
        return name, named(name, reading)
    config = run.config
    if config.eval_dataset:
        place = sources.Place(config.eval_split, config.dataset_config, sole=True)
        return config.eval_dataset, sources.held_out_rows(config.eval_dataset, place=place, reading=reading)
    used, left = sources.divide(config)
    if config.eval_samples:
        return f"{config.dataset} (the samples it held out)", used
    spec = sources.DATASETS.get(config.dataset)
    if spec and spec.validation:
        held = sources.held_out_rows(config.dataset, place=sources.Place.of(config), reading=reading)
        return f"{config.dataset} (validation)", held
    return f"{config.dataset} (rows that it left unused)" if len(left) else config.dataset, left


def named(name: str, reading: Reading) -> sources.Examples:
    """The rows of `--fidelity_data`."""
    place = sources.Place(dataset_split="validation", sole=True)
    return sources.held_out_rows(name, place=place, reading=reading, flag="fidelity_data")
