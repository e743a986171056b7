"""Activation checkpointing, compilation and FSDP2, in the one order in which they work together."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fsdp_utils.core.errors import UserError
from fsdp_utils.core.processes import pick_device
from fsdp_utils.sharding.offload import InputOffloader
from methods.targets import family_dropout, has_dropout

RESHARD_AFTER_FORWARD = {
    "full_shard": True,
    "hybrid_full_shard": True,
    "shard_grad_op": False,
    "hybrid_shard_grad_op": False,
    "ddp": False,
}


def _widths(op, args) -> tuple[int, int] | None:
    """Input and output width of a matrix product or attention, None of anything else."""
    name = str(op)
    if "adapted_linear." in name:
        return args[0].shape[-1], args[2].shape[0]
    if "_attention" in name:
        return args[0].shape[-1], args[0].shape[-1]
    if "aten.mm." in name or "aten.addmm." in name:
        return tuple(args[-1].shape)
    return None


def _save_if(kept: bool) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def keep_for_adapters(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    """What `--checkpoint_policy adapters` keeps: `A x`, and outputs of DoRA's narrowing projections. Nothing but the
    adapters' gradients reads them again, and of their size they are the dearest to compute."""
    width, out = _widths(op, args) or (0, 1)
    adapted = "adapted_linear." in str(op)
    for_magnitude = adapted and args[-1] is not None and out < width  # the last argument is DoRA's factor
    return _save_if(for_magnitude or (not adapted and 8 * out <= width))


