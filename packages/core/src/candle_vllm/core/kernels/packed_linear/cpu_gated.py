# SPDX-License-Identifier: MIT
"""Two products of one input, gated and quantised where their sums are made: step 6 of a request's life.

What a feed-forward layer's last matrix reads is made without a float of gate or up in memory. A thread owns a run of
units, 32 columns of both. For each block of rows it multiplies a few units' tiles of the gate, then those of the other,
which are two streams of memory, and has their sums in its first-level cache. Every number is made as by the operations
that do it one behind the other (`packed_linear.cpu`, `activation_quant.cpu`).
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from candle_vllm.core.kernels.activation_quant import Prologue
from candle_vllm.core.kernels.activation_quant.cpu import emit_gated, emit_quantised
from candle_vllm.core.kernels.cpu_runtime.emit import F32, I32, Emitter, vector
from candle_vllm.core.kernels.cpu_runtime.primitives import read, step_number
from candle_vllm.core.kernels.cpu_runtime.tiles import stack_bytes
from candle_vllm.core.kernels.packed_linear.cpu import CACHED_BYTES, fill_row, multiply, record_bytes
from candle_vllm.core.kernels.packed_linear.layout import GROUP, LAYOUTS, ROWS, GatedArguments, PackedKind

_UNITS = 4  # whose sums are kept at a time
_TILE_SUMS = 8 * 4 * ROWS  # bytes of a tile's sums


@intrinsic(prefer_literal=True)
def _gate_rows(
    _: Any,
    prologue: Any,
    together: Any,
    gate: Any,
    other: Any,
    first: Any,
    last: Any,
    q: Any,
    row_bytes: Any,
    scales: Any,
    sums: Any,
    group_bytes: Any,
) -> Any:
    """Gates and quantises `together` rows of a unit, one or four, from row `first` on; those behind `last` are it.

    `gate` and `other` are the addresses of the sums of two tiles each; q, scales and sums those of row 0's results,
    `row_bytes` and `group_bytes` from one row to the next. `prologue` and `together` are constants.
    """
    before, count = Prologue(prologue.literal_value), together.literal_value

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        e = Emitter(b)
        _, _, gate, other, first, last, q, row_bytes, scales, sums, group_bytes = args

        def gated(row: int, part: int) -> Any:
            at = b.add(b.mul(first, e.int64(4 * ROWS)), e.int64(4 * ROWS * row + _TILE_SUMS * part))
            return emit_gated(e, before, *(e.load(b.add(base, at), vector(F32)) for base in (gate, other)))

        numbers, s, total = emit_quantised(e, [[gated(row, part) for part in range(2)] for row in range(count)])
        for row, halves in enumerate(numbers):
            place = b.add(first, e.int64(row))
            place = b.select(b.icmp_signed("<", place, last), place, last)
            for part, half in enumerate(halves):
                e.store(b.add(q, b.mul(place, row_bytes)), half, ROWS * part)
            for base, floats in ((scales, s), (sums, total)):
                number = b.extract_element(floats, ir.Constant(I32, row))
                e.store(b.add(base, b.mul(place, group_bytes)), number)
        return context.get_dummy_value()

    return types.void(prologue, together, *[types.int64] * 9), code


def make_gated(KIND: int, PROLOGUE: int, ISA: int) -> Any:
    """The operation of two matrices of a kind."""
    PANEL_GROUP, BLOCK, UNITS = record_bytes(LAYOUTS[PackedKind(KIND)], 8), CACHED_BYTES, _UNITS
    TILE, SUMS, WIDTH = _TILE_SUMS, 2 * _UNITS * _TILE_SUMS, GROUP

    def packed_gated(entry: Any, thread: int, threads: int) -> None:
        given = read(GatedArguments, entry)
        rows, groups, tile_bytes, ahead = (
            step_number(entry, given.rows_from),
            given.length,
            given.tile_bytes,
            given.ahead,
        )
        units = given.outputs // WIDTH
        first, last = units * thread // threads, units * (thread + 1) // threads
        if rows <= 0 or first == last:
            return
        panel = stack_bytes(groups * PANEL_GROUP + 2 * SUMS)
        sums = panel + groups * PANEL_GROUP
        step = max(BLOCK // (4 * tile_bytes), 1)
        for begin in range(first, last, step):
            end = min(begin + step, last)
            row = 0
            while row < rows:
                left = rows - row
                block = 8 if left > 4 else 4 if left > 1 else 1
                count = min(block, left)
                for index in range(block):
                    source = row + min(index, count - 1)
                    at_xq = given.x + source * groups * 32
                    at_xs, at_xsum = given.scales + source * groups * 4, given.sums + source * groups * 4
                    fill_row(KIND, ISA, block, panel, index, at_xq, at_xs, at_xsum, groups)
                for unit in range(begin, end, UNITS):
                    some = min(UNITS, end - unit)
                    for tile in range(4 * some):
                        number, to = 2 * unit + tile, sums + tile * TILE
                        weights = given.gate
                        if tile >= 2 * some:
                            number, to = number - 2 * some, sums + SUMS + (tile - 2 * some) * TILE
                            weights = given.other
                        multiply(KIND, ISA, block, weights + number * tile_bytes, panel, to, groups, ahead)
                    for index in range(some):
                        gate, place = sums + 2 * index * TILE, unit + index
                        q = given.q + row * given.outputs + place * WIDTH
                        at = (row * units + place) * 4
                        scales, totals = given.q_scales + at, given.q_sums + at
                        if block == 1:
                            _gate_rows(
                                PROLOGUE, 1, gate, gate + SUMS, 0, 0, q, given.outputs, scales, totals, 4 * units
                            )
                        else:
                            for four in range(0, block, 4):
                                _gate_rows(
                                    PROLOGUE,
                                    4,
                                    gate,
                                    gate + SUMS,
                                    four,
                                    count - 1,
                                    q,
                                    given.outputs,
                                    scales,
                                    totals,
                                    4 * units,
                                )
                row += count

    return packed_gated
