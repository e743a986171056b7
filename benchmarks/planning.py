"""The planner against what was measured: predicted and measured peaks of every run in peaks.jsonl.

    python benchmarks/planning.py
    python benchmarks/planning.py --shapes 8b --worst 5

peaks.jsonl has a line for each run of the other benchmarks on real GPUs: shape, number of GPUs, flags, peak in GiB.
"""

import argparse
import json
import sys
import tempfile
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from benchmarks.common import make_config, write_config
from fsdp_utils.core.devices import GIB
from fsdp_utils.core.ranks import say
from fsdp_utils.planning.forecast import forecast
from fsdp_utils.planning.machines import machine_of
from fsdp_utils.planning.report import planned_for

PEAKS = Path(__file__).parent / "peaks.jsonl"
folder_of = cache(lambda shape: write_config(shape, tempfile.mkdtemp()))


def measured(shapes: list[str] | None = None) -> list[dict]:
    """The lines of peaks.jsonl."""
    rows = [json.loads(line) for line in PEAKS.read_text().splitlines()]
    return [row for row in rows if not shapes or row["shape"] in shapes]


def predicted(row: dict) -> float:
    """GiB that torch allocates in the fullest process."""
    config = make_config(folder_of(row["shape"]), **row["flags"])
    machine = machine_of(f"{row['gpus']}x{row['card']}", device=torch.device("cpu"))
    return forecast(planned_for(config, machine), config, machine).peak / GIB


def shown(flags: dict) -> str:
    return " ".join(f"{name}={str(value).lower()}" for name, value in flags.items())


def main(args: argparse.Namespace) -> None:
    rows = [row | dict(predicted=predicted(row)) for row in measured(args.shapes.split(",") if args.shapes else None)]
    off = lambda row: row["predicted"] / row["gib"] - 1
    chosen = sorted(rows, key=lambda row: -abs(off(row)))[: args.worst] if args.worst else rows
    say("| shape | GPUs | flags | measured GiB | predicted | off |\n|---|---|---|---|---|---|")
    for row in chosen:
        cells = (row["shape"], row["gpus"], shown(row["flags"]), f"{row['gib']:.2f}", f"{row['predicted']:.2f}")
        say(f"| {' | '.join(map(str, cells))} | {off(row):+.1%} |")
    within = sum(abs(off(row)) <= 0.05 for row in rows)
    say(f"\n{within} of {len(rows)} within 5 %; from {min(map(off, rows)):+.1%} to {max(map(off, rows)):+.1%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="", help="only these, with commas")
    parser.add_argument("--worst", type=int, default=0, help="only so many, the farthest off first; 0: all")
    main(parser.parse_args())
