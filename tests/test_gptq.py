"""Calibrated rounding: what a linear gives on the inputs that it has is nearer to the trained model's."""

import json

import pytest
import torch
from peft import PeftModel
from real_run import make_config, tokenized
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from fsdp_utils.core.errors import UserError
from fsdp_utils.core.flags import parse
from fsdp_utils.export import format_of, gptq, w4a16
from fsdp_utils.export.bnb import TableGrid
from fsdp_utils.export.config import ExportConfig
from fsdp_utils.export.trained import TrainedWeights
from fsdp_utils.folders.describe import describe, tokenizer_of
from methods.closest import closest

NF4 = torch.tensor([-1.0, -0.7, -0.5, -0.4, -0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.25, 0.3, 0.4, 0.6, 0.7, 1.0])


def int_grid(weight):
    candidates = w4a16.grids(weight.unflatten(1, (-1, 32)), symmetric=False)
    return w4a16.choose(weight, candidates, group_size=32, dtype=torch.float32)


def table_grid(weight):
    return TableGrid(NF4, weight.unflatten(1, (-1, 32)).abs().amax(-1), 32)


GRIDS = pytest.mark.parametrize("grid_of", [int_grid, table_grid])


def to_nearest(weight, grid):
    return torch.stack([grid.nearest(weight[:, i], i) for i in range(weight.shape[1])], dim=1)


