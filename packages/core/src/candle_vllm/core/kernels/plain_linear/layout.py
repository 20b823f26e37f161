# SPDX-License-Identifier: MIT
"""How plain weights lie in memory: what `pack.py` writes, and `cpu.py` and `reference.py` read.

Stands inside step 6 of a request's life. 16 rows are a **tile**, a run of **steps** along K. A step is what one vector
instruction multiplies by one 32-bit element of the activations:

    BF16   two columns, 64 bytes: [16 rows, 2 columns], for the dot product of pairs
    F16    one column, 32 bytes: [16 rows]
    F32    one column, 64 bytes: [16 rows]

A tile has a whole number of runs of `RUN` steps; what is beyond K or N is zero. A thread reads its tiles as one stream.
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
from candle_vllm.core.quantization.plain import ELEMENTS

ROWS = 16
"""Rows of a tile: 32-bit lanes of a vector."""

RUN = 4
"""Steps that a kernel takes in one turn of its loop."""

MAX_COLUMNS = 1 << 16
"""Longest row: the operations keep 8 rows of activations on their stack."""


class PlainKind(enum.IntEnum):
    """The number formats of plain weights."""

    BF16 = 0
    F16 = 1
    F32 = 2

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return ELEMENTS[self.name].itemsize

    @property
    def step_columns(self) -> int:
        """Columns of a step."""
        return 2 if self is PlainKind.BF16 else 1

    @property
    def step_bytes(self) -> int:
        """Bytes of a step of 16 rows."""
        return ROWS * self.step_columns * self.itemsize

    def steps(self, columns: int) -> int:
        """Steps of a tile, a multiple of `RUN`."""
        return -(-columns // (self.step_columns * RUN)) * RUN


@dataclass(frozen=True, eq=False)
class PlainMatrix:
    """A weight matrix of plain numbers, 16 rows interleaved.

    Attributes:
        rows: N, outputs.
        columns: K, inputs.
        kind: the number format.
        data: uint8 [tiles, bytes of a tile], contiguous, starting at a multiple of 64 bytes.
    """

    rows: int
    columns: int
    kind: PlainKind
    data: np.ndarray

    @property
    def steps(self) -> int:
        """Steps of a tile."""
        return self.kind.steps(self.columns)

    @property
    def input_form(self) -> RowForm:
        """See `Matrix`."""
        return RowForm.BF16 if self.kind is PlainKind.BF16 else RowForm.F32

    @property
    def tile_bytes(self) -> int:
        """Bytes of a tile."""
        return self.steps * self.kind.step_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.data.nbytes


def linear_operation(kind: PlainKind, isa: Isa) -> int:
    """Address of the compiled linear operation of a kind."""
    return operation.operation("plain_linear.cpu:make_linear", kind, isa)


def linear_arguments(matrix: PlainMatrix, *, x_bytes: int, **given: Any) -> LinearArguments:
    """See `operation.linear_arguments`."""
    assert x_bytes % 64 == 0
    assert x_bytes >= 4 * matrix.steps
    return operation.linear_arguments(matrix, matrix.steps // RUN, x_bytes=x_bytes, **given)


def embedding_rows_operation(kind: PlainKind) -> int:
    """Return the address of the compiled operation that reads rows of a plain matrix."""
    return operation.operation("plain_linear.cpu:make_embedding", kind)
