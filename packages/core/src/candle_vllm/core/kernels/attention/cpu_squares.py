# SPDX-License-Identifier: MIT
"""Scores and values of 16 query rows at a time on AMX, whose tile registers hold squares (step 6 of a request's life).

A square is the content of one register, up to 16 lines of up to 64 bytes. The cache has the layout that AMX reads: a
square of keys has a line of 16 positions for each pair of dimensions, a square of values a line of 16 dimensions for
each pair of positions (`cpu_tiles`). Other instructions round differently in fp32, so a CPU with AMX computes every row
with AMX, unless keys or values are quantised or the head size does not fit.

Registers 0 to 3 hold sums, 4 queries, 5 keys, 6 probabilities, 7 values.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from candle_vllm.core.kernels.attention.cpu_cache import PROBABILITY_STRIDE, SCORE_STRIDE, TILES, partial_floats
from candle_vllm.core.kernels.cpu_runtime.emit import F32, I16, I64, Emitter, vector
from candle_vllm.core.kernels.cpu_runtime.emit_squares import load_square, shape_squares, square_call, store_square
from candle_vllm.core.kernels.cpu_runtime.level import LANES

_SUMS = 4
_QUERIES, _KEYS, _PROBABILITIES, _VALUES = range(4, 8)
_CHUNK = 2 * LANES  # dimensions of a square of queries


def fits(head_dim: int) -> bool:
    """Return whether heads of this size consist of whole squares."""
    return head_dim % _CHUNK == 0


@intrinsic(prefer_literal=True)
def begin_squares(_: Any, memory: Any, rows: Any) -> Any:
    """Configure the tile registers for 8 or 16 `rows`, a constant; `memory` is 64 bytes for the configuration."""
    m = rows.literal_value
    shapes = [(m, 64)] * (_SUMS + 1) + [(16, 64), (m, 32), (8, 64)]

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        shape_squares(Emitter(b), args[0], shapes)
        return context.get_dummy_value()

    return types.void(types.int64, rows), code


@intrinsic(prefer_literal=True)
def score_squares(_: Any, q: Any, tiles: Any, stride: Any, scores: Any, dim: Any) -> Any:
    """Compute the scores of 8 or 16 contiguous bfloat16 rows with four tiles; see `cpu_tiles.score_tiles`."""
    signature = types.void(*[types.int64] * 4, dim)
    d = dim.literal_value

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        e = Emitter(b)
        places = [e.load(args[1], I64, 8 * n) for n in range(TILES)]
        for n in range(TILES):
            square_call(e, "tilezero", n)
        for chunk in range(d // _CHUNK):
            load_square(e, _QUERIES, b.add(args[0], e.int64(2 * _CHUNK * chunk)), e.int64(2 * d))
            below = b.mul(args[2], e.int64(LANES * chunk))
            for n in range(TILES):
                load_square(e, _KEYS, b.add(places[n], below), args[2])
                square_call(e, "tdpbf16ps", n, _QUERIES, _KEYS)
        for n in range(TILES):
            store_square(e, n, b.add(args[3], e.int64(4 * LANES * n)), SCORE_STRIDE)
        return context.get_dummy_value()

    return signature, code


@intrinsic(prefer_literal=True)
def value_squares(_: Any, probabilities: Any, tiles: Any, count: Any, partials: Any, dim: Any) -> Any:
    """Write the sums of the values of `count` tiles, weighted by the rows' probabilities, to the rows' partial results.

    Values after the last key must be finite.
    """
    signature = types.void(*[types.int64] * 4, dim)
    d = dim.literal_value

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        e = Emitter(b)
        for first in range(0, d, _SUMS * LANES):
            starts = range(first, min(first + _SUMS * LANES, d), LANES)
            for n, _ in enumerate(starts):
                square_call(e, "tilezero", n)

            def body(tile: Any, state: list[Any], starts: range = starts) -> list[Any]:
                at = b.add(args[0], b.shl(tile, e.int64(5)))
                load_square(e, _PROBABILITIES, at, e.int64(PROBABILITY_STRIDE))
                place = e.load(b.add(args[1], b.shl(tile, e.int64(3))), I64)
                for n, start in enumerate(starts):
                    load_square(e, _VALUES, b.add(place, e.int64(4 * start)), e.int64(4 * d))
                    square_call(e, "tdpbf16ps", n, _PROBABILITIES, _VALUES)
                return state

            e.loop(args[2], [], body)
            for n, start in enumerate(starts):
                store_square(e, n, b.add(args[3], e.int64(4 * start)), 4 * partial_floats(d))
        return context.get_dummy_value()

    return signature, code


@intrinsic(prefer_literal=True)
def copy_seen(_: Any, to: Any, tile: Any, keys: Any, dim: Any) -> Any:
    """Copy the first `keys` positions of a tile of values; write zeros for its other positions."""
    signature = types.void(*[types.int64] * 3, dim)
    d = dim.literal_value

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        e = Emitter(b)
        numbers = e.splat(b.trunc(args[2], I16), 2 * LANES)
        for pair in range(LANES // 2):
            positions = ir.Constant(vector(I16, 2 * LANES), [2 * pair, 2 * pair + 1] * LANES)
            there = b.icmp_unsigned("<", positions, numbers)
            for start in range(0, d, LANES):
                at = 4 * (d * pair + start)
                value = b.select(there, e.load(args[1], vector(I16, 2 * LANES), at), e.zeros(I16, 2 * LANES))
                e.store(args[0], value, at)
        return context.get_dummy_value()

    return signature, code


@intrinsic(prefer_literal=True)
def copy_partial(_: Any, to: Any, source: Any, dim: Any) -> Any:
    signature = types.void(types.int64, types.int64, dim)
    d = dim.literal_value

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        e = Emitter(b)
        for start in range(0, partial_floats(d), LANES):
            e.store(args[0], e.load(args[1], vector(F32), 4 * start), 4 * start)
        return context.get_dummy_value()

    return signature, code
