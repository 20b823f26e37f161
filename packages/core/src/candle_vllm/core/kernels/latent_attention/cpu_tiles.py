# SPDX-License-Identifier: MIT
"""The emitted inner loops of latent attention on the CPU: scores, softmax, values.

The cache stores a token's latent row [rope | latent] contiguously, D = R + L elements of bfloat16, and both products
read it. The heads of a token are in **groups** of 16: one vector has the same pair of dimensions of 16 heads, so a
score needs no sum over lanes; and the heads of a token attend to the same keys, so no mask is needed. Queries are
[T, P, D / 2, 16, 2] with P groups for each token; lanes without a head have undefined values and results.

Scores are float32 [G, 256, 16] for the G groups of a row tile, probabilities bfloat16 pairs of positions
[G, 128, 16, 2]. For the values, two neighbouring latent rows are interleaved in registers. A partial result has the
layout of `attention.cpu_tiles`, with L dimensions. A head's arithmetic does not depend on the other heads.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from candle_vllm.core.kernels.attention.cpu_cache import partial_floats
from candle_vllm.core.kernels.attention.cpu_tiles import NOTHING, emit_exp2
from candle_vllm.core.kernels.cpu_runtime.emit import F32, I16, I32, I64, Emitter, Float, Int, emitted, vector
from candle_vllm.core.kernels.cpu_runtime.emit_functions import emit_larger
from candle_vllm.core.kernels.cpu_runtime.level import LANES, Isa
from candle_vllm.core.kernels.latent_attention.layout import BLOCK, OCTET, SCORE_BYTES


def keys_at_once(groups: int) -> int:
    """Return the number of keys with which scores are computed at a time, so that registers hold about 16 sums."""
    return 16 // groups if groups < 3 else 4


@emitted
def latent_scores(e: Emitter, q: Int, keys: Int, scores: Int, groups: int, width: int, isa: Isa) -> None:
    """Compute scores of `groups` groups of queries with `keys_at_once` neighbouring latent rows.

    `width` is D.
    """
    b = e.b
    n = keys_at_once(groups)

    def body(pair: Any, totals: list[Any]) -> list[Any]:
        at = b.add(q, b.shl(pair, e.int64(6)))
        queries = [e.load(at, vector(I32), group * width * 2 * LANES) for group in range(groups)]
        place = b.add(keys, b.shl(pair, e.int64(2)))
        sums = list(totals)
        for key in range(n):
            k = e.splat(e.load(place, I32, 2 * width * key))
            for group in range(groups):
                at_sum = group * n + key
                sums[at_sum] = e.dot_bf16(sums[at_sum], queries[group], k, isa)
        return sums

    totals = e.loop(e.int64(width // 2), [e.zeros(F32)] * (groups * n), body)
    for group in range(groups):
        for key in range(n):
            e.store(scores, totals[group * n + key], group * SCORE_BYTES + 4 * LANES * key)


@emitted
def latent_softmax(e: Emitter, scores: Int, probabilities: Int, seen: Int, state: Int) -> None:
    """Write exp2(score - m) of a group's first `seen` keys as pairs of bfloat16; write m and s to `state`.

    m is the maximum, and s the sum of the rounded probabilities. An odd last key is paired with 0.
    """
    b = e.b

    def largest(key: Any, tops: list[Any]) -> list[Any]:
        return [emit_larger(e, e.load(b.add(scores, b.shl(key, e.int64(6))), vector(F32)), tops[0])]

    (top,) = e.loop_or_skip(seen, [e.constant(F32, NOTHING)], largest)

    def rounded(at: Any, offset: int) -> Any:
        bits = b.bitcast(emit_exp2(e, b.fsub(e.load(at, vector(F32), offset), top)), vector(I32))
        # Round to the nearest bfloat16, ties up; s is the sum of the same rounded values, so there is no bias.
        return b.and_(b.add(bits, e.constant(I32, 0x8000)), e.constant(I32, -65536))

    def exponentials(pair: Any, totals: list[Any]) -> list[Any]:
        at = b.add(scores, b.shl(pair, e.int64(7)))
        second = b.add(b.shl(pair, e.int64(1)), e.int64(1))
        low, high = rounded(at, 0), rounded(at, 4 * LANES)
        high = b.select(b.icmp_signed("<", second, seen), high, e.zeros(I32))
        both = b.or_(b.lshr(low, e.constant(I32, 16)), high)
        e.store(b.add(probabilities, b.shl(pair, e.int64(6))), both)
        return [b.fadd(b.fadd(totals[0], b.bitcast(low, vector(F32))), b.bitcast(high, vector(F32)))]

    pairs = b.ashr(b.add(seen, e.int64(1)), e.int64(1))
    (total,) = e.loop_or_skip(pairs, [e.zeros(F32)], exponentials)
    e.store(state, top)
    e.store(state, total, 4 * LANES)


@emitted
def latent_values(
    e: Emitter, probabilities: Int, tiles: Int, seen: Int, start: Int, partials: Int, width: int, latent: int, isa: Isa
) -> None:
    """Store `BLOCK` dimensions of the weighted sums of the first `seen` latent rows, for `OCTET` heads.

    `tiles` points at addresses of tiles; `start` is the dimensions' offset in a latent row, in bytes. `partials` points
    at the dimensions in the first head's partial result. `width` is D, `latent` L.
    """
    b = e.b
    orders = [
        ir.Constant(vector(I32, 2 * LANES), [half + lane // 2 + lane % 2 * BLOCK for lane in range(2 * LANES)])
        for half in (0, LANES)
    ]
    one, kind = e.int64(1), vector(I16, 2 * LANES)

    def body(pair: Any, totals: list[Any]) -> list[Any]:
        tile = e.load(b.add(tiles, b.and_(pair, e.int64(-8))), I64)
        at = b.add(b.add(tile, start), b.mul(b.and_(pair, e.int64(7)), e.int64(4 * width)))
        # Memory after the last key may hold NaN, which stays NaN when multiplied by 0.
        there = b.icmp_signed("<", b.add(b.shl(pair, one), one), seen)
        first = e.load(at, kind)
        second = b.select(there, e.load(at, kind, 2 * width), ir.Constant(kind, None))
        v = [b.bitcast(b.shuffle_vector(first, second, order), vector(I32)) for order in orders]
        p_at = b.add(probabilities, b.shl(pair, e.int64(6)))
        sums = list(totals)
        for row in range(OCTET):
            weight = e.splat(e.load(p_at, I32, 4 * row))
            for n in range(2):
                sums[2 * row + n] = e.dot_bf16(sums[2 * row + n], v[n], weight, isa)
        return sums

    pairs = b.ashr(b.add(seen, one), one)
    totals = e.loop_or_skip(pairs, [e.zeros(F32)] * (2 * OCTET), body)
    for row in range(OCTET):
        for n in range(2):
            e.store(partials, totals[2 * row + n], 4 * (partial_floats(latent) * row + LANES * n))


@emitted
def scaled_to_bf16(e: Emitter, x: Int, weight: Int, scale: Float, to: Int, count: Int) -> None:
    """Write x * scale * weight for `count` floats, a multiple of 16, as bfloat16."""
    b = e.b
    factor = e.splat(scale)
    with e.each(b.ashr(count, e.int64(4))) as index:
        offset = b.shl(index, e.int64(6))
        value = b.fmul(e.load(b.add(x, offset), vector(F32)), factor)
        value = b.fmul(value, e.load(b.add(weight, offset), vector(F32)))
        e.store(b.add(to, b.shl(index, e.int64(5))), e.float_to_bf16(value))


@emitted
def copy_numbers(e: Emitter, x: Int, to: Int, index: Int, form: bool) -> None:
    """Copy x[index:index + 16] to the same indices of a row of bfloat16 (`form` 0) or float32 (1)."""
    b = e.b
    value = e.load(b.add(x, b.shl(index, e.int64(2))), vector(F32))
    target = b.add(to, b.shl(index, e.int64(2 if form else 1)))
    e.store(target, value if form else e.float_to_bf16(value))


@emitted
def store_pairs(e: Emitter, x: Int, scale: Float, to: Int) -> None:
    """Write 16 floats times a factor as 8 pairs of bfloat16, 64 bytes apart: one lane of a group of queries."""
    b = e.b
    value = b.fmul(e.load(x, vector(F32)), e.splat(scale))
    pairs = b.bitcast(e.float_to_bf16(value), vector(I32, LANES // 2))
    for n in range(LANES // 2):
        e.store(to, b.extract_element(pairs, ir.Constant(I32, n)), 4 * LANES * n)


@emitted
def finish_latent(e: Emitter, partial: Int, out: Int, latent: int, form: bool) -> None:
    """Write the sum of values divided by the sum of probabilities: L elements in the form of `copy_numbers`."""
    total = e.splat(e.load(partial, F32, 4 * latent + 4))
    for start in range(0, latent, LANES):
        value = e.b.fdiv(e.load(partial, vector(F32), 4 * start), total)
        e.store(out, value if form else e.float_to_bf16(value), start * (4 if form else 2))
