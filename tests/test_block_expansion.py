"""Block expansion: the expanded model is the original, bit for bit, through stock transformers."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from block_expansion import LAYERS_NAME, Expansion, expand, expanded_layout

from fsdp_utils.core.errors import UserError
from fsdp_utils.model.build import DEMO_MODEL

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
FAMILIES = {
    "llama": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SHAPE, sliding_window=4),
    "qwen2": Qwen2Config(**SHAPE, **WINDOW),
    "qwen3": Qwen3Config(**SHAPE, **WINDOW, head_dim=16),
    "gemma": GemmaConfig(**SHAPE, head_dim=16),
    "gemma2": Gemma2Config(**SHAPE, head_dim=16, sliding_window=4),
    "gemma3": Gemma3TextConfig(**SHAPE, head_dim=16, sliding_window=4, sliding_window_pattern=2),
    "phi3": Phi3Config(**SHAPE),
}


def save_model(config, folder, *, max_shard_size="1GB"):
    """A tiny model with no parameter at its default, so that a swapped or dropped one shows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=torch.arange(1, 33).view(2, 16)).logits


@pytest.mark.parametrize("max_shard_size", ["1GB", "100KB"])
@pytest.mark.parametrize("family", FAMILIES)
def test_expanded_model_is_the_original(tmp_path, family, max_shard_size):
    """Logits are equal bit for bit, from one file or many, and no weight is missing, unused or re-made."""
    original = save_model(FAMILIES[family], tmp_path / "in", max_shard_size=max_shard_size)
    assert (len(list((tmp_path / "in").glob("*.safetensors"))) > 1) == (max_shard_size == "100KB")
    expand(Expansion(str(tmp_path / "in"), str(tmp_path / "out"), num_new_blocks=3, max_shard_size=max_shard_size))
    expanded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert len(expanded.model.layers) == expanded.config.num_hidden_layers == 7
    assert torch.equal(logits(expanded.eval()), logits(original))
    assert json.loads((tmp_path / "out" / LAYERS_NAME).read_text()) == {"expanded_layers": [1, 3, 6]}
    for layer in (1, 3, 6):
        block, before = expanded.model.layers[layer], expanded.model.layers[layer - 1]
        for (name, new), (_, old) in zip(block.named_parameters(), before.named_parameters(), strict=True):
            expected = torch.zeros_like(old) if "o_proj" in name or "down_proj" in name else old
            assert torch.equal(new, expected), name


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma2", "gemma3"])
def test_each_block_keeps_its_attention_type(tmp_path, family):
    """A copied block has the attention type of its source, also when config.json leaves the list to the class."""
    original = save_model(FAMILIES[family], tmp_path / "in")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    types = config.pop("layer_types")
    assert len(set(types)) == 2
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    expand(Expansion(str(tmp_path / "in"), str(tmp_path / "out"), num_new_blocks=2))
    expanded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert expanded.config.layer_types == [types[i] for i in (0, 1, 1, 2, 3, 3)]
    assert getattr(expanded.config, "max_window_layers", 3) == 3
    assert torch.equal(logits(expanded), logits(original))


def test_layout_spreads_evenly():
    """Every original layer once and in order, each new block after its source, group sizes one apart at most."""
    for depth in range(1, 40):
        for n_new in range(1, depth + 1):
            layout = expanded_layout(depth, n_new)
            assert [source for source, is_new in layout if not is_new] == list(range(depth))
            new = [i for i, (_, is_new) in enumerate(layout) if is_new]
            assert len(new) == n_new and all(layout[i - 1] == (layout[i][0], False) for i in new)
            groups = [b - a - 1 for a, b in zip([-1, *new], new, strict=False)]
            assert max(groups) - min(groups) <= 1 and new[-1] == len(layout) - 1


@pytest.mark.parametrize("rate, new_blocks", [(0.1, 1), (0.25, 1), (0.3, 1), (0.5, 2), (0.8, 3), (1.0, 4)])
def test_rates_round_down_to_at_least_one(tmp_path, rate, new_blocks):
    """The share of new blocks never exceeds the rate, except for the one block without which nothing is expanded."""
    save_model(FAMILIES["llama"], tmp_path / "in")
    expand(Expansion(str(tmp_path / "in"), str(tmp_path / "out"), expansion_rate=rate))
    assert len(json.loads((tmp_path / "out" / LAYERS_NAME).read_text())["expanded_layers"]) == new_blocks


