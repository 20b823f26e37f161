# SPDX-License-Identifier: MIT
"""The gated delta rule, Mamba 1 and 2 on the CPU: `prepare`, `scan`, `keep`, with barriers between them.

Terms (tile, kept row): see the package. The columns of a state are independent. A **unit** of `scan` is up to two tiles
of a value head (16 KB for Dk = 128) with all tokens of a sequence in the step, so the tiles stay in the L1 cache. Each
token reads the tiles in two passes: the first computes k S, which Mamba does not need, the second the new state and
q S. If the state after a token is to be stored, it is written to its slot, where the next token reads it.

Every element of k S and q S is a sum over Dk in a fixed order, as two partial sums. So the bits depend neither on how a
prompt is divided into steps, nor on the rest of the step, nor on the thread. `keep` writes the kept rows after all
units have read those of the previous step, because several units read the same row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit

from candle_vllm.core.kernels.cpu_runtime.emit import F32, Emitter, Float, Int, emitted, vector
from candle_vllm.core.kernels.cpu_runtime.emit_columns import emit_columns, lanes_below, load_columns, store_columns
from candle_vllm.core.kernels.cpu_runtime.emit_functions import emit_exp, emit_softplus
from candle_vllm.core.kernels.cpu_runtime.level import LANES
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber
from candle_vllm.core.kernels.cpu_runtime.primitives import float32_at, int64_at, read, step_number
from candle_vllm.core.kernels.cpu_runtime.tiles import stack_bytes
from candle_vllm.core.kernels.delta_rule.layout import EPS, DeltaArguments

_SEQUENCES, _TOKENS = int(StepNumber.SEQUENCES), int(StepNumber.TOKENS)
_LINE = 4 * LANES
_UNROLLED = 4  # rows of a state per iteration
_WIDTH = 2  # tiles of a unit


# ---- prepare ---------------------------------------------------------------------------------------------------------


@emitted
def _scale_row(e: Emitter, x: Int, count: Int, normed: Int, scale: Float) -> None:
    """Multiply `count` floats by `scale` in place; if `normed`, also divide them by the root of the sum of squares."""
    b = e.b

    def squares(place: Any, mask: Any, totals: list[Any]) -> list[Any]:
        value = load_columns(e, b.add(x, place), mask)
        return [e.fma(value, value, totals[0])]

    (total,) = emit_columns(e, count, [e.zeros(F32)], squares)
    root = e.call("llvm.sqrt.f32", F32, [b.fadd(e.sum_lanes(total), ir.Constant(F32, EPS))])
    norm = b.select(b.icmp_signed("!=", normed, e.int64(0)), root, ir.Constant(F32, 1.0))
    factor = e.splat(b.fdiv(scale, norm))

    def scaled(place: Any, mask: Any, state: list[Any]) -> list[Any]:
        at = b.add(x, place)
        store_columns(e, at, b.fmul(load_columns(e, at, mask), factor), mask)
        return state

    emit_columns(e, count, [], scaled)


@emitted
def _gates(
    e: Emitter,
    at_a: Int,
    at_b: Int,
    at_decay: Int,
    bias: Int,
    most: Float,
    least: Float,
    skip: Int,
    to: Int,
    decays: Int,
    to_strengths: Int,
    heads: Int,
) -> None:
    """Write `decays` decays and `heads` strengths (with `skip`, dt) from a and b of a token; NaN where one is NaN."""
    b = e.b
    one = e.constant(F32, 1.0)

    def times(place: Any, mask: Any) -> tuple[Any, Any]:
        time = b.fadd(*(load_columns(e, b.add(at, place), mask) for at in (at_a, bias)))
        return time, emit_softplus(e, time)

    def store(to: Any, source: Any, value: Any, mask: Any) -> list[Any]:
        store_columns(e, to, b.select(b.fcmp_unordered("uno", source, source), source, value), mask)
        return []

    def decayed(place: Any, mask: Any, _: list[Any]) -> list[Any]:
        time, positive = times(place, mask)
        decay = load_columns(e, b.add(at_decay, place), mask)
        return store(b.add(to, place), time, emit_exp(e, b.fmul(decay, positive)), mask)

    def bounded(place: Any, mask: Any, _: list[Any]) -> list[Any]:
        time = b.fadd(*(load_columns(e, b.add(at, place), mask) for at in (at_a, bias)))
        power = emit_exp(e, b.fmul(load_columns(e, b.add(at_decay, place), mask), time))
        return store(b.add(to, place), time, emit_exp(e, b.fdiv(e.splat(least), b.fadd(one, power))), mask)

    def corrected(place: Any, mask: Any, _: list[Any]) -> list[Any]:
        other = load_columns(e, b.add(at_b, place), mask)
        value = b.fdiv(e.splat(most), b.fadd(one, emit_exp(e, b.fneg(other))))
        return store(b.add(to_strengths, place), other, value, mask)

    def skipped(place: Any, mask: Any, _: list[Any]) -> list[Any]:
        other = load_columns(e, b.add(at_b, place), mask)
        return store(b.add(to_strengths, place), other, times(place, mask)[1], mask)

    with b.if_else(b.fcmp_ordered("==", least, ir.Constant(F32, 0.0))) as (free, limited):
        with free:
            emit_columns(e, decays, [], decayed)
        with limited:
            emit_columns(e, decays, [], bounded)
    with b.if_else(b.icmp_signed("==", skip, e.int64(0))) as (corrects, skips):
        with corrects:
            emit_columns(e, heads, [], corrected)
        with skips:
            emit_columns(e, heads, [], skipped)


def prepare(row, thread, threads):
    """Scale q and, if `normed`, norm q and k, in place; compute the gates. A unit is a key head of a token."""
    given = read(DeltaArguments, row)
    key_heads, heads, dim = given.key_heads, given.heads, given.key_dim
    group, each = heads // key_heads, given.decays // heads
    units = step_number(row, _TOKENS) * key_heads
    for unit in range(units * thread // threads, units * (thread + 1) // threads):
        t = unit // key_heads
        head = unit - t * key_heads
        _scale_row(given.q + 4 * (t * given.q_stride + head * dim), dim, given.normed, given.scale)
        if given.normed != 0:
            _scale_row(given.k + 4 * (t * given.k_stride + head * dim), dim, 1, 1.0)
        at = 4 * head * group
        a, b = given.a + 4 * t * given.a_stride + each * at, given.b + 4 * t * given.b_stride + at
        decay, bias, to = given.decay + each * at, given.bias + each * at, given.gates + 4 * t * given.gates_stride
        strengths = to + 4 * given.decays + at
        most, least = given.strength, given.least
        _gates(a, b, decay, bias, most, least, given.skip, to + each * at, each * group, strengths, group)


# ---- scan ------------------------------------------------------------------------------------------------------------


def _each_row(e: Emitter, rows: Any, state: list[Any], body: Any) -> list[Any]:
    """Emit body(row, half, state) -> state for each row of S, 4 at a time; `half` (0, 1) is the row's partial sum."""
    b = e.b

    def several(index: Any, state: list[Any]) -> list[Any]:
        first = b.mul(index, e.int64(_UNROLLED))
        for each in range(_UNROLLED):
            state = body(b.add(first, e.int64(each)), each & 1, state)
        return state

    def one(index: Any, state: list[Any]) -> list[Any]:
        return body(b.add(b.and_(rows, e.int64(-_UNROLLED)), index), 0, state)

    state = e.loop_or_skip(b.sdiv(rows, e.int64(_UNROLLED)), state, several)
    return e.loop_or_skip(b.and_(rows, e.int64(_UNROLLED - 1)), state, one)


