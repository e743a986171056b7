"""Turns results.jsonl into tables and two plots.

    python experiments/orca_math_mini/report.py --results output/mini_runs/results.jsonl --output_dir output/mini_report
    python experiments/orca_math_mini/report.py --plots false

report.md has the comparison (mean and standard deviation over seeds), the learning rates, the ranks, and how far DoRA's
magnitudes moved. The plots, loss.png and tradeoff.png, need matplotlib.
"""

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from experiments.orca_math_mini.run import ALPHA, METHODS, OWNERS, RANK, RANKED_METHODS, RANKS, best_rate, read_rows
from fsdp_utils.distributed import fail
from fsdp_utils.flags import flag, parse
from fsdp_utils.scoring import wilson_interval
from methods.errors import UserError


@dataclass
class Report:
    results: str = flag("output/mini_runs/results.jsonl", "what run.py wrote")
    output_dir: str = flag("output/mini_report", "folder of report.md and the plots")
    plots: bool = flag(True, "draw them; needs matplotlib")

    def errors(self) -> list[str]:
        found = [] if Path(self.results).is_file() else [f"--results {self.results}: no such file; run.py makes it"]
        if self.plots and find_spec("matplotlib") is None:
            found.append("--plots true: matplotlib is not installed; `pip install matplotlib`, or pass --plots false")
        return found


def table(header: list[str], lines: list[list[str]]) -> str:
    """Markdown; empty without lines."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n" if lines else ""


def spread(values: list[float], form: str) -> str:
    """Mean and, of several, standard deviation."""
    return form.format(mean(values)) + (f" ± {form.format(stdev(values))}" if len(values) > 1 else "")


def sizes_of(rows: list[dict]) -> list[int]:
    return sorted({row["samples"] for row in rows if row["samples"]})


def select(rows: list[dict], name: str, samples: int, *, diverged: bool = False, **wanted) -> list[dict]:
    """The finished (or the diverged) runs of a method at the main rank, or at the rank and alpha in `wanted`."""
    main = dict(rank=RANK, alpha=ALPHA) if METHODS[OWNERS[name]].adapter else {}
    wanted = main | wanted | dict(method=name, samples=samples)
    found = [row for row in rows if all(row[k] == v for k, v in wanted.items())]
    return [row for row in found if (row["exact_match"] is None) == diverged]


def at_best_rate(rows: list[dict], name: str, samples: int) -> list[dict]:
    """The runs of a method, one per seed; those of a base model do not depend on the size."""
    if METHODS[OWNERS[name]].train_type is None:
        return select(rows, name, 0)
    best = best_rate(rows, OWNERS[name], samples)
    return select(rows, name, samples, lr=best) if best else []


def exact(row: dict) -> str:
    return f"{row['exact_match']:.3f}"


def comparison(rows: list[dict], samples: int) -> str:
    """One line per method."""
    lines = []
    for name in OWNERS:
        found = at_best_rate(rows, name, samples)
        if not found:
            continue
        scores, problems = [row["exact_match"] for row in found], found[0]["test_problems"]
        low, high = wilson_interval(round(mean(scores) * problems), problems)
        line = [name, spread(scores, "{:.3f}"), f"{low:.3f} to {high:.3f}", str(len(found))]
        if found[0]["samples"]:
            shared = [r for r in select(rows, name, samples, seed=0) if r["lr"] == r["shared_lr"]]
            line += [f"{found[0]['lr']:g}", exact(shared[0]) if shared else "", *costs(found)]
        lines.append(line + [""] * (len(COMPARISON) - len(line)))
    return table(COMPARISON, lines)


COSTS = ["last loss", "peak GiB", "training, s", "trained", "gradient norm"]
COMPARISON = ["method", "exact match", "95 % interval", "seeds", "learning rate", "at the shared rate", *COSTS]


def costs(found: list[dict]) -> list[str]:
    """The cells under COSTS."""
    columns = (("train_peak_gib", "{:.2f}"), ("train_seconds", "{:.1f}"), ("trained_share", "{:.1%}"))
    cells = [form.format(mean(row[key] for row in found)) for key, form in columns]
    return [
        f"{mean(row['loss'][-1][1] for row in found):.3f}",
        *cells,
        spread([row["grad_norm_mean"] for row in found], "{:.3f}"),
    ]


def learning_rates(rows: list[dict], samples: int) -> str:
    """What each learning rate gave on the validation problems, at seed 0."""
    lines = []
    for name in METHODS:
        tried = sorted(select(rows, name, samples, seed=0), key=lambda row: row["lr"])
        failed = select(rows, name, samples, seed=0, diverged=True)
        cells = [f"{r['lr']:g}: {r['validation']:.3f}" for r in tried] + [f"{r['lr']:g}: diverged" for r in failed]
        lines += [[name, ", ".join(cells)]] if cells else []
    return table(["method", "validation exact match by learning rate"], lines)


def ranks(rows: list[dict], samples: int) -> str:
    """Exact match and costs by rank and alpha, at the main rank's learning rate."""
    lines = []
    for name in RANKED_METHODS:
        best = best_rate(rows, name, samples)
        for rank, alpha in RANKS:
            for row in select(rows, name, samples, seed=0, lr=best, rank=rank, alpha=alpha):
                lines.append([name, f"{rank}-{alpha}", exact(row), *costs([row])])
    return table(["method", "rank-alpha", "exact match", *COSTS], lines)


