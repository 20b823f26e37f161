# SPDX-License-Identifier: MIT
"""Panels of activations for the packed linear layer: interleaved rows in the order in which the kernel reads them.

A **panel** has 16, 8, 4 or 1 rows (tokens); if fewer are left, the last row is repeated, without further results. For
each group of 32 columns it has a **record**: the rows' int8 codes, then their scales, then values derived from the sums
of their codes. On CPUs with few registers a full panel has 4 rows, with AMX 16 if the group has one scale.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from llvmlite import ir
from numba import njit

from candle_vllm.core.kernels.cpu_runtime.emit import I8, I16, I32, Emitter, Int, emitted, vector
from candle_vllm.core.kernels.cpu_runtime.level import Isa
from candle_vllm.core.kernels.packed_linear.cpu_sums import (
    are_centred,
    emit_activation_sums,
    in_pairs,
    takes_signed,
    takes_squares,
    zero_of,
)
from candle_vllm.core.kernels.packed_linear.grids import GridLayout
from candle_vllm.core.kernels.packed_linear.layout import GROUP, LAYOUTS, ROWS, AnyLayout, PackedKind

TALL_ROWS = 32
"""Maximum rows of the panels for which a tile of weights is unpacked once."""

PANEL_BYTES = 192 << 10
"""Maximum bytes of several panels for which a tile is unpacked once; they stay in a core's L2 cache."""


def blocks(isa: Isa, layout: AnyLayout) -> tuple[int, ...]:
    """Return the possible numbers of rows of a panel, the largest first."""
    return (16, 8, 4, 1) if takes_squares(isa, layout) else (8, 4, 1) if isa.wide else (4, 1)


def most_panels(isa: Isa, layout: AnyLayout) -> int:
    """Return the maximum number of full panels for which a tile is unpacked once; 1 if more would not be faster."""
    costly = isinstance(layout, GridLayout) or layout.bits == 0
    return TALL_ROWS // blocks(isa, layout)[0] if costly or takes_squares(isa, layout) or not isa.wide else 1


@njit
def cut_rows(left: int, groups: int, full: int, most: int, group_bytes: int) -> tuple[int, int]:
    """Return the number of rows in each of the next panels, and the number of these panels, for `left` remaining rows.

    A full panel has `full` rows and `group_bytes` bytes for each of `groups` groups; `most` is `most_panels`.
    """
    block = 1 if left == 1 else full
    while block >= 8 and left <= block // 2:
        block //= 2
    most = max(min(most, PANEL_BYTES // (groups * group_bytes)), 1)
    return block, min((left + block - 1) // block, most)


def record_bytes(layout: AnyLayout, block: int) -> int:
    """Return the bytes of a record of `block` rows: each row's int8 codes, scale, and one or two sums."""
    sums = 1 if layout.width == GROUP or layout.paired else 2
    return block * (GROUP + 4 + 4 * sums)


def _sums(e: Emitter, x: Any, layout: AnyLayout, isa: Isa) -> list[Any]:
    """Return a row's values that are derived from sums of 32 int8 codes x, <32 x i8>: for the group or for each half.

    In a paired kind the value is a pair of 16-bit sums. Otherwise the values are -`zero_of(layout)` * sum.
    """
    x = e.pick(range(2 * GROUP), x, e.zeros(I8, GROUP))
    centred = are_centred(isa, layout)
    if centred:
        words = e.b.bitcast(x, vector(I32))
        total = e.b.bitcast(e.pairs_u8_i8(e.constant(I32, 0x01010101), words, isa), vector(I32))
    else:
        total = emit_activation_sums(e, isa, x)
    kind = vector(I16, 2 * ROWS) if centred else vector(I32)
    for step in (1, 2) if layout.width == 16 else (1, 2, 4):
        parts = [e.b.bitcast(part, kind) for part in (total, e.pick([i ^ step for i in range(ROWS)], total))]
        total = e.b.bitcast(e.b.add(*parts), vector(I32))
    if centred:
        total = e.b.mul(e.b.bitcast(total, kind), e.constant(I16, -zero_of(layout), 2 * ROWS))
        total = e.b.bitcast(total, vector(I32))
    halves = range(GROUP // layout.width)
    parts = [e.b.extract_element(total, ir.Constant(I32, 4 * half)) for half in halves]
    if layout.paired:
        low, high = parts
        return [e.b.or_(e.b.and_(low, ir.Constant(I32, 0xFFFF)), e.b.shl(high, ir.Constant(I32, 16)))]
    return parts if centred else [e.b.mul(part, ir.Constant(I32, -zero_of(layout))) for part in parts]


def _emit_row(e: Emitter, layout: AnyLayout, isa: Isa, count: int, given: Any) -> None:
    """Emit `fill_row` for a panel of `count` rows."""
    b, (at_panel, at_row, at_xq, at_xs, at_xsum, number) = e.b, given
    if paired := in_pairs(isa, count):
        pair, side = b.lshr(at_row, e.int64(1)), b.and_(at_row, e.int64(1))
        of_row = b.add(b.add(at_panel, b.mul(pair, e.int64(2 * GROUP))), b.mul(side, e.int64(8)))
    else:
        of_row = b.add(at_panel, b.mul(at_row, e.int64(GROUP)))
    of_float = b.add(at_panel, b.mul(at_row, e.int64(4)))
    with e.each(number) as group:
        record, four = b.mul(group, e.int64(record_bytes(layout, count))), b.mul(group, e.int64(4))
        x = e.load(b.add(at_xq, b.mul(group, e.int64(GROUP))), vector(I8, GROUP))
        if isinstance(layout, GridLayout):
            x = e.pick(layout.order, x)
        for at, part in enumerate(e.parts(x, 4) if paired else [x]):
            e.store(b.add(of_row, record), part, 16 * at)
        floats = b.add(of_float, record)
        e.store(floats, e.load(b.add(at_xs, four), I32), count * GROUP)
        if layout.minimum and layout.width == GROUP:
            sums = [e.load(b.add(at_xsum, four), I32)]
        else:
            sums = [] if takes_signed(isa, layout) else _sums(e, x, layout, isa)
        for index, part in enumerate(sums):
            e.store(floats, part, count * (GROUP + 4 + 4 * index))


@emitted
def fill_row(
    e: Emitter, kind: PackedKind, isa: Isa, block: Int, panel: Int, row: Int, xq: Int, xs: Int, xsum: Int, groups: Int
) -> None:
    """Copy one row of activations into a panel of `block` rows, a number from `blocks()`."""
    layout = LAYOUTS[kind]
    e.choose(
        block,
        {n: partial(_emit_row, e, layout, isa, n, [panel, row, xq, xs, xsum, groups]) for n in blocks(isa, layout)},
    )
