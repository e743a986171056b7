"""compressed-tensors `pack-quantized`: 4-bit weights with one scale per group, for Marlin and Machete kernels.

W = (code - zero) * scale      code and zero are integers from -8 to 7; symmetric: zero = 0
"""

import torch

from fsdp_utils.export.formats import Format
from methods.quantizers.hqq import HQQ

LOW, HIGH = -8, 7
# ranges tried for each group; a little clipping often costs less than a coarser grid
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)


def grids(groups: torch.Tensor, *, symmetric: bool):
    """Yields (scale, zero), fp32 `[..., 1]` each, that cover the values of each group fully or nearly."""
    low = groups.amin(-1, keepdim=True).clamp(max=0)  # with 0 inside, the zero is a code
    high = groups.amax(-1, keepdim=True).clamp(min=0)
    width = 2 * torch.maximum(-low, high) if symmetric else high - low
    for shrink in SHRINKS:
        scale = width * shrink / (HIGH - LOW)
        scale = torch.where(scale > 0, scale, 1.0)
        yield scale, torch.zeros_like(scale) if symmetric else LOW - low * shrink / scale


def solve(weight: torch.Tensor, candidates, *, group_size: int, dtype: torch.dtype):
    """Round to nearest on the candidate grid with the smallest squared error, each group on its own.

    Args:
        weight: fp32 `[out, in]`.
        candidates: iterable of (scale, zero), fp32 `[out, in/group, 1]`; zeros are rounded here.
        dtype: storage dtype of the scales; codes are solved for the rounded ones.

    Returns:
        codes int8 `[out, in]`, scales `[out, in/group]` in `dtype`, zeros int8 `[out, in/group]`.
    """
    groups = weight.unflatten(1, (-1, group_size))  # [out, in/group, group]
    best = None
    for scale, zero in candidates:
        scale, zero = scale.to(dtype).float(), zero.round().clamp(LOW, HIGH)
        codes = (groups / scale + zero).round().clamp(LOW, HIGH)
        error = ((codes - zero) * scale - groups).square().sum(-1, keepdim=True)
        found = (error, codes, scale, zero)
        best = best or found
        best = tuple(torch.where(error < best[0], new, old) for new, old in zip(found, best, strict=True))
    _, codes, scale, zero = best
    return codes.flatten(1).to(torch.int8), scale.squeeze(-1).to(dtype), zero.squeeze(-1).to(torch.int8)


def pack(values: torch.Tensor) -> torch.Tensor:
    """int8 `[n, m]` from -8 to 7 into int32 `[n, ceil(m/8)]`, first value in the low bits."""
    padded = torch.nn.functional.pad(values - LOW, (0, -values.shape[1] % 8)).to(torch.uint8)
    pairs = padded[:, ::2] | padded[:, 1::2] << 4  # [n, m/2]
    return pairs.reshape(-1).view(torch.int32).view(len(values), -1)


def scheme(*, symmetric: bool, group_size: int) -> dict:
    """How compressed-tensors describes the weights."""
    return dict(num_bits=4, type="int", symmetric=symmetric, strategy="group", group_size=group_size, dynamic=False)


class W4A16(Format):
    """Round to nearest from the merged weight. The grid that HQQ chose is tried too, where it is such a grid."""

    reader = "compressed_tensors"

    def __init__(self, trained, options):
        super().__init__(trained, options)
        self.symmetric, self.group_size = options.symmetric, options.group_size
        smaller = "use a smaller --group_size" if self.group_size > 32 else "use --infer_type merged"
        self.check_group(self.group_size, way_out=smaller)

    def linear_specs(self, path):
        out, width = self.trained.shapes[f"{path}.weight"]
        groups = width // self.group_size
        found = {
            f"{path}.weight_packed": (torch.int32, (out, width // 8)),
            f"{path}.weight_scale": (self.dtype, (out, groups)),
            f"{path}.weight_shape": (torch.int64, (2,)),
        }
        if not self.symmetric:
            found[f"{path}.weight_zero_point"] = (torch.int32, (-(-out // 8), groups))
        return found

    def linear_tensors(self, path):
        weight = self.trained.merged(path)
        candidates = [*grids(weight.unflatten(1, (-1, self.group_size)), symmetric=self.symmetric), *self._hqq(path)]
        codes, scales, zeros = solve(weight, candidates, group_size=self.group_size, dtype=self.dtype)
        found = {
            f"{path}.weight_packed": pack(codes),
            f"{path}.weight_scale": scales,
            f"{path}.weight_shape": torch.tensor(weight.shape),
        }
        if not self.symmetric:
            found[f"{path}.weight_zero_point"] = pack(zeros.T).T.contiguous()
        return found

    def _hqq(self, path):
        """HQQ's own (scale, zero) of each group, its zero to be rounded: it may be any fraction there."""
        quantizer = self.trained.quantizer
        same = isinstance(quantizer, HQQ) and (quantizer.bits, quantizer.group_size) == (4, self.group_size)
        if self.symmetric or not same or self.trained.run.kind != "adapter":
            return
        _, scales, zeros = self.trained.packed(path)
        factor = self.trained.row_factor(path).abs().unsqueeze(1)
        yield (scales.float() * factor).unsqueeze(-1), (zeros.float() + LOW).unsqueeze(-1)

    def quantization_config(self):
        weights = scheme(symmetric=self.symmetric, group_size=self.group_size)
        group = dict(targets=["Linear"], weights=weights, input_activations=None, output_activations=None)
        return dict(
            quant_method="compressed-tensors",
            format="pack-quantized",
            quantization_status="compressed",
            config_groups=dict(group_0=group),
            ignore=self.unpacked_linears(),
            kv_cache_scheme=None,
            global_compression_ratio=None,
        )
