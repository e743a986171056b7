"""A run that was interrupted and goes on is the run that was not: the same bytes, the same losses."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from real_run import make_config, tokenized
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import train
from fsdp_utils.core.errors import Ended, UserError
from fsdp_utils.folders import checkpoints
from fsdp_utils.folders.describe import describe
from fsdp_utils.folders.names import ADAPTER_WEIGHTS, OPTIMIZER_FILE, TRAINED_FILE
from fsdp_utils.inference.load import load_for_inference
from fsdp_utils.inference.whole import whole

# every source of randomness, four steps an epoch on two processes
RUN = dict(batch_size=2, num_epochs=3, lr=0.01, lora_dropout=0.1, lora_rank=4, save_model=True, grad_norm=0.5)


def run_train(**flags) -> int:
    """train.py in this process: its exit code."""
    try:
        train.main(make_config(**{**RUN, **flags}))
    except Ended as end:
        return end.code
    return 0


def refused(**flags) -> str | None:
    """What train.py says to bad input."""
    try:
        run_train(**flags)
    except UserError as error:
        return str(error)
    return None


def rows_of(folder: Path) -> list[dict]:
    """What was logged; speed and memory differ from run to run."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    measured = ("tokens_per_s", "seconds_left", "memory_gib")
    return [{k: v for k, v in line.items() if k not in measured} for line in lines]


def bytes_of(folder: Path) -> dict[str, bytes]:
    """The saved result."""
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.safetensors")}


def interrupted(pair, folder: Path, *, at: int, **flags) -> None:
    """A run that ends after step `at`, and goes on."""
    assert pair.run(run_train, output_dir=folder, resume="auto", stop_at_step=at, **flags) == [0, 0]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step-{at:06d}"]
    assert not bytes_of(folder)
    assert pair.run(run_train, output_dir=folder, resume="auto", **flags) == [0, 0]


def same_run(pair, tmp_path, *, at: int = 5, **flags) -> None:
    """8 steps straight are `at` steps and the rest."""
    flags = dict(num_epochs=2) | flags
    assert pair.run(run_train, output_dir=tmp_path / "straight", **flags) == [0, 0]
    interrupted(pair, tmp_path / "resumed", at=at, **flags)
    assert rows_of(tmp_path / "resumed") == rows_of(tmp_path / "straight")
    assert len(rows_of(tmp_path / "straight")) == 8
    assert bytes_of(tmp_path / "resumed") == bytes_of(tmp_path / "straight") != {}


# ---------------------------------------------------------------------------------------------------------------------
# The same number of processes: bit for bit
# ---------------------------------------------------------------------------------------------------------------------


# each method, on a base of its own; those of the options below are `custom_qlora` and `bnb_dora`
@pytest.mark.parametrize("train_type", ["full", "qlora", "hqq_dora", "llama_pro"])
def test_resumed_is_uninterrupted(pair, flags, tmp_path, train_type):
    """In the middle of an epoch, with dropout and clipping: parameters byte for byte, losses digit for digit."""
    same_run(pair, tmp_path, **flags(train_type=train_type) | dict(batch_size=2))


@pytest.mark.parametrize(
    "options",
    [
        dict(at=4, lr_scheduler="cosine", lr_warmup_ratio=0.5, optimizer="sgd"),  # between two epochs
        dict(packing=True, batch_size=1, context_length=80, max_steps=8, lora_init="pissa"),
        dict(use_cpu_offload=True),
        dict(precision="bf16"),  # rounds at random
        dict(precision="fp16_autocast", no_sync=True, gradient_accumulation_steps=2, batch_size=1),
        dict(lora_init="qera", train_type="bnb_dora", init_samples=4),
        dict(train_type="bnb_dora", train_for="nf4", round_every=2, wd=0.1),  # `at` is no multiple
        dict(sharding_strategy="ddp", use_gradient_checkpointing=False),
        dict(sharding_strategy="hybrid_full_shard", hybrid_shard_size=1),
    ],
    ids=str,
)
def test_options_survive(pair, flags, tmp_path, options):
    """So with everything that has a state of its own."""
    same_run(pair, tmp_path, **{**flags(train_type="custom_qlora"), "batch_size": 2, **options})


