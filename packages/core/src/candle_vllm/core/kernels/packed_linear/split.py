# SPDX-License-Identifier: MIT
"""Split blocks of ggml's types, except IQ1 to IQ3, into the parts of the packed layout, in numpy, for `pack.py`.

`quantization/ggml_types.py` describes the contents of a block; `layout.py` defines group, quad and vector. Shapes: B
blocks of a row, R rows, G groups of a block. Data that must be converted is copied to **planes**, uint32 [words, B, R],
word n of all blocks and rows in contiguous memory, which is fast. Data that already has the layout's form is a view.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from candle_vllm.core.kernels.packed_linear.layout import GROUP, LAYOUTS, TRITS, PackedKind, TileLayout
from candle_vllm.core.quantization.ggml_blocks import e4m3_codes, small_scales, take_apart
from candle_vllm.core.quantization.ggml_types import CONTENTS, BlockContents, Fields


class ChunkCodes(NamedTuple):
    """Parts of a chunk of rows; `small` has the sub-scales and sub-minima of nested kinds, None for other kinds."""

    codes: np.ndarray  # uint32 [G, vectors, B, R]; [1, vectors of a block, B, R] for base-3 digits
    floats: list[np.ndarray]  # bits of floats, uint8 to uint32 [B, R] each
    small: np.ndarray | None  # uint32 [words, B, R]: 4 sub-scales in a word


def split(blocks: np.ndarray, kind: PackedKind) -> ChunkCodes:
    """Split blocks of the kind's ggml type, uint8 [R, B, bytes]; the parts may be views of the blocks."""
    contents, layout = CONTENTS[kind.type], LAYOUTS[kind]
    assert isinstance(layout, TileLayout)
    floats = [part for place in contents.floats for part in _floats(blocks, place, contents)]
    if layout.nested and layout.minimum:
        floats[1] = floats[1] ^ np.uint16(0x8000)  # the kernels add the minimum
    codes = _codes(blocks, contents, layout) if contents.codes else _digits(blocks, contents)
    return ChunkCodes(codes, floats, _small(blocks, contents, layout))


def _floats(blocks: np.ndarray, place: tuple[int, int], contents: BlockContents) -> list[np.ndarray]:
    """Return the bits of the floats that are in `place`: [B, R] each, views if possible."""
    data = blocks[..., slice(*place)]
    if contents.float == "e4m3":
        return list(e4m3_codes(data).transpose(2, 1, 0))
    return [data.view({"f16": np.uint16, "f32": np.uint32, "e8m0": np.uint8}[contents.float])[..., 0].T]


def _words(blocks: np.ndarray, fields: Fields) -> np.ndarray:
    """Return the words of some fields, uint32 [words, B, R]: a view, which may be unaligned."""
    return blocks[..., fields.start : fields.stop].view(np.uint32).transpose(2, 1, 0)


def _planes(blocks: np.ndarray, fields: Fields) -> np.ndarray:
    """Return `_words` as a contiguous copy."""
    return np.ascontiguousarray(_words(blocks, fields))


def _each(value: int) -> np.uint32:
    """Return a word whose four bytes are `value`."""
    return np.uint32(value * 0x01010101)


def _taken(words: np.ndarray, place: int, bits: int) -> np.ndarray:
    """Return `bits` bits, from bit `place` on, of each byte."""
    if bits == 8:
        return words
    return (words >> np.uint32(place) if place else words) & _each((1 << bits) - 1)


# ---- codes: from the file's order to vectors of the layout; quads are [..., 8, B, R] ---------------------------------


def _codes(blocks: np.ndarray, contents: BlockContents, layout: TileLayout) -> np.ndarray:
    """Return the vectors of all groups, high bits first: uint32 [G, vectors, B, R]."""
    fields = contents.codes[::-1]
    if len(fields) == 1 and _in_order(fields[0]):
        if layout.zero == contents.zero or layout.values is not None:
            words = _words(blocks, fields[0])
            return words.reshape(layout.groups, -1, *words.shape[1:])
        words = _planes(blocks, fields[0]) ^ _each(layout.zero)  # signed to unsigned: flips a byte's highest bit
        return words.reshape(layout.groups, -1, *words.shape[1:])
    codes = np.empty((layout.groups, layout.bits, *blocks.shape[1::-1]), np.uint32)
    first = 0
    for piece in fields:
        _fill(codes[:, first : first + piece.bits], _planes(blocks, piece), piece)
        first += piece.bits
    return codes


def _in_order(fields: Fields) -> bool:
    """Return whether the vectors of a group are the same in the file and in the layout."""
    return fields.bits == 8 or fields.width * 8 // fields.bits == GROUP


