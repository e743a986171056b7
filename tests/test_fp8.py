"""--compute fp8: frozen products of 8-bit floats, against the same with the rounding done by hand."""

from types import SimpleNamespace

import pytest
import torch
from closeness import assert_close_norm, assert_learns
from kernel_devices import KERNEL_DEVICES
from real_run import first_step, make_config, plan
from torch import nn

from fsdp_utils.core.errors import UserError
from fsdp_utils.model import assemble
from methods.kernels import dequantize, fp8
from methods.kernels.adapted import LowRank, adapted_linear
from methods.quantizers.bnb import Bnb4bit
from methods.quantizers.hqq import HQQ
from methods.quantizers.linear import QuantizedLinear, compute_in_fp8, packed_parts, weight_rows

OUT, IN, TOKENS, RANK = 96, 128, 40, 8
CPU = torch.device("cpu")
QUANTIZERS = {
    "nf4": Bnb4bit(),
    "fp4, double": Bnb4bit("fp4", scales="double"),
    **{f"hqq {bits}": HQQ(bits) for bits in (8, 4, 3, 2, 1)},
    "dense": None,
}


def random(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def base_of(quantizer, device=CPU):
    """A loaded base linear whose rows differ much in size; one is zero."""
    weight = random(OUT, IN, seed=1) * torch.logspace(-2, 1, OUT)[:, None]
    weight[3] = 0
    linear = nn.Linear(IN, OUT, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    linear.weight.data = weight.bfloat16()
    if quantizer is None:
        return linear.to(device)
    packed = QuantizedLinear(linear, quantizer).to_empty(device="cpu")
    for parameter, values in zip(packed.packed(), quantizer.quantize(weight.bfloat16()), strict=True):
        parameter.data = values
    return packed.to(device)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("shape", [(64, 128), (1, 300), (97, 65)])
def test_transposed(device, shape, monkeypatch):
    """Every byte in its place, of whole tiles and of parts."""
    monkeypatch.setattr(dequantize, "available", lambda tensor: True)
    matrix = random(*shape).to(device).to(fp8.E4M3)
    found = fp8.transposed(matrix)
    assert found.is_contiguous() and torch.equal(found.float(), matrix.float().T)


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("shape", [(5, 8200), (1, 14336), (3, 300), (0, 9000)])
def test_rows_by_the_kernel(device, shape, columns):
    """The plain version's scales and bytes; rows of zeros, and of numbers whose scale has no inverse, too."""
    rows = (random(*shape) * torch.tensor([1.0, 1e-39, 0, 1e30, 3])[: shape[0], None]).to(device)
    columns = torch.linspace(0.1, 2, shape[1], device=device)[None] if columns else None
    values, scale = fp8.by_rows_kernel(rows, columns)
    wanted = fp8.by_rows_plain(rows, columns)
    assert torch.equal(scale, wanted.scale) and scale.isfinite().all()
    values, expected = values.float(), wanted.values.float()
    if device == "cuda":
        assert torch.equal(values, expected)
    else:  # Triton 3.6's interpreter cuts off instead of rounding, and loses the carry: 127.4 becomes 64
        values = torch.where(torch.frexp(expected).mantissa.abs() == 0.5, expected, values)
        assert (values - expected).norm() <= 0.01 * expected.norm()


def rounded(rows: torch.Tensor) -> torch.Tensor:
    """What is left of rows in 8 bits, fp32."""
    scale = rows.abs().amax(1, keepdim=True).float().clamp_min(1e-30) / 448
    return (rows.float() / scale).to(torch.float8_e4m3fn).float() * scale


@pytest.mark.parametrize("name", QUANTIZERS)
def test_no_weight_is_larger(name):
    """`row_peaks` bounds every weight, closely for codes that use all of their range."""
    base = base_of(QUANTIZERS[name])
    compute_in_fp8([SimpleNamespace(base_layer=base)])
    weight, peaks = weight_rows(base, lambda p: p, dtype=torch.float32), packed_parts(base).peaks
    assert (weight.abs().amax(1) <= peaks * 1.0001).all()
    assert (weight.abs().amax(1) >= peaks * 0.45)[weight.abs().amax(1) > 0].all()


@pytest.mark.parametrize("with_adapter", [False, "lora", "dora"])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_products(name, with_adapter):
    """Output and gradients are those of the operator in fp32 with rounded x, W and gradient."""
    base = base_of(QUANTIZERS[name])
    assert not compute_in_fp8([SimpleNamespace(base_layer=base)])
    x, a, b = (
        random(*s, seed=i).requires_grad_() for i, s in enumerate([(2, TOKENS // 2, IN), (RANK, IN), (OUT, RANK)], 2)
    )
    factor = torch.linspace(0.5, 2, OUT).requires_grad_() if with_adapter == "dora" else None
    adapter = LowRank(a, b, factor, 0.5) if with_adapter else None
    got = adapted_linear(x, packed_parts(base), adapter)
    grad = random(2, TOKENS // 2, OUT, seed=9)
    got.backward(grad)

    c = torch.ones(OUT) if factor is None else factor.detach()
    weight = weight_rows(base, lambda p: p, dtype=torch.float32) * c[:, None]
    scale = fp8.scale_of(packed_parts(base).peaks * c)[:, None]
    in_eight = (weight / scale).to(torch.float8_e4m3fn).float()
    rows, grads = x.detach().view(-1, IN), grad.view(-1, OUT)
    low, scaled_b = rows.float() @ a.detach().float().T, b.detach().float() * 0.5 * c[:, None]
    wanted = rounded(rows) @ (in_eight * scale).T
    through_b = grads.float() @ scaled_b
    grad_x = rounded(grads * scale.T) @ in_eight
    if with_adapter:
        wanted, grad_x = wanted + low @ scaled_b.T, grad_x + through_b @ a.detach().float()
        close(a.grad, through_b.T @ rows.float())
        close(b.grad, (grads.float().T @ low) * 0.5 * c[:, None])
    close(got.view(-1, OUT), wanted)
    close(x.grad.view(-1, IN), grad_x)
    if factor is not None:
        close(factor.grad, (grads.float() * wanted).sum(0) / c, relative=2e-2)


def close(got, wanted, relative=1e-2):
    assert (got.float() - wanted).norm() < relative * wanted.norm()


def test_error_of_a_product():
    """Of random numbers, as stated."""
    x, w = random(256, 512), random(256, 512, seed=1)
    exact = x.float() @ w.float().T
    error = (fp8.product(fp8.by_rows(x), fp8.by_rows(w)).float() - exact).norm() / exact.norm()
    assert 0.03 < error < 0.045


@pytest.mark.parametrize(
    "train_type", ["qlora", "custom_qlora", "bnb_dora", "hqq_dora", "custom_lora", "bnb_llama_pro"]
)
def test_a_step(one_process, flags, train_type):
    """Loss and gradients are near those of 16 bits, and differ: the base's products are rounded, not the adapter's."""
    given = flags(train_type=train_type, precision="bf16")
    plain, fast = one_process(given), first_step({**given, "compute": "fp8"})
    assert_learns(fast)
    assert fast[0] != plain[0]
    assert_close_norm(fast, plain, relative=0.25)  # bf16 itself is 0.02 off fp32


@pytest.mark.parametrize(
    "more", [dict(batch_size=4), dict(context_parallel=2), dict(batch_size=4, tile_tokens=48)], ids=str
)
def test_two_processes(pair, flags, more):
    """Rows and tokens are rounded each by itself, so that several processes come to what one does."""
    given = flags(train_type="bnb_dora", precision="bf16", compute="fp8")
    alone = first_step(given)
    for step in pair.run(first_step, {**given, **more}):
        assert_close_norm(step, alone, relative=3e-2)


def test_what_stays(tiny, capsys):
    """A side that is no multiple of 16 is said; adapters on a dense base count, a family's own linears do not."""
    odd = dict(model_name=tiny("llama", intermediate_size=200), train_type="custom_lora", precision="bf16")
    planned = plan(make_config(**odd, compute="fp8"))
    assert "note: --compute fp8: 6 linears stay in 16 bits" in capsys.readouterr().out
    layers = planned.model.model.layers[0]
    assert layers.self_attn.q_proj.base_layer.fp8 and not layers.mlp.up_proj.base_layer.fp8
    assert not hasattr(layers.self_attn.o_proj, "fp8")


def test_flags(tiny, monkeypatch):
    with pytest.raises(UserError, match="--compute fp8: adds up in bf16, not with --precision fp32; use bf16"):
        make_config(model_name=tiny("llama"), train_type="bnb_dora", compute="fp8")
    with pytest.raises(UserError, match="--compute fp8: not with --train_type full; use one of custom_lora"):
        make_config(model_name=tiny("llama"), train_type="full", precision="bf16", compute="fp8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    config = make_config(model_name=tiny("llama"), train_type="bnb_dora", precision="bf16", compute="fp8")
    monkeypatch.setattr(assemble, "_has_bf16", lambda: True)
    with pytest.raises(UserError, match="--compute fp8: this GPU has no products of 8-bit floats"):
        assemble.check_hardware(config, device=torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", QUANTIZERS)
def test_on_a_gpu(name):
    """The kernels give the CPU's products."""
    results = []
    for device in (CPU, torch.device("cuda")):
        base = base_of(QUANTIZERS[name], device)
        compute_in_fp8([SimpleNamespace(base_layer=base)])
        x, a, b = (
            random(*s, seed=i).to(device).requires_grad_() for i, s in enumerate([(64, IN), (RANK, IN), (OUT, RANK)])
        )
        out = adapted_linear(x, packed_parts(base), LowRank(a, b, None, 0.5))
        out.backward(random(64, OUT, seed=9).to(device))
        results.append([t.detach().cpu() for t in (out, x.grad, a.grad, b.grad)])
    for one, other in zip(*results, strict=True):
        close(one, other.float(), relative=2e-2)
