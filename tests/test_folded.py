"""--train_for: adapters that learn on the rounded weights that an export stores."""

import json

import pytest
import torch
from real_run import logits, make_config, off_zero, plan, planned_and_prepared, prepared
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import train
from fsdp_utils.core.errors import ConfigError, UserError
from fsdp_utils.core.rows import local
from fsdp_utils.export import fidelity
from fsdp_utils.folders import session
from fsdp_utils.folders.describe import describe
from fsdp_utils.inference.load import load_for_inference
from fsdp_utils.model.assemble import round_again
from fsdp_utils.training.validation import Validation
from methods.quantizers.bnb import Bnb4bit
from methods.quantizers.int4 import Int4
from methods.quantizers.linear import weight_rows

CPU = torch.device("cpu")
SERVED = {"nf4": "bnb_nf4", "w4a16": "w4a16"}
QUANTIZERS = {"nf4": Bnb4bit("nf4", 32, "fp32"), "w4a16": Int4(32, "bf16")}
TYPES = [("custom_qlora", "nf4"), ("bnb_dora", "nf4"), ("hqq_lora", "w4a16"), ("hqq_dora", "w4a16")]
every_type = pytest.mark.parametrize(("train_type", "train_for"), TYPES)


@pytest.fixture
def given(flags, tmp_path):
    """`given(train_type, train_for)`: the flags of a short run."""

    def make(train_type, train_for, **more):
        own = dict(train_for=train_for, quant_group_size=32, lora_rank=4, lora_alpha=8, lr=0.01, save_model=True)
        small = dict(batch_size=4, max_steps=7, round_every=3, output_dir=tmp_path / "run", log_to="stdout")
        return flags(train_type=train_type) | own | small | more

    return make


def rounded(weight, quantizer):
    """What a quantizer leaves of a weight, fp32."""
    packed = quantizer.quantize(weight)
    return quantizer.dequantize(packed, in_features=weight.shape[1], dtype=torch.float32)


@every_type
def test_the_base_is_the_rounded_merged_weight(given, tiny, train_type, train_for):
    """After a rounding the adapter adds nothing to it; later what it learned since; twice is once."""
    planned, run = planned_and_prepared(make_config(**given(train_type, train_for)))
    off_zero(run)
    stored = load_file(tiny() / "model.safetensors")
    for _ in range(2):
        round_again(planned, run)
    layers = planned.method.layers(run.model)
    for path, layer in layers.items():
        merged = torch.addmm(stored[f"{path}.weight"], layer.lora_B, layer.lora_A, alpha=layer.scaling)
        base = weight_rows(layer.base_layer, local, dtype=torch.float32)
        torch.testing.assert_close(base, rounded(merged.detach(), QUANTIZERS[train_for]), atol=1e-6, rtol=0)
        x, factor = torch.randn(3, layer.in_features), layer.row_factor()
        factor = 1 if factor is None else factor
        torch.testing.assert_close(layer(x), x @ base.T * factor, atol=1e-5, rtol=1e-5)
        older = layer.lora_B.detach() @ layer.lora_A.detach()
        with torch.no_grad():
            layer.lora_B += 0.01
        since = layer.lora_B @ layer.lora_A - older
        torch.testing.assert_close(layer(x), x @ (base + layer.scaling * since).T * factor, atol=1e-5, rtol=1e-5)


@every_type
def test_gradients_are_those_at_the_rounded_weight(given, train_type, train_for):
    """Of A and B beside the base as it is: the rounding is passed straight through."""
    planned, run = planned_and_prepared(make_config(**given(train_type, train_for)))
    off_zero(run)
    round_again(planned, run)
    layer = next(iter(planned.method.layers(run.model).values()))
    x, pull = torch.randn(5, layer.in_features), torch.randn(5, layer.out_features)
    factor = layer.row_factor()
    (layer(x) * pull).sum().backward()
    through = layer.scaling * (pull if factor is None else pull * factor.detach()).T @ x
    torch.testing.assert_close(layer.lora_A.grad, layer.lora_B.detach().T @ through, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer.lora_B.grad, through @ layer.lora_A.detach().T, atol=1e-4, rtol=1e-4)
    assert layer.folded_A.grad is None and layer.folded_B.grad is None


@pytest.mark.parametrize("train_type", ["custom_qlora", "bnb_dora"])
def test_it_begins_as_without(given, train_type):
    """B is zero: the same model as in an ordinary run with the same scales."""
    ours = logits(prepared(make_config(**given(train_type, "nf4"))).model)
    plain = {name: value for name, value in given(train_type, "none").items() if name != "round_every"}
    assert torch.equal(ours, logits(prepared(make_config(**plain, quant_scales="fp32")).model))


@every_type
def test_the_export_is_what_was_trained(given, export, tmp_path, train_type, train_for):
    """In our loader, in stock software, merged, and from the 4-bit folder: the same logits; the report says so too."""
    train.main(make_config(**given(train_type, train_for)))
    run = describe(tmp_path / "run")
    ours = logits(load_for_inference(run, device=CPU))
    merged = AutoModelForCausalLM.from_pretrained(
        export(run.folder, "merged", name="merged", dtype="fp32"), dtype=torch.float32
    )
    torch.testing.assert_close(logits(merged.eval()), ours, atol=1e-4, rtol=0)
    # with DoRA what w4a16 does not pack is in bf16 here, and so are scales, which factors of rows do not fit
    dtype, atol = ("bf16", 5e-2) if train_type == "hqq_dora" else ("fp32", 1e-4)
    folder = export(run.folder, SERVED[train_for], name="served", dtype=dtype)
    stock = fidelity.load_stock(describe(folder), device=CPU, dtype=torch.float32)
    torch.testing.assert_close(logits(stock), ours, atol=atol, rtol=0)