@pytest.mark.parametrize(
    "options",
    [
        dict(optimizer="adamw_8bit", wd=0.1),
        dict(optimizer="adamw_int8", precision="bf16"),
        dict(optimizer="muon", precision="bf16"),
        dict(precision="bf16", optimizer_in_backward=True),
    ],
    ids=str,
)
def test_full_survives(pair, flags, tmp_path, options):
    """Every weight, with 8-bit states and with random rounding."""
    same_run(pair, tmp_path, **{**flags(train_type="full"), "batch_size": 2, **options})


def test_skipped_steps_survive(flags, tmp_path):
    """A loss scale that is still falling when the run is interrupted falls on."""
    given = flags(train_type="full") | dict(batch_size=4, precision="fp16_autocast", num_epochs=3)
    run_train(output_dir=tmp_path / "a", **given)
    run_train(output_dir=tmp_path / "b", stop_at_step=3, **given)
    state = checkpoints.read_state(tmp_path / "b/checkpoints/step-000003")
    assert state["scaler"]["good_steps"] + state["scaler"]["scale"] != 2.0**15
    run_train(output_dir=tmp_path / "b", resume="auto", **given)
    assert rows_of(tmp_path / "a") == rows_of(tmp_path / "b") and bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


def test_intervals_change_nothing(pair, flags, tmp_path):
    """A checkpoint every two steps leaves the same bits behind as none, and the newest few."""
    given = flags(train_type="bnb_dora") | dict(batch_size=2)
    pair.run(run_train, output_dir=tmp_path / "without", **given)
    pair.run(run_train, output_dir=tmp_path / "with", save_every_steps=2, keep_checkpoints=3, **given)
    assert rows_of(tmp_path / "with") == rows_of(tmp_path / "without")
    assert bytes_of(tmp_path / "with") == bytes_of(tmp_path / "without")
    kept = sorted(path.name for path in (tmp_path / "with/checkpoints").iterdir())
    assert kept == ["step-000008", "step-000010", "step-000012"]
    assert all(checkpoints.problem(tmp_path / "with/checkpoints" / name) is None for name in kept)


# ---------------------------------------------------------------------------------------------------------------------
# Another number of processes
# ---------------------------------------------------------------------------------------------------------------------


def whole_state(folder: Path) -> dict[str, torch.Tensor]:
    """What trains and its optimizer's state, whole."""
    return load_file(folder / TRAINED_FILE) | load_file(folder / OPTIMIZER_FILE)


def test_two_one_three_processes(pair, trio, flags, tmp_path):
    """A run that moves from two processes to one and to three: the state is the same bit by bit where it changes
    hands, every sample comes once, and the losses and rates are those of the run that stayed."""
    given = flags(train_type="bnb_dora") | dict(
        lora_dropout=0.0, optimizer="adamw", global_batch_size=6, lr_scheduler="cosine", batch_size=1, max_steps=9
    )
    run_train(output_dir=tmp_path / "one", **given)
    moved = tmp_path / "moved"
    assert pair.run(run_train, output_dir=moved, stop_at_step=3, **given) == [0, 0]
    first = checkpoints.read_state(moved / "checkpoints/step-000003")
    assert run_train(output_dir=moved, resume="auto", stop_at_step=6, **given | dict(keep_checkpoints=9)) == 0
    assert trio.run(run_train, output_dir=moved, resume="auto", keep_checkpoints=9, **given) == [0, 0, 0]
    alone, together = rows_of(tmp_path / "one"), rows_of(moved)
    assert first["processes"] == 2 and [row["step"] for row in together] == list(range(1, 10))
    for name in ("loss", "grad_norm"):
        assert [row[name] for row in together] == pytest.approx([row[name] for row in alone], rel=1e-5)
    for name in ("lr", "tokens"):
        assert [row[name] for row in together] == [row[name] for row in alone]


def passed_on(folder: Path, **flags) -> None:
    """Reads a checkpoint and writes it again without a step between."""
    config = make_config(**{**RUN, **flags, "output_dir": folder, "save_every_steps": 1, "keep_checkpoints": 9})
    held = {}

    def rewrite(prepared, session):
        step = train.TrainStep(prepared, config, task=session.planned.task)
        session.begin(step)
        session.keeper.root = session.keeper.writer.root = folder / "again"
        assert session.keeper.keep(step.taken) == folder / "again/step-000002"
        held["done"] = True
        raise Ended(0)

    original, train.train = train.train, rewrite
    try:
        train.main(config)
    except Ended:
        pass
    finally:
        train.train = original
    assert held


