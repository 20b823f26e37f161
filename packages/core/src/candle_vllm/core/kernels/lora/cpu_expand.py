# SPDX-License-Identifier: MIT
"""`expand`: a compiled CPU operation that multiplies the sums of `shrink` by B, after the model's product, if that is
its nested operation.

Terms: see `layout.py`. A thread adds adapters to the columns of the model's product that it computed itself. If another
thread has not finished its share of `shrink` soon, this thread computes the share too, and writes the same values.
Threads divide columns, so a row's adapters are added in order, and each sum runs in the order of the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from numba import njit

from candle_vllm.core.kernels.cpu_runtime.emit import F32, I32, I64, Emitter, Float, Int, emitted, vector
from candle_vllm.core.kernels.cpu_runtime.level import LANES, Isa
from candle_vllm.core.kernels.cpu_runtime.operation import IS_X86, RUNS_BYTES
from candle_vllm.core.kernels.cpu_runtime.primitives import (
    call_operation,
    cpu_relax,
    float32_at,
    inner_row,
    int64_at,
    load_acquire,
    read,
    step_number,
)
from candle_vllm.core.kernels.cpu_runtime.tiles import add_run, no_runs, stack_bytes
from candle_vllm.core.kernels.lora import layout
from candle_vllm.core.kernels.lora.cpu_shrink import (
    FOLDED,
    VECTOR,
    added,
    are_shared,
    ask_ahead,
    count_blocks,
    jump_to,
    make_fold,
    scales_of,
    widened,
    zeros_of,
)

_PATIENCE = 1024  # pauses, some 50 us: about the time of a thread's share of the largest `shrink`
_FACTORS, _SUMS = 320, 384
_WHOLES = _SUMS + 1024
"""Offsets in the memory of `make_parts`: scales of integer factors; sums of tiles; sums of ranks."""

PARTS_MEMORY = _WHOLES + 64


def _emit_expand(e: Emitter, form: layout.NumberForm, isa: Isa, count: int, width: int, onto: bool, given: Any) -> None:
    """Emit the code of `_expand_rows` for `count` rows and `width` tiles."""
    b, (at_weights, at_scales, at_places, offset, number, at_out, end, jump) = e.b, given
    rows, whole = count if isa.wide else min(count, 4), form is layout.NumberForm.I8
    kind, moves = (I32, 2) if whole else (F32, 4)
    sources = [e.load(at_places, I64, 8 * row) for row in range(count)]
    for first in range(0, count, rows):

        def body(index: Any, totals: list[Any], first: int = first) -> list[Any]:
            base = b.add(at_weights, b.mul(index, e.int64(layout.PANEL_BYTES)))
            moved, totals = b.mul(index, e.int64(moves * form.per_step)), list(totals)
            ask_ahead(e, base, layout.PANEL_BYTES if form is layout.NumberForm.I8 else VECTOR * width, end, jump)
            for part, weights in _parts(e, form, base, width):
                for row in range(rows):
                    x = e.splat(e.load(b.add(sources[first + row], moved), kind, 4 * part))
                    for tile in range(width):
                        place = row * width + tile
                        totals[place] = added(e, form, isa, x, weights[tile], totals[place])
            return totals

        sums = e.loop_or_skip(number, [zeros_of(e, form)] * (rows * width), body)
        if whole:
            some = b.icmp_signed(">", number, e.int64(0))  # a part with only a bias has no ranks
            at = b.select(some, at_scales, at_places)
            scales = [b.select(some, scales_of(e, at, 2 * LANES * tile), e.zeros(F32)) for tile in range(width)]
            factors = [e.splat(e.load(at_places, F32, _FACTORS + 8 * (first + row))) for row in range(rows)]
            sums = [
                b.fmul(b.fmul(b.sitofp(total, vector(F32)), scales[place % width]), factors[place // width])
                for place, total in enumerate(sums)
            ]
        for row in range(rows):
            if not onto:
                for tile in range(width):
                    e.store(at_out, sums[row * width + tile], (tile * count + first + row) * VECTOR)
                continue
            scale = e.splat(e.load(at_places, F32, 64 + 4 * (first + row)))
            target = b.add(e.load(at_places, I64, 128 + 8 * (first + row)), offset)
            for tile in range(width):
                total = e.fma(scale, sums[row * width + tile], e.load(target, vector(F32), VECTOR * tile))
                e.store(target, total, VECTOR * tile)


def _parts(e: Emitter, form: layout.NumberForm, base: Any, width: int) -> Iterator[tuple[int, list[Any]]]:
    """Yield each rank of a step of B (with I8, each pair of ranks), and its weights in `width` tiles."""
    if form is not layout.NumberForm.I8:
        tiles = [widened(e, form, base, VECTOR * tile) for tile in range(width)]
        yield from enumerate(map(list, zip(*tiles, strict=True)))
        return
    for part in range(form.per_step // 2):
        yield part, [widened(e, form, base, 2 * (layout.PANEL * part + LANES * tile))[0] for tile in range(width)]


_KINDS = ((8, 2, 1), (8, 1, 1), (4, 1, 1), (2, 1, 1), (1, 4, 1), (1, 1, 1), (1, 1, 0))
"""Variants of `_expand_rows`: rows, tiles, and whether the products are added to the result."""


@emitted
def _expand_rows(
    e: Emitter,
    form: layout.NumberForm,
    isa: Isa,
    rows: Int,
    tiles: Int,
    onto: Int,
    weights: Int,
    scales: Int,
    places: Int,
    at: Int,
    steps: Int,
    out: Int,
    end: Int,
    jump: Int,
) -> None:
    """Multiply `tiles` * 16 neighbouring rows of B in a panel by `rows` rows of factors; a variant of `_KINDS`.

    scales: address of the scales of B's integers. places: address of int64 [rows], addresses of the rows' factors; 64
    bytes later float32 [rows], the rows' scales; 128 bytes later int64 [rows], the addresses of the results less the
    offset `at`; `_FACTORS` bytes later the scales of integer factors, 8 bytes apart. With `onto`, products times scales
    are added to the results; otherwise products are written to `out`, float32 [tiles, rows, 16]. end, jump: see
    `ask_ahead`.
    """
    b = e.b
    cases = {
        16 * many + 2 * wide + added: lambda many=many, wide=wide, added=added: _emit_expand(
            e, form, isa, many, wide, bool(added), [weights, scales, places, at, steps, out, end, jump]
        )
        for many, wide, added in _KINDS
    }
    e.choose(b.add(b.add(b.shl(rows, e.int64(4)), b.shl(tiles, e.int64(1))), onto), cases)


@emitted
def _add_16(e: Emitter, out: Int, sums: Int, scale: Float, bias: Int, less: Int, base: Int) -> None:
    """Add scale * (sums + bias + less * base) to 16 floats at `out`; address 0 for an absent bias, less or base."""
    b = e.b
    zeros = e.zeros(F32)

    def or_zeros(address: Any, otherwise: Any) -> Any:
        there = b.icmp_signed("!=", address, e.int64(0))
        return b.select(there, e.load(b.select(there, address, otherwise), vector(F32)), zeros)

    value = b.fadd(e.load(sums, vector(F32)), or_zeros(bias, sums))
    value = e.fma(or_zeros(less, sums), or_zeros(base, sums), value)
    e.store(out, e.fma(e.splat(scale), value, e.load(out, vector(F32))))


@njit
def _copy(source: int, target: int, count: int) -> None:
    values, copies = float32_at(source), float32_at(target)
    for index in range(count):
        copies[index] = values[index]


@njit
def _add(out: int, sums: int, scale: float, bias: int, less: int, base: int, lanes: int, spare: int) -> None:
    """Do what `_add_16` does for the first `lanes` floats; `spare` is the address of 64 floats of scratch memory."""
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
    """Write columns first .. last of the model's products, plus bias and old values, to the result, before adapters."""
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


