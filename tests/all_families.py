"""A tiny model of every family that transformers builds as a causal language model."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

# sizes by the names that families give them
SMALL = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "model_dim", "dim_model", "emb_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "encoder_attention_heads"), 2),
    "head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}


def small(config) -> dict:
    """The sizes of a configuration class, made small."""
    given = config.to_dict()
    return {name: value for name, value in SMALL.items() if isinstance(given.get(name), int)}


def tiny_config(kind: str):
    return AutoConfig.for_model(kind, **small(AutoConfig.for_model(kind)))


def make(kind: str):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(kind))
