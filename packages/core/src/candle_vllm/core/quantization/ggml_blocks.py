# SPDX-License-Identifier: MIT
"""Contents of a block of ggml's common types: one description per type, for all code that takes blocks apart.

`take_apart` decodes blocks byte by byte, in numpy or torch; `kernels/packed_linear/split.py` decodes word by word.
Layouts: ggml's `ggml-common.h` and `ggml-quants.c`.

A block has **codes** and the **floats** that they are multiplied with. A weight is scale * code, plus the minimum if
there is one. K-quants have small scales and minima for every `width` weights: there a weight is (scale * small scale) *
code, minus minimum * small minimum. A code is int8(stored bits - zero), modulo 256; TQ1_0's are base-3 digits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from types import MappingProxyType, ModuleType
from typing import Any, Generic, Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np

from candle_vllm.core.quantization.ggml_types import GGMLQuantizationType

Array = TypeVar("Array")  # numpy's or torch's


Float: TypeAlias = Literal["f16", "f32", "e8m0", "e4m3"]
"""Stored types of scales. The last two have one byte; the scale is half the e8m0 value, or half the e4m3 magnitude."""


class Fields(NamedTuple):
    """Bits of consecutive codes, which fill the lowest fields of a run of `width` bytes first, then its next fields.

    Attributes:
        start, stop: range of bytes in the block.
        width: bytes in a run.
        bits: bits of a field.
        shift: bit of the code at which a field begins.
        first: bit of the byte at which the lowest field begins.
    """

    start: int
    stop: int
    width: int
    bits: int
    shift: int = 0
    first: int = 0

    @property
    def places(self) -> range:
        """Bits of a byte at which its fields begin."""
        return range(self.first, 9 - self.bits, self.bits)

    @property
    def numbers(self) -> int:
        """Number of codes that have such a field."""
        return (self.stop - self.start) * len(self.places)


class BlockContents(NamedTuple):
    """Contents of a block.

    Attributes:
        codes: fields of a weight's code, lowest bits first. None: codes are base-3 digits.
        scale, minimum: byte range of a float, or of several floats.
        zero: stored bits that mean code 0.
        small: the small scales and minima in their order, in parts that are each described like `codes`.
        turn: number of small scales that precede the same number of minima, repeatedly; 0 without minima.
        small_zero: stored bits that mean the small scale 0.
        width: weights that share a scale.
        values: the element of each code, if it differs from the code.
        float: stored type of the scale and the minimum.
    """

    codes: tuple[Fields, ...]
    scale: tuple[int, int]
    minimum: tuple[int, int] | None = None
    zero: int = 0
    small: tuple[tuple[Fields, ...], ...] = ()
    turn: int = 0
    small_zero: int = 0
    width: int = 32
    values: tuple[int, ...] | None = None
    float: Float = "f16"

    @property
    def bits(self) -> int:
        """Stored bits of a code; 0 for base-3 digits."""
        return sum(fields.bits for fields in self.codes)

    @property
    def floats(self) -> tuple[tuple[int, int], ...]:
        """Byte ranges of the floats: the scale, and the minimum if there is one."""
        return (self.scale,) if self.minimum is None else (self.scale, self.minimum)

    @property
    def fields(self) -> tuple[Fields, ...]:
        """Fields of all codes and small scales."""
        return (*self.codes, *(fields for several in self.small for fields in several))

    @property
    def nbytes(self) -> int:
        """Bytes of a block, up to the last one that is described."""
        return max(stop for _, stop in (*self.floats, *((fields.start, fields.stop) for fields in self.fields)))


_SIX_BITS = ((Fields(4, 12, 8, 6),), (Fields(12, 16, 4, 4), Fields(4, 12, 8, 2, shift=4, first=6)))
"""Scales and minima of groups 0 to 3, then of groups 4 to 7, whose upper 2 bits are the upper bits of bytes 4 to 11."""

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""Elements of IQ4_NL's and IQ4_XS's codes: denser near 0, where most weights are."""

