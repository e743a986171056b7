"""Checkpoints of a run: what trains, its optimizer, and where the run was.

A folder `checkpoints/step-000020` holds safetensors and JSON, nothing pickled. Every process writes its own rows into
files that all share, and any number of processes reads them back: rows are rows. Everything is copied to host memory at
the step and written by a thread, while the steps go on. `manifest.json`, with the checksum of each file, comes last: a
folder without a valid one is no checkpoint. The base is frozen, known by its fingerprint, and not in it.
"""

import hashlib
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.tensor import DTensor, Replicate

from fsdp_utils.core.errors import UserError
from fsdp_utils.core.flags import lasting_flags
from fsdp_utils.core.folders import write_json
from fsdp_utils.core.locks import make_writable
from fsdp_utils.core.processes import all_gather_objects, barrier, from_main
from fsdp_utils.core.ranks import is_main, rank, say, world_size
from fsdp_utils.core.rows import local, row_range
from fsdp_utils.core.safetensors_io import start_file, write_rows
from fsdp_utils.folders.names import (
    ADAPTER_WEIGHTS,
    CHECKPOINTS,
    MANIFEST,
    MODEL_WEIGHTS,
    OPTIMIZER_FILE,
    STATE_FILE,
    TRAINED_FILE,
)
from fsdp_utils.folders.saving import lasting_values
from fsdp_utils.model.weights import saved_buffers
from fsdp_utils.sharding import fsdp
from methods.adapter import KEY_PREFIX

POLL_SECONDS = 0.02
Rows = list[tuple[tuple[str, int], torch.Tensor]]  # (name, first row) and rows on the CPU


@dataclass
class Snapshot:
    """What this process contributes to a checkpoint, in host memory.

    Args:
        specs: of each file that processes share, name -> (dtype, shape) of all its tensors.
        rows: of each such file, this process's rows.
        own: tensors that belong to this process alone.
        describe: writes the documents beside them into a folder; process 0 calls it.
        state: content of state.json.
    """

    number: int
    specs: dict[str, dict[str, tuple]]
    rows: dict[str, Rows]
    own: dict[str, torch.Tensor]
    describe: Callable[[Path], None]
    state: dict = field(default_factory=dict)


def root_of(config) -> Path:
    """The folder of a run's checkpoints."""
    return Path(config.output_dir).resolve() / CHECKPOINTS


def is_own(folder: Path | None, config) -> bool:
    """Whether it is a checkpoint of the run whose result lies there."""
    return folder is not None and folder.parent == root_of(config)


def folder_of(root: Path, number: int) -> Path:
    return root / f"step-{number:06d}"


# ---------------------------------------------------------------------------------------------------------------------
# Taking one
# ---------------------------------------------------------------------------------------------------------------------


def trained_file(model) -> str:
    """A model of which everything trains is one that stock software loads."""
    return MODEL_WEIGHTS if all(p.requires_grad for p in model.parameters()) else TRAINED_FILE


def take(step, planned, *, describe: Callable[[Path], None], state: dict) -> Snapshot:
    """Copies what a checkpoint holds to host memory. Collective; waits for the GPU.

    Args:
        step: the TrainStep, between two steps.
        describe, state: as of `Snapshot`, without what the step itself knows.
    """
    fsdp.leave_sharded(step.prepared)  # what is gathered ahead shows whole parameters
    model, own_state = step.model, step.state_dict()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    by_rows = getattr(step.optimizer, "by_rows", ())
    optimizer = _OptimizerState(own_state["optimizer"]["state"], trained, by_rows=by_rows)
    agreed = _agreed(optimizer)
    # buffers do not train, but a whole model is none without them
    kept = trained | planned.method.kept(model) | (saved_buffers(model) if trained_file(model) == MODEL_WEIGHTS else {})
    specs = {
        trained_file(model): {name: (p.dtype, tuple(p.shape)) for name, p in kept.items()},
        OPTIMIZER_FILE: {name: spec for found, _, _ in agreed for name, spec in found.items()},
    }
    copied = {}
    rows = {trained_file(model): _rows_of(kept, copied), OPTIMIZER_FILE: optimizer.rows}
    if planned.method.saves == "adapter":
        tensors = {f"{KEY_PREFIX}{name}": stored for name, stored in planned.method.tensors(model)}
        specs[ADAPTER_WEIGHTS] = {name: (stored.dtype, stored.shape) for name, stored in tensors.items()}
        rows[ADAPTER_WEIGHTS] = _rows_of_adapter(tensors, copied) if _writes(next(iter(trained.values()))) else []
    state = state | dict(
        step=own_state["taken"],
        scaler=own_state["scaler"],
        groups=own_state["optimizer"]["groups"],
        scalars={name: values for _, found, _ in agreed for name, values in found.items()},
        optimizer_is_split=any(split for *_, split in agreed),
        processes=world_size(),
        files=[*specs, *map(own_file, range(world_size()))],
    )
    return Snapshot(own_state["taken"], specs, rows, optimizer.own | random_states(step.device), describe, state)


