"""What attention sends between processes that share rows (--context_parallel), each of which has its part of the tokens
(`data.parts`). Two ways:

- by heads (DeepSpeed-Ulysses, arXiv:2309.14509): each process gets whole rows of some of the heads, and gives their
  results back. A process sends its queries, keys, values and results once each, whatever the length. The number of
  processes has to divide the number of heads.
- by keys (Llama 3, arXiv:2407.21783, section 3.3.2): each process keeps its queries and gets all keys and values, which
  are few where heads share them. For any number of heads.
"""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from fsdp_utils.core.ranks import world_size

Tensor = torch.Tensor
Attend = Callable[..., Tensor]  # query, key, value `[b, heads, L, d]` to `[b, L, heads, d]`

_groups: dict[str, dist.ProcessGroup] = {}  # operators of compiled code take names


def join(several: int, device: torch.device) -> str:
    """Name of the processes that this one shares rows with: so many neighbours. Collective."""
    mesh = init_device_mesh(device.type, (world_size() // several, several), mesh_dim_names=("data", "context"))
    group = mesh["context"].get_group()
    _groups[group.group_name] = group
    return group.group_name


@torch.library.custom_op("fsdp_qlora::exchange", mutates_args=())
def exchange(parts: Tensor, group: str) -> Tensor:
    """`[n, ...]`: part i goes to process i, which stacks what it gets in the order of those that sent it."""
    received = torch.empty_like(parts, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, parts.contiguous(), group=_groups[group])
    return received


@torch.library.custom_op("fsdp_qlora::collect", mutates_args=())
def collect(mine: Tensor, group: str) -> Tensor:
    """What each process has, stacked in their order, `[n, ...]`."""
    whole = mine.new_empty((_groups[group].size(), *mine.shape))
    dist.all_gather_into_tensor(whole.flatten(0, 1), mine.contiguous(), group=_groups[group])
    return whole


@torch.library.custom_op("fsdp_qlora::add_up", mutates_args=())
def add_up(parts: Tensor, group: str) -> Tensor:
    """`[n, ...]`: process i gets the sum of all parts i."""
    mine = parts.new_empty(parts.shape[1:])
    dist.reduce_scatter_tensor(mine, parts.flatten(0, 1).contiguous(), group=_groups[group])
    return mine


exchange.register_fake(lambda parts, group: torch.empty_like(parts, memory_format=torch.contiguous_format))
collect.register_fake(lambda mine, group: mine.new_empty((_groups[group].size(), *mine.shape)))
add_up.register_fake(lambda parts, group: parts.new_empty(parts.shape[1:]))


def _remember_group(ctx, inputs, output) -> None:
    ctx.group = inputs[1]


exchange.register_autograd(lambda ctx, grad: (exchange(grad, ctx.group), None), setup_context=_remember_group)
collect.register_autograd(lambda ctx, grad: (add_up(grad, ctx.group), None), setup_context=_remember_group)


def attend_by_heads(query: Tensor, key: Tensor, value: Tensor, attend: Attend, *, group: str) -> Tensor:
    """Attention over shared rows; this process has one piece of each.

    Args:
        query: `[b, heads, l, d]`; key, value: `[b, kv heads, l, d]`.
        attend: attention over whole rows.

    Returns:
        `[b, l, heads, d]`.
    """
    n = _groups[group].size()
    kv_heads = math.lcm(key.shape[1], n)  # what several processes need is sent to each
    key, value = (t.repeat_interleave(kv_heads // t.shape[1], dim=1) for t in (key, value))
    out = attend(*(_rows_of_heads(t, n, group) for t in (query, key, value)))
    parts = out.unflatten(1, (n, -1)).movedim(1, 0)  # [n pieces, b, l, heads / n, d]
    return exchange(parts, group).movedim(0, 2).flatten(2, 3)


def _rows_of_heads(mine: Tensor, n: int, group: str) -> Tensor:
    """`[b, heads, l, d]`, a piece of all heads, to `[b, heads / n, n * l, d]`, all of some."""
    parts = mine.unflatten(1, (n, -1)).movedim(1, 0)
    return exchange(parts, group).movedim(0, 2).flatten(2, 3)


def attend_by_keys(query: Tensor, key: Tensor, value: Tensor, attend: Attend, *, group: str) -> Tensor:
    """`attend_by_heads` for any number of heads; this process has two pieces of each row (`Part.folded`).

    Args:
        attend: takes `first`, too: the column of the first query.
    """
    index, n = dist.get_rank(_groups[group]), _groups[group].size()
    key, value = (_unfolded(collect(t, group)) for t in (key, value))
    pieces = zip(query.chunk(2, dim=2), (index, 2 * n - 1 - index), strict=True)
    return torch.cat([attend(q, key, value, first=number * q.shape[2]) for q, number in pieces], dim=1)


def _unfolded(parts: Tensor) -> Tensor:
    """`[n, b, heads, l, d]`, two pieces from each process, to whole rows `[b, heads, n * l, d]`."""
    early, late = parts.chunk(2, dim=3)
    return torch.cat([early, late.flip(0)]).movedim(0, 2).flatten(2, 3)
