"""adamw_int8: codes that are right on average, learn as fp32 states do, and belong to rows."""

import pytest
import torch

from fsdp_utils.memory.budget import optimizer_bytes
from fsdp_utils.training.int8 import AdamWInt8
from methods.kernels.adamw import Row, Step, random_bits
from methods.kernels.adamw_int8 import decode, encode, step_row, tables

CPU = torch.device("cpu")
STEP = Step(lr=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.999, eps=1e-8, number=3, seed=2**40 + 5)
NAMES = ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")


def rows_of(*shape, seed=0, dtype=torch.float32) -> list[torch.Tensor]:
    """Weight and gradient as they are in training: elements differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    weight, grad, spread = (torch.randn(shape, generator=generator) for _ in range(3))
    return [(weight * 0.02).to(dtype), (grad * 0.02 * spread.exp()).to(dtype)]


@pytest.mark.parametrize("moment", [0, 1])
def test_codes_are_right_on_average(moment):
    """Always one of two neighbours, each as often as the value is near it; signs, zero and the largest are exact."""
    sizes = tables(CPU)[moment]
    values = torch.tensor([[1.0, 0.51, 0.0123, 3.3e-4, -0.2, 0.0][: 6 - 2 * moment]]) * 7
    rows = values.expand(65536, -1).contiguous()
    bits = torch.arange(65536, dtype=torch.int32).unsqueeze(1).expand_as(rows).contiguous()
    found = decode(*encode(rows, bits, sizes), sizes)
    exact = ((values == 7) | (values == 0))[0]
    assert (found[:, exact] == rows[:, exact]).all()
    for i in (~exact).nonzero().flatten():
        two = found[:, i].unique()
        assert len(two) == 2 and two[0] < values[0, i] < two[1] and (two[1] / two[0]).log().abs() < 0.07
        assert (found[:, i].double().mean() - values[0, i]).abs() < 1e-3 * (two[1] - two[0])


def test_second_moment_is_never_zero():
    """What is far below the largest of its block is stored as too large, which makes a step too small."""
    sizes = tables(CPU)[1]
    values = torch.tensor([[1.0, 1e-20, 0.0]])
    codes, scales = encode(values, torch.zeros(1, 3, dtype=torch.int32), sizes)
    assert (decode(codes, scales, sizes)[0, 1:] == 2.0**-24).all()


@pytest.mark.parametrize("columns", [8, 256, 300, 512])
def test_rows_do_not_depend_on_the_sharding(columns):
    """Rows that two processes hold become what they become in one, bit by bit; also where blocks are not full."""
    whole = [*rows_of(9, columns, dtype=torch.bfloat16)]
    cut = [slice(0, 5), slice(5, 9)]
    parts = [[t[part].clone() for t in whole] for part in cut]

    def stepped(weight, grad, first):
        p = torch.nn.Parameter(weight.clone())
        optimizer = AdamWInt8([p], [(7, first)], lr=1e-3, wd=0.1, seed=3)
        for _ in range(3):
            p.grad = grad
            optimizer.step()
        return [p.detach(), *(optimizer.state[p][name] for name in NAMES)]

    halves = [stepped(*part, place.start * columns) for part, place in zip(parts, cut, strict=True)]
    for i, tensor in enumerate(stepped(*whole, 0)):
        assert torch.equal(torch.cat([half[i] for half in halves]), tensor)


def test_first_step_is_torchs():
    """Before anything was stored in codes, a step is AdamW's."""
    weight, grad = rows_of(20, 300)
    p, reference = (torch.nn.Parameter(weight.clone()) for _ in range(2))
    ours = AdamWInt8([p], [(0, 0)], lr=1e-2, wd=0.1, seed=1)
    for parameter, optimizer in ((p, ours), (reference, torch.optim.AdamW([reference], lr=1e-2, weight_decay=0.1))):
        parameter.grad = grad.clone()
        optimizer.step()
    torch.testing.assert_close(p, reference, rtol=1e-6, atol=1e-7)


