"""Triton: DoRA's factored row norm of a 4-bit weight from its packed rows; the weight is never written.

`methods.dora.row_norms` defines the result. A program looks a tile of 128 rows and 128 columns up in registers, where
the tensor cores take it from, and multiplies its `W A^T` by its rows of B at once: one number a row is left.
"""

from functools import lru_cache
from typing import NamedTuple

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

from methods.kernels.dequantize import code_table
from methods.packed import as_bytes

MAX_RANK = 128  # beyond it the tiles no longer fit
TILE, PROGRAMS = 128, 264  # rows and columns of a tile; at most, for 132 multiprocessors


class PackedRows(NamedTuple):
    """Rows of a bitsandbytes weight and how to read them.

    quant_type: "nf4" or "fp4"; group_size: how many weights of a row share a scale.
    codes: bytes `[n, in/2]`, high nibble first; scales: `[n, in/group]`, bytes if there are ranges.
    ranges: fp32 `[n, 2]`, smallest scale and step of a row whose scales are 8 bits, or None.
    """

    quant_type: str
    group_size: int
    codes: torch.Tensor
    scales: torch.Tensor
    ranges: torch.Tensor | None = None


# The 8 words of the table in `lookup_ptx`: high bytes of its 16 values, then low bytes. Two elements go through the PTX
# at once, so an operand that both share comes twice: hence every other number.
TABLE = [f"${number}" for number in range(11, 27, 2)]
HIGH, LOW = TABLE[:4], TABLE[4:]


def lookup_ptx() -> str:
    """PTX: two words of 8 codes -> 8 pairs of bf16, pair i = column i of each word, times the scale of its word.

    `prmt d, p, q, s` makes d of 4 of the 8 bytes of p (0 to 3) and q (4 to 7). Each of the lower 4 hexadecimal digits
    of s picks one, the lowest digit for the lowest byte. A code is such a digit: so a register of codes is itself a
    selector, and one prmt looks up one byte of 4 values among 8 values of the table. For 16 it takes two, and a third
    that chooses between them.

    Operands: $0 to $7 the pairs; $8 and $9 the words, v and w below; $10 both scales, bf16; then the table.
    Registers: x codes; m, c selectors; a, b for the moment; h, l high and low bytes of values; z two zeros.
    """
    # z is negative, so that adding it changes nothing. It is added since only a Hopper and later has `mul.bf16x2`.
    lines = [".reg .b32 x, m, c, a, b, h, l, z;", "mov.b32 z, 0x80008000;"]
    for column, two_bytes in ((0, "0x5140"), (4, "0x7362")):
        lines += [f"prmt.b32 x, $8, $9, {two_bytes};"]  # bytes v0 w0 v1 w1, from the lowest; then v2 w2 v3 w3
        lines += _selectors()
        lines += _look_up("h", HIGH) + _look_up("l", LOW) + _scaled_pairs(column)
        lines += ["shr.u32 m, m, 16;", "shr.u32 c, c, 16;"]  # on to v1 w1
        lines += _look_up("h", HIGH) + _look_up("l", LOW) + _scaled_pairs(column + 2)
    return "{\n" + "\n".join(lines) + "\n}"


def _selectors() -> list[str]:
    """From the 8 codes in x, a digit for each:

    m: the lower three bits of the code, which of 8 values. With the fourth, prmt would repeat the sign of a byte.
    c: its place, 0 to 3, or 4 more if it has the fourth bit: that byte of a (codes 0 to 7) or of b (codes 8 to 15).
    """
    return [
        "and.b32 m, x, 0x77777777;",
        "shr.u32 c, x, 1;",
        "lop3.b32 c, c, 0x44444444, 0x32103210, 0xea;",  # 0xea: (c & 0x4444...) | 0x3210...
    ]


def _look_up(out: str, table: list[str]) -> list[str]:
    """out: the high or low bytes of the values of 4 codes, those of the lower and upper half of v0, then of w0.

    a: what they are if the code is one of 0 to 7; b: if it is one of 8 to 15.
    """
    t0, t1, t2, t3 = table
    return [f"prmt.b32 a, {t0}, {t1}, m;", f"prmt.b32 b, {t2}, {t3}, m;", f"prmt.b32 {out}, a, b, c;"]


def _scaled_pairs(column: int) -> list[str]:
    """$column: the values of the upper halves of v0 and w0, which come first in a row, times the scales; the number
    after it: those of the lower halves. Each value gets its low byte from l and its high byte from h."""
    return [
        "prmt.b32 a, l, h, 0x7351;",
        f"fma.rn.bf16x2 ${column}, a, $10, z;",
        "prmt.b32 b, l, h, 0x6240;",
        f"fma.rn.bf16x2 ${column + 1}, b, $10, z;",
    ]


