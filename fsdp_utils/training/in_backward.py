"""`--optimizer_in_backward`: a parameter steps inside backward as soon as its gradient is there, and frees it."""

import math
import weakref
from contextlib import contextmanager
from functools import partial

import torch

from fsdp_utils.core.processes import sum_over_processes
from fsdp_utils.training.optim import LocalParameters, StochasticAdamW, combined_norm, norms_of


def _came(step: weakref.ref, place: int, parameter: torch.Tensor) -> None:
    """What autograd, or FSDP2, calls."""
    if (alive := step()) is not None:
        alive.came(place)


class StepInBackward:
    """The step of each parameter by itself, by the optimizer that would take them all: the same bits.

    Autograd says when all of a parameter's gradient is there, also of one that is used twice; of a sharded one FSDP2
    does, after it was reduced over the processes, on the stream that did it. While others still compute theirs, nothing
    can be undone: a loss that is no number is known before, a gradient that is none only afterwards.

    Args:
        trained, optimizer: of a `TrainStep`, which sets the learning rate before backward.
    """

    def __init__(self, trained: LocalParameters, optimizer: torch.optim.Optimizer, *, device: torch.device):
        self.trained, self.optimizer, self.device = trained, optimizer, device
        self.group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
        self.norms: dict[int, torch.Tensor] = {}  # of the gradients that came, by the parameter's place
        self.numbers, self.steps, self.loss = None, False, None
        for place, parameter in enumerate(trained.sharded):
            # weakly: hooks are out of the garbage collector's sight, and would keep the model for ever
            parameter.register_post_accumulate_grad_hook(partial(_came, weakref.ref(self), place))

    @contextmanager
    def stepping(self):
        """While it lasts, gradients become steps. Afterwards the optimizer has counted one."""
        groups = self.optimizer.param_groups
        parameters = [group["params"] for group in groups]
        self.numbers = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        self.norms.clear()
        try:
            yield
            self._step(None)
        finally:
            self.numbers = None
            for group, own in zip(groups, parameters, strict=True):
                group["params"] = own

    def look_at(self, loss: torch.Tensor) -> None:
        """The summed loss of this process, before backward: no parameter steps if that of all is no number. Collective;
        only StochasticAdamW asks the GPU itself, for others the host waits, as it does without this."""
        total = sum_over_processes(loss.double())
        ahead = isinstance(self.optimizer, StochasticAdamW)
        self.loss, self.steps = total.float(), ahead or math.isfinite(total.item())

    def norm(self, *, group) -> torch.Tensor:
        """`global_norm` of the gradients that came."""
        norms = [self.norms[place] for place in sorted(self.norms)]
        self.norms.clear()
        return combined_norm(norms, group=group, device=self.device)

    @torch.no_grad()
    def came(self, place: int) -> None:
        """All of the gradient of the parameter at this place is there."""
        if self.numbers is None:
            return
        if place in self.norms:
            raise RuntimeError(f"{self.trained.names[place]} has stepped before all of its gradient was there")
        plain = self.trained.follow(place)
        if self.device.type == "cuda" and not plain.grad.is_cuda:
            torch.cuda.current_stream().synchronize()  # its copy to host memory may be under way
        (self.norms[place],) = norms_of([plain.grad])
        if self.steps:
            if isinstance(self.optimizer, StochasticAdamW):
                self.optimizer.unless = self.loss + 0 * self.norms[place]
            self._step(plain)
        self.trained.drop_gradient(place)

    def _step(self, only: torch.nn.Parameter | None) -> None:
        """A step of one parameter, or of none, from the numbers that the optimizer had before backward."""
        for group, numbers in zip(self.optimizer.param_groups, self.numbers, strict=True):
            group.update(numbers)
            group["params"] = []
        if only is not None:
            self.group_of[only]["params"] = [only]
        self.optimizer.step()
