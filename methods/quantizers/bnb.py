"""bitsandbytes 4-bit: NF4 (QLoRA, arXiv:2305.14314) or FP4, one scale (absmax) per group of a row."""

from dataclasses import dataclass
from functools import partial

import bitsandbytes  # noqa: F401  registers torch.ops.bitsandbytes
import torch

from methods.kernels import dequantize as kernels
from methods.kernels import norms
from methods.packed import STORED_BYTES, Quantizer, as_bytes

SCALE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "double": STORED_BYTES}


@dataclass(frozen=True)
class Bnb4bit(Quantizer):
    """Codes `[out, in/2]`, high nibble first, and scales `[out, in/group]`, in bitsandbytes' own order."""

    quant_type: str = "nf4"
    group_size: int = 64
    scales: str = "bf16"
    bits = 4

    @classmethod
    def from_config(cls, config, *, checkpoint_dtype: torch.dtype) -> "Bnb4bit":
        scales = config.quant_scales
        if scales == "auto":  # the largest of a group of bf16 weights is itself a bf16 number
            scales = "bf16" if checkpoint_dtype == torch.bfloat16 else "fp32"
        return cls(config.quant_type, config.quant_group_size, scales)

    @classmethod
    def served(cls, config) -> "Bnb4bit":
        """As an export has it: NF4, whose scales stock software keeps in fp32."""
        return cls("nf4", config.quant_group_size, "fp32")

    def layout(self, out_features, in_features):
        groups = in_features // self.group_size
        parts = {
            "codes": ((out_features, in_features // 2), STORED_BYTES),
            "scales": ((out_features, groups), SCALE_DTYPES[self.scales]),
        }
        if self.scales == "double":
            parts["scale_range"] = ((out_features, 2), torch.float32)
        return parts

    def quantize(self, rows):
        n, width = rows.shape
        if n == 0:  # the op refuses empty input; a process may own no row of a small weight
            return tuple(
                torch.empty((0, *s[1:]), dtype=d, device=rows.device) for s, d in self.layout(0, width).values()
            )
        codes, absmax = torch.ops.bitsandbytes.quantize_4bit(
            rows.contiguous(), self.group_size, self.quant_type, torch.uint8
        )
        codes = codes.view(n, width // 2).view(STORED_BYTES)
        return codes, *self._pack_scales(absmax.view(n, width // self.group_size))

    def dequantize(self, packed, *, in_features, dtype, row_factor=None, out=None):
        codes, scales, ranges = (*packed, None)[:3]
        plain = partial(self.dequantize_plain, packed, in_features=in_features, row_factor=row_factor)
        settings = dict(quant_type=self.quant_type, group_size=self.group_size, row_factor=row_factor)
        kernel = partial(kernels.table_rows, codes, scales, ranges, **settings)
        return kernels.rows_by(plain, kernel, codes, in_features=in_features, dtype=dtype, out=out)

    def dequantize_plain(self, packed, *, in_features, dtype, row_factor=None):
        """bitsandbytes' own operator: the reference for the kernel, and the way on a CPU."""
        codes, *scales = packed
        if codes.shape[0] == 0:
            return torch.empty((0, in_features), dtype=dtype, device=codes.device)
        absmax = self.absmax(*scales)
        if row_factor is not None:
            absmax = absmax * row_factor.unsqueeze(1)
        known = dtype if dtype.itemsize > 1 else torch.float32
        shape, settings = (codes.shape[0], in_features), (self.group_size, self.quant_type)
        rows = torch.ops.bitsandbytes.dequantize_4bit(as_bytes(codes), absmax.reshape(-1), *settings, shape, known)
        return rows.to(dtype)

    def row_peaks(self, packed):
        return self.absmax(*packed[1:]).amax(1)  # the largest code is 1

    def row_norms(self, packed, weight_norm, lora_a, lora_b, scaling) -> torch.Tensor | None:
        """`methods.dora.row_norms` from packed rows, without their weight; None where the kernel does not run."""
        rows = norms.PackedRows(self.quant_type, self.group_size, *packed)
        if not norms.suits(rows, lora_a):
            return None
        return norms.row_norms(rows, weight_norm, lora_a=lora_a, lora_b=lora_b, scaling=scaling)

    def absmax(self, scales: torch.Tensor, scale_range: torch.Tensor | None = None) -> torch.Tensor:
        """Scales as fp32 `[n, in/group]`, from whatever way they are stored."""
        if scale_range is None:
            return scales.float()
        low, step = scale_range.split(1, dim=1)  # [n, 1] each
        return low + step * as_bytes(scales).float()

    def _pack_scales(self, absmax):
        """fp32 `[n, groups]` to what is stored. `double`: 8 bits between the row's smallest and largest scale.

        bitsandbytes' own double quantization spans 256 scales of several rows and cannot be sharded by rows.
        """
        if self.scales != "double":
            return (absmax.to(SCALE_DTYPES[self.scales]),)
        low, high = absmax.amin(1, keepdim=True), absmax.amax(1, keepdim=True)
        step = (high - low) / 255
        codes = ((absmax - low) / step.clamp_min(torch.finfo(torch.float32).tiny)).round().to(torch.uint8)
        return codes.view(STORED_BYTES), torch.cat([low, step], dim=1)
