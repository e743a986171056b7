"""`c * (W x + s B A x)` for any base as one operator: packed weights, no dequantized weight kept for backward.

The plain version is `LoRALinear.plain_forward`. What this one does differently:

- The row factor c goes into the scales while they are dequantized, and into B: DoRA costs what LoRA costs.
- The low-rank product is no pass of its own over the wider side. Where the output is wider than the input, the product
  is `[x, A x] @ [c W, s c B].T`, and in backward `grad @ [c W, s c B]` gives B's share beside the base's. Where the
  input is wider, its gradient is `[grad, s c grad B] @ [c W; A]`. Elsewhere the base product accumulates onto the
  low-rank one.
- The gradient of the magnitude needs `V x`, which is output / c: the output is kept anyway by what follows it.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from methods.kernels import fp8, reduce
from methods.kernels.dequantize import dense_rows
from methods.packed import parse_quantizer

Tensor = torch.Tensor
CHUNK = 2048  # tokens whose gradient is copied at once: fewer would not fill a GPU


class BaseWeight(NamedTuple):
    """A frozen weight W `[out, in]` as the operator takes it, from `methods.quantizers.linear.packed_parts`.

    p0, p1, p2: the one tensor of a dense weight or the two or three of a packed one, `out` rows each; None for no more.
    spec: how to read them: "dense", or the quantizer as `methods.packed.spec_of` writes it.
    peaks: where products with it are of 8-bit floats (`methods.kernels.fp8`), what no weight of a row is larger than,
        fp32 `[out]`; else None.
    """

    p0: Tensor
    p1: Tensor | None
    p2: Tensor | None
    spec: str
    peaks: Tensor | None = None

    @property
    def packed(self) -> tuple[Tensor, ...]:
        return (self.p0, self.p1) if self.p2 is None else (self.p0, self.p1, self.p2)


class LowRank(NamedTuple):
    """An adapter: s B A, added to the base weight, and c, which multiplies the rows of their sum.

    a: A `[r, in]`, b: B `[out, r]`, in any float dtype.
    factor: c, fp32 `[out]`, or None for a factor of one.
    scaling: s.
    """

    a: Tensor
    b: Tensor
    factor: Tensor | None
    scaling: float


class Weights(NamedTuple):
    """What x and A x are multiplied by inside the operator: c W and s c B.

    a: A `[r, in]`, which only backward reads; None if there is no adapter, or if A x gets a gradient in its place.
    scaled_b: s c B `[out, r]`, or None if there is no adapter.
    factor: c, fp32 `[out]`, or None.
    in_features, dtype: the width of W, and what to compute in.
    """

    base: BaseWeight
    a: Tensor | None
    scaled_b: Tensor | None
    factor: Tensor | None
    in_features: int
    dtype: torch.dtype

    @property
    def widens(self) -> bool:
        """Whether copying x costs less than writing and reading the output once more."""
        return self.base.p0.shape[0] > 2 * self.in_features

    @property
    def narrows(self) -> bool:
        """Whether copying the gradient costs less than writing and reading that of x once more."""
        return self.in_features > 2 * self.base.p0.shape[0]

    def scaled_base(self, out: Tensor | None = None) -> Tensor:
        """c W, `[out, in]`, written into `out` if given."""
        return self._times(self.factor, dtype=self.dtype, out=out)

    def _times(self, factor: Tensor | None, *, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """W with its rows multiplied by `factor`, fp32 `[out]`."""
        p0, spec = self.base.p0, self.base.spec
        if spec == "dense":
            if factor is None:
                return p0.to(dtype) if out is None else out.copy_(p0)
            return dense_rows(p0, factor, dtype=dtype, out=out)
        settings = dict(in_features=self.in_features, dtype=dtype, row_factor=factor, out=out)
        return parse_quantizer(spec).dequantize(self.base.packed, **settings)

    def in_fp8(self, scale: Tensor) -> fp8.Scaled:
        """c W, `[out, in]`, which is never there in 16 bits; with scales of rows, fp32 `[out, 1]`."""
        factor = 1 / scale[:, 0] if self.factor is None else self.factor / scale[:, 0]
        return fp8.Scaled(self._times(factor, dtype=fp8.E4M3), scale)

    def columns_in_fp8(self, scale: Tensor) -> fp8.Scaled:
        """`in_fp8` without its scale, `[in, out]`: in backward that is in the gradient (`_backward`)."""
        values = fp8.transposed(self.in_fp8(scale).values)
        return fp8.Scaled(values, torch.ones(len(values), 1, dtype=torch.float32, device=values.device))

    def beside_b(self) -> Tensor:
        """`[c W, s c B]`, `[out, in + r]`."""
        out, rank = self.scaled_b.shape
        both = torch.empty(out, self.in_features + rank, dtype=self.dtype, device=self.scaled_b.device)
        self.scaled_base(out=both[:, : self.in_features])
        both[:, self.in_features :] = self.scaled_b
        return both

    def above_a(self) -> Tensor:
        """`[c W; A]`, `[out + r, in]`."""
        out = self.base.p0.shape[0]
        both = torch.empty(out + len(self.a), self.in_features, dtype=self.dtype, device=self.a.device)
        self.scaled_base(out=both[:out])
        both[out:] = self.a
        return both


class Kept(NamedTuple):
    """What forward leaves for backward, None for what backward does not need.

    x: `[..., in]`, for the gradient of A; hidden: A x `[..., r]`, for B's; out: `[..., out]`, for the row factor's.
    """

    x: Tensor | None
    hidden: Tensor | None
    out: Tensor | None


class Eight(NamedTuple):
    """What a product of 8-bit floats takes beside the weight.

    rows: x by rows, `[t, in]`; in backward the gradient `[t, out]` times the scales of W's rows, over which that
        product sums.
    row_scale: of c W, fp32 `[out, 1]`.
    """

    rows: fp8.Scaled
    row_scale: Tensor


def forward(x: Tensor, hidden: Tensor | None, weights: Weights, eight: Eight | None = None) -> Tensor:
    """`c W x + (s c B) hidden`, `[..., in] -> [..., out]`; hidden is A x `[..., r]`, or None without an adapter;
    `eight` where products with W are in 8 bits."""
    shape, rows = x.shape[:-1], x.reshape(-1, weights.in_features)  # [t, in]
    if eight is not None:
        out = fp8.product(eight.rows, weights.in_fp8(eight.row_scale))
        if hidden is not None:
            out.addmm_(hidden.reshape(len(out), -1), weights.scaled_b.T)
        return out.view(*shape, -1)
    if hidden is None:
        return (rows @ weights.scaled_base().T).view(*shape, -1)
    hidden = hidden.reshape(-1, hidden.shape[-1])  # [t, r]
    if weights.widens:
        out = torch.cat([rows, hidden], dim=1) @ weights.beside_b().T
    else:
        out = (hidden @ weights.scaled_b.T).addmm_(rows, weights.scaled_base().T)
    return out.view(*shape, -1)


def factor_gradient(summed: Tensor, factor: Tensor) -> Tensor:
    """d/dc sum(grad * c V x) = sum(grad * out) / c, fp32 `[out]`; a row with c = 0 has no output to learn from."""
    return torch.where(factor == 0, 0.0, summed / factor)


def _through_both(grads: Tensor, grad_hidden: Tensor, both: Tensor) -> Tensor:
    """`[grads, grad_hidden] @ both`, `[t, in]`, a few rows at a time: what the product is widest at is where a step
    holds most."""
    out = grads.new_empty(len(grads), both.shape[1])
    for start in range(0, len(grads), CHUNK):
        rows = slice(start, start + CHUNK)
        torch.mm(torch.cat([grads[rows], grad_hidden[rows]], dim=1), both, out=out[rows])
    return out


def _gradient_of_x(grads: Tensor, weights: Weights, eight: Eight | None) -> tuple[Tensor, Tensor | None]:
    """`[t, in]`, with A's share if A is given, and the gradient of A x, `[t, r]`, if there is a B."""
    width, a = weights.in_features, weights.a
    if eight is not None:
        grad_x = fp8.product(eight.rows, weights.columns_in_fp8(eight.row_scale))
        grad_hidden = None if weights.scaled_b is None else grads @ weights.scaled_b
        return grad_x if a is None else grad_x.addmm_(grad_hidden, a.to(grads.dtype)), grad_hidden
    if weights.scaled_b is None:
        return grads @ weights.scaled_base(), None
    if weights.widens:
        both = grads @ weights.beside_b()  # [t, in + r]
        grad_x, grad_hidden = both[:, :width], both[:, width:]
        return grad_x if a is None else grad_x.addmm_(grad_hidden, a.to(grads.dtype)), grad_hidden
    grad_hidden = grads @ weights.scaled_b
    if a is None:
        return grads @ weights.scaled_base(), grad_hidden
    if weights.narrows:
        return _through_both(grads, grad_hidden, weights.above_a()), grad_hidden
    return (grad_hidden @ a.to(grads.dtype)).addmm_(grads, weights.scaled_base()), grad_hidden


