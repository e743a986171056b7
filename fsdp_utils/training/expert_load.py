"""How evenly the tokens of a step are spread over the experts of a mixture."""

import torch
from torch import nn

from fsdp_utils.core.processes import sum_over_processes
from methods.quantizers.experts import is_experts


@torch.library.custom_op("fsdp_qlora::seen_experts", mutates_args=())
def seen_experts(chosen: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """The experts of each token `[t, k]`, as they are; adds to how often each was chosen, int64 `[experts]`, which no
    gradient and no result depends on: torch is not told, since compiled code may change nothing that it recomputes.

    A recomputed block counts twice, and compiled code may run it once or twice: only shares mean something.
    """
    seen.scatter_add_(0, chosen.flatten(), torch.ones_like(chosen, dtype=torch.int64).flatten())
    return chosen.clone()


seen_experts.register_fake(lambda chosen, seen: torch.empty_like(chosen))


def _count(experts: nn.Module, args: tuple) -> tuple:
    """Before experts run. One function for all of them: each other one would have blocks compiled again."""
    return args[0], seen_experts(args[1], experts.seen), *args[2:]


class ExpertLoad:
    """Counts while a model runs; `take` tells what was counted since. Nothing to tell of a model without experts."""

    def __init__(self, model: nn.Module, *, device: torch.device):
        self.layers = [module for module in model.modules() if is_experts(module)]
        for experts in self.layers:
            experts.seen = torch.zeros(experts.num_experts, dtype=torch.int64, device=device)
            experts.register_forward_pre_hook(_count)

    def take(self) -> dict[str, float]:
        """Of all processes, the mean over layers: `expert_load_max`, tokens of the busiest expert by those of the mean
        one (1: even), and `experts_idle`, the share of experts without a token. Collective; waits for the GPU."""
        if not self.layers:
            return {}
        counts = [experts.seen for experts in self.layers]
        counted = sum_over_processes(torch.cat(counts)).double().split([len(c) for c in counts])
        for layer in counts:
            layer.zero_()
        busiest = torch.stack([c.max() / c.mean().clamp_min(1e-9) for c in counted]).mean()
        idle = torch.cat(counted).eq(0).double().mean()
        return dict(zip(("expert_load_max", "experts_idle"), torch.stack([busiest, idle]).tolist(), strict=True))
