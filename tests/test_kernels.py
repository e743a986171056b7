"""Fast paths against the plain ones that define them: on the CPU without Triton, on a GPU with it."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from kernel_devices import DEVICES, KERNEL_DEVICES, interpreted, relative
from tiny import SHAPE
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from methods.dora import DoRALinear, row_norms, row_norms_dense
from methods.kernels import adapted, cross_entropy, dequantize, norms, swiglu
from methods.kernels.gated_mlps import GATED_MLPS
from methods.kernels.reduce import add_kernel, add_plain, column_dot_kernel, column_dot_plain
from methods.lora import LoRALinear
from methods.quantizers.bnb import Bnb4bit
from methods.quantizers.hqq import HQQ
from methods.quantizers.int4 import Int4
from methods.quantizers.linear import QuantizedLinear, packed_parts
from methods.quantizers.mxfp4 import MXFP4

BNB = [Bnb4bit(), Bnb4bit("fp4", 128, "fp32"), Bnb4bit("nf4", 32, "double")]
QUANTIZERS = [
    *BNB,
    *[HQQ(bits) for bits in (8, 4, 3, 2, 1)],
    Int4(64, "bf16"),
    Int4(128, "fp16"),
    MXFP4(),
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


def adapter(kind, base, device, dtype, *, fused, dropout=0.0):
    """An adapter of rank 8 off its start."""
    layer = kind(base, rank=8, scaling=2.0, dropout=dropout, dtype=dtype, fused=fused)
    generator = torch.Generator().manual_seed(1)
    for name in kind.own_parameters:
        parameter = getattr(layer, name)
        value = torch.randn(parameter.shape, generator=generator) * 0.05
        value = value.abs() + 0.5 if name.endswith(("_norm", "initial_magnitude")) else value
        new = nn.Parameter(value.to(device, parameter.dtype), requires_grad=parameter.requires_grad)
        setattr(layer, name, new)
    return layer


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


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("others", [1, 3])
def test_sum_of_processes(device, dtype, others):
    """In fp32 and in the same order as the plain version, rounded once."""
    generator = torch.Generator().manual_seed(0)
    own, *rest = torch.randn(1 + others, 5000, generator=generator).to(device, dtype)
    rest, found, wanted = torch.stack(rest), torch.empty_like(own), torch.empty_like(own)
    add_kernel(own, rest, 1 / (1 + others), out=found)
    add_plain(own, rest, 1 / (1 + others), out=wanted)
    if device == "cuda" or dtype == torch.float32:
        assert torch.equal(found, wanted)
    else:  # Triton's interpreter cuts off instead of rounding
        assert relative(found, wanted) < 4e-3


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("wider", [0, 8])
def test_dense_rows_give_the_same_bits(device, dtype, wider, monkeypatch):
    """As torch multiplies them, also into some columns of a wider matrix."""
    monkeypatch.setattr(dequantize, "available", lambda tensor: True)
    dense = torch.randn(5, 4100, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    factor = torch.tensor([0.3, -2.7, 0, 1, 1e-3], device=device)
    out = torch.full((5, 4100 + wider), 7, device=device, dtype=dtype)
    dequantize.dense_rows(dense, factor, dtype=dtype, out=out[:, :4100])
    found, wanted = out[:, :4100], (dense * factor[:, None]).to(dtype)
    assert (out[:, 4100:] == 7).all()
    if device == "cuda" or dtype == torch.float32:
        assert torch.equal(found, wanted)
    else:  # Triton's interpreter cuts off instead of rounding
        assert relative(found, wanted) < 4e-3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("out_features", [OUT, 576, 96])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_fused_adapter_equals_plain(device, kind, quantizer, dtype, tolerance, out_features, dropout, monkeypatch):
    """Output and all gradients of the fused operator are those of the definition, for every quantizer, also where one
    side is so much wider than the other that base and adapter are one product there, and with what the same random
    numbers drop."""
    monkeypatch.setattr(adapted, "CHUNK", 20)  # of 51 tokens
    base = base_linear(quantizer, device, dtype, out=out_features)
    x = torch.randn(3, 17, IN, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    grad = torch.randn(3, 17, out_features, generator=torch.Generator().manual_seed(3)).to(device, dtype)
    results = []
    for fused in (False, True):
        layer = adapter(kind, base, device, dtype, fused=fused, dropout=dropout)
        inputs = x.clone().requires_grad_()
        torch.manual_seed(0)
        out = layer(inputs)
        out.backward(grad)
        trained = [p.grad for p in layer.parameters() if p.requires_grad]
        results.append([out.detach(), inputs.grad, *trained])
    plain, fast = results
    assert len(fast) == (4 if kind is LoRALinear else 5)
    for got, want in zip(fast, plain, strict=True):
        assert relative(got, want) < tolerance


@dataclass(frozen=True)
class Parts:
    """A quantizer that lays a weight out in any number of tensors."""

    count: int

    def layout(self, out_features, in_features):
        return {f"part{number}": ((out_features, in_features), torch.float32) for number in range(self.count)}


@pytest.mark.parametrize("count", [1, 4])
def test_layouts_that_the_fused_operator_does_not_take(count):
    """Other than two or three packed tensors would shift or lose an argument of the operator: refused by name."""
    with pytest.raises(ValueError, match=rf"Parts\(count={count}\) .*part{count - 1}\)"):
        packed_parts(QuantizedLinear(nn.Linear(IN, OUT), Parts(count)))


def mlp(kind, device, dtype, **settings):
    """Llama's MLP, its first two projections adapted."""
    module = LlamaMLP(LlamaConfig(hidden_size=IN, intermediate_size=OUT, **settings)).to(device, dtype)
    module.requires_grad_(False)
    for name in ("gate_proj", "up_proj"):
        setattr(module, name, adapter(kind, base_linear(Bnb4bit(), device, dtype), device, dtype, fused=True))
        getattr(module, name).base_layer.bias = None
    return module


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_swiglu_between_dora_projections(device, dtype, tolerance):
    """Output and all gradients are those of the MLP as it came, the magnitudes' from the output's backward included."""
    module = mlp(DoRALinear, device, dtype)
    with torch.no_grad():
        module.up_proj.initial_magnitude[3] = -module.up_proj.magnitude_delta[3].float()  # a row factor of zero
    x = torch.randn(3, 17, IN, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    results = []
    for joined in (False, True):
        if joined:
            swiglu.join(module, lambda layer: isinstance(layer, DoRALinear))
        module.zero_grad()
        inputs = x.clone().requires_grad_()
        out = module(inputs)
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(device, dtype))
        trained = {name: p.grad.clone() for name, p in module.named_parameters() if p.requires_grad}
        results.append(dict(out=out.detach(), x=inputs.grad, **trained))
    plain, fast = results
    assert "forward" in vars(module) and len(fast) == 2 + 2 * 3
    for name, want in plain.items():
        assert relative(fast[name], want) < tolerance, name
    assert fast["up_proj.magnitude_delta"][3] == 0