def backward(
    grad: Tensor, kept: Kept, weights: Weights, needs_x: bool, eight: Eight | None = None
) -> tuple[Tensor, ...]:
    """From the gradient of the output, `[..., out]`, those of x, of A x where A is not given, of A and of s c B, and
    the sum over tokens of grad * out, fp32 `[out]`, where the output was kept; empty tensors for what is absent."""
    x, hidden, out = kept
    grads = grad.reshape(-1, grad.shape[-1])  # [t, out]
    grad_x = through_b = grad_hidden = grad_a = grad_b = dots = None
    if needs_x:
        grad_x, through_b = _gradient_of_x(grads, weights, eight)  # through_b: of A x, [t, r]
        grad_x = grad_x.view(*grad.shape[:-1], weights.in_features)
    elif hidden is not None:
        through_b = grads @ weights.scaled_b
    if weights.a is not None:
        grad_a = (through_b.T @ x.reshape(-1, weights.in_features)).to(weights.a.dtype)
    elif hidden is not None:
        grad_hidden = through_b.contiguous().view(hidden.shape)
    if hidden is not None:
        grad_b = grads.T @ hidden.reshape(-1, hidden.shape[-1])
    if out is not None:
        dots = reduce.column_dot(grads, out.reshape(grads.shape))
    return _without_none(grad, grad_x, grad_hidden, grad_a, grad_b, dots)


