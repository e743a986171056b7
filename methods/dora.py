"""DoRA (arXiv:2402.09353) around any base linear: trained row magnitudes on top of LoRA.

    V = W + s B A      n = row norms of V (no gradient)      y = m / n * (V x) + bias

The magnitude is kept as `m = initial_magnitude + magnitude_delta`. The delta starts at zero, so small steps are not
rounded away in bf16 as they would be beside a norm near one, and weight decay pulls towards the start instead of zero.
`n` changes only when the optimizer steps; it is refreshed then, each process for its own rows.
"""

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fsdp_utils.core.rows import gather_each, local, row_range
from methods.adapter import MAGNITUDE, Stored
from methods.kernels import norms, swiglu
from methods.lora import LoRA, LoRALinear
from methods.quantizers.linear import QuantizedLinear, weight_rows

STREAMS = 2  # for the refresh of norms; each may hold a dequantized weight


class DoRALinear(LoRALinear):
    """A LoRA layer with a magnitude per output row. `weight_norm`, of W, `adapted_norm`, of V, and
    `initial_magnitude`, of V at the start, are frozen fp32 `[out]`."""

    own_parameters = ("lora_A", "lora_B", "magnitude_delta", "initial_magnitude", "weight_norm", "adapted_norm")

    def __init__(self, base, *, dtype, **settings):
        super().__init__(base, dtype=dtype, **settings)
        new = lambda dtype, trains: nn.Parameter(torch.empty(self.out_features, dtype=dtype, device="meta"), trains)
        self.magnitude_delta = new(dtype, True)
        self.initial_magnitude, self.weight_norm, self.adapted_norm = (new(torch.float32, False) for _ in range(3))

    def magnitude(self) -> torch.Tensor:
        """m, fp32 `[out]`."""
        return self.initial_magnitude + self.magnitude_delta.float()

    def row_factor(self) -> torch.Tensor:
        return divided(self.magnitude(), self.adapted_norm)


