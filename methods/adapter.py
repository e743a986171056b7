"""Adapters: what they have in common is a scaling, a start, a merge, and PEFT's format on disk.

PEFT's keys are `base_model.model.<module path>.<suffix>`; everything here leaves the prefix to those who write files.
"""

import hashlib
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from fsdp_utils.core.classes import load_class
from fsdp_utils.core.ranks import world_size
from fsdp_utils.core.rows import fill, gather, local, row_range
from methods import FOLDED, SCALINGS, STARTS
from methods.base import Method

ADAPTER_CONFIG = "adapter_config.json"
KEY_PREFIX = "base_model.model."
LORA_A, LORA_B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"

Tensors = dict[str, torch.Tensor]  # of one layer, by PEFT's suffix


class Pair(NamedTuple):
    """A `[r, in]` and B `[out, r]`: parameters, or whole tensors."""

    a: torch.Tensor
    b: torch.Tensor


class Stored(NamedTuple):
    """A tensor as it is written. `whole` gathers it: every process must call it. `rows` is what this process holds:
    pairs of the first row, and rows."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    whole: Callable[[], torch.Tensor]
    rows: Callable[[], list[tuple[int, torch.Tensor]]]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Stored":
        tensor = tensor.detach()
        rows = lambda: [(row_range(tensor)[0], local(tensor))]
        return cls(tensor.dtype, tuple(tensor.shape), partial(gather, tensor), rows)


class Scaling:
    """B A is multiplied by `alpha / r`."""

    peft_config: ClassVar[dict] = {}

    def factor(self, alpha: float, rank: int) -> float:
        return alpha / rank

    def alpha(self, factor: float, rank: int) -> float:
        """The alpha that gives this factor at this rank."""
        return factor * rank


class Start:
    """How A and B begin: A at random and B at zero, so that the base is what it was.

    Another start may move a part of the weight from the base into A and B (`base_rows`), and must then say in the
    saved adapter what the base lacks (`stored`), because stock software adds it to the unchanged one.
    """

    base_recipe = ""
    kept: tuple[str, ...] = ()  # frozen parameters of a layer that change in training
    folds = False  # the base holds the adapter, and is rounded anew as that learns: see methods/folded.py

    def __init__(self, config, *, scaling: float):
        self.config, self.scaling = config, scaling

    def attach(self, path: str, layer: nn.Module, *, dtype: torch.dtype) -> None:
        """Takes note of an adapted layer on meta; may give it frozen parameters of its own."""

    def before_loading(self, read_whole, *, device: torch.device) -> None:
        """As `Method.before_loading`."""

    def calibrate(self, layers: dict[str, nn.Module], see) -> None:
        """As `Method.calibrate`, of the adapted layers by path."""

    def base_rows(self, path: str, rows: torch.Tensor, *, start: int) -> torch.Tensor:
        """As `Method.base_rows`."""
        return rows

    def origin(self, path: str, layer: nn.Module) -> torch.Tensor:
        """The norms beside which magnitudes are kept, fp32 `[n]` of this process's rows: those at the start. A run that
        goes on must find the same."""
        return local(layer.adapted_norm)

    def begin(self, path: str, layer: nn.Module, pair: Pair) -> None:
        """Fills A and B of a layer, `pair`, once the base is loaded."""
        fill(pair.a, initial_lora_a(pair.a.shape, path=path, seed=self.config.seed))
        fill(pair.b, torch.zeros(pair.b.shape))

    def begin_as(self, tensors: dict[str, Tensors], kept: Tensors) -> None:
        """The start of an adapter that was saved, from its tensors by layer: the base must become what it was.

        Args:
            kept: of a run that goes on, what its checkpoint holds of `Method.kept`.
        """

    def stored(self, layer: nn.Module, pair: Pair) -> dict[str, Stored]:
        """What of A and B is written, under PEFT's suffixes."""
        return {LORA_A: Stored.of(pair.a), LORA_B: Stored.of(pair.b)}

    def trained(self, tensors: Tensors) -> Pair:
        """A and B from what `stored` wrote."""
        return Pair(tensors[LORA_A], tensors[LORA_B])

    def added(self, tensors: Tensors) -> Pair:
        """A `[n, in]` and B `[out, n]` that are added to the base, from what `stored` wrote."""
        return self.trained(tensors)

    def stored_rank(self, rank: int) -> int:
        """The rank of what `stored` writes."""
        return rank


