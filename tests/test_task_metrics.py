"""Scores of classification and sequence-to-sequence models: those of scikit-learn, sacrebleu and rouge-score, whatever
the batches and processes; and what evaluate.py makes of saved runs."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, root_mean_squared_error
from test_checkpoints import bytes_of, run_train
from test_validation import logged
from tiny_tasks import SEQ2SEQ, labelled_rows, make_task_model, source_rows, write_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fsdp_utils.data.labels import MULTI, REGRESSION, SINGLE
from fsdp_utils.training.scores import SCORES

CPU = torch.device("cpu")


def rows_of_kind(kind: str, samples: int = 24, *, seed: int = 0) -> list[dict]:
    """Texts with one label, with any of several, or with a score."""
    rows = labelled_rows(samples, seed=seed)
    if kind == MULTI:
        return [dict(text=row["text"], label=sorted({row["label"], row["text"].split()[0]})) for row in rows]
    if kind == REGRESSION:
        return [dict(text=row["text"], score=len(row["text"]) / 10) for row in rows]
    return rows


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    """`model_of("roberta")`: the folder of a tiny model, made once."""
    root, made = tmp_path_factory.mktemp("families"), {}

    def get(family):
        if family not in made:
            made[family] = make_task_model(root / family, family)
        return made[family]

    return get


@pytest.fixture(scope="module")
def data_of(tmp_path_factory):
    """`data_of(kind, samples=…, seed=…)`: a file of `rows_of_kind`, or of sources and targets."""
    root = tmp_path_factory.mktemp("rows")

    def get(kind, samples=24, seed=0):
        rows = source_rows(samples, seed=seed) if kind == "pairs" else rows_of_kind(kind, samples, seed=seed)
        return write_rows(root / f"{kind}-{samples}-{seed}.jsonl", rows)

    return get


@pytest.fixture(scope="module")
def trained(model_of, data_of, tmp_path_factory):
    """`trained(family, kind, **flags)`: the folder of a run that has learned for a few steps, made once."""
    made = {}

    def get(family, kind=SINGLE, **flags):
        key = (family, kind, *sorted(flags.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("trained") / "run"
            task = "seq2seq_lm" if family in SEQ2SEQ else "sequence_classification"
            data = data_of("pairs" if family in SEQ2SEQ else kind)
            given = dict(train_type="full", batch_size=8, num_epochs=2, lora_dropout=0.0, context_length=64)
            given |= dict(model_name=model_of(family), dataset=data, task=task, output_dir=folder) | flags
            run_train(**given)
            made[key] = folder
        return made[key]

    return get


# ---------------------------------------------------------------------------------------------------------------------
# The arithmetic
# ---------------------------------------------------------------------------------------------------------------------


def drawn(kind: str, rows: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and targets, of which one row asks for nothing."""
    generator = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, outputs, generator=generator)
    if kind == SINGLE:  # the last class is never wanted
        targets = torch.randint(0, outputs - 1, (rows,), generator=generator)
        targets[3] = -100
    else:
        targets = (logits + torch.randn(rows, outputs, generator=generator) > 0.3).float()
        targets = targets if kind == MULTI else logits * 0.3 + torch.randn(rows, outputs, generator=generator) + 50
        targets[3] = math.nan
    return logits, targets


def in_parts(kind: str, logits: torch.Tensor, targets: torch.Tensor, *, size: int) -> dict:
    """The metrics of sums over batches of `size` rows."""
    score, outputs = SCORES[kind], logits.shape[1]
    parts = zip(logits.split(size), targets.split(size), strict=True)
    return score.metrics(sum(score.sums(score.predicted(one), other, outputs=outputs) for one, other in parts))


@pytest.mark.parametrize("outputs", [2, 3, 20])
def test_single_label(outputs):
    """Accuracy, macro F1 and Matthews of scikit-learn, alike for batches of any size."""
    logits, targets = drawn(SINGLE, 40, outputs)
    found, asked = in_parts(SINGLE, logits, targets, size=40), targets >= 0
    wanted, given = targets[asked].numpy(), logits.argmax(1)[asked].numpy()
    assert found["accuracy"] == accuracy_score(wanted, given)
    assert found["macro_f1"] == pytest.approx(f1_score(wanted, given, average="macro"), abs=1e-12)
    assert found["matthews"] == pytest.approx(matthews_corrcoef(wanted, given), abs=1e-12)
    assert found == in_parts(SINGLE, logits, targets, size=7)


def test_bootstrap_is_that_of_rows():
    """Draws from the confusion matrix have the quantiles of scikit-learn's scores of rows drawn with replacement."""
    logits, targets = drawn(SINGLE, 120, 3)
    found, asked = in_parts(SINGLE, logits + 2 * torch.eye(3)[targets.clamp_min(0)], targets, size=120), targets >= 0
    given = (logits + 2 * torch.eye(3)[targets.clamp_min(0)]).argmax(1)[asked].numpy()
    wanted, rng, scores = targets[asked].numpy(), np.random.default_rng(5), []
    for _ in range(300):
        rows = rng.integers(0, len(wanted), len(wanted))
        f1 = f1_score(wanted[rows], given[rows], average="macro")
        scores.append((f1, matthews_corrcoef(wanted[rows], given[rows])))
    for name, expected in zip(("macro_f1", "matthews"), np.quantile(scores, [0.025, 0.975], axis=0).T, strict=True):
        low, high = found[f"{name}_interval"]
        assert low < found[name] < high and (low, high) == pytest.approx(tuple(expected), abs=0.04)


