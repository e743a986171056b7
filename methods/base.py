"""What a method is: it prepares the model on meta, fills what it added, and says which parameters train.

Freezing, the optimizer, saving and resuming derive from that one answer (`requires_grad`).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import nn

from methods.targets import block_linears


class Method(ABC):
    """One way to train a model. `saves` is "adapter" (PEFT folder) or "model" (Hugging Face folder)."""

    saves: str

    def __init__(self, config):
        self.config = config

    def to_quantize(self, model: nn.Module) -> list[str]:
        """Paths of the modules whose weights the quantizer packs."""
        return list(block_linears(model)) + self.head_to_quantize(model)

    def head_to_quantize(self, model: nn.Module) -> list[str]:
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

    def initialize(self, model: nn.Module, *, device: torch.device) -> None:
        """Fills the parameters that `attach` added, once the base is loaded and sharded."""

    def after_step(self, model: nn.Module, *, device: torch.device) -> None:
        """Refreshes what depends on trained parameters, once per optimizer step."""

    def adapter_tensors(self, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """What an adapter folder holds: `<module path>.<PEFT suffix>` and the (sharded) tensor."""
        raise TypeError(f"{type(self).__name__} saves a model, not an adapter")
