"""One training step: the micro-step (forward and backward of a micro-batch) and the optimizer step around it.

Small micro-batches are replayed as CUDA graphs, one launch instead of thousands: a step of a few hundred tokens keeps
the GPU busy for less time than the host needs to launch it.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch

from fsdp_utils.core.errors import Diverged
from fsdp_utils.core.processes import all_reduce_each, sum_over_processes
from fsdp_utils.core.ranks import world_size
from fsdp_utils.data.batches import Batches, predicting_tokens
from fsdp_utils.memory.graphs import graph_tokens
from fsdp_utils.sharding import fsdp
from fsdp_utils.sharding.mesh import shard_group
from fsdp_utils.sharding.prepared import Prepared
from fsdp_utils.training.clock import Compiling
from fsdp_utils.training.expert_load import ExpertLoad
from fsdp_utils.training.in_backward import StepInBackward
from fsdp_utils.training.optim import (
    LocalParameters,
    LossScaler,
    StochasticAdamW,
    clip_,
    global_norm,
    make_optimizer,
    place_state,
)
from methods.dropout import DropoutSeeds

CAPTURE_AFTER = 8  # micro-batches run one operator after the other, for each capture after the first
MAX_GRAPHS = 16  # different shapes; padding to multiples keeps them few
TARGETS_MULTIPLE = 256

Batch = dict[str, torch.Tensor]


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: Batch
    loss: torch.Tensor


class MicroStep:
    """Adds `weight * d loss_sum / d p` to the gradient of every trained parameter.

    With graphs, batches of a shape run as they are until one of them compiled nothing, the next is captured, and from
    then on the shape is replayed. Gradients must then be zeroed in place, never dropped.

    Args:
        loss_of: a batch to its summed loss, a scalar with a graph.
        autocast: dtype or None.
        graph_tokens: the most tokens of a batch that is captured; 0 for none.
        made: how often something was compiled so far.

    Attributes:
        before_backward: is shown the summed loss between forward and backward; None: nobody asks.
    """

    def __init__(
        self,
        loss_of: Callable[[Batch], torch.Tensor],
        *,
        device: torch.device,
        autocast: torch.dtype | None = None,
        graph_tokens: int = 0,
        made: Callable[[], int] = int,
    ):
        self.before_backward: Callable[[torch.Tensor], None] | None = None
        self.loss_of, self.device, self.autocast, self.graph_tokens = loss_of, device, autocast, graph_tokens
        self.made = made
        self.captured: dict[tuple, _Captured] = {}
        self.seen: set[tuple] = set()
        self.run = 0  # micro-batches that no graph ran
        self.pool = torch.cuda.graph_pool_handle() if self.graphs else None
        self.weight = torch.ones((), device=device)

    @property
    def graphs(self) -> bool:
        return self.graph_tokens > 0

    @property
    def affordable(self) -> int:
        """How many captures are worth their time by now: where every batch has another shape, as with many lengths,
        they would take longer than they save."""
        return min(MAX_GRAPHS, 1 + self.run // CAPTURE_AFTER)

    @property
    def targets_multiple(self) -> int:
        """What the number of targets of a micro-batch should be a multiple of."""
        return TARGETS_MULTIPLE if self.graphs else 1

    def __call__(self, batch: Batch, weight: float) -> torch.Tensor:
        """The summed loss, fp32 scalar; valid until the next call. `batch` may still be on the CPU."""
        self.weight.fill_(weight)
        key = tuple((name, tuple(tensor.shape)) for name, tensor in sorted(batch.items()))
        if key in self.captured:
            return self._replay(self.captured[key], batch)
        batch = self.moved(batch)
        self.run += 1
        small = batch["input_ids"].numel() <= self.graph_tokens and len(self.captured) < self.affordable
        if small and key in self.seen:
            return self._capture(key, batch)
        made = self.made()
        loss = self._run(batch)
        if self.made() == made:  # nothing can be compiled while a graph is recorded
            self.seen.add(key)
        return loss

    def moved(self, batch: Batch) -> Batch:
        """The batch on the device."""
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def in_autocast(self):
        """The context in which the model computes."""
        return torch.autocast(self.device.type, self.autocast) if self.autocast else nullcontext()

    def loss_sum(self, batch: Batch) -> torch.Tensor:
        """The summed loss of a batch on the device, with its graph."""
        with self.in_autocast():
            return self.loss_of(batch)

    def look(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The summed loss of a batch on the device, and the sums that a task's metrics follow from, `[n]`; by one
        forward pass."""
        looks = getattr(self.loss_of, "look", None)
        with self.in_autocast():
            return looks(batch) if looks else (self.loss_of(batch), torch.zeros(0, device=self.device))

    def _run(self, batch: Batch) -> torch.Tensor:
        loss = self.loss_sum(batch)
        if self.before_backward:
            self.before_backward(loss.detach())
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


