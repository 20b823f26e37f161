# SPDX-License-Identifier: MIT
"""Linear layer with weights of 8- and 4-bit floats as a compiled CPU operation (step 6 of a request's life).

Terms (tile, span, turn, pair): see `layout.py`; panels and the division among threads are those of
`plain_linear/cpu.py`. For up to 8 rows, weights are converted to floats in registers. For 1 row, or 4 rows in bfloat16,
both spans of a pair are multiplied at once: a sum is a sequence of dependent instructions, and the sums of one span are
too few to keep up with memory. For more rows, as many tiles as fit the second-level cache are converted to bfloat16
once, and multiplied by the rows in blocks. All variants add a span's products in the same order.

With AMX, a span of two adjacent tiles is converted in the first-level cache, for up to 16 blocks of 16 rows. A single
row is multiplied in vector registers, in AMX's order. Spans that are not whole squares of 32 columns do not use
AMX, for any number of rows. Weights are prefetched, because some CPUs load them too late (`level.bytes_ahead`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from numba import njit

from candle_vllm.core.kernels.cpu_runtime.emit import F16, F32, I8, I16, I32, Emitter, Int, emitted, vector
from candle_vllm.core.kernels.cpu_runtime.emit_squares import end_squares
from candle_vllm.core.kernels.cpu_runtime.level import LANES, Isa
from candle_vllm.core.kernels.cpu_runtime.operation import LinearArguments
from candle_vllm.core.kernels.cpu_runtime.primitives import float32_at, int64_at, read, step_number
from candle_vllm.core.kernels.cpu_runtime.tiles import CACHED_BYTES, stack_bytes
from candle_vllm.core.kernels.plain_linear.cpu_panel import (
    ask_tiles,
    choose_shape,
    emit_sums,
    fill_panel,
    find_rows,
    write_tiles,
)
from candle_vllm.core.kernels.plain_linear.cpu_squares import (
    CACHED_PANELS,
    SQUARE_BYTES,
    begin_squares,
    fill_panels,
    multiply_squares,
)
from candle_vllm.core.kernels.plain_linear.layout import RUN, PlainKind
from candle_vllm.core.kernels.scaled_linear.layout import HEAD_BYTES, ROWS, ScaledKind

_MOST_BYTES = 1 << 20
"""If two converted tiles have more bytes, a thread converts one tile at a time, because they are on the stack."""

_FEW = 8
"""Maximum number of rows for which weights are converted in registers."""


# ---- widening --------------------------------------------------------------------------------------------------------


def _moved(e: Emitter, word: Any, up: int, down: int, mask: int) -> Any:
    """Shift the bits of a small float, in 16 bits, to the fields of a larger float: left, then arithmetically right.

    `mask` clears the copies of the sign, and the bits of other codes.
    """
    lanes = word.type.count
    if up:
        word = e.b.shl(word, e.constant(I16, up, lanes))
    word = e.b.ashr(word, e.constant(I16, down, lanes))
    return e.b.and_(word, e.constant(I16, mask - (1 << 16), lanes))


def _joined(e: Emitter, first: Any, second: Any) -> Any:
    """Return two vectors of floats, exact in bfloat16, as pairs of bfloat16, <16 x i32>."""
    low = e.b.lshr(e.b.bitcast(first, vector(I32)), e.constant(I32, 16))
    return e.b.or_(low, e.b.bitcast(second, vector(I32)))


def _steps(e: Emitter, kind: ScaledKind, address: Any) -> Iterator[tuple[Any, Any]]:
    """Yield a turn's weights, two columns at a time, as floats divided by the kind's factor: two vectors of 16 rows.

    The code for columns is emitted when the caller requests them, because registers do not hold a whole turn.
    """
    if kind is ScaledKind.E2M1:
        scale = e.b.zext(e.load(address, vector(I8)), vector(I16))
        scale = e.half_to_float(e.b.bitcast(_moved(e, scale, 8, 1, 0xBF80), vector(F16)))
        for at in range(4):
            word = e.load(address, vector(I16), ROWS + 2 * ROWS * at)
            for up in (12, 4):
                halves = (e.b.bitcast(_moved(e, word, up - by, 3, 0x8E00), vector(F16)) for by in (0, 4))
                first, second = map(e.half_to_float, halves)
                yield e.b.fmul(first, scale), e.b.fmul(second, scale)
        return
    down, mask, bias = (4, 0x87F0, 120) if kind is ScaledKind.E4M3 else (3, 0x8FE0, 112)
    power = e.constant(F32, 2.0**bias)
    for at in range(2):
        word = e.load(address, vector(I16, 2 * ROWS), 4 * ROWS * at)
        for up in (8, 0):
            first, second = e.widened_pairs(e.b.bitcast(_moved(e, word, up, down, mask), vector(I32)))
            yield e.b.fmul(first, power), e.b.fmul(second, power)


@emitted
def _widen(e: Emitter, kind: ScaledKind, codes: Int, apart: Int, out: Int, turns: Int, ahead: Int) -> None:
    """Convert turns, which are `apart` bytes apart, to contiguous bfloat16 [16 rows, 2 columns].

    `ahead` is the prefetch distance in bytes.
    """
    b = e.b
    with e.each(turns) as index:
        source = b.add(codes, b.mul(index, apart))
        _ask_turn(e, kind, b.add(source, ahead))
        target = b.add(out, b.mul(index, e.int64(2 * ROWS * kind.turn_columns)))
        for step, floats in enumerate(_steps(e, kind, source)):
            e.store(target, _joined(e, *floats), step * PlainKind.BF16.step_bytes)


def _ask_turn(e: Emitter, kind: ScaledKind, address: Any) -> None:
    """Prefetch a turn."""
    for line in range(0, kind.turn_bytes, 64):
        e.prefetch(address, line)


# ---- few rows --------------------------------------------------------------------------------------------------------


def _x_bytes(isa: Isa) -> int:
    """Return the bytes of an activation for few rows: 2 with vector products of bfloat16; else, and with AMX, 4."""
    return 2 if isa.bf16 and not isa & Isa.AMX else 4


@emitted
def _spread(e: Emitter, x: Int, out: Int, vectors: Int) -> None:
    """Convert 16 * `vectors` elements of bfloat16 to float32."""
    b = e.b
    with e.each(vectors) as index:
        halves = e.load(b.add(x, b.mul(index, e.int64(2 * LANES))), vector(I16))
        floats = b.shl(b.zext(halves, vector(I32)), e.constant(I32, 16))
        e.store(b.add(out, b.mul(index, e.int64(4 * LANES))), floats)


def _add_step(e: Emitter, isa: Isa, total: Any, x: Any, height: int, floats: tuple[Any, Any]) -> Any:
    """Add the products of two columns and the row at x, in a panel of `height` rows, to 16 sums as `dot_bf16` does."""
    if isa.bf16:
        return e.dot_bf16(total, e.splat(e.load(x, I32)), _joined(e, *floats), isa)
    for at, weights in enumerate(floats):
        total = e.fma(e.splat(e.load(x, F32, 4 * height * at)), weights, total)
    return total


@emitted
def _multiply_rows(
    e: Emitter,
    kind: ScaledKind,
    block: int,
    isa: Isa,
    tile: Int,
    turns: Int,
    span_turns: Int,
    panel: Int,
    out: Int,
    ahead: Int,
) -> None:
    """Multiply a tile by a panel of `block` rows with elements of `_x_bytes` bytes: float32 [block, 16] at `out`.

    With AMX, products are added in AMX's order: those of even columns of a square, those of odd columns, then both.
    """
    b = e.b
    squares, of_square = bool(isa & Isa.AMX), 32 // kind.turn_columns
    step_x = 2 * _x_bytes(isa) * block
    turn_x = step_x * kind.turn_columns // 2
    paired_sums = block == 1 or (_x_bytes(isa) == 2 and block == 4)  # otherwise one span has enough sums
    span_bytes = b.add(b.mul(span_turns, e.int64(kind.turn_bytes)), e.int64(HEAD_BYTES))
    span_x = b.mul(span_turns, e.int64(turn_x))

    def add(spans: range, of: int, at: Any, length: Any, totals: list[Any]) -> list[Any]:
        """Add `spans` of a pair (`of` is 2) or a single span (1), from span `at` on, of `length` turns each."""
        head, x = b.add(tile, b.mul(at, span_bytes)), b.add(panel, b.mul(at, span_x))
        codes = b.add(head, e.int64(of * HEAD_BYTES))

        def body(index: Any, sums: list[Any]) -> list[Any]:
            first = b.add(codes, b.mul(index, e.int64(of * kind.turn_bytes)))
            inputs, sums = b.add(x, b.mul(index, e.int64(turn_x))), list(sums)
            places = [b.add(inputs, b.mul(span_x, e.int64(span))) for span in spans]
            addresses = [b.add(first, e.int64(span * kind.turn_bytes)) for span in spans]
            for address in addresses:
                _ask_turn(e, kind, b.add(address, ahead))
            for step, abreast in enumerate(zip(*(_steps(e, kind, address) for address in addresses))):
                for chain in range(len(spans) * block):
                    at, row = divmod(chain, block)
                    place = b.add(places[at], e.int64(step * step_x + 4 * row))
                    if squares:
                        for column, weights in enumerate(abreast[at]):
                            value, own = e.splat(e.load(place, F32, 4 * block * column)), 2 * chain + column
                            sums[own] = e.fma(value, weights, sums[own])
                    else:
                        sums[chain] = _add_step(e, isa, sums[chain], place, block, abreast[at])
            return sums

        def square(index: Any, parts: list[Any]) -> list[Any]:
            first = b.mul(index, e.int64(of_square))
            left, most = b.sub(length, first), e.int64(of_square)
            few = b.select(b.icmp_signed("<", left, most), left, most)
            sums = e.loop(few, zeros * 2, lambda turn, sums: body(b.add(first, turn), sums))
            return [b.fadd(part, b.fadd(*sums[2 * n : 2 * n + 2])) for n, part in enumerate(parts)]

        zeros = [e.zeros(F32)] * (len(spans) * block)
        if squares:
            count_of = b.sdiv(b.add(length, e.int64(of_square - 1)), e.int64(of_square))
            parts = e.loop(count_of, zeros, square)
        else:
            parts = e.loop(length, zeros, body)
        totals = list(totals)
        for chain, part in enumerate(parts):
            scale = e.load(head, vector(F32), spans[chain // block] * HEAD_BYTES)
            totals[chain % block] = e.fma(part, scale, totals[chain % block])
        return totals

    def two(index: Any, totals: list[Any]) -> list[Any]:
        at = b.mul(index, e.int64(2))
        if paired_sums:
            return add(range(2), 2, at, span_turns, totals)
        return add(range(1, 2), 2, at, span_turns, add(range(1), 2, at, span_turns, totals))

    def one(index: Any, totals: list[Any]) -> list[Any]:
        at = b.add(paired, index)
        left = b.sub(turns, b.mul(at, span_turns))
        return add(range(1), 1, at, b.select(b.icmp_signed("<", left, span_turns), left, span_turns), totals)

    pairs = b.sdiv(turns, b.mul(span_turns, e.int64(2)))
    paired = b.mul(pairs, e.int64(2))
    spans = b.sdiv(b.add(turns, b.sub(span_turns, e.int64(1))), span_turns)
    totals = e.loop_or_skip(pairs, [e.zeros(F32)] * block, two)
    for row, total in enumerate(e.loop_or_skip(b.sub(spans, paired), totals, one)):
        e.store(out, total, row * 4 * ROWS)


# ---- more rows -------------------------------------------------------------------------------------------------------


@emitted
def _add_span(
    e: Emitter,
    isa: Isa,
    block: Int,
    tiles: Int,
    weights: Int,
    tile_bytes: Int,
    panel: Int,
    runs: Int,
    head: Int,
    head_step: Int,
    sums: Int,
) -> None:
    """Multiply a span of converted tiles by a panel of `block` rows; add the result to sums float32 [tiles, block, 16].

    Tiles are `tile_bytes` apart. The first tile's scales are at `head`; scales of tiles are `head_step` bytes apart.
    """
    b = e.b

    def add(block: int, tiles: int) -> None:
        bases = [b.add(weights, b.mul(tile_bytes, e.int64(tile))) for tile in range(tiles)]
        heads = [b.add(head, b.mul(head_step, e.int64(tile))) for tile in range(tiles)]

        def write(tile: int, row: int, part: Any) -> None:
            place = (tile * block + row) * 4 * ROWS
            total = e.load(sums, vector(F32), place)
            e.store(sums, e.fma(part, e.load(heads[tile], vector(F32)), total), place)

        emit_sums(e, PlainKind.BF16, isa, bases, block, panel, runs, write)

    choose_shape(e, block, tiles, add)


@njit
def _place(span: int, paired: int, span_bytes: int, turn_bytes: int) -> tuple[int, int, int]:
    """Return the offsets of a span's scales and turns in its tile, and the bytes from one turn to the next.

    The first `paired` spans of the tile form pairs.
    """
    if span >= paired:
        return span * span_bytes, span * span_bytes + HEAD_BYTES, turn_bytes
    pair, second = (span & -2) * span_bytes, span & 1
    return pair + second * HEAD_BYTES, pair + 2 * HEAD_BYTES + second * turn_bytes, 2 * turn_bytes


# ---- AMX -------------------------------------------------------------------------------------------------------------


@emitted
def _add_scaled(e: Emitter, tiles: Int, sums: Int, head: Int, head_step: Int, rows: Int, totals: Int) -> None:
    """Add the sums of a span, float32 [tiles, 16, 16], times the scales of the tiles' rows to `rows` rows of totals.

    The scales of tiles are `head_step` bytes apart.
    """
    b = e.b

    def add(tiles: int) -> None:
        scales = [e.load(b.add(head, b.mul(head_step, e.int64(tile))), vector(F32)) for tile in range(tiles)]
        with e.each(rows) as row:
            offset = b.mul(row, e.int64(4 * LANES))
            part, total = b.add(sums, offset), b.add(totals, offset)
            for tile, scale in enumerate(scales):
                at = tile * SQUARE_BYTES
                added = e.fma(e.load(part, vector(F32), at), scale, e.load(total, vector(F32), at))
                e.store(total, added, at)

    e.choose(tiles, {count: partial(add, count) for count in (2, 1)})


def _make_squares(KIND: int, ISA: int) -> Any:
    """Make the operation for AMX; spans must be whole squares of 32 columns. Terms: `plain_linear/cpu_squares.py`."""
    CACHED, SQUARE, BF16 = CACHED_PANELS, SQUARE_BYTES, int(PlainKind.BF16)
    TURN_BYTES, COLUMNS = ScaledKind(KIND).turn_bytes, ScaledKind(KIND).turn_columns
    EACH = 32 // COLUMNS  # turns of a square

    def scaled_linear(entry: Any, thread: int, threads: int) -> None:
        given = read(LinearArguments, entry)
        rows = step_number(entry, given.rows_from)
        tile_bytes, turns, span_turns = given.tile_bytes, given.length, given.span
        tiles = (given.outputs + 15) >> 4
        first, last = tiles * thread // threads, tiles * (thread + 1) // threads
        if rows <= 0 or first == last:
            return
        spans, paired = (turns + span_turns - 1) // span_turns, turns // (2 * span_turns) * 2
        span_bytes, wide_bytes = HEAD_BYTES + span_turns * TURN_BYTES, span_turns // EACH * SQUARE
        if rows == 1:
            source = int64_at(given.picked)[0] if given.picked != 0 else 0
            sums = stack_bytes(64 + 2 * given.x_bytes)
            _spread(given.x + source * given.x_bytes, sums + 64, given.x_bytes >> 5)
            for tile in range(first, last):
                at_tile = given.weights + tile * tile_bytes
                _multiply_rows(KIND, 1, ISA, at_tile, turns, span_turns, sums + 64, sums, given.ahead)
                write_tiles(given, sums, 1, 0, 1, tile, 1)
            return
        squares, most = (turns + EACH - 1) // EACH, 1
        panel_bytes = squares * SQUARE
        if rows > 16:
            most = max(min(CACHED // panel_bytes, 16) & -2, 1)
        panels = stack_bytes(most * (panel_bytes + 2 * SQUARE) + 2 * wide_bytes + 4 * SQUARE + 128)
        sums = panels + most * panel_bytes
        wide = sums + most * 2 * SQUARE
        scratch = wide + 2 * wide_bytes
        addresses = scratch + 4 * SQUARE
        begin_squares(addresses)
        totals = float32_at(sums)
        row = 0
        while row < rows:
            count = min(16 * most, rows - row)
            blocks = (count + 15) >> 4
            fill_panels(given, row, count, addresses, panels, squares)
            tile = first
            while tile < last:
                width = 2 if last - tile >= 2 else 1
                for index in range(256 * width * blocks):
                    totals[index] = 0.0
                ask_tiles(given, row, count, tile, width)
                for span in range(spans):
                    length = min(span_turns, turns - span * span_turns)
                    some = (length + EACH - 1) // EACH
                    head, offset, apart = _place(span, paired, span_bytes, TURN_BYTES)
                    at_tile = given.weights + tile * tile_bytes
                    for at in range(width):
                        target = wide + at * wide_bytes
                        _widen(KIND, at_tile + at * tile_bytes + offset, apart, target, length, given.ahead)
                        rest = float32_at(target)
                        for index in range(length * COLUMNS * 8, some * 256):
                            rest[index] = 0.0
                    for block in range(0, blocks, 2):
                        few = min(blocks - block, 2)
                        inputs = panels + block * panel_bytes + span * (span_turns // EACH) * SQUARE
                        multiply_squares(
                            BF16, 1, few, width, wide, wide_bytes, inputs, panel_bytes, SQUARE, 64, scratch, some
                        )
                        for index in range(few):
                            own, own_rows = index * width * SQUARE, min(16, count - 16 * (block + index))
                            to = sums + block * width * SQUARE + own
                            _add_scaled(width, scratch + own, at_tile + head, tile_bytes, own_rows, to)
                for block in range(blocks):
                    some = min(16, count - 16 * block)
                    write_tiles(given, sums + block * width * SQUARE, 16, row + 16 * block, some, tile, width)
                tile += width
            row += count
        end_squares()

    return scaled_linear


# ---- the operation ---------------------------------------------------------------------------------------------------


def make_linear(KIND: int, ISA: int) -> Any:
    if Isa(ISA) & Isa.AMX:
        return _make_either(KIND, ISA)
    TILE_BLOCK, MOST = CACHED_BYTES, _MOST_BYTES
    TURN_BYTES, COLUMNS = ScaledKind(KIND).turn_bytes, ScaledKind(KIND).turn_columns
    X_BYTES, FEW = _x_bytes(Isa(ISA)), _FEW

    def scaled_linear(entry: Any, thread: int, threads: int) -> None:
        given = read(LinearArguments, entry)
        rows = step_number(entry, given.rows_from)
        weights, tile_bytes, turns, span_turns = given.weights, given.tile_bytes, given.length, given.span
        x_bytes, ahead = given.x_bytes, given.ahead
        tiles = (given.outputs + 15) >> 4
        first, last = tiles * thread // threads, tiles * (thread + 1) // threads
        if rows <= 0 or first == last:
            return
        if rows <= FEW:
            height = 1 if rows == 1 else 4 if rows <= 4 or X_BYTES == 4 else 8
            wide_row = x_bytes * X_BYTES >> 1
            sums = stack_bytes(512 + 64 + (height + FEW) * wide_row)
            addresses, spread, panels = int64_at(sums + 512), sums + 576, sums + 576 + height * wide_row
            for begin in range(0, rows, height):
                find_rows(given, begin, rows - begin, height, sums + 512, 0)
                if X_BYTES == 4:
                    for index in range(height):
                        _spread(addresses[index], spread + index * wide_row, x_bytes >> 5)
                        addresses[index] = spread + index * wide_row
                fill_panel(height, panels + begin * wide_row, sums + 512, wide_row >> 6)
            if height == 1:
                panels = addresses[0]
            for tile in range(first, last):
                at_tile = weights + tile * tile_bytes
                for begin in range(0, rows, height):
                    panel, count = panels + begin * wide_row, min(height, rows - begin)
                    if height == 8:
                        _multiply_rows(KIND, 8, ISA, at_tile, turns, span_turns, panel, sums, ahead)
                    elif height == 4:
                        _multiply_rows(KIND, 4, ISA, at_tile, turns, span_turns, panel, sums, ahead)
                    else:
                        _multiply_rows(KIND, 1, ISA, at_tile, turns, span_turns, panel, sums, ahead)
                    write_tiles(given, sums, height, begin, count, tile, 1)
            return
        span_bytes, spans = HEAD_BYTES + span_turns * TURN_BYTES, (turns + span_turns - 1) // span_turns
        paired = turns // (2 * span_turns) * 2
        wide_span, wide_tile = 32 * COLUMNS * span_turns, 32 * COLUMNS * turns
        step = 1 if 2 * wide_tile > MOST else max(TILE_BLOCK // wide_tile, 2) & -2
        panel = stack_bytes(8 * x_bytes + 1024 + 64 + step * wide_tile)
        sums = panel + 8 * x_bytes
        values, addresses, scratch = float32_at(sums), int64_at(sums + 1024), sums + 1024 + 64
        for begin in range(first, last, step):
            end = min(begin + step, last)
            for tile in range(begin, end):
                for span in range(spans):
                    _, codes, apart = _place(span, paired, span_bytes, TURN_BYTES)
                    target = scratch + (tile - begin) * wide_tile + span * wide_span
                    length = min(span_turns, turns - span * span_turns)
                    _widen(KIND, weights + tile * tile_bytes + codes, apart, target, length, ahead)
            row = 0
            while row < rows:
                left = rows - row
                block = 8 if left > 4 else 4 if left > 1 else 1
                count = min(block, left)
                find_rows(given, row, count, block, sums + 1024, 0)
                fill_panel(block, panel, sums + 1024, x_bytes >> 6)
                places = addresses[0] if block == 1 else panel
                tile = begin
                while tile < end:
                    width = 2 if block == 8 and end - tile >= 2 else 1
                    for index in range(256):
                        values[index] = 0.0
                    for span in range(spans):
                        wide = scratch + (tile - begin) * wide_tile + span * wide_span
                        head = weights + tile * tile_bytes + _place(span, paired, span_bytes, TURN_BYTES)[0]
                        at = places + span * span_turns * 2 * COLUMNS * block
                        runs = min(span_turns, turns - span * span_turns) * (COLUMNS // (2 * RUN))
                        _add_span(ISA, block, width, wide, wide_tile, at, runs, head, tile_bytes, sums)
                    write_tiles(given, sums, block, row, count, tile, width)
                    tile += width
                row += count

    return scaled_linear


def _make_either(KIND: int, ISA: int) -> Any:
    """Make the operation of a CPU with AMX, which is used if spans are whole squares."""
    COLUMNS = ScaledKind(KIND).turn_columns
    squares, others = njit(_make_squares(KIND, ISA)), njit(make_linear(KIND, int(Isa(ISA) & ~Isa.AMX)))

    def scaled_linear(entry: Any, thread: int, threads: int) -> None:
        if read(LinearArguments, entry).span * COLUMNS % 32 == 0:
            squares(entry, thread, threads)
        else:
            others(entry, thread, threads)

    return scaled_linear
