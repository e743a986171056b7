"""Products of tokens with the packed matrices of their experts: each token of a group with one matrix of a stack.

`grouped_plain` defines the result, expert by expert, and dequantizes only matrices that have tokens. On GPUs, in bf16,
one kernel multiplies all groups; nothing is asked of the host.
"""

import torch

from methods.packed import parse_quantizer

Tensor = torch.Tensor


def grouped_plain(rows: Tensor, ends: Tensor, weight_of, *, width: int) -> Tensor:
    """`[t, width]`: of the rows `[t, k]` up to `ends[0]` the product with `weight_of(0)` `[k, width]`, and so on.

    Args:
        ends: int32 `[experts]`, where the rows of each expert end.
    """
    made, first = rows.new_zeros(len(rows), width), 0
    for expert, end in enumerate(ends.tolist()):
        if first < end:
            torch.mm(rows[first:end], weight_of(expert), out=made[first:end])
        first = end
    return made


def _run(rows, ends, p0, p1, p2, spec, in_features, back):
    quantizer, packed = parse_quantizer(spec), (p0, p1) if p2 is None else (p0, p1, p2)
    experts, out_features = len(ends), len(p0) // len(ends)
    dense = lambda parts: quantizer.dequantize(parts, in_features=in_features, dtype=rows.dtype)
    if rows.is_cuda and rows.dtype == torch.bfloat16:
        weight = dense(packed).view(experts, out_features, in_features)
        return torch._grouped_mm(rows, weight if back else weight.transpose(1, 2), offs=ends)

    def weight_of(expert: int) -> Tensor:
        weight = dense(tuple(p[expert * out_features : (expert + 1) * out_features] for p in packed))
        return weight if back else weight.T

    return grouped_plain(rows, ends, weight_of, width=in_features if back else out_features)


def _shape(rows, ends, p0, p1, p2, spec, in_features, back):
    # of shapes, not len(): that is a number, and compiled code would be for this many tokens
    return rows.new_empty(rows.shape[0], in_features if back else p0.shape[0] // ends.shape[0])


# as in adapted.py
_library = torch.library.Library("fsdp_qlora", "FRAGMENT")
_library.define(
    "grouped_linear(Tensor rows, Tensor ends, Tensor p0, Tensor? p1, Tensor? p2, str spec, SymInt in_features, "
    "bool back) -> Tensor"
)
_library.impl("grouped_linear", _run, "CompositeExplicitAutograd")
torch.library.register_fake("fsdp_qlora::grouped_linear", _shape, lib=_library)


def _keep(ctx, inputs, output):
    _, ends, p0, p1, p2, ctx.spec, ctx.in_features, _ = inputs
    ctx.save_for_backward(ends, p0, p1, p2)


def _backward(ctx, grad):
    grad_rows = torch.ops.fsdp_qlora.grouped_linear(grad, *ctx.saved_tensors, ctx.spec, ctx.in_features, True)
    return grad_rows, *[None] * 7  # the weights are frozen


torch.library.register_autograd("fsdp_qlora::grouped_linear", _backward, setup_context=_keep, lib=_library)


def grouped_linear(rows: Tensor, ends: Tensor, packed: tuple[Tensor, ...], *, spec: str, in_features: int) -> Tensor:
    """`[t, out]` of rows `[t, in]` sorted by expert; gradients for the rows.

    Args:
        ends: int32 `[experts]`, where the rows of each expert end.
        packed: of the stack `[experts, out, in]`, the rows of all matrices below one another; two or three tensors.
        spec: how to read them: `methods.packed.spec_of`.
    """
    p0, p1, p2 = (*packed, None)[:3]
    return torch.ops.fsdp_qlora.grouped_linear(rows, ends, p0, p1, p2, spec, in_features, False)


def _multiplies(rows: Tensor, stack: Tensor) -> bool:
    """Whether one kernel multiplies all groups: it wants 16 bytes of every row."""
    return rows.is_cuda and rows.dtype == torch.bfloat16 and not any(size % 8 for size in stack.shape[1:])


def _trained(rows, stack, ends):
    if _multiplies(rows, stack):
        return torch._grouped_mm(rows, stack.transpose(1, 2), offs=ends)
    return grouped_plain(rows, ends, lambda expert: stack[expert].T, width=stack.shape[1])


def _trained_backward(grad, rows, stack, ends):
    """Gradients of rows and stack."""
    grad = grad.contiguous()
    if _multiplies(rows, stack):
        return torch._grouped_mm(grad, stack.contiguous(), offs=ends), torch._grouped_mm(grad.T, rows, offs=ends)
    grad_rows = grouped_plain(grad, ends, lambda expert: stack[expert], width=stack.shape[2])
    grad_stack, first = torch.zeros_like(stack, memory_format=torch.contiguous_format), 0
    for expert, end in enumerate(ends.tolist()):
        grad_stack[expert] = grad[first:end].T @ rows[first:end]
        first = end
    return grad_rows, grad_stack


_library.define("grouped_matmul(Tensor rows, Tensor stack, Tensor ends) -> Tensor")
_library.define("grouped_matmul_backward(Tensor grad, Tensor rows, Tensor stack, Tensor ends) -> (Tensor, Tensor)")
_library.impl("grouped_matmul", _trained, "CompositeExplicitAutograd")
_library.impl("grouped_matmul_backward", _trained_backward, "CompositeExplicitAutograd")
torch.library.register_fake(
    "fsdp_qlora::grouped_matmul", lambda rows, stack, ends: rows.new_empty(rows.shape[0], stack.shape[1]), lib=_library
)
torch.library.register_fake(
    "fsdp_qlora::grouped_matmul_backward",
    lambda grad, rows, stack, ends: (torch.empty_like(rows), stack.new_empty(stack.shape)),
    lib=_library,
)


def _keep_trained(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _back_trained(ctx, grad):
    return *torch.ops.fsdp_qlora.grouped_matmul_backward(grad, *ctx.saved_tensors), None


torch.library.register_autograd("fsdp_qlora::grouped_matmul", _back_trained, setup_context=_keep_trained, lib=_library)


def grouped_matmul(rows: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
    """`[t, n]` of rows `[t, k]` sorted by expert and matrices `[experts, n, k]`; gradients for both."""
    return torch.ops.fsdp_qlora.grouped_matmul(rows, stack, ends)
