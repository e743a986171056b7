"""Saving: what is trainable is what is saved, gathered tensor by tensor, in formats that stock libraries load."""

import copy
import os
import shutil
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from fsdp_utils.core.errors import UserError
from fsdp_utils.core.flags import as_dict
from fsdp_utils.core.folders import check_place, model_folder, write_json
from fsdp_utils.core.locks import claim, make_writable
from fsdp_utils.core.processes import barrier
from fsdp_utils.core.ranks import is_main, world_size
from fsdp_utils.core.rows import gather
from fsdp_utils.core.safetensors_io import INDEX_NAME, StreamingWriter, refuse_full_disk
from fsdp_utils.data.sources import DATASETS
from fsdp_utils.folders.names import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    DESCRIPTIONS,
    FOLDERS,
    MARKS,
    OF_AN_EXPORT,
    OWN_FILES,
    PACKAGES,
    RUN_FILE,
)
from fsdp_utils.model.build import resolve_model
from methods.adapter import KEY_PREFIX
from methods.llama_pro import EXPANDED_LAYERS_FILE
from methods.quantizers.linear import QuantizedWeight, weight_rows

READ = ("model_name", "llama_pro_path", "dataset")  # flags that may name a place
BUILT_IN = ("demo", *DATASETS)


def check_output(config) -> None:
    """Refuses an output folder that holds a result, before anything is read or written.

    Raises:
        UserError: naming the folder and the way out.
    """
    folder = Path(config.output_dir)
    check_place(folder, flag="output_dir", sources=[resolve_model(config.source)])
    held = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if held & (MARKS - OWN_FILES) and not config.save_model:
        raise UserError(
            f"--output_dir {folder}: holds a model, which a run that saves none would leave beside its own metrics; "
            "choose another or pass --save_model true"
        )
    if held - (set() if config.save_model else OWN_FILES) and not config.overwrite:
        raise UserError(f"--output_dir {folder}: exists and is not empty; choose another or pass --overwrite true")
    if held - OWN_FILES and not held & MARKS:
        raise UserError(
            f"--output_dir {folder}: holds neither a run nor a model, so nothing is replaced; choose another"
        )


@contextmanager
def begun(planned, config):
    """Claims the output folder for a run, which is unfinished until the block ends well.

    Raises:
        UserError: another run got there first, or the result will not fit on the disk.
    """
    facts = dict(base_fingerprint=planned.base_fingerprint, quantizer=planned.quantizer)
    with _claimed(planned, config) if is_main() else nullcontext():
        write_run(config, **facts, finished=False)
        yield
        write_run(config, **facts, finished=True)


@contextmanager
def _claimed(planned, config):
    folder = Path(config.output_dir)
    make_writable(folder, named=f"--output_dir {folder}")
    with claim(folder, named=f"--output_dir {folder}"):
        check_output(config)  # again: a run that was started together with this one may have ended
        if config.save_model:
            refuse_full_disk(folder, _SAVERS[planned.method.saves].specs(planned.model, planned, config))
        yield


def write_run(config, *, base_fingerprint: str, quantizer, finished: bool) -> None:
    """Writes `run.json`: every flag, the versions, which base it was. `finished` is the mark of a complete folder."""
    if not is_main():
        return
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    content = dict(
        finished=finished,
        saved=config.save_model and finished,
        base_fingerprint=base_fingerprint,
        quantizer=asdict(quantizer) if quantizer else None,
        processes=world_size(),
        flags=as_dict(config) | {name: _lasting(getattr(config, name)) for name in READ},
        versions={name: _version(name) for name in PACKAGES},
    )
    temporary = folder / f".{RUN_FILE}"
    write_json(temporary, content)
    os.replace(temporary, folder / RUN_FILE)


def _lasting(name: str) -> str:
    """A name that means the same from another working directory."""
    return str(Path(name).resolve()) if name and name not in BUILT_IN and Path(name).exists() else name


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def save(model: nn.Module, tokenizer, planned, config) -> None:
    """Writes the result into the output folder. Collective; process 0 writes, into a temporary folder first."""
    folder = Path(config.output_dir)
    temporary = folder / ".saving"
    if is_main():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        tokenizer.save_pretrained(temporary)
    _SAVERS[planned.method.saves].save(model, planned, config, temporary)
    if is_main():
        _move_in(temporary, folder)
    barrier()


