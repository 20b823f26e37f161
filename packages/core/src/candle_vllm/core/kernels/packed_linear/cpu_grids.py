# SPDX-License-Identifier: MIT
"""Groups of the types whose weights stand in a grid, as vector code: what `cpu.py` multiplies; step 6 of a request.

An index of eight weights is looked up as a word of eight nibbles, which say which of a few sizes a weight has; its sign
is put into the same nibble, and a shuffle makes a byte of each. An index of four weights is looked up as four bytes,
which are negated where the sign says so. Both give 128 + weight, unsigned.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from llvmlite import ir

from candle_vllm.core.kernels.cpu_runtime.emit import F16, F32, I8, I16, I32, Emitter, vector
from candle_vllm.core.kernels.cpu_runtime.emit_tables import gather, look_up
from candle_vllm.core.kernels.cpu_runtime.level import Isa
from candle_vllm.core.kernels.packed_linear.grids import ROWS, SIGNS_BITS, GridLayout, numbers

_HIGH_BITS = {"IQ1_S": 3, "IQ1_M": 4, "IQ2_XS": 1, "IQ2_S": 2, "IQ3_S": 1}
_SIZES = {"IQ1": (-8, 0, 8), "IQ2": (8, 25, 43)}


class GridGroup:
    """A group of 16 rows: its scales, and its weights four by four."""

    def __init__(self, e: Emitter, layout: GridLayout, isa: Isa, block: Any, group: Any, codes: Any) -> None:
        self.e, self.layout, self.isa = e, layout, isa
        self.block, self.group, self.codes = block, group, codes
        self._halves: dict[int, list[Any]] = {}

    def scales(self) -> list[Any]:
        """Of the whole, or of its halves: vectors of floats."""
        e, layout = self.e, self.layout
        unit = e.b.fmul(self._super(), e.constant(F32, layout.unit))
        found = []
        for small in self._small():
            odd = e.b.or_(e.b.shl(small, e.constant(I32, 1)), e.constant(I32, 1))
            found.append(e.b.fmul(unit, e.b.sitofp(odd, vector(F32))))
        return found

    def quad(self, quad: int) -> Any:
        """128 + weight of the weights 4 quad to 4 quad + 3."""
        e, b = self.e, self.e.b
        if self.layout.span == 4:
            found = gather(e, self._table, self._index(quad), self.isa)
            place = ((quad % 2) * 4 + quad // 2) & 7
            flag = b.and_(self._bytes(self._signs), e.constant(I8, 1 << place, 64))
            given = self._bytes(found)
            turned = b.sub(e.zeros(I8, 64), given)
            return b.bitcast(b.select(b.icmp_unsigned("!=", flag, e.zeros(I8, 64)), turned, given), vector(I32))
        index, half = divmod(quad, 2)
        if index not in self._halves:
            word = b.or_(gather(e, self._table, self._index(index), self.isa), self._flags(index))
            self._halves[index] = [word, self._shifted(word, -4)]
        nibbles = b.and_(self._halves[index][half], e.constant(I32, 0x0F0F0F0F))
        return look_up(e, self._bytes_of_nibbles, nibbles, self.isa)

    # ---- parts -------------------------------------------------------------------------------------------------------

    def _shifted(self, words: Any, by: int) -> Any:
        """To the left, or the right where `by` is below zero."""
        if by == 0:
            return words
        shift = self.e.b.shl if by > 0 else self.e.b.lshr
        return shift(words, self.e.constant(I32, abs(by)))

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
        found = self._shifted(low, -8 * place)
        found = found if place == 3 else self._and(found, 255)
        bits = _HIGH_BITS.get(self.layout.name, 0)
        if not bits:
            return found
        start = SIGNS_BITS if self.layout.name == "IQ2_XS" else 0
        source = self._stored_signs if start else self._high
        mask = ((1 << min(bits, 3)) - 1) << 8
        return self.e.b.or_(found, self._and(self._shifted(source, 8 - start - bits * index), mask))

    def _flags(self, index: int) -> Any:
        """What is put into the nibbles of an index: signs, or on which side IQ1's eighth is."""
        name = self.layout.name
        if name == "IQ1_S":
            return self._eighths(15)
        if name == "IQ1_M":
            return self._eighths(4 * index + 3)
        return self._and(self._shifted(self._signs, 3 - index), 0x88888888)

    def _eighths(self, bit: int) -> Any:
        moved = self._shifted(self._high, 31 - bit)
        return self._and(self.e.b.ashr(moved, self.e.constant(I32, 31)), 0x44444444)

    def _small(self) -> list[Any]:
        e, b, layout = self.e, self.e.b, self.layout
        if layout.name == "IQ1_S":
            return [self._and(self._shifted(self._high, -12), 7)]
        if layout.name in ("IQ2_XXS", "IQ3_XXS"):
            return [self._shifted(self._stored_signs, -SIGNS_BITS)]
        if layout.scales:
            both = self._part("scales", 1)
            return [self._and(both, 15), self._shifted(both, -4)]
        pair = b.lshr(self.group, e.int64(1))
        odd = b.trunc(b.and_(self.group, e.int64(1)), I32)
        size = 1 if layout.name == "IQ3_S" else 2
        at = b.add(self.block, b.mul(pair, e.int64(size * ROWS)))
        words = b.zext(e.load(at, vector(I8 if size == 1 else I16), 2 * ROWS * (size == 1)), vector(I32))
        if size == 1:
            return [self._and(b.lshr(words, e.splat(b.mul(odd, ir.Constant(I32, 4)))), 15)]
        words = b.lshr(words, e.splat(b.mul(odd, ir.Constant(I32, 6))))
        return [self._and(self._shifted(words, -3 * half), 7) for half in (0, 1)]

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
        """With those that the file leaves to parity: the highest four bits."""
        words = self._stored_signs
        if not self.layout.parity:
            return words
        b = self.e.b
        words = self._and(words, (1 << SIGNS_BITS) - 1)
        parity = words
        for by in (-16, -8, -4):
            parity = b.xor(parity, self._shifted(parity, by))
        return b.or_(words, self._shifted(parity, SIGNS_BITS))

    @property
    def _table(self) -> np.ndarray:
        """A word for each index."""
        found = numbers(self.layout.name)
        if self.layout.span == 4:
            return np.ascontiguousarray((found + 128).astype(np.uint8)).view(np.uint32)[:, 0]
        sizes = _SIZES[self.layout.name[:3]]
        codes = np.searchsorted(sizes, found).astype(np.uint32)
        places = np.arange(8)
        return (codes << (8 * (places % 4) + 4 * (places // 4)).astype(np.uint32)).sum(1, dtype=np.uint32)

    @property
    def _bytes_of_nibbles(self) -> list[int]:
        """128 + weight: two bits for the size, one for the side of IQ1's eighth, one for the sign."""
        sizes = (*_SIZES[self.layout.name[:3]], 0)
        if self.layout.name.startswith("IQ1"):
            return [128 + sizes[nibble & 3] + (-1 if nibble & 4 else 1) for nibble in range(16)]
        return [128 + (-1 if nibble & 8 else 1) * sizes[nibble & 3] for nibble in range(16)]
