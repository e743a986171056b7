"""Products of 8-bit floats, e4m3, with a scale a row on either side: about twice as fast as in 16 bits where tensor
cores have them (Ada, Hopper, Blackwell).

A row's largest entry becomes the largest number there is, 448, and 3 bits behind the leading one are left: a product of
random numbers comes out 3.8 % off. Written in plain operators, so that the compiler makes it part of the pass that
makes the rows (a norm, an activation); where these are wide, a kernel.
"""

from typing import NamedTuple

import torch

from methods.kernels import dequantize

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

Tensor = torch.Tensor
E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
COMPUTES = torch.bfloat16  # what torch's scaled product gives where scales are of rows


TILE = 64  # bytes of a row or column, read and written at once
TINY = 2 * torch.finfo(torch.float32).tiny * LARGEST  # of a row: its scale has an inverse
WIDE, WIDEST = 8192, 32768  # the compiler reads wider rows twice from memory; a program holds no wider ones


if triton is not None:

    @triton.jit
    def _transpose_kernel(matrix, out, rows, columns, TILE: tl.constexpr):
        row = tl.program_id(0) * TILE + tl.arange(0, TILE)
        column = tl.program_id(1) * TILE + tl.arange(0, TILE)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        tile = tl.load(matrix + row[:, None].to(tl.int64) * columns + column[None, :], mask=inside)
        place = column[:, None].to(tl.int64) * rows + row[None, :]
        tl.store(out + place, tl.trans(tile), mask=(column < columns)[:, None] & (row < rows)[None, :])

    @triton.jit
    def _rows_kernel(
        rows, columns, values, scales, width,
        LARGEST: tl.constexpr, TINY: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < width
        value = tl.load(rows + row * width + column, mask=inside, other=0).to(tl.float32)
        if SCALED:
            value *= tl.load(columns + column, mask=inside, other=0)
        scale = tl.maximum(tl.max(tl.abs(value), axis=0), TINY) * (1 / LARGEST)
        value = tl.minimum(tl.maximum(value * tl.div_rn(1.0, scale), -LARGEST), LARGEST)
        tl.store(values + row * width + column, value.to(values.dtype.element_ty), mask=inside)
        tl.store(scales + row, scale)


def transposed(matrix: Tensor) -> Tensor:
    """A matrix `[n, k]` of e4m3 as `[k, n]`, without gaps. torch's copy of single bytes writes them far apart."""
    if not dequantize.available(matrix):
        return matrix.T.contiguous()
    rows, columns = matrix.shape
    out = torch.empty(columns, rows, dtype=matrix.dtype, device=matrix.device)
    tiles = triton.cdiv(rows, TILE), triton.cdiv(columns, TILE)
    _transpose_kernel[tiles](matrix.view(torch.uint8), out.view(torch.uint8), rows, columns, TILE=TILE, num_warps=4)
    return out


class Scaled(NamedTuple):
    """`values * scale`: e4m3 `[n, k]` and fp32 `[n, 1]`."""

    values: Tensor
    scale: Tensor

    def whole(self) -> Tensor:
        """fp32 `[n, k]`."""
        return self.values.float() * self.scale


def scale_of(peak: Tensor) -> Tensor:
    """The scale of rows with these largest entries; a row of zeros has some."""
    return peak.float().clamp_min(TINY) * (1 / LARGEST)  # torch's division by a number differs from GPU to CPU


def by_rows_plain(rows: Tensor, columns: Tensor | None = None) -> Scaled:
    """`[n, k]` in any float dtype, its columns multiplied by `columns`, fp32 `[1, k]`, if given."""
    rows = rows if columns is None else rows * columns
    scale = scale_of(rows.abs().amax(1, keepdim=True))
    return Scaled((rows * scale.reciprocal()).clamp(-LARGEST, LARGEST).to(E4M3), scale)


def by_rows(rows: Tensor, *, columns: Tensor | None = None) -> Scaled:
    """As `by_rows_plain`; on GPUs wide rows are read once, by a kernel that holds a whole one."""
    if dequantize.available(rows) and WIDE < rows.shape[1] <= WIDEST:
        return Scaled(*torch.ops.fsdp_qlora.rows_in_fp8(rows, columns))
    return by_rows_plain(rows, columns)


def by_rows_kernel(rows: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    """The two tensors of `by_rows_plain`."""
    rows = rows.contiguous()
    count, width = rows.shape
    values, scale = rows.new_empty(count, width, dtype=E4M3), rows.new_empty(count, 1, dtype=torch.float32)
    if count:
        block = triton.next_power_of_2(width)
        settings = dict(LARGEST=LARGEST, TINY=TINY, SCALED=columns is not None, BLOCK=block, num_warps=16)
        _rows_kernel[(count,)](rows, columns, values, scale, width, **settings)
    return values, scale


# its own operator: the compiler looks into no kernel
_library = torch.library.Library("fsdp_qlora", "FRAGMENT")
_library.define("rows_in_fp8(Tensor rows, Tensor? columns) -> (Tensor, Tensor)")
_library.impl("rows_in_fp8", by_rows_kernel, "CUDA")


@torch.library.register_fake("fsdp_qlora::rows_in_fp8", lib=_library)
def _shapes(rows, columns):
    return rows.new_empty(rows.shape, dtype=E4M3), rows.new_empty(len(rows), 1, dtype=torch.float32)


def product(rows: Scaled, others: Scaled) -> Tensor:
    """`rows @ others.T`, bf16 `[n, m]`, of `[n, k]` and `[m, k]`; on CPUs in fp32, whose 8-bit products torch 2.11 has
    for a scale a matrix alone."""
    if not rows.values.is_cuda:
        return (rows.whole() @ others.whole().T).to(COMPUTES)
    scales = dict(scale_a=rows.scale, scale_b=others.scale.T)
    return torch._scaled_mm(rows.values, others.values.T, **scales, out_dtype=COMPUTES, use_fast_accum=True)


def available(device: torch.device) -> bool:
    """Whether products of e4m3 run there; on CPUs plainly."""
    return device.type == "cpu" or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9))
