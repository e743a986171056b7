"""Exports: what stock software loads from the written folder is the model that was trained."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from peft import PeftModel
from real_run import logits, set_json
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

import prepare_weights
from fsdp_utils.core.errors import UserError
from fsdp_utils.core.flags import ConfigError
from fsdp_utils.data.layouts import Reading
from fsdp_utils.export import fidelity, held_out, w4a16
from fsdp_utils.folders.describe import describe
from prepare_weights import ExportConfig
from scripts.block_expansion import Expansion, expand


@pytest.fixture(autouse=True)
def plain_cpu_kernels(monkeypatch):
    """On CPUs with AVX512-BF16 bitsandbytes computes in bf16 whatever it is asked for."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


def stock(folder, *, dtype=torch.float32, **options):
    """What transformers and PEFT make of a folder."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    if (folder / "adapter").is_dir():
        model = PeftModel.from_pretrained(model, folder / "adapter")
    return model.eval()


def kl(found, wanted) -> float:
    """Mean divergence of logits `found` from logits `wanted`."""
    wanted, found = wanted.log_softmax(-1), found.log_softmax(-1)
    return (wanted.exp() * (wanted - found)).sum(-1).mean().item()


MERGED = [
    ("llama", "bnb_dora", {}),
    ("qwen2", "qlora", {}),  # biases, tied head
    ("gemma", "hqq_dora", {}),  # tied head
    ("phi3", "custom_qlora", {"lora_target_modules": "qkv_proj,down_proj"}),  # fused; linears without an adapter
    ("qwen2", "dora", {}),
    ("mistral", "lora", {}),
    ("llama", "hqq_lora", {"n_bits": 3}),
    ("llama", "bnb_dora", {"quant_scales": "double", "quant_group_size": 32, "quant_type": "fp4"}),
    ("llama", "custom_qlora", {"quantize_lm_head": True}),
    ("qwen2", "hqq_dora", {"quantize_lm_head": True}),
    ("llama", "full", {}),
]


@pytest.mark.parametrize("family, train_type, flags", MERGED)
def test_merged(save_run, tiny, export, family, train_type, flags):
    """A merged folder has the logits of the run's model, and is complete."""
    run, model = save_run(tiny(family), train_type, **flags)
    folder = export(run, "merged", dtype="fp32", max_shard_size="100KB")
    merged = stock(folder)
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-4, rtol=0)
    tied = merged.config.tie_word_embeddings
    assert (merged.lm_head.weight is merged.get_input_embeddings().weight) == tied
    assert merged.config.use_cache and (folder / "generation_config.json").exists()
    assert AutoTokenizer.from_pretrained(folder)("abc")["input_ids"]


@pytest.mark.parametrize("flags", [{}, {"quantize_lm_head": True}], ids=str)
@pytest.mark.parametrize("train_type", ["bnb_dora", "custom_qlora"])
@pytest.mark.parametrize("family", ["qwen2", "phi3"])
def test_unmerged_qdora_is_exact(save_run, tiny, export, family, train_type, flags):
    """The scaled 4-bit base with a plain LoRA, in bitsandbytes and PEFT, is the trained model: biases stay unscaled."""
    run, model = save_run(tiny(family), train_type, **flags)
    folder = export(run, "bnb_dora", dtype="fp32")
    torch.testing.assert_close(logits(stock(folder)), logits(model), atol=1e-3, rtol=0)
    adapter = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert adapter["use_dora"] is False and adapter["base_model_name_or_path"] == str(folder)


def test_unmerged_qdora_of_any_quantizer(save_run, tiny, export):
    """Other block sizes, FP4 and 8-bit scales are stored exactly too."""
    flags = {"quant_scales": "double", "quant_group_size": 32, "quant_type": "fp4"}
    run, model = save_run(tiny(), "bnb_dora", **flags)
    torch.testing.assert_close(logits(stock(export(run, "bnb_dora", dtype="fp32"))), logits(model), atol=1e-3, rtol=0)


