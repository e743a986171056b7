"""Validation while training: exact, without a trace in what is trained, and what is kept because of it."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from real_run import make_config, tokenized
from test_checkpoints import bytes_of, refused, run_train
from tiny import make_data
from transformers import AutoModelForCausalLM

from fsdp_utils.core.flags import ConfigError
from fsdp_utils.folders.describe import describe
from fsdp_utils.inference.load import load_for_inference


@pytest.fixture(scope="module")
def other_data(tmp_path_factory):
    """Samples that are not trained on; their number fits no batch."""
    return make_data(tmp_path_factory.mktemp("validation") / "data.jsonl", samples=11, seed=5)


def logged(folder: Path) -> tuple[list[dict], list[dict]]:
    """The rows of steps, and those of validations."""
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row], [row for row in rows if "eval_loss" in row]


def mean_loss_of(model, data) -> tuple[float, int, float]:
    """By transformers' own forward, one sample at a time: token mean, tokens, and the share answered exactly."""
    total, tokens, right = 0.0, 0, 0
    for row in data.dataset:
        ids, labels = (torch.as_tensor(row[name]).long() for name in ("input_ids", "labels"))
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1].float()
        total += F.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum").item()
        tokens += int((labels[1:] != -100).sum())
        right += bool((logits.argmax(-1) == labels[1:])[labels[1:] != -100].all())
    return total / tokens, tokens, right / len(data)


@pytest.mark.parametrize("train_type", ["full", "bnb_dora"])
@pytest.mark.parametrize("packing", [False, True])
def test_loss_is_that_of_transformers(pair, flags, other_data, tmp_path, train_type, packing):
    """Token mean over all samples, for one and two processes and two batch sizes."""
    given = flags(train_type=train_type) | dict(eval_dataset=other_data, max_steps=2, packing=packing)
    given |= dict(context_length=96, num_epochs=1)
    run_train(output_dir=tmp_path / "1", **given | dict(batch_size=4))
    run_train(output_dir=tmp_path / "2", **given | dict(batch_size=1, gradient_accumulation_steps=4))
    pair.run(run_train, output_dir=tmp_path / "3", **given | dict(batch_size=2))
    data = tokenized(make_config(**given | dict(dataset=other_data, batch_size=1)))
    for name in "123":
        run = describe(tmp_path / name)
        expected, tokens, _ = mean_loss_of(load_for_inference(run, device=torch.device("cpu")), data)
        (row,) = logged(tmp_path / name)[1]
        assert row["eval_loss"] == pytest.approx(expected, rel=1e-5) and row["eval_tokens"] == tokens
        assert row["eval_perplexity"] == pytest.approx(torch.tensor(expected).exp().item(), rel=1e-4)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "1") if train_type == "full" else None
    if stock:
        assert logged(tmp_path / "1")[1][0]["eval_loss"] == pytest.approx(mean_loss_of(stock, data)[0], rel=1e-5)


@pytest.mark.parametrize("options", [dict(use_cpu_offload=True), dict(precision="bf16")], ids=str)
def test_validating_changes_nothing(pair, flags, other_data, tmp_path, options):
    """The same bits with and without it, with dropout and on two processes."""
    given = {**flags(train_type="custom_qlora"), "batch_size": 2, **options}
    pair.run(run_train, output_dir=tmp_path / "without", **given)
    validates = dict(eval_dataset=other_data, eval_every_steps=2, eval_generate=5)
    pair.run(run_train, output_dir=tmp_path / "with", **given, **validates)
    without, (steps, validations) = logged(tmp_path / "without")[0], logged(tmp_path / "with")
    same = lambda rows: [(row["step"], row["loss"], row["grad_norm"]) for row in rows]
    assert same(steps) == same(without) and len(validations) == 6
    assert bytes_of(tmp_path / "with") == bytes_of(tmp_path / "without")