def _make_columns(FORM: int, ISA: int) -> Any:
    """Return a function that adds an adapter's terms to columns of a part, for 8, 4, 2 or 1 rows of a product."""

    form, WIDE = layout.NumberForm(FORM), int(Isa(ISA).wide)
    ROW_BYTES, SCALES = form.row_bytes, form.panel_scales

    @njit
    def add_columns(part, memory, count, first, last, onward):
        """Add the terms in columns first .. last of a part; onward: address of the weights that are read next, or 0."""
        scales, targets, bases, sums = memory + 64, memory + 128, memory + 192, memory + _SUMS
        spare, steps = sums + 512, int64_at(part)[layout.STEPS]
        weights, begins = int64_at(part)[layout.MATRIX], 4 * int64_at(part)[layout.BEGIN]
        bias, less = int64_at(part)[layout.BIAS], int64_at(part)[layout.LESS]
        plain = bias == 0 and less == 0
        column = first
        end = weights + (last + 63 >> 6) * (layout.PANEL_BYTES * steps + SCALES)
        jump = jump_to(onward, end)
        while column < last:
            inside = column & 63  # the column's index in its panel
            panel = weights + (column >> 6) * (layout.PANEL_BYTES * steps + SCALES)
            at, at_scales = panel + SCALES + ROW_BYTES * inside, panel + 2 * inside
            left, to = min(64 - inside, last - column), begins + 4 * column
            if plain and left >= 16:
                tiles = 4 if count == 1 and left >= 64 else 2 if WIDE == 1 and count == 8 and left >= 32 else 1
                _expand_rows(FORM, ISA, count, tiles, 1, at, at_scales, memory, to, steps, sums, end, jump)
                column += 16 * tiles
                continue
            for index in range(count):
                _expand_rows(FORM, ISA, 1, 1, 0, at, at_scales, memory + 8 * index, 0, steps, sums, end, jump)
                at_bias = bias + 4 * column if bias != 0 else 0
                at_less = less + 4 * column if less != 0 else 0
                base = int64_at(bases)[index] + to if less != 0 else 0
                target = int64_at(targets)[index] + to
                _add(target, sums, float32_at(scales)[index], at_bias, at_less, base, left, spare)
            column += min(left, 16)

    return add_columns


