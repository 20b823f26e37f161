# SPDX-License-Identifier: MIT
"""Rows of several values side by side.

Contract: values [T, W1], [T, W2], ... of one dtype; y [T, W1 + W2 + ...] of that dtype, in new memory; an exact copy.
Of a single value it is a copy that later steps of the model do not write to.
"""

from __future__ import annotations

from typing import NamedTuple

from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, operation
from candle_vllm.core.kernels.recorded import Recorded, Value


def side_by_side(first: Value, *others: Value) -> Value:
    """The values' columns, one behind the other."""
    if isinstance(first, Recorded):
        return first.beside(*others)
    from candle_vllm.core.kernels.side_by_side import reference

    return reference.side_by_side(first, *others)


def first_of_heads(x: Value, size: int) -> Value:
    """The first `size` columns of each head, [T, H * size] of x [T, H, D]."""
    return x.first_of_heads(size) if isinstance(x, Recorded) else x[..., :size].flatten(1)


class CopyArguments(NamedTuple):
    """The operation's arguments.

    Attributes:
        x: address of float32 rows [T, columns], `stride` floats apart.
        target: address of the rows that they are copied to, `target_stride` floats apart.
        picked: address of int64 row numbers, of which x is copied; 0 takes rows 0, 1, 2, ...
        rows_from: which of the step's numbers is T.
        parts, gap: as many runs of columns are copied, whose first columns stand `gap` apart in x.
    """

    x: int
    stride: int
    columns: int
    target: int
    target_stride: int
    picked: int = 0
    rows_from: int = StepNumber.TOKENS
    parts: int = 1
    gap: int = 0


def copy_operation() -> int:
    """Address of the compiled operation."""
    return operation("side_by_side.cpu:copy")
