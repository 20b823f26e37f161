# SPDX-License-Identifier: MIT
"""Code that linear operations and `whole_attention` share: panels of activations, products, results.

Up to 8 input rows, a **block**, are interleaved in a **panel**: the first 32 bits of all rows, then the next 32 bits,
and so on, as steps of the weights read them. A **tile** is the weights of 16 outputs. A CPU without AVX-512 has fewer
or smaller registers, so it multiplies one tile at a time, by 4 rows of a panel or 6 of three panels (`cpu.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from numba import njit

from candle_vllm.core.kernels.activation_rows import SEGMENT
from candle_vllm.core.kernels.cpu_runtime.emit import F16, F32, I32, I64, Emitter, Int, emitted, vector
from candle_vllm.core.kernels.cpu_runtime.level import LANES, Isa
from candle_vllm.core.kernels.cpu_runtime.primitives import int64_at
from candle_vllm.core.kernels.cpu_runtime.tiles import ask_line, write_tile
from candle_vllm.core.kernels.plain_linear.layout import ROWS, RUN, PlainKind

VECTOR_BYTES = 4 * LANES

_AHEAD = 3072
"""Prefetch distance in bytes of weights, used only for 8 rows with AVX-512: a single row was not faster with it."""


# ---- the panel of activations ----------------------------------------------------------------------------------------


def _interleaved(e: Emitter, vectors: list[Any]) -> list[Any]:
    """Interleave vectors of 16 elements, one for each row: element 0 of all rows, element 1 of all rows, and so on."""
    if len(vectors) == 1:
        return vectors
    zipped: list[Any] = []
    for even, odd in zip(_interleaved(e, vectors[0::2]), _interleaved(e, vectors[1::2])):
        for start in (0, LANES // 2):
            zipped.append(e.pick([start + lane // 2 + lane % 2 * LANES for lane in range(LANES)], even, odd))
    return zipped


@emitted
def fill_panel(e: Emitter, block: Int, panel: Int, addresses: Int, vectors: Int) -> None:
    """Copy the rows at int64 [block] `addresses` into a panel of 8 or 4 rows of `vectors` times 16 elements."""
    e.choose(block, {rows: partial(_fill_panel, e, rows, panel, addresses, vectors) for rows in (8, 4)})


def _fill_panel(e: Emitter, rows: int, panel: Any, addresses: Any, vectors: Any) -> None:
    b = e.b
    sources = [e.load(addresses, I64, 8 * row) for row in range(rows)]
    with e.each(vectors) as index:
        offset = b.mul(index, e.int64(VECTOR_BYTES))
        loaded = [e.load(b.add(source, offset), vector(I32)) for source in sources]
        target = b.add(panel, b.mul(offset, e.int64(rows)))
        for part, mixed in enumerate(_interleaved(e, loaded)):
            e.store(target, mixed, part * VECTOR_BYTES)


@njit
def find_rows(given: Any, row: int, count: int, rows: int, addresses: int, offset: int) -> None:
    """Write the addresses of `count` input rows from `row` on, plus `offset`, to int64 [rows]; repeat the last one."""
    for index in range(rows):
        source = row + min(index, count - 1)
        source = int64_at(given.picked)[source] if given.picked != 0 else source
        int64_at(addresses)[index] = given.x + source * given.x_bytes + offset


@njit
def fill_panels(given: Any, row: int, count: int, addresses: int, panels: int) -> None:
    """Copy `count` input rows from `row` on into panels of 8; the last row is repeated until a panel is full.

    addresses: address of scratch memory for int64 [8].
    """
    for first in range(0, count, 8):
        find_rows(given, row + first, count - first, 8, addresses, 0)
        fill_panel(8, panels + given.x_bytes * first, addresses, given.x_bytes >> 6)


# ---- tiles times a panel ---------------------------------------------------------------------------------------------

SHAPES = ((8, 2), (8, 1), (4, 1), (1, 1))
"""Numbers of rows and of adjacent tiles that operations multiply at once."""


def choose_shape(
    e: Emitter, rows: Any, tiles: Any, emit: Callable[[int, int], None], shapes: Sequence[tuple[int, int]] = SHAPES
) -> None:
    """Emit the code for each of the shapes; the code for `rows` and `tiles` runs."""
    e.choose(e.b.add(e.b.shl(rows, e.int64(1)), tiles), {2 * n + m: partial(emit, n, m) for n, m in shapes})


def _weights(e: Emitter, kind: PlainKind, address: Any, offset: int) -> Any:
    """Load a step's weights of 16 output rows."""
    if kind is PlainKind.F16:
        return e.half_to_float(e.load(address, vector(F16), offset))
    return e.load(address, vector(F32 if kind is PlainKind.F32 else I32), offset)