def _without_none(like: Tensor, *results: Tensor | None) -> tuple[Tensor, ...]:
    """An empty tensor for each None, which an operator cannot return; one for each, since its outputs may not alias."""
    return tuple(like.new_empty(0) if result is None else result for result in results)


def backward_shapes(
    grad: Tensor, kept: Kept, weights: Weights, needs_x: bool, eight: Eight | None = None
) -> tuple[Tensor, ...]:
    """What `backward` returns, without values."""
    grad_x, width = None, weights.in_features
    if needs_x and eight is None and weights.scaled_b is not None and weights.widens:  # columns of a wider matrix
        grad_x = grad.new_empty(*grad.shape[:-1], width + weights.scaled_b.shape[1])[..., :width]
    elif needs_x:
        grad_x = grad.new_empty(*grad.shape[:-1], width)
    hidden, dots = kept.hidden if weights.a is None else None, None if kept.out is None else weights.factor
    like = (hidden, weights.a, weights.scaled_b, dots)
    return _without_none(grad, grad_x, *(None if t is None else torch.empty_like(t) for t in like))


# A schema knows no groups: what torch.library calls takes the arguments one by one, and only groups them.
def _flat_forward(x, hidden, p0, p1, p2, spec, a, scaled_b, factor, *eight):
    weights = Weights(BaseWeight(p0, p1, p2, spec), a, scaled_b, factor, x.shape[-1], x.dtype)
    return forward(x, hidden, weights, _eight(*eight))


def _flat_forward_shape(x, hidden, p0, *others):
    return x.new_empty(*x.shape[:-1], p0.shape[0])


def _eight(values, scale, row_scale):
    return None if values is None else Eight(fp8.Scaled(values, scale), row_scale)


def _grouped(grad, x, hidden, out, p0, p1, p2, spec, a, scaled_b, factor, in_features, needs_x, *eight):
    weights = Weights(BaseWeight(p0, p1, p2, spec), a, scaled_b, factor, in_features, grad.dtype)
    return grad, Kept(x, hidden, out), weights, needs_x, _eight(*eight)


def _flat_backward(*arguments):
    return backward(*_grouped(*arguments))


def _flat_backward_shapes(*arguments):
    return backward_shapes(*_grouped(*arguments))


