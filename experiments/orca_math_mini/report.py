"""Turns results.jsonl into tables and two plots.

    python experiments/orca_math_mini/report.py --results output/mini_runs/results.jsonl --output_dir output/mini_report
    python experiments/orca_math_mini/report.py --plots false

report.md has the comparison (mean and standard deviation over seeds), the learning rates, LoRA beside DoRA at equal
rates, the ranks, and how far DoRA's magnitudes moved. The plots, loss.png and tradeoff.png, need matplotlib.
"""

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from experiments.orca_math_mini.run import ALPHA, METHODS, OWNERS, RANK, RANKED_METHODS, RANKS, best_rate
from experiments.runs import spread
from fsdp_utils.core.errors import UserError
from fsdp_utils.core.flags import flag, parse
from fsdp_utils.core.folders import read_rows
from fsdp_utils.core.ranks import fail
from fsdp_utils.training.scores import wilson_interval


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
    """What each learning rate gave at seed 0: exact match on the validation problems, which choose, and on the test."""
    lines = []
    for name in METHODS:
        tried = sorted(select(rows, name, samples, seed=0), key=lambda row: row["lr"])
        failed = select(rows, name, samples, seed=0, diverged=True)
        best = best_rate(rows, name, samples)
        cells = [f"{r['lr']:g}: {r['validation']:.3f} / {exact(r)}" for r in tried]
        cells = [f"**{cell}**" if r["lr"] == best else cell for r, cell in zip(tried, cells, strict=True)]
        cells += [f"{r['lr']:g}: diverged" for r in failed]
        lines += [[name, ", ".join(cells)]] if cells and METHODS[name].train_type else []
    return table(["method", "learning rate: exact match on validation / test; bold: chosen"], lines)


def pairs(rows: list[dict], samples: int) -> str:
    """LoRA beside DoRA, on the same base at the same learning rate and seed 0."""
    found, higher = {}, []
    for dora in [name for name in METHODS if name.endswith("dora")]:
        names = dora.removesuffix("dora") + "lora", dora
        loras, doras = ({r["lr"]: r for r in select(rows, name, samples, seed=0)} for name in names)
        both = {lr: (loras[lr], doras[lr]) for lr in sorted(loras.keys() & doras.keys())}
        found |= {names: both} if both else {}
        higher += [b["exact_match"] > a["exact_match"] for a, b in both.values()]
    rates = sorted({lr for both in found.values() for lr in both})
    cells = lambda both: [" / ".join(map(exact, both.get(lr, ()))) for lr in rates]
    lines = [[" / ".join(names), *cells(both)] for names, both in found.items()]
    said = f"\nDoRA is higher in {sum(higher)} of {len(higher)}.\n" if higher else ""
    return table(["test exact match at", *(f"{lr:g}" for lr in rates)], lines) + said


def ranks(rows: list[dict], samples: int) -> str:
    """Exact match and costs by rank and alpha, at the main rank's learning rate."""
    lines = []
    for name in RANKED_METHODS:
        best = best_rate(rows, name, samples)
        for rank, alpha in RANKS:
            for row in select(rows, name, samples, seed=0, lr=best, rank=rank, alpha=alpha):
                lines.append([name, f"{rank}-{alpha}", exact(row), *costs([row])])
    if len({line[1] for line in lines}) < 2:
        return ""  # only the main rank was run
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
    "LoRA and DoRA at equal rates": pairs,
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


# a colour for each base; LoRA is a circle and dashes, DoRA a diamond and a line, so that pairs can be told apart
BASES = {"": "tab:gray", "q": "tab:blue", "hqq4_": "tab:orange", "hqq2_": "tab:green"}
KINDS = {"lora": dict(marker="o", linestyle="--"), "dora": dict(marker="D", linestyle="-")}
STYLES = {base + kind: dict(color=color, **KINDS[kind]) for base, color in BASES.items() for kind in KINDS} | {
    "full": dict(color="black", marker="s", linestyle="-"),
    "full_nf4": dict(color="tab:red", marker="x", linestyle="-"),
    "llama_pro": dict(color="tab:purple", marker="^", linestyle=":"),
    "llama_pro_4": dict(color="tab:brown", marker="v", linestyle=":"),
}


def draw_losses(rows: list[dict], path: Path) -> None:
    """Training loss over steps, seed 0 at the best learning rate; one panel per size."""
    from matplotlib.figure import Figure

    sizes = sizes_of(rows)
    figure = Figure(figsize=(5 * len(sizes) + 1.5, 4.5), layout="constrained")
    lines = {}
    for samples, axes in zip(sizes, figure.subplots(1, len(sizes), squeeze=False)[0], strict=True):
        for name in METHODS:
            for row in [r for r in at_best_rate(rows, name, samples) if r["seed"] == 0 and "loss" in r]:
                style = STYLES[name] | dict(marker="")
                lines[name] = axes.plot(*zip(*row["loss"], strict=True), label=name, linewidth=1.2, **style)[0]
        axes.set(title=f"{samples} training problems", xlabel="step", ylabel="training loss", yscale="log")
        axes.grid(alpha=0.3)
    figure.legend(handles=lines.values(), loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=100)


def draw_tradeoff(rows: list[dict], path: Path) -> None:
    """Exact match against peak memory and training time, mean over seeds; one row of panels per size.

    A bar is the standard deviation over seeds, where there are several. A method below a tenth of the best is named in
    a line below the others, which would otherwise lie on top of each other.
    """
    from matplotlib.figure import Figure

    processes = max(row["processes"] for row in rows)
    shared = f" (up to {processes} runs at a time)" if processes > 1 else ""
    sizes, costs = sizes_of(rows), {"train_peak_gib": "peak memory, GiB", "train_seconds": f"training, s{shared}"}
    figure = Figure(figsize=(5 * len(costs) + 1.5, 4 * len(sizes)), layout="constrained")
    points = {}
    for samples, line in zip(sizes, figure.subplots(len(sizes), len(costs), squeeze=False), strict=True):
        runs = {name: [r for r in at_best_rate(rows, name, samples) if "steps" in r] for name in OWNERS}
        scores = {name: [row["exact_match"] for row in found] for name, found in runs.items() if found}
        best = max((mean(values) for values in scores.values()), default=0)
        low = [name for name, values in scores.items() if mean(values) < best / 10]
        for (key, label), axes in zip(costs.items(), line, strict=True):
            at = {name: mean(row[key] for row in runs[name]) for name in scores}
            for name in [name for name in scores if name not in low]:
                bar = stdev(scores[name]) if len(scores[name]) > 1 else None
                style = STYLES[name] | dict(linestyle="none", capsize=3)
                points[name] = axes.errorbar(at[name], mean(scores[name]), yerr=bar, label=name, **style)
            left = ", ".join(f"{name} {mean(scores[name]):.3f} at {at[name]:.3g}" for name in low)
            axes.set(title=f"{samples} training problems", ylabel="exact match")
            axes.set_xlabel(label + (f"\nnot in the picture: {left}" if left else ""))
            axes.grid(alpha=0.3)
    figure.legend(handles=points.values(), loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=100)


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
