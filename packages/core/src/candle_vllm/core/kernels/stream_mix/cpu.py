# SPDX-License-Identifier: MIT
"""Mix residual streams on the CPU (step 6 of a request's life)."""

from __future__ import annotations

import math

from candle_vllm.core.kernels.activation_quant.cpu import rms_scale_within, share
from candle_vllm.core.kernels.cpu_runtime.primitives import float32_at, int64_at, read, step_number
from candle_vllm.core.kernels.cpu_runtime.tiles import add_rows, stack_bytes
from candle_vllm.core.kernels.stream_mix import LEAST, MixArguments

_LEAST_ROOT = math.sqrt(LEAST)


def mix(row, thread, threads):
    given = read(MixArguments, row)
    streams, columns, made, gates = given.streams, given.columns, given.made, given.gate_count
    rows, table = step_number(row, given.rows_from), float32_at(given.table)
    first_row, row_count, first, count = share(rows, columns >> 4, thread, threads)
    memory = stack_bytes(16 * streams + 4 * gates)
    addresses, factors, weights = int64_at(memory), float32_at(memory + 8 * streams), float32_at(memory + 12 * streams)
    tanh = float32_at(memory + 16 * streams)
    for t in range(first_row, first_row + row_count):
        gate = float32_at(given.gates + t * given.gate_stride * 4)
        for s in range(gates):
            tanh[s] = 1.0 - 2.0 / (1.0 + math.exp(2.0 * float(gate[s])))
        for n in range(streams):
            addresses[n], factors[n] = given.x + (t * given.stride + n * columns) * 4, 1.0
            if given.level != 0 and n > 0:
                own = 1.0 / float(rms_scale_within(addresses[n], columns, 0.0))
                factors[n] = 1.0 / float(rms_scale_within(addresses[0], columns, 0.0)) / max(own, _LEAST_ROOT)
        for m in range(made):
            for n in range(streams):
                total = float(table[m * streams + n])
                for s in range(gates):
                    total += float(tanh[s]) * float(table[((1 + s) * made + m) * streams + n])
                weights[n] = total * float(factors[n])
            to = given.out + (t * given.out_stride + m * columns) * 4
            add_rows(to, memory, memory + 12 * streams, streams, first, count, 0)
            if given.scale != 0:
                target, scale = float32_at(to), float32_at(given.scale)
                for column in range(16 * first, 16 * (first + count)):
                    target[column] *= scale[column]