def hold_frozen(layer: nn.Module, names: tuple[str, str], *, dtype: torch.dtype) -> None:
    """Gives an adapted layer on meta a frozen twin of A and of B."""
    for name, trained in zip(names, (layer.lora_A, layer.lora_B), strict=True):
        layer.register_parameter(name, nn.Parameter(torch.empty_like(trained, dtype=dtype), requires_grad=False))
    layer.own_parameters = (*layer.own_parameters, *names)


def tell_all(pairs: dict[str, Pair], layers: dict[str, nn.Module], *, rank: int) -> None:
    """Gives every process A and B of all layers, fp32 on the CPU, of which layer n is in the `pairs` of process n.
    Collective. What each works out for itself may differ: two GPUs may give a singular vector the other sign."""
    for number, (path, layer) in enumerate(layers.items()):
        empty = Pair(torch.empty(rank, layer.in_features), torch.empty(layer.out_features, rank))
        for tensor in pairs.setdefault(path, empty) if world_size() > 1 else ():
            dist.broadcast(tensor.contiguous(), number % world_size())  # gloo sends memory as it lies, not rows


def seed_of(path: str, *, seed: int) -> int:
    """A layer's own seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{path}".encode()).digest()[:7], "big")


def initial_lora_a(shape, *, path: str, seed: int) -> torch.Tensor:
    """PEFT's start of A, `U(-1/sqrt(in), 1/sqrt(in))`, fp32; the same for any number of processes and device."""
    generator = torch.Generator().manual_seed(seed_of(path, seed=seed))
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


