"""Scores of classification and sequence-to-sequence models: those of scikit-learn, sacrebleu and rouge-score, whatever
the batches and processes; and what evaluate.py makes of saved runs."""

import json
import math
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from peft import PeftModel
from real_run import set_json
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.scoring import BootstrapAggregator
from sacrebleu.metrics import BLEU
from safetensors.torch import load_file, save_file
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, root_mean_squared_error
from test_checkpoints import bytes_of, run_train
from test_validation import logged
from tiny_tasks import SEQ2SEQ, labelled_rows, make_task_model, source_rows, write_rows
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)

import evaluate
from evaluate import EvalConfig
from fsdp_utils.core.errors import UserError
from fsdp_utils.core.flags import parse
from fsdp_utils.data.labels import MULTI, REGRESSION, SINGLE, Labels
from fsdp_utils.inference import seq2seq
from fsdp_utils.training import sinks
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
            given = dict(train_type="full", batch_size=8, num_epochs=2, lora_dropout=0.0, context_length=64, lr=2e-3)
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


def test_bootstrap_of_other_labels():
    """F1 of lists of labels and the error of scores have the quantiles of scores of rows drawn with replacement; what
    batches say has the scores alone."""
    f1 = lambda right, either: np.divide(2 * right, either, out=np.zeros_like(either), where=either > 0)
    both = lambda given, wanted: ((given * wanted).sum(-2), given.sum(-2) + wanted.sum(-2))  # [..., labels]
    statistics = {
        (MULTI, "micro_f1"): lambda given, wanted: f1(*(part.sum(-1) for part in both(given, wanted))),
        (MULTI, "macro_f1"): lambda given, wanted: f1(*both(given, wanted)).mean(-1),
        (REGRESSION, "rmse"): lambda given, wanted: np.sqrt(((given - wanted) ** 2).mean((-1, -2))),
    }
    for (kind, name), statistic in statistics.items():
        logits, targets = drawn(kind, 120, 4 if kind == MULTI else 1)
        predicted, asked = SCORES[kind].predicted(logits), ~targets.isnan().any(1)
        found = SCORES[kind].of_rows(predicted, targets, outputs=logits.shape[1])
        given, wanted = (column[asked].double().numpy() for column in (predicted, targets))
        picks = np.random.default_rng(7).integers(0, len(wanted), (2000, len(wanted)))
        low, high = np.quantile(statistic(given[picks], wanted[picks]), [0.025, 0.975])
        assert found[f"{name}_interval"] == pytest.approx((low, high), abs=0.1 * (high - low))
        assert found[name] == pytest.approx(statistic(given, wanted)) and low < found[name] < high
        points = in_parts(kind, logits, targets, size=40)
        assert points[name] == pytest.approx(found[name]) and f"{name}_interval" not in points


def test_bootstrap_of_texts():
    """ROUGE and BLEU have the intervals that rouge-score and sacrebleu draw themselves."""
    words = np.random.default_rng(0)
    targets = [" ".join(words.choice([*"abcdef"], 12)) for _ in range(60)]
    said = [" ".join(w if words.random() < 0.7 else "x" for w in target.split()) for target in targets]
    found = seq2seq.rouge(said, targets) | seq2seq.bleu(said, targets)
    theirs = BLEU().corpus_score(said, [targets], n_bootstrap=1000)
    low, high = found["bleu_interval"]
    assert found["bleu"] == theirs.score and (high - low) / 2 == pytest.approx(theirs._ci, rel=0.1)
    assert (high + low) / 2 == pytest.approx(theirs._mean, abs=0.2 * theirs._ci)
    aggregated = BootstrapAggregator()
    for one, target in zip(said, targets, strict=True):
        aggregated.add_scores(RougeScorer(seq2seq.ROUGES).score(target, one))
    for name, limits in aggregated.aggregate().items():
        low, high = limits.low.fmeasure, limits.high.fmeasure
        assert found[f"{name}_interval"] == pytest.approx((low, high), abs=0.1 * (high - low))
        assert found[name] == pytest.approx(limits.mid.fmeasure, abs=0.1 * (high - low))
    assert seq2seq.bleu(["a"], ["b"])["bleu_interval"] == (0, 0)


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


