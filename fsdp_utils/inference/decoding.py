"""One token per row and step over a KV cache of fixed size; on CUDA a step is replayed as one graph.

`generate` launches thousands of small kernels per token, which takes the host several times as long as the GPU needs.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_static_cache"
LENGTH_MULTIPLE = 128  # of cache lengths, so that few differ


def supported(model: nn.Module) -> bool:
    """Whether a step is the same kernels for every token: full attention by SDPA in all layers, nothing read back."""
    if not isinstance(model, PreTrainedModel) or not model._can_compile_fullgraph:
        return False
    text = model.config.get_text_config()
    quantizer = getattr(model, "hf_quantizer", None)
    return (
        text._attn_implementation == "sdpa"
        and model._supports_attention_backend  # asks for attention by the name in its config, at every call
        and not getattr(text, "attn_logit_softcapping", None)
        and _all_layers_full(model)
        and not any(map(_reads_positions, model.modules()))
        and (quantizer is None or quantizer.is_compileable)
        and "logits_to_keep" in inspect.signature(model.forward).parameters
    )


def _all_layers_full(model: nn.Module) -> bool:
    """Sliding windows and state-space layers keep their place in Python numbers, which a graph would freeze."""
    try:
        layers = StaticCache(config=model.config, max_cache_len=1).layers  # allocates nothing yet
    except (AttributeError, KeyError):  # a kind of layer that has no such cache
        return False
    return all(type(layer) is StaticLayer for layer in layers)


def _reads_positions(module: nn.Module) -> bool:
    """Rotary embeddings that change with the longest position ask the GPU for it."""
    kinds = getattr(module, "rope_type", None) or ()
    kinds = [kinds] if isinstance(kinds, str) else dict(kinds).values()
    return any("dynamic" in kind or kind == "longrope" for kind in kinds)


# ---------------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------------


def static_attention(module, query, key, value, attention_mask, scaling=None, **options):
    """transformers' attention interface, over the whole of a `StaticDecoder`'s cache.

    Args:
        query: `[b, heads, L, d]`; L is 1 in a step, else these are prompts, and the cache was empty.
        key, value: `[b, kv heads, cache length, d]`.
        attention_mask: bool `[b, 1, L, cache length]`, or None for prompts without padding.

    Returns:
        `[b, L, heads, d]` and None.
    """
    batch, heads, length, size = query.shape
    if length > 1:  # nothing has been written behind the prompts
        key, value = key[:, :, :length], value[:, :, :length]
        mask = None if attention_mask is None else attention_mask[..., :length]
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **options)
    # Heads that share a key stand in line as if they were tokens: repeating the keys costs more than all else in a step
    lined_up = query.reshape(batch, key.shape[1], -1, size)  # [b, kv heads, heads per kv head, d]
    out = F.scaled_dot_product_attention(lined_up, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(batch, 1, heads, value.shape[-1]), None


AttentionInterface.register(NAME, static_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def _static_attention_in(model: nn.Module) -> Iterator[None]:
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


# ---------------------------------------------------------------------------------------------------------------------
# Steps
# ---------------------------------------------------------------------------------------------------------------------


def cache_length(tokens: int) -> int:
    """Of a cache that holds so many tokens."""
    return -(-tokens // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


class StaticDecoder:
    """Logits of the next token for `rows` prompts at a time, one batch of them after another.

    The first step runs as it is (kernels are compiled then), the second is captured with `graphs`, and all after it are
    replayed. Capturing only records: should it fail, the step still runs as it is. All memory is freed with the object.

    Args:
        length: tokens of the cache, for each row; prompt and answer must fit.
    """

    def __init__(self, model: nn.Module, *, rows: int, length: int, graphs: bool):
        device = next(model.parameters()).device
        self.model, self.rows, self.length, self.graphs = model, rows, length, graphs
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        self.tokens = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.positions = torch.zeros_like(self.tokens)  # of `tokens`, padding not counted
        self.mask = torch.ones(rows, length, dtype=torch.bool, device=device)
        self.warm, self.graph, self.logits = False, None, None

    def fits(self, *, rows: int, tokens: int) -> bool:
        """Whether a batch can be decoded here without waste: attention reads the whole cache at every step."""
        needed = cache_length(tokens)
        return rows == self.rows and needed <= self.length <= needed * 4 / 3

    def prefill(self, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Begins a batch.

        Args:
            input_ids, mask: `[rows, L]`, padded on the left; the mask is 0 there.

        Returns:
            fp32 `[rows, vocabulary]`.
        """
        width, mask = input_ids.shape[1], mask.bool()
        self.cache.reset()
        self.mask.fill_(True)  # what is not written yet is hidden by causality
        self.mask[:, :width] = mask
        positions = (mask.long().cumsum(1) - 1).clamp_min(0)
        self.positions.copy_(positions[:, -1:] + 1)
        return self._forward(input_ids, mask, positions)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Appends `tokens` `[rows]`; fp32 `[rows, vocabulary]`, valid until the next step."""
        self.tokens.copy_(tokens.unsqueeze(1))
        if self.graphs and self.warm and self.graph is None:
            self._capture()
        if self.graph is None:
            self.logits, self.warm = self._advance(), True
        else:
            self.graph.replay()
        return self.logits

    def _advance(self) -> torch.Tensor:
        """Reads and writes nothing but device memory that stays where it is: buffers, and the cache with its length."""
        logits = self._forward(self.tokens, self.mask, self.positions)
        self.positions.add_(1)
        return logits

    def _capture(self) -> None:
        try:
            graph = torch.cuda.CUDAGraph()
            # the stream: a capture that fails leaves its own in place. thread_local: threads that log may use CUDA
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, capture_error_mode="thread_local"),
            ):
                self.logits = self._advance()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # this model waits for the GPU somewhere
            self.graphs = False
            tqdm.write(f"no CUDA graph of a decoding step ({str(error).splitlines()[0]}); going on without")
        else:
            self.graph = graph

    def _forward(self, input_ids, mask, positions) -> torch.Tensor:
        with _static_attention_in(self.model):
            output = self.model(
                input_ids=input_ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return output.logits[:, -1].float()