def correlated_inputs(width=96, count=2000):
    """As those of a model: a few directions hold most of them, and one input is always zero."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(width, width, generator=generator) * 0.5 ** torch.arange(0, width / 8, 1 / 8)
    inputs = torch.randn(count, width, generator=generator) @ mixing.T
    inputs[:, 7] = 0
    return inputs


@GRIDS
def test_error_on_the_inputs(grid_of, monkeypatch):
    """At most a third of what rounding to the nearest costs; every value is on the grid, and however many columns are
    rounded at once, they come out the same."""
    weight, inputs = torch.randn(40, 96, generator=torch.Generator().manual_seed(1)), correlated_inputs()
    grid, hessian = grid_of(weight), inputs.T @ inputs
    found = gptq.round_together(weight, grid, hessian)
    assert torch.equal(to_nearest(found, grid), found)
    cost = lambda values: ((values - weight) @ inputs.T).square().sum()
    assert cost(found) < cost(to_nearest(weight, grid)) / 3
    monkeypatch.setattr(gptq, "COLUMNS", 5)
    torch.testing.assert_close(gptq.round_together(weight, grid, hessian), found)


@GRIDS
def test_inputs_that_do_not_depend_on_each_other(grid_of):
    """Nothing can make up for an error then: each weight goes to the nearest."""
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(1))
    grid = grid_of(weight)
    assert torch.equal(gptq.round_together(weight, grid, torch.eye(96)), to_nearest(weight, grid))


def test_codes_of_a_table():
    """Two codes a byte, the first one high, for a table in any order."""
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))
    grid = TableGrid(
        NF4[torch.randperm(16, generator=torch.Generator().manual_seed(3))], weight.abs().amax(1, True), 64
    )
    codes = grid.codes(weight)
    read = torch.stack([codes >> 4, codes & 15], dim=2).flatten(1).long()
    assert torch.equal(grid.table[read] * grid.absmax, to_nearest(weight, grid))


@pytest.mark.parametrize("train_type", ["bnb_dora", "custom_lora", "lora", "full"])
@pytest.mark.parametrize("infer_type", ["w4a16", "w4a16_dora", "bnb_nf4"])
def test_exports_are_nearer_on_what_was_trained_on(save_run, tiny, tiny_data, export, train_type, infer_type):
    """Stock transformers on the folder, on the samples that the run was trained on; biases and all (qwen2)."""
    if (train_type, infer_type) == ("full", "w4a16_dora"):
        pytest.skip("a full fine-tune has no adapter, which test_no_adapter refuses")
    run, model = save_run(tiny("qwen2"), train_type)
    rows = gptq.training_rows(describe(run), tokenizer_of(describe(run)), samples=20)
    data = tokenized(make_config(model_name=tiny("qwen2"), dataset=tiny_data)).dataset["input_ids"]
    assert [row.tolist() for row in rows] == [list(ids) for ids in data[:20]]

    @torch.no_grad()
    def divergence(name, **flags):
        group = dict(group_size=32) if infer_type.startswith("w4a16") else {}
        folder = export(run, infer_type, name=name, dtype="fp32", **group, **flags)
        how = dict(quantization_config=CompressedTensorsConfig(dequantize=True)) if group else {}
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how).eval()
        if infer_type == "w4a16_dora":
            loaded = PeftModel.from_pretrained(loaded, folder / "adapter").eval()
        total = 0.0
        for ids in rows:
            wanted, found = (m(input_ids=ids[None]).logits.float().log_softmax(-1) for m in (model, loaded))
            total += (wanted.exp() * (wanted - found)).sum().item()
        return total

    assert divergence("together") < 0.8 * divergence("nearest", gptq="false")


def test_what_keeps_more(save_run, tiny):
    """A format that rounds names one that does not, as far as the run has it."""

    def named(train_type, infer_type):
        run, _ = save_run(tiny(), train_type)
        flags = [f"--model={run}", "--save_dir=x", f"--infer_type={infer_type}"]
        trained = TrainedWeights(describe(run), device=torch.device("cpu"))
        return format_of(infer_type)(trained, parse(ExportConfig, flags, prog="prepare_weights.py")).better.split(",")[
            0
        ]

    for infer_type in ("w4a16", "w4a16_dora", "bnb_nf4"):
        assert named("bnb_dora", infer_type) == "--infer_type bnb_dora"
        assert named("custom_lora", infer_type) == "--infer_type merged"
    assert named("bnb_dora", "bnb_dora") == "--infer_type merged --dtype fp32"


def test_no_adapter(save_run, tiny, export):
    run, _ = save_run(tiny(), "full")
    with pytest.raises(UserError, match="has no adapter; use w4a16"):
        export(run, "w4a16_dora", group_size=32)


def test_adapter_that_makes_up_for_the_rounding():
    """No other of its rank is better on the inputs: not a part of it that is turned, and not the plain SVD."""
    error, inputs = torch.randn(40, 96, generator=torch.Generator().manual_seed(1)), correlated_inputs()
    cost = lambda pair: ((error - pair[1] @ pair[0]) @ inputs.T).square().sum()
    a, b = closest(error, inputs.T @ inputs, rank=8)
    assert a.shape == (8, 96) and b.shape == (40, 8)
    left, sizes, right = torch.linalg.svd(error, full_matrices=False)
    assert cost((a, b)) < 0.8 * cost((right[:8], left[:, :8] * sizes[:8]))
    for seed in range(5):
        noise = torch.randn(b.shape, generator=torch.Generator().manual_seed(seed)) * 0.05 * b.std()
        assert cost((a, b)) < cost((a, b + noise))


def test_a_folder_that_does_not_say_what_it_learned(save_run, tiny, export, capsys):
    """Is rounded to the nearest, and that is said."""
    run, _ = save_run(tiny(), "custom_lora")
    merged = export(run, "merged", name="merged")
    folder = export(merged, "w4a16", group_size=32)
    assert "each weight is rounded to the nearest" in capsys.readouterr().out
    assert json.loads((folder / "config.json").read_text())["quantization_config"]


def test_group_that_fits(save_run, tiny, export, capsys):
    """64 where 128 does not divide the rows, said; one that was given is taken or refused."""
    run, _ = save_run(tiny(), "custom_lora")
    config = json.loads((export(run, "w4a16") / "config.json").read_text())
    assert config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] == 64
    assert "--group_size 64: 128 does not divide" in capsys.readouterr().out