class StepResult(NamedTuple):
    """What became of an optimizer step."""

    loss: float  # per token of the global batch
    grad_norm: float  # before clipping, over all processes
    tokens: int  # of the global batch, in the loss
    stepped: bool  # false where fp16 overflowed, and the step was skipped
    votes: list[float]  # sums over all processes
    compiled: bool  # some process compiled or captured, so that its time measures nothing else
    experts: dict[str, float]  # how evenly they were used: `expert_load.ExpertLoad`; empty without experts


class LossSum(NamedTuple):
    """Of all processes."""

    total: float
    tokens: int
    sums: torch.Tensor | None = None  # fp64 `[n]`, what the task's metrics follow from

    @property
    def mean(self) -> float:
        return self.total / max(self.tokens, 1)


class TrainStep:
    """Optimizer steps of a prepared model: forward and backward of each micro-batch, clipping, the optimizer.

    `step(micro_batches, lr=…)` takes one; `step.loss(batch)` only looks; the state of both is in `state_dict`.
    """

    def __init__(self, prepared: Prepared, config, *, task):
        fsdp.leave_sharded(prepared)  # a forward pass without backward may have left it whole
        self.prepared, self.model, self.device = prepared, prepared.model.train(), prepared.device
        self.compiling, self.expert_load = Compiling(), ExpertLoad(self.model, device=self.device)
        self.micro_step = MicroStep(
            task.loss(self.model, fused=prepared.fused_loss, **prepared.sharing),
            device=self.device,
            autocast=prepared.autocast,
            # a mask of padding makes transformers look at it on the host
            graph_tokens=task.causal and graph_tokens(self.model, config, mesh=prepared.mesh, device=self.device),
            made=lambda: self.compiling.count,
        )
        self.trained = LocalParameters(self.model, keep_gradients=self.micro_step.graphs)
        self.optimizer = make_optimizer(config, self.trained)
        self.in_backward = None
        if config.optimizer_in_backward:
            self.in_backward = StepInBackward(self.trained, self.optimizer, device=self.device)
            self.micro_step.before_backward = self.in_backward.look_at
        self.scaler = LossScaler(config.precision == "fp16_autocast")
        self.dropout = DropoutSeeds(self.model, device=self.device)
        self.group = None if prepared.mesh is None else shard_group(prepared.mesh)
        self.clip_to = config.grad_norm if config.apply_gradient_clipping else None
        self.no_sync, self.taken, self.votes, self.task = config.no_sync, 0, [], task

    def __call__(self, micro_batches: list[Batch], *, lr: float, votes: Sequence[float] = ()) -> StepResult:
        """One step. Collective.

        Args:
            votes: numbers of this process, summed over all beside the tokens: what they have to agree on.

        Raises:
            Diverged: loss or gradient is no number, and it is not the loss scale's fault; no parameter has changed, but
                for a gradient with --optimizer_in_backward.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._turn("train")
        take = self._step_in_backward if self.in_backward else self._step_after_backward
        return take(micro_batches, votes=votes)

    def _turn(self, mode: str) -> None:
        """An optimizer that averages: parameters are the average between steps, to look at and to keep, and in a step
        where its gradient is taken. Each step turns both ways, so that whoever looks between changes nothing."""
        turn = getattr(self.optimizer, mode, None)
        if turn:
            fsdp.leave_sharded(self.prepared)
            self.trained.collect_gradients()  # where rows are today
            turn()
            self.prepared.method.after_step(self.model, device=self.device)

    def _end(self) -> None:
        """Of a step, as soon as nothing changes any more."""
        self._turn("eval")
        fsdp.gather_ahead(self.prepared)

    def _step_after_backward(self, micro_batches: list[Batch], *, votes: Sequence[float]) -> StepResult:
        total, tokens = self.backward(micro_batches, votes=votes)
        gradients = self.trained.collect_gradients()
        self.scaler.unscale_(gradients)
        norm = global_norm(gradients, group=self.group, device=self.device)
        ahead = isinstance(self.optimizer, StochasticAdamW)
        if ahead:  # the host need not wait for the GPU here: what diverged is not stepped on, and then nobody goes on
            self.optimizer.unless = norm + 0 * total.float()
            self._update(gradients, norm)
            self._end()
        loss, value = self._checked(total, tokens, norm)
        finite = math.isfinite(value)
        if not ahead:
            if finite:
                self._update(gradients, norm)
            self._end()
        self.taken += 1
        self.scaler.update(finite)
        self.trained.zero_grad()
        return StepResult(loss, value, tokens, finite, self.votes, self._has_compiled(), self.expert_load.take())

    def _step_in_backward(self, micro_batches: list[Batch], *, votes: Sequence[float]) -> StepResult:
        with self.in_backward.stepping():
            total, tokens = self.backward(micro_batches, votes=votes)
        norm = self.in_backward.norm(group=self.group)
        self.prepared.method.after_step(self.model, device=self.device)
        self._end()
        loss, value = self._checked(total, tokens, norm)
        self.taken += 1
        return StepResult(loss, value, tokens, True, self.votes, self._has_compiled(), self.expert_load.take())

    def _checked(self, total: torch.Tensor, tokens: int, norm: torch.Tensor) -> tuple[float, float]:
        """Loss per token and gradient norm; waits for the GPU.

        Raises:
            Diverged: see `__call__`.
        """
        loss, value = self.mean_loss(total, tokens), norm.item()
        # too large a scale overflows gradients, never the loss
        if not math.isfinite(loss) or not (math.isfinite(value) or self.scaler.can_shrink):
            changed = self.in_backward and math.isfinite(loss)
            lost = "; some parameters have taken this step: go on from the last checkpoint" if changed else ""
            raise Diverged(
                f"step {self.taken + 1}: loss {loss}, gradient norm {value}; lower --lr or check the data{lost}"
            )
        return loss, value

    def batches(self, batches: Batches) -> Batches:
        """The same samples in the shapes that suit this device: compiled blocks, matrix units and CUDA graphs like few,
        even ones."""
        if self.device.type != "cuda":
            return batches
        # rows of which each is nearly full had better be of one length
        multiple = batches.context_length if batches.packing else math.lcm(64, batches.multiple)
        shape = dict(multiple=multiple, fewest=batches.batch_size, targets_multiple=self.micro_step.targets_multiple)
        return replace(batches, **shape)

    def backward(self, micro_batches: list[Batch], *, votes: Sequence[float] = ()) -> tuple[torch.Tensor, int]:
        """Adds the gradients of the mean loss of the global batch. Returns its summed loss, fp64 scalar on the device,
        and its tokens. Collective."""
        self.made = self._made()
        tokens, *self.votes = all_reduce_each([sum(map(predicting_tokens, micro_batches)), *votes], self.device)
        tokens = int(tokens)
        total = torch.zeros((), device=self.device)
        for i, batch in enumerate(micro_batches, 1):
            fsdp.prepare_backward(self.prepared, last=i == len(micro_batches), no_sync=self.no_sync)
            self.dropout.draw()
            # gradient = d/dp (sum over ranks and micro-batches of loss_sum) / tokens; FSDP2 divides by world_size
            total += self.micro_step(batch, self.scaler.scale * world_size() / max(tokens, 1))
        # filled, not copied from the host, which would wait for the GPU
        made = total.new_full((), self._made() - self.made, dtype=torch.float64)
        total, self.made_by_all = sum_over_processes(torch.stack([total.double(), made]))
        return total, tokens

    def _made(self) -> int:
        """How much has been compiled and captured in this process."""
        return self.compiling.count + len(self.micro_step.captured)

    def _has_compiled(self) -> bool:
        """Whether anything was in this step: in backward of any process, or since in this one. Waits for the GPU."""
        return bool(self.made_by_all.item()) or self._made() > self.made

    def _set_rate(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def _update(self, gradients: list[torch.Tensor], norm: torch.Tensor) -> None:
        if self.clip_to is not None:
            clip_(gradients, norm, self.clip_to)
        self.optimizer.step()
        self.prepared.method.after_step(self.model, device=self.device)

    def mean_loss(self, total: torch.Tensor, tokens: int) -> float:
        """Per token of the global batch, from what `backward` returned; waits for the GPU."""
        return LossSum(total.item(), tokens).mean

    @contextmanager
    def _looking(self):
        """Eval mode without gradients; afterwards all is as a step left it."""
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train()
            fsdp.leave_sharded(self.prepared)
            fsdp.gather_ahead(self.prepared)

    def loss(self, batch: Batch) -> LossSum:
        """The loss of a batch, each process its own; nothing is learned from it. Collective."""
        return self.loss_over([batch])

    def loss_over(self, batches: Iterable[Batch]) -> LossSum:
        """`loss` of batches, as many on each process."""
        found, tokens = 0, 0
        with self._looking():
            for batch in batches:
                loss, sums = self.micro_step.look(self.micro_step.moved(batch))
                found = found + torch.cat([loss.view(1).double(), sums.double()])
                tokens += predicting_tokens(batch)
        found = sum_over_processes(torch.cat([found, found.new_tensor([tokens])]))
        total, *_, tokens = found.tolist()
        return LossSum(total, int(tokens), found[1:-1])

    def predictions(self, ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of one sample, as `task.predictions`; nothing is learned from it. Every process must call it."""
        with self._looking(), self.micro_step.in_autocast():
            return self.task.predictions(self.model, ids.to(self.device), labels.to(self.device))

    def close(self) -> None:
        """Makes every parameter this process's rows again."""
        self.compiling.close()
        fsdp.leave_sharded(self.prepared)

    def state_dict(self) -> dict:
        """What a run needs besides its trained parameters to go on exactly: the optimizer's state by the parameters'
        names, of this process's rows; the loss scale; the number of steps. Random states are the process's, and what a
        method derives from parameters (DoRA's norms) follows from `Method.after_step`: see `folders.checkpoints`."""
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        state = {name: self.optimizer.state.get(p, {}) for name, p in self._named()}
        return dict(optimizer=dict(state=state, groups=groups), scaler=self.scaler.state_dict(), taken=self.taken)

    def load_state_dict(self, state: dict) -> None:
        """As `state_dict` gave it, on any device."""
        for group, saved in zip(self.optimizer.param_groups, state["optimizer"]["groups"], strict=True):
            group.update({k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})
        # not by the optimizer's load_state_dict, which casts states to the dtype of their parameter
        for name, p in self._named():
            saved = state["optimizer"]["state"].get(name)
            if saved:
                self.optimizer.state[p] = {key: place_state(self.optimizer, value, p) for key, value in saved.items()}
        self.scaler.load_state_dict(state["scaler"])
        self.taken = state["taken"]

    def _named(self):
        return zip(self.trained.names, self.trained.plain, strict=True)
