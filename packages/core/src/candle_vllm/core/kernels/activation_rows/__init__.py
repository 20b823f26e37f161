"""Rows of activations as plain matrices read them, with what comes right before.

Contract: x float32 [T, C] goes through a prologue (see `kernels/activation_quant`) to y float32 [T, K]. Result: y in
the form F32 as it is, in the form BF16 rounded to the nearest bfloat16, ties to even (not for NaN). A row of the result
takes `row_elements(K)` numbers, which is K up to the next multiple of 32, and is zero behind K. K is any number from 1.
"""

from __future__ import annotations

import enum
from typing import TypeAlias

from candle_vllm.core.kernels.activation_quant import GROUP, Groups


class RowForm(enum.IntEnum):
    """The result as a form in which matrices read their input: the numbers of a row."""

    BF16 = 0
    F32 = 1

    @property
    def bytes(self) -> int:
        """Bytes of a number."""
        return 2 if self is RowForm.BF16 else 4


InputForm: TypeAlias = Groups | RowForm
"""How a matrix reads its input."""


def row_elements(columns: int) -> int:
    """Numbers that a row of K columns takes."""
    return -(-columns // GROUP) * GROUP
