# SPDX-License-Identifier: MIT
"""The convolution with a state on the CPU (step 6 of a request's life).

Threads divide the channels in runs of 16, and process their channels of all sequences, so no thread writes states
or kept rows that another thread reads. A list has the address of a token's input for each tap, and is shifted by one
for each token. Inputs before the step's first token are copied first, because their slots may be overwritten. Gates are
fused: g * x overwrites x when x is first read, and the result is multiplied by h.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit

from candle_vllm.core.kernels.cpu_runtime.emit import F32, I64, Emitter, Int, emitted
from candle_vllm.core.kernels.cpu_runtime.emit_columns import emit_columns, load_columns, store_columns
from candle_vllm.core.kernels.cpu_runtime.emit_functions import emit_silu
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber
from candle_vllm.core.kernels.cpu_runtime.primitives import int64_at, read, step_number
from candle_vllm.core.kernels.cpu_runtime.tiles import stack_bytes
from candle_vllm.core.kernels.short_conv import ShortConvArguments

_PIECE = 1024
"""Channels that are processed at a time, because their earlier inputs are on the stack."""


@emitted
def _convolve(
    e: Emitter,
    taps: int,
    silu: int,
    gated: int,
    inputs: Int,
    gate_in: Int,
    gate_out: Int,
    weight: Int,
    step: Int,
    bias: Int,
    out: Int,
    count: Int,
) -> None:
    """Compute `count` channels of a token.

    inputs: address of the addresses of the taps' inputs; the newest input is multiplied by its gate. weight, step:
    address of the oldest tap's weights, and bytes to the next tap's weights.
    """
    b = e.b
    seen = [e.load(inputs, I64, 8 * tap) for tap in range(taps)]
    weights = [b.add(weight, b.mul(step, e.int64(tap))) for tap in range(taps)]

    def body(place: Any, mask: Any, state: list[Any]) -> list[Any]:
        total, *given = (load_columns(e, b.add(at, place), mask) for at in (bias, *seen))
        if gated:
            given[-1] = b.fmul(load_columns(e, b.add(gate_in, place), mask), given[-1])
            store_columns(e, b.add(seen[-1], place), given[-1], mask)
        for x, factor in zip(given, weights):
            total = e.fma(load_columns(e, b.add(factor, place), mask), x, total)
        total = emit_silu(e, total) if silu else total
        if gated:
            total = b.fmul(load_columns(e, b.add(gate_out, place), mask), total)
        store_columns(e, b.add(out, place), total, mask)
        return state

    emit_columns(e, count, [], body)


@emitted
def _copy(e: Emitter, to: Int, source: Int, count: Int) -> None:
    """Copy `count` floats; write zeros if `source` is 0."""
    b = e.b

    def copy(place: Any, mask: Any, state: list[Any]) -> list[Any]:
        store_columns(e, b.add(to, place), load_columns(e, b.add(source, place), mask), mask)
        return state

    def clear(place: Any, mask: Any, state: list[Any]) -> list[Any]:
        store_columns(e, b.add(to, place), e.zeros(F32), mask)
        return state

    with b.if_else(b.icmp_signed("==", source, ir.Constant(I64, 0))) as (nothing, something):
        with nothing:
            emit_columns(e, count, [], clear)
        with something:
            emit_columns(e, count, [], copy)


@njit(inline="always")
def _earlier(given: Any, r: int, place: int, before: int, channel: int) -> int:
    """Return the address of input `place` of the `before` inputs before a run's first token; 0 for zeros."""
    source = int64_at(given.sources)[r]
    number = int64_at(given.replays)[r] + place - before
    if number >= 0:
        slot = given.kept + int64_at(given.slots)[r] * given.kept_bytes
        return slot + number * given.kept_row_bytes + 4 * channel
    if source < 0:
        return 0
    return given.states + source * given.slot_bytes + 4 * ((number + before) * given.channels + channel)


def make_short_conv(TAPS: int, SILU: int, GATED: int) -> Callable[..., None]:
    BEFORE = TAPS - 1

    def short_conv(row, thread, threads):
        given = read(ShortConvArguments, row)
        channels, sequences = given.channels, step_number(row, StepNumber.SEQUENCES.value)
        starts, slots = int64_at(given.query_start), int64_at(given.slots)
        stores, keeps = int64_at(given.stores), int64_at(given.keeps)
        history, inputs = stack_bytes(4 * _PIECE * TAPS), stack_bytes(8 * TAPS)
        seen = int64_at(inputs)
        vectors = (channels + 15) >> 4
        last = min(16 * (vectors * (thread + 1) // threads), channels)
        for begin in range(16 * (vectors * thread // threads), last, _PIECE):
            count = min(_PIECE, last - begin)
            for r in range(sequences):
                for place in range(BEFORE):
                    seen[place] = history + 4 * _PIECE * place
                    _copy(seen[place], _earlier(given, r, place, BEFORE, begin), count)
                kept = given.kept + slots[r] * given.kept_bytes + 4 * begin
                for t in range(starts[r], starts[r + 1]):
                    row_bytes = 4 * (t * given.stride + begin)
                    seen[BEFORE] = given.x + row_bytes
                    gate_in, gate_out = given.gate_in + row_bytes, given.gate_out + row_bytes
                    out = given.out + 4 * (t * given.out_stride + begin)
                    weight, bias = given.weight + 4 * begin, given.bias + 4 * begin
                    _convolve(TAPS, SILU, GATED, inputs, gate_in, gate_out, weight, 4 * channels, bias, out, count)
                    if keeps[t] >= 0:
                        _copy(kept + keeps[t] * given.kept_row_bytes, seen[BEFORE], count)
                    for place in range(BEFORE):
                        seen[place] = seen[place + 1]
                    if stores[t] >= 0:
                        slot = given.states + stores[t] * given.slot_bytes + 4 * begin
                        for place in range(BEFORE):
                            _copy(slot + 4 * place * channels, seen[place], count)

    return short_conv
