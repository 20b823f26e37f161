# pyright: reportCallIssue=false, reportArgumentType=false
"""Rows times a number of their position on the CPU, in place (part of step 6 of a request's life)."""

from __future__ import annotations

from functools import cache

from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, compile_operation
from candle_vllm.core.kernels.cpu_runtime.primitives import float32_at, int64_at


def position_scale(a, thread, threads):
    """The operation. Arguments: see `position_scale_row`."""
    rows = int64_at(a[2])[StepNumber.TOKENS.value]
    x, row_bytes, columns = a[3], 4 * a[4], a[5]
    positions, table = int64_at(a[6]), float32_at(a[7])
    for row in range(rows * thread // threads, rows * (thread + 1) // threads):
        values, factor = float32_at(x + row * row_bytes), table[positions[row]]
        if factor != 1:
            for column in range(columns):
                values[column] *= factor


@cache
def position_scale_operation() -> int:
    """Address of the compiled operation."""
    return compile_operation(position_scale)


def position_scale_row(*, x: int, stride: int, columns: int, positions: int, table: int) -> list[int]:
    """The operation's arguments.

    Args:
        x: address of float32 rows, `stride` floats apart, of which `columns` change.
        positions: address of the step's int64 positions.
        table: address of the float32 numbers of all positions.
    """
    return [x, stride, columns, positions, table]
