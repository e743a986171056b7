"""Saving: what is trainable is what is saved, gathered tensor by tensor, in formats that stock libraries load."""

import copy
import json
import os
import shutil
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from fsdp_utils.core.errors import UserError
from fsdp_utils.core.flags import as_dict, lasting_flags
from fsdp_utils.core.folders import check_place, model_folder, write_json
from fsdp_utils.core.locks import claim, make_writable
from fsdp_utils.core.processes import barrier
from fsdp_utils.core.ranks import is_main, world_size
from fsdp_utils.core.rows import gather
from fsdp_utils.core.safetensors_io import INDEX_NAME, StreamingWriter, refuse_full_disk
from fsdp_utils.data.sources import DATASETS, places_of
from fsdp_utils.folders.card import Told, is_users, write_card
from fsdp_utils.folders.documents import (
    describe_generation,
    describe_model,
    describe_tokenizer,
    end_tokens,
    is_tokenizer_file,
)
from fsdp_utils.folders.names import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CARD,
    CHECKPOINTS,
    DESCRIPTIONS,
    DIVERGED_FILE,
    FOLDERS,
    MARKS,
    METRICS_FILE,
    OF_AN_EXPORT,
    OWN_FILES,
    PACKAGES,
    REPORT_FILE,
    RUN_FILE,
)
from fsdp_utils.model.build import resolve_model
from fsdp_utils.model.weights import packed_name, saved_buffers
from methods.adapter import KEY_PREFIX
from methods.llama_pro import EXPANDED_LAYERS_FILE
from methods.quantizers.linear import QuantizedWeight, weight_rows

READ = ("model_name", "llama_pro_path", "dataset")  # flags that may name a place
SAVING = ".saving"  # the folder of a result that is not whole yet
BUILT_IN = ("demo", *DATASETS)


def check_output(config, *, resumes: bool = False) -> None:
    """Refuses an output folder that holds a result, before anything is read or written.

    Args:
        resumes: the run goes on from a checkpoint; what lies in the folder is its own.

    Raises:
        UserError: naming the folder and the way out.
    """
    folder = Path(config.output_dir)
    read = [*places_of(config.dataset), *places_of(config.eval_dataset)] if config.overwrite else []
    check_place(folder, flag="output_dir", sources=[resolve_model(config.source), *read])
    held = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if resumes or (config.resume == "auto" and _left_behind(folder, held)):
        return
    if CHECKPOINTS in held and not config.overwrite:
        raise UserError(
            f"--output_dir {folder}: holds checkpoints; pass --resume auto to go on from them, --overwrite true to "
            "begin anew, or choose another"
        )
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


def replaced(config, *, resumes: bool) -> list[str]:
    """What a run takes the place of in its output folder, where nothing had to be said to allow it."""
    if resumes or config.overwrite or not (Path(config.output_dir) / METRICS_FILE).exists():
        return []
    return [f"--output_dir {config.output_dir}: the record of an earlier run, which saved no weights, is replaced"]


def _left_behind(folder: Path, held: set[str]) -> bool:
    """Whether a folder holds only what a run leaves that was killed before its first checkpoint was whole."""
    unfinished = {SAVING, *(f".{name}" for name in (RUN_FILE, METRICS_FILE, REPORT_FILE))}
    return bool(held) and held <= OWN_FILES | {CHECKPOINTS} | unfinished and not is_finished(folder)


def is_finished(folder: str | Path) -> bool:
    """Whether a run has ended there."""
    try:
        return bool(json.loads((Path(folder) / RUN_FILE).read_text()).get("finished"))
    except (OSError, ValueError, AttributeError):
        return False


def has_ended(config) -> bool:
    """Whether the output folder holds the result of this very run."""
    folder = Path(config.output_dir)
    if not is_finished(folder):
        return False
    record, now = json.loads((folder / RUN_FILE).read_text()), lasting_values(config)
    same = [*lasting_flags(config), *READ, "num_epochs", "max_steps", "save_model"]
    return all(record["flags"].get(name) == now[name] for name in same)


@contextmanager
def begun(planned, config, *, resumes: bool = False, data: dict | None = None):
    """Claims the output folder for a run, which is unfinished until the block ends well.

    Args:
        data: what it trains on: how many `samples`, and whether they are `chats`; it may grow until the block ends.

    Raises:
        UserError: another run got there first, or the result will not fit on the disk.
    """
    with _claimed(planned, config, resumes=resumes) if is_main() else nullcontext():
        write_run(config, planned, finished=False, data=data)
        yield
        write_run(config, planned, finished=True, data=data)


