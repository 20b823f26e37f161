# SPDX-License-Identifier: MIT
"""Linear layer and embedding with packed (quantised) weights as compiled CPU operations (step 6 of a request's life).

Terms of weights (tile, block, group, quad): see `layout.py`; of activations (panel, record): see `cpu_panel.py`. Each
thread computes consecutive tiles, as many at a time as fit into its cache. For each group the kernel unpacks the tile's
8 quads and multiplies each by every row of a panel (`cpu_sums.py`), so that codes are read and unpacked once for up to
8 rows. On CPUs with few registers, with AMX, and for types that are slow to unpack, groups of a tile are unpacked to
the L1 cache for several panels.

Codes are unsigned; for weights scale * (code - zero) the int32 sums start at -zero * sum(x) instead of 0. Some
instruction sets multiply codes of some types as signed integers instead (`cpu_sums.takes_signed`). Whatever the panel,
a row is computed by the same operations in the same order (`_add_group`). For prefetching see `level.bytes_ahead`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from llvmlite import ir

from candle_vllm.core.kernels.cpu_runtime.emit import F16, F32, I8, I16, I32, Emitter, Int, emitted, vector
from candle_vllm.core.kernels.cpu_runtime.emit_squares import end_squares
from candle_vllm.core.kernels.cpu_runtime.emit_tables import look_up
from candle_vllm.core.kernels.cpu_runtime.level import Isa
from candle_vllm.core.kernels.cpu_runtime.operation import RUNS_BYTES, EmbeddingArguments, LinearArguments
from candle_vllm.core.kernels.cpu_runtime.primitives import float32_at, int64_at, read, step_number
from candle_vllm.core.kernels.cpu_runtime.tiles import CACHED_BYTES, ask_lines, lines_each, stack_bytes, write_tile
from candle_vllm.core.kernels.packed_linear import cpu_sums
from candle_vllm.core.kernels.packed_linear.cpu_grids import GridGroup
from candle_vllm.core.kernels.packed_linear.cpu_panel import (
    TALL_ROWS,
    blocks,
    cut_rows,
    fill_row,
    most_panels,
    record_bytes,
)
from candle_vllm.core.kernels.packed_linear.grids import GridLayout
from candle_vllm.core.kernels.packed_linear.layout import (
    GROUP,
    LAYOUTS,
    ROWS,
    TRITS,
    VECTOR_BYTES,
    AnyLayout,
    PackedKind,
    TileLayout,
)

UNPACKED = 4
"""Groups that are unpacked at a time for several panels; they and the panels' records fit into the L1 cache."""

UNPACKED_BYTES = (8 + 4) * VECTOR_BYTES  # bytes of a group: its codes, and up to four vectors of scales and minima