@emitted
def _take_in(
    e: Emitter,
    tiles: int,
    reads: bool,
    corrects: bool,
    grain: int,
    at: Int,
    to: Int,
    k: Int,
    q: Int,
    v: Int,
    out: Int,
    rows: Int,
    columns: Int,
    decay: Int,
    strength: Int,
    bias: Int,
    skip: Int,
    ahead: Int,
) -> None:
    """Process a token for some tiles at `at`; write their new state to `to`, which may be the same address.

    tiles: number of tiles. reads: whether to compute `out` from q. corrects: true for the delta rule, false for Mamba.
    grain: whether a head (0), a row (1) or an element (2, Mamba 1) has a decay.
    k, q: addresses of `rows` floats. v, out: of `columns` floats. decay: of 1 float, of `rows` floats, or of tiles.
    strength, skip: addresses of one float. If `grain` is 2, strength (a), bias and skip have `columns` floats.
    ahead: address of tiles to prefetch meanwhile.
    """
    b = e.b
    by_row, by_element = grain == 1, grain == 2
    size = b.mul(rows, e.int64(_LINE))
    sources, targets, later, decays = (
        [b.add(x, b.mul(size, e.int64(tile))) for tile in range(tiles)] for x in (at, to, ahead, decay)
    )

    def lane(address: Any, row: Any) -> Any:
        return e.splat(e.load(b.add(address, b.shl(row, e.int64(2))), F32))

    def remember(row: Any, half: int, sums: list[Any]) -> list[Any]:
        key, place, sums = lane(k, row), b.mul(row, e.int64(_LINE)), list(sums)
        key = b.fmul(key, lane(decay, row)) if by_row else key
        for tile in range(tiles):
            old = e.load(b.add(sources[tile], place), vector(F32))
            sums[2 * tile + half] = e.fma(key, old, sums[2 * tile + half])
        return sums

    remembered = _each_row(e, rows, [e.zeros(F32)] * (2 * tiles), remember) if corrects else []
    masks = [lanes_below(e, b.sub(columns, e.int64(LANES * tile))) for tile in range(tiles)]

    def of_columns(address: Any) -> list[Any]:
        return [load_columns(e, b.add(address, e.int64(_LINE * tile)), mask) for tile, mask in enumerate(masks)]

    def step_size(time: Any) -> Any:
        return b.select(b.fcmp_unordered("uno", time, time), time, emit_softplus(e, time))

    values, decayed, corrections, first = of_columns(v), e.constant(F32, 1.0), [], e.int64(0)
    if by_element:
        strengths = [step_size(b.fadd(*pair)) for pair in zip(of_columns(strength), of_columns(bias))]
    else:
        strengths, decayed = [lane(strength, first)] * tiles, decayed if by_row else lane(decay, first)
    for tile, value in enumerate(values):
        if corrects:
            value = e.fma(b.fneg(decayed), b.fadd(*remembered[2 * tile : 2 * tile + 2]), value)
        corrections.append(b.fmul(strengths[tile], value))

    def correct(row: Any, half: int, sums: list[Any]) -> list[Any]:
        key, place, sums = lane(k, row), b.mul(row, e.int64(_LINE)), list(sums)
        query, factor = lane(q, row) if reads else None, lane(decay, row) if by_row else decayed
        # Tiles are 8 KB apart if Dk = 128. On a Zen 4, a fifth of all processes took 2.7 times as long when the row
        # of the second tile was loaded after that of the first tile was stored.
        olds = [e.load(b.add(source, place), vector(F32)) for source in sources]
        for tile, old in enumerate(olds):
            e.prefetch(b.add(later[tile], place), near=2)
            if by_element:
                factor = emit_exp(e, b.fmul(e.load(b.add(decays[tile], place), vector(F32)), strengths[tile]))
            new = e.fma(key, corrections[tile], b.fmul(factor, old))
            e.store(b.add(targets[tile], place), new)
            if reads:
                sums[2 * tile + half] = e.fma(query, new, sums[2 * tile + half])
        return sums

    results = _each_row(e, rows, [e.zeros(F32)] * (2 * tiles) if reads else [], correct)
    skips = [] if corrects or not reads else of_columns(skip) if by_element else [lane(skip, first)] * tiles
    for tile, mask in enumerate(masks if reads else []):
        total = b.fadd(*results[2 * tile : 2 * tile + 2])
        total = e.fma(skips[tile], values[tile], total) if skips else total
        store_columns(e, b.add(out, e.int64(_LINE * tile)), total, mask)


