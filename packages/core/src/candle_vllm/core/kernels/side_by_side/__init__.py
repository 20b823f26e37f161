# SPDX-License-Identifier: MIT
"""Concatenate the columns of several values.

Contract: for values [T, W1], [T, W2], ... of one dtype, y [T, W1 + W2 + ...] has that dtype and is an exact copy in new
memory. For a single value it is a copy that later layers do not overwrite.
"""

from __future__ import annotations

from typing import NamedTuple

from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber
from candle_vllm.core.kernels.recorded import Recorded, Value


def side_by_side(first: Value, *others: Value) -> Value:
    """Return the concatenated columns."""
    if isinstance(first, Recorded):
        return first.beside(*others)
    import torch

    return torch.cat((first, *others), -1)


def first_of_heads(x: Value, size: int) -> Value:
    """Return the first `size` columns of each head of x [T, H, D], as [T, H * size]."""
    return x.first_of_heads(size) if isinstance(x, Recorded) else x[..., :size].flatten(1)


class CopyArguments(NamedTuple):
    """Arguments of the operation.

    Attributes:
        x, columns: address of float32 rows, `stride` floats apart, and columns of a run that is copied.
        target: address of the rows to which x is copied, `target_stride` floats apart.
        picked: address of the int64 row numbers of x that are copied, -1 for zeros; 0 for rows 0, 1, 2, ...
        rows_from: the `StepNumber` that is T.
        parts, gap, spread: number of runs, columns from one run's start to the next in x, and between runs in target.
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
    spread: int = 0
