"""`c * (W x + s B A x)` for any base as one operator: packed weights, no dequantized weight kept for backward.

The plain version is `LoRALinear.plain_forward`. What this one does differently:

- The row factor c goes into the scales while they are dequantized, and into B: DoRA costs what LoRA costs.
- The low-rank product is no pass of its own over the wider side. Where the output is wider than the input, the product
  is `[x, A x] @ [W, s c B].T`, and in backward `grad @ [W, s c B]` gives B's share beside the base's. Where the input
  is wider, its gradient is `[grad, s c grad B] @ [W; A]`. Elsewhere the base product accumulates onto the low-rank one.
- The gradient of the magnitude needs `V x`, which is output / c: the output is kept anyway by what follows it.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from methods.kernels import reduce
from methods.packed import parse_quantizer

Tensor = torch.Tensor
CHUNK = 2048  # tokens whose gradient is copied at once: fewer would not fill a GPU


def _weight(parts, spec: str, factor: Tensor | None, *, dtype, in_features: int, out: Tensor | None = None) -> Tensor:
    """`[out, in]`, each row times `factor`, into `out` if given. The spec is "dense" or a quantizer's."""
    if spec != "dense":
        packed = tuple(p for p in parts if p is not None)
        quantizer = parse_quantizer(spec)
        return quantizer.dequantize(packed, in_features=in_features, dtype=dtype, row_factor=factor, out=out)
    weight = parts[0] if factor is None else parts[0] * factor.unsqueeze(1)
    return weight.to(dtype) if out is None else out.copy_(weight)


def _widens(p0: Tensor, width: int) -> bool:
    """Whether copying x costs less than writing and reading the output once more."""
    return p0.shape[0] > 2 * width


def _narrows(p0: Tensor, width: int) -> bool:
    """Whether copying the gradient costs less than writing and reading that of x once more."""
    return width > 2 * p0.shape[0]


def _beside(parts, spec: str, factor: Tensor | None, scaled_b: Tensor, *, dtype, in_features: int) -> Tensor:
    """`[W, s c B]`, `[out, in + r]`."""
    out, rank = scaled_b.shape
    both = torch.empty(out, in_features + rank, dtype=dtype, device=scaled_b.device)
    _weight(parts, spec, factor, dtype=dtype, in_features=in_features, out=both[:, :in_features])
    both[:, in_features:] = scaled_b
    return both


def _above(parts, spec: str, factor: Tensor | None, a: Tensor, *, dtype, in_features: int) -> Tensor:
    """`[W; A]`, `[out + r, in]`."""
    out = parts[0].shape[0]
    both = torch.empty(out + a.shape[0], in_features, dtype=dtype, device=a.device)
    _weight(parts, spec, factor, dtype=dtype, in_features=in_features, out=both[:out])
    both[out:] = a
    return both


def forward(
    x: Tensor, hidden: Tensor | None, p0: Tensor, p1: Tensor | None, p2: Tensor | None, spec: str,
    a: Tensor | None, scaled_b: Tensor | None, factor: Tensor | None,
) -> Tensor:  # fmt: skip
    """x `[..., in]`, hidden = A x `[..., r]`, scaled_b = s c B `[out, r]` to `[..., out]`. A is for backward alone:
    given, it gets its gradient, and x A's share of its own; else hidden gets one."""
    shape, width, parts = x.shape[:-1], x.shape[-1], (p0, p1, p2)
    weight = dict(dtype=x.dtype, in_features=width)
    rows = x.reshape(-1, width)  # [t, in]
    if hidden is None:
        return (rows @ _weight(parts, spec, factor, **weight).T).view(*shape, -1)
    hidden = hidden.reshape(-1, hidden.shape[-1])  # [t, r]
    if _widens(p0, width):
        out = torch.cat([rows, hidden], dim=1) @ _beside(parts, spec, factor, scaled_b, **weight).T
    else:
        out = (hidden @ scaled_b.T).addmm_(rows, _weight(parts, spec, factor, **weight).T)
    return out.view(*shape, -1)


