"""AdamW for bf16 parameters that learns as in fp32: computed in fp32, rounded at random (arXiv:2010.06192).

bf16 has 8 significant bits. Rounded to the nearest, an update below 1/512 of a weight is lost, at every step anew, and
a second moment that should lose a thousandth a step never does. Rounded up or down with the probability that makes the
expected value right, neither is lost, and nothing has to be kept in fp32.

The random bits are a hash of seed, step, parameter and element: the same for any sharding, device and replica.
"""

import math
from typing import NamedTuple

import torch

from methods.kernels.rounding import bits_of, hashed, signed

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

Tensor = torch.Tensor
CHUNK = 2**18  # elements that the plain version works on at once: its fp32 copies stay in the cache
BLOCK = 1024  # elements of a program
HALF = 0x8000  # in place of random bits: to the nearest


class Step(NamedTuple):
    """The numbers of one step, as AdamW (arXiv:1711.05101) names them."""

    lr: float
    weight_decay: float
    beta1: float
    beta2: float
    eps: float
    number: int  # from 1
    seed: int
    unless: Tensor | None = None  # fp32 scalar on the parameters' device; where it is no number, nothing changes

    def scalars(self) -> tuple[float, ...]:
        """Factor of the weight, size of the step, the gradient's share of the first moment, factor of the second one,
        the gradient's share of it, factor of its root, eps."""
        corrected, root = 1 - self.beta1**self.number, math.sqrt(1 - self.beta2**self.number)
        # shares are subtracted here: in fp32, 1 - 0.999 has five right digits
        betas = 1 - self.beta1, self.beta2, 1 - self.beta2
        return 1 - self.lr * self.weight_decay, self.lr / corrected, *betas, 1 / root, self.eps


class Row(NamedTuple):
    """A parameter's elements in this process, with its gradient and moments, of one shape; all bf16 for the kernel."""

    weight: Tensor
    grad: Tensor
    first_moment: Tensor
    second_moment: Tensor
    parameter: int  # its number in the model
    first: int  # number of the first element here in the whole parameter


def _key(step: Step) -> int:
    seed = (step.seed ^ (step.seed >> 32)) & 0xFFFFFFFF
    return hashed(step.number ^ hashed(seed))


def random_bits(row: Row, step: Step, start: int, stop: int) -> Tensor:
    """`hashed(element ^ key)` of elements `[start, stop)`, int32."""
    key = hashed(row.parameter ^ _key(step))
    return bits_of(row.first + start, row.first + stop, key=key, device=row.weight.device)


def round_(x: Tensor, bits: Tensor | int) -> Tensor:
    """Makes each fp32 number one that bf16 has, in place: the next from zero with the probability of what is cut off.
    `bits` are 16 random ones, int32. Infinities stay, a NaN may become a number: who looks for one looks before."""
    x.view(torch.int32).add_(bits).bitwise_and_(-65536)
    return x


def _stored(x: Tensor, bits: Tensor | int, dtype: torch.dtype) -> Tensor:
    """fp32 stays as it is."""
    return round_(x, bits) if dtype == torch.bfloat16 else x


def step_plain(rows: list[Row], step: Step) -> None:
    """One step of every row, in place: the definition. Of tensors in fp32 nothing is rounded."""
    if step.unless is not None and not step.unless.isfinite():
        return
    decay, size, share1, beta2, share2, root, eps = step.scalars()
    for row in rows:
        weight, grad, first, second = (t.view(-1) for t in (row.weight, row.grad.contiguous(), *row[2:4]))
        for start in range(0, len(weight), CHUNK):
            part = slice(start, min(start + CHUNK, len(weight)))
            w, g, m, v = (t[part].to(torch.float32, copy=True) for t in (weight, grad, first, second))
            m.lerp_(g, share1)
            v.mul_(beta2).addcmul_(g, g, value=share2)
            w.mul_(decay).addcdiv_(m, v.sqrt().mul_(root).add_(eps), value=-size)
            bits = random_bits(row, step, part.start, part.stop)
            weight[part] = _stored(w, bits & 0xFFFF, weight.dtype)
            first[part] = _stored(m, HALF, first.dtype)  # it moves by a tenth of what it is off: nothing to lose
            second[part] = _stored(v, bits.bitwise_right_shift_(16).bitwise_and_(0xFFFF), second.dtype)


