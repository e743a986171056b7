"""Faults of a run that keeps checkpoints: killed processes, torn files, full disks, signals. By real processes."""

import errno
import itertools
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from commands import REPOSITORY, TRAIN, clean_environment, error_lines, free_port, losses
from real_run import make_config

from fsdp_utils.core.ranks import rank
from fsdp_utils.folders import checkpoints, saving

PREEMPTED = 75
STEPS = 14
KEPT = list(range(2, STEPS + 1, 2))  # steps whose checkpoints a whole run writes
LIMIT = 150  # seconds, of whatever is waited for; a busy machine included
SECRETS = dict(HF_TOKEN="hf_dontTellAnyone", WANDB_API_KEY="0123dontTell4567", SOME_PASSWORD="correcthorsebattery")
FLAGS = dict(
    train_type="custom_lora", lora_rank=4, lr=0.01, batch_size=2, max_steps=STEPS, precision="fp32", device="cpu",
    use_cpu_offload=False, context_length=64, save_model=True, save_every_steps=2, keep_checkpoints=9, resume="auto",
    log_to="stdout", world_size=2,
)  # fmt: skip

# train.py, in which at a named point of a step, on one process, something happens. The processes that it starts import
# it again.
DRIVER = '''
import json
import os
import signal
import time
from pathlib import Path

import train
from fsdp_utils.config import TrainConfig
from fsdp_utils.core import processes
from fsdp_utils.core.flags import parse_or_fail
from fsdp_utils.core.ranks import rank
from fsdp_utils.data.batches import Batches
from fsdp_utils.folders import checkpoints, saving
from fsdp_utils.training.step import TrainStep

FAULTS, PAUSE = json.loads(os.environ["FAULTS"]), float(os.environ["PAUSE"])


def kill(fault, step):
    os.kill(os.getpid(), signal.SIGKILL)


def hold(fault, step):
    """Tells its process id, and waits to be let go."""
    place, patience = Path(fault["at"]), time.monotonic() + 120
    place.with_suffix(".writing").write_text(str(os.getpid()))
    place.with_suffix(".writing").rename(place)
    while not place.with_suffix(".go").exists() and time.monotonic() < patience:
        time.sleep(0.02)


def poison(fault, step):
    """The loss of this process is no number; its gradients are."""
    loss_of = step.micro_step.loss_of
    step.micro_step.loss_of = lambda batch: loss_of(batch) + float("nan")


def fail(fault, step):
    raise RuntimeError("the data went away")


def kill_once(fault, step):
    if not Path(fault["at"]).exists():
        Path(fault["at"]).touch()
        kill(fault, step)


def at(point, number=0, step=None):
    for fault in FAULTS:
        if (fault["point"], fault.get("number", number), fault["rank"]) == (point, number, rank()):
            globals()[fault["do"]](fault, step)


def before(owner, name, tell):
    """Calls `tell` with the arguments of `owner.name` before it."""
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        tell(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def number_of(partial):
    return int(partial.name.rpartition("-")[2])


def step(step, *args, **kwargs):
    """With a pause, a checkpoint is whole before the next step, unless a process of it has been killed."""
    time.sleep(PAUSE)
    patience = time.monotonic() + 5
    while PAUSE and any(writer.busy for writer in WRITERS) and time.monotonic() < patience:
        time.sleep(0.01)
    at("step", step.taken + 1, step)


def read(batches, total, *, start=0):
    for number, micro_batches in enumerate(first(batches, total, start=start), start + 1):
        at("read", number)
        yield micro_batches


first, Batches.first = Batches.first, read
WRITERS = []
before(checkpoints.CheckpointWriter, "start", lambda writer, snapshot: WRITERS.append(writer))
before(TrainStep, "__call__", step)
before(TrainStep, "_update", lambda step, *args, **kwargs: at("update", step.taken + 1, step))
before(checkpoints, "write_rows", lambda path, rows: at(f"write {path.name}", number_of(path.parent)))
before(checkpoints, "write_manifest", lambda folder: at("manifest", number_of(folder)))
before(train, "load", lambda *args, **kwargs: at("load"))
before(saving, "save", lambda *args: at("save"))
before(saving, "_move_in", lambda *args: at("move"))

if __name__ == "__main__":
    processes.launch(train.main, parse_or_fail(TrainConfig, prog="train.py"))
'''