@contextmanager
def _claimed(planned, config, *, resumes: bool):
    folder = Path(config.output_dir)
    make_writable(folder, named=f"--output_dir {folder}")
    with claim(folder, named=f"--output_dir {folder}"):
        check_output(config, resumes=resumes)  # again: a run that was started together with this one may have ended
        if config.save_model:
            end_tokens(source_folder(config))  # finds a document that is damaged
            refuse_full_disk(folder, _SAVERS[planned.method.saves].specs(planned.model, planned, config))
        for name in (DIVERGED_FILE, REPORT_FILE):  # of what was there before
            (folder / name).unlink(missing_ok=True)
        yield


def run_record(config, planned, *, finished: bool, saved: bool, data: dict | None = None) -> dict:
    """Content of `run.json`: every flag, the versions, which base it was. `finished` marks a complete folder."""
    return dict(
        finished=finished,
        saved=saved,
        base_fingerprint=planned.base_fingerprint,
        quantizer=asdict(planned.quantizer) if planned.quantizer else None,
        processes=world_size(),
        task=planned.task.record(),
        **(data or {}),
        flags=lasting_values(config),
        explicit=sorted(config.explicit_flags),
        versions={name: _version(name) for name in PACKAGES},
    )


def other_batch(config) -> list[str]:
    """A note where --config is the record of a run that had another global batch."""
    path = Path(config.config or "")
    if path.name != RUN_FILE or config.global_batch_size > 0:
        return []
    record = json.loads(path.read_text())
    micro_batch = lambda of: of["batch_size"] * of["gradient_accumulation_steps"] / of["context_parallel"]
    before = vars(type(config)()) | record["flags"]  # an early record has not all of them
    then, now = (
        int(micro_batch(flags) * processes)
        for flags, processes in ((before, record.get("processes", 0)), (vars(config), world_size()))
    )
    if then in (0, now):
        return []
    had = f"that run had {record['processes']} processes and {then} samples a step, this one has {now}"
    return [f"note: --config {path}: {had}; --global_batch_size {then} keeps them"]


def lasting_values(config) -> dict:
    """Every flag and its value; places by names that mean the same from another working directory."""
    return as_dict(config) | {name: _lasting(getattr(config, name)) for name in READ}


def write_run(config, planned, *, finished: bool, data: dict | None = None) -> None:
    """Writes `run.json`."""
    if not is_main():
        return
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{RUN_FILE}"
    saved = config.save_model and finished
    write_json(temporary, run_record(config, planned, finished=finished, saved=saved, data=data))
    os.replace(temporary, folder / RUN_FILE)


def _lasting(name: str) -> str:
    """A name that means the same from another working directory."""
    return str(Path(name).resolve()) if name and name not in BUILT_IN and Path(name).exists() else name


@cache
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def describe_checkpoint(model: nn.Module, tokenizer, planned, config, folder: Path, *, number: int) -> None:
    """What makes a checkpoint's folder readable as a run: tokenizer, `run.json`, and what describes its weights."""
    describe_tokenizer(folder, source_folder(config), tokenizer=tokenizer)
    record = run_record(config, planned, finished=True, saved=True)
    write_json(folder / RUN_FILE, record | dict(checkpoint_of_step=number))
    whole = all(p.requires_grad for p in model.parameters())
    if planned.method.saves == "adapter" or whole:
        _SAVERS[planned.method.saves].describe(model, tokenizer, planned, config, folder)
    else:  # of which `inference.whole` makes a model
        describe_generation(folder, source_folder(config), tokenizer=tokenizer, is_model=False)


def save(model: nn.Module, tokenizer, planned, config) -> None:
    """Writes the result into the output folder. Collective; process 0 writes, into a temporary folder first."""
    folder = Path(config.output_dir)
    temporary = folder / SAVING
    try:
        if is_main():
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            describe_tokenizer(temporary, source_folder(config), tokenizer=tokenizer)
        saver = _SAVERS[planned.method.saves]
        saver.save(model, planned, config, temporary)
        if is_main():
            saver.describe(model, tokenizer, planned, config, temporary)
            _move_in(temporary, folder)
            write_card(folder, Told(folder, config.source, source_folder(config)))
    except OSError as error:
        way_out = "make room; --resume auto goes on from the last checkpoint, if there is one"
        raise UserError(f"--output_dir {folder}: the result could not be saved ({error}); {way_out}") from None
    barrier()


