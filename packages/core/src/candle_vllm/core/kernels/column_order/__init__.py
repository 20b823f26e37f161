# SPDX-License-Identifier: MIT
"""Columns of rows in another order, for matrices whose groups of inputs are no neighbours.

Part of step 6 of a request's life.

Contract: x float32 [R, K]; `order` K column numbers; out[t, i] = x[t, order[i]] float32, rows any distance apart in
both, exactly. `out` shares no memory with x. Recorded steps have it as an operation of their own, `cpu.py`, which may
pick rows of x; on a GPU torch's `index_select` does it.
"""

from __future__ import annotations

from typing import NamedTuple

from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, operation


class OrderArguments(NamedTuple):
    """The operation's arguments.

    Attributes:
        x: address of float32 rows, `stride` floats apart.
        order: address of int64 column numbers [K].
        columns: K.
        out: address of the result, its rows `out_stride` floats apart.
        picked: address of int64 row numbers of x; 0 takes rows 0, 1, 2, ...
        rows_from: which of the step's numbers counts the rows.
    """

    x: int
    stride: int
    order: int
    columns: int
    out: int
    out_stride: int
    picked: int = 0
    rows_from: int = StepNumber.TOKENS


def order_operation() -> int:
    """Address of the compiled operation."""
    return operation("column_order.cpu:column_order")
