"""Classification and sequence-to-sequence models: any number of processes, any sharding and stock libraries come to the
same numbers."""

import inspect
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from closeness import assert_close, assert_close_norm, assert_learns
from commands import REPOSITORY, error_lines, forked
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from real_run import batches_of, first_step, make_config, off_zero, plan, prepared, save_trained, task_in
from safetensors.torch import save_file
from test_checkpoints import bytes_of, interrupted, refused, rows_of, run_train
from tiny import byte_tokenizer
from tiny_tasks import CLASSIFYING, DECODERS, ENCODERS, SEQ2SEQ, labelled_rows, make_task_model, source_rows, write_rows
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer, BertConfig, T5Config

import train
from benchmarks.published import FLAN_T5_SMALL
from fsdp_utils.core.errors import UserError
from fsdp_utils.data.coded import EndPooledRows, _Ids
from fsdp_utils.data.labels import BadLabel, find_labels, written
from fsdp_utils.export import format_of
from fsdp_utils.folders.describe import describe
from fsdp_utils.inference.load import load_for_inference
from fsdp_utils.tasks import named_task, task_of_model
from fsdp_utils.tasks.causal_lm import CAUSAL_LM
from fsdp_utils.training.step import TrainStep
from methods import TRAIN_TYPES
from methods.targets import decoder_blocks

KEY_BIASES = ("key.bias", "k_proj.bias", "k_lin.bias", "key_proj.bias")
PRO = [name for name in TRAIN_TYPES if "llama_pro" in name]
KINDS = [name for name in TRAIN_TYPES if name not in PRO]
AUTO = dict.fromkeys([*ENCODERS, *DECODERS, *CLASSIFYING], AutoModelForSequenceClassification) | dict.fromkeys(
    SEQ2SEQ, AutoModelForSeq2SeqLM
)


@pytest.fixture(scope="session")
def task_flags(tmp_path_factory):
    """`task_flags("roberta", **more)`: the flags of a run of that family's task."""
    root, made = tmp_path_factory.mktemp("tasks"), {}
    data = {
        "sequence_classification": write_rows(root / "labelled.jsonl", labelled_rows()),
        "seq2seq_lm": write_rows(root / "sources.jsonl", source_rows()),
    }
    pairs = write_rows(root / "pairs.jsonl", labelled_rows(pairs=True))

    def flags(family, **more):
        if family not in made:
            made[family] = make_task_model(root / family, family)
        task = "seq2seq_lm" if family in SEQ2SEQ else "sequence_classification"
        rows = pairs if family == "bert" else data[task]  # whose second text has types of its own
        return dict(model_name=made[family], dataset=rows, task=task, batch_size=8, **more)

    return flags


@pytest.mark.parametrize(
    ("family", "train_type"),
    [
        *(("roberta", train_type) for train_type in KINDS[::4]),
        *(("t5", train_type) for train_type in ("qlora", "bnb_dora")),
        *((family, "full") for family in ("bert", "distilbert", "t5gemma", "bart", "llama_base")),
        *((family, "bnb_dora") for family in ("deberta", "modernbert", "t5gemma")),
        *((family, "hqq_dora") for family in ("bart", "pegasus", "llama_base")),
    ],
)
def test_two_processes_equal_one(pair, one_process, task_flags, family, train_type):
    """Loss and gradients, those of the new head included."""
    flags = task_flags(family, train_type=train_type)
    alone = but_keys(one_process(flags))
    assert_learns(alone)
    for step in pair.run(first_step, {**flags, "batch_size": 4}):
        assert_close(but_keys(step), alone, relative=2e-5)


def but_keys(step):
    """A step without the gradients of biases of keys: a softmax does not see them, so they are rounding."""
    loss, gradients = step
    return loss, {name: g for name, g in gradients.items() if not name.endswith(KEY_BIASES)}


WAYS = [
    dict(use_cpu_offload=True),
    dict(use_gradient_checkpointing=False),
    dict(reentrant_checkpointing=True),
    dict(checkpoint_policy="narrow"),
    dict(peer_gather=True),
    dict(sharding_strategy="ddp"),
    dict(sharding_strategy="shard_grad_op"),
    dict(sharding_strategy="hybrid_full_shard", hybrid_shard_size=1),
    dict(fused_loss=False),
    dict(fused_kernels=False),
    dict(batch_size=2, gradient_accumulation_steps=2),
]


