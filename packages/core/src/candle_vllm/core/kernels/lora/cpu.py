# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
"""What adapters add, as compiled CPU operations: `shrink`, and `expand` behind a barrier; step 6 of a request's life.

Weights are read once for all rows of a group, up to 8 of which meet a vector of them at a time. In `shrink` threads
share blocks of ranks, quarters of the columns and runs of rows; in `expand` they share columns, so that what a row gets
from several adapters comes in their order. Sums have one order, whatever else is in the step: in `shrink`, two chains
over the steps of a quarter, then the quarters; in `expand` one chain over the ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from candle_vllm.core.kernels.activation_rows import RowForm
from candle_vllm.core.kernels.cpu_runtime.emit import F32, I32, I64, Emitter, vector
from candle_vllm.core.kernels.cpu_runtime.level import LANES, Isa
from candle_vllm.core.kernels.cpu_runtime.primitives import (
    float32_at,
    float_from_bits,
    int64_at,
    read,
    step_number,
)
from candle_vllm.core.kernels.cpu_runtime.tiles import stack_bytes
from candle_vllm.core.kernels.lora.layout import (
    BEGIN,
    BIAS,
    BLOCK_BYTES,
    FULL,
    HEAD,
    LESS,
    MATRIX,
    OFFSET,
    PANEL_BYTES,
    PART,
    ROWS,
    SCALE,
    STEPS,
    ExpandArguments,
    ShrinkArguments,
)

_RUN = 32
"""Rows of a unit of work of `shrink`: they meet a quarter of a block, which stays in the first-level cache."""

_VECTOR = 4 * LANES

_AHEAD = 2048
"""Bytes of weights that are asked for ahead: runs of them are too short for a CPU to see coming."""


def _dot(e: Emitter, form: RowForm, isa: Isa, total: Any, x: Any, weights: Any) -> Any:
    """One step more of 16 sums; x and the weights are <16 x i32> of bfloat16 pairs, or floats."""
    if form is RowForm.BF16:
        return e.dot_bf16(total, x, weights, isa)
    return e.fma(x, weights, total)


def _wide(isa: Isa) -> bool:
    return bool(isa & (Isa.VNNI | Isa.BF16))  # both are of AVX-512, which has 32 long registers


# ---- x A^T -----------------------------------------------------------------------------------------------------------


def _repeated(e: Emitter, element: ir.Type, address: Any, offset: int, height: int) -> Any:
    """The neighbouring 16 / height elements at an address, in turns."""
    count = LANES // height
    if count == 1:
        return e.splat(e.load(address, element, offset))
    few = e.load(address, vector(element, count), offset)
    order = ir.Constant(vector(I32), [lane % count for lane in range(LANES)])
    return e.b.shuffle_vector(few, few, order)


@intrinsic(prefer_literal=True)
def _shrink_rows(
    _: Any, form: Any, isa: Any, height: Any, block: Any, weights: Any, inputs: Any, at: Any, outputs: Any, steps: Any
) -> Any:
    """A quarter of a block of `height` ranks times `block` rows: 16 sums each.

    inputs, outputs: addresses of int64 [block], where the rows' inputs begin, `at` bytes before what is read, and where
    their sums go.
    """
    kind, features = RowForm(form.literal_value), Isa(isa.literal_value)
    ranks, count = height.literal_value, block.literal_value
    element = I32 if kind is RowForm.BF16 else F32
    chains = 1 if kind is RowForm.BF16 and ranks == 4 else 2  # of that one, a quarter may be one step
    x_bytes = 4 * LANES // ranks
    rows = count if _wide(features) else min(count, 2)

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        e = Emitter(b)
        at_weights, at_inputs, offset, at_outputs, number = args[4:]
        sources = [b.add(e.load(at_inputs, I64, 8 * row), offset) for row in range(count)]
        for first in range(0, count, rows):

            def body(index: Any, totals: list[Any], first: int = first) -> list[Any]:
                base = b.add(at_weights, b.mul(index, e.int64(_VECTOR * chains)))
                moved = b.mul(index, e.int64(x_bytes * chains))
                totals = list(totals)
                for chain in range(chains):
                    e.prefetch(base, _VECTOR * chain + _AHEAD)
                    loaded = e.load(base, vector(element), _VECTOR * chain)
                    for row in range(rows):
                        x = _repeated(e, element, b.add(sources[first + row], moved), x_bytes * chain, ranks)
                        place = row * chains + chain
                        totals[place] = _dot(e, kind, features, totals[place], x, loaded)
                return totals

            sums = e.loop(b.sdiv(number, e.int64(chains)), [e.zeros(F32)] * (rows * chains), body)
            for row in range(rows):
                total = sums[row * chains] if chains == 1 else b.fadd(*sums[row * chains : row * chains + 2])
                e.store(e.load(at_outputs, I64, 8 * (first + row)), total)
        return context.get_dummy_value()

    return types.void(form, isa, height, block, *[types.int64] * 5), code


@intrinsic
def _ask(_: Any, address: Any) -> Any:
    """Asks for `_AHEAD` bytes that will be read; what is behind the end of memory does no harm."""

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        for offset in range(0, _AHEAD, _VECTOR):
            Emitter(b).prefetch(args[0], offset)
        return context.get_dummy_value()

    return types.void(types.int64), code


@njit
def count_blocks(ranks: int) -> int:
    return (ranks >> 4) + (ranks >> 3 & 1) + (ranks >> 2 & 1)


@njit
def _height(ranks: int, block: int) -> int:
    """Ranks of a block."""
    if block < ranks >> 4:
        return 16
    if block == ranks >> 4 and ranks & 8:
        return 8
    return 4


def make_unit(FORM: int, ISA: int) -> Any:
    """A function that multiplies a quarter of a block by up to 8 rows."""

    @njit
    def unit(weights, ranks, block, quarter, inputs, outputs, count, x_bytes):
        """A quarter of a block for up to 8 rows."""
        height = _height(ranks, block)
        part = x_bytes >> 2  # bytes of a quarter of a row
        steps = part * height >> 6
        before = 16 * block - (8 if height == 4 and ranks & 8 else 0)
        at = weights + before * x_bytes + quarter * steps * 64
        if height == 16:
            if count > 4:
                _shrink_rows(FORM, ISA, 16, 8, at, inputs, quarter * part, outputs, steps)
            elif count > 1:
                _shrink_rows(FORM, ISA, 16, 4, at, inputs, quarter * part, outputs, steps)
            else:
                _shrink_rows(FORM, ISA, 16, 1, at, inputs, quarter * part, outputs, steps)
        elif height == 8:
            if count > 4:
                _shrink_rows(FORM, ISA, 8, 8, at, inputs, quarter * part, outputs, steps)
            elif count > 1:
                _shrink_rows(FORM, ISA, 8, 4, at, inputs, quarter * part, outputs, steps)
            else:
                _shrink_rows(FORM, ISA, 8, 1, at, inputs, quarter * part, outputs, steps)
        elif count > 4:
            _shrink_rows(FORM, ISA, 4, 8, at, inputs, quarter * part, outputs, steps)
        elif count > 1:
            _shrink_rows(FORM, ISA, 4, 4, at, inputs, quarter * part, outputs, steps)
        else:
            _shrink_rows(FORM, ISA, 4, 1, at, inputs, quarter * part, outputs, steps)

    return unit


def make_shrink(FORM: int, ISA: int) -> Callable[..., None]:
    """The operation for a type of numbers."""
    unit, RUN = make_unit(FORM, ISA), _RUN

    def shrink(row, thread, threads):
        given = read(ShrinkArguments, row)
        groups = step_number(row, given.groups_from)
        starts, tables = int64_at(given.starts), int64_at(given.tables)
        total = 0
        for group in range(groups):
            about = int64_at(tables[group])[given.place]
            if about != 0:
                runs = (starts[group + 1] - starts[group] + RUN - 1) // RUN
                total += 4 * count_blocks(int64_at(about)[1]) * runs
        first, last = total * thread // threads, total * (thread + 1) // threads
        if first == last:
            return
        memory = stack_bytes(128)
        inputs, outputs = int64_at(memory), int64_at(memory + 64)
        before = 0
        for group in range(groups):
            about = int64_at(tables[group])[given.place]
            if about == 0 or before >= last:
                continue
            begin, end = starts[group], starts[group + 1]
            ranks = int64_at(about)[1]
            blocks = count_blocks(ranks)
            units = 4 * blocks * ((end - begin + RUN - 1) // RUN)
            if group + 1 < groups and before + units < last:
                following = int64_at(tables[group + 1])[given.place]
                if following != 0:
                    _ask(int64_at(following)[0])
            for number in range(max(first - before, 0), min(last - before, units)):
                run, rest = number // (4 * blocks), number % (4 * blocks)
                block, quarter = rest >> 2, rest & 3
                entry = begin + run * RUN
                stop = min(entry + RUN, end)
                while entry < stop:
                    count = min(stop - entry, 8)
                    for index in range(8):
                        source = entry + min(index, count - 1)
                        inputs[index] = given.x + source * given.x_bytes
                        sums = given.h + begin * given.h_bytes + (source - begin) * blocks * BLOCK_BYTES
                        outputs[index] = sums + (block * 4 + quarter) * 64
                    unit(int64_at(about)[0], ranks, block, quarter, memory, memory + 64, count, given.x_bytes)
                    entry += count
            before += units

    return shrink


# ---- h B^T -----------------------------------------------------------------------------------------------------------


@intrinsic(prefer_literal=True)
def _fold(_: Any, height: Any, sums: Any, target: Any) -> Any:
    """The quarters of a block's sums, and the shares of each rank's, added up: `height` floats at `target`."""
    ranks = height.literal_value

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        e = Emitter(b)
        quarters = [e.load(args[1], vector(F32), _VECTOR * quarter) for quarter in range(4)]
        value = b.fadd(b.fadd(quarters[0], quarters[1]), b.fadd(quarters[2], quarters[3]))
        lanes = LANES
        while lanes > ranks:
            lanes //= 2
            even, odd = (
                b.shuffle_vector(value, value, ir.Constant(vector(I32, lanes), [2 * n + start for n in range(lanes)]))
                for start in (0, 1)
            )
            value = b.fadd(even, odd)
        e.store(args[2], value)
        return context.get_dummy_value()

    return types.void(height, types.int64, types.int64), code


@intrinsic(prefer_literal=True)
def _scaled(_: Any, form: Any, source: Any, scale: Any, target: Any) -> Any:
    """16 floats times a scale, as numbers of `form`."""
    kind = RowForm(form.literal_value)

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        e = Emitter(b)
        value = b.fmul(e.load(args[1], vector(F32)), e.splat(args[2]))
        e.store(args[3], e.float_to_bf16(value) if kind is RowForm.BF16 else value)
        return context.get_dummy_value()

    return types.void(form, types.int64, types.float32, types.int64), code


@intrinsic(prefer_literal=True)
def _expand_rows(
    _: Any,
    form: Any,
    isa: Any,
    block: Any,
    tiles: Any,
    onto: Any,
    weights: Any,
    places: Any,
    at: Any,
    steps: Any,
    out: Any,
) -> Any:
    """`tiles` times 16 neighbouring rows of B in a panel times `block` rows of sums.

    places: address of int64 [block], where the rows' numbers begin; behind 64 bytes, of their float32 scales, and of
    int64 [block], where their results begin, `at` bytes before these. Where `onto`, the products times the scales are
    added there; else they are written to `out`, float32 [tiles, block, 16].
    """
    kind, features = RowForm(form.literal_value), Isa(isa.literal_value)
    count, width, added = block.literal_value, tiles.literal_value, bool(onto.literal_value)
    element = I32 if kind is RowForm.BF16 else F32
    rows = count if _wide(features) else min(count, 4)

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        e = Emitter(b)
        at_weights, at_places, offset, number, at_out = args[5:]
        sources = [e.load(at_places, I64, 8 * row) for row in range(count)]
        for first in range(0, count, rows):

            def body(index: Any, totals: list[Any], first: int = first) -> list[Any]:
                base, moved = b.add(at_weights, b.mul(index, e.int64(PANEL_BYTES))), b.mul(index, e.int64(4))
                loaded = []
                for tile in range(width):
                    e.prefetch(base, _VECTOR * tile + _AHEAD)
                    loaded.append(e.load(base, vector(element), _VECTOR * tile))
                totals = list(totals)
                for row in range(rows):
                    x = e.splat(e.load(b.add(sources[first + row], moved), element))
                    for tile in range(width):
                        place = row * width + tile
                        totals[place] = _dot(e, kind, features, totals[place], x, loaded[tile])
                return totals

            sums = e.loop_or_skip(number, [e.zeros(F32)] * (rows * width), body)
            for row in range(rows):
                if not added:
                    for tile in range(width):
                        e.store(at_out, sums[row * width + tile], (tile * count + first + row) * _VECTOR)
                    continue
                scale = e.splat(e.load(at_places, F32, 64 + 4 * (first + row)))
                target = b.add(e.load(at_places, I64, 128 + 8 * (first + row)), offset)
                for tile in range(width):
                    total = e.fma(scale, sums[row * width + tile], e.load(target, vector(F32), _VECTOR * tile))
                    e.store(target, total, _VECTOR * tile)
        return context.get_dummy_value()

    return types.void(form, isa, block, tiles, onto, *[types.int64] * 5), code


@intrinsic
def _add_16(_: Any, out: Any, sums: Any, scale: Any, bias: Any, less: Any, base: Any) -> Any:
    """out += scale * (sums + bias + less * base), of 16 floats; bias, less and base are 0 where there are none."""

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        e = Emitter(b)
        zeros = e.zeros(F32)

        def or_zeros(address: Any, otherwise: Any) -> Any:
            there = b.icmp_signed("!=", address, e.int64(0))
            return b.select(there, e.load(b.select(there, address, otherwise), vector(F32)), zeros)

        at_out, at_sums, factor, at_bias, at_less, at_base = args
        value = b.fadd(e.load(at_sums, vector(F32)), or_zeros(at_bias, at_sums))
        value = e.fma(or_zeros(at_less, at_sums), or_zeros(at_base, at_sums), value)
        e.store(at_out, e.fma(e.splat(factor), value, e.load(at_out, vector(F32))))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32, *[types.int64] * 3), code


@njit
def _copy(source: int, target: int, count: int) -> None:
    values, copies = float32_at(source), float32_at(target)
    for index in range(count):
        copies[index] = values[index]


@njit
def _add(out: int, sums: int, scale: float, bias: int, less: int, base: int, lanes: int, spare: int) -> None:
    """`_add_16` of the first lanes; `spare` is the address of 4 times 16 floats."""
    if lanes >= 16:
        _add_16(out, sums, scale, bias, less, base)
        return
    _copy(out, spare, lanes)
    if bias != 0:
        _copy(bias, spare + 64, lanes)
        bias = spare + 64
    if less != 0:
        _copy(less, spare + 128, lanes)
        _copy(base, spare + 192, lanes)
        less, base = spare + 128, spare + 192
    _add_16(spare, sums, scale, bias, less, base)
    _copy(spare, out, lanes)


@njit
def _spread(row: int, given: Any, first: int, last: int) -> None:
    """The model's own products, of some columns, to where adapters' are added."""
    for t in range(step_number(row, given.rows_from)):
        source = float32_at(given.base + t * given.base_bytes)
        target = float32_at(given.out + t * given.row_bytes)
        bias = float32_at(given.bias)
        for column in range(first, last):
            value = source[column]
            if given.bias != 0:
                value += bias[column]
            if given.accumulate != 0:
                value += target[column]
            target[column] = value


def make_parts(FORM: int, ISA: int) -> Any:
    """A function that adds what an adapter has for 8, 4, 2 or 1 rows of a product."""

    WIDE = int(_wide(Isa(ISA)))

    @njit
    def add_columns(part, memory, count, first, last):
        """A part's columns first .. last, of the part."""
        scales, targets, bases, sums = memory + 64, memory + 128, memory + 192, memory + 256
        spare, steps = sums + 512, int64_at(part)[STEPS]
        weights, begins = int64_at(part)[MATRIX], 4 * int64_at(part)[BEGIN]
        bias, less = int64_at(part)[BIAS], int64_at(part)[LESS]
        plain = bias == 0 and less == 0
        column = first
        while column < last:
            inside = column & 63  # of a panel
            at = weights + (column - inside) * 4 * steps + 4 * inside
            left, to = min(64 - inside, last - column), begins + 4 * column
            if plain and left >= 64 and count == 1:
                _expand_rows(FORM, ISA, 1, 4, 1, at, memory, to, steps, sums)
                column += 64
                continue
            if plain and WIDE == 1 and left >= 32 and count == 8:
                _expand_rows(FORM, ISA, 8, 2, 1, at, memory, to, steps, sums)
                column += 32
                continue
            if plain and left >= 16:
                if count == 8:
                    _expand_rows(FORM, ISA, 8, 1, 1, at, memory, to, steps, sums)
                elif count == 4:
                    _expand_rows(FORM, ISA, 4, 1, 1, at, memory, to, steps, sums)
                elif count == 2:
                    _expand_rows(FORM, ISA, 2, 1, 1, at, memory, to, steps, sums)
                else:
                    _expand_rows(FORM, ISA, 1, 1, 1, at, memory, to, steps, sums)
                column += 16
                continue
            for index in range(count):
                _expand_rows(FORM, ISA, 1, 1, 0, at, memory + 8 * index, 0, steps, sums)
                at_bias = bias + 4 * column if bias != 0 else 0
                at_less = less + 4 * column if less != 0 else 0
                base = int64_at(bases)[index] + to if less != 0 else 0
                target = int64_at(targets)[index] + to
                _add(target, sums, float32_at(scales)[index], at_bias, at_less, base, left, spare)
            column += min(left, 16)

    @njit
    def add_parts(about, h, x, x_bytes, count, memory, most, first, last):
        """Adds columns first .. last.

        about: the adapter's description. h: address of the rows' sums. x, x_bytes: of their inputs. most: floats that
        a row's numbers take. memory: of 8 inputs, 8 scales, 8 targets and 8 addresses of the model's own products, 64
        bytes each, of which all but the inputs are given; 1,024 bytes; 2 times 8 times `most` floats.
        """
        wholes = memory + 1280
        factors = wholes + 8 * 4 * most
        ranks, parts = int64_at(about)[1], int64_at(about)[2]
        blocks = count_blocks(ranks)
        for index in range(count):
            for block in range(blocks):
                at, to = h + (index * blocks + block) * BLOCK_BYTES, wholes + 4 * (index * most + block * 16)
                height = _height(ranks, block)
                if height == 16:
                    _fold(16, at, to)
                elif height == 8:
                    _fold(8, at, to)
                elif ranks & 8:
                    _fold(4, at, to - 32)
                else:
                    _fold(4, at, to)
        for number in range(parts):
            part = about + 8 * (HEAD + PART * number)
            begins, rows = int64_at(part)[BEGIN], int64_at(part)[ROWS]
            low, high = max(first - begins, 0), min(last - begins, rows)
            if low >= high:
                continue
            scale = float_from_bits(int64_at(part)[SCALE])
            for index in range(count):
                if int64_at(part)[FULL] != 0:
                    int64_at(memory)[index] = x + index * x_bytes
                    continue
                to = factors + 4 * index * most
                int64_at(memory)[index] = to
                at = wholes + 4 * (index * most + int64_at(part)[OFFSET])
                taken = int64_at(part)[STEPS] * (2 if FORM == 0 else 1)
                for rank in range(0, taken, 16):
                    _scaled(FORM, at + 4 * rank, scale, to + (2 * rank if FORM == 0 else 4 * rank))
            add_columns(part, memory, count, low, high)

    return add_parts