def test_one_class_only():
    """What is 0/0 is 0, as scikit-learn has it."""
    logits, targets = torch.tensor([[1.0, 0.0]] * 3), torch.tensor([0, 0, 0])
    found = in_parts(SINGLE, logits, targets, size=3)
    assert (found["accuracy"], found["macro_f1"], found["matthews"]) == (1.0, 1.0, 0.0)
    assert matthews_corrcoef([0, 0, 0], [0, 0, 0]) == 0 and f1_score([0, 0], [0, 0], average="macro") == 1


def test_several_labels():
    """Subset accuracy, micro and macro F1 of scikit-learn, also with a label that never occurs."""
    logits, targets = drawn(MULTI, 40, 4)
    targets[:, 2] = torch.where(targets[:, 2].isnan(), targets[:, 2], 0)
    logits[:, 2] = -1
    found, asked = in_parts(MULTI, logits, targets, size=40), ~targets.isnan().any(1)
    wanted, given = targets[asked].numpy(), (logits[asked].sigmoid() > 0.5).float().numpy()
    assert found["accuracy"] == accuracy_score(wanted, given)
    for average in ("micro", "macro"):
        expected = f1_score(wanted, given, average=average, zero_division=0)
        assert found[f"{average}_f1"] == pytest.approx(expected, abs=1e-12)
    assert found == in_parts(MULTI, logits, targets, size=7)


def test_regression():
    """Pearson's correlation with the interval of SciPy, and scikit-learn's root mean squared error."""
    logits, targets = drawn(REGRESSION, 40, 1)
    found, asked = in_parts(REGRESSION, logits, targets, size=40), ~targets[:, 0].isnan()
    wanted, given = (column[asked, 0].double().numpy() for column in (targets, logits))
    expected = pearsonr(given, wanted)
    assert found["pearson"] == pytest.approx(expected.statistic, abs=1e-9)
    assert found["pearson_interval"] == pytest.approx(tuple(expected.confidence_interval()), abs=1e-6)
    assert found["rmse"] == pytest.approx(root_mean_squared_error(wanted, given), rel=1e-9)
    parts = in_parts(REGRESSION, logits, targets, size=7)
    for name, value in found.items():
        assert parts[name] == pytest.approx(value, rel=1e-9)
    same = in_parts(REGRESSION, torch.full_like(logits, 0.1), targets, size=40)
    assert math.isnan(same["pearson"]) and "pearson_interval" not in same


# ---------------------------------------------------------------------------------------------------------------------
# Validation while training
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def stock_outputs(folder, rows: list[dict], *, load=AutoModelForSequenceClassification.from_pretrained) -> torch.Tensor:
    """fp32 logits `[rows, outputs]` of transformers, one row at a time."""
    model, tokenizer = load(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(row["text"], row.get("text_pair"))["input_ids"][:64] for row in rows]
    return torch.cat([model(input_ids=torch.tensor([row])).logits.float() for row in ids])


@pytest.mark.parametrize("kind", [SINGLE, MULTI, REGRESSION])
def test_validation_has_the_scores_of_stock(pair, model_of, data_of, tmp_path, kind):
    """One and two processes and two batch sizes log what scikit-learn says of transformers' outputs; validating
    changes nothing in training."""
    given = dict(model_name=model_of("roberta"), dataset=data_of(kind), task="sequence_classification", lr=1e-3)
    given |= dict(train_type="full", num_epochs=1, context_length=64, lora_dropout=0.0)
    validated = given | dict(eval_dataset=data_of(kind, 11, seed=5), eval_every_steps=2, task="auto")
    run_train(output_dir=tmp_path / "0", **given | dict(batch_size=4))
    run_train(output_dir=tmp_path / "1", **validated | dict(batch_size=4))
    run_train(output_dir=tmp_path / "2", **validated | dict(batch_size=1, gradient_accumulation_steps=4))
    pair.run(run_train, output_dir=tmp_path / "3", **validated | dict(batch_size=2))
    (steps, validations), without = logged(tmp_path / "1"), logged(tmp_path / "0")[0]
    assert [row["loss"] for row in steps] == [row["loss"] for row in without]
    assert bytes_of(tmp_path / "1") == bytes_of(tmp_path / "0")
    rows = rows_of_kind(kind, 11, seed=5)
    logits = stock_outputs(tmp_path / "1", rows)
    names = json.loads((tmp_path / "1/config.json").read_text())["label2id"]
    last, expected = validations[-1], {}
    if kind == SINGLE:
        wanted, found = [names[row["label"]] for row in rows], logits.argmax(1).numpy()
        expected = dict(eval_accuracy=accuracy_score(wanted, found), eval_matthews=matthews_corrcoef(wanted, found))
        expected["eval_macro_f1"] = f1_score(wanted, found, average="macro")
    elif kind == MULTI:
        wanted, found = [[name in row["label"] for name in names] for row in rows], (logits > 0).numpy()
        expected = {f"eval_{a}_f1": f1_score(wanted, found, average=a, zero_division=0) for a in ("micro", "macro")}
        expected["eval_accuracy"] = accuracy_score(wanted, found)
    else:
        wanted, found = [row["score"] for row in rows], logits[:, 0].double().numpy()
        expected = dict(eval_pearson=pearsonr(wanted, found).statistic)
        expected["eval_rmse"] = root_mean_squared_error(wanted, found)
    assert {name: last[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    intervals = {name: value for name, value in last.items() if name.endswith("_interval")}
    assert intervals and all(low <= last[name[:-9]] <= high for name, (low, high) in intervals.items())
    assert "eval_perplexity" not in last and len(validations) == 3
    for name in "23":
        (row,) = [row for row in logged(tmp_path / name)[1] if row["step"] == last["step"]]
        scores = {key: value for key, value in row.items() if key not in intervals}
        assert scores == pytest.approx({key: last[key] for key in scores}, rel=1e-4)
