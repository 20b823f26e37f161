# SPDX-License-Identifier: MIT
"""Reorder columns on the CPU (step 6 of a request's life)."""

from __future__ import annotations

from candle_vllm.core.kernels.activation_quant import GROUP
from candle_vllm.core.kernels.activation_quant.cpu import share
from candle_vllm.core.kernels.column_order import OrderArguments
from candle_vllm.core.kernels.cpu_runtime.primitives import float32_at, int64_at, read, step_number


def column_order(row, thread, threads):
    given = read(OrderArguments, row)
    order = int64_at(given.order)
    groups = (given.columns + GROUP - 1) // GROUP
    rows = step_number(row, given.rows_from)
    first_row, row_count, first_group, group_count = share(rows, groups, thread, threads)
    last = min((first_group + group_count) * GROUP, given.columns)
    for t in range(first_row, first_row + row_count):
        at = int64_at(given.picked)[t] if given.picked != 0 else t
        source = float32_at(given.x + at * given.stride * 4)
        target = float32_at(given.out + t * given.out_stride * 4)
        for i in range(first_group * GROUP, last):
            target[i] = source[order[i]]
