# SPDX-License-Identifier: MIT
"""Pack GGUF blocks into the packed layout at load, in numpy; only `*_CODES` layouts need a compiled function.

Each chunk of rows is split into codes and scales (`split.py`; IQ1 to IQ3: `grids.py`), which are written with 16 rows
interleaved. Threads pack chunks independently.
"""

from __future__ import annotations

import logging
from functools import cache

import numpy as np

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.kernels.cpu_runtime.level import host_isa
from candle_vllm.core.kernels.cpu_runtime.operation import address_of, c_function
from candle_vllm.core.kernels.cpu_runtime.weight_memory import WeightMemory, pack_tiles
from candle_vllm.core.kernels.packed_linear import grids
from candle_vllm.core.kernels.packed_linear.grids import FORMATS, GridLayout
from candle_vllm.core.kernels.packed_linear.layout import (
    GROUP,
    LAYOUTS,
    ROWS,
    PackedKind,
    PackedMatrix,
    TileLayout,
    host_kind,
)
from candle_vllm.core.kernels.packed_linear.split import ChunkCodes, split
from candle_vllm.core.quantization import ggml
from candle_vllm.core.quantization.ggml_blocks import as_q5_0
from candle_vllm.core.quantization.ggml_types import GGMLQuantizationType

logger = logging.getLogger(__name__)

MAX_COLUMNS = 1 << 16
"""Maximum elements of a row, because operations keep a panel of up to 16 rows of activations on the stack."""


def pack(
    raw: np.ndarray,
    ggml_type: GGMLQuantizationType,
    rows: int,
    columns: int,
    memory: WeightMemory | None = None,
    kind: PackedKind | None = None,
) -> PackedMatrix:
    """Pack a quantised matrix.

    Weights stay exact and take up to 4 % more memory than in the file, besides padding; IQ1 to IQ3 up to 2.2 times as
    much without VBMI. If a type is not precompiled, and Numba not installed, weights are rounded to 8 bits with a scale
    for each 32, which is logged; the error is at most 0.4 % of the largest. (MXFP4 becomes Q5_0 if nothing is lost.)

    Args:
        raw: the tensor's bytes, uint8, contiguous; need not be aligned.
        rows, columns: N, and K, at most 65,536; the order of rows is kept.
        memory: allocator of the result, shared by a model's matrices; None allocates separately.
        kind: layout; None for the `host_kind` of the type.

    Raises:
        UnsupportedModelError: no kernel multiplies such a matrix, or a weight cannot be rounded to 8 bits.
        ValueError: `raw` is not uint8, or its length does not match the shape.
    """
    kind = kind or host_kind(ggml_type)
    size, width = ggml_type.block
    if rows < 1 or columns < 1 or columns % max(size, GROUP) or columns > MAX_COLUMNS:
        raise UnsupportedModelError(
            f"a {ggml_type.name} matrix of {rows} x {columns} has no packed kernel: its rows must be a multiple of "
            f"{max(size, GROUP)} and at most {MAX_COLUMNS:,} weights long"
        )
    if raw.dtype != np.uint8 or raw.size != rows * (columns // size) * width:
        raise ValueError(f"{raw.size} bytes given for a {ggml_type.name} matrix of {rows} x {columns}")
    own = kind.type is ggml_type
    if not own and ggml_type is GGMLQuantizationType.MXFP4 and (blocks := as_q5_0(raw)) is not None:
        return pack(blocks, GGMLQuantizationType.Q5_0, rows, columns, memory)
    layout, tiles = LAYOUTS[kind], -(-rows // ROWS)
    if not own:
        _log_rounding(ggml_type)
    data = (memory or WeightMemory(0)).take(tiles * layout.tile_bytes(columns), tiles).reshape(tiles, -1)
    source = raw.reshape(rows, columns // size, width)

    def job(first: int, last: int) -> None:
        parts = source[first * ROWS : last * ROWS]
        missing = (last - first) * ROWS - len(parts)
        if missing:
            parts = np.concatenate([parts, np.zeros((missing, *parts.shape[1:]), np.uint8)])
        if not own:
            parts = ggml.round_to_q8_0(parts, ggml_type)
        if isinstance(layout, GridLayout):
            grids.store(np.ascontiguousarray(parts), layout, data[first:last])
        elif own and ggml_type.name in FORMATS:
            _store_codes(np.ascontiguousarray(parts), kind, data[first:last])
        else:
            _store(split(parts, kind), layout, data[first:last])

    pack_tiles(job, tiles, columns)
    return PackedMatrix(rows, columns, kind, data)


@cache
def _log_rounding(ggml_type: GGMLQuantizationType) -> None:
    """Log once for each type that its matrices are rounded to 8 bits."""
    text = "%s has no precompiled kernel: its matrices are packed as 8 bits, which takes %.1f times the memory"
    size, width = ggml_type.block
    logger.info(text, ggml_type.name, 8.5 * size / (8 * width))


def _store_codes(blocks: np.ndarray, kind: PackedKind, tiles: np.ndarray) -> None:
    """Expand blocks of a grid type to tiles of codes, uint8 [tiles, bytes]."""
    grid, count = FORMATS[kind.type.name], len(tiles) * blocks.shape[1]
    stored = np.empty((len(tiles), blocks.shape[1] * grid.block_bytes), np.uint8)
    grids.store(blocks, grid, stored)
    expand = c_function("packed_linear.cpu_grids:make_codes", 3, kind, host_isa())
    expand(address_of(stored), address_of(tiles), count)


def _store(parts: ChunkCodes, layout: TileLayout, tiles: np.ndarray) -> None:
    """Write the parts of a chunk to its tiles, uint8 [tiles, bytes]."""
    groups, vectors, count, _ = parts.codes.shape
    shape = (len(tiles), count, layout.block_bytes)
    blocks = tiles.reshape(shape)
    codes = tiles.view(np.uint32).reshape(*shape[:2], -1)[:, :, layout.head_bytes // 4 :]
    target = codes.reshape(*shape[:2], groups, vectors, ROWS)
    target[:] = parts.codes.reshape(groups, vectors, count, -1, ROWS).transpose(3, 2, 0, 1, 4)
    floats = tiles.view(parts.floats[0].dtype).reshape(*shape[:2], -1)
    for index, part in enumerate(parts.floats):
        floats[:, :, index * ROWS : (index + 1) * ROWS] = part.reshape(count, -1, ROWS).transpose(1, 0, 2)
    if parts.small is not None:
        small = blocks[:, :, layout.floats_bytes : layout.head_bytes]
        if layout.lone:
            small = small.reshape(*shape[:2], groups, ROWS)
            for index, part in enumerate(parts.small):
                four = part.view(np.uint8).reshape(count, -1, ROWS, 4).transpose(1, 0, 3, 2)
                small[:, :, 4 * index : 4 * index + 4] = four
            return
        if layout.paired:
            small = small.reshape(*shape[:2], groups, ROWS, 2).swapaxes(3, 4)
        else:
            small = small.reshape(*shape[:2], groups, 2, ROWS)
        for index, part in enumerate(parts.small):
            four = part.view(np.uint8).reshape(count, -1, ROWS, 2, 2).transpose(1, 0, 3, 4, 2)
            small[:, :, 2 * index : 2 * index + 2] = four