E2M1_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice the floats of the codes of MXFP4 and NVFP4."""

_TRITS = ((0, 32, 5), (32, 48, 5), (48, 52, 4))
"""Base-3 digits of TQ1_0: byte ranges, and digits per byte; first the highest digit of every byte, then the next."""

_ROWS = {  # codes, scale, minimum
    "Q4_0": BlockContents((Fields(2, 18, 16, 4),), (0, 2), zero=8),
    "Q4_1": BlockContents((Fields(4, 20, 16, 4),), (0, 2), (2, 4)),
    "Q5_0": BlockContents((Fields(6, 22, 16, 4), Fields(2, 6, 1, 1, shift=4)), (0, 2), zero=16),
    "Q5_1": BlockContents((Fields(8, 24, 16, 4), Fields(4, 8, 1, 1, shift=4)), (0, 2), (2, 4)),
    "Q8_0": BlockContents((Fields(2, 34, 32, 8),), (0, 2)),
    "Q2_K": BlockContents(
        (Fields(16, 80, 32, 2),), (80, 82), (82, 84), small=((Fields(0, 16, 16, 4),),), turn=16, width=16
    ),
    "Q3_K": BlockContents(
        (Fields(32, 96, 32, 2), Fields(0, 32, 32, 1, shift=2)),
        (108, 110),
        zero=4,
        small=((Fields(96, 104, 8, 4), Fields(104, 108, 4, 2, shift=4)),),
        small_zero=32,
        width=16,
    ),
    "Q4_K": BlockContents((Fields(16, 144, 32, 4),), (0, 2), (2, 4), small=_SIX_BITS, turn=4),
    "Q5_K": BlockContents(
        (Fields(48, 176, 32, 4), Fields(16, 48, 32, 1, shift=4)), (0, 2), (2, 4), small=_SIX_BITS, turn=4
    ),
    "Q6_K": BlockContents(
        (Fields(0, 128, 64, 4), Fields(128, 192, 32, 2, shift=4)),
        (208, 210),
        zero=32,
        small=((Fields(192, 208, 16, 8),),),
        width=16,
    ),
    "IQ4_NL": BlockContents((Fields(2, 18, 16, 4),), (0, 2), values=IQ4_VALUES),
    "IQ4_XS": BlockContents(
        (Fields(8, 136, 16, 4),),
        (0, 2),
        small=((Fields(4, 8, 1, 4), Fields(2, 4, 1, 2, shift=4)),),
        small_zero=32,
        values=IQ4_VALUES,
    ),
    "MXFP4": BlockContents((Fields(1, 17, 16, 4),), (0, 1), values=E2M1_VALUES, float="e8m0"),
    "NVFP4": BlockContents((Fields(4, 36, 8, 4),), (0, 4), width=16, values=E2M1_VALUES, float="e4m3"),
    "Q8_K": BlockContents((Fields(4, 260, 256, 8),), (0, 4), float="f32"),  # sums follow, which are not needed
    "TQ1_0": BlockContents((), (52, 54), zero=1),
    "TQ2_0": BlockContents((Fields(0, 64, 32, 2),), (64, 66), zero=1),
    "Q1_0": BlockContents((Fields(2, 18, 1, 1, shift=1),), (0, 2), zero=1),  # the codes are 1 and -1
}
CONTENTS: Mapping[GGMLQuantizationType, BlockContents] = MappingProxyType(
    {GGMLQuantizationType[name]: row for name, row in _ROWS.items()}
)
"""Contents of the blocks of each type."""


@dataclass(frozen=True, slots=True)
class BlockParts(Generic[Array]):
    """Parts of blocks: arrays of bytes, in the array library and on the device of the blocks.

    Attributes:
        codes: uint8 [..., weights of a block], bits of int8; may be a view of the blocks. `values` is not applied yet.
        scale, minimum: uint8 [..., bytes of a float, or of several floats]; a view of the blocks.
        scales: small scales of K-quants, uint8 [..., groups], bits of int8.
        minima: small minima in the same form; never negative.
    """

    codes: Array
    scale: Array
    minimum: Array | None = None
    scales: Array | None = None
    minima: Array | None = None


def take_apart(blocks: Array, contents: BlockContents, library: ModuleType) -> BlockParts[Array]:
    """Split blocks into their parts.

    Args:
        blocks: the blocks, uint8 [..., bytes of a block].
        contents: contents of their type.
        library: numpy or torch, the library of `blocks`. Both have the functions of the array API.
    """
    data: Any = blocks
    codes = _numbers(data, contents.codes, contents.zero, library) if contents.codes else _trits(data) - contents.zero
    scale = data[..., slice(*contents.scale)]
    minimum = None if contents.minimum is None else data[..., slice(*contents.minimum)]
    if not contents.small:
        return BlockParts(codes, scale, minimum)
    small = small_scales(data, contents, library)
    if not contents.turn:
        return BlockParts(codes, scale, None, small)
    turns = small.reshape(*small.shape[:-1], -1, 2, contents.turn)
    scales, minima = (turns[..., which, :].reshape(*small.shape[:-1], -1) for which in range(2))
    return BlockParts(codes, scale, minimum, scales, minima)


def small_scales(blocks: Any, contents: BlockContents, library: ModuleType) -> Any:
    """Return the small scales and minima of blocks in file order: uint8 [..., count]."""
    pieces = [_numbers(blocks, fields, contents.small_zero, library) for fields in contents.small]
    return pieces[0] if len(pieces) == 1 else library.concat(pieces, -1)


def _numbers(blocks: Any, fields: tuple[Fields, ...], zero: int, library: ModuleType) -> Any:
    """Return codes that consist of several fields, uint8 [..., count]."""
    found = _bits(blocks, fields[0], library)
    for more in fields[1:]:
        found |= _bits(blocks, more, library)
    if zero:
        found -= zero
    return found


def _bits(blocks: Any, fields: Fields, library: ModuleType) -> Any:
    """Return the bits of codes for one field, uint8 [..., count]; whole bytes are a view of the blocks."""
    data = blocks[..., fields.start : fields.stop]
    if fields.bits == 8:
        return data
    if (
        fields.width == 1 and fields.bits == 1 and library is np
    ):  # same as below, where numpy would process byte by byte
        found = np.unpackbits(data, axis=-1, bitorder="little")
    else:
        runs = data.reshape(-1).reshape(*data.shape[:-1], -1, fields.width)  # contiguous runs are faster
        shape = (*runs.shape[:-1], len(fields.places), fields.width)
        found = library.empty(shape, dtype=blocks.dtype, device=blocks.device)
        for index, place in enumerate(fields.places):
            found[..., index, :] = runs >> place & (1 << fields.bits) - 1
        found = found.reshape(*data.shape[:-1], -1)
    if fields.shift:
        found *= 1 << fields.shift  # numpy's left shift is slower
    return found


def _trits(blocks: Any) -> Any:
    """Return TQ1_0's codes, uint8 [..., 256]: a byte / 256 is a fraction in base 3, whose digits are the codes."""
    moved = [blocks[..., a:b] * np.uint8(3**digit) for a, b, count in _TRITS for digit in range(count)]
    return (np.concatenate(moved, axis=-1).astype(np.uint16) * 3 >> 8).astype(np.uint8)


