"""Triton kernels that turn packed rows into 16- or 32-bit rows, at the speed memory allows.

The quantizers' own torch code defines the result; these give the same bits when no row factor is passed.
"""

from functools import lru_cache

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without it
    triton = None

from methods.quantizers.linear import as_bytes

BYTES_PER_PROGRAM = 2048


def available(tensor: torch.Tensor) -> bool:
    """Whether the kernels can run on the device of `tensor`."""
    return triton is not None and tensor.is_cuda


if triton is not None:

    @triton.jit
    def _table_kernel(
        codes, scales, ranges, table, factors, out, size, row_bytes,
        GROUP_BYTES: tl.constexpr, DOUBLE: tl.constexpr, HAS_FACTOR: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = at < size
        byte = tl.load(codes + at, mask=mask, other=0).to(tl.int32)
        scale = tl.load(scales + at // GROUP_BYTES, mask=mask, other=0).to(tl.float32)
        row = at // row_bytes
        if DOUBLE:
            scale = (
                tl.load(ranges + 2 * row, mask=mask, other=0)
                + tl.load(ranges + 2 * row + 1, mask=mask, other=0) * scale
            )
        if HAS_FACTOR:
            scale *= tl.load(factors + row, mask=mask, other=0)
        high = tl.load(table + (byte >> 4)) * scale
        low = tl.load(table + (byte & 15)) * scale
        pair = tl.join(high, low)  # [BLOCK, 2]
        where = tl.join(2 * at, 2 * at + 1)
        tl.store(out + where, pair.to(out.dtype.element_ty), mask=tl.join(mask, mask))

    @triton.jit
    def _affine_kernel(
        codes, scales, zeros, factors, out, size, width, row_bytes,
        BITS: tl.constexpr, GROUP: tl.constexpr, HAS_FACTOR: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # weights, not bytes
        mask = at < size
        row = at // width
        column = at - row * width
        if BITS == 3:  # a plane of 2 bits, then a plane of 1
            first = codes + row * row_bytes
            two = tl.load(first + column // 4, mask=mask, other=0).to(tl.int32) >> (6 - 2 * (column % 4)).to(tl.int32)
            one = tl.load(first + width // 4 + column // 8, mask=mask, other=0).to(tl.int32)
            code = ((two & 3) << 1) | ((one >> (7 - column % 8).to(tl.int32)) & 1)
        else:
            PER_BYTE: tl.constexpr = 8 // BITS
            byte = tl.load(codes + at // PER_BYTE, mask=mask, other=0).to(tl.int32)
            code = (byte >> (8 - BITS - BITS * (at % PER_BYTE)).to(tl.int32)) & ((1 << BITS) - 1)
        scale = tl.load(scales + at // GROUP, mask=mask, other=0).to(tl.float32)
        zero = tl.load(zeros + at // GROUP, mask=mask, other=0).to(tl.float32)
        value = (code.to(tl.float32) - zero) * scale
        if HAS_FACTOR:
            value *= tl.load(factors + row, mask=mask, other=0)
        tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


@lru_cache
def code_table(quant_type: str, device: torch.device) -> torch.Tensor:
    """The 16 values of bitsandbytes' 4-bit code, fp32."""
    from bitsandbytes.functional import get_4bit_type

    return get_4bit_type(quant_type, device=device).float().contiguous()


def table_rows(codes, scales, ranges, *, quant_type, group_size, in_features, dtype, row_factor=None) -> torch.Tensor:
    """bitsandbytes rows `[n, in]`: `table[code] * scale`, times `row_factor` (fp32 `[n]`) if given."""
    n = codes.shape[0]
    out = torch.empty(n, in_features, dtype=dtype, device=codes.device)
    size = n * in_features // 2
    if size:
        _table_kernel[(triton.cdiv(size, BYTES_PER_PROGRAM),)](
            as_bytes(codes), scales if ranges is None else as_bytes(scales), ranges, code_table(quant_type, codes.device),
            row_factor, out, size, in_features // 2,
            GROUP_BYTES=group_size // 2, DOUBLE=ranges is not None, HAS_FACTOR=row_factor is not None,
            BLOCK=BYTES_PER_PROGRAM, num_warps=8,
        )  # fmt: skip
    return out


def affine_rows(codes, scales, zeros, *, bits, group_size, in_features, dtype, row_factor=None) -> torch.Tensor:
    """HQQ rows `[n, in]`: `(code - zero) * scale`, times `row_factor` (fp32 `[n]`) if given."""
    n = codes.shape[0]
    out = torch.empty(n, in_features, dtype=dtype, device=codes.device)
    if out.numel():
        block = 4096
        _affine_kernel[(triton.cdiv(out.numel(), block),)](
            as_bytes(codes), scales, zeros, row_factor, out, out.numel(), in_features, in_features * bits // 8,
            BITS=bits, GROUP=group_size, HAS_FACTOR=row_factor is not None, BLOCK=block, num_warps=8,
        )  # fmt: skip
    return out