@njit
def _panel_of(about: int, column: int, scales: int) -> int:
    """Return the address of the weights for a column, or 0; `about` may be 0. scales: bytes of a panel's scales."""
    for number in range(int64_at(about)[2] if about != 0 else 0):
        part = about + 8 * (layout.HEAD + layout.PART * number)
        inside = column - int64_at(part)[layout.BEGIN]
        if 0 <= inside < int64_at(part)[layout.ROWS] and int64_at(part)[layout.STEPS] != 0:
            weights = int64_at(part)[layout.MATRIX]
            return weights + (inside >> 6) * (layout.PANEL_BYTES * int64_at(part)[layout.STEPS] + scales)
    return 0


def make_parts(FORM: int, ISA: int) -> Any:
    """Return a function that adds an adapter to 8, 4, 2 or 1 rows of a product."""

    form = layout.NumberForm(FORM)
    MIXED, SCALES, fold_part = int(form.whole is not form), form.panel_scales, make_fold(FORM)
    add_columns = _make_columns(FORM, ISA)
    add_whole = _make_columns(int(form.whole), ISA) if form.whole is not form else add_columns

    @njit
    def add_parts(about, h, folded, count, memory, most, first, last, following):
        """Add an adapter's terms to columns first .. last; `following`: the next adapter's description, or 0.

        about: the adapter's description. h: address of the rows' sums, or, if `folded`, of their factors
        (`cpu_shrink.py`). most: maximum number of ranks, with padding. memory: address of lines of 64 bytes, for 8 rows
        each: addresses of factors, which this function writes; scales, addresses of results, of own products and of
        inputs, from the caller. Then scratch memory up to `PARTS_MEMORY` bytes, and 2 * 8 * `most` floats.
        """
        wholes = memory + _WHOLES
        factors = wholes + 8 * 4 * most
        ranks, parts = int64_at(about)[1], int64_at(about)[2]
        row_bytes = count_blocks(ranks) * layout.BLOCK_BYTES
        for number in range(parts):
            part = about + 8 * (layout.HEAD + layout.PART * number)
            begins, rows = int64_at(part)[layout.BEGIN], int64_at(part)[layout.ROWS]
            low, high = max(first - begins, 0), min(last - begins, rows)
            if low >= high:
                continue
            ends = high == last - begins
            onward = _panel_of(following if ends else about, first if ends else begins + rows, SCALES)
            for index in range(count):
                if int64_at(part)[layout.FULL] != 0:
                    int64_at(memory)[index] = int64_at(memory + 256)[index]
                    continue
                if folded:
                    made = h + index * row_bytes
                    int64_at(memory)[index] = made + 4 * int64_at(part)[layout.OFFSET]
                    float32_at(memory + _FACTORS)[2 * index] = 0
                    if ranks != 0:
                        float32_at(memory + _FACTORS)[2 * index] = float32_at(made + 4 * ranks + FOLDED)[number]
                    continue
                to = factors + 4 * index * most
                int64_at(memory)[index] = to
                factor = fold_part(part, ranks, h + index * row_bytes, wholes + 4 * index * most, to)
                float32_at(memory + _FACTORS)[2 * index] = factor
            if MIXED == 1 and int64_at(part)[layout.FULL] != 0:
                add_whole(part, memory, count, low, high, 0)
            else:
                add_columns(part, memory, count, low, high, onward)

    return add_parts


