"""Bits by layer: a plan says, by patterns of module paths, how each weight is quantized.

    {"model.layers.0.*": {"bits": 4}, "*.down_proj": {"bits": 3, "group_size": 32}, "*": {"bits": 2}}

Patterns are those of a shell, matched against the whole path, where `*` crosses dots too. The first that matches wins.
What an entry leaves away is as the flags say, and so is a weight that no pattern matches.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path

from fsdp_utils.core.classes import load_class
from fsdp_utils.core.errors import ConfigError, first_line
from fsdp_utils.core.ranks import say
from methods import GROUP_SIZES, QUANTIZERS, group_sizes_for, make_quantizer

MIXED = "mixed"  # of --n_bits: a plan by where a block stands
OF_MIXED, SHARE = (4, 2), 1 / 5  # its bits, of which the first are for this share of the blocks
KEYS = ("bits", "group_size", "quantizer")
FORM = 'write patterns and settings, as {"model.layers.0.*": {"bits": 4}, "*": {"bits": 2}}'


@dataclass(frozen=True)
class Mixed:
    """The quantizers (`methods.packed.Quantizer`) of a plan: by pattern, in order, and where none matches."""

    rules: dict[str, object]
    otherwise: object

    def at(self, path: str) -> object:
        """How the weight of the module at a path is packed."""
        pattern = first_match(self.rules, path)
        return self.otherwise if pattern is None else self.rules[pattern]


def first_match(patterns, path: str) -> str | None:
    """The pattern that says how the module at a path is quantized; None: the flags do."""
    return next((pattern for pattern in patterns if fnmatchcase(path, pattern)), None)


def is_text(plan: str) -> bool:
    """Whether it is a plan itself, and no file's name."""
    return plan.lstrip().startswith("{")


def text_of(plan: str) -> str:
    """A plan as one line of JSON, from its file or from such text: what a run records, so that it needs no file later.

    Raises:
        ConfigError: a file that cannot be read, is no JSON or holds no patterns.
    """
    text, named = plan, "--bits_plan"
    if not is_text(plan):
        named = f"--bits_plan {plan}"
        try:
            text = Path(plan).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or first_line(error)
            raise ConfigError(f"{named}: {why}; name a JSON file, as scripts/plan_bits.py writes it") from None
    try:
        entries = json.loads(text, object_pairs_hook=_each_once)
    except ValueError as error:
        raise ConfigError(f"{named}: is no JSON ({first_line(error)}); {FORM}") from None
    if not isinstance(entries, dict) or not entries:
        raise ConfigError(f"{named}: holds no patterns; {FORM}")
    return json.dumps(entries)


