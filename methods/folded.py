"""Adapters that learn on the rounding of the export they are for (--train_for).

Merged and rounded to 4 bits, much of a gentle change is lost: it is smaller than half a step of the grid, and the
adapter never heard of the rounding. Here the base that it learns on is what will be served, the rounded merged weight,
made anew every few steps; between, what was learned since is added in 16 bits:

    base = Q(W + s B0 A0)      y = c (base x + s (B A - B0 A0) x)      A0, B0: A and B at the last rounding

So gradients are those at rounded weights (a straight-through estimator, arXiv:1308.3432, whose rounding is a few steps
old). With DoRA, c = m / n holds the norms n of the last rounding: a grid whose scales belong to parts of a row bears
any factor of it. The last step ends with a rounding: what the run then computes with is what the export stores.

Saved are A and B, for the 16-bit base. Read again by us, the base is rounded with them in it.
"""

import torch

from fsdp_utils.core.rows import fill, gather
from methods.adapter import Pair, Start, hold_frozen

FROZEN = ("folded_A", "folded_B")


class Folded(Start):
    """A and B begin as by default, or as they were saved."""

    folds, kept = True, FROZEN

    def __init__(self, config, *, scaling):
        super().__init__(config, scaling=scaling)
        self.whole: dict[str, Pair] = {}  # what the base is being filled with, on the CPU
        self.paths: set[str] = set()
        # of this process's rows of W, fp32 `[n]`, for each piece that is read, by its first row
        self.norms: dict[str, dict[int, torch.Tensor]] = {}

    def attach(self, path, layer, *, dtype):
        self.paths.add(path)
        hold_frozen(layer, FROZEN, dtype=dtype)
        layer.folds = True

    def take(self, pairs: dict[str, Pair]) -> None:
        """Takes A and B of all layers, whole. Collective."""
        self.whole = {path: Pair(*(gather(t.detach()).cpu() for t in pair)) for path, pair in pairs.items()}

    def begin_as(self, tensors, kept):
        at_rounding = lambda path: Pair(*(kept[f"{path}.{name}"] for name in FROZEN))
        self.whole = {path: at_rounding(path) if kept else self.trained(saved) for path, saved in tensors.items()}

    def base_rows(self, path, rows, *, start):
        if path not in self.paths:
            return rows
        pieces = self.norms.setdefault(path, {})
        if start not in pieces:  # read again and again, W stays what it is
            pieces[start] = rows.float().norm(dim=1)
        if path not in self.whole:
            return rows
        a, b = (t.to(rows.device, torch.float32) for t in self.whole[path])
        return torch.addmm(rows.float(), b[start : start + len(rows)], a, alpha=self.scaling)

    def begin(self, path, layer, pair):
        if path in self.whole:
            for parameter, values in zip(pair, self.whole.pop(path), strict=True):
                fill(parameter, values)
        else:
            super().begin(path, layer, pair)
        for folded, parameter in zip(Pair(layer.folded_A, layer.folded_B), pair, strict=True):
            fill(folded, gather(parameter.detach()))

    def origin(self, path, layer):
        pieces = self.norms[path]
        whole = torch.cat([pieces[start] for start in sorted(pieces)])
        return whole.to(layer.weight_norm.device)  # of the 16-bit weight: the base changes

    def added(self, tensors):
        """Nothing: read again, the base has it all."""
        a, b = self.trained(tensors)
        return Pair(a[:0], b[:, :0])
