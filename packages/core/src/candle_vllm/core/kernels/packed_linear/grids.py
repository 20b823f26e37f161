# SPDX-License-Identifier: MIT
"""The types whose weights stand in a grid: IQ1, IQ2 and IQ3. How they lie in memory, and the way there from a file.

Stands beside `layout.py`, inside step 6 of a request's life. An index chooses four or eight neighbouring weights at
once from a list that ggml's authors found to be good; a bit for each weight is its sign. A block is 256 weights of 16
rows:

    head    super-scale f16[16]; IQ3_S: then 4 x u8[16], the scales of two groups in each; IQ1_M: 4 x u16[16] instead,
            which hold four scales of 3 bits and 4 bits of the super-scale
    groups  of 32 weights, eight times: low bytes of the indices, u32[16] (twice for IQ3, which has eight indices),
            signs u32[16], high bits of the indices u8[16] or u16[16], scales u8[16], as far as the type has them

A weight's sign meets its size in a nibble, and eight nibbles are a word, of which a group of a row has four: bytes 0
and 1 of a word stand for the first weights of two neighbouring indices, bytes 2 and 3 for their other ones
(`GridLayout.order`). Signs of the weights in byte c of word k are bits k (low nibble) and 4 + k (high nibble) of byte
c. Where the file leaves the sign of each eighth weight to the parity of the other seven, these four bits hold something
else: the scale of the group (IQ2_XXS, IQ3_XXS) or the ninth bits of the indices (IQ2_XS). IQ1 has no signs: its weights
are -1, 0 or 1 plus or minus an eighth, of which the bits above the indices tell. A weight is
super-scale * (2 * scale + 1) * `unit` * number.

A tile has exactly the bytes of the file. The lists are read from the `gguf` package. Source: ggml's `ggml-common.h`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

ROWS, GROUPS = 16, 8


@dataclass(frozen=True)
class GridLayout:
    """Facts of such a kind.

    Attributes:
        name: of the type.
        span: weights of an index.
        width: weights that share a scale, 32 or 16.
        unit: what the smallest scale is of the super-scale.
        signs: bytes of a group's signs in a row: 4 or none.
        parity: whether the file has seven of eight signs.
        high: bytes above the indices.
        scales: bytes of a group's scales that stand by themselves.
        head: bytes of a row in front of its groups.
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
        """Bytes in front of a block's groups."""
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
        """Bytes of a tile of `columns` weights per row."""
        return columns // 256 * self.block_bytes

    @cached_property
    def order(self) -> tuple[int, ...]:
        """The weight of a group at each of its 32 places: nibble q % 2 of byte c of word q // 2 is place 4 q + c."""
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
        """Bits of a word of signs that the file leaves to parity, those of weights 7, 15, 23 and 31."""
        return (28, 29, 30, 31) if self.span == 4 else (21, 29, 23, 31)

    @property
    def place(self) -> dict[str, int]:
        """Where the parts of a group begin."""
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
"""By type."""


@cache
def numbers(name: str) -> np.ndarray:
    """The list of a type: whole numbers, int16 [entries, 4 or 8]. IQ1's -1, 0 and 1 are eight times as large."""
    import gguf

    kind = getattr(gguf.quants, name)
    kind.init_grid()
    grid = kind.grid.reshape(kind.grid_shape)
    return (8 * grid if name.startswith("IQ1") else grid).astype(np.int16)


def split(blocks: np.ndarray, layout: GridLayout) -> Iterable[tuple[int, np.ndarray]]:
    """The parts of rows of blocks, uint8 [R, B, bytes]: where each lies in a tile's block, and uint8 to uint32
    [R, B] of the head, [R, B, 8] of the groups."""
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
    """Writes rows of blocks, uint8 [R, B, bytes], to their tiles, uint8 [R / 16, bytes]."""
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
"""How far apart pairs of bits are that change places, and the lower ones: from a sign for each weight in turn."""


def _signs(words: np.ndarray, layout: GridLayout) -> np.ndarray:
    """Bits of weights 0 to 31 as they stand in a tile."""
    for apart, chosen in _CHANGES[layout.span]:
        change = (words >> np.uint32(apart) ^ words) & np.uint32(chosen)
        words = words ^ change ^ change << np.uint32(apart)
    return words


