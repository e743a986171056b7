"""Bases that come quantized: codes and scales of stock formats, laid out by rows as they are.

A folder whose config.json has a `quantization_config` is read through one of `FORMATS`. To those who ask for tensors it
is the dense model that it stands for. The packed modules of a run take its codes, so nothing is quantized again.
"""

import json
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from fsdp_utils.core.classes import load_class
from fsdp_utils.core.errors import CheckpointError, UserError
from fsdp_utils.core.rows import row_range
from fsdp_utils.core.safetensors_io import CheckpointReader
from methods import GROUP_SIZES, TRAIN_TYPES, group_sizes_for
from methods.packed import STORED_BYTES, Quantizer
from methods.quantizers.experts import expert_stacks
from methods.quantizers.int4 import SCALE_DTYPES, Int4
from methods.quantizers.mxfp4 import MXFP4
from methods.targets import block_linears, weights_in_blocks

DENSE = "give the 16-bit model"
# eight zeros of 8 in a word of GPTQ; its first version stores one less
SYMMETRIC_ZEROS = {"gptq": 0x77777777, "gptq_v2": 0x88888888 - 2**32}


class Weight(NamedTuple):
    """A packed weight `[..., out, in]`: how the names of its parts begin, how many weights of a row share a scale."""

    stem: str
    shape: tuple[int, ...]
    group_size: int


