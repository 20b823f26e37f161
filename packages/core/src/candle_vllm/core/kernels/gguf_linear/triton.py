# SPDX-License-Identifier: MIT
"""Linear layers and embedding rows with GGUF's quantised weights on a GPU (step 6 of a request's life).

Terms (group, step, plane): see `layout.py`. `linear_exact` multiplies codes by x exactly, for few rows (decoding), and
for any number of rows with `invariant`. With many rows, rounding weights first is faster, because applying the scales
in `linear_exact` takes about as long as the tensor cores' products. With few rows, rounding would be slower: it takes
about three slow instructions for each weight, and an H200 loads a weight in the time of two. The results are invariant
because every tile of `linear_exact` is too small for wgmma, so that all use the instruction m16n8k16, on Hopper too.

`linear` rounds a tile of weights first, for many rows (prefill). On a GPU whose tensor cores, if any, Triton does not
use, parts of the matrix are decoded, and torch multiplies.

A **codec** reads the planes of a kind of matrix. It extracts codes in two ways. **Pairs** are for few rows of
activations, with which the number of instructions per weight matters: one mask extracts two codes from a word, and the
exponent of 128 (bfloat16) or 1024 (float16) is put above them. That gives the exact floats magic + code, with magic 128
or 1024, without a conversion; the sums are multiplied by scales. **Floats** are for many rows, which use a weight
often: 2048 + code in float32, so that one multiply-add scales the code and subtracts the 2048 again. Codes of a lookup
table are first converted to 8-bit integers, value plus zero point. Each bit of such an integer is a function of the
four bits of its code, computed for the eight codes of a word at once.

Names: g group of a step, h half of a pair, G groups of a step (4, or 2 for 8 bits), LOW and HIGH bits of the planes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import MappingProxyType

import torch
import triton
import triton.language as tl

from candle_vllm.core.kernels.gguf_linear.layout import PLANES, GgufMatrix
from candle_vllm.core.kernels.linear import linear as plain_linear
from candle_vllm.core.kernels.linear.triton import CODED_CUT, Tile, launch, tile_for
from candle_vllm.core.kernels.linear.triton_products import Codec, Operand, exact, rounded
from candle_vllm.core.kernels.packed_linear.layout import LAYOUTS, PackedKind
from candle_vllm.core.kernels.triton_build import OPTIONS, TENSOR_CORES, capability

# Tiles by the number of weights that share a scale. The first tile that has at least as many tokens as x is used,
# otherwise the last. Chosen by counting instructions and registers of the compiled code, not yet measured on a GPU. One
# warp needs no barriers. With more tokens, warps share x; with the most tokens, a step along K takes so long that
# prefetching one step hides the latency.
TILES = MappingProxyType(
    {
        16: (Tile(8, 32, 1, 4), Tile(16, 32, 1, 4), Tile(32, 64, 2, 4), Tile(64, 32, 2, 4), Tile(128, 32, 8, 2)),
        32: (Tile(8, 32, 1, 4), Tile(16, 64, 2, 4), Tile(32, 64, 2, 4), Tile(64, 32, 4, 4), Tile(128, 32, 8, 2)),
    }
)
PLAIN_TILES = MappingProxyType(  # without tensor cores: the largest tiles that do not spill
    {16: (Tile(8, 32, 4, 1),), 32: (Tile(8, 32, 4, 1), Tile(16, 32, 8, 1))}
)
# For codes that are looked up in a table, which takes registers: the largest tiles that do not spill.
TABLE_TILES = (Tile(8, 32, 1, 4), Tile(16, 64, 2, 4), Tile(32, 32, 2, 4), Tile(64, 32, 8, 4))
PLAIN_TABLE_TILES = MappingProxyType(
    {16: (Tile(8, 16, 4, 1), Tile(16, 32, 8, 1)), 32: (Tile(8, 32, 8, 1), Tile(16, 32, 8, 1))}
)
ROUNDED_TILES = (Tile(32, 128, 8, 3), Tile(64, 128, 8, 3), Tile(128, 128, 8, 3))
PIECE = 1 << 24  # weights that are decoded at a time for torch's product


@triton.jit
def spread(word, BITS: tl.constexpr):
    """Convert an element of a plane to int32; its halves hold the codes of the two halves of the pairs."""
    word = word.to(tl.int32)
    if BITS == 1:
        word = (word & 0xF) | ((word & 0xF0) << 12)
    if BITS == 2:
        word = (word & 0xFF) | ((word & 0xFF00) << 8)
    return word


@triton.jit
def moved(word, at: tl.constexpr, to: tl.constexpr):
    """Shift a word so that bit `at` becomes bit `to`."""
    if at > to:
        word = word >> (at - to)
    elif at < to:
        word = word << (to - at)
    return word


@triton.jit
def pair_tile(
    low,
    high,
    at: tl.constexpr,
    g: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    dtype: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Return magic + code (of 8 bits, 4 from `at` on) as dtype [ROWS, COLS], from spread words [ROWS, COLS / 2]."""
    BITS: tl.constexpr = 4 if LOW == 8 else LOW
    # Masks are constants: with values as masks, Triton converts layouts after the extraction, in twice the time.
    MAGIC: tl.constexpr = 0x43004300 if dtype == tl.bfloat16 else 0x64006400
    word = moved(low, at + LOW * g, 0) & (((1 << BITS) - 1) * 0x00010001) | MAGIC
    if HIGH > 0:
        word |= moved(high, HIGH * g, LOW) & ((((1 << HIGH) - 1) << LOW) * 0x00010001)
    first = word.to(tl.int16).to(dtype, bitcast=True)
    second = (word >> 16).to(tl.int16).to(dtype, bitcast=True)
    return tl.reshape(tl.join(first, second), (ROWS, COLS))


