"""Dropout whose mask is a hash of the layer's seed and the element's place.

Nothing is drawn inside the model, so what is dropped depends on neither the device, the compiler nor the order in which
kernels run: PyTorch's compiled dropout was seen to differ between two starts of a command. Recomputation and backward
find the mask again from the seed, and CUDA graphs can be replayed with another seed.
"""

import torch
from torch import nn

from methods.kernels.rounding import scramble_

Tensor = torch.Tensor


def kept(x: Tensor, rate: float, seed: Tensor, first: Tensor | None = None) -> Tensor:
    """Which elements of `x` stay, bool, each dropped with probability `rate`.

    Args:
        seed: int32 scalar on any device.
        first: likewise, the row of the whole that `x` begins with; None: it is the whole.
    """
    columns = x.shape[-1] if x.dim() else 1
    rows = torch.arange(x.numel() // columns, dtype=torch.int32, device=x.device)
    row = scramble_((rows if first is None else rows + first) ^ seed)
    column = scramble_(torch.arange(columns, dtype=torch.int32, device=x.device) ^ ~seed)
    bits = scramble_(row.unsqueeze(1) + column)
    return (bits >= round(rate * 2**32) - 2**31).view(x.shape)


class SeededDropout(nn.Dropout):
    """`nn.Dropout` with the mask of `kept`. `seed` is this layer's, see `DropoutSeeds`; `first` as there."""

    def __init__(self, rate: float):
        super().__init__(rate)
        self.seed, self.first = torch.zeros((), dtype=torch.int32, device="cpu"), None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not x.numel():
            return x
        return torch.where(kept(x, self.p, self.seed, self.first), x * (1 / (1 - self.p)), 0)


def seed_dropout(model: nn.Module) -> None:
    """Replaces every dropout layer of the model; what a family drops by a function stays."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout and 0 < child.p < 1:
                setattr(module, name, SeededDropout(child.p))


class DropoutSeeds:
    """The seeds of all dropout layers of a model, one tensor: `draw` takes new ones from the device's generator."""

    def __init__(self, model: nn.Module, *, device: torch.device):
        layers = [module for module in model.modules() if isinstance(module, SeededDropout)]
        self.seeds = torch.zeros(len(layers), dtype=torch.int32, device=device)
        for layer, seed in zip(layers, self.seeds, strict=True):
            layer.seed = seed

    def draw(self) -> None:
        """For the next micro-batch: its forward pass, and what backward runs again."""
        if self.seeds.numel():
            self.seeds.random_()