class Prequantized(ABC):
    """The files of a folder under the names and shapes that a dense model has, and with its values.

    Attributes:
        base: the quantizer in `methods.TRAIN_TYPES` of the train types that go with it.
        title: what it is called in messages.
        marks: by which end of a name a packed weight is known.
        parts: ends of the names of all that is stored of one.
        ending: what follows their beginning in the name that a dense model has for one.
        without: methods in `methods.METHODS` that such a folder cannot be trained by.
        packed: packed weights by name.
        quantizer: how all of them are laid out.

    Raises:
        CheckpointError: nothing is packed, groups that cross rows, weights that are packed in another way.
    """

    base: ClassVar[str]
    title: ClassVar[str]
    marks: ClassVar[tuple[str, ...]]
    parts: ClassVar[tuple[str, ...]]
    ending: ClassVar[str] = ".weight"
    without: ClassVar[tuple[str, ...]] = ()

    def __init__(self, files: CheckpointReader, settings: dict):
        self.files, self.folder, self.settings = files, files.folder, settings
        marked = [(name, mark) for name in files.names() for mark in self.marks if name.endswith(mark)]
        if not marked:
            said = f"config.json says {self.title}, but no weight is packed so"
            raise CheckpointError(f"{self.folder}: {said}; remove quantization_config from it")
        weights = [self._weight(name.removesuffix(mark)) for name, mark in marked]
        for weight in weights:
            if weight.shape[-1] % weight.group_size:
                crossing = f"groups of {weight.group_size} cross its rows of {weight.shape[-1]}"
                raise CheckpointError(f"{self.folder}: {weight.stem}: {crossing}, which cannot be sharded; {DENSE}")
        self.packed = {f"{weight.stem}{self.ending}": weight for weight in weights}
        part_of = {f"{w.stem}{part}": name for name, w in self.packed.items() for part in self.parts}
        self._names = list(dict.fromkeys(part_of.get(name, name) for name in files.names()))
        group_size = shared_group_size({weight.group_size for weight in weights}, named=str(self.folder))
        first, *others = {self._quantizer(weight, group_size): weight.stem for weight in weights}.items()
        if others:
            kinds = f"{first[1]} as {first[0]}, {others[0][1]} as {others[0][0]}"
            raise CheckpointError(f"{self.folder}: packs {kinds}, and only one kind is taken; {DENSE}")
        self.quantizer = first[0]

    # --- by config.json alone -----------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def refusal(cls, settings: dict) -> str | None:
        """What of a `quantization_config` is not taken, in words."""

    @classmethod
    @abstractmethod
    def usual(cls, settings: dict, *, group_size: int) -> Quantizer:
        """The quantizer, where no file says more."""

    @classmethod
    @abstractmethod
    def usual_group_size(cls, settings: dict) -> int:
        """How many weights share a scale, where no file says more; not above 0: those of a row."""

    @classmethod
    def packable(cls, model: nn.Module) -> list[str]:
        """Paths of what such a folder packs of a dense model, but for what it skips, where no file says more."""
        return list(block_linears(model))

    @classmethod
    @abstractmethod
    def skips(cls, settings: dict, path: str) -> bool:
        """Whether what is at a path is left in 16 bits, where no file says more."""

    # --- the files ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def _weight(self, stem: str) -> Weight:
        """What is packed under names that begin so."""

    @abstractmethod
    def _quantizer(self, weight: Weight, group_size: int) -> Quantizer: ...

    @abstractmethod
    def dtype_of(self, weight: Weight) -> torch.dtype:
        """In which stock software computes its values."""

    @abstractmethod
    def _codes(self, weight: Weight, start: int, stop: int, *, device: torch.device) -> torch.Tensor:
        """Rows [start, stop) of the codes, in the bytes and the order of the quantizer, contiguous, on `device`."""

    @abstractmethod
    def _scales(self, weight: Weight, start: int, stop: int, *, device: torch.device) -> torch.Tensor:
        """Rows [start, stop) of the scales that are stored, `[n, in/group]`, contiguous, on `device`."""

    def packed_rows(self, name: str, start: int, stop: int, *, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Rows [start, stop) of every packed parameter of a weight, on `device`; of a stack, those of all matrices."""
        weight = self.packed[name]
        codes, scales = (part(weight, start, stop, device=device) for part in (self._codes, self._scales))
        shared = weight.group_size // self.quantizer.group_size
        codes = codes.view(torch.uint8).view(stop - start, weight.shape[-1] // 2)
        return codes.view(STORED_BYTES), scales if shared == 1 else scales.repeat_interleave(shared, dim=1)

    def names(self) -> list[str]:
        return self._names

    def shape(self, name) -> tuple[int, ...]:
        return self.packed[name].shape if name in self.packed else self.files.shape(name)

    def dtype(self, name) -> torch.dtype:
        return self.dtype_of(self.packed[name]) if name in self.packed else self.files.dtype(name)

    def nbytes(self, name) -> int:
        if name not in self.packed:
            return self.files.nbytes(name)
        stored = (f"{self.packed[name].stem}{part}" for part in self.parts)
        return sum(self.files.nbytes(part) for part in stored if part in self.files)

    def tensor(self, name) -> torch.Tensor:
        return self.rows(name, 0, self.shape(name)[0]) if name in self.packed else self.files.tensor(name)

    def rows(self, name, start, stop) -> torch.Tensor:
        """Rows [start, stop) of dim 0."""
        if name not in self.packed:
            return self.files.rows(name, start, stop)
        weight = self.packed[name]
        packed = self.packed_rows(name, start, stop, device=torch.device("cpu"))
        return self.quantizer.dequantize(packed, in_features=weight.shape[-1], dtype=self.dtype_of(weight))


def shared_group_size(sizes: set[int], *, named: str) -> int:
    """The largest group that each of these is a whole number of: a scale is stored for each part of a longer one.

    Raises:
        CheckpointError: there is none that kernels know.
    """
    fitting = group_sizes_for(*sizes)
    if not fitting:
        known = ", ".join(map(str, GROUP_SIZES))
        raise CheckpointError(f"{named}: its groups of {min(sizes)} are no multiple of any of {known}; {DENSE}")
    return max(fitting)


class BitsAndBytes(Prequantized):
    """NF4 or FP4: codes in the order of `Bnb4bit`, one flat tensor of them and of scales. Scales in 8 bits are unpacked
    to fp32, as bitsandbytes unpacks them: 256 of them share one of their own, across rows."""

    base, title = "bnb", "bitsandbytes in 4 bits"
    marks = (".weight.quant_state.bitsandbytes__nf4", ".weight.quant_state.bitsandbytes__fp4")
    parts = (".weight", ".weight.absmax", ".weight.quant_map", ".weight.nested_absmax", ".weight.nested_quant_map")
    parts = (*parts, *marks)

    @classmethod
    def refusal(cls, settings):
        return None if settings.get("load_in_4bit") else "bitsandbytes in 8 bits"

    @classmethod
    def usual(cls, settings, *, group_size):
        return _bnb(settings.get("bnb_4bit_quant_type", "fp4"), group_size)

    @classmethod
    def usual_group_size(cls, settings):
        return 64

    @classmethod
    def skips(cls, settings, path):
        return any(f".{name}." in f".{path}." for name in settings.get("llm_int8_skip_modules") or ())

    def _weight(self, stem):
        state, codes = self._state(stem), f"{stem}.weight"
        shape, stored = tuple(state["shape"]), self.files.shape(codes)
        nbytes = stored[0] * self.files.dtype(codes).itemsize
        if len(shape) != 2 or stored[1:] != (1,) or nbytes * 2 != shape[0] * shape[1]:
            raise CheckpointError(f"{self.folder}: {codes} has shape {stored}, which holds no codes of {shape}")
        scales, groups = f"{codes}.absmax", shape[0] * shape[1] // state["blocksize"]
        if self.files.shape(scales) != (groups,):
            found, wanted = self.files.shape(scales), f"{groups} scales of {state['blocksize']} codes each"
            raise CheckpointError(f"{self.folder}: {scales} has shape {found}, its quant_state says {wanted}")
        return Weight(stem, shape, state["blocksize"])

    def _state(self, stem: str) -> dict:
        """What bitsandbytes keeps beside the tensors."""
        name = next(f"{stem}{mark}" for mark in self.marks if f"{stem}{mark}" in self.files)
        return json.loads(bytes(self.files.tensor(name).tolist()))

    def _quantizer(self, weight, group_size):
        return _bnb(self._state(weight.stem)["quant_type"], group_size)

    def dtype_of(self, weight):
        return getattr(torch, self._state(weight.stem)["dtype"])

    def _codes(self, weight, start, stop, *, device):
        name = f"{weight.stem}.weight"
        each = weight.shape[1] // 2 // self.files.dtype(name).itemsize  # to shard it, some store bytes as floats
        return self.files.rows(name, start * each, stop * each).to(device)

    def _scales(self, weight, start, stop, *, device):
        state, name, groups = self._state(weight.stem), f"{weight.stem}.weight", weight.shape[1] // weight.group_size
        first, last = start * groups, stop * groups
        scales = self.files.rows(f"{name}.absmax", first, last).to(device)
        if "nested_blocksize" in state:
            of_block, table = (
                self.files.tensor(f"{name}.{part}").to(device) for part in ("nested_absmax", "nested_quant_map")
            )
            block = torch.arange(first, last, device=device) // state["nested_blocksize"]
            scales = table[scales.int()] * of_block[block] + state["nested_offset"]
        return scales.view(stop - start, groups)


def _bnb(code: str, group_size: int) -> Quantizer:
    return load_class("methods.quantizers.bnb:Bnb4bit")(code, group_size, "fp32")


class Integers(Prequantized):
    """Symmetric 4-bit integers; both formats have eight of a row in a word, in the order of `Int4`."""

    base = "hqq"
    scales: ClassVar[str]  # how the name of the scales ends

    @classmethod
    def usual(cls, settings, *, group_size):
        return Int4(group_size)

    def _quantizer(self, weight, group_size):
        names = {dtype: name for name, dtype in SCALE_DTYPES.items()}
        if self.dtype_of(weight) not in names:
            raise CheckpointError(f"{self.folder}: {weight.stem}{self.scales} is {self.dtype_of(weight)}; {DENSE}")
        return Int4(group_size, names[self.dtype_of(weight)])

    def dtype_of(self, weight):
        return self.files.dtype(f"{weight.stem}{self.scales}")

    def _refuse(self, name: str, why: str) -> None:
        raise CheckpointError(f"{self.folder}: {name}: {why} is not taken; {DENSE}")


class CompressedTensors(Integers):
    """`pack-quantized`: codes `[out, in/8]` int32 and scales `[out, in/group]`."""

    title = "compressed-tensors pack-quantized in 4 bits"
    marks, scales = (".weight_packed",), ".weight_scale"
    parts = (".weight_packed", ".weight_scale", ".weight_shape")

    @classmethod
    def refusal(cls, settings):
        groups = list((settings.get("config_groups") or {}).values())
        weights = [group.get("weights") or {} for group in groups]
        formats = {settings.get("format"), *(group.get("format") or settings.get("format") for group in groups)}
        others = formats - {"pack-quantized"}
        transforms = (settings.get("transform_config") or {}).get("config_groups")
        table = (
            (others, f"compressed-tensors {', '.join(map(str, others))}"),
            (any((w.get("num_bits"), w.get("type")) != (4, "int") for w in weights), "other than 4-bit integers"),
            (not all(w.get("symmetric") for w in weights), "an asymmetric code"),
            (any(w.get("strategy") not in ("group", "channel") for w in weights), "a scale of neither group nor row"),
            (any(w.get("actorder") in (True, "group") for w in weights), "act-order"),
            (any(group.get("input_activations") for group in groups), "a code of activations"),
            ((settings.get("sparsity_config") or {}).get("format", "dense") != "dense", "sparsity"),
            (transforms, "transforms"),
        )
        return next((words for holds, words in table if holds), None)

    @classmethod
    def usual_group_size(cls, settings):
        return max(group["weights"].get("group_size") or 0 for group in settings["config_groups"].values())

    @classmethod
    def skips(cls, settings, path):
        return path in (settings.get("ignore") or ())

    def _weight(self, stem):
        for part, why in ((".weight_g_idx", "act-order"), (".weight_zero_point", "an asymmetric code")):
            if f"{stem}{part}" in self.files:
                self._refuse(f"{stem}{part}", why)
        out, width = self.files.tensor(f"{stem}.weight_shape").tolist()
        codes, scales = (self.files.shape(f"{stem}{part}") for part in (".weight_packed", self.scales))
        if codes != (out, width // 8) or width % 8 or scales[0] != out or width % scales[1]:
            raise CheckpointError(f"{self.folder}: {stem}: {codes} codes and {scales} scales make no {(out, width)}")
        return Weight(stem, (out, width), width // scales[1])

    def _codes(self, weight, start, stop, *, device):
        return self.files.rows(f"{weight.stem}.weight_packed", start, stop).to(device)

    def _scales(self, weight, start, stop, *, device):
        return self.files.rows(f"{weight.stem}{self.scales}", start, stop).to(device)


class GPTQ(Integers):
    """Codes `[in/8, out]` int32, zeros and scales `[in/group, out]`: a row of the weight is a column of each."""

    title = "gptq in 4 bits"
    marks, scales = (".qweight",), ".scales"
    parts = (".qweight", ".qzeros", ".scales", ".g_idx")

    @classmethod
    def refusal(cls, settings):
        version = cls._version(settings)
        table = (
            (settings.get("bits") != 4, f"gptq in {settings.get('bits')} bits"),
            (settings.get("desc_act"), "gptq with act-order (desc_act)"),
            (not settings.get("sym", True), "gptq with an asymmetric code (sym false)"),
            (version not in SYMMETRIC_ZEROS, f"gptq as {version}"),
            (settings.get("dynamic"), "gptq with settings by layer (dynamic)"),
        )
        return next((words for holds, words in table if holds), None)

    @staticmethod
    def _version(settings: dict) -> str:
        return settings.get("checkpoint_format") or settings.get("format") or "gptq"

    @classmethod
    def usual_group_size(cls, settings):
        return settings.get("group_size", 128)

    @classmethod
    def skips(cls, settings, path):
        named = [name for names in settings.get("modules_in_block_to_quantize") or () for name in names]
        return bool(named) and not path.endswith(tuple(f".{name}" for name in named))

    def _weight(self, stem):
        (eighths, out), (groups, scaled) = (self.files.shape(f"{stem}{part}") for part in (".qweight", self.scales))
        width = eighths * 8
        if scaled != out or width % groups:
            raise CheckpointError(f"{self.folder}: {stem}: {groups} x {scaled} scales do not fit {width} x {out} codes")
        group_size = width // groups
        zeros, order = f"{stem}.qzeros", f"{stem}.g_idx"
        if (self.files.tensor(zeros) != SYMMETRIC_ZEROS[self._version(self.settings)]).any():
            self._refuse(zeros, "an asymmetric code")
        if order in self.files and (self.files.tensor(order) != torch.arange(width) // group_size).any():
            self._refuse(order, "act-order")
        return Weight(stem, (out, width), group_size)

    def _codes(self, weight, start, stop, *, device):
        return self._rows(f"{weight.stem}.qweight", start, stop, device=device)

    def _scales(self, weight, start, stop, *, device):
        return self._rows(f"{weight.stem}{self.scales}", start, stop, device=device)

    def _rows(self, name, start, stop, *, device):
        columns = self.files.columns(name, start, stop).to(device)
        return columns.T.clone(memory_format=torch.contiguous_format)  # of no row too, where contiguous() does nothing


class MicroscalingFloats(Prequantized):
    """gpt-oss as published: experts in MXFP4, codes `[experts, out, in/32, 16]`, low nibble first, and exponents
    `[experts, out, in/32]`, where the model has `[experts, in, out]`. Everything else is in 16 bits."""

    base, title, without = "bnb", "MXFP4", ("llama_pro",)
    marks, parts, ending = ("_blocks",), ("_blocks", "_scales"), ""

    @classmethod
    def refusal(cls, settings):
        return None

    @classmethod
    def usual(cls, settings, *, group_size):
        return MXFP4(group_size)

    @classmethod
    def usual_group_size(cls, settings):
        return MXFP4.group_size

    @classmethod
    def packable(cls, model):
        return expert_stacks(model)

    @classmethod
    def skips(cls, settings, path):
        return not should_convert_module(path.rpartition(".")[0], settings.get("modules_to_not_convert"))

    def _weight(self, stem):
        (codes, code_shape), (scales, scale_shape) = (
            (f"{stem}{part}", self.files.shape(f"{stem}{part}")) for part in self.parts
        )
        if len(code_shape) != 4 or code_shape[-1] != MXFP4.group_size // 2:
            raise CheckpointError(f"{self.folder}: {codes} has shape {code_shape}, not [experts, out, in/32, 16]")
        if scale_shape != code_shape[:3]:
            raise CheckpointError(f"{self.folder}: {scales} has shape {scale_shape}, its codes want {code_shape[:3]}")
        for name in (codes, scales):
            if self.files.dtype(name) != torch.uint8:
                raise CheckpointError(f"{self.folder}: {name} is {self.files.dtype(name)}, not bytes")
        return Weight(stem, (*code_shape[:2], code_shape[2] * MXFP4.group_size), MXFP4.group_size)

    def _quantizer(self, weight, group_size):
        return MXFP4(group_size)

    def dtype_of(self, weight):
        return torch.bfloat16  # which holds each value exactly

    def _codes(self, weight, start, stop, *, device):
        stored = self.files.stacked_rows(f"{weight.stem}_blocks", start, stop).to(device)
        return stored << 4 | stored >> 4

    def _scales(self, weight, start, stop, *, device):
        return self.files.stacked_rows(f"{weight.stem}_scales", start, stop).to(device).view(STORED_BYTES)

    def shape(self, name):
        if name not in self.packed:
            return super().shape(name)
        experts, out, width = self.packed[name].shape
        return experts, width, out

    def rows(self, name, start, stop):
        """Rows [start, stop) of dim 0; of a stack, matrices `[n, in, out]`."""
        if name not in self.packed:
            return super().rows(name, start, stop)
        _, out, width = self.packed[name].shape
        return super().rows(name, start * out, stop * out).view(stop - start, out, width).transpose(1, 2)


FORMATS = {
    "bitsandbytes": BitsAndBytes,
    "compressed-tensors": CompressedTensors,
    "gptq": GPTQ,
    "mxfp4": MicroscalingFloats,
}


# ---------------------------------------------------------------------------------------------------------------------
# What config.json says
# ---------------------------------------------------------------------------------------------------------------------


def settings_of(model_config) -> dict:
    """The `quantization_config` of a model; empty where it is in 16 or 32 bits."""
    return getattr(model_config, "quantization_config", None) or {}


def refuse_unknown(model_config, *, named: str) -> None:
    """Raises UserError for weights that are quantized in a way of which no codes are taken."""
    settings = settings_of(model_config)
    if not settings:
        return
    method = settings.get("quant_method") or "an unknown method"
    kind = FORMATS.get(method)
    why = kind.refusal(settings) if kind else method
    if why:
        known = ", ".join(kind.title for kind in FORMATS.values())
        raise UserError(f"{named}: its weights are quantized already, with {why}; {DENSE}, or one of {known}")


def _format_of(model_config) -> type[Prequantized]:
    return FORMATS[settings_of(model_config)["quant_method"]]


def check_flags(config, model_config) -> None:
    """Raises UserError for flags that do not go with a model that comes quantized."""
    if not settings_of(model_config):
        return
    kind, named = _format_of(model_config), f"{config.source} comes quantized"
    fitting = [name for name, r in TRAIN_TYPES.items() if r.quantizer == kind.base and r.method not in kind.without]
    if config.train_type not in fitting:
        given = f"--train_type {config.train_type}"
        raise UserError(f"{given}: {named} ({kind.title}); use one of {', '.join(fitting)}, or {DENSE}")
    if config.lora_init != "default":
        given = f"--lora_init {config.lora_init}"
        raise UserError(f"{given}: needs the 16-bit weights, and {named}; drop it, or {DENSE}")
    if config.train_for != "none":
        raise UserError(f"--train_for {config.train_for}: {named}, and is rounded again from 16 bits; {DENSE}")
    if config.bits_plan:
        raise UserError(f"--bits_plan: {named}, so its bits are known; drop it, or {DENSE}")


def open_files(folder, model_config) -> "CheckpointReader | Prequantized":
    """The tensors of a folder, by the names of a dense model.

    Raises:
        CheckpointError: as the reader of its format.
    """
    files = CheckpointReader(folder)
    settings = settings_of(model_config)
    return _format_of(model_config)(files, settings) if settings else files


# ---------------------------------------------------------------------------------------------------------------------
# What of a model is packed
# ---------------------------------------------------------------------------------------------------------------------


class Coming(NamedTuple):
    """How a model comes quantized: the paths of its packed linears and stacks, and the quantizer that lays them out."""

    quantizer: Quantizer
    paths: frozenset[str]

    def chosen(self, model: nn.Module, method) -> dict[str, Quantizer]:
        """What a run packs, as `Method.to_quantize`: what comes packed, and nothing else of the blocks.

        Raises:
            UserError: what is to train in 16 bits comes packed.
        """
        in_blocks = set(method.packed_in_blocks(model))
        trained = sorted(self.paths & set(weights_in_blocks(model)) - in_blocks)
        if trained:
            raise UserError(f"{trained[0]}: comes in 4 bits, and is to train in 16; {DENSE}")
        dense = in_blocks - self.paths
        wanted = method.to_quantize(model, self.quantizer.at)
        return {path: q for path, q in wanted.items() if path not in dense} | dict.fromkeys(self.paths, self.quantizer)


def coming(model: nn.Module, weights) -> Coming | None:
    """How a dense model on meta comes quantized; None if it does not.

    Args:
        weights: of `model.weights.open_weights`; dummies are as config.json lets expect.

    Raises:
        CheckpointError: a packed tensor that is no linear of this model.
    """
    settings = settings_of(model.config)
    if not settings:
        return None
    reader, kind = getattr(weights, "reader", None), _format_of(model.config)
    if reader is None:
        paths = [path for path in kind.packable(model) if not kind.skips(settings, path)]
        stored = kind.usual_group_size(settings)
        sizes = {stored if stored > 0 else model.get_submodule(path).in_features for path in paths}
        group_size = shared_group_size(sizes, named=type(model).__name__)
        return Coming(kind.usual(settings, group_size=group_size), frozenset(paths))
    path_of = {name: place.removesuffix(".weight") for place, name in weights.places.items() if isinstance(name, str)}
    modules, stacks = dict(model.named_modules()), expert_stacks(model)
    for name in reader.packed:
        module = modules.get(path_of.get(name))
        if not isinstance(module, nn.Linear) and path_of.get(name) not in stacks:
            what = "one of several in a stack" if module is None else type(module).__name__
            raise CheckpointError(f"{reader.folder}: {name} is packed, and {what}, not a linear; {DENSE}")
    return Coming(reader.quantizer, frozenset(path_of[name] for name in reader.packed))


def check_values(config, quantizer: Quantizer) -> None:
    """Raises UserError for a flag that was passed and says something else than how the base is stored."""
    for name, value in _flags_of(quantizer).items():
        given = getattr(config, name)
        if name in config.explicit_flags and given not in (value, "auto"):
            raise UserError(f"--{name} {given}: {config.source} comes quantized with {value}; drop it, or {DENSE}")


def _flags_of(quantizer: Quantizer) -> dict:
    """The flags that say how weights are stored, and their values for this quantizer."""
    flags = dict(n_bits=quantizer.bits, quant_group_size=quantizer.group_size, quant_scales=quantizer.scales)
    return flags | (dict(quant_type=quantizer.quant_type) if hasattr(quantizer, "quant_type") else {})


def notes(config, quantizer: Quantizer) -> list[str]:
    """What is said at the start of a run on a base that comes quantized."""
    taken = {name: value for name, value in _flags_of(quantizer).items() if name not in config.explicit_flags}
    listed = ", ".join(f"{name} {value}" for name, value in taken.items())
    said = [f"note: {config.source} comes quantized, and its codes are taken as they are: {listed}"] if taken else []
    if config.quantized_cache:
        said.append(f"note: --quantized_cache has no effect: {config.source} comes quantized")
    return said


class StoredCodes:
    """Packed rows of a checkpoint that came quantized, handed out as a `QuantizedCache` hands out those it wrote."""

    def __init__(self, weights):
        self.weights = weights

    def _place(self, path: str):
        """What the files call the weight of a linear, or a stack, which is a parameter itself."""
        return self.weights.places.get(f"{path}.weight", self.weights.places.get(path))

    def __contains__(self, path: str) -> bool:
        return self._place(path) in self.weights.reader.packed

    def packed_rows(self, path: str, module, *, device: torch.device) -> tuple[torch.Tensor, ...]:
        """This process's rows of every packed parameter of a module, on `device`."""
        rows = row_range(module.packed()[0])
        return self.weights.reader.packed_rows(self._place(path), *rows, device=device)


def stored_codes(weights) -> StoredCodes | None:
    """Of a checkpoint that came quantized; None for others, and for dummies."""
    return StoredCodes(weights) if isinstance(getattr(weights, "reader", None), Prequantized) else None
