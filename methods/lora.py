"""LoRA (arXiv:2106.09685) around any base linear: `y = W x + s B A dropout(x)`."""

import torch
import torch.nn.functional as F
from torch import nn

from methods.adapter import Adapter, Pair
from methods.dropout import SeededDropout
from methods.expert_lora import LoRAStack, merged_stack, saved_path, split_targets, stacks_to_adapt, target_parameters
from methods.kernels.adapted import LowRank, adapted_linear
from methods.quantizers.linear import add_bias, compute_dtype, matmul, packed_parts
from methods.targets import adapter_targets, replace_module


class LoRALinear(nn.Module):
    """Adds a trained low-rank product to a frozen base linear. A `[r, in]`, B `[out, r]`."""

    own_parameters = ("lora_A", "lora_B")
    folds = False  # whether the base holds `folded_B folded_A`, an older B A: see methods/folded.py

    def __init__(self, base: nn.Module, *, rank: int, scaling: float, dropout: float, dtype: torch.dtype, fused: bool):
        super().__init__()
        self.fused = fused
        self.base_layer = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.scaling = scaling
        self.dropout = SeededDropout(dropout) if dropout else nn.Identity()
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, dtype=dtype, device="meta"))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, rank, dtype=dtype, device="meta"))

    def added(self) -> Pair:
        """A `[n, in]` and B `[out, n]` that are multiplied beside the base."""
        if not self.folds:
            return Pair(self.lora_A, self.lora_B)
        return Pair(torch.cat([self.lora_A, self.folded_A]), torch.cat([self.lora_B, -self.folded_B], dim=1))

    @property
    def weight(self) -> torch.Tensor | None:
        """The base's, if that is not packed: T5 looks at its dtype."""
        return self.base_layer.weight

    def low_rank(self, x: torch.Tensor) -> torch.Tensor:
        """`s B A dropout(x)`, `[..., in] -> [..., out]`."""
        x = self.dropout(x)
        dtype = compute_dtype(x)
        a, b = self.added()
        hidden = F.linear(x.to(dtype), a.to(dtype))  # [..., n]
        return F.linear(hidden, b.to(dtype)) * self.scaling

    def row_factor(self) -> torch.Tensor | None:
        """What each output row is multiplied by, fp32 `[out]`: nothing in LoRA."""
        return None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fused_forward(x, self.row_factor()) if self.fused else self.plain_forward(x)
        return add_bias(y, self.base_layer)

    def fused_forward(self, x: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
        """`plain_forward` as one operator, with the row factor given; it gets a gradient only if it asks for one."""
        x = x.to(compute_dtype(x))
        adapter = LowRank(*self.added(), factor, self.scaling)
        drops = self.training and isinstance(self.dropout, SeededDropout)
        return adapted_linear(x, packed_parts(self.base_layer), adapter, dropout=self.dropout if drops else None)

    def plain_forward(self, x: torch.Tensor) -> torch.Tensor:
        """The definition, without the bias: what the fused operator is tested against."""
        y, factor = matmul(self.base_layer, x) + self.low_rank(x), self.row_factor()
        return y if factor is None else y * factor.to(y.dtype)


class LoRA(Adapter):
    """Wraps every target in `layer`."""

    layer = LoRALinear

    def attach(self, model, *, dtype):
        c = self.config
        linears, experts = split_targets(c.lora_target_modules)
        for path in stacks_to_adapt(model, c) if experts else ():
            stack = LoRAStack(model.get_submodule(path), rank=c.lora_rank, scaling=self.scaling, dtype=dtype)
            replace_module(model, path, stack)
        for path in adapter_targets(model, linears) if linears else ():
            base = model.get_submodule(path)
            how = dict(rank=c.lora_rank, scaling=self.scaling, dropout=c.lora_dropout, fused=c.fused_kernels)
            layer = self.layer(base, dtype=dtype, **how)
            self.start.attach(path, layer, dtype=dtype)
            replace_module(model, path, layer)

    def layers(self, model):
        return {path: m for path, m in model.named_modules() if isinstance(m, (self.layer, LoRAStack))}

    def pair(self, layer):
        return Pair(layer.lora_A, layer.lora_B)

    def saved_path(self, path, layer):
        return saved_path(path) if isinstance(layer, LoRAStack) else path

    def peft_config(self, model):
        stacks = [path for path, layer in self.layers(model).items() if isinstance(layer, LoRAStack)]
        more = dict(target_parameters=target_parameters(stacks)) if stacks else {}
        return super().peft_config(model) | more

    def merge(self, weight, tensors):
        if weight.dim() == 2:
            return super().merge(weight, tensors)
        return merged_stack(weight, *self.start.trained(tensors), scaling=self.scaling)
