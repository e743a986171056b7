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

from experiments.runs import read_rows
from fsdp_utils.core.errors import UserError
from fsdp_utils.core.flags import flag, parse
from fsdp_utils.core.ranks import fail

COLUMNS = {
    "accuracy": ("eval_accuracy", "eval_macro_f1", "eval_matthews", "eval_loss", "train_peak_gib", "train_seconds"),
    "shape": ("train_peak_gib", "tokens_per_s", "train_seconds"),
    "t5": ("train_peak_gib", "tokens_per_s", "grad_norm_mean", "largest_norm"),
}


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


def cell(values: list[float]) -> str:
    spread = f" ± {stdev(values):.4g}" if len(values) > 1 else ""
    return f"{mean(values):.4g}{spread}"


def table(study: str, rows: list[dict]) -> str:
    """Markdown: mean and standard deviation over the seeds."""
    lines = ["| | seeds | " + " | ".join(COLUMNS[study]) + " |", "|---" * (2 + len(COLUMNS[study])) + "|"]
    for name, runs in by_row(rows).items():
        cells = [cell([run[column] for run in runs]) for column in COLUMNS[study]]
        lines.append(f"| {name} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], path: Path) -> None:
    """Accuracy of each row against its memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name, runs in by_row(rows).items():
        at = mean(run["train_peak_gib"] for run in runs), mean(run["eval_accuracy"] for run in runs)
        axes.errorbar(*at, yerr=stdev(r["eval_accuracy"] for r in runs) if len(runs) > 1 else 0, fmt="o")
        axes.annotate(name, at, textcoords="offset points", xytext=(6, 4))
    axes.set(xlabel="peak GiB", ylabel="accuracy on held-out rows")
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main(config: Report) -> None:
    rows = read_rows(Path(config.results))
    studies = {study: [row for row in rows if row["study"] == study] for study in COLUMNS}
    text = "\n".join(f"## {study}\n\n{table(study, found)}" for study, found in studies.items() if found)
    folder = Path(config.output_dir)
    (folder / "report.md").write_text(text)
    print(text)
    if studies["accuracy"] and find_spec("matplotlib"):
        plot(studies["accuracy"], folder / "accuracy.png")


if __name__ == "__main__":
    try:
        main(parse(Report, prog="report.py", description=__doc__))
    except UserError as error:
        fail(error)
