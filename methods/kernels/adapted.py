"""`c * (W x + s B A x)` for any base as one operator: packed weights, no dequantized weight kept for backward.

The plain version is `LoRALinear.forward` and `DoRALinear.forward`. What this one does differently:

- The row factor c goes into the scales while they are dequantized, and into B: DoRA costs what LoRA costs.
- The low-rank product is written first and the base product accumulates onto it, so that its read hides behind the
  larger product.
- The gradient of the magnitude needs `V x`, which is output / c: the output is kept anyway by what follows it.
"""

import torch

from methods.quantizers.linear import parse_quantizer

Tensor = torch.Tensor


def _weight(p0: Tensor, p1: Tensor | None, p2: Tensor | None, spec: str, factor: Tensor | None, x: Tensor) -> Tensor:
    """`[out, in]` in the dtype of x, each row times `factor`. The spec is "dense" or a quantizer's."""
    if spec == "dense":
        weight = p0.to(x.dtype)
        return weight if factor is None else (weight * factor.unsqueeze(1)).to(x.dtype)
    packed = tuple(p for p in (p0, p1, p2) if p is not None)
    return parse_quantizer(spec).dequantize(packed, in_features=x.shape[-1], dtype=x.dtype, row_factor=factor)


def _scaled_b(b: Tensor, scaling: float, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`s c B`, `[out, r]`."""
    scaled = b.float() * scaling
    return (scaled if factor is None else scaled * factor.unsqueeze(1)).to(dtype)


@torch.library.custom_op("fsdp_qlora::adapted_linear", mutates_args=())
def adapted_linear(
    x: Tensor, p0: Tensor, p1: Tensor | None, p2: Tensor | None, spec: str,
    a: Tensor | None, b: Tensor | None, factor: Tensor | None, scaling: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x `[..., in]` to output `[..., out]` and `A x` `[..., r]` (empty without adapter)."""
    rows = x.reshape(-1, x.shape[-1])  # [t, in]
    weight = _weight(p0, p1, p2, spec, factor, x)
    if a is None:
        return (rows @ weight.T).view(*x.shape[:-1], -1), x.new_empty(0)
    hidden = rows @ a.to(x.dtype).T  # [t, r]
    out = hidden @ _scaled_b(b, scaling, factor, x.dtype).T
    out.addmm_(rows, weight.T)
    return out.view(*x.shape[:-1], -1), hidden.view(*x.shape[:-1], -1)


@adapted_linear.register_fake
def _(x, p0, p1, p2, spec, a, b, factor, scaling):
    return x.new_empty(*x.shape[:-1], p0.shape[0]), x.new_empty(0) if a is None else x.new_empty(
        *x.shape[:-1], a.shape[0]
    )


@torch.library.custom_op("fsdp_qlora::adapted_linear_backward", mutates_args=())
def adapted_linear_backward(
    grad: Tensor, x: Tensor | None, hidden: Tensor, out: Tensor | None,
    p0: Tensor, p1: Tensor | None, p2: Tensor | None, spec: str,
    a: Tensor | None, b: Tensor | None, factor: Tensor | None, scaling: float, in_features: int, needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, A, B and the row factor; empty tensors for what is absent."""
    grads = grad.reshape(-1, grad.shape[-1])  # [t, out]
    grad_x, grad_a, grad_b, grad_factor = (grad.new_empty(0) for _ in range(4))  # an operator's outputs may not alias
    if a is not None:
        rows, hidden = x.reshape(-1, in_features), hidden.reshape(-1, a.shape[0])
        through_b = grads @ _scaled_b(b, scaling, factor, grad.dtype)  # [t, r]
        grad_a = (through_b.T @ rows).to(a.dtype)
        product = (grads.T @ hidden).float() * scaling  # [out, r]
        grad_b = (product if factor is None else product * factor.unsqueeze(1)).to(b.dtype)
        if needs_x:
            grad_x = through_b @ a.to(grad.dtype)
    if factor is not None:
        # d/dc sum(grad * c V x) = sum(grad * out) / c; a row with c = 0 has no output to learn from
        summed = column_dot(grads, out.reshape(grads.shape))  # fp32 [out]
        grad_factor = torch.where(factor == 0, torch.zeros_like(summed), summed / factor)
    if needs_x:
        weight = _weight(p0, p1, p2, spec, factor, torch.empty(0, in_features, dtype=grad.dtype, device=grad.device))
        grad_x = grads @ weight if a is None else grad_x.addmm_(grads, weight)
        grad_x = grad_x.view(*grad.shape[:-1], in_features)
    return grad_x, grad_a, grad_b, grad_factor


@adapted_linear_backward.register_fake
def _(grad, x, hidden, out, p0, p1, p2, spec, a, b, factor, scaling, in_features, needs_x):
    return (
        grad.new_empty(*grad.shape[:-1], in_features) if needs_x else grad.new_empty(0),
        *(grad.new_empty(0) if t is None else torch.empty_like(t) for t in (a, b, factor)),
    )


def _keep(ctx, inputs, output):
    x, p0, p1, p2, spec, a, b, factor, scaling = inputs
    out, hidden = output
    # what backward does not need is not kept: x only for A, the output only for the magnitude
    kept = (x if a is not None else None, hidden, out if factor is not None else None)
    ctx.save_for_backward(*kept, p0, p1, p2, a, b, factor)
    ctx.spec, ctx.scaling, ctx.in_features, ctx.needs_x = spec, scaling, x.shape[-1], ctx.needs_input_grad[0]


def _backward(ctx, grad, _):
    x, hidden, out, p0, p1, p2, a, b, factor = ctx.saved_tensors
    grad_x, grad_a, grad_b, grad_factor = torch.ops.fsdp_qlora.adapted_linear_backward(
        grad.contiguous(), x, hidden, out, p0, p1, p2, ctx.spec, a, b, factor, ctx.scaling, ctx.in_features, ctx.needs_x
    )
    return (
        grad_x if ctx.needs_x else None, None, None, None, None,
        None if a is None else grad_a, None if b is None else grad_b, None if factor is None else grad_factor, None,
    )  # fmt: skip


adapted_linear.register_autograd(_backward, setup_context=_keep)


def column_dot_plain(left: Tensor, right: Tensor) -> Tensor:
    """`sum over rows of left * right`, `[t, n]` each, to fp32 `[n]`."""
    return (left.float() * right.float()).sum(0)


def column_dot(left: Tensor, right: Tensor) -> Tensor:
    """As `column_dot_plain`, in one pass over both on CUDA."""
    from methods.kernels import reduce

    return reduce.column_dot(left, right) if reduce.available(left) else column_dot_plain(left, right)
