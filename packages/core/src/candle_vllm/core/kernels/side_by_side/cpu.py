# pyright: reportCallIssue=false, reportArgumentType=false
"""Copying rows on the CPU."""

from __future__ import annotations

from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber
from candle_vllm.core.kernels.cpu_runtime.primitives import float32_at, read, step_number
from candle_vllm.core.kernels.side_by_side import CopyArguments


def copy(row, thread, threads):
    """The operation."""
    given = read(CopyArguments, row)
    rows = step_number(row, StepNumber.TOKENS.value)
    for t in range(rows * thread // threads, rows * (thread + 1) // threads):
        x = float32_at(given.x + 4 * t * given.stride)
        target = float32_at(given.target + 4 * t * given.target_stride)
        for column in range(given.columns):
            target[column] = x[column]
