"""Keeps the inputs of checkpointed blocks in host memory between forward and backward, beside the computation.

Copies run on a stream of their own. In backward, the input of the block before is fetched while a block recomputes.
"""

from collections.abc import Callable

import torch


class InputOffloader:
    """One per model. Blocks call `pack` in order during forward and `unpack` in reverse during backward."""

    def __init__(self):
        self.stream = torch.cuda.Stream()
        self.hosts, self.fetched, self.count = {}, {}, 0

    def pack(self, tensor: torch.Tensor):
        """Hidden states go to pinned host memory; weights, masks and position embeddings (shared by all) stay."""
        if tensor.grad_fn is None or tensor.device.type == "cpu":
            return tensor
        if not self.hosts:
            self.count = 0
        number, self.count = self.count, self.count + 1
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            host.copy_(tensor.detach(), non_blocking=True)
        tensor.record_stream(self.stream)  # its memory may be reused only after the copy
        self.hosts[number] = (tensor.device, host)
        return number

    def _fetch(self, number: int) -> None:
        if number not in self.hosts or number in self.fetched:
            return
        device, host = self.hosts[number]
        with torch.cuda.stream(self.stream):
            copy = host.to(device, non_blocking=True)
        self.fetched[number] = (copy, self.stream.record_event())

    def unpack(self, saved):
        if isinstance(saved, torch.Tensor):
            return saved
        self._fetch(saved)
        copy, done = self.fetched.pop(saved)
        self._fetch(saved - 1)
        torch.cuda.current_stream().wait_event(done)
        copy.record_stream(torch.cuda.current_stream())
        del self.hosts[saved]
        return copy

    def wrap(self, forward: Callable) -> Callable:
        """A checkpointed block's forward whose saved input waits in host memory."""

        def offloaded(*args, **kwargs):
            with torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack):
                return forward(*args, **kwargs)

        return offloaded
