# SPDX-License-Identifier: MIT
"""Mix residual streams on the CPU (step 6 of a request's life)."""

from __future__ import annotations

import math

from candle_vllm.core.kernels.activation_quant.cpu import rms_scale, share
from candle_vllm.core.kernels.cpu_runtime.primitives import float32_at, int64_at, read, step_number
from candle_vllm.core.kernels.cpu_runtime.tiles import add_rows, stack_bytes
from candle_vllm.core.kernels.stream_mix import LEAST, MixArguments, WeightArguments

_LEAST_ROOT = math.sqrt(LEAST)


def mix(row, thread, threads):
    given = read(MixArguments, row)
    streams, columns, made, gates = given.streams, given.columns, given.made, given.gate_count
    rows = step_number(row, given.rows_from)
    first_row, row_count, first, count = share(rows, columns >> 4, thread, threads)
    memory = stack_bytes(16 * streams + 4 * gates)
    addresses, factors, weights = int64_at(memory), float32_at(memory + 8 * streams), float32_at(memory + 12 * streams)
    tanh = float32_at(memory + 16 * streams)
    for t in range(first_row, first_row + row_count):
        gate, table = (
            float32_at(given.gates + t * given.gate_stride * 4),
            float32_at(given.table + t * given.table_stride * 4),
        )
        for s in range(gates):
            tanh[s] = 1.0 - 2.0 / (1.0 + math.exp(2.0 * float(gate[s])))
        for n in range(streams):
            addresses[n], factors[n] = given.x + (t * given.stride + n * columns) * 4, 1.0
            if given.level != 0 and n > 0:
                own = 1.0 / float(rms_scale(1, addresses[n], columns, 0.0))
                factors[n] = 1.0 / float(rms_scale(1, addresses[0], columns, 0.0)) / max(own, _LEAST_ROOT)
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


def weigh(row, thread, threads):
    given = read(WeightArguments, row)
    n, eps, rows = given.streams, float(given.eps), step_number(row, given.rows_from)
    scale, base = float32_at(given.scale), float32_at(given.base)
    comb, sums = float32_at(stack_bytes(4 * n * n)), float32_at(stack_bytes(4 * n))
    for t in range(rows * thread // threads, rows * (thread + 1) // threads):
        x, out = float32_at(given.x + t * given.stride * 4), float32_at(given.out + t * given.out_stride * 4)
        for m in range(n):
            out[m] = 1.0 / (1.0 + math.exp(-(float(x[m]) * float(scale[m]) + float(base[m])))) + eps
        if given.columns == n:
            continue
        for m in range(n):
            at = n + m
            score = float(x[at]) * float(scale[at]) + float(base[at])
            out[n + m * (n + 1) + n] = 2.0 / (1.0 + math.exp(-score))
            at, most, total = 2 * n + m * n, -math.inf, 0.0
            for k in range(n):
                most = max(most, float(x[at + k]) * float(scale[at + k]) + float(base[at + k]))
            for k in range(n):
                comb[m * n + k] = math.exp(float(x[at + k]) * float(scale[at + k]) + float(base[at + k]) - most)
                total += float(comb[m * n + k])
            for k in range(n):
                comb[m * n + k] = float(comb[m * n + k]) / total + eps
        for number in range(2 * given.rounds - 1):
            over, along = (n, 1) if number % 2 == 0 else (1, n)  # sums over the first index, then over the last one
            for k in range(n):
                total = eps
                for m in range(n):
                    total += float(comb[m * over + k * along])
                sums[k] = total
            for k in range(n):
                for m in range(n):
                    comb[m * over + k * along] = float(comb[m * over + k * along]) / float(sums[k])
        for m in range(n):
            for k in range(n):
                out[n + m * (n + 1) + k] = comb[k * n + m]