# Registered by hand: torch.library.custom_op checks every call for aliasing, which costs more than a small product.
_library = torch.library.Library("fsdp_qlora", "DEF")
_library.define(
    "adapted_linear(Tensor x, Tensor? hidden, Tensor p0, Tensor? p1, Tensor? p2, str spec, Tensor? a, "
    "Tensor? scaled_b, Tensor? factor, Tensor? eight, Tensor? scale, Tensor? row_scale) -> Tensor"
)
_library.define(
    "adapted_linear_backward(Tensor grad, Tensor? x, Tensor? hidden, Tensor? out, Tensor p0, Tensor? p1, Tensor? p2, "
    "str spec, Tensor? a, Tensor? scaled_b, Tensor? factor, SymInt in_features, bool needs_x, "
    "Tensor? eight, Tensor? scale, Tensor? row_scale) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
for _name, _run, _shapes in (
    ("adapted_linear", _flat_forward, _flat_forward_shape),
    ("adapted_linear_backward", _flat_backward, _flat_backward_shapes),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fsdp_qlora::{_name}", _shapes, lib=_library)


def _keep(ctx, inputs, output):
    x, hidden, p0, p1, p2, spec, a, scaled_b, factor, _, _, row_scale = inputs
    # what backward does not need is not kept: x only for A, the output only for the row factor, the ninth input
    kept = Kept(x if a is not None else None, hidden, output if ctx.needs_input_grad[8] else None)
    ctx.save_for_backward(*kept, p0, p1, p2, a, scaled_b, factor, row_scale)
    ctx.spec, ctx.in_features, ctx.needs_x = spec, x.shape[-1], ctx.needs_input_grad[0]


def _backward(ctx, grad):
    x, hidden, out, p0, p1, p2, a, scaled_b, factor, row_scale = ctx.saved_tensors
    eight = (None, None, None)
    if row_scale is not None and ctx.needs_x:  # here, where the compiler makes it part of what made the gradient
        eight = (*fp8.by_rows(grad.reshape(-1, grad.shape[-1]), columns=row_scale.T), row_scale)
    grad_x, grad_hidden, grad_a, grad_b, dots = torch.ops.fsdp_qlora.adapted_linear_backward(
        grad, x, hidden, out, p0, p1, p2, ctx.spec, a, scaled_b, factor, ctx.in_features, ctx.needs_x, *eight
    )
    return (
        grad_x if ctx.needs_x else None,
        grad_hidden if hidden is not None and a is None else None,
        *[None] * 4,  # the base weight is frozen
        grad_a if a is not None else None,
        grad_b if hidden is not None else None,
        factor_gradient(dots, factor) if out is not None else None,  # here, where the compiler sees it
        *[None] * 3,
    )


# not an autograd.Function: compiled checkpointing would take its outputs for something it has to keep
torch.library.register_autograd("fsdp_qlora::adapted_linear", _backward, setup_context=_keep, lib=_library)


def adapted_linear(
    x: Tensor, base: BaseWeight, adapter: LowRank | None = None, *, dropout: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """`c * (W x + s B A dropout(x))`, `[..., in] -> [..., out]`, or W x alone; gradients for x, A, B and c.

    Args:
        x: `[..., in]` in the dtype to compute in.
        dropout: None where it changes nothing.
    """
    p0, p1, p2, spec, peaks = base
    eight = (None, None, None)
    if peaks is not None:
        scale = peaks if adapter is None or adapter.factor is None else peaks * adapter.factor.detach().abs()
        eight = (*fp8.by_rows(x.detach().reshape(-1, x.shape[-1])), fp8.scale_of(scale).unsqueeze(1))
    if adapter is None:
        return torch.ops.fsdp_qlora.adapted_linear(x, None, p0, p1, p2, spec, None, None, None, *eight)
    a, b, factor, scaling = adapter
    # A x apart from the operator: backward needs it, but not the output, which recomputation can then leave out
    if dropout is None:
        hidden = F.linear(x.detach(), a.detach().to(x.dtype))
    else:  # A's gradients take the way back through what was dropped
        hidden, a = F.linear(dropout(x), a.to(x.dtype)), None
    # the operator's gradient of c is that of the whole output
    scale = scaling if factor is None else (factor.detach() * scaling).unsqueeze(1)
    scaled_b = (b * scale).to(x.dtype)
    return torch.ops.fsdp_qlora.adapted_linear(x, hidden, p0, p1, p2, spec, a, scaled_b, factor, *eight)
