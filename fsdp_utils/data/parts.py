"""Which tokens of each row a process has, where several processes share a row (--context_parallel)."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from fsdp_utils.core.errors import UserError
from fsdp_utils.core.ranks import rank

Batch = dict[str, torch.Tensor]


def readers(config, processes: int) -> int:
    """How many readers of data so many processes are: neighbours that share rows are one.

    Raises:
        UserError: they do not come out even.
    """
    if processes % config.context_parallel:
        given = f"--context_parallel {config.context_parallel}"
        raise UserError(f"{given}: does not divide {processes} processes; start a multiple of it")
    return processes // config.context_parallel


class Part(NamedTuple):
    """A process's part of each row.

    Args:
        index, of: this is part `index` of `of`.
        folded: two pieces, one as far from the start as the other from the end: a token attends to those before it, so
            that those near the end take most time. Otherwise one piece.
    """

    index: int
    of: int
    folded: bool

    @classmethod
    def of_rows(cls, config, model_config) -> "Part":
        """That of this process: one piece where each process can take some of the heads, for whole rows."""
        several = config.context_parallel
        return cls(rank() % several, several, bool(model_config.get_text_config().num_attention_heads % several))

    @property
    def multiple(self) -> int:
        """What the length of rows has to be a multiple of."""
        return self.of * (1 + self.folded)

    def columns(self, length: int) -> torch.Tensor:
        """Those of the part in rows of so many tokens, int64 `[length / of]`."""
        pieces = torch.arange(length).view(self.multiple, -1)
        return torch.cat([pieces[self.index], pieces[-1 - self.index]]) if self.folded else pieces[self.index]

    def __call__(self, batch: Batch) -> Batch:
        """This part of a micro-batch of `data.batches.collate`. Positions are those in the whole row, and where samples
        begin (`cu_seq_lens_q`) is told of whole rows: attention needs both."""
        ids = batch["input_ids"]
        rows, length = ids.shape
        columns = self.columns(length)
        places = torch.full((length,), -1)
        places[columns] = torch.arange(len(columns))
        row, place = batch["positions"] // length, places[batch["positions"] % length]
        mine = place >= 0
        return {
            **batch,
            "input_ids": ids[:, columns],
            "position_ids": batch.get("position_ids", torch.arange(length).expand(rows, -1))[:, columns],
            "positions": (row * len(columns) + place)[mine],
            "targets": batch["targets"][mine],
        }

    def collating(self, collate: Callable[..., Batch]) -> Callable[..., Batch]:
        """A task's `collate`, of which this part is kept."""
        return lambda rows, **shape: self(collate(rows, **shape))
