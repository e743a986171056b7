"""What people bring is read as transformers reads it, or refused for a reason that is true."""

import json
import shutil
import sys
from functools import partial

import pytest
import torch
from all_families import make
from real_run import logits, make_config, prepared, set_json
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, OTHERS, SHAPE, byte_tokenizer
from transformers import AutoModelForCausalLM, Gemma4TextConfig, Lfm2Config, Llama4TextConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import train
from fsdp_utils.core.errors import CheckpointError, UserError
from fsdp_utils.core.safetensors_io import CheckpointReader
from fsdp_utils.folders.describe import describe, tokenizer_of
from fsdp_utils.inference.load import load_for_inference
from fsdp_utils.model import weights as model_weights
from fsdp_utils.model.build import build_on_meta, read_model_config, read_tokenizer
from fsdp_utils.model.checkpoint import match
from fsdp_utils.model.weights import load_weights, materialize
from fsdp_utils.tasks.causal_lm import CAUSAL_LM
from methods.targets import decoder_blocks, refuse_experts

pytestmark = pytest.mark.versions

CPU = torch.device("cpu")
UNBUILT = {  # families of which no tiny model is made here, and why
    **dict.fromkeys(("blt", "longcat_flash"), "sizes of its own that stay large"),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), "drafts for another model, whose cache it reads"),
    **dict.fromkeys(("musicgen", "musicgen_melody"), "decodes audio; its configuration holds two others"),
    **dict.fromkeys(("emu3", "mllama"), "writes the configuration of its text model, which is no causal model"),
    **dict.fromkeys(("cohere_compass_text", "lfm2_moe", "dots1", "dbrx"), "needs lists for each layer"),
    **dict.fromkeys(("zamba", "zamba2", "zaya", "dots3_note", "dots3_note_text", "gemma3n_text"), "checks its sizes"),
    "gemma3n": "needs an image library",
}


def ours(folder, *, dtype: torch.dtype = torch.float32):
    """Our model of a folder."""
    model = build_on_meta(read_model_config(str(folder), task=CAUSAL_LM), task=CAUSAL_LM, dtype=dtype)
    decoder_blocks(model), refuse_experts(model)
    weights = match(model, CheckpointReader(folder), task=CAUSAL_LM)
    materialize(model, device=CPU, buffer_device=CPU)
    load_weights(model, weights, device=CPU)
    return model


