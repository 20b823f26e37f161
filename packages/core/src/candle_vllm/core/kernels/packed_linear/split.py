"""What is in a block of each ggml type, as the parts of the packed layout: numpy, used at load by `pack.py`.

The blocks of some rows are turned into **planes**, uint32 [words of a block, B, R]: every step then works on long
contiguous runs. A block that is not a whole number of words is filled up in front where its scale comes first, else
behind. What the bytes mean: ggml's `ggml-common.h`. Shapes: B blocks of a row, R rows, G groups of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.kernels.packed_linear.layout import GROUP, LAYOUTS, PackedKind


class ChunkCodes(NamedTuple):
    """What a chunk is made of; `small` are the sub-scales of K-quants."""

    codes: np.ndarray  # uint32 [G, vectors, B, R]
    floats: list[np.ndarray]  # uint16 [B, R] each, bits of float16
    small: list[np.ndarray]  # uint32 [B, R] each: 4 sub-scales


def split(blocks: np.ndarray, kind: PackedKind) -> ChunkCodes:
    """Takes blocks of the kind's own ggml type apart: uint8 [R, B, bytes]."""
    return _SPLITTERS[kind](_planes(blocks, front=not LAYOUTS[kind].nested))


def from_floats(weights: np.ndarray) -> ChunkCodes:
    """Rounds float32 [R, K] to 8 bits with a float16 scale for each group, large enough for its largest weight."""
    groups = weights.reshape(len(weights), -1, GROUP)
    largest = np.abs(groups).max(axis=2)
    if not (largest < 127 * 65504).all():  # False for NaN too
        raise UnsupportedModelError("a weight is not finite or above 8 million: the file is damaged, or needs F32")
    scale = (largest / 127).astype(np.float16)
    short = scale.astype(np.float32) * 127 < largest
    scale[short] = np.nextafter(scale[short], np.float16(np.inf))
    exact = scale.astype(np.float32)
    inverse = np.divide(1, exact, out=np.zeros_like(exact), where=exact > 0)
    codes = (np.rint(groups * inverse[:, :, None]).astype(np.int16) + 128).astype(np.uint8)
    return ChunkCodes(codes.view(np.uint32).transpose(2, 1, 0)[None], [scale.view(np.uint16).T], [])


def _planes(blocks: np.ndarray, front: bool) -> np.ndarray:
    """Blocks uint8 [R, B, bytes] as uint32 [words, B, R]."""
    rows, count, width = blocks.shape
    extra = -width % 4
    if extra:
        whole = np.zeros((rows, count, width + extra), np.uint8)
        start = extra if front else 0
        whole[:, :, start : start + width] = blocks
    else:
        whole = np.ascontiguousarray(blocks)
    return np.ascontiguousarray(whole.view(np.uint32).transpose(2, 1, 0))


# ---- words of a group: quads [..., 8, B, R] of one code per byte, or what the file has -------------------------------


def _each(value: int) -> np.uint32:
    """A byte four times."""
    return np.uint32(value * 0x01010101)


def _nibble_vectors(words: np.ndarray, high: bool) -> np.ndarray:
    """Quads in the low or high nibbles of words [..., 8, B, R] as 4 vectors."""
    first, second = words[..., :4, :, :], words[..., 4:, :, :]
    if high:
        return (first >> 4 & _each(15)) | (second & _each(0xF0))
    return (first & _each(15)) | ((second & _each(15)) << 4)


def _pair_vectors(words: np.ndarray, field: int) -> np.ndarray:
    """Quads in the 2-bit field `field` of words [..., 8, B, R] as 2 vectors."""
    quads = words >> np.uint32(2 * field) & _each(3)
    quads = quads.reshape(*quads.shape[:-3], 2, 4, *quads.shape[-2:])
    return quads[..., 0, :, :] | quads[..., 1, :, :] << 2 | quads[..., 2, :, :] << 4 | quads[..., 3, :, :] << 6


def _bit_vector(words: np.ndarray, bit: int) -> np.ndarray:
    """Quads in one bit of words [8, B, R] as a vector [B, R]."""
    vector = words[0] >> np.uint32(bit) & _each(1)
    for quad in range(1, 8):
        vector |= (words[quad] >> np.uint32(bit) & _each(1)) << np.uint32(quad)
    return vector


def _bits_in_order(word: np.ndarray) -> np.ndarray:
    """A word whose bit k belongs to weight k as a vector: bit 4j + b goes to bit j of byte b."""
    vector = np.zeros_like(word)
    for quad in range(8):
        four = word >> np.uint32(4 * quad) & np.uint32(15)
        vector |= (four * np.uint32(0x00204081) & _each(1)) << np.uint32(quad)
    return vector


def _low(word: np.ndarray) -> np.ndarray:
    return word.astype(np.uint16)


def _high(word: np.ndarray) -> np.ndarray:
    return (word >> 16).astype(np.uint16)


def _negated(half: np.ndarray) -> np.ndarray:
    return half ^ np.uint16(0x8000)


# ---- the types -------------------------------------------------------------------------------------------------------


def _q4_0(planes: np.ndarray) -> ChunkCodes:
    return ChunkCodes(planes[None, 1:], [_high(planes[0])], [])


def _q4_1(planes: np.ndarray) -> ChunkCodes:
    return ChunkCodes(planes[None, 1:], [_low(planes[0]), _high(planes[0])], [])


def _with_fifth(planes: np.ndarray) -> np.ndarray:
    """Word 1 has the fifth bits, words 2 to 5 the nibbles."""
    return np.concatenate([_bits_in_order(planes[1])[None], planes[2:]])[None]


