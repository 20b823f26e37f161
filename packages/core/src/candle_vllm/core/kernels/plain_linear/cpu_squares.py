# SPDX-License-Identifier: MIT
"""Linear layer with BF16 and W8A8 weights on AMX as a compiled CPU operation (step 6 of a request's life).

Terms (tile, step): see `layout.py`. A **square** fills one AMX tile register, 16 rows of 64 bytes: 16 steps of a tile
of weights, or 64 bytes of each of 16 rows of activations. A thread copies **blocks** of 16 rows to panels of squares; a
single row is read where it is. Two tiles are multiplied by two blocks at once: four registers have sums, and each
square that is loaded is used twice. Panels stay in the second-level cache, and one **part** of K of two tiles in the
first-level cache; between parts the sums are in memory.

AMX adds bfloat16 products of even columns of a square, then products of odd columns, then both to the sum. Other
instructions add in another order, so a CPU with AMX computes every row of a BF16 layer with AMX. Integer sums of W8A8
are exact, so its steps of at most 8 rows use `cpu.py`.
"""

from __future__ import annotations

from typing import Any

from numba import njit

from candle_vllm.core.kernels.activation_rows import SEGMENT
from candle_vllm.core.kernels.cpu_runtime.emit import I64, Emitter, Int, emitted, vector
from candle_vllm.core.kernels.cpu_runtime.emit_squares import (
    end_squares,
    load_square,
    shape_squares,
    square_call,
    store_square,
)
from candle_vllm.core.kernels.cpu_runtime.operation import LinearArguments
from candle_vllm.core.kernels.cpu_runtime.primitives import float32_at, int64_at, read, step_number
from candle_vllm.core.kernels.cpu_runtime.tiles import stack_bytes
from candle_vllm.core.kernels.plain_linear.cpu_panel import (
    VECTOR_BYTES,
    add_segment,
    ask_tiles,
    choose_shape,
    find_rows,
    find_tails,
    scale_sums,
    write_tiles,
)
from candle_vllm.core.kernels.plain_linear.layout import ROWS, RUN, PlainKind

SQUARE_BYTES = ROWS * VECTOR_BYTES

CACHED_PANELS = 1 << 20
"""Bytes of the panels that a thread reads again for each pair of tiles from its second-level cache."""

_PART = 12
"""Squares of a tile in a part of K: 24 KiB of two tiles."""

_SUMS, _INPUTS, _WEIGHTS = 0, 4, 6
"""First registers for sums, activations and weights."""


@emitted
def begin_squares(e: Emitter, memory: Int) -> None:
    """Configure the tile registers; `memory` is 64 bytes for the configuration."""
    shape_squares(e, memory, [(ROWS, VECTOR_BYTES)] * 8)


@emitted
def _fill_panel(e: Emitter, panel: Int, addresses: Int, squares: Int) -> None:
    """Copy the rows at int64 [16] `addresses` into `squares` squares."""
    b = e.b
    sources = [e.load(addresses, I64, 8 * row) for row in range(ROWS)]
    with e.each(squares) as index:
        offset = b.mul(index, e.int64(VECTOR_BYTES))
        target = b.add(panel, b.mul(index, e.int64(SQUARE_BYTES)))
        for row, source in enumerate(sources):
            e.store(target, e.load(b.add(source, offset), vector(I64, 8)), row * VECTOR_BYTES)


@emitted
def multiply_squares(
    e: Emitter,
    kind: PlainKind,
    anew: int,
    blocks: Int,
    tiles: Int,
    weights: Int,
    tile_bytes: Int,
    inputs: Int,
    block_bytes: Int,
    square_bytes: Int,
    stride: Int,
    sums: Int,
    squares: Int,
) -> None:
    """Multiply one or two adjacent tiles by one or two blocks of rows; add the products to the sums unless `anew`.

    Sums are float32 [blocks, tiles, 16, 16], of W8A8 int32. Blocks are `block_bytes` apart, their squares
    `square_bytes`, and the rows of a square `stride`.
    """
    b = e.b
    product = "tdpbsud" if kind is PlainKind.W8A8 else "tdpbf16ps"

    def multiply(blocks: int, tiles: int) -> None:
        def body(index: Any, state: list[Any]) -> list[Any]:
            x, w = b.add(inputs, b.mul(index, square_bytes)), b.add(weights, b.mul(index, e.int64(SQUARE_BYTES)))
            for block in range(blocks):
                load_square(e, _INPUTS + block, b.add(x, b.mul(block_bytes, e.int64(block))), stride)
            for tile in range(tiles):
                load_square(e, _WEIGHTS + tile, b.add(w, b.mul(tile_bytes, e.int64(tile))), e.int64(VECTOR_BYTES))
                for block in range(blocks):
                    square_call(e, product, _SUMS + block * tiles + tile, _INPUTS + block, _WEIGHTS + tile)
            return state

        for at in range(blocks * tiles):
            if anew:
                square_call(e, "tilezero", _SUMS + at)
            else:
                load_square(e, _SUMS + at, b.add(sums, e.int64(at * SQUARE_BYTES)), e.int64(VECTOR_BYTES))
        e.loop(squares, [], body)
        for at in range(blocks * tiles):
            store_square(e, _SUMS + at, b.add(sums, e.int64(at * SQUARE_BYTES)), VECTOR_BYTES)

    choose_shape(e, blocks, tiles, multiply, [(2, 2), (2, 1), (1, 2), (1, 1)])


