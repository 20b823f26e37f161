# SPDX-License-Identifier: MIT
"""Memory layout of small floats with scales: `pack.py` writes it, and `cpu.py` reads it.

A **tile** is 16 rows, divided along K into **spans**, the columns that share a scale; the last span may be shorter. A
span is stored as the float32 scales of its 16 rows, followed by **turns** of 8 or 16 columns:

    E4M3, E5M2   8 columns: two vectors of [16 rows, 4 columns] bytes, columns in the order 0, 2, 1, 3       128 bytes
    E2M1         16 columns: their scales, e4m3 [16 rows], and four vectors of [16 rows, 4 columns] in 16 bits,
                 the first column in the lowest bits                                                         144 bytes

Two whole spans form a **pair**: the scales of both, then turns of both alternately. So a thread reads its tiles
sequentially, and can multiply two spans at once. Elements beyond K or N are zero.

The kernel shifts a small float's bits to the fields of a larger float, which then is the value divided by a power of
two. E4M3 and E5M2 become float32, and the kernel multiplies by the power. Subnormal codes would become subnormal
float32, which some CPUs multiply slowly, so `pack` multiplies the E4M3 codes of each row and span by a power of two, as
far as their range allows, and divides the scale by it. E2M1 becomes float16, and the stored scale includes the power
(`ScaledKind.factor`). NaN codes would become numbers, so a row's span with a NaN weight or e4m3 scale has a NaN scale.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from candle_vllm.core.kernels.activation_rows import RowForm
from candle_vllm.core.kernels.cpu_runtime.operation import ROWS, Matrix

HEAD_BYTES = 4 * ROWS
"""Bytes of a span's scales."""

MOST_SPAN = 256
"""Maximum columns of a span: its 16 rows as bfloat16 stay in the first-level cache."""


class ScaledKind(enum.IntEnum):
    """Formats of the weights."""

    E4M3 = 0
    E5M2 = 1
    E2M1 = 2

    @property
    def turn_columns(self) -> int:
        """Number of columns of a turn."""
        return 16 if self is ScaledKind.E2M1 else 8

    @property
    def turn_bytes(self) -> int:
        """Bytes of a turn of 16 rows."""
        return 144 if self is ScaledKind.E2M1 else 128

    @property
    def factor(self) -> float:
        """Factor by which converted weights are too small: for E2M1 2^14 times 2^8 of the e4m3 scale, otherwise 1."""
        return 2.0**22 if self is ScaledKind.E2M1 else 1.0


@dataclass(frozen=True, eq=False)
class ScaledMatrix(Matrix):
    """A weight matrix of small floats with scales, 16 rows interleaved.

    Attributes:
        span_turns: number of turns of a whole span.
    """

    linear = "scaled_linear.cpu:make_linear"

    kind: ScaledKind
    span_turns: int

    @property
    def turns(self) -> int:
        """Number of turns of a tile."""
        return -(-self.columns // self.kind.turn_columns)

    length = turns

    @property
    def span(self) -> int:
        return self.span_turns

    @property
    def spans(self) -> int:
        """Number of spans of a tile."""
        return -(-self.turns // self.span_turns)

    @property
    def span_bytes(self) -> int:
        """Bytes of a whole span."""
        return HEAD_BYTES + self.span_turns * self.kind.turn_bytes

    @property
    def pairs(self) -> int:
        """Number of pairs of whole spans of a tile."""
        return self.turns // (2 * self.span_turns)

    @property
    def input_form(self) -> RowForm:
        return RowForm.BF16

    @property
    def tile_bytes(self) -> int:
        return self.spans * HEAD_BYTES + self.turns * self.kind.turn_bytes
