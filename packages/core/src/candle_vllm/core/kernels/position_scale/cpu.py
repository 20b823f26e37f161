# pyright: reportCallIssue=false, reportArgumentType=false
"""Rows times a number of their position on the CPU, in place (part of step 6 of a request's life)."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, compile_operation, read, step_number
from candle_vllm.core.kernels.cpu_runtime.primitives import float32_at, int64_at


class PositionScaleArguments(NamedTuple):
    """The operation's arguments.

    Attributes:
        x: address of float32 rows, `stride` floats apart, of which `columns` change.
        positions: address of the step's int64 positions.
        table: address of the float32 numbers of all positions.
    """

    x: int
    stride: int
    columns: int
    positions: int
    table: int


def position_scale(row, thread, threads):
    """The operation."""
    given = read(PositionScaleArguments, row)
    rows = step_number(row, StepNumber.TOKENS.value)
    positions, table = int64_at(given.positions), float32_at(given.table)
    for t in range(rows * thread // threads, rows * (thread + 1) // threads):
        values, factor = float32_at(given.x + t * given.stride * 4), table[positions[t]]
        if factor != 1:
            for column in range(given.columns):
                values[column] *= factor


@cache
def position_scale_operation() -> int:
    """Address of the compiled operation."""
    return compile_operation(position_scale)
