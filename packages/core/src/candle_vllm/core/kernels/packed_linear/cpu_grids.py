# SPDX-License-Identifier: MIT
"""Emit vector code for `cpu.py` that decodes groups of IQ1, IQ2 and IQ3 (`grids.py`); step 6 of a request's life.

Terms: see `grids.py`. An index selects two bytes, one for each half of the index's weights; a few bits of a byte select
the magnitude of a weight. With VBMI, the bytes of four indices of each row are looked up at once from tables in
registers; otherwise they are gathered. The bytes of two adjacent indices are one word (`GridLayout.order`). Signs are
inserted between the magnitudes, and a shuffle converts each nibble to 128 + weight, unsigned. IQ1 has a long grid and
no signs: each index gathers one word of eight nibbles.

Without VBMI every product would have to gather from the grid. On such a CPU only packing gathers, once for a matrix:
`make_codes` converts tiles of indices to tiles of codes (`layout.py`).
"""

from __future__ import annotations

from collections import defaultdict
from functools import cached_property, reduce
from typing import Any

import numpy as np
from llvmlite import ir

from candle_vllm.core.kernels.cpu_runtime.emit import F16, F32, I8, I16, I32, Emitter, Int, emitted, vector
from candle_vllm.core.kernels.cpu_runtime.emit_tables import gather, look_up, look_up_bytes
from candle_vllm.core.kernels.cpu_runtime.level import Isa
from candle_vllm.core.kernels.packed_linear.grids import FORMATS, GROUPS, HIGH_BITS, ROWS, GridLayout, numbers
from candle_vllm.core.kernels.packed_linear.layout import LAYOUTS, VECTOR_BYTES, PackedKind, TileLayout

_SIGN = 0x88888888


