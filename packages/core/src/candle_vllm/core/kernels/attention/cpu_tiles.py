# SPDX-License-Identifier: MIT
"""The emitted inner loops of paged attention on the CPU: scores, softmax, values, merge (step 6 of a request's life).

Terms: see `cpu_cache.py`. A strip of bfloat16 keys is [D/2, W, 2]: a 64-byte load has the same pair of dimensions of
the 16 keys of a tile. Four tiles are read together: in a strip of 64 slots such reads are sequential, as the hardware
prefetcher needs. The values of a tile are [8, D, 2]: a load has 16 dimensions of a pair of positions.

D is any even number from 16 to 512. If it is not a multiple of 16, the last 16 dimensions of a row are computed as one
vector, which overlaps the previous vector.

A row's partial result over some keys is `partial_floats(D)` floats: the unnormalised sum of values, then, from
`state_at(D)` on, the maximum m of the scores and the sum s of exp2(score - m); the rest is padding. A row's arithmetic
does not depend on other rows, and masked keys do not change any bit of a result.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from llvmlite import ir
from numba import njit

from candle_vllm.core.kernels.attention.cpu_cache import (
    PROBABILITY_STRIDE,
    ROW_TILE,
    ROWS,
    SCORE_STRIDE,
    STRETCH_SHIFT,
    TILES,
    CacheKind,
    partial_floats,
    state_at,
)
from candle_vllm.core.kernels.attention.cpu_quantised import emit_scores, emit_values
from candle_vllm.core.kernels.cpu_runtime.emit import F32, I16, I32, I64, SHIFTER, Emitter, Float, Int, emitted, vector
from candle_vllm.core.kernels.cpu_runtime.emit_functions import emit_larger, emit_largest_lane, emit_tanh
from candle_vllm.core.kernels.cpu_runtime.level import LANES, Isa

NOTHING = -1e30  # the maximum of no scores; finite, so that exp2(NOTHING - NOTHING) is 1 and not NaN
_RUN = 8  # if registers are too few for all tiles: maximum pairs of dimensions of one group, before the next group
_BLOCKS = 5  # maximum vectors of 16 dimensions whose sums are held in registers, if there are 32 of 512 bits


def in_floats(isa: int) -> bool:
    """Return whether bfloat16 is converted to float32 before products, because the CPU has no bfloat16 products."""
    return not Isa(isa).bf16


def vectors_at_once(isa: Isa, rows: int) -> int:
    """Return how many vectors of 16 sums per row fit into registers; with AVX2, a vector needs two registers."""
    return TILES if isa.wide else max(TILES // rows, 1)


def vector_starts(head_dim: int) -> list[int]:
    """Return the first dimension of each vector of 16 dimensions of a row."""
    return [min(start, head_dim - LANES) for start in range(0, head_dim, LANES)]


def emit_exp2(e: Emitter, x: Any) -> Any:
    """Compute 2^x of 16 floats that are at most 0; exactly 1 at 0, exactly 0 below -127."""
    b = e.b
    x = emit_larger(e, x, e.constant(F32, -127.0))
    shifted = b.fadd(x, e.constant(F32, SHIFTER))
    return e.power_of_two(shifted, b.fsub(x, b.fsub(shifted, e.constant(F32, SHIFTER))))


@emitted
def score_tiles(
    e: Emitter,
    q: Int,
    tiles: Int,
    coming: Int,
    stride: Int,
    scores: Int,
    rows: Int,
    dim: int,
    kind: CacheKind,
    isa: Isa,
) -> None:
    """Compute the scores of `rows` query rows, 1 to `ROWS`, with the keys of four tiles.

    `q` has the rows as `copy_query` writes them. `tiles` points at four addresses of tiles, `coming` at four addresses
    of tiles to prefetch if keys are quantised (may be `tiles`). `stride` is the bytes from a pair of dimensions to the
    next.
    """

    def of_rows(m: int) -> None:
        if kind.is_quantised:
            emit_scores(e, q, tiles, coming, stride, scores, m, dim, kind, isa)
        else:
            _scores(e, q, [e.load(tiles, I64, 8 * n) for n in range(TILES)], stride, scores, m, dim, isa)

    _choose_rows(e, rows, of_rows)


def _choose_rows(e: Emitter, rows: Any, emit: Callable[[int], None]) -> None:
    """Emit the code of 1 to `ROWS` rows, and a switch between them."""
    e.choose(rows, {m: partial(emit, m) for m in range(1, ROWS + 1)})


def _scores(e: Emitter, queries: Any, tiles: list[Any], stride: Any, scores: Any, m: int, d: int, isa: Isa) -> None:
    """Emit `score_tiles` for bfloat16: as many tiles at once as registers have room for, `_RUN` pairs at a time."""
    b, pairs, at_once = e.b, d // 2, vectors_at_once(isa, m)
    run = pairs if at_once == TILES else next(n for n in range(min(_RUN, pairs), 0, -1) if pairs % n == 0)

    def of_tiles(begin: Any, some: range) -> None:
        places = [(row, n) for n in some for row in range(m)]

        def body(index: Any, totals: list[Any]) -> list[Any]:
            pair = b.add(begin, index)
            line = b.mul(pair, stride)
            products = [_pairs(e, e.load(b.add(tiles[n], line), vector(I32)), isa) for n in some]
            factors = [_spread_pair(e, queries, pair, d * row, isa) for row in range(m)]
            return [
                _add_product(e, total, products[n - some.start], factors[row], isa)
                for total, (row, n) in zip(totals, places)
            ]

        at = [SCORE_STRIDE * row + 4 * LANES * n for row, n in places]
        totals = [e.zeros(F32) if run == pairs else e.load(scores, vector(F32), place) for place in at]
        for total, place in zip(e.loop(e.int64(run), totals, body), at):
            e.store(scores, total, place)

    if run < pairs:
        for row in range(m):
            for n in range(TILES):
                e.store(scores, e.zeros(F32), SCORE_STRIDE * row + 4 * LANES * n)
    with e.each(e.int64(pairs // run)) as number:
        for first in range(0, TILES, at_once):
            of_tiles(b.mul(number, e.int64(run)), range(first, min(first + at_once, TILES)))


def _pairs(e: Emitter, words: Any, isa: Isa) -> list[Any]:
    """Return pairs of bfloat16, <16 x i32>, in the form in which they are multiplied."""
    return e.widened_pairs(words) if in_floats(isa) else [words]


def _spread_pair(e: Emitter, numbers: Any, pair: Any, first: int, isa: Isa) -> list[Any]:
    """Load pair number `pair` of a row into every lane, in the form of `_pairs`; the row begins at element `first`."""
    if not in_floats(isa):
        return [e.splat(e.load(e.b.add(numbers, e.b.shl(pair, e.int64(2))), I32, 2 * first))]
    at = e.b.add(numbers, e.b.shl(pair, e.int64(3)))
    return [e.splat(e.load(at, F32, 4 * (first + half))) for half in range(2)]


def _add_product(e: Emitter, total: Any, x: list[Any], y: list[Any], isa: Isa) -> Any:
    """Return total[lane] + the sum of the two products of the lane's pairs."""
    if not in_floats(isa):
        return e.dot_bf16(total, x[0], y[0], isa)
    for both in zip(x, y):
        total = e.fma(*both, total)
    return total