@pytest.mark.parametrize(
    ("family", "how"),
    [*(("t5", how) for how in WAYS), *(("roberta", how) for how in WAYS[::3]), *(("bart", how) for how in WAYS[1::3])],
    ids=str,
)
def test_every_way_equals_one_process(pair, one_process, task_flags, family, how):
    """Checkpointing, offload, sharding and the plain definitions."""
    flags = task_flags(family, train_type="bnb_dora")
    for step in pair.run(first_step, {**flags, "batch_size": 4, **how}):
        assert_close(step, one_process(flags), relative=2e-5)


@pytest.mark.parametrize(
    ("family", "train_type"),
    [("roberta", "full"), ("t5", "full"), ("t5", "custom_qlora"), ("llama_base", "custom_qlora")],
)
def test_bf16(pair, one_process, task_flags, family, train_type):
    """In 16 bits, to their own precision; T5 keeps some projections in fp32 where it must."""
    flags = task_flags(family, train_type=train_type, precision="bf16")
    alone = one_process(flags)
    assert_close_norm(
        (alone[0], but_keys(alone)[1]), but_keys(one_process(flags | dict(precision="fp32"))), relative=0.2
    )
    for step in pair.run(first_step, {**flags, "batch_size": 4}):
        assert_close_norm(but_keys(step), but_keys(alone), relative=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("family", ["roberta", "bert", "deberta", "modernbert", "t5", "bart", "llama_base"])
def test_gpu(one_process, task_flags, family, compiled):
    """Loss and gradients of a CPU, from eager and from compiled blocks."""
    flags = task_flags(family, train_type="bnb_dora")
    found = first_step({**flags, "device": "cuda", "compile": compiled})
    assert_close_norm(found, one_process(flags), relative=1e-2)


def test_goes_on_from_an_adapter(task_flags, tmp_path):
    """--init_adapter takes the head too: the first loss is lower than from the start."""
    flags = task_flags("roberta", train_type="bnb_dora", lr=0.01)
    assert run_train(**flags | dict(output_dir=tmp_path / "first", num_epochs=4)) == 0
    assert run_train(**flags | dict(output_dir=tmp_path / "second", init_adapter=tmp_path / "first", max_steps=1)) == 0
    first, second = (rows_of(tmp_path / name) for name in ("first", "second"))
    assert second[0]["loss"] < 0.3 * first[0]["loss"]


def stock_loss(model, batch) -> torch.Tensor:
    """The mean loss as transformers computes it of what its own collators would make."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}
    return model(**inputs, labels=batch.get("labels", batch["targets"])).loss


@pytest.mark.parametrize("family", ["roberta", "deberta", "bert", "llama_base", "t5", "bart", "t5gemma"])
@pytest.mark.parametrize("train_type", ["custom_lora", "dora"])
def test_parity_with_peft(task_flags, family, train_type):
    """The same adapter and head in PEFT's model: loss and gradients."""
    config = make_config(**task_flags(family, train_type=train_type), lora_rank=4)
    run = off_zero(prepared(config))
    step = TrainStep(run, config, task=task_in(config))
    (batch,) = next(batches_of(config, run).first(1))
    loss = step.mean_loss(*step.backward([batch]))
    outputs = dict(num_labels=3) if config.task == "sequence_classification" else {}
    stock = AUTO[family].from_pretrained(config.source, dtype=torch.float32, **outputs)
    described = run.method.peft_config(run.model) | dict(lora_dropout=0.0, inference_mode=False)
    twin = get_peft_model(stock, LoraConfig(**described, task_type=task_in(config).peft_type)).train()
    start = {f"base_model.model.{name}": stored.whole().clone() for name, stored in run.method.tensors(run.model)}
    assert not set_peft_model_state_dict(twin, start).unexpected_keys
    wanted = stock_loss(twin, batch)
    wanted.backward()
    assert loss == pytest.approx(wanted.item(), rel=1e-5)
    gradients = {
        name.removeprefix("base_model.model.").replace(".modules_to_save.default", "").replace(".default", ""): p.grad
        for name, p in twin.named_parameters()
        if p.requires_grad
    }
    assert len(gradients) == sum(p.requires_grad for p in run.model.parameters())
    ours = {name: p.grad for name, p in run.model.named_parameters() if p.requires_grad}
    for name, gradient in gradients.items():
        mine = name.replace("lora_A.weight", "lora_A").replace("lora_B.weight", "lora_B")
        mine = mine.replace("lora_magnitude_vector.weight", "magnitude_delta")
        assert gradient.abs().max() > 0
        assert (ours[mine] - gradient).abs().max() < 1e-4 * gradient.abs().max(), name


@torch.no_grad()
def answers(model, batch) -> torch.Tensor:
    """Logits of a micro-batch."""
    inputs = {
        name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids", "labels") if name in batch
    }
    return model.eval()(**inputs).logits.float()


@pytest.mark.parametrize(
    ("family", "train_type"),
    [
        *((family, name) for family in ("roberta", "t5") for name in ("lora", "bnb_dora", "full")),
        *((family, "bnb_dora") for family in ("distilbert", "t5gemma")),
        *((family, name) for family in ("llama_base", "bart") for name in ("lora", "full")),
    ],
)
def test_saved_is_what_stock_loads(task_flags, tmp_path, family, train_type):
    """Adapters with their head by PEFT on the base that training used, models by transformers; and by this project."""
    flags = task_flags(family, train_type=train_type, save_model=True, output_dir=tmp_path / "run", lora_rank=4)
    config = make_config(**flags)
    model = save_trained(config)
    (batch,) = next(batches_of(config, prepared(make_config(**flags))).first(1))
    wanted = answers(model, batch)
    run = describe(tmp_path / "run")
    torch.testing.assert_close(
        answers(load_for_inference(run, device=torch.device("cpu")), batch), wanted, atol=1e-4, rtol=1e-4
    )
    if train_type == "bnb_dora":  # whose base is packed
        return
    if train_type == "full":
        stock = AUTO[family].from_pretrained(tmp_path / "run", dtype=torch.float32)
        if family not in SEQ2SEQ:
            assert stock.config.id2label == {0: "sports", 1: "tech", 2: "world"}
    else:
        outputs = dict(num_labels=3) if config.task == "sequence_classification" else {}
        stock = AUTO[family].from_pretrained(config.source, dtype=torch.float32, **outputs)
        stock = PeftModel.from_pretrained(stock, tmp_path / "run")
    torch.testing.assert_close(answers(stock, batch), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "train_type", "infer_type"),
    [
        *(("roberta", "custom_lora", "merged"), ("t5", "bnb_dora", "merged")),
        *(("llama_base", "bnb_dora", "bnb_nf4"), ("t5", "bnb_dora", "bnb_nf4")),
    ],
)
def test_exports(task_flags, tmp_path, family, train_type, infer_type, monkeypatch):
    """What transformers reads of a merged folder answers as the run; of a 4-bit one, nearly so."""
    import prepare_weights
    from fsdp_utils.core.flags import parse
    from fsdp_utils.export.config import ExportConfig

    flags = task_flags(family, train_type=train_type, save_model=True, output_dir=tmp_path / "run", lora_rank=4)
    config = make_config(**flags)
    model = save_trained(config)
    (batch,) = next(batches_of(config, prepared(make_config(**flags))).first(1))
    given = dict(
        model=tmp_path / "run", save_dir=tmp_path / "export", infer_type=infer_type, dtype="fp32", device="cpu"
    )
    prepare_weights.main(parse(ExportConfig, [f"--{k}={v}" for k, v in given.items()], prog="prepare_weights.py"))
    report = json.loads((tmp_path / "export/fidelity.json").read_text())
    assert report["exported"]["kl"] < (1e-6 if infer_type == "merged" else 0.5)
    if infer_type == "merged":
        stock = AUTO[family].from_pretrained(tmp_path / "export", dtype=torch.float32)
        torch.testing.assert_close(answers(stock, batch), answers(model, batch), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("infer_type", ["w4a16", "bnb_dora"])
def test_exports_that_are_for_language_models(task_flags, tmp_path, infer_type):
    config = make_config(**task_flags("roberta", train_type="bnb_dora", save_model=True, output_dir=tmp_path / "run"))
    save_trained(config)
    from fsdp_utils.export.config import ExportConfig
    from fsdp_utils.export.trained import TrainedWeights

    trained = TrainedWeights(describe(tmp_path / "run"), device=torch.device("cpu"))
    with pytest.raises(UserError, match="export it by --infer_type merged or bnb_nf4"):
        format_of(infer_type)(trained, ExportConfig(model="", save_dir="", infer_type=infer_type))


@pytest.mark.parametrize(("family", "train_type"), [("t5", "custom_qlora"), ("llama_base", "full")])
def test_resume(pair, task_flags, tmp_path, family, train_type):
    """In the middle of an epoch, with dropout: byte for byte."""
    flags = task_flags(family, train_type=train_type) | dict(batch_size=2, num_epochs=2)
    assert pair.run(run_train, output_dir=tmp_path / "whole", **flags) == [0, 0]
    interrupted(pair, tmp_path / "parts", at=5, **flags)
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")
    assert rows_of(tmp_path / "parts") == rows_of(tmp_path / "whole")


def test_rows_are_shown(task_flags, capsys):
    """With their label, or the target marked as learned."""
    assert run_train(**task_flags("roberta"), show_rows=1) == 0
    assert f"</s> ⟦{labelled_rows()[0]['label']}⟧" in capsys.readouterr().out
    assert run_train(**task_flags("t5"), show_rows=1) == 0
    shown = capsys.readouterr().out
    first = source_rows()[0]
    assert f"{first['source']}</s>⟦{first['target']}</s>⟧" in shown


@pytest.mark.parametrize("family", ["roberta", "t5"])
def test_no_new_blocks_in_encoders(task_flags, tmp_path, family):
    """Neither trained nor made."""
    flags = task_flags(family, train_type="llama_pro") | dict(llama_pro_path=task_flags(family)["model_name"])
    assert "--train_type llama_pro: new blocks are added to decoders" in refused(**flags, output_dir=tmp_path / "out")
    script = REPOSITORY / "scripts/block_expansion.py"
    made = forked([script, "--model_name", flags["model_name"], "--output_dir", tmp_path / "pro"], tmp_path)
    assert made.returncode == 2 and not (tmp_path / "pro").exists()
    assert len(error_lines(made.stderr)) == 1, made.stderr


def test_what_auto_takes(task_flags, tmp_path, capsys):
    """The architecture decides; of a language model, the columns."""
    for family, wanted in (
        ("roberta", "sequence_classification"),
        ("t5", "seq2seq_lm"),
        ("llama_base", "sequence_classification"),
    ):
        flags = task_flags(family, max_steps=1, output_dir=tmp_path / family) | dict(task="auto")
        assert run_train(**flags) == 0
        assert f"task: {wanted}" in capsys.readouterr().out
        assert json.loads((tmp_path / family / "run.json").read_text())["flags"]["task"] == wanted
    text = task_flags("llama_base", max_steps=1, output_dir=tmp_path / "text") | dict(task="causal_lm")
    assert run_train(**text) == 0
    assert "not read: label" in capsys.readouterr().out


ROWS = labelled_rows(8)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([*ROWS, dict(text="goal", label=3)], "line 9: labels are numbers in some rows and names in others"),
        ([*ROWS, dict(text="goal", label=["tech"])], "line 9: some labels are lists and others are not"),
        ([dict(text="a", label="x")] * 8, "all rows have the label 'x'"),
        ([*ROWS, dict(text="  ", label="tech")], "line 9: field 'text' is empty"),
        ([*ROWS, dict(text="goal")], "line 9: field 'label' is missing or null"),
        ([*ROWS, dict(text="goal", label=0.5)], "line 9: label 0.5 is no class"),
        ([*[dict(text="a", score=0.5)] * 8, dict(text="a", score="high")], "line 9: score 'high' is no number"),
        ([dict(question="a", answer="b")] * 8, "unknown columns answer, question"),
        ([dict(text="a", label=[0, 0, 1]), dict(text="b", label=[1])], "line 1: label [0, 0, 1] says 0 or 1 of every"),
        ([dict(text="a", label=["x"])] * 8, "all rows have the label ['x']"),
        ([dict(text="a", label=[])] * 8, "all rows have the label []"),
        ([*[dict(text="a", label=i % 2) for i in range(4)], dict(text="b", label=-1)], "line 5: label -1: in many"),
        ([*ROWS, dict(text="goal", label="Tech")], "line 9: label 'Tech' is 'tech' in another row"),
    ],
    ids=str,
)
def test_bad_labels(task_flags, tmp_path, rows, said):
    """One line with file and row, before any weight is read."""
    flags = task_flags("roberta") | dict(dataset=write_rows(tmp_path / "bad.jsonl", rows))
    message = refused(**flags, output_dir=tmp_path / "out")
    assert said in message and "bad.jsonl" in message and len(message.splitlines()) == 1, message


