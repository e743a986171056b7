"""The 4-bit format of transformers and bitsandbytes: flat codes, fp32 absmax per block, a JSON of the rest."""

import json
from dataclasses import dataclass, replace
from functools import cached_property

import bitsandbytes.functional
import torch

from fsdp_utils.core.errors import UserError
from fsdp_utils.core.ranks import say
from fsdp_utils.export.formats import Format, write_adapter
from methods.adapter import Pair
from methods.packed import as_bytes
from methods.quantizers.bnb import Bnb4bit


@dataclass(frozen=True)
class TableGrid:
    """The 16 values of a table, times the absmax of each group of a row.

    Args:
        table: fp32 `[16]`, by code.
        absmax: fp32 `[out, in/group]`.
    """

    table: torch.Tensor
    absmax: torch.Tensor
    group_size: int

    def nearest(self, column, place):
        scale = self.absmax[:, place // self.group_size]
        return self.table[self._code(column, scale)] * scale

    def codes(self, values: torch.Tensor) -> torch.Tensor:
        """uint8 `[out, in/2]` of values `[out, in]` on the grid, or the next ones there; high nibble first."""
        scale = self.absmax.repeat_interleave(self.group_size, dim=1)
        codes = self._code(values, scale).to(torch.uint8)
        return codes[:, ::2] << 4 | codes[:, 1::2]

    @cached_property
    def _order(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Between which values the next one is nearer, fp32 `[15]`, and the codes in their order."""
        levels, order = self.table.sort()
        return (levels[1:] + levels[:-1]) / 2, order

    def _code(self, values, scale):
        between, order = self._order
        return order[torch.bucketize(values / scale.clamp_min(torch.finfo(torch.float32).tiny), between)]


class Bnb(Format):
    """What both variants share. `quantizer` gives code (NF4 or FP4) and block size."""

    quantizer: Bnb4bit

    def linear_specs(self, path):
        out, width = self._shape(path)
        return {
            f"{path}.weight": (torch.uint8, (out * width // 2, 1)),
            f"{path}.weight.absmax": (torch.float32, (out * width // self.quantizer.group_size,)),
            f"{path}.weight.quant_map": (torch.float32, (16,)),
            self._state_name(path): (torch.uint8, tuple(self._state(path).shape)),
        }

    def stored(self, path: str, codes: torch.Tensor, absmax: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors of a linear, from codes `[out, in/2]` and fp32 absmax `[out, in/group]`."""
        return {
            f"{path}.weight": as_bytes(codes).reshape(-1, 1),
            f"{path}.weight.absmax": absmax.reshape(-1),
            f"{path}.weight.quant_map": bitsandbytes.functional.get_4bit_type(self.quantizer.quant_type, device="cpu"),
            self._state_name(path): self._state(path),
        }

    def quantization_config(self):
        return dict(
            quant_method="bitsandbytes",
            load_in_4bit=True,
            load_in_8bit=False,
            bnb_4bit_quant_type=self.quantizer.quant_type,
            bnb_4bit_compute_dtype=self._dtype_name,
            bnb_4bit_use_double_quant=False,
            bnb_4bit_quant_storage="uint8",
            # whole blocks too: vLLM fuses q, k, v and then looks for the block's name
            llm_int8_skip_modules=[*self.unpacked_linears(), *self.trained.new_blocks],
        )

    def as_trained(self, path: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The codes of a base `[out, in/2]`, and its absmax, fp32 `[out, in/group]`, by what training multiplies rows
        with."""
        codes, *scales = self.trained.packed(path)
        return codes, self.trained.quantizer.absmax(*scales) * self.trained.row_factor(path).unsqueeze(1)

    @property
    def _dtype_name(self):
        return str(self.dtype).removeprefix("torch.")

    def _shape(self, path):
        return self.trained.shapes[f"{path}.weight"]

    def _state_name(self, path):
        return f"{path}.weight.quant_state.bitsandbytes__{self.quantizer.quant_type}"

    def _state(self, path) -> torch.Tensor:
        """The JSON that bitsandbytes keeps beside the tensors, as uint8."""
        state = dict(
            quant_type=self.quantizer.quant_type,
            blocksize=self.quantizer.group_size,
            dtype=self._dtype_name,
            shape=list(self._shape(path)),
        )
        return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


class BnbNF4(Bnb):
    """Any run, its merged weights quantized (again). The blocks that Llama-Pro trained stay in 16 bits.

    A run with a bitsandbytes base keeps its code and block size, so the frozen blocks of a Llama-Pro model come out
    as they were trained. An adapter on such a base suffers for the same reason: the base already lies on the grid, and
    a change smaller than half a step is rounded away.
    """

    for_all_tasks = True
    calibrates = True

    def __init__(self, trained, options):
        super().__init__(trained, options)
        own = trained.quantizer if isinstance(trained.quantizer, Bnb4bit) else Bnb4bit()
        self.quantizer = replace(own, scales="fp32")
        self.check_group(self.quantizer.group_size, way_out="use --infer_type merged")
        self.exact = self.holds(Bnb4bit)
        self.calibrates = not self.exact
        # under PiSSA the grid is that of the base's rest, and the merged weight lies on it no more than any other
        on_its_grid = trained.run.kind == "adapter" and not trained.method.base_recipe
        if on_its_grid and isinstance(trained.quantizer, Bnb4bit) and not self.exact:
            say(
                "note: rounding to the grid it was trained on undoes part of an adapter; --infer_type bnb_dora is exact"
            )

    def grid(self, path, weight, importance=None):
        table = bitsandbytes.functional.get_4bit_type(self.quantizer.quant_type, device=weight.device)
        absmax = weight.unflatten(1, (-1, self.quantizer.group_size)).abs().amax(-1)
        return TableGrid(table, absmax, self.quantizer.group_size)

    def linear_tensors(self, path):
        if self.exact:
            return self.stored(path, *self.as_trained(path))
        values, grid, _ = self.rounded(path)
        if self.calibrated:
            return self.stored(path, grid.codes(values), grid.absmax)
        return self.stored(path, *self.quantizer.quantize(values))


class BnbDoRA(Bnb):
    """A QDoRA or QLoRA run unmerged: y = c (W x + s B A x), so absmax x c and B x c are a plain LoRA on a 4-bit base.

    The adapter goes into the subfolder `adapter/`. Biases are not scaled.
    """

    def __init__(self, trained, options):
        super().__init__(trained, options)
        if trained.run.kind != "adapter" or not isinstance(trained.quantizer, Bnb4bit):
            mixed = trained.run.config and trained.run.config.bits_plan
            alike = " that is alike everywhere (--bits_plan)" if mixed else ""
            raise UserError(
                f"--infer_type bnb_dora: {trained.run.folder} ({trained.run.train_type or trained.run.kind}) is no "
                f"adapter on a bitsandbytes base{alike}; use merged, bnb_nf4 or w4a16"
            )
        if trained.folded:
            raise UserError(f"--infer_type bnb_dora: {trained.run.folder} has its adapter in the base; use bnb_nf4")
        for path in sorted(self.packed):
            if trained.quantizer_at(path) is None:  # its base came so; rows of 16 bits cannot be scaled without loss
                raise UserError(f"--infer_type bnb_dora: {path} of {trained.run.base} is in 16 bits; use merged")
        self.quantizer, self._factors = trained.quantizer, {}

    @property
    def better(self):
        return "--infer_type merged --dtype fp32"

    def linear_tensors(self, path):
        if path in self.trained.adapted():
            self._factors[path] = self.trained.row_factor(path)  # fp32 [out]
        return self.stored(path, *self.as_trained(path))

    def finish(self, folder, *, target):
        pairs = {}
        for path, factor in self._factors.items():
            a, b = self.trained.low_rank(path)
            pairs[path] = Pair(a, b.float() * factor.unsqueeze(1))
        write_adapter(self.trained, pairs, folder, target=target)