def test_seq2seq_validation(pair, model_of, tmp_path):
    """Loss is the mean over the decoder's tokens, and exact match the share of targets that `generate` gives, by
    transformers; for one and two processes."""
    rows = [dict(source="a", target="b")] * 12 + [dict(source="c" * n, target="d" * n) for n in range(8, 12)]
    asked = [dict(source="a", target="b"), dict(source="c" * 9, target="e"), dict(source="zz", target="b d")]
    given = dict(dataset=write_rows(tmp_path / "train.jsonl", rows), model_name=model_of("t5"), train_type="full")
    given |= dict(eval_dataset=write_rows(tmp_path / "asked.jsonl", asked), eval_generate=3, lr=0.02, num_epochs=3)
    run_train(output_dir=tmp_path / "1", **given | dict(batch_size=4))
    pair.run(run_train, output_dir=tmp_path / "2", **given | dict(batch_size=2))
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "1").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "1")
    total, tokens, right = 0.0, 0, 0
    for row in asked:
        ids, labels = (torch.tensor([tokenizer(row[name])["input_ids"]]) for name in ("source", "target"))
        with torch.no_grad():
            total += model(input_ids=ids, labels=labels).loss.item() * labels.numel()
        tokens += labels.numel()
        made = model.generate(input_ids=ids, max_new_tokens=labels.numel(), do_sample=False)[0, 1:]
        right += made.tolist() == labels[0].tolist()
    for name in "12":
        (found,) = logged(tmp_path / name)[1]
        assert found["eval_loss"] == pytest.approx(total / tokens, rel=1e-4) and found["eval_tokens"] == tokens
        assert found["eval_perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-3)
        assert found["eval_exact_match"] == right / 3 and 0 < right < 3


def test_intervals_are_logged():
    """Lines say both ends; what draws curves is given them by themselves."""
    row = dict(step=3, eval_accuracy=0.5, eval_accuracy_interval=(0.25, 0.75))
    assert sinks.shown(row) == "step=3 eval_accuracy=0.5 eval_accuracy_interval=0.25:0.75"
    assert sinks.apart(row) == dict(
        step=3, eval_accuracy=0.5, eval_accuracy_interval_low=0.25, eval_accuracy_interval_high=0.75
    )


# ---------------------------------------------------------------------------------------------------------------------
# evaluate.py
# ---------------------------------------------------------------------------------------------------------------------


def config_of(folder, data, output, **more) -> EvalConfig:
    given = dict(model=folder, dataset=data, output_file=output, max_new_tokens=12, batch_size=4)
    given |= dict(device="cpu", dtype="fp32") | more
    if given.pop("task", None):  # a classifier's
        given.pop("max_new_tokens")
    return parse(EvalConfig, [f"--{name}={value}" for name, value in given.items()], prog="evaluate.py")


def result_of(folder, data, output, **more) -> dict:
    """What evaluate.py writes."""
    evaluate.main(config_of(folder, data, output, **more))
    return json.loads(output.read_text())


def without_times(result: dict) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in ("seconds", "peak_memory_gib")} for row in result["results"]]


CLASSES = dict(task="sequence_classification")


def with_peft(folder, *, load):
    """Stock PEFT's adapter on transformers' base."""
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    return PeftModel.from_pretrained(load(base), folder)


def classifier(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, num_labels=3)