def _move_in(temporary: Path, folder: Path) -> None:
    """Replaces an older result: none of its files that say how to read weights may lie beside the new ones."""
    stale = (INDEX_NAME, *OF_AN_EXPORT, *DESCRIPTIONS)
    older = [path for path in folder.iterdir() if path.suffix == ".safetensors" or is_tokenizer_file(path.name)]
    cards = [] if is_users(folder) else [CARD]
    for path in [*older, *(folder / name for name in (*stale, *cards))]:
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


def _describe_adapter(model, tokenizer, planned, config, folder: Path) -> None:
    describe_generation(folder, source_folder(config), tokenizer=tokenizer, is_model=False)
    base = dict(base_model_name_or_path=_lasting(resolve_model(config.model_name)))
    described = planned.method.peft_config(model) | dict(task_type=planned.task.peft_type) | base
    write_json(folder / ADAPTER_CONFIG, described)


def dense_tensors(model: nn.Module) -> dict[str, object]:
    """Name of everything that a model without adapters saves, and the parameter, buffer or packed linear behind it."""
    found, seen = {}, set()
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, QuantizedWeight) and id(module.packed()[0]) not in seen:
            seen.add(id(module.packed()[0]))
            found[packed_name(path, module)] = module
        for name, parameter in module.named_parameters(recurse=False):
            if name not in getattr(module, "packed_names", ()) and id(parameter) not in seen:
                seen.add(id(parameter))
                found[prefix + name] = parameter
    return found | saved_buffers(model)


class _Pieces:
    """`dense_tensors` under the names of the base's files, where a stack of matrices may be many tensors."""

    def __init__(self, model, planned):
        self.dtype, self.last = planned.dtype, None
        tensors = dense_tensors(model).items()
        self.of = {
            stored: (source, cut) for name, source in tensors for stored, cut in planned.weights.pieces(name).items()
        }

    def spec(self, name: str) -> tuple[torch.dtype, tuple]:
        source, cut = self.of[name]
        packed = isinstance(source, QuantizedWeight)
        whole = torch.empty(source.shape, device="meta")
        whole = source.as_stored(whole) if packed else whole
        return self.dtype if packed else source.dtype, tuple(cut(whole).shape)

    def whole(self, name: str) -> torch.Tensor:
        """Collective. What a tensor is a piece of is made once, if its pieces are asked for one after the other."""
        source, cut = self.of[name]
        if self.last is None or self.last[0] is not source:
            self.last = source, self._gathered(source)
        return cut(self.last[1])

    def _gathered(self, source) -> torch.Tensor:
        if not isinstance(source, QuantizedWeight):
            return gather(source)
        return source.as_stored(weight_rows(source, gather, dtype=self.dtype))


def _model_specs(model, planned, config) -> dict[str, tuple[torch.dtype, tuple]]:
    pieces = _Pieces(model, planned)
    return {name: pieces.spec(name) for name in pieces.of}


def write_weights(model, planned, config, folder: Path) -> None:
    """The weights of a Hugging Face folder. A quantized base is written dequantized: what the trained blocks were
    trained on. Collective."""
    pieces = _Pieces(model, planned)
    _write_tensors(folder, _model_specs(model, planned, config), pieces.whole)


def describe_whole(model, tokenizer, planned, config, folder: Path) -> None:
    """What stands beside the weights of a Hugging Face folder, but for its tokenizer."""
    source = source_folder(config)
    if source is None:
        described = copy.deepcopy(model.config)
        described.use_cache = True  # training switched it off; generation without it is slow
        described.save_pretrained(folder)
        return
    describe_generation(folder, source, tokenizer=tokenizer, is_model=True)
    if (source / EXPANDED_LAYERS_FILE).exists():
        shutil.copyfile(source / EXPANDED_LAYERS_FILE, folder / EXPANDED_LAYERS_FILE)
    more = planned.task.described(model.config) | dict(quantization_config=None)  # a base that came so was unpacked
    describe_model(folder, source, dtype=planned.dtype, untied=planned.weights.untied, **more)


def source_folder(config) -> Path | None:
    """The folder of the base; None for a name of the hub of which only the configuration is needed."""
    name = resolve_model(config.source)
    return model_folder(name) if config.load_format != "dummy" or Path(name).is_dir() else None


class _Saver(NamedTuple):
    """specs: what will be written, name -> (dtype, shape), known on meta; describe: the documents beside weights."""

    specs: Callable
    save: Callable
    describe: Callable


_SAVERS = {
    "adapter": _Saver(_adapter_specs, _save_adapter, _describe_adapter),
    "model": _Saver(_model_specs, write_weights, describe_whole),
}
