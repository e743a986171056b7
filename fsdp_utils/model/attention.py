"""Causal attention without transformers' masks: over whole rows, over the samples of packed rows, and over rows that
several processes share. On GPUs by flash attention (of variable lengths where samples or pieces are); where that does
not run, with masks of our own for shared rows, and with transformers' for others.
"""

import inspect
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from fsdp_utils.core.errors import UserError
from fsdp_utils.model.sink_attention import attend_with_sinks
from fsdp_utils.options import OWN_ATTENTION
from fsdp_utils.sharding.context_parallel import attend_by_heads, attend_by_keys
from methods.quantizers.linear import compute_dtype
from methods.targets import family_dropout

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None

# names in transformers' attention interface: by kernels, for whole rows, and for rows that are shared; with masks
NAME, SHARED, SHARED_MASKED = OWN_ATTENTION, "shared_rows", "shared_rows_masked"
WINDOWED = "sliding_attention"

Tensor = torch.Tensor


def window_of(model) -> int | None:
    """How many tokens a token of some layers attends to, itself included; None: all before it."""
    text = model.config.get_text_config()
    return getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None


def obstacle(model, *, layers: set[str]) -> str | None:
    """Why a model's attention is not causal attention of queries, keys and values alone; None where it is.

    Args:
        layers: kinds that its layers may be of.
    """
    text = model.config.get_text_config()
    others = set(getattr(text, "layer_types", None) or ()) - layers
    dropped = [name for name in family_dropout(model) if "att" in name]
    table = (
        (not getattr(model, "_supports_attention_backend", False), "does not leave attention to others"),
        (getattr(text, "is_heterogeneous", False), "has layers with heads of different sizes"),  # Gemma 4
        (others, f"has layers of {', '.join(sorted(others))}"),
        (dropped, f"drops attention ({', '.join(dropped)})"),
        (getattr(text, "attn_logit_softcapping", None), "caps the scores of attention (attn_logit_softcapping)"),
    )
    return next((why for holds, why in table if holds), None)


