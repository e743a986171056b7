"""The planner: what was measured on GPUs, machines that are not here, what fits and what would."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from commands import forked
from real_run import make_config
from transformers import BertConfig, MambaConfig, T5Config

from benchmarks import planning
from benchmarks.common import write_config
from fsdp_utils.config import TrainConfig
from fsdp_utils.core.devices import GIB
from fsdp_utils.core.errors import UserError
from fsdp_utils.core.flags import parse
from fsdp_utils.memory.activations import kinds_of
from fsdp_utils.planning import report, search
from fsdp_utils.planning.forecast import forecast
from fsdp_utils.planning.machines import CARDS, machine_of
from fsdp_utils.planning.search import Search
from fsdp_utils.training.flops import peak_of
from methods.targets import decoder_blocks
from scripts import plan as plan_script

CPU = torch.device("cpu")
ROWS = planning.measured()
# some rows of each kind in every run of the tests; `python benchmarks/planning.py` does all, docs/planning.md has them
CHOSEN = [row for row in ROWS if planning.name_of(row) == "8b" and row["gpus"] == 1][1:22:3]
CHOSEN += [row for row in ROWS if planning.name_of(row) == "8b" and row["gpus"] > 1][::3]


@pytest.mark.parametrize("row", CHOSEN, ids=lambda row: f"{row['gpus']} {planning.shown(row['flags'])}")
def test_predicted_is_what_was_measured(row):
    """Within 5 % of the peak that torch counted on the GPU."""
    assert planning.predicted(row) == pytest.approx(row["gib"], rel=0.05)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Shapes without weights."""
    return {shape: str(write_config(shape, tmp_path_factory.mktemp(shape))) for shape in ("1b", "8b", "70b")}


@pytest.fixture
def few(monkeypatch):
    """Searches that try fewer batches."""
    monkeypatch.setattr(search, "BATCHES", (1, 8))


def config_of(folder, **flags):
    return make_config(model_name=folder, precision="bf16", device="auto", **flags)


def asked(folder, **more):
    """What scripts/plan.py searches with."""
    return plan_script.train_flags(plan_script.PlanConfig(model=folder, **more))


def test_a_plan_in_lines(large):
    """Everything that a run takes, for cards that are not here, from config.json alone."""
    flags = dict(train_type="bnb_dora", context_length=2048, batch_size=2, use_cpu_offload=True, save_model=True)
    flags |= dict(save_every_steps=100, max_steps=1000, quantize_lm_head=True, quant_scales="double", lora_rank=64)
    said = "\n".join(report.lines(config_of(large["70b"], **flags), machine_of("2x24", device=CPU)))
    for words in ("trainable params: 750,551,040", "plan for 2 x 24 GiB", "it fits", "80 of 80 blocks recompute"):
        assert words in said
    for words in ("host memory: 21.", "in all", "disk: result 1.40, 2 checkpoints 8.39", "a run reads about 131 GiB"):
        assert words in said
    assert "4 rows, at most 8,192 tokens; 1,000 steps" in said and "s a full step on RTX 4090" in said


def test_what_does_not_fit_says_what_helps(large):
    """A full fine-tune of an 8B on one card of 24 GiB."""
    config = config_of(large["8b"], train_type="full", context_length=2048)
    (line,) = [x for x in report.lines(config, machine_of("1x24", device=CPU)) if "GPU memory" in x]
    assert "TOO MUCH" in line and "--use_cpu_offload true" in line


def test_a_plan_here_is_of_this_process(large):
    """Without --plan_gpus on a CPU there is no card to fill."""
    said = "\n".join(report.lines(config_of(large["8b"], train_type="bnb_dora"), machine_of(None, device=CPU)))
    assert "plan for 1 process on a CPU" in said and "memory: " in said and "GPU" not in said and "time" not in said


