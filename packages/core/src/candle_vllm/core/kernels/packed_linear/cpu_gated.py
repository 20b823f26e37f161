# SPDX-License-Identifier: MIT
"""Fuse gate and up projections with gating and quantisation of the result (step 6 of a request's life).

The input of a feed-forward layer's down projection is computed without writing the gate and up products to memory. A
unit is 32 columns of both products, two tiles of each matrix; a thread computes consecutive units. For some panels of
rows it multiplies a few units' tiles of gate, then the same units' tiles of up; their sums stay in its caches. Every
element is the same as from the separate operations (`packed_linear.cpu`, `activation_quant.cpu`).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from candle_vllm.core.kernels.activation_quant import Prologue
from candle_vllm.core.kernels.activation_quant.cpu import emit_gated, emit_quantised
from candle_vllm.core.kernels.cpu_runtime.emit import F32, I32, Emitter, Int, emitted, vector
from candle_vllm.core.kernels.cpu_runtime.emit_squares import end_squares
from candle_vllm.core.kernels.cpu_runtime.level import Isa
from candle_vllm.core.kernels.cpu_runtime.primitives import read, step_number
from candle_vllm.core.kernels.cpu_runtime.tiles import CACHED_BYTES, stack_bytes
from candle_vllm.core.kernels.packed_linear.cpu import multiply, scratch_bytes
from candle_vllm.core.kernels.packed_linear.cpu_panel import blocks, cut_rows, fill_row, most_panels, record_bytes
from candle_vllm.core.kernels.packed_linear.cpu_sums import shape_sums, takes_squares
from candle_vllm.core.kernels.packed_linear.layout import GROUP, LAYOUTS, ROWS, GatedArguments, PackedKind

_UNITS = 4  # units at a time: the sums of gate and up take 8 to 32 KiB


@emitted
def _gate_rows(
    e: Emitter,
    prologue: Prologue,
    together: int,
    gate: Int,
    other: Int,
    tile_sums: Int,
    first: Int,
    last: Int,
    q: Int,
    row_bytes: Int,
    scales: Int,
    sums: Int,
    group_bytes: Int,
) -> None:
    """Gate and quantise `together` rows of a unit, 1 or 4, from `first` on; rows after `last` are copies of row `last`.

    `gate` and `other` point at the sums of two tiles each, `tile_sums` bytes apart. `q`, `scales` and `sums` point at
    row 0's results; rows of `q` are `row_bytes` apart, rows of `scales` and `sums` `group_bytes`.
    """
    b = e.b

    def gated(row: int, part: int) -> Any:
        at = b.add(b.mul(first, e.int64(4 * ROWS)), e.int64(4 * ROWS * row))
        at = b.add(at, b.mul(tile_sums, e.int64(part)))
        return emit_gated(e, prologue, *(e.load(b.add(base, at), vector(F32)) for base in (gate, other)))

    numbers, s, total = emit_quantised(e, [[gated(row, part) for part in range(2)] for row in range(together)])
    for row, halves in enumerate(numbers):
        place = b.add(first, e.int64(row))
        place = b.select(b.icmp_signed("<", place, last), place, last)
        for part, half in enumerate(halves):
            e.store(b.add(q, b.mul(place, row_bytes)), half, ROWS * part)
        for base, floats in ((scales, s), (sums, total)):
            number = b.extract_element(floats, ir.Constant(I32, row))
            e.store(b.add(base, b.mul(place, group_bytes)), number)


def make_gated(KIND: int, PROLOGUE: int, ISA: int) -> Any:
    layout, isa = LAYOUTS[PackedKind(KIND)], Isa(ISA)
    FULL, MOST, BLOCK, UNITS = blocks(isa, layout)[0], most_panels(isa, layout), CACHED_BYTES, _UNITS
    PANEL_GROUP, SCRATCH, SQUARES = record_bytes(layout, FULL), scratch_bytes(isa, layout), takes_squares(isa, layout)
    TILE, WIDTH = MOST * FULL * 4 * ROWS, GROUP  # bytes of a tile's sums
    SUMS = 2 * _UNITS * TILE

    def packed_gated(entry: Any, thread: int, threads: int) -> None:
        given = read(GatedArguments, entry)
        rows, groups, width = step_number(entry, given.rows_from), given.length, given.outputs
        tile_bytes, ahead, units = given.tile_bytes, given.ahead, width // WIDTH
        first, last = units * thread // threads, units * (thread + 1) // threads
        if rows <= 0 or first == last:
            return
        _, most = cut_rows(rows, groups, FULL, MOST, PANEL_GROUP)
        scratch = stack_bytes(SCRATCH + 2 * SUMS + most * groups * PANEL_GROUP)
        sums = scratch + SCRATCH
        panel = sums + 2 * SUMS
        if SQUARES and rows > FULL // 2:
            shape_sums(scratch)
        step = max(BLOCK // (4 * tile_bytes), 1)
        for begin in range(first, last, step):
            end = min(begin + step, last)
            row = 0
            while row < rows:
                block, panels = cut_rows(rows - row, groups, FULL, MOST, PANEL_GROUP)
                count = min(block * panels, rows - row)
                for index in range(block * panels):
                    source = row + min(index, count - 1)
                    at_xq = given.x + source * groups * 32
                    at_xs, at_xsum = given.scales + source * groups * 4, given.sums + source * groups * 4
                    at_panel = panel + index // block * groups * PANEL_GROUP
                    fill_row(KIND, ISA, block, at_panel, index % block, at_xq, at_xs, at_xsum, groups)
                for unit in range(begin, end, UNITS):
                    some = min(UNITS, end - unit)
                    for tile in range(4 * some):
                        number, to = 2 * unit + tile, sums + tile * TILE
                        weights = given.gate
                        if tile >= 2 * some:
                            number, to = number - 2 * some, sums + SUMS + (tile - 2 * some) * TILE
                            weights = given.other
                        at_tile = weights + number * tile_bytes
                        multiply(KIND, ISA, block, at_tile, panel, panels, to, groups, ahead, scratch)
                    for index in range(some):
                        gate, place = sums + 2 * index * TILE, unit + index
                        q = given.q + row * width + place * WIDTH
                        at = (row * units + place) * 4
                        scales, totals = given.q_scales + at, given.q_sums + at
                        other = gate + SUMS
                        if block == 1:
                            _gate_rows(PROLOGUE, 1, gate, other, TILE, 0, 0, q, width, scales, totals, 4 * units)
                        else:
                            for four in range(0, block * panels, 4):
                                _gate_rows(
                                    PROLOGUE, 4, gate, other, TILE, four, count - 1, q, width, scales, totals, 4 * units
                                )
                row += count
        if SQUARES and rows > FULL // 2:
            end_squares()

    return packed_gated