def until(condition, *, what, every: float = 0.02):
    """Waits for what `condition` returns to be true, and returns it."""
    patience = time.monotonic() + LIMIT
    while not (found := condition()):
        assert time.monotonic() < patience, f"waited {LIMIT} s for {what}"
        time.sleep(every)
    return found


class Run:
    """A started command, all that it says, and the places where it is held."""

    def __init__(self, scratch: Path, command: list, environment: dict):
        self.scratch, self.log, self.started = scratch, scratch / "said.log", set()
        settings = dict(stdout=self.log.open("w"), stderr=subprocess.STDOUT, cwd=REPOSITORY, start_new_session=True)
        # a shell in the background ignores SIGINT, and so would what it starts
        settings["preexec_fn"] = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        self.process = subprocess.Popen(list(map(str, command)), env=clean_environment(**environment), **settings)

    @property
    def said(self) -> str:
        return self.log.read_text()

    __str__ = said.fget

    def ends(self) -> int:
        """The exit code. Nothing that it started outlives it."""
        until(lambda: self.below() is None, what=self, every=0.2)
        assert not psutil.wait_procs(self.started, timeout=20)[1], "processes outlived the one that started them"
        return self.process.returncode

    def below(self) -> set | None:
        """The processes that it has started; None when it has ended."""
        if self.process.poll() is not None:
            return None
        with suppress(psutil.NoSuchProcess):  # it ends just now
            self.started |= {*psutil.Process(self.process.pid).children(recursive=True)}
        return self.started

    def held(self, name: str) -> int:
        """The id of the process that waits there."""
        place = self.scratch / name
        until(lambda: place.exists() or self.process.poll() is not None, what=self)
        assert place.exists(), self.said
        return int(place.read_text())

    def let_go(self, name: str) -> None:
        (self.scratch / name).with_suffix(".go").touch()

    def close(self) -> None:
        self.below()
        for process in (self.process, *self.started):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(timeout=20)


def fault(point: str, do: str, number: int | None = None, *, rank: int = 0, at="") -> dict:
    """What the driver does at a point: see `DRIVER`."""
    return dict(point=point, do=do, rank=rank, at=str(at)) | (dict(number=number) if number else {})


@pytest.fixture(scope="module")
def begin(tmp_path_factory, tiny, tiny_data):
    """`begin(output_dir, *faults, **flags)`: the command with these faults; without any, train.py itself. A fault whose
    `at` is a name holds the run there until `let_go`."""
    scratch = tmp_path_factory.mktemp("driver")
    driver, runs = scratch / "driver.py", []
    driver.write_text(DRIVER)

    def begin(output_dir, *faults, launcher=(), environment=(), pause=0.0, **flags):
        here = tmp_path_factory.mktemp("run")
        faults = [f | dict(at=str(here / f["at"])) for f in faults]
        given = FLAGS | dict(model_name=tiny(), dataset=tiny_data, output_dir=output_dir, master_port=free_port())
        words = [f"--{name}={value}" for name, value in (given | flags).items()]
        script = driver if faults or pause else TRAIN
        told = dict(FAULTS=json.dumps(faults), PAUSE=str(pause), PYTHONPATH=str(REPOSITORY), **dict(environment))
        runs.append(Run(here, [sys.executable, *launcher, script, *words], told))
        return runs[-1]

    try:
        yield begin
    finally:
        for run in runs:
            run.close()


