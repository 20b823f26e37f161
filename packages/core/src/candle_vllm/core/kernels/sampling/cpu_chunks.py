# SPDX-License-Identifier: MIT
"""The emitted inner loops of sampling on the CPU, for 512 logits at a time (step 7 of a request's life).

A **chunk** is 32 vectors of 16 logits; a row's last chunk is copied and filled up with -inf. A chunk has 16 maxima, one
for each lane: one vector comparison shows whether any logit of the chunk reaches a bound. A **weight** is
2^((logit - largest) * scale) in float32; with `scale` 0 every weight is exactly 1, so the same code counts logits. A
**mass** is a sum of weights. A **key** is an integer for a float32, in the same order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit

from candle_vllm.core.kernels.attention.cpu_tiles import emit_exp2
from candle_vllm.core.kernels.cpu_runtime.emit import (
    F32,
    I16,
    I32,
    I64,
    Bool,
    Double,
    Emitter,
    Float,
    Int,
    emitted,
    vector,
)
from candle_vllm.core.kernels.cpu_runtime.emit_functions import emit_larger
from candle_vllm.core.kernels.cpu_runtime.level import LANES
from candle_vllm.core.kernels.sampling.contract import CHUNK, CHUNK_BYTES

EDGES = 8  # bounds above which masses are summed in one pass
GROUP = 64  # number of logits whose hits fit into one int64
GROUPS = CHUNK // GROUP

# For functions that are called from compiled code only.
inner = njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)

_F64 = ir.DoubleType()
_LOWEST = float(np.finfo(np.float32).min)
_TOGETHER = 4  # vectors per iteration of a loop
_VECTOR_BYTES = 4 * LANES


def _vectors(e: Emitter, address: Any, turn: Any) -> list[Any]:
    at = e.b.add(address, e.b.mul(turn, e.int64(_TOGETHER * _VECTOR_BYTES)))
    return [e.load(at, vector(F32), _VECTOR_BYTES * part) for part in range(_TOGETHER)]


def _weight(e: Emitter, logit: Any, largest: Any, scale: Any) -> Any:
    """Emit weights of 16 logits; a difference that overflows becomes finite, because infinity times 0 is NaN."""
    difference = emit_larger(e, e.b.fsub(logit, largest), e.constant(F32, _LOWEST))
    return emit_exp2(e, e.b.fmul(difference, scale))


def _kept(e: Emitter, logit: Any, bound: Any, weight: Any) -> Any:
    return e.b.select(e.b.fcmp_ordered(">=", logit, bound), weight, e.zeros(F32))


def _bits(e: Emitter, hits: Any) -> Any:
    return e.b.zext(e.b.bitcast(hits, I16), I64)


@emitted
def chunk_maxima(e: Emitter, at: Int, to: Int) -> Int:
    """Store the 16 maxima of a chunk, ignoring NaN; return whether the chunk has a NaN."""
    b = e.b

    def body(turn: Any, state: list[Any]) -> list[Any]:
        values = _vectors(e, at, turn)
        odd = [b.fcmp_unordered("uno", values[part], values[part + 1]) for part in (0, 2)]
        tops = [emit_larger(e, value, top) for value, top in zip(values, state[1:])]
        return [b.or_(state[0], b.or_(*odd)), *tops]

    lowest = e.constant(F32, float("-inf"))
    count = e.int64(CHUNK // LANES // _TOGETHER)
    odd, *tops = e.loop(count, [e.zeros(ir.IntType(1)), *[lowest] * _TOGETHER], body)
    e.store(to, emit_larger(e, emit_larger(e, tops[0], tops[1]), emit_larger(e, tops[2], tops[3])))
    return b.zext(b.icmp_unsigned("!=", _bits(e, odd), e.int64(0)), I64)


@emitted
def largest_of(e: Emitter, at: Int, count: Int) -> Float:
    """Return the largest element of `count` vectors (at least one) without NaN."""
    b = e.b

    def body(index: Any, state: list[Any]) -> list[Any]:
        value = e.load(b.add(at, b.mul(index, e.int64(_VECTOR_BYTES))), vector(F32))
        return [emit_larger(e, value, state[0])]

    (top,) = e.loop(count, [e.constant(F32, float("-inf"))], body)
    return e.call("llvm.vector.reduce.fmax.v16f32", F32, [top])


@emitted
def least_of(e: Emitter, at: Int, count: Int) -> Float:
    """Return the smallest element of `count` vectors (at least one) without NaN, ignoring -inf."""
    b = e.b
    infinite = e.constant(F32, float("inf"))

    def body(index: Any, state: list[Any]) -> list[Any]:
        value = e.load(b.add(at, b.mul(index, e.int64(_VECTOR_BYTES))), vector(F32))
        value = b.select(b.fcmp_ordered(">=", value, e.constant(F32, _LOWEST)), value, infinite)
        return [b.select(b.fcmp_ordered("<", value, state[0]), value, state[0])]

    (least,) = e.loop(count, [infinite], body)
    return e.call("llvm.vector.reduce.fmin.v16f32", F32, [least])


@emitted
def reaches(e: Emitter, at: Int, bound: Float) -> Bool:
    """Return whether one of the 16 float32 at an address is at least `bound`."""
    hits = e.b.fcmp_ordered(">=", e.load(at, vector(F32)), e.splat(bound))
    return e.b.icmp_unsigned("!=", _bits(e, hits), e.int64(0))


@emitted
def weigh_chunk(e: Emitter, at: Int, largest: Float, scale: Float, bound: Float, to: Int) -> Double:
    """Store the weights of a chunk, 0 for logits below `bound`; return their sum."""
    b = e.b
    largest, scale, bound = (e.splat(value) for value in (largest, scale, bound))

    def body(turn: Any, totals: list[Any]) -> list[Any]:
        target = b.add(to, b.mul(turn, e.int64(_TOGETHER * _VECTOR_BYTES)))
        results = []
        for part, value in enumerate(_vectors(e, at, turn)):
            weight = _kept(e, value, bound, _weight(e, value, largest, scale))
            e.store(target, weight, _VECTOR_BYTES * part)
            results.append(b.fadd(totals[part], weight))
        return results

    totals = e.loop(e.int64(CHUNK // LANES // _TOGETHER), [e.zeros(F32)] * _TOGETHER, body)
    total = b.fadd(b.fadd(totals[0], totals[1]), b.fadd(totals[2], totals[3]))
    return b.fpext(e.sum_lanes(total), _F64)


@emitted
def add_masses(e: Emitter, at: Int, largest: Float, scale: Float, edges: Int, masses: Int) -> None:
    """Add, for each of EDGES float32 edges, the weights of a chunk's logits at or above the edge to a float64 mass."""
    b = e.b
    largest, scale = (e.splat(value) for value in (largest, scale))
    edges = [e.splat(e.load(edges, F32, 4 * n)) for n in range(EDGES)]

    def body(index: Any, totals: list[Any]) -> list[Any]:
        value = e.load(b.add(at, b.mul(index, e.int64(_VECTOR_BYTES))), vector(F32))
        weight = _weight(e, value, largest, scale)
        return [b.fadd(total, _kept(e, value, edge, weight)) for total, edge in zip(totals, edges)]

    totals = e.loop(e.int64(CHUNK // LANES), [e.zeros(F32)] * EDGES, body)
    for n, total in enumerate(totals):
        mass = b.fadd(e.load(masses, _F64, 8 * n), b.fpext(e.sum_lanes(total), _F64))
        e.store(masses, mass, 8 * n)


@emitted
def hits(e: Emitter, at: Int, low: Float, high: Float) -> Int:
    """Return which of 64 logits are in [low, high), one bit for each; the lowest bit is for the first logit."""
    b = e.b
    low, high = (e.splat(value) for value in (low, high))
    found = e.int64(0)
    for part in range(GROUP // LANES):
        value = e.load(at, vector(F32), _VECTOR_BYTES * part)
        inside = b.and_(b.fcmp_ordered(">=", value, low), b.fcmp_ordered("<", value, high))
        found = b.or_(found, b.shl(_bits(e, inside), e.int64(LANES * part)))
    return found


@emitted
def copy_hits(e: Emitter, at: Int, low: Float, high: Float, to: Int) -> Int:
    """Copy the logits of a chunk that are in [low, high) to `to`, without gaps; return the address after them.

    Up to 64 bytes after the last may be overwritten. `to` may be at or before `at`.
    """
    b = e.b
    low, high = (e.splat(value) for value in (low, high))

    def body(index: Any, state: list[Any]) -> list[Any]:
        value = e.load(b.add(at, b.mul(index, e.int64(_VECTOR_BYTES))), vector(F32))
        inside = b.and_(b.fcmp_ordered(">=", value, low), b.fcmp_ordered("<", value, high))
        undefined = ir.Constant(vector(F32), ir.Undefined)
        packed = e.call("llvm.experimental.vector.compress.v16f32", vector(F32), [value, inside, undefined])
        e.store(state[0], packed)
        return [b.add(state[0], b.shl(b.ctpop(_bits(e, inside)), e.int64(2)))]

    return e.loop(e.int64(CHUNK // LANES), [to], body)[0]


@emitted
def first_bit(e: Emitter, bits: Int) -> Int:
    """Return the position of the lowest 1 of an int64 that is not 0."""
    return e.b.cttz(bits, ir.Constant(ir.IntType(1), 1))


@emitted
def count_bits(e: Emitter, bits: Int) -> Int:
    return e.b.ctpop(bits)


def _from_key(b: Any, key: Any) -> Any:
    negative = b.sub(ir.Constant(I64, 1 << 31), key)
    return b.bitcast(b.trunc(b.select(b.icmp_signed("<", key, ir.Constant(I64, 0)), negative, key), I32), F32)


def _to_key(b: Any, value: Any) -> Any:
    bits, sign = b.zext(b.bitcast(value, I32), I64), ir.Constant(I64, 1 << 31)
    return b.select(b.icmp_signed("<", bits, sign), bits, b.sub(sign, bits))


@emitted
def key_of(e: Emitter, value: Float) -> Int:
    """Return the key of a float32; 0 for both zeros."""
    return _to_key(e.b, value)


@emitted
def value_of(e: Emitter, key: Int) -> Float:
    """Return the float32 of a key."""
    return _from_key(e.b, key)


@emitted
def above(e: Emitter, value: Float) -> Float:
    """Return the next larger float32."""
    b = e.b
    return _from_key(b, b.add(_to_key(b, value), ir.Constant(I64, 1)))


@emitted
def chunk_at(e: Emitter, row: Int, last: Int, chunks: Int, number: Int) -> Int:
    """Return the address of a chunk of a row; `last` is the address of the last chunk's copy."""
    b = e.b
    is_last = b.icmp_signed("==", b.add(number, ir.Constant(I64, 1)), chunks)
    return b.select(is_last, last, b.add(row, b.mul(number, ir.Constant(I64, CHUNK_BYTES))))
