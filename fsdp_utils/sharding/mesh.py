"""The mesh of processes that a model is sharded over."""

import os

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fsdp_utils.core.errors import UserError
from fsdp_utils.core.ranks import world_size
from fsdp_utils.options import STRATEGIES


def no_divisor(size: int, processes: int) -> UserError:
    """The error of nodes of another size."""
    return UserError(f"--hybrid_shard_size {size}: does not divide {processes} processes")


def make_mesh(strategy: str, device: torch.device, *, hybrid_shard_size: int = -1) -> DeviceMesh:
    """The mesh to shard over: 1-D where there is one copy of the model, (replicas, shards) where there are several.

    A copy in each process (`ddp`) is the mesh whose shard dimension has one member.

    Raises:
        UserError: the shard size does not divide the number of processes.
    """
    total, copies = world_size(), STRATEGIES[strategy].copies
    if copies == "one":
        return init_device_mesh(device.type, (total,), mesh_dim_names=("shard",))
    size = 1
    if copies == "nodes":
        size = hybrid_shard_size if hybrid_shard_size > 0 else int(os.environ.get("LOCAL_WORLD_SIZE", total))
    if total % size:
        raise no_divisor(size, total)
    return init_device_mesh(device.type, (total // size, size), mesh_dim_names=("replicate", "shard"))


def mesh_for(config, device: torch.device) -> DeviceMesh | None:
    """The mesh of a run, or None where one process holds the whole model and nothing is offloaded."""
    if world_size() == 1 and not config.use_cpu_offload:
        return None
    return make_mesh(config.sharding_strategy, device, hybrid_shard_size=config.hybrid_shard_size)


def shard_group(mesh: DeviceMesh):
    """The processes that together hold one copy of the model."""
    return (mesh["shard"] if mesh.ndim > 1 else mesh).get_group()
