"""Triton kernels that turn packed rows into 16- or 32-bit rows, at the speed memory allows.

The quantizers' own torch code defines the result; these give the same bits when no row factor is passed. A program
handles whole groups, so that a scale is read once per group and a division by the row length is rare.
"""

from collections.abc import Callable
from functools import lru_cache

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without it
    triton = None

from methods.packed import as_bytes

WEIGHTS_PER_PROGRAM = 4096
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)  # 4-bit floats


def available(tensor: torch.Tensor) -> bool:
    """Whether the kernels can run on the device of `tensor`."""
    return triton is not None and tensor.is_cuda


if triton is not None:

    @triton.jit
    def _table_kernel(
        codes, scales, ranges, table, factors, out, groups, groups_per_row, out_stride,
        GROUP: tl.constexpr, DOUBLE: tl.constexpr, HAS_FACTOR: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        HALF: tl.constexpr = GROUP // 2
        first = tl.program_id(0).to(tl.int64) * BLOCK
        group = tl.arange(0, BLOCK)
        inside = first + group < groups
        row = (first + group) // groups_per_row  # [BLOCK]
        scale = tl.load(scales + first + group, mask=inside, other=0).to(tl.float32)
        if DOUBLE:
            low = tl.load(ranges + 2 * row, mask=inside, other=0)
            scale = low + tl.load(ranges + 2 * row + 1, mask=inside, other=0) * scale
        if HAS_FACTOR:
            scale *= tl.load(factors + row, mask=inside, other=0)
        at = group[:, None] * HALF + tl.arange(0, HALF)[None, :]  # [BLOCK, HALF]
        byte = tl.load(codes + first * HALF + at, mask=inside[:, None], other=0).to(tl.int32)
        high = tl.load(table + (byte >> 4)) * scale[:, None]
        below = tl.load(table + (byte & 15)) * scale[:, None]
        values = tl.join(high, below).reshape(BLOCK, GROUP)
        column = (first + group) - row * groups_per_row
        start = row * out_stride + column * GROUP
        place = start[:, None] + tl.arange(0, GROUP)[None, :]
        tl.store(out + place, values.to(out.dtype.element_ty), mask=inside[:, None])

    @triton.jit
    def _affine_kernel(
        codes, scales, zeros, factors, out, groups, groups_per_row, row_bytes, out_stride,
        BITS: tl.constexpr, GROUP: tl.constexpr, HAS_FACTOR: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = index < groups
        row = index // groups_per_row
        column = (index - row * groups_per_row) * GROUP  # first weight of the group in its row
        scale = tl.load(scales + index, mask=inside, other=0).to(tl.float32)
        zero = tl.load(zeros + index, mask=inside, other=0).to(tl.float32)
        if HAS_FACTOR:
            scale *= tl.load(factors + row, mask=inside, other=0)
        lane = tl.arange(0, GROUP)[None, :]
        mask = inside[:, None] & (lane >= 0)
        start = row * row_bytes
        if BITS == 3:  # a plane of 2 bits, then a plane of 1
            two = tl.load(codes + (start + column // 4)[:, None] + lane // 4, mask=mask, other=0).to(tl.int32)
            plane = start + groups_per_row * (GROUP // 4) + column // 8
            one = tl.load(codes + plane[:, None] + lane // 8, mask=mask, other=0).to(tl.int32)
            code = (((two >> (6 - 2 * (lane % 4))) & 3) << 1) | ((one >> (7 - lane % 8)) & 1)
        else:
            PER_BYTE: tl.constexpr = 8 // BITS
            byte = tl.load(codes + (start + column // PER_BYTE)[:, None] + lane // PER_BYTE, mask=mask, other=0)
            code = (byte.to(tl.int32) >> (8 - BITS - BITS * (lane % PER_BYTE))) & ((1 << BITS) - 1)
        value = (code.to(tl.float32) - zero[:, None]) * scale[:, None]
        place = (row * out_stride + column)[:, None] + lane
        tl.store(out + place, value.to(out.dtype.element_ty), mask=mask)

    @triton.jit
    def _int4_kernel(
        codes, scales, factors, out, groups, groups_per_row, out_stride,
        GROUP: tl.constexpr, HAS_FACTOR: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        HALF: tl.constexpr = GROUP // 2
        first = tl.program_id(0).to(tl.int64) * BLOCK
        group = tl.arange(0, BLOCK)
        inside = first + group < groups
        row = (first + group) // groups_per_row  # [BLOCK]
        scale = tl.load(scales + first + group, mask=inside, other=0).to(tl.float32)
        at = group[:, None] * HALF + tl.arange(0, HALF)[None, :]  # [BLOCK, HALF]
        byte = tl.load(codes + first * HALF + at, mask=inside[:, None], other=0).to(tl.int32)
        below = ((byte & 15) - 8).to(tl.float32) * scale[:, None]
        high = ((byte >> 4) - 8).to(tl.float32) * scale[:, None]
        # a product in the dtype of the scales
        values = tl.join(below, high).reshape(BLOCK, GROUP).to(scales.dtype.element_ty).to(tl.float32)
        if HAS_FACTOR:
            values *= tl.load(factors + row, mask=inside, other=0)[:, None]
        start = row * out_stride + ((first + group) - row * groups_per_row) * GROUP
        place = start[:, None] + tl.arange(0, GROUP)[None, :]
        tl.store(out + place, values.to(out.dtype.element_ty), mask=inside[:, None])

    @triton.jit
    def _dense_kernel(weight, factors, out, columns, out_stride, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(weight + row * columns + column, mask=column < columns, other=0).to(tl.float32)
        value *= tl.load(factors + row)
        tl.store(out + row * out_stride + column, value.to(out.dtype.element_ty), mask=column < columns)


def rows_by(
    plain: Callable, kernel: Callable, codes: torch.Tensor, *, in_features: int, dtype: torch.dtype, out=None
) -> torch.Tensor:
    """Weights `[n, in]`, into `out` if given: by `kernel`, which writes them into a tensor, where kernels run, else by
    `plain`, which takes a dtype."""
    if not available(codes):
        rows = plain(dtype=dtype)
        return rows if out is None else out.copy_(rows)
    return kernel(torch.empty(len(codes), in_features, dtype=dtype, device=codes.device) if out is None else out)


def dense_rows(weight: torch.Tensor, row_factor: torch.Tensor, *, dtype: torch.dtype, out=None) -> torch.Tensor:
    """Weights `[n, in]` times `row_factor`, fp32 `[n]`, in one pass: torch's own of 16 and 32 bits reads a number at a
    time, and took 95 ms of a step of 773 (8B, DoRA)."""
    plain = lambda dtype: (weight * row_factor.unsqueeze(1)).to(dtype)

    def kernel(out):
        columns = weight.shape[1]
        _dense_kernel[(len(weight), triton.cdiv(columns, WEIGHTS_PER_PROGRAM))](
            weight, row_factor, out, columns, out.stride(0), BLOCK=WEIGHTS_PER_PROGRAM, num_warps=4
        )
        return out

    return rows_by(plain, kernel, weight, in_features=weight.shape[1], dtype=dtype, out=out)


@lru_cache
def code_table(quant_type: str, device: torch.device) -> torch.Tensor:
    """The 16 values of a 4-bit code, fp32: bitsandbytes' nf4 and fp4, or mxfp4."""
    if quant_type == "mxfp4":
        return torch.tensor(E2M1, device=device)
    from bitsandbytes.functional import get_4bit_type

    return get_4bit_type(quant_type, device=device).float().contiguous()


def table_rows(codes, scales, ranges, out, *, quant_type, group_size, row_factor=None) -> torch.Tensor:
    """Rows of codes, high nibble first, into `out` `[n, in]` (rows may be strided): `table[code] * scale`, times
    `row_factor`."""
    groups, table = scales.numel(), code_table(quant_type, codes.device)
    block = WEIGHTS_PER_PROGRAM // group_size
    if groups:
        _table_kernel[(triton.cdiv(groups, block),)](
            as_bytes(codes), scales if ranges is None else as_bytes(scales), ranges, table,
            row_factor, out, groups, scales.shape[1], out.stride(0),
            GROUP=group_size, DOUBLE=ranges is not None, HAS_FACTOR=row_factor is not None, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return out


def affine_rows(codes, scales, zeros, out, *, bits, group_size, row_factor=None) -> torch.Tensor:
    """HQQ rows into `out` `[n, in]` (rows may be strided): `(code - zero) * scale`, times `row_factor`."""
    groups = scales.numel()
    block = WEIGHTS_PER_PROGRAM // group_size
    if groups:
        _affine_kernel[(triton.cdiv(groups, block),)](
            as_bytes(codes), scales, zeros, row_factor, out, groups, scales.shape[1], codes.shape[1], out.stride(0),
            BITS=bits, GROUP=group_size, HAS_FACTOR=row_factor is not None, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return out


def int4_rows(codes, scales, out, *, group_size, row_factor=None) -> torch.Tensor:
    """Rows of `Int4` into `out` `[n, in]` (rows may be strided): `(code - 8) * scale`, rounded to the dtype of the
    scales, times `row_factor`."""
    groups = scales.numel()
    block = WEIGHTS_PER_PROGRAM // group_size
    if groups:
        _int4_kernel[(triton.cdiv(groups, block),)](
            as_bytes(codes), scales, row_factor, out, groups, scales.shape[1], out.stride(0),
            GROUP=group_size, HAS_FACTOR=row_factor is not None, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return out