def _agreed(optimizer: "_OptimizerState") -> list[tuple[dict, dict, bool]]:
    """Specs and scalars of process 0, then those that each process has beside them; and whether it has a state of its
    own. Not all hold rows of all tensors, but process 0 of nearly all: so little is said by each to each."""
    mine = (optimizer.specs, optimizer.scalars)
    main = from_main(lambda: mine)
    more = [{name: mine[name] for name in mine.keys() - main.keys()} for mine, main in zip(mine, main, strict=True)]
    return [(*main, False), *all_gather_objects((*more, bool(optimizer.own)))]


def _writes(parameter: torch.Tensor) -> bool:
    """Whether this process writes its rows: of several copies of the model, the first does."""
    if not isinstance(parameter, DTensor):
        return is_main()
    mesh, placements = parameter.device_mesh, parameter.placements
    return all(mesh.get_local_rank(i) == 0 for i, placed in enumerate(placements) if isinstance(placed, Replicate))


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy: the tensor goes on changing."""
    return tensor.detach().to("cpu", copy=True)


def _place(tensor: torch.Tensor) -> tuple:
    """Tells rows that live from others that live."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _rows_of(trained: dict[str, torch.Tensor], copied: dict[tuple, torch.Tensor]) -> Rows:
    """`copied` takes note of the copies by place."""
    rows = []
    for name, p in trained.items():
        if local(p).numel() and _writes(p):
            copied[_place(local(p))] = copy = _on_host(local(p))
            rows.append(((name, row_range(p)[0]), copy))
    return rows


def _rows_of_adapter(tensors: dict, copied: dict[tuple, torch.Tensor]) -> Rows:
    """Most of them are what trains, and were copied already. Others are made for this and gone afterwards: their place
    says nothing."""
    found = []
    for name, stored in tensors.items():
        for first, rows in stored.rows():
            if rows.numel():
                known = copied.get(_place(rows))
                found.append(((name, first), _on_host(rows) if known is None else known))
    return found