def keep_narrow(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    """What `--checkpoint_policy narrow` keeps: attention, and matrix products that are no wider than their input."""
    width, out = _widths(op, args) or (0, 1)
    return _save_if(out <= width)


def keep_products(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    """What `--checkpoint_policy products` keeps: everything that costs a matrix product or attention."""
    return _save_if(_widths(op, args) is not None)


def _selective(policy: Callable) -> dict:
    return {"context_fn": partial(create_selective_checkpoint_contexts, policy)}


POLICIES = {
    "full": {},
    "adapters": _selective(keep_for_adapters),
    "narrow": _selective(keep_narrow),
    "products": _selective(keep_products),
}


def check_policy(model: nn.Module, config, *, device: torch.device) -> None:
    """Raises UserError if attention that a policy keeps draws random numbers itself: it is not run again, so on CUDA
    whatever is dropped after it would be dropped otherwise when the block is recomputed."""
    kept = config.use_gradient_checkpointing and config.checkpoint_policy in ("narrow", "products")
    names = [name for name in family_dropout(model) if "att" in name]
    if kept and names and device.type == "cuda":
        given = f"--checkpoint_policy {config.checkpoint_policy}"
        raise UserError(f"{given}: {config.source} drops attention ({names[0]}), which is not replayed; pass full")


def checkpoint_block(block: nn.Module, *, reentrant: bool, preserve_rng: bool, policy: str = "full") -> None:
    """Makes a block keep only its input and run forward again in backward.

    It wraps `forward`, not the module: FSDP2's hooks stay outside the recomputed region, and names do not change.
    """
    forward = block.forward

    def checkpointed(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        run = partial(forward, **kwargs)  # re-entrant checkpointing takes no keyword arguments
        return checkpoint(run, *args, use_reentrant=reentrant, preserve_rng_state=preserve_rng, **POLICIES[policy])

    block.forward = checkpointed


def require_input_gradients(model: nn.Module) -> None:
    """Re-entrant checkpointing of a frozen model loses every gradient unless a block's input requires one."""
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_(True))


def prepare_blocks(
    model: nn.Module, blocks: dict[str, nn.Module], config, *, recomputed: int, compile_block: Callable | None
) -> None:
    """Checkpoints the first `recomputed` decoder blocks, then compiles every one.

    The recomputation is inside the compiled region, so that what backward does not need of it is never run (the down
    projection); re-entrant checkpointing cannot be compiled and stays outside, as FSDP2 and the offload of inputs do.
    """
    reentrant, random = config.reentrant_checkpointing, has_dropout(model)
    on_gpu = pick_device(config.device).type == "cuda"
    offloader = InputOffloader() if config.use_activation_cpu_offload and on_gpu else None
    for number, block in enumerate(blocks.values()):
        # the first, not the last: backward comes to them when the others have already freed all that they keep, so
        # what a block recomputes never adds to the peak
        recomputes = number < recomputed
        if compile_block and reentrant:
            block.forward = compile_block(block.forward)
        if recomputes:
            checkpoint_block(block, reentrant=reentrant, preserve_rng=random, policy=config.checkpoint_policy)
            block.recomputes = True
        elif compile_block and not reentrant:  # else the compiler keeps results of elementwise operations as well
            checkpoint_block(block, reentrant=False, preserve_rng=random, policy="products")
        if compile_block and not reentrant:
            block.forward = compile_block(block.forward)
        if offloader and recomputes:
            block.forward = offloader.wrap(block.forward)
    if recomputed and reentrant:
        require_input_gradients(model)


def shard(
    model: nn.Module,
    blocks: dict[str, nn.Module],
    config,
    *,
    mesh,
    dtype: torch.dtype,
    apart: set[nn.Parameter],
    frozen: set[nn.Parameter],
    together: bool,
) -> None:
    """Applies fully_shard to each block, to embedding and head, and to the rest.

    Must come after the blocks were found and wrapped: fully_shard renames classes. `mesh` None shards nothing.

    Args:
        apart: the embedding's parameters where every process holds them whole (`offload.whole_embedding`), or none.
            What is a gigabyte to gather, and shows at the start of every step, is a few rows to read.
        frozen: the parameters of blocks that `peer_gather` gathers, or none.
        together: what else is in the blocks is one group with the rest, and whole during a step.
    """
    model.trained_together = together
    if mesh is None:
        return
    pin = torch.cuda.is_available() and mesh.device_type == "cuda"
    settings = dict(
        mesh=mesh,
        reshard_after_forward=RESHARD_AFTER_FORWARD[config.sharding_strategy],
        # no param_dtype: it would cast fp32 scales and norms to 16 bits in the all-gather
        mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32 if dtype == torch.bfloat16 else None),
        offload_policy=CPUOffloadPolicy(pin_memory=pin) if config.use_cpu_offload else OffloadPolicy(),
    )
    for block in blocks.values() if not together else ():
        fully_shard(block, **settings, ignored_params=frozen)
    _shard_ends(model, settings, embedding=not apart)
    whole = dict(reshard_after_forward=False) if together else {}
    fully_shard(model, **settings | whole, ignored_params=apart | frozen)


def _shard_ends(model: nn.Module, settings: dict, *, embedding: bool) -> None:
    """Head, and embedding if wanted, in groups of their own: each is whole while it runs, not during the whole step.

    Where they share a weight it stays in the root group, since a weight cannot be in two.
    """
    first, head = model.get_input_embeddings(), model.get_output_embeddings()
    if {id(p) for p in first.parameters()} & {id(p) for p in head.parameters()}:
        return
    fully_shard(head, **settings)
    if embedding:
        fully_shard(first, **settings)
        gather_in_backward(first, False)  # nothing to compute from it there


def _frozen(module: nn.Module) -> bool:
    return not any(p.requires_grad for p in module.parameters())


def gather_in_backward(module: nn.Module, needed: bool) -> None:
    """Whether backward of a frozen sharded module needs its weight; without it no time is lost gathering."""
    if isinstance(module, FSDPModule) and _frozen(module):
        module.set_unshard_in_backward(needed)


def gather_ahead(model: nn.Module) -> None:
    """Gathers what is whole during a step at the end of the one before. The host is far ahead of the GPU then, and
    would be behind it at the start: this takes it some milliseconds."""
    if model.trained_together:
        model.unshard()


def leave_sharded(model: nn.Module) -> None:
    """Makes every parameter this process's rows again: `gather_ahead` leaves the root whole, and a forward pass without
    a backward all that is not resharded after forward."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def prepare_backward(model: nn.Module, *, last: bool, no_sync: bool) -> None:
    """Tells FSDP2 what comes after the next backward: the optimizer, or another micro-batch.

    Args:
        no_sync: reduce gradients over the processes in the last backward only.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or not no_sync)
    if model.trained_together:
        model.set_reshard_after_backward(last, recurse=False)
