"""What the bytes of ggml's tensor types mean: their block sizes, and the way back to numbers.

Stands before step 1 of a request's life: the loader dequantises what no kernel reads directly. The common types have
routines here, several times as fast as the `gguf` package's; every other type goes to `gguf.quants`, which is also
what the tests compare with, bit for bit. They are numpy and run on threads of their own that never wait for each
other: torch's operations meet at a barrier each, which costs them most of their speed on a busy machine.

Layouts: ggml's `ggml-common.h` and `ggml-quants.c`. Shapes: N blocks, G groups, W bytes. A block's numbers are
computed in float32 in the order that ggml computes them, without fused multiply-adds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.quantization.plain import ELEMENTS, convert, read_plain
from candle_vllm.core.threads import loading_threads

CHUNK = 1 << 18
"""Elements per round: what a round touches stays in the cache."""

THREAD_ELEMENTS = 1 << 19
"""Elements that are worth a thread of their own."""

PLAIN_TYPES = frozenset(kind for kind in GGMLQuantizationType if kind.name in ELEMENTS)
"""Types whose elements are stored one by one."""


Decoder = Callable[[np.ndarray, np.ndarray], None]
"""(blocks uint8 [N, bytes per block], out float32 [N, elements per block]) -> fills out."""


def block_layout(ggml_type: GGMLQuantizationType) -> tuple[int, int]:
    """Elements per block and bytes per block."""
    return GGML_QUANT_SIZES[ggml_type]


def dequantize(
    raw: np.ndarray, ggml_type: GGMLQuantizationType, shape: tuple[int, ...], wanted: str = "F32"
) -> np.ndarray:
    """Decodes a tensor.

    Peak memory is the result and a few MB of scratch.

    Args:
        raw: its bytes, uint8, contiguous; any shape, need not be aligned.
        ggml_type: how they are stored.
        shape: torch order; the innermost dimension is a whole number of blocks.
        wanted: the result's type, see `plain.ELEMENTS`; F32 is exact, a narrower one is rounded from it.

    Raises:
        UnsupportedModelError: nothing decodes this type.
    """
    if ggml_type in PLAIN_TYPES:
        return read_plain(raw, ggml_type.name, shape, wanted)
    decode = _DECODERS.get(ggml_type) or _library_decoder(ggml_type)
    size, width = block_layout(ggml_type)
    out = np.empty(shape, ELEMENTS[wanted])
    blocks, values = raw.reshape(-1, width), out.reshape(-1, size)
    assert len(blocks) == len(values), (blocks.shape, shape)

    workers = min(loading_threads(), out.size // THREAD_ELEMENTS)
    if workers < 2:
        _decode_blocks(decode, blocks, values, wanted)
        return out
    share = -(-len(blocks) // workers)
    starts = range(0, len(blocks), share)
    with ThreadPoolExecutor(workers) as pool:
        jobs = [
            pool.submit(_decode_blocks, decode, blocks[at : at + share], values[at : at + share], wanted)
            for at in starts
        ]
    for job in jobs:
        job.result()
    return out


def _decode_blocks(decode: Decoder, blocks: np.ndarray, values: np.ndarray, wanted: str) -> None:
    """Decodes blocks uint8 [N, bytes per block] into values [N, elements per block] of any type, chunk by chunk."""
    step = min(CHUNK // values.shape[1], len(blocks))
    scratch = None if wanted == "F32" else np.empty((step, values.shape[1]), np.float32)
    for first in range(0, len(blocks), step):
        part = values[first : first + step]
        floats = part if scratch is None else scratch[: len(part)]
        with np.errstate(all="ignore"):  # an infinite or NaN scale is the file's business, and no reason to warn
            decode(blocks[first : first + step], floats)
        if scratch is not None:
            convert(floats.reshape(-1), "F32", part.reshape(-1), wanted)


def check_decodable(ggml_type: GGMLQuantizationType) -> None:
    """Raises UnsupportedModelError for a type that `dequantize` cannot decode."""
    if ggml_type not in PLAIN_TYPES and ggml_type not in _DECODERS:
        _library_decoder(ggml_type)


def _library_decoder(ggml_type: GGMLQuantizationType) -> Decoder:
    def decode(blocks: np.ndarray, out: np.ndarray) -> None:
        # As one row: the library loops in Python over groups of 16 rows.
        out[:] = quants.dequantize(blocks.reshape(1, -1), ggml_type).reshape(out.shape)

    size, width = block_layout(ggml_type)
    try:
        with np.errstate(all="ignore"):
            decode(np.zeros((1, width), np.uint8), np.empty((1, size), np.float32))
    except NotImplementedError as error:
        raise UnsupportedModelError(
            f"tensor type {ggml_type.name} cannot be decoded; use a file in one of the usual types, "
            "such as Q4_K_M, Q8_0, F16 or BF16"
        ) from error
    return decode


def _half(blocks: np.ndarray, start: int) -> np.ndarray:
    """The float16 at byte `start` of each block as float32 [N, 1]."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view(np.float16).astype(np.float32)


