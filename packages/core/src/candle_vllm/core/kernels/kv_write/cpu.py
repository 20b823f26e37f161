# pyright: reportCallIssue=false, reportArgumentType=false
"""Rotary embedding, cache write and query conversion in one pass on the CPU (step 6 of a request's life).

Reads the fused q/k/v product, rotates q and k in fp32 as `rotary` says, and rounds to bfloat16: q, times a factor, into
a buffer, k and v into the caches in the tiles that `attention.cpu_tiles` describes. A unit of work is one head of one
token. Threads may write the two halves of one 32-bit word of the value cache, each with 16-bit stores.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from candle_vllm.core.kernels.attention.cpu_cache import STRIP
from candle_vllm.core.kernels.attention.cpu_tiles import place_of
from candle_vllm.core.kernels.cpu_runtime.emit import F32, I16, I32, Emitter, vector
from candle_vllm.core.kernels.cpu_runtime.level import LANES
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber
from candle_vllm.core.kernels.cpu_runtime.primitives import float32_at, float_from_bits, int64_at, read, step_number
from candle_vllm.core.kernels.kv_write import WriteArguments

_QUERY, _KEY, _VALUE = range(3)


# ---- emitted code ----------------------------------------------------------------------------------------------------


def _store_lanes(e: Emitter, lanes: Any, kind: int, to: Any, stride: Any, dim: Any) -> None:
    """Stores 16 bfloat16 of dimensions dim .. dim + 15 where they belong.

    `to` is the address of a query row, of a key's first pair in its strip (pairs are `stride` bytes apart), or of a
    value's first dimension, whose neighbours are 4 bytes apart: the other half of each word is not touched.
    """
    b = e.b
    if kind == _QUERY:
        e.store(b.add(to, b.shl(dim, e.int64(1))), lanes)
    elif kind == _KEY:
        pairs = b.bitcast(lanes, vector(I32, LANES // 2))
        at = b.add(to, b.mul(b.lshr(dim, e.int64(1)), stride))
        for n in range(LANES // 2):
            e.store(at, b.extract_element(pairs, ir.Constant(I32, n)))
            at = b.add(at, stride)
    else:
        every_other = [half for lane in range(LANES) for half in (lane, LANES)]
        spread = b.shuffle_vector(lanes, e.zeros(I16), ir.Constant(vector(I32, 2 * LANES), every_other))
        mask = ir.Constant(vector(ir.IntType(1), 2 * LANES), [1, 0] * LANES)
        e.store_masked(b.add(to, b.shl(dim, e.int64(2))), spread, mask)


@intrinsic(prefer_literal=True)
def write_plain(_: Any, x: Any, dim: Any, factor: Any, to: Any, stride: Any, kind: Any) -> Any:
    """Dimensions dim .. dim + 15 of the float row x, times a factor, to their place; `kind` is a constant."""
    signature = types.void(types.int64, types.int64, types.float32, types.int64, types.int64, kind)

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        e = Emitter(b)
        value = e.load(b.add(args[0], b.shl(args[1], e.int64(2))), vector(F32))
        scaled = b.fmul(value, e.splat(args[2]))
        _store_lanes(e, e.float_to_bf16(scaled), kind.literal_value, args[3], args[4], args[1])
        return context.get_dummy_value()

    return signature, code


@intrinsic(prefer_literal=True)
def write_rotated(
    _: Any, x: Any, dim: Any, half: Any, cos: Any, sin: Any, factor: Any, to: Any, stride: Any, kind: Any
) -> Any:
    """Dimensions dim .. dim + 15 and their partners, `half` further on, rotated, times a factor, to their places.

    `cos` and `sin` are the addresses of the position's row of the tables; `kind` is a constant.
    """
    signature = types.void(*[types.int64] * 5, types.float32, types.int64, types.int64, kind)

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        e = Emitter(b)
        x, dim, half, cos, sin, factor, to, stride, _ = args
        at, other = b.shl(dim, e.int64(2)), b.add(dim, half)
        first, c, s = (e.load(b.add(base, at), vector(F32)) for base in (x, cos, sin))
        second = e.load(b.add(x, b.shl(other, e.int64(2))), vector(F32))
        times = e.splat(factor)
        for place, value in (
            (dim, b.fsub(b.fmul(first, c), b.fmul(second, s))),
            (other, b.fadd(b.fmul(second, c), b.fmul(first, s))),
        ):
            _store_lanes(e, e.float_to_bf16(b.fmul(value, times)), kind.literal_value, to, stride, place)
        return context.get_dummy_value()

    return signature, code


@intrinsic
def store_bf16(_: Any, to: Any, value: Any) -> Any:
    """One float as bfloat16, rounded as `Emitter.float_to_bf16` does."""
    signature = types.void(types.int64, types.float32)

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        e = Emitter(b)
        bits = b.bitcast(args[1], I32)
        odd = b.and_(b.lshr(bits, ir.Constant(I32, 16)), ir.Constant(I32, 1))
        rounded = b.add(b.add(bits, ir.Constant(I32, 0x7FFF)), odd)
        e.store(args[0], b.trunc(b.lshr(rounded, ir.Constant(I32, 16)), I16))
        return context.get_dummy_value()

    return signature, code


# ---- the operation ---------------------------------------------------------------------------------------------------


@njit(inline="always")
def _place(to: int, stride: int, dim: int, kind: int) -> int:
    """Address of one dimension, as `_store_lanes` has it."""
    if kind == _QUERY:
        return to + 2 * dim
    if kind == _KEY:
        return to + stride * (dim >> 1) + 2 * (dim & 1)
    return to + 4 * dim


@njit(inline="always")
def _write_odd(x: int, half: int, cos: int, sin: int, factor: float, to: int, stride: int, kind: int) -> None:
    """The rotated dimensions where R / 2 is not a multiple of 16, one pair at a time."""
    row, c, s = float32_at(x), float32_at(cos), float32_at(sin)
    for i in range(half):
        a, b = row[i], row[i + half]
        store_bf16(_place(to, stride, i, kind), (a * c[i] - b * s[i]) * factor)
        store_bf16(_place(to, stride, i + half, kind), (b * c[i] + a * s[i]) * factor)


@njit(inline="always")
def _write_rest(x: int, first: int, dim: int, factor: float, to: int, stride: int, kind: int) -> None:
    """The dimensions from `first` on, which do not rotate; those outside whole runs of 16 one by one."""
    row = float32_at(x)
    i = first
    while i < dim and i % LANES != 0:
        store_bf16(_place(to, stride, i, kind), row[i] * factor)
        i += 1
    while i + LANES <= dim:
        write_plain(x, i, factor, to, stride, kind)
        i += LANES
    while i < dim:
        store_bf16(_place(to, stride, i, kind), row[i] * factor)
        i += 1


@njit(inline="always")
def _write_head(
    x: int, dim: int, half: int, cos: int, sin: int, factor: float, to: int, stride: int, kind: int
) -> None:
    """One query or key head."""
    if half % LANES == 0:
        for i in range(0, half, LANES):
            write_rotated(x, i, half, cos, sin, factor, to, stride, kind)
    else:
        _write_odd(x, half, cos, sin, factor, to, stride, kind)
    _write_rest(x, 2 * half, dim, factor, to, stride, kind)


def rotate_and_write(row, thread, threads):
    """The operation."""
    given = read(WriteArguments, row)
    tokens = step_number(row, StepNumber.TOKENS.value)
    heads, kv_heads, dim, half = given.heads, given.kv_heads, given.head_dim, given.half
    positions, slots = int64_at(given.positions), int64_at(given.slots)
    one = float_from_bits(0x3F800000)
    strip = min(1 << given.block_shift, STRIP)
    each = heads + 2 * kv_heads
    unit = tokens * each * thread // threads
    last = tokens * each * (thread + 1) // threads
    t, h = unit // each, unit % each
    while unit < last:
        x = given.qkv + 4 * t * given.stride
        at = 4 * half * positions[t]
        cos, sin = given.cos + at, given.sin + at
        if h < heads:
            to = given.q + 2 * (t * heads + h) * dim
            _write_head(x + 4 * (given.q_column + h * dim), dim, half, cos, sin, given.scale, to, 0, _QUERY)
        else:
            head = (h - heads) % kv_heads
            place = place_of(slots[t], head, given.block_shift, given.stretch_step)
            if h < heads + kv_heads:
                to = given.key_cache + 2 * dim * (place & -strip) + 4 * (place & (strip - 1))
                _write_head(x + 4 * (given.k_column + head * dim), dim, half, cos, sin, one, to, 4 * strip, _KEY)
            else:
                to = given.value_cache + 2 * dim * (place & ~1) + 2 * (place & 1)
                _write_rest(x + 4 * (given.v_column + head * dim), 0, dim, one, to, 0, _VALUE)
        unit += 1
        h += 1
        if h == each:
            h = 0
            t += 1
