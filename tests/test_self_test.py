"""scripts/self_test.py: it passes where all is right, and says so where something is not."""

import json
import subprocess

import pytest
import torch
from safetensors.torch import load_file
from tiny_tasks import make_task_model
from transformers import BertConfig

import train
from fsdp_utils.config import TrainConfig
from fsdp_utils.core.errors import UserError
from fsdp_utils.core.flags import parse
from fsdp_utils.model.build import resolve_model
from scripts import self_test


def run(words: list[str]) -> None:
    """What train.py does, in this process."""
    train.main(parse(TrainConfig, words, prog="train.py"))


@pytest.fixture
def launches(pair, monkeypatch):
    """Runs of train.py start no process, and may be changed: `launches(change)`, which is given name and words."""

    def use(change=lambda name, words: words):
        def launched(words, *, processes):
            (output,) = [word for word in words if word.startswith("--output_dir=")]
            words = change(output.rpartition("/")[2], words)
            pair.run(run, words) if processes > 1 else run(words)
            return subprocess.CompletedProcess(words, 0, stdout="", stderr="")

        monkeypatch.setattr(self_test, "launched", launched)
        monkeypatch.setattr(self_test, "STEPS", 2)

    return use


@pytest.mark.parametrize("train_type", ["bnb_dora", "full"])
def test_all_is_right(launches, capsys, train_type):
    """Processes, code and what was saved agree; memory is skipped with its reason where there is no GPU."""
    launches()
    self_test.main(self_test.SelfTest(train_type=train_type, blocks=1, context_length=64, device="cpu"))
    said = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line[:4] in ("pass", "FAIL", "skip")]
    assert said == ["pass", "pass", "pass", "skip"]


@pytest.mark.parametrize(("wrong", "line"), [("several", "1 process and 2"), ("plain", "fast and plain code")])
def test_what_is_wrong_is_found(launches, capsys, wrong, line):
    """A run that learns at a rate 1 % off differs by more than is allowed."""
    launches(lambda name, words: [*words, "--lr=0.05"] if name == wrong else words)
    with pytest.raises(UserError, match="1 of the checks failed"):
        self_test.main(self_test.SelfTest(blocks=1, context_length=64, device="cpu"))
    assert f"FAIL  {line}" in capsys.readouterr().out


def test_a_cut_model_is_the_first_blocks(tmp_path):
    """Its weights are the model's own, and nothing of later blocks is left."""
    folder = self_test.cut("demo", 1, tmp_path / "cut")
    whole = load_file(f"{resolve_model('demo')}/model.safetensors")
    kept = load_file(folder / "model.safetensors")
    assert all(torch.equal(whole[name], tensor) for name, tensor in kept.items())
    left = whole.keys() - kept.keys()
    assert left and all(".layers." in name and ".layers.0." not in name for name in left)


def test_without_weights_there_is_nothing_to_test(tmp_path):
    """One line says what to name."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="has no safetensors"):
        self_test.cut(str(tmp_path / "model"), 1, tmp_path / "cut")


def test_nothing_is_dropped_in_a_cut_model(tmp_path):
    """Processes draw numbers of their own: with T5's dropout two of them differed from one on a healthy machine."""
    folder = self_test.cut(str(make_task_model(tmp_path / "t5", "t5")), 1, tmp_path / "cut")
    assert json.loads((folder / "config.json").read_text())["dropout_rate"] == 0.0


@pytest.mark.parametrize(("config", "said"), [
    (dict(processes=1), "--processes 1: one is compared with several"),
    (dict(train_type="bnb_llama_pro"), "needs an expanded model"),
])  # fmt: skip
def test_what_cannot_be_compared(config, said):
    """A line before anything runs."""
    (found,) = self_test.SelfTest(**config).errors()
    assert said in found


def test_a_classifier_is_not_tried(tmp_path):
    """The demo's questions are not for it."""
    BertConfig(architectures=["BertForSequenceClassification"]).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match="is for sequence_classification"):
        self_test.cut(str(tmp_path), 1, tmp_path / "cut")
