# SPDX-License-Identifier: MIT
"""Exact integer sums of a group of packed weights, codes times activations, in the instructions of each CPU level.

Terms: see `layout.py` (quad, tile) and `cpu_panel.py` (panel, record).

- VNNI, AVX-VNNI: four products of an unsigned and a signed byte are added to 32 bits by one instruction.
- AVX2, AVX-512: pairs of products are added in 16 bits with saturation (vpmaddubsw). An unsigned code is at most 127; a
  signed code's magnitude, at most 128, is multiplied by the activation with the code's sign; an activation is at most
  127. Quads are added in 16 bits as long as no sum can reach 2^15, and are then widened; for some types without a
  minimum, all quads of a scale are added in 16 bits (`are_centred`).
- NEON: products of signed bytes in 16 bits (smull), summed as long as they fit; DOTPROD: sums of four products in 32
  bits, with four activations for all rows of the tile (sdot by element); I8MM: two rows of weights times two of
  activations (smmla), for which a panel interleaves pairs of rows of activations, eight bytes each.

With AVX2, AVX-512 and NEON, but without VNNI, an 8-bit code is signed: zero is subtracted from it, and sums begin at 0.
The values of grids, and of tables that span more than 127 steps (IQ4), are signed too; with AMX all (`square_sums`).
Values of other tables become unsigned steps from the lowest (`Steps`); if these equal the codes, there is no lookup.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from math import gcd
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir

from candle_vllm.core.kernels.cpu_runtime.emit import I8, I16, I32, I64, Emitter, Int, emitted, vector
from candle_vllm.core.kernels.cpu_runtime.emit_squares import load_square, shape_squares, square_call, store_square
from candle_vllm.core.kernels.cpu_runtime.level import LANES, Isa
from candle_vllm.core.kernels.packed_linear.grids import GridLayout, numbers
from candle_vllm.core.kernels.packed_linear.layout import GROUP, VECTOR_BYTES, AnyLayout

_ACTIVATION = 127  # the largest magnitude of an activation
_UNSIGNED = Isa.VNNI | Isa.AVX_VNNI
_SUMS, _ACTIVATIONS, _CODES = range(3)  # AMX's registers


class Steps(NamedTuple):
    """Values of a table as lowest + step * `numbers`, where `numbers` are at most 127."""

    numbers: tuple[int, ...]
    step: int
    lowest: int

    @property
    def are_codes(self) -> bool:
        """Whether codes need no lookup."""
        return self.numbers == tuple(range(len(self.numbers)))


@cache
def steps(layout: AnyLayout) -> Steps | None:
    """Return the steps of a layout with a table of values; None without a table, or if its values are too far apart."""
    if isinstance(layout, GridLayout) or layout.values is None:
        return None
    lowest = min(layout.values)
    step = gcd(*(value - lowest for value in layout.values))
    found = tuple((value - lowest) // step for value in layout.values)
    return Steps(found, step, lowest) if max(found) <= _ACTIVATION else None


def zero_of(layout: AnyLayout) -> int:
    """Return the zero point z: an unsigned factor f means the integer weight step * f - z (`Steps`, else step 1)."""
    found = steps(layout)
    return -found.lowest if found else layout.zero


def largest_code(layout: AnyLayout) -> int:
    """Return an upper bound of the magnitudes of codes, or of their values, in products that are added in 16 bits."""
    if isinstance(layout, GridLayout):
        return 128 if layout.name.startswith("IQ1") else int(np.abs(numbers(layout.name)).max())
    if found := steps(layout):
        return max(found.numbers)
    if layout.values is not None:
        return max(map(abs, layout.values))
    return 128 if layout.bits == 8 else max(2, (1 << layout.bits) - 1)  # base-3 digits and 1-bit codes are at most 2


def takes_signed(isa: Isa, layout: AnyLayout) -> bool:
    """Whether codes are multiplied as signed integers, with their zero subtracted."""
    if isa & _UNSIGNED or not isa & (Isa.AVX2 | Isa.AVX512 | Isa.NEON):
        return False
    if isinstance(layout, GridLayout):
        return True
    return steps(layout) is None if layout.values is not None else layout.bits == 8


def are_centred(isa: Isa, layout: AnyLayout) -> bool:
    """Whether all products of one scale are summed in 16 bits, beginning at -zero * sum(x).

    Intermediate sums may wrap at 2^15, which is harmless because the final sums cannot reach 2^15.
    """
    if isa & (_UNSIGNED | Isa.NEON) or not isa & (Isa.AVX2 | Isa.AVX512) or layout.minimum or takes_signed(isa, layout):
        return False
    found, zero, largest = steps(layout), zero_of(layout), largest_code(layout)
    if found and found.step > 1:
        return False
    return largest <= _ACTIVATION and max(zero, largest - zero) * layout.width * _ACTIVATION // 2 < 1 << 15


def rows_at_once(isa: Isa) -> int:
    """Return the number of rows of activations whose sums, 16 for each row, stay in registers."""
    return 8 if isa.wide else 2 if isa & Isa.NEON and not isa & Isa.DOTPROD else 4


def in_pairs(isa: Isa, block: int) -> bool:
    """Return whether a panel interleaves pairs of rows."""
    return bool(isa & Isa.I8MM) and block > 1


class Inputs:
    """Record of a group, at address `record`, in a panel of `block` rows of activations."""

    def __init__(self, e: Emitter, isa: Isa, layout: AnyLayout, block: int, record: Any) -> None:
        self.e, self.isa, self.layout, self.block, self.record = e, isa, layout, block, record
        self._loaded: dict[tuple[int, int], Any] = {}

    def number(self, row: int, index: int, kind: ir.Type) -> Any:
        """Load a row's scale (index 0) or value derived from sums (index 1, 2) into every lane."""
        return self.e.splat(self.e.load(self.record, kind, self._place(row, index)))

    def quad(self, row: int, quad: int) -> Any:
        """Load four consecutive activations into every lane, <16 x i32>."""
        e = self.e
        if not self.isa & Isa.NEON:
            return e.splat(e.load(self.record, I32, GROUP * row + 4 * quad))
        # Four quads are loaded at once, because the instruction selects one of four elements.
        four = self._once(row, quad // 4, vector(I32, 4), GROUP * row + 16 * (quad // 4))
        return e.pick([quad % 4] * LANES, four)

    def pair(self, pair: int, step: int) -> Any:
        """Load eight consecutive activations of each of two rows, <16 x i8>."""
        return self._once(pair, step, vector(I8, 16), 2 * GROUP * pair + 16 * step)

    def begins(self, row: int, index: int, *, of_pair: bool = False) -> Any:
        """Load `number` as an integer; with `of_pair`, those of rows `row` and `row` + 1 alternately, <4 x i32>."""
        if not of_pair:
            return self.number(row, index, I32)
        both = self.e.splat(self.e.load(self.record, I64, self._place(row, index)), 2)
        return self.e.b.bitcast(both, vector(I32, 4))

    def _place(self, row: int, index: int) -> int:
        return self.block * (GROUP + 4 * index) + 4 * row

    def _once(self, row: int, part: int, kind: ir.Type, offset: int) -> Any:
        if (row, part) not in self._loaded:
            self._loaded[row, part] = self.e.load(self.record, kind, offset)
        return self._loaded[row, part]


def emit_sums(
    inputs: Inputs, codes: Callable[[int], Any], quads: Sequence[int], rows: Sequence[int], begin: int
) -> list[Any]:
    """Emit the sums of the codes' values times activations, <16 x i32> for each row.

    Args:
        inputs: the group's activations.
        codes: codes(quad) emits the codes of a quad, <16 x i32>, signed if `takes_signed` is true.
        quads, rows: quads of the group, and rows of the panel, that are multiplied.
        begin: the index in `Inputs.begins` of the initial sums; 0 for sums that begin at 0.
    """
    e, found = inputs.e, steps(inputs.layout)
    if found and found.step > 1:
        sums = _emit_products(inputs, codes, quads, rows, 0)
        sums = [e.b.mul(part, e.constant(I32, found.step)) for part in sums]
        return [e.b.add(part, inputs.begins(row, begin)) for row, part in zip(rows, sums)]
    return _emit_products(inputs, codes, quads, rows, begin)


def _emit_products(
    inputs: Inputs, codes: Callable[[int], Any], quads: Sequence[int], rows: Sequence[int], begin: int
) -> list[Any]:
    """Emit the sums of `emit_sums` for factors that need no correction by their steps."""
    e, isa, layout = inputs.e, inputs.isa, inputs.layout
    if in_pairs(isa, inputs.block):
        return _by_matrices(inputs, codes, quads, rows, begin)
    totals = [inputs.begins(row, begin) if begin else e.zeros(I32) for row in rows]
    if isa & (_UNSIGNED | Isa.DOTPROD) or not isa & (Isa.AVX2 | Isa.AVX512 | Isa.NEON):
        for quad in quads:
            code = codes(quad)
            totals = [_dot(e, isa, total, code, inputs.quad(row, quad)) for row, total in zip(rows, totals)]
            totals = _in_turn(e, isa, totals) if isa & Isa.DOTPROD else totals
        return totals
    largest, signed, centred = largest_code(layout), takes_signed(isa, layout), are_centred(isa, layout)
    of_quad = 1 if isa & Isa.NEON else 2  # products that a quad adds to a sum
    room = len(quads) if centred else ((1 << 15) - 1) // (of_quad * largest * _ACTIVATION)
    totals = [e.zeros(I32) for _ in rows] if centred else totals
    for first in range(0, len(quads), room):
        narrow: list[list[Any]] = [[] for _ in rows]
        if centred:
            narrow = [e.parts(inputs.begins(row, begin), 1 if isa.wide else 2, I16) for row in rows]
        for quad in quads[first : first + room]:
            code = codes(quad)
            for at, row in enumerate(rows):
                products = _products(e, isa, code, inputs.quad(row, quad), signed=signed)
                narrow[at] = [e.b.add(*both) for both in zip(narrow[at], products)] if narrow[at] else products
                if room > 1:
                    narrow[at] = _in_turn(e, isa, narrow[at])
        totals = [e.b.add(total, _widened(e, isa, parts)) for total, parts in zip(totals, narrow)]
        totals = _in_turn(e, isa, totals)
    return totals


def emit_activation_sums(e: Emitter, isa: Isa, x: Any) -> Any:
    """Emit the sums of every four consecutive elements of <64 x i8>, <16 x i32>."""
    words, ones = e.b.bitcast(x, vector(I32)), e.constant(I32, 0x01010101)
    if isa & (_UNSIGNED | Isa.DOTPROD) or not isa & (Isa.AVX2 | Isa.AVX512 | Isa.NEON):
        return _dot(e, isa, e.zeros(I32), ones, words)
    return _widened(e, isa, _products(e, isa, ones, words, signed=False))


def _in_turn(e: Emitter, isa: Isa, sums: list[Any]) -> list[Any]:
    """Return the sums; with AVX2 or DOTPROD, the compiler must compute them before later sums: registers are few."""
    few = not isa.wide and (not isa & Isa.NEON or (isa & Isa.DOTPROD and len(sums) > 1))
    return [e.made_here(each, isa) for each in sums] if few else sums


# ---- by fours --------------------------------------------------------------------------------------------------------


def _dot(e: Emitter, isa: Isa, total: Any, code: Any, x: Any) -> Any:
    """Return total[lane] + the sum of the four products of the lane's codes and activations."""
    if isa & Isa.DOTPROD:
        return e.in_parts("llvm.aarch64.neon.sdot.v4i32.v16i8", 4, total, (code, I8), (x, I8))
    return e.dot_u8_i8(total, code, x, isa)


# ---- in 16 bits ------------------------------------------------------------------------------------------------------


def _products(e: Emitter, isa: Isa, code: Any, x: Any, *, signed: bool) -> list[Any]:
    """Return products of codes and activations in 16 bits, vector by vector; on x86, sums of two adjacent products."""
    if isa & Isa.NEON:
        found = []
        for u, s in zip(e.parts(code, 4, I8), e.parts(x, 4, I8)):
            for both in zip(e.parts(u, 2, I8), e.parts(s, 2, I8)):
                found.append(e.call("llvm.aarch64.neon.smull.v8i16", vector(I16, 8), list(both)))
        return found
    count, name = (1, "llvm.x86.avx512.pmaddubs.w.512") if isa.wide else (2, "llvm.x86.avx2.pmadd.ub.sw")
    found = []
    for u, s in zip(e.parts(code, count, I8), e.parts(x, count, I8)):
        size = u
        if signed:
            size = e.call(f"llvm.abs.v{u.type.count}i8", u.type, [u, ir.Constant(ir.IntType(1), 0)])
            if isa.wide:
                zero = e.zeros(I8, u.type.count)
                s = e.b.select(e.b.icmp_signed("<", u, zero), e.b.sub(zero, s), s)
            else:
                s = e.call("llvm.x86.avx2.psign.b", s.type, [s, u])
        found.append(e.call(name, vector(I16, u.type.count // 2), [size, s]))
    return found


def _widened(e: Emitter, isa: Isa, parts: list[Any]) -> Any:
    """Return the sums of each lane's products, <16 x i32>."""
    if isa & Isa.NEON:
        twos = [e.call("llvm.aarch64.neon.saddlp.v4i32.v8i16", vector(I32, 4), [part]) for part in parts]
        pairs = zip(twos[::2], twos[1::2])
        return e.whole([e.call("llvm.aarch64.neon.addp.v4i32", vector(I32, 4), list(pair)) for pair in pairs])
    name = "llvm.x86.avx512.pmaddw.d.512" if isa.wide else "llvm.x86.avx2.pmadd.wd"
    found = []
    for part in parts:
        count = part.type.count
        found.append(e.call(name, vector(I32, count // 2), [part, e.constant(I16, 1, count)]))
    return e.whole(found)


# ---- as matrices -----------------------------------------------------------------------------------------------------


def _by_matrices(
    inputs: Inputs, codes: Callable[[int], Any], quads: Sequence[int], rows: Sequence[int], begin: int
) -> list[Any]:
    """Do what `emit_sums` does by products of 2 x 8 and 8 x 2 matrices: two rows of weights by two of activations."""
    e, name = inputs.e, "llvm.aarch64.neon.smmla.v4i32.v16i8"
    pairs = range(rows[0] // 2, (rows[-1] + 2) // 2)
    found: dict[int, list[Any]] = {row: [] for row in rows}
    words = [e.parts(codes(quad), 4) for quad in quads]
    for part in range(4):
        totals = {
            (pair, half): inputs.begins(2 * pair, begin, of_pair=True) if begin else e.zeros(I32, 4)
            for pair in pairs
            for half in (0, 1)
        }
        for at in range(0, len(quads), 2):
            low, high = words[at][part], words[at + 1][part]
            for half in (0, 1):  # rows of weights 2 half and 2 half + 1, eight elements of each
                order = [2 * half + lane // 2 + 4 * (lane % 2) for lane in range(4)]
                two = e.b.bitcast(e.pick(order, low, high), vector(I8, 16))
                for pair in pairs:
                    x = inputs.pair(pair, quads[at] // 2)
                    totals[pair, half] = e.call(name, vector(I32, 4), [totals[pair, half], two, x])
        for pair in pairs:
            for side in (0, 1):
                found[2 * pair + side].append(e.pick(range(side, 8, 2), totals[pair, 0], totals[pair, 1]))
    return [e.whole(parts) for parts in found.values()]


# ---- sixteen rows at once --------------------------------------------------------------------------------------------


def takes_squares(isa: Isa, layout: AnyLayout) -> bool:
    """Return whether AMX multiplies panels of 16 rows: only with one scale per group, as half a group is no faster."""
    return bool(isa & Isa.AMX) and layout.width == GROUP


@emitted
def shape_sums(e: Emitter, memory: Int) -> None:
    """Configure AMX's registers for `square_sums`, with 64 bytes of memory; `end_squares` must be called afterwards."""
    shape_squares(e, memory, [(LANES, VECTOR_BYTES), (LANES, GROUP), (GROUP // 4, VECTOR_BYTES)])


def square_sums(e: Emitter, codes: Any, panels: Any, places: Callable[[Any], tuple[Inputs, Any]]) -> None:
    """Write the sums of a group for 16 rows of each panel.

    `codes` is the address of the group's consecutive quads as signed integers; `places` returns a panel's record and
    the address of its sums.
    """
    load_square(e, _CODES, codes, e.int64(VECTOR_BYTES))
    with e.each(panels) as panel:
        inputs, sums = places(panel)
        load_square(e, _ACTIVATIONS, inputs.record, e.int64(GROUP))
        square_call(e, "tilezero", _SUMS)
        square_call(e, "tdpbssd", _SUMS, _ACTIVATIONS, _CODES)
        store_square(e, _SUMS, sums, VECTOR_BYTES)
