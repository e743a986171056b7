"""Files of flags: YAML, one flag a line, and the run.json of a run."""

import json
import os
import textwrap
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from fsdp_utils.core.errors import ConfigError, first_line

HEADER = "# Written by --save_config. --config reads it, and flags on the command line win.\n"
FORM = "write a flag a line, as `lr: 1e-4`"
NULL = "tag:yaml.org,2002:null"


class Setting(NamedTuple):
    """What a file says of a flag.

    Args:
        value: as it stands on a command line; a list of such; None for null; a dict for anything deeper.
        place: file and line.
    """

    name: str
    value: str | list[str] | dict | None
    place: str


class FlagFile(NamedTuple):
    """`explicit`: the flags that count as given; None where a run.json does not tell."""

    settings: list[Setting]
    explicit: list[str] | None
    of_run: bool = False


def read(path: str) -> FlagFile:
    """What a file says; whether there are such flags is not asked.

    Raises:
        ConfigError: it cannot be read, or is neither YAML nor the run.json of a run.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or first_line(error)
        raise ConfigError(f"--config {path}: {why}; name a YAML file, or the run.json of a run") from None
    return _of_run(path, text) if path.endswith(".json") else _of_yaml(path, text)


def _of_yaml(path: str, text: str) -> FlagFile:
    import yaml  # --help does not wait for it

    try:
        # not `load`, for which 1e-4 is a word and `no` is false: values are read as those of a command line
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        why = getattr(error, "problem", None) or first_line(error)
        raise ConfigError(f"{path}{_line(getattr(error, 'problem_mark', None))}: is no YAML ({why}); {FORM}") from None
    if root is None or root.value == []:
        raise ConfigError(f"--config {path}: is empty; {FORM}")
    if root.id != "mapping":
        raise ConfigError(f"--config {path}: holds no flags; {FORM}")
    settings = [Setting(str(key.value), _value(value), path + _line(key.start_mark)) for key, value in root.value]
    return FlagFile(settings, [setting.name for setting in settings])


def _line(mark) -> str:
    return f", line {mark.line + 1}" if mark else ""


def _value(node) -> str | list[str] | dict | None:
    if node.id == "sequence" and all(item.id == "scalar" and item.tag != NULL for item in node.value):
        return [_text(item) for item in node.value]
    if node.id != "scalar":
        return {}
    return None if node.tag == NULL else _text(node)


def _text(node) -> str:
    return os.path.expanduser(node.value) if node.value.startswith("~/") else node.value  # which a shell would do


def _of_run(path: str, text: str) -> FlagFile:
    try:
        record = json.loads(text)
    except ValueError as error:
        raise ConfigError(
            f"--config {path}: is no JSON ({first_line(error)}); name a YAML file or a run.json"
        ) from None
    flags = record.get("flags") if isinstance(record, dict) else None
    if not isinstance(flags, dict):
        raise ConfigError(f"--config {path}: holds no flags of a run; name its run.json, or a YAML file")
    settings = [Setting(name, _typed(value), path) for name, value in flags.items()]
    explicit = record.get("explicit")
    return FlagFile(settings, explicit if isinstance(explicit, list) else None, of_run=True)


def _typed(value) -> str | dict | None:
    """A value of JSON as it is typed."""
    if isinstance(value, bool):
        return str(value).lower()
    return value if value is None or isinstance(value, dict) else str(value)


def as_text(sections: dict[str, list[tuple[str, object, str]]]) -> str:
    """A file that says so: name, value and help of each flag, under the titles of their sections."""
    import yaml

    lines = [HEADER]
    for title, rows in sections.items():
        lines.append(f"# --- {title} ---\n")
        for name, value, help in rows:
            lines.append(textwrap.fill(help, 118, initial_indent="# ", subsequent_indent="# "))
            lines.append(yaml.safe_dump({name: value}, allow_unicode=True, width=10**9))
    return "\n".join(lines)


def write(path: str, text: str, *, overwrite: bool) -> None:
    """Writes a file that appears when it is whole: the processes of a run may do so at once.

    Raises:
        ConfigError: another file is there, or none can be.
    """
    file, temporary = Path(path), Path(f"{path}.{os.getpid()}")
    if file.suffix == ".json":
        raise ConfigError(f"--save_config {path}: is written as YAML; name it {file.with_suffix('.yaml')}")
    try:
        if file.exists() and not overwrite and file.read_bytes() != text.encode():
            raise ConfigError(f"--save_config {path}: is there, and another; choose a name or pass --overwrite true")
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, file)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise ConfigError(f"--save_config {path}: cannot be written ({error.strerror}); choose another") from None