class Adapter(Method):
    """A method that leaves the base frozen and adds A and B to some of its linears."""

    saves = "adapter"

    def __init__(self, config):
        super().__init__(config)
        self._scaling = load_class(SCALINGS[config.use_rslora])()
        self.scaling = self._scaling.factor(config.lora_alpha, config.lora_rank)
        begins = STARTS[config.lora_init] if config.train_for == "none" else FOLDED
        self.start = load_class(begins)(config, scaling=self.scaling)

    @abstractmethod
    def layers(self, model: nn.Module) -> dict[str, nn.Module]:
        """Path and module of every adapted layer."""

    @abstractmethod
    def pair(self, layer: nn.Module) -> Pair:
        """A and B of a layer, the parameters."""

    # --- the base -----------------------------------------------------------------------------------------------------

    @property
    def base_recipe(self):
        return self.start.base_recipe

    def before_loading(self, read_whole, *, device):
        self.start.before_loading(read_whole, device=device)

    def calibrate(self, model, see):
        self.start.calibrate(self.layers(model), see)

    def base_rows(self, path, rows, *, start):
        return self.start.base_rows(path, rows, start=start)

    def initialize(self, model, *, device):
        for path, layer in self.layers(model).items():
            self.start.begin(path, layer, self.pair(layer))

    def fold(self, model: nn.Module, rewrite: Callable[..., None], *, device: torch.device) -> None:
        """Rounds the base anew, with the adapter in it (methods/folded.py). Collective, between two steps.

        Args:
            rewrite: fills the weights at these paths again, from `base_rows`.
        """
        layers = self.layers(model)
        self.start.take({path: self.pair(layer) for path, layer in layers.items()})
        rewrite(layers.keys())
        for path, layer in layers.items():
            self.start.begin(path, layer, self.pair(layer))

    # --- PEFT's format ------------------------------------------------------------------------------------------------

    def layer_tensors(self, layer: nn.Module) -> dict[str, Stored]:
        """What is written of a layer, under PEFT's suffixes."""
        return self.start.stored(layer, self.pair(layer))

    def tensors(self, model: nn.Module) -> Iterator[tuple[str, Stored]]:
        """What an adapter folder holds: `<module path>.<suffix>` and the tensor."""
        for path, layer in self.layers(model).items():
            for suffix, stored in self.layer_tensors(layer).items():
                yield f"{self.saved_path(path, layer)}.{suffix}", stored
        for name, tensor in (self.whole_parameters(model) | self._whole_buffers(model)).items():
            yield name, Stored.of(tensor)

    def saved_path(self, path: str, layer: nn.Module) -> str:
        """What PEFT calls an adapted layer in its files."""
        return path

    def by_layer(self, model: nn.Module, tensors: Tensors) -> dict[str, Tensors]:
        """A saved adapter, as by `tensors`, by the path of each layer."""
        found = by_layer(tensors)
        return {path: found[self.saved_path(path, layer)] for path, layer in self.layers(model).items()}

    def _whole_buffers(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """What PEFT saves and expects beside `whole_parameters`, though it does not train."""
        modules = {path: model.get_submodule(path) for path in self.whole}
        return {
            f"{path}.{name}": buffer
            for path, module in modules.items()
            for name, buffer in module.named_buffers()
            if name in module.state_dict()
        }

    def whole_parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """What trains in full, which PEFT calls `modules_to_save`."""
        return {
            f"{path}.{name}": parameter
            for path in self.whole
            for name, parameter in model.get_submodule(path).named_parameters()
        }

    def begin_as(self, tensors: Tensors, kept: Tensors) -> None:
        """Before the base is loaded: an adapter that was saved, as by `tensors`, will be put on it. `kept`: as of
        `Start.begin_as`."""
        self.start.begin_as(by_layer(tensors), kept)

    def kept(self, model):
        layers = self.layers(model).items() if self.start.kept else ()
        return {f"{path}.{name}": getattr(layer, name) for path, layer in layers for name in self.start.kept}

    @torch.no_grad()
    def fill(self, model: nn.Module, tensors: Tensors, *, device: torch.device) -> None:
        """Copies a saved adapter, as by `tensors`, into a loaded model."""
        saved = self.by_layer(model, tensors)
        for path, layer in self.layers(model).items():
            self.fill_layer(layer, saved[path], device=device)
        for name, parameter in self.whole_parameters(model).items():
            fill(parameter, tensors[name])
        self.after_step(model, device=device)

    def fill_layer(self, layer: nn.Module, tensors: Tensors, *, device: torch.device) -> None:
        for parameter, whole in zip(self.pair(layer), self.start.trained(tensors), strict=True):
            fill(parameter, whole)

    def peft_config(self, model: nn.Module) -> dict:
        """PEFT's description of the adapter, without task and base."""
        c, paths = self.config, [p for p, layer in self.layers(model).items() if hasattr(layer, "in_features")]
        names = {path.split(".")[-1] for path in paths}
        matched = {path for path, _ in model.named_modules() if path.split(".")[-1] in names}
        return dict(
            peft_type="LORA",
            **self.peft_rank(self.start.stored_rank(c.lora_rank)),
            lora_dropout=c.lora_dropout,
            bias="none",
            # names where they say exactly which modules have adapters, else full paths
            target_modules=(sorted(names) if matched == set(paths) else paths) or None,
            use_dora=False,
            inference_mode=True,
            **(dict(modules_to_save=list(self.whole)) if self.whole else {}),
        )

    def peft_rank(self, rank: int) -> dict:
        """The keys that give `scaling` at this rank."""
        alpha = self._scaling.alpha(self.scaling, rank)
        return dict(r=rank, lora_alpha=int(alpha) if float(alpha).is_integer() else alpha, **self._scaling.peft_config)

    # --- the merge ----------------------------------------------------------------------------------------------------

    def row_factor(self, weight: torch.Tensor, tensors: Tensors) -> torch.Tensor | None:
        """What training multiplies each output row by, fp32 `[out]`; None for one.

        Args:
            weight: `[out, in]` of the base as forward uses it, `[experts, out, in]` of a stack.
            tensors: the layer's, as saved, on the device of `weight`.
        """
        return None

    def merge(self, weight: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        """The weight of a layer with its adapter folded in, fp32 `[out, in]`; arguments as of `row_factor`."""
        a, b = self.start.added(tensors)
        merged = torch.addmm(weight.float(), b.float(), a.float(), alpha=self.scaling)
        factor = self.row_factor(weight, tensors)
        return merged if factor is None else merged * factor.unsqueeze(1)


def peft_scaling_keys() -> set[str]:
    """PEFT's keys that choose a scaling."""
    return {key for target in SCALINGS.values() for key in load_class(target).peft_config}


def flags_of(peft_config: dict) -> dict:
    """The flags that describe an adapter of PEFT's: the inverse of `Adapter.peft_rank`."""
    fits = lambda target: all(peft_config.get(key) == value for key, value in load_class(target).peft_config.items())
    scaling = next(value for value, target in reversed(SCALINGS.items()) if fits(target))  # the plain one fits all
    return dict(lora_rank=peft_config["r"], lora_alpha=peft_config["lora_alpha"], use_rslora=scaling)


def scaling_factor(peft_config: dict) -> float:
    """What an adapter of PEFT's multiplies B A by."""
    known = flags_of(peft_config)
    return load_class(SCALINGS[known["use_rslora"]])().factor(known["lora_alpha"], known["lora_rank"])


def by_layer(tensors: Tensors) -> dict[str, Tensors]:
    """`<path>.<suffix>` -> tensor, as path -> suffix -> tensor; without what trained in full."""
    found: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        if ".lora_" not in name:
            continue
        path, separator, suffix = name.rpartition(".lora_")
        found.setdefault(path, {})[f"{separator[1:]}{suffix}"] = tensor
    return found
