# SPDX-License-Identifier: MIT
"""Code that the linear operations of all weight formats share: stack memory, writing result tiles, prefetching."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit

from candle_vllm.core.kernels.cpu_runtime.emit import F32, I8, I64, Emitter, Int, emitted, vector
from candle_vllm.core.kernels.cpu_runtime.level import LANES
from candle_vllm.core.kernels.cpu_runtime.operation import ROWS, RUNS_BYTES
from candle_vllm.core.kernels.cpu_runtime.primitives import float32_at, int64_at

CACHED_BYTES = 384 << 10
"""Bytes of weights, or of panels of activations, that a thread reads again; they stay in its second-level cache."""


@emitted
def stack_bytes(e: Emitter, count: Int) -> Int:
    """Return the address of `count` bytes of the operation's stack, a multiple of 64; must not be called in a loop."""
    b = e.b
    memory = b.alloca(I8, size=count)
    memory.align = 64
    return b.ptrtoint(memory, ir.IntType(64))


@emitted
def add_rows(
    e: Emitter, target: Int, addresses: Int, weights: Int, terms: Int, first: Int, count: Int, onto: Int
) -> None:
    """Write weighted sums of `terms` > 0 rows to `count` vectors of `target` from `first` on; add them if `onto` is 1.
    `addresses` has the rows' addresses, int64 [terms], `weights` is float32 [terms]."""
    b = e.b
    with e.each_or_skip(count) as index:
        offset = b.mul(b.add(first, index), e.int64(4 * LANES))

        def term(j: Any, sums: list[Any]) -> list[Any]:
            source = e.load(b.add(addresses, b.mul(j, e.int64(8))), I64)
            weight = e.splat(e.load(b.add(weights, b.mul(j, e.int64(4))), F32))
            return [e.fma(weight, e.load(b.add(source, offset), vector(F32)), sums[0])]

        (result,) = e.loop(terms, [e.zeros(F32)], term)
        at = b.add(target, offset)
        old = b.select(b.icmp_signed("!=", onto, e.int64(0)), e.load(at, vector(F32)), e.zeros(F32))
        e.store(at, b.fadd(old, result))


@emitted
def _add_16(e: Emitter, target: Int, source: Int) -> None:
    e.store(target, e.b.fadd(e.load(target, vector(F32)), e.load(source, vector(F32))))


@emitted
def _copy_16(e: Emitter, target: Int, source: Int) -> None:
    e.store(target, e.load(source, vector(F32)))


@njit
def write_tile(sums: int, rows: int, lanes: int, out: int, row_bytes: int, bias: int, accumulate: int) -> None:
    """Write the first `lanes` sums of each row of float32 [rows, 16] to `out`, plus those at `bias` if it is not 0, and
    with `accumulate` plus the old values. `sums` may change."""
    for row in range(rows):
        source, target = sums + row * 4 * ROWS, out + row * row_bytes
        if lanes == ROWS:
            if bias:
                _add_16(source, bias)
            if accumulate:
                _add_16(source, target)
            _copy_16(target, source)
            continue
        values, old, added = float32_at(source), float32_at(target), float32_at(bias)
        for lane in range(lanes):
            value = values[lane]
            if bias:
                value += added[lane]
            if accumulate:
                value += old[lane]
            old[lane] = value


# ---- memory to prefetch during a product -----------------------------------------------------------------------------
# `runs` is the address of a list of memory ranges to prefetch: position in the current range, the range's end, index of
# the next range, number of ranges, number of cache lines; then start and end of each range.

_AT, _END, _NEXT, _COUNT, _LINES, _HEAD = range(6)
_MOST_RUNS = (RUNS_BYTES // 8 - _HEAD) // 2


@emitted
def ask_line(e: Emitter, address: Int) -> None:
    """Prefetch a cache line that is not read at once."""
    e.prefetch(address, near=2)


@njit
def no_runs(runs: int) -> None:
    """Create an empty list at an address."""
    for place in range(_HEAD):
        int64_at(runs)[place] = 0


@njit
def add_run(runs: int, begin: int, end: int) -> None:
    """Append the memory between two addresses; a full list ignores it."""
    number = int64_at(runs)[_COUNT]
    if number < _MOST_RUNS and begin < end:
        int64_at(runs)[_HEAD + 2 * number] = begin
        int64_at(runs)[_HEAD + 2 * number + 1] = end
        int64_at(runs)[_COUNT] = number + 1
        int64_at(runs)[_LINES] += (end - begin + 63) >> 6


@njit
def lines_each(runs: int, turns: int) -> int:
    """Return the number of cache lines of a list to prefetch in each of `turns` iterations."""
    return (int64_at(runs)[_LINES] + turns - 1) // turns if runs != 0 else 0


@njit
def ask_lines(runs: int, lines: int) -> None:
    """Prefetch the next `lines` lines of a list."""
    at, end = int64_at(runs)[_AT], int64_at(runs)[_END]
    while lines > 0:
        if at >= end:
            number = int64_at(runs)[_NEXT]
            if number >= int64_at(runs)[_COUNT]:  # the list may end early, because another thread may share it
                break
            at, end = int64_at(runs)[_HEAD + 2 * number], int64_at(runs)[_HEAD + 2 * number + 1]
            int64_at(runs)[_NEXT] = number + 1
        some = min(lines, (end - at + 63) >> 6)
        for _ in range(some):
            ask_line(at)
            at += 64
        lines -= some
    int64_at(runs)[_AT], int64_at(runs)[_END] = at, end
