"""LoRA of each expert: a pair of small matrices beside every matrix of a packed stack.

Kept in the layout of PEFT's `target_parameters` (0.18 and later): A `[experts * r, in]`, expert by expert, and B
`[out, r * experts]`, whose columns are those of all experts for each of the r. Both are sharded by rows like any other
adapter, and written as they are.
"""

from collections.abc import Iterable

import torch
from torch import nn

from fsdp_utils.core.errors import UserError
from methods.kernels.grouped import grouped_matmul
from methods.quantizers.experts import PackedStack, expert_stacks

Tensor = torch.Tensor
EXPERTS = "experts"  # in --lora_target_modules


class LoRAStack(nn.Module):
    """Adds trained low-rank products to the packed matrices of experts."""

    own_parameters = ("lora_A", "lora_B")

    def __init__(self, base: PackedStack, *, rank: int, scaling: float, dtype: torch.dtype):
        super().__init__()
        self.base_layer, self.rank, self.scaling = base, rank, scaling
        experts, out_features, in_features = base.shape
        self.lora_A = nn.Parameter(torch.empty(experts * rank, in_features, dtype=dtype, device="meta"))
        self.lora_B = nn.Parameter(torch.empty(out_features, rank * experts, dtype=dtype, device="meta"))

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        """As `PackedStack`: `[t, in]`, sorted by expert, to `[t, out]`."""
        out = self.base_layer(rows, ends)
        a, b = stacked(self.lora_A.to(out.dtype), self.lora_B.to(out.dtype), experts=len(ends))
        hidden = grouped_matmul(rows.to(out.dtype), a, ends)  # [t, r]
        return out + self.scaling * grouped_matmul(hidden, b, ends)


def stacked(a: Tensor, b: Tensor, *, experts: int) -> tuple[Tensor, Tensor]:
    """A `[experts, r, in]` and B `[experts, out, r]` of the layout that is kept."""
    return a.unflatten(0, (experts, -1)), b.unflatten(1, (-1, experts)).permute(2, 0, 1)


def merged_stack(weight: Tensor, a: Tensor, b: Tensor, *, scaling: float) -> Tensor:
    """`[experts, out, in]` with the adapters folded in, fp32."""
    a, b = stacked(a.float(), b.float(), experts=len(weight))
    return torch.baddbmm(weight.float(), b, a, alpha=scaling)


def split_targets(spec: str) -> tuple[str, bool]:
    """--lora_target_modules without the word `experts`, and whether it was there."""
    names = [name.strip() for name in spec.split(",") if name.strip()]
    return ",".join(name for name in names if name != EXPERTS), EXPERTS in names


def stacks_to_adapt(model: nn.Module, config) -> list[str]:
    """Paths of the stacks that get adapters.

    Raises:
        UserError: there are none, or they cannot have what the flags ask for.
    """
    stacks, given = expert_stacks(model), f"--lora_target_modules {config.lora_target_modules}"
    parts = [(model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in stacks]
    packed = all(isinstance(getattr(experts, name), PackedStack) for experts, name in parts)
    table = (
        (not stacks, f"{config.source} has no experts; drop the word"),
        (
            not packed,
            "its experts are in 16 bits, and get adapters only where they are packed, by custom_qlora or hqq_lora from "
            "a base in 16 bits; drop the word",
        ),
        (config.method == "dora", "PEFT reads no DoRA of experts; use custom_qlora or hqq_lora"),
        (config.train_for != "none", "experts do not learn on the rounding of an export; drop --train_for"),
        (config.lora_init != "default", f"experts begin as by default, not with --lora_init {config.lora_init}"),
        (config.lora_dropout > 0, "PEFT knows no dropout before adapters of experts; add --lora_dropout 0"),
    )
    for holds, why in table:
        if holds:
            raise UserError(f"{given}: {why}")
    return stacks


def saved_path(path: str) -> str:
    """What PEFT calls the stack at `path`: it wraps the module that holds both, first for one, then for the other."""
    experts, _, name = path.rpartition(".")
    return experts if name == "down_proj" else f"{experts}.base_layer"


def target_parameters(paths: Iterable[str]) -> list[str]:
    """PEFT's names for the stacks at these paths."""
    return sorted({".".join(path.split(".")[-2:]) for path in paths})


# what PEFT 0.21 takes for the experts' own in a mixture, wherever it stands
EXPERT_NAMES = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def adapters_beside_experts(layers: dict[str, nn.Module]) -> list[str]:
    """What to know of the adapted layers of a mixture of experts, by their path."""
    linears = {path.split(".")[-1] for path, layer in layers.items() if not isinstance(layer, LoRAStack)}
    confused = sorted(linears.intersection(EXPERT_NAMES))
    adapted = any(isinstance(layer, LoRAStack) for layer in layers.values())
    said = [] if adapted else ["experts stay as they are, without adapters; add the word experts for them"]
    if confused:
        said.append(
            f"stock PEFT takes {', '.join(confused)} of some mixtures (DeepSeek, GLM; not Qwen2-MoE) for their "
            "experts', and reads adapters of others wrongly or not at all; name attention's linears only, or export "
            "with --infer_type merged"
        )
    return said
