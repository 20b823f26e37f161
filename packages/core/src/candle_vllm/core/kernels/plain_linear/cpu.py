"""The plain linear layer as compiled CPU operations: step 6 of a request's life.

The shape is that of `packed_linear/cpu.py`. A thread owns a run of tiles, takes as many of them as stay in the cache,
and for these goes through the rows of activations in blocks of 8, 4 or 1. A block's rows are first copied into a
**panel** (`cpu_panel.py`); a block that is not full repeats its last row, and the repetitions are not written. One row
is read where it stands.

With AVX-512, 8 rows meet two tiles at once: 16 sums in registers for 2 loads of weights and 8 of activations a step, so
that the multiplications are what limits it. Fewer rows are limited by memory, and meet one tile after the other: two
streams of weights were read a fifth slower than one (measured on Zen 4).

Every sum is one chain over the steps of K, the same in every variant.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from candle_vllm.core.kernels.cpu_runtime.emit import F16, F32, I16, I32, Emitter
from candle_vllm.core.kernels.cpu_runtime.level import Isa
from candle_vllm.core.kernels.cpu_runtime.operation import EmbeddingArguments, LinearArguments
from candle_vllm.core.kernels.cpu_runtime.primitives import float32_at, int64_at, read, step_number
from candle_vllm.core.kernels.cpu_runtime.tiles import stack_bytes
from candle_vllm.core.kernels.plain_linear.cpu_panel import emit_sums, fill_panel, write_tiles
from candle_vllm.core.kernels.plain_linear.layout import ROWS, PlainKind

_CACHED_BYTES = 384 << 10
"""Weights that one thread goes through again for every block of rows: they stay in its second-level cache."""


@intrinsic(prefer_literal=True)
def _multiply(
    _: Any, kind: Any, block: Any, tiles: Any, isa: Any, weights: Any, tile_bytes: Any, panel: Any, out: Any, runs: Any
) -> Any:
    """Neighbouring tiles times a panel of `block` rows: float32 [tiles, block, 16] at `out`."""
    number, height, width = PlainKind(kind.literal_value), block.literal_value, tiles.literal_value
    features = Isa(isa.literal_value)

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        e = Emitter(b)
        at_weights, size, at_panel, at_out, count = args[4:]
        bases = [b.add(at_weights, b.mul(size, e.int64(tile))) for tile in range(width)]

        def write(tile: int, row: int, total: Any) -> None:
            e.store(at_out, total, (tile * height + row) * 4 * ROWS)

        emit_sums(e, number, features, bases, height, at_panel, count, write)
        return context.get_dummy_value()

    return types.void(kind, block, tiles, isa, *[types.int64] * 5), code


# ---- the operations --------------------------------------------------------------------------------------------------


def make_linear(KIND: int, ISA: int) -> Any:
    """The linear operation."""
    TILE_BLOCK = _CACHED_BYTES

    def plain_linear(entry: Any, thread: int, threads: int) -> None:
        given = read(LinearArguments, entry)
        rows = step_number(entry, given.rows_from)
        weights, tile_bytes, columns, runs = given.weights, given.tile_bytes, given.outputs, given.length
        row_bytes, bias, accumulate, x_bytes = given.row_bytes, given.bias, given.accumulate, given.x_bytes
        tiles = (columns + 15) >> 4
        first, last = tiles * thread // threads, tiles * (thread + 1) // threads
        if rows <= 0 or first == last:
            return
        panel = stack_bytes(8 * x_bytes + 1024 + 64)
        sums = panel + 8 * x_bytes
        addresses = int64_at(sums + 1024)
        step = max(TILE_BLOCK // tile_bytes, 2) & -2
        for begin in range(first, last, step):
            end = min(begin + step, last)
            row = 0
            while row < rows:
                left = rows - row
                block = 8 if left > 4 else 4 if left > 1 else 1
                count = min(block, left)
                for index in range(block):
                    source = row + min(index, count - 1)
                    if given.picked != 0:
                        source = int64_at(given.picked)[source]
                    addresses[index] = given.x + source * x_bytes
                target = given.out + row * row_bytes
                if block == 8:
                    fill_panel(8, panel, sums + 1024, x_bytes >> 6)
                elif block == 4:
                    fill_panel(4, panel, sums + 1024, x_bytes >> 6)
                tile = begin
                while tile < end:
                    at = weights + tile * tile_bytes
                    width = 2 if block == 8 and end - tile >= 2 else 1
                    if width == 2:
                        _multiply(KIND, 8, 2, ISA, at, tile_bytes, panel, sums, runs)
                    elif block == 8:
                        _multiply(KIND, 8, 1, ISA, at, tile_bytes, panel, sums, runs)
                    elif block == 4:
                        _multiply(KIND, 4, 1, ISA, at, tile_bytes, panel, sums, runs)
                    else:
                        _multiply(KIND, 1, 1, ISA, at, tile_bytes, addresses[0], sums, runs)
                    write_tiles(sums, block, count, tile, width, columns, target, row_bytes, bias, accumulate)
                    tile += width
                row += count

    return plain_linear


@intrinsic(prefer_literal=True)
def _widen_row(_: Any, kind: Any, weights: Any, lane: Any, out: Any, columns: Any) -> Any:
    """Writes row `lane` of a tile as floats."""
    number = PlainKind(kind.literal_value)
    width = number.itemsize
    stored = {PlainKind.BF16: I16, PlainKind.F16: F16, PlainKind.F32: F32}[number]

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        e = Emitter(b)
        at_weights, at_lane, at_out, count = args[1:]
        start = b.add(at_weights, b.mul(at_lane, e.int64(width * number.step_columns)))

        def body(index: Any, state: list[Any]) -> list[Any]:
            step = b.sdiv(index, e.int64(number.step_columns))
            inside = b.srem(index, e.int64(number.step_columns))
            offset = b.add(b.mul(step, e.int64(number.step_bytes)), b.mul(inside, e.int64(width)))
            value = e.load(b.add(start, offset), stored)
            if number is PlainKind.BF16:
                value = b.bitcast(b.shl(b.zext(value, I32), ir.Constant(I32, 16)), F32)
            elif number is PlainKind.F16:
                value = b.fpext(value, F32)
            e.store(b.add(at_out, b.mul(index, e.int64(4))), value)
            return state

        e.loop(count, [], body)
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 4), code


def make_embedding(KIND: int) -> Any:
    def plain_embedding(entry: Any, thread: int, threads: int) -> None:
        given = read(EmbeddingArguments, entry)
        rows, ids = step_number(entry, given.rows_from), int64_at(given.token_ids)
        for row in range(rows * thread // threads, rows * (thread + 1) // threads):
            token = ids[row]
            target = given.out + row * given.row_bytes
            if 0 <= token < given.rows:
                _widen_row(KIND, given.weights + (token >> 4) * given.tile_bytes, token & 15, target, given.columns)
            else:
                values = float32_at(target)
                for index in range(given.columns):
                    values[index] = float("nan")

    return plain_embedding