def scale_numbers(data: np.ndarray, kind: Float) -> np.ndarray:
    """Convert the floats of blocks, uint8 [N, bytes], to float32 [N, count] as ggml does; byte 0 of e8m0 is 2^-128."""
    if kind == "e8m0":
        return np.ldexp(np.float32(1), data.astype(np.int32) - 128)
    if kind == "e4m3":
        return (e4m3_codes(data).astype(np.uint16) << 7).view(np.float16).astype(np.float32) * np.float32(128)
    found = np.ascontiguousarray(data).view(np.float16 if kind == "f16" else np.float32)
    return found.astype(np.float32, copy=False)


def e4m3_codes(data: np.ndarray) -> np.ndarray:
    """Convert bytes of e4m3 as in ggml's NVFP4: 0x7F (NaN) means 0, and the sign is ignored."""
    return np.where(data == 0x7F, 0, data & 0x7F).astype(np.uint8)


def put_together(parts: BlockParts[np.ndarray], contents: BlockContents) -> np.ndarray:
    """Assemble blocks from their parts, the inverse of `take_apart`: uint8 [..., bytes of a block]."""
    out = np.empty((*parts.codes.shape[:-1], contents.nbytes), np.uint8)
    out[..., slice(*contents.scale)] = parts.scale
    if contents.minimum is not None and parts.minimum is not None:
        out[..., slice(*contents.minimum)] = parts.minimum
    _put(out, parts.codes, contents.codes, contents.zero)
    if parts.scales is None:
        return out
    small, first = parts.scales, 0
    if parts.minima is not None:
        turns = [part.reshape(*part.shape[:-1], -1, contents.turn) for part in (parts.scales, parts.minima)]
        small = np.stack(turns, axis=-2).reshape(*out.shape[:-1], -1)
    for several in contents.small:
        last = first + several[0].numbers
        _put(out, small[..., first:last], several, contents.small_zero)
        first = last
    return out


def _put(blocks: np.ndarray, numbers: np.ndarray, several: tuple[Fields, ...], zero: int) -> None:
    """Write the bits of codes [..., count] into blocks."""
    stored = numbers + np.uint8(zero) if zero else numbers
    for fields in several:
        data = blocks[..., fields.start : fields.stop]
        bits = stored >> fields.shift if fields.shift else stored
        if fields is not several[-1]:  # no field is above the last one
            bits = bits & (1 << fields.bits) - 1
        if fields.width == fields.bits == 1:
            data[:] = np.packbits(bits, axis=-1, bitorder="little")
            continue
        runs = bits.reshape(*bits.shape[:-1], -1, len(fields.places), fields.width)
        placed = [runs[..., index, :] * np.uint8(1 << place) for index, place in enumerate(fields.places) if place]
        lowest = data.reshape(*runs.shape[:-2], -1) if fields.first else runs[..., 0, :]  # data has the lower bits
        data[:] = reduce(np.bitwise_or, placed, lowest).reshape(data.shape)
