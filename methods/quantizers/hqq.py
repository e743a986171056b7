"""HQQ (half-quadratic quantization, mobiusml.github.io/hqq_blog): `W = (codes - zero) * scale`, 1 to 8 bits."""

from dataclasses import dataclass
from functools import partial

import torch

from methods.kernels import dequantize as kernels
from methods.packed import STORED_BYTES, Quantizer, as_bytes

# 3 bits are a plane of 2 and a plane of 1: no padding bits, unlike HQQ's ten codes in 32 bits
PLANES = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,), 1: (1,)}
SCALE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes `[n, in]` to bytes `[n, in*bits/8]`; planes side by side, first code in the high bits."""
    planes, below = [], bits
    for plane in PLANES[bits]:
        below -= plane
        per_byte = 8 // plane
        shifts = torch.arange(8 - plane, -1, -plane, dtype=torch.uint8, device=codes.device)
        part = (codes >> below) & (2**plane - 1)  # [n, in]
        part = part.view(len(codes), codes.shape[1] // per_byte, per_byte) << shifts
        planes.append(part.sum(-1, dtype=torch.uint8))
    return torch.cat(planes, dim=1)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of `pack`: bytes `[n, in*bits/8]` to uint8 codes `[n, in]`."""
    if bits == 8:
        return packed
    width = packed.shape[1] * 8 // bits
    codes, start, below = None, 0, bits
    for plane in PLANES[bits]:
        below -= plane
        stop = start + width * plane // 8
        shifts = torch.arange(8 - plane, -1, -plane, dtype=torch.uint8, device=packed.device)
        part = (packed[:, start:stop, None] >> shifts) & (2**plane - 1)
        part = part.reshape(len(packed), width) << below
        codes, start = (part if codes is None else codes | part), stop
    return codes


@dataclass(frozen=True)
class HQQ(Quantizer):
    """Codes `[out, in*bits/8]`, scales and zeros `[out, in/group]`; grouped along the row (HQQ's axis 1)."""

    bits: int = 4
    group_size: int = 64
    scales: str = "bf16"

    @classmethod
    def from_config(cls, config, *, checkpoint_dtype) -> "HQQ":
        # codes are solved for the rounded scale and zero, so bf16 costs no accuracy worth its bytes; but at 8 bits a
        # zero near 128 would be rounded to a whole step
        auto = "fp32" if config.n_bits == 8 else "bf16"
        return cls(
            config.n_bits, config.quant_group_size, auto if config.quant_scales == "auto" else config.quant_scales
        )

    def layout(self, out_features, in_features):
        groups = (out_features, in_features // self.group_size)
        return {
            "codes": ((out_features, in_features * self.bits // 8), STORED_BYTES),
            "scales": (groups, SCALE_DTYPES[self.scales]),
            "zeros": (groups, SCALE_DTYPES[self.scales]),
        }

    def quantize(self, rows):
        n, width = rows.shape
        groups = rows.float().reshape(-1, self.group_size)  # [n*groups, group]
        codes, scale, zero = solve(groups, levels=2**self.bits - 1, dtype=SCALE_DTYPES[self.scales])
        codes = pack(codes.to(torch.uint8).view(n, width), self.bits).view(STORED_BYTES)
        return codes, scale.view(n, width // self.group_size), zero.view(n, width // self.group_size)

    def dequantize(self, packed, *, in_features, dtype, row_factor=None, out=None):
        plain = partial(self.dequantize_plain, packed, in_features=in_features, row_factor=row_factor)
        settings = dict(bits=self.bits, group_size=self.group_size, row_factor=row_factor)
        kernel = partial(kernels.affine_rows, *packed, **settings)
        return kernels.rows_by(plain, kernel, packed[0], in_features=in_features, dtype=dtype, out=out)

    def row_peaks(self, packed):
        zeros = packed[2].float()
        furthest = torch.maximum(zeros.abs(), (2**self.bits - 1 - zeros).abs())
        return (furthest * packed[1].float()).amax(1)

    def dequantize_plain(self, packed, *, in_features, dtype, row_factor=None):
        """The definition, in torch."""
        codes, scales, zeros = packed
        n = codes.shape[0]
        values = unpack(as_bytes(codes), self.bits).view(n, in_features // self.group_size, self.group_size)
        weight = (values.float() - zeros.float().unsqueeze(-1)) * scales.float().unsqueeze(-1)
        if row_factor is not None:
            weight = weight * row_factor.view(n, 1, 1)
        return weight.to(dtype).view(n, in_features)


def solve(groups: torch.Tensor, *, levels: int, dtype: torch.dtype, iterations: int = 20):
    """HQQ's proximal solver for the zero, in fp32, each group on its own.

    The library stops when the error of the *whole* tensor rises, so rows quantized alone would differ from rows
    quantized together. Here every group keeps its own best zero, which is also never worse.

    Args:
        groups: fp32 `[g, group_size]`.
        dtype: storage dtype of scale and zero; the codes are solved for the rounded values.

    Returns:
        codes (float, whole numbers) `[g, group_size]`, scale and zero `[g, 1]` in `dtype`.
    """
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale = (high - low) / levels  # [g, 1]
    # a constant group, or one so narrow that its scale would round to zero, is its zero alone
    scale = torch.where(scale >= torch.finfo(torch.float32).tiny, scale, torch.ones_like(scale))
    scale = scale.to(dtype).float()
    zero = -low / scale
    best_zero, best_error = zero, torch.full_like(zero, torch.inf)
    beta = 10.0
    for _ in range(iterations):
        rounded = zero.to(dtype).float()
        codes = (groups / scale + rounded).round_().clamp_(0, levels)
        residual = groups - (codes - rounded) * scale
        error = residual.abs().mean(1, keepdim=True)
        better = error < best_error
        best_zero, best_error = torch.where(better, zero, best_zero), torch.where(better, error, best_error)
        size = residual.abs()  # shrinkage of the l_p norm, p = 0.7
        shrunk = residual.sign() * (size - size.clamp_min(1e-8).pow(-0.3) / beta).clamp_min_(0)
        zero = (codes - (groups - shrunk) / scale).mean(1, keepdim=True)
        beta *= 1.01
    scale, zero = scale.to(dtype), best_zero.to(dtype)
    codes = (groups / scale.float() + zero.float()).round_().clamp_(0, levels)
    return codes, scale, zero