def _each_once(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object; of a key that stands there twice, Python would take the last without a word."""
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name} stands there twice")
    return dict(pairs)


def named(config) -> str:
    """How messages call the plan of these flags."""
    return f"--bits_plan {config.bits_plan_file}" if config.bits_plan_file else "--bits_plan"


def entries_of(config) -> dict[str, dict]:
    """Settings by pattern, as they stand in the plan; none without one."""
    return {} if config.bits_plan is None else json.loads(text_of(config.bits_plan))


def errors(config) -> Iterator[str]:
    """One line for each thing in the plan of these flags that cannot work on any model."""
    try:
        entries = entries_of(config)
    except ConfigError as error:
        yield str(error)
        return
    if entries and config.quantizer == "none":
        yield f"{named(config)}: --train_type {config.train_type} quantizes nothing; use a bnb or hqq train type"
        return
    for pattern, entry in entries.items():
        yield from (f"{named(config)}: {pattern}: {wrong}" for wrong in _wrong(entry, config))


def _wrong(entry, config) -> Iterator[str]:
    if not isinstance(entry, dict) or not entry:
        yield f"{json.dumps(entry)} is no setting; {FORM}"
        return
    for key in [key for key in entry if key not in KEYS]:
        near = get_close_matches(key, KEYS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        yield f"{key}: unknown key; {hint}there are {', '.join(KEYS)}"
    (name, bits, group_size), able = _filled(entry, config), [name for name, row in QUANTIZERS.items() if row.bits]
    if name not in able:
        yield f"quantizer {json.dumps(name)}: choose from {', '.join(able)}"
        return
    row = QUANTIZERS[name]
    if not _is_one_of(bits, row.bits):
        others = [other for other in able if _is_one_of(bits, QUANTIZERS[other].bits)]
        way = f'; add "quantizer": "{others[0]}"' if others else ""
        yield f"bits {json.dumps(bits)}: {name} offers {', '.join(map(str, row.bits))}{way}"
    if not _is_one_of(group_size, GROUP_SIZES):
        yield f"group_size {json.dumps(group_size)}: choose from {', '.join(map(str, GROUP_SIZES))}"
    if config.quant_scales not in row.scales:
        yield f"--quant_scales {config.quant_scales}: {name} offers {', '.join(row.scales)}; choose one of these"


def _filled(entry: dict, config) -> tuple:
    """Name of the quantizer, bits and group size of an entry: what it leaves away is as the flags say."""
    flags = dict(quantizer=config.quantizer, bits=config.n_bits, group_size=config.quant_group_size)
    return tuple(entry.get(key, value) for key, value in flags.items())


def _is_one_of(value, numbers: tuple[int, ...]) -> bool:
    return type(value) is int and value in numbers  # to Python, true is 1


def quantizers_of(config) -> set[str]:
    """Names of the quantizers that flags and plan use."""
    return {config.quantizer, *(_filled(entry, config)[0] for entry in entries_of(config).values())}


def quantizer_of_flags(config, *, checkpoint_dtype):
    """What flags and plan describe: one quantizer, `Mixed` ones, or None where nothing is packed."""
    otherwise = make_quantizer(config.train_type, config, checkpoint_dtype=checkpoint_dtype)
    entries = entries_of(config)
    if otherwise is None or not entries:
        return otherwise

    def made(entry: dict):
        name, bits, group_size = _filled(entry, config)
        asked = replace(config, n_bits=bits, quant_group_size=group_size)
        return load_class(QUANTIZERS[name].target).from_config(asked, checkpoint_dtype=checkpoint_dtype)

    return Mixed({pattern: made(entry) for pattern, entry in entries.items()}, otherwise)


def settle(config, blocks: list[str]) -> None:
    """Makes `--n_bits mixed` the plan that it is for a model with blocks at these paths; before anything is packed.

    Those at both ends get more, most of them at the start: what the first get wrong passes through all others, and
    nothing mends what the last do (docs/memory.md). The share is that of 2024, whose authors chose by block influence.
    """
    if config.n_bits != MIXED:
        return
    count, (more, config.n_bits) = max(round(len(blocks) * SHARE), 2), OF_MIXED
    if count >= len(blocks):
        say(f"note: --n_bits {MIXED}: all {len(blocks)} blocks are at an end, so all get {more} bits")
    last = max(count // 3, 1)
    chosen = dict.fromkeys(blocks[: count - last] + blocks[-last:])
    config.bits_plan = json.dumps({f"{path}.*": dict(bits=more) for path in chosen})


def check(config, model, quantizers: dict) -> None:
    """Holds the plan of these flags against a model on meta, of which nothing is packed yet.

    Args:
        quantizers: by path, of every weight that is to be packed.

    Raises:
        ConfigError: with a line for each pattern that says nothing, each group size that does not divide a row, and
            each weight that two modules share and two patterns quantize differently.
    """
    patterns = list(entries_of(config))
    chosen = {path: first_match(patterns, path) for path in quantizers}
    lines = [_without_use(pattern, chosen, model) for pattern in patterns if pattern not in chosen.values()]
    refused, shared = set(), {}
    for path, pattern in chosen.items() if patterns else ():
        weight, width = _weight_at(model, path)
        group_size = quantizers[path].group_size
        if pattern not in (None, *refused) and width % group_size:
            refused.add(pattern)
            fitting = list(map(str, group_sizes_for(width)))
            way = f"choose from {', '.join(fitting)}" if fitting else "no size does"
            lines.append(f"{pattern}: group_size {group_size} does not divide the {width} inputs of {path}; {way}")
        first = shared.setdefault(id(weight), path)
        if quantizers[first] != quantizers[path]:
            lines.append(f"{path}: is one weight with {first}, which gets another setting; give both the same")
    if lines:
        raise ConfigError("\n".join(f"{named(config)}: {line}" for line in lines))


def _weight_at(model, path: str):
    """The weight of a linear, an embedding or a stack of experts, which is a parameter itself, and how long its rows
    are."""
    parent, _, name = path.rpartition(".")
    holder = model.get_submodule(parent)
    found = getattr(holder, name)
    weight = getattr(found, "weight", found)
    return weight, weight.shape[-2 if getattr(holder, "is_transposed", False) else -1]


def _without_use(pattern: str, chosen: dict[str, str | None], model) -> str:
    """What to say of a pattern that is the first match of nothing."""
    taken = [first for path, first in chosen.items() if fnmatchcase(path, pattern)]
    if taken:
        return f"{pattern}: the first match wins, and {taken[0]} before it takes all of it; put it first, or drop it"
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if any(fnmatchcase(path, pattern) for path, module in model.named_modules() if module in ends):
        return f"{pattern}: embedding and head stay in 16 bits; add --quantize_lm_head true"
    near = get_close_matches(pattern, chosen, n=1, cutoff=0.0) or ["none"]
    return f"{pattern}: matches none of the {len(chosen)} weights that are quantized, such as {near[0]}"
