"""Tiny models, a tokenizer and a dataset, made in a second without a network."""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    GemmaConfig,
    Glm4MoeConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteMoeConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

SHAPE = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=300,
    max_position_embeddings=512,
    bos_token_id=256,
    eos_token_id=257,
    pad_token_id=258,
)
FAMILIES = {
    "llama": lambda **kw: LlamaConfig(**{**SHAPE, "tie_word_embeddings": False, **kw}),
    "mistral": lambda **kw: MistralConfig(**{**SHAPE, "sliding_window": None, **kw}),
    "qwen2": lambda **kw: Qwen2Config(**{**SHAPE, "tie_word_embeddings": True, **kw}),  # biases, tied head
    "gemma": lambda **kw: GemmaConfig(**{**SHAPE, "head_dim": 16, **kw}),  # tied head, scaled embedding
    "gemma2": lambda **kw: Gemma2Config(**{**SHAPE, "head_dim": 16, **kw}),  # capped logits
    "phi3": lambda **kw: Phi3Config(**{**SHAPE, **kw}),  # fused projections
}

OTHER = dict(vocab_size=300, bos_token_id=256, eos_token_id=257)
OTHERS = {  # built otherwise, and supported in part
    "qwen3": lambda **kw: Qwen3Config(**{**SHAPE, "head_dim": 128, **kw}),  # norms of queries and keys, wide heads
    "gptneox": lambda: GPTNeoXConfig(  # a head of another name
        **OTHER, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    ),
    "gpt2": lambda: GPT2Config(**OTHER, n_embd=64, n_layer=2, n_head=4),  # Conv1D
    "falcon": lambda: FalconConfig(**OTHER, hidden_size=64, num_hidden_layers=2, num_attention_heads=4),  # own linears
    "opt": lambda **kw: OPTConfig(  # learned positions
        **OTHER, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=64,
        max_position_embeddings=512, **kw,
    ),
}  # fmt: skip

CHOSEN = dict(**SHAPE, moe_intermediate_size=64, num_experts_per_tok=2)
LATENT = dict(kv_lora_rank=64, q_lora_rank=64, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16,
              num_key_value_heads=4)  # fmt: skip
SHARING = dict(n_routed_experts=5, n_shared_experts=1, first_k_dense_replace=1)  # the first block is dense
EXPERTS = {  # mixtures, of 5 experts of which 2 take a token
    "mixtral": lambda **kw: MixtralConfig(**{**CHOSEN, "num_local_experts": 5, **kw}),
    "qwen2_moe": lambda **kw: Qwen2MoeConfig(
        **{**CHOSEN, "num_experts": 5, "shared_expert_intermediate_size": 64, **kw}
    ),
    "qwen3_moe": lambda **kw: Qwen3MoeConfig(**{**CHOSEN, "head_dim": 16, "num_experts": 5, **kw}),
    "olmoe": lambda **kw: OlmoeConfig(**{**CHOSEN, "num_experts": 5, **kw}),
    "granitemoe": lambda **kw: GraniteMoeConfig(**{**CHOSEN, "num_local_experts": 5, **kw}),  # stored as stacks
    "gpt_oss": lambda **kw: GptOssConfig(  # biases, gate and up by turns, matrices the other way round
        **{**CHOSEN, "head_dim": 16, "num_local_experts": 5, "layer_types": ["full_attention"] * 2, **kw}
    ),
    "deepseek_v2": lambda **kw: DeepseekV2Config(
        **{**CHOSEN, **LATENT, **SHARING, "n_group": 1, "topk_group": 1, **kw}
    ),
    "deepseek_v3": lambda **kw: DeepseekV3Config(
        **{**CHOSEN, **LATENT, **SHARING, "n_group": 1, "topk_group": 1, **kw}
    ),
    "glm4_moe": lambda **kw: Glm4MoeConfig(
        **{**CHOSEN, **SHARING, "head_dim": 16, "n_group": 1, "topk_group": 1, **kw}
    ),
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes and three special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(alphabet)} | {"<s>": 256, "</s>": 257, "<pad>": 258}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def make_model(folder, family: str = "llama", *, dtype=torch.float32, seed: int = 0, **config) -> Path:
    """Writes a random tiny model and its tokenizer; returns the folder."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config((FAMILIES | OTHERS | EXPERTS)[family](**config)).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)  # transformers starts biases at zero, which would hide a lost one
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return Path(folder)


def make_data(path, *, samples: int = 16, longest: int = 40, seed: int = 0) -> Path:
    """Writes question/answer lines of very different lengths."""
    generator = random.Random(seed)
    letters = "abcdefghij 0123456789"
    text = lambda n: "".join(generator.choice(letters) for _ in range(n))
    rows = [
        {"question": text(generator.randint(1, longest)), "answer": text(generator.randint(1, longest))}
        for _ in range(samples)
    ]
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Path(path)
