"""The word-problem experiment: right problems, a complete table of methods, and a reduced run from base to report."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from functools import partial
from itertools import islice

import pytest
import torch
from safetensors.torch import load_file

from experiments import runs
from experiments.orca_math_mini import pretrain, problems, report, run
from fsdp_utils.core.errors import UserError
from fsdp_utils.core.flags import ConfigError, parse
from fsdp_utils.inference.scoring import extract
from methods import TRAIN_TYPES

# what each story asks for, written down apart from the generator's solutions
FORMULAS = {
    "change": lambda n, p, m: m - n * p,
    "two_prices": lambda a, p, b, q: a * p + b * q,
    "discount": lambda p, r: p * (100 - r) / 100,
    "ratio_share": lambda p, q, n: n * p / (p + q),
    "average": lambda a, b, c: (a + b + c) / 3,
    "journey": lambda v, h, d: v * h + d,
    "at_first": lambda a, b, c: c - b + a,
    "boxes_left": lambda n, k, b: n - b * k,
    "three_people": lambda a, k, b: a + 2 * a * k - b,
    "wages": lambda p, a, b, m: p * (a + b) - m,
    "seats": lambda a, b, c, d: a * b - c - d,
    "shared_bill": lambda k, p, q: (p + q) / k,
    "weight": lambda w, n, u: w + n * u,
    "rope": lambda a, n, u: a - n * u,
    "saving": lambda p, m, s: (p - m) / s,
    "recipe": lambda k, g, n: g * n / k,
    "percent_sold": lambda n, r, b: n * (100 - r) / 100 - b,
    "for_every": lambda p, q, n: n * q / p,
    "bus": lambda a, b, c, d: a - b + c - d,
    "fence": lambda a, b, p: 2 * (a + b) * p,
    "profit": lambda n, p, q: n * (q - p),
    "minutes": lambda a, n, b: a * n + b,
    "half_spent": lambda p, q: p / 2 - q,
}
EQUATION = re.compile(r"(\d+(?:\.\d+)?) ([-+*/]) (\d+(?:\.\d+)?) = (\d+(?:\.\d+)?)")


@pytest.fixture(scope="module")
def drawn():
    return list(islice(problems.problems(seed=5), 1500))


def equations(text):
    """(left, operation, right, result) of each equation."""
    return [(Fraction(a), op, Fraction(b), Fraction(c)) for a, op, b, c in EQUATION.findall(text)]


def true(equation):
    left, op, right, result = equation
    return result == {"+": left + right, "-": left - right, "*": left * right, "/": left / right if right else None}[op]


def test_answers_follow_from_the_numbers(drawn):
    """The scorer reads from each answer what an independent formula gives for the story's numbers."""
    assert {problem.template for problem in drawn} == set(problems.TEMPLATES) == {*FORMULAS, "lowest_ratio"}
    for problem in drawn:
        if problem.template == "lowest_ratio":
            ratio = Fraction(*map(int, problem.numbers.values()))
            expected = (ratio.numerator, ratio.denominator)
        else:
            expected = FORMULAS[problem.template](**problem.numbers)
        assert extract(problem.answer) == expected, problem


def test_every_step_is_shown_and_true(drawn):
    """Answers take two to four true steps, and name no number above the largest."""
    for problem in drawn:
        steps = equations(problem.answer)
        assert 2 <= len(steps) <= 4 and all(map(true, steps)), problem
        assert all(0 < value <= problems.LARGEST for _, _, _, value in steps), problem


def test_questions_name_every_number(drawn):
    """Each number of the story stands in the question as a reader would write it; some questions have one too many."""
    for problem in drawn:
        kinds = problems.TEMPLATES[problem.template].numbers
        for name, value in problem.numbers.items():
            shown = problems.show_money(value) if kinds[name].money else problems.show(value)
            assert shown in problem.question, problem
    extra = sum(len(re.findall(r"\d+(?:\.\d+)?", p.question)) > len(p.numbers) for p in drawn)
    assert 0.3 < extra / len(drawn) < 0.5
    text = " ".join(problem.question for problem in drawn)
    assert re.search(r"\$\d+\.\d\d ", text) and re.search(r"\d:\d", text) and re.search(r"\d\.\d km|\d\.\d hours", text)


