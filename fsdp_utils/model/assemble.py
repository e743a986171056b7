"""Puts a model together: meta → quantized layers → method → checkpointing, compile, FSDP2 → weights."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from fsdp_utils.core.errors import UserError
from fsdp_utils.core.rows import local
from fsdp_utils.memory import recompute
from fsdp_utils.model import attention
from fsdp_utils.model.build import build_on_meta, quantize_on_meta, read_model_config
from fsdp_utils.model.quantized_cache import QuantizedCache, cache_folder, check_cache_root
from fsdp_utils.model.weights import (
    base_bytes,
    check_loaded,
    check_weights,
    checkpoint_dtype,
    fingerprint,
    load_weights,
    materialize,
    open_weights,
)
from fsdp_utils.sharding import fsdp, offload, peer_gather
from methods import method_of, quantizer_of
from methods.base import Method
from methods.targets import decoder_blocks, learned_positions, refuse_experts, refuse_in_place

# storage dtype of what is not quantized, autocast dtype
PRECISIONS = {
    "bf16": (torch.bfloat16, None),
    "fp32": (torch.float32, None),
    "fp16_autocast": (torch.float32, torch.float16),
    "bf16_autocast": (torch.float32, torch.bfloat16),
    "bf16_buffers_autocast": (torch.bfloat16, torch.bfloat16),
}


@dataclass
class Plan:
    """A model on meta with everything that can be wrong about it checked; no weight has been read."""

    model: nn.Module
    method: Method
    quantizer: object | None
    weights: object
    dtype: torch.dtype
    base_fingerprint: str


def plan(config, *, device: torch.device, training: bool = True) -> Plan:
    """Builds the model on meta, with quantized layers and adapters.

    Args:
        training: attention may be one that knows neither a cache nor padding on the left.

    Raises:
        UserError: anything about model, checkpoint, targets or group size that cannot work.
    """
    dtype, _ = PRECISIONS[config.precision]
    if torch.bfloat16 in PRECISIONS[config.precision] and device.type == "cuda" and not _has_bf16():
        raise UserError(f"--precision {config.precision}: this GPU has no bf16; use fp16_autocast or fp32")
    model_config = read_model_config(config.source, attn_implementation=config.attn_implementation)
    try:
        model = build_on_meta(model_config, dtype=dtype)
    except (ImportError, ValueError) as error:  # an attention that is unknown, not installed, or not for this family
        asked = f"--attn_implementation {config.attn_implementation}"
        raise UserError(f"{config.source} with {asked}: {str(error).splitlines()[0]}") from None
    refuse_experts(model)
    if training:
        fsdp.check_policy(model, config, device=device)
    positions = learned_positions(model)
    if training and positions and config.context_length > positions:
        given = f"--context_length {config.context_length}"
        raise UserError(f"{given}: {config.source} has learned {positions} positions; lower it")
    if config.quantized_cache:
        check_cache_root(config.quantized_cache)
    compute = PRECISIONS[config.precision][1] or dtype
    ours = training and config.attn_implementation == "auto"
    if ours and attention.supported(model, dtype=compute, device=device):
        model.config.get_text_config()._attn_implementation = attention.NAME
    weights = open_weights(
        model, config.source, load_format=config.load_format, dtype=dtype, device=device, seed=config.seed
    )
    base = fingerprint(weights) if config.load_format != "dummy" else "dummy"
    quantizer = quantizer_of(config.train_type).from_config(config, checkpoint_dtype=checkpoint_dtype(weights))
    method = method_of(config.train_type)(config)
    if quantizer:
        quantize_on_meta(model, method.to_quantize(model), quantizer)
    method.attach(model, dtype=dtype)
    refuse_in_place(model)
    if not any(p.requires_grad for p in model.parameters()):
        raise RuntimeError(f"{config.train_type} left no parameter to train")
    check_weights(model, weights)
    return Plan(model, method, quantizer, weights, dtype, base)


def _has_bf16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)


def cannot_compile(error: Exception) -> UserError:
    """The error to raise in place of the compiler's, which has already printed the code that it could not compile."""
    cause = error.inner_exception
    what = f"{type(cause).__name__}: {cause}".splitlines()[0]
    return UserError(f"--compile true: the compiler failed ({what}); pass --compile false")


def compiler(config, device: torch.device) -> Callable | None:
    """What compiles a decoder block's forward here, or None: compiled code needs CUDA and Triton."""
    if not config.compile or device.type != "cuda" or not torch.utils._triton.has_triton():
        return None
    # all blocks share one code object; every block may need its own variant when shapes change
    torch._dynamo.config.recompile_limit = 64
    return torch.compile


def load(planned: Plan, config, *, mesh, device: torch.device, compile_block: Callable | None = None) -> nn.Module:
    """Shards the planned model over `mesh` (None: one process holds it) and fills it."""
    model = planned.model
    blocks = decoder_blocks(model)
    dtypes = dict(dtype=planned.dtype, autocast=PRECISIONS[config.precision][1])
    peers = peer_gather.choose(blocks, config, mesh=mesh, device=device)
    frozen, together = (peers.parameters, peers.together) if peers else (set(), False)
    recomputed = recompute.choose(model, blocks, config, mesh=mesh, device=device, together=together, **dtypes)
    fsdp.prepare_blocks(model, blocks, config, recomputed=recomputed, compile_block=compile_block)
    apart = offload.whole_embedding(model, config, device=device)
    groups = dict(apart=set(apart.values()), frozen=frozen, together=together)
    fsdp.shard(model, blocks, config, mesh=mesh, dtype=planned.dtype, **groups)
    offload.move_embedding_to_host(model, apart, device=device)
    host = mesh is not None and config.use_cpu_offload
    materialize(model, device=torch.device("cpu") if host else device, buffer_device=device)
    cache = None
    if config.quantized_cache and planned.quantizer:
        folder = cache_folder(config.quantized_cache, model, fingerprint=planned.base_fingerprint)
        cache = QuantizedCache(folder, device=device)
    load_weights(model, planned.weights, device=device, cache=cache)
    if cache:
        cache.write(model)
    planned.method.initialize(model, device=device)
    check_loaded(model)
    if peers:
        peers.connect(device)
    model.slot_bytes = peers.slot_bytes if peers else 0
    return model


def size_report(model: nn.Module, quantizer) -> list[str]:
    """What the model weighs, in lines for the start of a run."""
    trained = [p for p in model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trained)
    mine, total = base_bytes(model)
    return [
        f"trained parameters: {count:,} ({sum(local(p).nbytes for p in trained) / 2**30:.3f} GiB in this process)",
        f"frozen base: {total / 2**30:.3f} GiB, {mine / 2**30:.3f} GiB in this process"
        + (f" ({quantizer})" if quantizer else ""),
    ]
