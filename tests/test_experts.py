"""Mixtures of experts on a packed base: what transformers computes, for any processes, files and tokens."""

import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from closeness import assert_close, assert_close_norm, assert_learns
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from peft import PeftModel
from real_run import assert_answers_alike, dense_of, first_step, logits, make_config, packed_bytes, plan, prepared
from safetensors.torch import load_file, save_file
from tiny import EXPERTS
from torch import nn
from transformers import AutoModelForCausalLM

import train
from fsdp_utils.core.errors import CheckpointError, Ended, UserError
from fsdp_utils.core.processes import barrier
from fsdp_utils.export.config import INFER_TYPES
from fsdp_utils.folders.describe import describe
from fsdp_utils.inference.load import load_for_inference
from methods.kernels.grouped import grouped_linear, grouped_plain
from methods.quantizers.bnb import Bnb4bit
from methods.quantizers.experts import PackedStack, expert_stacks
from methods.quantizers.hqq import HQQ
from methods.quantizers.linear import QuantizedLinear
from methods.targets import adapter_targets, block_linears, routers

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def dequantized_folder(tiny, tmp_path_factory):
    """A copy of a model whose quantized weights are what they are after dequantization."""
    made = {}

    def get(family, **flags):
        if family not in made:
            folder = tmp_path_factory.mktemp(f"dense_{family}")
            stock = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32)
            dense = dense_of(prepared(make_config(model_name=tiny(family), **flags)).model)
            _, unexpected = stock.load_state_dict(dense, strict=False)
            assert not unexpected and any("experts" in name for name in dense)
            stock.save_pretrained(folder)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                (folder / name).write_bytes((Path(tiny(family)) / name).read_bytes())
            made[family] = folder
        return made[family]

    return get


@pytest.mark.parametrize("family", EXPERTS)
def test_as_transformers_computes_them(one_process, tiny, flags, dequantized_folder, family):
    """Loss and gradients of adapters on packed experts are those of the family's own forward on the same weights."""
    given = flags(train_type="custom_qlora") | dict(model_name=tiny(family), lora_target_modules="all_linear")
    packed = one_process(given)
    assert_learns(packed)
    dense = first_step(
        {**given, "train_type": "custom_lora", "model_name": dequantized_folder(family, train_type="qlora")}
    )
    assert_close(packed, dense, relative=1e-5)


@pytest.mark.parametrize(("family", "train_type"), [
    ("mixtral", "bnb_dora"), ("gpt_oss", "hqq_lora"), ("gpt_oss", "custom_lora"), ("mixtral", "full"),
])  # fmt: skip
def test_processes(pair, trio, one_process, tiny, flags, family, train_type):
    """2 and 3 processes compute what one does, and hold its bytes; 5 experts come out even for neither."""
    given = flags(train_type=train_type) | dict(model_name=tiny(family), batch_size=12)
    alone, bytes_alone = one_process(given), packed_bytes(given)
    assert_learns(alone)
    share = bytes_alone.pop("*shard")
    for workers, count in ((pair, 2), (trio, 3)):
        several = {**given, "batch_size": 12 // count}
        for step in workers.run(first_step, several):
            assert_close(step, alone, relative=1e-5)
        for found in workers.run(packed_bytes, several):
            mine = found.pop("*shard")
            assert found.keys() == bytes_alone.keys()
            assert all(torch.equal(found[name], whole) for name, whole in bytes_alone.items())
            even = train_type.startswith(("bnb", "hqq"))  # dense experts are shared out whole
            assert mine < (1.1 / count if even else 1 / count + 1 / 5) * share + 2**14


@pytest.mark.parametrize("more", [
    dict(use_cpu_offload=True),
    dict(use_gradient_checkpointing=False),
    dict(reentrant_checkpointing=True),
    dict(checkpoint_policy="products"),
    dict(sharding_strategy="ddp"),
    dict(fused_kernels=False),
    dict(packing=True),
    dict(tile_tokens=48),
    dict(context_parallel=2, batch_size=8),
    dict(quant_scales="double"),
], ids=str)  # fmt: skip
def test_beside_other_flags(pair, one_process, tiny, flags, more):
    given = flags(train_type="bnb_dora") | dict(model_name=tiny("qwen3_moe"))
    alone = first_step({**given, **{k: v for k, v in more.items() if k in ("quant_scales", "packing")}})
    for step in pair.run(first_step, {**given, "batch_size": 4, **more}):
        assert_close(step, alone, relative=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "bf16_autocast"])
