"""What every task has."""

from abc import ABC
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForMaskedLM

from fsdp_utils.core.errors import UserError
from fsdp_utils.core.ranks import say
from fsdp_utils.data.batches import IGNORED
from fsdp_utils.data.labels import Labels


def is_encoder(model_config) -> bool:
    """Whether a model of this configuration sees its whole text at once."""
    decodes = getattr(model_config, "is_decoder", False)
    return type(model_config) in AutoModelForMaskedLM._model_mapping and not decodes


def goes_on(model_config) -> bool:
    """Whether the architecture of a configuration is one that writes on where a text ends."""
    return any("CausalLM" in name or "LMHead" in name for name in model_config.architectures or [])


@dataclass(frozen=True)
class Task(ABC):
    """What a model is for.

    Args:
        labels: what rows are classified as; None in other tasks, and before the data are read.
        pad: id that rows are padded with, where a model knows padding by it.

    Attributes:
        name: key of `options.TASKS`.
        auto_class: transformers' class that builds the model.
        noun: how messages call such a model.
        peft_type: PEFT's name of the task.
        coder: class that makes ids of rows (`data.coded`).
        loss: of a model, makes the function from a micro-batch to its summed loss.
        causal: every token sees those before it and no padding, so that attention needs no mask.
        writes: whether a model of it generates text.
        forbidden: flags that must be off, and what to say of each.
        idle: flags without effect, and why.
    """

    labels: Labels | None = None
    pad: int | None = None

    name: ClassVar[str]
    auto_class: ClassVar[type]
    noun: ClassVar[str]
    peft_type: ClassVar[str]
    coder: ClassVar[type]
    loss: ClassVar[Callable]
    causal: ClassVar[bool] = False
    writes: ClassVar[bool] = True
    forbidden: ClassVar[dict[str, str]] = {}
    idle: ClassVar[dict[str, str]] = {}

    def check(self, config, model_config) -> None:
        """Says which flags have no effect here. Raises UserError for those that mean nothing."""
        if config.method == "llama_pro" and not self.can_expand(model_config):
            raise UserError(
                f"--train_type {config.train_type}: new blocks are added to decoders, and {model_config.model_type} "
                "models have an encoder; choose another"
            )
        if config.context_parallel > 1 and not self.causal:
            given = f"--context_parallel {config.context_parallel}"
            raise UserError(f"{given}: --task {self.name} needs whole rows; pass 1")
        for flag, why in self.forbidden.items():
            if getattr(config, flag):
                raise UserError(f"--{flag} {str(getattr(config, flag)).lower()}: {why}")
        for flag, why in self.idle.items():
            if flag in config.explicit_flags:
                say(f"note: --{flag} has no effect: {why}")

    def coder_for(self, model_config) -> type:
        """`coder`, or that of a model which takes not all rows."""
        return self.coder

    def can_expand(self, model_config) -> bool:
        """Whether a model of this configuration can have new blocks (Llama-Pro)."""
        return True

    def shown(self, row: dict) -> tuple[np.ndarray, np.ndarray, str]:
        """A sample for the eye: its ids and which are learned, `[tokens]`, and what else is learned of it."""
        return np.asarray(row["input_ids"]), np.asarray(row["labels"]) != IGNORED, ""

    def given(self, labels: Labels | None, tokenizer, model_config) -> "Task":
        """This task when data, tokenizer and model are known."""
        return replace(self, labels=labels)

    def takes(self, model_config) -> bool:
        """Whether transformers has a class of this task for a model."""
        return type(model_config) in self.auto_class._model_mapping

    def adapt(self, model_config) -> None:
        """Writes into the configuration what the task decides."""

    def assumed(self, model_config) -> list[str]:
        """What a plan without data takes for granted of a model, in lines."""
        return []

    def described(self, model_config) -> dict:
        """What config.json of a result says besides what its base's says."""
        return {}

    def record(self) -> dict:
        """What run.json keeps, for `of_record`."""
        return dict(name=self.name, labels=self.labels and asdict(self.labels), pad=self.pad)

    @classmethod
    def of_record(cls, record: dict) -> "Task":
        """The task that `record` tells."""
        labels = record["labels"]
        return cls(labels and Labels(labels["problem"], tuple(labels["names"])), record["pad"])

    def known_labels(self, model_config) -> Labels | None:
        """The labels of the head that a model has."""
        return None

    def is_new(self, name: str, *, prefix: str) -> bool:
        """Whether a parameter may be missing in a checkpoint, and then begins as its class begins it.

        Args:
            prefix: of the parameters that models of all tasks have.
        """
        return False

    def is_dropped(self, name: str, *, prefix: str) -> bool:
        """Whether a tensor of a checkpoint is another task's."""
        return False

    def trained_whole(self, model: nn.Module, new: list[str]) -> list[str]:
        """Paths of the modules that train in full beside adapters.

        Args:
            new: names of parameters that the checkpoint lacks.
        """
        return []

    def pad_token_id(self, tokenizer, model_config, *, largest: int) -> int:
        """What rows are padded with.

        Args:
            largest: id of the data.
        """
        raise NotImplementedError

    def collate(self, rows: list, **shape) -> dict[str, torch.Tensor]:
        """Samples to a micro-batch, which has `input_ids` and `targets`; arguments as of `data.batches.collate`."""
        raise NotImplementedError

    def predictions(self, model: nn.Module, *sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the model says of one sample, and what was wanted.

        Args:
            sample: its columns, as the coder names them.

        Returns:
            Log-probabilities, fp32 `[n, choices]`, where something is asked for, and what, int64 `[n]`.
        """
        raise NotImplementedError

    def metrics(self, sums: torch.Tensor) -> dict:
        """What a validation logs beside the loss; pairs are intervals of 95 %.

        Args:
            sums: fp64 `[n]`, over all samples: what `look` of the loss gives beside the summed loss, if it has that.
        """
        return {}

    def measured(self, embedded: torch.Tensor, *, packing: bool) -> dict:
        """What the model is called with to measure what it keeps.

        Args:
            embedded: `[rows, tokens, hidden size]` in place of token ids.
        """
        raise NotImplementedError
