"""Text to compare an export on: what its run did not train on, wherever there is such text."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch

from fsdp_utils.core.errors import UserError
from fsdp_utils.data import sources
from fsdp_utils.data.batches import IGNORED
from fsdp_utils.data.layouts import Reading
from fsdp_utils.data.tokens import prepare_dataset, tokenize
from fsdp_utils.folders.describe import Run

MOST_TOKENS = 4096  # their log-probabilities go to disk: 2 GB with a vocabulary of 128k
CONTEXT = 2048

Row = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class HeldOut:
    """Text to compare on.

    Args:
        source: the dataset, and which part of it.
        rows: (ids `[tokens]`, labels `[tokens]`, -100 where no token is asked for), int64.
        unseen: whether the run, as far as it is known, did not train on it.
    """

    source: str
    rows: list[Row]
    unseen: bool

    @property
    def tokens(self) -> int:
        """How many are asked for."""
        return sum(int((labels != IGNORED).sum()) for _, labels in self.rows)


def held_out(run: Run, tokenizer, *, name: str | None, samples: int) -> HeldOut:
    """The first `samples` rows that the run did not train on: of `name`, a validation set or local file; else of what
    the run validated with, of its dataset's validation set, or of the rows that it left unused. Where it left none,
    rows that it trained on.

    Raises:
        UserError: it is not known what the run was trained on; as `sources.load_examples`.
    """
    if run.config is None and not name:
        raise UserError(
            f"--fidelity_data: {run.folder} does not say what it was trained on; give a dataset or local file "
            "to compare on, or --fidelity_samples 0 for no report"
        )
    context = run.config.context_length if run.config else CONTEXT
    if name is None and run.config.eval_samples:
        source, unseen = f"{run.config.dataset} (the samples it held out)", True
        _, kept = prepare_dataset(run.config, tokenizer).split(run.config.eval_samples, seed=run.config.seed)
        table = kept.dataset.select(range(min(samples, len(kept)))).with_format("arrow")[:]
    else:
        source, examples, unseen = _chosen(run, name, samples=samples)
        reading = Reading.of(run.config) if run.config else Reading()
        table = tokenize(examples, tokenizer, reading=reading, source=source, context_length=context)
    rows = list(_that_fit(table))
    if not rows:
        raise UserError(f"--fidelity_data {source}: no row has an answer within {context} tokens; give other text")
    return HeldOut(source, rows, unseen)


def _that_fit(table) -> Iterator[Row]:
    left = MOST_TOKENS
    for ids, labels in zip(table["input_ids"].to_pylist(), table["labels"].to_pylist(), strict=True):
        asked = sum(label != IGNORED for label in labels)
        if 0 < asked <= left:
            left -= asked
            yield torch.tensor(ids), torch.tensor(labels)


def _chosen(run: Run, name: str | None, *, samples: int) -> tuple[str, sources.Examples, bool]:
    """The source's name, rows of it, and whether they are unseen."""
    if run.config is None:
        return name, named(name, Reading()).first(samples), True
    used, left = sources.divide(run.config)
    source, examples = (name, named(name, Reading.of(run.config))) if name else _of_run(run.config, left)
    seen = set(map(_key, used)) if len(examples) else set()
    unseen = [place for place, row in islice(_unseen(examples, seen), samples)]
    if unseen:
        return source, examples.select(unseen), True
    trained_on = f"{source} (trained on: it has no other rows)"
    return trained_on, (examples if len(examples) else used).first(samples), False


def _key(row) -> int:
    """Equal for rows of equal content, wherever they stand."""
    return hash(repr(row[0].value))


def _unseen(examples: sources.Examples, seen: set[int]) -> Iterator[tuple[int, tuple]]:
    return ((place, row) for place, row in enumerate(examples) if _key(row) not in seen)


def named(name: str, reading: Reading) -> sources.Examples:
    """The rows of `--fidelity_data`."""
    place = sources.Place(dataset_split="validation", sole=True)
    return sources.held_out_rows(name, place=place, reading=reading, flag="fidelity_data")


def _of_run(config, left: sources.Examples) -> tuple[str, sources.Examples]:
    """What the run validated with, the validation set of its dataset, or the rows that it left unused."""
    reading = Reading.of(config)
    if config.eval_dataset:
        place = sources.Place(config.eval_split, config.dataset_config, sole=True)
        return config.eval_dataset, sources.held_out_rows(config.eval_dataset, place=place, reading=reading)
    spec = sources.DATASETS.get(config.dataset)
    if spec and spec.validation:
        held = sources.held_out_rows(config.dataset, place=sources.Place.of(config), reading=reading)
        return f"{config.dataset} (validation)", held
    return f"{config.dataset} (rows that it left unused)" if len(left) else config.dataset, left
