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
ROWS, PROGRAMS = 64, 528  # of a tile; at most, for 132 multiprocessors


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
        weight_norm, cross, gram, b, out, rows, rank, splits, stride, scaling, BLOCK: tl.constexpr, RANK: tl.constexpr,
        PART: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = row < rows
        r = tl.arange(0, RANK)
        at, mask = row[:, None] * rank + r[None, :], inside[:, None] & (r < rank)[None, :]
        product = tl.zeros((BLOCK, RANK), tl.float32)
        for split in range(splits):
            product += tl.load(cross + split * stride + at, mask=mask, other=0)
        # B (A A^T), a few columns of B at a time: the whole of A A^T would not stay in registers
        through = tl.zeros((BLOCK, RANK), tl.float32)
        for first in range(0, RANK, PART):
            part = first + tl.arange(0, PART)
            square_at = part[:, None] * rank + r[None, :]
            square_mask = (part < rank)[:, None] & (r < rank)[None, :]
            square = tl.zeros((PART, RANK), tl.float32)
            for split in range(splits):
                square += tl.load(gram + split * stride + square_at, mask=square_mask, other=0)
            some = tl.load(
                b + row[:, None] * rank + part[None, :], mask=inside[:, None] & (part < rank)[None, :], other=0
            )
            through = tl.dot(some.to(tl.float32), square, through, input_precision="tf32x3")
        lora_b = tl.load(b + at, mask=mask, other=0).to(tl.float32)
        norm = tl.load(weight_norm + row, mask=inside, other=0)
        added = tl.sum((2 * scaling * product + scaling * scaling * through) * lora_b, axis=1)
        tl.store(out + row, tl.sqrt(tl.maximum(norm * norm + added, 0)), mask=inside)


def fits(weight: torch.Tensor, *, rank: int, group_size: int = 1) -> bool:
    """Whether the kernels run here: CUDA, tiles that fit. `weight` may be packed, in groups of `group_size`."""
    return triton is not None and weight.is_cuda and rank <= MAX_RANK and group_size <= MAX_GROUP


def row_norms(codes, scales, ranges, weight_norm, lora_a, lora_b, scaling, *, quant_type, group_size) -> torch.Tensor:
    """`||W + s B A||` of each row, fp32 `[n]`; codes, scales and ranges as `dequantize.table_rows` takes them."""
    rows, groups, rank = len(codes), scales.shape[1], len(lora_a)
    if not rows:
        return weight_norm.clone()
    blocks = triton.cdiv(rows, ROWS) + triton.cdiv(rank, ROWS)
    splits = max(1, min(groups // 8, PROGRAMS // blocks))
    per_split = triton.cdiv(groups, splits)
    splits = triton.cdiv(groups, per_split)
    cross = torch.empty(splits, rows + rank, rank, dtype=torch.float32, device=codes.device)
    _cross_kernel[(blocks, splits)](
        as_bytes(codes), scales if ranges is None else as_bytes(scales), ranges, code_table(quant_type, codes.device),
        lora_a.contiguous(), cross, rows, groups, rank, per_split,
        GROUP=group_size, DOUBLE=ranges is not None, ROWS=ROWS, RANK=max(16, triton.next_power_of_2(rank)),
        num_warps=4, num_stages=1,  # with more, Triton looks the table up by asynchronous copies: 1.5 times as slow
    )  # fmt: skip
    stride = (rows + rank) * rank
    return finish(weight_norm, cross, cross[0, rows:], lora_b, scaling, splits=splits, stride=stride)


def finish(weight_norm, cross, gram, lora_b, scaling, *, splits: int = 1, stride: int = 0) -> torch.Tensor:
    """`sqrt(norm^2 + 2 s rowsum(cross * B) + s^2 rowsum((B gram) * B))`, fp32 `[n]`, in one pass.

    Args:
        weight_norm: fp32 `[n]`; cross: fp32 `[n, r]`; gram: fp32 `[r, r]`; lora_b: `[n, r]`.
        splits: of how many parts cross and gram are the sums, each `stride` elements after the one before.
    """
    rows, rank = lora_b.shape
    out = torch.empty(rows, dtype=torch.float32, device=lora_b.device)
    if rows:
        _norm_kernel[(triton.cdiv(rows, 32),)](
            weight_norm, cross, gram, lora_b.contiguous(), out, rows, rank, splits, stride, scaling,
            BLOCK=32, RANK=max(16, triton.next_power_of_2(rank)), PART=16, num_warps=4,
        )  # fmt: skip
    return out
