# SPDX-License-Identifier: MIT
"""Emitted code for a quantised KV cache on the CPU, in blocks of 32 elements of a key or value (terms: `cpu_cache.py`).

An element is scale * (code - bias) with an fp16 scale per block and unsigned codes, which have 8 bits in q8_0 (GGUF's
are signed), 6 bits in q6_0 and 4 bits in q4_0. In iq4_nl it is scale * `LEVELS`[code], with 4 bits in the layout of
q4_0. In q5_1 it is scale * code + minimum, with 5 bits and an fp16 minimum; see `CacheKind`. The layout suits an
instruction that adds four products of bytes in each of 16 lanes of 4-byte words:

- a strip of keys: words of 4 dimensions, [D / 4, W] (q8_0), or of 8 dimensions, [D / 8, W], the first four in the low
  halves of the bytes (q4_0); then the scales of two blocks as one word, [D / 64 rounded up, W];
- a tile of values: [D / 32, 4, 32, 4] bytes, four positions of a dimension adjacent (q8_0), or [D / 32, 4, 16, 4] with
  dimension i + 16 in the high halves (q4_0); then scales [D / 32, 16].

Codes of 5 to 7 bits have the layout of q4_0, and after each block's codes one to three planes, a word for each bit
above the fourth: for keys [D / 32, 4 + planes, W], dimension 4 k + j at bit 8 j + k; for values [planes, 16] after the
block's 256 bytes, dimension i at bit i. Codes of 2 and 3 bits are stored in planes only. A scale and minimum are one
word for keys, [D / 32, W], and [D / 32, 2, 16] for values. A key's minimum is multiplied by the sum of a query's codes.
The values' minima times a row's probabilities are summed in order of position in each lane, then over the lanes.

No two positions share a byte, because two threads may write them. A query is int8 [D], then the blocks' float32 scales
[D / 32], then the int32 sums of their codes [D / 32]. For each row and block of values, a chunk's probabilities times
the scales of its values are rounded to 15-bit integers, relative to the largest. So all sums of products with codes are
exact, and all other sums have a fixed order: a result depends neither on the instruction set nor on other rows.

Before they are quantised, queries, keys and values are multiplied by a Hadamard matrix, which spreads outliers of a few
dimensions over all; for values this is undone after attention. Before the multiplication, keys and queries are fitted
to each other (`engine/runners/key_fit.py`). An offset that is the same for all keys of a head is subtracted from keys:
softmax does not depend on it, but it may be a hundred times the difference between keys, as in Qwen2, and rounding
would lose the difference. And each dimension of keys is multiplied by a factor, by which that dimension of queries is
divided, so that no dimension of one is large where the other is small. Sources: llama.cpp's `ggml-quants.c` (formats);
Ashkboos et al., 2024, arXiv:2404.00456 (rotation); Zhang et al., 2024, arXiv:2411.10958 (offset); Xiao et al., 2023,
arXiv:2211.10438 (factors).
"""

from __future__ import annotations

import math
from functools import reduce
from itertools import pairwise
from typing import Any

from llvmlite import ir
from numba import njit

from candle_vllm.core.kernels.attention.cpu_cache import (
    BLOCK,
    CHUNK,
    LEVELS,
    PROBABILITY_STRIDE,
    SCORE_STRIDE,
    TILES,
    CacheKind,
    code_bytes,
    partial_floats,
)
from candle_vllm.core.kernels.cpu_runtime.emit import (
    F16,
    F32,
    I8,
    I16,
    I32,
    I64,
    SHIFTER,
    Double,
    Emitter,
    Int,
    emitted,
    vector,
)
from candle_vllm.core.kernels.cpu_runtime.emit_functions import emit_larger, emit_larger_size, emit_largest_lane
from candle_vllm.core.kernels.cpu_runtime.emit_tables import look_up
from candle_vllm.core.kernels.cpu_runtime.level import LANES, Isa

_LARGEST_HALF = 65504.0
_LARGEST_WEIGHT = 16383.0
_SCALES = (1.0, 0.92, 0.85, 0.78)  # a block of 4 bits has the best of these scales: larger numbers end at the last code
_LEVEL_SCALES = (1.0, 0.93)  # the same for a block with levels, for each sign of the scale
_FACTORS = [level - LEVELS[0] for level in LEVELS]
_LEAST = 1e-30  # blocks and chunks' probabilities whose scale is smaller are treated as zeros


