"""Mixtures of experts on a packed base: the matrices of all experts are one stack, whose rows are sharded like others.

transformers builds every such family alike (`use_experts_implementation`): a module with two stacks of matrices, which
says how they are laid out, and gets its tokens with the experts chosen for each. Here only its weights and its products
are replaced; router, activation and biases stay the family's own.
"""

from types import MethodType

import torch
from torch import nn

from methods.kernels.grouped import grouped_linear
from methods.packed import Quantizer
from methods.quantizers.linear import QuantizedWeight, compute_dtype

Tensor = torch.Tensor


class PackedStack(QuantizedWeight):
    """Takes the place of a parameter that holds a matrix for each expert, `[experts, out, in]`."""

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        """`[t, in]`, sorted by expert, to `[t, out]`; `ends` int32 `[experts]`, where the rows of each expert end."""
        rows = rows.to(compute_dtype(rows))
        return grouped_linear(rows, ends, self.packed(), spec=self.spec, in_features=self.in_features)


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds the stacks of a mixture of experts."""
    return all(hasattr(module, name) for name in ("is_transposed", "has_gate", "has_bias", "num_experts"))


def stack_names(experts: nn.Module) -> tuple[str, str]:
    """What such a module calls the stack before its activation and the one after."""
    return ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"


def expert_stacks(model: nn.Module) -> list[str]:
    """Paths of all stacks, packed or not."""
    return [
        f"{path}.{name}" for path, module in model.named_modules() if is_experts(module) for name in stack_names(module)
    ]


def pack_stack(model: nn.Module, path: str, quantizer: Quantizer) -> PackedStack:
    """Puts a packed stack without values in the place of the parameter at `path`, on meta."""
    parent, _, name = path.rpartition(".")
    experts = model.get_submodule(parent)
    count, *sides = getattr(experts, name).shape
    stack = PackedStack((count, *(reversed(sides) if experts.is_transposed else sides)), quantizer)
    stack.transposed = experts.is_transposed
    delattr(experts, name)
    experts.add_module(name, stack)
    experts.forward = MethodType(_forward, experts)
    return stack


def _forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """What an Experts module computes, `[t, hidden]`, when its stacks are packed.

    Args:
        hidden: `[t, hidden]`.
        chosen: `[t, k]`, the experts of each token.
        weights: `[t, k]`, how much each counts.
    """
    first, second = (getattr(self, name) for name in stack_names(self))
    several = chosen.shape[1]
    expert, order = chosen.flatten().sort(stable=True)
    numbers = torch.arange(self.num_experts, device=expert.device)
    ends = torch.searchsorted(expert, numbers, right=True).to(torch.int32)
    inner = first(hidden[order // several], ends)
    if self.has_bias:
        inner = inner + getattr(self, f"{stack_names(self)[0]}_bias")[expert]
    inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
    out = second(inner, ends)
    if self.has_bias:
        out = out + self.down_proj_bias[expert]
    if getattr(self, "has_post_expert_norm", False):
        out = self.post_expert_norm(out)
    out = out * weights.flatten()[order].unsqueeze(1)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return out[back].view(len(hidden), several, -1).sum(1).to(hidden.dtype)