def make_expand(FORM: int, ISA: int) -> Callable[..., None]:
    """The operation for a type of numbers."""
    add_parts = make_parts(FORM, ISA)

    def expand(row, thread, threads):
        given = read(ExpandArguments, row)
        tiles = (given.columns + 15) >> 4
        first, last = 16 * (tiles * thread // threads), min(16 * (tiles * (thread + 1) // threads), given.columns)
        if first >= last:
            return
        if given.base != 0:
            _spread(row, given, first, last)
        groups = step_number(row, given.groups_from)
        starts, tables = int64_at(given.starts), int64_at(given.tables)
        most = 0
        for group in range(groups):
            about = int64_at(tables[group])[given.place]
            if about != 0:
                most = max(most, int64_at(about)[1])
        most = (most + 31) & -16  # what is written in vectors may go beyond a rank
        memory = stack_bytes(4 * 64 + 1024 + 8 * 4 * most * 2 + 64)
        for group in range(groups):
            about = int64_at(tables[group])[given.place]
            if about == 0:
                continue
            begin, end = starts[group], starts[group + 1]
            blocks = count_blocks(int64_at(about)[1])
            if group + 1 < groups:
                following = int64_at(tables[group + 1])[given.place]
                if following != 0:
                    part = following + 8 * HEAD
                    column = max(first - int64_at(part)[BEGIN], 0) & -64
                    _ask(int64_at(part)[MATRIX] + column * 4 * int64_at(part)[STEPS])
            entry = begin
            while entry < end:
                count = end - entry
                count = 8 if count >= 8 else 4 if count >= 4 else 2 if count >= 2 else 1
                for index in range(count):
                    place = int64_at(given.rows)[entry + index]
                    float32_at(memory + 64)[index] = float32_at(given.scales)[entry + index]
                    int64_at(memory + 128)[index] = given.out + place * given.row_bytes
                    int64_at(memory + 192)[index] = given.base + place * given.base_bytes
                h = given.h + begin * given.h_bytes + (entry - begin) * blocks * BLOCK_BYTES
                x = given.x + entry * given.x_bytes
                add_parts(about, h, x, given.x_bytes, count, memory, most, first, last)
                entry += count

    return expand