@pytest.mark.parametrize(
    ("text", "gpus", "gib", "card"),
    [("2x24", 2, 24, "RTX 4090"), ("4xh100", 4, 80, "H100"), ("1 x 4090", 1, 24, "RTX 4090"), ("8x141", 8, 141, "H200"),
     ("1x13.5", 1, 13.5, "T4"), ("1x300", 1, 300, "B200")],
)  # fmt: skip
def test_machines(text, gpus, gib, card):
    """By size or by name; of a size the fastest known card is taken for granted."""
    machine = machine_of(text, device=CPU)
    assert (machine.gpus, machine.memory, machine.card) == (gpus, int(gib * GIB), card)
    assert machine.device.type == "cuda"


@pytest.mark.parametrize("text", ["2", "x24", "0x24", "2x0", "2xnosuch", "two x 24", "-1x24"])
def test_machines_that_are_none(text):
    """One line says how to write it."""
    with pytest.raises(UserError, match=r"--plan_gpus .*as 2x24.*4xH100"):
        machine_of(text, device=CPU)


def test_known_cards_have_a_peak():
    """Time can be told for each."""
    assert all(map(peak_of, CARDS))


def test_found_flags_fit_and_are_sorted(large):
    """Every set is a plan that fits, with the largest batch that does, the fastest first; a larger one does not fit."""
    config = asked(large["1b"], train_type="custom_qlora")
    machine = machine_of("1x8", device=CPU)
    search = Search(config, machine)
    choices = search.choices()
    speeds = [choice.tokens_per_s for choice in choices]
    assert len(choices) >= 3 and speeds == sorted(speeds, reverse=True)
    for choice in choices:
        whole = replace(config, **choice.flags)
        assert forecast(report.planned_for(whole, machine), whole, machine) == choice.found
        assert choice.found.fits(machine)
    most = choices[0].flags
    assert search.tried(most | dict(batch_size=2 * most["batch_size"])) is None


def test_smaller_places_come_where_nothing_fits(large, few):
    """A 1B on a card of 1.7 GiB needs host memory; on one of 1 GiB nothing helps but what is said."""
    config = asked(large["1b"], train_type="bnb_dora", context_length=1024)
    choices = Search(config, machine_of("1x1.7", device=CPU)).choices()
    assert choices and all(choice.flags["use_cpu_offload"] for choice in choices)
    small = machine_of("1x1", device=CPU)
    search = Search(config, small)
    assert search.choices() == []
    out = list(search.ways_out())
    assert out and any(name in out[-1] for name in CARDS)


def test_tiles_come_where_rows_are_too_long(large, few):
    """32,768 tokens of a 1B on 4 GiB, and no tiles where a row fits without."""
    machine = machine_of("1x4", device=CPU)
    for length, tiled in ((32768, True), (2048, False)):
        (first, *_) = Search(asked(large["1b"], train_type="custom_qlora", context_length=length), machine).choices()
        assert ("tile_tokens" in first.flags) == tiled and not replace(config_of(large["1b"]), **first.flags).errors()


def test_flags_that_do_not_go_with_given_ones_are_not_tried(large, few):
    """Tiles are refused beside the policies that keep products."""
    config = asked(large["1b"], train_type="custom_qlora", extra="tile_tokens=512")
    choices = Search(config, machine_of("1x24", device=CPU)).choices()
    assert choices and not any(replace(config, **choice.flags).errors() for choice in choices)


@pytest.mark.parametrize("length", [2048, 131072])
def test_what_cannot_be_measured_is_not_said_to_fit(large, few, monkeypatch, length):
    """It had looked as if nothing were kept for backward."""

    def unmeasured(*args, **how):
        raise UserError("cannot measure Some")

    monkeypatch.setattr(search, "measure", unmeasured)
    found = Search(asked(large["1b"], context_length=length), machine_of("1x24", device=CPU))
    with pytest.raises(UserError, match="cannot measure Some, so what fits is not known"):
        found.choices()


def test_speed_is_of_all_tokens_of_a_step(large, few):
    """Accumulation makes a step longer, and no slower."""
    machine = machine_of("1x24", device=CPU)
    once, often = (
        Search(asked(large["1b"], extra=f"gradient_accumulation_steps={n}"), machine).choices()[0] for n in (1, 8)
    )
    assert often.tokens_per_s == pytest.approx(once.tokens_per_s, rel=0.05)