@pytest.mark.parametrize("family", ["roberta", "llama_base"])
@pytest.mark.parametrize("kind", ["full", "adapter", "merged", "nf4", "foreign"])
def test_classification_is_that_of_stock(trained, data_of, export, tmp_path, family, kind):
    """Probabilities are those of transformers or PEFT with the same folder, one row at a time; scores follow from them,
    and so do those of the other batch sizes."""
    rows, data = rows_of_kind(SINGLE, 11, seed=5), data_of(SINGLE, 11, seed=5)
    folder = trained(family, train_type="full" if kind in ("full", "nf4") else "custom_lora")
    load, names = classifier, ("sports", "tech", "world")
    if kind == "merged":
        folder = export(folder, "merged", dtype="fp32")
    elif kind == "nf4":
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        quantized = AutoModelForSequenceClassification.from_pretrained(
            folder, quantization_config=quantization, dtype=torch.float32
        )
        quantized.save_pretrained(tmp_path / "nf4")
        AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "nf4")
        folder = tmp_path / "nf4"
    elif kind in ("adapter", "foreign"):
        load = partial(with_peft, load=classifier)
    if kind == "foreign":  # made by PEFT alone: its labels have no names
        folder = shutil.copytree(folder, tmp_path / "foreign")
        (folder / "run.json").unlink()
        names = ("LABEL_0", "LABEL_1", "LABEL_2")
        numbered = [row | dict(label=sorted({"sports", "tech", "world"}).index(row["label"])) for row in rows]
        data = write_rows(tmp_path / "numbered.jsonl", numbered)
    found = result_of(folder, data, tmp_path / "found.json", **CLASSES)
    expected = stock_outputs(folder, rows, load=load).softmax(1)
    chances = torch.tensor([row["probabilities"] for row in found["results"]])
    torch.testing.assert_close(chances, expected, atol=1e-4, rtol=0)
    given = [names[i] for i in expected.argmax(1)]
    wanted = [names[("sports", "tech", "world").index(row["label"])] for row in rows]
    assert [row["prediction"] for row in found["results"]] == given and found["labels"] == list(names)
    assert [row["answer"] for row in found["results"]] == wanted
    assert found["score"] == accuracy_score(wanted, given) and found["total"] == 11
    assert found["metrics"]["macro_f1"] == pytest.approx(f1_score(wanted, given, average="macro"))
    assert found["metrics"]["matthews"] == pytest.approx(matthews_corrcoef(wanted, given))
    for name in ("macro_f1", "matthews"):
        low, high = found["metrics"][f"{name}_interval_95"]
        assert low <= found["metrics"][name] <= high
    if kind == "full":
        single = result_of(folder, data, tmp_path / "single.json", batch_size=1, **CLASSES)
        assert single["metrics"] == found["metrics"] and single["score"] == found["score"]


@pytest.mark.parametrize("kind", [MULTI, REGRESSION])
def test_other_labels(trained, data_of, tmp_path, kind, capsys):
    """Several labels and a score: what scikit-learn and SciPy say of transformers' outputs."""
    folder, rows = trained("roberta", kind), rows_of_kind(kind, 11, seed=5)
    found = result_of(folder, data_of(kind, 11, seed=5), tmp_path / "found.json", **CLASSES)
    logits, scores = stock_outputs(folder, rows), found["metrics"]
    if kind == MULTI:
        names = found["labels"]
        wanted, given = [[name in row["label"] for name in names] for row in rows], (logits > 0).numpy()
        assert found["score"] == accuracy_score(wanted, given)
        for average in ("micro", "macro"):
            expected = f1_score(wanted, given, average=average, zero_division=0)
            assert scores[f"{average}_f1"] == pytest.approx(expected)
            low, high = scores[f"{average}_f1_interval_95"]
            assert low <= expected <= high
        chances = torch.tensor([row["probabilities"] for row in found["results"]])
        torch.testing.assert_close(chances, logits.sigmoid(), atol=1e-4, rtol=0)
        return
    wanted, given = [row["score"] for row in rows], logits[:, 0].double().numpy()
    expected = pearsonr(given, wanted)
    assert found["score"] == pytest.approx(expected.statistic, abs=1e-4)
    assert found["interval_95"] == pytest.approx(tuple(expected.confidence_interval()), abs=1e-3)
    assert scores["rmse"] == pytest.approx(root_mean_squared_error(wanted, given), rel=1e-4)
    assert scores["rmse_interval_95"][0] < scores["rmse"] < scores["rmse_interval_95"][1]
    assert "correct" not in found and "Pearson's correlation" in capsys.readouterr().out


