# SPDX-License-Identifier: MIT
"""`shrink`: multiply input rows by A, in a compiled CPU operation next to the model's own product.

Terms (entry, group, quarter, block, step): see `layout.py`. A thread never waits. A vector of weights is multiplied by
up to 8 rows at a time. With many entries (`are_shared`) threads divide the entries, and scale the sums to the
**factors** that `expand` multiplies by B. Then, if all rows have one adapter, a thread reads mostly input rows that it
wrote itself; rows that another core wrote are slower to read. With few entries, threads divide runs of rows, quarters
and blocks instead, and `expand` scales the sums. The order of summation is fixed: one or two partial sums over the
steps of a quarter, then the quarters, then the lanes of a rank. 8-bit weights are multiplied by 16-bit inputs; the sums
are exact within a `SPAN`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit

from candle_vllm.core.kernels.cpu_runtime.emit import (
    F32,
    I8,
    I16,
    I32,
    I64,
    SHIFTER,
    Emitter,
    Float,
    Int,
    emitted,
    vector,
)
from candle_vllm.core.kernels.cpu_runtime.level import LANES, Isa
from candle_vllm.core.kernels.cpu_runtime.primitives import (
    float32_at,
    float_from_bits,
    int64_at,
    read,
    step_number,
    store_release,
)
from candle_vllm.core.kernels.cpu_runtime.tiles import stack_bytes
from candle_vllm.core.kernels.lora import layout

_RUN = 32
"""Rows of a run if there are few entries: a thread multiplies a run by its blocks of a quarter, then of the next."""

VECTOR = 4 * LANES

_SMALLEST = 0x0D800000  # bits of 2^-100: if all values are smaller, their scale is 0

AHEAD = 2048
"""Prefetch distance in bytes: weights of an adapter are too short for the hardware prefetcher. At the end of an
adapter's weights, the start of the next adapter's weights is prefetched."""


def widened(e: Emitter, form: layout.NumberForm, address: Any, offset: int) -> list[Any]:
    """Load a vector of weights: F32 as <16 x float>, BF16 pairs as two <16 x float>, I8 as <32 x i16>.

    Floats are multiplied by fused multiply-adds in float32: every CPU has the same sums, and on a Xeon with AMX the
    instruction for pairs of bfloat16 is slower.
    """
    if form is layout.NumberForm.F32:
        return [e.load(address, vector(F32), offset)]
    if form is layout.NumberForm.I8:
        return [e.b.sext(e.load(address, vector(I8, 2 * LANES), offset), vector(I16, 2 * LANES))]
    return e.widened_pairs(e.load(address, vector(I32), offset))


def added(e: Emitter, form: layout.NumberForm, isa: Isa, x: Any, weights: Any, total: Any) -> Any:
    """Return `total` plus the products of x and a vector from `widened`: floats, or <16 x i32> for 16-bit integers."""
    return e.dot_i16(total, x, weights, isa) if form is layout.NumberForm.I8 else e.fma(x, weights, total)


def zeros_of(e: Emitter, form: layout.NumberForm) -> Any:
    """Return the initial value of a sum for `added`."""
    return e.zeros(I32 if form is layout.NumberForm.I8 else F32)


@emitted
def in_16_bits(e: Emitter, lanes: int, source: Int, count: Int, most: Float, target: Int) -> Float:
    """Write floats as 16-bit integers, as `reference.in_16_bits` does, and return their scale.

    count: number of floats, a multiple of `lanes`. most: the integer for the largest magnitude.
    """
    b = e.b
    words, floats, vectors = vector(I32, lanes), vector(F32, lanes), b.sdiv(count, e.int64(lanes))

    def size(index: Any, state: list[Any]) -> list[Any]:
        bits = b.and_(e.load(b.add(source, b.mul(index, e.int64(4 * lanes))), words), e.constant(I32, 2**31 - 1, lanes))
        return [b.select(b.icmp_unsigned(">", bits, state[0]), bits, state[0])]

    (found,) = e.loop_or_skip(vectors, [e.zeros(I32, lanes)], size)
    bits = e.call(f"llvm.vector.reduce.umax.v{lanes}i32", I32, [found])
    tiny, zero = b.icmp_unsigned("<", bits, ir.Constant(I32, _SMALLEST)), ir.Constant(F32, 0.0)
    scale = b.select(tiny, zero, b.fdiv(b.bitcast(bits, F32), most))
    inverse = e.splat(b.select(tiny, zero, b.fdiv(ir.Constant(F32, 1.0), scale)), lanes)
    with e.each_or_skip(vectors) as index:
        value = b.fmul(e.load(b.add(source, b.mul(index, e.int64(4 * lanes))), floats), inverse)
        moved = b.bitcast(b.fadd(value, e.constant(F32, SHIFTER, lanes)), words)
        e.store(b.add(target, b.mul(index, e.int64(2 * lanes))), b.trunc(moved, vector(I16, lanes)))
    return scale


def scales_of(e: Emitter, address: Any, offset: int = 0) -> Any:
    """Load 16 scales, stored in bfloat16."""
    bits = e.b.zext(e.load(address, vector(I16), offset), vector(I32))
    return e.b.bitcast(e.b.shl(bits, e.constant(I32, 16)), vector(F32))


def ask_ahead(e: Emitter, base: Any, size: int, end: Any, jump: Any) -> None:
    """Prefetch `size` bytes `AHEAD` bytes after `base`; addresses from `end` on are moved by `jump` bytes."""
    at = e.b.add(base, e.int64(AHEAD))
    at = e.b.select(e.b.icmp_unsigned("<", at, end), at, e.b.add(at, jump))
    for offset in range(0, size, VECTOR):
        e.prefetch(at, offset)


@njit
def jump_to(onward: int, end: int) -> int:
    """Return the bytes from `end`, the end of some weights, to `onward`, which is read next; 0 if nothing is known."""
    return onward - end if onward != 0 else -AHEAD  # prefetches memory that is being read, which costs nothing


@emitted
def ask(e: Emitter, count: int, address: Int) -> None:
    """Prefetch `count` bytes; addresses beyond the end of memory do no harm."""
    for offset in range(0, count, VECTOR):
        e.prefetch(address, offset)


def _repeated(e: Emitter, kind: Any, address: Any, offset: int, height: int, parts: int) -> list[Any]:
    """Load the inputs for a vector of weights of `height` ranks: 16 / height neighbours, repeated for each rank."""
    count = LANES // height
    if count == 1:
        return [e.splat(e.load(address, kind, offset + 4 * part)) for part in range(parts)]
    few = e.load(address, vector(kind, count * parts), offset)
    orders = [[lane % count * parts + part for lane in range(LANES)] for part in range(parts)]
    return [e.b.shuffle_vector(few, few, ir.Constant(vector(I32), order)) for order in orders]


def _emit_shrink(e: Emitter, form: layout.NumberForm, isa: Isa, height: int, count: int, given: Any) -> None:
    """Emit the code of `_shrink_rows` for `height` ranks and `count` rows."""
    b, (at_weights, at_scales, at_inputs, offset, at_outputs, number, onto, end, jump) = e.b, given
    parts, whole = 2 if form is layout.NumberForm.BF16 else 1, form is layout.NumberForm.I8
    chains = 1 if form is not layout.NumberForm.F32 and height == 4 else 2  # partial sums; a quarter may have one step
    size, x_bytes = form.step_bytes, 4 * LANES // height * parts
    rows = count if isa.wide else min(count, 2)
    turns = chains
    if whole:  # integer sums are exact in any order
        turns = height // 4
        chains = max(1, min(turns, (8 if isa.wide else 4) // rows))
    kind = I32 if whole else F32
    sources = [b.add(e.load(at_inputs, I64, 8 * row), offset) for row in range(count)]
    for first in range(0, count, rows):

        def body(index: Any, totals: list[Any], first: int = first) -> list[Any]:
            base = b.add(at_weights, b.mul(index, e.int64(size * turns)))
            moved = b.mul(index, e.int64(x_bytes * turns))
            totals = list(totals)
            ask_ahead(e, base, size * turns, end, jump)
            for turn in range(turns):
                weights = widened(e, form, base, size * turn)
                for row in range(rows):
                    place = row * chains + turn % chains
                    found = _repeated(e, kind, b.add(sources[first + row], moved), x_bytes * turn, height, parts)
                    for x, part in zip(found, weights):
                        totals[place] = added(e, form, isa, x, part, totals[place])
            return totals

        sums = e.loop(b.sdiv(number, e.int64(turns)), [zeros_of(e, form)] * (rows * chains), body)
        for row in range(rows):
            total, *others = sums[row * chains : row * chains + chains]
            target = e.load(at_outputs, I64, 8 * (first + row))
            for other in others:
                total = b.add(total, other) if whole else b.fadd(total, other)
            if whole:
                factor = e.splat(e.load(at_inputs, F32, X_SCALES + 4 * (first + row)))
                before = b.select(b.icmp_signed("!=", onto, e.int64(0)), e.load(target, vector(F32)), e.zeros(F32))
                total = b.fmul(b.fmul(b.sitofp(total, vector(F32)), factor), scales_of(e, at_scales))
                total = b.fadd(before, total)
            e.store(target, total)


@emitted
def _shrink_rows(
    e: Emitter,
    form: layout.NumberForm,
    isa: Isa,
    height: Int,
    rows: Int,
    weights: Int,
    scales: Int,
    inputs: Int,
    at: Int,
    outputs: Int,
    steps: Int,
    onto: Int,
    end: Int,
    jump: Int,
) -> None:
    """Multiply `steps` vectors of a block of `height` ranks (4, 8 or 16) by 1, 4 or 8 rows: 16 sums for each row.

    inputs, outputs: addresses of int64 [rows]: addresses of the rows' inputs less the offset `at`, and of their sums.
    scales: address of the scales of integer weights; scales of integer inputs are `X_SCALES` bytes after `inputs`. With
    `onto`, which only I8 may have, sums are added to the old values. end, jump: see `ask_ahead`.
    """
    b = e.b
    cases = {
        16 * ranks + count: lambda ranks=ranks, count=count: _emit_shrink(
            e, form, isa, ranks, count, [weights, scales, inputs, at, outputs, steps, onto, end, jump]
        )
        for ranks in (16, 8, 4)
        for count in (8, 4, 1)
    }
    e.choose(b.add(b.shl(height, e.int64(4)), rows), cases)


@njit
def count_blocks(ranks: int) -> int:
    return (ranks >> 4) + (ranks >> 3 & 1) + (ranks >> 2 & 1)


@njit
def height_of(ranks: int, block: int) -> int:
    """Return the number of ranks in a block."""
    if block < ranks >> 4:
        return 16
    if block == ranks >> 4 and ranks & 8:
        return 8
    return 4


@njit
def ranks_before(ranks: int, block: int) -> int:
    """Return the number of ranks in the blocks before `block`."""
    return 16 * block - (8 if block > ranks >> 4 else 0)


SOURCES, RESULTS, X_SCALES, _CODES = 128, 192, 256, 320
"""Offsets in the memory of `make_run`, for 8 rows: addresses of inputs, addresses of sums, scales, 16-bit inputs."""

RUN_MEMORY = _CODES + 8 * 2 * layout.SPAN


def make_run(FORM: int, ISA: int) -> Any:
    """Return a function that multiplies a quarter of some blocks by up to 8 rows."""
    form = layout.NumberForm(FORM)
    ITEM, STEP, SCALES, WHOLE = form.bytes, form.step_bytes, form.block_scales, int(form is layout.NumberForm.I8)

    @njit
    def run(weights, ranks, quarter, first, last, count, x_bytes, memory, onward):
        """Multiply blocks first .. last of a quarter.

        memory: `RUN_MEMORY` bytes, with addresses of the inputs of `count` rows, and of 8 rows of sums (1 if `count` is
        1), to which spans are added one after the other. onward: address of the weights that are read after the last
        block of the last quarter, or 0.
        """
        columns, blocks = x_bytes >> 4, count_blocks(ranks)
        end = weights + 4 * (ranks * columns * ITEM + blocks * SCALES)
        jump = jump_to(onward, end)
        rows = 8 if count > 4 else 4 if count > 1 else 1  # if `count` is less, the last row is repeated
        inputs, outputs, scales = int64_at(memory), int64_at(memory + 64), float32_at(memory + X_SCALES)
        begin = 0
        while begin < columns:
            size = min(columns - begin, layout.SPAN) if WHOLE == 1 else columns
            for index in range(rows):
                if index >= count:
                    inputs[index] = inputs[count - 1]
                    scales[index] = scales[count - 1]
                    continue
                inputs[index] = int64_at(memory + SOURCES)[index] + 4 * (quarter * columns + begin)
                if WHOLE == 1:
                    codes = memory + _CODES + 2 * layout.SPAN * index
                    if size & 15 == 0:
                        scales[index] = in_16_bits(16, inputs[index], size, layout.MOST_16, codes)
                    else:
                        scales[index] = in_16_bits(8, inputs[index], size, layout.MOST_16, codes)
                    inputs[index] = codes
            for block in range(first, last):
                height = height_of(ranks, block)
                before = (quarter * ranks + ranks_before(ranks, block)) * columns * ITEM
                about = weights + before + (quarter * blocks + block) * SCALES
                at, steps = about + SCALES + begin * height * ITEM, size * height * ITEM // STEP
                for index in range(rows):
                    outputs[index] = int64_at(memory + RESULTS)[index] + (block * 4 + quarter) * 64
                _shrink_rows(FORM, ISA, height, rows, at, about, memory, 0, memory + 64, steps, begin, end, jump)
            begin += size

    return run


@emitted
def _fold(e: Emitter, height: Int, sums: Int, target: Int) -> None:
    """Add the sums of a block's quarters and, for each rank, of its lanes: write `height` floats to `target`."""
    b = e.b
    quarters = [e.load(sums, vector(F32), VECTOR * quarter) for quarter in range(4)]
    whole = b.fadd(b.fadd(quarters[0], quarters[1]), b.fadd(quarters[2], quarters[3]))

    def fold(ranks: int) -> None:
        value, lanes = whole, LANES
        while lanes > ranks:
            lanes //= 2
            pairs = [[2 * n + start for n in range(lanes)] for start in (0, 1)]
            even, odd = (b.shuffle_vector(value, value, ir.Constant(vector(I32, lanes), each)) for each in pairs)
            value = b.fadd(even, odd)
        e.store(target, value)

    e.choose(height, {ranks: lambda ranks=ranks: fold(ranks) for ranks in (16, 8, 4)})


