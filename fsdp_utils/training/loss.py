"""The causal-language-model loss: the summed cross entropy of the places that predict."""

from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn

from fsdp_utils.core.errors import UserError, first_line
from fsdp_utils.data.batches import model_inputs, with_targets
from fsdp_utils.sharding.fsdp import leave_out_of_backward
from methods.kernels.cross_entropy import linear_cross_entropy
from methods.quantizers.linear import compute_dtype, dense_weight


@torch.no_grad()
def check_packing(model: nn.Module, *, device: torch.device, autocast: torch.dtype | None) -> None:
    """Runs two rows of two samples that differ in the first: some families (OPT, Bloom, Falcon) attend across samples,
    whatever `position_ids` say.

    Raises:
        UserError: the second sample's logits depend on the first.
    """
    length, vocabulary = 8, model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (2, 2 * length), generator=torch.Generator().manual_seed(0))
    ids[1, length:] = ids[0, length:]
    places = torch.arange(length).repeat(2).expand(2, -1)
    batch = with_targets(dict(input_ids=ids, labels=ids, position_ids=places))
    inputs = model_inputs({name: tensor.to(device) for name, tensor in batch.items()})
    eager = torch.compiler.set_stance("force_eager")  # two short rows are not worth compiling for
    with eager, torch.autocast(device.type, autocast) if autocast else nullcontext():
        try:
            one, other = model.eval()(**inputs, use_cache=False).logits[:, length:].float()
        except (
            ImportError,
            ValueError,
        ) as error:  # a state-space layer that needs another kernel to keep samples apart
            raise UserError(f"--packing true: {first_line(error)}; or pass --packing false") from None
    if (one - other).norm() > 1e-2 * one.norm():
        kind = model.config.model_type
        raise UserError(f"--packing true: samples in one row see each other in {kind} models; pass --packing false")


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
    """

    def __init__(self, model: nn.Module, *, fused: bool):
        self.model = model
        self.head = _LossHead(model.get_output_embeddings()) if fused else None

    def inputs(self, batch: dict[str, torch.Tensor]) -> dict:
        """What the model is called with."""
        # use_cache=True would make transformers ignore the sequence boundaries in position_ids
        return dict(**model_inputs(batch), use_cache=False)

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
