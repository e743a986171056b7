"""gpt-oss as published: experts in MXFP4, taken as they are; stock software's values, loss, gradients and adapters."""

import json
import shutil

import pytest
import torch
from closeness import assert_close, assert_learns
from peft import PeftModel
from real_run import CPU, batches_of, dense_of, first_step, logits, make_config, packed_bytes, plan, prepared, set_json
from safetensors.torch import load_file, save_file
from test_expert_lora import assert_gradients_alike
from test_prequantized import assert_goes_on, bytes_and_reads, changed, loss_of
from transformers import AutoModelForCausalLM, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from fsdp_utils.core.errors import UserError
from fsdp_utils.core.rows import gather
from fsdp_utils.folders.describe import describe
from fsdp_utils.inference.load import load_for_inference
from fsdp_utils.memory.budget import remedies
from fsdp_utils.model import prequantized
from fsdp_utils.model.build import read_model_config
from fsdp_utils.planning import report
from fsdp_utils.planning.machines import machine_of
from fsdp_utils.tasks.causal_lm import CAUSAL_LM
from fsdp_utils.training.step import TrainStep
from methods.packed import STORED_BYTES, as_bytes
from methods.quantizers.experts import PackedStack, expert_stacks
from methods.quantizers.linear import weight_rows
from methods.quantizers.mxfp4 import MXFP4

