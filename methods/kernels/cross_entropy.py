"""Head and cross entropy in one step, chunk by chunk, so that the logits of a batch never exist together.

The gradient of the hidden states is computed beside the loss; backward only scales it (as Liger-Kernel does,
arXiv:2410.10989). `linear_cross_entropy_plain` defines the result.
"""

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

LOGITS_BYTES = 128 * 2**20  # of one chunk


def linear_cross_entropy_plain(hidden, weight, bias, targets) -> torch.Tensor:
    """Sum of the cross entropies of `hidden @ weight.T + bias`, fp32 scalar. hidden `[t, h]`, targets `[t]`.

    A target of -100 predicts nothing.
    """
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), targets, reduction="sum")


if triton is not None:

    @triton.jit
    def _loss_and_gradient_kernel(logits, targets, losses, columns, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        logits += row * columns
        target = tl.load(targets + row)
        counts = (target >= 0).to(tl.float32)
        top, total = -float("inf"), 0.0
        for start in range(0, columns, BLOCK):
            at = start + tl.arange(0, BLOCK)
            values = tl.load(logits + at, mask=at < columns, other=-float("inf")).to(tl.float32)
            higher = tl.maximum(top, tl.max(values))
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(values - higher))
            top = higher
        at_target = tl.load(logits + tl.maximum(target, 0)).to(tl.float32)
        tl.store(losses + row, counts * (top + tl.log(total) - at_target))
        tl.debug_barrier()  # the target's logit is read before it is overwritten
        for start in range(0, columns, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < columns
            values = tl.load(logits + at, mask=inside, other=0).to(tl.float32)
            gradient = counts * (tl.exp(values - top) / total - (at == target).to(tl.float32))
            tl.store(logits + at, gradient.to(logits.dtype.element_ty), mask=inside)


def _losses_plain(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """fp32 losses `[t]`; overwrites `logits` `[t, v]` with their gradient."""
    values, counts, known = logits.float(), targets >= 0, targets.clamp_min(0)
    normaliser = values.logsumexp(1)
    losses = normaliser - values.gather(1, known[:, None])[:, 0]
    gradient = (values - normaliser[:, None]).exp_()
    gradient[torch.arange(len(targets), device=targets.device), known] -= 1
    logits.copy_(gradient * counts[:, None])
    return losses * counts


def _losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """As `_losses_plain`, in two passes over memory on CUDA."""
    if triton is None or not logits.is_cuda:
        return _losses_plain(logits, targets)
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    _loss_and_gradient_kernel[(len(logits),)](logits, targets, losses, logits.shape[1], BLOCK=4096, num_warps=16)
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets):
        rows = max(1, LOGITS_BYTES // (weight.shape[0] * hidden.element_size()))
        needs_hidden, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = F.linear(hidden[part], weight, bias)
            loss += _losses(logits, targets[part]).sum()  # logits now hold their gradient
            if needs_hidden:
                torch.mm(logits, weight, out=grad_hidden[part])
            if needs_weight:
                grad_weight += logits.T @ hidden[part]
            if needs_bias:
                grad_bias += logits.float().sum(0)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return loss

    @staticmethod
    def backward(ctx, grad):
        weight_dtype, bias_dtype = ctx.dtypes
        # in place: of a head that trains, a scaled copy would be the largest tensor of a step
        scaled = [None if kept is None else kept.mul_(grad.to(kept.dtype)) for kept in ctx.saved_tensors]
        hidden, weight, bias = scaled
        as_stored = lambda gradient, dtype: None if gradient is None else gradient.to(dtype)
        return hidden, as_stored(weight, weight_dtype), as_stored(bias, bias_dtype), None


def linear_cross_entropy(hidden, weight, bias, targets) -> torch.Tensor:
    """As `linear_cross_entropy_plain`, with at most LOGITS_BYTES of logits at a time."""
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets)