def test_sixteen_bits(one_process, tiny, flags, precision):
    """A token near the border of two experts may go to the other one: in norm, and not closely."""
    given = flags(train_type="bnb_dora") | dict(model_name=tiny("mixtral"))
    assert_close_norm(first_step({**given, "precision": precision}), one_process(given), relative=0.3)


def test_an_expert_without_tokens():
    """Gives nothing and takes no gradient; its matrix is never dequantized."""
    quantizer = Bnb4bit("nf4", 64, "fp32")
    weight = torch.randn(4, 32, 64, generator=torch.Generator().manual_seed(0))
    packed = quantizer.quantize(weight.flatten(0, 1))
    dense = quantizer.dequantize(packed, in_features=64, dtype=torch.float32).view(4, 32, 64)
    rows = torch.randn(9, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    ends, asked = torch.tensor([0, 5, 5, 9], dtype=torch.int32), []
    out = grouped_linear(rows, ends, packed, spec=spec(quantizer), in_features=64)
    wanted = torch.cat([rows[:5] @ dense[1].T, rows[5:] @ dense[3].T])
    torch.testing.assert_close(out, wanted)
    grad = torch.randn(9, 32, generator=torch.Generator().manual_seed(2))
    got = torch.autograd.grad(out, rows, grad)[0]
    torch.testing.assert_close(got, torch.autograd.grad(wanted, rows, grad)[0])
    grouped_plain(rows.detach(), ends, lambda e: asked.append(e) or dense[e].T, width=32)
    assert asked == [1, 3]
    none = grouped_linear(rows[:0], ends * 0, packed, spec=spec(quantizer), in_features=64)
    assert none.shape == (0, 32)


def spec(quantizer):
    from methods.packed import spec_of

    return spec_of(quantizer)


@pytest.mark.gpu
@pytest.mark.parametrize("quantizer", [Bnb4bit(), HQQ(2)], ids=str)
def test_groups_on_a_gpu(quantizer):
    """One kernel for all groups gives the products one by one."""
    torch.manual_seed(0)
    packed = tuple(p.cuda() for p in quantizer.quantize(torch.randn(8 * 128, 256).bfloat16()))
    ends = torch.tensor([0, 40, 41, 41, 100, 300, 301, 333], dtype=torch.int32, device="cuda")
    dense = quantizer.dequantize(packed, in_features=256, dtype=torch.bfloat16).view(8, 128, 256)
    rows = torch.randn(333, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    out = grouped_linear(rows, ends, packed, spec=spec(quantizer), in_features=256)
    grad = torch.randn_like(out)
    back = torch.autograd.grad(out, rows, grad)[0]
    for got, x, weight_of, width in (
        (out, rows, lambda e: dense[e].T, 128),
        (back, grad, lambda e: dense[e], 256),
    ):
        wanted = grouped_plain(x.detach(), ends, weight_of, width=width)
        assert (got - wanted).float().norm() < 1e-2 * wanted.float().norm()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "granitemoe"])
def test_one_by_one_or_stacked(pair, tiny, tmp_path, family):
    """Files that hold the matrices of experts one by one, and files that hold stacks, give the same bytes."""
    stacked = tmp_path / "stacked"
    stacked.mkdir()
    for file in Path(tiny(family)).iterdir():
        if "safetensors" not in file.name:
            (stacked / file.name).write_bytes(file.read_bytes())
    model = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32)
    save_file({k: v.clone().contiguous() for k, v in model.state_dict().items()}, stacked / "model.safetensors")
    apart = load_file(Path(tiny(family)) / "model.safetensors")
    names = load_file(stacked / "model.safetensors").keys()
    assert family == "granitemoe" or names != apart.keys()
    want = packed_bytes(dict(model_name=tiny(family), train_type="bnb_dora"))
    for found in [packed_bytes(dict(model_name=stacked, train_type="bnb_dora"))]:
        assert found.keys() == want.keys() and all(torch.equal(found[name], want[name]) for name in want)


def test_a_matrix_is_missing(tiny, tmp_path):
    """Named, before anything is read."""
    for file in Path(tiny("mixtral")).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in tensors if name.endswith("experts.3.w1.weight"))
    save_file({k: v for k, v in tensors.items() if k != gone}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"experts\.0\.w1\.weight and its like, .* some are missing"):
        plan(make_config(model_name=tmp_path, train_type="bnb_dora"))