def test_moments_follow():
    """When gradients shrink, the second moment falls as in fp32, which rounding to the nearest would prevent."""
    p, reference = (torch.nn.Parameter(rows_of(64, 512)[0]) for _ in range(2))
    ours = AdamWInt8([p], [(0, 0)], lr=0.0, wd=0.0, seed=1)
    torchs = torch.optim.AdamW([reference], lr=0.0, weight_decay=0.0)
    for number in range(400):
        grad = rows_of(64, 512, seed=number)[1] * (1 if number < 5 else 0.01)
        for parameter, optimizer in ((p, ours), (reference, torchs)):
            parameter.grad = grad.clone()
            optimizer.step()
    state, wanted = ours.state[p], torchs.state[reference]["exp_avg_sq"]
    found = decode(state["exp_avg_sq"], state["exp_avg_sq_scale"], tables(CPU)[1])
    assert (found.log() - wanted.log()).abs().median() < 0.3
    assert found.mean().item() == pytest.approx(wanted.mean().item(), rel=0.02)


def test_learns_as_fp32():
    """Fifty steps of a regression come to the loss of torch's fp32 AdamW within a few percent; so with bf16 weights."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(512, 64, generator=generator) * torch.logspace(-2, 0, 64)
    targets = torch.tanh(inputs @ torch.randn(64, 32, generator=generator))
    losses = {}
    for name, dtype in (("fp32", torch.float32), ("int8", torch.float32), ("int8 bf16", torch.bfloat16)):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 300), torch.nn.Tanh(), torch.nn.Linear(300, 32)).to(dtype)
        parameters = list(model.parameters())
        places = [(i, 0) for i in range(len(parameters))]
        ours = lambda parameters=parameters, places=places: AdamWInt8(parameters, places, lr=3e-3, wd=0.01, seed=1)
        optimizer = ours() if "int8" in name else torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.01)
        for _ in range(50):
            optimizer.zero_grad()
            loss = (model(inputs.to(dtype)).float() - targets).square().mean()
            loss.backward()
            optimizer.step()
        losses[name] = loss.item()
    assert losses["fp32"] < 0.2  # from 0.6
    assert losses["int8"] == pytest.approx(losses["fp32"], rel=0.01)
    assert losses["int8 bf16"] == pytest.approx(losses["fp32"], rel=0.01)


def test_state_is_two_bytes():
    """And eight for each block of 256."""
    p = torch.nn.Parameter(rows_of(64, 512)[0])
    optimizer = AdamWInt8([p], [(0, 0)], lr=1e-3, wd=0.0, seed=1)
    p.grad = rows_of(64, 512)[1]
    optimizer.step()
    assert sum(t.nbytes for t in optimizer.state[p].values()) == p.numel() * 2 + p.numel() // 256 * 8


@pytest.mark.parametrize("shape", [(64, 512), (64, 300), (64, 8), (64,)])
def test_budget_is_no_less(shape):
    """For rows of any length, and for vectors, whose states are fp32."""
    p = torch.nn.Parameter(rows_of(*shape)[0])
    optimizer = AdamWInt8([p], [(0, 0)], lr=1e-3, wd=0.0, seed=1)
    p.grad = rows_of(*shape)[1]
    optimizer.step()
    held = sum(t.nbytes for t in optimizer.state[p].values())
    told = optimizer_bytes("adamw_int8", p.numel(), 2, columns=p.shape[1:].numel())
    assert held <= told <= 1.25 * held


def test_bits_are_of_their_own():
    """First moment, second moment and weight are rounded by different bits."""
    weight, grad = rows_of(4, 256)
    seen = []
    watched = lambda weight, *args: seen.append(args[3]) or [weight, *args[1]]
    codes = [torch.zeros(4, 256, dtype=t) for t in (torch.int8, torch.uint8)]
    row = Row(weight, grad, *codes, 7, 0)
    step_row(row, (torch.zeros(4, 1), torch.zeros(4, 1)), STEP, run=watched)
    one, other = seen[0]
    assert torch.equal(one.flatten(), random_bits(row, STEP, 0, 1024))
    assert abs(((one ^ other) & 0xFFFF).float().mean() / 65536 - 0.5) < 0.03