def test_pairs_of_texts(tmp_path):
    """Both texts of a pair are read, with the types that the tokenizer gives them, and longer rows are cut, as in
    training."""
    base = make_task_model(tmp_path / "bert", "bert")
    set_json(base / "tokenizer_config.json", model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    rows = labelled_rows(24, pairs=True)
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    given = dict(model_name=base, lr=1e-3, dataset=data, task="sequence_classification", context_length=24)
    run_train(**given, output_dir=tmp_path / "run", train_type="full", num_epochs=1, lora_dropout=0.0)
    found = result_of(tmp_path / "run", data, tmp_path / "found.json", **CLASSES)
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path / "run"), classifier(tmp_path / "run").eval()
    for row, answered in zip(rows, found["results"], strict=True):
        both = (row["text"], row["text_pair"])
        inputs = tokenizer(*both, truncation=True, max_length=24, return_tensors="pt")
        assert inputs["token_type_ids"].unique().tolist() == [0, 1]
        with torch.no_grad():
            expected = model(**inputs).logits.softmax(-1)[0]
        torch.testing.assert_close(torch.tensor(answered["probabilities"]), expected, atol=1e-4, rtol=0)
        assert answered["question"] == "\n".join(both)


def test_classification_goes_on_and_is_shared(trained, data_of, pair, tmp_path, interrupt_evaluation):
    """An interrupted evaluation answers only the rest, and two processes come to the numbers of one."""
    folder, data = trained("roberta"), data_of(SINGLE, 11, seed=5)
    expected = result_of(folder, data, tmp_path / "one.json", **CLASSES)
    pair.run(evaluate.main, config_of(folder, data, tmp_path / "two.json", **CLASSES))
    two = json.loads((tmp_path / "two.json").read_text())
    asked = interrupt_evaluation(at=6)
    with pytest.raises(KeyboardInterrupt):
        result_of(folder, data, tmp_path / "again.json", **CLASSES)
    again = result_of(folder, data, tmp_path / "again.json", **CLASSES)
    assert len(asked) == 12
    for found in (two, again):
        assert (found["score"], found["metrics"]) == (expected["score"], expected["metrics"])
        for one, other in zip(without_times(found), without_times(expected), strict=True):
            assert one.pop("probabilities") == pytest.approx(other.pop("probabilities"), abs=1e-5)
            assert one == other


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize("kind", ["full", "adapter", "merged", "nf4"])
def test_generation_is_that_of_stock(trained, data_of, export, tmp_path, family, kind):
    """Targets are those that transformers' `generate` gives of the same folder, one source at a time."""
    rows, data = source_rows(5, seed=5), data_of("pairs", 5, seed=5)
    folder = trained(family, train_type="full" if kind in ("full", "nf4") else "custom_lora")
    plain = partial(AutoModelForSeq2SeqLM.from_pretrained, dtype=torch.float32)
    load = partial(with_peft, load=plain) if kind == "adapter" else plain
    if kind == "merged":
        folder = export(folder, "merged", dtype="fp32")
    elif kind == "nf4":
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        AutoModelForSeq2SeqLM.from_pretrained(
            folder, quantization_config=quantization, dtype=torch.float32
        ).save_pretrained(tmp_path / "nf4")
        AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "nf4")
        folder = tmp_path / "nf4"
    found = result_of(folder, data, tmp_path / "found.json")
    model, tokenizer = load(folder).eval(), AutoTokenizer.from_pretrained(folder)
    for row, answered in zip(rows, found["results"], strict=True):
        ids = torch.tensor([tokenizer(row["source"])["input_ids"]])
        made = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, num_beams=1)
        assert answered["prediction"] == tokenizer.decode(made[0], skip_special_tokens=True).strip()
        assert (answered["question"], answered["answer"]) == (row["source"], row["target"])
    if kind == "full":
        single = result_of(folder, data, tmp_path / "single.json", batch_size=1)
        assert [row["prediction"] for row in without_times(single)] == [row["prediction"] for row in found["results"]]
        sampled = result_of(folder, data, tmp_path / "sampled.json", temperature=5.0)
        assert [row["prediction"] for row in sampled["results"]] != [row["prediction"] for row in found["results"]]


