# SPDX-License-Identifier: MIT
"""Reorder the columns of activations, for matrices whose groups of inputs are not adjacent.

Contract: for x float32 [R, K] and `order`, K column numbers, out[t, i] = x[t, order[i]] float32, an exact copy. Rows of
x and of out may have any stride; `out` does not share memory with x. Recorded steps use the operation of `cpu.py`,
which may also select rows of x; a GPU uses torch's `index_select`.
"""

from __future__ import annotations

from typing import NamedTuple

from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber


class OrderArguments(NamedTuple):
    """Arguments of the operation.

    Attributes:
        x: address of float32 rows, `stride` floats apart.
        order: address of int64 column numbers [K].
        columns: K.
        out: address of the result, with rows `out_stride` floats apart.
        picked: address of int64 row numbers of x; 0 for rows 0, 1, 2, ...
        rows_from: the `StepNumber` that is the number of rows.
    """

    x: int
    stride: int
    order: int
    columns: int
    out: int
    out_stride: int
    picked: int = 0
    rows_from: int = StepNumber.TOKENS
