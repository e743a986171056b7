"""DoRA (arXiv:2402.09353) around any base linear: trained row magnitudes on top of LoRA.

    V = W + alpha/r * B A      n = row norms of V (no gradient)      y = m / n * (V x) + bias

The magnitude is kept as `m = weight_norm + magnitude_delta`. The delta starts at zero, so small steps are not rounded
away in bf16 as they would be beside a norm near one, and weight decay pulls towards the base instead of towards zero.
`n` changes only when the optimizer steps; it is refreshed then, each process for its own rows.
"""

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fsdp_utils.core.rows import fill, gather_each, local
from methods.kernels import norms, swiglu
from methods.lora import LoRA, LoRALinear
from methods.quantizers.linear import QuantizedLinear, weight_rows

STREAMS = 2  # for the refresh of norms; each may hold a dequantized weight


class DoRALinear(LoRALinear):
    """A LoRA layer with a magnitude per output row. `weight_norm` and `adapted_norm` are frozen fp32 `[out]`."""

    own_parameters = ("lora_A", "lora_B", "magnitude_delta", "weight_norm", "adapted_norm")

    def __init__(self, base, *, dtype, **settings):
        super().__init__(base, dtype=dtype, **settings)
        new = lambda dtype: torch.empty(self.out_features, dtype=dtype, device="meta")
        self.magnitude_delta = nn.Parameter(new(dtype))
        self.weight_norm = nn.Parameter(new(torch.float32), requires_grad=False)
        self.adapted_norm = nn.Parameter(new(torch.float32), requires_grad=False)

    def row_factor(self) -> torch.Tensor:
        """`m / n`, fp32 `[out]`; a row of zeros gives a finite value (peft#2049)."""
        magnitude = self.weight_norm + self.magnitude_delta.float()
        return magnitude / self.adapted_norm.clamp_min(torch.finfo(torch.float32).tiny)

    def adapter_tensors(self):
        magnitude = self.weight_norm.detach() + self.magnitude_delta.detach().float()
        return {**super().adapter_tensors(), "lora_magnitude_vector": magnitude}


def row_norms_dense(weight, lora_a, lora_b, scaling) -> torch.Tensor:
    """`||W + s B A||` of each row, fp32 `[n]`, from the product itself: the reference for `row_norms`."""
    return (weight.float() + scaling * (lora_b.float() @ lora_a.float())).norm(dim=1)


def row_norms(weight, weight_norm, lora_a, lora_b, scaling) -> torch.Tensor:
    """`||W + s B A||` of each row, fp32 `[n]`, without building `B A`.

    n^2 = ||W||^2 + 2 s rowsum((W A^T) * B) + s^2 rowsum((B (A A^T)) * B)

    Args:
        weight: `[n, in]`; weight_norm: fp32 `[n]`; lora_a: `[r, in]`; lora_b: `[n, r]`.
    """
    if weight.dtype == lora_a.dtype == torch.bfloat16 and norms.fits(weight, rank=len(lora_a)):
        wide = dict(out_dtype=torch.float32)  # sums stay in fp32
        cross, gram = torch.mm(weight, lora_a.T, **wide), torch.mm(lora_a, lora_a.T, **wide)
        return norms.finish(weight_norm, (cross * lora_b).sum(1)[None], gram[None], lora_b, scaling)
    cross = (weight @ lora_a.to(weight.dtype).T).float()  # [n, r]
    a, b = lora_a.float(), lora_b.float()
    low_rank = ((b @ (a @ a.T)) * b).sum(1)
    squared = weight_norm.square() + 2 * scaling * (cross * b).sum(1) + scaling**2 * low_rank
    return squared.clamp_min(0).sqrt()


def refreshed_norms(layer: DoRALinear, lora_a: torch.Tensor, *, device: torch.device) -> torch.Tensor:
    """`row_norms` of this process's rows of a layer, in the fastest way that its quantizer offers."""
    norm, b = local(layer.weight_norm).to(device), local(layer.lora_B).to(device)
    base, small = layer.base_layer, (norm, lora_a, b, layer.scaling)
    if isinstance(base, QuantizedLinear) and hasattr(base.quantizer, "row_norms"):
        packed = tuple(local(p).to(device) for p in base.packed())
        found = base.quantizer.row_norms(packed, *small)
        if found is not None:
            return found
    return row_norms(weight_rows(base, local, dtype=layer.lora_A.dtype, device=device), *small)


class DoRA(LoRA):
    """Wraps every target in a `DoRALinear`."""

    layer = DoRALinear

    def __init__(self, config):
        super().__init__(config)
        self._adapted, self._wholes, self._graph = None, None, None

    def attach(self, model, *, dtype):
        super().attach(model, dtype=dtype)
        # a bias is no part of the output that the magnitude's gradient is summed from
        swiglu.join(model, lambda m: isinstance(m, DoRALinear) and m.fused and m.base_layer.bias is None)

    @torch.no_grad()
    def initialize(self, model, *, device):
        super().initialize(model, device=device)
        for layer in self.layers(model).values():
            # of the weight that forward uses: the 2024 script took the unquantized one and started off the base
            weight = weight_rows(layer.base_layer, local, dtype=layer.lora_A.dtype, device=device)
            norm = weight.float().norm(dim=1)
            fill(layer.magnitude_delta, torch.zeros(layer.out_features))
            local(layer.weight_norm).copy_(norm)
            local(layer.adapted_norm).copy_(norm)

    @torch.no_grad()
    def after_step(self, model, *, device):
        first = self._adapted is None
        if first:  # walking the modules at every step costs the host milliseconds
            self._adapted = list(self.layers(model).values())
        lora_a = [layer.lora_A for layer in self._adapted]
        wholes = gather_each(lora_a, device=device)
        if first or local(lora_a[0]).device.type != "cuda":
            self._refresh(self._adapted, wholes, device=device)
            return
        # rows on a GPU stay where they are: from the second step on, a thousand launches become one
        wholes = list(wholes)
        if self._graph is None:
            self._graph, self._wholes = torch.cuda.CUDAGraph(), wholes
            with torch.cuda.graph(self._graph):
                self._refresh_on_streams(wholes, device=device)
        elif isinstance(lora_a[0], DTensor):
            torch._foreach_copy_(self._wholes, wholes)
        self._graph.replay()

    def _refresh_on_streams(self, wholes, *, device) -> None:
        """`_refresh`, some layers beside the others: most of their kernels are too small for a GPU."""
        streams = [torch.cuda.Stream() for _ in range(STREAMS)]
        for first, stream in enumerate(streams):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._refresh(self._adapted[first::STREAMS], wholes[first::STREAMS], device=device)
        for stream in streams:
            torch.cuda.current_stream().wait_stream(stream)

    @staticmethod
    def _refresh(layers, wholes, *, device) -> None:
        """Recomputes the norms of the adapted weight, this process's rows of each layer, of which A is given whole."""
        for layer, lora_a in zip(layers, wholes, strict=True):
            local(layer.adapted_norm).copy_(refreshed_norms(layer, lora_a, device=device))
