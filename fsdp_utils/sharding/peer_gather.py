"""Frozen weights of decoder blocks, copied straight out of the neighbours' memory while the block before them runs.

A frozen weight does not change after loading, so its shards can be read at any moment: no collective, no process that
waits for another, no kernel that takes multiprocessors from a matrix product; the GPUs' copy engines do it. Where one
does change (--train_for), between steps, all processes wait, and what was copied is forgotten. FSDP2 keeps what trains,
and where that is little it gathers and reduces it once a step: no decoder block waits for another process.

It takes GPUs of one host that reach each other's memory. Elsewhere FSDP2 gathers everything: the reference.
"""

import socket
import time
from contextlib import suppress
from itertools import chain
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils._pytree import tree_leaves

from fsdp_utils.core.devices import synchronize
from fsdp_utils.core.errors import UserError
from fsdp_utils.core.processes import barrier
from fsdp_utils.core.ranks import say
from fsdp_utils.core.rows import local
from fsdp_utils.options import STRATEGIES
from fsdp_utils.sharding.host_memory import HostMemory
from fsdp_utils.sharding.mesh import shard_group
from methods.quantizers.linear import QuantizedWeight

LITTLE = 1 / 4  # of a block's frozen bytes: what trains in it is adapters, and not the block itself


def frozen_weights(block: nn.Module) -> list[tuple[nn.Module, str]]:
    """Module and name of every frozen parameter of a linear. Nothing writes to these after loading."""
    linears = [m for m in block.modules() if isinstance(m, (nn.Linear, QuantizedWeight))]
    return [(m, name) for m in linears for name, p in m.named_parameters(recurse=False) if not p.requires_grad]


