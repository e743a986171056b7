"""Many short runs on few GPUs: processes that stay, one line of results.jsonl for each run, and no run made twice.

Every process calls `train.main` as `train.py` would, again and again, so that libraries are loaded once. Several share
a GPU, since a small model leaves it idle; with several GPUs they take turns.
"""

import gc
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median, stdev

import torch

import evaluate
import prepare_weights
import train
from fsdp_utils.config import TrainConfig
from fsdp_utils.core.devices import peak_memory_gib
from fsdp_utils.core.flags import parse
from fsdp_utils.core.folders import read_rows

RESULTS = "results.jsonl"
CURVE_POINTS = 60


def train_flags(flags: dict) -> TrainConfig:
    """The flags of train.py, checked as those of a command line."""
    return parse(TrainConfig, _words(flags), prog="train.py")


def _words(flags: dict) -> list[str]:
    """As they stand on a command line."""
    return [f"--{name}={value}" for name, value in flags.items()]


def forget(device: torch.device) -> None:
    """Gives back what the last run held, so that the next one's peak is its own."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def thinned(values: list[float]) -> list[tuple[int, float]]:
    """`(step, mean since the point before)` of a curve, at most CURVE_POINTS of them."""
    every = -(-len(values) // CURVE_POINTS)
    starts = range(0, len(values), every)
    return [(min(i + every, len(values)), round(mean(values[i : i + every]), 5)) for i in starts]


def train_once(flags: TrainConfig, device: torch.device) -> dict:
    """Trains; returns time (loading included), peak memory, the curves of metrics.jsonl and the last validation.

    Raises:
        FloatingPointError: it diverged.
    """
    forget(device)
    begun = time.perf_counter()
    train.main(flags)
    seconds = time.perf_counter() - begun
    rows = read_rows(Path(flags.output_dir) / "metrics.jsonl")
    steps, validations = [row for row in rows if "loss" in row], [row for row in rows if "eval_loss" in row]
    norms = [step["grad_norm"] for step in steps]
    judged = {name: value for name, value in validations[-1].items() if name != "step"} if validations else {}
    return dict(
        train_seconds=round(seconds, 2),
        train_peak_gib=round(peak_memory_gib(device), 4),
        tokens_per_s=median(step["tokens_per_s"] for step in steps),
        steps=len(steps),
        loss=thinned([step["loss"] for step in steps]),
        grad_norm=thinned(norms),
        grad_norm_mean=mean(norms),
        **judged,
    )


def evaluate_once(flags: dict, device: torch.device, *, output: Path) -> dict:
    """What evaluate.py writes with these flags; the file is not kept."""
    forget(device)
    flags = flags | dict(device=device.type, output_file=output, overwrite=True)
    evaluate.main(parse(evaluate.EvalConfig, _words(flags), prog="evaluate.py"))
    result = json.loads(output.read_text())
    output.unlink()
    return result


def export_once(flags: dict, device: torch.device) -> dict:
    """What prepare_weights.py reports of an export with these flags; the folder is not kept."""
    forget(device)
    words = _words(flags | dict(device=device.type))
    prepare_weights.main(parse(prepare_weights.ExportConfig, words, prog="prepare_weights.py"))
    report = json.loads((Path(flags["save_dir"]) / "fidelity.json").read_text())
    shutil.rmtree(flags["save_dir"])
    return report


def spread(values: list[float], form: str) -> str:
    """Mean and, of several, standard deviation."""
    return form.format(mean(values)) + (f" ± {form.format(stdev(values))}" if len(values) > 1 else "")


@contextmanager
def logged(path: Path) -> Iterator[None]:
    """What is said meanwhile goes to this file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as log, redirect_stdout(log), redirect_stderr(log):
        yield


@contextmanager
def in_its_place(job, folder: Path) -> Iterator[None]:
    """What a job says goes to its log in `folder`; what it leaves in its folder of work is removed."""
    try:
        with logged(folder / "logs" / f"{job}.log"):
            yield
    finally:
        shutil.rmtree(folder / "work" / str(job), ignore_errors=True)


class Here:
    """The executor of one process: a job is done when `submit` returns."""

    def submit(self, function, *args) -> Future:
        future = Future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            # all that a job may raise, as every executor does: run_jobs reads it from the future, so that one that
            # fails does not end the others
            future.set_exception(error)
        return future


def _take_gpu(counter, gpus: int) -> None:
    """Each process computes on one GPU, as those of torchrun do."""
    with counter.get_lock():
        os.environ["LOCAL_RANK"] = str(counter.value % gpus)
        counter.value += 1


def executor(processes: int):
    """Where jobs run; spawned, because CUDA does not survive a fork."""
    if processes == 1:
        return nullcontext(Here())
    spawned, gpus = get_context("spawn"), torch.cuda.device_count()
    taking = dict(initializer=_take_gpu, initargs=(spawned.Value("i", 0), gpus)) if gpus > 1 else {}
    return ProcessPoolExecutor(processes, mp_context=spawned, **taking)


def run_jobs(jobs: Callable[[], list], execute: Callable, pool, *, processes: int, deadline: float) -> Iterator[list]:
    """What `execute` makes of each job as it ends; nothing of one that fails, which is said and stops no other. After
    the deadline no further one is started.

    Args:
        jobs: those to do, asked again whenever one has ended, since results make further ones. None is run twice.
    """
    running, begun = {}, set()
    while True:
        waiting = deque(job for job in jobs() if job not in begun) if time.monotonic() <= deadline else ()
        while waiting and len(running) < processes:
            job = waiting.popleft()
            begun.add(job)
            running[pool.submit(execute, job)] = job
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            job, error = running.pop(future), future.exception()
            if error:
                print(f"{job}: failed ({str(error).splitlines()[0] if str(error) else repr(error)})", flush=True)
            else:
                yield future.result()


def carry_out(
    left: Callable[[], list], execute: Callable, path: Path, *, processes: int, announce: Callable, deadline: float
) -> None:
    """Executes what is left to do, and appends the rows of each job to `path` as soon as it has ended."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with executor(processes) as pool, open(path, "a", buffering=1) as file:
        if path.stat().st_size and not path.read_text().endswith("\n"):
            file.write("\n")  # a line that was cut short must not swallow the next
        for found in run_jobs(left, execute, pool, processes=processes, deadline=deadline):
            file.write("".join(json.dumps(row) + "\n" for row in found))  # one write: all rows of a run or none
            for row in found:
                announce(row)