@pytest.mark.parametrize("size", ["one", "trio"])
@pytest.mark.parametrize(
    ("train_type", "optimizer"), [("bnb_dora", "adamw"), ("full", "adamw"), ("full", "adamw_int8"), ("full", "muon")]
)
def test_state_changes_hands_bit_by_bit(pair, trio, flags, tmp_path, size, train_type, optimizer):
    """What two processes wrote, another number reads and writes again: the same whole tensors."""
    given = flags(train_type=train_type) | dict(optimizer=optimizer, batch_size=1, global_batch_size=6, num_epochs=3)
    assert pair.run(run_train, output_dir=tmp_path / "run", stop_at_step=2, **given) == [0, 0]
    asked = given | dict(folder=tmp_path / "run", resume="auto")
    passed_on(**asked) if size == "one" else trio.run(passed_on, **asked)
    before, after = tmp_path / "run/checkpoints/step-000002", tmp_path / "run/again/step-000002"
    trained = checkpoints.MODEL_WEIGHTS if train_type == "full" else TRAINED_FILE
    for name in (trained, OPTIMIZER_FILE):
        a, b = load_file(before / name), load_file(after / name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert checkpoints.read_state(before)["scalars"] == checkpoints.read_state(after)["scalars"]


def test_impossible_split_says_what_would_work(pair, trio, flags, tmp_path):
    """Four rows a step do not go into three processes; the message names what does."""
    given = flags(train_type="custom_lora") | dict(batch_size=2)
    pair.run(run_train, output_dir=tmp_path / "run", stop_at_step=2, **given)
    said = trio.run(refused, output_dir=tmp_path / "run", resume="auto", **given)
    assert all(
        "4 rows a step" in line and "3 processes" in line and "another number of processes" in line for line in said
    )
    assert "--batch_size 1" in pair.run(refused, output_dir=tmp_path / "new", global_batch_size=2, **given)[0]


def test_8bit_states_belong_to_their_processes(pair, flags, tmp_path):
    """Blocks of 8-bit states cross the borders of rows: another number of processes is refused, not mixed up."""
    given = flags(train_type="full") | dict(batch_size=2, optimizer="adamw_8bit")
    pair.run(run_train, output_dir=tmp_path / "run", stop_at_step=2, **given)
    said = refused(output_dir=tmp_path / "run", resume="auto", **given)
    assert "8-bit optimizer states belong to 2 processes" in said


# ---------------------------------------------------------------------------------------------------------------------
# What is refused, and what is said
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(flags, tmp_path_factory):
    """A run of one process that ended after step 2, and its flags."""
    given = flags(train_type="custom_lora") | dict(output_dir=tmp_path_factory.mktemp("stopped") / "run", batch_size=4)
    assert run_train(stop_at_step=2, **given) == 0
    return given


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        (dict(train_type="dora"), "--train_type dora"),
        (dict(lora_rank=8), "--lora_rank 8"),
        (dict(lora_target_modules="q_proj"), "--lora_target_modules q_proj"),
        (dict(lr=0.02), "--lr 0.02"),
        (dict(seed=1, lr=0.02), "--seed 1"),
        (dict(context_length=48), "data: another one"),
        (dict(batch_size=2, global_batch_size=2), "rows_per_step"),
        (dict(max_steps=1), "2 steps are done, and this run has 1"),
    ],
    ids=str,
)
def test_another_run_is_refused(stopped, changed, names):
    """All that makes it another run is named, with the values of both."""
    said = refused(**stopped | dict(resume="auto") | changed)
    assert said and names in said and "\n" not in said


def test_another_base_or_data_is_refused(stopped, tiny, tiny_data, tmp_path):
    """Judged by content: the same file under another name may go on."""
    other = tmp_path / "other.jsonl"
    other.write_text(tiny_data.read_text().replace("0", "1"))
    said = refused(**stopped | dict(resume="auto", dataset=other))
    assert "data: another one" in said and f"--dataset {other}, it has {stopped['dataset']}" in said
    said = refused(**stopped | dict(resume="auto", prompt_template="Q {question}"))
    assert "data: another one than in the checkpoint (--prompt_template Q {question}, it has None)" in said
    assert "base: another one" in refused(**stopped | dict(resume="auto", model_name=tiny(num_hidden_layers=1)))
    copy = tmp_path / "copy.jsonl"
    copy.write_text(tiny_data.read_text())
    resumed = stopped | dict(output_dir=tmp_path / "out", resume=stopped["output_dir"] / "checkpoints/step-000002")
    assert run_train(**resumed | dict(dataset=copy, stop_at_step=3, log_to="stdout")) == 0


