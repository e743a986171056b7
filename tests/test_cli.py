"""Bad input through the real command: one line, exit code 2 on every process, no weight read, nothing written."""

import contextlib
import io
import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import REPOSITORY, TRAIN, error_lines, forked, free_port, torchrun
from safetensors.torch import load_file, save_file
from tiny import SHAPE, byte_tokenizer
from transformers import Llama4TextConfig

import train
from fsdp_utils.config import TrainConfig
from fsdp_utils.core import ranks
from fsdp_utils.core.errors import UserError
from fsdp_utils.core.flags import parse_or_fail
from fsdp_utils.core.processes import launch
from fsdp_utils.model import assemble


class Exit(BaseException):
    """Stands for the end of the process."""


def refused(argv: list[str], gpus: int | None = None) -> tuple[int, str, bool]:
    """`train.py argv` in this process: its exit code, what it wrote to stderr, and whether it read a weight."""
    read, errors = [], io.StringIO()

    def leave(code):
        raise Exit(code)

    with contextlib.ExitStack() as stack:

        def replace(owner, name, value):
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)

        replace(os, "_exit", leave)
        replace(sys, "argv", ["train.py", *argv])
        replace(ranks, "FAIL_GRACE_SECONDS", 0)
        replace(assemble, "load_weights", lambda *args, **kwargs: read.append(True))
        if gpus is not None:
            replace(torch.cuda, "is_available", lambda: True)
            replace(torch.cuda, "device_count", lambda: gpus)
        stack.enter_context(contextlib.redirect_stderr(errors))
        try:
            launch(train.main, parse_or_fail(TrainConfig, prog="train.py"))
        except Exit as end:
            return end.args[0], errors.getvalue(), bool(read)
    return 0, errors.getvalue(), bool(read)


@pytest.fixture
def refuse(pair, tiny, tiny_data, tmp_path):
    """`refuse(words, **flags)` asserts that both processes end with 2 and one line that has all the words."""

    def check(*words, processes=pair.run, flags=(), **settings):
        output = tmp_path / "out"
        defaults = dict(
            model_name=tiny(), dataset=tiny_data, train_type="qlora", device="cpu", precision="fp32", output_dir=output
        )
        argv = [f"--{k}={v}" for k, v in {**defaults, **settings}.items()]
        for code, stderr, read in processes(refused, [*argv, *flags]):
            (line,) = error_lines(stderr)
            assert code == 2
            assert "Traceback" not in stderr
            assert not read
            for word in words:
                assert str(word) in line
        assert not output.exists()

    return check


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--train_type=bnb_lora"], ["--train_type bnb_lora", "did you mean bnb_dora"]),
        (["--trian_type=qlora"], ["--trian_type", "did you mean --train_type"]),
        (["--lora_rank=0"], ["--lora_rank 0", "at least 1"]),
        (["--lr=nan"], ["--lr nan", "finite"]),
        (["--lr=1e400"], ["--lr inf", "finite"]),
        (["--n_bits=3"], ["--n_bits 3", "hqq_"]),
        (["--train_type=hqq_lora", "--n_bits=6"], ["--n_bits 6", "8, 4, 3, 2, 1"]),
        (["--lora_target_modules=q_prj"], ["--lora_target_modules q_prj", "q_proj"]),
        (["--lora_target_modules=,"], ["--lora_target_modules ,", "q_proj"]),
        (["--quant_group_size=128"], ["--quant_group_size 128", "in_features 64", "q_proj"]),
        (["--sharding_strategy=hybrid_full_shard", "--hybrid_shard_size=4"], ["--hybrid_shard_size 4", "2 processes"]),
        (["--batch_size=9"], ["16 samples", "global batch of 18", "2 processes"]),
        (["--packing=true", "--batch_size=9"], ["packs", "global batch of 18"]),
        (["--device=cuda"], ["--device cuda", "no CUDA"]),
        (["--attn_implementation=flesh_attention"], ["--attn_implementation flesh_attention"]),
        (["--max_steps=0"], ["--max_steps 0", "-1"]),
    ],
    ids=str,
)
def test_flags(refuse, flags, words):
    """Every wrong flag of the list, and what only the model or the data can tell."""
    refuse(*words, flags=flags)