def _q5_0(planes: np.ndarray) -> ChunkCodes:
    return ChunkCodes(_with_fifth(planes), [_high(planes[0])], [])


def _q5_1(planes: np.ndarray) -> ChunkCodes:
    return ChunkCodes(_with_fifth(planes), [_low(planes[0]), _high(planes[0])], [])


def _q8_0(planes: np.ndarray) -> ChunkCodes:
    return ChunkCodes(planes[None, 1:] ^ _each(0x80), [_high(planes[0])], [])


def _empty_codes(planes: np.ndarray, vectors: int) -> np.ndarray:
    return np.empty((8, vectors, *planes.shape[1:]), np.uint32)


def _q2_k(planes: np.ndarray) -> ChunkCodes:
    """16 bytes of scale and minimum, 64 of pairs (32 bytes hold a quad of four groups), d, dmin."""
    codes = _empty_codes(planes, 2)
    pairs = planes[4:20].reshape(2, 8, *planes.shape[1:])
    for field in range(4):
        codes[field::4] = _pair_vectors(pairs, field)
    return ChunkCodes(codes, [_low(planes[20]), _negated(_high(planes[20]))], list(planes[:4]))


def _q3_k(planes: np.ndarray) -> ChunkCodes:
    """32 bytes of high bits, 64 of pairs, 12 of 6-bit scales, d."""
    codes = _empty_codes(planes, 3)
    pairs = planes[8:24].reshape(2, 8, *planes.shape[1:])
    for field in range(4):
        codes[field::4, 1:] = _pair_vectors(pairs, field)
    for group in range(8):
        codes[group, 0] = _bit_vector(planes[:8], group)
    first, second, top = planes[24:27]
    small = []
    for index, low in enumerate((first, second, first >> 4, second >> 4)):
        scale = (low & _each(15)) | (top >> np.uint32(2 * index) & _each(3)) << 4
        small.append(np.subtract(scale.view(np.uint8), 32).view(np.uint32))
    return ChunkCodes(codes, [_low(planes[27])], small)


def _six_bit_scales(planes: np.ndarray) -> list[np.ndarray]:
    """Words 1 to 3 of Q4_K and Q5_K: scales and minima of the 8 groups, interleaved as the layout wants them."""
    first, second, third = planes[1:4]
    scales = (first & _each(63), (third & _each(15)) | (first >> 2 & _each(48)))
    minima = (second & _each(63), (third >> 4 & _each(15)) | (second >> 2 & _each(48)))
    small = []
    for scale, minimum in zip(scales, minima):
        both = np.stack([scale.view(np.uint8), minimum.view(np.uint8)], axis=-1)  # group by group
        small.extend(both.reshape(*scale.shape, 2, 4).transpose(2, 0, 1, 3).copy().view(np.uint32)[..., 0])
    return small


def _nibbles_k(planes: np.ndarray, codes: np.ndarray) -> None:
    """128 bytes of nibbles: 32 bytes hold two groups."""
    words = planes.reshape(4, 8, *planes.shape[1:])
    codes[0::2, -4:] = _nibble_vectors(words, high=False)
    codes[1::2, -4:] = _nibble_vectors(words, high=True)


def _q4_k(planes: np.ndarray) -> ChunkCodes:
    """d, dmin, 12 bytes of scales, the nibbles."""
    codes = _empty_codes(planes, 4)
    _nibbles_k(planes[4:36], codes)
    return ChunkCodes(codes, [_low(planes[0]), _negated(_high(planes[0]))], _six_bit_scales(planes))


def _q5_k(planes: np.ndarray) -> ChunkCodes:
    """d, dmin, 12 bytes of scales, 32 of fifth bits (bit i: group i), the nibbles."""
    codes = _empty_codes(planes, 5)
    _nibbles_k(planes[12:44], codes)
    for group in range(8):
        codes[group, 0] = _bit_vector(planes[4:12], group)
    return ChunkCodes(codes, [_low(planes[0]), _negated(_high(planes[0]))], _six_bit_scales(planes))


def _q6_k(planes: np.ndarray) -> ChunkCodes:
    """Twice 64 bytes of nibbles, twice 32 of pairs (field i: group i of the half), 16 scales, d."""
    codes = _empty_codes(planes, 6)
    nibbles = planes[:32].reshape(2, 2, 8, *planes.shape[1:])  # half, group & 1
    pairs = planes[32:48].reshape(2, 8, *planes.shape[1:])
    for half in range(2):
        codes[half * 4 : half * 4 + 2, 2:] = _nibble_vectors(nibbles[half], high=False)
        codes[half * 4 + 2 : half * 4 + 4, 2:] = _nibble_vectors(nibbles[half], high=True)
    for field in range(4):
        codes[field::4, :2] = _pair_vectors(pairs, field)
    return ChunkCodes(codes, [_low(planes[52])], list(planes[48:52]))


_SPLITTERS: Mapping[PackedKind, Callable[[np.ndarray], ChunkCodes]] = MappingProxyType(
    {
        PackedKind.Q4_0: _q4_0,
        PackedKind.Q4_1: _q4_1,
        PackedKind.Q5_0: _q5_0,
        PackedKind.Q5_1: _q5_1,
        PackedKind.Q8_0: _q8_0,
        PackedKind.Q2_K: _q2_k,
        PackedKind.Q3_K: _q3_k,
        PackedKind.Q4_K: _q4_k,
        PackedKind.Q5_K: _q5_k,
        PackedKind.Q6_K: _q6_k,
    }
)
