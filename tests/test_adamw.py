"""AdamW that rounds bf16 weights at random: it learns what fp32 does, and the same for any number of processes."""

import math

import pytest
import torch
from kernel_devices import DEVICES, KERNEL_DEVICES, relative
from real_run import make_config, prepared

from fsdp_utils.training.optim import LocalParameters, StochasticAdamW, make_optimizer
from methods import TRAIN_TYPES
from methods.kernels import adamw
from methods.kernels.adamw import Row, Step, random_bits, round_, step_plain
from methods.kernels.rounding import hashed

STEP = Step(lr=1e-3, weight_decay=0.1, beta1=0.9, beta2=0.999, eps=1e-8, number=3, seed=2**40 + 5)


def row(*shape, parameter=7, first=0, seed=0, device="cpu") -> Row:
    """Weights of about 0.02, gradients and moments as they are in training."""
    generator = torch.Generator().manual_seed(seed)
    weight, grad, m = (torch.randn(shape, generator=generator) * 0.02 for _ in range(3))
    tensors = (t.to(device, torch.bfloat16) for t in (weight, grad, m, m.square() + 1e-6))
    return Row(*tensors, parameter, first)


def test_random_bits_are_those_of_the_element():
    """The vectorized hash is the scalar one, whose bits are each one half of the time; also beyond 31 bits."""
    for first in (0, 2**31 - 5, 2**32 - 5, 2**40):
        place = row(1000, first=first)
        key = hashed(place.parameter ^ hashed(STEP.number ^ hashed((STEP.seed ^ STEP.seed >> 32) & 0xFFFFFFFF)))
        wanted = [hashed((first + i) % 2**32 ^ key) for i in range(100, 1000)]
        bits = random_bits(place, STEP, 100, 1000)
        assert [x % 2**32 for x in bits.tolist()] == wanted
        for bit in range(32):
            assert (bits >> bit & 1).float().mean().item() == pytest.approx(0.5, abs=0.08)


def test_rounding_is_right_on_average():
    """Always one of the two neighbours, each as often as the value is near it; what bf16 can hold stays."""
    values = torch.tensor([1.0, 1.001, -1.001, 0.0199, 3e-39, -7.123e8, float("inf"), 0.0])
    drawn = torch.stack([round_(values.clone(), bits) for bits in range(0, 65536, 16)])
    assert torch.equal(drawn, drawn.bfloat16().float())
    assert (drawn[:, [0, 6, 7]] == values[[0, 6, 7]]).all()
    for i in range(1, 6):
        found = drawn[:, i].unique()
        assert len(found) == 2 and found[0] < values[i] < found[1]
        assert (drawn[:, i].double().mean() - values[i]).abs() < 1e-3 * (found[1] - found[0])


@pytest.mark.parametrize("device", DEVICES)
def test_small_steps_are_not_lost(device):
    """A hundred steps at 1e-5 move bf16 weights as far as torch's AdamW moves fp32 ones; torch's AdamW does not."""
    start = row(200, 300).weight.to(device)
    moved = {}
    for name, dtype in (("fp32", torch.float32), ("nearest", torch.bfloat16), ("stochastic", torch.bfloat16)):
        p = torch.nn.Parameter(start.to(dtype, copy=True))
        if name == "stochastic":
            optimizer = StochasticAdamW([p], [(0, 0)], lr=1e-5, wd=0.1, seed=1)
        else:
            optimizer = torch.optim.AdamW([p], lr=1e-5, weight_decay=0.1)
        for i in range(100):
            p.grad = (row(200, 300, seed=1).grad + row(200, 300, seed=i).grad).to(device, dtype)
            optimizer.step()
        moved[name] = p.detach().float() - start.float()
    along = {name: ((m * moved["fp32"]).sum() / moved["fp32"].square().sum()).item() for name, m in moved.items()}
    assert along["stochastic"] == pytest.approx(1, abs=0.01)
    assert along["nearest"] < 0.3


@pytest.mark.parametrize("device", DEVICES)
def test_moments_are_torchs(device):
    """When gradients shrink, the second moment falls as in fp32; that of torch's AdamW in bf16 is a third too large."""
    grads = [row(50, 64, seed=i).grad.float() * (10 if i < 5 else 0.1) for i in range(300)]
    p, reference = (torch.nn.Parameter(row(50, 64).weight.to(device, t)) for t in (torch.bfloat16, torch.float32))
    ours = StochasticAdamW([p], [(0, 0)], lr=1e-3, wd=0.1, seed=1)
    torchs = torch.optim.AdamW([reference], lr=1e-3, weight_decay=0.1)
    for grad in grads:
        for parameter, optimizer in ((p, ours), (reference, torchs)):
            parameter.grad = grad.to(device, torch.bfloat16).to(parameter.dtype)
            optimizer.step()
    got, wanted = ours.state[p], torchs.state[reference]
    assert relative(got["exp_avg"], wanted["exp_avg"]) < 1e-2
    assert relative(got["exp_avg_sq"], wanted["exp_avg_sq"]) < 5e-2
    assert got["exp_avg_sq"].float().mean().item() == pytest.approx(wanted["exp_avg_sq"].mean().item(), rel=5e-3)
    assert relative(p.detach(), reference.detach()) < 4e-2