def _fields(data: np.ndarray, bits: int) -> np.ndarray:
    """Bit fields of bytes, lowest first: [N, G, W] -> [N, G, 8 / bits, W]."""
    count, groups, width = data.shape
    fields = np.empty((count, groups, 8 // bits, width), np.uint8)
    for index in range(8 // bits):
        np.right_shift(data, index * bits, out=fields[:, :, index])
    fields &= (1 << bits) - 1
    return fields


def _groups(blocks: np.ndarray, start: int, stop: int, width: int) -> np.ndarray:
    """Bytes `start` to `stop` of each block in groups: [N, G, width], without a copy."""
    return blocks[:, start:stop].reshape(len(blocks), -1, width)


def _five_bits(blocks: np.ndarray, start: int) -> np.ndarray:
    """4 bytes from `start` with the fifth bit of each of 32 elements, 16 with the nibbles: [N, 32]."""
    fifth = np.unpackbits(blocks[:, start : start + 4], axis=1, bitorder="little")
    numbers = _fields(_groups(blocks, start + 4, start + 20, 16), 4).reshape(-1, 32)
    return np.bitwise_or(numbers, fifth << 4, out=numbers)


def _q4_0(blocks: np.ndarray, out: np.ndarray) -> None:
    out[:] = _fields(_groups(blocks, 2, 18, 16), 4).reshape(-1, 32)
    out -= 8
    out *= _half(blocks, 0)


def _q4_1(blocks: np.ndarray, out: np.ndarray) -> None:
    out[:] = _fields(_groups(blocks, 4, 20, 16), 4).reshape(-1, 32)
    out *= _half(blocks, 0)
    out += _half(blocks, 2)


def _q5_0(blocks: np.ndarray, out: np.ndarray) -> None:
    out[:] = _five_bits(blocks, 2)
    out -= 16
    out *= _half(blocks, 0)


def _q5_1(blocks: np.ndarray, out: np.ndarray) -> None:
    out[:] = _five_bits(blocks, 4)
    out *= _half(blocks, 0)
    out += _half(blocks, 2)


def _q8_0(blocks: np.ndarray, out: np.ndarray) -> None:
    out[:] = blocks[:, 2:].view(np.int8)
    out *= _half(blocks, 0)


def _q2_k(blocks: np.ndarray, out: np.ndarray) -> None:
    """16 bytes of scale (low nibble) and minimum (high), 64 of 2-bit numbers, d, dmin."""
    scales = blocks[:, :16]
    out[:] = _fields(_groups(blocks, 16, 80, 32), 2).reshape(-1, 256)
    groups = out.reshape(-1, 16, 16)
    groups *= (_half(blocks, 80) * (scales & 15))[:, :, None]
    groups -= (_half(blocks, 82) * (scales >> 4))[:, :, None]


def _q3_k(blocks: np.ndarray, out: np.ndarray) -> None:
    """32 bytes of high bits, 64 of low 2-bit numbers, 12 of 6-bit scales, d."""
    low = _fields(_groups(blocks, 96, 104, 8), 4).reshape(-1, 16)
    high = _fields(_groups(blocks, 104, 108, 4), 2).reshape(-1, 16)
    scale = _half(blocks, 108) * ((low | high << 4).astype(np.float32) - 32)
    numbers = _fields(_groups(blocks, 32, 96, 32), 2).reshape(-1, 256)
    high_bits = _fields(_groups(blocks, 0, 32, 32), 1).reshape(-1, 256)
    out[:] = np.bitwise_or(numbers, high_bits << 2, out=numbers)
    out -= 4  # a clear high bit means four less
    groups = out.reshape(-1, 16, 16)
    groups *= scale[:, :, None]


def _scale_and_shift(blocks: np.ndarray, out: np.ndarray) -> None:
    """Applies the scales and minima of the 8 sub-blocks of Q4_K and Q5_K: d, dmin and 12 packed bytes.

    Six bits each: bytes 0-3 hold scales 0-3, bytes 4-7 minima 0-3, bytes 8-11 the low nibbles of scales (low) and
    minima (high) 4-7, whose upper two bits are the top bits of bytes 0-3 and 4-7.
    """
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = np.concatenate([first & 63, (third & 15) | (first >> 2 & 48)], axis=1)
    minimum = np.concatenate([second & 63, (third >> 4) | (second >> 2 & 48)], axis=1)
    groups = out.reshape(-1, 8, 32)
    groups *= (_half(blocks, 0) * scale)[:, :, None]
    groups -= (_half(blocks, 2) * minimum)[:, :, None]


def _q4_k(blocks: np.ndarray, out: np.ndarray) -> None:
    """d, dmin, 12 bytes of scales, 128 of nibbles: 32 bytes hold two sub-blocks."""
    out[:] = _fields(_groups(blocks, 16, 144, 32), 4).reshape(-1, 256)
    _scale_and_shift(blocks, out)


def _q5_k(blocks: np.ndarray, out: np.ndarray) -> None:
    """As Q4_K, with 32 bytes of fifth bits before the nibbles: bit i of each belongs to sub-block i."""
    numbers = _fields(_groups(blocks, 48, 176, 32), 4).reshape(-1, 256)
    fifth = _fields(_groups(blocks, 16, 48, 32), 1).reshape(-1, 256)
    out[:] = np.bitwise_or(numbers, fifth << 4, out=numbers)
    _scale_and_shift(blocks, out)


def _q6_k(blocks: np.ndarray, out: np.ndarray) -> None:
    """128 bytes of low nibbles, 64 of high 2-bit fields, 16 int8 scales, d."""
    numbers = _fields(_groups(blocks, 0, 128, 64), 4).reshape(-1, 256)
    high = _fields(_groups(blocks, 128, 192, 32), 2).reshape(-1, 256)
    out[:] = np.bitwise_or(numbers, high << 4, out=numbers)
    out -= 32
    groups = out.reshape(-1, 16, 16)
    groups *= (_half(blocks, 208) * blocks[:, 192:208].view(np.int8))[:, :, None]


def _q8_k(blocks: np.ndarray, out: np.ndarray) -> None:
    """d in float32, 256 int8; sums of 16 numbers behind them are of no use here. Not in the `gguf` package."""
    out[:] = blocks[:, 4:260].view(np.int8)
    out *= np.ascontiguousarray(blocks[:, :4]).view(np.float32)


def _q1_0(blocks: np.ndarray, out: np.ndarray) -> None:
    """d and 128 bits: d where set, else -d. Not in the `gguf` package."""
    out[:] = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little")
    out *= 2
    out -= 1
    out *= _half(blocks, 0)


_DECODERS: Mapping[GGMLQuantizationType, Decoder] = MappingProxyType(
    {
        GGMLQuantizationType.Q4_0: _q4_0,
        GGMLQuantizationType.Q4_1: _q4_1,
        GGMLQuantizationType.Q5_0: _q5_0,
        GGMLQuantizationType.Q5_1: _q5_1,
        GGMLQuantizationType.Q8_0: _q8_0,
        GGMLQuantizationType.Q2_K: _q2_k,
        GGMLQuantizationType.Q3_K: _q3_k,
        GGMLQuantizationType.Q4_K: _q4_k,
        GGMLQuantizationType.Q5_K: _q5_k,
        GGMLQuantizationType.Q6_K: _q6_k,
        GGMLQuantizationType.Q8_K: _q8_k,
        **({GGMLQuantizationType["Q1_0"]: _q1_0} if "Q1_0" in GGMLQuantizationType.__members__ else {}),
    }
)
