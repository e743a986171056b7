"""The benchmarks measure ours and a peer that trains the same thing, on the tiny shape and a CPU."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from commands import torchrun
from peft import get_peft_model_state_dict

from benchmarks import components, first_minutes, implementations, recipes, throughput
from benchmarks.common import SHAPES, Run, make_config, write_config
from benchmarks.peer import PeerRun, parse_peers
from fsdp_utils.config import TrainConfig
from fsdp_utils.core.errors import UserError
from fsdp_utils.core.flags import parse
from fsdp_utils.core.folders import read_rows

CPU = torch.device("cpu")


def test_table_with_a_peer(tmp_path, capsys, monkeypatch):
    """Ours and PEFT's rows in one table and file, with as many trained parameters, then their ratios."""
    path, train_types = tmp_path / "rows.jsonl", ["custom_qlora", "bnb_dora", "hqq_lora"]
    flags = ["--rows=1x16:ckpt", f"--train_types={','.join(train_types)}", "--extra=device=cpu", f"--json={path}"]
    throughput.main(
        throughput.parse_arguments(["--shape=tiny", "--layers=1", "--peer=peft", "--sustained=0.05", *flags])
    )
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    pairs = [(row["train_type"], row["peer"]) for row in rows]
    assert pairs == [(t, p) for t in train_types for p in (None, "peft")][:-1]
    for ours, peer in (rows[:2], rows[2:4]):
        assert ours.keys() == peer.keys()
        assert ours["trained"] == peer["trained"] > 0
        assert ours["rows"] == peer["rows"] and ours["floor_s"] == peer["floor_s"]
    shown = [line for line in capsys.readouterr().out.splitlines() if "ours ÷ peft" in line]
    assert [line.split()[0] for line in shown] == train_types[:2]
    assert f"{rows[0]['tokens_s'] / rows[1]['tokens_s']:.2f} in tokens/s" in shown[0]


def measure_beside_alone(flags: list[str]) -> None:
    throughput.main(throughput.parse_arguments(["--shape=tiny", "--layers=1", "--sustained=0.05", *flags]))


def test_two_processes_beside_each_alone(pair, tmp_path):
    """Sharded, then whole in each process; both count the slowest, so both processes agree."""
    path = tmp_path / "rows.jsonl"
    train_types = ["hqq_lora", "full"]  # of no peer
    flags = ["--rows=1x16:ckpt", f"--train_types={','.join(train_types)}", "--extra=device=cpu", f"--json={path}"]
    pair.run(measure_beside_alone, [*flags, "--peer=alone"])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["train_type"], row["peer"]) for row in rows] == [(t, p) for t in train_types for p in (None, "alone")]
    assert all(row["processes"] == 2 and row["step_s"] > 0 for row in rows)
    assert all(ours["trained"] == alone["trained"] for ours, alone in (rows[:2], rows[2:]))


@pytest.mark.parametrize("train_type", ["custom_qlora", "bnb_dora", "lora", "dora"])
def test_peer_is_the_same_model(tmp_path, train_type):
    """The same base, quantized alike (equal logits while B is zero), and adapters of the same names and shapes."""
    folder = write_config("tiny", tmp_path, num_hidden_layers=1)
    config = make_config(folder, train_type=train_type, device="cpu")
    ours, peer = Run(config), PeerRun(config, peer="peft")
    mine = {f"base_model.model.{name}": t.shape for name, t in ours.plan.method.tensors(ours.model)}
    assert {name: t.shape for name, t in get_peft_model_state_dict(peer.model).items()} == mine
    assert {p.dtype for p in peer.model.parameters() if p.requires_grad} == {torch.bfloat16}
    ids = torch.arange(16).view(1, 16)
    torch.testing.assert_close(peer.model(input_ids=ids).logits, ours.model(input_ids=ids, use_cache=False).logits)
    peer.close()
    ours.close()


def test_peer_that_cannot_run(monkeypatch):
    """Every wrong name, missing package and missing GPU is one line that names the flag."""
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError) as error:
        parse_peers("peft,liger,pefd", device=CPU)
    package, gpu, unknown = str(error.value).splitlines()
    assert package.startswith("--peer peft: ") and "pip install peft" in package
    assert gpu.startswith("--peer liger: ") and "GPU" in gpu
    assert unknown == "--peer pefd: choose from peft, liger, alone"
    with pytest.raises(UserError, match=r"--peer alone: .* torchrun"):
        parse_peers("alone", device=CPU)


def test_components(tmp_path, capsys, monkeypatch):
    """Each component is a row beside its baseline; what cannot run here says why in its row, and the table goes on."""
    monkeypatch.setitem(SHAPES, "tiny", dict(SHAPES["tiny"], num_hidden_layers=1, vocab_size=128))
    few = [
        dict(),
        dict(optimizer="paged_adamw"),
        dict(optimizer="sgd", optimizer_in_backward=True),
        dict(compile=False),
    ]
    monkeypatch.setattr(components, "FULL", [components.Component(flags) for flags in few])
    path = tmp_path / "rows.jsonl"
    small = ["--shape=tiny", "--full_shape=tiny", "--rows=2x16", f"--json={path}"]
    components.main(components.parse_arguments([*small, "--tables=full", "--only=optimizer"]))
    base, paged, in_backward = rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert base["tokens_s"] > 0 and "GPU" in paged["failed"] and in_backward["tokens_s"] > 0
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(shown) == len(rows) + 1 and all(line.count("|") == 6 for line in shown)
    components.main(components.parse_arguments([*small, "--tables=adapters", "--only=accumulation"]))
    alone, four, one_row = [json.loads(line) for line in path.read_text().splitlines()][3:]
    assert "gradient_accumulation_steps 4" in four["component"] and "one row" in one_row["component"]
    assert four["step_s"] > alone["step_s"]