if triton is not None:

    @triton.jit
    def _hashed(x):
        x = ((x >> 16) ^ x) * 0x7FEB352D
        x = ((x >> 15) ^ x) * 0x846CA68B
        return (x >> 16) ^ x

    @triton.jit
    def _rounded(x, bits):
        wide = x.to(tl.uint32, bitcast=True) + bits
        return (wide >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)

    @triton.jit(do_not_specialize=["key"])  # else compiled again in the first step whose key is a multiple of 16
    def _step_kernel(
        addresses, sizes, parameters, firsts, of_program, unless, tensors, key,
        decay, size, share1, beta2, share2, root, eps, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.load(of_program + 2 * tl.program_id(0))
        start = tl.load(of_program + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCK
        at = start + tl.arange(0, BLOCK)
        finite = tl.abs(tl.load(unless)) < float("inf")  # false of NaN too
        inside = (at < tl.load(sizes + row)) & finite
        bf16 = tl.pointer_type(tl.bfloat16)
        weight, grad = tl.load(addresses + row).to(bf16), tl.load(addresses + tensors + row).to(bf16)
        first, second = tl.load(addresses + 2 * tensors + row).to(bf16), tl.load(addresses + 3 * tensors + row).to(bf16)
        w = tl.load(weight + at, mask=inside, other=0).to(tl.float32)
        g = tl.load(grad + at, mask=inside, other=0).to(tl.float32)
        m = tl.load(first + at, mask=inside, other=0).to(tl.float32)
        v = tl.load(second + at, mask=inside, other=0).to(tl.float32)
        m += share1 * (g - m)
        v = beta2 * v + share2 * g * g
        w = decay * w - size * m / (tl.sqrt(v) * root + eps)
        element = (tl.load(firsts + row) + at).to(tl.uint32)
        bits = _hashed(element ^ _hashed(tl.load(parameters + row).to(tl.uint32) ^ key.to(tl.uint32)))
        tl.store(weight + at, _rounded(w, bits & 0xFFFF), mask=inside)
        tl.store(first + at, _rounded(m, 0x8000), mask=inside)
        tl.store(second + at, _rounded(v, bits >> 16), mask=inside)


def _to(device: torch.device, values: Tensor) -> Tensor:
    """On the GPU, where the host does not wait for it."""
    pin = device.type == "cuda"
    return (values.pin_memory() if pin else values).to(device, non_blocking=pin)


class _Told:
    """What the GPU was told of some rows: tables of their sizes and places, and of where they lie."""

    def __init__(self, facts: tuple, device: torch.device):
        self.tables = StepKernel._tables(facts, device)
        self.addresses = self.address_table = None


class StepKernel:
    """`step_plain` of all rows of a GPU in one launch; keeps what the GPU was told, as long as it is true."""

    def __init__(self):
        self.told: dict[tuple, _Told] = {}  # all rows of a step, or one at a time where each steps by itself

    def __call__(self, rows: list[Row], step: Step) -> None:
        device = rows[0].weight.device
        rows = [row._replace(grad=row.grad.contiguous()) for row in rows]  # kept until the launch
        facts = tuple((row.weight.numel(), row.parameter, row.first) for row in rows)
        if facts not in self.told:
            self.told[facts] = _Told(facts, device)
        told = self.told[facts]
        addresses = [tensor.data_ptr() for place in range(4) for tensor in (row[place] for row in rows)]
        if addresses != told.addresses:  # gradients move where they are not kept for a CUDA graph
            told.addresses, told.address_table = addresses, _to(device, torch.tensor(addresses))
        unless = torch.zeros((), device=device) if step.unless is None else step.unless
        numbers = unless, len(rows), signed(_key(step)), *step.scalars()
        programs = told.tables[-1]
        _step_kernel[(len(programs),)](told.address_table, *told.tables, *numbers, BLOCK=BLOCK, num_warps=8)

    @staticmethod
    def _tables(facts: tuple[tuple[int, int, int], ...], device: torch.device) -> list[Tensor]:
        """Size, number and first element of each row; row and block, int32 `[programs, 2]`."""
        sizes, parameters, firsts = torch.tensor(facts).unbind(1)
        blocks = (sizes + BLOCK - 1) // BLOCK
        row = torch.repeat_interleave(torch.arange(len(facts)), blocks)
        block = torch.arange(len(row)) - (blocks.cumsum(0) - blocks)[row]
        programs = torch.stack([row, block], dim=1).to(torch.int32)
        return [_to(device, table.contiguous()) for table in (sizes, parameters, firsts, programs)]
