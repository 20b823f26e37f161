# SPDX-License-Identifier: MIT
"""Copy rows, or some runs of their columns, on the CPU (step 6 of a request's life)."""

from __future__ import annotations

from candle_vllm.core.kernels.cpu_runtime.primitives import float32_at, int64_at, read, step_number
from candle_vllm.core.kernels.side_by_side import CopyArguments


def copy(row, thread, threads):
    given = read(CopyArguments, row)
    rows = step_number(row, given.rows_from)
    for t in range(rows * thread // threads, rows * (thread + 1) // threads):
        source = int64_at(given.picked)[t] if given.picked != 0 else t
        x = float32_at(given.x + 4 * source * given.stride)
        target = float32_at(given.target + 4 * t * given.target_stride)
        for part in range(given.parts):
            first = part * (given.columns + given.spread)
            for column in range(given.columns):
                target[first + column] = x[part * given.gap + column] if source >= 0 else 0.0
