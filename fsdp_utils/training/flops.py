"""What a step multiplies, and what share of the GPU's peak that is: MFU and HFU of docs/performance.md."""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from fsdp_utils.data.batches import predicting_tokens, tokens_in
from fsdp_utils.options import POLICIES, Product
from fsdp_utils.sharding.prepared import Prepared
from methods.quantizers.experts import expert_stacks
from methods.quantizers.linear import QuantizedLinear, QuantizedWeight

# FLOP/s of 16-bit products summed in fp32, without sparsity, by the makers' data sheets; the first of these words that
# the driver calls the card by counts
PEAKS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A40": 150e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 6000 Ada": 364e12,
    "RTX A6000": 155e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}


class Cost(NamedTuple):
    """FLOPs of one token in the blocks, of one token that predicts in the head, and of one token attending to one."""

    token: float
    predicting: float
    pair: float

    def of(self, batch: dict[str, torch.Tensor], *, causal: bool) -> float:
        """FLOPs of a micro-batch; padding is computed like any token, and counts."""
        pairs = pairs_in(batch, causal=causal)
        return self.token * tokens_in(batch) + self.predicting * predicting_tokens(batch) + self.pair * pairs


def pairs_in(batch: dict[str, torch.Tensor], *, causal: bool) -> int:
    """How often a token of a micro-batch attends to a token."""
    rows, length = batch["input_ids"].shape
    if "position_ids" in batch:  # packed: a token sees those of its own sample
        return int(batch["position_ids"].sum()) + rows * length
    return rows * (length * (length + 1) // 2 if causal else length**2)


def device_name(device: torch.device) -> str:
    """What the driver calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_of(name: str) -> float | None:
    """FLOP/s of a device by its name, None where the table does not know it."""
    return next((peak for known, peak in PEAKS.items() if re.search(rf"\b{known}\b", name)), None)


def _weights(module: nn.Module) -> tuple[int, int]:
    """How many weights of matrix products a module has: frozen ones, trained ones."""
    counts = [0, 0]
    for m in module.modules():
        if isinstance(m, QuantizedWeight):
            counts[0] += math.prod(m.shape)
            continue
        for parameter in m.parameters(recurse=False):
            counts[parameter.requires_grad] += parameter.numel() if parameter.dim() > 1 else 0
    return tuple(counts)


def _both_ways(modules: Iterable[nn.Module]) -> int:
    """Of a token: 2 FLOPs a weight forward, 2 for the gradient of the input, 2 for that of a weight that trains."""
    return sum(4 * frozen + 6 * trained for frozen, trained in map(_weights, modules))


def _attention(config) -> int:
    """Width of all heads; 0 where there are none (Mamba)."""
    heads = getattr(config, "num_attention_heads", 0)
    return heads and heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)


def _attending(config, blocks: int) -> int:
    """How many of the blocks attend: some families mix them with convolutions or linear attention."""
    kinds = getattr(config, "layer_types", None)
    return blocks if kinds is None else sum("attention" in kind and "linear" not in kind for kind in kinds)


def model_cost(model: nn.Module, blocks: list[nn.Module]) -> Cost:
    """What the definition of a model asks for, forward and backward; on meta, or sharded."""
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    # a pair: 2 products of the width forward, the scores and what they mix, and 4 backward
    pair = 12 * _attending(config, len(blocks)) * _attention(config)
    return Cost(_both_ways(blocks), _both_ways([] if head is None else [head]), pair)


def recomputed_cost(model: nn.Module, blocks: list[nn.Module], config) -> Cost:
    """What blocks that recompute multiply again: what --checkpoint_policy does not keep."""
    shape, kept = model.config.get_text_config(), POLICIES[config.checkpoint_policy]
    width, again = _attention(shape), sum(sum(_weights(block)) for block in blocks)
    for linear in (m for block in blocks for m in block.modules() if isinstance(m, (nn.Linear, QuantizedLinear))):
        product = Product(linear.in_features, linear.out_features, adapted=True, factor=config.method == "dora")
        again -= linear.in_features * linear.out_features * kept(product)
    return Cost(2 * again, 0, 4 * _attending(shape, len(blocks)) * width * (not kept(Product(width, width))))


class Meter:
    """The shares of the peak that steps of a prepared model reach on this process's device."""

    def __init__(self, prepared: Prepared, config, *, causal: bool, peak: float):
        self.causal, self.peak = causal, peak
        blocks = list(prepared.blocks.values())
        self.model = model_cost(prepared.model, blocks)
        self.again = recomputed_cost(prepared.model, blocks[: prepared.recomputed], config)

    def __call__(self, micro_batches: list[dict[str, torch.Tensor]], seconds: float) -> dict[str, float]:
        """`mfu` and `hfu` of a step that took so long."""
        model, again = (sum(c.of(b, causal=self.causal) for b in micro_batches) for c in (self.model, self.again))
        return dict(mfu=model / seconds / self.peak, hfu=(model + again) / seconds / self.peak)


def unknown(prepared: Prepared) -> str | None:
    """Why the share of the peak cannot be told, None where it can."""
    name = device_name(prepared.device)
    if peak_of(name) is None:
        return f"the peak of {name} is not known"
    return unlike_others(prepared.model)


def unlike_others(model: nn.Module) -> str | None:
    """Why tokens of a model differ in what is multiplied for them, None where they do not."""
    if model.config.is_encoder_decoder:
        return "not every token goes through every block"
    return "not every token goes through every expert" if expert_stacks(model) else None


def meter_of(prepared: Prepared, config, *, task) -> Meter | None:
    """None where it is `unknown`."""
    if unknown(prepared):
        return None
    return Meter(prepared, config, causal=task.causal, peak=peak_of(device_name(prepared.device)))
