"""Triton: row norms of `W + s B A` for a 4-bit W, read once as packed codes; no weight is written.

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

MAX_RANK = 128  # beyond it the accumulator no longer fits in registers


if triton is not None:

    @triton.jit
    def _table_norm_kernel(
        codes, scales, ranges, table, weight_norm, a, b, gram, out, rows, width, groups, rank, scaling,
        GROUP: tl.constexpr, DOUBLE: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr,
    ):  # fmt: skip
        HALF: tl.constexpr = GROUP // 2
        row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = row < rows
        r = tl.arange(0, RANK)
        first = row.to(tl.int64) * groups
        cross = tl.zeros((BLOCK, RANK), tl.float32)  # W A^T
        for group in range(0, groups):
            scale = tl.load(scales + first + group, mask=inside, other=0).to(tl.float32)
            if DOUBLE:
                low = tl.load(ranges + 2 * row, mask=inside, other=0)
                scale = low + tl.load(ranges + 2 * row + 1, mask=inside, other=0) * scale
            at = ((first + group) * HALF)[:, None] + tl.arange(0, HALF)[None, :]
            byte = tl.load(codes + at, mask=inside[:, None], other=0).to(tl.int32)
            high = tl.load(table + (byte >> 4)) * scale[:, None]
            below = tl.load(table + (byte & 15)) * scale[:, None]
            weight = tl.join(high, below).reshape(BLOCK, GROUP).to(a.dtype.element_ty)
            at = r[:, None] * width + group * GROUP + tl.arange(0, GROUP)[None, :]
            cross += tl.dot(weight, tl.trans(tl.load(a + at, mask=r[:, None] < rank, other=0)))
        lora_b = tl.load(b + row[:, None] * rank + r[None, :], mask=inside[:, None] & (r[None, :] < rank), other=0).to(
            tl.float32
        )
        products = tl.load(
            gram + r[:, None] * rank + r[None, :], mask=(r[:, None] < rank) & (r[None, :] < rank), other=0
        )
        low_rank = tl.sum(tl.dot(lora_b, products, input_precision="ieee") * lora_b, axis=1)
        norm = tl.load(weight_norm + row, mask=inside, other=0)
        squared = norm * norm + 2 * scaling * tl.sum(cross * lora_b, axis=1) + scaling * scaling * low_rank
        tl.store(out + row, tl.sqrt(tl.maximum(squared, 0)), mask=inside)


def fits(quantizer, packed, a: torch.Tensor) -> bool:
    """Whether `table_row_norms` can do it: bitsandbytes codes, 16-bit adapters, CUDA."""
    known = hasattr(quantizer, "quant_type") and a.dtype in (torch.bfloat16, torch.float16)
    return triton is not None and known and packed[0].is_cuda and a.shape[0] <= MAX_RANK


def table_row_norms(quantizer, packed, weight_norm, a, b, scaling: float) -> torch.Tensor:
    """`||W + s B A||` of each row, fp32 `[n]`; W from packed bitsandbytes rows, a `[r, in]`, b `[n, r]`."""
    codes, scales, ranges = (*packed, None)[:3]
    (rank, width), rows = a.shape, codes.shape[0]
    out = torch.empty(rows, dtype=torch.float32, device=codes.device)
    if rows:
        wide = a.float()
        _table_norm_kernel[(triton.cdiv(rows, 64),)](
            as_bytes(codes), scales if ranges is None else as_bytes(scales), ranges,
            code_table(quantizer.quant_type, codes.device), weight_norm, a.contiguous(), b.contiguous(), wide @ wide.T,
            out,
            rows, width, width // quantizer.group_size, rank, scaling,
            GROUP=quantizer.group_size, DOUBLE=ranges is not None, BLOCK=64, RANK=max(16, triton.next_power_of_2(rank)),
            num_warps=4,
        )  # fmt: skip
    return out