@pytest.mark.parametrize("other", ["World", "WORLD news", "world  news", "world\tNews"])
def test_labels_that_are_hardly_two(other):
    """Of names that differ in case or white space alone, the later is refused, single or in a list; white space around
    a name is none of it, and numbers are no names."""
    of = lambda *labels: find_labels([written(dict(label=label), "label") for label in labels], scored=False)
    first = "world news" if " " in other or "\t" in other else "world"
    for labels in ((first, "tech", other), ([first], ["tech", other])):
        with pytest.raises(BadLabel, match=re.escape(f"label {other!r} is {first!r} in another row")):
            of(*labels)
    assert of(f" {other}\n", other, "tech").names == of(other, "tech").names
    assert of("1", "2").names == ("1", "2")


def test_bart_takes_no_end_within_a_text(task_flags, tmp_path):
    """transformers' refuses a batch whose rows have not as many ends of sequence; the row is named instead, before a
    weight is read, and may be left out. An encoder takes it, and T5Gemma."""
    rows = [*ROWS, dict(text="<s>goal</s>", label="tech")]
    data = write_rows(tmp_path / "ends.jsonl", rows)
    flags = task_flags("bart") | dict(task="sequence_classification", dataset=data, output_dir=tmp_path / "out")
    said = "ends.jsonl, line 9: field 'text' holds </s>, the token by which this model classifies; correct or remove"
    message = refused(**flags)
    assert said in message and "--skip_bad_rows true" in message and len(message.splitlines()) == 1
    model = AutoModelForSequenceClassification.from_pretrained(flags["model_name"])
    tokenizer = AutoTokenizer.from_pretrained(flags["model_name"])
    inputs = lambda rows: tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    with pytest.raises(ValueError, match="same number of <eos> tokens"):
        model(**inputs(rows))
    model(**inputs(ROWS))
    samples = lambda family: train.read_inputs(make_config(**flags | dict(model_name=task_flags(family)["model_name"])))
    assert len(samples("roberta")[3]) == len(samples("t5gemma")[3]) == 9
    flags["skip_bad_rows"] = True
    assert len(samples("bart")[3]) == 8


