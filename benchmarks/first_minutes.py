"""The first minutes of a run: seconds from the command to its first step and to a steady state, with an empty folder
of compiled code, and again with what that run left there.

    python benchmarks/first_minutes.py --data gsm8k_train.jsonl --tokenizer FOLDER
    python benchmarks/first_minutes.py --shape tiny --device cpu --steps 4

The model has a public shape and dummy weights; rows have the lengths of --data. A step waited if it took longer than
one and a half times the median of the second half. Python finds the bytecode of all packages, as pip leaves it: where
an image comes without, every start takes ten seconds longer.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.common import SHAPES, write_config, write_results
from benchmarks.published import with_tokenizer
from fsdp_utils.core.errors import UserError
from fsdp_utils.core.processes import command as starting
from fsdp_utils.core.ranks import say
from fsdp_utils.model.compiling import CACHE

ROOT = Path(__file__).resolve().parents[1]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8b", choices=SHAPES)
    parser.add_argument("--train_type", default="bnb_dora")
    parser.add_argument("--data", default="demo", help="what train.py takes as --dataset")
    parser.add_argument("--tokenizer", default="demo", help="folder of a tokenizer")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--extra", default="", help="further flags of train.py: name=value,name=value")
    parser.add_argument("--log", help="file for all that the runs say, with seconds")
    parser.add_argument("--json")
    return parser.parse_args(argv)


def command(args: argparse.Namespace, folder: Path) -> list[str]:
    """Of the run."""
    flags = dict(model_name=folder / "model", load_format="dummy", train_type=args.train_type, device=args.device)
    flags |= dict(dataset=args.data, dataset_samples=4000, batch_size=4, context_length=512, lora_dropout=0)
    flags |= dict(use_cpu_offload=False, max_steps=args.steps, log_to="stdout", output_dir=folder / "run")
    flags |= dict(overwrite=True) | dict(pair.split("=") for pair in args.extra.split(",") if pair)
    return [*starting("train.py", processes=args.processes), *(f"--{name}={value}" for name, value in flags.items())]


IMPORTS = "import torch._inductor.compile_fx, fsdp_utils.folders.opening"


def environment(folder: Path) -> dict[str, str]:
    """Of a run whose compiled code lies in a folder, beside the bytecode of what it imports."""
    usual = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return usual | {CACHE: str(folder / "code"), "PYTHONPYCACHEPREFIX": str(folder / "bytecode")}


def timed(words: list[str], env: dict[str, str]) -> tuple[list[float], str]:
    """Seconds from the command to the end of each step, and all that was said, with its seconds.

    Raises:
        UserError: the run failed.
    """
    begun, ends, said = time.perf_counter(), [], []
    settings = dict(cwd=ROOT, env=env, text=True)
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **settings) as run:
        for line in run.stdout:
            now = time.perf_counter() - begun
            said.append(f"{now:.1f} {line}")
            if line.startswith("step="):
                ends.append(now)
    if run.returncode or not ends:
        raise UserError(f"the run failed:\n{''.join(said[-20:])}")
    return ends, "".join(said)


def summary(ends: list[float], said: str) -> dict:
    """What a user waits for."""
    steps = [after - before for before, after in pairwise(ends)]
    steady = median(steps[len(steps) // 2 :])
    waited = {number: seconds - steady for number, seconds in enumerate(steps, 2) if seconds > 1.5 * steady}
    last = max(waited, default=1)
    return dict(
        first_step_ended_s=round(ends[0], 1),
        steady_after_s=round(ends[last - 1], 1),
        step_s=round(steady, 3),
        waited_at=[*waited],
        waited_s=round(sum(waited.values()), 1),
        marked=[int(found) for found in re.findall(r" step=(\d+) .*compiled=True", said)],
    )


def main(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        with_tokenizer(write_config(args.shape, folder / "model"), args.tokenizer)
        env = environment(folder)
        subprocess.run([sys.executable, "-c", IMPORTS], cwd=ROOT, env=env, check=True)
        say("| | first step ended, s | steady after, s | a step, s | waited at steps | compiled at steps |")
        say("|---" * 6 + "|")
        for name in ("first time", "second time"):
            ends, said = timed(command(args, folder), env)
            found = summary(ends, said)
            if args.log:
                with open(args.log, "a") as file:
                    file.write(f"{name}\n{said}")
            write_results(args.json, [dict(run=name, shape=args.shape, train_type=args.train_type, **found)])
            cells = [found[key] for key in ("first_step_ended_s", "steady_after_s", "step_s", "waited_at", "marked")]
            say(f"| {name} | {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main(parse_arguments())
