"""4-bit integers, evenly spaced in each group of a row, as compressed-tensors and GPTQ store them.

Bases that come so, or are made so, are symmetric: `W = (code - 8) * scale`. Exports may have a zero for each group.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch

from methods.kernels import dequantize as kernels
from methods.packed import STORED_BYTES, Quantizer, as_bytes

SCALE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ZERO = 8  # the code of a weight of zero
LOW, HIGH = -ZERO, 7
# ranges tried for each group; a little clipping often costs less than a coarser grid. With the first, the largest of a
# symmetric group is 7 scales, whatever its sign.
SHRINKS = ((HIGH - LOW) / (2 * HIGH), 1.0, 0.95, 0.9, 0.85, 0.8)


def grids(groups: torch.Tensor, *, symmetric: bool):
    """Yields (scale, zero), fp32 `[..., 1]` each, that cover the values of each group fully or nearly."""
    low = groups.amin(-1, keepdim=True).clamp(max=0)  # with 0 inside, the zero is a code
    high = groups.amax(-1, keepdim=True).clamp(min=0)
    width = 2 * torch.maximum(-low, high) if symmetric else high - low
    for shrink in SHRINKS:
        scale = width * shrink / (HIGH - LOW)
        scale = torch.where(scale > 0, scale, 1.0)
        yield scale, torch.zeros_like(scale) if symmetric else LOW - low * shrink / scale


@dataclass(frozen=True)
class IntGrid:
    """Codes from -8 to 7, evenly spaced in each group of a row.

    Args:
        scale: fp32 `[out, in/group]`; zero: whole numbers, fp32, alike.
    """

    scale: torch.Tensor
    zero: torch.Tensor
    group_size: int

    def nearest(self, column, place):
        group = place // self.group_size
        scale, zero = self.scale[:, group], self.zero[:, group]
        return ((column / scale + zero).round().clamp(LOW, HIGH) - zero) * scale

    def codes(self, values: torch.Tensor) -> torch.Tensor:
        """int8 `[out, in]` of values `[out, in]` on the grid, or the next ones there."""
        groups = values.unflatten(1, (-1, self.group_size))
        codes = (groups / self.scale.unsqueeze(-1) + self.zero.unsqueeze(-1)).round().clamp(LOW, HIGH)
        return codes.flatten(1).to(torch.int8)


def choose(
    weight: torch.Tensor,
    candidates: Iterable[tuple[torch.Tensor, torch.Tensor]],
    *,
    group_size: int,
    dtype: torch.dtype,
    importance: torch.Tensor | None = None,
) -> IntGrid:
    """Of the candidates for each group that which rounds to the nearest with the smallest squared error.

    Args:
        weight: fp32 `[out, in]`.
        candidates: (scale, zero), fp32 `[out, in/group, 1]`; zeros are rounded here.
        dtype: storage dtype of the scales, which the error is that of.
        importance: what an error costs at each input, fp32 `[in]`; None: the same everywhere.
    """
    groups = weight.unflatten(1, (-1, group_size))  # [out, in/group, group]
    costs = 1 if importance is None else importance.unflatten(0, (-1, group_size))
    best = None
    for scale, zero in candidates:
        scale, zero = scale.to(dtype).float(), zero.round().clamp(LOW, HIGH)
        codes = (groups / scale + zero).round().clamp(LOW, HIGH)
        error = (((codes - zero) * scale - groups).square() * costs).sum(-1, keepdim=True)
        found = (error, scale, zero)
        best = best or found
        best = tuple(torch.where(error < best[0], new, old) for new, old in zip(found, best, strict=True))
    return IntGrid(best[1].squeeze(-1), best[2].squeeze(-1), group_size)


def numbers(codes: torch.Tensor) -> torch.Tensor:
    """int8 `[n, in]` from -8 to 7, of packed codes `[n, in/2]`."""
    codes = as_bytes(codes)
    return torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1).to(torch.int8) - ZERO


@dataclass(frozen=True)
class Int4(Quantizer):
    """Codes `[out, in/2]`, low nibble first, and scales `[out, in/group]`.

    A weight is rounded to the dtype of the scales before anything else is done with it: stock software multiplies in
    that dtype, and in a wider one the numbers would be others. HQQ's layout cannot say that.
    """

    group_size: int = 128
    scales: str = "bf16"
    bits = 4

    @classmethod
    def served(cls, config) -> "Int4":
        """As the export `w4a16` has it."""
        return cls(config.quant_group_size, "bf16")

    def layout(self, rows, columns):
        return {
            "codes": ((rows, columns // 2), STORED_BYTES),
            "scales": ((rows, columns // self.group_size), SCALE_DTYPES[self.scales]),
        }

    def quantize(self, rows):
        """To the nearest code, of the scales that lose least."""
        rows = rows.float()
        candidates = grids(rows.unflatten(1, (-1, self.group_size)), symmetric=True)
        grid = choose(rows, candidates, group_size=self.group_size, dtype=SCALE_DTYPES[self.scales])
        codes = (grid.codes(rows) + ZERO).to(torch.uint8)
        return (codes[:, ::2] | codes[:, 1::2] << 4).view(STORED_BYTES), grid.scale.to(SCALE_DTYPES[self.scales])

    def dequantize(self, packed, *, in_features, dtype, row_factor=None, out=None):
        plain = partial(self.dequantize_plain, packed, in_features=in_features, row_factor=row_factor)
        kernel = partial(kernels.int4_rows, *packed, group_size=self.group_size, row_factor=row_factor)
        return kernels.rows_by(plain, kernel, packed[0], in_features=in_features, dtype=dtype, out=out)

    def dequantize_plain(self, packed, *, in_features, dtype, row_factor=None):
        """The definition, in torch."""
        codes, scales = packed
        groups = numbers(codes).view(len(codes), in_features // self.group_size, self.group_size)
        weight = (groups.to(scales.dtype) * scales.unsqueeze(-1)).view(len(codes), in_features)
        if row_factor is not None:
            weight = weight.float() * row_factor.unsqueeze(1)
        return weight.to(dtype)

    def row_peaks(self, packed):
        return packed[1].abs().amax(1).float() * ZERO
