# SPDX-License-Identifier: MIT
"""Rows of activations as plain matrices read them, with what comes right before.

Contract: x float32 [T, C] goes through a prologue (see `kernels/activation_quant`) to y float32 [T, K]. Result: y in
the form F32 as it is, in the form BF16 rounded to the nearest bfloat16, ties to even (not for NaN). A row of the result
takes `row_elements(K)` numbers, which is K up to the next multiple of 32, and is zero behind K. K is any number from 1.
In the form of `WordForm` each group of 32 is whole numbers of 16 bits, at most 8191 (`WORD`), rounded to nearest, ties
to even, and behind all of them stand the groups' scales, float32: the largest of a group over 8191.
"""

from __future__ import annotations

import enum
from typing import NamedTuple, TypeAlias

from candle_vllm.core.kernels.activation_quant import GROUP, Groups, Prologue
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, operation


class RowForm(enum.IntEnum):
    """The result as a form in which matrices read their input: the numbers of a row."""

    BF16 = 0
    F32 = 1

    @property
    def bytes(self) -> int:
        """Bytes of a number."""
        return 2 if self is RowForm.BF16 else 4


class WordForm(enum.IntEnum):
    """Whole numbers of 14 bits with a scale for each group."""

    I16 = 2

    @property
    def bytes(self) -> int:
        """Bytes of a number."""
        return 2


WORD = 8191
"""The largest of a group, which times 32 and the largest weight of `word_linear` stays below 2^31."""

InputForm: TypeAlias = Groups | RowForm | WordForm
"""How a matrix reads its input."""


def row_elements(columns: int) -> int:
    """Numbers that a row of K columns takes."""
    return -(-columns // GROUP) * GROUP


def row_bytes(form: RowForm | WordForm, columns: int) -> int:
    """Bytes of a row of K columns, a multiple of 64."""
    numbers = form.bytes * row_elements(columns)
    return numbers + 64 * -(-row_elements(columns) // (16 * GROUP)) if isinstance(form, WordForm) else numbers


class RowsArguments(NamedTuple):
    """The operation's arguments.

    Attributes:
        x: address of float32 rows, `stride` floats apart.
        columns: K.
        out: address of the result.
        weight, eps: of a norm; the weight's address, behind which LAYER_NORM has its bias.
        picked: address of int64 row numbers of x; 0 takes rows 0, 1, 2, ...
        rows_from: which of the step's numbers counts the rows.
    """

    x: int
    stride: int
    columns: int
    out: int
    weight: int = 0
    eps: float = 0.0
    picked: int = 0
    rows_from: int = StepNumber.TOKENS


def rows_operation(prologue: Prologue, form: RowForm | WordForm) -> int:
    """Address of the compiled operation."""
    return operation("activation_rows.cpu:make_rows", prologue, prologue.gated, form, form.bytes)
