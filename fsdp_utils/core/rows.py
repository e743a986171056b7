"""Rows of a parameter that this process holds: the same code serves sharded (DTensor) and plain tensors."""

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13


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


def largest_share(tensor: torch.Tensor, shards: int) -> tuple[int, int]:
    """Elements and bytes of a whole tensor in the process that holds most of its rows; FSDP2 fills up the others'."""
    elements = -(-tensor.shape[0] // shards) * (tensor.numel() // tensor.shape[0])
    return elements, elements * tensor.element_size()


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


def gather_each(
    tensors: list[torch.Tensor], *, device: torch.device, bucket_bytes: int = 2**28
) -> Iterator[torch.Tensor]:
    """`gather(t).to(device)` of each tensor in turn, with one collective per bucket instead of one per tensor.

    Collective: every process must call it with the same tensors and take all results.
    """
    bucket, size = [], 0
    for tensor in tensors:
        if not isinstance(tensor, DTensor) or not _even(tensor):
            yield from _gather_bucket(bucket, device)
            bucket, size = [], 0
            yield gather(tensor).to(device)
            continue
        bucket.append(tensor)
        size += tensor.numel() * tensor.element_size()
        if size >= bucket_bytes:
            yield from _gather_bucket(bucket, device)
            bucket, size = [], 0
    yield from _gather_bucket(bucket, device)


def _shard_dim(tensor: DTensor) -> int | None:
    """The mesh dimension over which rows are split."""
    return next((i for i, placement in enumerate(tensor.placements) if placement == Shard(0)), None)


def _even(tensor: DTensor) -> bool:
    dim = _shard_dim(tensor)
    return dim is not None and tensor.shape[0] % tensor.device_mesh.size(dim) == 0


def _gather_bucket(bucket: list[DTensor], device: torch.device) -> Iterator[torch.Tensor]:
    if not bucket:
        return
    dim = _shard_dim(bucket[0])
    processes = bucket[0].device_mesh.size(dim)
    mine = torch.cat([local(t).reshape(-1).to(device) for t in bucket])
    everyone = mine.new_empty(processes * mine.numel())
    _all_gather(everyone, mine, group=bucket[0].device_mesh.get_group(dim))
    everyone = everyone.view(processes, -1)
    start = 0
    for tensor in bucket:
        count = tensor.numel() // processes
        yield everyone[:, start : start + count].reshape(tensor.shape)
        start += count
