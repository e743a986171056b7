"""AdamW whose moments are 8-bit codes in blocks that never cross a row, rounded at random.

A code is a step of a logarithmic scale (arXiv:2110.02861 has a like one): of the first moment a sign and 127 sizes over
12 octaves below the block's largest, of the second one 256 sizes over 24, without zero: a second moment that becomes 0
would divide by eps. To the nearest, one that should lose a thousandth a step never would, since codes are 7 % apart; up
or down with the probability that makes the expected value right, it does.

Rows do not influence one another, so any number of processes may hold them: codes `[n, columns]`, and fp32 scales
`[n, columns / 256]`. The random bits are a hash of seed, step, parameter and element, as in `kernels.adamw`.
"""

from functools import lru_cache

import torch

from methods.kernels.adamw import Row, Step, random_bits
from methods.kernels.rounding import hashed

Tensor = torch.Tensor
BLOCK = 256  # elements of a row that share a scale
CHUNK = 2**22  # elements that a step works on at once, on a GPU; a 16th of it elsewhere, to stay in the cache
OCTAVES = 24  # of the second moment; the first one's root of that
FIRST, SECOND = 127, 255  # the largest codes


Tables = tuple[Tensor, Tensor]


@lru_cache
def tables(device: torch.device) -> Tables:
    """What the codes of the first and of the second moment stand for, fp32, rising to 1."""
    first = 2 ** (OCTAVES / 2 * (torch.arange(-1, FIRST, dtype=torch.float64) / (FIRST - 1) - 1))
    first[0] = 0
    second = 2 ** (OCTAVES * (torch.arange(SECOND + 1, dtype=torch.float64) / SECOND - 1))
    return first.float().to(device), second.float().to(device)


def blocks_of(columns: int) -> int:
    return -(-columns // BLOCK)


def _wide(scales: Tensor, columns: int) -> Tensor:
    """`[n, blocks]` to `[n, columns]`."""
    return scales.repeat_interleave(BLOCK, dim=1)[:, :columns]


def decode(codes: Tensor, scales: Tensor, sizes: Tensor) -> Tensor:
    """fp32 `[n, columns]` of codes, int8 or uint8, and their scales."""
    codes = codes.int()
    values = sizes[codes.abs()] * _wide(scales, codes.shape[1])
    return torch.where(codes < 0, -values, values)


def encode(values: Tensor, bits: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, int32 with the sign of the values, and scales of fp32 `[n, columns]`; `bits` are 16 random ones for each
    element, int32. The largest of a block stays as it is."""
    rows, columns = values.shape
    absolute = values.abs()
    scales = torch.nn.functional.pad(absolute, (0, -columns % BLOCK)).view(rows, -1, BLOCK).amax(-1)
    shares = absolute / _wide(scales.clamp_min(torch.finfo(torch.float32).tiny), columns)
    shares = torch.minimum(torch.maximum(shares, sizes[0]), sizes[-1])
    low = (torch.bucketize(shares, sizes, right=True, out_int32=True) - 1).clamp(0, len(sizes) - 2)
    above = (shares - sizes[low]) / (sizes[low + 1] - sizes[low])
    codes = low + (above * 65536 + bits >= 65536)
    return torch.where(values < 0, -codes, codes), scales


def update(
    weight: Tensor,
    grad: Tensor,
    moments: tuple[Tensor, ...],
    scalars: tuple[Tensor, ...],
    bits: tuple[Tensor, Tensor],
    sizes: Tables,
) -> tuple[Tensor, ...]:
    """The new weight, and codes and scales of both moments, of rows `[n, columns]`.

    Args:
        moments: codes and scales of the first, codes and scales of the second.
        scalars: those of `Step.scalars`, as tensors: a compiled version must not be made anew for each rate.
        bits: two of 32 random ones for each element, int32.
    """
    decay, size, share1, beta2, share2, root, eps = scalars
    m, v = decode(*moments[:2], sizes[0]), decode(*moments[2:], sizes[1])
    w, g = weight.float(), grad.float()
    m = m + share1 * (g - m)
    v = beta2 * v + share2 * g * g
    w = decay * w - size * m / (v.sqrt() * root + eps)
    if weight.dtype == torch.bfloat16:
        w = ((w.view(torch.int32) + (bits[0] & 0xFFFF)) & -65536).view(torch.float32).bfloat16()  # as `adamw.round_`
    first, first_scales = encode(m, bits[1] & 0xFFFF, sizes[0])
    second, second_scales = encode(v, (bits[0] >> 16) & 0xFFFF, sizes[1])
    return w, first.to(torch.int8), first_scales, second.to(torch.uint8), second_scales


def step_row(row: Row, scales: tuple[Tensor, Tensor], step: Step, *, run=update) -> None:
    """One step in place. The row's moments are codes, int8 and uint8, `[n, columns]` as its weight; `run` is `update`,
    or it compiled."""
    (rows, columns), device = row.weight.shape, row.weight.device
    scalars = torch.tensor(step.scalars(), dtype=torch.float32).to(device).unbind()
    at_once = max((CHUNK if row.weight.is_cuda else CHUNK // 16) // columns, 1)
    other = step._replace(seed=hashed(step.seed & 0xFFFFFFFF))
    held = row.weight, row.first_moment, scales[0], row.second_moment, scales[1]
    for start in range(0, rows, at_once):
        part = slice(start, min(start + at_once, rows))
        places = start * columns, part.stop * columns
        bits = tuple(random_bits(row, s, *places).view(-1, columns) for s in (step, other))
        weight, *moments = (t[part] for t in held)
        new = run(weight, row.grad[part], tuple(moments), scalars, bits, tables(device))
        for target, values in zip(held, new, strict=True):
            target[part] = values