def _seen_keys(e: Emitter, position: Any, last: Any, start: Any, window: Any) -> tuple[Any, Any]:
    """Return the index from `start` of a row's first key, and the number of keys from it to `last`, <16 x i32> each."""
    b, zero, one = e.b, e.int64(0), e.int64(1)

    def not_negative(value: Any) -> Any:
        return b.select(b.icmp_signed(">", value, zero), value, zero)

    own, end = (b.add(b.sub(place, start), one) for place in (position, last))
    chunked = b.icmp_signed("<", window, zero)
    chunk = b.srem(position, b.select(chunked, b.neg(window), one))  # offset of the row's position in its chunk
    first = b.select(chunked, b.sub(b.sub(position, chunk), start), b.sub(own, window))
    first = b.select(b.icmp_signed("!=", window, zero), not_negative(first), zero)
    return tuple(e.splat(b.trunc(value, I32)) for value in (first, not_negative(b.sub(end, first))))


@emitted
def softmax_rows(
    e: Emitter,
    scores: Int,
    probabilities: Int,
    tiles: Int,
    positions: Int,
    start: Int,
    window: Int,
    partials: Int,
    rows: Int,
    dim: int,
    kind: CacheKind,
    isa: Isa,
) -> None:
    """Compute exp2(score - m) for 1 to `ROWS` rows over 16 * tiles keys from position `start` on; masked keys get 0.

    The results are rounded to bfloat16, except for quantised values, and written to `probabilities`. With `in_floats`,
    and for quantised values, they are stored as float32 in `scores` instead. `positions` points at the rows' int64
    positions; `ROW_TILE` elements after each is the last position that the row attends to. m and s, the sum of the
    results, are written to `partials`.
    """
    given = (scores, probabilities, tiles, positions, start, window, partials)
    _choose_rows(e, rows, lambda m: _softmax(e, *given, m, dim, kind.is_quantised, in_floats(isa)))


