# SPDX-License-Identifier: MIT
"""What linear layers with activations in rows share: the panel of activations, tiles times a panel, writing results.

Stands inside step 6 of a request's life. A block's rows are copied into a **panel** on the stack, element by element
side by side, so that a step of the weights meets neighbouring elements. A CPU without AVX-512 has 16 vectors of half
the size: there, 4 rows meet one tile at a time, whose sums stay in registers (8 rows: half as fast, measured on Zen 3).
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from candle_vllm.core.kernels.cpu_runtime.emit import F16, F32, I32, I64, Emitter, vector
from candle_vllm.core.kernels.cpu_runtime.level import LANES, Isa
from candle_vllm.core.kernels.cpu_runtime.primitives import int64_at
from candle_vllm.core.kernels.cpu_runtime.tiles import write_tile
from candle_vllm.core.kernels.plain_linear.layout import ROWS, RUN, PlainKind

VECTOR_BYTES = 4 * LANES

_AHEAD = 3072
"""Bytes of weights that 8 rows ask for ahead: 2 to 6 % faster on Zen 4. A single row is not, and does not."""


# ---- the panel of activations ----------------------------------------------------------------------------------------


def _interleaved(e: Emitter, vectors: list[Any]) -> list[Any]:
    """Vectors of 16 elements, one for each row, as vectors of all rows' element 0, all rows' element 1, and so on."""
    if len(vectors) == 1:
        return vectors
    zipped: list[Any] = []
    for even, odd in zip(_interleaved(e, vectors[0::2]), _interleaved(e, vectors[1::2])):
        for start in (0, LANES // 2):
            order = [ir.Constant(I32, start + lane // 2 + lane % 2 * LANES) for lane in range(LANES)]
            zipped.append(e.b.shuffle_vector(even, odd, ir.Constant(vector(I32), order)))
    return zipped


@intrinsic(prefer_literal=True)
def fill_panel(_: Any, block: Any, panel: Any, addresses: Any, vectors: Any) -> Any:
    """Copies the rows at int64 [block] `addresses` into a panel of `block` rows of `vectors` times 16 elements."""
    height = block.literal_value

    def code(context: Any, b: Any, sig: Any, args: Any) -> Any:
        e = Emitter(b)
        at_panel, at_addresses, count = args[1:]
        sources = [e.load(at_addresses, I64, 8 * row) for row in range(height)]

        def body(index: Any, state: list[Any]) -> list[Any]:
            offset = b.mul(index, e.int64(VECTOR_BYTES))
            loaded = [e.load(b.add(source, offset), vector(I32)) for source in sources]
            target = b.add(at_panel, b.mul(offset, e.int64(height)))
            for part, mixed in enumerate(_interleaved(e, loaded)):
                e.store(target, mixed, part * VECTOR_BYTES)
            return state

        e.loop(count, [], body)
        return context.get_dummy_value()

    return types.void(block, *[types.int64] * 3), code


@njit
def fill_panels(given: Any, row: int, count: int, addresses: int, panels: int) -> None:
    """Copies rows `row` .. `row + count` of an operation's input into panels of 8, the last row repeated.

    addresses: of memory for int64 [8].
    """
    at_address, x_bytes = int64_at(addresses), given.x_bytes
    for block in range((count + 7) >> 3):
        for index in range(8):
            source = row + min(8 * block + index, count - 1)
            if given.picked != 0:
                source = int64_at(given.picked)[source]
            at_address[index] = given.x + source * x_bytes
        fill_panel(8, panels + 8 * x_bytes * block, addresses, x_bytes >> 6)


# ---- tiles times a panel ---------------------------------------------------------------------------------------------


def _weights(e: Emitter, kind: PlainKind, address: Any, offset: int) -> Any:
    """16 rows of a step."""
    if kind is PlainKind.F16:
        return e.half_to_float(e.load(address, vector(F16), offset))
    return e.load(address, vector(I32 if kind is PlainKind.BF16 else F32), offset)


def _add_step(e: Emitter, kind: PlainKind, isa: Isa, total: Any, weights: Any, x: Any) -> Any:
    """One step more of 16 sums; x is an element of the activations in every lane."""
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
    """Tiles times a panel of `height` rows: each sum is one chain over the steps, the same in every variant.

    Args:
        e, kind, isa: of the code.
        tiles: where the tiles' weights begin.
        height: rows of the panel; more than 8 are several panels of 8.
        panel: where it begins.
        runs: of `RUN` steps, at least 1.
        write: write(tile, row, sums) is called for each, 16 sums of a row.
        begin: begin(tile, row) gives the sums of the steps before; None is nothing.
        panel_bytes: from one panel to the next.
    """
    wide = isa.wide
    panels = [panel, *(e.b.add(panel, e.b.mul(panel_bytes, e.int64(n))) for n in range(1, height // 8))]
    together = (range(len(tiles)),) if wide else [(tile,) for tile in range(len(tiles))]
    rows = height if wide else 6 if height > 8 else min(height, 4)
    for picked in together:
        for first in range(0, height, rows):
            places = [(tile, first + row) for tile in picked for row in range(rows)]
            sums = [begin(*place) if begin else e.zeros(F32) for place in places]
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
    """`emit_sums` of some rows, (of how many, the first): sums that stay in registers, [tile, row]."""
    (height, first), rows = block, len(sums) // len(tiles)
    b, element = e.b, F32 if kind is not PlainKind.BF16 else I32

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


@njit
def write_tiles(
    sums: int,
    block: int,
    rows: int,
    tile: int,
    count: int,
    columns: int,
    out: int,
    row_bytes: int,
    bias: int,
    accumulate: int,
) -> None:
    """Writes the sums float32 [count, block, 16] of tiles `tile`, tile + 1, ... where they belong."""
    for index in range(tile, tile + count):
        lanes = min(columns - index * 16, 16)
        at_bias = bias + index * 64 if bias else 0
        write_tile(
            sums + (index - tile) * block * 4 * ROWS, rows, lanes, out + index * 64, row_bytes, at_bias, accumulate
        )
