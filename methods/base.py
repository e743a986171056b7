"""What a method is: it prepares the model on meta, fills what it added, and says which parameters train.

Freezing, the optimizer and saving derive from that one answer (`requires_grad`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import torch
from torch import nn

from methods.packed import Quantizer
from methods.targets import weights_in_blocks


class Seen(NamedTuple):
    """A linear of the dense model, and what samples gave it.

    Args:
        weight: `[out, in]`, as it is in the checkpoint; gram: `X X^T` of its inputs, fp32 `[in, in]`.
    """

    path: str
    weight: torch.Tensor
    gram: torch.Tensor


class Method(ABC):
    """One way to train a model. `saves` is "adapter" (PEFT folder) or "model" (Hugging Face folder)."""

    saves: str

    def __init__(self, config):
        self.config = config
        self.whole: list[str] = []

    def to_quantize(self, model: nn.Module, quantizer_for: Callable[[str], Quantizer]) -> dict[str, Quantizer]:
        """Path of each module whose weight is packed, and how.

        Args:
            quantizer_for: says how the module at a path is stored, if it is packed at all.
        """
        return {path: quantizer_for(path) for path in [*self.packed_in_blocks(model), *self._packed_ends(model)]}

    def packed_in_blocks(self, model: nn.Module) -> list[str]:
        """Paths of the linears and of the stacks of experts in decoder blocks whose weights are packed."""
        return weights_in_blocks(model)

    def _packed_ends(self, model: nn.Module) -> list[str]:
        """Paths of embedding and head, if the user wants them packed too."""
        if not self.config.quantize_lm_head:
            return []
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        return [path for path, module in model.named_modules() if module in ends]

    @abstractmethod
    def attach(self, model: nn.Module, *, dtype: torch.dtype) -> None:
        """Wraps or marks modules of a frozen model on meta; sets requires_grad on what trains.

        Args:
            dtype: of the new trainable parameters.
        """

    def train_whole(self, model: nn.Module, paths: list[str]) -> None:
        """Trains the modules at these paths in full beside what the method trains: the head of a task."""
        self.whole = paths
        for path in paths:
            model.get_submodule(path).requires_grad_(True)

    @property
    def base_recipe(self) -> str:
        """What tells the base that `base_rows` stores from any other of this checkpoint; empty where it is the
        checkpoint's own. Known after `before_loading`."""
        return ""

    def before_loading(self, read_whole: Callable[[str], torch.Tensor], *, device: torch.device) -> None:
        """Works out what `base_rows` needs. Collective.

        Args:
            read_whole: the weight `[out, in]` of the linear at a path, as it is in the checkpoint.
        """

    def calibrate(self, model: nn.Module, see: Callable[[Collection[str]], Iterator[list[Seen]]]) -> None:
        """Works out what depends on samples. Collective; `model` has no values yet.

        Args:
            see: runs the dense model on samples, block by block, and gives what the linears at these paths see.
        """

    def base_rows(self, path: str, rows: torch.Tensor, *, start: int) -> torch.Tensor:
        """What is stored, packed or not, of rows `[start, start + n)` of the linear at `path`, `[n, in]`: the rows
        themselves, unless a method moves a part of the weight elsewhere. In any float dtype."""
        return rows

    def kept(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """By their names in the model: frozen parameters that change in training, so that checkpoints hold them."""
        return {}

    def initialize(self, model: nn.Module, *, device: torch.device) -> None:
        """Fills the parameters that `attach` added, once the base is loaded and sharded."""

    def after_step(self, model: nn.Module, *, device: torch.device) -> None:
        """Refreshes what depends on trained parameters, once per optimizer step."""
