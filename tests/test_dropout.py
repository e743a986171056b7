"""Dropout whose mask is a hash: its rate, what it depends on, and that every way of running it drops the same."""

import pytest
import torch
from real_run import make_config, plan
from torch import nn

from methods.dropout import DropoutSeeds, SeededDropout, kept, seed_dropout
from methods.kernels.rounding import hashed, signed

CPU = torch.device("cpu")
DEVICES = [CPU, pytest.param("cuda", marks=pytest.mark.gpu)]


def as_seed(number: int) -> torch.Tensor:
    return torch.tensor(number, dtype=torch.int32)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.99])
def test_rate(rate):
    """Over all elements, over each row and each column, the share that stays is that of independent draws."""
    stays = kept(torch.empty(2, 500, 1000), rate, as_seed(7)).view(1000, 1000).double()
    spread = (rate * (1 - rate)) ** 0.5
    assert stays.mean() == pytest.approx(1 - rate, abs=5 * spread / 1000)
    for means in (stays.mean(0), stays.mean(1)):
        assert means.std().item() == pytest.approx(spread / 1000**0.5, rel=0.1, abs=1e-12)
        assert (means - (1 - rate)).abs().max() <= 6 * spread / 1000**0.5


@pytest.mark.parametrize("device", DEVICES)
def test_definition(device):
    """The hash in plain integers."""
    seed = -123456789
    found = kept(torch.empty(3, 2, 4, device=device), 0.4, as_seed(seed).to(device)).view(6, 4)
    word = seed & 0xFFFFFFFF
    for row in range(6):
        for column in range(4):
            bits = hashed((hashed(row ^ word) + hashed(column ^ word ^ 0xFFFFFFFF)) & 0xFFFFFFFF)
            assert found[row, column].item() == (signed(bits) >= round(0.4 * 2**32) - 2**31)


def test_seeds_and_rows_are_independent():
    """Two seeds, two rows or two columns agree as often as chance has it."""
    one, other = (kept(torch.empty(1000, 1000), 0.5, as_seed(seed)).double() for seed in (1, 2))
    for a, b in ((one, other), (one[:-1], one[1:]), (one[:, :-1], one[:, 1:]), (one, one.T)):
        assert (a == b).double().mean() == pytest.approx(0.5, abs=0.004)


@pytest.mark.parametrize("device", DEVICES)
def test_every_way_drops_the_same(device):
    """Compiled and not, for shapes that change: values and gradients; what stays is scaled so that the mean stays."""
    torch._dynamo.reset()
    layer = SeededDropout(0.25).train()
    layer.seed = as_seed(99).to(device)
    compiled = torch.compile(lambda x: layer(x * 2), backend="inductor" if device == "cuda" else "aot_eager")
    for rows in (5, 9, 3):
        x = torch.randn(2, rows, 64, device=device).requires_grad_()
        wanted = torch.where(kept(x, 0.25, layer.seed), 2 * x / 0.75, 0)
        torch.testing.assert_close(compiled(x), wanted)
        ways = [torch.autograd.grad(way.square().sum(), x)[0] for way in (wanted, compiled(x), layer(2 * x))]
        for gradient in ways[1:]:
            torch.testing.assert_close(gradient, ways[0])
    assert layer.eval()(x) is x


def test_seeds_are_drawn_for_each_layer():
    """Each layer has its own, another one at each draw, and the generator's state brings them back."""
    model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.0)))
    seed_dropout(model)
    assert [type(m) for m in model.modules() if not list(m.children())] == [SeededDropout, SeededDropout, nn.Dropout]
    seeds, x, seen = DropoutSeeds(model.train(), device=CPU), torch.ones(8, 64), []
    for start in (3, 3, 4):
        torch.manual_seed(start)
        seeds.draw()
        seen += [model[0](x), model[1](x)]
        seeds.draw()
        seen += [model[0](x)]
    for number, values in enumerate(seen):
        same = [other for other, more in enumerate(seen) if torch.equal(values, more)]
        assert same == ([number % 3, number % 3 + 3] if number < 6 else [number])


@pytest.mark.parametrize("train_type", ["lora", "custom_lora", "dora"])
def test_no_layer_draws_for_itself(tiny, train_type):
    """PEFT's layers and a family's own get it too."""
    family = dict(embd_pdrop=0.1, resid_pdrop=0.1) if train_type == "custom_lora" else {}
    config = make_config(
        model_name=tiny("phi3" if family else "llama", **family), train_type=train_type, lora_dropout=0.1
    )
    found = [m for m in plan(config).model.modules() if isinstance(m, nn.Dropout) and m.p]
    assert len(found) > 2 and {type(m) for m in found} == {SeededDropout}