def test_swiglu_only_where_it_is_one():
    """Another activation, another forward, or a projection without a magnitude: the MLP stays as it came."""

    class Scaled(LlamaMLP):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * 2)

    other = mlp(DoRALinear, "cpu", torch.float32)
    other.__class__ = Scaled
    mlps = [other, mlp(LoRALinear, "cpu", torch.float32), mlp(DoRALinear, "cpu", torch.float32, hidden_act="gelu")]
    for module in mlps:
        swiglu.join(module, lambda layer: isinstance(layer, DoRALinear))
        assert "forward" not in vars(module)


def joined_classes(module):
    """The names of the classes whose forward `swiglu.join` changes where every projection suits."""
    swiglu.join(module, lambda layer: isinstance(layer, nn.Linear))
    return {type(m).__name__ for m in module.modules() if "forward" in vars(m)}


@pytest.mark.parametrize(
    ("family", "names"),
    [("llama", {"LlamaMLP"}), ("mistral", {"MistralMLP"}), ("qwen2", {"Qwen2MLP"}), ("qwen3", {"Qwen3MLP"}),
     ("olmo", {"OlmoMLP"}), ("olmo2", {"Olmo2MLP"}), ("cohere", {"CohereMLP"}), ("cohere2", {"Cohere2MLP"}),
     ("granite", {"GraniteMLP"}), ("smollm3", {"SmolLM3MLP"}), ("stablelm", {"StableLmMLP"}),
     ("gemma", set()), ("gemma2", set()), ("gemma3_text", set()),  # gelu
     ("phi", set()), ("phi3", set()), ("glm4", set()),  # no gate, or one projection for both
     ("seed_oss", set())],  # drops some of the result
)  # fmt: skip
def test_families_with_swiglu(family, names):
    """Which models get it, built as training builds them: without values."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE))
        assert joined_classes(model) == names


def test_list_of_gated_mlps():
    """Of all classes of transformers that have a gate_proj, the list has those whose forward is the formula, no more:
    Seed-OSS drops some of the result."""
    formula = "self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))\n"
    forwards = (f"return {formula}", f"down_proj = {formula}        return down_proj\n")
    found, listed = set(), set()
    for file in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        for source in file.read_text().split("\nclass ")[1:]:
            name = f"transformers.models.{file.parent.name}.{file.stem}.{re.match('[A-Za-z0-9_]+', source)[0]}"
            if "self.gate_proj = " in source:
                found |= {name} if any(forward in source for forward in forwards) else set()
                listed |= {name} & GATED_MLPS
    assert found == listed and len(found) > 100


def formula(mlp, x):
    return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))


@pytest.mark.parametrize(
    ("forward", "is_swiglu"),
    [(formula, True),
     (lambda mlp, x: mlp.down_proj(mlp.act_fn(mlp.up_proj(x)) * mlp.gate_proj(x)), False),
     (lambda mlp, x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x) * mlp.up_proj(x))), False),
     (lambda mlp, x: formula(mlp, x) * 2, False),
     (lambda mlp, x: formula(mlp, x) + x, False),
     (lambda mlp, x: formula(mlp, x) if mlp.training else x, False)],
)  # fmt: skip
def test_swiglu_only_where_the_numbers_are_its_own(forward, is_swiglu, monkeypatch):
    """A class that looks like a known MLP, of the same attributes, stays as it came if it computes something else or
    reads more of itself; one that is not in the list stays so in any case."""
    lookalike = type("LookAlike", (LlamaMLP,), dict(forward=forward))
    module = lookalike(LlamaConfig(**SHAPE))
    assert not joined_classes(module)
    monkeypatch.setattr(swiglu, "GATED_MLPS", {f"{__name__}.LookAlike"})
    assert joined_classes(module) == ({"LookAlike"} if is_swiglu else set())


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 128), (51, 192), (300, 200)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_swiglu_kernels(device, rows, columns, dtype, tolerance):
    """The Triton kernels give what the plain versions do, for ragged shapes too."""
    generator = torch.Generator().manual_seed(0)
    grad, gate, up = (torch.randn(1, rows, columns, generator=generator).to(device, dtype) for _ in range(3))
    assert relative(swiglu.forward_kernel(gate, up), swiglu.forward_plain(gate, up)) < tolerance
    results = []
    for run, given in ((swiglu.backward_plain, grad.clone()), (swiglu.backward_kernel, grad.mT.contiguous().mT)):
        results.append((*run(given, gate, up), given))
    for got, want in zip(*reversed(results), strict=True):
        assert got.dtype == want.dtype and relative(got, want) < tolerance


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


def low_rank_rows(quantizer, device, dtype, *, rows, width, rank):
    """Packed rows, their weight in `dtype`, and A and B of that rank."""
    generator = torch.Generator().manual_seed(5)
    packed = quantizer.quantize(torch.randn(rows, width, generator=generator).to(device) * 0.05)
    a = (torch.randn(rank, width, generator=generator) * 0.02).to(device, dtype)
    b = (torch.randn(rows, rank, generator=generator) * 0.1).to(device, dtype)
    return packed, quantizer.dequantize_plain(packed, in_features=width, dtype=dtype), a, b


@interpreted
@pytest.mark.parametrize(("rows", "width", "rank"), [(200, 1024, 8), (70, 896, 64), (130, 512, 100), (1, 128, 1)])
@pytest.mark.parametrize("quantizer", BNB, ids=str)
def test_row_norms_of_packed_rows_interpreted(quantizer, rows, width, rank):
    """On the CPU and in fp32 the kernels' norms are those of the built product but for the order of sums: every row and
    column is at its place, for ragged rows, ranks that are padded, and columns that split evenly, unevenly or not."""
    packed, w, a, b = low_rank_rows(quantizer, "cpu", torch.float32, rows=rows, width=width, rank=rank)
    packed = norms.PackedRows(quantizer.quant_type, quantizer.group_size, *packed)
    found = norms.row_norms(packed, w.norm(dim=1), lora_a=a, lora_b=b, scaling=2.0)
    torch.testing.assert_close(found, row_norms_dense(w, a, b, 2.0), rtol=1e-5, atol=1e-6)


def bf16_pair(register):
    return torch.tensor([register]).view(torch.bfloat16)[:2]


def fma(x, y, z):
    """One rounding; the products of two bf16 and their sum with zero are exact in fp32."""
    x, y, z = (bf16_pair(register).float() for register in (x, y, z))
    return (x * y + z).bfloat16().view(torch.int32).item() & 0xFFFFFFFF


def prmt(low, high, selector):
    """Four of eight bytes; the eighth bit of a selector's half byte would repeat a sign instead."""
    digits = [selector >> 4 * i & 15 for i in range(4)]
    assert max(digits) < 8
    return sum(((low | high << 32) >> 8 * digit & 255) << 8 * i for i, digit in enumerate(digits))


