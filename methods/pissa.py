"""PiSSA (arXiv:2404.02948): A and B begin as the principal part of the weight, and the base is what is left of it.

    W = U S V^T      s B0 A0 = U_r S_r V_r^T      base = W - s B0 A0

Of a quantized base the residual is what is quantized. Saved, an adapter is `s (B A - B0 A0)` with twice the rank: what
stock PEFT adds to the unchanged W. (To a quantized W it adds the same, but then the rounding errors of another weight
are in the base than in training; read again here, the base is the residual quantized as it was.)
"""

import hashlib

import torch
from torch import nn
from tqdm import tqdm

from fsdp_utils.core.errors import UserError
from fsdp_utils.core.ranks import is_main, rank, world_size
from fsdp_utils.core.rows import fill, gather, local, row_range
from methods.adapter import LORA_A, LORA_B, Pair, Start, Stored, hold_frozen, seed_of, tell_all
from methods.quantizers.linear import QuantizedWeight

NITER = 16
FROZEN = ("initial_A", "initial_B")


class PiSSA(Start):
    """The exact decomposition; each process decomposes its share of the weights and tells the others."""

    def __init__(self, config, *, scaling):
        super().__init__(config, scaling=scaling)
        self.rank = config.lora_rank
        self.layers: dict[str, nn.Module] = {}
        self.whole: dict[str, Pair] = {}  # A0 and B0 of each layer on the CPU, until its own parameters hold them

    @property
    def base_recipe(self):
        """A hash of A0 and B0 themselves: they depend on seed, device and dtype, or come from a saved adapter, and a
        base that lacks others than those that are saved with the run is another model."""
        digest = hashlib.sha256(f"pissa {self.scaling}".encode())
        for path, pair in sorted(self.whole.items()):
            for tensor in pair:
                digest.update(f"{path} {tuple(tensor.shape)}".encode())
                digest.update(tensor.contiguous().numpy())
        return digest.hexdigest()

    def attach(self, path, layer, *, dtype):
        if self.rank > min(layer.in_features, layer.out_features):
            shape = f"{layer.out_features} x {layer.in_features}"
            raise UserError(f"--lora_rank {self.rank}: --lora_init pissa splits {path} of {shape}; lower it")
        self.layers[path] = layer
        hold_frozen(layer, FROZEN, dtype=dtype)
        layer.unread_names = FROZEN  # kept to be saved; no forward reads them

    def principal(self, path: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """U_r `[out, r]`, S_r `[r]` and V_r^T `[r, in]` of a weight in fp32."""
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
        return u[:, : self.rank], s[: self.rank], vt[: self.rank]

    def _decompose(self, path: str, weight: torch.Tensor) -> Pair:
        u, s, vt = self.principal(path, weight.float())
        root = (s / self.scaling).sqrt()
        dtype = self.layers[path].initial_A.dtype
        # rounded before the residual is taken: what A and B cannot hold stays in the base
        return Pair(*(t.to(dtype).float().cpu().contiguous() for t in (root[:, None] * vt, u * root)))

    def before_loading(self, read_whole, *, device):
        if self.whole:  # of an adapter that was saved
            return
        mine = list(self.layers)[rank() :: world_size()]
        for path in tqdm(mine, desc="decomposing", unit="weight", disable=not is_main()):
            self.whole[path] = self._decompose(path, read_whole(path))
        tell_all(self.whole, self.layers, rank=self.rank)

    def base_rows(self, path, rows, *, start):
        if path not in self.whole:
            return rows
        a, b = (t.to(rows.device) for t in self.whole[path])
        rest = torch.addmm(rows.float(), b[start : start + len(rows)], a, alpha=-self.scaling)
        if not isinstance(self.layers[path].base_layer, QuantizedWeight):
            return rest  # in the checkpoint's 16 bits a model kept in 32 would no longer begin as W
        # rounded: --quant_scales auto keeps the largest of a group in bf16, which then holds it without loss
        return rest.to(rows.dtype)

    def begin(self, path, layer, pair):
        a, b = self.whole.pop(path)
        for parameters in (pair, Pair(layer.initial_A, layer.initial_B)):
            fill(parameters.a, a)
            fill(parameters.b, b)

    def begin_as(self, tensors, kept):
        self.whole = {
            path: Pair(saved[LORA_A][self.rank :].float(), -saved[LORA_B][:, self.rank :].float())
            for path, saved in tensors.items()
        }

    def stored(self, layer, pair):
        a, b, a0, b0 = (t.detach() for t in (*pair, layer.initial_A, layer.initial_B))
        start = lambda t: row_range(t)[0]
        return {
            LORA_A: Stored(
                a.dtype,
                (2 * len(a), a.shape[1]),
                lambda: torch.cat([gather(a), gather(a0)]),
                lambda: [(start(a), local(a)), (len(a) + start(a0), local(a0))],
            ),
            LORA_B: Stored(
                b.dtype,
                (len(b), 2 * b.shape[1]),
                lambda: torch.cat([gather(b), -gather(b0)], dim=1),
                lambda: [(start(b), torch.cat([local(b), -local(b0)], dim=1))],
            ),
        }

    def trained(self, tensors):
        return Pair(tensors[LORA_A][: self.rank], tensors[LORA_B][:, : self.rank])

    def stored_rank(self, rank):
        return 2 * rank


class FastPiSSA(PiSSA):
    """By randomized subspace iteration (arXiv:0909.4061), as PEFT's `pissa_niter_16`: seconds instead of minutes."""

    def principal(self, path, weight):
        with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
            torch.manual_seed(seed_of(path, seed=self.config.seed))  # the same for any number of processes
            u, s, v = torch.svd_lowrank(weight, self.rank, niter=NITER)
        return u, s, v.T