class _OptimizerState:
    """The optimizer's state of this process, by how it is kept: `rows` of tensors shaped like their parameter, or that
    the optimizer names as laid out `by_rows`, with the `specs` of the whole ones; `scalars`, alike in every process;
    `own`, what fits no other number of processes (the blocks of bitsandbytes' 8-bit states)."""

    def __init__(self, states: dict[str, dict], trained: dict[str, torch.Tensor], *, by_rows: tuple[str, ...] = ()):
        self.by_rows = by_rows
        self.specs, self.rows, self.scalars, self.own = {}, [], {}, {}
        for name, values in states.items():
            for key, value in values.items():
                self._sort(name, key, value, trained[name])

    def _sort(self, name: str, key: str, value, parameter: torch.Tensor) -> None:
        rows = local(parameter)
        if not isinstance(value, torch.Tensor):
            self.scalars.setdefault(name, {})[key] = value
        elif (value.shape == rows.shape or key in self.by_rows) and value.dim():
            self.specs[f"{key}/{name}"] = (value.dtype, (parameter.shape[0], *value.shape[1:]))
            if _writes(parameter):
                self.rows.append(((f"{key}/{name}", row_range(parameter)[0]), _on_host(value)))
        elif value.dim() == 0:
            self.scalars.setdefault(name, {})[key] = [str(value.dtype).removeprefix("torch."), value.item()]
        else:
            self.own[f"optimizer/{key}/{name}"] = _on_host(value)


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of the generators that dropout draws from."""
    states = {"random/cpu": torch.get_rng_state()}
    return states | ({"random/cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def own_file(process: int) -> str:
    return f"process-{process:05d}.safetensors"


class _Elsewhere(Exception):
    """Another process failed; the message is its reason."""


class _Marks:
    """What the writing threads tell each other: through the store by which processes found each other, so that no
    collective waits in a thread, and a full disk does not keep a failure from being told."""

    def __init__(self, name: str):
        self.store = dist.PrefixStore(name, _get_default_store()) if dist.is_initialized() else dist.HashStore()

    def set(self, key: str, value: str = "1") -> None:
        self.store.set(key, value)

    def has(self, key: str) -> bool:
        return self.store.check([key])

    def get(self, key: str) -> str:
        return self.store.get(key).decode()


class CheckpointWriter:
    """Writes snapshots, one at a time, in a thread of each process; process 0 commits what all have written.

    Args:
        root: the folder of checkpoints, on a disk that all processes share.
        keep: how many of the newest stay.

    Raises:
        UserError: the processes do not see one folder, or nothing can be written there. Collective.
    """

    def __init__(self, root: Path, *, keep: int):
        self.root, self.keep, self.best = root, keep, None
        name = from_main(lambda: uuid.uuid4().hex)
        self.marks, self.attempt, self.thread, self.error = _Marks(name), 0, None, None
        trial = root / f".{name}"
        if is_main():
            make_writable(root, named=f"--output_dir {root.parent}")
            trial.touch()
        barrier()
        seen = all_gather_objects(trial.exists())
        if is_main():
            trial.unlink(missing_ok=True)
        if not all(seen):
            raise UserError(
                f"--output_dir {root.parent}: {seen.count(False)} of {len(seen)} processes do not see it; checkpoints "
                "need a disk that all share"
            )

    def start(self, snapshot: Snapshot) -> None:
        """Begins to write. The one before must have ended: `finish`."""
        self.error, self.attempt = None, self.attempt + 1
        self.thread = threading.Thread(target=self._write, args=(snapshot, f"{self.attempt}"), daemon=True)
        self.thread.start()

    @property
    def busy(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def finish(self) -> str | None:
        """Waits until the last checkpoint is committed; why it is not, or None. Collective."""
        if self.thread is None:
            return None
        self.thread.join()
        self.thread = None
        error, self.error = self.error, None
        return next(filter(None, all_gather_objects(error)), None)

    def _write(self, snapshot: Snapshot, attempt: str) -> None:
        partial = self.root / f".{folder_of(self.root, snapshot.number).name}"
        try:
            if is_main():
                self._prepare(partial, snapshot)
                self.marks.set(f"{attempt}/ready")
            self._until(attempt, [f"{attempt}/ready"])
            for name, rows in snapshot.rows.items():
                write_rows(partial / name, rows)
            save_file(snapshot.own, partial / own_file(rank()))
            self.marks.set(f"{attempt}/done/{rank()}")
            if is_main():
                self._until(attempt, [f"{attempt}/done/{process}" for process in range(world_size())])
                self._commit(partial, snapshot)
        except Exception as error:  # a full disk, a folder that is gone: the run goes on, and says it
            self.error = f"{type(error).__name__}: {error}" if not isinstance(error, _Elsewhere) else str(error)
            self.marks.set(f"{attempt}/failed", self.error)
            if is_main():
                shutil.rmtree(partial, ignore_errors=True)

    def _until(self, attempt: str, keys: list[str]) -> None:
        """Waits until all of these are set.

        Raises:
            _Elsewhere: another process could not write: the checkpoint will not be whole.
        """
        while not all(map(self.marks.has, keys)):
            if self.marks.has(f"{attempt}/failed"):
                raise _Elsewhere(self.marks.get(f"{attempt}/failed"))
            time.sleep(POLL_SECONDS)

    def _prepare(self, partial: Path, snapshot: Snapshot) -> None:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir(parents=True)
        for name, specs in snapshot.specs.items():
            start_file(partial / name, specs)
        write_json(partial / STATE_FILE, snapshot.state)
        snapshot.describe(partial)

    def _commit(self, partial: Path, snapshot: Snapshot) -> None:
        write_manifest(partial)
        target = folder_of(self.root, snapshot.number)
        if target.exists():  # of an earlier run that came this far
            shutil.rmtree(target)
        partial.rename(target)
        _sync(self.root)
        self._prune()

    def _prune(self) -> None:
        """Removes what is older than the newest few; never the best."""
        for old in numbered(self.root)[self.keep :]:
            if old.name != self.best:
                shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """So that a folder's names survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path) -> None:
    """Names every file with its size and checksum; it appears whole, and last."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = {str(p.relative_to(folder)): dict(bytes=p.stat().st_size, sha256=_sha256(p)) for p in files}
    temporary = folder / f".{MANIFEST}"
    write_json(temporary, dict(files=listed))
    _sync(temporary)
    temporary.rename(folder / MANIFEST)
    _sync(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Finding one
# ---------------------------------------------------------------------------------------------------------------------


def number_of(folder: Path) -> int:
    """The step of a checkpoint's name; -1 for a name that has none."""
    digits = folder.name.removeprefix(".").removeprefix("step-")
    return int(digits) if digits.isdecimal() else -1


