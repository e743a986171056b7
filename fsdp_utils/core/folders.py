"""Folders: names of models, what may be replaced, sizes, rows, and a new folder that appears when it is complete."""

import json
import os
import re
import shutil
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

from fsdp_utils.core.errors import CheckpointError, UserError, first_line
from fsdp_utils.core.locks import exclusively

OF_A_MODEL = ("safetensors", "json", "model", "txt", "jinja", "tiktoken", "py")  # suffixes of what is downloaded
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
RUN_FILE, METRICS_FILE, REPORT_FILE = "run.json", "metrics.jsonl", "report.html"  # of a run
DIVERGED_FILE = "diverged.json"  # at which step, on which samples
TEMPLATES = "additional_chat_templates"  # folder in which transformers keeps all chat templates but the default one


def parse_size(text):
    """Bytes of "5GB", "200MB" or "1000" (powers of ten, as on the hub). Raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", str(text).strip().upper())
    if not match or float(match[1]) == 0:
        raise UserError(f"{text!r} is not a size such as 5GB or 200MB")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2] or " "))


def size_errors(text: str, *, flag: str) -> list[str]:
    """The line that names the flag if its value is no size."""
    try:
        parse_size(text)
    except UserError as error:
        return [f"--{flag}: {error}"]
    return []


def repository_errors(name: str | None, *, flag: str) -> list[str]:
    """The line that names the flag if its value can be no repository of the hub."""
    if name is None or HUB_NAME.fullmatch(name):
        return []
    return [f"--{flag} {name}: is no name of a repository; give org/name"]


def refuse_missing_folder(name):
    """Raises CheckpointError where `name` can only be a folder and is none: the hub's answer would not say so."""
    named = str(name)
    if os.path.isfile(named):
        refuse_gguf(named)
    if not os.path.isdir(named) and (named.startswith((".", "/", "~")) or named.count("/") > 1):
        raise CheckpointError(f"{named}: no such folder")


def refuse_gguf(name):
    """Raises CheckpointError for a GGUF file, or a folder that holds weights in no other form."""
    path = Path(name)
    files = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf"))
    if files and not any(path.glob("*.safetensors")):
        raise CheckpointError(
            f"{name}: its weights are GGUF ({files[0].name}); convert them first: AutoModelForCausalLM.from_pretrained("
            f'folder, gguf_file="{files[0].name}", quantization_config=GgufConfig(dequantize=True)).save_pretrained(new'
            "), and the same with AutoTokenizer"
        )


def model_folder(name):
    """The local folder of a model: itself, or the hub snapshot of that name (from the cache when offline)."""
    refuse_missing_folder(name)
    if os.path.isdir(name):
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["README.md", *(f"*.{suffix}" for suffix in OF_A_MODEL)]))
    except (OSError, ValueError) as error:
        refuse_cache(error, folder=name)
        raise CheckpointError(f"{name}: neither a local folder nor a model of the hub ({first_line(error)})") from None


def refuse_cache(error: Exception, *, folder):
    """Raises CheckpointError if a file outside the model's folder could not be opened: one of the hub's cache, and
    not the model is to blame."""
    path = getattr(error, "filename", None)
    if isinstance(path, str) and not Path(path).resolve().is_relative_to(Path(folder).resolve()):
        what = f"{path}: {error.strerror}"
        raise CheckpointError(f"{what}; set HF_HOME to a folder that can be written to") from None


def refuse_file_above(path: str | Path, *, flag: str) -> None:
    """Raises UserError if a parent of `path`, which is to be made, is a file."""
    above = next((parent for parent in Path(path).absolute().parents if parent.exists()), None)
    if above and not above.is_dir():
        raise UserError(f"--{flag} {path}: {above} is a file; choose another place")


def check_place(folder: str | Path, *, flag: str, sources: Iterable[str | Path] = ()) -> None:
    """Raises UserError if no folder can be made there, or if replacing it would remove a source that is read."""
    if Path(folder).is_file():
        raise UserError(f"--{flag} {folder}: is a file; choose another name")
    refuse_file_above(folder, flag=flag)
    for source in sources:
        if Path(source).exists() and Path(source).resolve().is_relative_to(Path(folder).resolve()):
            raise UserError(f"--{flag} {folder}: holds {source}, which is read; choose another")


def check_new_folder(
    folder: str | Path, *, flag: str, overwrite: bool, mark: str = "config.json", sources: Iterable[str | Path] = ()
) -> None:
    """Raises UserError if `new_folder` must not write there.

    Args:
        mark: a folder is replaced only if it has this file, by which one of the kind that is written is known.
        sources: files and folders that are read to write this one.
    """
    check_place(folder, flag=flag, sources=sources)
    if not Path(folder).exists() or not any(Path(folder).iterdir()):
        return
    if not overwrite:
        raise UserError(f"--{flag} {folder}: is not empty; choose another or pass --overwrite true")
    if not (Path(folder) / mark).exists():
        raise UserError(f"--{flag} {folder}: holds no model, there is no {mark}, so it is not replaced; choose another")


@contextmanager
def new_folder(output_dir, *, overwrite=False, mark="config.json", sources=()):
    """A temporary sibling that takes the name `output_dir` when the block ends well, and vanishes when it does not.

    Raises:
        UserError: before anything is written, as `check_new_folder`, or another process is writing it.
    """
    rules = dict(flag="output_dir", overwrite=overwrite, mark=mark, sources=sources)
    check_new_folder(output_dir, **rules)
    target = Path(output_dir).resolve()  # a link stays one
    partial = target.with_name(f".{target.name}.partial")
    with exclusively(target, named=f"--output_dir {output_dir}"):
        check_new_folder(output_dir, **rules)  # again: another process may have ended meanwhile
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        partial.mkdir()
        try:
            yield partial
            if target.exists():
                shutil.rmtree(target)
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def write_json(path: str | Path, content) -> None:
    """Writes readable JSON with a final newline."""
    Path(path).write_text(json.dumps(content, indent=2, default=str) + "\n")


def read_rows(path: str | Path) -> list[dict]:
    """The whole lines of a file of JSON lines; none where there is no file."""
    found = []
    for line in Path(path).read_text().splitlines() if Path(path).exists() else ():
        with suppress(ValueError):  # the process was killed while it wrote this line
            found.append(json.loads(line))
    return found