def unread(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Module and name of every frozen parameter that is kept to be saved, and that no forward reads."""
    return [(m, name) for m in module.modules() for name in getattr(m, "unread_names", ())]


def unread_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Those of `unread`: nobody gathers them."""
    return [m._parameters[name] for m, name in unread(module)]


def trains_little(blocks: list[nn.Module]) -> bool:
    """Whether what is in each block beside its frozen weights is little."""

    def little(block: nn.Module) -> bool:
        frozen = sum(module._parameters[name].nbytes for module, name in frozen_weights(block))
        left = sum(p.nbytes for p in unread_parameters(block))
        return sum(p.nbytes for p in block.parameters()) - frozen - left <= LITTLE * frozen

    return all(map(little, blocks))


def slot_sizes(blocks: list[nn.Module], *, resharded: bool) -> list[int]:
    """Bytes of the memory that whole frozen weights take: two slots that take turns, or one for each block."""
    count = min(2, len(blocks)) if resharded else len(blocks)
    nbytes = lambda block: sum(HostMemory.aligned(m._parameters[name].nbytes) for m, name in frozen_weights(block))
    sizes = [nbytes(block) for block in blocks]
    return [max(sizes[i::count]) for i in range(count)]


def sharded(parameter: nn.Parameter, mesh) -> nn.Parameter:
    """A parameter on meta as FSDP2 would shard it: dim 0 over the last dimension of the mesh."""
    last = mesh.ndim - 1
    rows, mine = parameter.data.chunk(mesh.size(last)), mesh.get_local_rank(last)
    own = rows[mine] if mine < len(rows) else parameter.data[:0]
    layout = dict(run_check=False, shape=parameter.shape, stride=parameter.stride())
    sharded = DTensor.from_local(own, mesh, [*[Replicate()] * last, Shard(0)], **layout)
    return nn.Parameter(sharded, requires_grad=False)


class Exported(NamedTuple):
    """Where the bytes of a tensor are, for other processes of this host."""

    start: int
    nbytes: int
    handle: tuple


def export(tensor: torch.Tensor) -> Exported:
    """For one other process: torch counts readers by exports. No gaps in the tensor; a CPU's moves to shared memory."""
    storage, start = tensor.untyped_storage(), tensor.storage_offset() * tensor.element_size()
    handle = storage._share_cuda_()[1:] if tensor.is_cuda else _share_on_host(storage)
    return Exported(start, tensor.nbytes, handle)


def _share_on_host(storage: torch.UntypedStorage) -> tuple:
    """Its handle. The first call starts a process, for which torch waits a second: on a busy host, too short a time."""
    for _ in range(10):
        with suppress(RuntimeError):
            return storage._share_filename_cpu_()
    return storage._share_filename_cpu_()


def mapped(exported: Exported, device: torch.device) -> torch.Tensor:
    """uint8 `[nbytes]`: the memory of another process as `device` reads it.

    Raises:
        RuntimeError: `device` cannot reach it.
    """
    if device.type == "cuda":  # under our own device: under its owner's, this process would start a context there
        storage = torch.UntypedStorage._new_shared_cuda(device.index, *exported.handle)
    else:
        storage = torch.UntypedStorage._new_shared_filename_cpu(*exported.handle)
    whole = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
    return whole[exported.start : exported.start + exported.nbytes]


def export_to_others(tensors: list[torch.Tensor], group) -> list[list[Exported | None]]:
    """For each process of the group what it needs of each tensor; None for this process and for empty tensors."""
    mine = dist.get_rank(group)
    return [
        [export(t) if process != mine and t.numel() else None for t in tensors]
        for process in range(dist.get_world_size(group))
    ]


def exchange(mine, group=None) -> list:
    """What every process of the group gave, by its place in it; all processes without one."""
    everyone = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


def _read_all(exported: list, sample: torch.Tensor, rank: int) -> str | None:
    """Reads every process's sample, each filled with its owner's rank; what went wrong, or None."""
    for owner, of_owner in enumerate(exported):
        if isinstance(of_owner, str):
            return of_owner
        if owner != rank and not bool((mapped(of_owner[rank][0], sample.device) == owner).all()):
            return "it reads as something else"
    return None


def _tried(function, *args):
    """What a function returns, or the first line of its error: memory that cannot be shared or mapped, or another torch
    whose calls for that (they are not public) have changed."""
    try:
        return function(*args)
    except (RuntimeError, TypeError, AttributeError) as error:
        return str(error).partition("\n")[0]


def give_back(exported: list[torch.Tensor]) -> None:
    """Frees GPU memory that no other process maps any more, while this one still lives: torch counts what it shares."""
    for tensor in exported:
        if tensor.is_cuda:
            tensor.untyped_storage().resize_(0)


def unreachable(mesh, device: torch.device) -> str | None:
    """Why the processes that share a copy of the model cannot read each other's memory; None if they can, found out by
    reading it. Collective; the same answer in every process of the run.
    """
    group = shard_group(mesh)
    rank = dist.get_rank(group)
    if len(set(exchange(socket.gethostname(), group))) > 1:
        why = "they are on several hosts"
    else:
        sample = torch.full((1024,), rank, dtype=torch.uint8, device=device)
        synchronize(device)
        exported = exchange(_tried(export_to_others, [sample], group), group)
        why = _tried(_read_all, exported, sample, rank)
        dist.barrier(group)  # nobody lets go of its sample before all have read it
    return next(filter(None, exchange(why)), None)


class _Slot:
    """Memory for the whole frozen weights of a block."""

    def __init__(self, nbytes: int, device: torch.device):
        self.memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.holds, self.ready = None, None  # the number of a block, and the event after which it is whole


class _Whole(NamedTuple):
    """A weight of a block: what is in its module while the block runs, and what is there otherwise."""

    module: nn.Module
    name: str
    whole: nn.Parameter
    shard: nn.Parameter


class PeerShards:
    """The frozen weights of decoder blocks, sharded here and not by FSDP2; made on meta, before FSDP2 shards the rest.

    Args:
        resharded: two slots take turns, so that one fills while the block in the other runs; else each block has its
            own, filled once in a run.

    Attributes:
        weights: of each block, module and name of each frozen weight.
        slot_sizes: bytes of each slot.
        trains_little: what else is in the blocks is little beside these weights: it may be whole during a step.
    """

    def __init__(self, blocks: dict[str, nn.Module], *, mesh, resharded: bool):
        self.blocks, self.mesh = list(blocks.values()), mesh
        self.weights = [frozen_weights(block) for block in self.blocks]
        self.trains_little = trains_little(self.blocks)
        self.slot_sizes = slot_sizes(self.blocks, resharded=resharded)
        for module, name in chain.from_iterable(self.weights):
            module._parameters[name] = sharded(module._parameters[name], mesh)

    @property
    def parameters(self) -> set[nn.Parameter]:
        """The sharded parameters, which FSDP2 must leave alone."""
        return {module._parameters[name] for module, name in chain.from_iterable(self.weights)}


class PeerGather:
    """Makes the frozen weights of each block whole just before it runs, forward or backward.

    Made once every shard is loaded: it maps the neighbours' shards and watches the blocks, until `close`. Collective.
    """

    def __init__(self, shards: PeerShards, device: torch.device):
        self.blocks, self.parameters, group = shards.blocks, shards.parameters, shard_group(shards.mesh)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.slots = [_Slot(size, device) for size in shards.slot_sizes]
        self.inside = None  # the number of the block whose weights are whole
        synchronize(device)
        rank = dist.get_rank(group)
        of_blocks = [[module._parameters[name] for module, name in weights] for weights in shards.weights]
        everyone = exchange([export_to_others([local(p) for p in of_block], group) for of_block in of_blocks], group)
        self.wholes: list[list[_Whole]] = []  # of each block
        self.copies: list[list[tuple]] = []  # of each block, pairs of target and source
        for number, (weights, of_block) in enumerate(zip(shards.weights, of_blocks, strict=True)):
            exported = [of_process[number][rank] for of_process in everyone]
            self._lay_out(number, weights, of_block, exported, rank=rank, device=device)
        self.hooks = [hook for number, block in enumerate(self.blocks) for hook in self._watch(block, number)]
        self._say(how="once a step" if shards.trains_little else "by block", processes=dist.get_world_size(group))

    def _say(self, *, how: str, processes: int) -> None:
        """What is gathered in which way, and on GPUs how fast: a step takes as long as the process with the slowest
        link."""
        begin, end = f"frozen weights are copied out of {processes} processes' memory", f"what trains is gathered {how}"
        if not self.stream:
            say(f"{begin}, {end}")
            return
        rates = exchange(self._gigabytes_a_second() * (processes - 1) / processes)
        slowest, fastest = (rates.index(pick(rates)) for pick in (min, max))
        say(f"{begin} at {rates[slowest]:.0f} GB/s, {end}")
        if rates[slowest] < rates[fastest] / 2:
            others = f"process {fastest} at {rates[fastest]:.0f} GB/s"
            say(
                f"note: process {slowest} reads at {rates[slowest]:.0f} GB/s, {others}: steps wait for the slowest link"
            )

    def _gigabytes_a_second(self) -> float:
        """Of the first block, while all processes copy theirs."""
        slot, device, times = self._slot(0), self.slots[0].memory.device, []
        for _ in range(3):
            slot.holds = None
            synchronize(device)
            barrier()
            start = time.perf_counter()
            self._fetch(0)
            synchronize(device)
            times.append(time.perf_counter() - start)
        return sum(target.nbytes for target, _ in self.copies[0]) / min(times) / 1e9

    def _slot(self, number: int) -> _Slot:
        return self.slots[number % len(self.slots)]

    def _lay_out(self, number: int, weights: list, shards: list, exported: list, *, rank: int, device) -> None:
        """Gives each weight of a block its place in the slot, and says which bytes to copy there from where.

        Args:
            exported: of each process, what this one needs of each of the block's weights.
        """
        memory, start, wholes, copies = self._slot(number).memory, 0, [], []
        # a view whose version counter is its own: autograd must not take the next gather for a change of a weight
        written = memory.data
        for index, ((module, name), p) in enumerate(zip(weights, shards, strict=True)):
            part = slice(start, start + p.nbytes)
            whole = memory[part].view(p.dtype).view(p.shape)
            wholes.append(_Whole(module, name, nn.Parameter(whole, requires_grad=False), p))
            for owner, target in enumerate(written[part].view(p.shape[0], -1).chunk(len(exported))):
                source = local(p).view(torch.uint8) if owner == rank else mapped(exported[owner][index], device)
                copies.append(((owner - rank - 1) % len(exported), target, source.view(target.shape)))
            start += HostMemory.aligned(p.nbytes)
        # each begins with its next neighbour, so that not all read from one at a time
        self.copies.append([(target, source) for _, target, source in sorted(copies, key=lambda copy: copy[0])])
        self.wholes.append(wholes)

    def _watch(self, block: nn.Module, number: int) -> tuple:
        """Gathers around the block; the handles of its hooks. As FSDP2's, they see the module, so that recomputation
        stays inside them."""

        def before_forward(module, args):
            self._enter(number, then=number + 1)

        def after_forward(module, args, output):
            self._leave()
            for tensor in tree_leaves(output):
                if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                    tensor.register_hook(before_backward)

        def before_backward(grad):
            self._enter(number, then=number - 1)
            torch.autograd.Variable._execution_engine.queue_callback(self._leave)  # when backward is over

        return block.register_forward_pre_hook(before_forward), block.register_forward_hook(after_forward)

    def _enter(self, number: int, *, then: int) -> None:
        """Makes a block whole for what is launched from now on; `then` is the block that is likely to be next."""
        self._leave()
        self._fetch(number)
        if self.stream:
            torch.cuda.current_stream().wait_event(self._slot(number).ready)
        for module, name, whole, _ in self.wholes[number]:
            module._parameters[name] = whole
        self.inside = number
        if 0 <= then < len(self.blocks):
            self._fetch(then)

    def _leave(self) -> None:
        """Puts the shards back: outside its block a weight is this process's rows."""
        if self.inside is not None:
            for module, name, _, shard in self.wholes[self.inside]:
                module._parameters[name] = shard
            self.inside = None

    @torch.no_grad()
    def _fetch(self, number: int) -> None:
        """Begins to fill a block's slot, if it holds another; what was launched so far may still read that one."""
        slot = self._slot(number)
        if slot.holds == number:
            return
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for target, source in self.copies[number]:
                target.copy_(source, non_blocking=True)
        slot.holds, slot.ready = number, self.stream and self.stream.record_event()

    def forget_frozen(self) -> None:
        """Copies every block again, also those that still are in their slots."""
        for slot in self.slots:
            slot.holds = None

    def close(self) -> None:
        """Gathers no more. No process frees memory that another still maps, and none ends with it. Collective."""
        if not self.hooks:
            return
        self._disconnect()
        barrier()
        self._free()

    def _disconnect(self) -> None:
        """Lets go of the neighbours' memory."""
        if self.stream:
            self.stream.synchronize()
        for hook in self.hooks:
            hook.remove()
        self.copies, self.hooks = [], []

    def _free(self) -> None:
        """Gives back this process's shards."""
        give_back([local(p) for p in self.parameters])


def wanted(config, *, shards: int, device: torch.device) -> bool:
    """Whether `--peer_gather` asks for it, of so many processes that share a copy of the model."""
    asked = config.peer_gather is True or (config.peer_gather == "auto" and device.type == "cuda")
    return asked and shards > 1 and not config.use_cpu_offload


def reached(config, *, mesh, device: torch.device) -> bool:
    """Whether processes read each other's memory in this run: `--peer_gather` asks for it, and they can. Collective.

    Raises:
        UserError: it was asked for, and they cannot.
    """
    if mesh is None or not wanted(config, shards=shard_group(mesh).size(), device=device):
        if config.peer_gather is True:
            say("note: --peer_gather true: no other process holds a part of the model, so there is nothing to read")
        return False
    why = unreachable(mesh, device)
    if why and config.peer_gather is True:
        raise UserError(f"--peer_gather true: no process reads another's memory here ({why}); pass auto or false")
    if why:
        say(f"note: FSDP2 gathers all weights: no process reads another's memory here ({why})")
    return why is None


def choose(blocks: dict[str, nn.Module], config, *, mesh) -> PeerShards | None:
    """What processes that reach each other's memory take away from FSDP2; None where nothing is frozen."""
    if not any(map(frozen_weights, blocks.values())):
        return None
    return PeerShards(blocks, mesh=mesh, resharded=STRATEGIES[config.sharding_strategy].resharded)
