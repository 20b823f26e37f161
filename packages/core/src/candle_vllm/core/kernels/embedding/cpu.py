# pyright: reportCallIssue=false, reportArgumentType=false
"""Adding rows of a table to others on the CPU; `packed_linear` and its like read the rows of their kinds of matrix."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, compile_operation, read, step_number
from candle_vllm.core.kernels.cpu_runtime.primitives import float32_at


class AddArguments(NamedTuple):
    """The operation's arguments.

    Attributes:
        x: address of float32 rows [T, columns], `stride` floats apart.
        target: address of the rows that they are added to, `target_stride` floats apart.
    """

    x: int
    stride: int
    columns: int
    target: int
    target_stride: int


def make_add() -> Callable[..., None]:
    """The operation."""

    def add(row, thread, threads):
        given = read(AddArguments, row)
        rows = step_number(row, StepNumber.TOKENS.value)
        for t in range(rows * thread // threads, rows * (thread + 1) // threads):
            x = float32_at(given.x + 4 * t * given.stride)
            target = float32_at(given.target + 4 * t * given.target_stride)
            for column in range(given.columns):
                target[column] += x[column]

    return add


@cache
def add_operation() -> int:
    """Address of the compiled operation."""
    return compile_operation(make_add())
