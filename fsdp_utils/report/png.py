"""The curves of a report as pictures, drawn by matplotlib where that is installed."""

from importlib.util import find_spec
from pathlib import Path

from fsdp_utils.report.curves import panels_of, running_mean
from fsdp_utils.report.runs import Run


def write(page: Path, runs: list[Run]) -> list[Path]:
    """One beside the page for each panel; none without matplotlib."""
    if find_spec("matplotlib") is None:
        return []
    from matplotlib.figure import Figure

    written = []
    for panel, drawn in panels_of(runs):
        axes = Figure(figsize=(8, 4), dpi=110, layout="constrained").subplots()
        for number, (run, series) in enumerate(zip(runs, drawn, strict=True)):
            colour = f"C{number % 10}"
            axes.plot(*(running_mean(series) if panel.noisy else series), color=colour, label=run.name)
            if panel.noisy:
                axes.plot(*series, color=colour, alpha=0.25, linewidth=0.8)
            if panel.beside:
                axes.plot(*run.series(panel.beside), "o", color=colour, markersize=4)
        axes.set(title=panel.title, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend()
        written.append(page.with_name(f"{page.stem}_{panel.key}.png"))
        axes.figure.savefig(written[-1])
    return written
