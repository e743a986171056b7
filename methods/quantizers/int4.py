"""Symmetric 4-bit integers, as compressed-tensors and GPTQ store them: `W = (code - 8) * scale`."""

from dataclasses import dataclass
from functools import partial

import torch

from methods.kernels import dequantize as kernels
from methods.packed import STORED_BYTES, Quantizer, as_bytes

SCALE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ZERO = 8  # the code of a weight of zero


@dataclass(frozen=True)
class Int4(Quantizer):
    """Codes `[out, in/2]`, low nibble first, and scales `[out, in/group]`.

    A weight is rounded to the dtype of the scales before anything else is done with it: stock software multiplies in
    that dtype, and in a wider one the numbers would be others. HQQ's layout cannot say that.
    """

    group_size: int = 128
    scales: str = "bf16"
    bits = 4

    def layout(self, rows, columns):
        return {
            "codes": ((rows, columns // 2), STORED_BYTES),
            "scales": ((rows, columns // self.group_size), SCALE_DTYPES[self.scales]),
        }

    def quantize(self, rows):
        """To the nearest code, the largest of a group being 7 scales."""
        groups = rows.float().unflatten(1, (-1, self.group_size))  # [n, in/group, group]
        scales = (groups.abs().amax(-1) / (ZERO - 1)).to(SCALE_DTYPES[self.scales])
        scales = torch.where(scales > 0, scales, 1)
        codes = (groups / scales.float().unsqueeze(-1)).round().clamp(-ZERO, ZERO - 1) + ZERO
        codes = codes.flatten(1).to(torch.uint8)
        return (codes[:, ::2] | codes[:, 1::2] << 4).view(STORED_BYTES), scales

    def dequantize(self, packed, *, in_features, dtype, row_factor=None, out=None):
        plain = partial(self.dequantize_plain, packed, in_features=in_features, row_factor=row_factor)
        kernel = partial(kernels.int4_rows, *packed, group_size=self.group_size, row_factor=row_factor)
        return kernels.rows_by(plain, kernel, packed[0], in_features=in_features, dtype=dtype, out=out)

    def dequantize_plain(self, packed, *, in_features, dtype, row_factor=None):
        """The definition, in torch."""
        codes, scales = packed
        codes = as_bytes(codes)
        nibbles = torch.stack([codes & 15, codes >> 4], dim=-1)  # [n, in/2, 2]
        groups = (nibbles.to(torch.int8) - ZERO).view(len(codes), in_features // self.group_size, self.group_size)
        weight = (groups.to(scales.dtype) * scales.unsqueeze(-1)).view(len(codes), in_features)
        if row_factor is not None:
            weight = weight.float() * row_factor.unsqueeze(1)
        return weight.to(dtype)

    def row_peaks(self, packed):
        return packed[1].abs().amax(1).float() * ZERO