def answers(path: Path) -> Path:
    """One question that a model learns by heart in a few steps, and others that it does not."""
    rows = [dict(question="a", answer="b")] * 12 + [dict(question="c" * n, answer="d" * n) for n in range(8, 12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_exact_match_is_that_of_generation(pair, flags, tmp_path):
    """The share of questions that greedy generation answers token for token, for one and two processes."""
    given = flags(train_type="full") | dict(dataset=answers(tmp_path / "train.jsonl"), num_epochs=3, lr=0.02)
    validation = tmp_path / "validation.jsonl"
    validation.write_text("".join(json.dumps(row) + "\n" for row in [
        dict(question="a", answer="b"), dict(question="c" * 9, answer="e"), dict(question="zz", answer="b d"),
    ]))  # fmt: skip
    given |= dict(eval_dataset=validation, eval_generate=3, precision="fp32")
    run_train(output_dir=tmp_path / "1", **given | dict(batch_size=4))
    pair.run(run_train, output_dir=tmp_path / "2", **given | dict(batch_size=2))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "1").eval()
    data, right = tokenized(make_config(**given | dict(dataset=validation, batch_size=1))), 0
    for row in data.dataset:
        ids, labels = (torch.as_tensor(row[name]).long() for name in ("input_ids", "labels"))
        asked, wanted = ids[labels == -100], labels[labels != -100]
        made = model.generate(asked[None], max_new_tokens=len(wanted), do_sample=False, eos_token_id=None)
        right += made[0, len(asked) :].tolist() == wanted.tolist()
    found = [logged(tmp_path / name)[1][0]["eval_exact_match"] for name in "12"]
    assert found == [right / 3, right / 3] and 0 < right < 3


def test_held_out_samples(pair, flags, tmp_path, capsys):
    """--eval_samples: the same rows for every number of processes, and none of them is trained on."""
    given = flags(train_type="custom_lora") | dict(eval_samples=5, lora_dropout=0.0, max_steps=3)
    run_train(output_dir=tmp_path / "1", **given | dict(batch_size=4))
    pair.run(run_train, output_dir=tmp_path / "2", **given | dict(batch_size=2))
    (alone,), (together,) = logged(tmp_path / "1")[1], logged(tmp_path / "2")[1]
    assert alone["eval_loss"] == pytest.approx(together["eval_loss"], rel=1e-5)
    assert alone["eval_tokens"] == together["eval_tokens"]
    data = tokenized(make_config(**given | dict(batch_size=1)))
    train, held = data.split(5, seed=42)
    assert sorted([*train.rows, *held.rows]) == list(data.rows) and len(held) == 5
    assert held.rows.tolist() == data.split(5, seed=42)[1].rows.tolist() != data.split(5, seed=43)[1].rows.tolist()
    assert (
        held.dataset[0]["input_ids"].tolist()
        == data.dataset[int((data.rows == held.rows[0]).nonzero()[0][0])]["input_ids"].tolist()
    )
    assert "hold out fewer" in refused(output_dir=tmp_path / "3", **given | dict(eval_samples=15))


def diverging(flags, other_data) -> dict:
    """A run whose validation loss falls and then rises."""
    return flags(train_type="custom_lora") | dict(
        batch_size=5, num_epochs=4, lr=0.3, lora_dropout=0.0, eval_dataset=other_data, eval_every_steps=1
    )


def test_best_becomes_the_result(flags, other_data, tmp_path):
    """--save_best: the folder holds the weights of the step with the lowest validation loss, and a resume knows it."""
    given = diverging(flags, other_data) | dict(save_best=True, keep_checkpoints=1, max_steps=3)
    run_train(output_dir=tmp_path / "a", save_every_steps=1, **given)
    steps, validations = logged(tmp_path / "a")
    best = min(validations, key=lambda row: row["eval_loss"])
    assert len(validations) == len(steps) == 3 and best["step"] == 1
    kept = {path.name for path in (tmp_path / "a/checkpoints").iterdir()}
    assert kept == {f"step-{best['step']:06d}", "step-000003"}
    data = tokenized(make_config(**given | dict(dataset=other_data, batch_size=1)))
    model = load_for_inference(describe(tmp_path / "a"), device=torch.device("cpu"))
    assert mean_loss_of(model, data)[0] == pytest.approx(best["eval_loss"], rel=1e-5)
    run_train(output_dir=tmp_path / "b", stop_at_step=2, **given)
    run_train(output_dir=tmp_path / "b", resume="auto", **given)
    assert bytes_of(tmp_path / "b") == bytes_of(tmp_path / "a")
    assert [row["step"] for row in logged(tmp_path / "b")[1]] == [1, 2, 3]


def test_early_stopping(flags, other_data, tmp_path, capsys):
    """--early_stopping_patience: ends after so many validations without a lower loss, and stays ended."""
    given = diverging(flags, other_data) | dict(early_stopping_patience=2, save_every_steps=1)
    run_train(output_dir=tmp_path / "a", **given)
    steps, validations = logged(tmp_path / "a")
    best = min(validations, key=lambda row: row["eval_loss"])
    assert len(steps) == best["step"] + 2 < 12 and bytes_of(tmp_path / "a")
    run_train(output_dir=tmp_path / "a", resume="auto", **given)
    assert "nothing is left to do" in capsys.readouterr().out


def test_losses_of_other_samples_are_not_compared(flags, other_data, tmp_path, capsys):
    """A resumed run with another validation set judges anew: the lowest loss was that of other samples."""
    given = flags(train_type="custom_lora") | dict(batch_size=5, num_epochs=2, eval_every_steps=1, save_best=True)
    run_train(output_dir=tmp_path / "a", eval_dataset=other_data, stop_at_step=3, **given)
    more = make_data(tmp_path / "more.jsonl", samples=7, seed=9)
    run_train(output_dir=tmp_path / "a", eval_dataset=more, resume="auto", **given)
    said = capsys.readouterr().out
    rows = [row for row in logged(tmp_path / "a")[1] if row["step"] > 3]
    best = min(rows, key=lambda row: row["eval_loss"])
    assert "validation is of other samples" in said and f"that of step {best['step']}," in said


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (dict(eval_every_steps=2), "--eval_every_steps: add --eval_dataset or --eval_samples"),
        (dict(save_best=True), "--save_best"),
        (dict(eval_dataset="demo", eval_samples=2), "drop one"),
        (dict(eval_samples=2, early_stopping_patience=2), "add --eval_every_steps"),
    ],
    ids=str,
)
def test_flags_that_need_others(given, names):
    """Before any library is read."""
    with pytest.raises(ConfigError, match=names):
        make_config(**given)


def test_training_file_is_no_validation_file(flags, tmp_path):
    """The same file under both flags would flatter the run."""
    given = flags(train_type="custom_lora")
    said = refused(output_dir=tmp_path / "x", eval_dataset=given["dataset"], **given)
    assert "is what is trained on" in said
    assert "--eval_dataset" in refused(output_dir=tmp_path / "x", eval_dataset="alpaca", **given)
