"""The causal-language-model loss: the summed cross entropy of the places that predict."""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from fsdp_utils.data.batches import model_inputs
from fsdp_utils.sharding.fsdp import leave_out_of_backward
from methods.kernels.cross_entropy import linear_cross_entropy
from methods.quantizers.linear import compute_dtype, dense_weight


class _LossHead:
    """The head, which computes the loss where the model calls it: only there FSDP2 holds its whole weight, and only so
    the model's own forward, which differs between families, is left as it is."""

    def __init__(self, head: nn.Linear):
        self.head, self.plain = head, head.forward
        self.positions = self.targets = self.loss = None
        head.forward = self.forward
        leave_out_of_backward(head)  # the loss has its gradient by then

    @contextmanager
    def asked(self, batch: dict[str, torch.Tensor]):
        """While it lasts, the head returns the loss of this batch in place of logits, and keeps it."""
        self.positions, self.targets = batch["positions"], batch["targets"]
        try:
            yield
        finally:
            self.positions = self.targets = self.loss = None  # the loss holds the graph of the whole forward pass

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[b, L, h]` to logits, or to the loss, shaped like logits: `[1, 1, 1]`."""
        if self.targets is None:
            return self.plain(hidden)
        dtype = compute_dtype(hidden)
        chosen = hidden.flatten(0, 1)[self.positions].to(dtype)
        bias = None if self.head.bias is None else self.head.bias.to(dtype)
        loss = linear_cross_entropy(chosen, dense_weight(self.head, dtype=dtype), bias, self.targets)
        self.loss = loss * loss.new_ones(1, 1, 1)  # not a view, which FSDP2's hooks forbid
        return self.loss


class CausalLMLoss:
    """Sums the cross entropies of a micro-batch; fp32 scalar.

    Args:
        fused: the head computes the loss, and whole logits never exist. Not for families that change their logits after
            the head (capping, scaling): `memory.activations` finds them out.
        sharing: what attention is told where processes share rows: `model.attention.shared_attention`.
    """

    def __init__(self, model: nn.Module, *, fused: bool, **sharing):
        self.model, self.sharing = model, sharing
        self.head = _LossHead(model.get_output_embeddings()) if fused else None

    def inputs(self, batch: dict[str, torch.Tensor]) -> dict:
        """What the model is called with."""
        # use_cache=True would make transformers ignore the sequence boundaries in position_ids
        return dict(**model_inputs(batch), **self.sharing, use_cache=False)

    def __call__(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        inputs = self.inputs(batch)
        if self.head is None:
            logits = self.model(**inputs).logits.flatten(0, 1)  # [b*L, vocabulary]
            return F.cross_entropy(logits[batch["positions"]].float(), batch["targets"], reduction="sum")
        with self.head.asked(batch):
            out = self.model(**inputs).logits
            if out is not self.head.loss:  # what it was changed to is no loss
                raise RuntimeError(f"{type(self.model).__name__} changes what its head returns: the loss is not fused")
            return out.sum()
