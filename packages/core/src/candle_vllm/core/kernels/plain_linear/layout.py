# SPDX-License-Identifier: MIT
"""Memory layout of weights without block scales: unquantised ones, and W8A8 with one scale for each row.

`pack.py` writes it; the compiled operations read it.

16 rows are a **tile**, which consists of consecutive **steps** along K. A step is the part of a tile that one vector
instruction multiplies by one 32-bit element of the activations:

    BF16   two columns, 64 bytes: [16 rows, 2 columns], for the dot product of pairs
    F16    one column, 32 bytes: [16 rows]
    F32    one column, 64 bytes: [16 rows]
    W8A8   four columns, 64 bytes: [16 rows, 4 columns], integers + 128

The number of steps of a tile is a multiple of `RUN`, and of 16 for BF16 and W8A8, because AMX multiplies 16 steps at
once. Elements beyond K or N are 0. A tile of W8A8 ends with the scales of its rows, float32 [16]. Threads read tiles in
order.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from candle_vllm.core.kernels.activation_rows import RowForm
from candle_vllm.core.kernels.cpu_runtime.operation import ROWS, Matrix
from candle_vllm.core.quantization.plain import ELEMENTS

RUN = 4
"""Number of steps in an iteration of the kernels' loops without AMX."""

MAX_COLUMNS = 1 << 16
"""Maximum length of a row: 8 float32 rows of activations (2 MiB), or 16 bfloat16 rows with AMX, fit on the stack."""


class PlainKind(enum.IntEnum):
    """Formats of weights without block scales."""

    BF16 = 0
    F16 = 1
    F32 = 2
    W8A8 = 3

    @property
    def itemsize(self) -> int:
        """Bytes of a weight."""
        return 1 if self is PlainKind.W8A8 else ELEMENTS[self.name].itemsize

    @property
    def step_columns(self) -> int:
        """Columns of a step."""
        return {PlainKind.BF16: 2, PlainKind.W8A8: 4}.get(self, 1)

    @property
    def step_bytes(self) -> int:
        """Bytes of a step of 16 rows."""
        return ROWS * self.step_columns * self.itemsize

    def steps(self, columns: int) -> int:
        """Return the number of steps of a tile."""
        run = ROWS if self in (PlainKind.BF16, PlainKind.W8A8) else RUN
        return -(-columns // (self.step_columns * run)) * run


@dataclass(frozen=True, eq=False)
class PlainMatrix(Matrix):
    """A weight matrix without block scales, 16 rows interleaved."""

    linear, embedding = "plain_linear.cpu:make_linear", "plain_linear.cpu:make_embedding"

    kind: PlainKind

    @property
    def length(self) -> int:
        return self.kind.steps(self.columns) // RUN

    @property
    def input_form(self) -> RowForm:
        return {PlainKind.BF16: RowForm.BF16, PlainKind.W8A8: RowForm.I8}.get(self.kind, RowForm.F32)
