"""What a model is for: the one object that knows it is a causal language model that is trained."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from fsdp_utils.data.batches import IGNORED, collate
from fsdp_utils.training.loss import CausalLMLoss


@dataclass(frozen=True)
class CausalLM:
    """Every token is predicted from those before it.

    Attributes:
        auto_class: transformers' class that builds the model.
        noun: how messages call such a model.
        peft_type: PEFT's name of the task.
        collate: samples of token ids and labels to a micro-batch: `data.batches.collate`.
        loss: of a model, makes the function from a micro-batch to its summed loss.
    """

    auto_class = AutoModelForCausalLM
    noun = "causal language model"
    peft_type = "CAUSAL_LM"
    collate = staticmethod(collate)
    loss = CausalLMLoss

    @staticmethod
    def predictions(model: nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the model says of one sample, and what was wanted.

        Args:
            ids, labels: `[tokens]`; -100 where no token is asked for.

        Returns:
            Log-probabilities, fp32 `[n, vocabulary]`, where a label asks for them, and the labels `[n]`.
        """
        logits = model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0, :-1]  # [tokens - 1, vocabulary]
        asked = labels[1:] != IGNORED
        return logits[asked].float().log_softmax(-1), labels[1:][asked]


CAUSAL_LM = CausalLM()
