"""Real runs that keep checkpoints, and the faults that are put into them."""

import json
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from commands import REPOSITORY, TRAIN, clean_environment, free_port, losses
from forks import Command

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
    """A started command of Python, all that it says, and the places where it is held."""

    def __init__(self, scratch: Path, command: list, environment: dict):
        self.scratch, self.log, self.started = scratch, scratch / "said.log", set()
        self.log.touch()
        settings = dict(environment=clean_environment(**environment), folder=REPOSITORY, said=self.log)
        self.process = Command(command, **settings)

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
        runs.append(Run(here, [*launcher, script, *words], told))
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