@pytest.mark.parametrize(("train_type", "train_for", "other"), [TYPES[0] + ("w4a16",), TYPES[-1] + ("bnb_nf4",)])
def test_another_rounding_is_said(given, export, tmp_path, capsys, train_type, train_for, other):
    """It keeps part of what was learned: the way out is named."""
    train.main(make_config(**given(train_type, train_for)))
    export(tmp_path / "run", other, name="other", dtype="bf16")
    said = (
        f"--train_for {train_for}, and not on this one; use --infer_type {SERVED[train_for]}, which it was trained for"
    )
    assert said in capsys.readouterr().out


def test_two_processes_learn_the_same(pair, given, tmp_path):
    """As one with twice the rows, whatever was rounded by whom, also where whole weights are kept from step to step."""
    near = dict(peer_gather=True)
    for train_type, train_for, *ways in (
        (*TYPES[1], near, near | dict(sharding_strategy="shard_grad_op")),
        (*TYPES[2], {}, near),
    ):
        run_main(**given(train_type, train_for, batch_size=4, eval_samples=4, output_dir=tmp_path / train_type))
        one = numbers(tmp_path / train_type)
        for i, more in enumerate(ways):
            folder = tmp_path / f"{train_type}{i}"
            more = dict(batch_size=2, eval_samples=4, output_dir=folder) | more
            pair.run(run_main, **given(train_type, train_for, **more))
            assert numbers(folder) == pytest.approx(one, rel=1e-4) and len(one) == 8


def numbers(folder) -> list[float]:
    """Losses of the steps and of the validation."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows for name in ("loss", "eval_loss") if name in row]


def run_main(**flags):
    train.main(make_config(**flags))


def test_a_mixture_whose_experts_its_export_does_not_pack(tiny):
    """Said before a weight is read, not by the export."""
    for family, train_type, train_for in (("mixtral", "custom_qlora", "nf4"), ("gpt_oss", "hqq_lora", "w4a16")):
        with pytest.raises(
            UserError, match=f"--train_for {train_for}: --infer_type {SERVED[train_for]} packs no experts"
        ):
            plan(make_config(model_name=tiny(family), train_type=train_type, train_for=train_for))


def test_what_is_judged_is_rounded(given, monkeypatch):
    """Before each validation, whatever --round_every says, and once where several reasons meet."""
    rounds, seen = [], []
    monkeypatch.setattr(session, "round_again", lambda planned, prepared: rounds.append(len(seen)))
    judge = Validation.__call__
    monkeypatch.setattr(Validation, "__call__", lambda self, step: (seen.append(step.taken), judge(self, step))[1])
    train.main(make_config(**given("custom_qlora", "nf4", eval_samples=4, eval_every_steps=2, max_steps=5)))
    assert seen == [2, 4, 5] and rounds == [0, 1, 1, 2]  # after steps 2, 3, 4 and 5


def test_another_base_has_no_rounding(given, tmp_path):
    """Evaluated on 16 bits, the adapter stands beside the weight that it was merged into."""
    train.main(make_config(**given("custom_qlora", "nf4")))
    run = describe(tmp_path / "run")
    dense = load_for_inference(run, device=CPU, eval_type="custom_lora")
    layer = next(m for m in dense.modules() if hasattr(m, "lora_A"))
    assert not layer.folds and (logits(dense) - logits(load_for_inference(run, device=CPU))).abs().max() > 1e-3


@pytest.mark.parametrize(("flags", "why"), [
    (dict(train_type="custom_lora", train_for="nf4"), "not with --train_type custom_lora; use one of custom_qlora"),
    (dict(train_type="bnb_dora", train_for="w4a16"), "not with --train_type bnb_dora; use one of hqq_lora, hqq_dora"),
    (dict(train_type="qlora", train_for="nf4"), "not with --train_type qlora"),
    (dict(train_type="hqq_lora", train_for="w4a16", n_bits=2), "--n_bits 2: not with --train_for w4a16"),
    (dict(train_type="bnb_dora", train_for="nf4", quant_scales="double"), "--quant_scales double: not with"),
    (dict(train_type="bnb_dora", train_for="nf4", lora_init="pissa"), "--lora_init pissa: not with"),
    (dict(train_type="bnb_dora", train_for="nf4", quantize_lm_head=True), "--quantize_lm_head true: not with"),
])  # fmt: skip
def test_what_does_not_go_together(flags, why):
    with pytest.raises(ConfigError, match=why):
        make_config(**flags)


@pytest.mark.parametrize(("train_type", "infer_type"), [("bnb_dora", "bnb_dora"), ("hqq_lora", "w4a16_dora")])
def test_formats_that_keep_an_adapter_apart(given, export, tmp_path, train_type, infer_type):
    """There is none left to keep."""
    train.main(make_config(**given(train_type, "nf4" if train_type == "bnb_dora" else "w4a16", max_steps=1)))
    with pytest.raises(UserError, match=r"has its adapter in the base; use (bnb_nf4|w4a16)"):
        export(tmp_path / "run", infer_type)
