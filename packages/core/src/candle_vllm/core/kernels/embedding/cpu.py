# SPDX-License-Identifier: MIT
"""Add float32 rows to other rows on the CPU; each weight format, such as `packed_linear`, looks up rows itself."""

from __future__ import annotations

from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber
from candle_vllm.core.kernels.cpu_runtime.primitives import float32_at, read, step_number
from candle_vllm.core.kernels.embedding import AddArguments


def add(row, thread, threads):
    given = read(AddArguments, row)
    rows = step_number(row, StepNumber.TOKENS.value)
    for t in range(rows * thread // threads, rows * (thread + 1) // threads):
        x = float32_at(given.x + 4 * t * given.stride)
        target = float32_at(given.target + 4 * t * given.target_stride)
        for column in range(given.columns):
            target[column] += x[column]