def sum_type(kind: PlainKind) -> Any:
    """Return the type of sums: float32, or int32 for the segments of W8A8, see `add_segment`."""
    return I32 if kind is PlainKind.W8A8 else F32


def _add_step(e: Emitter, kind: PlainKind, isa: Isa, total: Any, weights: Any, x: Any) -> Any:
    """Add a step's products to 16 sums; x has the same activation element in every lane."""
    if kind is PlainKind.W8A8:
        return e.dot_u8_i8(total, weights, x, isa)
    return e.dot_bf16(total, x, weights, isa) if kind is PlainKind.BF16 else e.fma(x, weights, total)


def emit_sums(
    e: Emitter,
    kind: PlainKind,
    isa: Isa,
    tiles: Sequence[Any],
    height: int,
    panel: Any,
    runs: Any,
    write: Callable[[int, int, Any], None],
    begin: Callable[[int, int], Any] | None = None,
    panel_bytes: Any = None,
) -> None:
    """Multiply tiles by a panel of `height` rows; each sum always adds its products in the order of the steps.

    Args:
        tiles: addresses of the tiles' weights.
        height: rows of the panel; more than 8 are several panels of 8 (a multiple of 24 without AVX-512).
        panel: address of the panel, or of the first one.
        runs: number of runs of `RUN` steps, at least 1.
        write: write(tile, row, sums) stores 16 sums of a row.
        begin: begin(tile, row) loads the sums of earlier steps; None begins at 0.
        panel_bytes: bytes from one panel to the next.
    """
    wide = isa.wide
    panels = [panel, *(e.b.add(panel, e.b.mul(panel_bytes, e.int64(n))) for n in range(1, height // 8))]
    together = (range(len(tiles)),) if wide else [(tile,) for tile in range(len(tiles))]
    rows = height if wide else 6 if height > 8 else min(height, 4)
    for picked in together:
        for first in range(0, height, rows):
            places = [(tile, first + row) for tile in picked for row in range(rows)]
            sums = [begin(*place) if begin else e.zeros(sum_type(kind)) for place in places]
            block, bases = (min(height, 8), first), [tiles[tile] for tile in picked]
            sums = _block_sums(e, kind, isa, bases, block, sums, panels, runs)
            for place, total in zip(places, sums):
                write(*place, total)


def _block_sums(
    e: Emitter,
    kind: PlainKind,
    isa: Isa,
    tiles: list[Any],
    block: tuple[int, int],
    sums: list[Any],
    panels: list[Any],
    runs: Any,
) -> list[Any]:
    """Do what `emit_sums` does, for so few rows that their sums [tile, row] fit in registers.

    block: rows of a panel, and the number of the first row.
    """
    (height, first), rows = block, len(sums) // len(tiles)
    b, element = e.b, I32 if kind in (PlainKind.BF16, PlainKind.W8A8) else F32

    def body(index: Any, totals: list[Any]) -> list[Any]:
        offset = b.mul(index, e.int64(RUN * kind.step_bytes))
        places = [b.add(tile, offset) for tile in tiles]
        inside = b.mul(index, e.int64(RUN * height * 4))
        x = {n: b.add(panels[n], inside) for n in {(first + row) // 8 for row in range(rows)}}
        totals = list(totals)
        for step in range(RUN):
            if rows == 8:
                for place in places:
                    e.prefetch(place, step * kind.step_bytes + _AHEAD)
            loaded = [_weights(e, kind, place, step * kind.step_bytes) for place in places]
            for row in range(rows):
                splat = e.splat(e.load(x[(first + row) // 8], element, 4 * (step * height + (first + row) % 8)))
                for tile, vectors in enumerate(loaded):
                    at = tile * rows + row
                    totals[at] = _add_step(e, kind, isa, totals[at], vectors, splat)
        return totals

    return e.loop(runs, sums, body)


@emitted
def add_segment(e: Emitter, block: Int, tiles: Int, sums: Int, tails: Int, segment: Int, totals: Int) -> None:
    """Add a segment of W8A8 to the floats at `totals`: its sums times the activation rows' scales.

    sums: address of int32 [tiles, block, 16]; each row's correction for the weights' offset of 128 is added first.
    tails: address of int64 [block], the addresses of each row's scales and corrections of segments, see `RowForm`.
    """
    b = e.b

    def add(block: int, tiles: int) -> None:
        for row in range(block):
            tail = b.add(e.load(tails, I64, 8 * row), b.mul(segment, e.int64(8)))
            scale, start = e.splat(e.load(tail, F32)), e.splat(e.load(tail, I32, 4))
            for place in range(row * VECTOR_BYTES, tiles * block * VECTOR_BYTES, block * VECTOR_BYTES):
                part = b.sitofp(b.add(e.load(sums, vector(I32), place), start), vector(F32))
                e.store(totals, e.fma(part, scale, e.load(totals, vector(F32), place)), place)

    choose_shape(e, block, tiles, add, [(16, 2), (16, 1), *SHAPES])


@emitted
def _times_16(e: Emitter, target: Int, factors: Int) -> None:
    """Multiply 16 floats at `target` by those at `factors`."""
    e.store(target, e.b.fmul(e.load(target, vector(F32)), e.load(factors, vector(F32))))


@njit
def scale_sums(given: Any, sums: int, block: int, rows: int, tile: int, count: int) -> None:
    """Multiply the first `rows` rows of W8A8's sums, float32 [count, block, 16], by the scales of the weights."""
    for at in range(count):
        for row in range(rows):
            _times_16(sums + (at * block + row) * 64, given.weights + (tile + at + 1) * given.tile_bytes - 64)


@njit
def find_tails(given: Any, row: int, count: int, rows: int, tails: int) -> None:
    """Write addresses of the segments' scales and corrections of `count` rows to int64 [rows]; repeat the last row."""
    size = (given.length * RUN * 4 + 8 * SEGMENT - 1) // (8 * SEGMENT) * 64
    find_rows(given, row, count, rows, tails, given.x_bytes - size)


@njit
def ask_tiles(given: Any, row: int, rows: int, tile: int, count: int) -> None:
    """Prefetch the cache lines that `write_tiles` will write: with many output columns, stores would wait for them."""
    for at in range(row, row + rows):
        for index in range(tile, tile + count):
            ask_line(given.out + at * given.row_bytes + index * 64)


@njit
def write_tiles(given: Any, sums: int, block: int, row: int, rows: int, tile: int, count: int) -> None:
    """Write the first `rows` rows of sums, float32 [count, block, 16], of tiles from `tile` on; the first is row `row`.

    given: the operation's `LinearArguments`.
    """
    for index in range(tile, tile + count):
        lanes = min(given.outputs - index * 16, 16)
        at_bias = given.bias + index * 64 if given.bias else 0
        target = given.out + row * given.row_bytes + index * 64
        at_sums = sums + (index - tile) * block * 4 * ROWS
        write_tile(at_sums, rows, lanes, target, given.row_bytes, at_bias, given.accumulate)
