"""Which curves a report draws, and of how many points."""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from fsdp_utils.report.runs import Run, Series

MOST_POINTS = 1000
NOT_DRAWN = ("eval_loss", "eval_tokens")  # is drawn beside the training loss; is always the same


class Panel(NamedTuple):
    """A picture. `key`: of rows; `title`; `form`: of a value; `noisy`: drawn faintly, under its running mean; `beside`:
    key of what is drawn as marks over it; `timed`: without steps whose time tells nothing; `zero`: its axis begins
    there; `log`: it may be logarithmic."""

    key: str
    title: str
    form: Callable[[float], str] = "{:.4g}".format
    noisy: bool = False
    beside: str | None = None
    timed: bool = False
    zero: bool = False
    log: bool = False


SPEED = dict(noisy=True, timed=True, zero=True)
PANELS = (
    Panel("loss", "Loss: each step faint, running mean bold, validation as dots", noisy=True, beside="eval_loss"),
    Panel("grad_norm", "Gradient norm, before clipping", noisy=True, log=True),
    Panel("lr", "Learning rate", "{:.3g}".format, zero=True),
    Panel("tokens_per_s", "Tokens per second of all processes, without steps that compile", "{:,.0f}".format, **SPEED),
    Panel("mfu", "MFU: the model's products, of the card's peak", "{:.1%}".format, **SPEED),
    Panel("hfu", "HFU: recomputed ones too", "{:.1%}".format, **SPEED),
    Panel("memory_gib", "Peak memory so far, GiB", "{:.2f}".format, zero=True),
)


def panels_of(runs: list[Run]) -> list[tuple[Panel, list[Series]]]:
    """Each panel that has something to draw, and what of each run; one too for each other number of validations."""
    judged = {key for run in runs for row in run.validations for key in row if key.startswith("eval_")}
    more = sorted(key for key in judged - set(NOT_DRAWN) if not key.endswith(("_low", "_high")))
    of_validation = [Panel(key, f"Validation: {key.removeprefix('eval_').replace('_', ' ')}") for key in more]
    wanted = [PANELS[0], *of_validation, *PANELS[1:]]
    found = [(panel, [run.series(panel.key, timed=panel.timed) for run in runs]) for panel in wanted]
    return [(panel, drawn) for panel, drawn in found if any(len(series.steps) for series in drawn)]


def thinned(series: Series, most: int = MOST_POINTS) -> Series:
    """At most so many points, in order: of each stretch the lowest and the highest, so that no spike is lost."""
    count, stretches = len(series.values), most // 2
    if count <= most:
        return series
    edges = np.arange(stretches + 1) * count // stretches
    parts = [(first, series.values[first:end]) for first, end in pairwise(edges)]
    kept = np.unique([first + place for first, part in parts for place in (part.argmin(), part.argmax())])
    return Series(series.steps[kept], series.values[kept])


def running_mean(series: Series) -> Series:
    """The mean of each value and its neighbours, a fortieth of the steps on either side."""
    count = len(series.values)
    sums, places = np.concatenate([[0.0], np.cumsum(series.values)]), np.arange(count)
    starts, ends = np.maximum(places - count // 40, 0), np.minimum(places + count // 40 + 1, count)
    return Series(series.steps, (sums[ends] - sums[starts]) / (ends - starts))