def test_host_memory_is_a_limit(large, few):
    """Sets that keep more than the machine has beside its GPUs are left out."""
    config, machine = asked(large["8b"]), machine_of("2x8", device=CPU)
    needs = lambda choices: [sum(choice.found.host.values()) * 2 for choice in choices]
    free, limited = (needs(Search(config, machine, host=host).choices()) for host in (float("inf"), 8 * GIB))
    assert max(free) > 8 * GIB >= max(limited)


def test_policies_that_a_family_does_not_bear_are_not_tried(tmp_path, few):
    """What drops attention weights is not replayed by a policy that keeps attention."""
    BertConfig(architectures=["BertForSequenceClassification"], num_hidden_layers=2).save_pretrained(tmp_path)
    choices = Search(
        asked(str(tmp_path), train_type="full", context_length=512), machine_of("1x8", device=CPU)
    ).choices()
    assert choices and not any("checkpoint_policy" in choice.flags for choice in choices)


@pytest.mark.parametrize(("machine", "flags", "said"), [
    ("16x24", dict(sharding_strategy="hybrid_full_shard", hybrid_shard_size=3), "does not divide 16 processes"),
    ("1xA100", dict(compute="fp8"), "an A100 has no products of 8-bit floats"),
])  # fmt: skip
def test_what_a_run_refuses_is_not_planned(large, machine, flags, said):
    """Instead of a plan that fits."""
    with pytest.raises(UserError, match=said):
        report.lines(config_of(large["1b"], train_type="bnb_dora", **flags), machine_of(machine, device=CPU))


def test_tasks_refuse_in_a_plan_too(tmp_path):
    """As they do in a run."""
    T5Config(architectures=["T5ForConditionalGeneration"], num_layers=2).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="an encoder sees all samples of a row"):
        report.lines(config_of(tmp_path, train_type="full", packing=True), machine_of("1x24", device=CPU))


def test_what_is_not_measured_is_not_known_to_fit(large, monkeypatch):
    """A plan says so."""

    def unmeasured(*args, **how):
        raise UserError("cannot measure Some")

    monkeypatch.setattr(report, "forecast", partial(forecast, measure=unmeasured))
    found = report.lines(config_of(large["1b"], train_type="bnb_dora"), machine_of("1x24", device=CPU))
    assert any("NOT KNOWN" in line for line in found) and not any(": it fits" in line for line in found)


def test_a_model_without_heads(tmp_path):
    """Mamba attends to nothing."""
    MambaConfig(architectures=["MambaForCausalLM"], num_hidden_layers=2, hidden_size=64).save_pretrained(tmp_path)
    found = report.lines(config_of(tmp_path, train_type="full", context_length=8), machine_of("1x24", device=CPU))
    assert any("time: about" in line for line in found)


def test_extra_takes_lists():
    """A part without a name belongs to the list before it."""
    config = plan_script.PlanConfig(extra="lora_target_modules=all,experts, lora_rank=8")
    assert config.given == ["lora_target_modules=all,experts", "lora_rank=8"] and not config.errors()
    assert plan_script.PlanConfig(extra="8,lora_rank=8").errors()


def test_blocks_of_one_kind_answer_for_each_other(tiny):
    """Kinds are told apart by parameters and by the layer's own words."""
    planned = lambda name: report.planned_for(make_config(model_name=tiny(name)), machine_of(None, device=CPU)).model
    assert len(set(kinds_of(decoder_blocks(planned("llama"))))) == 1
    assert len(set(kinds_of(decoder_blocks(planned("gemma2"))))) == 2  # sliding and full attention


def test_script_makes_commands_to_paste(large, few, capsys):
    """Each command is a train.py that plans what the script says."""
    plan_script.main(plan_script.PlanConfig(model=large["1b"], gpus="1x4", best=1, extra="lora_rank=16"))
    told, command = capsys.readouterr().out.splitlines()
    config = parse(TrainConfig, command.split("train.py ")[1].split(), prog="train.py")
    assert config.lora_rank == 16
    found = report.lines(config, machine_of("1x4", device=CPU))
    peak = told.split(" of 4.00")[0].rsplit(" ", 1)[1]
    assert any(f"GPU memory: {peak} GiB" in line and "it fits" in line for line in found)