def forward_shape(x, hidden, p0, p1, p2, spec, a, scaled_b, factor):
    """What `forward` returns, without values."""
    return x.new_empty(*x.shape[:-1], p0.shape[0])


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


def _gradient_of_x(
    grads: Tensor, parts, spec: str, a: Tensor | None, scaled_b: Tensor | None, factor: Tensor | None, in_features: int
) -> tuple[Tensor, Tensor | None]:
    """`[t, in]`, with A's share if A is given, and the gradient of A x, `[t, r]`, if there is a B."""
    weight = dict(dtype=grads.dtype, in_features=in_features)
    if scaled_b is None:
        return grads @ _weight(parts, spec, factor, **weight), None
    if _widens(parts[0], in_features):
        both = grads @ _beside(parts, spec, factor, scaled_b, **weight)  # [t, in + r]
        grad_x, grad_hidden = both[:, :in_features], both[:, in_features:]
        return grad_x if a is None else grad_x.addmm_(grad_hidden, a), grad_hidden
    grad_hidden = grads @ scaled_b
    if a is None:
        grad_x = grads @ _weight(parts, spec, factor, **weight)
    elif _narrows(parts[0], in_features):
        grad_x = _through_both(grads, grad_hidden, _above(parts, spec, factor, a, **weight))
    else:
        grad_x = (grad_hidden @ a).addmm_(grads, _weight(parts, spec, factor, **weight))
    return grad_x, grad_hidden


