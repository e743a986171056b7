"""Which tensor of a folder is which of a model, found as `from_pretrained` finds it."""

import re
from types import SimpleNamespace

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, dot_natural_key, rename_source_key

from fsdp_utils.core.errors import CheckpointError
from fsdp_utils.core.safetensors_io import CheckpointReader
from methods.adapter import seed_of

MASK = re.compile(r"attn(\.attention)?\.(bias|masked_bias|causal_mask)$")
COMPARED = 2**24  # numbers at a time


class Checkpoint:
    """A folder's tensors under the names that a model has for them.

    Args:
        places: name in the model -> name in the files; tied ones have several names.
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

    def stored_name(self, name: str) -> str:
        """What the files call a tensor, or would."""
        return self.places.get(name, name)

    def shape(self, name) -> tuple[int, ...]:
        return tuple(self.initial[name].shape) if name in self.initial else self.reader.shape(self.stored_name(name))

    def dtype(self, name) -> torch.dtype:
        return self.initial[name].dtype if name in self.initial else self.reader.dtype(self.stored_name(name))

    def nbytes(self, name) -> int:
        return self.initial[name].nbytes if name in self.initial else self.reader.nbytes(self.stored_name(name))

    def tensor(self, name) -> torch.Tensor:
        return self.initial[name] if name in self.initial else self.reader.tensor(self.stored_name(name))

    def rows(self, name, start, stop) -> torch.Tensor:
        """Rows [start, stop) of dim 0."""
        if name in self.initial:
            return self.initial[name][start:stop]
        return self.reader.rows(self.stored_name(name), start, stop)


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
    in_order = sorted(found.items(), key=lambda item: order[item[1]])
    places = {place: name for place, name in in_order if place in wanted}
    tied = _untie(model, reader, places)
    masks = {place for place, name in found.items() if _is_mask(name, reader.shape(name))}
    unexpected, missing = found.keys() - places.keys() - masks, wanted.keys() - places.keys() - tied.keys()
    shared = dict(prefix=f"{model.base_model_prefix}.")
    new = {name for name in missing if task.is_new(name, **shared)}
    dropped = {place for place in unexpected if task.is_dropped(place, **shared)}
    unexpected, missing = unexpected - dropped, missing - new
    keys = SimpleNamespace(unexpected_keys=unexpected, missing_keys=missing)
    model._adjust_missing_and_unexpected_keys(keys)
    if keys.unexpected_keys:
        first, count = found[min(keys.unexpected_keys)], len(keys.unexpected_keys)
        raise CheckpointError(f"{reader.folder}: {first} (of {count}) loads into nothing in this model")
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name in sorted(keys.missing_keys & parameters):
        raise CheckpointError(f"{reader.folder}: no tensor for {name}, which {type(model).__name__} needs")
    for place, name in places.items():
        shape, expected = reader.shape(name), tuple(wanted[place].shape)
        if shape != expected:
            raise CheckpointError(f"{reader.folder}: {name} has shape {shape}, the model wants {expected}")
    lacking = sorted(parameters - places.keys() - tied.keys())
    initial = {name: _initial(model, name, seed=seed_of(name, seed=seed) if name in new else 0) for name in lacking}
    places |= {name: places[source] for name, source in tied.items()}
    heads = dict(new=sorted(new & parameters), dropped=sorted(found[place] for place in dropped))
    return Checkpoint(reader, places, initial, untied=ties and not _ties(model), **heads)


def _is_mask(name: str, shape: tuple[int, ...]) -> bool:
    """Whether it is what attention once saved beside its weights (GPT-J, GPT-Neo, CodeGen), and computes by now."""
    return bool(MASK.search(name)) and (shape == () or shape[:2] == (1, 1))


def _ties(model) -> dict[str, str]:
    return getattr(model, "all_tied_weights_keys", None) or {}


def _places(model, reader, wanted) -> dict[str, str]:
    """Where each tensor of the folder goes, in the model or not."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if not isinstance(t, WeightRenaming)]
    places = {}
    for name in sorted(reader.names(), key=dot_natural_key):  # some renamings know by those before what a name means
        place, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
        if place not in wanted and name in wanted:
            place, converter = rename_source_key(name, [], [], model.base_model_prefix, wanted)
        if place in wanted and converter:
            made = f"of {name} and its like, which is not supported"
            raise CheckpointError(f"{reader.folder}: transformers makes {place} {made}; choose another model")
        if place in wanted and place in places:
            raise CheckpointError(f"{reader.folder}: {places[place]} and {name} are both {place} in this model")
        places[place] = name
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
