"""What a run's folder tells of it."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np

from fsdp_utils.core.errors import UserError, first_line
from fsdp_utils.core.folders import DIVERGED_FILE, METRICS_FILE, RUN_FILE, read_rows

LAST = 20  # steps whose losses are averaged, as one alone is noise


class Series(NamedTuple):
    """A curve: `[n]` each."""

    steps: np.ndarray
    values: np.ndarray


def _number(value) -> bool:
    """Whether it can be drawn: a file that others wrote may hold words, or NaN."""
    return isinstance(value, (int, float)) and math.isfinite(value)


@dataclass(frozen=True)
class Run:
    """A run. `record`: content of run.json; `steps`, `validations`: rows of metrics.jsonl."""

    name: str
    folder: Path
    record: dict
    steps: list[dict]
    validations: list[dict]

    @classmethod
    def read(cls, folder: str | Path, *, name: str = "") -> "Run":
        """Raises UserError: no step was logged there."""
        folder = Path(folder)
        rows = [row for row in read_rows(folder / METRICS_FILE) if isinstance(row, dict) and _number(row.get("step"))]
        steps = [row for row in rows if _number(row.get("loss"))]
        if not steps:
            raise UserError(f"{folder}: holds no step of a run ({METRICS_FILE}); name the --output_dir of one")
        return cls(
            name or folder.resolve().name,
            folder,
            _record(folder),
            steps,
            [row for row in rows if _number(row.get("eval_loss"))],
        )

    @property
    def flags(self) -> dict:
        return self.record.get("flags") or {}

    @property
    def plan(self) -> dict[str, float]:
        """GiB in each process by purpose, as planned."""
        return {purpose: size / 2**30 for purpose, size in (self.record.get("memory_plan") or {}).items()}

    @property
    def peak(self) -> float:
        """GiB in process 0, as measured."""
        return max(row["memory_gib"] for row in self.steps)

    @property
    def timed(self) -> list[dict]:
        """Steps whose time tells the speed: not the first, not those that compile."""
        return [row for row in self.steps[1:] if not row.get("compiled")]

    def series(self, key: str, *, timed: bool = False) -> Series:
        """What was logged under this name, where it was a number."""
        rows = self.validations if key.startswith("eval_") else self.timed if timed else self.steps
        known = [(row["step"], row[key]) for row in rows if _number(row.get(key))]
        return Series(*np.array(known, dtype=float).reshape(-1, 2).T)

    def facts(self) -> dict[str, str]:
        """What is compared between runs, by its name; in the order of a table."""
        best = min(self.validations, key=lambda row: row["eval_loss"], default=None)
        last = [row["loss"] for row in self.steps[-LAST:]]
        told = {
            "train type": self.flags.get("train_type"),
            "base": self.flags.get("model_name"),
            "data": self.flags.get("dataset"),
            "trained parameters": _count(self.record.get("trained_parameters"), self.record.get("parameters")),
            "device": self._device(),
            "steps": f"{self.steps[-1]['step']:,} of {self.record.get('steps') or self.steps[-1]['step']:,}",
            "ended": self._end(),
            "tokens learned": f"{sum(row['tokens'] for row in self.steps):,}",
            f"training loss, mean of the last steps, at most {LAST}": f"{fmean(last):.4f}",
            "validation loss, last": f"{self.validations[-1]['eval_loss']:.4f}" if best else None,
            "validation loss, lowest": f"{best['eval_loss']:.4f} (step {best['step']})" if best else None,
            "tokens/s, median": self._median("tokens_per_s", "{:,.0f}"),
            "MFU, median": self._median("mfu", "{:.1%}"),
            "HFU, median": self._median("hfu", "{:.1%}"),
            "steps that compiled": str(sum(map(bool, (row.get("compiled") for row in self.steps)))),
            "peak memory, GiB": f"{self.peak:.2f}",
            "planned memory, GiB": f"{sum(self.plan.values()):.2f}" if self.plan else None,
        }
        return {name: str(value) for name, value in told.items() if value is not None}

    def _end(self) -> str:
        """What became of it."""
        if self.record.get("finished"):
            return "as planned"
        diverged = self.folder / DIVERGED_FILE
        if diverged.exists():
            return f"diverged after step {self.steps[-1]['step']:,} ({DIVERGED_FILE})"
        return "not yet: it was stopped or killed, or still runs"

    def _device(self) -> str | None:
        count = self.record.get("processes", 1)
        return self.record.get("device") and (f"{count} × " * (count > 1) + self.record["device"])

    def _median(self, key: str, form: str) -> str | None:
        values = self.series(key, timed=True).values
        return form.format(np.median(values)) if len(values) else None


def _record(folder: Path) -> dict:
    """Content of run.json, if it is there."""
    path = folder / RUN_FILE
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        ways = "without this file the run still makes a page"
        raise UserError(f"{path}: cannot be read ({first_line(error)}); {ways}") from None


def _count(trained: int | None, total: int | None) -> str | None:
    return f"{trained:,} of {total:,} ({trained / total:.2%})" if trained and total else None


def read_runs(folders: list[str]) -> list[Run]:
    """Runs with names that tell them apart: the last part of each folder, or as many as it takes.

    Raises:
        UserError: one is no run, or is named twice.
    """
    paths = [Path(folder).resolve() for folder in folders]
    if twice := {folder for folder, path in zip(folders, paths, strict=True) if paths.count(path) > 1}:
        raise UserError(f"{min(twice)}: is named twice; name each run once")
    length = next(n for n in range(1, 1000) if len({path.parts[-n:] for path in paths}) == len(paths))
    return [Run.read(path, name="/".join(path.parts[-length:])) for path in paths]
