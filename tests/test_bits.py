"""Bits by layer: a plan's weights are those of each quantizer alone, a run keeps its plan whatever becomes of the file,
and the plans that scripts/plan_bits.py finds are the best that fit."""

import itertools
import json
import random
from unittest.mock import patch

import pytest
import torch
from closeness import assert_close, assert_learns
from commands import forked
from real_run import CPU, dequantized, first_step, logits, make_config, packed_bytes, plan, prepared, save_trained
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import evaluate
import train
from fsdp_utils.core import flags as flags_module
from fsdp_utils.core.devices import GIB
from fsdp_utils.core.errors import ConfigError, Ended, UserError
from fsdp_utils.core.flags import parse
from fsdp_utils.folders.describe import describe
from fsdp_utils.inference.config import EvalConfig
from fsdp_utils.inference.load import load_for_inference
from fsdp_utils.model.assemble import size_report
from fsdp_utils.model.weights import base_bytes
from fsdp_utils.planning import report
from fsdp_utils.planning.machines import machine_of
from fsdp_utils.planning.search import Search
from fsdp_utils.sharding import peer_gather
from fsdp_utils.tasks.causal_lm import CAUSAL_LM
from methods import bits
from methods.bits import first_match
from methods.quantizers.linear import QuantizedWeight
from scripts import plan_bits
from scripts.plan_bits import Option, best_choice

FIRST = "model.layers.0.*"
PLAN = {FIRST: {"bits": 4}, "*.down_proj": {"bits": 3, "group_size": 32}, "*": {"bits": 2}}


@pytest.fixture
def written(tmp_path):
    """`written(plan)`: a file of it."""

    def write(content, name="plan.json"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


# ---------------------------------------------------------------------------------------------------------------------
# What is loaded
# ---------------------------------------------------------------------------------------------------------------------


def test_patterns():
    """The first that matches wins, `*` crosses dots, and case counts."""
    patterns = ["model.layers.1.*", "*.layers.[0-2].mlp.*", "*.q_proj"]
    assert first_match(patterns, "model.layers.1.mlp.up_proj") == "model.layers.1.*"
    assert first_match(patterns, "model.layers.10.mlp.up_proj") is None
    assert first_match(patterns, "model.layers.2.mlp.up_proj") == "*.layers.[0-2].mlp.*"
    assert first_match(patterns, "model.layers.7.self_attn.q_proj") == "*.q_proj"
    assert first_match(patterns, "model.layers.7.self_attn.Q_PROJ") is None


@pytest.mark.parametrize(
    ("train_type", "entries"),
    [("hqq_dora", PLAN), ("hqq_llama_pro", {name: PLAN[name] for name in ("*.down_proj", "*")})],  # one block is new
)
def test_each_weight_is_as_its_quantizer_makes_it(flags, written, train_type, entries):
    """Those of runs that quantize everything in one way."""
    given = flags(train_type=train_type)
    found = dequantized(prepared(make_config(**given, bits_plan=written(entries))).model)
    alike = {
        pattern: dequantized(
            prepared(make_config(**given, n_bits=entry["bits"], quant_group_size=entry.get("group_size", 64))).model
        )
        for pattern, entry in entries.items()
    }
    used = {name: first_match(entries, name.removesuffix(".weight")) for name in found}
    assert set(used.values()) == set(entries)
    for name, pattern in used.items():
        assert torch.equal(found[name], alike[pattern][name])


TWO = {"*.mlp.*": {"quantizer": "hqq", "bits": 2}}


@pytest.mark.parametrize("train_type", ["custom_qlora", "qlora"])
def test_two_quantizers_in_one_model(flags, written, train_type):
    """What no pattern matches is as the flags say; an adapter does not know what is under it."""
    given = flags(train_type=train_type)
    mixed = prepared(make_config(**given, bits_plan=written(TWO)))
    nf4 = dequantized(prepared(make_config(**given)).model)
    hqq = dequantized(prepared(make_config(**flags(train_type="hqq_lora"), n_bits=2)).model)
    for name, weight in dequantized(mixed.model).items():
        assert torch.equal(weight, (hqq if ".mlp." in name else nf4)[name])


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])  # the second has its matrices the other way round
def test_stacks_of_experts(flags, written, family):
    """They are parameters to a dense model, and have paths as other weights."""
    config = make_config(**flags(family, train_type="hqq_dora"), bits_plan=written({"*.mlp.experts.*": {"bits": 2}}))
    modules = dict(plan(config).model.named_modules())
    found = {path: m.quantizer.bits for path, m in modules.items() if isinstance(m, QuantizedWeight)}
    assert found == {path: 2 if ".experts." in path else 4 for path in found} and set(found.values()) == {2, 4}
    crossing = written({"*.experts.gate_up_proj": {"bits": 2, "group_size": 128}})
    with pytest.raises(ConfigError, match=r"128 does not divide the 64 inputs of .*experts.gate_up_proj; choose"):
        plan(make_config(**flags(family, train_type="hqq_dora"), bits_plan=crossing))


