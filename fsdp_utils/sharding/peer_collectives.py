"""FSDP2's gathering and reducing of decoder blocks that train, done by the copy engines of one host's GPUs.

NCCL's kernels take multiprocessors and memory's time from the products beside them: 8 % of a step of an 8B that trains
whole on two H200s. Here each process copies what it needs out of the others' memory:

- Gathering reads weights where they are: only the optimizer writes them. Every forward pass begins with a barrier of
  the GPUs, behind which all have written.
- For reducing, each process puts its gradients, in the dtype they came in, into one of two buffers that take turns. All
  wait until all have; then each copies its rows of the others' and adds up in fp32, rounding once: what FSDP2 does
  with a copy in fp32, at half the bytes. A process that waits for block n - 1 knows that nobody reads block n - 2 any
  more, in whose buffer block n goes.
"""

import math
from collections.abc import Iterable, Iterator
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from fsdp_utils.core.devices import synchronize
from fsdp_utils.core.processes import barrier
from fsdp_utils.core.ranks import say
from fsdp_utils.core.rows import largest_share, local
from fsdp_utils.sharding.mesh import shard_group
from fsdp_utils.sharding.peer_gather import exchange, export_to_others, give_back, mapped, unread_parameters
from methods.kernels import reduce
from methods.packed import as_bytes

Tensor = torch.Tensor


def reduces(blocks: Iterable[nn.Module], config, *, copies: int) -> bool:
    """Whether gradients are reduced here: where every block trains, else the two buffers cost more than they bring; and
    not where fp32 sums are kept, over micro-batches or for the reduction over `copies` of the model."""
    sums = copies > 1 or (config.no_sync and config.gradient_accumulation_steps > 1)
    return not sums and all(any(p.requires_grad for p in block.parameters()) for block in blocks)


def buffer_bytes(blocks: Iterable[nn.Module], *, shards: int) -> int:
    """Of one of the two buffers: the gradients of the largest block, rows of zeros included that make shards even."""
    share = lambda block: sum(largest_share(p, shards)[1] for p in block.parameters() if p.requires_grad)
    return shards * max(map(share, blocks), default=0)


