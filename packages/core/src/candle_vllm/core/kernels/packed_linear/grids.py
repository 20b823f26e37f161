# SPDX-License-Identifier: MIT
"""Layouts of the types with a grid of weights, IQ1, IQ2 and IQ3, and their packing from a file.

Terms: see `layout.py`. An **index** selects four or eight consecutive weights at once from a **grid**, a list in ggml's
sources; except in IQ1, a bit for each weight is its sign. A block is 256 weights of 16 rows:

    head    super-scale f16[16]; IQ3_S: then 4 x u8[16], each byte with the scales of two groups; IQ1_M: 4 x u16[16]
            instead, each with four scales of 3 bits and 4 bits of the super-scale
    groups  of 32 weights, eight times: low bytes of the indices, u32[16] (twice for IQ3, which has eight indices),
            signs u32[16], high bits of the indices u8[16] or u16[16], scales u8[16], if the type has them

The decoder combines a weight's sign and magnitude in a nibble. Eight nibbles are a **word**; a group of a row has four
words. In IQ2 and IQ3 bytes 0 and 1 of a word are for the first half of the weights of two adjacent indices, bytes 2 and
3 for the second half; in IQ1 a word is one index (`GridLayout.order`). Signs of the weights in byte c of word k are
bits k (low nibble) and 4 + k (high nibble) of byte c of the group's signs. In some types the sign of every 8th weight
is the parity of the other seven; the bits of these signs then hold the scale of the group (IQ2_XXS, IQ3_XXS) or the
ninth bits of the indices (IQ2_XS). IQ1 has no signs: its weights are -1, 0 or 1 plus or minus 1/8, and the sign of the
1/8 is above the indices' bits. A weight is super-scale * (2 * scale + 1) * `unit` * n, where n is the value in
`numbers` with its sign, or in IQ1 the value in `numbers` plus or minus 1.

A tile has the bytes of its rows in the file. The grids come from the `gguf` package. Source: ggml's `ggml-common.h`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

ROWS, GROUPS = 16, 8
HIGH_BITS: Mapping[str, int] = MappingProxyType({"IQ1_S": 3, "IQ1_M": 4, "IQ2_XS": 1, "IQ2_S": 2, "IQ3_S": 1})
"""Bits of an index above its low byte, by type; the fourth of IQ1_M is the sign of 1/8, not part of the index."""


@dataclass(frozen=True)
class GridLayout:
    """Properties of a layout with a grid.

    Attributes:
        name: name of the type.
        span: number of weights of an index.
        width: number of weights that share a scale, 32 or 16.
        unit: the smallest scale divided by the super-scale.
        signs: bytes of a group's signs in a row: 4 or 0.
        parity: whether the file has only seven of eight signs.
        high: bytes of the high bits of the indices.
        scales: bytes of a group's separate scales.
        head: bytes of a row's part of the head.
    """

    name: str
    span: int
    width: int
    unit: float
    signs: int
    parity: bool
    high: int
    scales: int
    head: int

    minimum = False
    nested = True
    paired = False
    zero = 128
    groups = GROUPS
    floats_bytes = 2 * ROWS

    @property
    def head_bytes(self) -> int:
        """Bytes before a block's groups."""
        return ROWS * self.head

    @property
    def code_bytes(self) -> int:
        """Bytes of a group."""
        return ROWS * (32 // self.span + self.signs + self.high + self.scales)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return self.head_bytes + GROUPS * self.code_bytes

    def tile_bytes(self, columns: int) -> int:
        """Return the bytes of a tile of `columns` weights per row."""
        return columns // 256 * self.block_bytes

    @cached_property
    def order(self) -> tuple[int, ...]:
        """The weight at each of a group's 32 places; nibble q % 2 of byte c of word q // 2 is place 4 q + c."""
        if not self.signs:
            return tuple(range(32))
        found = []
        for place in range(32):
            word, high, other, odd = place >> 3, place >> 2 & 1, place >> 1 & 1, place & 1
            if self.span == 4:
                found.append(8 * word + 4 * odd + 2 * other + high)
            else:
                found.append(16 * (word >> 1) + 8 * odd + 4 * other + 2 * high + (word & 1))
        return tuple(found)

    @property
    def left_out(self) -> tuple[int, ...]:
        """Bits of a word of signs that the file encodes as parity: the signs of weights 7, 15, 23 and 31."""
        return (28, 29, 30, 31) if self.span == 4 else (21, 29, 23, 31)

    @property
    def place(self) -> dict[str, int]:
        """Offsets of the parts of a group."""
        sizes = {"low": 32 // self.span, "signs": self.signs, "high": self.high, "scales": self.scales}
        found, at = {}, 0
        for name, size in sizes.items():
            found[name] = at
            at += ROWS * size
        return found


FORMATS = {
    layout.name: layout
    for layout in (
        GridLayout("IQ1_S", 8, 32, 1 / 8, 0, False, 2, 0, 2),
        GridLayout("IQ1_M", 8, 16, 1 / 8, 0, False, 2, 0, 8),
        GridLayout("IQ2_XXS", 8, 32, 1 / 8, 4, True, 0, 0, 2),
        GridLayout("IQ2_XS", 8, 16, 1 / 8, 4, True, 0, 1, 2),
        GridLayout("IQ2_S", 8, 16, 1 / 8, 4, False, 1, 1, 2),
        GridLayout("IQ3_XXS", 4, 32, 1 / 4, 4, True, 0, 0, 2),
        GridLayout("IQ3_S", 4, 32, 1.0, 4, False, 1, 0, 6),
    )
}
"""Layouts by type."""


@cache
def numbers(name: str) -> np.ndarray:
    """Return the grid of a type: int16 [entries, 4 or 8]; IQ1's -1, 0 and 1 are multiplied by eight."""
    import gguf

    kind = getattr(gguf.quants, name)
    kind.init_grid()
    grid = kind.grid.reshape(kind.grid_shape)
    return (8 * grid if name.startswith("IQ1") else grid).astype(np.int16)


def split(blocks: np.ndarray, layout: GridLayout) -> Iterable[tuple[int, np.ndarray]]:
    """Split R rows of B blocks of the file, uint8 [R, B, bytes]. Yield (offset in a tile's block, part): parts of the
    head [R, B], of groups [R, B, 8], uint8 to uint32."""
    name, place = layout.name, layout.place

    def part(start: int, stop: int, kind: type[np.generic]) -> np.ndarray:
        return blocks[..., start:stop].view(kind)

    def in_group(part_name: str, data: np.ndarray, more: int = 0) -> tuple[int, np.ndarray]:
        return layout.head_bytes + place[part_name] + more, data

    if name == "IQ1_M":
        scales = part(48, 56, np.uint16)
        for word in range(4):
            yield 2 * ROWS * word, scales[..., word]
        yield in_group("low", part(0, 32, np.uint32))
        yield in_group("high", part(32, 48, np.uint16))
        return
    yield 0, part(0, 2, np.uint16)[..., 0]
    if name == "IQ1_S":
        yield in_group("low", part(2, 34, np.uint32))
        yield in_group("high", part(34, 50, np.uint16))
    elif name == "IQ2_XXS":
        words = part(2, 66, np.uint32)
        yield in_group("low", words[..., ::2])
        yield in_group("signs", _signs_of_seven(words[..., 1::2], layout) | _left_out(words[..., 1::2]))
    elif name == "IQ2_XS":
        pairs = part(2, 66, np.uint16).reshape(*blocks.shape[:2], GROUPS, 4)
        yield in_group("low", np.ascontiguousarray(pairs & 255).astype(np.uint8).view(np.uint32)[..., 0])
        signs = np.zeros(pairs.shape[:3], np.uint32)
        ninth = signs.copy()
        for index in range(4):
            signs |= (pairs[..., index] >> 9).astype(np.uint32) << np.uint32(7 * index)
            ninth |= (pairs[..., index] >> 8 & 1).astype(np.uint32) << np.uint32(28 + index)
        yield in_group("signs", _signs_of_seven(signs, layout) | _left_out(ninth))
        yield in_group("scales", blocks[..., 66:74])
    elif name == "IQ2_S":
        yield in_group("low", part(2, 34, np.uint32))
        yield in_group("signs", _signs(part(34, 66, np.uint32), layout))
        yield in_group("high", blocks[..., 66:74])
        yield in_group("scales", blocks[..., 74:82])
    else:
        words = part(2, 66, np.uint32)
        yield in_group("low", words[..., ::2])
        yield in_group("low", words[..., 1::2], 4 * ROWS)
        if name == "IQ3_XXS":
            words = part(66, 98, np.uint32)
            yield in_group("signs", _signs_of_seven(words, layout) | words & np.uint32(0xF0000000))
        else:
            yield in_group("high", blocks[..., 66:74])
            yield in_group("signs", _signs(part(74, 106, np.uint32), layout))
            for pair in range(4):
                yield ROWS * (2 + pair), blocks[..., 106 + pair]


def store(blocks: np.ndarray, layout: GridLayout, tiles: np.ndarray) -> None:
    """Write rows of blocks, uint8 [R, B, bytes], to their tiles, uint8 [R / 16, bytes]."""
    whole = tiles.reshape(len(tiles), -1, layout.block_bytes)
    for at, part in split(blocks, layout):
        size = ROWS * part.itemsize
        rows = part.reshape(len(tiles), ROWS, *part.shape[1:])
        if part.ndim == 2:
            whole[..., at : at + size].view(part.dtype)[:] = rows.transpose(0, 2, 1)
            continue
        groups = whole[..., layout.head_bytes :].reshape(*whole.shape[:2], GROUPS, layout.code_bytes)
        at -= layout.head_bytes
        groups[..., at : at + size].view(part.dtype)[:] = rows.transpose(0, 2, 3, 1)


_CHANGES = {8: ((2, 0x0C0C0C0C), (14, 0x0000CCCC)), 4: ((3, 0x0A0A0A0A), (7, 0x00AA00AA), (14, 0x0000CCCC))}
"""Swaps of bits, by span, that convert signs in the order of weights to the order in a tile: distance of the swapped
bits, and mask of the lower of them."""


def _signs(words: np.ndarray, layout: GridLayout) -> np.ndarray:
    """Convert the sign bits of weights 0 to 31 to the order in a tile."""
    for apart, chosen in _CHANGES[layout.span]:
        change = (words >> np.uint32(apart) ^ words) & np.uint32(chosen)
        words = words ^ change ^ change << np.uint32(apart)
    return words


def _signs_of_seven(words: np.ndarray, layout: GridLayout) -> np.ndarray:
    """Do what `_signs` does for words of 4 times 7 bits; the sign of every 8th weight is 0."""
    spread = words & np.uint32(0x7F)
    for index in range(1, 4):
        spread |= (words & np.uint32(0x7F << 7 * index)) << np.uint32(index)
    return _signs(spread, layout)


def _left_out(words: np.ndarray) -> np.ndarray:
    """Move bits 28 to 31 to the bits of the signs that IQ2 encodes as parity."""
    return words >> np.uint32(7) & np.uint32(0x00A00000) | words & np.uint32(0xA0000000)


# ---- decoding, literal enough to check by eye; for arrays of numpy or of a library with the same operators -----------


class GridParts(NamedTuple):
    """Decoded parts of blocks.

    Attributes:
        indices: integers [..., 8, 32 / span], indices in the grid.
        flags: [..., 8, 32], 0 or 1: whether a weight is negated, or, in IQ1, whether 1/8 is subtracted.
        scales: [..., 8, 32 / width] odd integers.
        supers: [...], the bits of the super-scales.
    """

    indices: Any
    flags: Any
    scales: Any
    supers: Any


def decoded(parts: Mapping[int, np.ndarray], layout: GridLayout, to: Callable[[np.ndarray], Any]) -> GridParts:
    """Decode the results of `split`, by their offsets; `to` converts int64 arrays to arrays of any library."""

    def part(name: str, more: int = 0) -> Any:
        return to(parts[layout.head_bytes + layout.place[name] + more].astype(np.int64))

    def bits(words: Any, places: Sequence[int], most: int = 1) -> Any:
        return words[..., None] >> to(np.array(places)) & most

    count, places = 32 // layout.span, range(32)
    low = bits(part("low"), range(0, 32, 8), 255)
    indices = to(np.zeros((*low.shape[:-1], count), np.int64))
    indices[..., :4] = low
    if count == 8:
        indices[..., 4:] = bits(part("low", 4 * ROWS), range(0, 32, 8), 255)
    signs = part("signs") if layout.signs else None
    high = part("high") if layout.high else None
    above = HIGH_BITS.get(layout.name, 0)
    if layout.name == "IQ2_XS":
        indices |= bits(signs, layout.left_out) << 8
    elif above:
        indices |= bits(high, range(0, above * count, above), (1 << min(above, 3)) - 1) << 8
    if signs is None:
        flags = bits(high, [15 if layout.name == "IQ1_S" else 4 * (weight // 8) + 3 for weight in places])
    else:
        stands = np.argsort(layout.order)
        flags = bits(signs, [int(8 * (at % 4) + 4 * (at // 4 % 2) + at // 8) for at in stands])
        if layout.parity:
            for last in (7, 15, 23, 31):
                flags[..., last] = flags[..., last - 7 : last].sum(-1) & 1
    if layout.name == "IQ1_M":
        words = [to(parts[2 * ROWS * word].astype(np.int64)) for word in range(4)]
        supers = sum((word >> 12 << 4 * place for place, word in enumerate(words)), start=0 * words[0])
        small = to(np.zeros((*flags.shape[:-1], 2), np.int64))
        for group in range(GROUPS):
            small[..., group, :] = bits(words[group // 2] >> 6 * (group % 2), (0, 3), 7)
        return GridParts(indices, flags, 2 * small + 1, supers)
    supers = to(parts[0].astype(np.int64))
    if layout.name == "IQ3_S":
        small = to(np.zeros((*flags.shape[:-1], 1), np.int64))
        for pair in range(4):
            found = to(parts[ROWS * (2 + pair)].astype(np.int64))
            small[..., 2 * pair : 2 * pair + 2, 0] = bits(found, (0, 4), 15)
    elif layout.name == "IQ1_S":
        small = bits(high, (12,), 7)
    elif layout.scales:
        small = bits(part("scales"), (0, 4), 15)
    else:
        small = (bits(signs, layout.left_out) << to(np.arange(4))).sum(-1)[..., None]
    return GridParts(indices, flags, 2 * small + 1, supers)


def values(name: str) -> tuple[int, ...]:
    """Return the 16 values of a type's 4-bit codes: three bits select a grid number, the fourth is the flag."""
    sizes = np.unique(numbers(name)).tolist()
    sizes += [0] * (8 - len(sizes))
    if FORMATS[name].signs:
        return (*sizes, *(-size for size in sizes))
    return (*(size + 1 for size in sizes), *(size - 1 for size in sizes))


def codes(name: str) -> np.ndarray:
    """Return the lower three bits of a type's 4-bit codes for each index, int64 [entries, span]."""
    found = numbers(name)
    return np.searchsorted(np.unique(found), found).astype(np.int64)
