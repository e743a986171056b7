"""MXFP4, as gpt-oss is published: 4-bit floats, and for each 32 of them a power of two in a byte.

The format is that of the Open Compute Project (Microscaling Formats 1.0); its values are those of transformers'
`convert_moe_packed_tensors`, of which bf16 holds each exactly.
"""

from dataclasses import dataclass
from functools import partial

import torch

from methods.kernels import dequantize as kernels
from methods.packed import STORED_BYTES, Quantizer, as_bytes

BIAS = 127  # of the exponents
LARGEST = kernels.E2M1[7]
# between the eight magnitudes, where rounding changes
MIDPOINTS = [(low + high) / 2 for low, high in zip(kernels.E2M1[:7], kernels.E2M1[1:8], strict=True)]


@dataclass(frozen=True)
class MXFP4(Quantizer):
    """Codes `[out, in/2]`, high nibble first as in `Bnb4bit`, and exponents `[out, in/32]`, a byte each.

    Files have the low nibble first; so turned, the kernel for bitsandbytes' tables reads them, with scales in fp32.
    """

    group_size: int = 32
    bits = 4
    scales, quant_type = "e8m0", "mxfp4"

    def layout(self, rows, columns):
        groups = (rows, columns // self.group_size)
        return {"codes": ((rows, columns // 2), STORED_BYTES), "scales": (groups, STORED_BYTES)}

    def quantize(self, rows):
        """To the nearest code under the smallest power of two that cuts nothing off, as gpt-oss' own tools do."""
        groups = rows.float().unflatten(1, (-1, self.group_size))  # [n, in/32, 32]
        fraction, exponent = torch.frexp(groups.abs().amax(-1) / LARGEST)
        exponent = exponent - (fraction == 0.5).int()  # frexp is above a power of two itself
        scales = (exponent + BIAS).clamp(0, 2 * BIAS).to(torch.uint8)
        scaled = groups / powers(scales).unsqueeze(-1)
        codes = torch.bucketize(scaled.abs(), torch.tensor(MIDPOINTS, device=rows.device)) + 8 * (scaled < 0)
        codes = codes.flatten(1).to(torch.uint8)
        return (codes[:, ::2] << 4 | codes[:, 1::2]).view(STORED_BYTES), scales.view(STORED_BYTES)

    def dequantize(self, packed, *, in_features, dtype, row_factor=None, out=None):
        codes, scales = packed
        plain = partial(self.dequantize_plain, packed, in_features=in_features, row_factor=row_factor)
        settings = dict(quant_type=self.quant_type, group_size=self.group_size, row_factor=row_factor)
        kernel = lambda to: kernels.table_rows(codes, powers(scales), None, to, **settings)
        return kernels.rows_by(plain, kernel, codes, in_features=in_features, dtype=dtype, out=out)

    def dequantize_plain(self, packed, *, in_features, dtype, row_factor=None):
        """The definition, in torch."""
        codes, scales = as_bytes(packed[0]), powers(packed[1])
        if row_factor is not None:
            scales = scales * row_factor.unsqueeze(1)
        nibbles = torch.stack([codes >> 4, codes & 15], dim=-1)  # [n, in/2, 2]
        values = torch.tensor(kernels.E2M1, device=codes.device)[nibbles.int()]
        groups = values.view(len(codes), in_features // self.group_size, self.group_size)
        return (groups * scales.unsqueeze(-1)).to(dtype).view(len(codes), in_features)

    def row_peaks(self, packed):
        return powers(packed[1]).amax(1) * LARGEST


def powers(exponents: torch.Tensor) -> torch.Tensor:
    """`2 ** (e - 127)` of bytes e, fp32: e stands where a float has its exponent. 255, no number, is infinity."""
    bits = as_bytes(exponents).to(torch.int32) << 23
    return bits.clamp_min(2**22).view(torch.float32)  # 2**-127 is no normal float: it is half of the smallest