def test_rate_and_eps_are_torchs():
    """A rate that changes between steps, and gradients as small as eps, move a weight as in fp32."""
    start = torch.full((4096,), 1e-3)  # small: what is rounded is far below a step
    p, reference = (torch.nn.Parameter(start.to(dtype)) for dtype in (torch.bfloat16, torch.float32))
    ours = StochasticAdamW([p], [(0, 0)], lr=1.0, wd=0.1, seed=1)
    torchs = torch.optim.AdamW([reference], lr=1.0, weight_decay=0.1)
    for rate in (1e-2, 3e-2, 1e-3):
        for parameter, optimizer in ((p, ours), (reference, torchs)):
            optimizer.param_groups[0]["lr"] = rate
            parameter.grad = torch.full_like(parameter, 1.5 * 2**-27)
            optimizer.step()
    assert p.float().mean().item() == pytest.approx(reference.mean().item(), rel=2e-3)
    assert reference.mean().item() == pytest.approx(-0.0208, rel=0.1)  # with eps: half of a rate a step


def test_bits_do_not_depend_on_the_sharding():
    """Rows that two processes hold become what they become in one."""
    whole = row(90, 64)
    halves = [
        Row(*(t[part].clone() for t in whole[:4]), whole.parameter, part.start * 64)
        for part in (slice(0, 37), slice(37, 90))
    ]
    step_plain([whole], STEP)
    step_plain(halves, STEP)
    for i in (0, 2, 3):
        assert torch.equal(torch.cat([half[i] for half in halves]), whole[i])
    other = row(90, 64, parameter=8)
    step_plain([other], STEP)
    assert not torch.equal(other.weight, whole.weight)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("aligned", [True, False])
def test_kernel_equals_plain(device, aligned, monkeypatch):
    """One launch for tensors of many sizes gives what the plain version does, but for few elements that fp32 sums in
    another order round the other way; of the first moment (9 m + g) / 10, every tenth is a tie."""
    monkeypatch.setattr(adamw, "CHUNK", 1000)
    sizes = [(3,), (70, 64), (5000,), (1,), (33, 65)]
    results = []
    for run in (step_plain, adamw.StepKernel()):
        rows = [row(*size, parameter=i, first=100 * i, seed=i, device=device) for i, size in enumerate(sizes)]
        if not aligned:
            rows = [Row(*(torch.cat([t.view(-1)[:1], t.view(-1)])[1:] for t in r[:4]), *r[4:]) for r in rows]
        for number in (1, 2, 3):  # the third with what the second told the GPU
            run(rows, STEP._replace(number=number))
            grads = [r.grad.clone() for r in rows] if number == 1 else [r.grad for r in rows]
            rows = [r._replace(grad=grad) for r, grad in zip(rows, grads, strict=True)]
        results.append([torch.cat([r[i].view(-1) for r in rows]) for i in (0, 2, 3)])
    for ours, wanted, few, near in zip(*results, (3e-3, 0.1, 3e-3), (1e-3, 3e-3, 1e-3), strict=True):
        assert (ours != wanted).float().mean() < few
        assert relative(ours, wanted) < near


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("unless", [math.nan, math.inf, 0.0])
def test_nothing_changes_where_the_run_diverged(device, unless):
    """The host has not looked yet when it launches a step: the step looks itself."""
    for run in (step_plain, adamw.StepKernel()):
        stepped, before = row(70, 64, device=device), row(70, 64, device=device)
        run([stepped], STEP._replace(unless=torch.tensor(unless, device=device)))
        same = [torch.equal(stepped[i], before[i]) for i in (0, 2, 3)]
        assert same == [unless != 0.0] * 3


def test_places_of_parameters(tiny):
    """Every trained parameter has a number of its own, its place in the whole model."""
    model = prepared(make_config(model_name=tiny("llama"), train_type="bnb_dora", precision="bf16")).model
    trained = LocalParameters(model)
    numbers = [number for number, _ in trained.places]
    assert len(set(numbers)) == len(trained.plain) and all(first == 0 for _, first in trained.places)
    parameters = list(model.parameters())
    assert all(parameters[n] is p for n, p in zip(numbers, trained.sharded, strict=True))


@pytest.mark.parametrize("train_type", TRAIN_TYPES)
def test_every_train_type(flags, train_type):
    """All that trains with --precision bf16 is bf16."""
    config = make_config(**flags(train_type=train_type, precision="bf16"))
    model = prepared(config).model
    assert isinstance(make_optimizer(config, LocalParameters(model)), StochasticAdamW)


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(3, 2, dtype=torch.bfloat16).T])
def test_what_it_does_not_take(wrong):
    """fp32, which would lose bits, and elements that do not lie side by side."""
    with pytest.raises(ValueError, match="contiguous bf16 parameters"):
        StochasticAdamW([torch.nn.Parameter(wrong)], [(0, 0)], lr=1.0, wd=0.0, seed=0)


@pytest.mark.parametrize(
    ("settings", "ours"),
    [
        (dict(), True),
        (dict(optimizer="fused_adamw"), True),
        (dict(precision="bf16_buffers_autocast"), True),
        (dict(precision="fp32"), False),
        (dict(precision="bf16_autocast"), False),
        (dict(optimizer="sgd"), False),
        (dict(stochastic_rounding=False), False),
    ],
)
def test_where_it_is_used(tiny, settings, ours):
    """Where AdamW trains bf16 weights, unless refused."""
    config = make_config(model_name=tiny("llama"), train_type="bnb_dora", **{"precision": "bf16", **settings})
    model = prepared(config).model
    trained = LocalParameters(model)
    assert isinstance(make_optimizer(config, trained), StochasticAdamW) is ours
    assert {p.dtype for p in trained.plain} == {torch.bfloat16 if config.stores_bf16 else torch.float32}
