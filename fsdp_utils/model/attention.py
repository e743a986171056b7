"""Causal attention without a mask: over whole rows, or over the samples of packed rows (flash attention of variable
lengths). Where neither runs, transformers builds its masks.
"""

import inspect

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from methods.targets import family_dropout

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None

NAME = "causal_or_packed"


def supported(model, *, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether every layer is plain causal attention in 16 bits on CUDA, which is all that the kernels know, and asks
    transformers' attention interface for it."""
    text = model.config.get_text_config()
    if getattr(text, "is_heterogeneous", False):  # Gemma 4: its layers differ in head_dim
        return False
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    windows = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    full = set(getattr(text, "layer_types", None) or ()) <= {"full_attention"}
    dropped = any("att" in name for name in family_dropout(model))
    plain = full and not windows and not dropped and not getattr(text, "attn_logit_softcapping", None)
    fits = head_dim <= 256 and head_dim % 8 == 0 and dtype in (torch.bfloat16, torch.float16) and device.type == "cuda"
    return varlen_attn is not None and getattr(model, "_supports_attention_backend", False) and plain and fits


def _varlen_settings() -> dict:
    """How this version of torch is told that attention is causal and heads are shared."""
    known = inspect.signature(varlen_attn).parameters
    causal = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    return causal | ({"enable_gqa": True} if "enable_gqa" in known else {})


def causal_attention(
    module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, max_length_q=None, **_
):
    """transformers' attention interface. query `[b, heads, L, d]`, key and value `[b, kv heads, L, d]`.

    transformers makes no mask for a name it does not know, nor reads position ids from the GPU to see if it should.

    Args:
        cu_seq_lens_q: int32 `[n]`, where samples begin in packed rows, or None.

    Returns:
        `[b, L, heads, d]` and None.
    """
    if cu_seq_lens_q is None:
        shared = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=shared)
        return out.transpose(1, 2), None
    batch, heads, length, size = query.shape
    settings = _varlen_settings()
    flat = [t.transpose(1, 2).reshape(batch * length, t.shape[1], size) for t in (query, key, value)]
    if "enable_gqa" not in settings and flat[1].shape[1] != heads:
        flat[1:] = [t.repeat_interleave(heads // t.shape[1], dim=1) for t in flat[1:]]
    if scaling is not None and scaling != size**-0.5:
        flat[0] = flat[0] * (scaling * size**0.5)  # the kernel divides by sqrt(d)
    out = varlen_attn(*flat, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, **settings)
    return out.view(batch, length, heads, size), None


AttentionInterface.register(NAME, causal_attention)
