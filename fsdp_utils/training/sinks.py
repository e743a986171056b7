"""Where numbers are shown, on the terminal or by a library that tracks runs; a class for a row of `options.SINKS`."""

import json
import math
import os
import shutil
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from tqdm import tqdm

from fsdp_utils.core.classes import load_class
from fsdp_utils.core.errors import UserError, first_line
from fsdp_utils.core.flags import as_dict
from fsdp_utils.core.ranks import say
from fsdp_utils.options import SINKS

TENSORBOARD = "tensorboard"  # its folder in the output folder


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


def numbers(row: dict) -> dict[str, float]:
    """What of a row can be drawn over its step."""
    known = {name: float(value) for name, value in apart(row).items() if name != "step"}
    return {name: value for name, value in known.items() if math.isfinite(value)}


def clock_time(seconds: float) -> str:
    """1:02:03, or 02:03."""
    return tqdm.format_interval(seconds)


class Stdout:
    """One line per step.

    Args:
        total: steps of the run; start: those that are done; run_id: by which an earlier process of the run logged.

    Attributes:
        run_id: by which a later process goes on logging to the same place, or None.
    """

    run_id = None

    def __init__(self, config, *, total: int, start: int, run_id: str | None):
        pass

    @classmethod
    def check(cls) -> None:
        """Raises UserError, before anything is loaded, if nothing can be logged there."""

    def log(self, row: dict) -> None:
        print(shown(row), flush=True)

    def close(self) -> None:
        pass


# what the bar shows of a row, and how
ON_THE_BAR = {
    "loss": ("loss", "{:.4f}".format),
    "lr": ("lr", "{:.2e}".format),
    "grad_norm": ("norm", "{:.3g}".format),
    "tokens_per_s": ("tok/s", "{:.0f}".format),
    "mfu": ("mfu", "{:.0%}".format),
    "memory_gib": ("GiB", "{:.1f}".format),
    "seconds_left": ("left", clock_time),
}


class Tqdm(Stdout):
    """A progress bar over optimizer steps. tqdm's own guess of the time left would count the steps that compile."""

    FORMAT = "{desc}: {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"

    def __init__(self, config, *, total, start, run_id):
        self.bar = tqdm(total=total, initial=start, desc="training", file=sys.stderr, bar_format=self.FORMAT)

    def log(self, row):
        if "loss" not in row:
            self.bar.write(shown(row))
            return
        told = [f"{name} {form(row[key])}" for key, (name, form) in ON_THE_BAR.items() if key in row]
        self.bar.set_postfix_str(", ".join(["compiling"] * bool(row.get("compiled")) + told), refresh=False)
        self.bar.update()

    def close(self):
        self.bar.close()


class Tracker(Stdout):
    """A library that keeps runs beside one another. Once it has begun, its failing ends no run."""

    failing = False

    def log(self, row):
        try:
            self.send(row)
            self.failing = False
        except Exception as error:  # of the library, its disk or its server
            if not self.failing:
                say(f"WARNING: {type(self).__name__} did not take a step ({first_line(error)}); it is asked again")
            self.failing = True

    def send(self, row: dict) -> None:
        """Gives the library a row; `log` takes what it raises."""
        raise NotImplementedError  # each library has its own way


class Wandb(Tracker):
    """Weights & Biases; WANDB_MODE=offline works without a network."""

    def __init__(self, config, *, total, start, run_id):
        import wandb

        names = dict(project=config.project_name, name=config.name, group=config.group, entity=config.entity)
        self.run = wandb.init(**names, config=as_dict(config), id=run_id, resume="allow" if run_id else None)
        self.run_id = self.run.id

    @classmethod
    def check(cls):
        import wandb

        if wandb.setup().settings.mode in ("offline", "dryrun", "disabled"):
            return
        try:
            why = None if wandb.login(prompt=False) else "no API key is known; run `wandb login`"
        except wandb.Error as error:
            why = first_line(error)
        if why:
            raise UserError(f"--log_to wandb: {why}, or set WANDB_MODE=offline")

    def send(self, row):
        self.run.log(apart(row), step=row["step"])

    def close(self):
        self.run.finish()


class TensorBoard(Tracker):
    """Event files in the output folder."""

    def __init__(self, config, *, total, start, run_id):
        from torch.utils.tensorboard import SummaryWriter

        folder = Path(config.output_dir) / TENSORBOARD
        if not start:
            shutil.rmtree(folder, ignore_errors=True)  # of an older run
        self.writer = SummaryWriter(folder, purge_step=start + 1)  # a step is told once
        self.writer.add_text("flags", f"```\n{json.dumps(as_dict(config), indent=1)}\n```", start)

    def send(self, row):
        for name, value in numbers(row).items():
            self.writer.add_scalar(name, value, row["step"])

    def close(self):
        self.writer.close()


class Trackio(Tracker):
    """Hugging Face's tracker: a file of this machine, or a Space (TRACKIO_SPACE_ID). It knows a run by its name."""

    def __init__(self, config, *, total, start, run_id):
        import trackio

        names = dict(project=config.project_name, name=run_id or config.name, group=config.group)
        again = dict(resume="allow" if run_id else "never")
        measured = dict(auto_log_gpu=False, auto_log_cpu=False)  # threads beside a run that is timed
        self.run = trackio.init(**names, **again, **measured, config=as_dict(config), embed=False)
        self.run_id = self.run.name

    def send(self, row):
        self.run.log(numbers(row), step=row["step"])

    def close(self):
        self.run.finish()


class MLflow(Tracker):
    """MLflow, at MLFLOW_TRACKING_URI or in a file of this machine."""

    def __init__(self, config, *, total, start, run_id):
        import mlflow

        mlflow.set_experiment(config.project_name)
        self.run_id = mlflow.start_run(run_id=run_id, run_name=None if run_id else config.name).info.run_id
        self.mlflow = mlflow
        if not run_id:  # what was told cannot be told otherwise
            mlflow.log_params(as_dict(config))

    @classmethod
    def check(cls):
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # of 7, which take four minutes
        import mlflow

        try:
            mlflow.search_experiments(max_results=1)
        except mlflow.MlflowException as error:
            way_out = "pip install mlflow (mlflow-skinny reaches servers only), or set MLFLOW_TRACKING_URI to a server"
            raise UserError(f"--log_to mlflow: {first_line(error)}; {way_out}") from None

    def send(self, row):
        self.mlflow.log_metrics(numbers(row), step=row["step"], run_id=self.run_id, synchronous=False)

    def close(self):
        with suppress(Exception):  # as of `log`
            self.mlflow.end_run()


def check(config) -> None:
    """Raises UserError, before anything is loaded, if what is named in --log_to is not there or does not answer."""
    for name in config.sinks:
        row = SINKS[name]
        if row.package and find_spec(row.package) is None:
            raise UserError(f"--log_to {name}: {row.package} is not installed; pip install {row.package}")
        load_class(row.target).check()


def make(config, *, run_ids: dict, **settings) -> dict[str, Stdout]:
    """What --log_to names, and a bar where none of it is read on the terminal."""
    names = config.sinks if any(SINKS[name].terminal for name in config.sinks) else ["tqdm", *config.sinks]
    return {name: load_class(SINKS[name].target)(config, run_id=run_ids.get(name), **settings) for name in names}
