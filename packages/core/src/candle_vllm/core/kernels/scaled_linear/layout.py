# SPDX-License-Identifier: MIT
"""How small floats with scales lie in memory: what `pack.py` writes, and `cpu.py` and `reference.py` read.

Stands inside step 6 of a request's life. 16 rows are a **tile**, a run of **spans** along K, of which the last may be
shorter. A span is the float32 scales of its 16 rows, and **turns**:

    E4M3, E5M2   8 columns: two vectors of [16 rows, 4 columns] bytes, columns in the order 0, 2, 1, 3       128 bytes
    E2M1         16 columns: their scales, e4m3 [16 rows], and four vectors of [16 rows, 4 columns],
                 the first column in the lowest bits of 16                                                   144 bytes

Two whole spans make a **pair**: the scales of both, then turns of the one and the other in turn. So a thread reads its
tiles as one stream, and adds up two spans side by side. What is beyond K or N is zero.

Bits of a small float, moved to the places of a larger one's, are its number divided by a power of two. For e4m3 and
e5m2 that is a float32, multiplied by the power at once. Where the small one is subnormal so is the large one, which
some CPUs multiply slowly, so e4m3 is brought to the top of its range: of each row and span, numbers times a power of
two, and the scale divided by it. For e2m1 it is a float16, and the scale is kept multiplied by the power
(`ScaledKind.factor`). The codes that are no number have other floats in their place: a span of a row that holds one,
among weights or among scales of groups, has the scale NaN.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import numpy as np

from candle_vllm.core.kernels.activation_rows import RowForm
from candle_vllm.core.kernels.cpu_runtime import operation
from candle_vllm.core.kernels.cpu_runtime.level import Isa
from candle_vllm.core.kernels.cpu_runtime.operation import LinearArguments

ROWS = 16
"""Rows of a tile: 32-bit lanes of a vector."""

HEAD_BYTES = 4 * ROWS
"""Bytes of a span's scales."""

MOST_SPAN = 256
"""Columns of the longest span: 16 rows of it, widened, stay in the first-level cache."""


class ScaledKind(enum.IntEnum):
    """The number formats."""

    E4M3 = 0
    E5M2 = 1
    E2M1 = 2

    @property
    def turn_columns(self) -> int:
        """Columns of a turn."""
        return 16 if self is ScaledKind.E2M1 else 8

    @property
    def turn_bytes(self) -> int:
        """Bytes of a turn of 16 rows."""
        return 144 if self is ScaledKind.E2M1 else 128

    @property
    def factor(self) -> float:
        """What a widened weight is too small by: that of e2m1 by 2^14, and the scale of its group by 2^8."""
        return 2.0**22 if self is ScaledKind.E2M1 else 1.0

    def turns(self, columns: int) -> int:
        """Turns of a tile."""
        return -(-columns // self.turn_columns)


@dataclass(frozen=True, eq=False)
class ScaledMatrix:
    """A weight matrix of small floats with scales, 16 rows interleaved.

    Attributes:
        rows: N, outputs.
        columns: K, inputs.
        kind: the number format.
        span_turns: turns of a span.
        data: uint8 [tiles, bytes of a tile], contiguous, starting at a multiple of 64 bytes.
    """

    rows: int
    columns: int
    kind: ScaledKind
    span_turns: int
    data: np.ndarray

    @property
    def turns(self) -> int:
        """Turns of a tile."""
        return self.kind.turns(self.columns)

    @property
    def spans(self) -> int:
        """Spans of a tile."""
        return -(-self.turns // self.span_turns)

    @property
    def span_bytes(self) -> int:
        """Bytes of a whole span."""
        return HEAD_BYTES + self.span_turns * self.kind.turn_bytes

    @property
    def pairs(self) -> int:
        """Pairs of whole spans of a tile."""
        return self.turns // (2 * self.span_turns)

    @property
    def input_form(self) -> RowForm:
        """See `Matrix`."""
        return RowForm.BF16

    @property
    def tile_bytes(self) -> int:
        """Bytes of a tile."""
        return self.spans * HEAD_BYTES + self.turns * self.kind.turn_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.data.nbytes


def linear_operation(kind: ScaledKind, isa: Isa) -> int:
    """Address of the compiled linear operation of a kind."""
    return operation.operation("scaled_linear.cpu:make_linear", kind, isa)


def linear_arguments(matrix: ScaledMatrix, *, x_bytes: int, **given: Any) -> LinearArguments:
    """See `operation.linear_arguments`."""
    assert x_bytes % 64 == 0
    assert x_bytes >= 2 * matrix.turns * matrix.kind.turn_columns
    return operation.linear_arguments(matrix, matrix.turns, x_bytes=x_bytes, span=matrix.span_turns, **given)