@emitted
def _clear(e: Emitter, to: Int, lines: Int) -> None:
    """Write zeros to `lines` lines of 16 floats."""
    b = e.b
    with e.each_or_skip(lines) as index:
        e.store(b.add(to, b.mul(index, e.int64(_LINE))), e.zeros(F32))


@njit(inline="always")
def _first_tile(given: Any, part: int) -> tuple[int, int]:
    """Return the value head of unit `part` of a sequence, and the unit's first tile in the head."""
    each = ((given.value_dim + LANES - 1) // LANES + _WIDTH - 1) // _WIDTH
    head = part // each
    return head, _WIDTH * (part - head * each)


@njit(inline="always")
def _place(given: Any, slot: int, part: int) -> int:
    """Return the address of a unit's tiles in a slot; for slot -1, in slot 0."""
    head, first = _first_tile(given, part)
    tiles = (given.value_dim + LANES - 1) // LANES
    return given.states + max(slot, 0) * given.slot_bytes + _LINE * given.key_dim * (head * tiles + first)


def make_scan(CORRECTS: int, GRAIN: int) -> Callable[..., None]:
    """Return the operation that processes tokens by the delta rule or by Mamba; `_take_in` explains the arguments.

    Threads divide the units of all sequences into equal shares, ordered by unit, then by sequence.
    """

    @njit
    def scan_columns(given: Any, r: int, part: int, scratch: int, ahead: int) -> None:
        """Process the tokens of sequence r for unit `part`; with the last token, prefetch the tiles at `ahead`."""
        starts, stores = int64_at(given.query_start), int64_at(given.stores)
        heads, dim, source = given.heads, given.key_dim, int64_at(given.sources)[r]
        decays = given.decays
        head, first = _first_tile(given, part)
        columns = min(given.value_dim - LANES * first, LANES * _WIDTH)
        tiles = (columns + LANES - 1) // LANES
        key = 4 * dim * (head // (heads // given.key_heads))
        value = 4 * (head * given.value_dim + LANES * first)
        at = _place(given, source, part)
        if source < 0:
            at = scratch
            _clear(scratch, tiles * dim)
        skip, bias, of_strength = given.skip + 4 * head, given.bias + value, 4 * (decays + head)
        if GRAIN == 2:
            skip, of_strength = given.skip + value, value
        taken = given.kept + int64_at(given.slots)[r] * given.kept_bytes
        of_values = 4 * dim * given.key_heads
        of_gates, of_decay = of_values + 4 * heads * given.value_dim, 4 * head * (decays // heads)
        for _ in range(int64_at(given.replays)[r]):
            k, v = taken + key, taken + of_values + value
            decay, strength = taken + of_gates + of_decay, taken + of_gates + of_strength
            if GRAIN == 2:
                decay = given.decay + _place(given, 0, part) - given.states
            if tiles == 2:
                _take_in(2, 0, CORRECTS, GRAIN, at, scratch, k, k, v, v, dim, columns, decay, strength, bias, skip, at)
            else:
                _take_in(1, 0, CORRECTS, GRAIN, at, scratch, k, k, v, v, dim, columns, decay, strength, bias, skip, at)
            at = scratch
            taken += given.kept_row_bytes
        for t in range(starts[r], starts[r + 1]):
            k, q = given.k + 4 * t * given.k_stride + key, given.q + 4 * t * given.q_stride + key
            v, out = given.v + 4 * t * given.v_stride + value, given.out + 4 * t * given.out_stride + value
            gates = given.gates + 4 * t * given.gates_stride
            decay, strength, to, later = gates + of_decay, gates + of_strength, scratch, at
            if GRAIN == 2:
                decay = given.decay + _place(given, 0, part) - given.states
            if stores[t] >= 0:
                to = _place(given, stores[t], part)
            if t + 1 == starts[r + 1]:
                later = ahead
            if tiles == 2:
                _take_in(2, 1, CORRECTS, GRAIN, at, to, k, q, v, out, dim, columns, decay, strength, bias, skip, later)
            else:
                _take_in(1, 1, CORRECTS, GRAIN, at, to, k, q, v, out, dim, columns, decay, strength, bias, skip, later)
            at = to

    def scan(row, thread, threads):
        given = read(DeltaArguments, row)
        sequences, sources = step_number(row, _SEQUENCES), int64_at(given.sources)
        tiles = (given.value_dim + LANES - 1) // LANES
        units = given.heads * ((tiles + _WIDTH - 1) // _WIDTH) * sequences
        if units == 0:
            return
        begin, end = units * thread // threads, units * (thread + 1) // threads
        first_part, last_part = begin // sequences, end // sequences
        first_rest, last_rest = begin - first_part * sequences, end - last_part * sequences
        scratch = stack_bytes(_WIDTH * _LINE * given.key_dim)
        for r in range(sequences):
            part = first_part + (1 if r < first_rest else 0)
            last = last_part + (1 if r < last_rest else 0)
            while part < last:
                ahead = scratch
                if part + 1 < last:
                    ahead = _place(given, sources[r], part + 1)
                elif r + 1 < sequences:
                    ahead = _place(given, sources[r + 1], first_part + (1 if r + 1 < first_rest else 0))
                scan_columns(given, r, part, scratch, ahead)
                part += 1

    return scan


# ---- keep ------------------------------------------------------------------------------------------------------------


@njit
def _copy(source: int, count: int, to: int) -> int:
    """Copy floats; return the address after the copy."""
    values, target = float32_at(source), float32_at(to)
    for i in range(count):
        target[i] = values[i]
    return to + 4 * count


def keep(row, thread, threads):
    """Write kept rows, after `scan` has read those of the previous step."""
    given = read(DeltaArguments, row)
    starts, slots, keeps = int64_at(given.query_start), int64_at(given.slots), int64_at(given.keeps)
    tokens = step_number(row, _TOKENS)
    first, last = tokens * thread // threads, tokens * (thread + 1) // threads
    for r in range(step_number(row, _SEQUENCES)):
        for t in range(max(first, starts[r]), min(last, starts[r + 1])):
            if keeps[t] >= 0:
                to = given.kept + slots[r] * given.kept_bytes + keeps[t] * given.kept_row_bytes
                to = _copy(given.k + 4 * t * given.k_stride, given.key_heads * given.key_dim, to)
                to = _copy(given.v + 4 * t * given.v_stride, given.heads * given.value_dim, to)
                _copy(given.gates + 4 * t * given.gates_stride, given.decays + given.strengths, to)
