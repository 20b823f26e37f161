# SPDX-License-Identifier: MIT
"""Linear layer with weights of 14-bit integers as a compiled CPU operation (step 6 of a request's life).

Terms (tile, group, step): see `layout.py`. Blocks of 8 rows are copied to panels (`plain_linear/cpu_panel.py`). Each
pair of tiles is multiplied by up to 8 panels, which stay in the second-level cache, one part of K at a time. Within a
group, 16 vectors of integer sums stay in registers. The float sums are in memory, in the first-level cache, because
AVX-512 has only 32 vector registers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from candle_vllm.core.kernels.cpu_runtime.emit import F32, I32, Emitter, Int, emitted, vector
from candle_vllm.core.kernels.cpu_runtime.level import Isa
from candle_vllm.core.kernels.cpu_runtime.operation import LinearArguments
from candle_vllm.core.kernels.cpu_runtime.primitives import float32_at, read, step_number
from candle_vllm.core.kernels.cpu_runtime.tiles import CACHED_BYTES, stack_bytes
from candle_vllm.core.kernels.plain_linear.cpu_panel import VECTOR_BYTES, ask_tiles, fill_panels, write_tiles
from candle_vllm.core.kernels.word_linear.layout import GROUP_BYTES, SCALES, STEPS

_PANELS = 8  # maximum number of panels that a pair of tiles is multiplied by
_PART = 11  # groups of columns in a part of K: 24 KiB of two tiles
_HEIGHT = 8  # rows of a panel


@emitted
def _multiply(
    e: Emitter, isa: Isa, tiles: Int, weights: Int, tile_bytes: Int, panel: Int, scales: Int, out: Int, groups: Int
) -> None:
    """Multiply adjacent tiles by a panel, whose scales are at `scales`, and add to float32 [tiles, 8, 16] at `out`."""
    b = e.b

    def multiply(tiles: int) -> None:
        places = [(tile, row) for tile in range(tiles) for row in range(_HEIGHT)]
        bases = [b.add(weights, b.mul(tile_bytes, e.int64(tile))) for tile in range(tiles)]
        with e.each(groups) as index:
            offset = b.mul(index, e.int64(GROUP_BYTES))
            own = [b.add(base, offset) for base in bases]
            x = b.add(panel, b.mul(index, e.int64(STEPS * _HEIGHT * 4)))

            # One step per iteration: with more, LLVM emits two instructions for each vpdpwssd but the first.
            def step(number: Any, totals: list[Any]) -> list[Any]:
                loaded = [e.load(b.add(each, b.mul(number, e.int64(VECTOR_BYTES))), vector(I32)) for each in own]
                across, totals = b.add(x, b.mul(number, e.int64(_HEIGHT * 4))), list(totals)
                for row in range(_HEIGHT):
                    splat = e.splat(e.load(across, I32, 4 * row))
                    for tile, words in enumerate(loaded):
                        at = tile * _HEIGHT + row
                        totals[at] = e.dot_i16(totals[at], splat, words, isa)
                return totals

            totals = e.loop(e.int64(STEPS), [e.zeros(I32) for _ in places], step)
            factors = [e.load(each, vector(F32), SCALES) for each in own]
            given = b.add(scales, b.mul(index, e.int64(_HEIGHT * 4)))
            for (tile, row), total in zip(places, totals):
                factor = b.fmul(factors[tile], e.splat(e.load(given, F32, 4 * row)))
                place = (tile * _HEIGHT + row) * VECTOR_BYTES
                before = e.load(out, vector(F32), place)
                e.store(out, e.fma(b.sitofp(total, vector(F32)), factor, before), place)

    e.choose(tiles, {count: partial(multiply, count) for count in (2, 1)})


def make_linear(ISA: int) -> Any:
    CACHED, PANELS, PART = CACHED_BYTES, _PANELS, _PART
    GROUP, X, S = GROUP_BYTES, STEPS * _HEIGHT * 4, _HEIGHT * 4  # bytes of a group: weights, panel, scales

    def word_linear(entry: Any, thread: int, threads: int) -> None:
        given = read(LinearArguments, entry)
        rows = step_number(entry, given.rows_from)
        tile_bytes, groups, x_bytes = given.tile_bytes, given.length, given.x_bytes
        tiles = (given.outputs + 15) >> 4
        first, last = tiles * thread // threads, tiles * (thread + 1) // threads
        if rows <= 0 or first == last:
            return
        panel_bytes = 8 * x_bytes
        most = min(max(CACHED // panel_bytes, 1), PANELS)
        panels = stack_bytes(most * (panel_bytes + 1024) + 64)
        sums = panels + most * panel_bytes
        addresses = sums + most * 1024
        values = float32_at(sums)
        row = 0
        while row < rows:
            count = min(8 * most, rows - row)
            blocks = (count + 7) >> 3
            fill_panels(given, row, count, addresses, panels)
            tile = first
            while tile < last:
                at = given.weights + tile * tile_bytes
                width = 2 if last - tile >= 2 else 1
                for index in range(256 * blocks):
                    values[index] = 0.0
                ask_tiles(given, row, count, tile, width)
                for begin in range(0, groups, PART):
                    some, part = min(PART, groups - begin), at + begin * GROUP
                    for block in range(blocks):
                        panel, to = panels + block * panel_bytes, sums + 1024 * block
                        x, s = panel + begin * X, panel + groups * X + begin * S
                        _multiply(ISA, width, part, tile_bytes, x, s, to, some)
                for block in range(blocks):
                    some = min(8, count - 8 * block)
                    write_tiles(given, sums + 1024 * block, 8, row + 8 * block, some, tile, width)
                tile += width
            row += count

    return word_linear
