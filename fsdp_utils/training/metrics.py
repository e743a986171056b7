"""What is logged of a step, and where it goes: what --log_to names, always metrics.jsonl; the profiler."""

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import torch

from fsdp_utils.core import devices
from fsdp_utils.core.folders import METRICS_FILE, read_rows
from fsdp_utils.core.locks import make_writable
from fsdp_utils.core.ranks import rank, say
from fsdp_utils.training import sinks


def check_sink(config) -> None:
    """Raises UserError, before anything is loaded, if profiles or what is logged have nowhere to go. Process 0 asks."""
    if rank() != 0:
        return
    if config.profile:
        folder = Path(config.profiling_output).absolute()
        # nothing is made yet: a folder inside --output_dir would pass for a result
        there = next(path for path in (folder, *folder.parents) if path.exists())
        make_writable(there, named=f"--profiling_output {config.profiling_output}")
    sinks.check(config)


def row_of(number: int, result, *, lr: float, timed: dict, device: torch.device, profile_memory: bool) -> dict:
    """What is logged of step `number`, from its `StepResult` and what the clock says of it."""
    now = devices.memory_now(device) if profile_memory else {}
    told = dict(step=number, loss=result.loss, lr=lr, grad_norm=result.grad_norm, tokens=result.tokens)
    return told | timed | result.experts | dict(memory_gib=devices.peak_memory_gib(device)) | now


class Silent:
    """What the other processes log to, so that the loop asks no one's rank."""

    run_ids: ClassVar[dict] = {}

    def log(self, row):
        pass

    def close(self):
        pass


class Logger:
    """Process 0's logger: what --log_to names, and `metrics.jsonl` in the output folder.

    Args:
        total: steps of the run; start: those that are done; run_ids: of an earlier process of the run.
    """

    def __init__(self, config, *, total: int, start: int, run_ids: dict[str, str]):
        path = Path(config.output_dir) / METRICS_FILE
        kept = [line for line in read_rows(path) if start and line["step"] <= start]  # a step is told once
        temporary = path.with_name(f".{path.name}")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(path)
        self.file, self.unwritten, self.failing = open(path, "ab", buffering=0), b"", False
        self.sinks = sinks.make(config, total=total, start=start, run_ids=run_ids)

    @property
    def run_ids(self) -> dict[str, str]:
        """By which a later process goes on logging to the same places."""
        return {name: sink.run_id for name, sink in self.sinks.items() if sink.run_id}

    def log(self, row: dict) -> None:
        # a skipped step's infinite norm is no JSON
        finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in row.items()}
        self._write(json.dumps(finite, allow_nan=False) + "\n")
        for sink in self.sinks.values():
            sink.log(row)

    def _write(self, line: str = "") -> None:
        """Also what could not be written before: a full disk ends no run."""
        self.unwritten += line.encode()
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
            self.failing = False
        except OSError as error:
            if not self.failing:
                say(f"WARNING: {self.file.name} could not be written ({error}); it is tried again with the next step")
            self.failing = True

    def close(self) -> None:
        self._write()
        for sink in self.sinks.values():
            sink.close()
        self.file.close()


def make_logger(config, **settings):
    """The logger of this process: see `Logger`."""
    return Logger(config, **settings) if rank() == 0 else Silent()


def make_profiler(config, device: torch.device):
    """torch.profiler as the flags say, or None. Traces go to `profiling_output`, one file per process and cycle."""
    if not config.profile:
        return None
    from torch.profiler import ProfilerActivity, profile, schedule

    folder = Path(config.profiling_output)
    folder.mkdir(parents=True, exist_ok=True)

    exported = set()

    def export(profiler):
        if profiler.step_num in exported:
            return  # a window that opened as the run ended is empty, and has the name of the one before
        exported.add(profiler.step_num)
        name = f"rank{rank()}_step{profiler.step_num}"
        if config.export_trace:
            profiler.export_chrome_trace(str(folder / f"{name}.json.gz"))
        if config.export_memory_timeline:
            suffix = "html" if find_spec("matplotlib") else "json.gz"  # torch plots with it, or writes nothing
            profiler.export_memory_timeline(str(folder / f"{name}_memory.{suffix}"), device=str(device))

    recorded = config.warmup_steps + config.active_steps
    wait = max(config.wait_steps, config.profiling_frequency - recorded)
    return profile(
        activities=[ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else []),
        schedule=schedule(wait=wait, warmup=config.warmup_steps, active=config.active_steps, repeat=config.repeat),
        on_trace_ready=export,
        record_shapes=config.with_shapes or config.export_memory_timeline,
        with_stack=config.with_stack or config.export_memory_timeline,
        profile_memory=config.profile_memory or config.export_memory_timeline,
    )