def divided(magnitude: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """`m / n`, fp32 `[out]`; a row of zeros gives a finite value (peft#2049)."""
    return magnitude / norm.clamp_min(torch.finfo(torch.float32).tiny)


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
        product = (cross * lora_b).sum(1)
        return norms.finish(weight_norm, product=product[None], gram=gram[None], lora_b=lora_b, scaling=scaling)
    cross = (weight @ lora_a.to(weight.dtype).T).float()  # [n, r]
    a, b = lora_a.float(), lora_b.float()
    low_rank = ((b @ (a @ a.T)) * b).sum(1)
    squared = weight_norm.square() + 2 * scaling * (cross * b).sum(1) + scaling**2 * low_rank
    return squared.clamp_min(0).sqrt()


def refreshed_norms(layer: DoRALinear, lora_a: torch.Tensor, *, device: torch.device) -> torch.Tensor:
    """`row_norms` of this process's rows of a layer, in the fastest way that its quantizer offers."""
    norm, b = local(layer.weight_norm).to(device), local(layer.lora_B).to(device)
    base, small = layer.base_layer, (norm, lora_a, b, layer.scaling)
    if isinstance(base, QuantizedLinear):
        packed = tuple(local(p).to(device) for p in base.packed())
        found = base.quantizer.row_norms(packed, *small)
        if found is not None:
            return found
    return row_norms(weight_rows(base, local, dtype=layer.lora_A.dtype, device=device), *small)


def refresh(layers: list[DoRALinear], wholes: Iterable[torch.Tensor], *, device: torch.device) -> None:
    """Recomputes the norms of the adapted weight, this process's rows of each layer, of which A is given whole."""
    for layer, lora_a in zip(layers, wholes, strict=True):
        local(layer.adapted_norm).copy_(refreshed_norms(layer, lora_a, device=device))


class NormRefresh:
    """`refresh` of all layers after each optimizer step; on a GPU its thousand launches become one.

    The first call launches them, since kernels are compiled and parameters may move before the first step. The second
    one records them as a CUDA graph, into whose copies of A the later ones write. Rows in host memory are refreshed
    layer by layer: a graph would read them where they are not.
    """

    def __init__(self, layers: list[DoRALinear], *, device: torch.device):
        self.layers, self.device = layers, device  # walking the modules at every step costs the host milliseconds
        self.called, self.graph, self.wholes = False, None, []

    def __call__(self) -> None:
        """Collective."""
        lora_a = [layer.lora_A for layer in self.layers]
        wholes = gather_each(lora_a, device=self.device)
        if not self.called or local(lora_a[0]).device.type != "cuda":
            self.called = True
            refresh(self.layers, wholes, device=self.device)
            return
        wholes = list(wholes)
        if self.graph is None:
            self._record(wholes)
        elif isinstance(lora_a[0], DTensor):  # else they are the parameters themselves
            torch._foreach_copy_(self.wholes, wholes)
        self.graph.replay()

    def _record(self, wholes: list[torch.Tensor]) -> None:
        self.graph, self.wholes = torch.cuda.CUDAGraph(), wholes
        streams = [torch.cuda.Stream() for _ in range(STREAMS)]
        with torch.cuda.graph(self.graph):
            # some layers beside the others: most of their kernels are too small for a GPU
            for first, stream in enumerate(streams):
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    refresh(self.layers[first::STREAMS], wholes[first::STREAMS], device=self.device)
            for stream in streams:
                torch.cuda.current_stream().wait_stream(stream)


class DoRA(LoRA):
    """Wraps every target in a `DoRALinear`."""

    layer = DoRALinear

    def __init__(self, config):
        super().__init__(config)
        self._norms: NormRefresh | None = None

    def attach(self, model, *, dtype):
        super().attach(model, dtype=dtype)
        # a bias is no part of the output that the magnitude's gradient is summed from
        swiglu.join(model, lambda m: isinstance(m, DoRALinear) and m.fused and m.base_layer.bias is None)

    @torch.no_grad()
    def initialize(self, model, *, device):
        super().initialize(model, device=device)
        layers = self.layers(model)
        self._measure(list(layers.values()), device=device)
        for path, layer in layers.items():
            origin, norm = self.start.origin(path, layer), local(layer.adapted_norm)
            local(layer.initial_magnitude).copy_(origin)
            local(layer.magnitude_delta).copy_(norm - origin.to(norm.device))

    def _measure(self, layers: list[DoRALinear], *, device: torch.device) -> None:
        """Norms of a base that was just filled, and with the adapter on it."""
        for layer in layers:
            # of the weight that forward uses: the 2024 script took the unquantized one and started off the base
            weight = weight_rows(layer.base_layer, local, dtype=layer.lora_A.dtype, device=device)
            local(layer.weight_norm).copy_(weight.float().norm(dim=1))
        if self.start.folds:  # the base holds it, and the norms stay those of the last rounding
            for layer in layers:
                local(layer.adapted_norm).copy_(local(layer.weight_norm))
            return
        refresh(layers, gather_each([layer.lora_A for layer in layers], device=device), device=device)

    @torch.no_grad()
    def fold(self, model, rewrite, *, device):
        super().fold(model, rewrite, device=device)
        self._measure(list(self.layers(model).values()), device=device)

    @torch.no_grad()
    def after_step(self, model, *, device):
        if self.start.folds:
            return
        if self._norms is None:
            self._norms = NormRefresh(list(self.layers(model).values()), device=device)
        self._norms()

    def layer_tensors(self, layer):
        return {**super().layer_tensors(layer), MAGNITUDE: Stored.of(layer.magnitude())}

    def fill_layer(self, layer, tensors, *, device):
        super().fill_layer(layer, tensors, device=device)
        delta, initial = layer.magnitude_delta, local(layer.initial_magnitude)
        start, stop = row_range(delta)
        with torch.no_grad():
            local(delta).copy_(tensors[MAGNITUDE][start:stop].to(initial.device) - initial)

    def peft_config(self, model):
        return super().peft_config(model) | {"use_dora": True}

    def row_factor(self, weight, tensors):
        a, b = self.start.added(tensors)
        norm = row_norms(weight, weight.float().norm(dim=1), a, b, self.scaling)
        return divided(tensors[MAGNITUDE].float(), norm)