def scratch_bytes(isa: Isa, layout: AnyLayout) -> int:
    """Return the bytes of scratch memory for unpacked groups and for sums of a panel's rows (with AMX, of all rows)."""
    rows = TALL_ROWS if cpu_sums.takes_squares(isa, layout) else blocks(isa, layout)[0]
    return UNPACKED * (UNPACKED_BYTES + rows * VECTOR_BYTES * GROUP // layout.width)


# ---- reading packed weights: for 16 rows at once, or for one row (lanes = 1, at its own addresses) -------------------


def _words(e: Emitter, value: int, lanes: int) -> Any:
    """Return a vector of `lanes` 32-bit lanes, each byte of which is `value`."""
    return e.constant(I32, value * 0x01010101, lanes)


def _field(e: Emitter, words: Any, start: int, target: int, bits: int, lanes: int) -> Any:
    """Extract `bits` bits, from bit `start` on, of each byte; move them to bit `target`. Other bits are 0."""
    return e.b.and_(e.shifted(words, target - start), _words(e, ((1 << bits) - 1) << target, lanes))


def _quad(
    e: Emitter, group: Any, codes: Any, layout: TileLayout, quad: int, isa: Isa = Isa.GENERIC, lanes: int = ROWS
) -> Any:
    """Load quad `quad` of group `group` of a block: 4 bytes in each lane, signed if `takes_signed`.

    With one lane, for one row, the bytes are integer weight + zero; with 16 lanes they are the factors for
    `cpu_sums.emit_sums`. `codes` is the address of the group's codes, see `_block_of`.
    """
    if layout.bits == 0:
        return _digit(e, codes, e.b.add(e.b.shl(group, e.int64(3)), e.int64(quad)), lanes)
    found, signed = _stored_quad(e, codes, layout, quad, lanes), cpu_sums.takes_signed(isa, layout)
    if layout.values is not None:
        of_steps = cpu_sums.steps(layout) if lanes == ROWS else None
        if of_steps and of_steps.are_codes:
            return found
        zero = 0 if signed else layout.zero
        numbers = of_steps.numbers if of_steps else [(value + zero) & 255 for value in layout.values]
        return look_up(e, [*numbers, *[0] * (16 - len(numbers))], found, isa, lanes)
    return e.b.xor(found, _words(e, layout.zero, lanes)) if signed else found


def _signed_quad(e: Emitter, group: Any, codes: Any, layout: TileLayout, quad: int, isa: Isa) -> Any:
    """Load a quad of 16 lanes as signed integer weights (code - zero, or the table's value), the form for AMX."""
    if layout.values is not None:
        numbers = [value & 255 for value in layout.values]
        return look_up(e, [*numbers, *[0] * (16 - len(numbers))], _stored_quad(e, codes, layout, quad, ROWS), isa, ROWS)
    return _less(e, _quad(e, group, codes, layout, quad, Isa.GENERIC), layout.zero)


def _less(e: Emitter, words: Any, zero: int) -> Any:
    """Subtract `zero` from each byte."""
    if zero == 0:
        return words
    zeros = e.constant(I8, zero, 4 * ROWS)
    return e.b.bitcast(e.b.sub(e.b.bitcast(words, zeros.type), zeros), words.type)


def _stored_quad(e: Emitter, codes: Any, layout: TileLayout, quad: int, lanes: int) -> Any:
    """Load a quad of codes, without the lookup in the layout's table of values."""
    bits, kind = layout.bits, vector(I32, lanes)

    def words(index: int) -> Any:
        return e.load(codes, kind, index * VECTOR_BYTES)

    if bits == 8:
        return words(quad)
    if bits == 1:
        return _field(e, words(0), quad, 1, 1, lanes)
    if bits == 3 and layout.values is not None:
        if quad < 6:
            return _field(e, words(quad // 2), quad % 2 * 3, 0, 3, lanes)
        low = _field(e, words(2 * (quad - 6)), 6, 0, 2, lanes)
        return e.b.or_(low, _field(e, words(1), quad, 2, 1, lanes))
    if bits in (3, 5):
        high = _field(e, words(0), quad, bits - 1, 1, lanes)
    else:
        high = _field(e, words(quad // 4), quad % 4 * 2, 4, 2, lanes) if bits == 6 else None
    if bits >= 4:
        low = _field(e, words(bits - 4 + quad % 4), quad // 4 * 4, 0, 4, lanes)
    else:
        low = _field(e, words(bits - 2 + quad // 4), quad % 4 * 2, 0, 2, lanes)
    return low if high is None else e.b.or_(low, high)


def _digit(e: Emitter, codes: Any, quad: Any, lanes: int) -> Any:
    """Load quad `quad` of a block of base-3 digits.

    A byte is a fraction of 256. Multiplication by a power of 3 (mod 256) makes the wanted digit the fraction's first
    base-3 digit, which two comparisons find.
    """
    b, pairs, bytes_ = e.b, vector(I16, 2 * lanes), vector(I8, 4 * lanes)
    place = b.udiv(quad, e.int64(TRITS))
    digit = b.sub(quad, b.mul(place, e.int64(TRITS)))
    powers = e.int64(sum(3**n << 8 * n for n in range(TRITS)))
    power = b.and_(b.trunc(b.lshr(powers, b.shl(digit, e.int64(3))), I16), ir.Constant(I16, 255))
    words = e.load(b.add(codes, b.mul(place, e.int64(VECTOR_BYTES))), pairs)
    power, low, eight = e.splat(power, 2 * lanes), e.constant(I16, 255, 2 * lanes), e.constant(I16, 8, 2 * lanes)
    even = b.and_(b.mul(words, power), low)
    odd = b.shl(b.mul(b.lshr(words, eight), power), eight)
    found = b.bitcast(b.or_(even, odd), bytes_)
    digits = [b.zext(b.icmp_unsigned(">", found, e.constant(I8, most, 4 * lanes)), bytes_) for most in (85, 170)]
    return b.bitcast(b.add(*digits), vector(I32, lanes))


def _scales(e: Emitter, block: Any, group: Any, layout: TileLayout, lane: Any = None) -> tuple[list[Any], list[Any]]:
    """Load scales and minima of group `group` of a block: lists of one vector of floats, or of one for each half."""
    lanes = ROWS if lane is None else 1
    if layout.float == "e4m3":
        return _small_floats(e, block, group, layout, lane), []
    scale, minimum = _floats(e, block, layout, lane)
    if not layout.nested:
        return [scale], [] if minimum is None else [minimum]
    at = e.b.add(block, e.b.mul(group, e.int64(layout.small_bytes)))
    step = ROWS
    if lane is not None:
        at = e.b.add(at, e.b.mul(lane, e.int64(1 + layout.paired)))
        step = 1 if layout.paired else ROWS
    small = [
        e.b.zext(e.load(at, vector(I8, lanes), layout.floats_bytes + half * step), vector(I32, lanes))
        for half in range(layout.small_bytes // ROWS)
    ]

    def times(factor: Any, numbers: Any) -> Any:
        return e.b.fmul(factor, e.b.sitofp(numbers, vector(F32, lanes)))

    if minimum is None:
        up = e.constant(I32, 24, lanes)
        return [times(scale, e.b.ashr(e.b.shl(numbers, up), up)) for numbers in small], []
    if layout.width == GROUP:
        return [times(scale, small[0])], [times(minimum, small[1])]
    assert lane is not None, "paired kinds read whole tiles by `_pairs`"
    low = [e.b.and_(numbers, e.constant(I32, 15, lanes)) for numbers in small]
    high = [e.b.lshr(numbers, e.constant(I32, 4, lanes)) for numbers in small]
    return [times(scale, numbers) for numbers in low], [times(minimum, numbers) for numbers in high]


def _floats(e: Emitter, block: Any, layout: TileLayout, lane: Any = None) -> tuple[Any, Any]:
    """Load the (super-)scales at the start of a block, and the minima or None, converted to float32."""
    lanes = ROWS if lane is None else 1
    if layout.float == "e8m0":
        return _halved_power(e, block if lane is None else e.b.add(block, lane), lanes), None
    if layout.float == "f32":
        return e.load(block if lane is None else e.b.add(block, e.b.mul(lane, e.int64(4))), vector(F32, lanes)), None
    at = block if lane is None else e.b.add(block, e.b.mul(lane, e.int64(2)))
    offsets = (0, 2 * ROWS) if layout.minimum else (0,)
    found = [e.b.fpext(e.load(at, vector(F16, lanes), offset), vector(F32, lanes)) for offset in offsets]
    return found[0], found[1] if layout.minimum else None


def _halved_power(e: Emitter, at: Any, lanes: int) -> Any:
    """Convert e8m0 bytes to half their values: 2^(byte - 128). The two smallest results are subnormal floats."""
    b, kind = e.b, vector(I32, lanes)
    byte = b.zext(e.load(at, vector(I8, lanes)), kind)
    usual = b.shl(b.sub(byte, e.constant(I32, 1, lanes)), e.constant(I32, 23, lanes))
    small = b.shl(e.constant(I32, 1 << 21, lanes), b.and_(byte, e.constant(I32, 1, lanes)))
    few = b.icmp_unsigned("<", byte, e.constant(I32, 2, lanes))
    return b.bitcast(b.select(few, small, usual), vector(F32, lanes))


def _small_floats(e: Emitter, block: Any, group: Any, layout: TileLayout, lane: Any = None) -> list[Any]:
    """Load the e4m3 scales of a group's parts, halved. Shifted bits of e4m3 are a float16 of the value / 2^8."""
    b, lanes, parts = e.b, ROWS if lane is None else 1, GROUP // layout.width
    at = b.add(block, b.mul(group, e.int64(parts * ROWS)))
    at = at if lane is None else b.add(at, lane)
    found = []
    for part in range(parts):
        byte = b.zext(e.load(at, vector(I8, lanes), part * ROWS), vector(I16, lanes))
        half = b.bitcast(b.shl(byte, e.constant(I16, 7, lanes)), vector(F16, lanes))
        found.append(b.fmul(b.fpext(half, vector(F32, lanes)), e.constant(F32, 128.0, lanes)))
    return found


def _pairs(e: Emitter, block: Any, group: Any, layout: TileLayout) -> tuple[Any, Any]:
    """Load a group's sub-scales and sub-minima of a paired kind, each <16 x i32>: both halves' 16-bit integers."""
    at = e.b.add(block, e.b.mul(group, e.int64(2 * ROWS)))
    small = e.b.zext(e.load(at, vector(I8, 2 * ROWS), layout.floats_bytes), vector(I16, 2 * ROWS))
    scale = e.b.and_(small, e.constant(I16, 15, 2 * ROWS))
    minimum = e.b.lshr(small, e.constant(I16, 4, 2 * ROWS))
    return e.b.bitcast(scale, vector(I32)), e.b.bitcast(minimum, vector(I32))


def _paired(e: Emitter, low: Any, high: Any) -> Any:
    """Combine two vectors of 16-bit integers in 32-bit lanes to one vector of pairs."""
    count = low.type.count
    return e.b.or_(e.b.and_(low, e.constant(I32, 0xFFFF, count)), e.b.shl(high, e.constant(I32, 16, count)))


def _block_of(e: Emitter, weights: Any, group: Any, layout: AnyLayout) -> tuple[Any, Any, Any]:
    """Return the address of the block that has group `group`, the group's index in the block, its codes' address."""
    if layout.groups == 1:
        block = e.b.add(weights, e.b.mul(group, e.int64(layout.block_bytes)))
        return block, e.int64(0), e.b.add(block, e.int64(layout.head_bytes))
    number = e.b.and_(group, e.int64(layout.groups - 1))
    of = e.b.lshr(group, e.int64(layout.groups.bit_length() - 1))
    block = e.b.add(weights, e.b.mul(of, e.int64(layout.block_bytes)))
    inside = e.b.add(e.b.mul(number, e.int64(layout.code_bytes)), e.int64(layout.head_bytes))
    return block, number, e.b.add(block, inside)


# ---- one tile times a panel ------------------------------------------------------------------------------------------


class _Group(NamedTuple):
    """A group of a tile: vectors of scales and minima (with sub-scales if paired), and a function for its quads."""

    scales: list[Any]
    minima: list[Any]
    quad: Callable[[int], Any]


def _packed_group(e: Emitter, layout: AnyLayout, isa: Isa, weights: Any, group: Any, *, signed: bool = False) -> _Group:
    """Return group `group` of a packed tile; codes are signed if `signed` or `takes_signed` is true."""
    head, number, codes = _block_of(e, weights, group, layout)
    if isinstance(layout, GridLayout):
        grid = GridGroup(e, layout, isa, head, number, codes)
        zero = layout.zero if signed or cpu_sums.takes_signed(isa, layout) else 0
        return _Group(grid.scales(), [], lambda quad: _less(e, grid.quad(quad), zero))
    if layout.paired:
        scale, minimum = _floats(e, head, layout)
        small = _pairs(e, head, number, layout)
        scales, minima = [scale, small[0]], [minimum, small[1]]
    else:
        scales, minima = _scales(e, head, number, layout)
    read = _signed_quad if signed else _quad
    return _Group(scales, minima, lambda quad: read(e, number, codes, layout, quad, isa))


def _sums_of(inputs: cpu_sums.Inputs, rows: range, group: _Group) -> list[list[Any]]:
    """Return the sums of a group, or of its halves, each <16 x i32> for each row."""
    layout, isa = inputs.layout, inputs.isa
    halves = GROUP // layout.width
    apart = not (layout.minimum or cpu_sums.takes_signed(isa, layout))  # whether sums begin at -zero * sum(x)
    size = 8 // halves
    return [
        cpu_sums.emit_sums(inputs, group.quad, range(half * size, (half + 1) * size), rows, 1 + half if apart else 0)
        for half in range(halves)
    ]


def _add_group(inputs: cpu_sums.Inputs, rows: range, group: _Group, sums: list[list[Any]], old: list[Any]) -> list[Any]:
    """Return the totals `old` of some rows of a panel, plus a group's integer sums in its scales, plus its minima."""
    e, layout = inputs.e, inputs.layout
    if not isinstance(layout, GridLayout) and layout.paired:
        return _add_paired(inputs, rows, group, sums, old)
    scaled, totals = list[Any](), old
    for half, scale in zip(sums, group.scales):
        floats = [e.b.sitofp(part, vector(F32)) for part in half]
        if layout.width == GROUP:
            xs = [inputs.number(row, 0, F32) for row in rows]
            totals = [e.fma(value, e.b.fmul(scale, x), total) for value, x, total in zip(floats, xs, totals)]
            if group.minima:
                least = group.minima[0]
                totals = [e.fma(least, inputs.number(row, 1, F32), total) for row, total in zip(rows, totals)]
        elif scaled:
            scaled = [e.fma(value, scale, before) for value, before in zip(floats, scaled)]
        else:
            scaled = [e.b.fmul(value, scale) for value in floats]
    if layout.width != GROUP:
        totals = [e.fma(value, inputs.number(row, 0, F32), total) for row, value, total in zip(rows, scaled, totals)]
    return totals


def _add_paired(
    inputs: cpu_sums.Inputs, rows: range, group: _Group, halves: list[list[Any]], old: list[Any]
) -> list[Any]:
    """Do what `_add_group` does for a paired kind: both halves' sums, below 2^13, are scaled and added as integers."""
    e, isa = inputs.e, inputs.isa
    (scale, sub_scales), (minimum, sub_minima) = group.scales, group.minima
    results = []
    for row, low, high, total in zip(rows, *halves, old):
        scaled = e.b.sitofp(e.dot_i16(e.zeros(I32), _paired(e, low, high), sub_scales, isa), vector(F32))
        lowest = e.b.sitofp(e.dot_i16(e.zeros(I32), sub_minima, inputs.number(row, 1, I32), isa), vector(F32))
        scaled = e.fma(lowest, minimum, e.b.fmul(scaled, scale))
        results.append(e.fma(scaled, inputs.number(row, 0, F32), total))
    return results


class _Tile(NamedTuple):
    """Arguments of `multiply`, all int64: addresses, counts, and the prefetch distance in bytes."""

    weights: Any
    panel: Any
    panels: Any
    out: Any
    groups: Any
    ahead: Any
    scratch: Any


def _ask_ahead(e: Emitter, layout: AnyLayout, at: _Tile, group: Any) -> None:
    """Prefetch the memory `ahead` bytes after a group."""
    bytes_each = layout.block_bytes // layout.groups
    coming = e.b.add(e.b.add(at.weights, at.ahead), e.b.mul(group, e.int64(bytes_each)))
    for line in range(0, bytes_each, 64):
        e.prefetch(coming, line)


def _record(e: Emitter, layout: AnyLayout, isa: Isa, count: int, panel: Any, group: Any) -> cpu_sums.Inputs:
    """Return the record of a group in a panel of `count` rows."""
    return cpu_sums.Inputs(e, isa, layout, count, e.b.add(panel, e.b.mul(group, e.int64(record_bytes(layout, count)))))


def _rows_in_turn(isa: Isa, count: int) -> list[range]:
    """Divide the rows of a panel into ranges whose sums fit into registers."""
    most = cpu_sums.rows_at_once(isa)
    return [range(first, min(first + most, count)) for first in range(0, count, most)]


def _emit_tile(e: Emitter, layout: AnyLayout, isa: Isa, count: int, at: _Tile) -> None:
    """Emit `multiply` for one panel of `count` rows."""

    def body(number: Any, totals: list[Any], rows: range) -> list[Any]:
        if not rows.start:
            _ask_ahead(e, layout, at, number)
        inputs = _record(e, layout, isa, count, at.panel, number)
        found = _packed_group(e, layout, isa, at.weights, number)
        return _add_group(inputs, rows, found, _sums_of(inputs, rows, found), totals)

    for rows in _rows_in_turn(isa, count):  # later rows find the tile in a cache
        totals = e.loop(at.groups, [e.zeros(F32)] * len(rows), partial(body, rows=rows))
        for row, total in zip(rows, totals):
            e.store(at.out, total, row * 4 * ROWS)


def _emit_tall(e: Emitter, layout: AnyLayout, isa: Isa, count: int, at: _Tile) -> None:
    """Emit `multiply` for several panels, or with AMX.

    A few groups are unpacked for all panels. For each panel (with AMX, for all panels), first the integer sums of these
    groups are computed and then added to the totals, because registers do not hold both. Intermediate results stay in
    the L1 cache.
    """
    squares = cpu_sums.takes_squares(isa, layout)
    b, of_panel, row_sums = e.b, count * 4 * ROWS, VECTOR_BYTES * GROUP // layout.width
    panel_bytes = b.mul(at.groups, e.int64(record_bytes(layout, count)))
    at_sums = b.add(at.scratch, e.int64(UNPACKED * UNPACKED_BYTES))

    with e.each(at.panels) as panel:
        for row in range(count):
            e.store(b.add(at.out, b.mul(panel, e.int64(of_panel))), e.zeros(F32), row * 4 * ROWS)
    with e.each(b.udiv(b.add(at.groups, e.int64(UNPACKED - 1)), e.int64(UNPACKED))) as number:
        first = b.mul(number, e.int64(UNPACKED))
        left = b.sub(at.groups, first)
        few = b.select(b.icmp_signed("<", left, e.int64(UNPACKED)), left, e.int64(UNPACKED))

        def codes_of(group: Any) -> Any:
            return b.add(at.scratch, b.mul(group, e.int64(UNPACKED_BYTES)))

        def unpacked(group: Any) -> _Group:
            place = codes_of(group)
            offsets = iter(range(8 * VECTOR_BYTES, UNPACKED_BYTES, VECTOR_BYTES))
            scales, minima = ([e.load(place, kind, next(offsets)) for kind in some] for some in kinds)
            return _Group(scales, minima, lambda quad: e.load(place, vector(I32), VECTOR_BYTES * quad))

        def places_in(panel: Any, group: Any) -> tuple[cpu_sums.Inputs, Any]:
            from_panel = b.add(at.panel, b.mul(panel, panel_bytes))
            inputs = _record(e, layout, isa, count, from_panel, b.add(first, group))
            number = b.add(group, b.mul(panel, e.int64(UNPACKED))) if squares else group
            return inputs, b.add(at_sums, b.mul(number, e.int64(count * row_sums)))

        with e.each(few) as index:
            place, group = codes_of(index), b.add(first, index)
            _ask_ahead(e, layout, at, group)
            found = _packed_group(e, layout, isa, at.weights, group, signed=squares)
            numbers = [*found.scales, *found.minima]
            for part, value in enumerate([*map(found.quad, range(8)), *numbers]):
                e.store(place, value, VECTOR_BYTES * part)
            kinds = [[part.type for part in parts] for parts in (found.scales, found.minima)]
        if squares:
            with e.each(few) as group:
                cpu_sums.square_sums(e, codes_of(group), at.panels, partial(places_in, group=group))
        with e.each(at.panels) as panel:
            out = b.add(at.out, b.mul(panel, e.int64(of_panel)))
            places = partial(places_in, panel)

            def add(group: Any, totals: list[Any], rows: range) -> list[Any]:
                inputs, place = places(group)
                halves = range(0, row_sums, VECTOR_BYTES)
                sums = [[e.load(place, vector(I32), row * row_sums + half) for row in rows] for half in halves]
                return _add_group(inputs, rows, unpacked(group), sums, totals)

            for rows in [range(count)] if squares else _rows_in_turn(isa, count):
                if not squares:
                    with e.each(few) as group:
                        inputs, place = places(group)
                        for half, parts in enumerate(_sums_of(inputs, rows, unpacked(group))):
                            for row, part in zip(rows, parts):
                                e.store(place, part, row * row_sums + VECTOR_BYTES * half)
                totals = [e.load(out, vector(F32), row * 4 * ROWS) for row in rows]
                for row, total in zip(rows, e.loop(few, totals, partial(add, rows=rows))):
                    e.store(out, total, row * 4 * ROWS)


@emitted
def multiply(
    e: Emitter,
    kind: PackedKind,
    isa: Isa,
    block: Int,
    weights: Int,
    panel: Int,
    panels: Int,
    out: Int,
    groups: Int,
    ahead: Int,
    scratch: Int,
) -> None:
    """Multiply a tile by `panels` panels of `block` rows, see `blocks`; write float32 [panels * block, 16] to `out`.

    Several panels must be full. They, and 16 rows (AMX, after `shape_sums`), use the `scratch_bytes` at `scratch`.
    """
    layout, at = LAYOUTS[kind], _Tile(weights, panel, panels, out, groups, ahead, scratch)
    counts = blocks(isa, layout)
    cases = {n: partial(_emit_tile, e, layout, isa, n, at) for n in counts}
    number, tall = block, partial(_emit_tall, e, layout, isa, counts[0], at)
    if cpu_sums.takes_squares(isa, layout):
        cases[counts[0]] = tall
    elif most_panels(isa, layout) > 1:
        cases[0] = tall
        number = e.b.select(e.b.icmp_signed(">", panels, e.int64(1)), e.int64(0), number)
    e.choose(number, cases)


# ---- the operations --------------------------------------------------------------------------------------------------


def make_linear(KIND: int, ISA: int) -> Any:
    layout, isa = LAYOUTS[PackedKind(KIND)], Isa(ISA)
    FULL, MOST, RUNS, SCRATCH = blocks(isa, layout)[0], most_panels(isa, layout), RUNS_BYTES, scratch_bytes(isa, layout)
    SQUARES, TILE_BLOCK = cpu_sums.takes_squares(isa, layout), CACHED_BYTES
    PANEL_GROUP = record_bytes(layout, FULL)  # bytes of a group in a panel

    def packed_linear(entry: Any, thread: int, threads: int) -> None:
        given = read(LinearArguments, entry)
        rows = step_number(entry, given.rows_from)
        weights, tile_bytes, columns, groups = given.weights, given.tile_bytes, given.outputs, given.length
        tiles = (columns + 15) >> 4
        first, last = tiles * thread // threads, tiles * (thread + 1) // threads
        if rows <= 0 or first == last:
            return
        _, most = cut_rows(rows, groups, FULL, MOST, PANEL_GROUP)
        scratch = stack_bytes(SCRATCH + most * (FULL * 64 + groups * PANEL_GROUP))
        sums = scratch + SCRATCH
        panel = sums + most * FULL * 64
        if SQUARES and rows > FULL // 2:
            cpu_sums.shape_sums(scratch)
        ahead, beside = given.ahead, 0
        if given.beside != 0:
            beside = given.beside + RUNS * thread
        turns = (rows + most * FULL - 1) // (most * FULL)
        lines = lines_each(beside, (last - first) * turns)
        step = max(TILE_BLOCK // tile_bytes, 1)
        for begin in range(first, last, step):
            end = min(begin + step, last)
            row = 0
            while row < rows:
                block, panels = cut_rows(rows - row, groups, FULL, MOST, PANEL_GROUP)
                count = min(block * panels, rows - row)
                for index in range(block * panels):
                    source = row + min(index, count - 1)
                    source = int64_at(given.picked)[source] if given.picked != 0 else source
                    at_xq = given.x + source * groups * 32
                    at_xs, at_xsum = given.scales + source * groups * 4, given.sums + source * groups * 4
                    place = panel + index // block * groups * PANEL_GROUP
                    fill_row(KIND, ISA, block, place, index % block, at_xq, at_xs, at_xsum, groups)
                target = given.out + row * given.row_bytes
                for tile in range(begin, end):
                    at_tile = weights + tile * tile_bytes
                    multiply(KIND, ISA, block, at_tile, panel, panels, sums, groups, ahead, scratch)
                    if lines != 0:
                        ask_lines(beside, lines)
                    lanes = min(columns - tile * 16, 16)
                    at_bias = given.bias + tile * 64 if given.bias else 0
                    write_tile(sums, count, lanes, target + tile * 64, given.row_bytes, at_bias, given.accumulate)
                row += count
        if SQUARES and rows > FULL // 2:
            end_squares()

    return packed_linear


@emitted
def _unpack_row(e: Emitter, kind: PackedKind, weights: Int, lane: Int, out: Int, groups: Int) -> None:
    """Write row `lane` of a tile as floats; each operation is rounded as in ggml's routines."""
    b = e.b
    layout = LAYOUTS[kind]

    with e.each(groups) as group:
        head, inside, codes = _block_of(e, weights, group, layout)
        if isinstance(layout, GridLayout):
            _unpack_grid(e, GridGroup(e, layout, Isa.GENERIC, head, inside, codes), lane, out, group)
        else:
            scales, minima = _scales(e, head, inside, layout, lane)
            codes = b.add(codes, b.mul(lane, e.int64(4)))
            target = b.add(out, b.mul(group, e.int64(4 * GROUP)))
            for quad in range(8):
                half = quad * len(scales) // 8
                scale, *minimum = (
                    e.splat(b.extract_element(part[half], ir.Constant(I32, 0)), 4) for part in (scales, minima) if part
                )
                found = _quad(e, inside, codes, layout, quad, lanes=1)
                numbers = b.zext(b.bitcast(found, vector(I8, 4)), vector(I32, 4))
                numbers = b.sub(numbers, e.constant(I32, layout.zero, 4))
                value = b.fmul(b.sitofp(numbers, vector(F32, 4)), scale)
                e.store(target, b.fadd(value, minimum[0]) if minimum else value, 16 * quad)


def _unpack_grid(e: Emitter, grid: GridGroup, lane: Any, out: Any, group: Any) -> None:
    """Write a group of row `lane`. All 16 rows are decoded: this is slow, but such embedding tables are rare."""
    b, picked = e.b, e.b.trunc(lane, I32)
    target = b.add(out, b.mul(group, e.int64(4 * GROUP)))
    scales = [e.splat(b.extract_element(part, picked), 4) for part in grid.scales()]
    for quad in range(8):
        numbers = b.bitcast(b.extract_element(grid.quad(quad), picked), vector(I8, 4))
        numbers = b.sub(b.zext(numbers, vector(I32, 4)), e.constant(I32, grid.layout.zero, 4))
        value = b.fmul(b.sitofp(numbers, vector(F32, 4)), scales[quad * len(scales) // 8])
        for at, weight in enumerate(grid.layout.order[4 * quad : 4 * quad + 4]):
            e.store(target, b.extract_element(value, ir.Constant(I32, at)), 4 * weight)


def make_embedding(KIND: int) -> Any:
    def packed_embedding(entry: Any, thread: int, threads: int) -> None:
        given = read(EmbeddingArguments, entry)
        rows, ids, groups = step_number(entry, given.rows_from), int64_at(given.token_ids), given.columns >> 5
        for row in range(rows * thread // threads, rows * (thread + 1) // threads):
            token = ids[row]
            target = given.out + row * given.row_bytes
            if 0 <= token < given.rows:
                _unpack_row(KIND, given.weights + (token >> 4) * given.tile_bytes, token & 15, target, groups)
            else:
                values = float32_at(target)
                for index in range(groups * 32):
                    values[index] = float("nan")

    return packed_embedding