def magnitudes(rows: list[dict], samples: int) -> str:
    """How far DoRA's magnitudes moved: if they did not, DoRA was LoRA."""
    lines = []
    for name in METHODS:
        for row in at_best_rate(rows, name, samples)[:1]:
            moved = row.get("magnitude_change")
            lines += [[name, f"{moved['mean']:.2%}", f"{moved['largest']:.2%}", f"{moved['rows']:,}"]] if moved else []
    return table(["method", "mean change of a magnitude", "largest", "rows"], lines)


SECTIONS = {
    "Comparison": comparison,
    "Learning rates": learning_rates,
    "Ranks": ranks,
    "DoRA's magnitudes": magnitudes,
}


def markdown(rows: list[dict]) -> str:
    """The whole report."""
    facts = {key: sorted({str(row[key]) for row in rows}) for key in ("device", "base", "processes")}
    said = [f"{len(rows)} results", *(f"{key} {', '.join(values)}" for key, values in facts.items())]
    parts = ["; ".join(said) + ".\n"]
    for samples in sizes_of(rows):
        for title, section in SECTIONS.items():
            body = section(rows, samples)
            parts += [f"## {title}, {samples} training problems\n\n{body}"] if body else []
    return "\n".join(parts)


def draw_losses(rows: list[dict], path: Path) -> None:
    """Training loss over steps, seed 0 at the best learning rate; one panel per size."""
    from matplotlib.figure import Figure

    sizes = sizes_of(rows)
    figure = Figure(figsize=(6 * len(sizes), 4), layout="constrained")
    for samples, axes in zip(sizes, figure.subplots(1, len(sizes), squeeze=False)[0], strict=True):
        for name in METHODS:
            for row in [r for r in at_best_rate(rows, name, samples) if r["seed"] == 0 and "loss" in r]:
                axes.plot(*zip(*row["loss"], strict=True), label=name)
        axes.set(title=f"{samples} training problems", xlabel="step", ylabel="loss", yscale="log")
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def draw_tradeoff(rows: list[dict], path: Path) -> None:
    """Exact match against peak memory and training time, mean over seeds; one row of panels per size."""
    from matplotlib.figure import Figure

    sizes, costs = sizes_of(rows), {"train_peak_gib": "peak memory, GiB", "train_seconds": "training, s"}
    figure = Figure(figsize=(6 * len(costs), 4 * len(sizes)), layout="constrained")
    for samples, line in zip(sizes, figure.subplots(len(sizes), len(costs), squeeze=False), strict=True):
        for (key, label), axes in zip(costs.items(), line, strict=True):
            for name in OWNERS:
                found = [row for row in at_best_rate(rows, name, samples) if key in row]
                if found:
                    point = mean(row[key] for row in found), mean(row["exact_match"] for row in found)
                    axes.scatter(*point)
                    axes.annotate(name, point, fontsize="small")
            axes.set(title=f"{samples} training problems", xlabel=label, ylabel="exact match")
    figure.savefig(path, dpi=120)


def main(args: Report) -> None:
    rows, out = read_rows(Path(args.results)), Path(args.output_dir)
    if not rows:
        raise UserError(f"--results {args.results}: holds no result; run.py was stopped before its first")
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.md").write_text(markdown(rows))
    if args.plots and sizes_of(rows):
        draw_losses(rows, out / "loss.png")
        draw_tradeoff(rows, out / "tradeoff.png")
    print(f"{len(rows)} results, written to {out}")


if __name__ == "__main__":
    try:
        main(parse(Report, prog="report.py", description=__doc__))
    except UserError as error:
        fail(error)