def test_unmerged_qdora_in_bf16(save_run, tiny, export):
    """In bf16 the most likely token is the trained model's, wherever bf16 tells its two best apart."""
    run, model = save_run(tiny(dtype=torch.bfloat16), "bnb_dora", precision="bf16")
    found, wanted = logits(stock(export(run, "bnb_dora"), dtype=torch.bfloat16), rows=100), logits(model, rows=100)
    top = wanted.topk(2).values
    clear = top[..., 0] - top[..., 1] > 2 * torch.finfo(torch.bfloat16).eps * top[..., 0].abs()
    agreed = found.argmax(-1) == wanted.argmax(-1)
    assert agreed[clear].float().mean() > 0.99


def test_nf4(save_run, tiny, export):
    """bitsandbytes loads what was packed: merged weights quantized again, straight from the run or from its merge."""
    run, model = save_run(tiny("qwen2"), "qlora")
    folder = export(run, "bnb_nf4", dtype="fp32", gptq="false")
    direct = logits(stock(folder))
    assert kl(direct, logits(model)) < 0.05
    merged = export(run, "merged", name="merged", dtype="fp32")
    assert torch.equal(logits(stock(export(merged, "full_post_quant", name="nf4", dtype="fp32"))), direct)
    loaded = stock(folder)
    layer = loaded.model.layers[0].mlp.up_proj.weight
    assert (layer.quant_state.quant_type, layer.quant_state.blocksize, layer.dtype) == ("nf4", 64, torch.uint8)
    assert loaded.lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize("train_type", ["bnb_llama_pro", "full"])
def test_nf4_of_models(save_run, tiny, export, tmp_path, train_type):
    """New Llama-Pro blocks stay as they were trained, and the frozen ones come out as they were quantized."""
    flags = {}
    if train_type == "bnb_llama_pro":
        expand(Expansion(model_name=str(tiny()), output_dir=str(tmp_path / "pro"), num_new_blocks=1))
        flags = dict(llama_pro_path=tmp_path / "pro")
    run, model = save_run(tiny(), train_type, **flags)
    loaded = stock(export(run, "bnb_nf4", dtype="fp32"))
    assert kl(logits(loaded), logits(model)) < (1e-6 if flags else 0.05)
    new = json.loads((run / "expanded_layers.json").read_text())["expanded_layers"] if flags else []
    for number, block in enumerate(loaded.model.layers):
        assert block.mlp.up_proj.weight.dtype == (torch.float32 if number in new else torch.uint8)


CASES = [("bnb_dora", True, 64), ("bnb_dora", False, 32), ("hqq_dora", False, 64), ("full", True, 32)]


@pytest.mark.parametrize("train_type, symmetric, group_size", CASES)
def test_w4a16(save_run, tiny, export, train_type, symmetric, group_size):
    """transformers with compressed-tensors unpacks what was packed, and it is near the trained model."""
    run, model = save_run(tiny("qwen2"), train_type)
    folder = export(run, "w4a16", symmetric=symmetric, group_size=group_size, dtype="fp32", gptq="false")
    loaded = stock(folder, quantization_config=CompressedTensorsConfig(dequantize=True))
    assert kl(logits(loaded), logits(model)) < 0.05
    if symmetric:
        torch.testing.assert_close(logits(stock(folder)), logits(loaded))
    merged = stock(export(run, "merged", name="merged", dtype="fp32"))
    path = "model.layers.0.mlp.up_proj"
    grid = load_file(folder / "model.safetensors")[f"{path}.weight_scale"].repeat_interleave(group_size, dim=1)
    error = (loaded.get_submodule(path).weight - merged.get_submodule(path).weight).abs()
    assert (error <= grid * 1.01).float().mean() > 0.95  # but for what clipping cuts off
    assert loaded.get_submodule("lm_head").weight is loaded.get_input_embeddings().weight


