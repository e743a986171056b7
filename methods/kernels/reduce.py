"""Sums in one pass over their operands on CUDA: the column-wise dot product that the magnitude's gradient is, and the
gradients of several processes."""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


if triton is not None:

    @triton.jit
    def _column_dot_kernel(left, right, partial, rows, columns, per_program, R: tl.constexpr, C: tl.constexpr):
        column = tl.program_id(0) * C + tl.arange(0, C)
        start = tl.program_id(1) * per_program
        # summed over R once, at the end: a sum per step would wait on shared memory
        total = tl.zeros((R, C), tl.float32)
        for step in range(0, per_program, R):
            row = start + step + tl.arange(0, R)
            at = row[:, None].to(tl.int64) * columns + column[None, :]
            mask = (row[:, None] < rows) & (column[None, :] < columns)
            value = tl.load(left + at, mask=mask, other=0).to(tl.float32)
            total += value * tl.load(right + at, mask=mask, other=0).to(tl.float32)
        at = tl.program_id(1) * columns + column
        tl.store(partial + at, tl.sum(total, axis=0), mask=column < columns)

    @triton.jit
    def _add_kernel(own, others, out, count, factor, OTHERS: tl.constexpr, BLOCK: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < count
        total = tl.load(own + at, mask=inside, other=0).to(tl.float32)
        for other in range(OTHERS):
            total += tl.load(others + other * count + at, mask=inside, other=0).to(tl.float32)
        tl.store(out + at, (total * factor).to(out.dtype.element_ty), mask=inside)


def add_plain(own: torch.Tensor, others: torch.Tensor, factor: float, *, out: torch.Tensor) -> torch.Tensor:
    """`factor * (own + others[0] + others[1] + ...)`, `[n]` and `[k, n]` of one dtype, in fp32, rounded once into
    `out`."""
    total = own.float()
    for other in others:
        total = total + other.float()
    return out.copy_(total * factor)


def add_kernel(own: torch.Tensor, others: torch.Tensor, factor: float, *, out: torch.Tensor) -> torch.Tensor:
    """As `add_plain`."""
    if out.numel():
        programs = (triton.cdiv(out.numel(), 4096),)
        _add_kernel[programs](own, others, out, out.numel(), factor, OTHERS=len(others), BLOCK=4096, num_warps=8)
    return out


def add(own: torch.Tensor, others: torch.Tensor, factor: float, *, out: torch.Tensor) -> torch.Tensor:
    """The fastest of the two that runs here."""
    return (add_kernel if triton is not None and own.is_cuda else add_plain)(own, others, factor, out=out)


def column_dot_plain(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`sum over rows of left * right`, `[t, n]` each, to fp32 `[n]`."""
    return (left.float() * right.float()).sum(0)


def column_dot_kernel(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """As `column_dot_plain`; partial sums per block of rows, added in a fixed order, so runs repeat exactly."""
    rows, columns = left.shape
    left, right = left.contiguous(), right.contiguous()
    blocks = max(1, min(32, rows // 64))
    per_program = triton.cdiv(triton.cdiv(rows, blocks), 16) * 16
    partial = torch.empty(blocks, columns, dtype=torch.float32, device=left.device)
    _column_dot_kernel[(triton.cdiv(columns, 128), blocks)](
        # rows per program are no constant: every length of batch would be compiled
        left, right, partial, rows, columns, per_program, R=16, C=128, num_warps=4, num_stages=4,
    )  # fmt: skip
    return partial.sum(0)


def column_dot(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The fastest of the two that runs here."""
    return column_dot_kernel(left, right) if triton is not None and left.is_cuda else column_dot_plain(left, right)
