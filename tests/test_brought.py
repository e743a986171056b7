"""Data as people bring them, through whole runs: the same for any number of processes, shown, saved, asked again."""

import json
import shutil

import pytest
from real_run import make_config
from test_checkpoints import run_train
from texts import write_jsonl
from transformers import AutoTokenizer

import train
from fsdp_utils.core.errors import DataError, UserError
from fsdp_utils.core.flags import parse
from fsdp_utils.folders.describe import describe, tokenizer_of
from fsdp_utils.inference.asking import make_asking
from fsdp_utils.inference.config import EvalConfig

pytestmark = pytest.mark.versions

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def brought(tmp_path):
    """Chats, and questions with other names and a row that cannot be read."""
    chats = [[dict(role="user", content=f"u{i}"), dict(role="assistant", content="a" * i)] for i in range(1, 9)]
    write_jsonl(tmp_path / "chats.jsonl", [{"messages": messages, "id": i} for i, messages in enumerate(chats)])
    write_jsonl(tmp_path / "asked.jsonl", [{"ask": f"q{i}", "reply": "r" * i} for i in range(9)])
    with open(tmp_path / "asked.jsonl", "a") as file:
        file.write('{"ask": "q"}\n')
    (tmp_path / "template.jinja").write_text(CHATML)
    (tmp_path / "prompt.txt").write_text("Q: {question}\nA: ")
    return dict(
        dataset=f"{tmp_path}/chats.jsonl:0.5,{tmp_path}/asked.jsonl:0.5",
        columns="question=ask,answer=reply",
        chat_template=tmp_path / "template.jinja",
        skip_bad_rows=True,
    )


@pytest.mark.parametrize("packing", [False, True])
def test_two_processes_equal_one(pair, flags, brought, tmp_path, packing):
    """A mixture of chats and questions, with a row that is left out: each step's loss is that of one process."""
    given = (
        flags(train_type="custom_lora")
        | brought
        | dict(max_steps=4, packing=packing, context_length=80, lora_dropout=0.0)
    )
    run_train(output_dir=tmp_path / "1", **given | dict(batch_size=4))
    pair.run(run_train, output_dir=tmp_path / "2", **given | dict(batch_size=2))
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in "12"
    ]
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_shown_instead_of_trained(tiny, brought, tmp_path, capsys):
    """--show_rows reads no weight and writes nothing; what is learned stands between brackets."""
    base = shutil.copytree(tiny(), tmp_path / "base")
    (base / "model.safetensors").unlink()
    config = make_config(model_name=base, output_dir=tmp_path / "out", show_rows=16, context_length=96, **brought)
    train.main(config)
    shown = capsys.readouterr().out
    assert "assistant\n⟦aaa<|im_end|>⟧\n" in shown and "###Answer:\n⟦rr" in shown and "rr</s>⟧" in shown
    assert f"mixture: 8 of 8 rows of {tmp_path}/chats.jsonl, 8 of 10 rows of {tmp_path}/asked.jsonl" in shown
    assert "not read: id (8 rows)" in shown and " tokens:" in shown
    assert not (tmp_path / "out").exists()


def test_templates_go_with_the_result(flags, brought, tmp_path, monkeypatch):
    """The chat template is saved in the tokenizer; evaluate.py asks as it was trained, though the file is gone before
    the run has ended."""
    given = flags(train_type="custom_lora") | brought | dict(max_steps=1, save_model=True, output_dir=tmp_path / "out")
    prompt, mixed = tmp_path / "prompt.txt", dict(dataset=tmp_path / "chats.jsonl", columns="messages=messages")
    run_train(**given | mixed)
    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert saved.get_chat_template() == CHATML
    asked = dict(dataset=tmp_path / "asked.jsonl", prompt_template=prompt, overwrite=True, chat_template="")
    monkeypatch.setattr(train, "plan", lambda *args, plan=train.plan, **more: (prompt.unlink(), plan(*args, **more))[1])
    run_train(**given | asked)
    assert not prompt.exists()
    run = describe(tmp_path / "out")
    asking = [f"--dataset={tmp_path}/asked.jsonl", "--samples=9"]
    config = parse(EvalConfig, asking, prog="evaluate.py")
    with pytest.raises(UserError, match="row 1: has no answer"):
        make_asking(config, run, tokenizer_of(run))
    write_jsonl(tmp_path / "asked.jsonl", [{"ask": "q", "reply": "r"}])
    assert make_asking(config, run, tokenizer_of(run)).questions[0].prompt == "Q: q\nA: "


def test_what_is_trained_on_does_not_validate(flags, tmp_path, tiny_data):
    """Under another name either."""
    copy = shutil.copy(tiny_data, tmp_path / "copy.jsonl")
    with pytest.raises(DataError, match=r"--eval_dataset .*copy\.jsonl: is what is trained on"):
        train.main(make_config(**flags(train_type="custom_lora", eval_dataset=copy, output_dir=tmp_path / "out")))
