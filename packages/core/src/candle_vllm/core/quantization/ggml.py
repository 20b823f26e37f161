# SPDX-License-Identifier: MIT
"""Conversion of ggml's tensor types to floats.

The loaders of models and adapters dequantise what no kernel reads directly. Types whose contents `ggml_types.py`
describes are decoded here, faster than by the `gguf` package; other types are decoded by `gguf.quants`.
The tests compare both bit for bit. The work is done by numpy in threads that never wait for each other: each of torch's
operations waits for all its threads, which is slow on a busy machine.

Shapes: N blocks. A block's elements are computed in float32 in ggml's order of operations, without fused multiply-adds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import numpy as np

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.quantization import ggml_blocks
from candle_vllm.core.quantization.ggml_types import CONTENTS, BlockContents, GGMLQuantizationType
from candle_vllm.core.quantization.plain import ELEMENTS, convert, read_plain
from candle_vllm.core.threads import in_chunks, loading_threads

CHUNK = 1 << 18
"""Elements per round: the data of a round stays in the cache."""

THREAD_ELEMENTS = 1 << 19
"""Elements per additional thread."""

PLAIN_TYPES = frozenset(kind for kind in GGMLQuantizationType if kind.name in ELEMENTS)
"""Types whose elements are stored one by one."""


Fill: TypeAlias = Callable[[np.ndarray, np.ndarray], None]
"""Function that converts its first argument, data of N blocks, and fills its second with the result."""


def dequantize(
    raw: np.ndarray, ggml_type: GGMLQuantizationType, shape: tuple[int, ...], wanted: str = "F32"
) -> np.ndarray:
    """Decode a tensor.

    Peak memory is the result and a few MB of scratch.

    Args:
        raw: its bytes, uint8, contiguous, of any shape; they need not be aligned.
        shape: shape in torch's order; the innermost dimension is a whole number of blocks.
        wanted: type of the result, see `plain.ELEMENTS`; F32 is exact, narrower types are rounded from it.

    Raises:
        UnsupportedModelError: no decoder exists for this type.
    """
    if ggml_type in PLAIN_TYPES:
        return read_plain(raw, ggml_type.name, shape, wanted)
    out = np.empty(shape, ELEMENTS[wanted])

    def rounded(floats: np.ndarray, part: np.ndarray) -> None:
        convert(floats.reshape(-1), "F32", part.reshape(-1), wanted)

    _decode_all(raw, ggml_type, out.reshape(-1, ggml_type.block[0]), None if wanted == "F32" else rounded)
    return out


def round_to_q8_0(raw: np.ndarray, ggml_type: GGMLQuantizationType) -> np.ndarray:
    """Round rows to 8 bits with a float16 scale for each 32 elements, by their largest magnitude.

    Args:
        raw: bytes of the rows, uint8 [R, ...], contiguous.
        ggml_type: their stored type, with a multiple of 32 elements in a block.

    Returns:
        Blocks of Q8_0, uint8 [R, B, 34].

    Raises:
        UnsupportedModelError: no decoder exists for this type, or a weight is not finite or too large.
    """
    size, width = ggml_type.block
    eight, bytes_of_eight = GGMLQuantizationType.Q8_0.block
    out = np.empty((raw.size // width, size // eight * bytes_of_eight), np.uint8)

    def rounded(floats: np.ndarray, part: np.ndarray) -> None:
        part[:] = _q8_0(floats.reshape(-1, eight)).reshape(part.shape)

    _decode_all(raw, ggml_type, out, rounded)
    return out.reshape(len(raw), -1, bytes_of_eight)


def _q8_0(groups: np.ndarray) -> np.ndarray:
    """Convert floats [N, 32] to blocks of Q8_0."""
    largest = np.abs(groups).max(axis=1)
    if not (largest < 127 * 65504).all():  # False for NaN too
        raise UnsupportedModelError("a weight is not finite or above 8 million: the file is damaged, or needs F32")
    scale = (largest / 127).astype(np.float16)
    short = scale.astype(np.float32) * 127 < largest
    scale[short] = np.nextafter(scale[short], np.float16(np.inf))
    exact = scale.astype(np.float32)
    inverse = np.divide(1, exact, out=np.zeros_like(exact), where=exact > 0)
    codes = np.rint(groups * inverse[:, None]).astype(np.int8)
    parts = ggml_blocks.BlockParts(codes.view(np.uint8), scale[:, None].view(np.uint8))
    return ggml_blocks.put_together(parts, CONTENTS[GGMLQuantizationType.Q8_0])


def _decode_all(raw: np.ndarray, ggml_type: GGMLQuantizationType, out: np.ndarray, finish: Fill | None) -> None:
    """Decode a tensor into `out` [blocks, ...], with several threads if it is large.

    Args:
        finish: converts floats [N, elements per block] to [N, ...]; None if `out` stores the floats themselves.
    """
    decode = _decoder(ggml_type)
    size, width = ggml_type.block
    blocks = raw.reshape(-1, width)
    assert len(blocks) == len(out), (blocks.shape, out.shape)
    workers = len(blocks) * size // THREAD_ELEMENTS
    workers = min(loading_threads(), workers) if workers > 1 else 1  # `loading_threads` may read system files

    def share(begin: int, end: int) -> None:
        step = min(CHUNK // size, end - begin)
        scratch = np.empty((step, size), np.float32) if finish else None
        for first in range(begin, end, step):
            last = min(first + step, end)
            floats = out[first:last] if scratch is None else scratch[: last - first]
            with np.errstate(all="ignore"):  # an infinite or NaN scale comes from the file and needs no warning
                decode(blocks[first:last], floats)
            if finish:
                finish(floats, out[first:last])

    in_chunks(share, len(blocks), max(1, -(-len(blocks) // workers)))


def check_decodable(ggml_type: GGMLQuantizationType) -> None:
    """Raise UnsupportedModelError for a type that `dequantize` cannot decode."""
    if ggml_type not in PLAIN_TYPES:
        _decoder(ggml_type)


def _decoder(ggml_type: GGMLQuantizationType) -> Fill:
    """Return the function that decodes blocks, uint8 [N, bytes per block], to float32 [N, elements per block]."""
    contents = CONTENTS.get(ggml_type)
    if contents is not None:
        return partial(_decode, contents)

    import gguf  # only for rare types: its import takes longer than opening a file

    kind = gguf.GGMLQuantizationType(ggml_type)

    def decode(blocks: np.ndarray, out: np.ndarray) -> None:
        # All blocks are one row, because the library loops in Python over groups of 16 rows.
        out[:] = gguf.quants.dequantize(blocks.reshape(1, -1), kind).reshape(out.shape)

    size, width = ggml_type.block
    try:
        with np.errstate(all="ignore"):
            decode(np.zeros((1, width), np.uint8), np.empty((1, size), np.float32))
    except NotImplementedError as error:
        raise UnsupportedModelError(
            f"tensor type {ggml_type.name} cannot be decoded; use a file in one of the usual types, "
            "such as Q4_K_M, Q8_0, F16 or BF16"
        ) from error
    return decode


def _decode(contents: BlockContents, blocks: np.ndarray, out: np.ndarray) -> None:
    """Decode types whose block contents are described in `ggml_types.py`; see `_decoder`."""
    parts = ggml_blocks.take_apart(blocks, contents, np)
    scale = ggml_blocks.scale_numbers(parts.scale, contents.float)
    codes = parts.codes.view(np.int8)
    out[:] = codes if contents.values is None else np.array(contents.values, np.float32)[parts.codes]
    if parts.scales is None:
        groups = out.reshape(len(out), scale.shape[1], -1)
        groups *= scale[:, :, None]
        if parts.minimum is not None:
            out += ggml_blocks.scale_numbers(parts.minimum, contents.float)
        return
    groups = out.reshape(len(out), -1, contents.width)
    groups *= (scale * parts.scales.view(np.int8))[:, :, None]
    if parts.minimum is not None and parts.minima is not None:
        groups -= (ggml_blocks.scale_numbers(parts.minimum, contents.float) * parts.minima)[:, :, None]