class GridGroup:
    """A group of 16 rows: its scales, and its weights in quads.

    Args:
        block, group, codes: address of the block, index of the group, address of its codes; see `cpu.py`.
        named: a table of weights; `quad` returns each weight's index in it. With None, `quad` returns 128 + weight.
    """

    def __init__(
        self,
        e: Emitter,
        layout: GridLayout,
        isa: Isa,
        block: Any,
        group: Any,
        codes: Any,
        named: tuple[int, ...] | None = None,
    ) -> None:
        self.e, self.layout, self.isa, self._named = e, layout, isa, named
        self.block, self.group, self.codes = block, group, codes
        self._words: dict[int, Any] = {}
        self._pairs: dict[int, Any] = {}

    def scales(self) -> list[Any]:
        """Return the scales of the group or of its halves: vectors of floats."""
        e, unit = self.e, self.unit()
        return [e.b.fmul(unit, e.b.sitofp(odd, vector(F32))) for odd in self.odds()]

    def unit(self) -> Any:
        """Return the unit of which the scales are odd multiples: a vector of floats."""
        return self.e.b.fmul(self._super(), self.e.constant(F32, self.layout.unit))

    def odds(self) -> list[Any]:
        """Return scale / `unit` of the group or of its halves: vectors of odd 32-bit integers."""
        one = self.e.constant(I32, 1)
        return [self.e.b.or_(self.e.b.shl(small, one), one) for small in self._small()]

    def quad(self, quad: int) -> Any:
        """Return 128 + weight for the four places from `4 * quad` on in `GridLayout.order`; or indices, see `named`."""
        word, high = divmod(quad, 2)
        if word not in self._words:
            self._words[word] = self._signed(word) if self.layout.signs else self._of_index(word)
        found = self.e.shifted(self._words[word], -4 * high)
        return look_up(self.e, self._bytes_of_nibbles, self._and(found, 0x0F0F0F0F), self.isa)

    # ---- words of eight nibbles --------------------------------------------------------------------------------------

    def _signed(self, word: int) -> Any:
        """Return a word of eight nibbles: magnitudes, with the sign in the highest bit of each nibble."""
        shared = self.layout.span // 4  # words of nibbles that share a word of magnitudes, which have 2 bits in IQ2
        sizes = self.e.shifted(self._pair(word // shared), -2 * (word % shared))
        signs = self.e.shifted(self._signs, 3 - word)
        return self.e.b.or_(self._and(sizes, ~_SIGN), self._and(signs, _SIGN))

    def _of_index(self, index: int) -> Any:
        """Return the word of an index of IQ1: indices in `_sizes`, and the sign of the 1/8 that is added to each."""
        found = gather(self.e, self._table, self._index(index), self.isa)
        moved = self.e.shifted(self._high, 16 if self.layout.name == "IQ1_S" else 28 - 4 * index)
        side = self._and(self.e.b.ashr(moved, self.e.constant(I32, 31)), 0x44444444)
        return self.e.b.or_(found, side)

    def _pair(self, pair: int) -> Any:
        """Look up indices `2 * pair` and `2 * pair + 1`: the first bytes, then the second bytes."""
        if pair in self._pairs:
            return self._pairs[pair]
        e, b = self.e, self.e.b
        if not self.isa & Isa.VBMI:
            tables = (self._table, self._table << np.uint32(8))
            both = [gather(e, table, self._index(2 * pair + at), self.isa) for at, table in enumerate(tables)]
            self._pairs[pair] = b.or_(*both)
            return self._pairs[pair]
        low, first = self._bytes(self._low[pair // 2]), pair // 2 * 2
        more = [self._ninth] if self.layout.name == "IQ2_XS" else self._upper(first * 2)
        planes = look_up_bytes(e, self._planes, low, more)
        for side in (0, 1):
            order = [4 * lane + 2 * side + at % 2 + 64 * (at // 2) for lane in range(ROWS) for at in range(4)]
            self._pairs[first + side] = b.bitcast(e.pick(order, *planes), vector(I32))
        return self._pairs[pair]

    def _upper(self, first: int) -> list[Any]:
        """Return the bits above the low bytes of the four indices from `first` on, <64 x i1> for each bit."""
        bits = HIGH_BITS.get(self.layout.name, 0)
        if not bits:
            return []
        rows = self.e.load(self.codes, vector(I8), self.layout.place["high"])
        rows = self.e.pick([at // 4 for at in range(64)], rows)
        return [self._are_set(rows, [1 << bits * (first + at) + bit for at in range(4)]) for bit in range(bits)]

    @property
    def _ninth(self) -> Any:
        """Return the ninth bits of the indices 0 to 3, which are in bytes 2, 3, 2 and 3 of the signs."""
        rows = self.e.pick([at | 2 for at in range(64)], self._bytes(self._stored_signs))
        return self._are_set(rows, [1 << bit % 8 for bit in self.layout.left_out])

    def _are_set(self, rows: Any, bits: list[int]) -> Any:
        """Return for each byte whether it has its bit, <64 x i1>; `bits` are the masks of a lane's four bytes."""
        wanted = ir.Constant(vector(I8, 64), [ir.Constant(I8, bit) for bit in bits * ROWS])
        return self.e.b.icmp_unsigned("!=", self.e.b.and_(rows, wanted), self.e.zeros(I8, 64))

    # ---- parts -------------------------------------------------------------------------------------------------------

    def _and(self, words: Any, mask: int) -> Any:
        return self.e.b.and_(words, self.e.constant(I32, mask))

    def _bytes(self, words: Any) -> Any:
        return self.e.b.bitcast(words, vector(I8, 64))

    def _part(self, name: str, size: int, more: int = 0) -> Any:
        kind = {1: I8, 2: I16, 4: I32}[size]
        found = self.e.load(self.codes, vector(kind), self.layout.place[name] + more)
        return found if size == 4 else self.e.b.zext(found, vector(I32))

    def _index(self, index: int) -> Any:
        low = self._low[index // 4]
        place = index % 4
        found = self.e.shifted(low, -8 * place)
        found = found if place == 3 else self._and(found, 255)
        bits = HIGH_BITS.get(self.layout.name, 0)
        if not bits:
            return found
        xs = self.layout.name == "IQ2_XS"
        start = self.layout.left_out[index] if xs else bits * index
        source = self._stored_signs if xs else self._high
        mask = ((1 << min(bits, 3)) - 1) << 8
        return self.e.b.or_(found, self._and(self.e.shifted(source, 8 - start), mask))

    def _small(self) -> list[Any]:
        e, b, layout = self.e, self.e.b, self.layout
        if layout.name == "IQ1_S":
            return [self._and(self.e.shifted(self._high, -12), 7)]
        if layout.name == "IQ3_XXS":
            return [self.e.shifted(self._stored_signs, -28)]
        if layout.name == "IQ2_XXS":
            odd, even = self.e.shifted(self._stored_signs, -28), self.e.shifted(self._stored_signs, -21)
            return [b.or_(self._and(odd, 0b1010), self._and(even, 0b0101))]
        if layout.scales:
            both = self._part("scales", 1)
            return [self._and(both, 15), self.e.shifted(both, -4)]
        pair = b.lshr(self.group, e.int64(1))
        odd = b.trunc(b.and_(self.group, e.int64(1)), I32)
        size = 1 if layout.name == "IQ3_S" else 2
        at = b.add(self.block, b.mul(pair, e.int64(size * ROWS)))
        words = b.zext(e.load(at, vector(I8 if size == 1 else I16), 2 * ROWS * (size == 1)), vector(I32))
        if size == 1:
            return [self._and(b.lshr(words, e.splat(b.mul(odd, ir.Constant(I32, 4)))), 15)]
        words = b.lshr(words, e.splat(b.mul(odd, ir.Constant(I32, 6))))
        return [self._and(self.e.shifted(words, -3 * half), 7) for half in (0, 1)]

    def _super(self) -> Any:
        e, b = self.e, self.e.b
        if self.layout.name != "IQ1_M":
            return e.b.fpext(e.load(self.block, vector(F16)), vector(F32))
        found = e.zeros(I16)
        for word in range(4):
            part = e.load(self.block, vector(I16), 2 * ROWS * word)
            part = b.and_(part, e.constant(I16, 0xF000))
            moved = b.lshr(part, e.constant(I16, 12 - 4 * word)) if word < 3 else part
            found = b.or_(found, moved)
        return b.fpext(b.bitcast(found, vector(F16)), vector(F32))

    @cached_property
    def _low(self) -> list[Any]:
        return [self._part("low", 4, 4 * ROWS * half) for half in range(8 // self.layout.span)]

    @cached_property
    def _high(self) -> Any:
        return self._part("high", self.layout.high)

    @cached_property
    def _stored_signs(self) -> Any:
        return self._part("signs", 4)

    @cached_property
    def _signs(self) -> Any:
        """Return the group's word of signs, including those that the file encodes as parity."""
        words, layout, b = self._stored_signs, self.layout, self.e.b
        if not layout.parity:
            return words
        told = sum(1 << bit for bit in layout.left_out)
        words = parity = self._and(words, ~told)
        for by in (16, 8, 4) if layout.span == 4 else (16, 4, 1):  # the parity moves to the bits of every 8th weight
            parity = b.xor(parity, self.e.shifted(parity, by))
        return b.or_(words, self._and(parity, told))

    @cached_property
    def _planes(self) -> np.ndarray:
        """The grid as uint8 [2, entries]: magnitudes of the first half of an index's weights, and of the other half."""
        found = numbers(self.layout.name)
        codes = np.searchsorted(self._sizes, found).astype(np.uint8).reshape(len(found), 2, -1)
        bits = 8 // codes.shape[2]
        places = bits * np.arange(codes.shape[2], dtype=np.uint8)
        return np.ascontiguousarray((codes << places).sum(2, dtype=np.uint8).T)

    @property
    def _table(self) -> np.ndarray:
        """A word for each index: bytes 0 and 2 are its `_planes`; for IQ1, the nibbles of weights 0, 4, 1, 5, ..."""
        if self.layout.signs:
            first, second = self._planes.astype(np.uint32)
            return first | second << np.uint32(16)
        codes = np.searchsorted(self._sizes, numbers(self.layout.name)).astype(np.uint32)
        places = np.arange(8)
        return (codes << (8 * (places % 4) + 4 * (places // 4)).astype(np.uint32)).sum(1, dtype=np.uint32)

    @property
    def _sizes(self) -> np.ndarray:
        """Every value in the type's grid, in ascending order: magnitudes, or -8, 0 and 8 for IQ1."""
        return np.unique(numbers(self.layout.name))

    @property
    def _bytes_of_nibbles(self) -> list[int]:
        """What `quad` returns, by nibble: two or three bits select from `_sizes`, one is the sign (IQ1: of the 1/8)."""
        sizes, few = self._sizes.tolist(), 7 if self.layout.span == 4 else 3
        sizes += [0] * (few + 1 - len(sizes))
        if self.layout.signs:
            found = [(-1 if nibble & 8 else 1) * sizes[nibble & few] for nibble in range(16)]
        else:
            found = [sizes[nibble & few] + (-1 if nibble & 4 else 1) for nibble in range(16)]
        if self._named is None:
            return [128 + number for number in found]
        return [self._named.index(number) if number in self._named else 0 for number in found]


# ---- tiles of codes --------------------------------------------------------------------------------------------------


def _in_order(e: Emitter, layout: GridLayout, quads: list[Any]) -> list[Any]:
    """Convert quads in the order of `GridLayout.order` to quads of consecutive weights."""
    stands, found = np.argsort(layout.order), []
    for quad in range(8):
        masks: defaultdict[tuple[int, int], int] = defaultdict(int)
        for byte in range(4):
            source, at = divmod(int(stands[4 * quad + byte]), 4)
            masks[source, 8 * (byte - at)] |= 255 << 8 * at
        parts = []
        for (source, by), mask in masks.items():
            part = e.b.and_(quads[source], e.constant(I32, mask))
            parts.append(e.shifted(part, by))
        found.append(reduce(e.b.or_, parts))
    return found


def _vectors(e: Emitter, quads: list[Any], bits: int) -> list[Any]:
    """Convert quads of codes to the vectors of a group, nibbles or triples (`layout.py`)."""

    def field(quad: int, start: int, count: int, target: int) -> Any:
        words = quads[quad]
        if start or count < bits:
            words = e.b.and_(words, e.constant(I32, ((1 << count) - 1 << start) * 0x01010101))
        return e.shifted(words, target - start)

    if bits == 4:
        return [e.b.or_(field(quad, 0, 4, 0), field(quad + 4, 0, 4, 4)) for quad in range(4)]
    above = ((field(6, 0, 2, 6),), (field(6, 2, 1, 6), field(7, 2, 1, 7)), (field(7, 0, 2, 6),))
    return [
        reduce(e.b.or_, more, e.b.or_(field(2 * at, 0, 3, 0), field(2 * at + 1, 0, 3, 3)))
        for at, more in enumerate(above)
    ]


@emitted
def _code_blocks(e: Emitter, kind: PackedKind, isa: Isa, blocks: Int, to: Int, count: Int) -> None:
    """Convert `count` consecutive blocks of indices to blocks of codes."""
    b = e.b
    layout, grid = LAYOUTS[kind], FORMATS[kind.type.name]
    assert isinstance(layout, TileLayout)
    with e.each(count) as index:
        source = b.add(blocks, b.mul(index, e.int64(grid.block_bytes)))
        target = b.add(to, b.mul(index, e.int64(layout.block_bytes)))
        with e.each(e.int64(GROUPS)) as number:
            codes = b.add(source, b.add(b.mul(number, e.int64(grid.code_bytes)), e.int64(grid.head_bytes)))
            found = GridGroup(e, grid, isa, source, number, codes, layout.values)
            e.store(target, found.unit())
            small = b.add(target, b.mul(number, e.int64(layout.small_bytes)))
            for half, odd in enumerate(found.odds()):
                e.store(small, b.trunc(odd, vector(I8)), layout.floats_bytes + half * ROWS)
            place = b.add(target, b.add(b.mul(number, e.int64(layout.code_bytes)), e.int64(layout.head_bytes)))
            quads = _in_order(e, grid, [found.quad(quad) for quad in range(8)])
            for at, part in enumerate(_vectors(e, quads, layout.bits)):
                e.store(place, part, at * VECTOR_BYTES)


def make_codes(KIND: int, ISA: int) -> Any:
    """Return a function of two addresses and a count that converts blocks of indices to as many blocks of codes."""

    def grids_to_codes(blocks: int, to: int, count: int) -> None:
        _code_blocks(KIND, ISA, blocks, to, count)

    return grids_to_codes