def test_splits_are_disjoint_and_stable():
    """No template comes twice with the same numbers, within or across sets; more to train on changes nothing else."""
    small = problems.splits(seed=0, test=200, validation=100, train=300)
    large = problems.splits(seed=0, test=200, validation=100, train=2000)
    keys = [(p.template, *p.numbers.values()) for found in large.values() for p in found]
    assert len(keys) == len(set(keys)) == 2300
    assert all(large[name][: len(found)] == found for name, found in small.items())
    assert problems.splits(seed=1, test=200, validation=100, train=300) != small


def test_pretraining_is_another_task():
    """The base model sees true arithmetic and plain sentences, but no question and no answer."""
    texts = list(islice(problems.pretraining_texts(seed=0), 2000))
    assert not [text for text in texts if "?" in text or "answer" in text.lower() or "#" in text]
    assert all(true(equation) for text in texts for equation in equations(text))
    assert texts == list(islice(problems.pretraining_texts(seed=0), 2000))
    assert sum(not re.search(r"\d", text) for text in texts) > 60  # plain sentences


def pretrained(folder):
    """Two steps; a thread draws the problems, where a process of its own would take seconds to start."""
    flags = dict(scale="small", steps=2, train_samples=40, test_samples=6, validation_samples=4, device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "ProcessPoolExecutor", lambda workers, mp_context=None: ThreadPoolExecutor(workers))
        pretrain.main(pretrain.Pretrain(output_dir=str(folder), **flags))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A barely pre-trained small model with its problems."""
    return pretrained(tmp_path_factory.mktemp("mini") / "base")


def test_pretraining_is_repeatable(base, tmp_path):
    """The same seed gives the same files; every row of weights holds whole groups of 64."""
    again = pretrained(tmp_path / "again")
    first, second = (load_file(folder / "model" / "model.safetensors") for folder in (base, again))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all((base / f"{s}.jsonl").read_bytes() == (again / f"{s}.jsonl").read_bytes() for s in run.SPLITS)
    assert all(weight.shape[1] % 64 == 0 for weight in first.values() if weight.dim() == 2)


@pytest.mark.parametrize("scale", pretrain.SCALES.values(), ids=pretrain.SCALES)
def test_shapes_suit_every_quantizer(scale):
    """Every in_features is divisible by 64, also at the scale that is not trained here."""
    assert scale.shape["hidden_size"] % 64 == scale.shape["intermediate_size"] % 64 == 0


def config_of(base, out, **flags):
    """Settings of a run that ends in seconds."""
    common = dict(base=base, output_dir=out, sizes=32, epochs=1, batch_size=8, max_new_tokens=8, device="cpu", seeds=1)
    argv = [f"--{name}={value}" for name, value in (common | flags).items()]
    return parse(run.RunConfig, argv, prog="run.py")


def test_table_covers_every_method(base, tmp_path):
    """Each kind of base meets each method, and the flags of each row are accepted by train.py."""
    config = config_of(base, tmp_path / "runs")
    run.prepare(config)
    found = {name: run.METHODS[name].train_type for name in run.METHODS}
    assert set(found.values()) - {None} == set(TRAIN_TYPES) - {"lora", "qlora", "llama_pro", "hqq_llama_pro"}
    assert {"zero_shot", "five_shot", "full_nf4"} < set(run.OWNERS)
    for job in run.rate_jobs(config, []):
        if job.samples:
            assert run.train_config(job, config).train_type == found[job.method]
    bits = {name: run.METHODS[name].flags.get("n_bits") for name in found if name.startswith("hqq")}
    assert sorted(bits.values()) == [2, 2, 4, 4]


def test_learning_rates(base, tmp_path):
    """Every method tries three rates, one of them shared by all, and goes on with the best on validation."""
    config = config_of(base, tmp_path, seeds=3)
    jobs = list(run.rate_jobs(config, []))
    assert run.pending(config, []) == list(dict.fromkeys(jobs))  # of one size: the readings of the base, then in order
    both = replace(config, sizes="8,32", epochs="1,1")
    assert [job.samples for job in run.pending(both, [])] == [0] * 2 + [32] * 33 + [8] * 33
    for name, method in run.METHODS.items():
        rates = {job.lr for job in jobs if job.method == name}
        assert rates == {0.0} if method.train_type is None else len(rates) == 3 and config.shared_lr in rates
    rows = [job._asdict() | {"validation": 0.5 if job.lr == 4e-3 else 0.25} for job in jobs if job.method == "qdora"]
    rows += [rows[0] | {"lr": 1.0, "validation": None}, rows[0] | {"lr": 2.0, "validation": 1.0, "rank": 2, "alpha": 4}]
    assert list(run.seed_jobs(config, rows[1:])) == []  # not before all rates are done
    more = list(run.seed_jobs(config, rows))
    assert [(job.method, job.lr, job.seed) for job in more] == [("qdora", 4e-3, 1), ("qdora", 4e-3, 2)]
    assert [(job.rank, job.alpha, job.lr) for job in run.rank_jobs(config, rows)] == [(*r, 4e-3) for r in run.RANKS]


def test_flags_are_checked():
    """Unknown methods and stages and odd sizes are named, all at once."""
    with pytest.raises(ConfigError) as error:
        parse(run.RunConfig, ["--only=qdora,nosuch", "--stages=all", "--sizes=3k", "--epochs=1,2"], prog="run.py")
    assert all(word in str(error.value) for word in ("--only nosuch", "--stages all", "--sizes 3k", "--epochs 1,2"))


def test_missing_base_is_named(tmp_path):
    """A folder that pretrain.py did not make ends the run before anything is written."""
    with pytest.raises(UserError, match=r"pretrain\.py"):
        run.prepare(config_of(tmp_path / "nowhere", tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """The settings and results of a reduced run: two readings of the base, full, NF4 of it, QDoRA, Llama-Pro."""
    only = "zero_shot,five_shot,full,qdora,llama_pro"
    config = config_of(base, tmp_path_factory.mktemp("runs"), only=only, tune=False, stages="rates")
    run.main(config)
    return config, run.read_rows(run.Path(config.output_dir) / run.RESULTS)


def test_reduced_run(finished):
    """Each method has one row with a score on the held-out problems, and each training its costs and curves."""
    config, rows = finished
    assert [row["method"] for row in rows] == ["zero_shot", "five_shot", "full", "full_nf4", "qdora", "llama_pro"]
    for row in rows:
        assert 0 <= row["interval_95"][0] <= row["exact_match"] <= row["interval_95"][1] <= 1
        assert row["test_problems"] == 6 and row["base"] == rows[0]["base"]
    for row in rows[2:]:
        assert row["steps"] == 4 and [step for step, _ in row["loss"]] == [1, 2, 3, 4]
        assert row["grad_norm_mean"] > 0 and row["train_seconds"] > 0 and row["train_peak_gib"] > 0
    by_name = {row["method"]: row for row in rows}
    assert by_name["full"]["trained_share"] == 1 > by_name["qdora"]["trained_share"] > 0
    assert by_name["qdora"]["magnitude_change"]["mean"] > 0  # DoRA's own parameters were trained
    assert not list((run.Path(config.output_dir) / "work").iterdir())


def test_resume_skips_what_is_done(finished, monkeypatch, tmp_path, capsys):
    """A second call with the same settings starts nothing; a line that was cut short is run again."""
    config, rows = finished
    started = []

    def fake(job, config):
        started.append(job.method)
        return [row for row in rows if run.OWNERS[row["method"]] == job.method]

    monkeypatch.setattr(run, "execute", fake)
    run.main(config)
    assert started == []
    resumed = replace(config, output_dir=str(tmp_path))
    lines = [json.dumps(row) + "\n" for row in rows]
    (tmp_path / run.RESULTS).write_text("".join(lines[:-1]) + lines[-1][:40])
    run.main(resumed)
    assert started == ["llama_pro"]
    assert run.read_rows(tmp_path / run.RESULTS) == rows


def test_budget_starts_nothing_after_its_end(finished, monkeypatch):
    """Once the time is over no run is started."""
    config, _ = finished
    monkeypatch.setattr(run, "execute", lambda job, config: pytest.fail("started"))
    jobs = [run.Job("zero_shot"), run.Job("five_shot")]
    how = dict(processes=1, deadline=0.0)
    assert list(runs.run_jobs(lambda: jobs, partial(run.execute, config=config), runs.Here(), **how)) == []


def test_a_failing_run_stops_no_other(finished, monkeypatch, capsys):
    """Its line says why, the rows of the others come, and it is left to do."""
    config, _ = finished

    def execute(job, config):
        if job.method == "five_shot":
            raise MemoryError("no room\nfor it")
        return [job._asdict()]

    monkeypatch.setattr(run, "execute", execute)
    jobs = [run.Job(name) for name in ("five_shot", "zero_shot", "full")]
    how = dict(processes=1, deadline=float("inf"))
    found = list(runs.run_jobs(lambda: jobs, partial(run.execute, config=config), runs.Here(), **how))
    assert [row["method"] for (row,) in found] == ["zero_shot", "full"]
    assert capsys.readouterr().out == f"{jobs[0]}: failed (no room)\n"


def test_other_settings_are_refused(finished):
    """Results of another batch size or number of epochs are not taken for those asked for."""
    config, _ = finished
    for name, value in (("batch_size", 4), ("epochs", "2"), ("max_new_tokens", 9)):
        with pytest.raises(UserError, match=f"--{name}: .* now it is {value}"):
            run.main(replace(config, **{name: value}))


def test_divergence_is_a_result(finished, monkeypatch):
    """A run that diverges is recorded and left out of the choice of rates; it is not tried again."""
    config, _ = finished

    def diverge(flags, device):
        raise FloatingPointError("step 3: loss nan")

    monkeypatch.setattr(run, "train_once", diverge)
    job = run.job_of("full", 32, 1.0)
    rows = run.outcome(job, config)
    assert [row["method"] for row in rows] == ["full", "full_nf4"] and rows[0]["error"] == "step 3: loss nan"
    assert run.best_rate(rows, "full", 32) is None and run.remaining([job], rows) == []


def test_report(finished, tmp_path, monkeypatch):
    """Tables for every row, mean and spread over seeds; without matplotlib one line says what to do."""
    _, rows = finished
    again = [row | {"seed": 1, "exact_match": row["exact_match"] + 0.5} for row in rows if row["method"] == "qdora"]
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *again]))
    report.main(report.Report(results=str(results), output_dir=str(tmp_path), plots=False))
    text = (tmp_path / "report.md").read_text()
    assert all(f"| {row['method']} |" in text for row in rows)
    mean = rows[4]["exact_match"] + 0.25
    assert f"| qdora | {mean:.3f} ± 0.354 |" in text and "magnitude" in text
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install matplotlib"):
        parse(report.Report, [f"--results={results}"], prog="report.py")


def test_plots(finished, tmp_path):
    """Both plots are drawn where matplotlib is."""
    pytest.importorskip("matplotlib")
    _, rows = finished
    report.draw_losses(rows, tmp_path / "loss.png")
    report.draw_tradeoff(rows, tmp_path / "tradeoff.png")
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("loss.png", "tradeoff.png"))
