# SPDX-License-Identifier: MIT
"""Pack unquantised weights, and Q8_0 with one scale for each row (W8A8), into the layout of the kernels.

Weights are packed once, when a model is loaded. Unquantised rows are converted to another type if necessary. Tiles are
divided among threads that do not wait for each other.
"""

from __future__ import annotations

from types import MappingProxyType

import numpy as np

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.kernels.cpu_runtime.weight_memory import WeightMemory, pack_tiles
from candle_vllm.core.kernels.plain_linear.layout import MAX_COLUMNS, ROWS, PlainKind, PlainMatrix
from candle_vllm.core.quantization.ggml_types import GGMLQuantizationType
from candle_vllm.core.quantization.plain import ELEMENTS, read_plain
from candle_vllm.core.threads import in_chunks


def plain_kind(stored: str) -> PlainKind:
    """Return the kind of a stored type: its own, or F32 for a type without its own kind (F64 is rounded)."""
    return PlainKind.__members__.get(stored, PlainKind.F32)


def check_shape(rows: int, columns: int) -> None:
    """Raise `UnsupportedModelError` if no kernel multiplies a matrix of this shape."""
    if rows < 1 or not 1 <= columns <= MAX_COLUMNS:
        raise UnsupportedModelError(
            f"a matrix of {rows} x {columns} has no kernel: its rows must be 1 to {MAX_COLUMNS:,} weights long"
        )


def pack(
    raw: np.ndarray,
    stored: str,
    rows: int,
    columns: int,
    kind: PlainKind | None = None,
    memory: WeightMemory | None = None,
) -> PlainMatrix:
    """Pack an unquantised matrix.

    Args:
        raw: the weights' bytes, uint8, contiguous; need not be aligned.
        stored: type of the weights in the file, one of `plain.ELEMENTS`.
        rows: N; the order of rows is unchanged.
        columns: K, at most 65,536.
        kind: BF16, F16 or F32, to which weights are rounded, to nearest; None is `plain_kind(stored)`.
        memory: allocator of the result, shared by a model's matrices; None allocates separately.

    Raises:
        UnsupportedModelError: no kernel multiplies such a matrix, or a weight is too large for `kind`.
        ValueError: the length of `raw` does not match the shape.
    """
    kind = plain_kind(stored) if kind is None else kind
    check_shape(rows, columns)
    if raw.dtype != np.uint8 or raw.size != rows * columns * ELEMENTS[stored].itemsize:
        raise ValueError(f"{raw.size} bytes given for a {stored} matrix of {rows} x {columns}")
    tiles, steps = -(-rows // ROWS), kind.steps(columns)
    data = (memory or WeightMemory(0)).take(tiles * steps * kind.step_bytes, tiles).reshape(tiles, -1)
    source = raw.reshape(rows, columns * ELEMENTS[stored].itemsize)

    def job(first: int, last: int) -> None:
        numbers = _converted(source[first * ROWS : last * ROWS], stored, columns, kind)
        _store(numbers, kind, data[first:last])

    pack_tiles(job, tiles, columns)
    return PlainMatrix(rows, columns, kind, data)


def pack_rows(raw: np.ndarray, rows: int, columns: int, memory: WeightMemory | None = None) -> PlainMatrix | None:
    """Pack blocks of Q8_0, uint8 [N, bytes of a row], as W8A8; `memory` is as for `pack`.

    Returns None if a row has several scales, or more than `MAX_COLUMNS` weights.
    """
    blocks = np.ascontiguousarray(raw).reshape(rows, -1, GGMLQuantizationType.Q8_0.block[1])
    halves, kind = np.ascontiguousarray(blocks[:, :, :2]).view(np.uint16)[:, :, 0], PlainKind.W8A8
    if columns > MAX_COLUMNS or not (halves == halves[:, :1]).all():
        return None
    tiles, steps = -(-rows // ROWS), kind.steps(columns)
    data = (memory or WeightMemory(0)).take(tiles * (steps + 1) * kind.step_bytes, tiles).reshape(tiles, -1)
    scales = np.zeros(tiles * ROWS, np.float32)
    scales[:rows] = halves[:, 0].view(np.float16)
    data[:, -4 * ROWS :] = scales.view(np.uint8).reshape(tiles, -1)

    def job(first: int, last: int) -> None:
        codes = np.full((ROWS, steps * kind.step_columns), 128, np.uint8)
        some = blocks[first * ROWS : last * ROWS, :, 2:]
        codes[: len(some), :columns] = some.reshape(len(some), -1) ^ np.uint8(128)
        target = data[first, : -4 * ROWS].view(np.uint32).reshape(steps, ROWS)
        target[:] = codes.view(np.uint32).reshape(ROWS, steps).T

    in_chunks(job, tiles, 1)
    return PlainMatrix(rows, columns, kind, data)


_LARGEST = MappingProxyType(
    {
        PlainKind.BF16: (0x7F80, 3.3895314e38, "leave --dtype out, or set f32"),
        PlainKind.F16: (0x7C00, 65504.0, "leave --dtype out, or set bf16 or f32"),
        PlainKind.F32: (0x7F800000, 3.4028235e38, "the kernels have no wider type, so this model cannot be loaded"),
    }
)
"""For each floating-point kind, the bits of infinity, the largest finite number, and advice if a weight is larger."""


def _converted(raw: np.ndarray, stored: str, columns: int, kind: PlainKind) -> np.ndarray:
    """Convert stored rows to the bits of `kind`, uint16 or uint32 [rows, columns]."""
    bits, shape = np.uint16 if kind.itemsize == 2 else np.uint32, (len(raw), columns)
    if stored == kind.name:
        return np.ascontiguousarray(raw).view(bits).reshape(shape)
    numbers = read_plain(raw, stored, shape, kind.name).view(bits)
    infinite, largest, advice = _LARGEST[kind]
    overflown = numbers << bits(1) == bits(infinite) << bits(1)  # without the sign
    if overflown.any():
        exact = read_plain(raw, stored, shape, "F64")[overflown]
        if np.isfinite(exact).any():
            raise UnsupportedModelError(
                f"a weight of {exact[np.isfinite(exact)][0]:g} is beyond the range of {kind.name}, which ends at "
                f"{largest:g}: {advice}"
            )
    return numbers


def _store(numbers: np.ndarray, kind: PlainKind, tiles: np.ndarray) -> None:
    """Write rows of weights, as bit patterns, to their tiles, uint8 [tiles, bytes]."""
    rows, columns = len(tiles) * ROWS, tiles.shape[1] // (ROWS * kind.itemsize)
    if numbers.shape != (rows, columns):
        numbers = np.pad(numbers, [(0, rows - numbers.shape[0]), (0, columns - numbers.shape[1])])
    elements = np.uint16 if kind is PlainKind.F16 else np.uint32  # per row and step: an F16, an F32 or two BF16
    target = tiles.view(elements).reshape(len(tiles), -1, ROWS)
    target[:] = numbers.view(elements).reshape(len(tiles), ROWS, -1).transpose(0, 2, 1)