def test_who_classifies_by_the_end_of_sequence():
    """Of every family that transformers classifies with, those whose code looks for that token."""
    mapping = AutoModelForSequenceClassification._model_mapping
    for config in mapping:
        looks = "config.eos_token_id" in inspect.getsource(mapping[config].forward)
        assert (named_task("sequence_classification").coder_for(config()) is EndPooledRows) == looks, config


@torch.no_grad()
def test_t5gemma_sees_a_row_to_its_end(task_flags):
    """Beside longer rows, as the longest, and alone, its logits are the same; without padding behind the longest row,
    the stock model gives that one others."""
    config = make_config(**task_flags("t5gemma"))
    task, model = task_in(config), prepared(config).model.eval()
    rows = [(np.arange(n), np.array([0])) for n in (3, 5, 9)]
    shape = dict(packing=False, targets_multiple=1, pad_token_id=task.pad, multiple=1, context_length=0)
    batch = task.collate(rows, **shape)
    together = answers(model, batch).log_softmax(-1)
    for row, wanted in zip(rows, together, strict=True):
        alone, _ = task.predictions(model, *map(torch.tensor, row))
        torch.testing.assert_close(alone[0], wanted, atol=1e-5, rtol=1e-5)
    stock = answers(model, {name: batch[name][:, :9] for name in ("input_ids", "attention_mask")}).log_softmax(-1)
    torch.testing.assert_close(stock[:2], together[:2], atol=1e-5, rtol=1e-5)
    assert (stock[2] - together[2]).abs().max() > 1e-3


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("template", ["$A </s> $B:1 </s>:1", "<s> $A </s> </s> $B </s>", "$A $B"])
def test_rows_are_cut_as_the_tokenizer_cuts(template, side):
    """Ids and types of one and two texts of every length, which hold special tokens too."""
    tokenizer = byte_tokenizer()
    tokenizer.truncation_side, tokenizer.model_input_names = side, ["input_ids", "token_type_ids"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template.partition(" $B")[0], pair=template, special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    texts = ["a", *("abc</s>defghijk"[:n] for n in range(7, 16))]
    both = [(one, other[::-1]) for one in texts for other in texts]
    for longest in (5, 6, 10):
        ids = _Ids(tokenizer, context_length=longest)
        for given in ([one for one, _ in both],), tuple(map(list, zip(*both, strict=True))):
            columns, cut = ids(*given)
            assert columns == dict(tokenizer(*given, truncation=True, max_length=longest))
            assert cut == [len(row) > longest for row in tokenizer(*given)["input_ids"]] and any(cut)


def test_a_long_pair_is_cut_at_once():
    """The tokenizer's own truncation takes most of a minute for a fifth of it."""
    columns, cut = _Ids(byte_tokenizer(), context_length=128)(["a" * 100_000], ["b" * 100_000])
    assert columns["input_ids"] == [byte_tokenizer()("a" * 64 + "b" * 64)["input_ids"]] and cut == [True]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([*source_rows(8), dict(source="a", target=" ")], "line 9: field 'target' is empty"),
        ([*source_rows(8), dict(source="a")], "line 9: field 'target' is missing or null"),
        ([*source_rows(8), dict(source="", target="b")], "line 9: field 'source' is empty"),
        ([dict(text="a")] * 8, "unknown columns text"),
    ],
    ids=str,
)
def test_bad_pairs(task_flags, tmp_path, rows, said):
    flags = task_flags("t5") | dict(dataset=write_rows(tmp_path / "bad.jsonl", rows))
    message = refused(**flags, output_dir=tmp_path / "out")
    assert said in message and "bad.jsonl" in message and len(message.splitlines()) == 1, message


