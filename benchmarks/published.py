"""The public shapes of the models that recipes name, as folders with a config.json: nothing reaches a hub."""

import json
from pathlib import Path

from transformers import AutoTokenizer, LlamaConfig, MistralConfig, Qwen2Config, RobertaConfig, T5Config

from benchmarks.common import SHAPES
from fsdp_utils.model.build import resolve_model

LLAMA_2_7B = dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_key_value_heads=32,
                  vocab_size=32000, max_position_embeddings=4096)  # fmt: skip
FLAN_T5_SMALL = dict(
    vocab_size=32128, d_model=512, d_kv=64, d_ff=1024, num_layers=8, num_decoder_layers=8, num_heads=6,
    feed_forward_proj="gated-gelu", decoder_start_token_id=0, tie_word_embeddings=False,
)  # fmt: skip
PUBLISHED = {
    "meta-llama/Llama-2-7b-hf": lambda: LlamaConfig(**LLAMA_2_7B, num_hidden_layers=32),
    "meta-llama/Llama-3.2-1B": lambda: LlamaConfig(**SHAPES["1b"], tie_word_embeddings=True),
    "meta-llama/Llama-3.1-8B": lambda: LlamaConfig(**SHAPES["8b"]),
    "meta-llama/Llama-3.1-70B": lambda: LlamaConfig(**SHAPES["70b"]),
    "meta-llama/Llama-3.1-405B": lambda: LlamaConfig(**SHAPES["405b"]),
    "mistralai/Mistral-7B-v0.3": lambda: MistralConfig(vocab_size=32768, sliding_window=None),
    "Qwen/Qwen2.5-7B-Instruct": lambda: Qwen2Config(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
        vocab_size=152064,
    ),
    "FacebookAI/roberta-base": lambda: RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1),
    "google/flan-t5-small": lambda: T5Config(**FLAN_T5_SMALL),
}  # fmt: skip
CLASSES = {"roberta": "RobertaForMaskedLM", "t5": "T5ForConditionalGeneration"}


def published(name: str, folder: Path) -> Path:
    """A folder with the configuration of a public model."""
    config = PUBLISHED[name]()
    config.architectures = [CLASSES.get(config.model_type, type(config).__name__.replace("Config", "ForCausalLM"))]
    config.save_pretrained(folder)
    return folder


def with_tokenizer(folder: Path, tokenizer: str) -> Path:
    """The folder, with the tokenizer of another or of the demo."""
    AutoTokenizer.from_pretrained(resolve_model(tokenizer)).save_pretrained(folder)
    return folder


def expanded(folder: Path, *, new: list[int]) -> Path:
    """A folder with the configuration of Llama-2-7B, and new blocks at these places."""
    LlamaConfig(**LLAMA_2_7B, num_hidden_layers=32 + len(new)).save_pretrained(folder)
    (folder / "expanded_layers.json").write_text(json.dumps({"expanded_layers": new}))
    return folder


def folders_of(flags: dict, folder: Path) -> dict:
    """The flags of a recipe that name models, with folders of their public shapes."""
    found = dict(model_name=published(flags["model_name"], folder / "model"))
    return found | (
        dict(llama_pro_path=expanded(folder / "pro", new=[10, 21, 33])) if "llama_pro_path" in flags else {}
    )
