"""SwiGLU, `silu(gate) * up`, whose backward also gives the gradients of the magnitudes of two DoRA projections.

DoRA multiplies each output row by a factor c, made from its magnitude. The gradient of c is `sum over tokens of
grad * out / c`. For the gate and up projections of an MLP, SwiGLU's backward holds both: it reads out, and makes grad.
Summing there saves reading them once more, and they are the widest tensors of a block.

Autograd expects the gradient of c from the projection that multiplied by it. So `join` gives an MLP another forward.
There the projections get their factors detached and make no gradient of them. `swiglu` takes the factors as further
inputs, on which its value does not depend, and its backward returns their gradients.
"""

from collections.abc import Callable
from types import MethodType, SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

from methods.kernels.adapted import factor_gradient
from methods.kernels.gated_mlps import GATED_MLPS

Tensor = torch.Tensor


if triton is not None:

    @triton.jit
    def _forward_kernel(gate, up, out, count, BLOCK: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < count
        g = tl.load(gate + at, mask=inside, other=0).to(tl.float32)
        u = tl.load(up + at, mask=inside, other=0).to(tl.float32)
        tl.store(out + at, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _backward_kernel(
        grad, gate, up, grad_gate, gate_dots, up_dots, rows, columns, per_program,
        R: tl.constexpr, C: tl.constexpr,
    ):  # fmt: skip
        column = tl.program_id(0) * C + tl.arange(0, C)
        start = tl.program_id(1) * per_program
        gate_total, up_total = tl.zeros((R, C), tl.float32), tl.zeros((R, C), tl.float32)
        for step in range(0, per_program, R):
            row = start + step + tl.arange(0, R)
            at = row[:, None].to(tl.int64) * columns + column[None, :]
            mask = (row[:, None] < rows) & (column[None, :] < columns)
            d = tl.load(grad + at, mask=mask, other=0).to(tl.float32)
            g = tl.load(gate + at, mask=mask, other=0).to(tl.float32)
            u = tl.load(up + at, mask=mask, other=0).to(tl.float32)
            share = tl.sigmoid(g)
            of_gate = d * u * share * (1 + g * (1 - share))
            of_up = d * g * share
            gate_total += of_gate * g
            up_total += of_up * u
            tl.store(grad_gate + at, of_gate.to(grad_gate.dtype.element_ty), mask=mask)
            tl.store(grad + at, of_up.to(grad.dtype.element_ty), mask=mask)
        at = tl.program_id(1) * columns + column
        tl.store(gate_dots + at, tl.sum(gate_total, axis=0), mask=column < columns)
        tl.store(up_dots + at, tl.sum(up_total, axis=0), mask=column < columns)


def forward_plain(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`."""
    return F.silu(gate) * up


def backward_plain(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turns the gradient of the product into that of up, `[..., n]`, in its place: a step holds most here.

    Returns:
        The gradient of gate, `[..., n]`; the sums over the tokens of both with gate and up themselves, fp32 `[n]`.
    """
    d, g, u = grad.float(), gate.float(), up.float()
    share = torch.sigmoid(g)
    of_gate, of_up = d * u * share * (1 + g * (1 - share)), d * g * share
    dots = ((of_gate * g).flatten(0, -2).sum(0), (of_up * u).flatten(0, -2).sum(0))
    grad.copy_(of_up)
    return of_gate.to(gate.dtype), *dots


def forward_kernel(gate: Tensor, up: Tensor) -> Tensor:
    """As `forward_plain`."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    if out.numel():
        _forward_kernel[(triton.cdiv(out.numel(), 4096),)](gate, up, out, out.numel(), BLOCK=4096, num_warps=8)
    return out


def backward_kernel(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `backward_plain`; partial sums per block of rows, added in a fixed order, so runs repeat exactly."""
    rows_of_grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    columns = gate.shape[-1]
    rows = gate.numel() // columns
    blocks = max(1, min(64, rows // 32))
    per_program = triton.cdiv(triton.cdiv(rows, blocks), 8) * 8
    grad_gate = torch.empty_like(gate)
    dots = torch.empty(2, blocks, columns, dtype=torch.float32, device=gate.device)
    _backward_kernel[(triton.cdiv(columns, 128), blocks)](
        # rows per program are no constant: every length of batch would be compiled
        rows_of_grad, gate, up, grad_gate, dots[0], dots[1], rows, columns, per_program,
        R=8, C=128, num_warps=4, num_stages=1,
    )  # fmt: skip
    if rows_of_grad is not grad:
        grad.copy_(rows_of_grad)
    return grad_gate, dots[0].sum(0), dots[1].sum(0)


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """The fastest of the two that runs here."""
    return forward_kernel(gate, up) if triton is not None and gate.is_cuda else forward_plain(gate, up)


def backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The fastest of the two that runs here."""
    run = backward_kernel if triton is not None and gate.is_cuda else backward_plain
    return run(grad, gate, up)


def _forward_op(gate, up, gate_factor, up_factor):
    return forward(gate, up)


def _shapes(grad, gate, up):
    dots = (gate.new_empty(gate.shape[-1], dtype=torch.float32) for _ in range(2))
    return torch.empty_like(gate), *dots


_library = torch.library.Library("fsdp_qlora", "FRAGMENT")
_library.define("swiglu(Tensor gate, Tensor up, Tensor gate_factor, Tensor up_factor) -> Tensor")
_library.define("swiglu_backward(Tensor(a!) grad, Tensor gate, Tensor up) -> (Tensor, Tensor, Tensor)")
_library.impl("swiglu", _forward_op, "CompositeExplicitAutograd")
_library.impl("swiglu_backward", backward, "CompositeExplicitAutograd")
torch.library.register_fake("fsdp_qlora::swiglu", lambda gate, *_: torch.empty_like(gate), lib=_library)
torch.library.register_fake("fsdp_qlora::swiglu_backward", _shapes, lib=_library)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    gate, up, gate_factor, up_factor = ctx.saved_tensors
    # the gradient is ours to change: nothing but the down projection has read the product
    grad_gate, gate_dot, up_dot = torch.ops.fsdp_qlora.swiglu_backward(grad, gate, up)
    return grad_gate, grad, factor_gradient(gate_dot, gate_factor), factor_gradient(up_dot, up_factor)


# as in adapted.py, and for the same reason, not an autograd.Function
torch.library.register_autograd("fsdp_qlora::swiglu", _backward, setup_context=_keep, lib=_library)


def swiglu(gate: Tensor, up: Tensor, gate_factor: Tensor, up_factor: Tensor) -> Tensor:
    """`silu(gate) * up`, `[..., n]`, of two projections whose rows were multiplied by detached factors, fp32 `[n]`.

    Backward gives the factors the gradients that the projections leave out.
    """
    return torch.ops.fsdp_qlora.swiglu(gate, up, gate_factor, up_factor)


def join(model: nn.Module, suits: Callable[[nn.Module | None], bool]) -> None:
    """Puts `swiglu` into every SwiGLU MLP whose gate and up projections both suit; all other modules stay as they are.

    Args:
        suits: whether a module, None where there is none, is a DoRA projection without a bias.
    """
    for module in model.modules():
        gate_proj, up_proj = getattr(module, "gate_proj", None), getattr(module, "up_proj", None)
        if suits(gate_proj) and suits(up_proj) and _is_known(type(module)) and _computes_swiglu(module):
            module.forward = MethodType(_joined_forward, module)


def _joined_forward(self, x):
    """What a joined MLP computes, `down(silu(gate(x)) * up(x))`, `[..., hidden]` to the same shape."""
    gate_proj, up_proj = self.gate_proj, self.up_proj
    if not (hasattr(gate_proj, "row_factor") and hasattr(up_proj, "row_factor")):
        return type(self).forward(self, x)  # replaced since then, by their merged weights for instance
    gate_factor, up_factor = gate_proj.row_factor(), up_proj.row_factor()
    gate = gate_proj.fused_forward(x, gate_factor.detach())
    up = up_proj.fused_forward(x, up_factor.detach())
    return self.down_proj(swiglu(gate, up, gate_factor, up_factor))


def _is_known(kind: type) -> bool:
    """Whether the very class is in the list; what a subclass of it computes is not known."""
    return f"{kind.__module__}.{kind.__qualname__}" in GATED_MLPS


def _computes_swiglu(module: nn.Module) -> bool:
    """Whether an MLP of the list gives what `_joined_forward` gives: its activation, and what another version of its
    family does, only show in numbers. Its class's forward runs with plain functions in the place of projections."""
    gate, up, down = lambda x: x + 1, lambda x: 2 * x - 3, lambda x: 3 * x + 5
    stand_in = SimpleNamespace(gate_proj=gate, up_proj=up, down_proj=down, act_fn=module.act_fn)
    x = torch.linspace(-8, 8, 33, device="cpu")  # not where the model is, which has no values yet
    try:
        found = type(module).forward(stand_in, x)
    except AttributeError:  # reads more of itself than projections and activation
        return False
    return torch.allclose(found, down(F.silu(gate(x)) * up(x)))
