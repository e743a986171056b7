"""`--use_gradient_checkpointing`: how many decoder blocks recompute; with `auto`, from what is free."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed import ReduceOp

from fsdp_utils.core.devices import GIB
from fsdp_utils.core.errors import UserError
from fsdp_utils.core.processes import all_reduce
from fsdp_utils.core.ranks import say
from fsdp_utils.memory.activations import Kept, measure
from fsdp_utils.memory.budget import (
    Resident,
    at_loss,
    block_bytes,
    host_activations,
    of_head,
    peak_activations,
    sizes,
)
from fsdp_utils.memory.graphs import graph_tokens

WORKSPACE = dict(cuda=64 * 2**20, cpu=0)  # of cuBLAS
RESERVE = 0.1  # of the free memory: fragmentation, libraries' workspaces, communication buffers


def blocks_to_recompute(*, free: int, blocks: int, **of_blocks) -> int:
    """The fewest blocks that must recompute for `peak_activations` to fit into `free` bytes; all, if nothing does."""
    fits = lambda recomputed: max(peak_activations(recomputed, blocks=blocks, **of_blocks)) <= free
    return next(filter(fits, range(blocks + 1)), blocks)


def graphs_share(model: nn.Module, config, *, mesh, device: torch.device) -> float:
    """What part of the activations of a batch CUDA graphs hold for good.

    They hold those of the largest batch that was captured, beside those of a batch that runs without a graph.
    """
    most = graph_tokens(model, config, mesh=mesh, device=device)
    return min(1.0, most / (config.batch_size * config.row_tokens))


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process can still allocate on its GPU; None on a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    cached = torch.cuda.memory_reserved(device) - allocated
    limit = torch.cuda.get_per_process_memory_fraction(device) * total
    return min(free + cached, int(limit) - allocated)


class Layout(NamedTuple):
    """What a step will hold: the fields of `sharding.prepared.Prepared` that memory decides."""

    recomputed: int
    fused_loss: bool
    sizes: dict[str, int]
    host_activations: int


def lay_out(
    model: nn.Module,
    blocks: dict[str, nn.Module],
    config,
    held: Resident,
    *,
    task,
    mesh,
    device: torch.device,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
    compiled: bool,
    slack: int,
    available: int | None,
    measure: Callable[..., Kept] = measure,
) -> Layout:
    """Decides how many blocks recompute, the same in every process; with `auto` it says why. Collective.

    Runs on the planned model on meta, before blocks are wrapped and sharded. The first blocks are the ones to
    recompute: see `wrapping.wrap_blocks`.

    Args:
        held: what is in memory besides activations.
        task: knows how the model is called.
        dtype, autocast: of hidden states and of the products.
        compiled: blocks will be compiled.
        slack: of the offloader.
        available: bytes that are free on this process's GPU; None on a CPU.
        measure: as `activations.measure`.

    Raises:
        UserError: the model cannot be measured, and `auto` would have to know.
    """
    auto = config.use_gradient_checkpointing == "auto"
    try:
        kept = measure(model, blocks, config, task=task, dtype=dtype, autocast=autocast)
    except UserError as error:
        if auto and available is not None:
            raise UserError(f"--use_gradient_checkpointing auto: {error}; pass true or false") from error
        say(f"note: {error}: its memory is not estimated, and the loss is computed from whole logits")
        kept = None
    recomputed = len(blocks) if config.use_gradient_checkpointing else 0
    if kept is None:
        return Layout(recomputed, False, sizes(config, held, None), 0)
    activations = dict(
        blocks=len(blocks),
        block=block_bytes(blocks, kept, config, dtype=autocast or dtype, compiled=compiled, slack=slack),
        of_head=of_head(model, held),
        at_loss=at_loss(model, config, kept, dtype=dtype, autocast=autocast),
    )
    if auto and available is None:
        say(f"activation checkpointing: {recomputed} of {len(blocks)} blocks recompute (auto on a CPU: all)")
    elif auto:
        free = all_reduce(int(available * (1 - RESERVE)) - held.total, device, op=ReduceOp.MIN)
        free = int(free / (1 + graphs_share(model, config, mesh=mesh, device=device)))
        recomputed = blocks_to_recompute(free=free, **activations)
        whole = activations["block"].whole
        say(_decision(recomputed, config, whole, blocks=len(blocks), free=free))
    on_host = host_activations(config, kept, recomputed, compiled=compiled)
    by_purpose = sizes(config, held, kept, recomputed=recomputed, workspace=WORKSPACE[device.type], **activations)
    return Layout(recomputed, kept.fused_loss, by_purpose, on_host)


def _decision(recomputed: int, config, whole: int, *, blocks: int, free: int) -> str:
    return (
        f"activation checkpointing: {recomputed} of {blocks} blocks recompute ({whole / GIB:.2f} GiB a block "
        f"at {config.batch_size} x {config.row_tokens} tokens, {free / GIB:.1f} GiB free for activations)"
    )