@lru_cache
def table_words(quant_type: str) -> tuple[int, ...]:
    """The 16 values of the code, bf16, as `lookup_ptx` takes them: 8 signed 32-bit words, 4 of their high bytes, 4 of
    their low bytes."""
    raw = code_table(quant_type, torch.device("cpu")).bfloat16().view(torch.uint8).view(16, 2)  # low byte, high byte
    return tuple(raw.flip(1).T.contiguous().view(torch.int32).flatten().tolist())


if triton is not None:
    LOOKUP, OPERANDS = tl.constexpr(lookup_ptx()), tl.constexpr(",".join(["=r"] * 8 + ["r"] * 19))

    @triton.jit
    def _reorder_kernel(a, out, rank, width, RANK: tl.constexpr):
        """A^T, `[in, RANK]`, rows of each tile in the order in which `_product_kernel` multiplies them."""
        k, r = tl.program_id(1) * 32 + tl.arange(0, 32), tl.arange(0, RANK)
        word = k % 8 // 2 * 4 + k // 8 % 2 * 2 + k % 2
        column = tl.program_id(0) * 128 + word * 8 + k // 16
        value = tl.load(a + r[None, :] * width + column[:, None], mask=(r < rank)[None, :], other=0)
        tl.store(out + (tl.program_id(0) * 128 + k)[:, None] * RANK + r[None, :], value)

    @triton.jit
    def _weights(w, s, table, t0, t1, t2, t3, t4, t5, t6, t7):
        """Words and scales `[128, 4, 4]` to weights `[128, 4, 4, 8]`, in bf16 as the scales are."""
        if s.dtype == tl.bfloat16:
            p0, p1, p2, p3, p4, p5, p6, p7 = tl.inline_asm_elementwise(
                LOOKUP, OPERANDS, [w, s, t0, t1, t2, t3, t4, t5, t6, t7], dtype=(tl.bfloat16,) * 8, is_pure=True, pack=2
            )
        else:  # for Triton's interpreter, whose bf16 has no arithmetic and which knows no PTX
            p0, p1 = tl.load(table + (w >> 4 & 15)) * s, tl.load(table + (w & 15)) * s
            p2, p3 = tl.load(table + (w >> 12 & 15)) * s, tl.load(table + (w >> 8 & 15)) * s
            p4, p5 = tl.load(table + (w >> 20 & 15)) * s, tl.load(table + (w >> 16 & 15)) * s
            p6, p7 = tl.load(table + (w >> 28 & 15)) * s, tl.load(table + (w >> 24 & 15)) * s
        even, odd = tl.join(tl.join(p0, p4), tl.join(p2, p6)), tl.join(tl.join(p1, p5), tl.join(p3, p7))
        return tl.join(even, odd).reshape(128, 4, 4, 8)

    # The table comes in arguments: loaded, or written into the PTX, ptxas would copy its registers for each lookup. Not
    # in one tuple: Triton specializes what is in a tuple despite do_not_specialize, so a word of 1 would be a constant.
    @triton.jit(do_not_specialize=[*(f"t{i}" for i in range(8)), "per_split"])
    def _product_kernel(
        words, scales, ranges, table, t0, t1, t2, t3, t4, t5, t6, t7, a, b, product, gram, rows, tiles, rank, per_split,
        GROUP: tl.constexpr, DOUBLE: tl.constexpr, RANK: tl.constexpr,
    ):  # fmt: skip
        """One split's share of `rowsum((W A^T) * B)`, and in the last program of `A A^T`.

        The packed rows: words (8 codes each), scales, ranges; table (for the interpreter) and its words t0 to t7.
        The adapter: a from `_reorder_kernel`, b. The results: product, gram. Sizes: rows, tiles of a row, rank, and
        per_split, the tiles of a split.

        Words are loaded so that a thread has 4 of a row, four threads a row, a warp 8 rows, 8 warps 64, and all of them
        the other 64. wgmma wants of a warp's thread, for 16 columns: of its rows i and i + 8 the columns 2q, 2q + 1,
        2q + 8 and 2q + 9, q = 0..3. Nothing moves between threads if place i of a warp is one of the first 64 rows,
        i + 8 one of the others, and the 16 columns are the same column of the 16 words, the four of thread q at those
        places. Columns may come in any order that A's have too; the rows' order is undone at the end.
        """
        GROUPS: tl.constexpr = 128 // GROUP  # of a tile
        split, first = tl.program_id(1), tl.program_id(1) * per_split
        last = tl.minimum(first + per_split, tiles)
        r = tl.arange(0, RANK)
        a_at = a + tl.arange(0, 128)[:, None] * RANK + r[None, :]
        if tl.program_id(0) * 128 < rows:
            row = tl.minimum(tl.program_id(0) * 128 + tl.arange(0, 128), rows - 1)
            word_at = words + (row * (tiles * 16))[:, None] + tl.arange(0, 16)[None, :]  # int32: to 2^34 weights
            quarter = tl.arange(0, 4)  # of the tile's columns: a thread's 4 words
            scale_at = scales + (row * (tiles * GROUPS))[:, None] + (quarter * GROUPS // 4)[None, :]
            if DOUBLE:
                range_at = ranges + 2 * row[:, None] + 0 * quarter[None, :]
                low, step = tl.load(range_at), tl.load(range_at + 1)
            total = tl.zeros((128, RANK), tl.float32)
            next_w, next_s = tl.load(word_at + first * 16), tl.load(scale_at + first * GROUPS)
            next_a = tl.load(a_at + first * (128 * RANK))
            for tile in range(first, last):  # loads of the next tile are under way while this one is multiplied
                w, scale, right = next_w, next_s.to(tl.float32), next_a
                then = tl.minimum(tile + 1, last - 1)
                next_w, next_s = tl.load(word_at + then * 16), tl.load(scale_at + then * GROUPS)
                next_a = tl.load(a_at + then * (128 * RANK))
                if DOUBLE:
                    scale = low + step * scale
                s = tl.broadcast_to(scale.to(a.dtype.element_ty)[:, :, None], (128, 4, 4))
                left = _weights(w.reshape(128, 4, 4), s, table, t0, t1, t2, t3, t4, t5, t6, t7)
                left = left.reshape(2, 8, 8, 4, 2, 2, 8)  # half, warp, row; quarter, word's two bits, column
                total = tl.dot(tl.permute(left, (1, 0, 2, 6, 4, 3, 5)).reshape(128, 128), right, total)
            i = tl.arange(0, 128)
            own = tl.program_id(0) * 128 + i // 8 % 2 * 64 + i // 16 * 8 + i % 8  # the row at place i
            inside = own < rows
            lora_b = tl.load(b + own[:, None] * rank + r[None, :], mask=inside[:, None] & (r < rank)[None, :], other=0)
            tl.store(product + split * rows + own, tl.sum(total * lora_b.to(tl.float32), axis=1), mask=inside)
        else:
            square = tl.zeros((RANK, RANK), tl.float32)
            for tile in range(first, last):
                right = tl.load(a_at + tile * (128 * RANK))
                square = tl.dot(tl.trans(right), right, square)
            mask = (r < rank)[:, None] & (r < rank)[None, :]
            tl.store(gram + (split * rank + r)[:, None] * rank + r[None, :], square, mask=mask)

    @triton.jit(do_not_specialize=["splits"])
    def _finish_kernel(
        weight_norm, product, gram, b, out, rows, rank, splits, scaling, BLOCK: tl.constexpr, RANK: tl.constexpr,
        PART: tl.constexpr,
    ):  # fmt: skip
        row, r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, RANK)
        inside = row < rows
        added = tl.zeros((BLOCK,), tl.float32)
        for split in range(splits):
            added += tl.load(product + split * rows + row, mask=inside, other=0)
        # B (A A^T), a few columns of B at a time: the whole of A A^T would not stay in registers
        through = tl.zeros((BLOCK, RANK), tl.float32)
        for first in range(0, RANK, PART):
            k = first + tl.arange(0, PART)
            mask = (k < rank)[:, None] & (r < rank)[None, :]
            square = tl.zeros((PART, RANK), tl.float32)
            for split in tl.range(splits, loop_unroll_factor=4):  # few rows have many splits: wait for four at once
                square += tl.load(gram + (split * rank + k)[:, None] * rank + r[None, :], mask=mask, other=0)
            some = tl.load(b + row[:, None] * rank + k[None, :], mask=inside[:, None] & (k < rank)[None, :], other=0)
            through = tl.dot(some.to(tl.float32), square, through, input_precision="tf32x3")
        lora_b = tl.load(b + row[:, None] * rank + r[None, :], mask=inside[:, None] & (r < rank)[None, :], other=0)
        low_rank = tl.sum(through * lora_b.to(tl.float32), axis=1)
        norm = tl.load(weight_norm + row, mask=inside, other=0)
        squared = norm * norm + 2 * scaling * added + scaling * scaling * low_rank
        tl.store(out + row, tl.sqrt(tl.maximum(squared, 0)), mask=inside)


