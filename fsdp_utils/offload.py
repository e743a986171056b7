"""Keeps the inputs of checkpointed blocks in host memory between forward and backward."""

from contextlib import contextmanager

import torch


@contextmanager
def offload_block_inputs(enabled: bool):
    """Inside, tensors saved for backward that carry a gradient (the hidden states) move to host memory.

    Masks and position embeddings are shared by all blocks and stay where they are.
    """
    if not enabled:
        yield
        return

    def pack(tensor):
        if not tensor.requires_grad or isinstance(tensor, torch.nn.Parameter):
            return tensor
        if tensor.device.type == "cpu":
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor.detach(), non_blocking=True)
        return tensor.device, host

    def unpack(saved):
        if isinstance(saved, torch.Tensor):
            return saved
        device, host = saved
        return host.to(device, non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
