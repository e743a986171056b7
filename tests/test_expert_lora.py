"""Adapters of experts: what PEFT computes with its `target_parameters`, for any processes, saved as PEFT reads them."""

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close, assert_learns
from peft import PeftModel
from real_run import assert_answers_alike, dense_of, first_step, logits, make_config, plan
from transformers import AutoModelForCausalLM

from fsdp_utils.core.errors import UserError
from methods.expert_lora import merged_stack, stacked
from methods.kernels.grouped import grouped_matmul

CPU = torch.device("cpu")
TARGETS = {"mixtral": "all,experts", "qwen3_moe": "experts", "gpt_oss": "q_proj,experts", "glm4_moe": "v_proj,experts"}
FLAGS = dict(lora_dropout=0.0, quant_scales="fp32")


def test_layout():
    """Column `k * experts + e` of B and row `e * r + k` of A are the k-th of expert e."""
    a, b = torch.arange(2 * 3 * 5.0).view(6, 5), torch.arange(4 * 6.0).view(4, 6)
    by_expert_a, by_expert_b = stacked(a, b, experts=2)
    assert torch.equal(by_expert_a[1, 2], a[1 * 3 + 2]) and torch.equal(by_expert_b[1][:, 2], b[:, 2 * 2 + 1])
    weight = torch.zeros(2, 4, 5)
    wanted = torch.stack([by_expert_b[e] @ by_expert_a[e] for e in range(2)]) * 0.5
    torch.testing.assert_close(merged_stack(weight, a, b, scaling=0.5), wanted)


def groups(device="cpu", dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()
    )
    ends = torch.tensor([0, 40, 41, 41, 100], dtype=torch.int32, device=device)
    return make(100, 16), make(5, 24, 16), ends, make(100, 24).detach()


def by_hand(rows, stack, ends):
    starts = [0, *ends.tolist()]
    return torch.cat([rows[starts[e] : starts[e + 1]] @ stack[e].T for e in range(len(ends))])


def test_groups():
    """Result and both gradients; an expert without tokens gets a gradient of zero."""
    rows, stack, ends, grad = groups()
    got, wanted = grouped_matmul(rows, stack, ends), by_hand(rows, stack, ends)
    torch.testing.assert_close(got, wanted)
    found, expected = (torch.autograd.grad(out, (rows, stack), grad, retain_graph=True) for out in (got, wanted))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert found[1][0].abs().max() == 0 == found[1][3].abs().max()


@pytest.mark.gpu
def test_groups_on_a_gpu():
    rows, stack, ends, grad = groups("cuda", torch.bfloat16)
    got, wanted = grouped_matmul(rows, stack, ends), by_hand(rows.float(), stack.float(), ends)
    found = torch.autograd.grad(got, (rows, stack), grad)
    expected = torch.autograd.grad(wanted, (rows, stack), grad.float())
    for one, other in ((got, wanted), *zip(found, expected, strict=True)):
        assert (one.float() - other.float()).norm() < 1e-2 * other.float().norm()


def gradients(model, named) -> dict[str, torch.Tensor]:
    """Of the loss of fixed tokens, by `named` of each trained parameter."""
    ids = torch.randint(0, 250, (2, 12), generator=torch.Generator().manual_seed(3))
    model.zero_grad()
    F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
    return {named(name): p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", TARGETS)
def test_as_peft_computes_them(tiny, save_run, tmp_path, family):
    """The saved adapter on the dequantized base, in stock PEFT: our logits, and our gradients of every A and B."""
    folder, model = save_run(tiny(family), "custom_qlora", lora_target_modules=TARGETS[family], **FLAGS)
    base = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32, experts_implementation="eager")
    assert not base.load_state_dict(dense_of(model), strict=False)[1]
    stock = PeftModel.from_pretrained(base, folder, is_trainable=True).eval()
    torch.testing.assert_close(logits(stock), logits(model), atol=1e-5, rtol=0)
    assert_gradients_alike(model, stock)


def assert_gradients_alike(model, stock) -> dict:
    """Of every A and B, ours and PEFT's, by PEFT's names; ours."""
    theirs = gradients(stock, lambda name: name.removeprefix("base_model.model.").replace(".default", ""))
    saved = {
        name: f"{model_path(path, layer)}.{name.rpartition('.')[2]}.weight"
        for path, layer in model_layers(model).items()
        for name in (f"{path}.lora_A", f"{path}.lora_B")
    }
    ours = gradients(model, saved.__getitem__)
    assert ours.keys() == theirs.keys() and any("experts" in name for name in ours)
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).abs().max() < 1e-5 * gradient.abs().max().clamp_min(1e-6), name
    return ours


def model_layers(model) -> dict:
    return {name.removesuffix(".lora_A"): model.get_submodule(name.removesuffix(".lora_A"))
            for name, _ in model.named_parameters() if name.endswith(".lora_A")}  # fmt: skip


def model_path(path, layer) -> str:
    """What PEFT calls a layer, written out."""
    if ".experts." not in path:
        return path
    return path.replace(".gate_up_proj", ".base_layer").replace(".down_proj", "")


@pytest.mark.parametrize(("family", "train_type"), [("mixtral", "custom_qlora"), ("gpt_oss", "hqq_lora")])
def test_processes(pair, trio, one_process, tiny, flags, family, train_type):
    given = flags(train_type=train_type) | dict(
        model_name=tiny(family), lora_target_modules="all,experts", batch_size=12
    )
    alone = one_process(given)
    assert_learns(alone)
    assert any("experts" in name for name in alone[1])
    for workers, count in ((pair, 2), (trio, 3)):
        for step in workers.run(first_step, {**given, "batch_size": 12 // count}):
            assert_close(step, alone, relative=1e-5)
    for step in pair.run(first_step, {**given, "batch_size": 6, "use_cpu_offload": True}):
        assert_close(step, alone, relative=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_merged(tiny, save_run, export, family):
    """Folded into the matrices of the base's files, and loaded again by us."""
    folder, model = save_run(tiny(family), "custom_qlora", lora_target_modules=TARGETS[family], **FLAGS)
    assert_answers_alike(folder, model, base=tiny(family), export=export)


@pytest.mark.parametrize(("more", "why"), [
    (dict(lora_dropout=0.1), "PEFT knows no dropout before adapters of experts; add --lora_dropout 0"),
    (dict(train_type="bnb_dora"), "PEFT reads no DoRA of experts"),
    (dict(train_type="custom_lora"), "its experts are in 16 bits"),
    (dict(train_type="qlora"), "experts get adapters by custom_qlora or hqq_lora"),
    (dict(lora_init="pissa"), "experts begin as by default"),
    (dict(model_name="llama"), "has no experts; drop the word"),
], ids=str)  # fmt: skip
def test_refused(tiny, more, why):
    given = dict(train_type="custom_qlora", lora_target_modules="all,experts", model_name="mixtral") | more
    with pytest.raises(UserError, match=f"--lora_target_modules all,experts: .*{why}"):
        plan(make_config(**given | dict(model_name=tiny(given["model_name"]))))
