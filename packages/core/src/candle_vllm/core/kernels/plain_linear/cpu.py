# SPDX-License-Identifier: MIT
"""Linear layer and embedding with BF16, F16, F32 or W8A8 weights as compiled CPU operations (step 6).

Terms (tile, step): see `layout.py`. A thread has consecutive tiles, and multiplies them by rows of activations (tokens)
in **blocks** of 8, 4 or 1. A block's rows are first copied to a **panel** (`cpu_panel.py`); a block that is not full
repeats its last row, and the repetitions' results are not written. A single row is not copied.

More than 8 rows are divided into **groups** of blocks, whose panels stay in the second-level cache. Each pair of tiles
is multiplied by all panels of a group, one **part** of K at a time, which stays in the first-level cache; between parts
the sums are in memory.

With AVX-512, 8 rows are multiplied by two tiles at once: a step of 16 vectors of sums needs 2 loads of weights and 8 of
activations, so that multiplication is the limit. Fewer rows are limited by memory, and use one tile after the other,
because reading two tiles alternately is slower.

With AVX2 alone, three panels of a group are multiplied by one tile of F16 or F32, 6 of their 24 rows at a time. 6 rows
have 12 vectors of sums; with 8 (4 rows), multiplications wait for each other. BF16's unpacking needs the registers.

Every variant adds a sum's products in the order of K.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit

from candle_vllm.core.kernels.activation_rows import SEGMENT
from candle_vllm.core.kernels.cpu_runtime.emit import F16, F32, I8, I16, I32, Emitter, Int, emitted, vector
from candle_vllm.core.kernels.cpu_runtime.level import Isa
from candle_vllm.core.kernels.cpu_runtime.operation import EmbeddingArguments, LinearArguments
from candle_vllm.core.kernels.cpu_runtime.primitives import float32_at, int64_at, read, step_number
from candle_vllm.core.kernels.cpu_runtime.tiles import CACHED_BYTES, stack_bytes
from candle_vllm.core.kernels.plain_linear import cpu_squares
from candle_vllm.core.kernels.plain_linear.cpu_panel import (
    SHAPES,
    add_segment,
    ask_tiles,
    choose_shape,
    emit_sums,
    fill_panel,
    fill_panels,
    find_rows,
    find_tails,
    scale_sums,
    sum_type,
    write_tiles,
)
from candle_vllm.core.kernels.plain_linear.layout import ROWS, RUN, PlainKind

_PART = 48
"""Runs of `RUN` steps in a part of K: 24 KiB of two tiles, 12 KiB of F16. Half as many if two tiles are multiplied
without AVX-512: a panel then reads each tile twice, and both must stay in the first-level cache."""


def _is_tall(kind: int, isa: Isa) -> bool:
    """Whether three panels of 8 rows are multiplied by one tile at once."""
    return bool(isa & Isa.AVX2) and not isa.wide and kind != PlainKind.BF16


@emitted
def _multiply(
    e: Emitter,
    kind: PlainKind,
    isa: Isa,
    more: int,
    block: Int,
    tiles: Int,
    weights: Int,
    tile_bytes: Int,
    panel: Int,
    out: Int,
    runs: Int,
    panel_bytes: Int,
) -> None:
    """Multiply adjacent tiles by a panel of `block` rows: float32 [tiles, block, 16] at `out`, added to it if `more`.

    Sums of W8A8 are int32. A block of 24 rows is three panels of 8, `panel_bytes` apart, with sums 1024 bytes apart.
    """
    b = e.b

    def multiply(block: int, tiles: int) -> None:
        def place(tile: int, row: int) -> int:
            return row // 8 * 1024 + (tile * min(block, 8) + row % 8) * 4 * ROWS

        def begin(tile: int, row: int) -> Any:
            return e.load(out, vector(sum_type(kind)), place(tile, row))

        def write(tile: int, row: int, total: Any) -> None:
            e.store(out, total, place(tile, row))

        bases = [b.add(weights, b.mul(tile_bytes, e.int64(tile))) for tile in range(tiles)]
        emit_sums(e, kind, isa, bases, block, panel, runs, write, begin if more else None, panel_bytes)

    several = [(24, 1), (8, 1)] if _is_tall(kind, isa) else [(8, 2), (8, 1)]
    choose_shape(e, block, tiles, multiply, several if more else SHAPES)


# ---- the operations --------------------------------------------------------------------------------------------------


def make_linear(KIND: int, ISA: int) -> Any:
    PANEL_BYTES = CACHED_BYTES  # maximum bytes of a group's panels; a group has at least one panel
    isa = Isa(ISA)
    if isa & Isa.AMX and KIND == PlainKind.BF16:
        return cpu_squares.make_linear(KIND)
    INTEGERS, RUN_BYTES = int(KIND == PlainKind.W8A8), RUN * PlainKind(KIND).step_bytes
    SEGMENT_RUNS = SEGMENT // (RUN * PlainKind.W8A8.step_columns)
    TALL = _is_tall(KIND, isa)
    PART, PANELS = _PART if isa.wide or TALL else _PART // 2, 9 if TALL else 8  # maximum panels of a group

    def plain_linear(entry: Any, thread: int, threads: int) -> None:
        given = read(LinearArguments, entry)
        rows = step_number(entry, given.rows_from)
        weights, tile_bytes, x_bytes, runs = given.weights, given.tile_bytes, given.x_bytes, given.length
        tiles = (given.outputs + 15) >> 4
        first, last = tiles * thread // threads, tiles * (thread + 1) // threads
        if rows <= 0 or first == last:
            return
        panel_bytes, most = 8 * x_bytes, 1
        if rows > 8:
            most = min(max(PANEL_BYTES // panel_bytes, 1), PANELS)
            if TALL and most > 3:
                most -= most % 3
        panels = stack_bytes(most * (panel_bytes + 1024 + 64) + 1024 + 64)
        sums = panels + most * panel_bytes
        scratch = sums + most * 1024
        tails, addresses = scratch + 1024, scratch + 1024 + most * 64
        at_address, values = int64_at(addresses), float32_at(sums)
        row = 0
        while rows - row > 8:
            count = min(8 * most, rows - row)
            if count & 7 <= 4:  # the last rows are a smaller block, which is computed at the end
                count &= -8
            blocks = (count + 7) >> 3
            fill_panels(given, row, count, addresses, panels)
            if INTEGERS == 1:
                find_tails(given, row, count, 8 * blocks, tails)
            tile = first
            while tile < last:
                at = weights + tile * tile_bytes
                width = 2 if last - tile >= 2 and not TALL else 1
                for index in range(256 * blocks):
                    values[index] = 0.0
                ask_tiles(given, row, count, tile, width)
                for begin in range(0, runs, PART):
                    some, part = min(PART, runs - begin), at + begin * RUN_BYTES
                    block = 0
                    while block < blocks:
                        panel, to = panels + block * panel_bytes + begin * 32 * RUN, sums + 1024 * block
                        height = 8
                        if INTEGERS == 1:
                            for first_run in range(0, some, SEGMENT_RUNS):
                                own, x = part + first_run * RUN_BYTES, panel + first_run * 32 * RUN
                                few, segment = min(SEGMENT_RUNS, some - first_run), (begin + first_run) // SEGMENT_RUNS
                                _multiply(KIND, ISA, 0, 8, width, own, tile_bytes, x, scratch, few, 0)
                                add_segment(8, width, scratch, tails + 64 * block, segment, to)
                        else:
                            height = 24 if TALL and blocks - block >= 3 else 8
                            _multiply(KIND, ISA, 1, height, width, part, tile_bytes, panel, to, some, panel_bytes)
                        block += height >> 3
                for block in range(blocks):
                    some = min(8, count - 8 * block)
                    if INTEGERS == 1:
                        scale_sums(given, sums + 1024 * block, 8, some, tile, width)
                    write_tiles(given, sums + 1024 * block, 8, row + 8 * block, some, tile, width)
                tile += width
            row += count
        count = rows - row
        if count <= 0:
            return
        block = 8 if count > 4 else 4 if count > 1 else 1
        find_rows(given, row, count, block, addresses, 0)
        fill_panel(block, panels, addresses, x_bytes >> 6)
        x = at_address[0] if block == 1 else panels
        if INTEGERS == 1:
            find_tails(given, row, count, block, tails)
        tile = first
        while tile < last:
            at = weights + tile * tile_bytes
            width = 2 if block == 8 and last - tile >= 2 else 1
            if INTEGERS == 1:
                for index in range(16 * width * block):
                    values[index] = 0.0
                for begin in range(0, runs, SEGMENT_RUNS):
                    own, part = at + begin * RUN_BYTES, x + begin * 4 * RUN * block
                    some, segment = min(SEGMENT_RUNS, runs - begin), begin // SEGMENT_RUNS
                    _multiply(KIND, ISA, 0, block, width, own, tile_bytes, part, scratch, some, 0)
                    add_segment(block, width, scratch, tails, segment, sums)
                scale_sums(given, sums, block, count, tile, width)
            else:
                _multiply(KIND, ISA, 0, block, width, at, tile_bytes, x, sums, runs, 0)
            write_tiles(given, sums, block, row, count, tile, width)
            tile += width

    if not isa & Isa.AMX or KIND != PlainKind.W8A8:
        return plain_linear
    few, many = njit(plain_linear), njit(cpu_squares.make_linear(KIND))

    def w8a8_linear(entry: Any, thread: int, threads: int) -> None:
        if step_number(entry, read(LinearArguments, entry).rows_from) <= 8:  # the sums are exact in both
            few(entry, thread, threads)
        else:
            many(entry, thread, threads)

    return w8a8_linear


@emitted
def _widen_row(e: Emitter, kind: PlainKind, weights: Int, lane: Int, out: Int, columns: Int, tile_bytes: Int) -> None:
    """Convert row `lane` of a tile to floats."""
    b = e.b
    width = kind.itemsize
    stored = {PlainKind.BF16: I16, PlainKind.F16: F16, PlainKind.F32: F32, PlainKind.W8A8: I8}[kind]
    start = b.add(weights, b.mul(lane, e.int64(width * kind.step_columns)))
    scale = e.load(b.add(b.add(weights, tile_bytes), b.mul(lane, e.int64(4))), F32, -4 * ROWS)
    with e.each(columns) as index:
        step = b.sdiv(index, e.int64(kind.step_columns))
        inside = b.srem(index, e.int64(kind.step_columns))
        offset = b.add(b.mul(step, e.int64(kind.step_bytes)), b.mul(inside, e.int64(width)))
        value = e.load(b.add(start, offset), stored)
        if kind is PlainKind.BF16:
            value = b.bitcast(b.shl(b.zext(value, I32), ir.Constant(I32, 16)), F32)
        elif kind is PlainKind.F16:
            value = b.fpext(value, F32)
        elif kind is PlainKind.W8A8:
            value = b.fmul(b.sitofp(b.sub(b.zext(value, I32), ir.Constant(I32, 128)), F32), scale)
        e.store(b.add(out, b.mul(index, e.int64(4))), value)


def make_embedding(KIND: int) -> Any:
    def plain_embedding(entry: Any, thread: int, threads: int) -> None:
        given = read(EmbeddingArguments, entry)
        rows, ids = step_number(entry, given.rows_from), int64_at(given.token_ids)
        for row in range(rows * thread // threads, rows * (thread + 1) // threads):
            token = ids[row]
            target = given.out + row * given.row_bytes
            if 0 <= token < given.rows:
                tile = given.weights + (token >> 4) * given.tile_bytes
                _widen_row(KIND, tile, token & 15, target, given.columns, given.tile_bytes)
            else:
                values = float32_at(target)
                for index in range(given.columns):
                    values[index] = float("nan")

    return plain_embedding