def _signs_of_seven(words: np.ndarray, layout: GridLayout) -> np.ndarray:
    """The same of 4 times 7 bits; those of the eighth are 0."""
    spread = words & np.uint32(0x7F)
    for index in range(1, 4):
        spread |= (words & np.uint32(0x7F << 7 * index)) << np.uint32(index)
    return _signs(spread, layout)


def _left_out(words: np.ndarray) -> np.ndarray:
    """Bits 28 to 31 where IQ2 has the signs that parity tells."""
    return words >> np.uint32(7) & np.uint32(0x00A00000) | words & np.uint32(0xA0000000)


# ---- the way back, literal enough to check by eye --------------------------------------------------------------------


def dequantise(data: np.ndarray, layout: GridLayout) -> np.ndarray:
    """The weights of tiles, uint8 [tiles, bytes], as float32 [16 * tiles, K]: ggml's numbers, to the bit."""
    blocks = data.reshape(len(data), -1, layout.block_bytes)
    records = blocks[..., layout.head_bytes :].reshape(*blocks.shape[:2], GROUPS, layout.code_bytes)

    def part(at: int, kind: type[np.generic], source: np.ndarray = records) -> np.ndarray:
        return np.ascontiguousarray(source[..., at : at + ROWS * np.dtype(kind).itemsize]).view(kind).astype(np.int64)

    place, count = layout.place, 32 // layout.span
    low = [part(4 * ROWS * (k // 4), np.uint32) >> 8 * (k % 4) & 255 for k in range(count)]
    signs = part(place["signs"], np.uint32) if layout.signs else np.zeros_like(low[0])
    high = part(place["high"], np.uint16 if layout.high == 2 else np.uint8) if layout.high else signs
    bits = {"IQ1_S": 3, "IQ1_M": 4, "IQ2_XS": 1, "IQ2_S": 2, "IQ3_S": 1}.get(layout.name, 0)
    starts = layout.left_out if layout.name == "IQ2_XS" else [bits * k for k in range(count)]
    most = (1 << min(bits, 3)) - 1
    chosen = [index | (high >> start & most) << 8 for start, index in zip(starts, low)]
    found = numbers(layout.name)[np.stack(chosen, -1)].astype(np.float32)  # [tiles, blocks, groups, rows, k, span]
    found = found.reshape(*found.shape[:4], 32)
    weight = np.arange(32)
    if layout.signs:
        stands = np.argsort(layout.order)
        flags = signs[..., None] >> 8 * (stands % 4) + 4 * (stands // 4 % 2) + stands // 8 & 1
        if layout.parity:
            of_eight = flags.reshape(*flags.shape[:-1], 4, 8)
            of_eight[..., 7] = of_eight[..., :7].sum(-1) & 1
        found *= 1 - 2 * flags
    else:
        shift = 15 if layout.name == "IQ1_S" else 4 * (weight // 8) + 3
        found += 1 - 2 * (high[..., None] >> shift & 1)
    half = np.arange(32 // layout.width)
    if layout.name == "IQ1_M":
        words = np.stack([part(2 * ROWS * word, np.uint16, blocks) for word in range(4)], 2)  # [tiles, blocks, 4, rows]
        tops = words >> 12 << 4 * np.arange(4)[:, None]
        bits16 = np.bitwise_or.reduce(tops, axis=2).astype(np.uint16)
        small = words.repeat(2, 2)[..., None] >> (6 * (np.arange(8) % 2))[:, None, None] + 3 * half & 7
    else:
        bits16 = part(0, np.uint16, blocks).astype(np.uint16)
        if layout.name == "IQ3_S":
            pairs = np.stack([part(ROWS * (2 + pair), np.uint8, blocks) for pair in range(4)], 2)
            small = (pairs.repeat(2, 2) >> (4 * (np.arange(8) % 2))[:, None] & 15)[..., None]
        elif layout.name == "IQ1_S":
            small = (high >> 12 & 7)[..., None]
        elif layout.scales:
            small = part(place["scales"], np.uint8)[..., None] >> 4 * half & 15
        else:
            bits4 = np.stack([signs >> bit & 1 for bit in layout.left_out], -1)
            small = (bits4 << np.arange(4)).sum(-1)[..., None]
    supers = bits16.view(np.float16).astype(np.float32)[:, :, None, :, None]
    scale = supers * (2 * small + 1).astype(np.float32) * np.float32(layout.unit)  # [tiles, blocks, groups, rows, half]
    weights = found * scale.repeat(layout.width, -1)
    return weights.transpose(0, 3, 1, 2, 4).reshape(ROWS * len(data), -1)
