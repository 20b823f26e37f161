# SPDX-License-Identifier: MIT
"""On the CPU, multiply each row in place by the factor for its position (step 6 of a request's life)."""

from __future__ import annotations

from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber
from candle_vllm.core.kernels.cpu_runtime.primitives import float32_at, int64_at, read, step_number
from candle_vllm.core.kernels.position_scale import PositionScaleArguments


def position_scale(row, thread, threads):
    given = read(PositionScaleArguments, row)
    rows = step_number(row, StepNumber.TOKENS.value)
    positions, table = int64_at(given.positions), float32_at(given.table)
    for t in range(rows * thread // threads, rows * (thread + 1) // threads):
        values, factor = float32_at(given.x + t * given.stride * 4), table[positions[t]]
        if factor != 1:
            for column in range(given.columns):
                values[column] *= factor
