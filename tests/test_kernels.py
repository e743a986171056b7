"""Fast paths against the plain ones that define them: on the CPU without Triton, on a GPU with it."""

import pytest
import torch
from torch import nn

from methods.dora import DoRALinear, row_norms, row_norms_dense
from methods.kernels import cross_entropy
from methods.kernels.reduce import column_dot, column_dot_plain
from methods.lora import LoRALinear
from methods.quantizers.bnb import Bnb4bit
from methods.quantizers.hqq import HQQ
from methods.quantizers.linear import QuantizedLinear

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
QUANTIZERS = [
    Bnb4bit(),
    Bnb4bit("fp4", 128, "fp32"),
    Bnb4bit("nf4", 32, "double"),
    *[HQQ(bits) for bits in (8, 4, 3, 2, 1)],
    None,
]
IN, OUT = 256, 192


def weight(device, dtype=torch.float32, *, out=OUT):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(out, IN, generator=generator) * 0.05).to(device, dtype)


def base_linear(quantizer, device, dtype, *, out=OUT):
    """A frozen base with the values of `weight`."""
    linear = nn.Linear(IN, out, bias=True, device=device, dtype=dtype).requires_grad_(False)
    linear.weight.copy_(weight(device, dtype, out=out))
    if quantizer is None:
        return linear
    base = QuantizedLinear(linear, quantizer)
    for name, packed in zip(base.packed_names, quantizer.quantize(weight(device, out=out)), strict=True):
        setattr(base, name, nn.Parameter(packed, requires_grad=False))
    return base


def adapter(kind, base, device, dtype, *, fused):
    """An adapter of rank 8 off its start."""
    layer = kind(base, rank=8, alpha=16, dropout=0.0, dtype=dtype, fused=fused)
    generator = torch.Generator().manual_seed(1)
    for name in kind.own_parameters:
        parameter = getattr(layer, name)
        value = torch.randn(parameter.shape, generator=generator) * 0.05
        value = value.abs() + 0.5 if name.endswith("_norm") else value
        new = nn.Parameter(value.to(device, parameter.dtype), requires_grad=parameter.requires_grad)
        setattr(layer, name, new)
    return layer


def relative(got, want):
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


@pytest.mark.gpu
@pytest.mark.parametrize("quantizer", [q for q in QUANTIZERS if q], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dequantize_kernels_give_the_same_bits(quantizer, dtype):
    """The Triton kernels equal the quantizers' own torch code bit for bit; with a row factor, to rounding."""
    packed = quantizer.quantize(weight("cuda"))
    settings = dict(in_features=IN, dtype=dtype)
    plain = quantizer.dequantize_plain(packed, **settings)
    fast = quantizer.dequantize(packed, **settings)
    if getattr(quantizer, "scales", None) != "double":
        assert torch.equal(fast, plain)
    else:  # low + step * code is one fused multiply-add in the kernel, two roundings in torch
        assert relative(fast, plain) < 1e-6 if dtype == torch.float32 else relative(fast, plain) < 1e-3
    factor = torch.rand(OUT, device="cuda") + 0.5
    fast = quantizer.dequantize(packed, **settings, row_factor=factor)
    assert relative(fast, plain.float() * factor[:, None]) < (1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("out_features", [OUT, 576])
def test_fused_adapter_equals_plain(device, kind, quantizer, dtype, tolerance, out_features):
    """Output and all gradients of the fused operator are those of the definition, for every quantizer, also where the
    output is so much wider than the input that the operator multiplies `[x, A x]` at once."""
    base = base_linear(quantizer, device, dtype, out=out_features)
    x = torch.randn(3, 17, IN, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    grad = torch.randn(3, 17, out_features, generator=torch.Generator().manual_seed(3)).to(device, dtype)
    results = []
    for fused in (False, True):
        layer = adapter(kind, base, device, dtype, fused=fused)
        inputs = x.clone().requires_grad_()
        out = layer(inputs)
        out.backward(grad)
        trained = [p.grad for p in layer.parameters() if p.requires_grad]
        results.append([out.detach(), inputs.grad, *trained])
    plain, fast = results
    assert len(fast) == (4 if kind is LoRALinear else 5)
    for got, want in zip(fast, plain, strict=True):
        assert relative(got, want) < tolerance


@pytest.mark.parametrize("device", DEVICES)
def test_row_norms_equal_dense(device):
    """The factored norm equals that of the built product in fp32; a zero row stays finite (peft#2049)."""
    w, generator = weight(device), torch.Generator().manual_seed(4)
    w[3] = 0
    a = torch.randn(8, IN, generator=generator).to(device)
    b = torch.randn(OUT, 8, generator=generator).to(device) * 0.1
    b[3] = 0
    factored = row_norms(w, w.norm(dim=1), a, b, 2.0)
    torch.testing.assert_close(factored, row_norms_dense(w, a, b, 2.0), rtol=2e-6, atol=1e-6)
    assert factored.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [8, 64, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("quantizer", [q for q in QUANTIZERS if isinstance(q, Bnb4bit)], ids=str)
def test_row_norms_of_packed_rows(quantizer, dtype, rank):
    """The kernel's norms are those of the built product, for ragged numbers of rows and groups that split; so are those
    that end in the same kernel after cuBLAS."""
    generator = torch.Generator().manual_seed(5)
    packed = quantizer.quantize(torch.randn(200, 4096, generator=generator).cuda() * 0.05)
    a = (torch.randn(rank, 4096, generator=generator) * 0.02).to("cuda", dtype)
    b = (torch.randn(200, rank, generator=generator) * 0.1).to("cuda", dtype)
    w = quantizer.dequantize_plain(packed, in_features=4096, dtype=dtype)
    norm, dense = w.float().norm(dim=1), row_norms_dense(w, a, b, 2.0)
    torch.testing.assert_close(quantizer.row_norms(packed, norm, a, b, 2.0), dense, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(row_norms(w, norm, a, b, 2.0), dense, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("trained_head", [False, True])
def test_fused_loss_equals_plain(device, dtype, tolerance, trained_head, monkeypatch):
    """Loss and gradients without the logits equal those with them, over several chunks."""
    monkeypatch.setattr(cross_entropy, "LOGITS_BYTES", 5000 * 7)
    generator = torch.Generator().manual_seed(5)
    head = (torch.randn(5000, 64, generator=generator) * 0.2).to(device, dtype).requires_grad_(trained_head)
    hidden = torch.randn(33, 64, generator=generator).to(device, dtype)
    targets = torch.randint(0, 5000, (33,), generator=generator).to(device)
    targets[[3, 32]] = -100
    results = []
    for function in (cross_entropy.linear_cross_entropy_plain, cross_entropy.linear_cross_entropy):
        inputs = hidden.clone().requires_grad_()
        loss = function(inputs, head, None, targets)
        head.grad = None
        (loss * 0.25).backward()
        results.append([loss.detach(), inputs.grad, *([head.grad] if trained_head else [])])
    for got, want in zip(results[1], results[0], strict=True):
        assert relative(got, want) < tolerance


@pytest.mark.parametrize("device", DEVICES)
def test_column_dot(device):
    """The one-pass column dot equals the plain one."""
    generator = torch.Generator().manual_seed(6)
    left, right = (torch.randn(1001, 333, generator=generator).to(device) for _ in range(2))
    assert relative(column_dot(left, right), column_dot_plain(left, right)) < 1e-5
