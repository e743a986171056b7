"""Optimizers, which step on the rows that this process holds, and what belongs to a step of theirs."""

import torch
import torch.distributed as dist
from torch import nn

from fsdp_utils.core.classes import load_class
from fsdp_utils.core.rows import local, row_range
from fsdp_utils.options import OPTIMIZERS, SCHEDULES
from methods.kernels import adamw


class StochasticAdamW(torch.optim.Optimizer):
    """torch's AdamW for bf16 parameters, rounded at random: see `methods.kernels.adamw`.

    Args:
        places: of each parameter, its number in the model and the number of its first element here.

    Attributes:
        unless: fp32 scalar on the device; where it is no number, a step changes nothing. None: not asked.

    Raises:
        ValueError: a parameter is not bf16, and would lose bits that it has, or has gaps between its elements.
    """

    def __init__(self, params: list[nn.Parameter], places: list[tuple[int, int]], *, lr: float, wd: float, seed: int):
        if not all(p.dtype == torch.bfloat16 and p.is_contiguous() for p in params):
            raise ValueError("StochasticAdamW: trains contiguous bf16 parameters")
        # the number of steps is part of the state: without it a resumed run would draw other random bits
        super().__init__(params, dict(lr=lr, weight_decay=wd, betas=(0.9, 0.999), eps=1e-8, steps=0))
        self.places, self.seed, self.unless = dict(zip(params, places, strict=True)), seed, None
        self.step_kernel = adamw.StepKernel()

    @torch.no_grad()
    def step(self, closure=None):
        (group,) = self.param_groups
        group["steps"] += 1
        numbers = group["lr"], group["weight_decay"], *group["betas"], group["eps"], group["steps"]
        step = adamw.Step(*numbers, self.seed, self.unless)
        rows = []
        for p in group["params"]:
            if p.grad is not None:
                state = self.state[p]
                if not state:
                    state.update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                rows.append(adamw.Row(p, p.grad, state["exp_avg"], state["exp_avg_sq"], *self.places[p]))
        if rows:
            run = self.step_kernel if adamw.triton is not None and rows[0].weight.is_cuda else adamw.step_plain
            run(rows, step)


def make_optimizer(config, trained: "LocalParameters") -> torch.optim.Optimizer:
    """That of `--optimizer`."""
    own = OPTIMIZERS[config.optimizer].own
    if own:
        return load_class(own)(config, trained)
    if config.rounds_stochastically:
        return StochasticAdamW(trained.plain, trained.places, lr=config.lr, wd=config.wd, seed=config.seed)
    return stock_optimizer(config, trained.plain)