def test_output_with_checkpoints_is_not_begun_anew(stopped):
    """Without --resume, a folder of checkpoints is left alone; the message names both ways on."""
    said = refused(**stopped)
    assert "--resume auto" in said and "--overwrite true" in said


def test_resume_names_no_checkpoint(stopped, tmp_path):
    """A folder that is none, and one that is not there."""
    for folder in (tmp_path, tmp_path / "gone", stopped["output_dir"]):
        assert "is no valid checkpoint" in refused(**stopped | dict(resume=folder, output_dir=tmp_path / "x"))


def test_finished_run_has_nothing_left(flags, tmp_path, capsys):
    """One command for the first start and every restart: after the end it does nothing, and for more epochs goes on."""
    given = flags(train_type="custom_lora") | dict(output_dir=tmp_path / "run", resume="auto", batch_size=4)
    given |= dict(save_every_steps=5)
    assert run_train(**given) == 0
    before = bytes_of(tmp_path / "run")
    assert run_train(**given) == 0
    assert "nothing is left to do" in capsys.readouterr().out and bytes_of(tmp_path / "run") == before
    assert run_train(**given | dict(num_epochs=4)) == 0
    assert [row["step"] for row in rows_of(tmp_path / "run")] == list(range(1, 17))


def test_finished_run_without_checkpoints(flags, tmp_path, capsys):
    """So too where it kept none, or only that of a stop."""
    given = flags(train_type="custom_lora") | dict(output_dir=tmp_path / "run", resume="auto", batch_size=4)
    assert run_train(stop_at_step=2, **given) == run_train(**given) == 0
    before = bytes_of(tmp_path / "run")
    assert run_train(**given) == 0
    assert "nothing is left to do" in capsys.readouterr().out and bytes_of(tmp_path / "run") == before
    assert "--overwrite true" in refused(**given | dict(resume="false"))


def test_old_checkpoints_stay_until_there_is_something_to_train(stopped, tmp_path, monkeypatch):
    """--overwrite true, and a run that fails while it loads."""
    given = stopped | dict(output_dir=tmp_path / "run")
    run_train(stop_at_step=2, **given)
    monkeypatch.setattr(train, "load", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_train(overwrite=True, **given)
    assert checkpoints.problem(tmp_path / "run/checkpoints/step-000002") is None
    monkeypatch.undo()
    run_train(overwrite=True, stop_at_step=1, **given)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-000001"]


def test_resume_from_an_older_one_drops_the_newer(flags, tmp_path):
    """What was written after it belongs to a run that did not take place."""
    given = flags(train_type="custom_lora") | dict(output_dir=tmp_path / "run", batch_size=4, keep_checkpoints=9)
    assert run_train(save_every_steps=3, **given) == 0
    older = tmp_path / "run/checkpoints/step-000003"
    assert run_train(resume=older, stop_at_step=4, **given) == 0
    assert sorted(path.name for path in older.parent.iterdir()) == ["step-000003", "step-000004"]
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1, 2, 3, 4]


def test_nothing_kept_is_said(flags, tmp_path, capsys):
    """The default of 2024 saves nothing."""
    run_train(output_dir=tmp_path / "run", save_model=False, max_steps=1, **flags(train_type="custom_lora"))
    assert "no weights of this run will be kept" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# A checkpoint is a model, and an adapter a start
# ---------------------------------------------------------------------------------------------------------------------


