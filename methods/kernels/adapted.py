"""`c * (W x + s B A x)` for any base as one operator: packed weights, no dequantized weight kept for backward.

The plain version is `LoRALinear.plain_forward`. What this one does differently:

- The row factor c goes into the scales while they are dequantized, and into B: DoRA costs what LoRA costs.
- The low-rank product is no pass of its own over the wider side. Where the output is wider than the input, the product
  is `[x, A x] @ [W, s c B].T`, and in backward `grad @ [W, s c B]` gives B's share beside the base's. Where the input
  is wider, its gradient is `[grad, s c grad B] @ [W; A]`. Elsewhere the base product accumulates onto the low-rank one.
- The gradient of the magnitude needs `V x`, which is output / c: the output is kept anyway by what follows it.
"""

import torch
import torch.nn.functional as F

from methods.kernels import reduce
from methods.quantizers.linear import parse_quantizer

Tensor = torch.Tensor


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
    """x `[..., in]`, hidden = A x `[..., r]`, scaled_b = s c B `[out, r]` to `[..., out]`. A only gets a gradient."""
    shape, width, parts = x.shape[:-1], x.shape[-1], (p0, p1, p2)
    weight = dict(dtype=x.dtype, in_features=width)
    rows = x.reshape(-1, width)  # [t, in]
    if a is None:
        return (rows @ _weight(parts, spec, factor, **weight).T).view(*shape, -1)
    hidden = hidden.reshape(-1, a.shape[0])  # [t, r]
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


def backward(
    grad: Tensor, x: Tensor | None, hidden: Tensor | None, out: Tensor | None,
    p0: Tensor, p1: Tensor | None, p2: Tensor | None, spec: str,
    a: Tensor | None, scaled_b: Tensor | None, factor: Tensor | None, in_features: int, needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, A and scaled_b, and the sum over tokens of grad * out, fp32 `[out]` (only with the output);
    empty tensors for what is absent."""
    grads = grad.reshape(-1, grad.shape[-1])  # [t, out]
    parts, weight = (p0, p1, p2), dict(dtype=grad.dtype, in_features=in_features)
    grad_x, grad_a, grad_b, dots = (grad.new_empty(0) for _ in range(4))  # an operator's outputs may not alias
    if a is None:
        if needs_x:
            grad_x = grads @ _weight(parts, spec, factor, **weight)
    else:
        rows, hidden, wide_a = x.reshape(-1, in_features), hidden.reshape(-1, a.shape[0]), a.to(grad.dtype)
        if needs_x and _widens(p0, in_features):
            both = grads @ _beside(parts, spec, factor, scaled_b, **weight)  # [t, in + r]
            grad_x, through_b = both[:, :in_features], both[:, in_features:]
            grad_x.addmm_(through_b, wide_a)
        else:
            through_b = grads @ scaled_b  # [t, r]
            if needs_x and _narrows(p0, in_features):
                grad_x = torch.cat([grads, through_b], dim=1) @ _above(parts, spec, factor, wide_a, **weight)
            elif needs_x:
                grad_x = (through_b @ wide_a).addmm_(grads, _weight(parts, spec, factor, **weight))
        grad_a = (through_b.T @ rows).to(a.dtype)
        grad_b = grads.T @ hidden
    if out is not None:
        dots = reduce.column_dot(grads, out.reshape(grads.shape))
    if needs_x:
        grad_x = grad_x.view(*grad.shape[:-1], in_features)
    return grad_x, grad_a, grad_b, dots


def backward_shapes(grad, x, hidden, out, p0, p1, p2, spec, a, scaled_b, factor, in_features, needs_x):
    """What `backward` returns, without values."""
    grad_x = grad.new_empty(*grad.shape[:-1], in_features) if needs_x else grad.new_empty(0)
    if needs_x and a is not None and _widens(p0, in_features):  # columns of a wider matrix
        grad_x = grad.new_empty(*grad.shape[:-1], in_features + a.shape[0])[..., :in_features]
    found = (a, scaled_b, None if out is None else factor)
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
    "-> (Tensor, Tensor, Tensor, Tensor)"
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
    grad_x, grad_a, grad_b, dots = torch.ops.fsdp_qlora.adapted_linear_backward(
        grad, x, hidden, out, p0, p1, p2, ctx.spec, a, scaled_b, factor, ctx.in_features, ctx.needs_x
    )
    grad_x = grad_x if ctx.needs_x else None
    grad_a, grad_b = (grad_a, grad_b) if a is not None else (None, None)
    grad_factor = factor_gradient(dots, factor) if out is not None else None  # here, where the compiler sees it
    return grad_x, None, None, None, None, None, grad_a, grad_b, grad_factor


# not an autograd.Function: compiled checkpointing would take its outputs for something it has to keep
torch.library.register_autograd("fsdp_qlora::adapted_linear", _backward, setup_context=_keep, lib=_library)


def adapted_linear(
    x: Tensor, p0: Tensor, p1: Tensor | None, p2: Tensor | None, spec: str,
    a: Tensor | None = None, b: Tensor | None = None, factor: Tensor | None = None, scaling: float = 1.0,
) -> Tensor:  # fmt: skip
    """`factor * (W x + scaling * B A x)`, `[..., in] -> [..., out]`.

    Args:
        x: `[..., in]` in the dtype to compute in.
        p0, p1, p2, spec: the base weight, from `methods.quantizers.linear.packed_parts`.
        a, b: `[r, in]` and `[out, r]`, or None for the base product alone.
        factor: fp32 `[out]` or None.
    """
    if a is None:
        return torch.ops.fsdp_qlora.adapted_linear(x, None, p0, p1, p2, spec, None, None, factor)
    # A x apart from the operator: backward needs it, but not the output, which recomputation can then leave out
    hidden = F.linear(x.detach(), a.detach().to(x.dtype))
    # the operator's gradient of c is that of the whole output
    scale = scaling if factor is None else (factor.detach() * scaling).unsqueeze(1)
    scaled_b = (b * scale).to(x.dtype)
    return torch.ops.fsdp_qlora.adapted_linear(x, hidden, p0, p1, p2, spec, a, scaled_b, factor)