@pytest.fixture(scope="module")
def whole(begin, tmp_path_factory):
    """The folder of a run that nothing interrupted, with secrets around it, and what it said; its checkpoints all
    stay."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    run = begin(folder, environment=SECRETS, pause=0.01, verbose=True)
    assert run.ends() == 0, run.said
    assert steps_of(folder) == KEPT
    return folder, run.said


@pytest.fixture
def copy_until(whole, tmp_path):
    """`copy_until(step)`: the folder of the whole run as if it had been killed with its newest checkpoint there."""

    def copy(number: int, name: str = "out") -> Path:
        folder = tmp_path / name
        shutil.copytree(whole[0] / "checkpoints", folder / "checkpoints")
        checkpoints.remove_after(folder / "checkpoints", number)
        shutil.copy(whole[0] / "metrics.jsonl", folder)
        record = json.loads((whole[0] / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(record | dict(finished=False, saved=False)))
        return folder

    return copy


@pytest.fixture
def disk(tmp_path):
    """`disk(place, size)`: mounts a small file system there."""
    mounted = []

    def mount(place: Path, size: str = "4m") -> Path:
        place.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True)
        if done.returncode:
            pytest.skip(f"cannot mount a tmpfs: {done.stderr.decode().strip()}")
        mounted.append(place)
        return place

    try:
        yield mount
    finally:
        for place in mounted:
            subprocess.run(["umount", "-l", place], check=True, timeout=20)


def remount(place: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", place], check=True, timeout=20)


def fill(place: Path) -> Path:
    """A file that takes all the room that is left."""
    with open(place / "filled", "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                if size == 1:
                    raise
    return place / "filled"


def steps_of(folder: Path) -> list[int]:
    """Of the valid checkpoints."""
    found = map(checkpoints.number_of, filter(lambda f: not checkpoints.problem(f), (folder / "checkpoints").iterdir()))
    return sorted(found)


def metrics_of(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same(folder: Path, whole: tuple) -> None:
    """The run has ended, with the result that it has without interruption, and told each step once."""
    assert saving.is_finished(folder)
    name = "adapter_model.safetensors"
    assert (folder / name).read_bytes() == (whole[0] / name).read_bytes()
    assert metrics_of(folder) == list(range(1, STEPS + 1))
    assert losses(folder) == losses(whole[0])


def looks_finished(folder: Path) -> bool:
    return saving.is_finished(folder) or (folder / "adapter_config.json").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Killed
# ---------------------------------------------------------------------------------------------------------------------


def test_killed_thrice(begin, whole, tmp_path):
    """SIGKILL in a step, while a checkpoint is written, and before its manifest: the others end too, what is not whole
    counts as nothing, and the run comes to the bytes that it has without."""
    folder = tmp_path / "out"
    for start, killed in (
        (None, fault("update", "kill", 4, rank=1)),
        (2, fault("write optimizer.safetensors", "kill", 4, rank=1)),
        (2, fault("manifest", "kill", 4)),
    ):
        run = begin(folder, killed, pause=0.05)
        assert run.ends() not in (0, PREEMPTED), run.said
        assert ("goes on after step 2" in run.said) == bool(start)
        assert steps_of(folder) == [2] and not looks_finished(folder)
        assert checkpoints.newest(folder / "checkpoints").name == "step-000002"
    run = begin(folder)
    assert run.ends() == 0, run.said
    assert f"goes on after step 2 of {STEPS}" in run.said
    assert_same(folder, whole)
    assert not list((folder / "checkpoints").glob(".*")), "something half-written was left"


def test_killed_before_the_first_checkpoint_while_saving(tmp_path):
    """What a run without checkpoints leaves when it is killed while it saves does not keep it from starting anew."""
    folder = tmp_path / "out"
    (folder / ".saving").mkdir(parents=True)
    (folder / "run.json").write_text('{"finished": false}')
    (folder / "metrics.jsonl").touch()
    saving.check_output(
        make_config(model_name="demo", dataset="demo", output_dir=folder, save_model=True, resume="auto")
    )


@pytest.mark.parametrize("meeting", ["static", "standalone"])
def test_torchrun_restarts(begin, whole, tmp_path, meeting):
    """torchrun starts a run again of which a process was killed, and it goes on by itself, to the same bytes."""
    place = dict(static=f"--master_port={free_port()}", standalone="--standalone")[meeting]
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--max_restarts=2", place)
    run = begin(tmp_path / "out", fault("step", "kill_once", 4, rank=1, at="killed"), launcher=launcher, pause=0.05)
    assert run.ends() == 0, run.said
    assert run.said.count(f"goes on after step 2 of {STEPS}") == 1
    assert_same(tmp_path / "out", whole)


# ---------------------------------------------------------------------------------------------------------------------
# Torn, flipped, or of someone else
# ---------------------------------------------------------------------------------------------------------------------


def _truncate(folder: Path, name: str = "optimizer.safetensors") -> None:
    os.truncate(folder / name, (folder / name).stat().st_size - 1)


def _flip(folder: Path, name: str = "optimizer.safetensors") -> None:
    content = bytearray((folder / name).read_bytes())
    content[-5] ^= 0b100
    (folder / name).write_bytes(content)


def _link_outside(folder: Path, name: str = "optimizer.safetensors") -> None:
    elsewhere = folder.parent.parent / "elsewhere"
    (folder / name).rename(elsewhere)
    (folder / name).symlink_to(elsewhere)


def _link_folder_outside(folder: Path) -> None:
    elsewhere = folder.parent.parent / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(folder / "state.json", elsewhere)
    (folder / "linked").symlink_to(elsewhere)
    _rename("state.json", "linked/state.json", keep=True)(folder)


def _rename(old: str, new: str, *, keep: bool = False):
    """Of an entry in the manifest, with its true size and checksum."""

    def change(folder: Path) -> None:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        files[new] = files[old] if keep else files.pop(old)
        (folder / "manifest.json").write_text(json.dumps(dict(files=files)))

    return change


def _outside(folder: Path) -> None:
    shutil.copy(folder / "state.json", folder.parent / "state.json")
    _rename("state.json", "../state.json", keep=True)(folder)


def _absolute(folder: Path) -> None:
    _rename("state.json", str(folder / "state.json"), keep=True)(folder)


def _forget(name: str):
    def change(folder: Path) -> None:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        del files[name]
        (folder / "manifest.json").write_text(json.dumps(dict(files=files)))

    return change


def _write_manifest(text: str):
    return lambda folder: (folder / "manifest.json").write_text(text)


DAMAGES = {
    "torn": (_truncate, "optimizer.safetensors has"),
    "flipped": (_flip, "optimizer.safetensors is damaged"),
    "flipped state": (partial(_flip, name="state.json"), "state.json is damaged"),
    "gone": (lambda folder: (folder / "process-00001.safetensors").unlink(), "process-00001.safetensors is missing"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
    "half a manifest": (lambda folder: os.truncate(folder / "manifest.json", 200), "manifest.json is .*damaged"),
    "empty manifest": (_write_manifest(""), "manifest.json is .*damaged"),
    "manifest of a list": (_write_manifest('{"files": ["state.json"]}'), "manifest.json is .*damaged"),
    "manifest without sizes": (_write_manifest('{"files": {"state.json": {}}}'), "manifest.json is .*damaged"),
    "manifest of nothing": (_write_manifest('{"files": {}}'), "state.json"),
    "outside": (_outside, "outside the folder"),
    "absolute": (_absolute, "outside the folder"),
    "link outside": (_link_outside, "outside the folder"),
    "linked folder outside": (_link_folder_outside, "outside the folder"),
    "no name": (_rename("run.json", "a\0b", keep=True), "manifest.json"),
    "too long a name": (_rename("run.json", "x" * 300, keep=True), "manifest.json"),
    **{f"{name} not named": (_forget(name), name) for name in (
        "state.json", "optimizer.safetensors", "trained.safetensors", "adapter_model.safetensors",
        "process-00001.safetensors",
    )},
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged(copy_until, capsys, damage):
    """Whatever a run would read from a checkpoint must be named, whole, and inside its folder; if not, the reason is
    told and the checkpoint before is taken."""
    change, reason = DAMAGES[damage]
    folder = copy_until(8)
    root = folder / "checkpoints"
    newest = root / "step-000008"
    change(newest)
    assert checkpoints.newest(root).name == "step-000006"
    assert re.search(reason, checkpoints.problem(newest))
    if damage != "no manifest":  # without one it is none, and nothing is said of it
        assert f"{newest} is no valid checkpoint ({checkpoints.problem(newest)})" in capsys.readouterr().out


class _Trap:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


def test_torn_checkpoint_is_passed_over(begin, whole, copy_until, tmp_path):
    """A real run names the torn file, goes on from the checkpoint before, and reads no file that no manifest names."""
    folder, mark = copy_until(6), tmp_path / "unpickled"
    _truncate(folder / "checkpoints" / "step-000006")
    for name in ("optimizer.pt", "process-00000.pt", "trained.bin", "pytorch_model.bin"):
        (folder / "checkpoints" / "step-000004" / name).write_bytes(pickle.dumps(_Trap(mark)))
    run = begin(folder)
    assert run.ends() == 0, run.said
    assert "step-000006 is no valid checkpoint (optimizer.safetensors has" in run.said
    assert f"goes on after step 4 of {STEPS}" in run.said
    assert not mark.exists()
    assert_same(folder, whole)


def test_flipped_checkpoint_by_name_is_refused(begin, copy_until, tmp_path):
    """`--resume PATH` to a checkpoint with a flipped bit: one line, exit code not 0, nothing is trained."""
    checkpoint = copy_until(6) / "checkpoints" / "step-000006"
    _flip(checkpoint)
    run = begin(tmp_path / "new", resume=checkpoint)
    assert run.ends() == 2, run.said
    (line,) = error_lines(run.said)
    assert str(checkpoint) in line and "optimizer.safetensors is damaged" in line
    assert "Traceback" not in run.said and not (tmp_path / "new").exists()


# ---------------------------------------------------------------------------------------------------------------------
# How many are kept
# ---------------------------------------------------------------------------------------------------------------------

ATTEMPTS = itertools.count(1000, 1000)  # marks of writers in the same processes must not meet


def _snapshot(number: int) -> checkpoints.Snapshot:
    """Two rows of each process."""
    rows = [(("a", 2 * rank()), torch.full((2, 3), float(number)))]
    names = ("optimizer.safetensors", "trained.safetensors", "adapter_model.safetensors")
    specs = {name: {"a": (torch.float32, (4, 3))} for name in names}
    describe = lambda folder: (folder / "run.json").write_text("{}")
    own = {"random/cpu": torch.get_rng_state()}
    return checkpoints.Snapshot(
        number, specs, dict.fromkeys(names, rows), own, describe, dict(step=number, processes=2)
    )


def _valid(root: Path) -> list[int]:
    return sorted(map(checkpoints.number_of, filter(lambda f: not checkpoints.problem(f), root.glob("step-*"))))


def _no_room(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


def write_some(root: Path, *, keep: int, attempt: int, failing: str) -> dict:
    """Writes the checkpoints of steps 2, 4 and 6, the last of which fails on process 1 or before its manifest; which
    were valid when the manifest of each was about to be written, which are at last, and the reasons."""
    writer, seen, errors = checkpoints.CheckpointWriter(root, keep=keep), [], []
    writer.attempt = attempt
    original = dict(write_manifest=checkpoints.write_manifest, write_rows=checkpoints.write_rows)
    try:
        checkpoints.write_manifest = lambda f: (seen.append(_valid(root)), original["write_manifest"](f))
        for number in (2, 4, 6):
            if number == 6 and (failing == "write_manifest" or rank() == 1):
                setattr(checkpoints, failing, _no_room)
            writer.start(_snapshot(number))
            errors.append(writer.finish())
    finally:
        for name, function in original.items():
            setattr(checkpoints, name, function)
    return dict(seen=seen, valid=_valid(root), errors=errors, left=sorted(p.name for p in root.glob(".*")))


@pytest.mark.parametrize("failing", ["write_rows", "write_manifest"])
@pytest.mark.parametrize("keep", [1, 2])
def test_the_newest_valid_one_stays(pair, tmp_path, keep, failing):
    """Older ones go only after the newer one is whole: while it is written, and when it fails, they stay."""
    root = tmp_path / "checkpoints"
    found, other = pair.run(write_some, root, keep=keep, attempt=next(ATTEMPTS), failing=failing)
    assert found["seen"] == [[], [2]]
    assert found["valid"] == [2, 4][-keep:]
    assert found["errors"] == other["errors"] and found["errors"][:2] == [None, None]
    assert "No space left on device" in found["errors"][2]
    assert not found["left"]


# ---------------------------------------------------------------------------------------------------------------------
# Disks
# ---------------------------------------------------------------------------------------------------------------------


def test_full_disk(begin, disk, tmp_path):
    """Without room for a checkpoint, nor for metrics, the run says so and goes on; the checkpoint before stays valid;
    with room again the next is written. Without room for the result, it ends with an error, and can save it later."""
    place = disk(tmp_path / "disk")
    folder, flags = place / "out", dict(max_steps=50, save_every_steps=10, keep_checkpoints=1)
    holds = (
        fault("step", "hold", 12, at="full"),
        fault("step", "hold", 39, at="free"),
        fault("save", "hold", at="end"),
    )
    run = begin(folder, *holds, pause=0.02, **flags)
    run.held("full")
    filled = fill(place)
    run.let_go("full")
    run.held("free")
    assert steps_of(folder) == [10]
    for number in (20, 30):
        assert f"WARNING: the checkpoint of step {number} could not be written" in run.said
    filled.unlink()
    run.let_go("free")
    run.held("end")
    assert steps_of(folder) == [50]
    filled = fill(place)
    run.let_go("end")
    assert run.ends() not in (0, PREEMPTED), run.said
    assert not looks_finished(folder) and steps_of(folder) == [50]
    filled.unlink()
    again = begin(folder, **flags)
    assert again.ends() == 0, again.said
    assert saving.is_finished(folder) and (folder / "adapter_model.safetensors").exists()


def test_read_only_disk(begin, whole, disk, copy_until):
    """A disk that becomes read-only while the run goes on is as a full one: the checkpoint before stays, the run goes
    on, and the next is written when it can be."""
    folder = copy_until(0)
    disk(folder / "checkpoints")
    holds = [fault("step", "hold", number, at=f"at-{number}") for number in (3, 7)]
    run = begin(folder, *holds, pause=0.05)
    run.held("at-3")
    assert steps_of(folder) == [2]
    remount(folder / "checkpoints", "ro")
    run.let_go("at-3")
    run.held("at-7")
    assert steps_of(folder) == [2]
    assert "WARNING: the checkpoint of step 4 could not be written" in run.said
    remount(folder / "checkpoints", "rw")
    run.let_go("at-7")
    assert run.ends() == 0, run.said
    assert steps_of(folder) == [2, *KEPT[3:]]
    assert_same(folder, whole)


def test_removed_folder(begin, whole, tmp_path):
    """An output folder that someone removes while the run goes on ends no run: later checkpoints are valid, or it says
    that they could not be written, and the result is saved."""
    folder = tmp_path / "out"
    run = begin(folder, fault("step", "hold", 3, at="removed"), pause=0.05)
    run.held("removed")
    shutil.rmtree(folder)
    run.let_go("removed")
    assert run.ends() == 0, run.said
    said = {n for n in KEPT[1:] if f"WARNING: the checkpoint of step {n} could not be written" in run.said}
    assert said | set(steps_of(folder)) == {*KEPT[1:]}
    assert saving.is_finished(folder)
    assert (folder / "adapter_model.safetensors").read_bytes() == (whole[0] / "adapter_model.safetensors").read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# Signals
# ---------------------------------------------------------------------------------------------------------------------


def _signalled(begin, folder: Path, number: int, how: signal.Signals, *, rank: int | None) -> Run:
    """A run to its end: in step `number` one process gets a signal, or the one that started them."""
    run = begin(folder, fault("step", "hold", number, rank=rank or 0, at="here"), pause=0.05)
    pid = run.held("here")
    os.kill(run.process.pid if rank is None else pid, how)
    time.sleep(1 if rank is None else 0.3)  # until it is passed on
    run.let_go("here")
    assert run.ends() == PREEMPTED, run.said
    return run


def test_signals(begin, whole, tmp_path):
    """A signal to one process, or to the parent of both: all end after the same step, with a checkpoint of it, from
    which the run goes on to the same bytes. A signal while the result is saved lets that end."""
    folder = tmp_path / "out"
    signals = ((signal.SIGTERM, 1), (signal.SIGUSR1, 0), (signal.SIGINT, 1), (signal.SIGTERM, None))
    for number, (how, who) in zip((2, 5, 8, 11), signals, strict=True):
        run = _signalled(begin, folder, number, how, rank=who)
        assert metrics_of(folder)[-1] == number + 1  # what step `number` sums had been given before the signal came
        assert f"after step {number + 1}; --resume auto goes on from" in run.said and "Traceback" not in run.said
        assert number + 1 in steps_of(folder) and not looks_finished(folder)
    run = begin(folder, fault("move", "hold", at="saving"))
    os.kill(run.held("saving"), signal.SIGTERM)
    run.let_go("saving")
    assert run.ends() == 0, run.said
    assert_same(folder, whole)


def test_signal_while_loading(begin, tmp_path):
    """Before the first step there is nothing to keep: the run ends at once, and what lies there looks unfinished."""
    run = begin(tmp_path / "out", fault("load", "hold", rank=1, at="loading"), pause=0.01)
    os.kill(run.held("loading"), signal.SIGTERM)  # it is not let go
    assert run.ends() == PREEMPTED, run.said
    assert not looks_finished(tmp_path / "out") and "Traceback" not in run.said
    assert not (tmp_path / "out" / "checkpoints").exists() or not steps_of(tmp_path / "out")


@pytest.mark.parametrize("waiting", [False, True], ids=["in a step", "in a collective"])
def test_second_signal(begin, copy_until, waiting):
    """Who sends a signal again, more than a second later, does not want to wait for the step: the process ends at
    once, also while it waits for the other, and the checkpoint before stays."""
    folder = copy_until(2)
    run = begin(folder, fault("step", "hold", 4, rank=1, at="long"), pause=0.01, save_every_steps=0)
    pid = run.held("long")
    both = {p.pid for p in run.below() or () if "spawn_main" in " ".join(p.cmdline())}
    if waiting:
        (pid,) = both - {pid}
        time.sleep(0.5)  # it has come to the sum in which it waits
    for pause in (1.3, 0):
        os.kill(pid, signal.SIGTERM)
        time.sleep(pause)
    (process,) = {p for p in run.started if p.pid == pid}
    alive = psutil.wait_procs([process], timeout=10)[1]
    run.let_go("long")
    assert not alive, f"the step was waited for\n{run.said}"
    assert run.ends() == PREEMPTED, run.said
    assert "ended by SIGTERM" in run.said
    assert steps_of(folder) == [2] and not looks_finished(folder)


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong in a step
# ---------------------------------------------------------------------------------------------------------------------


def test_nan_on_one_process(begin, copy_until):
    """A loss that is no number on one process: both end before that step is taken, in one clear line, and
    diverged.json tells where; the last checkpoint stays."""
    folder = copy_until(2)
    run = begin(folder, fault("step", "poison", 5, rank=1), pause=0.05)
    assert run.ends() not in (0, PREEMPTED), run.said
    (line,) = error_lines(run.said)
    assert "step 5" in line and "nan" in line and "Traceback" not in run.said
    told = json.loads((folder / "diverged.json").read_text())
    assert told["step"] == 5 and told["lr"] == FLAGS["lr"]
    assert len(told["samples"]) == 2 * FLAGS["batch_size"] and all(0 <= sample < 16 for sample in told["samples"])
    assert metrics_of(folder) == [1, 2, 3, 4] and steps_of(folder) == [2, 4] and not looks_finished(folder)


def test_one_process_fails_to_read(begin, copy_until):
    """Data that one process cannot read ends both, with its reason."""
    folder = copy_until(2)
    run = begin(folder, fault("read", "fail", 4, rank=1), pause=0.01)
    assert run.ends() not in (0, PREEMPTED), run.said
    assert "the data went away" in run.said
    assert steps_of(folder) == [2] and not looks_finished(folder)


def test_no_secret_is_told(whole):
    """Tokens and passwords of the environment are in no file of a run, nor in what it says, with --verbose too."""
    folder, said = whole
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {"run.json", "metrics.jsonl", "manifest.json", "state.json"} <= {path.name for path in files}
    assert "keep_checkpoints" in said
    for secret in SECRETS.values():
        assert secret not in said
        assert [path for path, content in files.items() if secret.encode() in content] == []


# ---------------------------------------------------------------------------------------------------------------------
# Two hosts
# ---------------------------------------------------------------------------------------------------------------------


def _on_two_hosts(begin, folder: Path, **flags) -> str:
    """A run of two agents with a process each, to its end; what the first said."""
    port = free_port()
    agent = ("-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1")
    runs = [begin(folder, launcher=(*agent, f"--master_port={port}", f"--node_rank={i}"), **flags) for i in (0, 1)]
    for run in runs:
        assert run.ends() == 0, "\n".join(r.said for r in runs)
    return runs[0].said


@pytest.mark.parametrize("strategy", ["full_shard", "hybrid_full_shard"])
def test_two_hosts(begin, whole, tmp_path, strategy):
    """Two hosts train, write checkpoints together and go on from them, to the result of one host with two processes;
    with a copy of the model on each host, up to the order in which numbers are added."""
    folder, flags = tmp_path / "out", dict(sharding_strategy=strategy)
    _on_two_hosts(begin, folder, **flags, stop_at_step=3)
    assert 3 in steps_of(folder) and not looks_finished(folder)
    assert f"goes on after step 3 of {STEPS}" in _on_two_hosts(begin, folder, **flags)
    if strategy == "full_shard":
        assert_same(folder, whole)
    assert saving.is_finished(folder) and metrics_of(folder) == list(range(1, STEPS + 1))
    assert losses(folder) == pytest.approx(losses(whole[0]), rel=1e-4)