def test_stock_peft_reads_a_checkpoint(stopped, tiny):
    """The folder is a PEFT adapter, with what trains in it."""
    folder = stopped["output_dir"] / "checkpoints/step-000002"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny()), folder)
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        assert len(file.keys()) == sum(".lora_A." in name or ".lora_B." in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("train_type", ["bnb_dora", "full", "bnb_llama_pro"])
def test_any_checkpoint_is_a_model(pair, flags, export, tmp_path, train_type):
    """Evaluation and export make of a checkpoint what they make of a run that ended at its step."""
    given = flags(train_type=train_type) | dict(batch_size=2)
    pair.run(run_train, output_dir=tmp_path / "ended", **given | dict(max_steps=5))
    pair.run(run_train, output_dir=tmp_path / "stopped", stop_at_step=5, **given)
    checkpoint = tmp_path / "stopped/checkpoints/step-000005"
    ids, logits, cpu = torch.arange(20)[None], [], torch.device("cpu")
    for folder in (checkpoint, tmp_path / "ended"):
        model = load_for_inference(whole(describe(folder), device=cpu), device=cpu)
        logits.append(model(input_ids=ids).logits)
    assert torch.equal(*logits)
    exports = [export(folder, "merged", name=f"export of {folder.name}") for folder in (checkpoint, tmp_path / "ended")]
    assert bytes_of(exports[0]) == bytes_of(exports[1]) != {}
    assert checkpoints.problem(checkpoint) is None  # what was made of it is no part of it


@pytest.mark.parametrize("train_type", ["custom_lora", "bnb_dora"])
def test_init_adapter_goes_on(flags, tmp_path, train_type, capsys):
    """Training that starts from a saved adapter has its loss at the first step, on the way and after; resumed too."""
    given = flags(train_type=train_type) | dict(batch_size=15, lora_dropout=0.0)
    run_train(output_dir=tmp_path / "first", **given)  # three steps of all samples
    run_train(output_dir=tmp_path / "fourth", **given | dict(num_epochs=4))
    second = given | dict(output_dir=tmp_path / "second", init_adapter=tmp_path / "first")
    run_train(**second)
    assert rows_of(tmp_path / "second")[0]["loss"] == pytest.approx(rows_of(tmp_path / "fourth")[3]["loss"], rel=1e-6)
    run_train(**second | dict(output_dir=tmp_path / "third", stop_at_step=2))
    run_train(**second | dict(output_dir=tmp_path / "third", resume="auto"))
    assert bytes_of(tmp_path / "third") == bytes_of(tmp_path / "second")


def test_init_adapter_that_peft_trained(flags, tiny, tmp_path):
    """A folder without run.json: the first loss is that of PEFT's model."""
    given = flags(train_type="custom_lora") | dict(batch_size=15, lora_dropout=0.0, max_steps=1)
    torch.manual_seed(0)
    names = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    stock = LoraConfig(r=4, lora_alpha=16, target_modules=names, init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny()), stock)
    model.save_pretrained(tmp_path / "peft")
    run_train(output_dir=tmp_path / "ours", init_adapter=tmp_path / "peft", **given)
    run_train(output_dir=tmp_path / "new", **given)
    total = tokens = 0
    for row in tokenized(make_config(**given)).dataset:
        labels = torch.as_tensor(row["labels"]).long()[None]
        loss = model(input_ids=torch.as_tensor(row["input_ids"]).long()[None], labels=labels).loss.item()
        count = int((labels[:, 1:] != -100).sum())
        total, tokens = total + loss * count, tokens + count
    first = rows_of(tmp_path / "ours")[0]["loss"]
    assert (
        first
        == pytest.approx(total / tokens, rel=1e-5)
        != pytest.approx(rows_of(tmp_path / "new")[0]["loss"], rel=1e-3)
    )


def test_wandb_goes_on_in_the_same_run(flags, tmp_path, offline_wandb):
    """By the id in the checkpoint."""
    given = flags(train_type="custom_lora") | dict(output_dir=tmp_path / "run", batch_size=4, log_to="wandb")
    run_train(stop_at_step=2, **given)
    known = checkpoints.read_state(tmp_path / "run/checkpoints/step-000002")["run_ids"]["wandb"]
    run_train(resume="auto", **given | dict(max_steps=4))
    runs = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert known and len(runs) == 2 and all(name.endswith(f"-{known}") for name in runs)


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        (dict(lora_rank=8), "has rank 4"),
        (dict(train_type="dora"), "is a LoRA adapter"),
        (dict(lora_alpha=32), "pass --lora_rank 4 --lora_alpha 16 --use_rslora false"),
        (dict(lora_target_modules="q_proj,v_proj"), "has no place"),
        (dict(train_type="full"), "trains no adapter"),
    ],
    ids=str,
)
def test_init_adapter_that_does_not_fit(stopped, tmp_path, changed, names):
    """Another rank, kind, scaling or set of layers would quietly be another function."""
    adapter = stopped["output_dir"] / "checkpoints/step-000002"
    said = refused(**stopped | dict(output_dir=tmp_path / "x", init_adapter=adapter) | changed)
    assert said and names in said and "--init_adapter" in said


def test_init_adapter_of_another_base(stopped, tiny, tmp_path):
    """Judged by the fingerprint."""
    adapter = stopped["output_dir"] / "checkpoints/step-000002"
    other = dict(model_name=tiny(num_hidden_layers=1), output_dir=tmp_path / "x")
    assert "is not --model_name" in refused(**stopped | other | dict(init_adapter=adapter))
