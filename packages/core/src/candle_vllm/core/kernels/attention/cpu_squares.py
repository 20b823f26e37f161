# SPDX-License-Identifier: MIT
"""Scores and values of 16 query rows at a time on AMX, whose tile registers hold squares (step 6 of a request's life).

A square is the content of one register, up to 16 lines of up to 64 bytes. The cache has the layout that AMX reads: a
square of keys has a line of 16 positions for each pair of dimensions, a square of values a line of 16 dimensions for
each pair of positions (`cpu_tiles`). Other instructions round differently in fp32, so a CPU with AMX computes every row
with AMX, unless keys or values are quantised or the head size does not fit.

Registers 0 to 3 hold sums, 4 queries, 5 keys, 6 probabilities, 7 values.
"""

from __future__ import annotations

from llvmlite import ir

from candle_vllm.core.kernels.attention.cpu_cache import PROBABILITY_STRIDE, SCORE_STRIDE, TILES, partial_floats
from candle_vllm.core.kernels.cpu_runtime.emit import F32, I16, I64, Emitter, Int, emitted, vector
from candle_vllm.core.kernels.cpu_runtime.emit_squares import load_square, shape_squares, square_call, store_square
from candle_vllm.core.kernels.cpu_runtime.level import LANES

_SUMS = 4
_QUERIES, _KEYS, _PROBABILITIES, _VALUES = range(4, 8)
_CHUNK = 2 * LANES  # dimensions of a square of queries


def fits(head_dim: int) -> bool:
    """Return whether heads of this size consist of whole squares."""
    return head_dim % _CHUNK == 0


@emitted
def begin_squares(e: Emitter, memory: Int, rows: int) -> None:
    """Configure the tile registers for 8 or 16 `rows`; `memory` is 64 bytes for the configuration."""
    shape_squares(e, memory, [(rows, 64)] * (_SUMS + 1) + [(16, 64), (rows, 32), (8, 64)])


@emitted
def score_squares(e: Emitter, q: Int, tiles: Int, stride: Int, scores: Int, dim: int) -> None:
    """Compute the scores of 8 or 16 contiguous bfloat16 rows with four tiles; see `cpu_tiles.score_tiles`."""
    b = e.b
    places = [e.load(tiles, I64, 8 * n) for n in range(TILES)]
    for n in range(TILES):
        square_call(e, "tilezero", n)
    for chunk in range(dim // _CHUNK):
        load_square(e, _QUERIES, b.add(q, e.int64(2 * _CHUNK * chunk)), e.int64(2 * dim))
        below = b.mul(stride, e.int64(LANES * chunk))
        for n in range(TILES):
            load_square(e, _KEYS, b.add(places[n], below), stride)
            square_call(e, "tdpbf16ps", n, _QUERIES, _KEYS)
    for n in range(TILES):
        store_square(e, n, b.add(scores, e.int64(4 * LANES * n)), SCORE_STRIDE)


@emitted
def value_squares(e: Emitter, probabilities: Int, tiles: Int, count: Int, partials: Int, dim: int) -> None:
    """Write the sums of the values of `count` tiles, weighted by the rows' probabilities, to the rows' partial results.

    Values after the last key must be finite.
    """
    b = e.b
    for first in range(0, dim, _SUMS * LANES):
        starts = range(first, min(first + _SUMS * LANES, dim), LANES)
        for n, _ in enumerate(starts):
            square_call(e, "tilezero", n)
        with e.each(count) as tile:
            at = b.add(probabilities, b.shl(tile, e.int64(5)))
            load_square(e, _PROBABILITIES, at, e.int64(PROBABILITY_STRIDE))
            place = e.load(b.add(tiles, b.shl(tile, e.int64(3))), I64)
            for n, start in enumerate(starts):
                load_square(e, _VALUES, b.add(place, e.int64(4 * start)), e.int64(4 * dim))
                square_call(e, "tdpbf16ps", n, _PROBABILITIES, _VALUES)
        for n, start in enumerate(starts):
            store_square(e, n, b.add(partials, e.int64(4 * start)), 4 * partial_floats(dim))


@emitted
def copy_seen(e: Emitter, to: Int, tile: Int, keys: Int, dim: int) -> None:
    """Copy the first `keys` positions of a tile of values; write zeros for its other positions."""
    b = e.b
    numbers = e.splat(b.trunc(keys, I16), 2 * LANES)
    for pair in range(LANES // 2):
        positions = ir.Constant(vector(I16, 2 * LANES), [2 * pair, 2 * pair + 1] * LANES)
        there = b.icmp_unsigned("<", positions, numbers)
        for start in range(0, dim, LANES):
            at = 4 * (dim * pair + start)
            value = b.select(there, e.load(tile, vector(I16, 2 * LANES), at), e.zeros(I16, 2 * LANES))
            e.store(to, value, at)


@emitted
def copy_partial(e: Emitter, to: Int, source: Int, dim: int) -> None:
    for start in range(0, partial_floats(dim), LANES):
        e.store(to, e.load(source, vector(F32), 4 * start), 4 * start)