QA = '{"question": "a", "answer": "b"}\n'
BAD_DATA = {
    "malformed": ("d.jsonl", QA + '{"question": "a", \n', ["d.jsonl, line 2", "malformed JSON"]),
    "not an object": ("d.jsonl", QA + "[1]\n", ["d.jsonl, line 2", "object"]),
    "null field": ("d.jsonl", QA + '{"question": null, "answer": "b"}\n', ["d.jsonl, line 2", "question"]),
    "empty": ("d.jsonl", "", ["d.jsonl", "no rows"]),
    "blank lines": ("d.json", "\n\n", ["d.json", "no rows"]),
    "unknown columns": ("d.jsonl", '{"foo": "a", "bar": "b"}\n', ["d.jsonl", "bar, foo", "question, answer"]),
    "one row": ("d.jsonl", QA, ["1 samples", "global batch of 2"]),
    "no parquet": ("d.parquet", "nothing", ["d.parquet", "cannot be read"]),
    "unknown kind": ("d.xlsx", "a,b\n", ["d.xlsx", "unknown kind"]),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_datasets(refuse, tmp_path, case):
    """Each kind of bad dataset names the file, and the line where there is one."""
    name, content, words = BAD_DATA[case]
    (tmp_path / name).write_text(content)
    refuse(*words, dataset=tmp_path / name)


def test_missing_dataset(refuse, tmp_path):
    """A file that is not there, and a misspelled name."""
    refuse("--dataset", "no.jsonl", "no such file", dataset=tmp_path / "no.jsonl")
    refuse("--dataset alpca", "did you mean alpaca", dataset="alpca")


def test_samples_without_labels(refuse, tiny, tmp_path, pair):
    """One sample whose labels are all masked is dropped and counted; if it is every one, that is the error."""
    rows = [dict(question="q" * 200, answer="a"), *[dict(question="q", answer="a")] * 4]
    some, every = tmp_path / "some.jsonl", tmp_path / "every.jsonl"
    some.write_text("".join(json.dumps(row) + "\n" for row in rows))
    every.write_text((json.dumps(rows[0]) + "\n") * 4)
    refuse("every.jsonl", "4 samples", "--context_length 64", dataset=every, context_length=64)
    # four are left: too few for 2 x 4, enough for 2 x 2
    refuse("4 samples", "global batch of 8", dataset=some, context_length=64, batch_size=4)


def damaged(tiny, folder: Path, damage) -> Path:
    shutil.copytree(tiny(), folder)
    damage(folder)
    return folder


def _only_bin(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _truncate(folder):
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(10_000)


def _index(folder, shard):
    names = load_file(folder / "model.safetensors").keys()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))


def _change(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def _edit_config(folder, **more):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **more}))


