"""The page of runs: what is on it, that it needs nothing else, and that a browser shows it without a complaint."""

import json
import re
import shutil
import subprocess
import sys
from unittest.mock import Mock

import numpy as np
import pytest
from commands import REPOSITORY, start
from real_run import make_config

import train
from fsdp_utils.core.errors import UserError
from fsdp_utils.folders import saving
from fsdp_utils.report import answers, curves, page, svg
from fsdp_utils.report.runs import Run, Series, read_runs
from scripts import report as report_script

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"),
)


def written(folder, *, steps: int = 60, lr: float = 1e-3, more: dict | None = None, **flags):
    """A run's folder without a run: losses fall, step 3 compiles, two validations."""
    folder.mkdir(parents=True)
    rows = []
    for step in range(1, steps + 1):
        row = dict(step=step, loss=2 / step + lr, lr=lr, grad_norm=1 / step, tokens=100, tokens_per_s=1000.0 + step)
        rows.append(row | dict(mfu=0.25, hfu=0.5, memory_gib=1.5) | (dict(compiled=True) if step == 3 else {}))
        if step in (steps // 2, steps):
            rows.append(dict(step=step, eval_loss=2.5 / step + lr, eval_accuracy=0.5, eval_tokens=7))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = dict(
        finished=True, processes=2, device="NVIDIA L4", steps=steps, trained_parameters=5, parameters=50,
        memory_plan=dict(base=2**30, optimizer=2**29), explicit=["lr"],
        flags=dict(train_type="bnb_dora", model_name="org/<base>", dataset="demo", lr=lr, seed=42) | flags,
    )  # fmt: skip
    (folder / "run.json").write_text(json.dumps(record | (more or {})))
    return folder


def evaluated(path, model, verdicts):
    """What evaluate.py writes."""
    rows = [dict(index=i, question=f"Q{i} <b>?", answer=str(i), prediction=f"P{i}", correct=v) for i, v in
            enumerate(verdicts)]  # fmt: skip
    found = dict(score=sum(verdicts) / len(verdicts), interval_95=[0.1, 0.9], total=len(verdicts), results=rows)
    path.write_text(json.dumps(found | dict(settings=dict(model=str(model)))))
    return path


@pytest.fixture
def two(tmp_path):
    """Two runs that differ in rate and type."""
    return [written(tmp_path / "a"), written(tmp_path / "b", lr=2e-3, train_type="custom_qlora")]


def cells(html: str, name: str) -> list[list[str]]:
    """The rows of tables that begin with this name: what stands in the other cells."""
    rows = re.findall(r"<tr><th>(.*?)</th>(.*?)</tr>", html)
    return [re.findall(r"<td>(.*?)</td>", rest) for first, rest in rows if re.sub("<.*?>", "", first) == name]


def test_numbers_of_runs(two):
    """Speed is of steps that neither come first nor compile; memory is planned and measured; what differs is marked."""
    html = page.page(read_runs(two), [])
    timed = [1000 + step for step in range(2, 61) if step != 3]
    assert cells(html, "tokens/s, median") == [[f"{np.median(timed):,.0f}"] * 2]
    assert cells(html, "steps that compiled") == [["1", "1"]]
    assert cells(html, "device") == [["2 × NVIDIA L4"] * 2]
    assert cells(html, "validation loss, lowest") == [[f"{2.5 / 60 + lr:.4f} (step 60)" for lr in (1e-3, 2e-3)]]
    assert cells(html, "planned together") == [["1.500", "1.500"]] and cells(html, "measured peak") == [["1.500"] * 2]
    assert cells(html, "base")[-1] == ["1.000", "1.000"] and cells(html, "optimizer") == [["0.500", "0.500"]]
    assert cells(html, "--lr") == [["0.001", "0.002"]] * 2  # as given, and among all
    assert "<mark>--train_type</mark>" in html and "--seed" not in html.partition("<details>")[0]
    assert "org/&lt;base&gt;" in html and "<base>" not in html


def test_the_page_needs_nothing_else(two):
    """No address but that of a namespace, and no file."""
    html = page.page(read_runs(two), [])
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", html)
    assert not re.search(r"https?://|@import|url\(", html)


def test_thinning_keeps_spikes():
    """At most so many points, in order, each one of the curve's, the lowest and the highest among them."""
    values = np.random.default_rng(0).normal(size=100_003)
    values[77_777], values[5] = 50, -50
    series = Series(np.arange(len(values)), values)
    thin = curves.thinned(series)
    assert len(thin.steps) <= 1000 and np.all(np.diff(thin.steps) > 0)
    assert np.array_equal(values[thin.steps.astype(int)], thin.values)
    assert thin.values.max() == 50 and thin.values.min() == -50
    short = Series(np.arange(999), values[:999])
    assert curves.thinned(short) is short


def test_running_mean():
    """Against the definition."""
    series = Series(np.arange(95), np.random.default_rng(1).normal(size=95))
    wanted = [series.values[max(i - 2, 0) : i + 3].mean() for i in range(95)]
    assert curves.running_mean(series).values == pytest.approx(wanted)


@pytest.mark.parametrize("values", [(0, 7.3), (0.001, 40.0), (5, 5), (0, 0), (-3, 2), (1e-8, 3e-8), (999, 123456)])
def test_axes(values):
    """Round ticks inside the axis, a few of them, also of a curve that is flat."""
    for log in (False, True) if min(values) > 0 and len(set(values)) > 1 else (False,):
        scale = svg.Scale.over(values, 0, 100, log=log, room=0.04)
        ticks = scale.ticks()
        assert 1 <= len(ticks) <= 12
        assert all(-0.1 <= scale(tick) <= 100.1 for tick in ticks)
        assert [scale(tick) for tick in ticks] == sorted(scale(tick) for tick in ticks)


def test_odd_runs(tmp_path):
    """A run of one step, of norms that are no numbers, without a plan, and with a line that was cut short."""
    folder = tmp_path / "odd"
    folder.mkdir()
    row = dict(step=1, loss=1.0, lr=1e-3, grad_norm=None, tokens=3, tokens_per_s=5.0, memory_gib=0.5)
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row)[:20])
    html = page.page([Run.read(folder)], [])
    assert 'id="panel-loss"' in html and "panel-grad_norm" not in html and "panel-tokens_per_s" not in html
    assert "No plan was written" in html and "None: no evaluation was named" in html