def _move_in(temporary: Path, folder: Path) -> None:
    """Replaces an older result: none of its files that say how to read weights may lie beside the new ones."""
    stale = (INDEX_NAME, *OF_AN_EXPORT, *DESCRIPTIONS)
    for path in [*folder.glob("*.safetensors"), *(folder / name for name in stale)]:
        path.unlink(missing_ok=True)
    for name in FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    # what makes the folder loadable comes last: a move that is interrupted leaves nothing that looks finished
    last = {name: place for place, name in enumerate(DESCRIPTIONS)}
    for path in sorted(temporary.iterdir(), key=lambda path: last.get(path.name, -1)):
        os.replace(path, folder / path.name)
    temporary.rmdir()


def _write_tensors(folder: Path, tensors: dict[str, tuple[torch.dtype, tuple]], whole, *, single_name=None) -> None:
    """Streams `whole(name)` (collective) for each name into safetensors files in `folder`."""
    writer = StreamingWriter(folder, tensors) if is_main() else None
    for name, (dtype, _) in tensors.items():
        tensor = whole(name).detach().to(dtype)
        if writer:
            writer.write(name, tensor)
    if writer:
        writer.finish()
        if single_name:
            os.replace(folder / "model.safetensors", folder / single_name)


def _adapter_specs(model, planned, config) -> dict[str, tuple[torch.dtype, tuple]]:
    return {f"{KEY_PREFIX}{name}": (stored.dtype, stored.shape) for name, stored in planned.method.tensors(model)}


def _save_adapter(model, planned, config, folder: Path) -> None:
    tensors = {f"{KEY_PREFIX}{name}": stored for name, stored in planned.method.tensors(model)}
    specs = {name: (stored.dtype, stored.shape) for name, stored in tensors.items()}
    _write_tensors(folder, specs, lambda name: tensors[name].whole(), single_name=ADAPTER_WEIGHTS)
    if is_main():
        base = dict(base_model_name_or_path=_lasting(resolve_model(config.model_name)))
        described = planned.method.peft_config(model) | dict(task_type=planned.task.peft_type) | base
        write_json(folder / ADAPTER_CONFIG, described)


def dense_tensors(model: nn.Module) -> dict[str, object]:
    """Checkpoint name of every weight of a model without adapters, and the parameter or packed linear behind it."""
    found, seen = {}, set()
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, QuantizedWeight) and id(module.packed()[0]) not in seen:
            seen.add(id(module.packed()[0]))
            found[f"{prefix}weight"] = module
        for name, parameter in module.named_parameters(recurse=False):
            if name not in getattr(module, "packed_names", ()) and id(parameter) not in seen:
                seen.add(id(parameter))
                found[prefix + name] = parameter
    return found


def _model_specs(model, planned, config) -> dict[str, tuple[torch.dtype, tuple]]:
    # not model.dtype, which is that of packed codes where the embedding is quantized
    return {name: (planned.dtype, tuple(source.shape)) for name, source in dense_tensors(model).items()}


def _save_model(model, planned, config, folder: Path) -> None:
    """A Hugging Face folder. A quantized base is written dequantized: what the trained blocks were trained on."""
    sources, specs = dense_tensors(model), _model_specs(model, planned, config)

    def whole(name):
        source = sources[name]
        if not isinstance(source, QuantizedWeight):
            return gather(source)
        return weight_rows(source, gather, dtype=planned.dtype).view(source.shape)

    _write_tensors(folder, specs, whole)
    if not is_main():
        return
    described = copy.deepcopy(model.config)
    described.use_cache = True  # training switched it off; generation without it is slow
    described.save_pretrained(folder)
    source = model_folder(resolve_model(config.source)) if _has_files(config) else None
    for name in ("generation_config.json", EXPANDED_LAYERS_FILE):
        if source and (source / name).exists():
            shutil.copy(source / name, folder / name)


def _has_files(config) -> bool:
    return config.load_format != "dummy"


class _Saver(NamedTuple):
    """specs: what will be written, name -> (dtype, shape), known on meta."""

    specs: Callable
    save: Callable


_SAVERS = {"adapter": _Saver(_adapter_specs, _save_adapter), "model": _Saver(_model_specs, _save_model)}
