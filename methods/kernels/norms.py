"""Triton: the end of DoRA's factored row norm, one pass over small matrices instead of a dozen launches.

`methods.dora.row_norms` defines the result.
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

MAX_RANK = 128  # beyond it the tiles no longer fit in registers


if triton is not None:

    @triton.jit
    def _norm_kernel(
        weight_norm, cross, b, gram, out, rows, rank, scaling, BLOCK: tl.constexpr, RANK: tl.constexpr
    ):  # fmt: skip
        row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = row < rows
        r = tl.arange(0, RANK)
        known = r < rank
        at = row[:, None] * rank + r[None, :]
        mask = inside[:, None] & known[None, :]
        lora_b = tl.load(b + at, mask=mask, other=0).to(tl.float32)
        product = tl.load(cross + at, mask=mask, other=0).to(tl.float32)
        square = tl.load(gram + r[:, None] * rank + r[None, :], mask=known[:, None] & known[None, :], other=0)
        low_rank = tl.sum(tl.dot(lora_b, square, input_precision="ieee") * lora_b, axis=1)
        norm = tl.load(weight_norm + row, mask=inside, other=0)
        squared = norm * norm + 2 * scaling * tl.sum(product * lora_b, axis=1) + scaling * scaling * low_rank
        tl.store(out + row, tl.sqrt(tl.maximum(squared, 0)), mask=inside)


def fits(cross: torch.Tensor) -> bool:
    """Whether the kernel runs here: CUDA, a rank that fits."""
    return triton is not None and cross.is_cuda and cross.shape[1] <= MAX_RANK


def finish(weight_norm, cross, b, gram, scaling: float) -> torch.Tensor:
    """`sqrt(norm^2 + 2 s rowsum(cross * B) + s^2 rowsum((B gram) * B))`, fp32 `[n]`.

    Args:
        weight_norm: fp32 `[n]`; cross, b: `[n, r]`; gram: fp32 `[r, r]`.
    """
    rows, rank = cross.shape
    out = torch.empty(rows, dtype=torch.float32, device=cross.device)
    if rows:
        _norm_kernel[(triton.cdiv(rows, 64),)](
            weight_norm, cross.contiguous(), b.contiguous(), gram, out, rows, rank, scaling,
            BLOCK=64, RANK=max(16, triton.next_power_of_2(rank)), num_warps=4,
        )  # fmt: skip
    return out