def test_rows_that_are_no_numbers_are_not_drawn(tmp_path):
    """Words, NaN and lists in a file that others wrote."""
    folder = written(tmp_path / "run")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": "x", "loss": null}\n[1, 2]\n{"loss": NaN, "step": 61}\n{"step": 62, "loss": "low"}\n')
    assert 'id="panel-loss"' in page.page([Run.read(folder)], [])
    assert len(Run.read(folder).steps) == 60


def test_wrong_names(two, tmp_path):
    """One line each, with the way out."""
    with pytest.raises(UserError, match=r"nowhere: holds no step of a run \(metrics.jsonl\); name the --output_dir"):
        read_runs([tmp_path / "nowhere"])
    with pytest.raises(UserError, match="a: is named twice"):
        read_runs([two[0], two[0] / "../a"])
    for content, said in (("{}", "is no output file of evaluate.py"), (None, "cannot be read")):
        path = tmp_path / f"{said[:2]}.json"
        if content:
            path.write_text(content)
        with pytest.raises(UserError, match=f"{path}: {said}"):
            answers.Evaluation.read(path)
    inner = [written(tmp_path / which / "run", steps=2) for which in ("x", "y")]
    assert [run.name for run in read_runs(inner)] == ["x/run", "y/run"]


def test_sample_answers(two):
    """Questions that runs answer differently stand beside those that all do; an older evaluation is another run's."""
    evaluated(two[0] / "evaluation.json", two[0], [True] * 20 + [False])
    evaluated(two[1] / "evaluation.json", two[1], [True] * 19 + [False, False])
    runs = read_runs(two)
    found = answers.evaluations_of(runs, [])
    assert [e.name for e in found] == ["a", "b"]
    assert answers.samples(found)[:4] == ["Q0 <b>?", "Q19 <b>?", "Q20 <b>?", "Q1 <b>?"]
    html = page.page(runs, found)
    assert "Q19 &lt;b&gt;?" in html and html.count("✓ right") == 21 and html.count("✗ wrong") == 3
    (two[1] / "evaluation_of_mine.json").write_text("{}")
    (two[0] / "metrics.jsonl").touch()
    assert [e.name for e in answers.evaluations_of(runs, [])] == ["b"]
    assert answers.evaluations_of(runs, [str(two[0] / "evaluation.json")])[0].score.startswith("0.952 (95 % interval")


