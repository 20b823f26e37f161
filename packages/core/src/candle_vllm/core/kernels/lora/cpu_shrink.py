# SPDX-License-Identifier: MIT
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
"""`shrink`, rows of the input times A, as a compiled CPU operation, beside the model's own product.

It waits for nothing. Weights are read once for all rows of a group, up to 8 of which meet a vector of them at a time.
Threads share runs of rows, quarters of the columns and blocks of ranks. Sums have one order, whatever else is in the
step: two chains over the steps of a quarter, then the quarters. Step 6 of a request's life.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from candle_vllm.core.kernels.cpu_runtime.emit import F32, I8, I16, I32, I64, Emitter, vector
from candle_vllm.core.kernels.cpu_runtime.level import LANES, Isa
from candle_vllm.core.kernels.cpu_runtime.primitives import int64_at, read, step_number, store_release
from candle_vllm.core.kernels.cpu_runtime.tiles import stack_bytes
from candle_vllm.core.kernels.lora.layout import BLOCK_BYTES, DONE_BYTES, BeginArguments, NumberForm, ShrinkArguments

_RUN = 32
"""Rows of a unit of work of `shrink`: they meet a quarter of a block, which stays in the first-level cache."""

VECTOR = 4 * LANES

AHEAD = 2048
"""Bytes of weights that are asked for ahead: runs of them are too short for a CPU to see coming."""


def widened(e: Emitter, form: NumberForm, address: Any, offset: int) -> list[Any]:
    """A vector of weights as floats: <16 x float>, of bfloat16 pairs two; of whole numbers 16 bytes.

    Their products are made by fused multiply-adds, with float32 numbers that nobody has rounded, so that every CPU has
    the same sums. The instruction for pairs of bfloat16 takes three times as long as such a one on a Xeon with AMX.
    """
    if form is NumberForm.F32:
        return [e.load(address, vector(F32), offset)]
    if form is NumberForm.I8:
        codes = e.load(address, vector(I8), offset)
        return [e.b.sitofp(e.b.sext(codes, vector(I32)), vector(F32))]
    pairs = e.load(address, vector(I32), offset)
    parts = e.b.shl(pairs, e.constant(I32, 16)), e.b.and_(pairs, e.constant(I32, -65536))
    return [e.b.bitcast(part, vector(F32)) for part in parts]


def scales_of(e: Emitter, address: Any, offset: int = 0) -> Any:
    """16 scales, stored in bfloat16."""
    bits = e.b.zext(e.load(address, vector(I16), offset), vector(I32))
    return e.b.bitcast(e.b.shl(bits, e.constant(I32, 16)), vector(F32))


def is_wide(isa: Isa) -> bool:
    return isa.wide


@intrinsic(prefer_literal=True)
def ask(_: Any, count: Any, address: Any) -> Any:
    """Asks for `count` bytes that will be read; what is behind the end of memory does no harm."""
    size = count.literal_value

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        for offset in range(0, size, VECTOR):
            Emitter(b).prefetch(args[1], offset)
        return context.get_dummy_value()

    return types.void(count, types.int64), code


def _repeated(e: Emitter, address: Any, offset: int, height: int, parts: int) -> list[Any]:
    """What 16 / height lanes of weights meet of the neighbouring floats at an address, in turns, by `widened`."""
    count = LANES // height
    if count == 1:
        return [e.splat(e.load(address, F32, offset + 4 * part)) for part in range(parts)]
    few = e.load(address, vector(F32, count * parts), offset)
    orders = [[lane % count * parts + part for lane in range(LANES)] for part in range(parts)]
    return [e.b.shuffle_vector(few, few, ir.Constant(vector(I32), order)) for order in orders]


def _emit_shrink(e: Emitter, form: NumberForm, isa: Isa, height: int, count: int, given: Any) -> None:
    """What `_shrink_rows` does, of `height` ranks and `count` rows."""
    b, (at_weights, at_inputs, offset, at_outputs, number) = e.b, given
    parts = 2 if form is NumberForm.BF16 else 1
    chains = 1 if parts == 2 and height == 4 else 2  # of that one, a quarter may be one step
    turns = 4 if form is NumberForm.I8 and height > 4 else chains
    size, x_bytes = form.step_bytes, 4 * LANES // height * parts
    rows = count if is_wide(isa) else min(count, 2)
    sources = [b.add(e.load(at_inputs, I64, 8 * row), offset) for row in range(count)]
    for first in range(0, count, rows):

        def body(index: Any, totals: list[Any], first: int = first) -> list[Any]:
            base = b.add(at_weights, b.mul(index, e.int64(size * turns)))
            moved = b.mul(index, e.int64(x_bytes * turns))
            totals = list(totals)
            for turn in range(turns):
                if size * turn % VECTOR == 0:
                    e.prefetch(base, size * turn + AHEAD)
                weights = widened(e, form, base, size * turn)
                for row in range(rows):
                    place = row * chains + turn % chains
                    found = _repeated(e, b.add(sources[first + row], moved), x_bytes * turn, height, parts)
                    for x, part in zip(found, weights):
                        totals[place] = e.fma(x, part, totals[place])
            return totals

        sums = e.loop(b.sdiv(number, e.int64(turns)), [e.zeros(F32)] * (rows * chains), body)
        for row in range(rows):
            total = sums[row * chains] if chains == 1 else b.fadd(*sums[row * chains : row * chains + 2])
            if form is NumberForm.I8:
                total = b.fmul(total, scales_of(e, at_weights, -form.block_scales))
            e.store(e.load(at_outputs, I64, 8 * (first + row)), total)


@intrinsic(prefer_literal=True)
def _shrink_rows(
    _: Any, form: Any, isa: Any, height: Any, rows: Any, weights: Any, inputs: Any, at: Any, outputs: Any, steps: Any
) -> Any:
    """A quarter of a block of `height` ranks, 4, 8 or 16, times 1, 4 or 8 rows: 16 sums each. It is `steps` vectors.

    inputs, outputs: addresses of int64 [rows], where the rows' inputs begin, `at` bytes before what is read, and where
    their sums go.
    """
    kind, features = NumberForm(form.literal_value), Isa(isa.literal_value)

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        e = Emitter(b)
        cases = {
            16 * ranks + count: lambda ranks=ranks, count=count: _emit_shrink(e, kind, features, ranks, count, args[4:])
            for ranks in (16, 8, 4)
            for count in (8, 4, 1)
        }
        e.choose(b.add(b.shl(args[2], e.int64(4)), args[3]), cases)
        return context.get_dummy_value()

    return types.void(form, isa, *[types.int64] * 7), code


@njit
def count_blocks(ranks: int) -> int:
    return (ranks >> 4) + (ranks >> 3 & 1) + (ranks >> 2 & 1)


@njit
def height_of(ranks: int, block: int) -> int:
    """Ranks of a block."""
    if block < ranks >> 4:
        return 16
    if block == ranks >> 4 and ranks & 8:
        return 8
    return 4


@njit
def ranks_before(ranks: int, block: int) -> int:
    """Ranks of the blocks before one."""
    return 16 * block - (8 if block > ranks >> 4 else 0)


def make_unit(FORM: int, ISA: int) -> Any:
    """A function that multiplies a quarter of a block by up to 8 rows."""
    form = NumberForm(FORM)
    ITEM, STEP, SCALES = form.bytes, form.step_bytes, form.block_scales

    @njit
    def unit(weights, ranks, block, quarter, inputs, outputs, count, x_bytes):
        """A quarter of a block for up to 8 rows; of 1, 4 or 8 there are addresses, the last of them repeated."""
        height, part = height_of(ranks, block), (x_bytes >> 4) * ITEM  # bytes of a quarter of a rank
        before = quarter * ranks + ranks_before(ranks, block)
        at = weights + before * part + (quarter * count_blocks(ranks) + block + 1) * SCALES
        rows = 8 if count > 4 else 4 if count > 1 else 1
        _shrink_rows(FORM, ISA, height, rows, at, inputs, quarter * (x_bytes >> 2), outputs, part * height // STEP)

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
                ask(320, about + 64)  # for `expand`
                runs = (starts[group + 1] - starts[group] + RUN - 1) // RUN
                total += 4 * count_blocks(int64_at(about)[1]) * runs
        first, last = total * thread // threads, total * (thread + 1) // threads
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
            for entry in range(begin, end, RUN):
                low, high = max(first - before, 0), min(last - before, 4 * blocks)
                before += 4 * blocks
                if low < high and entry + RUN >= end and before < last and group + 1 < groups:
                    following = int64_at(tables[group + 1])[given.place]
                    if following != 0:
                        ask(AHEAD, int64_at(following)[0])
                stop = min(entry + RUN, end)
                for number in range(low, high):
                    quarter, block = number // blocks, number % blocks
                    for at in range(entry, stop, 8):
                        count = min(stop - at, 8)
                        for index in range(8 if count > 4 else 4 if count > 1 else 1):
                            source = at + min(index, count - 1)
                            inputs[index] = given.x + int64_at(given.rows)[source] * given.x_bytes
                            sums = given.h + begin * given.h_bytes + (source - begin) * blocks * BLOCK_BYTES
                            outputs[index] = sums + (block * 4 + quarter) * 64
                        unit(int64_at(about)[0], ranks, block, quarter, memory, memory + 64, count, given.x_bytes)
        store_release(given.done + DONE_BYTES * thread, 1)

    return shrink


def begin(row, thread, threads):
    """Before `shrink`, and before all meet: nobody has done anything of it yet."""
    store_release(read(BeginArguments, row).done + DONE_BYTES * thread, 0)
