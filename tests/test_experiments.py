"""The experiments on real models, reduced to the built-in one: what they train, choose, and write."""

import json
from dataclasses import replace
from math import log

import pytest

from experiments.gsm8k import report as gsm8k_report
from experiments.gsm8k import run as gsm8k
from experiments.lora_or_qlora import report as classes_report
from experiments.lora_or_qlora import run as classes
from fsdp_utils.core.errors import UserError
from fsdp_utils.core.flags import ConfigError, parse
from fsdp_utils.core.folders import read_rows
from scripts.make_demo import write_jsonl

TOPICS = {
    "sport": ("the team won the match", "a goal in the last minute", "the runner broke the record"),
    "money": ("the bank raised its rates", "shares fell on the market", "the firm sold its stock"),
}


@pytest.fixture
def topics(tmp_path):
    """Texts of two kinds that words tell apart, to train on and to judge by."""
    rows = [
        dict(text=f"{text} {n}", label=label) for label, texts in TOPICS.items() for text in texts for n in range(60)
    ]
    files = {name: tmp_path / f"{name}.jsonl" for name in ("train", "eval")}
    write_jsonl(files["train"], rows[::2])
    write_jsonl(files["eval"], rows[1::6])
    return files


def test_a_classifier_learns(topics, tmp_path, capsys, monkeypatch):
    """QLoRA 8-16, the row of the published table, on two topics: nearly all held-out texts right. The report has it."""
    monkeypatch.setitem(classes.COMMON, "precision", "fp32")  # CPUs are slow in bf16
    out = tmp_path / "out"
    words = ["--model=demo", f"--train={topics['train']}", f"--eval={topics['eval']}", f"--output_dir={out}"]
    words += ["--only=QLoRA 8-16", "--seeds=1", "--steps=40", "--device=cpu"]
    study = parse(classes.Study, words, prog="run.py")
    classes.main(study)
    (row,) = read_rows(out / "results.jsonl")
    assert row["eval_accuracy"] > 0.85 > 0.5 and row["steps"] == 40
    assert not list((out / "work").iterdir())
    monkeypatch.setattr(classes, "execute", lambda job, study: pytest.fail("made again"))
    classes.main(study)
    classes_report.main(classes_report.Report(results=str(out / "results.jsonl"), output_dir=str(out)))
    assert "| QLoRA 8-16 | 1 |" in capsys.readouterr().out


def test_rows_of_classes_are_known():
    """A row that is not in the table, and a file that is not named, end before anything runs."""
    with pytest.raises(ConfigError, match="--eval: name it"):
        parse(classes.Study, ["--model=demo", "--train=a.jsonl"], prog="run.py")
    study = parse(classes.Study, ["--model=demo", "--train=a", "--eval=b", "--only=nosuch"], prog="run.py")
    with pytest.raises(UserError, match="--only nosuch"):
        classes.jobs_of(study)


@pytest.fixture
def sums(tmp_path):
    rows = [dict(question=f"What is {a} + {b}?", answer=f"#### {a + b}") for a in range(5) for b in range(5)]
    files = {name: tmp_path / f"{name}.jsonl" for name in ("train", "test")}
    write_jsonl(files["train"], rows[:20])
    write_jsonl(files["test"], rows[20:])
    return files


def study_of(sums, out, **flags):
    common = dict(
        model="demo", train=sums["train"], test=sums["test"], output_dir=out, held_out=8, steps=2, batch_size=2
    )
    common |= dict(seeds=1, max_new_tokens=8, precision="fp32", device="cpu")
    return parse(gsm8k.Study, [f"--{k}={v}" for k, v in (common | flags).items()], prog="run.py")


