"""Curves and bars as SVG. Colours are classes, which page.css gives one value by day and one by night."""

import json
import math
from collections.abc import Callable
from html import escape
from typing import NamedTuple

import numpy as np

from fsdp_utils.report.curves import Panel, running_mean, thinned
from fsdp_utils.report.runs import Run, Series

WIDTH, HEIGHT = 620, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 34
STYLES = 8  # colours and dashes that page.css knows
SPREAD = 30  # from here on a panel is logarithmic, if it may be


class Scale(NamedTuple):
    """From values to places."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    @classmethod
    def over(cls, values, start: float, stop: float, *, log: bool = False, room: float = 0) -> "Scale":
        """`room`: share of the range that is left free above, and below where that is not negative for no reason."""
        low, high = float(min(values)), float(max(values))
        if log:
            return cls(low, high, start, stop, log)
        free = room * (high - low) or (low == high) * (abs(low) / 10 or 1)
        return cls(low - free if low < 0 or low >= free else 0, high + free, start, stop)

    def __call__(self, value: float) -> float:
        bend = math.log if self.log else float
        share = (bend(value) - bend(self.low)) / (bend(self.high) - bend(self.low))
        return round(self.start + share * (self.stop - self.start), 1)

    def ticks(self, wanted: int = 5) -> list[float]:
        """Round values in between."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
            found = [value for value in found if self.low <= value <= self.high]
            return found if len(found) <= 2 * wanted else [v for v in found if math.log10(v).is_integer()]
        rough = (self.high - self.low) / wanted
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * digit for digit in (1, 2, 2.5, 5, 10) if unit * digit >= rough)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]


def of_run(number: int, kind: str) -> str:
    """The attributes of what is drawn of a run."""
    return f'class="{kind} run-{number % STYLES}" data-of="{number}"'


def short(value: float) -> str:
    """A number beside an axis."""
    if value and abs(value) >= 10_000:
        return f"{value / 1000:g}k" if abs(value) < 1e6 else f"{value / 1e6:g}M"
    return f"{value:.6g}"


def panel_svg(runs: list[Run], panel: Panel, drawn: list[Series], *, number: int) -> str:
    """The curves of all runs in one picture, with the points that the script shows under the pointer."""
    beside = [run.series(panel.beside) for run in runs] if panel.beside else []
    curves, marks = ([(i, s) for i, s in enumerate(found) if len(s.steps)] for found in (drawn, beside))
    steps, values = (np.concatenate([series[axis] for _, series in [*curves, *marks]]) for axis in (0, 1))
    low, high = values.min(), values.max()
    log = panel.log and low > 0 and high / low > SPREAD
    x = Scale.over((steps.min(), steps.max()), LEFT, WIDTH - RIGHT)
    y = Scale.over((0 if panel.zero else low, high), HEIGHT - BOTTOM, TOP, log=log, room=0.04)
    parts = [_axes(x, y, panel.form if "%" in panel.form(0) else short)]
    for i, series in curves:
        parts += [_line(i, "faint", series, x, y)] if panel.noisy else []
        parts += [_line(i, "curve", running_mean(series) if panel.noisy else series, x, y)]
    for i, series in marks:
        dots = "".join(f'<circle cx="{x(s)}" cy="{y(v)}" r="3.5"/>' for s, v in _points(series))
        parts += [_line(i, "between", series, x, y), f"<g {of_run(i, 'marks')}>{dots}</g>"]
    inside = "".join(parts) + f'<line class="pointer" y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="0" x2="0"/>'
    return _figure(panel, inside, _under_the_pointer(curves, marks, x, panel.form), number=number, log=log)


def _points(series: Series) -> list[tuple[float, float]]:
    """As many as are drawn."""
    return list(zip(*(axis.tolist() for axis in thinned(series)), strict=True))


def _line(number: int, kind: str, series: Series, x: Scale, y: Scale) -> str:
    points = " ".join(f"{x(step)},{y(value)}" for step, value in _points(series))
    return f'<polyline {of_run(number, kind)} points="{points}"/>'


def _figure(panel: Panel, inside: str, data: dict, *, number: int, log: bool) -> str:
    title = escape(panel.title) + (", logarithmic" if log else "")
    return (
        f'<figure class="panel" id="panel-{panel.key}"><figcaption id="title-{number}">{title}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="title-{number}">{inside}</svg>'
        f'<script type="application/json">{json.dumps(data, separators=(",", ":"))}</script></figure>'
    )


def _under_the_pointer(curves, marks, x: Scale, form: Callable[[float], str]) -> dict:
    """Where the axis of steps lies, and of each run the values as they are read."""
    told = lambda found: [[i, [[int(step), form(value)] for step, value in _points(series)]] for i, series in found]
    return dict(axis=[x.low, x.high, x.start, x.stop], curves=told(curves), marks=told(marks))


def _axes(x: Scale, y: Scale, form: Callable[[float], str]) -> str:
    bottom, parts = HEIGHT - BOTTOM, []
    for value in y.ticks():
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value)}" y2="{y(value)}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y(value) + 4}" text-anchor="end">{form(value)}</text>')
    for value in x.ticks(7):
        if value == int(value):
            parts.append(f'<text x="{x(value)}" y="{bottom + 16}" text-anchor="middle">{short(value)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">step</text>')
    return "".join(parts)


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------

BAR, GAP = 20, 6


def memory_svg(runs: list[Run], purposes: list[str]) -> str:
    """The plan of each run by purpose, and under it the peak that was measured, on one scale."""
    measured = [run.peak for run in runs]
    planned = [sum(run.plan.values()) for run in runs]
    width, height = 2 * WIDTH, len(runs) * (2 * BAR + 3 * GAP) + BOTTOM
    x = Scale.over([0, *measured, *planned], 200, width - 80)
    parts = [_memory_axis(x, height)]
    for i, run in enumerate(runs):
        top = i * (2 * BAR + 3 * GAP) + GAP
        rows = (("planned", planned[i], _stacked(run, purposes, x, top)),
                ("measured", measured[i], _bar(x(0), x(measured[i]), top + BAR + 1, "measured")))  # fmt: skip
        for line, (what, total, bars) in enumerate(rows):
            middle = top + line * (BAR + 1) + BAR / 2 + 4
            parts.append(f'<text x="{x(0) - 8}" y="{middle}" text-anchor="end">{escape(run.name[-22:])}, {what}</text>')
            parts.append(bars + f'<text x="{x(total) + 8}" y="{middle}">{total:.2f}</text>')
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="memory by purpose">{"".join(parts)}</svg>'


def _stacked(run: Run, purposes: list[str], x: Scale, top: float) -> str:
    bars, before = [], 0.0
    for purpose, size in run.plan.items():
        bars.append(_bar(x(before), x(before + size), top, f"part part-{purposes.index(purpose) % STYLES}"))
        before += size
    return "".join(bars)


def _bar(start: float, stop: float, top: float, style: str) -> str:
    return f'<rect class="{style}" x="{start}" y="{top}" width="{max(stop - start, 0):.1f}" height="{BAR}"/>'


def _memory_axis(x: Scale, height: float) -> str:
    lines = [
        f'<line class="grid" x1="{x(v)}" x2="{x(v)}" y1="0" y2="{height - BOTTOM}"/>'
        f'<text x="{x(v)}" y="{height - BOTTOM + 16}" text-anchor="middle">{short(v)}</text>'
        for v in x.ticks(8)
    ]
    return "".join(lines) + f'<text x="{x.stop}" y="{height - 3}" text-anchor="end">GiB in each process</text>'
