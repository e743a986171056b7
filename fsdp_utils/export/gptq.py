"""GPTQ (arXiv:2210.17323): 4-bit rounding that makes up in one input's weights for the error in another's.

What an error costs depends on the inputs that a linear really has, so the trained model is run on samples that it was
trained on, block by block: each block sees what the packed blocks before it give. One block is unpacked at a time.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from fsdp_utils.data.tokens import training_samples
from fsdp_utils.export.trained import TrainedWeights
from fsdp_utils.folders.describe import Run
from fsdp_utils.inference.load import load_for_inference
from fsdp_utils.model.calibrate import grams, record, through
from methods.adapter import Pair
from methods.targets import decoder_blocks

DAMPING = 0.01  # of the mean of the diagonal: inputs that hardly occur are not worth much
COLUMNS = 128  # that are rounded before the rest hears of their errors

Tensor = torch.Tensor


class Grid(Protocol):
    """The values that the weights of a linear can have: fixed before the first is rounded."""

    def nearest(self, column: Tensor, place: int) -> Tensor:
        """The value on the grid next to each weight fp32 `[out]` of input number `place`."""


class Rounded(NamedTuple):
    """What is stored of a linear.

    Args:
        values: fp32 `[out, in]`, on the grid or to be put there by `grid.codes`.
        low_rank: A `[r, in]` and B `[out, r]`, fp32, whose product is added in the server; None without an adapter.
    """

    values: Tensor
    grid: Grid
    low_rank: Pair | None = None

    def whole(self) -> Tensor:
        """The weight that the server computes with, fp32 `[out, in]`."""
        return self.values if self.low_rank is None else self.values + self.low_rank.b @ self.low_rank.a


def round_together(weight: Tensor, grid: Grid, hessian: Tensor) -> Tensor:
    """Values on the grid for which `|(W - found) X|` is small, fp32 `[out, in]`.

    Args:
        weight: fp32 `[out, in]`.
        hessian: `X X^T` of the inputs, fp32 `[in, in]`.
    """
    order = hessian.diagonal().argsort(descending=True)  # the dearest first: the others can still make up for them
    left, found = weight[:, order], torch.empty_like(weight)
    spread = _upper_of_inverse(hessian[order][:, order])
    for start in range(0, len(order), COLUMNS):
        stop = min(start + COLUMNS, len(order))
        errors = torch.empty_like(left[:, start:stop])
        for i in range(start, stop):
            column, place = left[:, i], order[i].item()
            found[:, place] = grid.nearest(column, place)
            errors[:, i - start] = (column - found[:, place]) / spread[i, i]
            left[:, i + 1 : stop] -= errors[:, i - start, None] * spread[i, i + 1 : stop]
        left[:, stop:] -= errors @ spread[start:stop, stop:]
    return found


def _upper_of_inverse(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped inverse, fp32 `[in, in]`."""
    damped = hessian.double()
    diagonal = damped.diagonal()
    diagonal += DAMPING * diagonal.mean() + (diagonal == 0)  # an input that is always zero costs nothing
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()


def training_rows(run: Run, tokenizer, *, samples: int) -> list[Tensor]:
    """Ids `[tokens]` of the first samples that the run was trained on."""
    data = training_samples(run.config, tokenizer)
    return [torch.tensor(ids) for ids in data.dataset[: min(samples, len(data))]["input_ids"]]


def trained_model(run: Run, *, device: torch.device) -> nn.Module:
    """The model of a run, each linear of which is called as a module: `Calibrated` looks at what they are given."""
    return load_for_inference(replace(run, config=replace(run.config, fused_kernels=False)), device=device)


class Calibrated:
    """The weights of packed linears, rounded together; asked for in the order of the model.

    Args:
        model: the trained one in eval mode, on `trained`'s device; its blocks are used up.
        rows: ids `[tokens]` of samples.
        packed: paths of the linears to round.
        solve: from a linear's path and `X X^T` of its inputs, fp32 `[in, in]`, to what is stored.
    """

    def __init__(
        self,
        trained: TrainedWeights,
        model: nn.Module,
        rows: Iterable[Tensor],
        *,
        packed: set[str],
        solve: Callable[[str, Tensor], Rounded],
    ):
        self.trained, self.packed, self.solve, self.ready = trained, packed, solve, {}
        self.blocks = list(zip(trained.block_paths, decoder_blocks(model).values(), strict=True))
        run = lambda ids: model(input_ids=ids.to(trained.device), use_cache=False)
        self.samples = record(run, [block for _, block in self.blocks], rows)
        self.states, self.done = [sample.pop("state") for sample in self.samples], 0

    def __call__(self, path: str) -> Rounded:
        """What is stored of a linear; once for each."""
        while path not in self.ready:
            self._next_block()
        return self.ready.pop(path)

    @torch.no_grad()
    def _next_block(self) -> None:
        """Rounds all linears of a block, and lets the samples through it."""
        number, (prefix, block) = self.done, self.blocks[self.done]
        linears = {
            path: block.get_submodule(path.removeprefix(f"{prefix}."))
            for path in self.trained.in_blocks
            if path.startswith(f"{prefix}.") and path in self.packed
        }
        for path, module in linears.items():  # merged: no pass has to dequantize again
            self._replace(path, module, self.trained.merged(path))
        for path, hessian in self._hessians(number, linears).items():
            self.ready[path] = self.solve(path, hessian)
            self._replace(path, linears[path], self.ready[path].whole())
        self.states = [self._through(number, sample) for sample in range(len(self.samples))]
        self.blocks[number], self.done = (prefix, None), number + 1

    def _through(self, number: int, sample: int) -> Tensor:
        """What a block makes of a sample's state."""
        block, given = self.blocks[number][1], self.samples[sample][number]
        return through(block, self.states[sample], given, device=self.trained.device)

    def _hessians(self, number: int, linears: dict[str, nn.Module]) -> dict[str, Tensor]:
        """`X X^T` of each linear's inputs over all samples, fp32 `[in, in]`."""
        with grams(linears, device=self.trained.device) as sums:
            for sample in range(len(self.samples)):
                self._through(number, sample)
        return sums

    def _replace(self, path: str, module: nn.Module, weight: Tensor) -> None:
        """Makes a linear, whatever stood there, compute with this weight."""
        name, dtype = f"{path}.bias", self.states[0].dtype
        bias = self.trained.tensor(name).to(dtype) if name in self.trained.shapes else None
        module.forward = partial(F.linear, weight=weight.to(dtype), bias=bias)
