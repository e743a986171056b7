"""Where numbers go: progress bar, stdout or wandb, always metrics.jsonl; the clock and the profiler."""

import json
import math
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import torch
from tqdm import tqdm

from fsdp_utils.core.devices import synchronize
from fsdp_utils.core.errors import UserError
from fsdp_utils.core.locks import make_writable
from fsdp_utils.core.ranks import rank, say


def shown(row: dict) -> str:
    """A row as one line; a pair is an interval."""
    short = lambda value: f"{value:.6g}" if isinstance(value, float) else str(value)
    told = lambda value: ":".join(map(short, value)) if isinstance(value, tuple) else short(value)
    return " ".join(f"{name}={told(value)}" for name, value in row.items())


def apart(row: dict) -> dict:
    """A row with the two ends of each interval by themselves: what draws curves draws no pairs."""
    found = {}
    for name, value in row.items():
        ends = (f"{name}_low", f"{name}_high") if isinstance(value, tuple) else (name,)
        found |= zip(ends, value if len(ends) > 1 else [value], strict=True)
    return found


class Stdout:
    """One line per step."""

    run_id = None

    def __init__(self, config, total, *, start=0, run_id=None):
        self.total = total

    def log(self, row):
        print(shown(row), flush=True)

    def close(self):
        pass


class Tqdm(Stdout):
    """A progress bar over optimizer steps."""

    def __init__(self, config, total, *, start=0, run_id=None):
        self.bar = tqdm(total=total, initial=start, desc="training", unit="step", file=sys.stderr)

    def log(self, row):
        if "loss" not in row:
            self.bar.write(shown(row))
            return
        self.bar.set_postfix(loss=f"{row['loss']:.4f}", lr=f"{row['lr']:.2e}", tok_s=f"{row['tokens_per_s']:.0f}")
        self.bar.update()

    def close(self):
        self.bar.close()


class Wandb(Tqdm):
    """Weights & Biases beside the bar; WANDB_MODE=offline works without a network."""

    def __init__(self, config, total, *, start=0, run_id=None):
        import wandb

        from fsdp_utils.core.flags import as_dict

        names = dict(project=config.project_name, name=config.name, group=config.group, entity=config.entity)
        self.run = wandb.init(**names, config=as_dict(config), id=run_id, resume="allow" if run_id else None)
        super().__init__(config, total, start=start)

    @property
    def run_id(self):
        return self.run.id

    def log(self, row):
        self.run.log(apart(row), step=row["step"])
        super().log(row)

    def close(self):
        super().close()
        self.run.finish()


SINKS = {"tqdm": Tqdm, "stdout": Stdout, "wandb": Wandb}


def check_sink(config) -> None:
    """Raises UserError, before anything is loaded, if profiles or what is logged have nowhere to go. Process 0 asks."""
    if rank() != 0:
        return
    if config.profile:
        folder = Path(config.profiling_output).absolute()
        # nothing is made yet: a folder inside --output_dir would pass for a result
        there = next(path for path in (folder, *folder.parents) if path.exists())
        make_writable(there, named=f"--profiling_output {config.profiling_output}")
    if config.log_to == "wandb":
        _check_wandb()


def _check_wandb() -> None:
    import wandb

    if wandb.setup().settings.mode in ("offline", "dryrun", "disabled"):
        return
    try:
        why = None if wandb.login(prompt=False) else "no API key is known; run `wandb login`"
    except wandb.Error as error:
        why = str(error).splitlines()[0]
    if why:
        raise UserError(f"--log_to wandb: {why}, or set WANDB_MODE=offline")


class Silent:
    """What the other processes log to, so that the loop asks no one's rank."""

    run_id = None

    def log(self, row):
        pass

    def close(self):
        pass


class Logger:
    """Process 0's logger: the chosen sink and `metrics.jsonl` in the output folder."""

    def __init__(self, config, *, total: int, start: int = 0, run_id: str | None = None):
        path = Path(config.output_dir) / "metrics.jsonl"
        kept = [line for line in _lines(path) if start and line["step"] <= start]  # a step is told once
        temporary = path.with_name(f".{path.name}")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(path)
        self.file, self.unwritten, self.failing = open(path, "ab", buffering=0), b"", False
        self.sink = SINKS[config.log_to](config, total, start=start, run_id=run_id)

    @property
    def run_id(self) -> str | None:
        """By which a later process goes on logging to the same place."""
        return self.sink.run_id

    def log(self, row: dict) -> None:
        # a skipped step's infinite norm is no JSON
        finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in row.items()}
        self._write(json.dumps(finite, allow_nan=False) + "\n")
        self.sink.log(row)

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
        self.sink.close()
        self.file.close()


def _lines(path: Path) -> list[dict]:
    """The whole lines of a file of metrics."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(ValueError):  # the process was killed while it wrote this line
            found.append(json.loads(line))
    return found


def make_logger(config, **settings):
    """The logger of this process: see `Logger`."""
    return Logger(config, **settings) if rank() == 0 else Silent()


class Clock:
    """Tokens per second of this run, without the first step (compilation, allocator, lazy initialisation)."""

    def __init__(self, device: torch.device):
        self.device, self.tokens, self.start = device, 0, None

    def step(self, tokens: int) -> float:
        """Adds one step's tokens (all processes) and returns the last step's tokens per second."""
        synchronize(self.device)
        now = time.perf_counter()
        speed = tokens / (now - self.last) if self.start is not None else tokens / (now - self.begun)
        if self.start is None:
            self.start = now
        else:
            self.tokens += tokens
        self.last = now
        return speed

    def begin(self) -> None:
        """Call right before the first step."""
        self.begun = time.perf_counter()

    def mean(self) -> float:
        """Tokens per second from the end of the first step to the end of the last."""
        return self.tokens / max(self.last - self.start, 1e-9) if self.start is not None else 0.0


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
