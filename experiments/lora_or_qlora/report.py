"""Turns results.jsonl of run.py into a table for each study and a plot of accuracy against memory.

    python experiments/lora_or_qlora/report.py --results output/lora_or_qlora/results.jsonl

The plot, accuracy.png, needs matplotlib.
"""

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.runs import spread
from fsdp_utils.core.errors import UserError
from fsdp_utils.core.flags import flag, parse
from fsdp_utils.core.folders import read_rows
from fsdp_utils.core.ranks import fail

COLUMNS = {
    "accuracy": ("eval_accuracy", "eval_macro_f1", "eval_matthews", "eval_loss", "train_peak_gib", "train_seconds"),
    "shape": ("train_peak_gib", "tokens_per_s", "train_seconds"),
    "t5": ("train_peak_gib", "tokens_per_s", "grad_norm_mean", "largest_norm"),
}


MARKERS = "osD^v<>PX*h"


@dataclass
class Report:
    results: str = flag("output/lora_or_qlora/results.jsonl", "what run.py wrote")
    output_dir: str = flag("output/lora_or_qlora", "folder of report.md and accuracy.png")

    def errors(self) -> list[str]:
        return [] if Path(self.results).is_file() else [f"--results {self.results}: no such file; run.py makes it"]


def by_row(rows: list[dict]) -> dict[str, list[dict]]:
    """The runs of each row, of all seeds, with what follows from their gradient norms."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        largest = max(norm for _, norm in row["grad_norm"])
        found.setdefault(row["row"], []).append(row | dict(largest_norm=largest))
    return found


def table(study: str, rows: list[dict]) -> str:
    """Markdown: mean and standard deviation over the seeds."""
    lines = ["| | seeds | " + " | ".join(COLUMNS[study]) + " |", "|---" * (2 + len(COLUMNS[study])) + "|"]
    for name, runs in by_row(rows).items():
        cells = [spread([run[column] for run in runs], "{:.4g}") for column in COLUMNS[study]]
        lines.append(f"| {name} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], path: Path) -> None:
    """Accuracy of each row against its memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes, runs_of = figure.subplots(), by_row(rows)
    accuracy = lambda runs: mean(run["eval_accuracy"] for run in runs)
    # the best first, as they stand in the legend: names beside points would lie on each other
    for number, name in enumerate(sorted(runs_of, key=lambda name: -accuracy(runs_of[name]))):
        runs = runs_of[name]
        bar = stdev(run["eval_accuracy"] for run in runs) if len(runs) > 1 else None
        at, label = mean(run["train_peak_gib"] for run in runs), f"{name}: {accuracy(runs):.3f}"
        axes.errorbar(at, accuracy(runs), yerr=bar, fmt=MARKERS[number % len(MARKERS)], capsize=3, label=label)
    axes.set(xlabel="peak GiB", ylabel="accuracy on held-out rows")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=100)


def main(config: Report) -> None:
    rows = read_rows(Path(config.results))
    studies = {study: [row for row in rows if row["study"] == study] for study in COLUMNS}
    text = "\n".join(f"## {study}\n\n{table(study, found)}" for study, found in studies.items() if found)
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(text)
    print(text)
    if studies["accuracy"] and find_spec("matplotlib"):
        plot(studies["accuracy"], folder / "accuracy.png")


if __name__ == "__main__":
    try:
        main(parse(Report, prog="report.py", description=__doc__))
    except UserError as error:
        fail(error)
