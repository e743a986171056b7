"""Layers whose weight is packed codes and scales laid out row by row: ordinary parameters to FSDP2."""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from methods.kernels.adapted import BaseWeight, adapted_linear
from methods.packed import Quantizer, as_bytes, spec_of


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype a matrix product of `x` runs in, autocast included."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class QuantizedWeight(nn.Module):
    """A weight `[..., out, in]` as packed parameters; made on meta, filled by the loader row by row.

    The rows of all leading dimensions stand below one another: a stack of matrices (experts) is only more rows. The
    packed parameters are frozen and have that many rows each, so FSDP2 shards all of them on dim 0.
    """

    own_parameters = ()
    transposed = False  # whether a checkpoint has each matrix as [in, out]

    def __init__(self, shape: tuple[int, ...], quantizer: Quantizer):
        super().__init__()
        self.shape, (self.out_features, self.in_features) = tuple(shape), shape[-2:]
        self.quantizer, self.spec = quantizer, spec_of(quantizer)
        self.packed_names = []
        for name, (shape, dtype) in quantizer.layout(math.prod(self.shape[:-1]), self.in_features).items():
            empty = torch.empty(shape, dtype=dtype, device="meta")
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
            self.packed_names.append(name)

    def as_rows(self, stored: torch.Tensor) -> torch.Tensor:
        """A weight, or some matrices of a stack, as a checkpoint has them, to rows `[n, in]`."""
        return (stored.transpose(-1, -2) if self.transposed else stored).reshape(-1, self.in_features)

    def as_stored(self, rows: torch.Tensor) -> torch.Tensor:
        """All rows `[n, in]`, as a checkpoint has the weight."""
        whole = rows.view(self.shape)
        return whole.transpose(-1, -2) if self.transposed else whole

    def packed(self) -> tuple[torch.Tensor, ...]:
        return tuple(getattr(self, name) for name in self.packed_names)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.quantizer}"


class QuantizedLinear(QuantizedWeight):
    """Takes the place of an `nn.Linear`."""

    def __init__(self, linear: nn.Linear, quantizer: Quantizer):
        super().__init__((linear.out_features, linear.in_features), quantizer)
        self.bias = linear.bias

    @property
    def weight(self) -> torch.Tensor:
        """The first of the packed parts as int8, by which T5 knows that it need not convert what it multiplies."""
        return self.packed()[0].view(torch.int8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return add_bias(matmul(self, x), self)


class QuantizedEmbedding(QuantizedWeight):
    """Takes the place of an `nn.Embedding`: only the rows that are looked up are dequantized."""

    def __init__(self, embedding: nn.Embedding, quantizer: Quantizer):
        super().__init__((embedding.num_embeddings, embedding.embedding_dim), quantizer)
        self.dtype = embedding.weight.dtype
        # some families (Gemma) multiply what they look up
        self.register_buffer("embed_scale", getattr(embedding, "embed_scale", None), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        packed = tuple(
            as_bytes(p)[ids.flatten()].view(p.dtype) if p.element_size() == 1 else p[ids.flatten()]
            for p in self.packed()
        )
        rows = self.quantizer.dequantize(packed, in_features=self.in_features, dtype=self.dtype)
        rows = rows.view(*ids.shape, -1)
        return rows if self.embed_scale is None else rows * self.embed_scale.to(rows.dtype)


def quantized(module: nn.Module, quantizer: Quantizer) -> QuantizedWeight:
    """The packed module, without values yet, that takes the place of a linear or an embedding."""
    kind = QuantizedEmbedding if isinstance(module, nn.Embedding) else QuantizedLinear
    return kind(module, quantizer)


def packed_parts(base: nn.Module) -> BaseWeight:
    """The weight of a base linear of any kind as `adapted_linear` takes it.

    Raises:
        ValueError: the quantizer lays a weight out in other than two or three tensors.
    """
    eight = getattr(base, "fp8", False)
    if not isinstance(base, QuantizedLinear):
        dense = base.weight
        peaks = torch.linalg.vector_norm(dense.detach(), float("inf"), dim=1, dtype=torch.float32) if eight else None
        return BaseWeight(dense, None, None, "dense", peaks)
    packed = base.packed()
    peaks = base.quantizer.row_peaks(packed) if eight else None
    if len(packed) == 2:
        return BaseWeight(*packed, None, base.spec, peaks)
    if len(packed) == 3:
        return BaseWeight(*packed, base.spec, peaks)
    names = ", ".join(base.packed_names)
    raise ValueError(f"{base.quantizer} packs {len(packed)} tensors ({names}); adapted_linear takes two or three")


def matmul(base: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`x @ W.T` of a base linear of any kind, without its bias; keeps only the packed weight for backward."""
    x = x.to(compute_dtype(x))
    if not isinstance(base, QuantizedLinear) and not getattr(base, "fp8", False):
        return F.linear(x, base.weight)
    return adapted_linear(x, packed_parts(base))


def compute_in_fp8(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Makes products with the frozen weights among these modules those of 8-bit floats: packed ones, and dense ones
    behind an adapter (by itself, a dense linear is the family's own). Returns those whose sides no such product takes.
    """
    inner = (getattr(m, "base_layer", m if isinstance(m, QuantizedLinear) else None) for m in modules)
    bases = {id(base): base for base in inner if base is not None}.values()
    for base in bases:
        base.fp8 = base.in_features % 16 == base.out_features % 16 == 0
    return [base for base in bases if not base.fp8]


def add_bias(y: torch.Tensor, base: nn.Module) -> torch.Tensor:
    """`y + bias` of a base linear, if it has one."""
    return y if base.bias is None else y + base.bias.to(y.dtype)


def weight_rows(base: nn.Module, rows, *, dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
    """The weight of a base layer as forward uses it, `[n, in]`: of a stack of matrices, the rows of all.

    Args:
        rows: maps a parameter to the tensor to use: `core.rows.local` for this process's rows,
            `core.rows.gather` for all.
    """
    if not isinstance(base, QuantizedWeight):
        return rows(base.weight).detach().to(device=device, dtype=dtype)
    packed = tuple(rows(p).detach().to(device) for p in base.packed())
    return base.quantizer.dequantize(packed, in_features=base.in_features, dtype=dtype)


def dense_weight(base: nn.Module, *, dtype: torch.dtype) -> torch.Tensor:
    """`[out, in]` of a base linear of any kind inside its forward, with its gradient if it trains."""
    if isinstance(base, QuantizedWeight):
        return weight_rows(base, lambda p: p, dtype=dtype)
    return base.weight.to(dtype)