def _fill(vectors: np.ndarray, words: np.ndarray, fields: Fields) -> None:
    """Write the vectors of some fields of all groups, [G, vectors, B, R]."""
    if _in_order(fields):
        vectors[:] = words
    elif fields.width == 1:
        vectors[:] = _bits_in_order(words)[:, None]
    elif fields.width < GROUP // 2:
        _fill_halves(vectors, words)
    else:
        runs = words.reshape(-1, fields.width // GROUP, 8, *words.shape[1:])
        out = vectors.reshape(len(runs), len(fields.places), runs.shape[1], *vectors.shape[1:])
        for index, place in enumerate(fields.places):
            nibbles = fields.bits == 4
            out[:, index] = _nibble_vectors(runs, place) if nibbles else _dense_vectors(runs, place, fields.bits)


def _fill_halves(vectors: np.ndarray, words: np.ndarray) -> None:
    """Write the vectors of nibbles if each half of a group has two words of its own."""
    halves = words.reshape(-1, 2, 2, *words.shape[1:])
    first, second = halves[:, 0], halves[:, 1]
    vectors[:, :2] = first & _each(15) | (second & _each(15)) << 4
    vectors[:, 2:] = first >> 4 & _each(15) | second & _each(0xF0)


def _digits(blocks: np.ndarray, contents: BlockContents) -> np.ndarray:
    """Return the vectors of blocks of base-3 digits: uint32 [1, vectors, B, R]."""
    codes = take_apart(blocks, contents, np).codes + np.uint8(contents.zero)
    quads = codes.reshape(*codes.shape[:-1], -1, 4)
    missing = -quads.shape[-2] % TRITS
    quads = np.pad(quads, (*[(0, 0)] * (quads.ndim - 2), (0, missing), (0, 0)))
    turns = quads.reshape(*quads.shape[:2], -1, TRITS, 4)
    whole = np.zeros(turns[..., 0, :].shape, np.uint16)
    for digit in range(TRITS):
        whole = whole * 3 + turns[..., digit, :]
    found = np.ascontiguousarray(((whole * 256 + 242) // 243).astype(np.uint8)).view(np.uint32)
    return found[..., 0].transpose(2, 1, 0)[None]


def _nibble_vectors(quads: np.ndarray, place: int) -> np.ndarray:
    """Return the nibbles from bit `place` on as 4 vectors."""
    first, second = quads[..., :4, :, :], quads[..., 4:, :, :]
    if place:
        return (first >> 4 & _each(15)) | (second & _each(0xF0))
    return (first & _each(15)) | ((second & _each(15)) << 4)


def _dense_vectors(quads: np.ndarray, place: int, bits: int) -> np.ndarray:
    """Return one or two bits from bit `place` on as as many vectors, each of adjacent quads."""
    taken = _taken(quads, place, bits)
    taken = taken.reshape(*taken.shape[:-3], bits, 8 // bits, *taken.shape[-2:])
    return np.bitwise_or.reduce(taken << np.arange(0, 8, bits, dtype=np.uint32)[:, None, None], axis=-3)


def _bits_in_order(word: np.ndarray) -> np.ndarray:
    """Convert a word whose bit k belongs to weight k to a vector: bit 4j + b becomes bit j of byte b."""
    vector = np.zeros_like(word)
    for quad in range(8):
        four = word >> np.uint32(4 * quad) & np.uint32(15)
        vector |= (four * np.uint32(0x00204081) & _each(1)) << np.uint32(quad)
    return vector


# ---- sub-scales ------------------------------------------------------------------------------------------------------


def _small(blocks: np.ndarray, contents: BlockContents, layout: TileLayout) -> np.ndarray | None:
    """Return the sub-scales and sub-minima of nested kinds in the layout's form, uint32 [words, B, R], or None."""
    if not layout.nested:
        return None
    if layout.paired:  # each scale is next to its minimum, in the file and in the layout
        return _planes(blocks, contents.small[0][0])
    if layout.lone:  # a block has too few sub-scales to process them in words
        scales = np.ascontiguousarray(small_scales(blocks, contents, np))
        return np.ascontiguousarray(scales.view(np.uint32).transpose(2, 1, 0))
    pieces = [_numbers(blocks, fields) for fields in contents.small]
    found = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    if contents.small_zero:
        found = np.subtract(found.view(np.uint8), contents.small_zero).view(np.uint32)
    if not contents.turn:
        return found
    turns = found.reshape(-1, 2, *found.shape[1:])  # scales of four groups, then their minima
    halves = [_apart(turns >> np.uint32(16 * half)) for half in range(2)]  # two groups each
    return np.stack([half[:, 0] | half[:, 1] << np.uint32(8) for half in halves], axis=1).reshape(found.shape)


def _apart(words: np.ndarray) -> np.ndarray:
    """Move the lower two bytes to the lowest and the third byte."""
    return words & np.uint32(0xFF) | (words & np.uint32(0xFF00)) << np.uint32(8)


def _numbers(blocks: np.ndarray, several: tuple[Fields, ...]) -> np.ndarray:
    """Return small numbers of several fields, four in a word: [words, B, R]."""
    found = None
    for fields in several:
        data = _planes(blocks, fields)
        runs = data.reshape(-1, fields.width // 4, *data.shape[1:])
        taken = [_taken(runs, place, fields.bits) for place in fields.places]
        bits = (taken[0] if len(taken) == 1 else np.stack(taken, axis=1)).reshape(-1, *data.shape[1:])
        found = bits if found is None else found | bits << np.uint32(fields.shift)
    assert found is not None
    return found
