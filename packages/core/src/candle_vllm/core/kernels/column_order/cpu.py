# pyright: reportCallIssue=false, reportArgumentType=false
"""Columns in another order on the CPU (part of step 6 of a request's life)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from candle_vllm.core.kernels.activation_quant import GROUP
from candle_vllm.core.kernels.activation_quant.cpu import share
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, compile_operation
from candle_vllm.core.kernels.cpu_runtime.primitives import float32_at, int64_at


def make_order() -> Callable[..., None]:
    """The operation. Arguments: see `order_row`."""

    def column_order(a, thread, threads):
        x, stride, order, columns, out, out_stride, picked = a[3], a[4], int64_at(a[5]), a[6], a[7], a[8], a[9]
        rows = int64_at(a[2])[a[10]]
        groups = (columns + GROUP - 1) // GROUP
        first_row, row_count, first_group, group_count = share(rows, groups, thread, threads)
        last = min((first_group + group_count) * GROUP, columns)
        for t in range(first_row, first_row + row_count):
            row = t
            if picked != 0:
                row = int64_at(picked)[t]
            source, target = float32_at(x + row * stride * 4), float32_at(out + t * out_stride * 4)
            for i in range(first_group * GROUP, last):
                target[i] = source[order[i]]

    return column_order


@cache
def order_operation() -> int:
    """Address of the compiled operation."""
    return compile_operation(make_order())


def order_row(
    *,
    x: int,
    stride: int,
    order: int,
    columns: int,
    out: int,
    out_stride: int,
    picked: int = 0,
    rows_from: StepNumber = StepNumber.TOKENS,
) -> list[int]:
    """The operation's arguments.

    Args:
        x: address of float32 rows, `stride` floats apart.
        order: address of int64 column numbers [K].
        columns: K.
        out: address of the result, its rows `out_stride` floats apart.
        picked: address of int64 row numbers of x; 0 takes rows 0, 1, 2, ...
        rows_from: which of the step's numbers counts the rows.
    """
    return [x, stride, order, columns, out, out_stride, picked, int(rows_from)]
