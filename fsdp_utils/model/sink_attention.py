"""Attention whose heads have a sink, a score without a value beside those of the keys (gpt-oss), by flash attention.

Flash attention knows no sinks. It also returns the logarithm of each query's sum of exponents; with the sink's added to
it, its output becomes the wanted one by a factor, and its backward, told that sum and that output, computes the wanted
gradients: it makes probabilities anew as exp(score - logarithm), of which those of the keys no longer sum to 1.
"""

import torch

Tensor = torch.Tensor


def forward_by_kernel(query, key, value, *, of_queries, of_keys, asked, length, window, scale) -> tuple[Tensor, Tensor]:
    """Flash attention without sinks: output as `query`, and logarithms of the sums of exponents, fp32 `[heads, t]`."""
    out, total, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, of_queries, of_keys, asked, length, 0.0, window < 0, return_debug_mask=False,
        scale=scale, window_size_left=window, window_size_right=0,
    )  # fmt: skip
    return out, total


def backward_by_kernel(grad, query, key, value, out, total, *, of_queries, of_keys, asked, length, window, scale):
    """Gradients of query, key and value."""
    unused = (
        query.new_empty(0),
        torch.zeros(2, dtype=torch.uint64, device=query.device),
    )  # for dropout, of which is none
    return torch.ops.aten._flash_attention_backward(
        grad, query, key, value, out, total, of_queries, of_keys, asked, length, 0.0, window < 0, unused[1], unused[0],
        scale=scale, window_size_left=window, window_size_right=0,
    )  # fmt: skip


@torch.library.custom_op("fsdp_qlora::sink_attention", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, of_queries: Tensor, of_keys: Tensor,
    asked: int, length: int, window: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    settings = dict(of_queries=of_queries, of_keys=of_keys, asked=asked, length=length, window=window, scale=scale)
    out, keys_alone = forward_by_kernel(query, key, value, **settings)
    total = torch.logaddexp(keys_alone, sinks.float().unsqueeze(1))
    share = (keys_alone - total).exp().T.unsqueeze(-1)  # [t, heads, 1], of the keys
    return (out * share).to(out.dtype), total


@_forward.register_fake
def _(query, key, value, sinks, of_queries, of_keys, asked, length, window, scale):
    return torch.empty_like(query), query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)


@torch.library.custom_op("fsdp_qlora::sink_attention_backward", mutates_args=())
def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, total: Tensor, of_queries: Tensor,
    of_keys: Tensor, asked: int, length: int, window: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    settings = dict(of_queries=of_queries, of_keys=of_keys, asked=asked, length=length, window=window, scale=scale)
    return tuple(backward_by_kernel(grad, query, key, value, out, total, **settings))


@_backward.register_fake
def _(grad, query, key, value, out, total, of_queries, of_keys, asked, length, window, scale):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save(ctx, inputs, output):
    query, key, value, sinks, of_queries, of_keys, *ctx.settings = inputs
    ctx.save_for_backward(query, key, value, sinks, of_queries, of_keys, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, grad, _):
    query, key, value, sinks, of_queries, of_keys, out, total = ctx.saved_tensors
    found = _backward(grad.contiguous(), query, key, value, out, total, of_queries, of_keys, *ctx.settings)
    of_sinks = None
    if ctx.needs_input_grad[3]:
        share = (sinks.float().unsqueeze(1) - total).exp()  # [heads, t]
        of_sinks = -(share * (grad.float() * out.float()).sum(-1).T).sum(1).to(sinks.dtype)
    return *found, of_sinks, None, None, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_save)


def attend_with_sinks(query, key, value, sinks, *, of_queries, of_keys, asked, length, window, scaling) -> Tensor:
    """Causal attention of samples that stand one after the other.

    Args:
        query: 16 bits, `[t, heads, d]`.
        key, value: `[T, heads, d]`.
        sinks: `[heads]`.
        of_queries, of_keys: int32 `[n]`, where samples begin among queries and keys, and the end.
        asked, length: at most so many queries and keys of a sample.
        window: a token attends to so many, itself included; None: to all before it.
        scaling: of scores; None: 1 / sqrt(d).

    Returns:
        As `query`.
    """
    left = -1 if window is None else window - 1
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _forward(query, key, value, sinks, of_queries, of_keys, asked, length, left, scale)[0]