def test_a_label_that_the_head_does_not_know(task_flags, tmp_path):
    """Of a model that was trained to classify, and of validation rows."""
    first = task_flags("roberta", train_type="full", output_dir=tmp_path / "first", max_steps=1)
    assert run_train(**first) == 0
    other = write_rows(tmp_path / "other.jsonl", [*labelled_rows(8), dict(text="vote", label="weather")])
    flags = first | dict(model_name=tmp_path / "first", dataset=other, output_dir=tmp_path / "second")
    assert "line 9: label 'weather' is not known; there are sports, tech, world" in refused(**flags)
    flags = first | dict(eval_dataset=other, output_dir=tmp_path / "third")
    assert "line 9: label 'weather' is not known" in refused(**flags)
    for row, said in (
        (dict(label=["tech"]), "line 1: label ['tech']: what is learned has one label a row"),
        (dict(score=0.5), "has scores, and what is learned is 3 classes: sports, tech, world"),
    ):
        rows = write_rows(tmp_path / "kind.jsonl", [dict(text="goal") | row] * 3)
        assert said in refused(**first | dict(eval_dataset=rows, output_dir=tmp_path / "fourth"))


def test_an_adapter_keeps_its_labels(task_flags, tmp_path, capsys):
    """--init_adapter: other labels are refused, some of them or their numbers are taken as what they are."""
    first = task_flags("roberta", train_type="lora", output_dir=tmp_path / "first", max_steps=1, save_model=True)
    assert run_train(**first) == 0
    on = first | dict(init_adapter=tmp_path / "first", output_dir=tmp_path / "second")
    other = write_rows(tmp_path / "other.jsonl", [dict(text="a", label=name) for name in ("art", "zoo") * 8])
    assert "line 1: label 'art' is not known; there are sports, tech, world" in refused(**on | dict(dataset=other))
    some = write_rows(tmp_path / "some.jsonl", [dict(text="a", label=n) for n in (2, 0) * 8])
    assert run_train(**on | dict(dataset=some)) == 0
    assert "the head has names: 0 = sports, 1 = tech, 2 = world" in capsys.readouterr().out
    record = json.loads((tmp_path / "second/run.json").read_text())
    assert record["task"]["labels"]["names"] == ["sports", "tech", "world"]


