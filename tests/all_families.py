"""A tiny model of every family that transformers builds as a causal language model."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

# sizes by the names that families give them
SMALL = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "model_dim", "dim_model", "emb_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size_mlp"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "encoder_attention_heads"), 2),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "n_group", "topk_group"), 2),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "max_position_embeddings", "n_positions"), 64),
    **dict.fromkeys(("hidden_size_per_layer_input", "head_dim", "image_size", "patch_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "n_mamba_heads"), 8),
    "depth": 1,
}
OWN = {  # what a family needs besides
    "bamba": dict(mamba_d_head=8),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "mamba2": dict(num_heads=8, head_dim=8),
    "reformer": dict(is_decoder=True, axial_pos_shape=[8, 8], axial_pos_embds_dim=[16, 16]),
    "hunyuan_v1_dense": dict(head_dim=8),
    "ministral": dict(head_dim=8),
    "nemotron": dict(num_key_value_heads=2),
    "modernbert-decoder": dict(pad_token_id=0),
}


def small(config: PreTrainedConfig) -> dict:
    """The values of a configuration that are made small, those of configurations inside it too."""
    found = {}
    for name, value in config.__dict__.items():
        if isinstance(value, PreTrainedConfig):
            found[name] = small(value) | dict(model_type=value.model_type)
        elif name in SMALL and (isinstance(value, int) or value is None) and not isinstance(value, bool):
            found[name] = SMALL[name]
        elif name.endswith("_token_id") and isinstance(value, int):
            found[name] = min(value, 3)
    return found


def tiny_config(kind: str) -> PreTrainedConfig:
    return AutoConfig.for_model(kind, **small(AutoConfig.for_model(kind)) | OWN.get(kind, {}))


def make(kind: str):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(kind))