@pytest.mark.parametrize("family", EXPERTS)
def test_what_is_packed(tiny, family):
    """Every matrix of a block but the router's and what weighs experts; adapters go to linears, never to a router."""
    model = plan(make_config(model_name=tiny(family), train_type="bnb_dora", lora_target_modules="all_linear")).model
    stacks = expert_stacks(model)
    assert stacks and all(isinstance(model.get_submodule(path), PackedStack) for path in stacks)
    left = {
        path: m
        for path, m in model.model.layers.named_modules()
        if isinstance(m, nn.Linear) or (isinstance(m, nn.Module) and "Router" in type(m).__name__)
    }
    assert left and all(path.endswith(("gate", "router", "shared_expert_gate")) for path in left)
    assert len(routers(model)) == len({path.split(".")[0] for path in left if not path.endswith("shared_expert_gate")})
    assert all(isinstance(m, QuantizedLinear) for m in block_linears(model).values())
    assert not any("experts." in path and "shared" not in path for path in adapter_targets(model, "all_linear"))


def run_of(flags: dict) -> None:
    with suppress(Ended):  # by --stop_at_step
        train.main(make_config(**flags))
    barrier()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_saved_and_loaded(pair, tiny, tiny_data, save_run, export, tmp_path, family):
    """An adapter answers as the run did in our loader and in stock PEFT on the dequantized base; merged, in stock
    transformers, under the names of the base's files."""
    folder, model = save_run(tiny(family), "bnb_dora", quant_scales="fp32")
    assert_answers_alike(folder, model, base=tiny(family), export=export)
    packs = {"w4a16"} if family != "gpt_oss" else set()
    for infer_type in set(INFER_TYPES) - {"merged", "merged_bnb_dora"} - packs:
        with pytest.raises(UserError, match=r"its experts.*; use merged|use --infer_type merged"):
            export(folder, infer_type, name=infer_type)


@pytest.mark.parametrize(("family", "train_type", "more"), [
    ("mixtral", "custom_qlora", dict(lora_target_modules="all,experts")),
    ("qwen3_moe", "bnb_dora", {}),
    ("deepseek_v3", "full", {}),
])  # fmt: skip
def test_packed_for_servers(tiny, save_run, export, family, train_type, more):
    """w4a16 has every expert's matrices under the names of the base's files, as vLLM 0.32 reads them, near the
    merged weight; what chooses experts is left alone."""
    folder, _ = save_run(tiny(family), train_type, **more)
    merged = load_file(export(folder, "merged", name="merged", dtype="fp32") / "model.safetensors")
    target = export(folder, "w4a16", name="packed", group_size=32, gptq="false")
    packed, left = load_file(target / "model.safetensors"), 0
    config = json.loads((target / "config.json").read_text())["quantization_config"]
    for name, weight in merged.items():
        path = name.removesuffix(".weight")
        if name in packed:
            assert weight.dim() < 2 or "embed" in name or path in config["ignore"]
            left += path in config["ignore"]
            continue
        codes = unpack_from_int32(packed[f"{path}.weight_packed"], 4, weight.shape)
        scales = packed[f"{path}.weight_scale"].float().repeat_interleave(32, dim=1)
        assert packed[f"{path}.weight_shape"].tolist() == list(weight.shape)
        # clipping is allowed where it makes the whole group more exact
        assert ((codes * scales - weight).abs() <= 0.5 * scales).float().mean() > 0.85
        assert (codes * scales - weight).norm() < 0.12 * weight.norm()
    assert left >= 2 and sum("experts.0." in name for name in packed) >= 3
    stock, whole = (
        dict(AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).named_parameters())
        for f in (target, target.with_name("merged"))
    )
    stacks = [name for name in whole if "experts." in name and whole[name].dim() == 3]
    assert stacks and all((stock[name] - whole[name]).norm() < 0.12 * whole[name].norm() for name in stacks)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_full(pair, tiny, tiny_data, tmp_path, family):
    """Everything trains, sharded, and is saved under the names of the base's files, for stock transformers."""
    flags = dict(model_name=tiny(family), dataset=tiny_data, train_type="full", batch_size=4, max_steps=2, lr=1e-2)
    pair.run(run_of, {**flags, "save_model": True, "output_dir": tmp_path / "full"})
    saved = tmp_path / "full"
    ours, base = (load_file(Path(f) / "model.safetensors") for f in (saved, tiny(family)))
    assert ours.keys() == base.keys()
    changed = [name for name in ours if not torch.equal(ours[name], base[name])]
    assert any("experts" in name for name in changed) and any(
        "router" in name or "gate.weight" in name for name in changed
    )
    stock = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).eval()
    torch.testing.assert_close(
        logits(stock), logits(load_for_inference(describe(saved), device=CPU)), atol=1e-5, rtol=0
    )