def test_hqq_grid_helps(save_run, tiny, export, monkeypatch):
    """The grid that HQQ found, its zeros rounded and its codes solved again, lowers the error of the weights."""
    run, _ = save_run(tiny("qwen2"), "hqq_dora")
    merged = stock(export(run, "merged", name="merged", dtype="fp32")).model.layers[0].mlp.up_proj.weight

    def error(name):
        folder = export(run, "w4a16", symmetric=False, group_size=64, dtype="fp32", name=name)
        loaded = stock(folder, quantization_config=CompressedTensorsConfig(dequantize=True))
        return (loaded.model.layers[0].mlp.up_proj.weight - merged).square().mean().item()

    with_grid = error("with")
    monkeypatch.setattr(w4a16.W4A16, "_hqq", lambda self, path: ())
    assert with_grid < error("without")


@pytest.mark.parametrize("symmetric", [True, False])
def test_packing_is_that_of_compressed_tensors(symmetric):
    """Codes and zeros unpack to themselves; half a step is the largest error; constant and zero groups are finite."""
    weight = torch.randn(12, 64, generator=torch.Generator().manual_seed(0))
    weight[0], weight[1], weight[2] = 0, 3.0, -3.0
    candidates = list(w4a16.grids(weight.unflatten(1, (-1, 32)), symmetric=symmetric))
    grid = w4a16.choose(weight, candidates, group_size=32, dtype=torch.float32)
    codes, scales, zeros = grid.codes(weight), grid.scale, grid.zero.to(torch.int8)
    assert torch.equal(unpack_from_int32(w4a16.pack(codes), 4, (12, 64)), codes)
    packed = w4a16.pack(zeros.T).T.contiguous()
    assert torch.equal(unpack_from_int32(packed, 4, (12, 2), packed_dim=0), zeros)
    wide = lambda tensor: tensor.float().repeat_interleave(32, dim=1)
    error = ((codes - wide(zeros)) * wide(scales) - weight).abs()
    assert error.isfinite().all() and error[0].max() == 0
    assert (error / wide(scales)).median() <= 0.5


def test_fidelity_report(save_run, tiny, tiny_data, export):
    """The report compares trained, exported and base on the run's data; an exact export has no divergence."""
    run, _ = save_run(tiny(), "bnb_dora", context_length=128)
    folder = export(run, "bnb_dora", dtype="fp32", fidelity_samples=4)
    found = json.loads((folder / "fidelity.json").read_text())
    assert found["texts"] == 4 and "trained on" in found["data"]
    assert found["exported"]["kl"] < 1e-6 and found["exported"]["top1_agreement"] == 1
    assert found["exported"]["perplexity"] == pytest.approx(found["trained"]["perplexity"], rel=1e-4)
    assert found["base"]["kl"] > 1e-3
    merged = export(run, "merged", name="merged", fidelity_samples=4, fidelity_data="demo")
    found = json.loads((merged / "fidelity.json").read_text())
    assert found["data"] == "demo" and 0 < found["exported"]["kl"] < 0.01
    with pytest.raises(UserError, match="--fidelity_samples 0"):
        export(merged, "bnb_nf4", name="nf4", fidelity_samples=4)
    nf4 = export(merged, "bnb_nf4", name="nf4", fidelity_samples=4, fidelity_data=tiny_data)
    assert "base" not in json.loads((nf4 / "fidelity.json").read_text())


