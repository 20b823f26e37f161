# SPDX-License-Identifier: MIT
"""Memory layout of 14-bit weights, and their packing when a model is loaded.

A **tile** is 16 rows, stored as **groups** of 32 columns. A group is 16 **steps** of [16 rows, 2 columns] int16,
followed by the scales, float32 [16 rows]. Elements beyond K or N are 0.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np

from candle_vllm.core.kernels.activation_rows import GROUP, RowForm
from candle_vllm.core.kernels.cpu_runtime.operation import Matrix
from candle_vllm.core.kernels.cpu_runtime.weight_memory import WeightMemory, pack_tiles
from candle_vllm.core.kernels.plain_linear.layout import MAX_COLUMNS, ROWS

STEPS = GROUP // 2
"""Number of steps of a group."""

SCALES = STEPS * ROWS * 4
"""Bytes of a group before its scales."""

GROUP_BYTES = SCALES + 4 * ROWS

BITS = 13
"""A weight's integer is from -2^BITS to 2^BITS."""


class WordKind(enum.IntEnum):
    """Layouts of 14-bit weights, of which there is only one."""

    I16 = 0


@dataclass(frozen=True, eq=False)
class WordMatrix(Matrix):
    """A weight matrix of integers with scales, 16 rows interleaved."""

    linear = "word_linear.cpu:make_linear"

    @property
    def length(self) -> int:
        """Groups of a tile."""
        return -(-self.columns // GROUP)

    @property
    def input_form(self) -> RowForm:
        return RowForm.I16


def pack(raw: np.ndarray, dtype: str, rows: int, columns: int, memory: WeightMemory | None = None) -> WordMatrix | None:
    """Pack a matrix of F16 or F32 weights; return None if K is above `MAX_COLUMNS` or a weight is not finite.

    Args:
        raw: the weights' bytes, uint8, contiguous; need not be aligned.
        dtype: "F16" or "F32".
        rows, columns: N and K.
        memory: allocator of the result; None allocates separately.
    """
    if columns > MAX_COLUMNS:
        return None
    kind = {"F16": np.float16, "F32": np.float32}[dtype]
    stored = np.ascontiguousarray(raw).view(np.uint8).reshape(rows, -1)
    tiles, groups = -(-rows // ROWS), -(-columns // GROUP)
    finite = list[bool]()

    def numbers(first: int, last: int) -> np.ndarray:
        return np.ascontiguousarray(stored[first * ROWS : last * ROWS]).view(kind)

    pack_tiles(lambda *chunk: finite.append(bool(np.isfinite(numbers(*chunk)).all())), tiles, columns)
    if not all(finite):
        return None
    data = (memory or WeightMemory(0)).take(tiles * groups * GROUP_BYTES, tiles).reshape(tiles, -1)
    pack_tiles(lambda first, last: _store(numbers(first, last), data[first:last]), tiles, columns)
    return WordMatrix(rows, columns, WordKind.I16, data)


def _store(numbers: np.ndarray, tiles: np.ndarray) -> None:
    """Write rows of weights to their tiles, uint8 [tiles, bytes]."""
    groups = tiles.shape[1] // GROUP_BYTES
    whole = np.zeros((len(tiles) * ROWS, groups * GROUP), np.float32)
    whole[: numbers.shape[0], : numbers.shape[1]] = numbers
    each = whole.reshape(len(tiles), ROWS, groups, STEPS, 2)
    _, exponents = np.frexp(np.abs(each).max((3, 4)))  # [tiles, rows, groups]: the largest is below 2^exponent
    words = np.rint(np.ldexp(each, (BITS - exponents)[..., None, None])).astype(np.int16)
    at = tiles.reshape(len(tiles), groups, GROUP_BYTES)
    at[:, :, :SCALES] = words.transpose(0, 2, 3, 1, 4).reshape(len(tiles), groups, -1).view(np.uint8)
    scales = np.ldexp(np.float32(1), exponents - BITS).transpose(0, 2, 1)
    at[:, :, SCALES:] = np.ascontiguousarray(scales, np.float32).view(np.uint8)