def test_other_files_come_along(tmp_path):
    """Tokenizer, chat templates and generation config are copied; what tells how the source was made is not."""
    save_model(FAMILIES["llama"], tmp_path / "in")
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    (tmp_path / "in" / "run.json").write_text("{}")
    (tmp_path / "in" / "additional_chat_templates").mkdir()
    (tmp_path / "in" / "additional_chat_templates" / "tool_use.jinja").write_text("x")
    expand(Expansion(str(tmp_path / "in"), str(tmp_path / "mid"), num_new_blocks=1))
    expand(Expansion(str(tmp_path / "mid"), str(tmp_path / "out"), num_new_blocks=1))
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "out" / "generation_config.json").exists()
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").read_text() == "x"
    assert not (tmp_path / "out" / "run.json").exists()
    assert json.loads((tmp_path / "out" / LAYERS_NAME).read_text()) == {"expanded_layers": [5]}


def stale_config(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))


def quantized(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))


def truncated(folder):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def no_config(folder):
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    "config, damage, flags, message",
    [
        (GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=96), None, {}, "gpt2: .*o_proj.*; choose a model"),
        (MixtralConfig(**SHAPE, num_local_experts=2), None, {}, "mixtral: "),
        (FAMILIES["llama"], stale_config, {}, "has 3 layers, the weights 4"),
        (FAMILIES["llama"], quantized, {}, "quantized already; give the 16-bit model"),
        (FAMILIES["llama"], truncated, {}, "truncated"),
        (FAMILIES["llama"], no_weights, {}, "no model.safetensors"),
        (FAMILIES["llama"], no_config, {}, "config.json"),
        (FAMILIES["llama"], None, {"num_new_blocks": 5}, "--num_new_blocks 5: must be from 1"),
        (FAMILIES["llama"], None, {"model_name": "/nonexistent"}, "/nonexistent: no such folder; give .* or demo"),
    ],
)
def test_refusals_leave_no_folder(tmp_path, config, damage, flags, message):
    """What is not understood is refused in one line that begins with the flag, and nothing is left that looks like a
    model."""
    save_model(config, tmp_path / "in")
    if damage:
        damage(tmp_path / "in")
    with pytest.raises(UserError, match=message) as error:
        expand(Expansion(**{"model_name": str(tmp_path / "in"), "output_dir": str(tmp_path / "out"), **flags}))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("--num_new_blocks 5" if "num_new_blocks" in flags else "--model_name ")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_interruption_leaves_the_old_folder(tmp_path, monkeypatch):
    """A non-empty folder needs --overwrite true, and survives an expansion that is interrupted."""
    save_model(FAMILIES["llama"], tmp_path / "in")
    flags = {"model_name": str(tmp_path / "in"), "output_dir": str(tmp_path / "out"), "num_new_blocks": 1}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match="--overwrite true"):
        expand(Expansion(**flags))
    with pytest.raises(UserError, match="not replaced"):
        expand(Expansion(**flags, overwrite=True))
    with pytest.raises(UserError, match="which is read"):
        expand(Expansion(**flags | {"output_dir": str(tmp_path)}, overwrite=True))
    (tmp_path / "out" / "config.json").touch()

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("block_expansion.StreamingWriter.write", interrupt)
        expand(Expansion(**flags, overwrite=True))
    left = sorted(path.name for path in tmp_path.rglob("*") if path.parent != tmp_path / "in")
    assert left == ["config.json", "in", "mine", "out"]
    expand(Expansion(**flags, overwrite=True))
    assert not (tmp_path / "out" / "mine").exists()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 5


def test_wrong_flags_are_named(monkeypatch):
    """Before anything is read, a line for each; so is a launch as several processes."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    missing = Expansion(max_shard_size="big").errors()
    assert [line.split(":")[0] for line in missing] == ["--model_name", "--output_dir", "--max_shard_size"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    (several,) = Expansion("demo", "out").errors()
    assert several == "torchrun: an expansion is one process; start it with plain python"


def test_demo_is_the_built_in_model(tmp_path):
    """As in the other scripts."""
    expand(Expansion("demo", str(tmp_path / "out"), num_new_blocks=1))
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (DEMO_MODEL, tmp_path / "out"))
    assert after["num_hidden_layers"] == before["num_hidden_layers"] + 1
