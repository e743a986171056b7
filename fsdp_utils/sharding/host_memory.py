"""Host memory for parameters that live there between uses."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fsdp_utils.core.rows import local

LARGEST_PIECE = 2**32  # of HostMemory


class HostMemory:
    """Host memory for many tensors, page-locked if a GPU reads it, in a few large pieces.

    torch's pinned allocator rounds every tensor up to a power of two: 2 GiB per process of a 70B on two. The pieces are
    powers of two themselves, at most LARGEST_PIECE.
    """

    def __init__(self, nbytes: int, *, pinned: bool):
        self.left, self.pinned = nbytes, pinned
        self.pieces: list[torch.Tensor] = []  # what is free of each

    @staticmethod
    def aligned(nbytes: int) -> int:
        return -(-nbytes // 256) * 256

    def empty(self, tensor: torch.Tensor) -> torch.Tensor:
        """Memory for a tensor shaped like this one."""
        size = self.aligned(tensor.nbytes)
        at = next((i for i, piece in enumerate(self.pieces) if len(piece) >= size), None)
        if at is None:
            at = len(self.pieces)
            largest = 1 << (max(self.left, 1).bit_length() - 1)  # the largest power of two that will be used up
            self.pieces.append(self._piece(max(min(largest, LARGEST_PIECE), size)))
        self.left -= size
        mine, self.pieces[at] = self.pieces[at][: tensor.nbytes], self.pieces[at][size:]
        return mine.view(tensor.dtype).view(tensor.shape)

    def _piece(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.pinned)


def in_host_memory(model: nn.Module, *, pinned: bool):
    """What gives each parameter on meta its place in one HostMemory; everything else is left as it is."""
    rows = {id(p): local(p) for p in model.parameters() if local(p).is_meta}
    memory = HostMemory(sum(HostMemory.aligned(t.nbytes) for t in rows.values()), pinned=pinned)

    def place(tensor):
        if id(tensor) not in rows or not local(tensor).is_meta:  # a tied parameter comes twice
            return tensor
        mine = memory.empty(local(tensor))
        # as FSDP2 does: DTensor.from_local would move the rows to the GPUs of the mesh
        return DTensor(mine, tensor._spec, requires_grad=False) if isinstance(tensor, DTensor) else mine

    return place
