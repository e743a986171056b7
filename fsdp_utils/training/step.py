"""Forward and backward of a micro-batch; small ones are replayed as CUDA graphs, one launch instead of thousands.

A step of a few hundred tokens keeps the GPU busy for less time than the host needs to launch it.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import nn

from fsdp_utils.memory.graphs import graph_tokens
from fsdp_utils.model.assemble import PRECISIONS
from fsdp_utils.training.loss import CausalLMLoss

MAX_GRAPHS = 16  # different shapes; padding to multiples keeps them few
TARGETS_MULTIPLE = 256

Batch = dict[str, torch.Tensor]


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: Batch
    loss: torch.Tensor


class MicroStep:
    """Adds `weight * d loss_sum / d p` to the gradient of every trained parameter.

    With graphs, the first batch of a shape runs as it is (kernels are compiled then), the second is captured, and
    from then on the shape is replayed. Gradients must then be zeroed in place, never dropped.

    Args:
        loss_sum_of: a batch to its summed loss, a scalar with a graph.
        autocast: dtype or None.
        graph_tokens: the most tokens of a batch that is captured; 0 for none.
    """

    def __init__(
        self,
        loss_sum_of: Callable[[Batch], torch.Tensor],
        *,
        device: torch.device,
        autocast: torch.dtype | None = None,
        graph_tokens: int = 0,
    ):
        self.loss_sum_of, self.device, self.autocast, self.graph_tokens = loss_sum_of, device, autocast, graph_tokens
        self.captured: dict[tuple, _Captured] = {}
        self.seen: set[tuple] = set()
        self.pool = torch.cuda.graph_pool_handle() if self.graphs else None
        self.weight = torch.ones((), device=device)

    @property
    def graphs(self) -> bool:
        return self.graph_tokens > 0

    @property
    def targets_multiple(self) -> int:
        """What `with_targets` is to bring the number of targets to."""
        return TARGETS_MULTIPLE if self.graphs else 1

    def __call__(self, batch: Batch, weight: float) -> torch.Tensor:
        """The summed loss, fp32 scalar; valid until the next call. `batch` may still be on the CPU."""
        self.weight.fill_(weight)
        key = tuple((name, tuple(tensor.shape)) for name, tensor in sorted(batch.items()))
        if key in self.captured:
            return self._replay(self.captured[key], batch)
        batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        small = batch["input_ids"].numel() <= self.graph_tokens and len(self.captured) < MAX_GRAPHS
        if small and key in self.seen:
            return self._capture(key, batch)
        self.seen.add(key)
        return self._run(batch)

    def _run(self, batch: Batch) -> torch.Tensor:
        with torch.autocast(self.device.type, self.autocast) if self.autocast else nullcontext():
            loss = self.loss_sum_of(batch)
        with torch.autograd.set_multithreading_enabled(False):  # another thread has a cuBLAS workspace of its own
            loss.backward(self.weight.to(loss.dtype))
        return loss.detach()

    def _capture(self, key: tuple, batch: Batch) -> torch.Tensor:
        graph = torch.cuda.CUDAGraph()
        # thread_local: threads that read data or log may use CUDA meanwhile
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            loss = self._run(batch)
        self.captured[key] = _Captured(graph, batch, loss)
        graph.replay()
        return loss

    @staticmethod
    def _replay(captured: _Captured, batch: Batch) -> torch.Tensor:
        for name, tensor in batch.items():
            captured.inputs[name].copy_(tensor, non_blocking=True)
        captured.graph.replay()
        return captured.loss


def micro_step(model: nn.Module, config, *, mesh, device: torch.device) -> MicroStep:
    """The step of a run."""
    return MicroStep(
        CausalLMLoss(model, fused=config.fused_loss),
        device=device,
        autocast=PRECISIONS[config.precision][1],
        graph_tokens=graph_tokens(model, config, mesh=mesh, device=device),
    )