def stock(folder, *, dtype: torch.dtype = torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def tensors(model) -> dict[str, torch.Tensor]:
    """Every parameter and buffer under every name it has."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    return dict(model.named_parameters(remove_duplicate=False)) | buffers


def assert_same(model, reference) -> None:
    got, want = tensors(model), tensors(reference)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, atol=0, rtol=0, equal_nan=True, msg=lambda m: f"{name}: {m}")  # noqa: B023


def is_true(reason: str, model) -> bool:
    """Whether a family is refused for what it is."""
    if "holds experts" in reason:
        return any(p.dim() == 3 and "Expert" in type(model.get_submodule(n.rpartition(".")[0])).__name__
                   for n, p in model.named_parameters())  # fmt: skip
    if "names no decoder blocks" in reason:
        return not model._no_split_modules
    converts = any(isinstance(step, WeightConverter) for step in get_model_conversion_mapping(model, add_legacy=False))
    return "transformers makes" in reason and converts


@pytest.mark.parametrize("kind", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_every_family(tmp_path, kind):
    """Of each family of causal language models, every parameter and buffer is what `from_pretrained` makes of the same
    folder, in fp32 and bf16; or the family is refused for a reason that its model shows."""
    if kind in UNBUILT:
        pytest.skip(f"{kind}: {UNBUILT[kind]}")
    model = make(kind)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():  # a buffer that is not read would keep its start
            if name not in dict(model.named_parameters()) and tensor.is_floating_point():
                tensor.add_(0.5)
    model.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        try:
            found = ours(tmp_path, dtype=dtype)
        except UserError as error:
            assert is_true(str(error), model), error
            return
        assert_same(found, stock(tmp_path, dtype=dtype))


@pytest.fixture
def another_head(tiny, tmp_path):
    """A model whose configuration ties the head to the embedding, and whose checkpoint stores another head."""
    folder = tmp_path / "another_head"
    shutil.copytree(tiny("qwen2"), folder)
    stored = load_file(folder / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"] + 0.1
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("train_type", ["full", "bnb_dora", "custom_lora"])
def test_a_stored_head_wins_over_the_configuration(another_head, save_run, export, train_type):
    """Trained, evaluated and exported is what `from_pretrained` loads: the head that is stored, not the embedding; and
    the result says so to software that would believe its configuration."""
    assert_same(ours(another_head), stock(another_head))
    folder, trained = save_run(another_head, train_type)
    torch.testing.assert_close(logits(load_for_inference(describe(folder), device=CPU)), logits(trained))
    for result in [folder] * (train_type == "full") + [export(folder, "merged", dtype="fp32")]:
        torch.testing.assert_close(logits(stock(result)), logits(trained), atol=1e-4, rtol=0)
        assert "lm_head.weight" in load_file(result / "model.safetensors")
        assert json.loads((result / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_head_stored_twice_stays_tied(tiny, another_head):
    """Equal tensors under both names are one weight, as are two that are equal once they are rounded to bf16; one that
    is stored under the head's name alone is read as both."""
    path = another_head / "model.safetensors"
    stored = load_file(path)
    stored["model.embed_tokens.weight"] = stored["model.embed_tokens.weight"].bfloat16().float()
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"] * (1 + 2**-20)
    save_file(stored, path, metadata={"format": "pt"})
    for dtype, tied in ((torch.float32, False), (torch.bfloat16, True)):
        found = ours(another_head, dtype=dtype)
        assert_same(found, stock(another_head, dtype=dtype))
        assert (found.lm_head.weight is found.model.embed_tokens.weight) is tied
    del stored["model.embed_tokens.weight"]
    save_file(stored, path, metadata={"format": "pt"})
    found = ours(another_head)
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert_same(found, stock(another_head))


OLD_BUFFERS = {
    "gptneox": {"gpt_neox.layers.0.attention.bias": (1, 1, 8, 8), "gpt_neox.layers.1.attention.masked_bias": ()},
    "gpt2": {"transformer.h.0.attn.bias": (1, 1, 8, 8)},
    "gptj": {"transformer.h.0.attn.bias": (1, 1, 8, 8), "transformer.h.0.attn.masked_bias": ()},
    "gpt_neo": {"transformer.h.0.attn.attention.bias": (1, 1, 8, 8), "transformer.h.0.attn.attention.masked_bias": ()},
    "llama": {"model.layers.0.self_attn.rotary_emb.inv_freq": (8,)},
}


@pytest.mark.parametrize("family", OLD_BUFFERS)
def test_tensors_that_transformers_ignores(tiny, tmp_path, family):
    """Buffers of old checkpoints are passed over where the model's class does so, and masks of old attention; a tensor
    that nobody knows is not."""
    if family in OTHERS | FAMILIES:
        shutil.copytree(tiny(family), tmp_path / "model")
    else:
        make(family).save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    stored = load_file(path) | {name: torch.ones(shape) for name, shape in OLD_BUFFERS[family].items()}
    save_file(stored, path, metadata={"format": "pt"})
    assert_same(ours(tmp_path / "model"), stock(tmp_path / "model"))
    save_file(stored | {"model.extra.weight": torch.ones(2)}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.extra\.weight .*loads into nothing"):
        ours(tmp_path / "model")


def test_tensors_that_may_be_missing(tiny, tmp_path, monkeypatch):
    """What the model's class allows to be missing begins as the class begins it; another one is named."""
    shutil.copytree(tiny("qwen2"), tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    stored = load_file(path)
    del stored["model.norm.weight"], stored["model.layers.0.self_attn.q_proj.bias"]
    save_file(stored, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no tensor for model\.layers\.0\.self_attn\.q_proj\.bias"):
        ours(tmp_path / "model")
    kind = type(stock(tiny("qwen2")))
    monkeypatch.setattr(kind, "_keys_to_ignore_on_load_missing", [r"model\.norm", r"q_proj\.bias"])
    assert_same(ours(tmp_path / "model"), stock(tmp_path / "model"))


KINDS = {
    "lfm2": lambda: Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"]),
    "gemma4": lambda: Gemma4TextConfig(
        **SHAPE, head_dim=16, vocab_size_per_layer_input=300, hidden_size_per_layer_input=64
    ),
}


@pytest.fixture(scope="module")
def kind_of(tmp_path_factory):
    """The folder of a tiny model of one of these kinds, its stored buffers off their start."""

    def get(kind):
        folder = tmp_path_factory.mktemp(kind)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(KINDS[kind]())
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.fill_(0.75)
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        return folder

    return get


@pytest.mark.parametrize("train_type", ["full", "bnb_dora"])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_layers(kind_of, save_run, export, kind, train_type):
    """Convolutions in decoder blocks stay as they are under adapters; layers that differ in shape, and stored buffers,
    are trained on, evaluated and exported as transformers computes them."""
    base = kind_of(kind)
    torch.testing.assert_close(logits(prepared(make_config(model_name=base, train_type="full")).model.eval()),
                               logits(stock(base)))  # fmt: skip
    folder, trained = save_run(base, train_type)
    torch.testing.assert_close(logits(load_for_inference(describe(folder), device=CPU)), logits(trained))
    for result in [folder] * (train_type == "full") + [export(folder, "merged", dtype="fp32")]:
        torch.testing.assert_close(logits(stock(result)), logits(trained), atol=1e-4, rtol=0)


def test_experts_are_refused_by_their_name(tmp_path):
    """Evaluation and export refuse what training refuses, and name it: stacks of another kind."""
    shape = SHAPE | dict(head_dim=16, intermediate_size_mlp=64, num_local_experts=2, moe_layers=[1])
    AutoModelForCausalLM.from_config(Llama4TextConfig(**shape)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"feed_forward\.experts\.gate_up_proj \(2, 64, 256\) holds experts"):
        load_for_inference(describe(tmp_path), device=CPU)


REMOTE = {
    "configuration_tiny.py": """
from transformers import LlamaConfig

class TinyConfig(LlamaConfig):
    model_type = "tiny_remote"
""",
    "tokenization_tiny.py": """
from transformers import PreTrainedTokenizerFast

class TinyTokenizer(PreTrainedTokenizerFast):
    pass
""",
    "modeling_tiny.py": """
from transformers import LlamaForCausalLM
from .configuration_tiny import TinyConfig

class TinyForCausalLM(LlamaForCausalLM):
    config_class = TinyConfig

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 2  # no class of transformers does so
        return out
""",
}
TOKENIZER_CLASSES = dict(AutoTokenizer=[None, "tokenization_tiny.TinyTokenizer"])


@pytest.fixture
def remote(tiny, tmp_path, monkeypatch):
    """A model whose folder brings its own code."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    folder = tmp_path / "remote"
    shutil.copytree(tiny("llama"), folder)
    for name, code in REMOTE.items():
        (folder / name).write_text(code)
    classes = dict(AutoConfig="configuration_tiny.TinyConfig", AutoModelForCausalLM="modeling_tiny.TinyForCausalLM")
    set_json(folder / "config.json", model_type="tiny_remote", auto_map=classes)
    return folder


@pytest.mark.parametrize("train_type", ["full", "bnb_dora"])
def test_code_that_a_model_brings(remote, save_run, export, train_type):
    """It runs where the flag says so, in training, evaluation and export, and its results bring it along."""
    stock = lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)
    set_json(remote / "tokenizer_config.json", tokenizer_class="TinyTokenizer", auto_map=TOKENIZER_CLASSES)
    folder, trained = save_run(remote, train_type, trust_remote_code=True)
    run = describe(folder, trust_remote_code=True)
    torch.testing.assert_close(logits(load_for_inference(run, device=CPU)), logits(trained))
    exported = export(folder, "merged", dtype="fp32", trust_remote_code=True)
    for tokenizer in (tokenizer_of(run), read_tokenizer(str(exported), trust_remote_code=True)):
        assert type(tokenizer).__name__ == "TinyTokenizer"
    merged = stock(exported).eval()
    torch.testing.assert_close(logits(merged), logits(trained), atol=1e-4, rtol=0)
    with pytest.raises(UserError, match=r"brings code of its own .*--trust_remote_code true"):
        load_for_inference(describe(folder), device=CPU)


def test_code_that_nobody_trusts(remote):
    """Nothing asks at the terminal: one line names the flag; where transformers has a class, that one is taken."""
    set_json(remote / "tokenizer_config.json", tokenizer_class="TinyTokenizer", auto_map=TOKENIZER_CLASSES)
    for read in (partial(read_model_config, task=CAUSAL_LM), read_tokenizer):
        with pytest.raises(UserError, match=r"brings code of its own .*--trust_remote_code true"):
            read(str(remote))
    assert type(read_tokenizer(str(remote), trust_remote_code=True)).__name__ == "TinyTokenizer"
    set_json(remote / "config.json", model_type="llama")
    assert type(read_model_config(str(remote), task=CAUSAL_LM)).__module__.startswith("transformers.models.llama")
    assert_same(ours(remote), stock(remote))


@pytest.mark.parametrize("name", ["configuration_tiny.py", "tokenization_tiny.py"])
def test_packages_that_such_code_takes(remote, name):
    """One line names those that are missing, and the way out."""
    set_json(remote / "tokenizer_config.json", tokenizer_class="TinyTokenizer", auto_map=TOKENIZER_CLASSES)
    (remote / name).write_text(f"import a_package_that_nobody_has\n{REMOTE[name]}")
    reads = {
        "configuration_tiny.py": partial(read_model_config, task=CAUSAL_LM),
        "tokenization_tiny.py": read_tokenizer,
    }
    with pytest.raises(UserError, match="pip install a_package_that_nobody_has") as error:
        reads[name](str(remote), trust_remote_code=True)
    assert "\n" not in str(error.value)


def test_a_cache_that_cannot_be_written(remote, monkeypatch):
    """The line names it and the variable that moves it, and does not blame the model."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", "/proc/nowhere")
    with pytest.raises(UserError, match=r"^/proc/.*; set HF_HOME"):
        read_model_config(str(remote), task=CAUSAL_LM, trust_remote_code=True)


def test_an_adapter_beside_a_model(save_run, tiny, tmp_path):
    """transformers would load the adapter's base: the folder is refused as a base, with both ways to go on."""
    folder, _ = save_run(tiny(), "custom_lora")
    shutil.copytree(tiny(), tmp_path / "both")
    shutil.copy(folder / "adapter_config.json", tmp_path / "both")
    with pytest.raises(UserError, match=r"holds an adapter .*--init_adapter .*prepare_weights"):
        read_model_config(str(tmp_path / "both"), task=CAUSAL_LM)


def test_a_checkpoint_of_everything_is_a_model(kind_of, tiny_data, tmp_path):
    """What a checkpoint holds of a full fine-tune loads as a model, with the buffers that the base had."""
    base = kind_of("gemma4")
    flags = dict(model_name=base, dataset=tiny_data, output_dir=tmp_path / "run", batch_size=4, log_to="stdout")
    train.main(make_config(train_type="full", save_every_steps=1, max_steps=1, save_model=True, **flags))
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert_same(stock(checkpoint), stock(tmp_path / "run"))
    assert all((b == 0.75).all() for name, b in tensors(stock(checkpoint)).items() if name.endswith("layer_scalar"))


def kept_in_fp32(folder, precision):
    """How loading a model ends of which some weights stay in fp32, with all training and two processes."""
    kind = type(stock(folder))
    kind._keep_in_fp32_modules_strict = ["norm"]
    try:
        run = prepared(make_config(model_name=folder, train_type="full", precision=precision))
    except UserError as error:
        return str(error)
    finally:
        kind._keep_in_fp32_modules_strict = None
    return {name: p.dtype for name, p in run.model.named_parameters()}


def test_weights_that_stay_in_fp32(pair, tiny):
    """They do under bf16, one process trains them so; FSDP2 cannot beside others, which is said before any is read."""
    for name, dtype in kept_in_fp32(tiny(), "bf16").items():
        assert dtype == (torch.float32 if "norm" in name else torch.bfloat16)
    assert all("--precision bf16" in said for said in pair.run(kept_in_fp32, tiny(), "bf16"))
    assert set(pair.run(kept_in_fp32, tiny(), "fp32")[0].values()) == {torch.float32}


@pytest.mark.parametrize(("family", "flags"), [
    ("llama", dict(train_type="bnb_dora", quant_scales="double")),
    ("llama", dict(train_type="hqq_dora", train_for="w4a16", quant_group_size=32)),
    ("mixtral", dict(train_type="hqq_lora", n_bits=3)),
    ("gpt_oss", dict(train_type="custom_qlora")),
], ids=str)  # fmt: skip
def test_read_in_pieces(tiny, monkeypatch, family, flags):
    """What is read and quantized a few rows at a time is what is read whole: every parameter, to the bit."""
    config = make_config(model_name=tiny(family), **flags)
    whole = prepared(config)
    monkeypatch.setattr(model_weights, "PIECE", 5 * 64)  # a few rows; fewer than a matrix of a stack has
    pieces = prepared(config)
    for (name, a), b in zip(whole.model.named_parameters(), pieces.model.parameters(), strict=True):
        assert a.shape == b.shape and torch.equal(a.data.view(torch.uint8), b.data.view(torch.uint8)), name
