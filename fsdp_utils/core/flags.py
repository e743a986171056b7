"""Turns a dataclass into command-line flags: help, choices and bounds stand beside each field."""

import argparse
import difflib
import math
import sys
from dataclasses import field, fields

from fsdp_utils.core.errors import UserError
from fsdp_utils.core.ranks import fail


class ConfigError(UserError):
    """One line for each wrong flag."""


def flag(default, help, *, choices=None, minimum=None, above=None, maximum=None, may_change=False):
    """A dataclass field that is also a flag; choices and bounds are checked by `parse`.

    Args:
        may_change: a run that is resumed may have another value.
    """
    metadata = dict(help=help, choices=choices, minimum=minimum, above=above, maximum=maximum, may_change=may_change)
    return field(default=default, metadata=metadata)


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


def _add(parser, f):
    """One dataclass field as one argparse flag."""
    kind = {bool: boolean, int: int, float: float}.get(f.type, str)
    default = "" if f.default is None else f" (default: {str(f.default).lower() if kind is boolean else f.default})"
    metavar = "true|false" if kind is boolean else kind.__name__.upper()
    if f.metadata["choices"]:
        metavar = "|".join(str(c) for c in f.metadata["choices"])
    help_text = (f.metadata["help"] + default).replace("%", "%%")
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


def _reject_unknown(unknown: list[str], known: list[str]) -> None:
    """Raises ConfigError naming each unknown flag and the nearest known one."""
    lines = []
    for word in unknown:
        name = word.split("=")[0].lstrip("-").replace("-", "_")
        if word.startswith("--"):
            near = difflib.get_close_matches(name, known, n=1)
            lines.append(f"{word}: unknown flag" + (f"; did you mean --{near[0]}?" if near else "; see --help"))
    if unknown:
        raise ConfigError("\n".join(lines) or f"{unknown[0]}: a value without a flag; see --help")


def parse(config, argv: list[str] | None = None, *, prog: str, description: str | None = None):
    """An instance of the dataclass `config` from a command line.

    Its `explicit_flags` holds the names the user gave. Its `errors()` lists what is wrong beyond choices and bounds.

    Raises:
        ConfigError: with one line for every flag that is unknown or cannot work.
    """
    known, unknown = build_parser(config, prog=prog, description=description).parse_known_args(
        sys.argv[1:] if argv is None else argv
    )
    _reject_unknown(unknown, [f.name for f in flags(config)])
    parsed = config(**vars(known))
    parsed.explicit_flags = frozenset(vars(known))
    # errors() reads values that must be valid on their own
    errors = field_errors(parsed) or parsed.errors()
    if errors:
        raise ConfigError("\n".join(errors))
    return parsed


def parse_or_fail(config, **options):
    """`core.flags.parse`, where a wrong flag ends every process with one line and exit code 2."""
    try:
        return parse(config, **options)
    except UserError as error:
        fail(error)
