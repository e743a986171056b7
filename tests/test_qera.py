"""QERA's start: A and B begin as what makes up best for the rounding of the base, on the data's own inputs."""

from statistics import mean

import pytest
import torch
from peft import PeftModel
from real_run import dequantized, first_step, logits, make_config, plan, prepared, tokenized
from test_checkpoints import bytes_of, run_train
from tiny_tasks import make_task_model, source_rows, write_rows
from transformers import AutoModelForCausalLM

from fsdp_utils.core.errors import ConfigError, UserError
from fsdp_utils.core.rows import gather
from fsdp_utils.folders.describe import describe
from fsdp_utils.inference.load import load_for_inference
from fsdp_utils.model import assemble
from fsdp_utils.model.build import build_on_meta
from fsdp_utils.model.calibrate import linears_seen
from fsdp_utils.tasks.causal_lm import CAUSAL_LM
from methods.closest import closest
from methods.lora import LoRALinear
from methods.qera import QERA

CPU = torch.device("cpu")
QUANTIZED = ["qlora", "custom_qlora", "hqq_lora", "bnb_dora"]
TWO_BITS = dict(train_type="hqq_lora", n_bits=2)


def layers(model) -> dict[str, LoRALinear]:
    return {path: m for path, m in model.named_modules() if isinstance(m, LoRALinear)}


def correlated(width: int, count: int = 500) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(width, width, generator=generator) * 0.7 ** torch.arange(width)
    return torch.randn(count, width, generator=generator) @ mixing.T


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)], ids=str)
def test_nothing_is_closer(shape):
    """The error that is left is the least there is (Eckart and Young, of the error by a root of X X^T, fp64), and every
    step away from the solution costs more."""
    error = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    inputs = correlated(shape[1])
    sizes, directions = torch.linalg.eigh((inputs.T @ inputs).double())
    root = directions * sizes.clamp_min(0).sqrt() @ directions.T
    cost = lambda pair: ((error - pair[1] @ pair[0]).double() @ root).square().sum().item()
    found = closest(error, inputs.T @ inputs, rank=6)
    least = torch.linalg.svdvals(error.double() @ root)[6:].square().sum().item()
    assert least <= cost(found) * (1 + 1e-6) <= 1.01 * least
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        moved = [t + 0.05 * t.std() * torch.randn(t.shape, generator=generator) for t in found]
        assert cost(moved) > cost(found)


# ---------------------------------------------------------------------------------------------------------------------
# What linears see
# ---------------------------------------------------------------------------------------------------------------------


def stock_grams(folder, rows, paths) -> dict[str, torch.Tensor]:
    """`X X^T` of linears in transformers' own model."""
    stock, sums = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), {}
    for path in paths:

        def add(module, args, path=path):
            inputs = args[0].flatten(0, -2)
            sums[path] = sums.get(path, 0) + inputs.T @ inputs

        stock.get_submodule(path).register_forward_pre_hook(add)
    with torch.no_grad():
        for ids in rows:
            stock(input_ids=ids[None])
    return sums


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gptneox", "mixtral"])
def test_block_by_block_is_the_model(tiny, tiny_data, family):
    """Positions, masks and windows of each block are the family's own; each linear's weight is the checkpoint's."""
    config = make_config(model_name=tiny(family), dataset=tiny_data)
    built, rows = assemble.build(config, task=CAUSAL_LM, device=CPU), tokenized(config).spread(5)
    weights = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32).state_dict()
    paths = [p for p, m in built.model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in p]
    dense = build_on_meta(built.model.config, task=CAUSAL_LM, dtype=torch.float32)
    seen = [seen for block in linears_seen(dense, built.weights, rows, paths, device=CPU) for seen in block]
    expected = stock_grams(tiny(family), rows, paths)
    assert len(rows) == 5 and {s.path for s in seen} == expected.keys() and len(expected) > 7
    for path, weight, gram in seen:
        assert torch.equal(weight, weights[f"{path}.weight"])
        torch.testing.assert_close(gram, expected[path], rtol=1e-4, atol=1e-4 * expected[path].abs().max().item())
    assert all(p.is_meta for p in dense.parameters())


def test_samples_are_spread(tiny, tiny_data):
    data = tokenized(make_config(model_name=tiny(), dataset=tiny_data))
    rows = lambda count: [ids.tolist() for ids in data.spread(count)]
    every = [list(ids) for ids in data.dataset["input_ids"]]
    assert rows(99) == every and rows(2) == [every[0], every[-1]]


# ---------------------------------------------------------------------------------------------------------------------
# How a run begins
# ---------------------------------------------------------------------------------------------------------------------


