"""Triton: the column-wise dot product that the magnitude's gradient is."""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def available(tensor: torch.Tensor) -> bool:
    return triton is not None and tensor.is_cuda


if triton is not None:

    @triton.jit
    def _column_dot_kernel(left, right, partial, rows, columns, ROWS: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
        column = tl.program_id(0) * C + tl.arange(0, C)
        start = tl.program_id(1) * ROWS
        inside = column < columns
        total = tl.zeros((C,), tl.float32)
        for step in range(0, ROWS, R):
            row = start + step + tl.arange(0, R)
            at = row[:, None].to(tl.int64) * columns + column[None, :]
            mask = (row[:, None] < rows) & inside[None, :]
            product = tl.load(left + at, mask=mask, other=0).to(tl.float32) * tl.load(
                right + at, mask=mask, other=0
            ).to(tl.float32)
            total += tl.sum(product, axis=0)
        tl.store(partial + tl.program_id(1) * columns + column, total, mask=inside)


def column_dot(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`[t, n]` twice to fp32 `[n]`; partial sums per block of rows, added in a fixed order, so runs repeat exactly."""
    rows, columns = left.shape
    left, right = left.contiguous(), right.contiguous()
    per_program = max(64, triton.cdiv(rows, 64))
    blocks = triton.cdiv(rows, per_program)
    partial = torch.empty(blocks, columns, dtype=torch.float32, device=left.device)
    grid = (triton.cdiv(columns, 128), blocks)
    _column_dot_kernel[grid](left, right, partial, rows, columns, ROWS=per_program, R=16, C=128, num_warps=4)
    return partial.sum(0)
