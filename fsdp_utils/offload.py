"""What lives in host memory without slowing the GPU: a frozen embedding, and what checkpointed blocks save."""

from collections import deque
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

AHEAD = 2  # tensors fetched before they are asked for: a block saves at most its input and one output
LEAVING = 2  # tensors whose copy may still be under way while the computation goes on


class _Bytes:
    """Page-locked host memory as numba's CUDA array interface describes it: a GPU reads it at the same address."""

    def __init__(self, pinned: torch.Tensor):
        self.pinned = pinned  # lives as long as the tensor made of this
        interface = dict(shape=(pinned.nbytes,), typestr="|u1", data=(pinned.data_ptr(), False), version=3)
        self.__cuda_array_interface__ = interface


def move_embedding_to_host(model: nn.Module, *, device: torch.device) -> None:
    """Puts a frozen embedding's weight into host memory; it stays a CUDA tensor to all who use it.

    The rows of a micro-batch, a few megabytes, then come over the bus. Nothing is done where the weight trains, is
    the head's too, or is packed.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    weight = getattr(embedding, "weight", None)
    if weight is None or weight.requires_grad or weight is getattr(head, "weight", None):
        return
    pinned = torch.empty(weight.shape, dtype=weight.dtype, pin_memory=True)
    rows = torch.as_tensor(_Bytes(pinned), device=device).view(weight.dtype).view(weight.shape)
    embedding.weight = nn.Parameter(rows, requires_grad=False)
    embedding.on_host = True


class InputOffloader:
    """Keeps what checkpointed blocks save in host memory between forward and backward, beside the computation.

    One per model. Blocks call `pack` in order during forward and `unpack` in reverse during backward. Copies run on a
    stream of their own; what the block before saved is fetched while a block recomputes.

    Tensors are handed back to the allocator only once the computation is known to wait for their copy. (With
    `record_stream` the allocator would wait for the copy itself: the host runs so far ahead that it would find nothing
    free, and take new memory as if nothing had left.)
    """

    def __init__(self):
        self.stream = torch.cuda.Stream()
        self.hosts, self.leaving, self.fetched, self.count, self.wrapped = {}, deque(), {}, 0, False

    @staticmethod
    def is_state(tensor: torch.Tensor, *, elements: int, width: int) -> bool:
        """Whether a tensor is as large as the hidden states, and no weight."""
        return tensor.numel() == elements and tensor.shape[-1] == width and not isinstance(tensor, nn.Parameter)

    def pack(self, tensor: torch.Tensor, *, elements: int, width: int):
        """What is as large as the hidden states goes to pinned host memory: the block's input, and outputs that its
        policy keeps. Weights, masks and position embeddings stay."""
        if not self.is_state(tensor, elements=elements, width=width) or tensor.device.type == "cpu":
            return tensor
        number, self.count = self.count, self.count + 1
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            host.copy_(tensor.detach(), non_blocking=True)
        self.hosts[number] = (tensor.device, host)
        self.leaving.append((tensor.detach(), self.stream.record_event()))
        while len(self.leaving) > LEAVING:
            _, left = self.leaving.popleft()
            torch.cuda.current_stream().wait_event(left)
        return number

    def _fetch(self, number: int) -> None:
        if number not in self.hosts or number in self.fetched:
            return
        device, host = self.hosts[number]
        copy = torch.empty(host.shape, dtype=host.dtype, device=device)
        self.stream.wait_stream(torch.cuda.current_stream())  # the memory may still be read by what it held before
        with torch.cuda.stream(self.stream):
            copy.copy_(host, non_blocking=True)
        self.fetched[number] = (copy, self.stream.record_event())

    def unpack(self, saved):
        if isinstance(saved, torch.Tensor):
            return saved
        self._finish_leaving()
        self._fetch(saved)
        copy, done = self.fetched.pop(saved)
        for number in range(saved - 1, saved - 1 - AHEAD, -1):
            self._fetch(number)
        torch.cuda.current_stream().wait_event(done)
        del self.hosts[saved]
        return copy

    def _finish_leaving(self) -> None:
        if self.leaving:
            torch.cuda.current_stream().wait_stream(self.stream)
            self.leaving.clear()

    def forget(self) -> None:
        """Drops what a forward pass left that no backward followed."""
        self._finish_leaving()
        self.hosts.clear()
        self.fetched.clear()
        self.count = 0

    def wrap(self, forward: Callable) -> Callable:
        """A checkpointed block's forward whose saved hidden states wait in host memory. Wrap blocks in their order."""
        first, self.wrapped = not self.wrapped, True

        def offloaded(hidden, *args, **kwargs):
            if first:
                self.forget()
            # sizes, not the tensor: autograd keeps this function for as long as what it packed
            pack = partial(self.pack, elements=hidden.numel(), width=hidden.shape[-1])
            with torch.autograd.graph.saved_tensors_hooks(pack, self.unpack):
                return forward(hidden, *args, **kwargs)

        return offloaded