def test_resumed_and_cached(pair, tiny, tiny_data, tmp_path):
    """A run in two halves, from a cache of packed experts, is the run in one."""
    flags = dict(model_name=tiny("qwen3_moe"), dataset=tiny_data, train_type="bnb_dora", batch_size=2, max_steps=4)
    flags |= dict(lr=1e-3, save_every_steps=2, quantized_cache=tmp_path / "cache")
    pair.run(run_of, {**flags, "output_dir": tmp_path / "one"})
    for steps in (2, 4):
        pair.run(
            run_of,
            {**flags, "max_steps": 4, "stop_at_step": steps % 4, "output_dir": tmp_path / "two", "resume": "auto"},
        )
    rows = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    losses = [{row["step"]: row["loss"] for row in found if "loss" in row} for found in rows]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and len(losses[0]) == 4


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("train_type", ["bnb_dora", "custom_lora"])
def test_routers(pair, one_process, tiny, flags, save_run, family, train_type):
    """--train_router: they get gradients, alike on two processes, and are saved; stock PEFT puts them back."""
    given = flags(train_type=train_type) | dict(model_name=tiny(family), train_router=True)
    alone = one_process(given)
    assert_learns(alone)
    assert any(name.endswith("mlp.gate.weight") for name in alone[1])
    for step in pair.run(first_step, {**given, "batch_size": 4}):
        assert_close(step, alone, relative=1e-5)
    attention = dict(mixtral="q_proj,v_proj", deepseek_v3="q_b_proj,kv_b_proj")[family]
    folder, model = save_run(tiny(family), train_type, train_router=True, lora_target_modules=attention)
    want = logits(model)
    torch.testing.assert_close(logits(load_for_inference(describe(folder), device=CPU)), want, atol=1e-5, rtol=0)
    if train_type == "custom_lora":
        base = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32)
        stock = PeftModel.from_pretrained(base, folder).eval()
        torch.testing.assert_close(logits(stock), want, atol=1e-5, rtol=0)


def test_notes(tiny, capsys):
    """What PEFT would take for adapters of experts is said; attention alone is read by everyone."""
    for targets, said in (("all", 2), ("kv_b_proj", 1)):
        plan(make_config(model_name=tiny("deepseek_v3"), train_type="bnb_dora", lora_target_modules=targets))
        out = capsys.readouterr().out
        assert "experts stay as they are, without adapters" in out
        assert ("stock PEFT takes down_proj, gate_proj, up_proj" in out) == (said == 2)


def test_no_routers(tiny):
    with pytest.raises(UserError, match=r"--train_router true: .* has no experts to choose from"):
        plan(make_config(model_name=tiny("llama"), train_type="bnb_dora", train_router=True))


@pytest.mark.parametrize("train_type", ["bnb_dora", "custom_lora"])
def test_load_is_logged(pair, tiny, tiny_data, tmp_path, train_type):
    """How evenly experts are used, the same on two processes; a router that always chooses two of five shows."""
    sided = tmp_path / "sided"
    sided.mkdir()
    for file in Path(tiny("mixtral")).iterdir():
        (sided / file.name).write_bytes(file.read_bytes())
    tensors = load_file(sided / "model.safetensors")
    for name in tensors:
        if name.endswith("gate.weight"):
            tensors[name].zero_()  # all alike: the first ones win
    save_file(tensors, sided / "model.safetensors", metadata={"format": "pt"})
    found = {}
    for base in (tiny("mixtral"), sided):
        flags = dict(model_name=base, dataset=tiny_data, train_type=train_type, max_steps=1)
        run_of({**flags, "batch_size": 8, "output_dir": tmp_path / "one"})
        pair.run(run_of, {**flags, "batch_size": 4, "output_dir": tmp_path / "two", "overwrite": True})
        rows = [json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0]) for name in ("one", "two")]
        assert rows[0]["expert_load_max"] == pytest.approx(rows[1]["expert_load_max"], rel=0.1)  # padding differs
        found[base] = rows[0]
        for name in ("one", "two"):
            shutil.rmtree(tmp_path / name)
    assert 1 <= found[tiny("mixtral")]["expert_load_max"] < 2.5
    assert found[sided]["expert_load_max"] == pytest.approx(2.5) and found[sided]["experts_idle"] == pytest.approx(0.6)
