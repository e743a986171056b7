"""Bases that come quantized: the values of stock software, its loss, its adapters; the same bytes on two processes."""

import json
import shutil

import bitsandbytes.functional as bnb
import pytest
import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from peft import LoraConfig, PeftModel, get_peft_model
from real_run import CPU, batches_of, logits, make_config, packed_bytes, plan, prepared, set_json
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, CompressedTensorsConfig

import train
from fsdp_utils.core.errors import Ended, UserError
from fsdp_utils.core.rows import gather
from fsdp_utils.core.safetensors_io import CheckpointReader
from fsdp_utils.data.batches import model_inputs
from fsdp_utils.folders.describe import describe
from fsdp_utils.inference.load import load_for_inference
from fsdp_utils.memory.budget import remedies
from fsdp_utils.model import prequantized
from fsdp_utils.model.build import read_model_config
from fsdp_utils.planning import report
from fsdp_utils.planning.machines import machine_of
from fsdp_utils.tasks.causal_lm import CAUSAL_LM
from fsdp_utils.training.step import TrainStep
from methods.quantizers.bnb import Bnb4bit
from methods.quantizers.int4 import Int4
from methods.quantizers.linear import QuantizedLinear, weight_rows

KEPT = "model.layers.1.mlp.down_proj"  # in 16 bits, in the folders of bitsandbytes
TRAIN_TYPES = {"nf4": "bnb_dora", "double": "custom_qlora", "fp4": "qlora", "group": "hqq_dora", "channel": "hqq_lora",
               "gptq": "hqq_dora"}  # fmt: skip