def test_rates_are_chosen_before_they_are_reported(sums, tmp_path, monkeypatch, capsys):
    """Three rates at seed 0 choose by held-out rows; another seed alone is reported, by the test file, for `full` also
    with NF4 after it."""
    rates = gsm8k.FULL_RATES[::3]
    monkeypatch.setitem(gsm8k.METHODS, "full", replace(gsm8k.METHODS["full"], rates=rates))
    out = tmp_path / "out"
    gsm8k.main(study_of(sums, out, only="base, NF4;full"))
    rows = read_rows(out / "results.jsonl")
    chose = [row for row in rows if row["seed"] == 0]
    reported = {row["method"]: row for row in rows if row["seed"]}
    assert [row["lr"] for row in chose] == list(rates) and not any("exact_match" in row for row in chose)
    assert list(reported) == ["base, NF4", "full", "full + NF4"]
    best = min(chose, key=lambda row: row["eval_loss"])["lr"]
    assert reported["full"]["lr"] == reported["full + NF4"]["lr"] == best
    assert reported["full"]["eval_loss"] != reported["full + NF4"]["eval_loss"]
    assert all(0 <= row["exact_match"] <= 1 and row["asked"] == 5 for row in reported.values())
    gsm8k_report.main(gsm8k_report.Report(results=str(out / "results.jsonl")))
    said = capsys.readouterr().out
    assert f"**{best:g}: " in said and "| full + NF4 |" in said


def test_what_becomes_of_exports_is_reported(sums, tmp_path, monkeypatch, capsys):
    """What was trained on the rounding of its export is that export, but for 16 bits elsewhere."""
    monkeypatch.setitem(gsm8k.METHODS, "QLoRA for NF4", replace(gsm8k.METHODS["QLoRA for NF4"], rates=(4e-3, 8e-3)))
    out = tmp_path / "out"
    gsm8k.main(study_of(sums, out, only="QLoRA for NF4"))
    (row,) = [row for row in read_rows(out / "results.jsonl") if row["seed"]]
    scores = row["exported"]["bnb_nf4"]
    assert log(scores["exported"]["perplexity"]) == pytest.approx(log(scores["trained"]["perplexity"]), abs=0.05)
    gsm8k_report.main(gsm8k_report.Report(results=str(out / "results.jsonl")))
    assert "| QLoRA for NF4 | bnb_nf4 |" in capsys.readouterr().out


def test_eight_bits_are_judged_in_sixteen_too(sums, tmp_path, monkeypatch):
    """An adapter that was trained in 8 bits is used without them."""
    name = "QLoRA, 8-bit products"
    monkeypatch.setitem(gsm8k.METHODS, name, replace(gsm8k.METHODS[name], rates=(4e-3, 8e-3)))
    out = tmp_path / "out"
    gsm8k.main(study_of(sums, out, only=name))
    (row,) = [row for row in read_rows(out / "results.jsonl") if row["seed"]]
    assert row["eval_loss"] != row["eval_loss_in_16_bits"] == pytest.approx(row["eval_loss"], rel=0.02)


def test_seeds_wait_for_all_rates():
    """A rate that diverged is not chosen; while one is missing, none is."""
    rates = gsm8k.METHODS["LoRA"].rates
    rows = [dict(method="LoRA", lr=lr, seed=0, eval_loss=2.0 - lr) for lr in rates]
    assert gsm8k.best_rate(rows[:-1], "LoRA") is None
    assert gsm8k.best_rate(rows, "LoRA") == rates[-1]
    rows[-1]["eval_loss"] = None
    assert gsm8k.best_rate(rows, "LoRA") == rates[-2]


def test_every_method_is_a_run(sums, tmp_path):
    """train.py takes the flags of each row."""
    study = study_of(sums, tmp_path / "out")
    gsm8k.prepare(study)
    for job in gsm8k.jobs_of(study, []):
        flags = gsm8k.train_flags(gsm8k.flags_of(job, study))
        assert flags.lr == job.lr and json.loads(json.dumps(job)) == list(job)


def test_runs_that_are_not_reported():
    """Those of a rate that a wider search has given up, and those that diverged."""
    tried = [dict(method="LoRA", lr=lr, seed=0, eval_loss=abs(lr - 2e-3)) for lr in gsm8k.METHODS["LoRA"].rates]
    made = dict(method="LoRA", eval_loss=1.0, steps=9, asked=4, exact_match=0.5, train_peak_gib=1, train_seconds=1)
    kept = [made | dict(lr=2e-3, seed=1), made | dict(lr=2e-3, seed=2, eval_loss=3.0)]
    others = [made | dict(lr=1e-3, seed=1, eval_loss=9.0), dict(method="LoRA", lr=2e-3, seed=3, eval_loss=None)]
    (line,) = [
        line for line in gsm8k_report.methods([*tried, *kept, *others]).splitlines() if line.startswith("| LoRA")
    ]
    assert line.startswith("| LoRA | 0.002 | 2 | 2.0000 ")
