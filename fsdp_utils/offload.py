"""Keeps the inputs of checkpointed blocks in host memory between forward and backward."""

from collections.abc import Callable

import torch


def _pack(tensor: torch.Tensor):
    """Hidden states go to pinned host memory; weights, masks and position embeddings (shared by all blocks) stay."""
    if tensor.grad_fn is None or tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor.detach(), non_blocking=True)
    return tensor.device, host


def _unpack(saved):
    if isinstance(saved, torch.Tensor):
        return saved
    device, host = saved
    return host.to(device, non_blocking=True)


def offload_inputs(forward: Callable) -> Callable:
    """Wraps a checkpointed block's forward: what it saves for backward waits in host memory."""

    def offloaded(*args, **kwargs):
        with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
            return forward(*args, **kwargs)

    return offloaded