UP = "model.layers.1.mlp.up_proj.weight"
DAMAGES = {
    "only pickles": (_only_bin, [".bin", "safetensors"]),
    "truncated": (_truncate, ["model.safetensors", "truncated"]),
    "missing shard": (lambda f: _index(f, "model-1-of-2.safetensors"), ["model-1-of-2.safetensors", "missing"]),
    "path outside": (lambda f: _index(f, "../other/model.safetensors"), ["../other/model.safetensors", "outside"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["no model.safetensors"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["--model_name"]),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("tok*")], ["--model_name", "tokenizer"]),
    "missing tensor": (lambda f: _change(f, lambda w: w.pop(UP)), ["no tensor", UP]),
    "superfluous tensor": (lambda f: _change(f, lambda w: w.update(extra=w[UP].clone())), ["extra", "nothing"]),
    "other shape": (lambda f: _change(f, lambda w: w.update({UP: w[UP][:-1].clone()})), [UP, "(127, 64)", "(128, 64)"]),
    "more layers": (lambda f: _edit_config(f, num_hidden_layers=3), ["no tensor", "layers.2"]),
    "small vocabulary": (lambda f: _edit_config(f, vocab_size=200), ["vocabulary", "200 rows", "257"]),
    "quantized already": (
        lambda f: _edit_config(f, quantization_config={"quant_method": "awq", "bits": 4}),
        ["--model_name", "quantized already, with awq", "16-bit model"],
    ),
    "not causal": (lambda f: _edit_config(f, model_type="vit"), ["--model_name", "not a causal language model"]),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_models(refuse, tiny, tmp_path, case):
    """Each kind of bad model folder names the file or the flag."""
    damage, words = DAMAGES[case]
    refuse(*words, model_name=damaged(tiny, tmp_path / "model", damage))


def test_missing_model(refuse, tmp_path):
    """Neither a folder nor, without a network, a hub name."""
    refuse("--model_name", "no/such-model", model_name="no/such-model")
    refuse("--model_name", tmp_path / "none", "no such folder", model_name=tmp_path / "none")
    refuse("--model_name", "./none", "no such folder", model_name="./none")


@pytest.mark.parametrize("train_type", ["bnb_dora", "full"])
def test_experts(refuse, tmp_path, train_type):
    """Experts that are built as no other family's are refused, never trained half-quantized."""
    shape = SHAPE | dict(head_dim=16, intermediate_size_mlp=64, num_local_experts=2, moe_layers=[1])
    Llama4TextConfig(**shape).save_pretrained(tmp_path / "moe")
    byte_tokenizer().save_pretrained(tmp_path / "moe")
    refuse("experts", "not supported", model_name=tmp_path / "moe", train_type=train_type)


def test_llama_pro_paths(refuse, tiny):
    """Llama-Pro without its folder, and with one that was never expanded."""
    refuse("--llama_pro_path", "block_expansion.py", train_type="bnb_llama_pro")
    refuse("--llama_pro_path", "expanded_layers.json", train_type="bnb_llama_pro", llama_pro_path=tiny())


def test_output_that_is_there(pair, tiny, tiny_data, tmp_path):
    """A folder with a result is refused before anything, and stays as it is."""
    (tmp_path / "adapter_config.json").write_text("{}")
    argv = [f"--model_name={tiny()}", f"--dataset={tiny_data}", f"--output_dir={tmp_path}", "--device=cpu"]
    argv += ["--save_model=true"]
    for code, stderr, read in pair.run(refused, argv):
        assert (code, read) == (2, False)
        assert error_lines(stderr) == [
            f"error: --output_dir {tmp_path}: exists and is not empty; choose another or pass --overwrite true"
        ]
    assert [p.name for p in tmp_path.iterdir()] == ["adapter_config.json"]


def test_more_processes_than_gpus(refuse, pair):
    """Both processes say so where one GPU is visible: the first must not wait for the second."""
    run = lambda function, argv: pair.run(function, argv, gpus=1)
    refuse("2 processes but 1 visible GPU", processes=run, device="auto")


def test_bf16_without_hardware(tiny, monkeypatch):
    """--precision bf16 on a GPU that has none is refused, with the way out."""
    from real_run import make_config, plan

    monkeypatch.setattr(assemble, "_has_bf16", lambda: False)
    for precision in ("bf16", "bf16_autocast", "bf16_buffers_autocast"):
        with pytest.raises(UserError, match=f"--precision {precision}: this GPU has no bf16; use fp16"):
            plan(make_config(model_name=tiny(), precision=precision), device=torch.device("cuda"))


def test_torchrun_says_it_once(tmp_path):
    """Under torchrun a wrong command line is one line for each wrong flag, from one process, and a non-zero exit."""
    done = torchrun(TRAIN, "--lora_rank=0", "--lr=nan", f"--output_dir={tmp_path / 'out'}", scratch=tmp_path, anew=True)
    assert done.returncode != 0
    assert [line.split(":")[1] for line in error_lines(done.stderr)] == [" --lora_rank 0", " --lr nan"]
    assert not (tmp_path / "out").exists()


def test_spawned_processes_say_it_once(tiny, tmp_path):
    """So do the processes that plain python starts, and its own exit code is 2."""
    flags = dict(model_name=tiny(), dataset=tmp_path / "no.jsonl", device="cpu", world_size=2, master_port=free_port())
    flags |= dict(output_dir=tmp_path / "out")
    done = forked([TRAIN, *(f"--{k}={v}" for k, v in flags.items())], tmp_path)
    assert done.returncode == 2, done.stderr
    assert len(error_lines(done.stderr)) == 1 and "no.jsonl" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_process_that_raises_ends_the_run(tiny, tiny_data, tmp_path):
    """An exception in process 1 at step 2 ends both within a minute, with its traceback; the run is not finished."""
    script = tmp_path / "broken.py"
    script.write_text(
        "import train\n"
        "from fsdp_utils.core.flags import parse_or_fail\n"
        "from fsdp_utils.core.ranks import rank\n"
        "from fsdp_utils.training.step import TrainStep\n"
        "from fsdp_utils.core import processes\n"
        "steps, backward = iter(range(9)), TrainStep.backward\n"
        "def failing(*args, **kwargs):\n"
        "    if next(steps) == 1 and rank() == 1:\n"
        "        raise RuntimeError('planted in process 1')\n"
        "    return backward(*args, **kwargs)\n"
        "TrainStep.backward = failing\n"
        "processes.launch(train.main, parse_or_fail(train.TrainConfig, prog='train.py'))\n"
    )
    flags = dict(model_name=tiny(), dataset=tiny_data, device="cpu", precision="fp32", output_dir=tmp_path / "out")
    begun = time.perf_counter()
    words = [script, *(f"--{k}={v}" for k, v in flags.items())]
    done = torchrun(*words, scratch=tmp_path, PYTHONPATH=str(REPOSITORY))
    assert done.returncode != 0
    assert "RuntimeError: planted in process 1" in done.stderr and "Traceback" in done.stderr
    assert time.perf_counter() - begun < 60
    assert json.loads((tmp_path / "out/run.json").read_text())["finished"] is False
