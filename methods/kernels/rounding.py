"""Rounding fp32 to 16 bits at random: up or down, with the probability that keeps the expected value.

bf16 has 8 significant bits, fp16 has 11. Rounded to the nearest, every change of a weight below half a unit in its
last place is lost, all of them together: what a gentle run has learned (arXiv:2010.06192). Rounded at random, what is
lost in one weight is won in another.

The random bits are a hash of a key and the number of the element: the same in any process, on any device.
"""

import torch

Tensor = torch.Tensor
CHUNK = 2**20  # elements rounded at once: their copies stay in the cache


def hashed(x: int) -> int:
    """32 bits to 32 bits, each of the input changes half of the output (Wellons' lowbias32)."""
    x = ((x >> 16) ^ x) * 0x7FEB352D & 0xFFFFFFFF
    x = ((x >> 15) ^ x) * 0x846CA68B & 0xFFFFFFFF
    return (x >> 16) ^ x


def signed(x: int) -> int:
    """The int32 of the same 32 bits."""
    return x - 2**32 if x >= 2**31 else x


def bits_of(first: int, stop: int, *, key: int, device: torch.device) -> Tensor:
    """`hashed(element ^ key)` of elements `[first, stop)`, int32."""
    if stop <= 2**31:
        x = torch.arange(first, stop, dtype=torch.int32, device=device)
    else:
        x = (torch.arange(first, stop, device=device) & 0xFFFFFFFF).to(torch.int32)
    return scramble_(x.bitwise_xor_(signed(key)))


def scramble_(x: Tensor) -> Tensor:
    """`hashed` of each int32, in place."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x.bitwise_xor_((x >> shift).bitwise_and_(2 ** (32 - shift) - 1)).mul_(signed(factor))
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def at_random(x: Tensor, dtype: torch.dtype, *, key: int) -> Tensor:
    """fp32 `x` in a 16-bit dtype, each element one of its two neighbours there; what is neither stays as torch
    converts it: infinities, NaN, and what rounds to infinity.

    Args:
        key: 32 bits; another key, other random numbers.
    """
    flat = x.contiguous().view(-1)
    found = torch.empty_like(flat, dtype=dtype)
    for start in range(0, flat.numel(), CHUNK):
        part = slice(start, min(start + CHUNK, flat.numel()))
        found[part] = _round(flat[part], dtype, bits_of(part.start, part.stop, key=key, device=x.device))
    return found.view(x.shape)


def _round(x: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    low_bits, nearest = bits.bitwise_and_(0xFFFF), x.to(dtype)
    found = _by_bits(x, low_bits) if dtype == torch.bfloat16 else _by_neighbours(x, dtype, low_bits)
    return torch.where(nearest.isfinite() & found.isfinite(), found, nearest)


def _by_bits(x: Tensor, bits: Tensor) -> Tensor:
    """bf16 is the upper half of fp32."""
    return bits.add_(x.view(torch.int32)).bitwise_and_(-65536).view(torch.float32).to(torch.bfloat16)


def _by_neighbours(x: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """The definition: up by the share of the way that the number is from its lower neighbour to the upper one."""
    size, nearest = x.abs(), x.abs().to(dtype)
    # of numbers without sign, the next one has the next bit pattern
    low = (nearest.view(torch.int16) - (nearest.float() > size).to(torch.int16)).view(dtype)
    high = (low.view(torch.int16) + 1).view(dtype)
    share = (size - low.float()) / (high.float() - low.float())
    return torch.where(share * 65536 + bits >= 65536, high, low).copysign(x)
