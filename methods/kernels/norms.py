"""Triton: DoRA's factored row norm of a 4-bit weight from its packed rows; the weight is never written.

`methods.dora.row_norms` defines the result.
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

from methods.kernels.dequantize import code_table
from methods.quantizers.linear import as_bytes

MAX_RANK, MAX_GROUP = 128, 128  # beyond them the tiles no longer fit
ROWS, PROGRAMS, WARPS, STAGES = 64, 528, 4, 3  # of a tile; to keep 132 multiprocessors busy


if triton is not None:

    @triton.jit
    def _cross_kernel(
        codes, scales, ranges, table, a, cross, rows, groups, rank, per_split,
        GROUP: tl.constexpr, DOUBLE: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr,
    ):  # fmt: skip
        """One split's share of `W A^T`, and below it of `A A^T`: A is a few more rows of W."""
        HALF: tl.constexpr = GROUP // 2
        weight_blocks = tl.cdiv(rows, ROWS)
        block, first = tl.program_id(0), tl.program_id(1) * per_split
        last = tl.minimum(first + per_split, groups)
        width = groups * GROUP
        lane, half, r = tl.arange(0, GROUP), tl.arange(0, HALF), tl.arange(0, RANK)
        right = a + r[None, :] * width + lane[:, None]  # A^T, one group of columns: [GROUP, RANK]
        known = r < rank
        total = tl.zeros((ROWS, RANK), tl.float32)
        if block < weight_blocks:
            row = block * ROWS + tl.arange(0, ROWS)
            inside = row < rows
            place, end = row, rows
            start = row.to(tl.int64) * groups
            if DOUBLE:
                low = tl.load(ranges + 2 * row, mask=inside, other=0)
                step = tl.load(ranges + 2 * row + 1, mask=inside, other=0)
            for group in range(first, last):
                scale = tl.load(scales + start + group, mask=inside, other=0).to(tl.float32)
                if DOUBLE:
                    scale = low + step * scale
                at = codes + ((start + group) * HALF)[:, None] + half[None, :]
                byte = tl.load(at, mask=inside[:, None], other=0).to(tl.int32)
                high = tl.load(table + (byte >> 4)) * scale[:, None]
                below = tl.load(table + (byte & 15)) * scale[:, None]
                weight = tl.join(high, below).reshape(ROWS, GROUP).to(a.dtype.element_ty)
                other = tl.load(right + group * GROUP, mask=known[None, :], other=0)
                total = tl.dot(weight, other, total, input_precision="ieee")
        else:
            row = (block - weight_blocks) * ROWS + tl.arange(0, ROWS)
            inside = row < rank
            place, end = rows + row, rows + rank
            for group in range(first, last):
                at = a + row[:, None] * width + group * GROUP + lane[None, :]
                own = tl.load(at, mask=inside[:, None], other=0)
                other = tl.load(right + group * GROUP, mask=known[None, :], other=0)
                total = tl.dot(own, other, total, input_precision="ieee")
        at = (tl.program_id(1) * (rows + rank) + place)[:, None] * rank + r[None, :]
        tl.store(cross + at, total, mask=(place < end)[:, None] & known[None, :])

    @triton.jit
    def _norm_kernel(
        weight_norm, cross, b, out, rows, rank, splits, scaling, BLOCK: tl.constexpr, RANK: tl.constexpr
    ):  # fmt: skip
        row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = row < rows
        r = tl.arange(0, RANK)
        known = r < rank
        at = row[:, None] * rank + r[None, :]
        mask = inside[:, None] & known[None, :]
        lora_b = tl.load(b + at, mask=mask, other=0).to(tl.float32)
        square_at, square_mask = (rows + r[:, None]) * rank + r[None, :], known[:, None] & known[None, :]
        product = tl.zeros((BLOCK, RANK), tl.float32)
        square = tl.zeros((RANK, RANK), tl.float32)
        for split in range(splits):
            part = cross + split * (rows + rank) * rank
            product += tl.load(part + at, mask=mask, other=0)
            square += tl.load(part + square_at, mask=square_mask, other=0)
        low_rank = tl.sum(tl.dot(lora_b, square, input_precision="ieee") * lora_b, axis=1)
        norm = tl.load(weight_norm + row, mask=inside, other=0)
        squared = norm * norm + 2 * scaling * tl.sum(product * lora_b, axis=1) + scaling * scaling * low_rank
        tl.store(out + row, tl.sqrt(tl.maximum(squared, 0)), mask=inside)


def fits(codes: torch.Tensor, *, rank: int, group_size: int) -> bool:
    """Whether the kernels run here: CUDA, tiles that fit."""
    return triton is not None and codes.is_cuda and rank <= MAX_RANK and group_size <= MAX_GROUP


def row_norms(codes, scales, ranges, weight_norm, lora_a, lora_b, scaling, *, quant_type, group_size) -> torch.Tensor:
    """`||W + s B A||` of each row, fp32 `[n]`; codes, scales and ranges as `dequantize.table_rows` takes them."""
    rows, groups, rank = len(codes), scales.shape[1], len(lora_a)
    out = torch.empty(rows, dtype=torch.float32, device=codes.device)
    if not rows:
        return out
    blocks = triton.cdiv(rows, ROWS) + triton.cdiv(rank, ROWS)
    splits = max(1, min(groups // 8, PROGRAMS // blocks))
    per_split = triton.cdiv(groups, splits)
    splits = triton.cdiv(groups, per_split)
    cross = torch.empty(splits, rows + rank, rank, dtype=torch.float32, device=codes.device)
    width = max(16, triton.next_power_of_2(rank))
    _cross_kernel[(blocks, splits)](
        as_bytes(codes), scales if ranges is None else as_bytes(scales), ranges, code_table(quant_type, codes.device),
        lora_a.contiguous(), cross, rows, groups, rank, per_split,
        GROUP=group_size, DOUBLE=ranges is not None, ROWS=ROWS, RANK=width, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    _norm_kernel[(triton.cdiv(rows, 64),)](
        weight_norm, cross, lora_b.contiguous(), out, rows, rank, splits, scaling, BLOCK=64, RANK=width, num_warps=4
    )
    return out
