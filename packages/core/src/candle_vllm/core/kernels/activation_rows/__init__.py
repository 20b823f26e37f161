# SPDX-License-Identifier: MIT
"""Convert activations to the input format of plain matrices, after a prologue such as a norm.

Contract: a prologue (see `kernels/activation_quant`) computes y float32 [T, K] from x float32 [T, C]. In the format F32
the result is y, in BF16 y rounded to the nearest bfloat16, ties to even (except NaN). A row of the result has
`row_elements(K)` elements, K rounded up to a multiple of 32; elements after K are 0. K is at least 1.
In I16 each group of 32 elements becomes int16 of at most 8191 (`WORD`), rounded to nearest, ties to even. All
integers of a row are followed by the groups' scales, float32: a group's largest magnitude divided by 8191.
In I8 each segment of 128 elements (`SEGMENT`) becomes int8, rounded to nearest, ties to even. All integers of a
row, with zeros up to a multiple of 64, are followed by two numbers of each segment: the scale, float32, which is its
largest magnitude divided by 127, and int32 -128 * sum(integers).
"""

from __future__ import annotations

import enum
from typing import NamedTuple, TypeAlias

from candle_vllm.core.kernels.activation_quant import GROUP, Groups, Prologue
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, operation


class RowForm(enum.IntEnum):
    """Input format of a matrix: rows of floats, or of integers with scales."""

    BF16 = 0
    F32 = 1
    I16 = 2  # 14-bit integers with a scale for each group
    I8 = 3  # with a scale for each segment

    @property
    def bytes(self) -> int:
        """Bytes of an element."""
        return (2, 4, 2, 1)[self]


FLOAT_FORMS = (RowForm.BF16, RowForm.F32)


SEGMENT = 128
"""Elements that share a scale in I8, a multiple of 64."""

WORD = 8191
"""Largest magnitude of an integer: 32 products with the largest weight of `word_linear` are below 2^31."""

InputForm: TypeAlias = Groups | RowForm
"""Input format of a matrix."""


def row_elements(columns: int) -> int:
    """Return the number of elements of a row of K columns, with padding."""
    return -(-columns // GROUP) * GROUP


def row_bytes(form: RowForm, columns: int) -> int:
    """Return the bytes of a row of K columns, a multiple of 64."""
    if form is RowForm.I8:
        return -(-columns // 64) * 64 + -(-columns // (8 * SEGMENT)) * 64
    numbers = form.bytes * row_elements(columns)
    return numbers + 64 * -(-row_elements(columns) // (16 * GROUP)) if form is RowForm.I16 else numbers


class RowsArguments(NamedTuple):
    """Arguments of the operation: fields as in `QuantiseArguments`, with any K; `out` is the address of the result."""

    x: int
    stride: int
    columns: int
    out: int
    weight: int = 0
    eps: float = 0.0
    picked: int = 0
    rows_from: int = StepNumber.TOKENS


def rows_operation(prologue: Prologue, form: RowForm) -> int:
    """Return the address of the compiled operation."""
    return operation("activation_rows.cpu:make_rows", prologue, prologue.gated, form, form.bytes)
