# SPDX-License-Identifier: MIT
"""The packed linear layer in plain numpy: the readable reference, with which tests compare the kernels."""

from __future__ import annotations

import numpy as np

from candle_vllm.core.kernels.packed_linear import grids
from candle_vllm.core.kernels.packed_linear.grids import GridLayout
from candle_vllm.core.kernels.packed_linear.layout import (
    GROUP,
    LAYOUTS,
    ROWS,
    TRITS,
    VECTOR_BYTES,
    PackedMatrix,
    TileLayout,
)
from candle_vllm.core.quantization.ggml_blocks import scale_numbers
from candle_vllm.core.quantization.ggml_types import GGMLQuantizationType


def quantise(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantise activations x float32 [T, K]; return xq int8 [T, K], xs and xsum float32 [T, K/32]."""
    groups = np.asarray(x, np.float32).reshape(len(x), -1, GROUP)
    xs = np.abs(groups).max(axis=2) / np.float32(127)
    inverse = np.divide(np.float32(1), xs, out=np.zeros_like(xs), where=xs > 0)  # as kernels do, so that ties are equal
    xq = np.rint(groups * inverse[:, :, None]).astype(np.int8)
    return xq.reshape(x.shape), xs, xs * xq.sum(axis=2, dtype=np.int32).astype(np.float32)


def linear(weight: np.ndarray, xq: np.ndarray, xs: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """Return quantised activations times weight, float32 [N, K], plus bias [N]: float32 [T, N]."""
    x = (xq.reshape(*xs.shape, GROUP) * xs[:, :, None]).reshape(xq.shape)
    y = x @ weight.T
    return y if bias is None else y + bias


def dequantise(matrix: PackedMatrix) -> np.ndarray:
    """Return the weights as float32 [N, K], exactly as ggml decodes blocks of the kind's type."""
    layout = LAYOUTS[matrix.kind]
    if isinstance(layout, GridLayout):
        return _decoded_grids(matrix.data, layout)[: matrix.rows]
    blocks = matrix.data.reshape(len(matrix.data), -1, layout.block_bytes)  # [tiles, blocks, bytes]
    codes = blocks[:, :, layout.head_bytes :]
    if layout.bits:
        numbers = _numbers(codes.reshape(*blocks.shape[:2], layout.groups, layout.code_bytes), layout)
    else:
        numbers = _digits(codes, layout)
    if layout.values is not None:
        numbers = np.array(layout.values, np.int16)[numbers] + layout.zero
    numbers = numbers.astype(np.float32)  # [tiles, blocks, groups, 8 quads, 16 rows, 4]
    scale, minimum = _scales(blocks, layout)  # [tiles, blocks, groups or 1, 1 or 2 halves, 16 rows]
    halves = numbers.reshape(*numbers.shape[:3], scale.shape[3], -1, ROWS, 4)
    halves = (halves - layout.zero) * scale[:, :, :, :, None, :, None]
    if minimum is not None:
        halves += minimum[:, :, :, :, None, :, None]
    tiles = halves.reshape(len(blocks), -1, ROWS, 4).transpose(0, 2, 1, 3)  # [tiles, 16 rows, K / 4, 4]
    return np.ascontiguousarray(tiles.reshape(-1, matrix.columns)[: matrix.rows])


def _numbers(codes: np.ndarray, layout: TileLayout) -> np.ndarray:
    """Unpack codes of groups, uint8 [..., bytes] -> [..., 8 quads, 16 rows, 4]."""
    vectors = codes.reshape(*codes.shape[:-1], -1, VECTOR_BYTES)
    if layout.bits == 8:
        quads = vectors
    elif layout.bits == 1:
        quads = np.zeros((*vectors.shape[:-2], 8, VECTOR_BYTES), np.uint8)
    elif layout.bits >= 4:
        quads = np.concatenate([vectors[..., -4:, :] & 15, vectors[..., -4:, :] >> 4], axis=-2)
        if layout.bits == 6:
            quads |= _pairs(vectors[..., :2, :]) << 4
    else:
        quads = _pairs(vectors[..., -2:, :]) if layout.values is None else _triples(vectors)
    if layout.bits in (1, 5) or (layout.bits == 3 and layout.values is None):
        single = np.stack([vectors[..., 0, :] >> j & 1 for j in range(8)], axis=-2)
        quads |= single << max(layout.bits - 1, 1)
    return quads.reshape(*quads.shape[:-1], ROWS, 4)


def _digits(codes: np.ndarray, layout: TileLayout) -> np.ndarray:
    """Unpack base-3 codes of blocks, uint8 [..., bytes] -> [..., groups, 8 quads, 16 rows, 4]."""
    vectors = codes.reshape(*codes.shape[:-1], -1, 1, VECTOR_BYTES)
    moved = vectors * np.uint8(3) ** np.arange(TRITS, dtype=np.uint8)[:, None]
    quads = (moved.astype(np.uint16) * 3 >> 8).astype(np.uint8)
    quads = quads.reshape(*codes.shape[:-1], -1, VECTOR_BYTES)[..., : 8 * layout.groups, :]
    return quads.reshape(*codes.shape[:-1], layout.groups, 8, ROWS, 4)


def _pairs(vectors: np.ndarray) -> np.ndarray:
    """Unpack two vectors of 2-bit codes to 8 quads."""
    fields = [vectors[..., p, :] >> 2 * f & 3 for p in range(2) for f in range(4)]
    return np.stack(fields, axis=-2)


def _triples(vectors: np.ndarray) -> np.ndarray:
    """Unpack three vectors of 3-bit codes to 8 quads."""
    first, second, third = (vectors[..., v, :] for v in range(3))
    fields = [part >> place & 7 for part in (first, second, third) for place in (0, 3)]
    fields += [first >> 6 | second >> 4 & 4, third >> 6 | second >> 5 & 4]
    return np.stack(fields, axis=-2)


def _scales(blocks: np.ndarray, layout: TileLayout) -> tuple[np.ndarray, np.ndarray | None]:
    """Return scales, and minima or None, float32 [tiles, blocks, groups or 1, 1 or 2 halves, 16 rows]."""
    head = np.ascontiguousarray(blocks[:, :, : layout.floats_bytes])
    if layout.float == "e4m3":  # packing removed NaN: 0x7F is a number here, and decoded as one with the sign bit
        floats = scale_numbers(head | 0x80, layout.float)
        return floats.reshape(*blocks.shape[:2], layout.groups, -1, ROWS), None
    floats = scale_numbers(head.reshape(-1, layout.floats_bytes), layout.float)
    floats = floats.reshape(*blocks.shape[:2], 1, 1, -1, ROWS)
    scale = floats[..., 0, :]
    minimum = floats[..., 1, :] if layout.minimum else None
    if not layout.nested:
        return scale, minimum
    small = blocks[:, :, layout.floats_bytes : layout.head_bytes].reshape(*blocks.shape[:2], layout.groups, -1)
    if layout.paired:
        small = np.ascontiguousarray(small.reshape(*small.shape[:-1], ROWS, 2).swapaxes(-1, -2))
    elif layout.lone:
        small = small.reshape(*small.shape[:-1], 1, ROWS)
    else:
        small = small.reshape(*small.shape[:-1], 2, ROWS)
    if minimum is None:
        return scale * small.view(np.int8), None
    if layout.width == GROUP:
        return scale * small[..., :1, :], minimum * small[..., 1:, :]
    return scale * (small & 15), minimum * (small >> 4)


def _decoded_grids(data: np.ndarray, layout: GridLayout) -> np.ndarray:
    """Decode the weights of tiles, uint8 [tiles, bytes], to float32 [16 * tiles, K], bit for bit as ggml."""
    blocks = data.reshape(len(data), -1, layout.block_bytes)
    groups = blocks[..., layout.head_bytes :].reshape(*blocks.shape[:2], grids.GROUPS, layout.code_bytes)
    parts = {}
    for at, like in grids.split(np.zeros((1, 1, GGMLQuantizationType[layout.name].block[1]), np.uint8), layout):
        source, start = (blocks, at) if like.ndim == 2 else (groups, at - layout.head_bytes)
        part = np.ascontiguousarray(source[..., start : start + ROWS * like.itemsize]).view(like.dtype)
        parts[at] = np.moveaxis(part, -1, 1)  # [tiles, rows, blocks], and maybe groups
    found = grids.decoded(parts, layout, lambda part: part)
    given = grids.codes(layout.name)[found.indices].reshape(*found.flags.shape) | found.flags << 3
    weights = np.array(grids.values(layout.name), np.float32)[given]
    supers = found.supers.astype(np.uint16).view(np.float16).astype(np.float32)
    scale = supers[..., None, None] * found.scales.astype(np.float32) * np.float32(layout.unit)
    return (weights * scale.repeat(layout.width, -1)).reshape(ROWS * len(data), -1)