def _make_list(FORM: int) -> Any:
    """Return a function that lists B's memory for some columns of an adapter site, to be prefetched."""
    SCALES = layout.NumberForm(FORM).panel_scales

    @njit
    def list_parts(tables, groups, place, first, last, runs):
        for group in range(groups):
            about = int64_at(tables[group])[place]
            for number in range(int64_at(about)[2] if about != 0 else 0):
                part = about + 8 * (layout.HEAD + layout.PART * number)
                begins = int64_at(part)[layout.BEGIN]
                low, high = max(first - begins, 0), min(last - begins, int64_at(part)[layout.ROWS])
                if low < high and int64_at(part)[layout.STEPS] != 0 and int64_at(part)[layout.FULL] == 0:
                    size = layout.PANEL_BYTES * int64_at(part)[layout.STEPS] + SCALES
                    weights = int64_at(part)[layout.MATRIX]
                    add_run(runs, weights + (low >> 6) * size, weights + (high + 63 >> 6) * size)

    return list_parts


def make_expand(FORM: int, ISA: int) -> Callable[..., None]:
    add_parts, INNER = make_parts(FORM, ISA), len(layout.ExpandArguments._fields)
    list_parts, RUNS = _make_list(FORM), RUNS_BYTES

    def expand(row, thread, threads):
        given = read(layout.ExpandArguments, row)
        tiles = (given.columns + 15) >> 4  # divided among threads as in linear operations
        first = given.first + 16 * (tiles * thread // threads)
        last = given.first + min(16 * (tiles * (thread + 1) // threads), given.columns)
        inner = inner_row(row, INNER)
        if inner != 0:
            if given.beside != 0:
                runs, many = given.beside + RUNS * thread, step_number(row, given.groups_from)
                no_runs(runs)
                if are_shared(int64_at(given.starts)[many], threads):
                    list_parts(int64_at(given.tables), many, given.place, first, last, runs)
            call_operation(int64_at(inner)[0], inner, thread, threads)
        if given.back != 0:
            before = row - given.back
            for other in range(threads):
                left = _PATIENCE
                while left > 0 and load_acquire(given.done + layout.DONE_BYTES * other) == 0:
                    cpu_relax(IS_X86)
                    left -= 1
                if left == 0:
                    call_operation(int64_at(before)[0], before, other, threads)
        if first >= last:
            return
        if given.base != 0:
            _spread(row, given, first, last)
        groups = step_number(row, given.groups_from)
        starts, tables = int64_at(given.starts), int64_at(given.tables)
        folded = given.back != 0 and are_shared(starts[groups], threads)
        most = 0
        for group in range(groups):
            about = int64_at(tables[group])[given.place]
            if about != 0:
                most = max(most, int64_at(about)[1])
        most = (most + 31) & -16  # vectors are written beyond the last rank
        memory = stack_bytes(PARTS_MEMORY + 8 * 4 * most * 2)
        for group in range(groups):
            about = int64_at(tables[group])[given.place]
            if about == 0:
                continue
            begin, end = starts[group], starts[group + 1]
            blocks = count_blocks(int64_at(about)[1])
            entry = begin
            while entry < end:
                count = end - entry
                count = 8 if count >= 8 else 4 if count >= 4 else 2 if count >= 2 else 1
                for index in range(count):
                    place = int64_at(given.rows)[entry + index]
                    float32_at(memory + 64)[index] = float32_at(given.scales)[entry + index]
                    int64_at(memory + 128)[index] = given.out + place * given.row_bytes
                    int64_at(memory + 192)[index] = given.base + place * given.base_bytes
                    int64_at(memory + 256)[index] = given.x + place * given.x_bytes
                h = given.h + begin * given.h_bytes + (entry - begin) * blocks * layout.BLOCK_BYTES
                entry += count
                following = int64_at(tables[group + 1])[given.place] if entry == end and group + 1 < groups else 0
                add_parts(about, h, folded, count, memory, most, first, last, following)

    return expand