def test_sources_of_two_kinds(task_flags, tmp_path):
    """Labels in one and scores in the other would be learned as numbers alike."""
    one = write_rows(tmp_path / "one.jsonl", [dict(text="a", label=i % 2) for i in range(8)])
    two = write_rows(tmp_path / "two.jsonl", [dict(text="a", score=0.5)] * 8)
    flags = task_flags("roberta") | dict(dataset=f"{one},{two}", output_dir=tmp_path / "out")
    assert "one.jsonl has the column label, and" in refused(**flags)


def test_an_encoder_is_no_language_model(task_flags, tmp_path):
    """It would be trained on what it sees."""
    rows = write_rows(tmp_path / "rows.jsonl", [dict(text="a b c")] * 8)
    flags = task_flags("roberta") | dict(task="causal_lm", dataset=rows, output_dir=tmp_path / "out")
    assert "--task causal_lm: roberta models see their whole text" in refused(**flags)


@pytest.mark.parametrize("name", ["XLMWithLMHeadModel", "BertLMHeadModel", "RobertaForCausalLM", "BertForMaskedLM"])
def test_encoders_that_write(name):
    """`auto` and --task causal_lm take the same ones for language models."""
    config, model_config = make_config(), BertConfig(architectures=[name])
    if name == "BertForMaskedLM":
        assert task_of_model(model_config) == "sequence_classification"
        with pytest.raises(UserError, match="see their whole text"):
            CAUSAL_LM.check(config, model_config)
    else:
        assert task_of_model(model_config) == "causal_lm"
        CAUSAL_LM.check(config, model_config)


