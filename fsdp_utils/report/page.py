"""Runs as one HTML page that needs nothing else: no network, no other file."""

import os
from contextlib import contextmanager
from html import escape
from pathlib import Path

from fsdp_utils.core.errors import UserError, first_line
from fsdp_utils.core.folders import METRICS_FILE, REPORT_FILE
from fsdp_utils.core.ranks import is_main, say
from fsdp_utils.report.answers import Evaluation, evaluations_of, samples
from fsdp_utils.report.curves import panels_of
from fsdp_utils.report.runs import Run
from fsdp_utils.report.svg import memory_svg, of_run, panel_svg

HERE = Path(__file__).parent
BEGINNING = "<!DOCTYPE html>"
VERDICTS = {True: '<b class="right">✓ right</b> ', False: '<b class="wrong">✗ wrong</b> '}
STYLE, SCRIPT = ((HERE / name).read_text() for name in ("page.css", "page.js"))


def page(runs: list[Run], evaluations: list[Evaluation]) -> str:
    """The whole document."""
    title = escape(", ".join(run.name for run in runs))
    panels = "".join(panel_svg(runs, *panel, number=i) for i, panel in enumerate(panels_of(runs)))
    sections = (
        ("Numbers", _facts(runs)),
        ("Curves", f'<div class="panels">{panels}</div>'),
        ("Memory: the plan, and what was measured", _memory(runs)),
        ("Sample answers", _answers(evaluations)),
        ("Flags", _flags(runs)),
    )
    body = "".join(f"<section><h2>{name}</h2>{content}</section>" for name, content in sections)
    return (
        f'{BEGINNING}\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # without an icon of its own a browser asks the server for one
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head>'
        f"<body><header><h1>{title}</h1>{_legend(runs)}</header><main>{body}</main>"
        f'<div id="tip" hidden></div><script>{SCRIPT}</script></body></html>\n'
    )


def _legend(runs: list[Run]) -> str:
    """A box for each run, which hides its curves."""
    line = '<svg viewBox="0 0 34 10" aria-hidden="true"><polyline {} points="1,5 33,5"/></svg>'
    keys = [line.format(of_run(i, "curve")) + escape(run.name) for i, run in enumerate(runs)]
    boxes = (f'<label><input type="checkbox" checked data-run="{i}">{key}</label>' for i, key in enumerate(keys))
    return f'<div class="legend">{"".join(boxes)}</div>'


def _table(head: list[str], rows: list[list[str]], *, style: str = "") -> str:
    """Cells are HTML; the first of each row says what the row is."""
    line = lambda cells, kind: "".join(f"<{kind}>{cell}</{kind}>" for cell in cells)
    body = "".join(f"<tr><th>{first}</th>{line(rest, 'td')}</tr>" for first, *rest in rows)
    inside = f"<thead><tr>{line(head, 'th')}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="wide"><table class="{style}">{inside}</table></div>'


def _names(runs: list[Run]) -> list[str]:
    return ["", *(escape(run.name) for run in runs)]


def _facts(runs: list[Run]) -> str:
    facts = [run.facts() for run in runs]
    names = dict.fromkeys(name for told in facts for name in told)
    rows = [[escape(name), *(escape(told.get(name, "–")) for told in facts)] for name in names]
    return _table(_names(runs), rows, style="numbers")


def _memory(runs: list[Run]) -> str:
    purposes = list(dict.fromkeys(purpose for run in runs for purpose in run.plan))
    if not purposes:
        return "<p>No plan was written by these runs.</p>"
    key = lambda i: f'<svg class="key" viewBox="0 0 12 12" aria-hidden="true"><rect class="part part-{i % 8}"/></svg>'
    size = lambda run, purpose: f"{run.plan[purpose]:.3f}" if purpose in run.plan else "–"
    rows = [[key(i) + escape(p), *(size(run, p) for run in runs)] for i, p in enumerate(purposes)]
    rows.append(["planned together", *(f"{sum(run.plan.values()):.3f}" for run in runs)])
    rows.append(["measured peak", *(f"{run.peak:.3f}" for run in runs)])
    rows.append(["planned ÷ measured", *(f"{sum(run.plan.values()) / run.peak:.2f}" for run in runs)])
    on_cpu = any(run.record.get("device") == "cpu" for run in runs)
    note = "<p>The plan is of a GPU. On a CPU the measured peak is the process's, libraries included.</p>" * on_cpu
    return memory_svg(runs, purposes) + note + _table(_names(runs), rows, style="numbers")


