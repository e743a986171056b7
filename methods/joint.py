"""Adapted projections that read the same input (q, k, v; gate, up) computed by one operator.

The parent's forward gets their outputs, side by side, in place of its input, and each projection takes its own columns
of what it is called with. That is right where the parent uses its input for nothing but these projections and its
shape, which is so in the families listed; everywhere else each projection is computed by itself.
"""

from collections.abc import Callable

import torch
from torch import nn

from methods.kernels.adapted import adapted_linear, spans
from methods.quantizers.linear import add_bias, compute_dtype, packed_parts

FAMILIES = {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"}
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def join(model: nn.Module) -> None:
    """Joins every group of adapted projections of a model, if its family is known."""
    if model.config.model_type not in FAMILIES:
        return
    for parent in model.modules():
        for names in GROUPS:
            members = [getattr(parent, name, None) for name in names]
            if all(getattr(m, "is_fused", False) for m in members) and _alike(members):
                _join(parent, members)


def _alike(members: list[nn.Module]) -> bool:
    """Whether one operator can compute these `LoRALinear`s."""
    kinds = {(type(m), m.scaling, m.lora_A.shape, packed_parts(m.base_layer)[1]) for m in members}
    return len(kinds) == 1


def together(members: list[nn.Module], x: torch.Tensor) -> torch.Tensor:
    """The outputs of all members without their biases, side by side: `[..., in] -> [..., sum of outs]`."""
    x = x.to(compute_dtype(x))
    packed = [part for m in members for part in packed_parts(m.base_layer)[0]]
    _, spec = packed_parts(members[0].base_layer)
    a, b = (torch.cat([getattr(m, name) for m in members]) for name in ("lora_A", "lora_B"))
    factors = [m.row_factor() for m in members]
    factor = None if factors[0] is None else torch.cat(factors)
    sizes = [m.out_features for m in members]
    return adapted_linear(x, packed, spec, sizes, a, b, factor, members[0].scaling)


def _join(parent: nn.Module, members: list[nn.Module]) -> None:
    forward = parent.forward

    def joined(*args, **kwargs):
        if "hidden_states" in kwargs:
            kwargs = kwargs | {"hidden_states": together(members, kwargs["hidden_states"])}
        else:
            args = (together(members, args[0]), *args[1:])
        return forward(*args, **kwargs)

    parent.forward = joined
    for member, columns in zip(members, spans([m.out_features for m in members]), strict=True):
        member.forward = _own_columns(member, columns)


def _own_columns(member: nn.Module, columns: slice) -> Callable:
    return lambda joint: add_bias(joint[..., columns], member.base_layer)