def test_script_says_what_would_fit(tmp_path):
    """One line, and not zero."""
    done = forked(["scripts/plan.py", "--model", "demo", "--gpus", "1x0.02"], tmp_path)
    assert done.returncode and len(done.stderr.splitlines()) == 1 and "would fit" in done.stderr


def test_measured_rows_are_whole():
    """Every line of peaks.jsonl says what it is of."""
    assert len(ROWS) >= 20
    common = {"gpus", "flags", "gib", "card"}
    kinds = [common | {"shape"}, common | {"shape", "layers"}, common | {"recipe"}]
    assert all(row.keys() in kinds and row["card"] in CARDS for row in ROWS)
    assert len({json.dumps(row) for row in ROWS}) == len(ROWS)


def test_cards_are_told_by_whole_words():
    """An L4 is no L40S, and what no card is called is refused, not taken for the next best."""
    for name, gib in CARDS.items():
        machine = machine_of(f"2x{name.lower()}", device=CPU)
        assert (machine.card, round(machine.memory / GIB)) == (name, gib)
    assert machine_of("1x4090", device=CPU).card == "RTX 4090"
    for unknown in ("1xH20", "1xRTX", "1xA", "1x00", "1xA1000"):
        with pytest.raises(UserError, match=f"--plan_gpus {unknown}: write how many"):
            machine_of(unknown, device=CPU)
    assert [str(machine_of(text, device=CPU)) for text in ("2x24.5", "1x0.1")] == ["2 x 24.5 GiB", "1 x 0.1 GiB"]


def test_what_a_plan_says_beside_sizes(tmp_path, capsys):
    """That a folder has no weights, instead of a download; that a context is longer than the model was made for."""
    folder = write_config("tiny", tmp_path)
    config = make_config(model_name=folder, train_type="custom_lora", context_length=200_000)
    said = "\n".join(report.lines(config, machine_of("1x80", device=CPU)))
    assert f"weights: {folder} holds none; a run reads about" in said and "download" not in said
    assert f"note: --context_length 200000: {folder} was made for 131072 tokens" in capsys.readouterr().out
    planned = report.planned_for(config, machine_of("1x80", device=CPU))
    config.model_name, config.load_format = "some/model", "safetensors"  # of the hub
    assert any(
        line.startswith("download: about") and "from some/model" in line for line in report._disk(planned, config)
    )


def test_given_flags_are_kept(large, few):
    """What --extra says is in every set as it was given, and the rest is searched."""
    config = asked(large["1b"], train_type="custom_qlora", extra="batch_size=2,use_cpu_offload=true")
    for choice in Search(config, machine_of("1x24", device=CPU)).choices():
        assert not choice.flags.keys() & {"batch_size", "use_cpu_offload"}
        assert "use_gradient_checkpointing" in choice.flags or choice.flags.keys() <= {
            "checkpoint_policy", "use_activation_cpu_offload", "quantize_lm_head", "quant_scales"
        }  # fmt: skip


@pytest.mark.parametrize("extra", ["plan=true", "config=recipes/demo.yaml", "show_rows=2"])
def test_what_is_no_part_of_a_plan(extra):
    assert plan_script.PlanConfig(extra=extra).errors() == [
        f"--extra {extra}: is no part of what a run takes; leave it away"
    ]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (dict(hidden_size=-512), r"builds no model"),
        (dict(hidden_size="big"), r"hidden_size"),
    ],
)
def test_configurations_that_build_nothing(large, tmp_path, wrong, said):
    """One line, whatever transformers or torch make of them."""
    config = json.loads((Path(large["1b"]) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | wrong))
    with pytest.raises(UserError, match=said) as error:
        report.planned_for(config_of(tmp_path), machine_of("1x24", device=CPU))
    assert "\n" not in str(error.value)