def _softmax(
    e: Emitter,
    scores: Any,
    probabilities: Any,
    tiles: Any,
    positions: Any,
    start: Any,
    window: Any,
    partials: Any,
    rows: int,
    dim: int,
    exact: bool,
    wide: bool,
) -> None:
    """Emit `softmax_rows`; `exact` and `wide` results are float32."""
    b = e.b
    bounds = [
        _seen_keys(e, *(e.load(positions, I64, 8 * at) for at in (row, row + ROW_TILE)), start=start, window=window)
        for row in range(rows)
    ]
    numbers = ir.Constant(vector(I32), list(range(LANES)))
    lanes = [b.sub(numbers, first) for first, _ in bounds]

    def seen(tile: Any, row: int) -> Any:
        index = b.add(lanes[row], e.splat(b.trunc(b.shl(tile, e.int64(4)), I32)))
        return b.icmp_unsigned("<", index, bounds[row][1])

    def score(tile: Any, row: int) -> Any:
        return e.load(b.add(scores, b.shl(tile, e.int64(6))), vector(F32), SCORE_STRIDE * row)

    def largest(tile: Any, tops: list[Any]) -> list[Any]:
        nothing = e.constant(F32, NOTHING)
        return [emit_larger(e, b.select(seen(tile, row), score(tile, row), nothing), tops[row]) for row in range(rows)]

    tops = e.loop(tiles, [e.constant(F32, NOTHING)] * rows, largest)
    tops = [emit_largest_lane(e, top) for top in tops]

    def exponentials(tile: Any, totals: list[Any]) -> list[Any]:
        at, results = b.add(probabilities, b.shl(tile, e.int64(5))), []
        for row in range(rows):
            bits = b.bitcast(emit_exp2(e, b.fsub(score(tile, row), tops[row])), vector(I32))
            if exact:
                power = b.bitcast(b.select(seen(tile, row), bits, e.zeros(I32)), vector(F32))
                e.store(b.add(scores, b.shl(tile, e.int64(6))), power, SCORE_STRIDE * row)
                results.append(b.fadd(totals[row], power))
                continue
            # Round to the nearest bfloat16, ties up; s is the sum of the same rounded values, so there is no bias.
            bits = b.and_(b.add(bits, e.constant(I32, 0x8000)), e.constant(I32, -65536))
            bits = b.select(seen(tile, row), bits, e.zeros(I32))
            if wide:
                e.store(b.add(scores, b.shl(tile, e.int64(6))), bits, SCORE_STRIDE * row)
            else:
                e.store(at, b.trunc(b.lshr(bits, e.constant(I32, 16)), vector(I16)), PROBABILITY_STRIDE * row)
            results.append(b.fadd(totals[row], b.bitcast(bits, vector(F32))))
        return results

    totals = e.loop(tiles, [e.zeros(F32)] * rows, exponentials)
    for row in range(rows):
        at = 4 * (partial_floats(dim) * row + state_at(dim))
        e.store(partials, b.extract_element(tops[row], ir.Constant(I32, 0)), at)
        e.store(partials, e.sum_lanes(totals[row]), at + 4)