@pytest.mark.parametrize("train_type", ["custom_lora", "bnb_dora"])
def test_implementations_at_equal_loss(tmp_path, capsys, train_type):
    """PEFT's loss is ours at every step, from the same start on the same rows; what is not installed is said."""
    path = tmp_path / "rows.jsonl"
    flags = [f"--train_type={train_type}", "--steps=6", f"--json={path}"]
    implementations.main(implementations.parse_arguments([*flags, "--extra=precision=fp32,device=cpu,lr=1e-3"]))
    ours, peft, torchtune = (json.loads(line) for line in path.read_text().splitlines())
    assert ours["losses"][0] > ours["losses"][-1] + 0.1
    assert peft["losses"] == pytest.approx(ours["losses"], abs=2e-4)
    assert "failed" in torchtune or torchtune["losses"] == pytest.approx(ours["losses"], abs=2e-4)
    assert f"| PEFT + bitsandbytes | {peft['losses'][0]:.4f} |" in capsys.readouterr().out


@pytest.fixture
def few(tmp_path):
    path = tmp_path / "few.jsonl"
    path.write_text('{"question": "1 + 1?", "answer": "2"}\n')
    return path


def test_recipes_run(tmp_path, monkeypatch):
    """What came out of the demo's recipe, on two processes, is a row; one for more GPUs than there are says so."""
    path = tmp_path / "rows.jsonl"
    words = ["--device=cpu", "--steps=2", f"--json={path}", f"--logs={tmp_path}", "--only=demo"]
    ran = lambda words, **_: torchrun(*words[words.index("train.py") :], scratch=tmp_path)  # by a fork
    monkeypatch.setattr(recipes.subprocess, "run", ran)
    recipes.main(recipes.parse_arguments(words))
    (demo,) = (json.loads(line) for line in path.read_text().splitlines())
    assert demo["recipe"] == "demo" and demo["gpus"] == 2 and demo["tokens_per_s"] > 0 and demo["peak_gib"] > 0
    assert "step=2 " in (tmp_path / "demo.log").read_text()
    (tmp_path / "again").mkdir()
    found = recipes.run(recipes.RECIPES[0].with_name("demo.yaml"), recipes.parse_arguments(words), tmp_path / "again",
                        recipes.Cards(1))  # fmt: skip
    assert found == dict(recipe="demo", failed="needs 2 GPUs")


def test_recipes_are_told_what_to_run_on(tmp_path, few):
    """Of each the flags without its own data and folders, and rows with the columns that it reads."""
    args = recipes.parse_arguments([f"--data={few}", "--steps=3"])
    for path in recipes.RECIPES:
        _, (_, written) = recipes.prepared(path, args, tmp_path)
        config = parse(TrainConfig, ["--config", written], prog="train.py")
        assert config.max_steps == 3 and not config.save_model and str(tmp_path) in config.output_dir
        if config.model_name != "demo":
            (row,) = read_rows(Path(config.dataset))
            assert config.load_format == "dummy" and row
    assert set(read_rows(tmp_path / "chat" / "rows.jsonl")[0]) == {"messages"}
    assert set(read_rows(tmp_path / "flan_t5" / "rows.jsonl")[0]) == {"source", "target"}


def test_first_minutes(tmp_path):
    """Lines get the seconds at which they came; which steps were waited for follows from those."""
    words = [sys.executable, "-c", "print('loading'); print('step=1 loss=2', flush=True); print('step=2 loss=1')"]
    ends, said = first_minutes.timed(words, os.environ)
    assert len(ends) == 2 and 0 < ends[0] <= ends[1] and said.count("\n") == 3
    with pytest.raises(UserError, match=r"the run failed:\n.*no such thing"):
        first_minutes.timed([sys.executable, "-c", "print('no such thing')"], os.environ)
    args = first_minutes.parse_arguments(["--extra=batch_size=1", "--processes=2"])
    *start, _ = first_minutes.command(args, tmp_path)
    assert "--nproc_per_node" in start
    words = [word for word in first_minutes.command(args, tmp_path) if word.startswith("--") and "=" in word]
    assert parse(TrainConfig, words, prog="train.py").batch_size == 1
    ends, said = [9.0, 12.0, 13.0, 18.0, 19.0, 20.0, 21.0], "9.0 step=1 compiled=True\n18.0 step=4 x=1 compiled=True\n"
    found = first_minutes.summary(ends, said)
    assert (found["waited_at"], found["steady_after_s"], found["step_s"]) == ([2, 4], 18.0, 1.0)
    assert found["waited_s"] == 6.0 and found["marked"] == [1, 4]