def _answers(evaluations: list[Evaluation]) -> str:
    if not evaluations:
        way = "python evaluate.py --model RUN --output_file RUN/evaluation.json"
        return f"<p>None: no evaluation was named or lies in the runs' folders. <code>{way}</code> writes one.</p>"
    scores = "".join(f"<li>{escape(e.name)}: {escape(e.score)}</li>" for e in evaluations)
    head = ["question", "expected", *(escape(e.name) for e in evaluations)]
    rows = [_sample(question, evaluations) for question in samples(evaluations)]
    return f"<ul>{scores}</ul>" + _table(head, rows, style="answers")


def _sample(question: str, evaluations: list[Evaluation]) -> list[str]:
    given = [e.answers.get(question) for e in evaluations]
    return [escape(question), escape(str(given[0]["answer"])), *(_answer(row) for row in given)]


def _answer(row: dict | None) -> str:
    if row is None:
        return "not asked"
    return VERDICTS.get(row.get("correct"), "") + escape(str(row["prediction"]).strip())


def _flags(runs: list[Run]) -> str:
    """Those that differ or were given; then all."""
    names = list(dict.fromkeys(name for run in runs for name in run.flags))
    given = {name for run in runs for name in run.record.get("explicit", ())}
    differ = {name for name in names if len({str(run.flags.get(name)) for run in runs}) > 1}
    shown = lambda name, run: escape(str(run.flags.get(name, "–")))
    rows = {name: [f"--{name}", *(shown(name, run) for run in runs)] for name in names}
    told = [(name, row) for name, row in rows.items() if name in given | differ]
    marked = [[f"<mark>{row[0]}</mark>" if name in differ else row[0], *row[1:]] for name, row in told]
    note = "<p>Given on the command line or in a file; what differs is marked.</p>"
    every = f"<details><summary>All {len(names)} flags</summary>{_table(_names(runs), list(rows.values()))}</details>"
    return note + _table(_names(runs), marked) + every


def refuse_no_page(path: Path) -> None:
    """Raises UserError: something else than a page is there, which would be gone."""
    if path.is_dir():
        raise UserError(f"--output {path}: is a folder; name a file, such as {path / REPORT_FILE}")
    if path.exists() and path.stat().st_size and not path.read_bytes().startswith(BEGINNING.encode()):
        raise UserError(f"--output {path}: holds something else than a page, and is not replaced; name another file")


def write(path: str | Path, runs: list[Run], evaluations: list[Evaluation]) -> None:
    """Puts the page there, whole or not at all."""
    temporary = Path(path).with_name(f".{Path(path).name}")
    temporary.write_text(page(runs, evaluations))
    os.replace(temporary, path)


@contextmanager
def at_end(config):
    """Writes `report.html` of a run into its folder when the block ends, however it ends. That fails no run."""
    folder = Path(config.output_dir)
    before = _version(folder / METRICS_FILE)
    try:
        yield
    finally:
        if is_main() and _version(folder / METRICS_FILE) != before:  # else the rows are an older run's
            _try_to_write(folder)


def _version(path: Path) -> tuple | None:
    """What changes with a file."""
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else None


def _try_to_write(folder: Path) -> None:
    try:
        run = Run.read(folder)
        write(folder / REPORT_FILE, [run], evaluations_of([run], []))
    except Exception as error:  # a full disk, a file that somebody put there: the result is what matters
        say(f"WARNING: {folder / REPORT_FILE} was not written ({first_line(error)})")
