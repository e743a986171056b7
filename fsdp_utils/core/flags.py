"""Turns a dataclass into command-line flags: help, choices and bounds stand beside each field."""

import argparse
import difflib
import math
import re
import sys
from dataclasses import field, fields
from typing import NamedTuple

from fsdp_utils.core import config_files
from fsdp_utils.core.errors import ConfigError, UserError
from fsdp_utils.core.ranks import fail, is_main, local_rank, say

NAMING_FILES = ("config", "save_config")  # flags that no file of flags holds


def flag(
    default, help, *, choices=None, minimum=None, above=None, maximum=None, may_change=False, several=False,
    belongs="run",
):  # fmt: skip
    """A dataclass field that is also a flag; choices and bounds are checked by `parse`.

    Args:
        may_change: a run that is resumed may have another value.
        several: the value is a list with commas; a file may have one of YAML instead.
        belongs: to the "run"; to the "place" of a run, a machine or folder, which its run.json does not hand on; to
            the "command", which --save_config does not write, either.
    """
    metadata = dict(help=help, choices=choices, minimum=minimum, above=above, maximum=maximum, may_change=may_change)
    metadata |= dict(several=several, belongs=belongs)
    return field(default=default, metadata=metadata, compare=belongs != "command")  # which makes no other run


def section(title, *, may_change=False):
    """Starts a group of flags in --help; `may_change` as of `flag`, for all of them."""
    return field(default=title, init=False, repr=False, metadata={"section": True, "may_change": may_change})


def flags(config):
    """The fields of a dataclass that are flags, in order."""
    return [f for f in fields(config) if f.metadata and "section" not in f.metadata]


def as_dict(config) -> dict:
    """Every flag and its value."""
    return {f.name: getattr(config, f.name) for f in flags(config)}


def lasting_flags(config) -> list[str]:
    """Names of the flags that a run keeps when it is resumed."""
    names, group_may = [], False
    for f in fields(config):
        if f.metadata.get("section"):
            group_may = f.metadata["may_change"]
        elif f.metadata and not (group_may or f.metadata["may_change"]):
            names.append(f.name)
    return names


def field_errors(config) -> list[str]:
    """One line for each flag whose value is not among its choices or outside its bounds."""
    return [line for f in flags(config) for line in _errors_of(f, getattr(config, f.name))]


def _errors_of(f, value):
    meta = f.metadata
    if meta["choices"] and value not in meta["choices"]:
        near = difflib.get_close_matches(str(value), [str(c) for c in meta["choices"]], n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        yield f"--{f.name} {value}: {hint}choose from {', '.join(str(c) for c in meta['choices'])}"
    if isinstance(value, float) and not math.isfinite(value):
        yield f"--{f.name} {value}: must be a finite number"
        return
    for key, wrong, words in (
        ("minimum", lambda v, b: v < b, "at least"),
        ("above", lambda v, b: v <= b, "above"),
        ("maximum", lambda v, b: v > b, "at most"),
    ):
        if meta[key] is not None and wrong(value, meta[key]):
            yield f"--{f.name} {value}: must be {words} {meta[key]}"


def boolean(text: str) -> bool:
    """`true`/`false` and their like, as the 2024 script read them."""
    lowered = text.lower()
    if lowered in ("true", "t", "yes", "y", "1"):
        return True
    if lowered in ("false", "f", "no", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text}: expected true or false")


class _Parser(argparse.ArgumentParser):
    """Reports a wrong flag as one line, without the page of usage that hides it."""

    def error(self, message):
        raise ConfigError(message.replace("argument ", ""))


def _help(f) -> str:
    """What a flag does, and its default."""
    default = str(f.default).lower() if f.type is bool else f.default
    return f.metadata["help"] + ("" if f.default is None else f" (default: {default})")


def _add(parser, f):
    """One dataclass field as one argparse flag."""
    kind = {bool: boolean, int: int, float: float}.get(f.type, str)
    metavar = "true|false" if kind is boolean else kind.__name__.upper()
    if f.metadata["choices"]:
        metavar = "|".join(str(c) for c in f.metadata["choices"])
    help_text = _help(f).replace("%", "%%")
    extra = dict(nargs="?", const=True) if isinstance(f.default, bool) else {}  # a bare --packing means true
    parser.add_argument(f"--{f.name}", type=kind, default=argparse.SUPPRESS, metavar=metavar, help=help_text, **extra)


def build_parser(config, *, prog: str, description: str | None = None) -> argparse.ArgumentParser:
    """The parser of every flag of a dataclass, in its sections."""
    parser = _Parser(
        prog=prog,
        description=description,
        allow_abbrev=False,  # --lora would silently mean the only flag that starts so
        usage=f"{prog} [--flag value ...]",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=120),
    )
    target = parser
    for f in fields(config):
        if f.metadata.get("section"):
            target = parser.add_argument_group(f.default)
        elif f.metadata:
            _add(target, f)
    return parser