def test_what_an_export_reads_stays(save_run, tiny, tiny_data, export, tmp_path):
    """--overwrite does not remove the data to compare on."""
    run, _ = save_run(tiny(), "bnb_dora")
    folder = export(run, "merged", name="merged")
    shutil.copy(tiny_data, folder / "data.jsonl")
    more = dict(fidelity_samples=2, fidelity_data=str(folder / "data.jsonl"), overwrite=True)
    with pytest.raises(UserError, match=r"holds .*data\.jsonl, which is read"):
        export(run, "merged", name="merged", **more)
    assert (folder / "data.jsonl").exists()
    mixed = f"{folder / 'data.jsonl'}:0.5,demo:0.5"
    for flag in (dict(dataset=mixed), dict(eval_dataset=f"{folder}/*.jsonl")):
        trained, _ = save_run(tiny(), "custom_lora", **{"dataset": tiny_data, **flag})
        with pytest.raises(UserError, match=r"holds .*data\.jsonl, which is read"):
            export(trained, "merged", name="merged", overwrite=True)


def test_another_model_in_the_base_s_place_is_no_base(tiny, save_run, tmp_path):
    """The report leaves the base out rather than compare with a model that training did not start from."""
    base = shutil.copytree(tiny(), tmp_path / "base")
    run, _ = save_run(base, "full")
    assert fidelity.base_folder(describe(run)) == base
    shutil.rmtree(base)
    shutil.copytree(tiny("llama", num_hidden_layers=4), base)
    assert fidelity.base_folder(describe(run)) is None


def test_interrupted_export_leaves_nothing(save_run, tiny, export, tmp_path, monkeypatch):
    """A failure in the middle of the weights removes what was written, and keeps what was there before."""
    run, _ = save_run(tiny(), "bnb_dora")
    kept = export(run, "bnb_nf4", name="kept")
    real = prepare_weights.TrainedWeights.merged

    def fail(self, path):
        if path.startswith("model.layers.1."):
            raise KeyboardInterrupt
        return real(self, path)

    monkeypatch.setattr(prepare_weights.TrainedWeights, "merged", fail)
    for name in ("new", "kept"):
        with pytest.raises(KeyboardInterrupt):
            export(run, "merged", name=name, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert "quantization_config" in json.loads((kept / "config.json").read_text())


def test_target_and_disk(save_run, tiny, export, tmp_path, monkeypatch):
    """Nothing is replaced unasked, sources and other folders never are, and a full disk is noticed before writing."""
    run, _ = save_run(tiny(), "bnb_dora")
    folder = export(run, "merged")
    with pytest.raises(UserError, match=r"--save_dir .*: is not empty"):
        export(run, "merged")
    (folder / "stale").write_text("")
    export(run, "bnb_nf4", overwrite=True)
    assert not (folder / "stale").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="holds no model"):
        export(run, "merged", name="other", overwrite=True)
    copy = shutil.copytree(run, tmp_path / "copy")
    with pytest.raises(UserError, match="which is read"):
        export(copy, "merged", name="copy", overwrite=True)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match="GB to write"):
        export(run, "merged", name="full")
    assert not (tmp_path / "full").exists()


