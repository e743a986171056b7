"""What lives in host memory without slowing the GPU: a frozen embedding, and what checkpointed blocks save."""

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn


class _Bytes:
    """Page-locked host memory as numba's CUDA array interface describes it: a GPU reads it at the same address."""

    def __init__(self, pinned: torch.Tensor):
        self.pinned = pinned  # lives as long as the tensor made of this
        interface = dict(shape=(pinned.nbytes,), typestr="|u1", data=(pinned.data_ptr(), False), version=3)
        self.__cuda_array_interface__ = interface


def embedding_for_host(model: nn.Module, config) -> dict[str, nn.Parameter]:
    """The parameters of the embedding, packed or not; none if they train, are another module's too or shall stay where
    the others are."""
    if not config.embedding_on_host:
        return {}
    embedding = model.get_input_embeddings()
    held = dict(embedding.named_parameters(recurse=False))
    return {} if is_shared(model, embedding) or any(p.requires_grad for p in held.values()) else held


def is_shared(model: nn.Module, module: nn.Module) -> bool:
    """Whether another module has the parameters of this one: a head, or the embeddings of an encoder and a decoder."""
    held = {id(p) for p in module.parameters()}
    others = (m for m in model.modules() if m is not module)
    return any(id(p) in held for m in others for p in m._parameters.values())


def whole_embedding(model: nn.Module, config, *, device: torch.device) -> dict[str, nn.Parameter]:
    """What each process of a run holds whole in its host memory, and FSDP2 need not gather: a frozen embedding."""
    return embedding_for_host(model, config) if device.type == "cuda" else {}


def move_embedding_to_host(model: nn.Module, held: dict[str, nn.Parameter], *, device: torch.device) -> None:
    """Makes what `whole_embedding` named in host memory, without values; its tensors are CUDA tensors to all who use
    them. The rows of a micro-batch, a few megabytes, then come over the bus."""
    embedding = model.get_input_embeddings()
    for name, p in held.items():
        pinned = torch.empty(p.shape, dtype=p.dtype, pin_memory=True)
        rows = torch.as_tensor(_Bytes(pinned), device=device).view(p.dtype).view(p.shape)
        setattr(embedding, name, nn.Parameter(rows, requires_grad=False))


class Leaving(NamedTuple):
    """A tensor whose copy to the host may be under way; it is kept until the computation waited for that."""

    block: int
    tensor: torch.Tensor
    copied: torch.cuda.Event


def slack_for(config, *, peers: bool) -> int:
    """How many blocks more may be on their way to the host. Where the GPU copies frozen weights out of its `peers`'
    memory meanwhile, QLoRA has 0.99 of the speed alone in place of 0.98 (four H200s). In 8 bits a block runs forward in
    less time than its states take to the host."""
    return 3 if config.compute == "fp8" else int(peers)


class InputOffloader:
    """Keeps what checkpointed blocks save in host memory between forward and backward, beside the computation.

    One per model. Blocks pack in order during forward and unpack in reverse during backward. Copies run on a stream of
    their own: a block's leave while the next one runs, and come back while the one after it is in backward. The last
    block's stay, since backward begins with it.

    Tensors are handed back to the allocator only once the computation is known to wait for their copy. (With
    `record_stream` the allocator would wait for the copy itself: the host runs so far ahead that it would find nothing
    free, and take new memory as if nothing had left.)

    Args:
        slack: how many blocks before the one that ran last may be on their way to the host.
    """

    def __init__(self, *, slack: int = 0):
        self.slack = slack
        self.stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        self.away: dict[int, list] = {}  # of a block: device and host memory of each tensor it sent
        self.fetched: dict[tuple[int, int], tuple] = {}  # of block and place in that list
        self.leaving, self.blocks = deque(), 0

    @staticmethod
    def is_state(tensor: torch.Tensor, *, elements: int, dtype: torch.dtype) -> bool:
        """Whether a tensor is as large as the hidden states, without gaps, and no weight."""
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        same = tensor.numel() == elements == span and tensor.dtype == dtype
        return same and not isinstance(tensor, nn.Parameter)

    def _send(self, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event]:
        """A copy in pinned host memory, and the event after which it is whole."""
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)  # with the same strides
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            host.copy_(tensor, non_blocking=True)
        return host, self.stream.record_event()

    def _bring(self, host: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.cuda.Event]:
        """A copy on the GPU, and the event after which it is whole."""
        copy = torch.empty_like(host, device=device)
        self.stream.wait_stream(torch.cuda.current_stream())  # the memory may still be read by what it held before
        with torch.cuda.stream(self.stream):
            copy.copy_(host, non_blocking=True)
        return copy, self.stream.record_event()

    @staticmethod
    def _wait(event: torch.cuda.Event) -> None:
        torch.cuda.current_stream().wait_event(event)

    def _let_go(self, *, before: int) -> None:
        """Gives back the GPU memory of what the blocks before this one sent."""
        while self.leaving and self.leaving[0].block < before:
            self._wait(self.leaving.popleft().copied)

    def pack(self, tensor: torch.Tensor, *, block: int, elements: int, dtype: torch.dtype):
        """What is as large as the hidden states goes to the host: a block's input, and outputs that its policy keeps.
        Weights, masks and position embeddings stay."""
        if not self.is_state(tensor, elements=elements, dtype=dtype):
            return tensor
        tensor = tensor.detach()
        self._let_go(before=block - self.slack)
        host, copied = self._send(tensor)
        self.leaving.append(Leaving(block, tensor, copied))
        sent = self.away.setdefault(block, [])
        sent.append((tensor.device, host))
        return len(sent) - 1

    def _fetch_block(self, block: int) -> None:
        for number, (device, host) in enumerate(self.away.pop(block, ())):
            self.fetched[block, number] = self._bring(host, device)

    def unpack(self, saved, *, block: int) -> torch.Tensor:
        self._let_go(before=self.blocks)
        for needed in (block, block - 1):
            self._fetch_block(needed)
        if isinstance(saved, torch.Tensor):
            return saved
        copy, done = self.fetched.pop((block, saved))
        self._wait(done)
        return copy

    def forget(self) -> None:
        """Drops what a forward pass left that no backward followed, or that backward did not ask for."""
        self._let_go(before=self.blocks)
        for _, whole in self.fetched.values():
            self._wait(whole)  # else the copy might still be written to when its memory holds something else
        self.away.clear()
        self.fetched.clear()

    def wrap(self, forward: Callable) -> Callable:
        """A checkpointed block's forward whose saved hidden states wait in host memory. Wrap blocks in their order."""
        block, self.blocks = self.blocks, self.blocks + 1

        def offloaded(hidden, *args, **kwargs):
            if block == 0:
                self.forget()
            # sizes, not the tensor: autograd keeps these functions for as long as what they packed
            size = dict(elements=hidden.numel(), dtype=hidden.dtype)
            pack = partial(self.pack, block=block, **size) if block < self.blocks - 1 else lambda tensor: tensor
            with torch.autograd.graph.saved_tensors_hooks(pack, partial(self.unpack, block=block)):
                return forward(hidden, *args, **kwargs)

        return offloaded
