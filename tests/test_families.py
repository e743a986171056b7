"""Families built otherwise than Llama: what works, and what is refused in one line instead of computed wrongly."""

import pytest
import torch
from runs import logits, make_config, prepared, save_trained
from tiny import FAMILIES, make_model
from transformers import AutoModelForCausalLM, FalconConfig, GPT2Config, GPTNeoXConfig

import prepare_weights
from fsdp_utils import runs
from fsdp_utils.flags import parse
from methods.errors import UserError

CPU = torch.device("cpu")
SIZES = dict(vocab_size=300, bos_token_id=256, eos_token_id=257)
OTHERS = {
    "gptneox": lambda: GPTNeoXConfig(
        **SIZES, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    ),
    "gpt2": lambda: GPT2Config(**SIZES, n_embd=64, n_layer=2, n_head=4),
    "falcon": lambda: FalconConfig(**SIZES, hidden_size=64, num_hidden_layers=2, num_attention_heads=4),
}


@pytest.fixture
def model_of(tmp_path, monkeypatch):
    """`model_of("falcon")`: the folder of a tiny model of one of OTHERS."""

    def make(family):
        monkeypatch.setitem(FAMILIES, family, OTHERS[family])
        return make_model(tmp_path / family, family)

    return make


@pytest.fixture
def saved(model_of, tiny_data, tmp_path):
    """`saved("gpt2")`: the folder of a finished full fine-tune, and its base."""

    def save(family, train_type="full"):
        base, out = model_of(family), tmp_path / "run"
        flags = dict(model_name=base, dataset=tiny_data, train_type=train_type, save_model=True, output_dir=out)
        return out, save_trained(make_config(**flags))

    return save


def export(folder, infer_type):
    flags = dict(model=folder, save_dir=folder.parent / infer_type, infer_type=infer_type, dtype="fp32")
    argv = [f"--{name}={value}" for name, value in {**flags, "fidelity_samples": 0, "device": "cpu"}.items()]
    prepare_weights.main(parse(prepare_weights.ExportConfig, argv, prog="prepare_weights.py"))
    return folder.parent / infer_type


@pytest.mark.parametrize("train_type", ["bnb_dora", "full"])
def test_a_head_of_another_name(saved, train_type):
    """GPT-NeoX checkpoints call it embed_out: training, loading and merging give what stock transformers computes."""
    folder, trained = saved("gptneox", train_type)
    torch.testing.assert_close(logits(runs.load_for_inference(runs.describe(folder), device=CPU)), logits(trained))
    merged = AutoModelForCausalLM.from_pretrained(export(folder, "merged"), dtype=torch.float32).eval()
    torch.testing.assert_close(logits(merged), logits(trained), atol=1e-4, rtol=0)


def test_linears_that_are_none(saved):
    """GPT-2 has Conv1D: nothing of it is quantized, and nothing says it were."""
    folder, trained = saved("gpt2")
    run = runs.describe(folder)
    torch.testing.assert_close(logits(runs.load_for_inference(run, device=CPU)), logits(trained))
    with pytest.raises(UserError, match=r"full_post_quantized: .* no linears"):
        runs.load_for_inference(run, device=CPU, eval_type="full_post_quantized")
    with pytest.raises(UserError, match="no packed Conv1D layers; use merged"):
        export(folder, "bnb_nf4")
    stock = AutoModelForCausalLM.from_pretrained(export(folder, "merged"), dtype=torch.float32).eval()
    torch.testing.assert_close(logits(stock), logits(trained), atol=1e-4, rtol=0)


def test_results_changed_in_place(saved):
    """Falcon adds to what its linears return: adapters are refused, stock loaders would not find its own linears."""
    folder, _ = saved("falcon")
    with pytest.raises(UserError, match="no packed FalconLinear layers"):
        export(folder, "bnb_nf4")
    for train_type in ("bnb_dora", "custom_lora", "qlora"):
        with pytest.raises(UserError, match="falcon models"):
            prepared(make_config(model_name=folder, train_type=train_type))
