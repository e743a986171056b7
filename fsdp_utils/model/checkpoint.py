"""Which tensor of a folder is which of a model, found as `from_pretrained` finds it."""

import re
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from fsdp_utils.core.errors import CheckpointError
from fsdp_utils.core.safetensors_io import CheckpointReader
from methods.adapter import seed_of

MASK = re.compile(r"attn(\.attention)?\.(bias|masked_bias|causal_mask)$")
COMPARED = 2**24  # numbers at a time

Cut = Callable[[torch.Tensor], torch.Tensor]


class Stack(NamedTuple):
    """A tensor `[n, out, in]` of a model whose matrices a folder stores one by one, as those of experts.

    Args:
        matrices: of each matrix the names of the tensors that stand below one another in it.
    """

    matrices: tuple[tuple[str, ...], ...]

    def shape(self, reader: CheckpointReader) -> tuple[int, ...]:
        first = [reader.shape(name) for name in self.matrices[0]]
        return len(self.matrices), sum(shape[0] for shape in first), *first[0][1:]

    def rows(self, reader: CheckpointReader, start: int, stop: int) -> torch.Tensor:
        """Matrices [start, stop)."""
        made = [torch.cat([reader.tensor(name) for name in names]) for names in self.matrices[start:stop]]
        return torch.stack(made) if made else torch.empty(0, *self.shape(reader)[1:], dtype=self.dtype(reader))

    def dtype(self, reader: CheckpointReader) -> torch.dtype:
        return reader.dtype(self.matrices[0][0])

    def nbytes(self, reader: CheckpointReader) -> int:
        return sum(reader.nbytes(name) for names in self.matrices for name in names)

    def pieces(self, reader: CheckpointReader) -> dict[str, Cut]:
        """What of the whole tensor is stored under which name."""
        found = {}
        for number, names in enumerate(self.matrices):
            start = 0
            for name in names:
                stop = start + reader.shape(name)[0]
                found[name], start = partial(_cut, number=number, rows=slice(start, stop)), stop
        return found


def _cut(whole: torch.Tensor, *, number: int, rows: slice) -> torch.Tensor:
    return whole[number, rows]


class Checkpoint:
    """A folder's tensors under the names that a model has for them.

    Args:
        places: name in the model -> name in the files, or a stack of them; tied ones have several names.
        initial: what the folder lacks and the model's class allows to be missing, as its class begins it.
        untied: no two of its tensors are tied, though its configuration says so.
        new: of `initial`, what is a head of the task.
        dropped: tensors of the folder that are a head of another task.
    """

    def __init__(self, reader: CheckpointReader, places: dict, initial: dict, *, untied: bool, new=(), dropped=()):
        self.reader, self.folder, self.places, self.initial = reader, reader.folder, places, initial
        self.untied, self.new, self.dropped = untied, tuple(new), tuple(dropped)

    def names(self) -> list[str]:
        return [*self.places, *self.initial]

    def __contains__(self, name) -> bool:
        return name in self.places or name in self.initial

    def pieces(self, name: str) -> dict[str, Cut]:
        """What the files call a tensor, or would, and what of it each name stands for."""
        place = self.places.get(name, name)
        return place.pieces(self.reader) if isinstance(place, Stack) else {place: lambda whole: whole}

    def _asked(self, name: str):
        """Who knows about a tensor, and what it is called there."""
        place = self.places.get(name, name)
        return (place, self.reader) if isinstance(place, Stack) else (self.reader, place)

    def shape(self, name) -> tuple[int, ...]:
        if name in self.initial:
            return tuple(self.initial[name].shape)
        known, what = self._asked(name)
        return known.shape(what)

    def dtype(self, name) -> torch.dtype:
        if name in self.initial:
            return self.initial[name].dtype
        known, what = self._asked(name)
        return known.dtype(what)

    def nbytes(self, name) -> int:
        if name in self.initial:
            return self.initial[name].nbytes
        known, what = self._asked(name)
        return known.nbytes(what)

    def tensor(self, name) -> torch.Tensor:
        if name in self.initial:
            return self.initial[name]
        place = self.places.get(name, name)
        return place.rows(self.reader, 0, None) if isinstance(place, Stack) else self.reader.tensor(place)

    def rows(self, name, start, stop) -> torch.Tensor:
        """Rows [start, stop) of dim 0."""
        if name in self.initial:
            return self.initial[name][start:stop]
        known, what = self._asked(name)
        return known.rows(what, start, stop)


