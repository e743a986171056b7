"""From token rows to micro-batches: orders and packs samples, deals global batches to the ranks, pads."""

import itertools
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from fsdp_utils.core.errors import DataError
from fsdp_utils.data.parts import readers

IGNORED = -100  # the label that every cross entropy here skips
BOUNDARIES_MULTIPLE = 32  # of the boundaries of packed samples, so that compiled code sees few shapes
WINDOW = 16_384  # samples packed together: enough for tight packs, few enough to mix differently every epoch


def pack(lengths: np.ndarray, *, capacity: int, rng: np.random.Generator) -> list[list[int]]:
    """Puts every sample into exactly one pack of at most `capacity` tokens.

    Best fit decreasing (Johnson, 1974) within random windows. Packs come back in random order, so long samples do not
    come first. A pure function of its arguments and the state of `rng`.

    Args:
        lengths: tokens of each sample, int [samples].

    Returns:
        Sample indices of each pack.

    Raises:
        ValueError: a sample is longer than `capacity`.
    """
    if len(lengths) and lengths.max() > capacity:
        raise ValueError(f"a sample of {lengths.max()} tokens does not fit a pack of {capacity}")
    order = rng.permutation(len(lengths))
    packs = []
    for start in range(0, len(order), WINDOW):
        packs += _pack_window(order[start : start + WINDOW], lengths, capacity=capacity)
    return [packs[i] for i in rng.permutation(len(packs))]


def _pack_window(window: np.ndarray, lengths: np.ndarray, *, capacity: int) -> list[list[int]]:
    """Best fit decreasing over the sample indices `window`."""
    window = window[np.argsort(-lengths[window], kind="stable")]
    packs: list[list[int]] = []
    open_packs: dict[int, list[int]] = {}  # free tokens -> packs with just that many
    free_sizes: list[int] = []  # the keys of open_packs, sorted
    for sample, length in zip(window.tolist(), lengths[window].tolist(), strict=True):
        at = bisect_left(free_sizes, length)
        if at == len(free_sizes):
            which, free = len(packs), capacity
            packs.append([])
        else:
            free = free_sizes[at]
            which = open_packs[free].pop()
            if not open_packs[free]:
                del open_packs[free], free_sizes[at]
        packs[which].append(sample)
        rest = free - length
        if rest not in open_packs:
            open_packs[rest] = []
            insort(free_sizes, rest)
        open_packs[rest].append(which)
    return packs


def padding_share(packs: list[list[int]], lengths: np.ndarray, *, capacity: int) -> float:
    """The share of padding in rows of `capacity` tokens that hold these packs: 0.03 means 3 %."""
    return 1.0 - sum(int(lengths[p].sum()) for p in packs) / max(1, len(packs) * capacity)


def deal(lengths: np.ndarray, *, micro_batches: int, rank: int, world_size: int) -> list[np.ndarray]:
    """This rank's part of one global batch: for each micro-batch, positions into `lengths`.

    Rows are sorted by length and cut into `micro_batches * world_size` runs whose sizes differ by at most one; the
    ranks of one micro-step take neighbouring runs, so they wait little for each other and pad little. A run is empty
    where the last global batch of an epoch has too few rows.

    Args:
        lengths: tokens of each row of the global batch, int [rows].
    """
    runs = np.array_split(np.argsort(-lengths, kind="stable"), micro_batches * world_size)
    mine = []
    for micro in range(micro_batches):
        # back and forth: otherwise rank 0 gets the longest rows of every micro-step
        place = rank if micro % 2 == 0 else world_size - 1 - rank
        mine.append(runs[micro * world_size + place])
    return mine