DOUBLE = dict(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
BNB = {
    "nf4": dict(bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=torch.bfloat16),
    "double": DOUBLE | dict(llm_int8_skip_modules=["lm_head", KEPT]),
    "fp4": dict(bnb_4bit_quant_type="fp4"),
}


# --- tiny folders, as stock software writes them --------------------------------------------------------------------


def write_bnb(base, folder, kind, *, dtype):
    asked = BitsAndBytesConfig(load_in_4bit=True, **BNB[kind])
    AutoModelForCausalLM.from_pretrained(base, quantization_config=asked, dtype=dtype).save_pretrained(folder)


def split(weight, *, group, dtype):
    """Codes from -8 to 7, int8 `[out, in]`, and scales `[out, in/group]`."""
    groups = weight.float().unflatten(1, (-1, group))
    scales = (groups.abs().amax(-1) / 7.3).to(dtype)
    codes = (groups / scales.float().unsqueeze(-1)).round().clamp(-8, 7)
    return codes.flatten(1).to(torch.int8), scales


def in_blocks(name):
    return ".layers." in name and name.endswith("_proj.weight")


def rewritten(base, folder, packed_as, **quantization):
    """A copy of a model whose linears `packed_as` makes tensors of."""
    shutil.copytree(base, folder)
    stored = load_file(folder / "model.safetensors")
    for name in [name for name in stored if in_blocks(name)]:
        stored |= packed_as(name.removesuffix(".weight"), stored.pop(name))
    save_file({k: v.contiguous() for k, v in stored.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    set_json(folder / "config.json", quantization_config=quantization)


def write_ct(base, folder, kind, *, dtype):
    """compressed-tensors, its scales in `dtype`, one for a group or for a row."""

    def packed(path, weight):
        codes, scales = split(weight, group=32 if kind == "group" else weight.shape[1], dtype=dtype)
        shape = torch.tensor(weight.shape)
        made = dict(weight_packed=pack_to_int32(codes, 4), weight_scale=scales, weight_shape=shape)
        return {f"{path}.{name}": tensor for name, tensor in made.items()}

    size = dict(strategy="group", group_size=32) if kind == "group" else dict(strategy="channel")
    weights = dict(num_bits=4, type="int", symmetric=True, **size)
    group = dict(targets=["Linear"], weights=weights, input_activations=None, output_activations=None)
    settings = dict(quant_method="compressed-tensors", format="pack-quantized", quantization_status="compressed")
    rewritten(base, folder, packed, **settings, config_groups=dict(group_0=group), ignore=["lm_head"])


def write_gptq(base, folder, kind, *, dtype):
    """GPTQ as AutoGPTQ wrote it first: zeros less one, scales in 16 bits."""

    def packed(path, weight):
        codes, scales = split(weight, group=32, dtype=dtype)
        words = (codes.T.to(torch.int64) + 8).unflatten(0, (-1, 8)) << torch.arange(0, 32, 4)[None, :, None]
        zeros = torch.full((scales.shape[1], weight.shape[0] // 8), 0x77777777, dtype=torch.int32)
        order = (torch.arange(weight.shape[1]) // 32).int()
        made = dict(qweight=words.sum(1).to(torch.int32), qzeros=zeros, scales=scales.T, g_idx=order)
        return {f"{path}.{name}": tensor for name, tensor in made.items()}

    rewritten(base, folder, packed, quant_method="gptq", bits=4, group_size=32, desc_act=False, sym=True)


WRITERS = {**dict.fromkeys(BNB, write_bnb), "group": write_ct, "channel": write_ct, "gptq": write_gptq}


@pytest.fixture(scope="module")
def comes(tiny, tmp_path_factory):
    """`comes(kind, dtype)`: the folder of a quantized model, made once; `dtype` of what is not packed."""
    made = {}

    def get(kind, dtype=torch.float32):
        if (kind, dtype) not in made:
            folder = tmp_path_factory.mktemp("quantized") / kind
            scales = torch.float16 if kind == "gptq" else dtype
            WRITERS[kind](tiny("qwen2", dtype=dtype), folder, kind, dtype=scales)
            (folder.parent / "dense").symlink_to(tiny("qwen2", dtype=dtype))
            byte_tokenizer().save_pretrained(folder)
            made[kind, dtype] = folder
        return made[kind, dtype]

    return get


def reference(folder):
    """The values of GPTQ's tensors by its definition: the product of two numbers of 16 bits is one."""
    stored = load_file(folder / "model.safetensors")
    values = {}
    for name in [name for name in stored if name.endswith(".qweight")]:
        path = name.removesuffix(".qweight")
        shifts = torch.arange(0, 32, 4)
        codes = ((stored[name][:, None, :] >> shifts[None, :, None]) & 15).flatten(0, 1)  # [in, out]
        zeros = ((stored[f"{path}.qzeros"][:, :, None] >> shifts) & 15).flatten(1) + 1  # [in/g, out]
        order = stored[f"{path}.g_idx"].long()
        weight = stored[f"{path}.scales"][order] * (codes - zeros[order]).to(torch.int8)
        values[f"{path}.weight"] = weight.T
    return values


def stock(folder, dtype=torch.float32):
    """What transformers makes of a folder, in train mode: in eval mode, bitsandbytes packs weights anew for a CPU."""
    method = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    if method == "gptq":  # the library that reads it needs a GPU
        model = AutoModelForCausalLM.from_config(read_model_config(str(folder), task=CAUSAL_LM), dtype=dtype)
        plain = {name: t for name, t in load_file(folder / "model.safetensors").items() if name in model.state_dict()}
        left = model.load_state_dict(plain | reference(folder), strict=False)
        assert set(left.missing_keys) <= {"lm_head.weight"} and not left.unexpected_keys
        return model.train()
    options = dict(quantization_config=CompressedTensorsConfig(dequantize=True)) if "compressed" in method else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).train()


def value_of(weight, dtype):
    """What stock software multiplies by."""
    if weight.dtype.is_floating_point and not hasattr(weight, "quant_state"):
        return weight.data.to(dtype)
    weight.quant_state.dtype = dtype
    return bnb.dequantize_4bit(weight.data, weight.quant_state)


def kl(found, wanted) -> float:
    """Of the next token, in nats."""
    wanted, found = wanted.log_softmax(-1), found.log_softmax(-1)
    return (wanted.exp() * (wanted - found)).sum(-1).mean().item()


def flags_for(folder, kind, **more):
    return dict(model_name=folder, train_type=TRAIN_TYPES[kind], lora_target_modules="all_linear", lora_rank=4) | more


# --- values, loss, adapters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", WRITERS)
def test_values_are_those_of_stock_software(comes, kind, stored, dtype):
    """Bit for bit, whatever the dtype of scales, and what is computed in; of each layer, packed exactly as it comes."""
    folder = comes(kind, stored)
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    run = prepared(make_config(**flags_for(folder, kind, precision=precision)))
    theirs, packed = stock(folder, dtype), set()
    for path, module in run.model.named_modules():
        if isinstance(module, QuantizedLinear):
            path = path.replace(".base_layer", "")
            packed.add(path)
            found = weight_rows(module, gather, dtype=dtype)
            assert torch.equal(found, value_of(theirs.get_submodule(path).weight, dtype))
    kept = {KEPT} if kind == "double" else set()
    linears = {name.removesuffix(".weight") for name, _ in theirs.named_parameters() if in_blocks(name)}
    assert packed == linears - kept


@torch.no_grad()
def loss_of(model, micro_batches):
    total = count = 0
    for batch in micro_batches:
        found = model(**model_inputs(batch), use_cache=False).logits.flatten(0, 1)[batch["positions"]]
        total += torch.nn.functional.cross_entropy(found.float(), batch["targets"], reduction="sum")
        count += (batch["targets"] >= 0).sum()
    return (total / count).item()


@pytest.mark.parametrize("kind", WRITERS)
def test_first_loss_is_that_of_stock_software(comes, tiny_data, kind):
    """Of transformers' model with PEFT's adapter at its start, in fp32, to 1e-6."""
    config = make_config(**flags_for(comes(kind), kind, dataset=tiny_data, batch_size=8))
    run = prepared(config)
    step = TrainStep(run, config, task=CAUSAL_LM)
    (micro_batches,) = step.batches(batches_of(config, run)).first(1)
    ours = step.mean_loss(*step.backward(micro_batches))
    peft = LoraConfig(r=4, target_modules="all-linear", use_dora="dora" in TRAIN_TYPES[kind], task_type="CAUSAL_LM")
    theirs = get_peft_model(stock(comes(kind)), peft)
    assert ours == pytest.approx(loss_of(theirs, micro_batches), abs=1e-6)


@pytest.mark.parametrize("kind", WRITERS)
def test_saved_adapters(comes, save_run, export, kind):
    """PEFT on the stock folder, our own evaluation and the merged export all give the logits of the run."""
    base = comes(kind)
    folder, model = save_run(base, TRAIN_TYPES[kind], lora_target_modules="all_linear")
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    plain, expected = logits(stock(base)), logits(model)
    assert (plain - expected).abs().max() > 1e-2  # the adapter matters
    peft = PeftModel.from_pretrained(stock(base), folder).train()
    for module in peft.modules():
        module.training = not isinstance(module, torch.nn.Dropout)
    torch.testing.assert_close(logits(peft), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(load_for_inference(describe(folder), device=CPU)), expected)
    merged = export(folder, "merged", dtype="fp32")
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    theirs = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(theirs), expected, atol=1e-4, rtol=1e-4)


# --- processes, reading ---------------------------------------------------------------------------------------------


def bytes_and_reads(flags):
    """`packed_bytes`, and how many bytes this process read of what is packed."""
    read, counted = [0], {}
    for name in ("rows", "columns", "stacked_rows"):
        counted[name] = original = getattr(CheckpointReader, name)

        def spy(self, tensor, *rows, original=original):
            found = original(self, tensor, *rows)
            read[0] += found.nbytes if "proj" in tensor and "bias" not in tensor else 0
            return found

        setattr(CheckpointReader, name, spy)
    try:
        return packed_bytes(flags), read[0]
    finally:
        for name, original in counted.items():
            setattr(CheckpointReader, name, original)


@pytest.mark.parametrize("kind", WRITERS)
def test_two_processes_hold_the_bytes_of_one(pair, comes, kind):
    """Codes, scales and norms, byte for byte; each process reads only its own rows of them."""
    flags = flags_for(comes(kind), kind)
    prepared(make_config(**flags))  # the fingerprint is read, too
    alone, all_read = bytes_and_reads(flags)
    for both, read in pair.run(bytes_and_reads, flags):
        assert both.keys() == alone.keys()
        assert all(torch.equal(both[name], alone[name]) for name in alone if name != "*shard")
        assert both["*shard"] <= alone["*shard"] / 2 + 1000
        assert read < 0.55 * all_read + 20000  # of the fingerprint


@pytest.mark.parametrize("kind", WRITERS)
def test_any_rows_are_those_of_the_whole(comes, kind):
    """Rows that begin and end anywhere, also none."""
    reader = prequantized.open_files(comes(kind), read_model_config(str(comes(kind)), task=CAUSAL_LM))
    name = "model.layers.0.self_attn.k_proj.weight"
    whole = reader.packed_rows(name, 0, 32, device=CPU)
    for start, stop in ((0, 7), (7, 32), (13, 14), (5, 5)):
        for part, of in zip(reader.packed_rows(name, start, stop, device=CPU), whole, strict=True):
            assert torch.equal(part.view(torch.uint8), of.view(torch.uint8)[start:stop])
        assert torch.equal(reader.rows(name, start, stop), reader.tensor(name)[start:stop])


# --- the run ----------------------------------------------------------------------------------------------------------


def test_a_run_goes_on(comes, tiny_data, tmp_path, capfd):
    """From its checkpoint, to the adapter of a run that was not interrupted; how the base is stored is in run.json."""
    flags = flags_for(comes("group"), "group", quantized_cache=tmp_path / "cache", dataset=tiny_data)
    record = assert_goes_on(flags, tmp_path, capfd, stored="n_bits 4, quant_group_size 32, quant_scales fp32")
    assert record["quantizer"] == dict(group_size=32, scales="fp32")


def assert_goes_on(flags, tmp_path, capfd, *, stored: str) -> dict:
    """A run on a base that comes quantized, interrupted after one of two steps, is one that was not; its run.json."""
    flags = flags | dict(batch_size=4, max_steps=2, lr=0.01, save_model=True, log_to="stdout")
    train.main(make_config(**flags, output_dir=tmp_path / "whole"))
    said = capfd.readouterr().out
    assert f"comes quantized, and its codes are taken as they are: {stored}" in said
    assert "--quantized_cache has no effect" in said and not any((tmp_path / "cache").iterdir())
    parts = dict(flags, output_dir=tmp_path / "parts", save_every_steps=1)
    with pytest.raises(Ended):
        train.main(make_config(**parts, stop_at_step=1))
    train.main(make_config(**parts, resume="auto"))
    one, other = (tmp_path / name / "adapter_model.safetensors" for name in ("whole", "parts"))
    assert one.read_bytes() == other.read_bytes()
    return json.loads((tmp_path / "parts" / "run.json").read_text())


def test_passed_flags_that_agree_are_taken(comes):
    """No note is left to say."""
    flags = dict(n_bits=4, quant_group_size=64, quant_type="nf4", quant_scales="fp32")
    config = make_config(**flags_for(comes("nf4"), "nf4", **flags))
    planned = plan(config)
    assert planned.quantizer == Bnb4bit("nf4", 64, "fp32")
    assert prequantized.notes(config, planned.quantizer) == []
    assert plan(make_config(**flags_for(comes("channel"), "channel"))).quantizer == Int4(
        64, "fp32"
    )  # rows of 64 and 128


@pytest.mark.parametrize("kind", WRITERS)
def test_a_plan_without_weights(comes, tmp_path, kind):
    """From config.json alone, a run takes what it does with the weights; 8-bit scales are no way out."""
    folder = tmp_path / "config"
    folder.mkdir()
    shutil.copy(comes(kind) / "config.json", folder)
    flags = dict(use_cpu_offload=False, batch_size=1)
    sizes = []
    for name in (comes(kind), folder):
        config, machine = make_config(**flags_for(name, kind, **flags)), machine_of("1x1", device=CPU)
        planned = report.planned_for(config, machine)
        found = [m for m in planned.model.modules() if isinstance(m, QuantizedLinear)]
        sizes.append((len(found), sum(p.numel() for m in found for p in m.packed())))
        assert "--quant_scales double" not in remedies(config, planned.model.config)
    assert sizes[0] == sizes[1]


def test_head_and_embedding_can_be_packed_too(comes):
    """They come in 16 bits, and are quantized as they are read; the blocks are as they come."""
    flags = flags_for(comes("double"), "double")
    alone, both = (packed_bytes(dict(flags, quantize_lm_head=more)) for more in (False, True))
    assert len(both) == len(alone) + 1  # of the embedding, which is the head
    assert all(torch.equal(both[name], alone[name]) for name in alone if "layers" in name)


def test_new_blocks_of_a_quantized_model(comes, save_run, tmp_path):
    """Llama-Pro trains blocks that stayed in 16 bits beside those that came in 4; what is saved is dense and whole."""
    folder = tmp_path / "pro"
    asked = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["lm_head", "model.layers.1"], **DOUBLE)
    options = dict(quantization_config=asked, dtype=torch.float32)
    AutoModelForCausalLM.from_pretrained(comes("nf4").parent / "dense", **options).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "expanded_layers.json").write_text('{"expanded_layers": [1]}')
    run, model = save_run(folder, "bnb_llama_pro", llama_pro_path=folder)
    assert "quantization_config" not in json.loads((run / "config.json").read_text())
    theirs = AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=1e-5)
    (folder / "expanded_layers.json").write_text('{"expanded_layers": [0]}')
    with pytest.raises(UserError, match=r"layers\.0\..*comes in 4 bits, and is to train in 16"):
        plan(make_config(model_name=folder, llama_pro_path=folder, train_type="bnb_llama_pro"))


@pytest.mark.parametrize("infer_type", ["bnb_dora", "w4a16_dora", "bnb_nf4"])
def test_other_exports(comes, save_run, export, infer_type):
    """What scales rows of 4-bit codes is exact; what rounds again is nearer to the run than its base is."""
    folder, model = save_run(comes("nf4"), "bnb_dora", lora_target_modules="all_linear")
    extra = {} if infer_type == "bnb_dora" else dict(gptq="false")
    made = describe(export(folder, infer_type, dtype="fp32", **extra))
    loaded = load_for_inference(made, device=CPU, dtype=torch.float32).train()
    found, base = kl(logits(loaded), logits(model)), kl(logits(stock(comes("nf4"))), logits(model))
    assert found < (1e-6 if infer_type == "bnb_dora" else 0.8 * base)


def test_an_export_of_a_base_in_part_in_16_bits(comes, save_run, export):
    """What would have to scale such rows says so before it writes anything."""
    folder, _ = save_run(comes("double"), "custom_qlora", lora_target_modules="all_linear")
    with pytest.raises(UserError, match=rf"--infer_type bnb_dora: {KEPT} of .* is in 16 bits; use merged"):
        export(folder, "bnb_dora")


# --- what is refused --------------------------------------------------------------------------------------------------

FLAGS = [
    ("nf4", dict(train_type="full"), r"--train_type full: .*bitsandbytes in 4 bits.*use one of qlora, .*16-bit model"),
    ("nf4", dict(train_type="dora"), r"--train_type dora: .*bnb_dora"),
    ("nf4", dict(train_type="hqq_dora"), r"--train_type hqq_dora: .*bnb_dora"),
    ("group", dict(train_type="lora"), r"--train_type lora: .*pack-quantized.*use one of hqq_lora, hqq_dora"),
    ("gptq", dict(train_type="bnb_dora"), r"--train_type bnb_dora: .*gptq in 4 bits.*hqq_dora"),
    ("nf4", dict(lora_init="pissa"), r"--lora_init pissa: needs the 16-bit weights"),
    ("nf4", dict(quant_group_size=128), r"--quant_group_size 128: .*quantized with 64; drop it"),
    ("nf4", dict(quant_type="fp4"), r"--quant_type fp4: .*quantized with nf4"),
    ("double", dict(quant_scales="double"), r"--quant_scales double: .*quantized with fp32"),
    ("group", dict(n_bits=8), r"--n_bits 8: .*quantized with 4"),
    ("gptq", dict(quant_scales="bf16"), r"--quant_scales bf16: .*quantized with fp16"),
]


@pytest.mark.parametrize("kind, flags, message", FLAGS)
def test_flags_that_do_not_fit(comes, kind, flags, message):
    """One line names the flag, how the base comes, and the way out."""
    with pytest.raises(UserError, match=message) as error:
        plan(make_config(**flags_for(comes(kind), kind, **flags)))
    assert "\n" not in str(error.value)


def test_a_train_type_that_does_not_fit_waits_for_no_data(comes):
    """It is refused before the data is looked for."""
    with pytest.raises(UserError, match=r"--train_type full"):
        train.read_inputs(
            make_config(model_name=comes("nf4"), train_type="full", dataset="none.jsonl", task="causal_lm")
        )


SCHEME = dict(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
CT = dict(quant_method="compressed-tensors", format="pack-quantized")
SETTINGS = [
    (dict(quant_method="awq", bits=4), "awq"),
    (dict(quant_method="fp8"), "fp8"),
    (dict(quant_method="bitsandbytes", load_in_8bit=True), "bitsandbytes in 8 bits"),
    (dict(quant_method="gptq", bits=8), "gptq in 8 bits"),
    (dict(quant_method="gptq", bits=4, desc_act=True), "act-order"),
    (dict(quant_method="gptq", bits=4, sym=False), "asymmetric"),
    (dict(quant_method="gptq", bits=4, checkpoint_format="marlin"), "gptq as marlin"),
    (CT | dict(format="float-quantized"), "compressed-tensors float-quantized"),
    *[
        (CT | dict(config_groups=dict(group_0=dict(weights=SCHEME | other))), words)
        for other, words in (
            (dict(num_bits=8), "other than 4-bit integers"),
            (dict(symmetric=False), "an asymmetric code"),
            (dict(actorder="group"), "act-order"),
            (dict(strategy="tensor"), "neither group nor row"),
        )
    ],
    (CT | dict(config_groups=dict(group_0=dict(weights=SCHEME, input_activations=dict(num_bits=8)))), "activations"),
]


@pytest.mark.parametrize("settings, words", SETTINGS, ids=lambda value: value if isinstance(value, str) else "")
def test_other_formats(tiny, tmp_path, settings, words):
    """Named in one line, with the way out; nothing is read of the weights."""
    shutil.copytree(tiny(), tmp_path / "model")
    set_json(tmp_path / "model" / "config.json", quantization_config=settings)
    with pytest.raises(
        UserError, match=rf"quantized already, with .*{words}.*; give the 16-bit model, or one of"
    ) as error:
        read_model_config(str(tmp_path / "model"), task=CAUSAL_LM)
    assert "\n" not in str(error.value)


def changed(name, change):
    """Applies `change` to a tensor of a folder; a name that does not end in a tensor's is new."""

    def apply(folder):
        stored = load_file(folder / "model.safetensors")
        stored[name] = change(stored.get(name)).contiguous()
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


UP = "model.layers.0.mlp.up_proj"
TENSORS = {
    "asymmetric": ("gptq", changed(f"{UP}.qzeros", lambda t: t + 1), rf"{UP}\.qzeros: an asymmetric code"),
    "act-order": ("gptq", changed(f"{UP}.g_idx", lambda t: t.flip(0)), rf"{UP}\.g_idx: act-order"),
    "zeros": ("group", changed(f"{UP}.weight_zero_point", lambda _: torch.ones(2)), "weight_zero_point: an asymmetric"),
    "order": ("group", changed(f"{UP}.weight_g_idx", lambda _: torch.ones(2)), "weight_g_idx: act-order"),
    "shape": ("group", changed(f"{UP}.weight_shape", lambda t: t.flip(0)), r"codes and .* scales make no \(64, 128\)"),
    "scales": ("nf4", changed(f"{UP}.weight.absmax", lambda t: t[:-3]), "absmax has shape .*, its quant_state says"),
    "two dtypes": ("group", changed(f"{UP}.weight_scale", lambda t: t.half()), "only one kind is taken"),
    "dense": (
        "nf4",
        lambda folder: shutil.copy(folder.parent / "dense" / "model.safetensors", folder),
        "no weight is packed",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit(comes, tmp_path, case):
    """Found before anything is loaded, and named."""
    kind, damage, message = TENSORS[case]
    shutil.copytree(comes(kind).parent, tmp_path / "copy", symlinks=True)
    damage(tmp_path / "copy" / kind)
    with pytest.raises(UserError, match=message) as error:
        plan(make_config(**flags_for(tmp_path / "copy" / kind, kind)))
    assert "\n" not in str(error.value)


def test_blocks_across_rows(tiny, tmp_path):
    """Of a model whose rows are no whole number of bitsandbytes' blocks, which cannot be sharded by rows."""
    base = tiny("llama", hidden_size=96, intermediate_size=64, num_attention_heads=2, num_key_value_heads=2)
    write_bnb(base, tmp_path / "model", "nf4", dtype=torch.float32)
    byte_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"groups of 64 cross its rows of 96, which cannot be sharded; give the 16-bit"):
        plan(make_config(**flags_for(tmp_path / "model", "nf4")))


def test_groups_that_no_kernel_knows():
    """Long groups are stored as several; short ones are refused."""
    assert prequantized.shared_group_size({512, 384}, named="x") == 128
    with pytest.raises(UserError, match="x: its groups of 16 are no multiple of any of 32"):
        prequantized.shared_group_size({16, 64}, named="x")