@pytest.mark.parametrize(("train_type", "entries"), [("hqq_dora", PLAN), ("bnb_dora", TWO)])
def test_processes_and_cache(pair, flags, written, tmp_path, train_type, entries):
    """One process, two, and a cache that two wrote have the same bytes; a cache of other bits is left alone."""
    given = flags(train_type=train_type, quantized_cache=tmp_path / "cache")
    packed_bytes(given)
    given["bits_plan"] = written(entries)
    alone = packed_bytes({**given, "quantized_cache": tmp_path / "alone"})
    for got in (*pair.run(packed_bytes, given), packed_bytes(given)):
        assert got.keys() == alone.keys()
        assert all(torch.equal(got[name], alone[name]) for name in alone.keys() - {"*shard"})
    assert len(list((tmp_path / "cache").iterdir())) == 2


def by_peers(flags: dict):
    """`first_step`, where the tiny model's adapters count as little beside its frozen weights."""
    with patch.object(peer_gather, "LITTLE", 1e9):
        return first_step(flags)


@pytest.mark.parametrize("peer", [True, False])
def test_processes_learn_alike(pair, one_process, tiny, flags, written, peer):
    """Blocks of four sizes, two of which take turns in the same memory: loss and gradients are those of one process."""
    entries = {f"model.layers.{block}.*": {"bits": bits} for block, bits in enumerate((2, 8, 4, 3))}
    given = flags(train_type="hqq_dora", bits_plan=written(entries)) | dict(model_name=tiny(num_hidden_layers=4))
    alone = one_process(given)
    assert_learns(alone)
    for step in pair.run(by_peers, {**given, "peer_gather": peer, "batch_size": 4}):
        assert_close(step, alone, relative=1e-5)


def test_what_is_said_of_it(flags, written):
    """The run's first lines and --plan count the weights of each kind, and the bytes are those of the parts."""
    config = make_config(**flags(train_type="hqq_dora"), bits_plan=written(PLAN))
    counts = {"bits=4, group_size=64": 7, "bits=2, group_size=64": 6, "bits=3, group_size=32": 1}
    for said in (size_report(prepared(config).model)[-1], *report.lines(config, machine_of(None, device=CPU))[1:2]):
        assert all(f"{count} x HQQ({kind}, scales='bf16')" in said for kind, count in counts.items())
    layer = 64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 64 * 128  # weights of a block
    down = 64 * 128
    packed = layer * 4.5 + (layer - down) * 2.5 + down * 4
    dense = [p for n, p in plan(config).model.named_parameters() if "embed" in n or "norm" in n or "lm_head" in n]
    magnitudes = base_bytes(plan(make_config(**flags(train_type="hqq_dora"))).model)[1] - 2 * layer * 4.5 / 8
    magnitudes -= sum(p.nbytes for p in dense)  # DoRA keeps norms beside the base
    assert base_bytes(plan(config).model)[1] == packed / 8 + magnitudes + sum(p.nbytes for p in dense)


