"""What a run takes in each process, from the configuration of a model alone."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from fsdp_utils.core.devices import GIB
from fsdp_utils.data.batches import accumulation_for
from fsdp_utils.memory import budget, recompute
from fsdp_utils.memory.activations import Kept, measure
from fsdp_utils.model.assemble import Plan, offloads
from fsdp_utils.options import STRATEGIES
from fsdp_utils.planning.machines import Machine
from fsdp_utils.sharding import offload, peer_collectives, peer_gather
from fsdp_utils.sharding.mesh import no_divisor
from methods.targets import decoder_blocks

# what a process takes besides what torch allocates: CUDA's context and libraries, the allocator's own gaps
CONTEXT = int(0.6 * GIB)
OFFLOADED = "parameters and states"  # of `Forecast.host`
HOST = int(1.6 * GIB)  # Python, torch, CUDA's libraries


class Shards(NamedTuple):
    """Stands for a device mesh of which only the shape is asked."""

    replicas: int
    shards: int
    ndim: int = 2

    def size(self, dim: int | None = None) -> int:
        return self.replicas * self.shards if dim is None else self[dim]


class Forecast(NamedTuple):
    """Of the process that takes most.

    Args:
        sizes: bytes of GPU memory by purpose.
        host: bytes of host memory of a process, by purpose.
        recomputed: of `blocks`, how many run forward again in backward.
    """

    sizes: dict[str, int]
    host: dict[str, int]
    recomputed: int
    blocks: int

    @property
    def peak(self) -> int:
        """Bytes that torch allocates at the worst moment."""
        return sum(self.sizes.values())

    @property
    def measured(self) -> bool:
        """Whether it is known what blocks keep for backward."""
        return "activations" in self.sizes

    def fits(self, machine: Machine) -> bool:
        return machine.memory is None or self.peak + CONTEXT <= machine.memory


def mesh_of(config, machine: Machine) -> Shards | None:
    """As `sharding.mesh.mesh_for` of a run on this machine."""
    total, copies = machine.gpus, STRATEGIES[config.sharding_strategy].copies
    if total == 1 and not config.use_cpu_offload:
        return None
    whole = dict(one=total, processes=1, nodes=config.hybrid_shard_size if config.hybrid_shard_size > 0 else total)
    if total % whole[copies]:
        raise no_divisor(whole[copies], total)
    return Shards(total // whole[copies], whole[copies])


def split_for(config, machine: Machine):
    """The flags with the accumulation that `--global_batch_size` means on this machine.

    Raises:
        UserError: it is no whole number.
    """
    if config.global_batch_size < 1:
        return config
    asked = dict(processes=machine.gpus, named="--global_batch_size")
    return replace(config, gradient_accumulation_steps=accumulation_for(config.global_batch_size, config, **asked))


def forecast(planned: Plan, config, machine: Machine, *, measure: Callable[..., Kept] = measure) -> Forecast:
    """Of a planned model, on meta; as `model.assemble.load` decides it on the machine itself. `measure`: as
    `activations.measure`."""
    model, device, blocks = planned.model, machine.device, decoder_blocks(planned.model)
    mesh = mesh_of(config, machine)
    near = mesh is not None and peer_gather.wanted(config, shards=mesh.shards, device=device)
    with_peers = near and any(map(peer_gather.frozen_weights, blocks.values()))
    resharded = STRATEGIES[config.sharding_strategy].resharded
    slots = peer_gather.slot_sizes(list(blocks.values()), resharded=resharded) if with_peers else []
    with_root = with_peers and peer_gather.trains_little(list(blocks.values()))
    reduced = near and not with_root and peer_collectives.reduces(blocks.values(), config, copies=mesh.replicas)
    groups = dict(gathered_with_root=with_root, reduced_by_peers=reduced)
    on_host = offload.whole_embedding(model, config, device=device)
    placed = dict(mesh=mesh, device=device, on_host=on_host, slot_bytes=sum(slots))
    held = budget.resident(model, blocks, config, **placed, **groups)
    available = None if machine.memory is None else machine.memory - CONTEXT
    types = dict(dtype=planned.dtypes.stored, autocast=planned.dtypes.autocast)
    compiled = config.compile and device.type == "cuda" and not config.tile_tokens
    slack = offload.slack_for(config, peers=with_peers)
    here = dict(mesh=mesh, device=device, compiled=compiled, slack=slack, available=available)
    layout = recompute.lay_out(model, blocks, config, held, task=planned.task, measure=measure, **here, **types)
    host = dict(process=HOST, embedding=sum(p.nbytes for p in on_host.values()))
    if offloads(config, device):
        host["activations"] = layout.host_activations
    if mesh is not None and config.use_cpu_offload:
        host[OFFLOADED] = offloaded_bytes(model, blocks, config, on_host=on_host, shards=mesh.shards)
    return Forecast(layout.sizes, {k: v for k, v in host.items() if v}, layout.recomputed, len(blocks))


def offloaded_bytes(model: nn.Module, blocks: dict[str, nn.Module], config, *, on_host: dict, shards: int) -> int:
    """Host memory of a process's rows, the gradients of those that train and the optimizer's states."""
    mesh, cpu = Shards(1, shards), torch.device("cpu")
    flags = dict(mesh=mesh, on_host=on_host, device=cpu, offloaded=False)
    held = budget.resident(model, blocks, config, **flags)
    return held.base + held.learned + held.optimizer