def _halves(e: Emitter, codes: Any, kind: CacheKind, planes: list[list[Any]], isa: Isa) -> list[Any]:
    """Unpack words (None without bits in `kind.low`) to four factors in each lane; a plane has bits of both halves."""
    if not kind.has_halves:
        return [codes]
    low, b = e.constant(I32, 0x0F0F0F0F), e.b
    parts = list(planes)
    if kind.low:
        parts.insert(0, [b.and_(codes, low), b.and_(b.lshr(codes, e.constant(I32, 4)), low)])
    halves = [reduce(b.or_, half) for half in zip(*parts)]
    return [look_up(e, _FACTORS, half, isa) for half in halves] if kind.has_levels else halves


def _plane_of_keys(e: Emitter, bits: Any, to: int) -> list[Any]:
    """Move the lowest bit of each byte, and the second lowest, to bit `to`, for low and for high halves."""
    b, own = e.b, e.constant(I32, 0x01010101 << to)
    second = b.shl(bits, e.constant(I32, to - 1)) if to else b.lshr(bits, e.constant(I32, 1))
    return [b.and_(b.shl(bits, e.constant(I32, to)), own), b.and_(second, own)]


def _plane_of_values(e: Emitter, at: Any, to: int) -> list[Any]:
    """Load a plane's bits of four positions to bit `to`: of dimension i in lane i, of i + 16 in the second vector."""
    b, found = e.b, []
    words = e.load(at, vector(I8, LANES))
    own = ir.Constant(vector(I8, 4 * LANES), [1 << (lane & 7) for lane in range(LANES) for _ in range(4)])
    for first in (0, 2):
        order = [4 * position + first + (lane >> 3) for lane in range(LANES) for position in range(4)]
        spread = b.shuffle_vector(words, words, ir.Constant(vector(I32, 4 * LANES), order))
        there = b.icmp_unsigned("!=", b.and_(spread, own), e.zeros(I8, 4 * LANES))
        bits = b.select(there, e.constant(I8, 1 << to, 4 * LANES), e.zeros(I8, 4 * LANES))
        found.append(b.bitcast(bits, vector(I32)))
    return found


def _in_turn(kind: CacheKind, isa: Isa) -> bool:
    """Return whether to sum only one tile of keys, or half a block of values, at a time, because registers are few.

    False for codes of 8 bits, which would be slower because of the order in which memory is read.
    """
    return not isa.wide and kind.has_halves


def _dots(e: Emitter, total: Any, codes: list[Any], words: list[Any], kind: CacheKind, isa: Isa) -> Any:
    """Return total[lane] + the sum of products of the lane's bytes of `codes` and of `words`."""
    if not isa & Isa.AVX2 or isa & (Isa.AVX_VNNI | Isa.VNNI) or kind.largest > 31:
        for code, word in zip(codes, words):
            total = e.dot_u8_i8(total, code, word, isa, largest=kind.largest)
        return total
    products = [e.pairs_u8_i8(*both, isa) for both in zip(codes, words)]  # sums of four stay below 2^15
    return e.dot_i16(total, e.b.bitcast(reduce(e.b.add, products), vector(I32)), e.constant(I32, 0x00010001), isa)


# ---- reading ---------------------------------------------------------------------------------------------------------


