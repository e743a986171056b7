"""The planner against what was measured: predicted and measured peaks of every run in peaks.jsonl.

    python benchmarks/planning.py
    python benchmarks/planning.py --shapes 8b --worst 5

peaks.jsonl has a line for each run of the other benchmarks on real GPUs: shape (of so many layers) or recipe, number of
GPUs, flags, GiB.
"""

import argparse
import json
import sys
import tempfile
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import yaml

from benchmarks.common import make_config, write_config
from benchmarks.published import folders_of
from fsdp_utils.config import TrainConfig
from fsdp_utils.core.devices import GIB
from fsdp_utils.core.flags import parse
from fsdp_utils.core.ranks import say
from fsdp_utils.planning.forecast import forecast, split_for
from fsdp_utils.planning.machines import machine_of
from fsdp_utils.planning.report import planned_for

ROOT = Path(__file__).resolve().parents[1]
PEAKS = Path(__file__).parent / "peaks.jsonl"
folder_of = cache(lambda shape, layers: write_config(shape, tempfile.mkdtemp(), layers=layers))


def measured(shapes: list[str] | None = None) -> list[dict]:
    """The lines of peaks.jsonl."""
    rows = [json.loads(line) for line in PEAKS.read_text().splitlines()]
    return [row for row in rows if not shapes or name_of(row) in shapes]


def name_of(row: dict) -> str:
    """Of the shape, or the recipe."""
    return row.get("shape") or row["recipe"]


def label_of(row: dict) -> str:
    """Its name, and how many layers it was cut to."""
    return name_of(row) + (f", {row['layers']} layers" if "layers" in row else "")


def config_of(row: dict) -> TrainConfig:
    """The flags of a run; on the public shape of the model that its recipe names."""
    if "shape" in row:
        return make_config(folder_of(row["shape"], row.get("layers")), **row["flags"])
    path = ROOT / "recipes" / f"{row['recipe']}.yaml"
    folders = folders_of(yaml.safe_load(path.read_text()), Path(tempfile.mkdtemp()))
    given = [f"--{name}={value}" for name, value in (folders | row["flags"]).items()]
    return parse(TrainConfig, ["--config", str(path), *given], prog="train.py")


def predicted(row: dict) -> float:
    """GiB that torch allocates in the fullest process."""
    machine = machine_of(f"{row['gpus']}x{row['card']}", device=torch.device("cpu"))
    config = split_for(config_of(row), machine)
    return forecast(planned_for(config, machine), config, machine).peak / GIB


def shown(flags: dict) -> str:
    return " ".join(f"{name}={str(value).lower()}" for name, value in flags.items())


def main(args: argparse.Namespace) -> None:
    rows = [row | dict(predicted=predicted(row)) for row in measured(args.shapes.split(",") if args.shapes else None)]
    off = lambda row: row["predicted"] / row["gib"] - 1
    chosen = sorted(rows, key=lambda row: -abs(off(row)))[: args.worst] if args.worst else rows
    say("| shape or recipe | GPUs | flags | measured GiB | predicted | off |\n|---|---|---|---|---|---|")
    for row in chosen:
        cells = (label_of(row), row["gpus"], shown(row["flags"]), f"{row['gib']:.2f}", f"{row['predicted']:.2f}")
        say(f"| {' | '.join(map(str, cells))} | {off(row):+.1%} |")
    within = sum(abs(off(row)) <= 0.05 for row in rows)
    say(f"\n{within} of {len(rows)} within 5 %; from {min(map(off, rows)):+.1%} to {max(map(off, rows)):+.1%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="", help="only these, with commas")
    parser.add_argument("--worst", type=int, default=0, help="only so many, the farthest off first; 0: all")
    main(parser.parse_args())