# ---------------------------------------------------------------------------------------------------------------------
# In runs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def flags(tiny, tiny_data, tmp_path):
    given = dict(model_name=tiny(), dataset=tiny_data, train_type="custom_lora", output_dir=tmp_path / "run")
    return given | dict(batch_size=4, max_steps=3, lr=0.01, log_to="stdout")


def test_a_run_writes_its_page(flags, tmp_path, monkeypatch):
    """At its end, also where it ends early; the page is no foreign file to the next run, which replaces it."""
    train.main(make_config(**flags, eval_samples=2))
    html = (tmp_path / "run/report.html").read_text()
    assert 'id="panel-loss"' in html and cells(html, "steps") == [["3 of 3"]]
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["finished"] and set(record["memory_plan"]) >= {"base", "optimizer"} and record["steps"] == 3
    assert cells(html, "trained parameters")[0][0].startswith(f"{record['trained_parameters']:,} of ")
    saving.check_output(make_config(**flags, overwrite=True))
    stopped = make_config(**flags, overwrite=True, save_every_steps=2, stop_at_step=2)
    with pytest.raises(BaseException, match="exit code 0"):
        train.main(stopped)
    assert cells((tmp_path / "run/report.html").read_text(), "steps") == [["2 of 3"]]
    train.main(make_config(**flags, resume="auto", save_every_steps=2))
    assert cells((tmp_path / "run/report.html").read_text(), "steps") == [["3 of 3"]]
    monkeypatch.setattr(train, "load", Mock(side_effect=UserError("no memory")))
    with pytest.raises(UserError, match="no memory"):
        train.main(make_config(**flags, overwrite=True))
    assert not (tmp_path / "run/report.html").exists()  # of a run that took no step, over an older one


def test_how_a_run_ended_is_on_its_page(flags, tmp_path):
    """As planned, stopped, or diverged."""
    ended = lambda: cells((tmp_path / "run/report.html").read_text(), "ended")
    train.main(make_config(**flags))
    assert ended() == [["as planned"]]
    with pytest.raises(BaseException, match="exit code 0"):
        train.main(make_config(**flags, overwrite=True, save_every_steps=1, stop_at_step=1))
    assert ended()[0][0].startswith("not yet")
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(UserError, match="step 2: loss nan"):
        train.main(make_config(**flags | dict(lr=1e30, stochastic_rounding=False)))
    assert ended() == [["diverged after step 1 (diverged.json)"]]


def test_what_a_page_does_not_replace(two, tmp_path):
    """A run's record, or a folder; of one run the page goes into its folder."""
    for place in (two[0] / "run.json", tmp_path):
        before = place.read_bytes() if place.is_file() else None
        with pytest.raises(UserError, match=f"--output {place}: "):
            report_script.main(two, report_script.Report(output=str(place)))
        assert before is None or place.read_bytes() == before
    for _ in range(2):  # a page is replaced
        report_script.main(two[:1], report_script.Report())
        assert (two[0] / "report.html").read_text().count("data-run=") == 1
    (two[0] / "run.json").write_text("<html>")
    with pytest.raises(UserError, match=r"run\.json: cannot be read"):
        read_runs(two)