def test_flags_without_effect(capsys):
    """Said once a task is known, where they are given."""
    for task, flags in (("sequence_classification", ("train_on", "fused_loss")), ("seq2seq_lm", ("train_on",))):
        given = dict(train_on="all", fused_loss=True)
        named_task(task).check(make_config(**given), BertConfig())
        lines = capsys.readouterr().out.splitlines()
        assert [line.partition(" has no effect: --task ")[0] for line in lines] == [f"note: --{name}" for name in flags]
        named_task(task).check(make_config(), BertConfig())
        assert not capsys.readouterr().out


def test_a_plan_says_which_head_it_has(task_flags, capsys):
    """The number of outputs, and whether config.json says it."""
    classifies = named_task("sequence_classification")
    (said,) = classifies.assumed(BertConfig(num_labels=5))
    assert "a head of 5 outputs, by config.json" in said
    assert run_train(model_name=task_flags("roberta")["model_name"], plan=True, train_type="lora") == 0
    said, counted, *_ = capsys.readouterr().out.splitlines()[2:]  # behind a flag's note and what is new
    assert said == "note: a head of 2 outputs, as config.json names no labels; a run has one for each label of its rows"
    assert counted.startswith("trainable params: ")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (dict(packing=True), "--packing true: "),
        (dict(eval_generate=3, eval_samples=4), "--eval_generate 3: "),
    ],
    ids=str,
)
def test_flags_that_mean_nothing(task_flags, tmp_path, more, said):
    assert said in refused(**task_flags("roberta", **more), output_dir=tmp_path / "out")
    assert "--packing true: " in refused(**task_flags("t5", packing=True), output_dir=tmp_path / "out")


@pytest.mark.parametrize("kind", ["score", "lists", "numbers", "texts"])
def test_kinds_of_labels(task_flags, tmp_path, kind):
    """Scores, several labels, numbers that do not count from zero, and numbers as text: the head and its names, and a
    loss that falls."""
    value = {
        "score": lambda i: dict(score=i / 2),
        "lists": lambda i: dict(label=[["a"], ["b", "a"], []][i]),
        "numbers": lambda i: dict(label=[1, 3, 7][i]),
        "texts": lambda i: dict(label=str(i)),
    }[kind]
    rows = [dict(text=["goal", "vote", "chip"][i % 3]) | value(i % 3) for i in range(24)]
    flags = task_flags("roberta", train_type="full", output_dir=tmp_path / "run", num_epochs=8)
    assert run_train(**flags | dict(dataset=write_rows(tmp_path / "rows.jsonl", rows))) == 0
    config = json.loads((tmp_path / "run/config.json").read_text())
    names = list(config["id2label"].values())
    counted = ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert names == dict(score=counted[:1], lists=["a", "b"], numbers=["1", "3", "7"], texts=counted)[kind]
    losses = [row["loss"] for row in rows_of(tmp_path / "run")]
    assert losses[-1] < 0.5 * losses[0]
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run", dtype=torch.float32)
    assert stock.config.num_labels == len(names)


