"""`c * (W x + s B A x)` for any base as one operator: packed weights, no dequantized weight kept for backward.

It serves one linear, or several that read the same x (q, k, v; gate, up): their outputs stand side by side in one
tensor, and A x, the gradient of A and the gradient of x are one product for all. The plain version is
`LoRALinear.plain_forward`. What this one does differently:

- The row factor c goes into the scales while they are dequantized, and into B: DoRA costs what LoRA costs.
- The low-rank product is no pass over the output of its own. Where the output is wider than the input, the product is
  `[x, A x] @ [W, s c B].T`; elsewhere the base product accumulates onto it.
- The gradient of the magnitude needs `V x`, which is output / c: the output is kept anyway by what follows it.
"""

from functools import partial
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F

from methods.kernels import reduce
from methods.quantizers.linear import parse_quantizer

Tensor = torch.Tensor
WIDE = 2  # an output this much wider than x is better off beside a copy of x than with another pass over it


def spans(sizes: list[int]) -> list[slice]:
    """Where each of several linears is in what stands side by side."""
    return [slice(*ends) for ends in pairwise(accumulate(sizes, initial=0))]


def _weight(parts, spec: str, factor: Tensor | None, *, dtype, in_features: int, out: Tensor | None = None) -> Tensor:
    """`[out, in]`, each row times `factor`, into `out` if given. The spec is "dense" or a quantizer's."""
    if spec != "dense":
        quantizer = parse_quantizer(spec)
        return quantizer.dequantize(tuple(parts), in_features=in_features, dtype=dtype, row_factor=factor, out=out)
    weight = parts[0] if factor is None else parts[0] * factor.unsqueeze(1)
    return weight.to(dtype) if out is None else out.copy_(weight)


def _weights(packed: list[Tensor], spec: str, sizes: list[int], factor: Tensor | None, **settings):
    """`(where it is, function that dequantizes it)` of each linear."""
    parts = len(packed) // len(sizes)
    for i, at in enumerate(spans(sizes)):
        c = None if factor is None else factor[at]
        yield at, partial(_weight, packed[i * parts : (i + 1) * parts], spec, c, **settings)


def _beside(rows: Tensor, low: list[Tensor], wide: list[int]) -> Tensor:
    """x with `A x` to its right for the first wide linear, and to its left for the second: one copy of x for both."""
    return torch.cat([*(low[i] for i in wide[1:]), rows, low[wide[0]]], dim=1)


def _product_beside(beside: Tensor, weight, scaled_b: Tensor, *, width: int, left: bool, out: Tensor) -> None:
    """`out = [x, A x] @ [W, scaled_b].T`, or with both the other way round."""
    both = scaled_b.new_empty(len(scaled_b), width + scaled_b.shape[1])
    rank = scaled_b.shape[1]
    base, low = (both[:, rank:], both[:, :rank]) if left else (both[:, :width], both[:, width:])
    weight(out=base)
    low.copy_(scaled_b)
    torch.mm(beside[:, : both.shape[1]] if left else beside[:, -both.shape[1] :], both.T, out=out)


def forward(
    x: Tensor, hidden: Tensor | None, packed: list[Tensor], spec: str, sizes: list[int],
    a: Tensor | None, scaled_b: Tensor | None, factor: Tensor | None,
) -> Tensor:  # fmt: skip
    """x `[..., in]` to `[..., sum of sizes]`.

    Args:
        hidden: A x of all linears, `[..., k r]`.
        packed: each linear's base, one after the other; all of them as `spec` says.
        sizes: rows of each of the k linears.
        a: `[k r, in]`, which only gets a gradient here; scaled_b: s c B, `[sum of sizes, r]`; factor: c.
    """
    shape, width = x.shape[:-1], x.shape[-1]
    rows = x.reshape(-1, width)  # [t, in]
    out = x.new_empty(rows.shape[0], sum(sizes))
    low, wide = [], []
    if a is not None:
        low = hidden.reshape(-1, a.shape[0]).split(scaled_b.shape[1], dim=1)
        wide = [i for i, size in enumerate(sizes) if size > WIDE * width][:2]
    beside = _beside(rows, low, wide) if wide else None
    for i, (at, weight) in enumerate(_weights(packed, spec, sizes, factor, dtype=x.dtype, in_features=width)):
        if i in wide:
            _product_beside(beside, weight, scaled_b[at], width=width, left=i != wide[0], out=out[:, at])
        elif low:
            torch.mm(low[i], scaled_b[at].T, out=out[:, at])
            out[:, at].addmm_(rows, weight().T)
        else:
            torch.mm(rows, weight().T, out=out[:, at])
    return out.view(*shape, -1)


def forward_shape(x, hidden, packed, spec, sizes, a, scaled_b, factor):
    """What `forward` returns, without values."""
    return x.new_empty(*x.shape[:-1], sum(sizes))