@emitted
def _scaled(e: Emitter, source: Int, scale: Float, target: Int) -> None:
    """Write 16 floats times a scale."""
    e.store(target, e.b.fmul(e.load(source, vector(F32)), e.splat(scale)))


def make_fold(FORM: int) -> Any:
    """Return a function that converts sums to the factors of B."""
    form = layout.NumberForm(FORM)
    PER_STEP, WHOLE = form.per_step, int(form is layout.NumberForm.I8)

    @njit
    def fold_part(part, ranks, h, at, to):
        """Write a row's factors of B for a part's ranks to `to`: its sums (scratch memory at `at`) times its scale.

        With I8 the factors are 16-bit integers, and the part's scale times their scale is returned; otherwise 1.
        """
        begins, count = int64_at(part)[layout.OFFSET], int64_at(part)[layout.STEPS] * PER_STEP
        for block in range(begins >> 4, count_blocks(ranks)):
            before, height = ranks_before(ranks, block), height_of(ranks, block)
            if begins < before + height and before < begins + count:
                _fold(height, h + block * layout.BLOCK_BYTES, at + 4 * before)
        scale = float_from_bits(int64_at(part)[layout.SCALE])
        if WHOLE == 1:
            most = min(layout.MOST_16, np.float32(2**31 // 127 // max(count, 1)))  # sums with 8-bit B fit in 32 bits
            if count & 15 == 0:
                return scale * in_16_bits(16, at + 4 * begins, count, most, to)
            return scale * in_16_bits(4, at + 4 * begins, count, most, to)
        for rank in range(0, count, 16):
            _scaled(at + 4 * (begins + rank), scale, to + 4 * rank)
        return np.float32(1)

    return fold_part


@njit
def are_shared(entries: int, threads: int) -> bool:
    """Whether threads divide a step's entries, so that `shrink` writes factors instead of sums.

    Factors have 4 bytes of memory for each rank; the parts' scales are `FOLDED` bytes after the factors.
    """
    return entries >= 4 * threads


FOLDED = 64


def make_shrink(FORM: int, ISA: int) -> Callable[..., None]:
    multiply, fold_part, RUN = make_run(FORM, ISA), make_fold(FORM), _RUN

    @njit
    def fold_row(about, sums, h, memory, most):
        """Write the factors of B for a row's sums; memory: 2 times `most` floats."""
        ranks, made = int64_at(about)[1], memory + 4 * most
        for number in range(int64_at(about)[2]):
            part = about + 8 * (layout.HEAD + layout.PART * number)
            if int64_at(part)[layout.FULL] == 0 and int64_at(part)[layout.STEPS] != 0:
                factor = fold_part(part, ranks, sums, memory, made + 4 * int64_at(part)[layout.OFFSET])
                float32_at(made + 4 * ranks + FOLDED)[number] = factor
        for number in range(ranks):
            float32_at(h)[number] = float32_at(made)[number]
        for number in range(int64_at(about)[2] if ranks != 0 else 0):
            float32_at(h + 4 * ranks + FOLDED)[number] = float32_at(made + 4 * ranks + FOLDED)[number]

    def shrink(row, thread, threads):
        given = read(layout.ShrinkArguments, row)
        groups = step_number(row, given.groups_from)
        starts, tables = int64_at(given.starts), int64_at(given.tables)
        total, most, run_bytes, entries = 0, 0, 0, starts[groups]
        for group in range(groups):
            about = int64_at(tables[group])[given.place]
            if about != 0:
                ask(320, about + 64)  # the description, which `expand` reads
                runs = (starts[group + 1] - starts[group] + RUN - 1) // RUN
                total += 4 * count_blocks(int64_at(about)[1]) * runs
                most = max(most, int64_at(about)[1] + int64_at(about)[2])
                run_bytes = max(run_bytes, 8 * count_blocks(int64_at(about)[1]) * layout.BLOCK_BYTES)
        shared, first_entry, last_entry = are_shared(entries, threads), 0, entries
        if shared:
            first_entry, last_entry = entries * thread // threads, entries * (thread + 1) // threads
        first, last = total * thread // threads, total * (thread + 1) // threads
        most = (most + 63) & -16  # vectors are written beyond the last rank
        run = 8 if shared else RUN
        memory = stack_bytes(RUN_MEMORY + 8 * most + run_bytes)
        own = memory + RUN_MEMORY + 8 * most  # sums of this thread: another thread may compute the same entries
        sources, results = int64_at(memory + SOURCES), int64_at(memory + RESULTS)
        before = 0
        for group in range(groups):
            about = int64_at(tables[group])[given.place]
            if about == 0 or (not shared and before >= last):
                continue
            begin, end = starts[group], min(starts[group + 1], last_entry)
            ranks = int64_at(about)[1]
            blocks = count_blocks(ranks)
            for index in range(8):
                results[index] = own + index * blocks * layout.BLOCK_BYTES
            for entry in range(max(begin, first_entry), end, run):
                number, high = max(first - before, 0), min(last - before, 4 * blocks)
                before += 4 * blocks
                more = before < last
                if shared:
                    number, high, more = 0, 4 * blocks, end < last_entry
                onward = 0
                if number < high and entry + run >= end and more and group + 1 < groups:
                    following = int64_at(tables[group + 1])[given.place]
                    if following != 0:
                        onward = int64_at(following)[0]
                stop = min(entry + run, end)
                while number < high:
                    quarter = number // blocks
                    low, until = number - quarter * blocks, min(blocks, high - quarter * blocks)
                    for at in range(entry, stop, 8):
                        count = min(stop - at, 8)
                        for index in range(count):
                            sources[index] = given.x + int64_at(given.rows)[at + index] * given.x_bytes
                        weights = int64_at(about)[0]
                        multiply(weights, ranks, quarter, low, until, count, given.x_bytes, memory, onward)
                        for index in range(0 if shared else count):
                            h = given.h + begin * given.h_bytes + (at + index - begin) * blocks * layout.BLOCK_BYTES
                            for block in range(low, until):
                                line = (block * 4 + quarter) * LANES
                                for lane in range(line, line + LANES):
                                    float32_at(h)[lane] = float32_at(results[index])[lane]
                    number = (quarter + 1) * blocks
                for at in range(entry, stop if shared else entry):
                    sums = own + (at - entry) * blocks * layout.BLOCK_BYTES
                    h = given.h + begin * given.h_bytes + (at - begin) * blocks * layout.BLOCK_BYTES
                    fold_row(about, sums, h, memory + RUN_MEMORY, most)
        store_release(given.done + layout.DONE_BYTES * thread, 1)

    return shrink


def begin(row, thread, threads):
    """Mark each thread's share as not done; runs before `shrink`, with a barrier between them."""
    store_release(read(layout.BeginArguments, row).done + layout.DONE_BYTES * thread, 0)