def test_begins_nearer_on_its_inputs(tiny, tiny_data, capsys):
    """Of every layer, what the samples give differs less from the dense layer than with the plain SVD of the error, and
    that less than without a correction; by how much is said."""
    flags = dict(model_name=tiny(), dataset=tiny_data, **TWO_BITS)
    run = prepared(make_config(**flags, lora_init="qera"))
    grams = stock_grams(tiny(), tokenized(make_config(**flags)).spread(128), layers(run.model))
    dense = AutoModelForCausalLM.from_pretrained(tiny(), dtype=torch.float32).state_dict()
    base = dequantized(run.model)
    made_up = []
    for path, layer in layers(run.model).items():
        error, gram = dense[f"{path}.weight"] - base[f"{path}.weight"], grams[path]
        cost = lambda low_rank, error=error, gram=gram: ((error - low_rank) @ gram * (error - low_rank)).sum()
        left, sizes, right = torch.linalg.svd(error, full_matrices=False)
        plain = left[:, :8] * sizes[:8] @ right[:8]
        a, b = layer.lora_A.detach(), layer.lora_B.detach()
        assert cost(layer.scaling * b @ a) < 0.9 * cost(plain) < 0.9 * cost(torch.zeros_like(error))
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), rtol=1e-3, atol=1e-5)
        made_up.append(1 - (cost(layer.scaling * b @ a) / cost(torch.zeros_like(error))).item())
    told = f"of {len(made_up)} linears, squared, adapters begin by making up for {100 * mean(made_up):.0f} % on average"
    assert told in capsys.readouterr().out


def test_begins_with_a_smaller_loss():
    """The built-in model in 2 bits, on its data: more than half of what the rounding costs is made up for."""
    flags = dict(model_name="demo", dataset="demo", batch_size=16, lora_target_modules="all_linear", lora_rank=16)
    loss = lambda **more: first_step(flags | more, perturbed=False)[0]
    dense, default = loss(train_type="custom_lora"), loss(**TWO_BITS)
    assert loss(**TWO_BITS, lora_init="qera", init_samples=32) - dense < (default - dense) / 2


def test_dora_begins_as_lora(tiny, tiny_data):
    """Its magnitudes are the norms of base and correction together, exactly; as counted from those of the base."""
    flags = dict(model_name=tiny(), dataset=tiny_data, lora_init="qera")
    runs = {kind: prepared(make_config(**flags, train_type=kind)) for kind in ("custom_qlora", "bnb_dora")}
    lora, dora = (logits(run.model.eval()) for run in runs.values())
    torch.testing.assert_close(dora, lora, atol=1e-5, rtol=0)
    for layer in layers(runs["bnb_dora"].model).values():
        torch.testing.assert_close(layer.row_factor(), torch.ones(layer.out_features), atol=1e-6, rtol=0)
        assert torch.equal(layer.initial_magnitude, layer.weight_norm) and layer.magnitude_delta.abs().max() > 0


def pairs_at_start(flags: dict) -> dict[str, list[torch.Tensor]]:
    """A and B of all layers as this process holds them, before they are sharded; how many it worked out is `solved`."""
    found, begin, solve = {"solved": 0}, QERA.begin, QERA._correction

    def begun(self, path, layer, pair):
        found[path] = [t.clone() for t in self.whole[path]]
        begin(self, path, layer, pair)

    def solved(self, layer, seen):
        found["solved"] += 1
        return solve(self, layer, seen)

    QERA.begin, QERA._correction = begun, solved
    try:
        prepared(make_config(**flags))
    finally:
        QERA.begin, QERA._correction = begin, solve
    return found


def test_two_processes_find_the_same(pair, flags):
    """Each runs half of the samples and solves half of the layers; both hold the same bytes, and the product is that of
    one process."""
    given = flags(**TWO_BITS, lora_init="qera", init_samples=7)
    alone, (first, second) = pairs_at_start(given), pair.run(pairs_at_start, given)
    assert alone.pop("solved") == 12 and first.pop("solved") == second.pop("solved") == 6
    assert alone.keys() == first.keys() == second.keys()
    for path, (a, b) in alone.items():
        assert all(torch.equal(x, y) for x, y in zip(first[path], second[path], strict=True))
        product = first[path][1] @ first[path][0]
        assert (product - b @ a).norm() < 1e-3 * (b @ a).norm()


def test_more_processes_than_samples(trio, flags):
    given = flags(**TWO_BITS, lora_init="qera", init_samples=2)
    for found in trio.run(pairs_at_start, given):
        assert found["solved"] == 4