def fits(weight: torch.Tensor, *, rank: int) -> bool:
    """Whether `finish` runs for rows that lie where `weight` lies: CUDA, tiles that fit."""
    return triton is not None and weight.is_cuda and rank <= MAX_RANK


def suits(rows: PackedRows, lora_a: torch.Tensor) -> bool:
    """Whether `row_norms` runs: bf16 on an Ampere or later, whole tiles, words loaded 4 at once."""
    codes = rows.codes
    if not fits(codes, rank=len(lora_a)) or torch.version.cuda is None:
        return False
    whole = codes.shape[1] * 2 % TILE == 0 and rows.group_size in (32, 64, 128) and codes.data_ptr() % 16 == 0
    return whole and lora_a.dtype == torch.bfloat16 and torch.cuda.get_device_capability(codes.device) >= (8, 0)


def row_norms(rows: PackedRows, weight_norm: torch.Tensor, *, lora_a, lora_b, scaling: float) -> torch.Tensor:
    """`||W + s B A||` of each row, fp32 `[n]`, for what `suits`; W is the bf16 product of bf16 table and bf16 scales.

    Args:
        weight_norm: fp32 `[n]`.
        lora_a: bf16 `[r, in]`, or fp32 in Triton's interpreter, which then rounds nothing; lora_b: `[n, r]`.
    """
    if not len(rows.codes):
        return weight_norm.clone()
    product, gram = _products(rows, lora_a, lora_b)
    return finish(weight_norm, product=product, gram=gram, lora_b=lora_b, scaling=scaling)


