"""Every recipe once, on dummy weights of its model's public shape: peak memory beside the plan, and speed.

    python benchmarks/recipes.py --data gsm8k_train.jsonl --tokenizer FOLDER
    python benchmarks/recipes.py --only demo --device cpu --steps 2

--data has `question` and `answer`; where a recipe's own data has other columns, they are made of these. Recipes for
fewer GPUs than are there run at the same time, each on its own.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from threading import Condition

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import yaml

from benchmarks.common import write_results
from benchmarks.published import PUBLISHED, folders_of, with_tokenizer
from fsdp_utils.core.folders import read_rows
from fsdp_utils.core.processes import command
from fsdp_utils.core.ranks import say
from fsdp_utils.folders.opening import PLANNED

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
OWN = ("dataset", "columns", "output_dir", "log_to", "resume", "push_to_hub")  # of a user's run
PEAK = re.compile(r"^tokens/s: .* peak ([\d.]+) GiB", re.MULTILINE)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names, by comma; all if empty")
    parser.add_argument("--data", default="demo", help="rows of `question` and `answer`")
    parser.add_argument("--tokenizer", default="demo", help="folder of a tokenizer")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--logs", help="folder for what each run says")
    parser.add_argument("--json")
    return parser.parse_args(argv)


def as_chat(question: str, answer: str) -> dict:
    said = dict(user=question, assistant=answer)
    return dict(messages=[dict(role=role, content=text) for role, text in said.items()])


# of recipes whose data have other columns: a row of theirs
COLUMNS = {
    "classification": lambda question, answer: dict(text=question, label=len(answer) % 4),
    "flan_t5": lambda question, answer: dict(source=question, target=answer),
    "continued_pretraining": lambda question, answer: dict(text=f"{question} {answer}"),
    "chat": as_chat,
}


def prepared(path: Path, args: argparse.Namespace, folder: Path) -> tuple[int, list[str]]:
    """How many processes a recipe wants, and the flags with which it runs here."""
    text, folder = path.read_text(), folder / path.stem
    recipe, several = yaml.safe_load(text), re.search(r"--nproc_per_node (\d+)", text)
    flags = {name: value for name, value in recipe.items() if name not in OWN and not name.startswith(("eval", "save"))}
    folder.mkdir()
    if recipe["model_name"] in PUBLISHED:
        row_of = COLUMNS.get(path.stem, dict)
        rows = [row_of(question=row["question"], answer=row["answer"]) for row in read_rows(Path(args.data))]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags |= folders_of(flags, folder) | dict(dataset=folder / "rows.jsonl")
        for place in {flags["model_name"], flags.get("llama_pro_path", flags["model_name"])}:
            with_tokenizer(place, args.tokenizer)
        flags |= dict(load_format="dummy")
    else:
        flags |= dict(dataset=recipe["dataset"])
    flags |= dict(max_steps=args.steps, device=args.device, log_to="stdout", output_dir=folder / "run")
    written = folder / "flags.yaml"
    written.write_text(yaml.safe_dump({k: str(v) if isinstance(v, Path) else v for k, v in flags.items()}))
    return int(several[1]) if several else 1, ["--config", str(written)]


class Cards:
    """GPUs, each used by one run at a time; `count` 0 where runs are on the CPU."""

    def __init__(self, count: int):
        self.count, self.free, self.changed = count, list(range(count)), Condition()

    def take(self, count: int) -> list[int]:
        with self.changed:
            count = min(count, self.count)
            self.changed.wait_for(lambda: len(self.free) >= count)
            taken, self.free = self.free[:count], self.free[count:]
            return taken

    def give(self, taken: list[int]) -> None:
        with self.changed:
            self.free += taken
            self.changed.notify_all()


def run(path: Path, args: argparse.Namespace, folder: Path, cards: Cards) -> dict:
    """One recipe: planned and measured GiB of process 0, and tokens/s of all processes, the median of its later steps;
    or `failed`."""
    processes, words = prepared(path, args, folder)
    if 0 < cards.count < processes:
        return dict(recipe=path.stem, failed=f"needs {processes} GPUs")
    taken = cards.take(processes)
    visible = dict(CUDA_VISIBLE_DEVICES=",".join(map(str, taken))) if taken else {}
    done = subprocess.run(
        [*command("train.py", processes=processes), *words],
        cwd=ROOT,
        env=os.environ | visible,
        capture_output=True,
        text=True,
    )
    cards.give(taken)
    if args.logs:
        Path(args.logs).mkdir(parents=True, exist_ok=True)
        (Path(args.logs) / f"{path.stem}.log").write_text(done.stdout + done.stderr)
    memory, peak = PLANNED.search(done.stdout), PEAK.search(done.stdout)
    if done.returncode or not peak:
        said = (done.stderr + done.stdout).splitlines()
        why = [line for line in said if "error" in line.lower()] or ["no peak was said"]
        return dict(recipe=path.stem, failed=why[-1], said=said[-40:])
    steps = read_rows(folder / path.stem / "run" / "metrics.jsonl")
    later = [row for row in steps[len(steps) // 2 :] if "loss" in row]
    found = dict(recipe=path.stem, gpus=processes, peak_gib=float(peak[1]))
    found |= {name: median(row[name] for row in later) for name in ("tokens_per_s", "mfu") if name in later[0]}
    return found | (dict(planned_gib=float(memory[1])) if memory else {})


def line(found: dict) -> str:
    if "failed" in found:
        return f"| {found['recipe']} | {found['failed'][:200]} | | | | |"
    planned = found.get("planned_gib")
    off = f"{planned / found['peak_gib'] - 1:+.1%}" if planned and found["peak_gib"] else ""
    cells = (found["recipe"], found["gpus"], f"{found['tokens_per_s']:,.0f}", found["peak_gib"], planned or "", off)
    return f"| {' | '.join(map(str, cells))} |"


def chosen(names: str) -> Iterable[Path]:
    """Those for many GPUs first: the others fill what is left."""
    wanted = set(filter(None, names.split(",")))
    paths = [path for path in RECIPES if not wanted or path.stem in wanted]
    return sorted(paths, key=lambda path: -int((re.search(r"--nproc_per_node (\d+)", path.read_text()) or [0, 1])[1]))


def main(args: argparse.Namespace) -> None:
    say("| recipe | GPUs | tokens/s | peak GiB | planned | off |\n|---|---|---|---|---|---|")
    cards = Cards(torch.cuda.device_count() if args.device != "cpu" else 0)
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(max(len(cards.free), 1)) as pool:
        for found in pool.map(lambda path: run(path, args, Path(place), cards), chosen(args.only)):
            write_results(args.json, [found])
            say(line(found))


if __name__ == "__main__":
    main(parse_arguments())
