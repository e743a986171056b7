"""QERA (arXiv:2410.06040): A and B begin as what makes up best for the rounding of a quantized base, on real inputs.

    s B0 A0 = the matrix of rank r for which |(W - W_q - s B A) X| is smallest      X: what samples of the data give W

The base is the quantized checkpoint as without it, and what is saved is a plain adapter for that base. On the 16-bit
weights it would be wrong: it adds what these do not lack.
"""

import torch
import torch.nn.functional as F
from torch import nn

from fsdp_utils.core.errors import UserError
from fsdp_utils.core.processes import all_reduce_each
from fsdp_utils.core.ranks import rank, say, world_size
from fsdp_utils.core.rows import fill, local
from methods.adapter import LORA_A, LORA_B, Pair, Start, tell_all
from methods.base import Seen
from methods.closest import changed, closest
from methods.quantizers.linear import QuantizedWeight

ROWS = 512  # whose rounding is worked out at a time: fitting it takes ten times their memory


def _error(base: QuantizedWeight, weight: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    """What rounding takes from a weight `[out, in]`, fp32; each row is rounded by itself."""
    error = torch.empty_like(weight, dtype=torch.float32)
    for part, rows in zip(error.split(ROWS), weight.split(ROWS), strict=True):
        packed = base.quantizer.quantize(rows)
        torch.sub(rows, base.quantizer.dequantize(packed, in_features=base.in_features, dtype=dtype).float(), out=part)
    return error


class QERA(Start):
    """Each process works out its share of the layers and tells the others."""

    def __init__(self, config, *, scaling):
        super().__init__(config, scaling=scaling)
        self.rank = config.lora_rank
        self.made_up: list[float] = []  # of each layer that this process worked out, the share
        self.whole: dict[str, Pair] = {}  # A and B of each layer on the CPU, until its own parameters hold them

    def attach(self, path, layer, *, dtype):
        self.dtype = dtype
        if self.rank > min(layer.in_features, layer.out_features):
            shape = f"{layer.out_features} x {layer.in_features}"
            raise UserError(f"--lora_rank {self.rank}: --lora_init qera corrects {path} of {shape}; lower it")

    def calibrate(self, layers, see):
        if self.whole:  # of an adapter that was saved
            return
        # a plan of bits may leave some in 16 bits, which begin as by default
        rounded = {path: layer for path, layer in layers.items() if isinstance(layer.base_layer, QuantizedWeight)}
        owners = {path: number % world_size() for number, path in enumerate(rounded)}
        for block in see(rounded):
            mine = lambda seen: owners[seen.path] == rank()
            self.whole |= {seen.path: self._correction(rounded[seen.path], seen) for seen in filter(mine, block)}
        tell_all(self.whole, rounded, rank=self.rank)
        share, count = all_reduce_each([sum(self.made_up), len(self.made_up)], torch.device("cpu"))
        say(
            f"--lora_init qera: of the change that rounding makes to the outputs of {count:.0f} linears, squared, "
            f"adapters begin by making up for {100 * share / max(count, 1):.0f} % on average"
        )

    def _correction(self, layer: nn.Module, seen: Seen) -> Pair:
        error = _error(layer.base_layer, seen.weight, dtype=self.dtype)
        a, b = closest(error, seen.gram, rank=self.rank)
        rounded = changed(error, seen.gram)
        # B A is a part of the error, at right angles to the rest
        self.made_up.append(changed(a, seen.gram) / rounded if rounded else 1.0)
        # a row of A as long as its column of B, whatever the size of the inputs: each learns as fast as the other
        root = (a.norm(dim=1) * b.norm(dim=0) / self.scaling).sqrt()
        return Pair((F.normalize(a) * root.unsqueeze(1)).cpu(), (F.normalize(b, dim=0) * root).cpu())

    def origin(self, path, layer):
        return local(layer.weight_norm)  # a saved adapter does not tell what A and B were at the start

    def begin(self, path, layer, pair):
        correction = self.whole.pop(path, None)
        if correction is None or not correction.b.any():  # zeros on both sides would never learn
            return super().begin(path, layer, pair)
        for parameter, values in zip(pair, correction, strict=True):
            fill(parameter, values)

    def begin_as(self, tensors, kept):
        self.whole = {path: Pair(saved[LORA_A], saved[LORA_B]) for path, saved in tensors.items()}
