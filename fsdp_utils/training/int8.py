"""`--optimizer adamw_int8`: AdamW with 8-bit states that any number of processes can go on with."""

import torch
from torch import nn

from fsdp_utils.training.optim import LocalParameters
from methods.kernels import adamw
from methods.kernels.adamw_int8 import blocks_of, step_row, update


class AdamWInt8(torch.optim.Optimizer):
    """AdamW whose moments are codes: see `methods.kernels.adamw_int8`. Vectors keep theirs in fp32: they are small, and
    a row of theirs is one element. bf16 weights are rounded at random.

    Args:
        places: of each parameter, its number in the model and the number of its first element here.
        compiled: makes one kernel of an update (CUDA with Triton).
    """

    by_rows = ("exp_avg_scale", "exp_avg_sq_scale")  # states beside those of the parameter's shape that belong to rows

    def __init__(
        self,
        params: list[nn.Parameter],
        places: list[tuple[int, int]],
        *,
        lr: float,
        wd: float,
        seed: int,
        compiled: bool = False,
    ):
        super().__init__(params, dict(lr=lr, weight_decay=wd, betas=(0.9, 0.999), eps=1e-8, steps=0))
        self.places, self.seed = dict(zip(params, places, strict=True)), seed
        self.update = torch.compile(update, dynamic=True) if compiled else update

    @torch.no_grad()
    def step(self, closure=None):
        (group,) = self.param_groups
        group["steps"] += 1
        numbers = group["lr"], group["weight_decay"], *group["betas"], group["eps"], group["steps"]
        for p in group["params"]:
            if p.grad is not None:
                self._step(p, adamw.Step(*numbers, self.seed))

    def _step(self, p: nn.Parameter, step: adamw.Step) -> None:
        state = self.state[p]
        if not state:
            state.update(self._start(p))
        row = adamw.Row(p, p.grad, state["exp_avg"], state["exp_avg_sq"], *self.places[p])
        if p.dim() < 2:
            return adamw.step_plain([row], step)
        step_row(
            adamw.Row(*(t.flatten(1) for t in row[:4]), *row[4:]),
            tuple(state[name] for name in self.by_rows),
            step,
            run=self.update,
        )

    def _start(self, p: nn.Parameter) -> dict[str, torch.Tensor]:
        if p.dim() < 2:
            return {name: torch.zeros_like(p, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")}
        scales = torch.zeros(len(p), blocks_of(p.shape[1:].numel()), device=p.device)
        codes = dict(exp_avg=torch.zeros_like(p, dtype=torch.int8), exp_avg_sq=torch.zeros_like(p, dtype=torch.uint8))
        return codes | {name: scales.clone() for name in self.by_rows}


def make(config, trained: LocalParameters) -> AdamWInt8:
    """That of a run."""
    on_gpu = any(p.is_cuda for p in trained.plain)
    compiled = config.compile and on_gpu and torch.utils._triton.has_triton()
    return AdamWInt8(trained.plain, trained.places, lr=config.lr, wd=config.wd, seed=config.seed, compiled=compiled)