def test_search_does_not_offer_what_hqq_lacks(flags, written):
    """--quant_scales double is of bitsandbytes alone."""
    alone, mixed = (make_config(**flags(train_type="bnb_dora"), **more) for more in ({}, dict(bits_plan=written(TWO))))
    machine = machine_of("1x24", device=CPU)
    offered = lambda config: {name for place in Search(config, machine).places for name in place}
    assert offered(alone) - offered(mixed) == {"quant_scales"}


# ---------------------------------------------------------------------------------------------------------------------
# What is kept
# ---------------------------------------------------------------------------------------------------------------------


def saved(flags, written, folder, entries=PLAN, **more):
    """A saved run whose plan is gone, and the model that it had in memory."""
    path = written(entries)
    model = save_trained(make_config(**flags(**more), bits_plan=path, save_model=True, output_dir=folder, lora_rank=4))
    path.unlink()
    return model


def test_a_result_needs_no_file(flags, written, tmp_path, tiny_data, export):
    """evaluate.py and prepare_weights.py have the base that was trained on when the plan is gone."""
    folder = tmp_path / "run"
    expected = logits(saved(flags, written, folder, train_type="hqq_dora"))
    assert json.loads(json.loads((folder / "run.json").read_text())["flags"]["bits_plan"]) == PLAN
    torch.testing.assert_close(logits(load_for_inference(describe(folder), device=CPU)), expected, atol=1e-5, rtol=0)
    merged = AutoModelForCausalLM.from_pretrained(export(folder, "merged", name="merged", dtype="fp32"))
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=0)
    words = dict(model=folder, dataset=tiny_data, samples=2, max_new_tokens=2, output_file=tmp_path / "said.json")
    evaluate.main(parse(EvalConfig, [f"--{n}={v}" for n, v in words.items()] + ["--device=cpu"], prog="evaluate.py"))
    assert json.loads((tmp_path / "said.json").read_text())["total"] == 2


def test_another_base_than_in_training(flags, written, tmp_path):
    """A quantizer of the plan that this version makes in another way is refused, as one of the flags is."""
    folder = tmp_path / "run"
    saved(flags, written, folder, train_type="hqq_dora")
    record = json.loads((folder / "run.json").read_text())
    record["quantizer"]["rules"][FIRST]["scales"] = "fp32"
    (folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"trained on a base quantized as .*this version makes"):
        load_for_inference(describe(folder), device=CPU)


