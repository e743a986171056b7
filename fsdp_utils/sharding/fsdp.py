"""FSDP2: what is sharded in which group, and when a group is whole."""

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from fsdp_utils.core.errors import UserError
from fsdp_utils.options import STRATEGIES
from fsdp_utils.sharding.offload import is_shared
from fsdp_utils.sharding.peer_gather import sharded, unread
from fsdp_utils.sharding.prepared import Prepared


def shard(
    model: nn.Module,
    blocks: dict[str, nn.Module],
    config,
    *,
    mesh,
    dtype: torch.dtype,
    apart: set[nn.Parameter],
    frozen: set[nn.Parameter],
    gathered_with_root: bool,
    reduced_by_peers: bool,
) -> None:
    """Applies fully_shard to each block, to embedding and head, and to the rest.

    Must come after the blocks were found and wrapped: fully_shard renames classes. `mesh` None shards nothing.

    Args:
        apart: the embedding's parameters where every process holds them whole (`offload.whole_embedding`), or none.
            What is a gigabyte to gather, and shows at the start of every step, is a few rows to read.
        frozen: the parameters of blocks that `peer_gather` gathers, or none. What no forward reads joins them.
        gathered_with_root: what else is in the blocks is one group with the rest, and whole during a step.
        reduced_by_peers: `peer_collectives` adds up the gradients of blocks, in fp32 whatever dtype they come in.

    Raises:
        UserError: weights of several dtypes train, which FSDP2 does not gather together.
    """
    if mesh is None:
        return
    if len({p.dtype for p in model.parameters() if p.requires_grad}) > 1:
        kept = f"{model.config.model_type} models keep some of their weights in fp32, which FSDP2 does not train beside"
        raise UserError(f"--precision bf16: {kept} others; use --precision bf16_autocast or fp32, or adapters")
    frozen = frozen | _kept_as_rows(model, mesh)
    pin = torch.cuda.is_available() and mesh.device_type == "cuda"
    settings = dict(
        mesh=mesh,
        reshard_after_forward=STRATEGIES[config.sharding_strategy].resharded,
        # no param_dtype: it would cast fp32 scales and norms to 16 bits in the all-gather
        mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32 if dtype == torch.bfloat16 else None),
        offload_policy=CPUOffloadPolicy(pin_memory=pin) if config.use_cpu_offload else OffloadPolicy(),
    )
    of_blocks = settings | (dict(mp_policy=MixedPrecisionPolicy()) if reduced_by_peers else {})
    for block in blocks.values() if not gathered_with_root else ():
        fully_shard(block, **of_blocks, ignored_params=frozen)
    _shard_ends(model, settings, embedding=not apart)
    whole = dict(reshard_after_forward=False) if gathered_with_root else {}
    fully_shard(model, **settings | whole, ignored_params=apart | frozen)


def _kept_as_rows(model: nn.Module, mesh) -> set[nn.Parameter]:
    """Shards what no forward reads, and gives it back for FSDP2 to ignore: it would gather it with its group."""
    found = set()
    for module, name in unread(model):
        module._parameters[name] = sharded(module._parameters[name], mesh)
        found.add(module._parameters[name])
    return found


def _shard_ends(model: nn.Module, settings: dict, *, embedding: bool) -> None:
    """Head, and embedding if wanted, in groups of their own: each is whole while it runs, not during the whole step.

    Where they share a weight it stays in the root group, since a weight cannot be in two.
    """
    first, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and not is_shared(model, head):
        fully_shard(head, **settings)
    if embedding and not is_shared(model, first):
        fully_shard(first, **settings)
        leave_out_of_backward(first)  # nothing to compute from it there


def leave_out_of_backward(module: nn.Module) -> None:
    """Loses no time gathering the weight of a frozen sharded module that backward does not need."""
    if isinstance(module, FSDPModule) and not any(p.requires_grad for p in module.parameters()):
        module.set_unshard_in_backward(False)


def gather_ahead(prepared: Prepared) -> None:
    """Gathers what is whole during a step at the end of the one before. The host is far ahead of the GPU then, and
    would be behind it at the start: this takes it some milliseconds."""
    if prepared.gathered_with_root:
        prepared.model.unshard()


def leave_sharded(prepared: Prepared) -> None:
    """Makes every parameter this process's rows again: `gather_ahead` leaves the root whole, and a forward pass without
    a backward all that is not resharded after forward."""
    for module in prepared.model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def prepare_backward(prepared: Prepared, *, last: bool, no_sync: bool) -> None:
    """Tells FSDP2 what comes after the next backward: the optimizer, or another micro-batch.

    Args:
        no_sync: reduce gradients over the processes in the last backward only.
    """
    model = prepared.model
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or not no_sync)
    if prepared.gathered_with_root:
        model.set_reshard_after_backward(last, recurse=False)
