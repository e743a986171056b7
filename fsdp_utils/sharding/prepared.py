"""A model that is ready to train: what became of it when it was wrapped, sharded and loaded."""

from dataclasses import dataclass, field

import torch
from torch import nn

from fsdp_utils.sharding.peer_collectives import PeerCollectives
from fsdp_utils.sharding.peer_gather import PeerGather


@dataclass(frozen=True)
class Prepared:
    """What `assemble.load` returns.

    Args:
        method: `methods.base.Method`, which refreshes what depends on trained parameters.
        blocks: decoder blocks by their path.
        mesh: the model is sharded over, or None.
        autocast: dtype of products, or None for that of the parameters.
        recomputed: so many blocks, the first ones, run forward again in backward.
        fused_loss: the head computes the loss itself.
        gathered_with_root: what trains in the blocks is one FSDP2 group with the rest of the model, and whole during a
            step; else each block is a group.
        peers: what gathers and reduces in FSDP2's place, where processes reach each other's memory.
        sharing: what attention is told where processes share rows (`model.attention.shared_attention`).
        sizes: bytes of this process's GPU memory by purpose, from `memory.budget`.
        host_activations: bytes of host memory that activations take, from the same numbers.
    """

    model: nn.Module
    method: object
    blocks: dict[str, nn.Module]
    device: torch.device
    mesh: object | None = None
    autocast: torch.dtype | None = None
    recomputed: int = 0
    fused_loss: bool = False
    gathered_with_root: bool = False
    peers: tuple[PeerGather | PeerCollectives, ...] = ()
    sharing: dict = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    host_activations: int = 0

    def forget_frozen(self) -> None:
        """Frozen weights are other ones from now on: whole ones that are kept from block to block are old."""
        for each in self.peers:
            each.forget_frozen()

    def close(self) -> None:
        """Ends what is shared with other processes. Collective, at the end of a run that ends well; else processes end
        at once, and their memory with them."""
        for each in self.peers:
            each.close()
