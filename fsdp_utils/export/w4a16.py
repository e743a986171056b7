"""compressed-tensors `pack-quantized`: 4-bit weights with one scale per group, for Marlin and Machete kernels.

W = (code - zero) * scale      code and zero are integers from -8 to 7; symmetric: zero = 0
"""

import torch

from fsdp_utils.core.ranks import say
from fsdp_utils.export.formats import Format
from methods.quantizers.hqq import HQQ
from methods.quantizers.int4 import LOW, SCALE_DTYPES, Int4, choose, grids, numbers

GROUPS = (128, 64, 32)  # that vLLM's kernels know


def pack(values: torch.Tensor) -> torch.Tensor:
    """int8 `[n, m]` from -8 to 7 into int32 `[n, ceil(m/8)]`, first value in the low bits."""
    padded = torch.nn.functional.pad(values - LOW, (0, -values.shape[1] % 8)).to(torch.uint8)
    pairs = padded[:, ::2] | padded[:, 1::2] << 4  # [n, m/2]
    return pairs.reshape(-1).view(torch.int32).view(len(values), -1)


def scheme(*, symmetric: bool, group_size: int) -> dict:
    """How compressed-tensors describes the weights."""
    return dict(num_bits=4, type="int", symmetric=symmetric, strategy="group", group_size=group_size, dynamic=False)


class W4A16(Format):
    """From the merged weight. The grid that HQQ chose is tried too, where it is such a grid."""

    reader, calibrates, packs_experts = "compressed_tensors", True, True

    def __init__(self, trained, options):
        super().__init__(trained, options)
        self.exact = self.holds(Int4)
        self.symmetric, self.group_size = options.symmetric or self.exact, self._fitting_group()
        self.calibrates = not self.exact
        # what training rounds, code times scale, it rounds in the dtype of scales, and so do their readers; DoRA's
        # factors, which go into the scales, it does not round
        as_rounded = self.exact and trained.run.config.method != "dora"
        self.scale_dtype = SCALE_DTYPES[trained.quantizer.scales] if as_rounded else self.dtype
        smaller = "use a smaller --group_size" if self.group_size > 32 else "use --infer_type merged"
        self.check_group(self.group_size, way_out=smaller)

    def _fitting_group(self) -> int:
        """--group_size, or the largest that divides the rows of all linears where it was not given."""
        if self.exact:
            return self.trained.quantizer.group_size
        wanted, widths = self.options.group_size, [self.trained.linears[path].in_features for path in self.packed]
        widths += [self.trained.shapes[path][-1] for path in self.trained.stacks]  # [experts, out, in]
        fitting = [size for size in GROUPS if not any(width % size for width in widths)]
        if "group_size" in self.options.explicit_flags or wanted in fitting or not fitting:
            return wanted
        say(f"note: --group_size {fitting[0]}: {wanted} does not divide the rows of this model's linears")
        return fitting[0]

    def linear_specs(self, path):
        return self.matrix_specs(path, self.trained.shapes[f"{path}.weight"])

    def matrix_specs(self, path, shape):
        out, width = shape
        groups = width // self.group_size
        found = {
            f"{path}.weight_packed": (torch.int32, (out, width // 8)),
            f"{path}.weight_scale": (self.scale_dtype, (out, groups)),
            f"{path}.weight_shape": (torch.int64, (2,)),
        }
        if not self.symmetric:
            found[f"{path}.weight_zero_point"] = (torch.int32, (-(-out // 8), groups))
        return found

    def grid(self, path, weight, importance=None):
        wide = weight.unflatten(1, (-1, self.group_size))
        candidates = [*grids(wide, symmetric=self.symmetric), *self._hqq(path)]
        return choose(weight, candidates, group_size=self.group_size, dtype=self.dtype, importance=importance)

    def linear_tensors(self, path):
        if self.exact:
            return self._as_trained(path)
        values, grid, _ = self.rounded(path)
        return self._stored(path, values, grid)

    def matrix_tensors(self, path, weight):
        return self._stored(path, weight, self.grid(path, weight))

    def _stored(self, path, values, grid):
        found = self._parts(path, grid.codes(values), grid.scale)
        if not self.symmetric:
            found[f"{path}.weight_zero_point"] = pack(grid.zero.to(torch.int8).T).T.contiguous()
        return found

    def _as_trained(self, path):
        """The codes of the base that holds the adapter; scales by what training multiplies rows with."""
        codes, scales = self.trained.packed(path)
        return self._parts(path, numbers(codes), scales.float() * self.trained.row_factor(path).unsqueeze(1))

    def _parts(self, path, codes, scale):
        """What is stored of codes int8 `[out, in]` and scales `[out, in/group]`."""
        return {
            f"{path}.weight_packed": pack(codes),
            f"{path}.weight_scale": scale.to(self.scale_dtype),
            f"{path}.weight_shape": torch.tensor(codes.shape),
        }

    def _hqq(self, path):
        """HQQ's own (scale, zero) of each group, its zero to be rounded: it may be any fraction there."""
        quantizer = self.trained.quantizer_at(path)
        same = isinstance(quantizer, HQQ) and (quantizer.bits, quantizer.group_size) == (4, self.group_size)
        if self.symmetric or not same:
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