def backward(
    grad: Tensor, x: Tensor | None, hidden: Tensor | None, out: Tensor | None,
    packed: list[Tensor], spec: str, sizes: list[int],
    a: Tensor | None, scaled_b: Tensor | None, factor: Tensor | None, in_features: int, needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, A, scaled_b and the row factor; empty tensors for what is absent."""
    grads = grad.reshape(-1, grad.shape[-1])  # [t, out]
    grad_x, grad_a, grad_b, grad_factor = (grad.new_empty(0) for _ in range(4))  # an operator's outputs may not alias
    if a is not None:
        through_b, grad_b = _low_rank_gradients(grads, hidden.reshape(-1, a.shape[0]), scaled_b, sizes)
        grad_a = (through_b.T @ x.reshape(-1, in_features)).to(a.dtype)
        if needs_x:
            grad_x = through_b @ a.to(grad.dtype)
    if factor is not None:
        # d/dc sum(grad * c V x) = sum(grad * out) / c; a row with c = 0 has no output to learn from
        summed = reduce.column_dot(grads, out.reshape(grads.shape))  # fp32 [out]
        grad_factor = torch.where(factor == 0, 0.0, summed / factor)
    if needs_x:
        for at, weight in _weights(packed, spec, sizes, factor, dtype=grad.dtype, in_features=in_features):
            started = bool(grad_x.numel())
            grad_x = grad_x.addmm_(grads[:, at], weight()) if started else grads[:, at] @ weight()
        grad_x = grad_x.view(*grad.shape[:-1], in_features)
    return grad_x, grad_a, grad_b, grad_factor


def _low_rank_gradients(grads: Tensor, hidden: Tensor, scaled_b: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Gradients of `hidden` `[t, k r]` and of `scaled_b`."""
    through_b, grad_b = torch.empty_like(hidden), torch.empty_like(scaled_b)
    parts = zip(spans(sizes), *(t.split(scaled_b.shape[1], dim=1) for t in (through_b, hidden)), strict=True)
    for at, through, low in parts:
        torch.mm(grads[:, at], scaled_b[at], out=through)
        torch.mm(grads[:, at].T, low, out=grad_b[at])
    return through_b, grad_b


def backward_shapes(grad, x, hidden, out, packed, spec, sizes, a, scaled_b, factor, in_features, needs_x):
    """What `backward` returns, without values."""
    return (
        grad.new_empty(*grad.shape[:-1], in_features) if needs_x else grad.new_empty(0),
        *(grad.new_empty(0) if t is None else torch.empty_like(t) for t in (a, scaled_b, factor)),
    )


# Registered by hand: torch.library.custom_op checks every call for aliasing, which costs more than a small product.
_library = torch.library.Library("fsdp_qlora", "DEF")
_library.define(
    "adapted_linear(Tensor x, Tensor? hidden, Tensor[] packed, str spec, int[] sizes, Tensor? a, Tensor? scaled_b, "
    "Tensor? factor) -> Tensor"
)
_library.define(
    "adapted_linear_backward(Tensor grad, Tensor? x, Tensor? hidden, Tensor? out, Tensor[] packed, str spec, "
    "int[] sizes, Tensor? a, Tensor? scaled_b, Tensor? factor, SymInt in_features, bool needs_x) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
for _name, _run, _shapes in (
    ("adapted_linear", forward, forward_shape),
    ("adapted_linear_backward", backward, backward_shapes),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fsdp_qlora::{_name}", _shapes, lib=_library)


def _keep(ctx, inputs, output):
    x, hidden, packed, spec, sizes, a, scaled_b, factor = inputs
    # what backward does not need is not kept: x only for A, the output only for the magnitude
    kept = (x if a is not None else None, hidden, output if factor is not None else None)
    ctx.save_for_backward(*kept, a, scaled_b, factor, *packed)
    ctx.spec, ctx.sizes, ctx.in_features, ctx.needs_x = spec, list(sizes), x.shape[-1], ctx.needs_input_grad[0]


def _backward(ctx, grad):
    x, hidden, out, a, scaled_b, factor, *packed = ctx.saved_tensors
    grad_x, grad_a, grad_b, grad_factor = torch.ops.fsdp_qlora.adapted_linear_backward(
        grad, x, hidden, out, packed, ctx.spec, ctx.sizes, a, scaled_b, factor, ctx.in_features, ctx.needs_x
    )
    adapters = (g if t is not None else None for g, t in ((grad_a, a), (grad_b, scaled_b), (grad_factor, factor)))
    return (grad_x if ctx.needs_x else None, None, [None] * len(packed), None, None, *adapters)


# not an autograd.Function: compiled checkpointing would take its outputs for something it has to keep
torch.library.register_autograd("fsdp_qlora::adapted_linear", _backward, setup_context=_keep, lib=_library)


def adapted_linear(
    x: Tensor, packed: list[Tensor], spec: str, sizes: list[int],
    a: Tensor | None = None, b: Tensor | None = None, factor: Tensor | None = None, scaling: float = 1.0,
) -> Tensor:  # fmt: skip
    """`factor * (W x + scaling * B A x)` of k linears side by side, `[..., in] -> [..., sum of sizes]`.

    Args:
        x: `[..., in]` in the dtype to compute in.
        packed, spec: the base weights, each from `methods.quantizers.linear.packed_parts`.
        sizes: rows of each linear.
        a, b: `[k r, in]` and `[sum of sizes, r]`, one linear's rows after the other's, or None for the base alone.
        factor: fp32 `[sum of sizes]` or None.
    """
    if a is None:
        return torch.ops.fsdp_qlora.adapted_linear(x, None, packed, spec, sizes, None, None, factor)
    # A x apart from the operator: backward needs it, but not the output, which recomputation can then leave out
    hidden = F.linear(x.detach(), a.detach().to(x.dtype))
    # the operator's gradient of c is that of the whole output
    scale = scaling if factor is None else (factor.detach() * scaling).unsqueeze(1)
    scaled_b = (b * scale).to(x.dtype)
    return torch.ops.fsdp_qlora.adapted_linear(x, hidden, packed, spec, sizes, a, scaled_b, factor)