def _unknown(word: str, known: list[str], *, dashes: str) -> str:
    """The line of a flag that there is not, with the nearest one."""
    near = difflib.get_close_matches(word.split("=")[0].lstrip("-").replace("-", "_"), known, n=1)
    return f"{word}: unknown flag" + (f"; did you mean {dashes}{near[0]}?" if near else "; see --help")


def _reject_unknown(unknown: list[str], known: list[str]) -> None:
    """Raises ConfigError naming each unknown flag and the nearest known one."""
    lines = [_unknown(word, known, dashes="--") for word in unknown if word.startswith("--")]
    if unknown:
        raise ConfigError("\n".join(lines) or f"{unknown[0]}: a value without a flag; see --help")


class _Filed(NamedTuple):
    """What a file gives: values by name, where each stands, and the flags that count as given."""

    values: dict
    places: dict[str, str]
    explicit: frozenset[str]


def _read_file(parser, config, path: str) -> _Filed:
    """The flags of a file, read by the parser of the command line.

    Raises:
        ConfigError: with a line for everything that is wrong, which names file and line.
    """
    known, file = {f.name: f for f in flags(config)}, config_files.read(path)
    handed_on = lambda name: name not in known or known[name].metadata["belongs"] == "run"
    settings = [setting for setting in file.settings if not file.of_run or handed_on(setting.name)]
    errors = list(_wrong_settings(settings, known))
    if errors:
        raise ConfigError("\n".join(errors))
    places = {setting.name: setting.place for setting in settings}
    texts = {s.name: ",".join(s.value) if isinstance(s.value, list) else s.value for s in settings}
    try:
        values = vars(parser.parse_args([f"--{name}={text}" for name, text in texts.items() if text is not None]))
    except ConfigError as error:
        raise ConfigError(_placed(str(error), places)) from None
    explicit = [name for name, value in values.items() if value != known[name].default]
    return _Filed(values, places, frozenset(values).intersection(explicit if file.explicit is None else file.explicit))


def _wrong_settings(settings, known: dict):
    """A line for each that can be no flag, whatever its value."""
    for number, (name, value, place) in enumerate(settings):
        if name not in known:
            yield f"{place}: {_unknown(name, list(known), dashes='')}"
            continue
        table = (
            (name in [s.name for s in settings[:number]], "stands there twice; keep one of them"),
            (name in NAMING_FILES, "is for command lines; a file names no other"),
            (isinstance(value, dict), "holds flags or lists of its own; all stand side by side"),
            (isinstance(value, list) and not known[name].metadata["several"], "takes one value, not a list"),
            (value is None and known[name].default is not None, "has no value; leave the line away for the default"),
        )
        yield from [f"{place}: {name}: {words}" for holds, words in table if holds][:1]


def _placed(line: str, places: dict[str, str]) -> str:
    """An error behind the place where its flag stands, if that is in a file."""
    named = re.match(r"--(\w+)", line)
    return f"{places[named[1]]}: {line}" if named and named[1] in places else line


def parse(config, argv: list[str] | None = None, *, prog: str, description: str | None = None):
    """An instance of the dataclass `config` from a command line, and from the file that its --config names.

    Its `explicit_flags` holds the names that the user gave in either, its `errors()` lists what is wrong beyond choices
    and bounds.

    Raises:
        ConfigError: with one line for every flag that is unknown or cannot work.
    """
    parser = build_parser(config, prog=prog, description=description)
    known, unknown = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    _reject_unknown(unknown, [f.name for f in flags(config)])
    typed = vars(known)
    path = typed.get("config")
    filed = _Filed({}, {}, frozenset()) if path is None else _read_file(parser, config, path)
    parsed = config(**(filed.values | typed))
    parsed.explicit_flags = filed.explicit.union(typed).difference(NAMING_FILES)
    # errors() reads values that must be valid on their own
    errors = field_errors(parsed) or parsed.errors()
    if errors:
        places = {name: place for name, place in filed.places.items() if name not in typed}
        raise ConfigError("\n".join(_placed(line, places) for line in errors))
    return parsed


def save(config, path: str) -> None:
    """Writes a file by which --config makes this run: the flags that were given, and those that are not as by default.

    Raises:
        ConfigError: there is nothing to write, or another file.
    """
    sections, title = {}, None
    for f in fields(config):
        if f.metadata.get("section"):
            title = f.default
        elif f.metadata and f.metadata["belongs"] != "command":
            value = getattr(config, f.name)
            if value != f.default or f.name in config.explicit_flags:
                sections.setdefault(title, []).append((f.name, value, _help(f)))
    if not sections:
        raise ConfigError(f"--save_config {path}: all flags are as by default, so a file would say nothing; drop it")
    config_files.write(path, config_files.as_text(sections), overwrite=config.overwrite)


def parse_or_fail(config, **options):
    """`core.flags.parse`, where a wrong flag ends every process with one line and exit code 2. Writes --save_config."""
    try:
        parsed = parse(config, **options)
        path = getattr(parsed, "save_config", None)
        if path is not None and is_main() and local_rank() == 0:  # of srun's processes too, one of a node
            save(parsed, path)
            say(f"--save_config {path}: written")
        return parsed
    except UserError as error:
        fail(error)