def test_a_page_that_cannot_be_written_fails_no_run(flags, tmp_path, monkeypatch, capsys):
    """It is said, and the run ends well."""
    monkeypatch.setattr(page, "write", Mock(side_effect=OSError(28, "No space left on device")))
    train.main(make_config(**flags))
    assert "report.html was not written ([Errno 28] No space left on device)" in capsys.readouterr().out
    assert json.loads((tmp_path / "run/run.json").read_text())["finished"]


def test_the_command(two, tmp_path):
    """One page of several runs; wrong words are one line."""
    script = REPOSITORY / "scripts" / "report.py"
    done = start([sys.executable, script, *two, "--output", tmp_path / "new/both.html"])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "new/both.html").read_text().count("data-run=") == 2
    assert "no PNGs: matplotlib is not installed" in done.stdout or list(tmp_path.glob("new/both_loss.png"))
    done = start([sys.executable, script, "--output", "x.html"])
    assert done.returncode == 2 and done.stderr.startswith("error: RUN: no run is named"), done.stderr


def test_pictures(two, tmp_path):
    """One for each panel."""
    pytest.importorskip("matplotlib")
    from fsdp_utils.report import png

    runs = read_runs(two)
    made = png.write(tmp_path / "both.html", runs)
    assert [path.name for path in made] == [f"both_{panel.key}.png" for panel, _ in curves.panels_of(runs)]
    assert all(path.read_bytes()[1:4] == b"PNG" for path in made)


# ---------------------------------------------------------------------------------------------------------------------
# In a browser
# ---------------------------------------------------------------------------------------------------------------------

# what a person does: hides the second run, and points into the middle of the first picture. And two faults, to see that
# faults are seen
CONTROL = "http://localhost:9/control"
HANDS = f"""<script>
new Image().src = "{CONTROL}";
console.warn("control");
document.querySelector('input[data-run="1"]').click();
const svg = document.querySelector("#panel-loss svg");
const box = svg.getBoundingClientRect();
const at = {{ clientX: box.left + box.width / 2, clientY: box.top + box.height / 2 }};
svg.dispatchEvent(new PointerEvent("pointermove", at));
</script></body>"""


def browse(path, folder) -> tuple[str, list[str], set[str]]:
    """The document as Chromium ends with it, what its console says, and the addresses that the page asks for."""
    log = folder / "net.json"
    where = (f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}", "--virtual-time-budget=2000")
    words = [CHROMIUM, *QUIET, *where, "--dump-dom", f"file://{path}"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    requests = (event.get("params", {}) for event in json.loads(log.read_text())["events"])
    # what the browser asks of its maker on its own has no origin
    asked = {params["url"] for params in requests if params.get("initiator", "not an origin") != "not an origin"}
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line], asked


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_in_a_browser(two, tmp_path):
    """Every curve is there, the console is empty, nothing is asked of a network; a run can be hidden, and under the
    pointer stand the numbers of the others."""
    runs = read_runs(two)
    html = page.page(runs, [])
    (tmp_path / "page.html").write_text(html.replace("</body>", HANDS))
    document, console, asked = browse(tmp_path / "page.html", tmp_path)
    assert asked == {CONTROL}
    assert len(console) == 1 and '"control"' in console[0]
    for panel, _ in curves.panels_of(runs):
        figure = re.search(rf'<figure class="panel" id="panel-{panel.key}">.*?</figure>', document, re.DOTALL).group()
        shown, hidden = (re.findall(rf'class="curve run-{i}"[^>]*', figure) for i in range(2))
        assert len(shown) == len(hidden) == 1
        assert "display: none" in hidden[0] and "display: none" not in shown[0]
    tip = re.search(r'<div id="tip"(.*?)</div></div>', document, re.DOTALL).group(1)
    assert "hidden" not in tip.partition(">")[0]
    assert "a: 0.07243 at step 28" in tip and "a: validation" in tip and "b: " not in tip
