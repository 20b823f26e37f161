# SPDX-License-Identifier: MIT
"""Rotary embedding, cache write and query conversion in one pass on the CPU (step 6 of a request's life).

Terms: see `attention/cpu_cache.py`. The operation reads the product of the fused q/k/v projection, rotates q and k in
fp32 (`kernels/rotary`), and rounds to bfloat16: q, times a factor, is written to a buffer, k and v to the caches in the
layout of `attention.cpu_tiles`. For a quantised cache, a head is first computed as floats on the stack, and then
becomes blocks of `attention.cpu_quantised`; queries are quantised if keys are. A unit of work is one head of one token.
Two threads may write the halves of one 32-bit word of the value cache, so stores to that cache have 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit

from candle_vllm.core.kernels.attention.cpu_cache import BLOCK, MOST_DIM, STRIP, CacheKind, code_bytes
from candle_vllm.core.kernels.attention.cpu_quantised import quantise_key, quantise_query, quantise_value, rotate_row
from candle_vllm.core.kernels.attention.cpu_tiles import place_of
from candle_vllm.core.kernels.cpu_runtime.emit import F32, I16, I32, Emitter, Float, Int, emitted, vector
from candle_vllm.core.kernels.cpu_runtime.level import LANES
from candle_vllm.core.kernels.cpu_runtime.primitives import (
    float32_at,
    float64_at,
    float_from_bits,
    int64_at,
    read,
    step_number,
)
from candle_vllm.core.kernels.cpu_runtime.tiles import ask_line, stack_bytes
from candle_vllm.core.kernels.kv_write import WriteArguments

_QUERY, _KEY, _VALUE, _FLOATS = range(4)


# ---- emitted code ----------------------------------------------------------------------------------------------------


def _store_lanes(e: Emitter, values: Any, kind: int, to: Any, stride: Any, dim: Any) -> None:
    """Store dimensions dim .. dim + 15 of a head as bfloat16, or as float32 if `kind` is `_FLOATS`.

    `to` is the address of a row (`_QUERY`, `_FLOATS`), of a key's first pair of dimensions in the strip (pairs are
    `stride` bytes apart), or of a value's first dimension (dimensions are 4 bytes apart).
    """
    b = e.b
    if kind == _FLOATS:
        e.store(b.add(to, b.shl(dim, e.int64(2))), values)
        return
    lanes = e.float_to_bf16(values)
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


@emitted
def write_plain(e: Emitter, x: Int, dim: Int, factor: Float, to: Int, stride: Int, kind: int) -> None:
    """Store dimensions dim .. dim + 15 of the float row x, times a factor, as `_store_lanes` does."""
    value = e.load(e.b.add(x, e.b.shl(dim, e.int64(2))), vector(F32))
    _store_lanes(e, e.b.fmul(value, e.splat(factor)), kind, to, stride, dim)


@emitted
def write_rotated(
    e: Emitter, x: Int, dim: Int, half: Int, cos: Int, sin: Int, factor: Float, to: Int, stride: Int, kind: int
) -> None:
    """Rotate dimensions dim .. dim + 15 and the dimensions `half` later, and store both times a factor.

    `cos` and `sin` are the addresses of the tables' rows for the token.
    """
    b = e.b
    at, other = b.shl(dim, e.int64(2)), b.add(dim, half)
    first, c, s = (e.load(b.add(base, at), vector(F32)) for base in (x, cos, sin))
    second = e.load(b.add(x, b.shl(other, e.int64(2))), vector(F32))
    times = e.splat(factor)
    for place, value in (
        (dim, b.fsub(b.fmul(first, c), b.fmul(second, s))),
        (other, b.fadd(b.fmul(second, c), b.fmul(first, s))),
    ):
        _store_lanes(e, b.fmul(value, times), kind, to, stride, place)


@emitted
def store_one(e: Emitter, to: Int, value: Float, kind: int) -> None:
    """Store a float, rounded to bfloat16 unless `kind` is `_FLOATS`."""
    e.store(to, value if kind == _FLOATS else e.float_to_bf16(value))


# ---- the operation ---------------------------------------------------------------------------------------------------


@njit(inline="always")
def _place(to: int, stride: int, dim: int, kind: int) -> int:
    """Return the address of one dimension; see `_store_lanes`."""
    if kind == _QUERY:
        return to + 2 * dim
    if kind == _KEY:
        return to + stride * (dim >> 1) + 2 * (dim & 1)
    return to + 4 * dim  # of values, and of heads as floats


@njit(inline="always")
def _write_odd(x: int, half: int, cos: int, sin: int, factor: float, to: int, stride: int, kind: int) -> None:
    """Rotate and store dimensions 0 to 2 * `half` - 1 one pair at a time, because `half` is not a multiple of 16."""
    row, c, s = float32_at(x), float32_at(cos), float32_at(sin)
    for i in range(half):
        a, b = row[i], row[i + half]
        store_one(_place(to, stride, i, kind), (a * c[i] - b * s[i]) * factor, kind)
        store_one(_place(to, stride, i + half, kind), (b * c[i] + a * s[i]) * factor, kind)


@njit(inline="always")
def _write_rest(x: int, first: int, dim: int, factor: float, to: int, stride: int, kind: int) -> None:
    """Store the dimensions from `first` on, which are not rotated, by vectors of 16 where possible."""
    row = float32_at(x)
    i = first
    while i < dim and i % LANES != 0:
        store_one(_place(to, stride, i, kind), row[i] * factor, kind)
        i += 1
    while i + LANES <= dim:
        write_plain(x, i, factor, to, stride, kind)
        i += LANES
    while i < dim:
        store_one(_place(to, stride, i, kind), row[i] * factor, kind)
        i += 1


@njit(inline="always")
def _write_head(
    x: int, dim: int, half: int, cos: int, sin: int, factor: float, to: int, stride: int, kind: int
) -> None:
    if half % LANES == 0:
        for i in range(0, half, LANES):
            write_rotated(x, i, half, cos, sin, factor, to, stride, kind)
    else:
        _write_odd(x, half, cos, sin, factor, to, stride, kind)
    _write_rest(x, 2 * half, dim, factor, to, stride, kind)


@njit(inline="always")
def _fit(row: int, offset: int, factor: int, dim: int) -> None:
    """Subtract an offset from a key and multiply it by factors; a query has no offset."""
    x, y = float32_at(row), float32_at(factor)
    if offset != 0:
        z = float32_at(offset)
        for i in range(dim):
            x[i] -= z[i]
    for i in range(dim):
        x[i] *= y[i]


@njit(inline="always")
def _add_squares(row: int, to: int, dim: int) -> None:
    x, y = float32_at(row), float64_at(to)
    for i in range(dim):
        y[i] += x[i] * x[i]


@njit(inline="always")
def _write_query_blocks(row: int, dim: int, to: int) -> None:
    for n in range(dim // BLOCK):
        quantise_query(row + 4 * BLOCK * n, to + BLOCK * n, to + dim + 4 * n, to + dim + dim // 8 + 4 * n)


@njit(inline="always")
def _write_key_blocks(
    row: int, dim: int, cache: int, place: int, strip: int, size: int, codes: int, kind: int, minima: int
) -> None:
    """Quantise a row of floats to the key of slot `place`; a key has `size` bytes, of which `codes` are codes."""
    within = place & (strip - 1)
    to = cache + size * (place & -strip) + 4 * within
    scales = to + codes * strip
    step = codes * strip // (dim // BLOCK)
    for n in range(dim // BLOCK):
        scale = scales + (4 * strip * n if minima else 4 * strip * (n >> 1) + 2 * (n & 1))
        quantise_key(row + 4 * BLOCK * n, to + step * n, 4 * strip, scale, kind)


@njit(inline="always")
def _write_value_blocks(
    row: int, dim: int, cache: int, place: int, size: int, codes: int, kind: int, planes: int, minima: int
) -> None:
    """Quantise a row of floats to the value of slot `place`; a value has `size` bytes, of which `codes` are codes.

    `planes` is the number of planes of a block; `minima` is 1 if blocks have a minimum, otherwise 0.
    """
    within = place & (LANES - 1)
    tile = cache + size * (place & -LANES)
    step = codes * LANES // (dim // BLOCK)
    whole = step - 4 * LANES * planes  # the planes follow the nibbles
    to = tile + (whole >> 2) * (within >> 2) + (within & 3)
    for n in range(dim // BLOCK):
        scale = tile + codes * LANES + 2 * LANES * (1 + minima) * n + 2 * within
        planes_at = tile + step * n + whole + 4 * within
        quantise_value(row + 4 * BLOCK * n, to + step * n, planes_at, scale, kind)


@njit(inline="always")
def _ask_lines(key: int, stride: int, value: int, dim: int) -> None:
    """Prefetch the memory of a slot's key and value in a bfloat16 KV cache."""
    for pair in range(dim >> 1):
        ask_line(key + stride * pair)
    for at in range(0, 4 * dim, 64):
        ask_line(value + at)