@triton.jit
def float_code(low, high, g: tl.constexpr, h: tl.constexpr, G: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Return 2048 + code in float32."""
    at: tl.constexpr = g + G * h
    code = moved(low.to(tl.int32), LOW * at, 12) & (((1 << LOW) - 1) << 12)
    if HIGH > 0:
        code |= moved(high.to(tl.int32), HIGH * at, 12 + LOW) & (((1 << HIGH) - 1) << (12 + LOW))
    return (code | 0x45000000).to(tl.float32, bitcast=True)


@triton.jit
def half_of(word, HIGH: tl.constexpr):
    """Return the upper (HIGH) or lower float16 in a word as float32."""
    if HIGH:
        word = word >> 16
    return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def scale_of(words, g: tl.constexpr, half: tl.constexpr, FORM: tl.constexpr):
    """Return scale and offset of group g, or of `half` if 16 weights share them; a weight is scale * code + offset."""
    NESTED: tl.constexpr = FORM.nested
    MINIMUM: tl.constexpr = FORM.minimum
    WIDTH: tl.constexpr = FORM.width
    ZERO: tl.constexpr = FORM.zero
    FACTOR: tl.constexpr = FORM.factor
    w0, w1, w2, w3, above = words
    if NESTED:
        if WIDTH == 32 and MINIMUM:
            scale = ((w0 >> (8 * g)) & 255).to(tl.float32) * half_of(above, False)
            minimum = ((w1 >> (8 * g)) & 255).to(tl.float32) * half_of(above, True)
        elif WIDTH == 32:
            scale = ((w0 << (24 - 8 * g)) >> 24).to(tl.float32) * (half_of(above, False) * FACTOR)
            minimum = scale * -ZERO
        else:
            index: tl.constexpr = (2 * g + half) % 4
            word = w0 if g < 2 else w1
            if MINIMUM:
                scale = ((word >> (8 * index)) & 15).to(tl.float32) * half_of(above, False)
                minimum = ((word >> (8 * index + 4)) & 15).to(tl.float32) * half_of(above, True)
            else:
                scale = ((word << (24 - 8 * index)) >> 24).to(tl.float32) * (half_of(above, False) * FACTOR)
                minimum = scale * -ZERO
    elif MINIMUM:
        pair = w0 if g == 0 else (w1 if g == 1 else (w2 if g == 2 else w3))
        scale = half_of(pair, False)
        minimum = half_of(pair, True)
    else:
        scale = half_of(w0 if g < 2 else w1, g % 2 == 1)
        minimum = scale * -ZERO
    return scale, minimum


# ---- the codec -------------------------------------------------------------------------------------------------------


@triton.jit
def _words(planes, step, row, inside, height, _pitch, FORM: tl.constexpr):
    """Load the words of a step for some rows: up to four of `scales`, and one of `supers`. `height` is int64."""
    WORDS: tl.constexpr = FORM.count
    at = planes[2] + step * (height * WORDS) + row
    w0 = tl.load(at, mask=inside, other=0)
    w1 = w0
    w2 = w0
    w3 = w0
    if WORDS > 1:
        w1 = tl.load(at + height, mask=inside, other=0)
    if WORDS > 2:
        w2 = tl.load(at + 2 * height, mask=inside, other=0)
        w3 = tl.load(at + 3 * height, mask=inside, other=0)
    above = w0
    if FORM.nested:
        above = tl.load(planes[3] + (step // 2) * height + row, mask=inside, other=0)
    return w0, w1, w2, w3, above


@triton.jit
def _codes(planes, step, element, row, inside, height, FORM: tl.constexpr, EXACT: tl.constexpr):
    """Load elements of both planes as stored, or converted by `spread` if the product uses pairs.

    Two steps share an element of single bits.
    """
    LOW: tl.constexpr = FORM.low
    HIGH: tl.constexpr = FORM.high
    lows = tl.load(planes[0] + (step * height + row)[:, None] * 16 + element, mask=inside[:, None], other=0)
    if EXACT:
        lows = spread(lows, LOW)
    highs = lows
    if HIGH > 0:
        above = step // 2 if HIGH == 1 else step
        place = (above * height + row[:, None]) * 16 + element
        highs = tl.load(planes[1] + place, mask=inside[:, None], other=0).to(tl.int32)
        if HIGH == 1:
            highs = highs >> ((step % 2) * 8)
        if EXACT:
            highs = spread(highs, HIGH)
    return lows, highs


@triton.jit
def truth(bit0, bit1, bit2, bit3, TABLE: tl.constexpr):
    """Apply a function of four bits at every bit position of a word: bit c of the table is the result for code c."""
    upper = bit3 & _of_three(bit0, bit1, bit2, TABLE >> 8)
    return upper | ~bit3 & _of_three(bit0, bit1, bit2, TABLE & 255)


@triton.jit
def _of_three(bit0, bit1, bit2, TABLE: tl.constexpr):
    return bit2 & _of_two(bit0, bit1, TABLE >> 4) | ~bit2 & _of_two(bit0, bit1, TABLE & 15)


@triton.jit
def _of_two(bit0, bit1, TABLE: tl.constexpr):
    FIRST: tl.constexpr = -(TABLE & 1)  # results for codes 0 to 3: words of all ones or all zeros
    SECOND: tl.constexpr = -(TABLE >> 1 & 1)
    THIRD: tl.constexpr = -(TABLE >> 2 & 1)
    FOURTH: tl.constexpr = -(TABLE >> 3 & 1)
    return bit1 & (bit0 & FOURTH | ~bit0 & THIRD) | ~bit1 & (bit0 & SECOND | ~bit0 & FIRST)


@triton.jit
def _found(planes, step, element, row, inside, height, FORM: tl.constexpr, _EXACT: tl.constexpr):
    """Look up 4-bit codes; return the lower and the upper four bits of the 8-bit integers instead of the codes."""
    word = tl.load(planes[0] + (step * height + row)[:, None] * 16 + element, mask=inside[:, None], other=0)
    one = word
    two = word >> 1
    four = word >> 2
    eight = word >> 3
    lower = truth(one, two, four, eight, FORM.tables[0]) & 0x11111111
    upper = truth(one, two, four, eight, FORM.tables[4]) & 0x11111111
    for bit in tl.static_range(1, 4):
        lower |= (truth(one, two, four, eight, FORM.tables[bit]) & 0x11111111) << bit
        upper |= (truth(one, two, four, eight, FORM.tables[4 + bit]) & 0x11111111) << bit
    return lower, upper


@triton.jit
def _half_pairs(
    codes, _words, at: tl.constexpr, g: tl.constexpr, FORM: tl.constexpr, dtype: tl.constexpr, ROWS: tl.constexpr
):
    """Return magic + the lower or the upper four bits of an 8-bit integer, as dtype [ROWS, width]."""
    half = codes[0] if at == 0 else codes[1]
    return pair_tile(half, half, 0, g, 4, 0, dtype, ROWS, FORM.width)


@triton.jit
def _scale(words, unit: tl.constexpr, part: tl.constexpr, OFFSET: tl.constexpr, FORM: tl.constexpr):
    scale, minimum = scale_of(words, unit, part, FORM)
    return scale, minimum - scale * OFFSET


@triton.jit
def code_pairs(
    codes, _words, at: tl.constexpr, g: tl.constexpr, FORM: tl.constexpr, dtype: tl.constexpr, ROWS: tl.constexpr
):
    """Return magic + code (4 bits of an 8-bit code, from `at` on) as dtype [ROWS, width]."""
    return pair_tile(codes[0], codes[1], at, g, FORM.low, FORM.high, dtype, ROWS, FORM.width)


@triton.jit
def scaled_codes(codes, g: tl.constexpr, scale, shift, FORM: tl.constexpr, dtype: tl.constexpr, ROWS: tl.constexpr):
    """Return (2048 + code) * scale + shift as dtype [ROWS, 32]."""
    even = float_code(codes[0], codes[1], g, 0, FORM.parts, FORM.low, FORM.high) * scale + shift
    odd = float_code(codes[0], codes[1], g, 1, FORM.parts, FORM.low, FORM.high) * scale + shift
    return tl.reshape(tl.join(even, odd), (ROWS, 32)).to(dtype)


@triton.jit
def _rounded(codes, words, g: tl.constexpr, FORM: tl.constexpr, dtype: tl.constexpr, ROWS: tl.constexpr):
    WIDTH: tl.constexpr = FORM.width
    scale, minimum = scale_of(words, g, 0, FORM)
    scale = scale[:, None]
    shift = minimum[:, None] - scale * 2048.0
    if WIDTH == 16:
        scale_2, minimum_2 = scale_of(words, g, 1, FORM)
        second = (tl.arange(0, 16) >= 8)[None, :]
        shift = tl.where(second, (minimum_2 - scale_2 * 2048.0)[:, None], shift)
        scale = tl.where(second, scale_2[:, None], scale)
    return scaled_codes(codes, g, scale, shift, FORM, dtype, ROWS)


@dataclass(frozen=True, eq=False, kw_only=True)
class GgufCodec(Codec):
    """Codec of a kind of GGUF matrix.

    Attributes:
        count: number of words of a row in a step of `scales`.
        nested, minimum, zero: as in `packed_linear.layout.TileLayout`.
        factor: as in `Planes`.
        tables: for codes of a lookup table: for each bit of value + zero an integer, of which bit c is for code c.
    """

    count: int
    nested: bool
    minimum: bool
    zero: int
    factor: float
    tables: tuple[int, ...]


@functools.cache
def codec(kind: PackedKind) -> GgufCodec:
    planes = PLANES[kind]
    layout = planes.layout
    numbers = [] if layout.values is None else [value + layout.zero for value in layout.values]
    return GgufCodec(
        words=_words,
        codes=_found if numbers else _codes,
        scale=_scale,
        tile=_half_pairs if numbers else code_pairs,
        rounded=_rounded,
        low=planes.low,
        high=4 if numbers else planes.high,
        parts=planes.groups,
        width=layout.width,
        count=planes.words,
        nested=layout.nested,
        minimum=layout.minimum,
        zero=layout.zero,
        factor=planes.factor,
        tables=tuple(sum((number >> bit & 1) << code for code, number in enumerate(numbers)) for bit in range(8)),
    )


def operand(matrix: GgufMatrix) -> Operand:
    planes = matrix.low, matrix.high, matrix.scales, matrix.supers
    steps = matrix.planes.steps(matrix.columns)
    return Operand(planes, matrix.rows, matrix.columns, None, steps, codec(matrix.kind))


# ---- the launches ----------------------------------------------------------------------------------------------------


@triton.jit
def embedding_kernel(
    token_ids,  # [T]
    low,
    high,
    scales,
    supers,
    out,  # [T, K]
    N,
    K,
    FORM: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Decode `parts` groups of 32 weights of one token's row in a program."""
    G: tl.constexpr = FORM.parts
    LOW: tl.constexpr = FORM.low
    HIGH: tl.constexpr = FORM.high
    WIDTH: tl.constexpr = FORM.width
    step = tl.program_id(1)
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(token_ids + token + tl.arange(0, 1)).to(tl.int64)
    inside = (row >= 0) & (row < N)
    height = tl.cast(N, tl.int64)
    planes = (low, high, scales, supers)
    words = FORM.words(planes, step, row, inside, height, None, FORM)
    element = tl.arange(0, 16)
    lows, highs = FORM.codes(planes, step, element[None, :], row, inside, height, FORM, False)
    for g in tl.static_range(G):
        scale, minimum = scale_of(words, g, 0, FORM)
        if WIDTH == 16:
            scale_2, minimum_2 = scale_of(words, g, 1, FORM)
            scale = tl.where(element >= 8, scale_2, scale)
            minimum = tl.where(element >= 8, minimum_2, minimum)
        even = (float_code(lows, highs, g, 0, G, LOW, HIGH) - 2048.0) * scale + minimum
        odd = (float_code(lows, highs, g, 1, G, LOW, HIGH) - 2048.0) * scale + minimum
        k = (step * G + g) * 32 + tl.arange(0, 32)
        values = tl.reshape(tl.join(even, odd), (32,)).to(out.dtype.element_ty)
        tl.store(out + token * K + k, values, mask=(k < K) if PADDED else None)


def linear_exact(
    x: torch.Tensor, matrix: GgufMatrix, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply exactly: made for few rows, valid for any number; see the contract in the package."""
    tile = _tile(len(x), matrix.kind, capability(x.device))
    return launch(x, operand(matrix), bias, out, exact, tile, CODED_CUT)


def linear(
    x: torch.Tensor, matrix: GgufMatrix, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply any number of rows by weights that are rounded first; see the contract in the package."""
    if capability(x.device) >= TENSOR_CORES or not len(x):
        return launch(x, operand(matrix), bias, out, rounded, tile_for(len(x), ROUNDED_TILES))
    if out is None:
        out = torch.empty((len(x), matrix.rows), dtype=x.dtype, device=x.device)
    height = max(1, PIECE // matrix.columns)
    for first in range(0, matrix.rows, height):
        last = min(first + height, matrix.rows)
        weights = embedding(torch.arange(first, last, device=x.device), matrix, x.dtype)
        plain_linear(x, weights, None if bias is None else bias[first:last], out=out[:, first:last])
    return out


def embedding(token_ids: torch.Tensor, matrix: GgufMatrix, dtype: torch.dtype) -> torch.Tensor:
    """See the contract in the package."""
    assert token_ids.dim() == 1
    assert token_ids.is_contiguous()
    assert token_ids.dtype in (torch.int32, torch.int64)
    assert token_ids.device == matrix.device
    out = torch.empty((len(token_ids), matrix.columns), dtype=dtype, device=matrix.device)
    if len(token_ids):
        given = operand(matrix)
        embedding_kernel[(len(token_ids), given.steps)](
            token_ids,
            *given.planes,
            out,
            matrix.rows,
            matrix.columns,
            FORM=given.form,
            PADDED=given.padded,
            num_warps=1,
            **OPTIONS,
        )
    return out


def _tile(tokens: int, kind: PackedKind, capability: int) -> Tile:
    if PLANES[kind].layout.values is not None:
        return tile_for(tokens, TABLE_TILES if capability >= TENSOR_CORES else PLAIN_TABLE_TILES[LAYOUTS[kind].width])
    return tile_for(tokens, (TILES if capability >= TENSOR_CORES else PLAIN_TILES)[LAYOUTS[kind].width])
