"""From token rows to micro-batches: orders and packs samples, deals global batches to the ranks, pads."""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

import numpy as np
import torch

IGNORED = -100  # the label that every cross entropy here skips
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


def collate_padded(rows: list, *, pad_token_id: int, multiple: int, context_length: int) -> dict[str, torch.Tensor]:
    """One micro-batch of samples, padded on the right.

    Args:
        rows: (input_ids, labels) of each sample, int arrays [tokens]; none at all gives one row without labels.

    Returns:
        `input_ids`, `labels`, `attention_mask`: int64 [rows, longest].
    """
    # a rank without rows still has to take part in every all-gather of the forward pass
    rows = rows or [(np.array([pad_token_id]), np.array([IGNORED]))]
    width = _width(max(len(ids) for ids, _ in rows), multiple=multiple, context_length=context_length)
    batch = {
        "input_ids": torch.full((len(rows), width), pad_token_id),
        "labels": torch.full((len(rows), width), IGNORED),
        "attention_mask": torch.zeros((len(rows), width), dtype=torch.int64),
    }
    for i, (ids, labels) in enumerate(rows):
        batch["input_ids"][i, : len(ids)] = torch.tensor(ids)
        batch["labels"][i, : len(ids)] = torch.tensor(labels)
        # from the length: the end-of-sequence token may be the padding token too (trl#1623)
        batch["attention_mask"][i, : len(ids)] = 1
    return batch


def collate_packed(packs: list, *, pad_token_id: int, multiple: int, context_length: int) -> dict[str, torch.Tensor]:
    """One micro-batch of packs, each a list of (input_ids, labels) int arrays [tokens].

    transformers reads sequence boundaries from `position_ids` only where there is no attention mask, so there is none.

    Returns:
        `input_ids`, `labels`, `position_ids`: int64 [packs, longest]; positions restart at 0 at every sample and at
        the padding, and the first label of every sample is masked.
    """
    packs = packs or [[(np.array([pad_token_id]), np.array([IGNORED]))]]
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
            # the first token of a sample would be predicted from the last of its neighbour
            batch["labels"][i, start + 1 : end] = torch.tensor(labels[1:])
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


def steps_per_epoch(
    data,
    *,
    batch_size: int,
    gradient_accumulation_steps: int,
    world_size: int,
    seed: int = 0,
    epoch: int = 0,
    context_length: int = 0,
    packing: bool = False,
) -> int:
    """Optimizer steps of an epoch, its incomplete last one included.

    With packing, epochs may differ by a step or so: the number of packs depends on `seed` and `epoch`, which then
    have to be those of `epoch_steps`, as `context_length` has.
    """
    _, tokens = epoch_rows(data.lengths, seed=seed, epoch=epoch, context_length=context_length, packing=packing)
    return -(-len(tokens) // (batch_size * gradient_accumulation_steps * world_size))


def epoch_steps(
    data,
    *,
    batch_size: int,
    gradient_accumulation_steps: int,
    rank: int,
    world_size: int,
    seed: int,
    epoch: int,
    pad_token_id: int | None,
    context_length: int,
    packing: bool = False,
    pad_to_multiple_of: int = 1,
    start_step: int = 0,
) -> Iterator[list[dict[str, torch.Tensor]]]:
    """This rank's micro-batches of each optimizer step of an epoch.

    Step k of an epoch holds the same rows whatever `rank`, `world_size` and the way the global batch is split, and
    needs nothing but its number, so a resume passes `start_step`. Every row is in exactly one step. Every rank gets
    `gradient_accumulation_steps` micro-batches at every step: where the last one has too few rows, some hold a single
    row without labels.

    Args:
        data: TokenizedData.
        pad_token_id: any id of the vocabulary; None for 0. Padding is never told by its id.
        packing: rows of several samples, see `collate_packed`; otherwise of one, see `collate_padded`.
        pad_to_multiple_of: micro-batches are so wide, unless that is past `context_length`.
    """
    rows, tokens = epoch_rows(data.lengths, seed=seed, epoch=epoch, context_length=context_length, packing=packing)
    shape = {"pad_token_id": pad_token_id or 0, "multiple": pad_to_multiple_of, "context_length": context_length}
    global_batch = batch_size * gradient_accumulation_steps * world_size
    for start in range(start_step * global_batch, len(tokens), global_batch):
        shares = deal(
            tokens[start : start + global_batch],
            micro_batches=gradient_accumulation_steps,
            rank=rank,
            world_size=world_size,
        )
        yield [_micro_batch(data, [rows[start + i] for i in share], packing=packing, shape=shape) for share in shares]


def _micro_batch(data, rows: list[Sequence[int]], *, packing: bool, shape: dict) -> dict[str, torch.Tensor]:
    """Reads the samples of `rows` and pads them."""
    indices = [int(sample) for samples in rows for sample in samples]
    read = data.dataset[indices] if indices else {"input_ids": [], "labels": []}
    samples = list(zip(read["input_ids"], read["labels"], strict=True))
    if not packing:
        return collate_padded(samples, **shape)
    ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
    return collate_packed([samples[end - len(row) : end] for row, end in zip(rows, ends, strict=True)], **shape)
