"""Families built otherwise than Llama: what works, and what is refused in one line instead of computed wrongly."""

import pytest
import torch
from real_run import logits, make_config, prepared
from transformers import AutoModelForCausalLM

from fsdp_utils.core.errors import UserError
from fsdp_utils.folders.describe import describe
from fsdp_utils.inference.load import load_for_inference

pytestmark = pytest.mark.versions

CPU = torch.device("cpu")


@pytest.mark.parametrize("train_type", ["bnb_dora", "full"])
def test_a_head_of_another_name(save_run, tiny, export, train_type):
    """GPT-NeoX checkpoints call it embed_out: training, loading and merging give what stock transformers computes."""
    folder, trained = save_run(tiny("gptneox"), train_type)
    torch.testing.assert_close(logits(load_for_inference(describe(folder), device=CPU)), logits(trained))
    merged = AutoModelForCausalLM.from_pretrained(export(folder, "merged", dtype="fp32"), dtype=torch.float32).eval()
    torch.testing.assert_close(logits(merged), logits(trained), atol=1e-4, rtol=0)


def test_linears_that_are_none(save_run, tiny, export):
    """GPT-2 has Conv1D: nothing of it is quantized, and nothing says it were."""
    folder, trained = save_run(tiny("gpt2"), "full")
    run = describe(folder)
    torch.testing.assert_close(logits(load_for_inference(run, device=CPU)), logits(trained))
    with pytest.raises(UserError, match=r"full_post_quantized: .* no linears"):
        load_for_inference(run, device=CPU, eval_type="full_post_quantized")
    with pytest.raises(UserError, match="no packed Conv1D layers; use merged"):
        export(folder, "bnb_nf4", dtype="fp32")
    stock = AutoModelForCausalLM.from_pretrained(export(folder, "merged", dtype="fp32"), dtype=torch.float32).eval()
    torch.testing.assert_close(logits(stock), logits(trained), atol=1e-4, rtol=0)


def test_results_changed_in_place(save_run, tiny, export):
    """Falcon adds to what its linears return: adapters are refused, stock loaders would not find its own linears."""
    folder, _ = save_run(tiny("falcon"), "full")
    with pytest.raises(UserError, match="no packed FalconLinear layers"):
        export(folder, "bnb_nf4", dtype="fp32")
    for train_type in ("bnb_dora", "custom_lora", "qlora"):
        with pytest.raises(UserError, match="falcon models"):
            prepared(make_config(model_name=tiny("falcon"), train_type=train_type))
