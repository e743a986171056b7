"""`--optimizer muon`: Muon for the matrices of decoder blocks, AdamW for the rest (embedding, head, norms)."""

import re
from collections import defaultdict

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim._muon import _adjust_lr
from torch.optim._muon import _zeropower_via_newtonschulz as orthogonal

from fsdp_utils.core.errors import UserError
from fsdp_utils.core.rows import gather, row_range
from fsdp_utils.training.optim import LocalParameters, StochasticAdamW
from methods.kernels import adamw

IN_A_BLOCK = re.compile(r"\.\d+\.")


class RowsMuon(torch.optim.Muon):
    """torch's Muon (arXiv:2502.16982) of matrices of which this process holds rows.

    Momentum belongs to rows; only where the update is made orthogonal must the matrix be whole, so its momentum is
    gathered there, and every process makes all of it orthogonal: what comes out does not depend on their number. An
    update is as large as one of AdamW, so rates are AdamW's. bf16 weights are rounded at random.

    Args:
        whole: the sharded parameter of each.
        places: of each, its number in the model and the number of its first element here.
    """

    def __init__(self, params: list[nn.Parameter], *, whole, places, lr: float, wd: float, seed: int):
        super().__init__(params, lr=lr, weight_decay=wd, adjust_lr_fn="match_rms_adamw")
        self.whole, self.places = (dict(zip(params, values, strict=True)) for values in (whole, places))
        self.seed = seed
        for group in self.param_groups:
            group["steps"] = 0  # without it a resumed run would draw other random bits

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["steps"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    self._step(p, group)

    def _step(self, p: nn.Parameter, group: dict) -> None:
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        momentum = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
        update = self._orthogonal(p, p.grad.lerp(momentum, group["momentum"]), group)
        rate = _adjust_lr(group["lr"], group["adjust_lr_fn"], self.whole[p].shape)
        moved = (p.float() * (1 - group["lr"] * group["weight_decay"])).add_(update, alpha=-rate)
        if p.dtype == torch.bfloat16:
            row = adamw.Row(p, p.grad, momentum, momentum, *self.places[p])
            numbers = adamw.Step(group["lr"], group["weight_decay"], 0, 0, 0, group["steps"], self.seed)
            adamw.round_(moved, adamw.random_bits(row, numbers, 0, p.numel()).view(p.shape) & 0xFFFF)
        p.copy_(moved)

    def _orthogonal(self, p: nn.Parameter, update: torch.Tensor, group: dict) -> torch.Tensor:
        """This process's rows of the whole update, made orthogonal."""
        whole = self.whole[p]
        if isinstance(whole, DTensor):
            form = dict(run_check=False, shape=whole.shape, stride=whole.stride())
            update = gather(DTensor.from_local(update, whole.device_mesh, whole.placements, **form))
        made = orthogonal(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
        return made[slice(*row_range(whole))].to(p.device, torch.float32)


class Together:
    """Two optimizers as one: groups and states of both."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers, self.state = optimizers, defaultdict(dict)
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for optimizer in optimizers:
            optimizer.state = self.state

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


def _matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """What Muon trains, by name: all that is 2-D in the blocks. Rows of embedding and head are of single tokens or
    classes; these, and what else is in no numbered block, as a classifier's pooler, have AdamW.

    Raises:
        UserError: one has so few rows that a process holds none, and could not take part in gathering it.
    """
    trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad and p.dim() == 2)
    found = {name: p for name, p in trained if IN_A_BLOCK.search(name)}
    for name, p in found.items():
        shards = p.device_mesh.size(p.device_mesh.ndim - 1) if isinstance(p, DTensor) else 1
        if -(-len(p) // shards) * (shards - 1) >= len(p):
            raise UserError(f"--optimizer muon: {name} has {len(p)} rows, too few for {shards} processes; use adamw")
    return found


def make(config, trained: LocalParameters) -> Together:
    """That of a run.

    Raises:
        UserError: see `_matrices`.
    """
    found = _matrices(trained.model)
    rows = list(zip(trained.names, trained.plain, trained.sharded, trained.places, strict=True))
    common = dict(lr=config.lr, wd=config.wd, seed=config.seed)
    matrices, rest = [r for r in rows if r[0] in found], [r for r in rows if r[0] not in found]
    optimizers = []
    if matrices:
        _, plain, whole, places = zip(*matrices, strict=True)
        optimizers.append(RowsMuon(plain, whole=whole, places=places, **common))
    if rest:
        _, plain, _, places = zip(*rest, strict=True)
        stock = torch.optim.AdamW(plain, lr=config.lr, weight_decay=config.wd)
        optimizers.append(StochasticAdamW(plain, places, **common) if config.rounds_stochastically else stock)
    return Together(*optimizers)