def _values(
    e: Emitter, scores: Any, probabilities: Any, tiles: Any, keys: Any, partials: Any, m: int, d: int, isa: Isa
) -> None:
    """Emit `value_tiles` for bfloat16: as many vectors of dimensions at once as registers hold."""
    b = e.b
    weights, row_numbers = (scores, SCORE_STRIDE // 4) if in_floats(isa) else (probabilities, PROBABILITY_STRIDE // 2)
    pairs = b.lshr(b.add(keys, e.int64(1)), e.int64(1))
    odd = b.icmp_unsigned("==", b.and_(keys, e.int64(1)), e.int64(1))
    # After the last key the cache may contain anything, even NaN, which stays NaN when multiplied by 0.
    last, all_bits = b.sub(pairs, e.int64(1)), ir.Constant(I32, -1)
    last_mask = b.select(odd, ir.Constant(I32, 0xFFFF), all_bits)
    starts = vector_starts(d)
    passes = -(-len(starts) // (_BLOCKS if isa.wide else vectors_at_once(isa, m)))
    width = -(-len(starts) // passes)
    parts = [starts[first : first + width] for first in range(0, len(starts), width)]
    # If the last vector overlaps the one before it, sums must not be carried from tile to tile.
    whole = isa.wide or len(parts) == 1 or d % LANES != 0

    def of_part(begin: Any, count: Any, part: list[int]) -> None:
        places = [(row, n) for n in range(len(part)) for row in range(m)]

        def body(index: Any, totals: list[Any]) -> list[Any]:
            pair = b.add(begin, index)
            within = b.mul(b.and_(pair, e.int64(7)), e.int64(4 * d))
            at = b.add(e.load(b.add(tiles, b.and_(pair, e.int64(-8))), I64), within)
            mask = e.splat(b.select(b.icmp_signed("==", pair, last), last_mask, all_bits))
            values = [_pairs(e, b.and_(e.load(at, vector(I32), 4 * start), mask), isa) for start in part]
            factors = [_spread_pair(e, weights, pair, row_numbers * row, isa) for row in range(m)]
            return [_add_product(e, total, values[n], factors[row], isa) for total, (row, n) in zip(totals, places)]

        at = [4 * (partial_floats(d) * row + part[n]) for row, n in places]
        totals = [e.zeros(F32) if whole else e.load(partials, vector(F32), place) for place in at]
        for total, place in zip(e.loop_or_skip(count, totals, body), at):
            e.store(partials, total, place)

    if whole:
        for part in parts:
            of_part(e.int64(0), pairs, part)
        return
    for row in range(m):
        for start in starts:
            e.store(partials, e.zeros(F32), 4 * (partial_floats(d) * row + start))
    with e.each_or_skip(b.lshr(b.add(pairs, e.int64(7)), e.int64(3))) as tile:
        begin, eight = b.shl(tile, e.int64(3)), e.int64(8)
        left = b.sub(pairs, begin)
        for part in parts:
            of_part(begin, b.select(b.icmp_signed("<", left, eight), left, eight), part)


@emitted
def value_tiles(
    e: Emitter,
    scores: Int,
    probabilities: Int,
    tiles: Int,
    coming: Int,
    keys: Int,
    partials: Int,
    rows: Int,
    dim: int,
    kind: CacheKind,
    isa: Isa,
) -> None:
    """Write the sum of the first `keys` values, weighted by the rows' probabilities, to partial results.

    `tiles` points at the addresses of the values' tiles, `coming` at as many to prefetch if values are quantised. With
    `in_floats`, and for quantised values, float32 probabilities are read from `scores`; `probabilities` is then unused
    or scratch memory.
    """

    def of_rows(m: int) -> None:
        if kind.is_quantised:
            emit_values(e, scores, probabilities, tiles, coming, keys, partials, m, dim, kind, isa)
        else:
            _values(e, scores, probabilities, tiles, keys, partials, m, dim, isa)

    _choose_rows(e, rows, of_rows)


@emitted
def cap_scores(e: Emitter, scores: Int, tiles: Int, cap: Float) -> None:
    """Soft-cap a row's scores of some tiles: cap * tanh(score / cap)."""
    b = e.b
    cap = e.splat(cap)
    with e.each(tiles) as tile:
        at = b.add(scores, b.shl(tile, e.int64(6)))
        e.store(at, b.fmul(emit_tanh(e, b.fdiv(e.load(at, vector(F32)), cap)), cap))


@emitted
def fall_with_distance(e: Emitter, scores: Int, tiles: Int, slope: Int, distance: Int) -> None:
    """Subtract slope times distance from a row's scores; `slope` is an address, `distance` the first key's distance."""
    b = e.b
    slope, numbers = e.splat(b.fneg(e.load(slope, F32))), ir.Constant(vector(I32), list(range(LANES)))
    with e.each(tiles) as tile:
        at = b.add(scores, b.shl(tile, e.int64(6)))
        first = e.splat(b.trunc(b.sub(distance, b.shl(tile, e.int64(4))), I32))
        away = b.sitofp(b.sub(first, numbers), vector(F32))
        e.store(at, e.fma(away, slope, e.load(at, vector(F32))))


@emitted
def add_relative(
    e: Emitter, scores: Int, tiles: Int, states: Int, profiles: Int, count: Int, size: Int, distance: Int
) -> None:
    """Add relative logits to a row's scores; `count` states are at `states`, profiles [count, size] at `profiles`.

    `distance` is the first key's distance. Keys at other distances than the profiles have read the zeros at their ends.
    """
    b, last = e.b, e.b.sub(size, e.int64(LANES))
    first = b.sub(b.sub(last, e.int64(1)), distance)
    with e.each(tiles) as tile:
        at = b.add(scores, b.shl(tile, e.int64(6)))
        place = b.add(first, b.shl(tile, e.int64(4)))
        place = b.select(b.icmp_signed("<", place, e.int64(0)), e.int64(0), place)
        place = b.select(b.icmp_signed(">", place, last), last, place)
        row = b.add(profiles, b.shl(place, e.int64(2)))

        def add(number: Any, total: list[Any], row: Any = row) -> list[Any]:
            state = e.splat(e.load(b.add(states, b.shl(number, e.int64(2))), F32))
            profile = e.load(b.add(row, b.shl(b.mul(number, size), e.int64(2))), vector(F32))
            return [e.fma(state, profile, total[0])]

        e.store(at, *e.loop(count, [e.load(at, vector(F32))], add))


@emitted
def clear_partial(e: Emitter, partial: Int, dim: int) -> None:
    """Initialise a partial result that has no keys yet."""
    end = state_at(dim)
    for start in range(0, end, LANES):
        e.store(partial, e.zeros(F32), 4 * start)
    e.store(partial, ir.Constant(F32, NOTHING), 4 * end)
    e.store(partial, ir.Constant(F32, 0.0), 4 * end + 4)


def _shares(e: Emitter, old_top: Any, new_top: Any) -> tuple[Any, Any]:
    """Return the factors that rescale two sums, each relative to its own maximum, to the larger maximum."""
    b, one = e.b, e.constant(F32, 1.0)
    difference = b.fsub(old_top, new_top)
    power = emit_exp2(e, b.fneg(e.call("llvm.fabs.v16f32", vector(F32), [difference])))
    rises = b.fcmp_ordered("<", difference, e.zeros(F32))
    return b.select(rises, power, one), b.select(rises, one, power)


@emitted
def merge_partial(e: Emitter, state: Int, partial: Int, dim: int) -> None:
    """Merge `partial`, a row's partial result of later keys, into `state`; one without keys changes nothing."""
    b = e.b
    end = state_at(dim)
    old_top, new_top = (e.splat(e.load(at, F32, 4 * end)) for at in (state, partial))
    keep, add = _shares(e, old_top, new_top)

    def mix(kind: ir.Type, offset: int, keep: Any, add: Any) -> None:
        old, new = (e.load(at, kind, offset) for at in (state, partial))
        e.store(state, b.fadd(b.fmul(old, keep), b.fmul(new, add)), offset)

    for start in range(0, end, LANES):
        mix(vector(F32), 4 * start, keep, add)
    zero = ir.Constant(I32, 0)
    mix(F32, 4 * end + 4, b.extract_element(keep, zero), b.extract_element(add, zero))
    e.store(state, b.extract_element(emit_larger(e, old_top, new_top), zero), 4 * end)


@emitted
def add_sink(e: Emitter, state: Int, sink: Int, dim: int) -> None:
    """Add the sink at the address `sink` to a row's sum of probabilities."""
    b = e.b
    end = state_at(dim)
    top, sink = e.splat(e.load(state, F32, 4 * end)), e.splat(e.load(sink, F32))
    keep, add = _shares(e, top, sink)
    for start in range(0, end, LANES):
        e.store(state, b.fmul(e.load(state, vector(F32), 4 * start), keep), 4 * start)
    total = b.fadd(b.fmul(e.splat(e.load(state, F32, 4 * end + 4)), keep), add)
    e.store(state, b.extract_element(total, ir.Constant(I32, 0)), 4 * end + 4)


@emitted
def finish_partial(e: Emitter, partial: Int, out: Int, dim: int) -> None:
    """Write attention's result: the sum of values divided by the sum of probabilities."""
    total = e.splat(e.load(partial, F32, 4 * state_at(dim) + 4))
    for start in vector_starts(dim):
        e.store(out, e.b.fdiv(e.load(partial, vector(F32), 4 * start), total), 4 * start)


@emitted
def copy_query(e: Emitter, to: Int, source: Int, dim: int, wide: bool) -> None:
    """Copy a row of 2 D bytes; with `wide` convert bfloat16 to float32."""
    b = e.b
    for start in vector_starts(dim):
        row = e.load(source, vector(I16), 2 * start)
        if wide:
            row = b.shl(b.zext(row, vector(I32)), e.constant(I32, 16))
        e.store(to, row, (4 if wide else 2) * start)


@njit(inline="always")
def place_of(slot: int, head: int, shift: int, stretch_step: int) -> int:
    """Return the offset of a head's slot from the beginning of the layer's cache, in slots.

    S is 1 << shift; `stretch_step`: slots from one stretch to the next. The caller adds the heads' gaps, `head_gap`.
    """
    bits = max(shift, STRETCH_SHIFT)
    return (slot >> bits) * stretch_step + (head << bits) + (slot & ((1 << bits) - 1))
