"""Rounding at random to 16 bits keeps small changes of weights; to the nearest loses them."""

import hashlib

import pytest
import torch
from real_run import logits, make_config
from transformers import AutoModelForCausalLM

import train
from fsdp_utils.folders.describe import describe
from fsdp_utils.inference.load import load_for_inference
from methods.kernels import rounding
from methods.kernels.adamw import round_
from methods.kernels.rounding import at_random, bits_of

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def numbers(count: int = 20_000) -> torch.Tensor:
    """fp32 of both signs, from far below one to a thousand."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, generator=generator) * 10 ** (torch.rand(count, generator=generator) * 8 - 5)


@DTYPES
def test_each_becomes_one_of_its_neighbours(dtype):
    """And a number that the dtype has stays what it is, for any key."""
    x, tiny = numbers(), torch.finfo(dtype).smallest_normal
    step = torch.maximum(x.abs().log2().floor().exp2(), torch.tensor(tiny)) * torch.finfo(dtype).eps
    for key in (0, 2**32 - 1):
        found = at_random(x, dtype, key=key)
        assert found.dtype == dtype and ((found.float() - x).abs() < step).all()
        assert torch.equal(at_random(found.float(), dtype, key=key + 1), found)


@DTYPES
def test_the_expected_value_is_the_number(dtype):
    """Over many keys; to the nearest, the same numbers are off by a quarter of a step."""
    step = torch.finfo(dtype).eps
    x = 1 + step * torch.linspace(0, 1, 101)
    mean = torch.stack([at_random(x, dtype, key=key).float() for key in range(4000)]).mean(0)
    assert ((mean - x) / step).abs().max() < 0.04  # 5 standard deviations of 0.5 / 4000 ** 0.5
    assert ((x.to(dtype).float() - x) / step).abs().mean() > 0.2


@DTYPES
def test_what_has_no_neighbours(dtype):
    """Zeros with their sign, infinities and NaN are those of torch's own conversion; what is too large too."""
    big = torch.finfo(dtype).max
    x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, big, -big, 3.4e38])
    found, wanted = at_random(x, dtype, key=5), x.to(dtype)
    assert torch.equal(found.view(torch.int16)[~x.isnan()], wanted.view(torch.int16)[~x.isnan()])
    assert found.isnan().equal(x.isnan())


def test_bits_are_those_of_the_element(monkeypatch):
    """However many are rounded at once, and as the optimizer rounds with the same bits."""
    x = numbers().view(200, 100)
    wanted = at_random(x, torch.bfloat16, key=7)
    monkeypatch.setattr(rounding, "CHUNK", 333)
    assert torch.equal(at_random(x, torch.bfloat16, key=7), wanted)
    bits = bits_of(0, x.numel(), key=7, device=x.device) & 0xFFFF
    assert torch.equal(round_(x.clone().view(-1), bits).bfloat16().view_as(x), wanted)
    assert not torch.equal(at_random(x, torch.bfloat16, key=8), wanted)
    assert torch.equal(rounding._by_neighbours(x, torch.bfloat16, bits.view_as(x)), wanted)


def test_merging_keeps_small_changes(tiny, tiny_data, tmp_path, export):
    """Updates below half a unit in the last place: stock transformers has the change of the logits (as its projection
    on that of the trained model) in the merged folder, and the same bytes come from every export."""
    base = tiny("llama", dtype=torch.bfloat16, hidden_size=256, intermediate_size=512)
    run = tmp_path / "run"
    flags = dict(precision="bf16", train_type="custom_lora", lr=1e-4, max_steps=10, batch_size=4)
    train.main(make_config(model_name=base, dataset=tiny_data, save_model=True, output_dir=run, **flags))
    stock = lambda folder: logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), rows=64)
    before = stock(base)
    trained = load_for_inference(describe(run), device=torch.device("cpu"), dtype=torch.float32)
    change = logits(trained.eval(), rows=64) - before

    def kept(folder):
        return ((stock(folder) - before) * change).sum().item() / change.square().sum().item()

    folders = {name: export(run, "merged", name=name, rounding=name) for name in ("random", "nearest")}
    assert kept(folders["nearest"]) < 0.7 < 0.95 < kept(folders["random"]) < 1.05
    digest = lambda folder: hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert digest(export(run, "merged", name="again")) == digest(folders["random"])