def backward(
    grad: Tensor, x: Tensor | None, hidden: Tensor | None, out: Tensor | None,
    p0: Tensor, p1: Tensor | None, p2: Tensor | None, spec: str,
    a: Tensor | None, scaled_b: Tensor | None, factor: Tensor | None, in_features: int, needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, of A x where A is not given, of A and of scaled_b, and the sum over tokens of grad * out, fp32
    `[out]` (only with the output); empty tensors for what is absent."""
    grads, parts = grad.reshape(-1, grad.shape[-1]), (p0, p1, p2)  # [t, out]
    # an operator's outputs may not alias
    grad_x, grad_hidden, grad_a, grad_b, dots = (grad.new_empty(0) for _ in range(5))
    through_b, wide_a = None, None if a is None else a.to(grad.dtype)
    if needs_x:
        grad_x, through_b = _gradient_of_x(grads, parts, spec, wide_a, scaled_b, factor, in_features)
        grad_x = grad_x.view(*grad.shape[:-1], in_features)
    elif hidden is not None:
        through_b = grads @ scaled_b  # [t, r]
    if a is not None:
        grad_a = (through_b.T @ x.reshape(-1, in_features)).to(a.dtype)
    elif hidden is not None:
        grad_hidden = through_b.contiguous().view(hidden.shape)
    if hidden is not None:
        grad_b = grads.T @ hidden.reshape(-1, hidden.shape[-1])
    if out is not None:
        dots = reduce.column_dot(grads, out.reshape(grads.shape))
    return grad_x, grad_hidden, grad_a, grad_b, dots


def backward_shapes(grad, x, hidden, out, p0, p1, p2, spec, a, scaled_b, factor, in_features, needs_x):
    """What `backward` returns, without values."""
    grad_x = grad.new_empty(*grad.shape[:-1], in_features) if needs_x else grad.new_empty(0)
    if needs_x and scaled_b is not None and _widens(p0, in_features):  # columns of a wider matrix
        grad_x = grad.new_empty(*grad.shape[:-1], in_features + scaled_b.shape[1])[..., :in_features]
    found = (hidden if a is None else None, a, scaled_b, None if out is None else factor)
    return grad_x, *(grad.new_empty(0) if t is None else torch.empty_like(t) for t in found)


# Registered by hand: torch.library.custom_op checks every call for aliasing, which costs more than a small product.
_library = torch.library.Library("fsdp_qlora", "DEF")
_library.define(
    "adapted_linear(Tensor x, Tensor? hidden, Tensor p0, Tensor? p1, Tensor? p2, str spec, Tensor? a, "
    "Tensor? scaled_b, Tensor? factor) -> Tensor"
)
_library.define(
    "adapted_linear_backward(Tensor grad, Tensor? x, Tensor? hidden, Tensor? out, Tensor p0, Tensor? p1, Tensor? p2, "
    "str spec, Tensor? a, Tensor? scaled_b, Tensor? factor, SymInt in_features, bool needs_x) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
for _name, _run, _shapes in (
    ("adapted_linear", forward, forward_shape),
    ("adapted_linear_backward", backward, backward_shapes),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fsdp_qlora::{_name}", _shapes, lib=_library)


def _keep(ctx, inputs, output):
    x, hidden, p0, p1, p2, spec, a, scaled_b, factor = inputs
    # what backward does not need is not kept: x only for A, the output only for the row factor, the ninth input
    kept = (x if a is not None else None, hidden, output if ctx.needs_input_grad[8] else None)
    ctx.save_for_backward(*kept, p0, p1, p2, a, scaled_b, factor)
    ctx.spec, ctx.in_features, ctx.needs_x = spec, x.shape[-1], ctx.needs_input_grad[0]


def _backward(ctx, grad):
    x, hidden, out, p0, p1, p2, a, scaled_b, factor = ctx.saved_tensors
    grad_x, grad_hidden, grad_a, grad_b, dots = torch.ops.fsdp_qlora.adapted_linear_backward(
        grad, x, hidden, out, p0, p1, p2, ctx.spec, a, scaled_b, factor, ctx.in_features, ctx.needs_x
    )
    present = (ctx.needs_x, hidden is not None and a is None, a is not None, hidden is not None)
    grads = (g if there else None for g, there in zip((grad_x, grad_hidden, grad_a, grad_b), present, strict=True))
    grad_x, grad_hidden, grad_a, grad_b = grads
    grad_factor = factor_gradient(dots, factor) if out is not None else None  # here, where the compiler sees it
    return grad_x, grad_hidden, None, None, None, None, grad_a, grad_b, grad_factor


# not an autograd.Function: compiled checkpointing would take its outputs for something it has to keep
torch.library.register_autograd("fsdp_qlora::adapted_linear", _backward, setup_context=_keep, lib=_library)


def adapted_linear(
    x: Tensor, p0: Tensor, p1: Tensor | None, p2: Tensor | None, spec: str,
    a: Tensor | None = None, b: Tensor | None = None, factor: Tensor | None = None, scaling: float = 1.0,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """`factor * (W x + scaling * B A dropout(x))`, `[..., in] -> [..., out]`.

    Args:
        x: `[..., in]` in the dtype to compute in.
        p0, p1, p2, spec: the base weight, from `methods.quantizers.linear.packed_parts`.
        a, b: `[r, in]` and `[out, r]`, or None for the base product alone.
        factor: fp32 `[out]` or None.
        dropout: None where it changes nothing.
    """
    if a is None:
        return torch.ops.fsdp_qlora.adapted_linear(x, None, p0, p1, p2, spec, None, None, factor)
    # A x apart from the operator: backward needs it, but not the output, which recomputation can then leave out
    if dropout is None:
        hidden = F.linear(x.detach(), a.detach().to(x.dtype))
    else:  # A's gradients take the way back through what was dropped
        hidden, a = F.linear(dropout(x), a.to(x.dtype)), None
    # the operator's gradient of c is that of the whole output
    scale = scaling if factor is None else (factor.detach() * scaling).unsqueeze(1)
    scaled_b = (b * scale).to(x.dtype)
    return torch.ops.fsdp_qlora.adapted_linear(x, hidden, p0, p1, p2, spec, a, scaled_b, factor)