def has_kernel(model, *, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there is flash attention of variable lengths for a model."""
    text = model.config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    fits = head_dim <= 256 and head_dim % 8 == 0
    return varlen_attn is not None and device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and fits


def supported(model, *, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether every layer is causal attention in 16 bits on CUDA, which is all that the kernels know, and asks
    transformers' attention interface for it. Windows are left to transformers' masks, but beside sinks, which no other
    kernel knows."""
    sinks = any(name.endswith(".sinks") for name, _ in model.named_parameters())
    layers = {"full_attention", WINDOWED} if sinks else {"full_attention"}
    known = not obstacle(model, layers=layers) and (sinks or not window_of(model))
    return known and has_kernel(model, dtype=dtype, device=device)


def for_shared_rows(model, config, *, dtype: torch.dtype, device: torch.device) -> str:
    """The name of the attention of rows that processes share (--context_parallel).

    Raises:
        UserError: they cannot.
    """
    given = f"--context_parallel {config.context_parallel}"
    why = obstacle(model, layers={"full_attention", WINDOWED})
    if why:
        raise UserError(f"{given}: {config.source} {why}; pass 1")
    if config.attn_implementation != "auto":
        raise UserError(f"{given}: has attention of its own; drop --attn_implementation {config.attn_implementation}")
    return SHARED if has_kernel(model, dtype=dtype, device=device) else SHARED_MASKED


def _varlen_settings(window: int | None) -> dict:
    """How this version of torch is told that attention is causal, how far it goes, and that heads are shared."""
    known = inspect.signature(varlen_attn).parameters
    if "is_causal" in known and window is not None:
        raise UserError(f"sliding windows need a newer torch than {torch.__version__}")
    causal = {"is_causal": True} if "is_causal" in known else {"window_size": (-1 if window is None else window - 1, 0)}
    return causal | ({"enable_gqa": True} if "enable_gqa" in known else {})


def _starts(boundaries: Tensor | None, *, rows: int, length: int, device: torch.device) -> Tensor:
    """Where samples begin in the flattened rows, and the end, int32 `[n]`; where that is not told, rows begin."""
    if boundaries is not None:
        return boundaries
    return torch.arange(0, (rows + 1) * length, length, device=device, dtype=torch.int32)


class _Where(NamedTuple):
    """Which keys a query meets, and how: as of `attend`, with `starts` for its boundaries."""

    starts: Tensor
    first: int
    window: int | None
    scaling: float | None
    sinks: Tensor | None


def _attend_flash(query, key, value, where: _Where):
    """`attend` by the kernel. Of each row it is told where its samples begin among its queries and among its keys; it
    lets the last query of a sample attend to the last key, so keys end where queries do. What is left of a row are keys
    that nobody asks for."""
    starts, first, window, scaling, sinks = where
    rows, heads, asked, size = query.shape
    length, settings = key.shape[2], {} if sinks is not None else _varlen_settings(window)
    if asked == length:
        of_queries = of_keys = starts
    else:
        row = torch.arange(rows, device=query.device, dtype=torch.int32)[:, None]
        inside = starts[None] - row * length  # [rows, n], where they begin seen from a row's first token
        of_keys = (inside.clamp(0, first + asked) + row * length).flatten()
        of_queries = ((inside - first).clamp(0, asked) + row * asked).flatten()
        # the last keys of the last row
        of_keys, of_queries = F.pad(of_keys, (0, 1), value=rows * length), F.pad(of_queries, (0, 1), value=rows * asked)
    dtype = compute_dtype(query)  # autocast leaves rotated queries in fp32
    flat = [t.transpose(1, 2).reshape(-1, t.shape[1], size).to(dtype) for t in (query, key, value)]
    if "enable_gqa" not in settings and flat[1].shape[1] != heads:
        flat[1:] = [t.repeat_interleave(heads // t.shape[1], dim=1) for t in flat[1:]]
    if sinks is not None:
        known = dict(of_queries=of_queries, of_keys=of_keys, asked=asked, length=length, window=window, scaling=scaling)
        return attend_with_sinks(*flat, sinks, **known).view(rows, asked, heads, size)
    if scaling is not None and scaling != size**-0.5:
        flat[0] = flat[0] * (scaling * size**0.5)  # the kernel divides by sqrt(d)
    return varlen_attn(*flat, of_queries, of_keys, asked, length, **settings).view(rows, asked, heads, size)


def _attend_masked(query, key, value, where: _Where):
    """`attend` with a mask: the plain definition."""
    starts, first, window, scaling, sinks = where
    rows, length, asked = query.shape[0], key.shape[2], query.shape[2]
    flat = torch.arange(rows * length, device=query.device)
    sample = torch.searchsorted(starts, flat.to(starts.dtype), right=True).view(rows, 1, 1, length)
    column = torch.arange(length, device=query.device)
    mine = slice(first, first + asked)
    distance = column[mine, None] - column
    seen = (sample[..., mine].transpose(2, 3) == sample) & (distance >= 0)
    if window is not None:
        seen = seen & (distance < window)
    if sinks is not None:
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        scores = scores.masked_fill(~seen, -torch.inf)
        beside = sinks.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        return (torch.cat([scores, beside], dim=-1).softmax(-1)[..., :-1] @ value).transpose(1, 2)
    shared = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling, enable_gqa=shared)
    return out.transpose(1, 2)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    boundaries: Tensor | None = None,
    first: int = 0,
    window: int | None = None,
    scaling: float | None = None,
    sinks: Tensor | None = None,
    masked: bool = False,
) -> Tensor:
    """Causal attention over rows, or over the samples in them.

    Args:
        query: `[b, heads, l, d]`, the tokens of each row from column `first` on.
        key, value: `[b, kv heads, L, d]`, all tokens of each row.
        boundaries: int32 `[n]`, where samples begin in the flattened rows, and the end, any number of times; None: each
            row is a sample.
        window: a token attends to so many, itself included; None: to all before it.
        scaling: of scores; None: 1 / sqrt(d).
        sinks: `[heads]`, a score of each beside those of the keys, without a value.
        masked: by the plain definition, for devices and dtypes that no kernel knows.

    Returns:
        `[b, l, heads, d]`.
    """
    rows, length = key.shape[0], key.shape[2]
    window = None if window is None or window >= length else window
    if boundaries is None and window is None and sinks is None and query.shape[2] == length:
        shared = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=shared)
        return out.transpose(1, 2)
    starts = _starts(boundaries, rows=rows, length=length, device=query.device)
    where = _Where(starts, first, window, scaling, sinks)
    return (_attend_masked if masked else _attend_flash)(query, key, value, where)


def causal_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    cu_seq_lens_q=None,
    sliding_window=None,
    s_aux=None,
    **_,
):
    """transformers' attention interface. query `[b, heads, L, d]`, key and value `[b, kv heads, L, d]`.

    transformers makes no mask for a name it does not know, nor reads position ids from the GPU to see if it should.

    Args:
        cu_seq_lens_q: int32 `[n]`, where samples begin in packed rows, or None.
        s_aux: the sinks of `attend`.

    Returns:
        `[b, L, heads, d]` and None.
    """
    known = dict(boundaries=cu_seq_lens_q, window=sliding_window, scaling=scaling, sinks=s_aux)
    return attend(query, key, value, **known), None


def shared_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    cu_seq_lens_q=None,
    sliding_window=None,
    sharing_rows=None,
    folded_rows=False,
    masked=False,
    **_,
):
    """`causal_attention` where several processes share rows.

    Args:
        cu_seq_lens_q: of whole rows.
        sharing_rows: name of those processes (`context_parallel.join`); None: rows are whole.
        folded_rows: `data.parts.Part.folded`.
        masked: as of `attend`.
    """
    known = dict(boundaries=cu_seq_lens_q, window=sliding_window, scaling=scaling, masked=masked)
    over = lambda *tensors, **more: attend(*tensors, **known, **more)
    if sharing_rows is None:
        return over(query, key, value), None
    together = attend_by_keys if folded_rows else attend_by_heads
    return together(query, key, value, over, group=sharing_rows), None


AttentionInterface.register(NAME, causal_attention)
AttentionInterface.register(SHARED, shared_attention)
AttentionInterface.register(SHARED_MASKED, partial(shared_attention, masked=True))
