"""The causal-language-model loss: which tokens count, and their summed cross entropy."""

from contextlib import nullcontext
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from fsdp_utils.core.errors import UserError
from fsdp_utils.model.attention import boundaries
from fsdp_utils.sharding.fsdp import gather_in_backward
from methods.kernels.cross_entropy import linear_cross_entropy
from methods.quantizers.linear import compute_dtype, dense_weight

IGNORED = -100


def _shifted(labels: torch.Tensor) -> torch.Tensor:
    """What each place predicts, flat; the last token of a row predicts nothing."""
    return F.pad(labels, (0, 1), value=IGNORED)[:, 1:].flatten()


def label_tokens(batch: dict[str, torch.Tensor]) -> int:
    """How many places of a batch are in the loss."""
    return int((_shifted(batch["labels"]) != IGNORED).sum())


def with_targets(batch: dict[str, torch.Tensor], *, multiple: int = 1) -> dict[str, torch.Tensor]:
    """Replaces `labels` `[b, L]` by `positions` and `targets` `[n]`: the flat places that predict, and what.

    Runs on the CPU, before the batch moves: finding the places on a GPU would make the host wait for it. A causal model
    needs no attention mask for padding on the right, and without one attention takes its fast kernels.

    Args:
        multiple: n is brought to a multiple of it by places that predict nothing, so that few shapes occur.
    """
    shifted = _shifted(batch["labels"])
    positions = (shifted != IGNORED).nonzero()[:, 0]
    inputs = {name: t for name, t in batch.items() if name not in ("labels", "attention_mask")}
    if "position_ids" in batch:
        inputs["cu_seq_lens_q"] = boundaries(batch["position_ids"])
    missing = -len(positions) % multiple
    targets = F.pad(shifted[positions], (0, missing), value=IGNORED)
    return {**inputs, "positions": F.pad(positions, (0, missing)), "targets": targets}


def model_inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | int]:
    """What of a batch from `with_targets` the model is called with."""
    inputs = {name: t for name, t in batch.items() if name not in ("positions", "targets")}
    if "cu_seq_lens_q" in inputs:
        # the row length bounds every sample; the true maximum would differ from batch to batch and recompile
        length = inputs["input_ids"].shape[1]
        inputs.update(cu_seq_lens_k=inputs["cu_seq_lens_q"], max_length_q=length, max_length_k=length)
    return inputs


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
        one, other = model.eval()(**inputs, use_cache=False).logits[:, length:].float()
    if (one - other).norm() > 1e-2 * one.norm():
        kind = model.config.model_type
        raise UserError(f"--packing true: samples in one row see each other in {kind} models; pass --packing false")


class CausalLMLoss:
    """Sums the cross entropies of a batch from `with_targets`; fp32 scalar.

    With `fused`, the head computes the loss itself where the model calls it: there FSDP2 holds its whole weight.
    """

    def __init__(self, model: nn.Module, *, fused: bool):
        self.model, self.fused = model, fused
        self.pending = SimpleNamespace(positions=None, targets=None, loss=None)
        if fused:
            self._install(model.get_output_embeddings())

    def _install(self, head: nn.Linear) -> None:
        plain, pending = head.forward, self.pending
        gather_in_backward(head, False)  # the loss has its gradient by then

        def forward(hidden):  # [b, L, h]
            if pending.targets is None:
                return plain(hidden)
            dtype = compute_dtype(hidden)
            chosen = hidden.flatten(0, 1)[pending.positions].to(dtype)
            bias = None if head.bias is None else head.bias.to(dtype)
            loss = linear_cross_entropy(chosen, dense_weight(head, dtype=dtype), bias, pending.targets)
            pending.loss = loss * loss.new_ones(1, 1, 1)  # shaped like logits; not a view, which FSDP2's hooks forbid
            return pending.loss

        head.forward = forward

    def __call__(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        inputs = model_inputs(batch)
        if self.fused:
            self.pending.positions, self.pending.targets = batch["positions"], batch["targets"]
            try:
                out = self.model(**inputs, use_cache=False).logits
            finally:
                self.pending.positions = self.pending.targets = None
            if out is self.pending.loss:
                self.pending.loss = None
                return out.sum()
            self.pending.loss = None  # it holds the graph of the whole forward pass
            self.fused = False  # this family changes its logits after the head (capping, scaling)
            gather_in_backward(self.model.get_output_embeddings(), True)
        # use_cache=True would make transformers ignore the sequence boundaries in position_ids
        logits = self.model(**inputs, use_cache=False).logits.flatten(0, 1)  # [b*L, vocabulary]
        return F.cross_entropy(logits[batch["positions"]].float(), batch["targets"], reduction="sum")
