"""The documents of a result: those of its base as they are, with what training changed.

They are copied, not written anew from objects: that would be in the words of the installed transformers, which older
stock software reads as defaults (`rope_theta`) or not at all (tokenizer classes).
"""

import fnmatch
import json
import shutil
from pathlib import Path

import torch

from fsdp_utils.core.errors import UserError
from fsdp_utils.core.folders import TEMPLATES, write_json
from fsdp_utils.folders.names import GENERATION_CONFIG, TEMPLATE, TOKENIZER_CONFIG, TOKENIZER_FILES

TEMPLATE_FILES = (TEMPLATE, "chat_template.json")
NEOX_WORDS = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}


def read_json(path: Path) -> dict:
    """The object in a file; empty where there is no file.

    Raises:
        UserError: the file holds something else.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); the file is damaged") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object, found {type(content).__name__}; the file is damaged")
    return content


def _copy_code(source: Path, folder: Path, *, named_by: str) -> None:
    """The code that a document of the base names."""
    if "auto_map" in read_json(source / named_by):
        _copy(source, folder, lambda name: name.endswith(".py"))


def is_tokenizer_file(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in TOKENIZER_FILES)


def _copy(source: Path, folder: Path, wanted) -> None:
    for path in source.iterdir():
        if path.is_file() and wanted(path.name) and path.resolve() != (folder / path.name).resolve():
            shutil.copyfile(path, folder / path.name)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer
# ---------------------------------------------------------------------------------------------------------------------


def describe_tokenizer(folder: Path, source: Path | None, *, tokenizer) -> None:
    """Copies the tokenizer's files from the folder that it was read from (None: writes it).

    Args:
        tokenizer: its `given_chat_template`, if it has one, takes the place of what the files hold.
    """
    if source is None or not any(is_tokenizer_file(path.name) for path in source.iterdir()):
        tokenizer.save_pretrained(folder)
        return
    _copy(source, folder, is_tokenizer_file)
    _copy_code(source, folder, named_by=TOKENIZER_CONFIG)
    given = getattr(tokenizer, "given_chat_template", None)
    if given is not None:
        for name in TEMPLATE_FILES:
            (folder / name).unlink(missing_ok=True)
        (folder / TEMPLATE).write_text(given)
        # versions before 4.43 know no other place
        write_json(folder / TOKENIZER_CONFIG, read_json(folder / TOKENIZER_CONFIG) | dict(chat_template=given))
    elif (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, folder / TEMPLATES, dirs_exist_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# Generation: what ends an answer
# ---------------------------------------------------------------------------------------------------------------------


def end_tokens(folder: Path | None) -> list[int]:
    """The ids that end an answer, as the documents of a model or adapter say.

    Raises:
        UserError: one of them is damaged.
    """
    for name in (GENERATION_CONFIG, "config.json") if folder else ():
        ids = read_json(folder / name).get("eos_token_id")
        if ids is not None:
            return sorted(ids) if isinstance(ids, list) else [ids]
    return []


def describe_generation(folder: Path, source: Path | None, *, tokenizer, is_model: bool) -> None:
    """Copies generation_config.json and adds what training taught to end with: `tokenizer.learned_ends`, if it has any
    that the base does not know. The folder of an adapter gets one only then."""
    learned = getattr(tokenizer, "learned_ends", ())
    ends = end_tokens(source)
    known = source and (source / GENERATION_CONFIG).exists()
    if not set(learned) <= set(ends):
        content = read_json(source / GENERATION_CONFIG) if known else {}
        write_json(folder / GENERATION_CONFIG, content | dict(eos_token_id=sorted({*ends, *learned})))
    elif known and is_model:
        _copy(source, folder, GENERATION_CONFIG.__eq__)


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------


def describe_model(folder: Path, source: Path, *, dtype: torch.dtype, untied: bool, **more) -> None:
    """Writes config.json: the base's, with what differs, and copies the code that it names.

    Args:
        dtype: of the weights.
        untied: head and embedding differ, whatever the base's says.
        more: further keys; None removes one.
    """
    config = read_json(source / "config.json")
    name = str(dtype).removeprefix("torch.")
    config |= dict(dtype=name, torch_dtype=name)  # the second is the older word
    for part in (config, config.get("text_config") or {}):
        if untied and part.get("tie_word_embeddings", part is config):
            part["tie_word_embeddings"] = False
        part |= older_words(part)
    content = {key: value for key, value in (config | more).items() if value is not None or key not in more}
    write_json(folder / "config.json", content)
    _copy_code(source, folder, named_by="config.json")


def older_words(config: dict) -> dict:
    """What transformers 4 calls the rotary embedding, where a configuration says it in the words of version 5 alone.
    Where it differs between kinds of layers, version 5 would misread the older words."""
    given = config.get("rope_parameters")
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        return {}
    apart = ("rope_theta", "partial_rotary_factor")
    words = {key: given[key] for key in apart if key in given}
    if given.get("rope_type", "default") != "default":
        words["rope_scaling"] = {key: value for key, value in given.items() if key not in apart}
    if config.get("model_type") == "gpt_neox":
        words = {NEOX_WORDS.get(key, key): value for key, value in words.items()}
    return {key: value for key, value in words.items() if key not in config}