def make_rotate_and_write(keys_as: int, values_as: int) -> Callable[..., None]:
    """Return the operation for one `CacheKind` of keys and of values."""
    keys, values = CacheKind(keys_as), CacheKind(values_as)
    plain_keys, plain_values = not keys.is_quantised, not values.is_quantised
    # Whether a thread prefetches the slot of its next token, if that slot does not follow the current token's slot.
    ASKS = plain_keys and plain_values
    # Bytes of the codes of 64 elements, because the head size is known only when the operation runs.
    key_codes, value_codes = code_bytes(keys, 64), code_bytes(values, 64)
    key_minima, value_minima, planes = int(keys.has_minima), int(values.has_minima), values.planes

    def rotate_and_write(row, thread, threads):
        given = read(WriteArguments, row)
        tokens = step_number(row, given.rows_from)
        heads, kv_heads, dim, half = given.heads, given.kv_heads, given.head_dim, given.half
        positions, slots = int64_at(given.positions), int64_at(given.slots)
        one = float_from_bits(0x3F800000)
        strip = min(1 << given.block_shift, STRIP)
        floats = stack_bytes(4 * MOST_DIM)
        blocks = dim // BLOCK
        each = heads + 2 * kv_heads
        unit = tokens * each * thread // threads
        last = tokens * each * (thread + 1) // threads
        t, h = unit // each, unit % each
        while unit < last:
            x = given.qkv + 4 * t * given.stride
            token = t
            if given.picked != 0:
                token = int64_at(given.picked)[t]
            turned = positions[token]
            if given.turns != 0:
                turned += int64_at(given.turns)[token]
            at = 4 * half * turned
            cos, sin = given.cos + at, given.sin + at
            if h < heads:
                to = given.q + 2 * (t * heads + h) * dim
                source = x + 4 * (given.q_column + h * dim)
                if plain_keys:
                    _write_head(source, dim, half, cos, sin, given.scale, to, 0, _QUERY)
                else:
                    _write_head(source, dim, half, cos, sin, given.scale, floats, 0, _FLOATS)
                    _fit(floats, 0, given.fit + 4 * dim * (3 * (h // given.group) + 2), dim)
                    rotate_row(floats, dim)
                    _write_query_blocks(floats, dim, to)
            else:
                head = (h - heads) % kv_heads
                place = place_of(slots[t], head, given.block_shift, given.stretch_step)
                place += head * given.head_gap
                if ASKS and h < heads + kv_heads and unit + each < last and slots[t + 1] != slots[t] + 1:
                    coming = place_of(slots[t + 1], head, given.block_shift, given.stretch_step)
                    coming += head * given.head_gap
                    to = given.key_cache + 2 * dim * (coming & -strip) + 4 * (coming & (strip - 1))
                    _ask_lines(to, 4 * strip, given.value_cache + 2 * dim * (coming & ~1), dim)
                if h < heads + kv_heads:
                    source = x + 4 * (given.k_column + head * dim)
                    if plain_keys:
                        to = given.key_cache + 2 * dim * (place & -strip) + 4 * (place & (strip - 1))
                        _write_head(source, dim, half, cos, sin, one, to, 4 * strip, _KEY)
                    else:
                        _write_head(source, dim, half, cos, sin, one, floats, 0, _FLOATS)
                        fit = given.fit + 12 * dim * head
                        _fit(floats, fit, fit + 4 * dim, dim)
                        rotate_row(floats, dim)
                        codes = key_codes * dim // 64
                        size = codes + 4 * (blocks if key_minima else (blocks + 1) // 2)
                        _write_key_blocks(floats, dim, given.key_cache, place, strip, size, codes, keys_as, key_minima)
                else:
                    source = x + 4 * (given.v_column + head * dim)
                    if plain_values:
                        to = given.value_cache + 2 * dim * (place & ~1) + 2 * (place & 1)
                        _write_rest(source, 0, dim, one, to, 0, _VALUE)
                    else:
                        _write_rest(source, 0, dim, one, floats, 0, _FLOATS)
                        rotate_row(floats, dim)
                        codes = value_codes * dim // 64
                        size = codes + 2 * blocks * (1 + value_minima)
                        _write_value_blocks(
                            floats, dim, given.value_cache, place, size, codes, values_as, planes, value_minima
                        )
            unit += 1
            h += 1
            if h == each:
                h = 0
                t += 1

    return rotate_and_write


def measure(row, thread, threads):
    """Add a step's rotated keys, their squares and the squares of the queries to float64 [K, 3, D] at `fit`."""
    given = read(WriteArguments, row)
    dim, half, group = given.head_dim, given.half, given.group
    positions = int64_at(given.positions)
    one = float_from_bits(0x3F800000)
    floats = stack_bytes(4 * MOST_DIM)
    for head in range(given.kv_heads * thread // threads, given.kv_heads * (thread + 1) // threads):
        to = given.fit + 24 * dim * head
        for t in range(step_number(row, given.rows_from)):
            turned = positions[t]
            if given.turns != 0:
                turned += int64_at(given.turns)[t]
            cos, sin = given.cos + 4 * half * turned, given.sin + 4 * half * turned
            x = given.qkv + 4 * t * given.stride
            _write_head(x + 4 * (given.k_column + head * dim), dim, half, cos, sin, one, floats, 0, _FLOATS)
            _add_squares(floats, to + 8 * dim, dim)
            key, total = float32_at(floats), float64_at(to)
            for i in range(dim):
                total[i] += key[i]
            for h in range(head * group, (head + 1) * group):
                _write_head(x + 4 * (given.q_column + h * dim), dim, half, cos, sin, one, floats, 0, _FLOATS)
                _add_squares(floats, to + 16 * dim, dim)