def numbered(root: Path) -> list[Path]:
    """Folders that have the name of a checkpoint, and a manifest; the newest first."""
    return sorted((path.parent for path in root.glob(f"step-*/{MANIFEST}")), key=number_of, reverse=True)


def problem(folder: Path) -> str | None:
    """Why a folder is no valid checkpoint; None if it is one. Reads every file."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        entries = [(name, entry["bytes"], entry["sha256"]) for name, entry in files.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is missing or damaged ({type(error).__name__})"
    if STATE_FILE not in files:
        return f"{MANIFEST} does not name {STATE_FILE}"
    try:
        found = next(filter(None, (_problem_of(folder, *entry) for entry in entries)), None)
        unnamed = sorted({*read_state(folder).get("files", ())} - {*files}) if found is None else ()
    except (OSError, ValueError) as error:  # a name that no file can have, a disk that does not answer
        return f"a file that {MANIFEST} names cannot be read ({error})"
    return found or (f"{MANIFEST} does not name {unnamed[0]}" if unnamed else None)


def _problem_of(folder: Path, name: str, size: int, checksum: str) -> str | None:
    """Of a file that the manifest names."""
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts or not path.resolve().is_relative_to(folder.resolve()):
        return f"{MANIFEST} names {name}, which lies outside the folder"
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != size:
        return f"{name} has {path.stat().st_size} bytes where {MANIFEST} says {size}"
    if _sha256(path) != checksum:
        return f"{name} is damaged: its checksum is another one"
    return None


def newest(root: Path) -> Path | None:
    """The newest valid checkpoint; says which newer ones are not valid, and why."""
    for folder in numbered(root):
        if not (why := problem(folder)):
            return folder
        say(f"note: {folder} is no valid checkpoint ({why}); the one before is taken")
    return None


def find(config) -> Path | None:
    """The checkpoint that `--resume` asks for. Collective: process 0 reads, all learn.

    Raises:
        UserError: it is named, and is none.
    """
    if config.resume == "false":
        return None

    def look() -> Path | None:
        if config.resume == "auto":
            return newest(root_of(config))
        found = Path(config.resume).resolve()
        if why := problem(found):
            raise UserError(f"--resume {config.resume}: is no valid checkpoint ({why}); name another, or pass auto")
        return found

    return from_main(look)


def remove_after(root: Path, number: int) -> None:
    """Removes what is newer than the checkpoint of step `number`, from which the run goes on otherwise."""
    for folder in [*root.glob("step-*"), *root.glob(".step-*")]:
        if number_of(folder) > number:
            shutil.rmtree(folder)


def read_state(folder: Path) -> dict:
    return json.loads((folder / STATE_FILE).read_text())


# ---------------------------------------------------------------------------------------------------------------------
# Going on from one
# ---------------------------------------------------------------------------------------------------------------------


class _SharedFile:
    """Rows of a file that processes wrote together."""

    def __init__(self, path: Path):
        self.file = safe_open(path, framework="pt")
        self.names = set(self.file.keys())

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.file.get_slice(name)[start:stop]


@torch.no_grad()
def restore_parameters(model, folder: Path) -> None:
    """Fills this process's rows of what trains; `Method.after_step` is left to the caller."""
    file = _SharedFile(folder / trained_file(model))
    for name, p in model.named_parameters():
        if p.requires_grad and local(p).numel():
            local(p).copy_(file.rows(name, *row_range(p)))