def in_order(module: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters as FSDP2 lines them up: those of children come first."""
    for child in module.children():
        yield from in_order(child)
    yield from (p for p in module._parameters.values() if p is not None)


class PeerAllGather:
    """`torch.distributed.fsdp`'s AllGather of one block."""

    def __init__(self, block: nn.Module, ignored: set[nn.Parameter]):
        self.parameters = [p for p in dict.fromkeys(in_order(block)) if p not in ignored]
        self.sources: list[list[tuple[int, Tensor]]] = []  # of each process: where in its part, and what to copy there

    def allocate(self, size, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group, async_op: bool = False) -> None:
        """Fills `output_tensor`, the parts of all processes, in which this one's, `input_tensor`, already is."""
        if not self.sources:
            self._connect(as_bytes(input_tensor), group)
        parts = as_bytes(output_tensor).view(group.size(), -1)
        for shift in range(1, group.size()):  # each begins with its next neighbour: not all read from one at a time
            owner = (group.rank() + shift) % group.size()
            for start, source in self.sources[owner]:
                parts[owner, start : start + len(source)].copy_(source, non_blocking=True)

    def _connect(self, own: Tensor, group) -> None:
        """Maps everyone's rows: at the first gathering, since FSDP2 moves rows once more before it. Collective.

        Raises:
            RuntimeError: FSDP2 lines parameters up in another order than `in_order`.
        """
        rows = [local(p) for p in self.parameters]
        *starts, end = accumulate((largest_share(p, group.size())[1] for p in self.parameters), initial=0)
        alike = end == len(own) and all(
            torch.equal(own[start : start + r.nbytes], as_bytes(r.view(-1)))
            for start, r in zip(starts, rows, strict=True)
        )
        if not alike:
            raise RuntimeError("FSDP2 gathers parameters in an order that peer_collectives does not know")
        everyone = exchange(export_to_others(rows, group), group)
        of_each = [exported[group.rank()] for exported in everyone]
        self.sources = [
            [(start, mapped(e, own.device)) for start, e in zip(starts, exported, strict=True) if e is not None]
            for exported in of_each
        ]


class PeerReduceScatter:
    """`torch.distributed.fsdp`'s ReduceScatter of all blocks, one after another; the same order in every process."""

    def __init__(self, nbytes: int, group, device: torch.device):
        self.buffers = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(2)]
        everyone = exchange(export_to_others(self.buffers, group), group)
        # of each process both buffers
        self.everyone = [
            self.buffers if owner == group.rank() else [mapped(e, device) for e in exported[group.rank()]]
            for owner, exported in enumerate(everyone)
        ]
        self.here = Barrier(group, device)
        self.turn, self.for_input, self.done = 0, False, None

    def allocate(self, size, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for the gradients of a block, then for what this process keeps of their sum, by turns."""
        self.for_input = not self.for_input
        if not self.for_input:
            return torch.empty(*size, dtype=dtype, device=device)
        self.turn = 1 - self.turn
        if self.done is not None:
            torch.cuda.current_stream(device).wait_event(self.done)
        return self.buffers[self.turn][: math.prod(size) * dtype.itemsize].view(dtype)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group, op, async_op: bool = False) -> None:
        """Fills `output_tensor`, `[n]`, with the sum or mean of everyone's `input_tensor`, `[processes * n]`, there."""
        self.here()
        mine, count = group.rank(), group.size()
        part = slice(mine * output_tensor.nbytes, (mine + 1) * output_tensor.nbytes)
        others = output_tensor.new_empty(count - 1, output_tensor.numel())
        for shift, theirs in enumerate(others, 1):
            as_bytes(theirs).copy_(self.everyone[(mine + shift) % count][self.turn][part], non_blocking=True)
        own = self.buffers[self.turn][part].view(output_tensor.dtype)
        reduce.add(own, others, 1 / count if op == dist.ReduceOp.AVG else 1.0, out=output_tensor)
        if output_tensor.is_cuda:
            self.done = torch.cuda.current_stream(output_tensor.device).record_event()


class Barrier:
    """What is launched after it on a GPU's current stream runs when all have come to it; a CPU waits."""

    def __init__(self, group, device: torch.device):
        self.group, self.token = group, torch.zeros(1, device=device)

    def __call__(self, *unused) -> None:
        dist.all_reduce(self.token, group=self.group)


class PeerCollectives:
    """Gives the blocks that FSDP2 shards one by one these collectives, until `close`.

    Args:
        ignored: parameters of blocks that FSDP2 does not gather.
        reduced: whether gradients are reduced here too (`reduces`).
    """

    def __init__(
        self, model: nn.Module, blocks: dict[str, nn.Module], *, mesh, ignored: set, reduced: bool, device: torch.device
    ):
        group = shard_group(mesh)
        sharded = [block for block in blocks.values() if isinstance(block, FSDPModule)]
        self.gathers = [PeerAllGather(block, ignored | set(unread_parameters(block))) for block in sharded]
        nbytes = buffer_bytes(sharded, shards=group.size()) if reduced else 0
        self.reduce = PeerReduceScatter(nbytes, group, device) if nbytes else None
        for block, gather in zip(sharded, self.gathers, strict=True):
            if not gather.parameters:
                continue
            block.set_custom_all_gather(gather)
            if self.reduce:
                block.set_custom_reduce_scatter(self.reduce)
        # before FSDP2's own hook, which lets gathering begin behind what has been launched until then
        self.hook = model.register_forward_pre_hook(Barrier(group, device), prepend=True)
        self.device = device
        done = "gathered and reduced" if self.reduce else "gathered"
        say(f"blocks that train are {done} out of {group.size()} processes' memory")

    def forget_frozen(self) -> None:
        """It keeps none."""

    def close(self) -> None:
        """No process frees memory that another still maps, and none ends with it. Collective."""
        if not self.gathers:
            return
        synchronize(self.device)
        self.hook.remove()
        exported = [local(p) for gather in self.gathers if gather.sources for p in gather.parameters]
        for gather in self.gathers:
            gather.sources = []
        if self.reduce:
            exported += self.reduce.buffers
            self.reduce.everyone = []
        self.gathers = []
        barrier()
        give_back(exported)