def test_rouge_and_bleu(trained, data_of, pair, tmp_path, monkeypatch):
    """The definitions: shares of words, pairs of words and longest common subsequences; BLEU of the paper's formula.
    Two processes and question/answer files come to the same."""
    said, targets = ["the cat sat on the mat", "a b c d e"], ["the cat lay on the mat", "a b c d"]
    one, two, longest = 2 * 5 / 12 / 2 + 8 / 9 / 2, 2 * 3 / 10 / 2 + 6 / 7 / 2, 2 * 5 / 12 / 2 + 8 / 9 / 2
    found = seq2seq.rouge(said, targets)
    assert [found[name] for name in seq2seq.ROUGES] == pytest.approx([one, two, longest])
    precisions = np.array([9 / 11, 6 / 9, 3 / 7, 1 / 5])  # of words in rows of one, two, three and four
    assert seq2seq.bleu(said, targets)["bleu"] == pytest.approx(100 * np.exp(np.log(precisions).mean()))
    assert seq2seq.bleu(targets, targets)["bleu"] == pytest.approx(100)
    folder, data = trained("t5"), data_of("pairs", 5, seed=5)
    alone = result_of(folder, data, tmp_path / "one.json")
    pair.run(evaluate.main, config_of(folder, data, tmp_path / "two.json"))
    together = json.loads((tmp_path / "two.json").read_text())
    assert together["metrics"] == alone["metrics"] and without_times(together) == without_times(alone)
    assert alone["metrics"]["bleu_signature"].startswith("nrefs:1|case:mixed") and alone["score"] == 0
    assert {f"{name}_interval_95" for name in (*seq2seq.ROUGES, "bleu")} < alone["metrics"].keys()
    asked = [dict(question=row["source"], answer=row["target"]) for row in source_rows(3, seed=5)]
    written = result_of(folder, write_rows(tmp_path / "asked.jsonl", asked), tmp_path / "asked.json")
    assert [row["answer"] for row in written["results"]] == [row["answer"] for row in asked]
    assert written["results"][0]["tokens"] <= 12


def test_input_that_cannot_be_scored(trained, model_of, data_of, tmp_path, capsys):
    """An unknown label, a model without a head, rows of another kind, and flags that mean nothing: a line each."""
    run, data, output = trained("roberta"), data_of(SINGLE, 11, seed=5), tmp_path / "x.json"
    unknown = write_rows(tmp_path / "unknown.jsonl", [*labelled_rows(2), dict(text="a", label="weather")])
    with pytest.raises(UserError, match=r"unknown.jsonl.*3: label 'weather' is not known; there are sports, tech"):
        result_of(run, unknown, output, **CLASSES)
    with pytest.raises(UserError, match="has no head that classifies"):
        result_of(model_of("roberta"), data, output, **CLASSES)
    with pytest.raises(UserError, match="--dataset orca_math: has no rows for a model that transformers classifies"):
        result_of(run, "orca_math", output, **CLASSES)
    with pytest.raises(UserError, match="unknown columns"):
        result_of(run, data_of("pairs"), output, **CLASSES)
    for flags in (dict(n_shots=2), dict(temperature=0.5), dict(prompt="chat"), dict(backend="vllm"), dict(seed=1)):
        ((name, value),) = flags.items()
        with pytest.raises(UserError, match=f"--{name} {value}: means nothing to a model that"):
            result_of(run, data, output, **CLASSES, **flags)
    with pytest.raises(UserError, match="--server http://localhost:1: means nothing to a sequence-to-sequence model"):
        result_of(trained("t5"), data_of("pairs"), output, server="http://localhost:1")
    with pytest.raises(UserError, match="--max_new_tokens 600: the model's decoder has 512 positions"):
        result_of(trained("bart"), data_of("pairs"), output, max_new_tokens=600)
    result_of(run, data, output, task="sequence_classification", temperature=0)
    assert "note: --temperature: without effect" in capsys.readouterr().out


def test_a_head_that_is_missing_is_refused(trained, data_of, tmp_path):
    """A result whose head was lost would answer at random."""
    folder = shutil.copytree(trained("roberta"), tmp_path / "headless")
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("classifier")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="no tensor for classifier"):
        result_of(folder, data_of(SINGLE, 11, seed=5), tmp_path / "x.json", **CLASSES)


def test_scores_are_named_as_they_are_written():
    """Not with the digits that fp32 adds to them."""
    labels = Labels(REGRESSION)
    for score in (4.1, -0.3, 1e-3, 1234.567):
        assert labels.named([np.float32(score).item()]) == score