@njit
def fill_panels(given: Any, row: int, count: int, addresses: int, panels: int, squares: int) -> None:
    """Copy `count` input rows from `row` on into panels of 16; the last row is repeated until a panel is full."""
    for block in range((count + 15) >> 4):
        find_rows(given, row + 16 * block, count - 16 * block, 16, addresses, 0)
        _fill_panel(panels + block * squares * SQUARE_BYTES, addresses, squares)


def make_linear(KIND: int) -> Any:
    CACHED, SQUARE, WIDE, INTEGERS = CACHED_PANELS, SQUARE_BYTES, ROWS // RUN, int(KIND == PlainKind.W8A8)
    PART, EACH = _PART, SEGMENT // 64 if INTEGERS else _PART  # squares of a segment

    def plain_linear(entry: Any, thread: int, threads: int) -> None:
        given = read(LinearArguments, entry)
        rows = step_number(entry, given.rows_from)
        tile_bytes, squares = given.tile_bytes, given.length // WIDE
        tiles = (given.outputs + 15) >> 4
        first, last = tiles * thread // threads, tiles * (thread + 1) // threads
        if rows <= 0 or first == last:
            return
        panel_bytes, most = squares * SQUARE, 1
        if rows > 16:
            most = max(min(CACHED // panel_bytes, 16) & -2, 1)
        panels = stack_bytes(most * (panel_bytes + 2 * SQUARE + 128) + 4 * SQUARE + 128)
        sums = panels + most * panel_bytes
        scratch = sums + most * 2 * SQUARE
        tails, addresses = scratch + 4 * SQUARE, scratch + 4 * SQUARE + most * 128
        begin_squares(addresses)
        values = float32_at(sums)
        row = 0
        while row < rows:
            count = min(16 * most, rows - row)
            blocks = (count + 15) >> 4
            x, step, stride = panels, SQUARE, 64
            if INTEGERS == 1:
                find_tails(given, row, count, 16 * blocks, tails)
            if count > 1:
                fill_panels(given, row, count, addresses, panels, squares)
            else:
                source = int64_at(given.picked)[row] if given.picked != 0 else row
                x, step, stride = given.x + source * given.x_bytes, 64, 0
            tile = first
            while tile < last:
                at = given.weights + tile * tile_bytes
                width = 2 if last - tile >= 2 else 1
                for index in range(256 * width * blocks):
                    values[index] = 0.0
                ask_tiles(given, row, count, tile, width)
                for begin in range(0, squares, PART):
                    part, some = at + begin * SQUARE, min(PART, squares - begin)
                    for block in range(0, blocks, 2):
                        inputs, to = x + block * panel_bytes + begin * step, sums + block * width * SQUARE
                        few = min(blocks - block, 2)
                        if INTEGERS == 1:
                            for first_square in range(0, some, EACH):
                                own, own_x = part + first_square * SQUARE, inputs + first_square * step
                                length, segment = min(EACH, some - first_square), (begin + first_square) // EACH
                                multiply_squares(
                                    KIND, 1, few, width, own, tile_bytes, own_x, panel_bytes, step, stride, scratch,
                                    length,
                                )  # fmt: skip
                                for index in range(few):
                                    at_sums, at_tails = index * width * SQUARE, tails + 128 * (block + index)
                                    add_segment(16, width, scratch + at_sums, at_tails, segment, to + at_sums)
                        else:
                            multiply_squares(
                                KIND, 0, few, width, part, tile_bytes, inputs, panel_bytes, step, stride, to, some
                            )
                for block in range(blocks):
                    some, to = min(16, count - 16 * block), sums + block * width * SQUARE
                    if INTEGERS == 1:
                        scale_sums(given, to, 16, some, tile, width)
                    write_tiles(given, to, 16, row + 16 * block, some, tile, width)
                tile += width
            row += count
        end_squares()

    return plain_linear