def _products(rows: PackedRows, lora_a: torch.Tensor, lora_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`rowsum((W A^T) * B)`, fp32 `[splits, n]`, and `A A^T`, fp32 `[splits, r, r]`: of each split of the columns."""
    n, rank, tiles, device = len(rows.codes), len(lora_a), rows.codes.shape[1] * 2 // TILE, rows.codes.device
    a, double = _reordered(lora_a), rows.ranges is not None
    blocks = triton.cdiv(n, TILE)
    splits = max(1, min(tiles // 2, PROGRAMS // blocks))
    per_split = triton.cdiv(tiles, splits)
    splits = triton.cdiv(tiles, per_split)
    product = torch.empty(splits, n, dtype=torch.float32, device=device)
    gram = torch.empty(splits, rank, rank, dtype=torch.float32, device=device)
    _product_kernel[(blocks + 1, splits)](
        as_bytes(rows.codes).view(torch.int32), as_bytes(rows.scales) if double else rows.scales, rows.ranges,
        code_table(rows.quant_type, device), *table_words(rows.quant_type), a, lora_b.contiguous(), product, gram,
        n, tiles, rank, per_split, GROUP=rows.group_size, DOUBLE=double, RANK=a.shape[1],
        num_warps=8, num_stages=1,  # 8: the order of rows; with more stages ptxas waits after each wgmma
    )  # fmt: skip
    return product, gram


def _reordered(lora_a: torch.Tensor) -> torch.Tensor:
    """A^T, `[in, padded rank]`, as `_product_kernel` takes it."""
    rank, width = lora_a.shape
    out = torch.empty(width, _padded(rank), dtype=lora_a.dtype, device=lora_a.device)
    _reorder_kernel[(width // TILE, 4)](lora_a.contiguous(), out, rank, width, RANK=out.shape[1], num_warps=4)
    return out


def _padded(rank: int) -> int:
    """The width of a tile that holds the rank."""
    return max(16, triton.next_power_of_2(rank))


def finish(weight_norm: torch.Tensor, *, product, gram, lora_b, scaling: float) -> torch.Tensor:
    """`sqrt(norm^2 + 2 s product + s^2 rowsum((B gram) * B))`, fp32 `[n]`, in one pass.

    Args:
        weight_norm: fp32 `[n]`; lora_b: `[n, r]`.
        product: fp32 `[splits, n]`, whose sum is `rowsum((W A^T) * B)`; gram: fp32 `[splits, r, r]`, of `A A^T`.
    """
    rows, rank = lora_b.shape
    padded = _padded(rank)
    out = torch.empty(rows, dtype=torch.float32, device=lora_b.device)
    if rows:
        _finish_kernel[(triton.cdiv(rows, 64),)](
            weight_norm, product, gram, lora_b.contiguous(), out, rows, rank, len(product), scaling,
            BLOCK=64, RANK=padded, PART=min(padded, 2048 // padded), num_warps=4,
        )  # fmt: skip
    return out