def test_exports(flags, written, tmp_path, export):
    """Formats of 4 bits take what a plan packed in other widths; the one of bitsandbytes' own codes says it cannot."""
    folder = tmp_path / "run"
    saved(flags, written, folder, TWO, train_type="bnb_dora")
    with pytest.raises(UserError, match=r"no adapter on a bitsandbytes base that is alike everywhere \(--bits_plan\)"):
        export(folder, "bnb_dora")
    merged = load_file(export(folder, "merged", name="merged", dtype="fp32") / "model.safetensors")
    packed = load_file(export(folder, "w4a16", name="w4a16", group_size=32, gptq="false") / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    error = (packed_weight(packed, name) - merged[f"{name}.weight"]).norm() / merged[f"{name}.weight"].norm()
    assert error < 0.1


def packed_weight(tensors: dict, name: str) -> torch.Tensor:
    """A linear of a symmetric compressed-tensors file, fp32."""
    words, scale = tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_scale"].float()
    codes = torch.stack([(words >> 4 * i) & 15 for i in range(8)], dim=-1).flatten(1) - 8
    return (codes.unflatten(1, (scale.shape[1], -1)) * scale.unsqueeze(-1)).flatten(1)


def test_another_type_of_base(flags, written, tmp_path):
    """--eval_type of another quantizer leaves the plan away, one of the same keeps it."""
    folder = tmp_path / "run"
    saved(flags, written, folder, {"*": {"bits": 2}}, train_type="hqq_lora")
    run = describe(folder)
    opened = lambda kind: dequantized(load_for_inference(run, device=CPU, eval_type=kind))
    given = flags(train_type="qlora")
    for found, like in (
        (opened("custom_qlora"), make_config(**given)),
        (opened(None), make_config(**given | dict(train_type="hqq_lora"), n_bits=2)),
    ):
        expected = dequantized(prepared(like).model)
        assert all(torch.equal(weight, expected[name]) for name, weight in found.items()) and len(found) == 14


def run_train(**more) -> int:
    """train.py in this process: its exit code."""
    try:
        train.main(make_config(lr=0.01, lora_rank=4, save_model=True, **more))
    except Ended as end:
        return end.code
    return 0


def test_resuming(flags, written, tmp_path):
    """A run goes on with its plan, written as one likes, or with its run.json alone; with another it is refused by
    name, and so is one in another order."""
    given = flags(train_type="hqq_dora") | dict(max_steps=4, batch_size=4, output_dir=tmp_path / "run")
    entries = {FIRST: {"bits": 2}, "*.down_proj": {"bits": 3, "group_size": 32}}
    run_train(**given | dict(output_dir=tmp_path / "straight"), bits_plan=written(entries))
    on = dict(**given, resume="auto")
    assert run_train(**on, bits_plan=written(entries), stop_at_step=1) == 0
    for other in ({**entries, FIRST: {"bits": 1}}, dict(reversed(entries.items())), None):
        with pytest.raises(UserError, match=r"is of another run: --bits_plan .*: the checkpoint has ") as error:
            run_train(**on, **(dict(bits_plan=written(other, "other.json")) if other else {}))
        assert "\n" not in str(error.value)
    assert run_train(**on, bits_plan=written(json.dumps(entries, indent=8)), stop_at_step=2) == 0
    (tmp_path / "plan.json").unlink()
    (tmp_path / "run.json").write_bytes((tmp_path / "run" / "run.json").read_bytes())
    assert run_train(**on, config=tmp_path / "run.json") == 0
    ends = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("straight", "run")]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_mixed_is_a_plan(tiny, flags, written, tmp_path):
    """`--n_bits mixed` trains as the plan that it stands for, goes on by the same command, and is kept as that."""
    model = tiny("llama", num_hidden_layers=4)
    given = flags(train_type="hqq_dora") | dict(model_name=model, max_steps=4, batch_size=4)
    by_hand = written({f"model.layers.{n}.*": {"bits": 4} for n in (0, 3)})
    assert run_train(**given, n_bits=2, bits_plan=by_hand, output_dir=tmp_path / "by_hand") == 0
    mixed = dict(**given, n_bits="mixed", output_dir=tmp_path / "mixed", resume="auto")
    assert run_train(**mixed, stop_at_step=2) == 0
    assert run_train(**mixed) == 0
    ends = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("by_hand", "mixed")]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
    found = [logits(load_for_inference(describe(tmp_path / name), device=CPU)) for name in ("by_hand", "mixed")]
    assert torch.equal(*found)


def test_where_mixed_has_more_bits():
    """A fifth of the blocks, most of them the first; one at each end of a small model."""
    for count, ends in ((1, {0}), (2, {0, 1}), (4, {0, 3}), (32, {0, 1, 2, 3, 30, 31}), (33, {0, 1, 2, 3, 4, 31, 32})):
        config = make_config(train_type="hqq_dora", n_bits="mixed")
        bits.settle(config, [f"h.{n}" for n in range(count)])
        assert config.n_bits == 2
        assert json.loads(config.bits_plan) == {f"h.{n}.*": {"bits": 4} for n in sorted(ends)}