def emit_scores(
    e: Emitter,
    queries: Any,
    tiles_at: Any,
    coming_at: Any,
    stride: Any,
    scores: Any,
    m: int,
    d: int,
    kind: CacheKind,
    isa: Isa,
) -> None:
    """Emit `cpu_tiles.score_tiles` for quantised queries and keys."""
    b = e.b
    parts = 1 + kind.has_halves
    words = BLOCK // (4 * parts)  # words of a block, without planes
    whole = words if kind.low else 0  # of which so many are stored
    lines = whole + kind.planes
    bits_of = range(kind.low, kind.bits)  # of the planes
    scales = b.mul(stride, e.int64(d // BLOCK * lines))
    for row in range(m):
        for n in range(TILES):
            e.store(scores, e.zeros(F32), SCORE_STRIDE * row + 4 * LANES * n)

    def begins(number: Any) -> tuple[list[Any], list[Any], Any]:
        """Return each query's sum of codes in block `number`, the initial sums of products, and the scales' offset."""
        of_block = b.add(queries, b.shl(number, e.int64(2)))
        sums = [e.splat(e.load(of_block, I32, 2 * d * row + d + d // 8)) for row in range(m)]
        place = number if kind.has_minima else b.lshr(number, e.int64(1))
        return sums, [b.mul(each, e.constant(I32, -kind.bias)) for each in sums], b.add(scales, b.mul(place, stride))

    def add(number: Any, place: Any, tile: Any, target: Any, sums: list[Any], totals: list[Any]) -> None:
        """Add a block's totals to the scores of a tile."""
        of_block, shift = b.add(queries, b.shl(number, e.int64(2))), e.zeros(I32)
        if not kind.has_minima:
            shift = e.splat(b.trunc(b.shl(b.and_(number, e.int64(1)), e.int64(4)), I32))
        word_of_halves = e.load(b.add(tile, place), vector(I32))
        scale = _half_of(e, word_of_halves, shift)
        for row, total in enumerate(totals):
            of_query = e.splat(e.load(of_block, F32, 2 * d * row + d))
            score = e.load(target, vector(F32), SCORE_STRIDE * row)
            if kind.has_minima:
                minimum = _half_of(e, word_of_halves, e.constant(I32, 16))
                score = e.fma(b.sitofp(sums[row], vector(F32)), b.fmul(minimum, of_query), score)
            score = e.fma(b.sitofp(total, vector(F32)), b.fmul(scale, of_query), score)
            e.store(target, score, SCORE_STRIDE * row)

    def block(number: Any) -> None:
        tiles, coming = ([e.load(at, I64, 8 * n) for n in range(TILES)] for at in (tiles_at, coming_at))
        first = b.mul(number, e.int64(lines))

        def word(index: Any, state: list[Any]) -> list[Any]:
            totals, bits = state[: m * TILES], state[m * TILES :]
            line = b.mul(b.add(first, index), stride)
            at = b.add(queries, b.add(b.mul(number, e.int64(BLOCK)), b.mul(index, e.int64(4 * parts))))
            planes = [[_plane_of_keys(e, *each) for each in zip(bits[n::TILES], bits_of)] for n in range(TILES)]
            if kind.low:
                for tile in coming:
                    e.prefetch(b.add(tile, line))
            loaded = [e.load(b.add(tile, line), vector(I32)) if kind.low else None for tile in tiles]
            keys = [_halves(e, codes, kind, each, isa) for codes, each in zip(loaded, planes)]
            for part in range(parts):
                rows = [e.splat(e.load(at, I32, 2 * d * row + 4 * part)) for row in range(m)]
                totals = [
                    e.dot_u8_i8(totals[TILES * row + n], keys[n][part], rows[row], isa, largest=kind.largest)
                    for row in range(m)
                    for n in range(TILES)
                ]
            return totals + [b.lshr(each, e.constant(I32, 2)) for each in bits]

        sums, begin, place = begins(number)
        planes = [b.mul(b.add(first, e.int64(whole + n)), stride) for n in range(kind.planes)]
        bits = [e.load(b.add(tile, plane), vector(I32)) for plane in planes for tile in tiles]
        totals = e.loop(e.int64(words), [begin[row] for row in range(m) for _ in range(TILES)] + bits, word)
        for tile in coming:
            e.prefetch(b.add(tile, place))
        for n, tile in enumerate(tiles):
            add(number, place, tile, b.add(scores, e.int64(4 * LANES * n)), sums, totals[n : m * TILES : TILES])

    def block_in_turn(number: Any) -> None:
        first, of_block = b.mul(number, e.int64(lines)), b.add(queries, b.mul(number, e.int64(BLOCK)))
        lines_at = [b.mul(b.add(first, e.int64(index)), stride) for index in range(lines)]
        sums, begin, place = begins(number)

        with e.each(e.int64(TILES)) as n:
            tile, coming = (e.load(b.add(at, b.shl(n, e.int64(3))), I64) for at in (tiles_at, coming_at))
            totals = list(begin)
            for line in (*lines_at, place):
                e.prefetch(b.add(coming, line))
            for start in range(0, words, 2):
                codes = list[Any]()
                for index in (start, start + 1):
                    bits = [e.load(b.add(tile, line), vector(I32)) for line in lines_at[whole:]]
                    bits = [b.lshr(each, e.constant(I32, 2 * index)) for each in bits]
                    planes = [_plane_of_keys(e, *each) for each in zip(bits, bits_of)]
                    loaded = e.load(b.add(tile, lines_at[index]), vector(I32)) if kind.low else None
                    codes += _halves(e, loaded, kind, planes, isa)
                for row in range(m):
                    at = range(8 * start, 8 * start + 16, 4)
                    four = [e.splat(e.load(of_block, I32, 2 * d * row + offset)) for offset in at]
                    totals[row] = e.made_here(_dots(e, totals[row], codes, four, kind, isa), isa)
            add(number, place, tile, b.add(scores, b.shl(n, e.int64(6))), sums, totals)

    with e.each(e.int64(d // BLOCK)) as number:
        (block_in_turn if _in_turn(kind, isa) else block)(number)


def _half_of(e: Emitter, words: Any, shift: Any) -> Any:
    """Convert the fp16 number that begins at bit `shift` of each word to float32."""
    return e.half_to_float(e.b.bitcast(e.b.trunc(e.b.lshr(words, shift), vector(I16)), vector(F16)))


def emit_values(
    e: Emitter,
    exact: Any,
    weights: Any,
    tiles_at: Any,
    coming_at: Any,
    keys: Any,
    partials: Any,
    m: int,
    d: int,
    kind: CacheKind,
    isa: Isa,
) -> None:
    """Emit `cpu_tiles.value_tiles` for quantised values; the probabilities are float32, in the memory of the scores."""
    b = e.b
    count = b.lshr(b.add(keys, e.int64(LANES - 1)), e.int64(4))
    vectors = 1 if kind.has_halves else 2  # vectors of a group of four positions
    whole_codes = 64 * (LANES // 4) * vectors if kind.low else 0  # bytes of a tile's block, without planes
    tile_codes = LANES * code_bytes(kind, BLOCK)
    halves_of_block = 4 * LANES if kind.has_minima else 2 * LANES  # in bytes
    scales = d // BLOCK * tile_codes
    shifter = e.constant(F32, SHIFTER)

    def tile_at(tile: Any, among: Any = tiles_at) -> Any:
        return e.load(b.add(among, b.shl(tile, e.int64(3))), I64)

    with e.each(e.int64(d // BLOCK)) as number:
        of_scales, of_codes = (b.mul(number, e.int64(size)) for size in (halves_of_block, tile_codes))

        def weighed(tile: Any) -> list[Any]:
            """Return a tile's probabilities times the scales of its values. Scales of masked positions may be NaN."""
            halves = e.load(b.add(tile_at(tile), of_scales), vector(F16), scales)
            scale, found = e.half_to_float(halves), []
            for row in range(m):
                p = e.load(b.add(exact, b.shl(tile, e.int64(6))), vector(F32), SCORE_STRIDE * row)
                there = b.fcmp_ordered(">", p, e.zeros(F32))
                found.append(b.select(there, b.fmul(p, scale), e.zeros(F32)))
            return found

        def largest(tile: Any, tops: list[Any]) -> list[Any]:
            sizes = [e.call("llvm.fabs.v16f32", vector(F32), [each]) for each in weighed(tile)]
            return [emit_larger_size(e, size, top) for size, top in zip(sizes, tops)]

        tops = e.loop(count, [e.zeros(F32)] * m, largest)
        tops = [emit_largest_lane(e, top, emit_larger_size) for top in tops]
        factors = []
        for top in tops:
            some = b.fcmp_ordered(">", top, e.constant(F32, _LEAST))
            factors.append(b.select(some, b.fdiv(e.constant(F32, _LARGEST_WEIGHT), top), e.zeros(F32)))

        def whole(tile: Any, sums: list[Any]) -> list[Any]:
            at, results = b.add(weights, b.shl(tile, e.int64(4))), []
            for row, each in enumerate(weighed(tile)):
                shifted = b.fadd(b.fmul(each, factors[row]), shifter)
                number = b.sub(b.bitcast(shifted, vector(I32)), b.bitcast(shifter, vector(I32)))
                high, low = b.ashr(number, e.constant(I32, 7)), b.and_(number, e.constant(I32, 127))
                e.store(at, b.trunc(high, vector(I8)), PROBABILITY_STRIDE * row)
                e.store(at, b.trunc(low, vector(I8)), PROBABILITY_STRIDE * row + CHUNK)
                results.append(b.add(sums[row], number))
            return results

        def lowest(tile: Any, sums: list[Any]) -> list[Any]:
            minimum = e.half_to_float(e.load(b.add(tile_at(tile), of_scales), vector(F16), scales + 2 * LANES))
            found = []
            for row in range(m):
                p = e.load(b.add(exact, b.shl(tile, e.int64(6))), vector(F32), SCORE_STRIDE * row)
                there = b.fcmp_ordered(">", p, e.zeros(F32))
                found.append(b.select(there, e.fma(p, minimum, sums[row]), sums[row]))
            return found

        sums = e.loop(count, [e.zeros(I32)] * m, whole)
        minima = [e.zeros(F32)] * m
        if kind.has_minima:
            minima = [e.splat(e.sum_lanes(each)) for each in e.loop(count, minima, lowest)]
        begin = [b.mul(e.splat(_sum_numbers(e, each)), e.constant(I32, -kind.bias)) for each in sums]

        def products(tile: Any, totals: list[Any]) -> list[Any]:
            codes, at = b.add(tile_at(tile), of_codes), b.add(weights, b.shl(tile, e.int64(4)))
            coming = tile_at(tile, coming_at)
            for line in range(0, tile_codes, 64):
                e.prefetch(b.add(coming, of_codes), line)
            e.prefetch(b.add(coming, of_scales), scales)

            def unpacked(group: int) -> list[Any]:
                """Load the codes of four positions, of dimensions 0 to 15 and of 16 to 31."""
                starts = [whole_codes + 4 * LANES * n + LANES * group for n in range(kind.planes)]
                planes = [_plane_of_values(e, b.add(codes, e.int64(at)), kind.low + n) for n, at in enumerate(starts)]
                offsets = [64 * (vectors * group + n) for n in range(vectors)]
                loaded = [e.load(codes, vector(I32), at) if kind.low else None for at in offsets]
                return [part for each in loaded for part in _halves(e, each, kind, planes, isa)]

            groups = range(LANES // 4)
            places = [(4 * row + 2 * low, PROBABILITY_STRIDE * row + CHUNK * low) for row in range(m) for low in (0, 1)]
            if _in_turn(kind, isa):
                for n in range(2):
                    parts = [unpacked(group)[n] for group in groups]
                    for place, start in places:
                        words = [e.splat(e.load(at, I32, start + 4 * group)) for group in groups]
                        totals[place + n] = e.made_here(_dots(e, totals[place + n], parts, words, kind, isa), isa)
                return totals
            for group in groups:
                parts = unpacked(group)
                for place, start in places:
                    word = e.splat(e.load(at, I32, start + 4 * group))
                    for n, part in enumerate(parts):
                        found = e.dot_u8_i8(totals[place + n], part, word, isa, largest=kind.largest)
                        totals[place + n] = found
            return totals

        totals = e.loop(count, [e.zeros(I32)] * (4 * m), lambda tile, totals: products(tile, list(totals)))
        at = b.add(partials, b.shl(number, e.int64(7)))
        for row in range(m):
            factor = b.fmul(tops[row], e.constant(F32, 1 / _LARGEST_WEIGHT))
            for n in range(2):
                high, low = totals[4 * row + n], totals[4 * row + 2 + n]
                total = b.add(b.add(b.shl(high, e.constant(I32, 7)), low), begin[row])
                value = b.fmul(b.sitofp(total, vector(F32)), factor)
                if kind.has_minima:
                    value = b.fadd(value, minima[row])
                e.store(at, value, 4 * (partial_floats(d) * row + LANES * n))


def _sum_numbers(e: Emitter, value: Any) -> Any:
    for step in (8, 4, 2, 1):
        lanes = ir.Constant(vector(I32), [(i ^ step) for i in range(LANES)])
        value = e.b.add(value, e.b.shuffle_vector(value, value, lanes))
    return e.b.extract_element(value, ir.Constant(I32, 0))


# ---- writing ---------------------------------------------------------------------------------------------------------


def _limited(e: Emitter, x: Any, low: float, high: float) -> Any:
    b, least, most = e.b, e.constant(F32, low), e.constant(F32, high)
    x = b.select(b.fcmp_ordered("<", x, least), least, x)  # NaN stays
    return b.select(b.fcmp_ordered(">", x, most), most, x)


def _rounded(e: Emitter, x: Any) -> Any:
    """Round 16 small floats to the nearest integers, ties to even."""
    shifter = e.constant(F32, SHIFTER)
    return e.b.sub(e.b.bitcast(e.b.fadd(x, shifter), vector(I32)), e.b.bitcast(shifter, vector(I32)))


def _inverse(e: Emitter, scale: Any) -> Any:
    some = e.b.fcmp_ordered(">", e.call("llvm.fabs.v16f32", vector(F32), [scale]), e.constant(F32, _LEAST))
    return e.b.select(some, e.b.fdiv(e.constant(F32, 1.0), scale), e.zeros(F32))


def _largest(e: Emitter, values: list[Any]) -> Any:
    """Return the largest of 32 floats, in every lane."""
    return emit_largest_lane(e, emit_larger(e, *values))


def _to_half(e: Emitter, x: Any) -> tuple[Any, Any]:
    """Round a vector of equal floats to fp16; return the fp16 bits, and the rounded value as floats."""
    half = e.b.fptrunc(_limited(e, x, -_LARGEST_HALF, _LARGEST_HALF), vector(F16))
    return e.b.extract_element(e.b.bitcast(half, vector(I16)), ir.Constant(I32, 0)), e.half_to_float(half)


def _block_codes(e: Emitter, x: Any, kind: CacheKind) -> tuple[list[Any], list[Any]]:
    """Quantise 32 floats: return the bits of the fp16 scale and of the minimum, if any, and two vectors of codes."""
    b, most = e.b, float((1 << kind.bits) - 1)
    values = [e.load(x, vector(F32), 64 * n) for n in range(2)]
    if kind.has_levels:
        return _level_codes(e, values)
    if kind.has_minima:
        above, below = _largest(e, values), _largest(e, [b.fneg(value) for value in values])
        low, minimum = _to_half(e, b.fneg(below))
        bits, scale = _to_half(e, b.fmul(b.fsub(above, minimum), e.constant(F32, 1 / most)))
        inverse = _inverse(e, scale)
        above_it = [b.fmul(b.fsub(value, minimum), inverse) for value in values]
        return [bits, low], [_rounded(e, _limited(e, each, 0.0, most)) for each in above_it]
    low, high = -float(kind.bias), kind.bias - 1.0
    if not kind.has_halves:
        low = -high
        top = _largest(e, [e.call("llvm.fabs.v16f32", vector(F32), [value]) for value in values])
        scale = b.fmul(top, e.constant(F32, 1 / high))
    else:
        # The element with the largest magnitude becomes the lowest code, which has no positive counterpart.
        above, below = _largest(e, values), _largest(e, [b.fneg(value) for value in values])
        scale = b.fmul(b.select(b.fcmp_ordered(">", above, below), above, b.fneg(below)), e.constant(F32, 1 / low))
    best: list[Any] = []  # the error, the scale's bits and the codes
    for factor in _SCALES if kind.bits == 4 else (1.0,):
        bits, rounded = _to_half(e, b.fmul(scale, e.constant(F32, factor)))
        inverse = _inverse(e, rounded)
        codes = [_rounded(e, _limited(e, b.fmul(value, inverse), low, high)) for value in values]
        off = [b.fsub(value, b.fmul(b.sitofp(code, vector(F32)), rounded)) for value, code in zip(values, codes)]
        found = [e.sum_lanes(b.fadd(*(b.fmul(each, each) for each in off))), bits, *codes]
        better = b.fcmp_ordered("<", found[0], best[0]) if best else None
        best = [b.select(better, *pair) for pair in zip(found, best)] if best else found
    return best[1:2], [b.add(code, e.constant(I32, kind.bias)) for code in best[2:]]


def _level_codes(e: Emitter, values: list[Any]) -> tuple[list[Any], list[Any]]:
    """Quantise 32 floats to `LEVELS`: return the bits of the fp16 scale, and two vectors of codes.

    For some scales of either sign, each element gets the nearest level, and the levels get the scale with the least
    squared error. The best scale is taken, or the one that the same steps derive from it.
    """
    b, both = e.b, 2 * LANES
    above, below = _largest(e, values), _largest(e, [b.fneg(value) for value in values])
    extreme = b.select(b.fcmp_ordered(">", above, below), above, b.fneg(below))

    def count(halves: Any, steps: list[tuple[int, int]]) -> Any:
        """Return the sum of `by` over the steps (of, by) that begin below a half, <32 x i8>."""
        total = e.zeros(I8, both)
        for of, by in steps:
            is_above = b.icmp_signed(">", halves, e.constant(I8, of, both))
            total = b.add(total, b.select(is_above, e.constant(I8, by, both), e.zeros(I8, both)))
        return total

    def fitted(scale: Any) -> list[Any]:
        """Return the decrease of the squared error, the scale and the levels, beginning with a scale."""
        inverse = b.fmul(_inverse(e, scale), e.constant(F32, 2.0))
        up = [e.fma(value, inverse, e.constant(F32, 0.5)) for value in values]  # twice the level, rounded up
        doubled = e.whole([_rounded(e, _limited(e, value, -128.0, 127.0)) for value in up])
        middles = [(low + high, high - low) for low, high in pairwise(LEVELS)]
        levels = b.add(count(b.trunc(doubled, vector(I8, both)), middles), e.constant(I8, LEVELS[0], both))
        numbers = [b.sitofp(part, vector(F32)) for part in e.parts(b.sext(levels, vector(I32, both)), 2)]
        product = e.sum_lanes(b.fadd(*(b.fmul(*pair) for pair in zip(values, numbers))))
        best = b.fdiv(product, e.sum_lanes(b.fadd(*(b.fmul(number, number) for number in numbers))))
        return [b.fmul(product, best), best, levels]

    def better(one: list[Any], other: list[Any]) -> list[Any]:
        more = b.fcmp_ordered(">", other[0], one[0])
        return [b.select(more, *pair) for pair in zip(other, one)]

    ends = [factor / end for end in (LEVELS[0], LEVELS[-1]) for factor in _LEVEL_SCALES]
    best = reduce(better, [fitted(b.fmul(extreme, e.constant(F32, end))) for end in ends])
    _, scale, levels = better(best, fitted(e.splat(best[1])))
    codes = b.zext(count(levels, [(low, 1) for low in LEVELS[:-1]]), vector(I32, both))
    return [_to_half(e, e.splat(scale))[0]], e.parts(codes, 2)


@emitted
def quantise_query(e: Emitter, x: Int, to: Int, scale: Int, total: Int) -> None:
    """Quantise 32 floats: write int8 codes to `to`, a float32 scale to `scale`, the int32 sum of codes to `total`."""
    b = e.b
    values = [e.load(x, vector(F32), 64 * n) for n in range(2)]
    top = _largest(e, [e.call("llvm.fabs.v16f32", vector(F32), [value]) for value in values])
    step = b.fmul(top, e.constant(F32, 1 / 127))
    inverse = _inverse(e, step)
    codes = [_rounded(e, _limited(e, b.fmul(value, inverse), -127.0, 127.0)) for value in values]
    for n, each in enumerate(codes):
        e.store(to, b.trunc(each, vector(I8)), LANES * n)
    e.store(scale, b.extract_element(step, ir.Constant(I32, 0)))
    e.store(total, _sum_numbers(e, b.add(*codes)))


@emitted
def quantise_key(e: Emitter, x: Int, to: Int, stride: Int, scale: Int, kind: CacheKind) -> None:
    """Quantise a block of a key: write words, `stride` bytes apart, and the fp16 scale and any minimum to `scale`."""
    b = e.b
    halves, codes = _block_codes(e, x, kind)
    words, planes = [], []
    for each in codes:
        four = b.bitcast(b.trunc(each, vector(I8)), vector(I32, 4))
        words += [b.extract_element(four, ir.Constant(I32, n)) for n in range(4)]
    for n in range(kind.low, kind.low + kind.planes):
        every = ir.Constant(I32, 0)
        for k, word in enumerate(words):
            bit = b.and_(b.lshr(word, ir.Constant(I32, n)), ir.Constant(I32, 0x01010101))
            every = b.or_(every, b.shl(bit, ir.Constant(I32, k)))
        planes.append(every)
    if kind.has_halves:
        words = [b.and_(word, ir.Constant(I32, 0x0F0F0F0F)) for word in words]
        words = [b.or_(low, b.shl(high, ir.Constant(I32, 4))) for low, high in zip(words[::2], words[1::2])]
    at = to
    for word in (words if kind.low else []) + planes:
        e.store(at, word)
        at = b.add(at, stride)
    for n, half in enumerate(halves):
        e.store(scale, half, 2 * n)


@emitted
def quantise_value(e: Emitter, x: Int, to: Int, planes: Int, scale: Int, kind: CacheKind) -> None:
    """Quantise a block of a value: write codes to every fourth byte from `to` on, each plane as a word to `planes`, 64
    bytes apart, the fp16 scale to `scale`, and an fp16 minimum 32 bytes further."""
    b = e.b
    halves, codes = _block_codes(e, x, kind)
    for n in range(kind.planes):
        own = e.constant(I32, 1 << kind.low + n)
        bits = [b.icmp_unsigned("==", b.and_(code, own), own) for code in codes]
        low, high = (b.zext(b.bitcast(each, I16), I32) for each in bits)
        e.store(planes, b.or_(low, b.shl(high, ir.Constant(I32, 16))), 4 * LANES * n)
    if kind.has_halves:
        codes = [b.and_(code, e.constant(I32, 15)) for code in codes]
        codes = [b.or_(codes[0], b.shl(codes[1], e.constant(I32, 4)))]
    spread = ir.Constant(vector(I32, 64), [i // 4 if i % 4 == 0 else LANES for i in range(64)])
    mask = ir.Constant(vector(ir.IntType(1), 64), [1, 0, 0, 0] * LANES)
    for n, each in enumerate(codes if kind.low else []):
        wide = b.shuffle_vector(b.trunc(each, vector(I8)), e.zeros(I8), spread)
        e.store_masked(b.add(to, e.int64(64 * n)), wide, mask)
    for n, half in enumerate(halves):
        e.store(scale, half, 2 * LANES * n)


# ---- rotation --------------------------------------------------------------------------------------------------------


@emitted
def _turn_16(e: Emitter, x: Int, factor: Double) -> None:
    """Multiply 16 floats by the Hadamard matrix of size 16 and a factor, in place."""
    b = e.b
    value = b.fmul(e.load(x, vector(F32)), e.splat(b.fptrunc(factor, F32)))
    for step in (1, 2, 4, 8):
        lanes = ir.Constant(vector(I32), [(i ^ step) for i in range(LANES)])
        signs = ir.Constant(vector(F32), [-1.0 if i & step else 1.0 for i in range(LANES)])
        value = b.fadd(b.shuffle_vector(value, value, lanes), b.fmul(value, signs))
    e.store(x, value)


@emitted
def _turn_pair(e: Emitter, x: Int, y: Int) -> None:
    """Compute x, y = x + y, x - y for 16 floats each, in place."""
    first, second = (e.load(at, vector(F32)) for at in (x, y))
    e.store(x, e.b.fadd(first, second))
    e.store(y, e.b.fsub(first, second))


@njit(inline="always")
def rotate_row(row: int, dim: int) -> None:
    """Multiply each `size` elements of D floats by an orthogonal Hadamard matrix, its own inverse, in place.

    `size` is the largest power of two that divides D.
    """
    size = dim & -dim
    for i in range(0, dim, LANES):
        _turn_16(row + 4 * i, 1.0 / math.sqrt(size))
    step = LANES
    while step < size:
        for i in range(0, dim, 2 * step):
            for j in range(i, i + step, LANES):
                _turn_pair(row + 4 * j, row + 4 * (j + step))
        step *= 2