def stock_optimizer(config, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The library's class behind `--optimizer`, on plain parameters."""
    row = OPTIMIZERS[config.optimizer]
    return load_class(row.target)(parameters, lr=config.lr, weight_decay=config.wd, **(row.settings or {}))


def schedule_factor(name: str, step: int, *, total: int, warmup_ratio: float) -> float:
    """The factor of the peak learning rate for 0-based optimizer step `step` of `total`."""
    warmup = 0 if name == "constant" else int(total * warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    return SCHEDULES[name]((step - warmup) / max(total - warmup, 1))


class LocalParameters:
    """The trained parameters as plain tensors that share the memory of this process's rows.

    Every optimizer offered works element by element, so it never needs to know that a parameter is sharded;
    bitsandbytes' refuse sharded ones, and torch's are slower on them.

    Args:
        keep_gradients: zero_grad writes zeros, so that the memory of gradients stays where a CUDA graph found it.
    """

    def __init__(self, model: nn.Module, *, keep_gradients: bool = False):
        self.model, self.keep_gradients = model, keep_gradients
        numbered = enumerate(model.named_parameters())
        trained = [(number, name, p) for number, (name, p) in numbered if p.requires_grad and local(p).numel()]
        self.names = [name for _, name, _ in trained]
        self.sharded = [p for *_, p in trained]
        self.plain = [nn.Parameter(local(p).detach()) for p in self.sharded]
        # for the optimizer that asks: a parameter's number, and that of its first element here
        self.places = [(number, row_range(p)[0] * p.shape[1:].numel()) for number, _, p in trained]

    def follow(self, place: int) -> nn.Parameter:
        """The plain tensor of one, pointed at today's rows and gradient."""
        sharded, plain = self.sharded[place], self.plain[place]
        plain.data = local(sharded).detach()  # FSDP2 moves rows once, before the first forward (pinning, padding)
        plain.grad = None if sharded.grad is None else local(sharded.grad)
        return plain

    def collect_gradients(self) -> list[torch.Tensor]:
        """Points the plain tensors at today's rows and gradients; returns the gradients."""
        followed = map(self.follow, range(len(self.plain)))
        return [p.grad for p in followed if p.grad is not None]

    def drop_gradient(self, place: int) -> None:
        self.sharded[place].grad = self.plain[place].grad = None

    def zero_grad(self) -> None:
        if self.keep_gradients:
            torch._foreach_zero_([p.grad for p in self.plain if p.grad is not None])
            return
        for place in range(len(self.plain)):
            self.drop_gradient(place)


def norms_of(gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    """The 2-norm of each, fp32 scalars."""
    # in fp32: fp16 would overflow, and bf16 norms would have to be converted one by one
    return list(torch._foreach_norm(gradients, dtype=torch.float32)) if gradients else []


def place_state(optimizer: torch.optim.Optimizer, value, parameter: torch.Tensor):
    """A value of a parameter's state, read from a file, where the optimizer wants it: tensors beside the parameter or,
    if it pages them, in such memory; numbers on the host, unless a fused optimizer counts on the device."""
    if not isinstance(value, torch.Tensor) or (value.dim() == 0 and not optimizer.param_groups[0].get("fused")):
        return value
    if getattr(optimizer, "is_paged", False) and value.shape == parameter.shape:
        return optimizer.get_state_buffer(parameter, dtype=value.dtype).copy_(value)
    return value.to(parameter.device)


def global_norm(gradients: list[torch.Tensor], *, group, device: torch.device) -> torch.Tensor:
    """The 2-norm over all rows of all processes, fp32 scalar; `group` together holds each row once."""
    return combined_norm(norms_of(gradients), group=group, device=device)


def combined_norm(norms: list[torch.Tensor], *, group, device: torch.device) -> torch.Tensor:
    """`global_norm` from `norms_of` gradients."""
    squared = torch.zeros((), device=device)
    if norms:
        squared = torch.stack(norms).square().sum().to(device)
    if group is not None:
        dist.all_reduce(squared, group=group)
    return squared.sqrt()


def clip_(gradients: list[torch.Tensor], norm: torch.Tensor, limit: float) -> None:
    """Scales gradients of this global norm down to `limit`, where it is larger; does not wait for the GPU."""
    if gradients:
        torch._foreach_mul_(gradients, (limit / norm).clamp_max(1).to(gradients[0].device))


class LossScaler:
    """Scales the loss so that small fp16 gradients survive; skips steps that overflow. Every process decides alike,
    because it looks at the global norm."""

    def __init__(self, enabled: bool, *, start: float = 2.0**15, growth_interval: int = 1000):
        self.scale = start if enabled else 1.0
        self.enabled, self.growth_interval, self.good_steps = enabled, growth_interval, 0

    @property
    def can_shrink(self) -> bool:
        """Whether an overflow may be the scale's fault. At 1 it is not: then the model diverged."""
        return self.enabled and self.scale > 1

    def unscale_(self, gradients: list[torch.Tensor]) -> None:
        if self.enabled and gradients:
            torch._foreach_mul_(gradients, 1 / self.scale)

    def state_dict(self) -> dict:
        return dict(scale=self.scale, good_steps=self.good_steps)

    def load_state_dict(self, state: dict) -> None:
        self.scale, self.good_steps = state["scale"], state["good_steps"]

    def update(self, finite: bool) -> None:
        """Halves the scale after an overflow, doubles it after `growth_interval` good steps."""
        if not self.enabled:
            return
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.scale = max(self.scale / 2, 1.0)
        elif self.good_steps == self.growth_interval:
            self.scale, self.good_steps = self.scale * 2, 0
