"""Turns results.jsonl of run.py into tables: the methods at their chosen rates, and what each rate gave.

python experiments/gsm8k/report.py --results output/gsm8k/results.jsonl
"""

import sys
from dataclasses import dataclass
from math import log
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.gsm8k.run import METHODS, NF4, best_rate
from experiments.runs import spread
from fsdp_utils.core.errors import UserError
from fsdp_utils.core.flags import flag, parse
from fsdp_utils.core.folders import read_rows
from fsdp_utils.core.ranks import fail
from fsdp_utils.training.scores import wilson_interval


@dataclass
class Report:
    """What to read."""

    results: str = flag("output/gsm8k/results.jsonl", "what run.py wrote")

    def errors(self) -> list[str]:
        return [] if Path(self.results).is_file() else [f"--results {self.results}: no such file; run.py makes it"]


def methods(rows: list[dict]) -> str:
    """Of each row the seeds that did not choose its rate. What was run at a rate that a wider search has since given up
    is left out."""
    lines = [
        "| method | rate | seeds | test loss | exact match | 95 % interval | peak GiB | seconds |",
        "|---" * 8 + "|",
    ]
    reported: dict[str, list[dict]] = {}
    chosen = {name: best_rate(rows, name) for name, method in METHODS.items() if len(method.rates) > 1}
    for row in rows:
        current = row["lr"] == chosen.get(row["method"].removesuffix(NF4), row["lr"])
        if row["seed"] and row["eval_loss"] is not None and current:
            reported.setdefault(row["method"], []).append(row)
    for name, found in reported.items():
        scores, asked = [row["exact_match"] for row in found], found[0]["asked"]
        low, high = wilson_interval(round(mean(scores) * asked * len(found)), asked * len(found))
        rate = f"{found[0]['lr']:g}" if found[0]["steps"] > 1 else ""
        cells = [name, rate, len(found), spread([row["eval_loss"] for row in found], "{:.4f}")]
        cells += [spread(scores, "{:.4f}"), f"{low:.4f} to {high:.4f}"]
        costs = ("train_peak_gib", "{:.2f}"), ("train_seconds", "{:.0f}")
        cells += [form.format(mean(row[key] for row in found)) for key, form in costs]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def exports(rows: list[dict]) -> str:
    """Loss of the exported model, and the share of what that method's own run gained which it keeps."""
    lines = ["| method | export | loss trained | loss exported | kept of its gain |", "|---" * 5 + "|"]
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["lr"] == best_rate(rows, row["method"].removesuffix(NF4)):
            for name, scores in row.get("exported", {}).items():
                found.setdefault((row["method"], name), []).append(scores)
    for (method, name), scores in found.items():
        loss = lambda which, scores=scores: spread([log(score[which]["perplexity"]) for score in scores], "{:.4f}")
        kept = spread([100 * score["exported"]["gain_kept"] for score in scores], "{:.1f}")
        lines.append(f"| {method} | {name} | {loss('trained')} | {loss('exported')} | {kept} % |")
    return "\n".join(lines) if found else ""


def rates(rows: list[dict]) -> str:
    """Loss on the held-out rows; a chosen rate at the edge of what was tried is said to be."""
    lines = ["| method | rate: loss on held-out rows; bold: chosen |", "|---|---|"]
    for name, method in METHODS.items():
        tried = {row["lr"]: row["eval_loss"] for row in rows if row["method"] == name and row["seed"] == 0}
        best = best_rate(rows, name)
        shown = {lr: "diverged" if loss is None else f"{loss:.4f}" for lr, loss in sorted(tried.items())}
        cells = [f"**{lr:g}: {said}**" if lr == best else f"{lr:g}: {said}" for lr, said in shown.items()]
        at_edge = " (at the edge)" if best in (min(method.rates), max(method.rates)) else ""
        lines += [f"| {name} | {', '.join(cells)}{at_edge} |"] if cells else []
    return "\n".join(lines)


def main(config: Report) -> None:
    rows = read_rows(Path(config.results))
    parts = {"Methods": methods(rows), "Exports": exports(rows), "Rates": rates(rows)}
    print("\n\n".join(f"## {name}\n\n{table}" for name, table in parts.items() if table))


if __name__ == "__main__":
    try:
        main(parse(Report, prog="report.py", description=__doc__))
    except UserError as error:
        fail(error)
