"""Rows of a parameter that this process holds: the same code serves sharded (DTensor) and plain tensors."""

import math

import torch
from torch.distributed.tensor import DTensor, Shard


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of `tensor` in this process, sharing its memory; a plain tensor is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def row_range(tensor: torch.Tensor) -> tuple[int, int]:
    """`(start, stop)` of the rows (dim 0) that `local` holds, as torch.chunk lays them out."""
    rows = tensor.shape[0] if tensor.dim() else 1
    if not isinstance(tensor, DTensor):
        return 0, rows
    for mesh_dim, placement in enumerate(tensor.placements):
        if placement == Shard(0):
            chunk = math.ceil(rows / tensor.device_mesh.size(mesh_dim))
            start = min(tensor.device_mesh.get_local_rank(mesh_dim) * chunk, rows)
            return start, min(start + chunk, rows)
    return 0, rows


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor on every process. Collective: every process must call it."""
    if not isinstance(tensor, DTensor):
        return tensor
    if tensor.dtype != torch.float8_e4m3fn:
        return tensor.full_tensor()
    # gloo has no float8: packed codes travel as the bytes they are
    as_bytes = DTensor.from_local(
        local(tensor).view(torch.uint8),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
    return as_bytes.full_tensor().view(tensor.dtype)


@torch.no_grad()
def fill(parameter: torch.Tensor, whole: torch.Tensor) -> None:
    """Copies this process's rows of `whole` into `parameter`."""
    start, stop = row_range(parameter)
    local(parameter).copy_(whole[start:stop] if whole.dim() else whole)