def match(model: nn.Module, reader: CheckpointReader, *, task, seed: int = 0) -> Checkpoint:
    """The tensors of a folder for a dense model on meta. What its configuration ties, but the folder stores twice with
    different values, becomes untied.

    Args:
        task: knows which parameters are a head that a checkpoint may lack, and which tensors one that it may have.
        seed: of what begins at random.

    Raises:
        CheckpointError: a tensor without place that the model's class does not ignore, a place without tensor, another
            shape, two tensors for one place, or one that transformers makes of others.
    """
    wanted, ties = model.state_dict(keep_vars=True), bool(_ties(model))
    found = _places(model, reader, wanted)
    order = {name: number for number, name in enumerate(reader.names())}
    in_order = sorted(found.items(), key=lambda item: order[_first(item[1])])
    places = {place: name for place, name in in_order if place in wanted}
    tied = _untie(model, reader, places)
    masks = {place for place, name in found.items() if _is_mask(_first(name), reader.shape(_first(name)))}
    unexpected, missing = found.keys() - places.keys() - masks, wanted.keys() - places.keys() - tied.keys()
    shared = dict(prefix=f"{model.base_model_prefix}.")
    new = {name for name in missing if task.is_new(name, **shared)}
    dropped = {place for place in unexpected if task.is_dropped(place, **shared)}
    unexpected, missing = unexpected - dropped, missing - new
    keys = SimpleNamespace(unexpected_keys=unexpected, missing_keys=missing)
    model._adjust_missing_and_unexpected_keys(keys)
    if keys.unexpected_keys:
        first, count = _first(found[min(keys.unexpected_keys)]), len(keys.unexpected_keys)
        raise CheckpointError(f"{reader.folder}: {first} (of {count}) loads into nothing in this model")
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name in sorted(keys.missing_keys & parameters):
        raise CheckpointError(f"{reader.folder}: no tensor for {name}, which {type(model).__name__} needs")
    for place, name in places.items():
        shape = name.shape(reader) if isinstance(name, Stack) else reader.shape(name)
        expected = tuple(wanted[place].shape)
        if shape != expected:
            raise CheckpointError(f"{reader.folder}: {_first(name)} has shape {shape}, the model wants {expected}")
    lacking = sorted(parameters - places.keys() - tied.keys())
    initial = {name: _initial(model, name, seed=seed_of(name, seed=seed) if name in new else 0) for name in lacking}
    places |= {name: places[source] for name, source in tied.items()}
    heads = dict(new=sorted(new & parameters), dropped=sorted(_first(found[place]) for place in dropped))
    return Checkpoint(reader, places, initial, untied=ties and not _ties(model), **heads)


def _is_mask(name: str, shape: tuple[int, ...]) -> bool:
    """Whether it is what attention once saved beside its weights (GPT-J, GPT-Neo, CodeGen), and computes by now."""
    return bool(MASK.search(name)) and (shape == () or shape[:2] == (1, 1))


def _ties(model) -> dict[str, str]:
    return getattr(model, "all_tied_weights_keys", None) or {}


def _first(name: str | Stack) -> str:
    """The name that stands for a tensor of the folder, or for a stack of them."""
    return name.matrices[0][0] if isinstance(name, Stack) else name


def _stacked(place: str, parts: dict[str, list[str]], converters: list, *, folder) -> Stack:
    """The stack that transformers makes of tensors.

    Args:
        parts: names by the pattern of `converters` that each fits, in the order of the matrices.

    Raises:
        CheckpointError: it makes something else of them, or they do not come out even.
    """
    like = next(iter(parts.values()))[0]
    converter = next(c for c in converters if set(parts) <= set(c.source_patterns))
    steps = [(type(op), getattr(op, "dim", None)) for op in converter.operations]
    if steps not in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]):
        made = f"of {like} and its like, which is not supported"
        raise CheckpointError(f"{folder}: transformers makes {place} {made}; choose another model")
    sources = [parts.get(pattern, []) for pattern in converter.source_patterns]
    if len({len(names) for names in sources}) > 1:
        raise CheckpointError(f"{folder}: of {like} and its like, which are {place} together, some are missing")
    return Stack(tuple(zip(*sources, strict=True)))


def _places(model, reader, wanted) -> dict[str, str | Stack]:
    """Where each tensor of the folder goes, in the model or not."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if not isinstance(t, WeightRenaming)]
    places, parts = {}, {}
    for name in sorted(reader.names(), key=dot_natural_key):  # some renamings know by those before what a name means
        place, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
        if place not in wanted and name in wanted:
            place, converter = rename_source_key(name, [], [], model.base_model_prefix, wanted)
        if place in wanted and converter:
            parts.setdefault(place, {}).setdefault(converter, []).append(name)
            continue
        if place in wanted and place in places:
            raise CheckpointError(f"{reader.folder}: {places[place]} and {name} are both {place} in this model")
        places[place] = name
    for place, made in parts.items():
        stack = _stacked(place, made, converters, folder=reader.folder)
        if place in places:
            raise CheckpointError(
                f"{reader.folder}: {places[place]} and {_first(stack)} are both {place} in this model"
            )
        places[place] = stack
    return places


def _untie(model, reader, places) -> dict[str, str]:
    """Unties what is stored twice with different values; other tied names without tensor, and who has it."""
    groups, aliases = {}, {}
    for target, source in _ties(model).items():
        groups.setdefault(source, [source]).append(target)
    for names in groups.values():
        first, *others = [name for name in names if name in places] or [None]
        aliases |= {name: first for name in names if first and name not in places}
        for name in others:
            if not _equal(reader, places[first], places[name], dtype=model.get_parameter(name).dtype):
                _set_parameter(model, name, torch.empty_like(model.get_parameter(name)))
                model.all_tied_weights_keys.pop(name)
    if groups and not _ties(model):
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
    return aliases


def _equal(reader, one: str, other: str, *, dtype: torch.dtype) -> bool:
    """Whether two stored tensors are the same when they are loaded in `dtype`."""
    shape = reader.shape(one)
    if shape != reader.shape(other):
        return False
    step = max(1, COMPARED // max(1, shape[-1]))
    rows = lambda name, start: reader.rows(name, start, min(start + step, shape[0])).to(dtype)
    return all(torch.equal(rows(one, start), rows(other, start)) for start in range(0, shape[0], step))


def _set_parameter(model, name: str, tensor: torch.Tensor) -> nn.Parameter:
    path, _, leaf = name.rpartition(".")
    module, parameter = model.get_submodule(path), nn.Parameter(tensor, requires_grad=False)
    setattr(module, leaf, parameter)
    return parameter


def _initial(model, name: str, *, seed: int) -> torch.Tensor:
    """The value that its class gives to a parameter that may be missing; alike in every process."""
    on_meta = model.get_parameter(name)
    real = _set_parameter(model, name, torch.empty_like(on_meta, device="cpu"))
    model.get_submodule(name.rpartition(".")[0])._is_hf_initialized = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.initialize_weights()
    _set_parameter(model, name, on_meta)
    return real.detach()