def _width(longest: int, *, multiple: int, context_length: int) -> int:
    """`longest` rounded up to `multiple`, but not past `context_length`, where position embeddings may end."""
    return max(longest, min(-(-longest // multiple) * multiple, context_length))


def width_of(rows: list, *, multiple: int, context_length: int, room: int = 0) -> int:
    """Columns of a micro-batch of these rows, int arrays `[tokens]`, with `room` for more behind the longest."""
    return _width(max(map(len, rows)) + room, multiple=multiple, context_length=context_length)


def pad_rows(rows: list, *, fill: int, width: int) -> torch.Tensor:
    """int64 `[rows, width]`, padded on the right."""
    padded = torch.full((len(rows), width), fill)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.tensor(row)
    return padded


def at_least(rows: list, fewest: int, blank) -> list:
    """The rows, and as many times `blank` as are missing.

    A process without rows still has to take part in every all-gather of the forward pass; and where compiled code is
    for one number of rows, all batches had better have it.
    """
    return [*rows, *[blank] * (fewest - len(rows))]


def collate_padded(
    rows: list, *, pad_token_id: int, multiple: int, context_length: int, fewest: int = 1
) -> dict[str, torch.Tensor]:
    """One micro-batch of samples, padded on the right. A causal model needs no mask for that, and without one attention
    takes its fast kernels.

    Args:
        rows: (input_ids, labels) of each sample, int arrays [tokens].
        fewest: rows of the result; those that are missing have no labels.

    Returns:
        `input_ids`, `labels`: int64 [rows, longest].
    """
    rows = at_least(rows, fewest, (np.array([pad_token_id]), np.array([IGNORED])))
    ids, labels = ([row[i] for row in rows] for i in range(2))
    width = width_of(ids, multiple=multiple, context_length=context_length)
    return {
        "input_ids": pad_rows(ids, fill=pad_token_id, width=width),
        "labels": pad_rows(labels, fill=IGNORED, width=width),
    }


def collate_packed(
    packs: list, *, pad_token_id: int, multiple: int, context_length: int, fewest: int = 1
) -> dict[str, torch.Tensor]:
    """One micro-batch of packs, each a list of (input_ids, labels) int arrays [tokens].

    transformers reads sequence boundaries from `position_ids` only where there is no attention mask, so there is none.

    Returns:
        `input_ids`, `labels`, `position_ids`: int64 [packs, longest]; positions restart at 0 at every sample and at
        the padding.
    """
    packs = at_least(packs, fewest, [(np.array([pad_token_id]), np.array([IGNORED]))])
    longest = max(sum(len(ids) for ids, _ in samples) for samples in packs)
    width = _width(longest, multiple=multiple, context_length=context_length)
    batch = {
        "input_ids": torch.full((len(packs), width), pad_token_id),
        "labels": torch.full((len(packs), width), IGNORED),
        "position_ids": torch.zeros((len(packs), width), dtype=torch.int64),
    }
    for i, samples in enumerate(packs):
        start = 0
        for ids, labels in samples:
            end = start + len(ids)
            batch["input_ids"][i, start:end] = torch.tensor(ids)
            batch["labels"][i, start:end] = torch.tensor(labels)
            batch["position_ids"][i, start:end] = torch.arange(end - start)
            start = end
        batch["position_ids"][i, start:] = torch.arange(width - start)
    return batch


def epoch_rows(
    lengths: np.ndarray, *, seed: int, epoch: int, context_length: int, packing: bool
) -> tuple[Sequence[Sequence[int]], np.ndarray]:
    """The rows of an epoch in order: the sample indices of each (one, without packing), and its tokens, int [rows]."""
    rng = np.random.default_rng([seed, epoch])
    if not packing:
        order = rng.permutation(len(lengths))
        return order[:, None], lengths[order]
    packs = pack(lengths, capacity=context_length, rng=rng)
    return packs, np.array([lengths[samples].sum() for samples in packs], dtype=np.int64)


def with_targets(batch: dict[str, torch.Tensor], *, multiple: int = 1) -> dict[str, torch.Tensor]:
    """Replaces `labels` `[b, L]` by `positions` and `targets` `[n]`: the flat places that predict, and what.

    Runs on the CPU, before the batch moves: finding the places on a GPU would make the host wait for it. A place
    predicts the token after it, if that is of the same sample: nothing predicts the first one.

    Args:
        multiple: n is brought to a multiple of it by places that predict nothing, so that few shapes occur.
    """
    labels = batch["labels"]
    if "position_ids" in batch:
        labels = labels.masked_fill(batch["position_ids"] == 0, IGNORED)
    after = F.pad(labels, (0, 1), value=IGNORED)[:, 1:].flatten()
    positions = (after != IGNORED).nonzero()[:, 0]
    inputs = {name: t for name, t in batch.items() if name != "labels"}
    if "position_ids" in batch:
        inputs["cu_seq_lens_q"] = boundaries(batch["position_ids"])
    missing = -len(positions) % multiple
    targets = F.pad(after[positions], (0, missing), value=IGNORED)
    return {**inputs, "positions": F.pad(positions, (0, missing)), "targets": targets}


def predicting_tokens(batch: dict[str, torch.Tensor]) -> int:
    """How many targets of a batch are in the loss; real numbers that are not asked for are NaN."""
    targets = batch["targets"]
    return int((~targets.isnan() if targets.is_floating_point() else targets != IGNORED).sum())


def tokens_in(batch: dict[str, torch.Tensor]) -> int:
    """How many tokens the model is given, with padding; in an encoder and in a decoder."""
    return batch["input_ids"].numel() + (batch["labels"].numel() if "labels" in batch else 0)


def boundaries(position_ids: torch.Tensor) -> torch.Tensor:
    """Where each sample begins in the flattened rows, and the end; int32 `[n]`, the end repeated to a multiple.

    Args:
        position_ids: `[b, L]`, zero at the first token of each sample (and of the padding).
    """
    starts = (position_ids.flatten() == 0).nonzero()[:, 0]
    length = -(-(len(starts) + 1) // BOUNDARIES_MULTIPLE) * BOUNDARIES_MULTIPLE
    ends = torch.full((length,), position_ids.numel(), dtype=torch.int32)
    ends[: len(starts)] = starts
    return ends


def model_inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | int]:
    """What of a micro-batch the model is called with."""
    inputs = {name: t for name, t in batch.items() if name not in ("positions", "targets")}
    if "cu_seq_lens_q" in inputs:
        # the row length bounds every sample; the true maximum would differ from batch to batch and recompile
        length = inputs["position_ids"].shape[1]
        inputs.update(cu_seq_lens_k=inputs["cu_seq_lens_q"], max_length_q=length, max_length_k=length)
    return inputs


def packed_inputs(rows: int, length: int) -> dict[str, torch.Tensor | int]:
    """What the model is called with besides the tokens, of packed rows of two samples each."""
    position_ids = (torch.arange(length) % max(length // 2, 1)).repeat(rows, 1)
    return model_inputs(dict(position_ids=position_ids, cu_seq_lens_q=boundaries(position_ids)))


def collate(rows: list, *, packing: bool, targets_multiple: int, **shape) -> dict[str, torch.Tensor]:
    """One micro-batch of a causal language model: `collate_packed` or `collate_padded`, `with_targets`."""
    padded = collate_packed if packing else collate_padded
    return with_targets(padded(rows, **shape), multiple=targets_multiple)


def accumulation_for(rows: int, config, *, processes: int, named: str) -> int:
    """Micro-batches of a process in a step of so many rows.

    Args:
        named: what asks for this number of rows, for the message.

    Raises:
        DataError: it is no whole number; says which batch sizes would work.
    """
    batch_size, world_size = config.batch_size, readers(config, processes)
    accumulation, rest = divmod(rows, batch_size * world_size)
    if rest or not accumulation:
        sizes = [size for size in range(1, rows // world_size + 1) if rows % (size * world_size) == 0]
        way_out = f"--batch_size {' or '.join(map(str, sizes[-4:]))}" if sizes else "another number of processes"
        raise DataError(
            f"{named}: {rows} rows a step are no multiple of --batch_size {batch_size} x {world_size} processes; "
            f"take {way_out}"
        )
    return accumulation


@dataclass(frozen=True)
class Batches:
    """How samples become the micro-batches of this process: a pure function of seed, epoch and step.

    Step k of an epoch holds the same rows whatever `rank`, `world_size` and the way the global batch is split, and
    needs nothing but its number, so a resume passes `start`. Every row is in exactly one step. Every process gets
    `accumulation` micro-batches at every step: where the last one has too few rows, some hold a single row without
    labels.

    Args:
        data: the samples.
        collate: of the task: `collate`.
        batch_size: rows of a micro-batch.
        accumulation: micro-batches of a process in a step.
        packing: rows of several samples, up to `context_length` tokens; otherwise of one.
        pad_token_id: any id of the vocabulary. Padding is never told by its id.
        multiple: micro-batches are so wide, unless that is past `context_length`.
        targets_multiple: so many places predict, some of them nothing.
        fewest: rows that a micro-batch has at least.
    """

    data: object
    collate: Callable
    batch_size: int
    accumulation: int = 1
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    context_length: int = 0
    packing: bool = False
    pad_token_id: int = 0
    multiple: int = 1
    targets_multiple: int = 1
    fewest: int = 1

    @classmethod
    def of(cls, config, data, *, collate: Callable, **more) -> "Batches":
        """Those of a run."""
        flags = {name: getattr(config, name) for name in ("batch_size", "seed", "context_length", "packing")}
        return cls(data, collate, accumulation=config.gradient_accumulation_steps, **flags, **more)

    @property
    def rows_per_step(self) -> int:
        """Of the global batch."""
        return self.batch_size * self.accumulation * self.world_size

    def _rows(self, epoch: int):
        return epoch_rows(
            self.data.lengths,
            seed=self.seed,
            epoch=epoch,
            context_length=self.context_length,
            packing=self.packing,
        )

    def count(self, epoch: int) -> int:
        """Optimizer steps of an epoch, its incomplete last one included. With packing, epochs may differ by one."""
        return -(-len(self._rows(epoch)[1]) // self.rows_per_step)

    def check(self) -> None:
        """Raises DataError where the samples do not fill one global batch."""
        rows, needed = len(self._rows(0)[0]), self.rows_per_step
        if rows < needed:
            kind = f"packs of {self.context_length} tokens" if self.packing else "samples"
            raise DataError(
                f"--dataset {self.data.name}: {rows} {kind} do not fill one global batch of {needed} (batch_size "
                f"{self.batch_size} x gradient_accumulation_steps {self.accumulation} x {self.world_size} "
                "processes or groups of them); lower one of these or give more data"
            )

    def steps(self, epoch: int, *, start: int = 0) -> Iterator[list[dict[str, torch.Tensor]]]:
        """The micro-batches of each optimizer step of an epoch, from step `start` on."""
        rows, tokens = self._rows(epoch)
        split = dict(micro_batches=self.accumulation, rank=self.rank, world_size=self.world_size)
        for first in range(start * self.rows_per_step, len(tokens), self.rows_per_step):
            shares = deal(tokens[first : first + self.rows_per_step], **split)
            yield [self._micro_batch([rows[first + i] for i in share]) for share in shares]

    def first(self, total: int, *, start: int = 0) -> Iterator[list[dict[str, torch.Tensor]]]:
        """Exactly so many steps, epoch after epoch; without the first `start` of them."""
        epoch, done = self.epoch_of(start)
        later = (step for following in itertools.count(epoch + 1) for step in self.steps(following))
        return itertools.islice(itertools.chain(self.steps(epoch, start=done), later), max(total - start, 0))

    def epoch_of(self, number: int) -> tuple[int, int]:
        """The epoch of the step that follows `number` steps, and how many of its steps come before."""
        epoch = 0
        while number >= (count := self.count(epoch)):
            epoch, number = epoch + 1, number - count
        return epoch, number

    def samples_of(self, number: int) -> list[int]:
        """The samples of the global batch that follows `number` steps, by their places in `data`."""
        epoch, done = self.epoch_of(number)
        rows, first = self._rows(epoch)[0], done * self.rows_per_step
        return sorted(int(sample) for row in rows[first : first + self.rows_per_step] for sample in row)

    def _micro_batch(self, rows: list[Sequence[int]]) -> dict[str, torch.Tensor]:
        """Reads the samples of `rows` and pads them."""
        indices = [int(sample) for samples in rows for sample in samples]
        samples = list(zip(*self.data.dataset[indices].values(), strict=True)) if indices else []
        if self.packing:
            ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
            samples = [samples[end - len(row) : end] for row, end in zip(rows, ends, strict=True)]
        return self.collate(
            samples,
            packing=self.packing,
            targets_multiple=self.targets_multiple,
            pad_token_id=self.pad_token_id,
            multiple=self.multiple,
            context_length=self.context_length,
            fewest=self.fewest,
        )