def test_wrong_base_and_damaged_runs(save_run, tiny, export, tmp_path):
    """Another base, a missing tensor, another rank, half a run and lost block ids are one line each."""
    run, _ = save_run(tiny(), "bnb_dora")
    broken = shutil.copytree(run, tmp_path / "broken")
    set_json(broken / "adapter_config.json", base_model_name_or_path=str(tiny(tie_word_embeddings=True)))
    refused = [(broken, "is not the base it was trained on")]
    tensors = load_file(run / "adapter_model.safetensors")
    for number, (changed, message) in enumerate(
        (
            (dict(list(tensors.items())[1:]), "is missing from"),
            ({n: t[:2].clone() if "lora_A" in n else t for n, t in tensors.items()}, "says r = 4"),
        )
    ):
        copy = shutil.copytree(run, tmp_path / f"copy{number}")
        save_file(changed, copy / "adapter_model.safetensors")
        refused.append((copy, message))
    half = shutil.copytree(run, tmp_path / "half")
    set_json(half / "run.json", finished=False)
    expand(Expansion(model_name=str(tiny()), output_dir=str(tmp_path / "pro"), num_new_blocks=1))
    pro, _ = save_run(tiny(), "llama_pro", llama_pro_path=tmp_path / "pro")
    lost, wrong = (shutil.copytree(pro, tmp_path / name) for name in ("lost", "wrong"))
    (lost / "expanded_layers.json").unlink()
    set_json(wrong / "expanded_layers.json", expanded_layers=[7])
    refused += [(half, "did not finish"), (lost, "no expanded_layers.json"), (wrong, r"expanded layers \[7\]")]
    for folder, message in refused:
        with pytest.raises(UserError, match=message) as error:
            export(folder, "merged")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_unsupported_combinations(save_run, tiny, export, monkeypatch):
    """What a format cannot store is refused in one line, before anything is written."""
    dora, _ = save_run(tiny(), "bnb_dora")
    hqq, _ = save_run(tiny("gemma"), "hqq_dora")
    full, _ = save_run(tiny(), "full")
    for run in (hqq, full):
        with pytest.raises(UserError, match="no adapter on a bitsandbytes base"):
            export(run, "bnb_dora")
    with pytest.raises(UserError, match="no multiple of the group size 128"):
        export(dora, "w4a16", group_size=128)
    merged = export(dora, "merged", name="merged")
    with pytest.raises(UserError, match=r"--gptq true: .* give the run itself"):
        export(merged, "w4a16", group_size=32, gptq="true")
    with pytest.raises(ConfigError, match="--rounding: has no meaning for --dtype fp32"):
        export(dora, "merged", dtype="fp32", rounding="nearest")
    with pytest.raises(ConfigError, match="--gptq: has no meaning for --infer_type bnb_dora"):
        export(dora, "bnb_dora", gptq="false")
    with pytest.raises(ConfigError, match="--group_size: has no meaning for --infer_type merged"):
        export(dora, "merged", group_size=32)
    with monkeypatch.context() as patched:
        patched.setattr(prepare_weights, "find_spec", lambda name: None)
        with pytest.raises(UserError, match="pip install compressed-tensors"):
            export(dora, "w4a16", group_size=32, fidelity_samples=1)
    nf4 = export(dora, "bnb_nf4", name="nf4")
    with pytest.raises(UserError, match="quantized for serving already"):
        export(nf4, "merged")


def test_what_is_refused_leaves_no_trace(save_run, tiny, export, tmp_path):
    """The reason is the run's, also where the report could not be made; no folder is made on the way to the target."""
    full, _ = save_run(tiny(), "full")
    nf4 = export(full, "bnb_nf4", name="nf4")
    with pytest.raises(UserError, match=f"^--model {nf4}: is quantized for serving already"):
        export(nf4, "merged", name="new/out", fidelity_samples=4)
    with pytest.raises(UserError, match="no adapter on a bitsandbytes base"):
        export(full, "bnb_dora", name="new/out")
    assert [path.name for path in tmp_path.iterdir()] == ["nf4"]


@pytest.mark.parametrize("lora_init", ["default", "pissa"])
def test_the_grid_is_mentioned_where_there_is_one(save_run, tiny, export, capsys, lora_init):
    """The merged weight of a run lies near the grid of its base, unless the base is the rest that PiSSA leaves."""
    run, _ = save_run(tiny(), "bnb_dora", lora_init=lora_init)
    export(run, "bnb_nf4")
    assert ("rounding to the grid it was trained on" in capsys.readouterr().out) is (lora_init == "default")


def test_flags_are_required():
    """Without --model and --save_dir nothing can be done."""
    assert replace(ExportConfig()).errors() == ["--model: required", "--save_dir: required"]


@pytest.mark.parametrize("name", ["no_such_set", "no/such/file.jsonl"])
def test_comparison_data_that_is_not_there(name):
    """What cannot be read is said under the flag that named it."""
    with pytest.raises(UserError, match=f"^--fidelity_data {name}: "):
        held_out.named(name, Reading())