KEPT = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
UP, DOWN = (f"model.layers.1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))
EXPERTS = dict(train_type="custom_qlora", lora_target_modules="q_proj,v_proj,experts", lora_rank=4)


# --- a tiny folder, as gpt-oss is published ---------------------------------------------------------------------------


def to_mxfp4(weight):
    """`[experts, in, out]` to blocks `[experts, out, in/32, 16]`, low nibble first, and exponents."""
    groups = weight.float().transpose(1, 2).unflatten(2, (-1, 32))  # [experts, out, in/32, 32]
    exponents = (groups.abs().amax(-1) / 6).log2().ceil()
    scaled = groups / exponents.exp2().unsqueeze(-1)
    codes = (scaled.abs().unsqueeze(-1) - VALUES).abs().argmin(-1) + 8 * (scaled < 0)
    codes = codes.to(torch.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, (exponents + 127).to(torch.uint8)


@pytest.fixture(scope="module")
def published(tiny, tmp_path_factory):
    """`published(dtype)`: the folder, made once; `dtype` of what is not packed."""
    made = {}

    def get(dtype=torch.float32):
        if dtype not in made:
            folder = tmp_path_factory.mktemp("published") / "model"
            shutil.copytree(tiny("gpt_oss", dtype=dtype), folder)
            stored = load_file(folder / "model.safetensors")
            for name in [name for name in stored if name.endswith("experts.gate_up_proj") or "down_proj" in name]:
                if name.endswith("_proj"):
                    stored[f"{name}_blocks"], stored[f"{name}_scales"] = to_mxfp4(stored.pop(name))
            save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
            settings = dict(quant_method="mxfp4", modules_to_not_convert=KEPT)
            set_json(folder / "config.json", quantization_config=settings)
            made[dtype] = folder
        return made[dtype]

    return get


def stock(folder, dtype=torch.float32):
    """What transformers makes of it on a CPU."""
    options = dict(quantization_config=Mxfp4Config(dequantize=True), experts_implementation="eager")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


def stacks_of(model):
    return {p.replace(".base_layer", ""): m for p, m in model.named_modules() if isinstance(m, PackedStack)}


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_every_byte_under_every_exponent(dtype):
    """Bit for bit what `convert_moe_packed_tensors` gives; 255, no exponent, gives no number that could hide it."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 255, 1, 1)
    exponents = torch.arange(255, dtype=torch.uint8).view(1, 255, 1).repeat(1, 1, 16)
    want = convert_moe_packed_tensors(blocks, exponents, dtype=dtype)[0].T.contiguous()
    codes = blocks.view(255, 256)
    packed = (codes << 4 | codes >> 4).view(STORED_BYTES), exponents[0].view(STORED_BYTES)
    found = MXFP4().dequantize(packed, in_features=512, dtype=dtype)
    as_bits = torch.int32 if dtype.itemsize == 4 else torch.int16
    assert torch.equal(found.view(as_bits), want.view(as_bits))
    wrong = MXFP4().dequantize((packed[0], as_bytes(packed[1]) | 255), in_features=512, dtype=dtype)
    assert not wrong.isfinite().any()


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_values_are_those_of_stock_software(published, stored, precision, dtype):
    """Of each stack, packed exactly as it comes; nothing else is packed."""
    run = prepared(make_config(model_name=published(stored), precision=precision, **EXPERTS))
    theirs, found = stock(published(stored), dtype), dense_of(run.model)
    assert found.keys() == set(expert_stacks(theirs)) and len(found) == 4
    for path, module in stacks_of(run.model).items():
        ours = module.as_stored(weight_rows(module, gather, dtype=dtype))
        assert torch.equal(ours, theirs.get_parameter(path).data)
        assert module.quantizer == MXFP4() and sum(p.nbytes for p in module.packed()) * 8 == 4.25 * ours.numel()


def test_reader(published):
    """Rows that begin and end anywhere, also none, are those of the whole; matrices are those of the dense model."""
    folder = published()
    reader = prequantized.open_files(folder, read_model_config(str(folder), task=CAUSAL_LM))
    name, theirs = "model.layers.0.mlp.experts.gate_up_proj", stock(folder)
    height, rows = 256, 5 * 256
    whole = reader.packed_rows(name, 0, rows, device=CPU)
    for start, stop in ((0, 7), (7, height), (height - 1, height + 1), (3, rows - 3), (5, 5), (rows, rows)):
        for part, of in zip(reader.packed_rows(name, start, stop, device=CPU), whole, strict=True):
            assert torch.equal(as_bytes(part), as_bytes(of)[start:stop])
    dense = theirs.get_parameter(name).data
    assert reader.shape(name) == dense.shape and reader.dtype(name) == torch.bfloat16
    for start, stop in ((0, 5), (1, 3), (2, 2)):
        assert torch.equal(reader.rows(name, start, stop).float(), dense[start:stop])
    assert torch.equal(reader.tensor(name).float(), dense)
    assert reader.nbytes(name) * 8 == 4.25 * dense.numel()


def test_packing():
    """What is quantized all the same (a head, dummies): values on the grid stay, the largest is not cut off."""
    rows = torch.randn(40, 128, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 40).unsqueeze(1)
    quantizer = MXFP4()
    packed = quantizer.quantize(rows)
    found = quantizer.dequantize(packed, in_features=128, dtype=torch.float32)
    assert (found - rows).norm(dim=1).div(rows.norm(dim=1)).max() < 0.16
    assert (quantizer.row_peaks(packed) >= rows.abs().amax(1)).all()
    again = quantizer.dequantize(quantizer.quantize(found), in_features=128, dtype=torch.float32)
    assert torch.equal(again, found)
    assert torch.equal(
        quantizer.dequantize(quantizer.quantize(rows * 0), in_features=128, dtype=torch.float32), rows * 0
    )


# --- loss, gradients, processes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("train_type, targets", [("custom_qlora", "q_proj,experts"), ("qlora", "q_proj,v_proj")])
def test_first_loss_is_that_of_stock_software(published, tiny_data, train_type, targets):
    """Of transformers' model of the dequantized weights, in fp32: adapters begin at nothing."""
    flags = dict(model_name=published(), train_type=train_type, lora_target_modules=targets)
    config = make_config(**flags, dataset=tiny_data, batch_size=8)
    run = prepared(config)
    step = TrainStep(run, config, task=CAUSAL_LM)
    (micro_batches,) = step.batches(batches_of(config, run)).first(1)
    ours = step.mean_loss(*step.backward(micro_batches))
    assert ours == pytest.approx(loss_of(stock(published()), micro_batches), abs=1e-6)


def test_as_peft_computes_them(published, save_run):
    """The saved adapter in stock PEFT, on the very folder: our logits, and our gradients of every A and B."""
    folder, model = save_run(published(), **EXPERTS)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(published())
    theirs = PeftModel.from_pretrained(stock(published()), folder, is_trainable=True).eval()
    assert (logits(stock(published())) - logits(model)).abs().max() > 1e-2  # the adapter matters
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=0)
    assert sum("experts" in name for name in assert_gradients_alike(model, theirs)) == 8


@pytest.mark.parametrize("train_type, targets", [
    ("custom_qlora", "q_proj,experts"), ("qlora", "q_proj,v_proj"),
])  # fmt: skip
def test_processes(pair, trio, published, tiny_data, train_type, targets):
    """2 and 3 processes hold the bytes of one, of which each reads its own rows, and compute what it does."""
    flags = dict(model_name=published(), train_type=train_type, lora_target_modules=targets, batch_size=12)
    flags["dataset"] = tiny_data
    step_alone = first_step(flags)
    assert_learns(step_alone)
    alone, all_read = bytes_and_reads(flags)
    for workers, count in ((pair, 2), (trio, 3)):
        several = {**flags, "batch_size": 12 // count}
        for step in workers.run(first_step, several):
            assert_close(step, step_alone, relative=1e-5)
        for found, read in workers.run(bytes_and_reads, several):
            assert found.keys() == alone.keys()
            assert all(torch.equal(found[name], alone[name]) for name in alone if name != "*shard")
            assert found["*shard"] <= alone["*shard"] / count + 2**14
            assert read < all_read / count + 2**15  # of the fingerprint, which reads no matrix whole


def test_sixteen_bits(published, tiny_data):
    """bf16, as it is published: the loss of stock software, to rounding."""
    flags = dict(model_name=published(torch.bfloat16), dataset=tiny_data, batch_size=8, precision="bf16", **EXPERTS)
    config = make_config(**flags)
    run = prepared(config)
    step = TrainStep(run, config, task=CAUSAL_LM)
    (micro_batches,) = step.batches(batches_of(config, run)).first(1)
    ours = step.mean_loss(*step.backward(micro_batches))
    assert ours == pytest.approx(loss_of(stock(published(torch.bfloat16), torch.bfloat16), micro_batches), rel=1e-2)


# --- the run ---------------------------------------------------------------------------------------------------------


SAVED = {
    "custom_qlora": EXPERTS,
    "qlora": dict(train_type="qlora", lora_target_modules="q_proj,v_proj"),
    "bnb_dora": dict(train_type="bnb_dora", lora_target_modules="q_proj,o_proj"),
}


@pytest.mark.parametrize("train_type", SAVED)
def test_saved_adapters(published, save_run, export, train_type):
    """PEFT on the stock folder, our own evaluation, and stock software on the merged export, which is an ordinary
    gpt-oss in 16 or 32 bits, all give the logits of the run."""
    folder, model = save_run(published(), **SAVED[train_type])
    expected = logits(model)
    torch.testing.assert_close(logits(load_for_inference(describe(folder), device=CPU)), expected, atol=1e-5, rtol=0)
    peft = PeftModel.from_pretrained(stock(published()), folder).eval()
    torch.testing.assert_close(logits(peft), expected, atol=1e-4, rtol=0)
    merged = export(folder, "merged", dtype="fp32")
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    theirs = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    assert load_file(merged / "model.safetensors").keys() == theirs.state_dict().keys()
    torch.testing.assert_close(logits(theirs), expected, atol=1e-4, rtol=0)


def test_the_base_alone(published):
    """evaluate.py on the folder: stock software reads it."""
    run = describe(published())
    assert run.kind == "stock"
    loaded = load_for_inference(run, device=CPU, dtype=torch.float32)
    assert torch.equal(logits(loaded), logits(stock(published())))


def test_a_run_goes_on(published, tiny_data, tmp_path, capfd):
    """From its checkpoint, to the adapter of a run that was not interrupted; how the base is stored is in run.json."""
    flags = dict(model_name=published(), quantized_cache=tmp_path / "cache", **EXPERTS, dataset=tiny_data)
    stored = "n_bits 4, quant_group_size 32, quant_scales e8m0, quant_type mxfp4"
    assert assert_goes_on(flags, tmp_path, capfd, stored=stored)["quantizer"] == dict(group_size=32)


def planned_stacks(folder) -> dict:
    """Path and bytes of what a plan packs."""
    config = make_config(model_name=folder, batch_size=1, train_type="custom_qlora", lora_target_modules="q_proj")
    planned = report.planned_for(config, machine_of("1x1", device=CPU))
    assert "--quant_scales double" not in remedies(config, planned.model.config)
    return {path: sum(p.nbytes for p in m.packed()) for path, m in stacks_of(planned.model).items()}


def test_a_plan_without_weights(published, tmp_path):
    """From config.json alone, a run packs what it does with the weights."""
    shutil.copy(published() / "config.json", tmp_path)
    found = planned_stacks(tmp_path)
    assert found == planned_stacks(published()) and len(found) == 4


def test_experts_left_in_16_bits(published, tmp_path):
    """Those that `modules_to_not_convert` names are read as they are, and packed in no plan."""
    folder, kept = tmp_path / "model", "model.layers.1.mlp.experts"
    shutil.copytree(published(), folder)
    values, stored = stock(folder).state_dict(), load_file(folder / "model.safetensors")
    left = {
        name: tensor for name, tensor in stored.items() if not (kept in name and "_proj_" in name) or "bias" in name
    }
    left |= {f"{kept}.{name}": values[f"{kept}.{name}"].contiguous() for name in ("gate_up_proj", "down_proj")}
    save_file(left, folder / "model.safetensors", metadata={"format": "pt"})
    settings = dict(quant_method="mxfp4", modules_to_not_convert=[*KEPT, kept])
    set_json(folder / "config.json", quantization_config=settings)
    run = prepared(make_config(model_name=folder, train_type="custom_qlora", lora_target_modules="q_proj"))
    assert stacks_of(run.model).keys() == {name.replace("layers.1", "layers.0") for name in (UP, DOWN)}
    torch.testing.assert_close(logits(run.model.eval()), logits(stock(folder)), atol=1e-5, rtol=0)
    (folder / "model.safetensors").unlink()
    assert planned_stacks(folder).keys() == stacks_of(run.model).keys()


def test_head_and_embedding_can_be_packed_too(published):
    """They come in 16 bits, and are quantized as they are read; the blocks are as they come."""
    flags = dict(model_name=published(), **EXPERTS)
    alone, both = (packed_bytes(dict(flags, quantize_lm_head=more)) for more in (False, True))
    assert len(both) == len(alone) + 2
    assert all(torch.equal(both[name], alone[name]) for name in alone if "layers" in name)


# --- what is refused --------------------------------------------------------------------------------------------------

FITTING = r"comes quantized \(MXFP4\); use one of qlora, custom_qlora, bnb_dora, or give the 16-bit model"
FLAGS = [
    *[(dict(train_type=name), rf"--train_type {name}: .*{FITTING}") for name in ("full", "lora", "dora", "hqq_lora")],
    (dict(train_type="bnb_llama_pro", llama_pro_path="."), rf"--train_type bnb_llama_pro: .*{FITTING}"),
    (dict(lora_init="pissa"), r"--lora_init pissa: needs the 16-bit weights"),
    (dict(quant_group_size=64), r"--quant_group_size 64: .*quantized with 32; drop it"),
    (dict(quant_type="nf4"), r"--quant_type nf4: .*quantized with mxfp4; drop it"),
    (dict(quant_scales="double"), r"--quant_scales double: .*quantized with e8m0; drop it"),
    (dict(train_type="qlora", lora_target_modules="experts"), r"experts get adapters by custom_qlora"),
]


@pytest.mark.parametrize("flags, message", FLAGS)
def test_flags_that_do_not_fit(published, flags, message):
    """One line names the flag, how the base comes, and the way out."""
    given = dict(model_name=published(), train_type="custom_qlora", lora_target_modules="q_proj") | flags
    if "llama_pro_path" in given:
        given["llama_pro_path"] = published()
    with pytest.raises(UserError, match=message) as error:
        plan(make_config(**given))
    assert "\n" not in str(error.value)


def without(name):
    def apply(folder):
        stored = load_file(folder / "model.safetensors")
        del stored[name]
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def narrower(folder):
    """Half of the rows' groups, of codes and of scales."""
    for part in ("blocks", "scales"):
        changed(f"{UP}_{part}", lambda t: t[:, :, :1])(folder)


TENSORS = {
    "no scales": (without(f"{UP}_scales"), rf"no tensor named {UP}_scales"),
    "no blocks": (without(f"{UP}_blocks"), rf"{UP}_scales .*loads into nothing"),
    "fewer scales": (changed(f"{UP}_scales", lambda t: t[..., :-1]), rf"{UP}_scales has .*want \(5, 256, 2\)"),
    "flat blocks": (changed(f"{UP}_blocks", lambda t: t.flatten(2)), rf"{UP}_blocks has shape .*not \[experts, out"),
    "short blocks": (changed(f"{DOWN}_blocks", lambda t: t[..., :8]), rf"{DOWN}_blocks has shape .*not \[experts, out"),
    "floats": (changed(f"{DOWN}_scales", lambda t: t.float()), rf"{DOWN}_scales is torch.float32, not bytes"),
    "narrow": (narrower, rf"{UP} has shape \(5, 32, 256\), the model wants \(5, 64, 256\)"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit(published, tmp_path, case):
    """Found before anything is loaded, and named."""
    damage, message = TENSORS[case]
    shutil.copytree(published(), tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(UserError, match=message) as error:
        plan(make_config(model_name=tmp_path / "model", **EXPERTS))
    assert "\n" not in str(error.value) and str(tmp_path / "model") in str(error.value)


def test_dense_experts(tiny, tmp_path):
    """A folder that says MXFP4 and holds none."""
    shutil.copytree(tiny("gpt_oss", dtype=torch.float32), tmp_path / "model")
    set_json(tmp_path / "model" / "config.json", quantization_config=dict(quant_method="mxfp4"))
    with pytest.raises(UserError, match="says MXFP4, but no weight is packed so; remove quantization_config"):
        plan(make_config(model_name=tmp_path / "model", **EXPERTS))


def test_rows_of_no_whole_groups(published, tmp_path):
    """Of a model that cannot have been stored so."""
    shutil.copy(published() / "config.json", tmp_path)
    set_json(tmp_path / "config.json", hidden_size=80)
    with pytest.raises(UserError, match="does not divide in_features 80"):
        planned_stacks(tmp_path)