def whole_tensors(folder: Path, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Those of what a run goes on from, whole, by their names in the model."""
    names = list(names)
    if not names:
        return {}
    with safe_open(folder / TRAINED_FILE, "pt") as file:
        return {name: file.get_tensor(name) for name in names}


def restore(step, folder: Path) -> None:
    """Makes a TrainStep go on where the one went that was saved; `read_state` has been checked.

    Raises:
        UserError: an optimizer whose state belongs to another number of processes.
    """
    state = read_state(folder)
    same_processes = state["processes"] == world_size()
    if state["optimizer_is_split"] and not same_processes:
        raise UserError(
            f"--resume {folder}: its 8-bit optimizer states belong to {state['processes']} processes, not to "
            f"{world_size()}; start as many"
        )
    restore_parameters(step.model, folder)
    step.prepared.method.after_step(step.model, device=step.device)
    own = load_file(folder / own_file(rank())) if same_processes else {}
    by_name = _optimizer_state(step, folder, state, own)
    optimizer = dict(state=by_name, groups=state["groups"])
    step.load_state_dict(dict(optimizer=optimizer, scaler=state["scaler"], taken=state["step"]))
    if same_processes:
        torch.set_rng_state(own["random/cpu"])
        if "random/cuda" in own and step.device.type == "cuda":
            torch.cuda.set_rng_state(own["random/cuda"], step.device)
    else:  # other processes draw other numbers; they shall not repeat those of the start
        torch.manual_seed(hash((state["flags"]["seed"], rank(), state["step"])) % 2**63)


def _optimizer_state(step, folder: Path, state: dict, own: dict[str, torch.Tensor]) -> dict[str, dict]:
    """By the names of the parameters of which this process holds rows."""
    file = _SharedFile(folder / OPTIMIZER_FILE)
    found = {name: {} for name in step.trained.names}
    parameters = dict(zip(step.trained.names, step.trained.sharded, strict=True))
    for full in file.names:
        key, _, name = full.partition("/")
        if name in found:
            found[name][key] = file.rows(full, *row_range(parameters[name]))
    for name, values in state["scalars"].items():
        if name in found:
            found[name] |= {key: _scalar(value) for key, value in values.items()}
    for full, tensor in own.items():
        kind, _, rest = full.partition("/")
        key, _, name = rest.partition("/")
        if kind == "optimizer" and name in found:
            found[name][key] = tensor
    return {name: values for name, values in found.items() if values}


def _scalar(value):
    return torch.tensor(value[1], dtype=getattr(torch, value[0])) if isinstance(value, list) else value


# ---------------------------------------------------------------------------------------------------------------------
# When, and whether it is the same run
# ---------------------------------------------------------------------------------------------------------------------


def keeps_checkpoints(config) -> bool:
    """Whether the flags ask for checkpoints."""
    intervals = config.save_every_steps or config.save_every_minutes
    return bool(intervals or config.stop_at_step or config.stop_after_minutes or config.save_best)


class Keeper:
    """Decides with the other processes when a checkpoint is written, and says what could not be.

    Args:
        root: the folder of checkpoints.
        take: step number -> Snapshot.
        keeps: checkpoints are asked for: it is tried at once whether they can be written.
    """

    def __init__(self, config, root: Path, take: Callable[[int], Snapshot], *, keeps: bool):
        self.root, self.take, self.keeps, self.count = root, take, keeps, config.keep_checkpoints
        self.every_steps, self.every_seconds = config.save_every_steps, 60 * config.save_every_minutes
        self.writer = CheckpointWriter(root, keep=self.count) if keeps else None
        self.saved_at, self.due, self.last = time.monotonic(), False, None

    def votes(self) -> list[float]:
        """What this process adds to the sums of the next step."""
        late = is_main() and self.every_seconds and time.monotonic() - self.saved_at > self.every_seconds
        busy, failed = (self.writer.busy, self.writer.error is not None) if self.writer else (False, False)
        return [float(bool(late)), float(busy), float(failed)]

    def after(self, number: int, votes: list[float], *, last: bool) -> None:
        """After step `number`: begins to write where it is time, unless the one before is still being written.

        Args:
            last: of the run, after which it can still be trained for longer.
        """
        late, busy, failed = votes
        if failed:
            self._report(self.writer.finish())
            busy = False
        self.due = self.due or bool(late) or bool(self.every_steps and number % self.every_steps == 0)
        if (self.due and not busy) or (last and self.keeps):
            self._begin(number)

    def keep(self, number: int) -> Path | None:
        """Waits until step `number` has a checkpoint; its folder, or None where it could not be written. Collective."""
        if self.last != number:
            self._begin(number)
        return folder_of(self.root, number) if self._report(self.writer.finish()) else None

    def _begin(self, number: int) -> None:
        """Waits for the one before."""
        if self.writer is None:
            self.writer = CheckpointWriter(self.root, keep=self.count)
        self._report(self.writer.finish())
        self.writer.start(self.take(number))
        self.due, self.saved_at, self.last = False, time.monotonic(), number

    def keep_best(self, number: int) -> None:
        """Keeps step `number` for as long as no later one is better. Collective."""
        kept = self.keep(number)
        if kept:
            self.writer.best = kept.name

    def close(self) -> None:
        """Waits for what is being written. Collective."""
        if self.writer:
            self._report(self.writer.finish())

    def _report(self, error: str | None) -> bool:
        if error:
            say(
                f"WARNING: the checkpoint of step {self.last} could not be written ({error}); the one before stays, "
                "and the next is tried at its time"
            )
        return error is None


def _brief(value, most: int = 80) -> str:
    """A flag's value in a message; of a long one, as a plan of bits, its beginning and a hash."""
    text = str(value)
    return text if len(text) <= most else f"{text[:most]}… ({hashlib.sha256(text.encode()).hexdigest()[:8]})"


DATA_FLAGS = ("dataset", "dataset_samples", "dataset_split", "dataset_config", "columns", "prompt_template",
              "chat_template", "eval_samples")  # fmt: skip


def differences(state: dict, config, *, facts: dict) -> list[str]:
    """One line for each thing in which a run differs from the one that wrote a checkpoint.

    Args:
        facts: what is recorded beside the flags and must be the same: base, data.
    """
    now = lasting_values(config)
    found = [
        f"--{name} {_brief(now[name])}: the checkpoint has {_brief(state['flags'].get(name))}"
        for name in lasting_flags(config)
        if state["flags"].get(name, now[name]) != now[name]
    ]
    before = {name: state["flags"].get(name, now[name]) for name in DATA_FLAGS}
    changed = [f"--{name} {now[name]}, it has {old}" for name, old in before.items() if old != now[name]]
    of_data = "; ".join(changed) or "the files or the tokenizer changed"
    hints = dict(data=f" ({of_data})", rows_per_step=f" ({facts['rows_per_step']})")
    return found + [
        f"{name}: another one than in the checkpoint{hints.get(name, '')}"
        for name, value in facts.items()
        if state[name] != value
    ]