def test_a_file_of_flags_holds_the_plan(written, tmp_path):
    """--save_config writes what the plan says, and --config reads it; a wrong plan there is found with its line."""
    file = tmp_path / "run.yaml"
    flags_module.save(make_config(train_type="hqq_dora", bits_plan=written(PLAN)), str(file))
    (tmp_path / "plan.json").unlink()
    assert json.loads(make_config(config=file).bits_plan) == PLAN
    file.write_text("train_type: hqq_dora\nbits_plan: gone.json\n")
    with pytest.raises(ConfigError, match=r"run\.yaml, line 2: --bits_plan gone\.json: No such file"):
        make_config(config=file)


def test_a_plan_that_changes_while_it_is_used(flags, written, tmp_path):
    """What counts is what the file said when the run began."""
    path = written(PLAN)
    config = make_config(**flags(train_type="hqq_dora"), bits_plan=path)
    written({"*": {"bits": 8}})
    assert json.loads(config.bits_plan) == PLAN and config.bits_plan_file == str(path)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------

WRONG = {
    "no file": (None, ["No such file", "name a JSON file"]),
    "no JSON": ('{"*": {"bits": 4}', ["is no JSON", "write patterns and settings"]),
    "a list": ("[4]", ["holds no patterns", "write patterns and settings"]),
    "empty": ("{}", ["holds no patterns"]),
    "twice": ('{"*": {"bits": 4}, "*": {"bits": 2}}', ["* stands there twice"]),
    "a number": ({"*": 4}, ["*: 4 is no setting", '{"bits": 4}']),
    "nothing": ({"*": {}}, ["*: {} is no setting"]),
    "key": ({"*": {"bit": 4}}, ["*: bit: unknown key; did you mean bits? there are bits, group_size, quantizer"]),
    "quantizer": ({"*": {"quantizer": "gptq"}}, ['*: quantizer "gptq": choose from bnb, hqq']),
    "bits": ({"*": {"bits": 5}}, ["*: bits 5: hqq offers 8, 4, 3, 2, 1"]),
    "true": ({"*": {"bits": True}}, ["*: bits true: hqq offers"]),
    "bits of bnb": ({"*": {"bits": 3, "quantizer": "bnb"}}, ["bits 3: bnb offers 4", 'add "quantizer": "hqq"']),
    "group": ({"*": {"bits": 4, "group_size": 48}}, ["*: group_size 48: choose from 32, 64, 128, 256"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_plans(written, tmp_path, case):
    """Each is one line that names flag, file, pattern and way out, as soon as flags are read."""
    content, words = WRONG[case]
    path = tmp_path / "none.json" if content is None else written(content)
    with pytest.raises(ConfigError) as error:
        make_config(train_type="hqq_dora", bits_plan=path)
    assert str(error.value).startswith(f"--bits_plan {path}: ") and "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_plans_beside_other_flags(written):
    """Train types that quantize nothing; scales that a quantizer of the plan lacks; two errors are two lines."""
    path = written(PLAN)
    with pytest.raises(ConfigError, match=f"--bits_plan {path}: --train_type dora quantizes nothing; use a bnb or hqq"):
        make_config(train_type="dora", bits_plan=path)
    with pytest.raises(ConfigError, match=r"\*\.mlp\.\*: --quant_scales double: hqq offers auto, bf16, fp32"):
        make_config(train_type="bnb_dora", quant_scales="double", bits_plan=written(TWO))
    with pytest.raises(ConfigError, match=f"--n_bits mixed: --bits_plan {path} says what each block has; drop one"):
        make_config(train_type="hqq_dora", n_bits="mixed", bits_plan=path)
    with pytest.raises(ConfigError, match=r"--n_bits mixed: bnb offers 4; use an hqq_\* train type"):
        make_config(train_type="bnb_dora", n_bits="mixed")
    with pytest.raises(ConfigError) as error:
        make_config(train_type="hqq_dora", bits_plan=written({"a": {"bits": 5}, "b": {"group_size": 1}}))
    assert len(str(error.value).splitlines()) == 2


UNFIT = {
    "nothing": (
        {"model.layer.0.*": {"bits": 2}},
        {},
        "matches none of the 14 weights that are quantized, such as model.",
    ),
    "covered": (
        {"*": {"bits": 2}, "*.q_proj": {"bits": 4}},
        {},
        r"q_proj: the first match wins, and \* before it takes all of it",
    ),
    "head": ({"lm_head": {"bits": 8}}, {}, "lm_head: embedding and head stay in 16 bits; add --quantize_lm_head true"),
    "group": (
        {"*": {"bits": 4, "group_size": 128}},
        {},
        r"\*: group_size 128 does not divide the 64 inputs of model.layers.0.self_attn.q_proj; choose from 32, 64",
    ),
    "tied": (
        {"lm_head": {"bits": 8}},
        dict(family="qwen2", quantize_lm_head=True),
        "lm_head: is one weight with model.embed_tokens, which gets another setting; give both the same",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_plans_that_do_not_fit_the_model(flags, written, case):
    """Each is one line, and comes before a weight is read."""
    entries, more, words = UNFIT[case]
    path = written(entries)
    with pytest.raises(ConfigError, match=words) as error:
        plan(make_config(**flags(train_type="hqq_dora", **more), bits_plan=path))
    assert str(error.value).startswith(f"--bits_plan {path}: ") and "\n" not in str(error.value)


def test_tied_ends_of_one_setting(flags, written):
    """Where both get the same, they stay one weight."""
    entries = {"lm_head": {"bits": 8}, "model.embed_tokens": {"bits": 8}}
    config = make_config(**flags("qwen2", train_type="hqq_dora"), quantize_lm_head=True, bits_plan=written(entries))
    model = plan(config).model
    assert model.lm_head.codes is model.model.embed_tokens.codes
    assert (model.lm_head.quantizer.bits, model.model.layers[0].mlp.up_proj.base_layer.quantizer.bits) == (8, 4)


# ---------------------------------------------------------------------------------------------------------------------
# Finding a plan
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_the_best_choice_is_the_best_of_all(seed):
    """All choices are tried: none that fits has a smaller sum; and where none fits, there is none."""
    chance = random.Random(seed)
    sizes = [chance.choice([(9, 7, 5), (18, 13, 10), (31, 30, 2)]) for _ in range(chance.randint(1, 6))]
    table = [
        [Option(bits, size, chance.gauss(1 / bits, 0.3)) for bits, size in zip((4, 3, 2), unit, strict=True)]
        for unit in sizes
    ]
    room = chance.randint(sum(unit[-1] for unit in sizes) - 2, sum(unit[0] for unit in sizes))
    all_that_fit = [c for c in itertools.product(*table) if sum(o.nbytes for o in c) <= room]
    found = best_choice(table, room)
    if not all_that_fit:
        assert found is None
        return
    assert found.nbytes == sum(o.nbytes for o in found.options()) <= room
    assert found.change == pytest.approx(min(sum(o.change for o in c) for c in all_that_fit))
    assert found.change == pytest.approx(sum(o.change for o in found.options()))


@pytest.fixture
def measuring(tiny, tiny_data, tmp_path):
    """`measuring(**flags)`: the parsed flags of the script on a tiny model."""

    def make(**more):
        given = dict(model=tiny(), data=tiny_data, budget_gib=1, samples=3, precision="fp32", device="cpu")
        given |= dict(out=tmp_path / "plan.json") | more
        words = [f"--{name}={value}" for name, value in given.items()]
        return parse(plan_bits.BitsConfig, words, prog="plan_bits.py")

    return make


def loss_of(model, config) -> float:
    """Mean over the learned tokens of the rows that the script takes."""
    with torch.no_grad():
        said = [CAUSAL_LM.predictions(model, *row) for row in plan_bits.samples_of(config, describe(config.model))]
    total = sum(-found.gather(1, wanted.unsqueeze(1)).sum().item() for found, wanted in said)
    return total / sum(len(wanted) for _, wanted in said)


@pytest.mark.parametrize("by", ["block", "projection"])
def test_a_plan_that_was_measured(measuring, flags, tmp_path, capsys, by):
    """Its bytes and its loss are those of the run that takes it, and it is the best of what was measured."""
    room = base_bytes(plan(make_config(**flags(train_type="hqq_lora"), n_bits=3)).model)[1]
    config = measuring(by=by, budget_gib=room / GIB, bits="4,2")
    plan_bits.main(config)
    said = capsys.readouterr().out
    run = prepared(make_config(**flags(train_type="hqq_lora"), bits_plan=config.out))
    assert base_bytes(run.model)[1] <= room
    assert len(json.loads((tmp_path / "plan.json").read_text())) == dict(block=2, projection=14)[by]
    assert (
        f"{loss_of(run.model, config):.4f} measured" in said
        and f"plan: {base_bytes(run.model)[1] / GIB:.4f} of" in said
    )


def test_what_is_measured_of_one_unit(measuring, flags, written):
    """The loss of a run in which this unit alone has so many bits, and the others 8, which change nothing to speak of;
    afterwards the weights are what they were."""
    config, task = measuring(), CAUSAL_LM
    model = load_for_inference(describe(config.model), device=CPU, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantizers = {bits: plan_bits.HQQ(bits) for bits in (4, 2)}
    rows = plan_bits.samples_of(config, describe(config.model))
    measured = plan_bits.Measured(model, rows, task=task, quantizers=quantizers)
    units, dense = plan_bits.units_of(model, "block"), measured.loss()
    table = measured.options(units, dense)
    for unit, options in zip(units, table, strict=True):
        for option in options:
            entries = {unit.pattern: {"bits": option.bits}, "*": {"bits": 8}}
            run = prepared(make_config(**flags(train_type="hqq_lora"), bits_plan=written(entries)))
            assert loss_of(run.model, config) - dense == pytest.approx(option.change, abs=2e-3)
    assert max(abs(option.change) for options in table for option in options) > 2e-2
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (dict(budget_gib=0), "--budget_gib: required"),
        (dict(bits="4,5"), "--bits 4,5: hqq offers 8, 4, 3, 2, 1"),
        (dict(out="/tmp", overwrite=True), "--out /tmp: is a folder; name a file"),
        (dict(out="/nowhere/plan.json"), "--out /nowhere/plan.json: is in no folder; make that first"),
    ],
)
def test_wrong_flags_of_the_script(measuring, more, words):
    """One line each."""
    with pytest.raises(ConfigError) as error:
        measuring(**more)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_what_the_script_refuses(measuring, tiny, save_run, written):
    """In one line, before anything is measured: what is no dense model, does not fit, or would be overwritten."""
    adapter, _ = save_run(tiny(), "bnb_dora")
    for more, words in (
        (
            dict(budget_gib=1e-6),
            "--budget_gib 1e-06: .* GiB are the least, .* of them not packed; give more, or smaller",
        ),
        (
            dict(group_size=128),
            "--group_size 128: does not divide the 64 inputs of model.layers.0.self_attn.q_proj; use",
        ),
        (dict(model=adapter), "--model .*name the 16-bit model under it"),
        (dict(model=tiny("gpt2")), "--model .*its blocks have no linears"),
        (dict(model=tiny("mixtral")), "--model .*experts.gate_up_proj is no linear, and only those are measured"),
        (dict(data="nothing.jsonl"), "--data nothing.jsonl: "),
        (dict(context_length=2), "--data .*no row has an answer within 2 tokens"),
    ):
        with pytest.raises(UserError, match=words) as error:
            plan_bits.main(measuring(**more))
        assert "\n" not in str(error.value)
    written(PLAN)
    with pytest.raises(ConfigError, match="is there already; choose another or pass --overwrite true"):
        measuring()


def test_the_command(tmp_path):
    """The script by itself ends with one line where a flag is wrong."""
    done = forked(["scripts/plan_bits.py", "--model", "demo", "--out", tmp_path / "plan.json"], tmp_path)
    assert done.returncode == 2 and "--budget_gib: required" in done.stderr