INSTRUCTIONS = {
    "prmt.b32": prmt,
    "and.b32": lambda x, y: x & y,
    "shr.u32": lambda x, y: x >> y,
    "lop3.b32": lambda x, y, z, table: {0xEA: x & y | z}[table],
    "mov.b32": lambda x: x,
    "fma.rn.bf16x2": fma,
}


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_lookup_ptx(quant_type):
    """The kernel's PTX, run in Python, gives `table[code] * scale` for every code at every place of both words."""
    table = norms.code_table(quant_type, torch.device("cpu")).bfloat16()
    scales = torch.tensor([0.0371, 1.43]).bfloat16()
    for first in range(16):
        codes = torch.stack([torch.arange(8) + first, 5 * torch.arange(8) - first]) % 16  # a word each
        words = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8).view(torch.int32)  # as bitsandbytes stores them
        given = [*words.flatten().tolist(), scales.view(torch.int32).item(), *norms.table_words(quant_type)]
        names = ["$8", "$9", "$10", *(f"${number}" for number in range(11, 27, 2))]
        registers = {name: value & 0xFFFFFFFF for name, value in zip(names, given, strict=True)}
        for line in re.findall(r"^(\w.*);$", norms.lookup_ptx(), re.MULTILINE):
            operation, operands = line.split(maxsplit=1)
            out, *inputs = operands.split(", ")
            values = [registers[name] if name in registers else int(name, 0) for name in inputs]
            registers[out] = INSTRUCTIONS[operation](*values)
        found = torch.stack([bf16_pair(registers[f"${column}"]) for column in range(8)], dim=1)  # [word, column]
        assert torch.equal(found, table[codes] * scales[:, None])


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [8, 64, 100, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("quantizer", BNB, ids=str)
def test_row_norms_of_packed_rows(quantizer, dtype, rank):
    """The kernels' norms are those of the built product, for ragged rows and columns that split; so are those that end
    in the same kernel after cuBLAS. Packed rows are a bf16 table times a bf16 scale, where forward rounds only
    the product: an error that a B of 0.1, far beyond a trained one, shows. fp32 is left to the composite path."""
    packed, w, a, b = low_rank_rows(quantizer, "cuda", dtype, rows=200, width=4096, rank=rank)
    norm, dense = w.float().norm(dim=1), row_norms_dense(w, a, b, 2.0)
    torch.testing.assert_close(row_norms(w, norm, a, b, 2.0), dense, rtol=1e-5, atol=1e-6)
    found = quantizer.row_norms(packed, norm, a, b, 2.0)
    if dtype == torch.float32:
        assert found is None
    else:
        torch.testing.assert_close(found, dense, rtol=2e-4, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize(("width", "rank", "group"), [(192, 8, 64), (256, 129, 64), (256, 8, 256)])
def test_row_norms_leave_what_they_do_not_take(width, rank, group):
    """Half a tile, ranks beyond 128 and other groups go to the composite path."""
    codes = torch.empty(4, width // 2, device="cuda", dtype=torch.uint8)
    a = torch.empty(rank, width, device="cuda", dtype=torch.bfloat16)
    assert not norms.suits(norms.PackedRows("nf4", group, codes, scales=None), a)


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


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_column_dot(device):
    """The one-pass column dot equals the plain one."""
    generator = torch.Generator().manual_seed(6)
    left, right = (torch.randn(1001, 333, generator=generator).to(device) for _ in range(2))
    assert relative(column_dot_kernel(left, right), column_dot_plain(left, right)) < 1e-5
