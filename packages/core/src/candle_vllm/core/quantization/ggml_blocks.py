# SPDX-License-Identifier: MIT
"""Split blocks of ggml's types into their parts as bytes (numpy or torch), and assemble blocks from parts (only numpy).

The rows of `ggml_types.py` describe what a block contains, and define codes, floats, and small scales and minima.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from types import ModuleType
from typing import Any, Generic, TypeVar

import numpy as np

from candle_vllm.core.quantization.ggml_types import CONTENTS, BlockContents, Fields, Float, GGMLQuantizationType

Array = TypeVar("Array")  # numpy's or torch's


@dataclass(frozen=True, slots=True)
class BlockParts(Generic[Array]):
    """Parts of blocks: arrays of bytes, in the array library and on the device of the blocks.

    Attributes:
        codes: uint8 [..., weights of a block], bits of int8, maybe a view of the blocks; `contents.values` not applied.
        scale, minimum: uint8 [..., bytes of a float, or of several floats]; a view of the blocks.
        scales: small scales of K-quants and IQ4_XS, uint8 [..., groups], bits of int8.
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
        library: numpy or torch, the library of `blocks`: both have the array API. TQ1_0 needs numpy.
    """
    data: Any = blocks
    codes = _numbers(data, contents.codes, contents.zero, library) if contents.codes else _trits(data, contents)
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
    assert fields[0].bits < 8 or not zero  # whole bytes are a view of the blocks
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


def _trits(blocks: Any, contents: BlockContents) -> Any:
    """Return TQ1_0's codes, uint8 [..., 256]: the digits of byte / 256 in base 3, less `zero`."""
    moved = [blocks[..., a:b] * np.uint8(3**digit) for a, b, count in contents.digits for digit in range(count)]
    return (np.concatenate(moved, axis=-1).astype(np.uint16) * 3 >> 8).astype(np.uint8) - contents.zero


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
    """Assemble blocks from their parts, the inverse of `take_apart`: uint8 [..., bytes of a block].

    It cannot assemble TQ1_0, and leaves bytes unset that the contents do not describe (Q8_K's sums).
    """
    assert contents.codes
    out = np.empty((*parts.codes.shape[:-1], contents.block[1]), np.uint8)
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
        if fields is not several[-1]:  # the last field has the highest bits, and needs no mask
            bits = bits & (1 << fields.bits) - 1
        if fields.width == fields.bits == 1:
            data[:] = np.packbits(bits, axis=-1, bitorder="little")
            continue
        runs = bits.reshape(*bits.shape[:-1], -1, len(fields.places), fields.width)
        placed = [runs[..., index, :] * np.uint8(1 << place) for index, place in enumerate(fields.places) if place]
        lowest = data.reshape(*runs.shape[:-2], -1) if fields.first else runs[..., 0, :]  # lower bits are written
        data[:] = reduce(np.bitwise_or, placed, lowest).reshape(data.shape)


# ---- MXFP4 as Q5_0 ---------------------------------------------------------------------------------------------------

_SMALLEST, _LARGEST = 104, 143  # exponents whose scale is a float16, 2^-24 to 2^15


def as_q5_0(raw: np.ndarray) -> np.ndarray | None:
    """Convert blocks of MXFP4 exactly to blocks of Q5_0, for kernels that do not support MXFP4.

    An element of MXFP4 is an integer (twice the e2m1 float) with the scale 2^(e - 128), and Q5_0 has elements from -16
    to 15 with a float16 scale. The 32 codes have the same order in both.

    Args:
        raw: blocks of MXFP4, uint8, contiguous.

    Returns:
        Blocks of Q5_0, uint8; None if a scale exceeds the range of float16.
    """
    contents = CONTENTS[GGMLQuantizationType.MXFP4]
    found = take_apart(raw.reshape(-1, contents.block[1]), contents, np)
    exponents = found.scale[:, 0].astype(np.int32)
    fives = np.array(contents.values, np.int8).view(np.uint8)[found.codes]
    empty = ~fives.any(axis=1)  # blocks of zeros may have any scale
    if not np.all(empty | (exponents >= _SMALLEST) & (exponents <= _LARGEST)):
        return None
    scales = np.where(empty, 0.0, np.exp2(exponents.clip(_SMALLEST, _LARGEST) - 128.0)).astype(np.float16)
    parts = BlockParts(fives, scales[:, None].view(np.uint8))
    return put_together(parts, CONTENTS[GGMLQuantizationType.Q5_0]).reshape(-1)