# ---------------------------------------------------------------------------------------------------------------------
# What is kept
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train_type", QUANTIZED)
def test_saved_and_opened(save_run, tiny, export, train_type):
    """A plain adapter for the quantized base: PEFT computes the run from the two, and we do, without looking at samples
    again. Merged it goes into the base as rounded, never into 16-bit weights, which lack nothing."""
    folder, trained = save_run(tiny(), train_type, lora_init="qera")
    expected = logits(trained)
    assert describe(folder).rank == 4
    torch.testing.assert_close(logits(load_for_inference(describe(folder), device=CPU)), expected, atol=1e-5, rtol=0)
    stock = AutoModelForCausalLM.from_pretrained(tiny(), dtype=torch.float32)
    stock.load_state_dict(dequantized(trained), strict=False)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(stock, folder).eval()), expected, atol=1e-4, rtol=0)
    merged = AutoModelForCausalLM.from_pretrained(export(folder, "merged", dtype="fp32"), dtype=torch.float32)
    torch.testing.assert_close(logits(merged.eval()), expected, atol=1e-4, rtol=0)


def test_another_base_is_refused(save_run, tiny, tiny_data):
    """Weights that are rounded otherwise, or not, lack something else than the adapter makes up for."""
    folder, _ = save_run(tiny(), "hqq_lora", lora_init="qera")
    for other in ("custom_lora", "custom_qlora"):
        with pytest.raises(UserError, match=f"--eval_type {other}: .* corrects the rounding of the base"):
            load_for_inference(describe(folder), device=CPU, eval_type=other)
    begun = dict(
        model_name=tiny(), dataset=tiny_data, init_adapter=folder, lora_rank=4, output_dir=folder.parent / "on"
    )
    alone = "is for a rounded base alone, which it corrects; pass --lora_init qera"
    for other, why in (
        (dict(train_type="hqq_lora"), alone),
        (dict(TWO_BITS, lora_init="qera"), "corrects the rounding of a base with .*; give this run the same"),
        (dict(train_type="custom_lora"), alone),
    ):
        with pytest.raises(UserError, match=f"run: {why}"):
            run_train(**begun, **other)


def test_goes_on_without_samples(save_run, tiny, tiny_data, tmp_path, monkeypatch):
    """An adapter that training goes on with is the start; a model is not run again for one."""
    folder, _ = save_run(tiny(), "hqq_lora", lora_init="qera")
    monkeypatch.setattr(assemble, "linears_seen", None)
    given = dict(model_name=tiny(), dataset=tiny_data, train_type="hqq_lora", lora_init="qera", lora_rank=4, lr=1e-30)
    run_train(**given, init_adapter=folder, output_dir=tmp_path / "on", max_steps=1, wd=0)
    assert bytes_of(tmp_path / "on") == bytes_of(folder)
    assert "On weights in 16 bits it is wrong" in (tmp_path / "on/README.md").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# What cannot begin so
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train_type", ["lora", "custom_lora", "dora"])
def test_a_base_that_is_not_rounded(train_type):
    said = f"--lora_init qera: corrects the rounding of a base, and {train_type} rounds none; use one of qlora, custom"
    with pytest.raises(ConfigError, match=said):
        make_config(train_type=train_type, lora_init="qera")


def test_refused_before_weights_are_read(tiny, tmp_path):
    """A rank that a weight has not, experts, and models whose blocks do not follow one another."""
    given = dict(train_type="custom_qlora", lora_init="qera")
    with pytest.raises(UserError, match=r"--lora_rank 40: --lora_init qera corrects .* of 32 x 64; lower it"):
        plan(make_config(**given, model_name=tiny(), lora_rank=40))
    with pytest.raises(UserError, match="experts begin as by default, not with --lora_init qera"):
        plan(make_config(**given, model_name=tiny("mixtral"), lora_target_modules="all,experts"))
    data = write_rows(tmp_path / "rows.jsonl", source_rows())
    with pytest.raises(UserError, match=r"--lora_init qera: looks at one block after the other, and .* has an encoder"):
        run_train(**given, model_name=make_task_model(tmp_path / "t5", "t5"), dataset=data, output_dir=tmp_path / "out")


def test_samples_that_nobody_looks_at():
    said = lambda **flags: [n for n in make_config(init_samples=4, **flags).notes() if "--init_samples" in n]
    assert said(train_type="qlora") == ["--init_samples has no effect: --lora_init is default"]
    assert not said(train_type="qlora", lora_init="qera")
    assert "where it begins" in said(train_type="qlora", lora_init="qera", init_adapter="x")[0]


def test_random_weights(tiny, tiny_data):
    """--load_format dummy; a linear that was rounded without loss begins as by default."""
    flags = dict(model_name=tiny(), dataset=tiny_data, init_samples=2, load_format="dummy")
    run = prepared(make_config(**flags, **TWO_BITS, lora_init="qera"))
    assert all(gather(layer.lora_B).abs().max() > 0 for layer in layers(run.model).values())