@pytest.mark.parametrize("family", [*ENCODERS, *DECODERS, *SEQ2SEQ, *CLASSIFYING])
def test_blocks_are_found_by_structure(task_flags, family):
    """Every layer of encoder and decoder, and nothing else."""
    model = plan(make_config(**task_flags(family))).model
    assert len(decoder_blocks(model)) == (4 if family in SEQ2SEQ | CLASSIFYING else 2)


PUBLISHED = {  # rank -> with the head tied, with a head of its own
    4: ("172,032 || all params: 60,683,648 ||", "172,032 || all params: 77,133,184 || trainable%: 0.2230\n"),
    8: ("344,064 || all params: 60,855,680 ||", "344,064 || all params: 77,305,216 || trainable%: 0.4451\n"),
    16: ("688,128 || all params: 61,199,744 ||", "688,128 || all params: 77,649,280 || trainable%: 0.8862\n"),
    32: ("1,376,256 || all params: 61,887,872 ||", "1,376,256 || all params: 78,337,408 || trainable%: 1.7568\n"),
}


def test_trainable_parameters_of_flan_t5_small(tmp_path, capsys):
    """As published, with LoRA on q and v: from the configuration alone, whose head transformers ties, and with a file
    that has a head of its own."""
    config = T5Config(**FLAN_T5_SMALL)
    config.architectures = ["T5ForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    flags = dict(model_name=tmp_path, plan=True, train_type="lora", lora_target_modules="q,v")
    for stored in (0, 1):
        for rank, wanted in list(PUBLISHED.items())[: 1 if stored else None]:
            assert run_train(**flags, lora_rank=rank) == 0
            assert f"trainable params: {wanted[stored]}" in capsys.readouterr().out
        with torch.device("meta"):
            shapes = {name: t.shape for name, t in AutoModelForSeq2SeqLM.from_config(config).state_dict().items()}
        tensors = {name: torch.zeros(shape) for name, shape in shapes.items() if "embed_tokens" not in name}
        save_file(tensors | {"lm_head.weight": torch.ones(shapes["lm_head.weight"])}, tmp_path / "model.safetensors")


@pytest.mark.parametrize("family", ["roberta", "bert", "bart", "t5", "llama"])
def test_rows_that_are_missing_count_nothing(task_flags, tiny, tiny_data, family):
    """Micro-batches that are filled up, as on a GPU, have the loss, the tokens and the scores of those that are not."""
    flags = dict(model_name=tiny("llama"), dataset=tiny_data) if family == "llama" else task_flags(family)
    config = make_config(**flags | dict(batch_size=7, train_type="full", precision="fp32"))
    ready = prepared(config)
    step, batches = TrainStep(ready, config, task=task_in(config)), batches_of(config, ready)
    (*_, last), (*_, filled) = (list(which.steps(0)) for which in (batches, replace(batches, fewest=7)))
    assert len(last[0]["input_ids"]) < 7 == len(filled[0]["input_ids"])
    ours, wanted = (step.loss_over(found) for found in (filled, last))
    assert ours.tokens == wanted.tokens > 0
    torch.testing.assert_close(torch.tensor(ours.total), torch.tensor(wanted.total), rtol=1e-6, atol=1e-6)
    assert torch.equal(ours.sums, wanted.sums)
    step.close()


@pytest.mark.parametrize("more", [{}, dict(optimizer_in_backward=True)], ids=["after", "in backward"])
@pytest.mark.parametrize("family", ["roberta", "bert", "llama_base", "t5"])
def test_muon_trains_the_blocks_of_every_task(task_flags, family, more):
    """A classifier has no head that yields tokens; its new head and its pooler have AdamW, and all of it moves."""
    config = make_config(**task_flags(family, train_type="full", precision="bf16", optimizer="muon", lr=1e-2, **more))
    ready = prepared(config)
    step = TrainStep(ready, config, task=task_in(config))
    before = {name: p.clone() for name, p in ready.model.named_parameters()}
    (micro_batches,) = step.batches(batches_of(config, ready)).first(1)
    step(micro_batches, lr=config.lr)
    moved = {name: not torch.equal(p, before[name]) for name, p in ready.model.named_parameters()}
    heads = [name for name in moved if name.endswith("weight") and not re.search(r"\.\d+\.", name)]
    assert heads and all(moved[name] for name in heads if "classif" in name or "score" in name or "pooler" in name)
    assert any(moved[name] for name in moved if re.search(r"\.\d+\.", name))
    step.close()
