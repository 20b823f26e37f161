# SPDX-License-Identifier: MIT
"""Scale, soft-cap, clamp or sparsify rows in place on the CPU (step 6 of a request's life)."""

from __future__ import annotations

from collections.abc import Callable

from candle_vllm.core.kernels.activation_quant.cpu import layer_scale, row_mean
from candle_vllm.core.kernels.cpu_runtime.emit import F32, Emitter, Float, Int, emitted, vector
from candle_vllm.core.kernels.cpu_runtime.emit_functions import emit_tanh
from candle_vllm.core.kernels.cpu_runtime.level import LANES
from candle_vllm.core.kernels.cpu_runtime.primitives import float32_at, read, step_number
from candle_vllm.core.kernels.scale_cap import ScaleCapArguments


@emitted
def scale_cap_lines(e: Emitter, at: Int, lines: Int, factor: Float, cap: Float, kind: int) -> None:
    """Replace 16 * `lines` floats by x * factor (`kind` is 0), cap * tanh(x * factor) (1), or
    min(max(x, factor), cap) (2)."""
    b = e.b
    factor, cap = e.splat(factor), e.splat(cap)
    with e.each_or_skip(lines) as index:
        place = b.add(at, b.mul(index, e.int64(4 * LANES)))
        x = e.load(place, vector(F32))
        if kind == 2:
            value = b.select(b.fcmp_ordered("<", x, factor), factor, x)
            value = b.select(b.fcmp_ordered(">", value, cap), cap, value)
        else:
            value = b.fmul(x, factor)
            value = b.fmul(emit_tanh(e, value), cap) if kind else value
        e.store(place, value)


def make_scale_cap(KIND: int) -> Callable[..., None]:
    def scale_cap(row, thread, threads):
        given = read(ScaleCapArguments, row)
        units = step_number(row, given.rows_from) * given.lines
        unit, last = units * thread // threads, units * (thread + 1) // threads
        while unit < last:
            t, line = unit // given.lines, unit % given.lines
            count = min(given.lines - line, last - unit)
            scale_cap_lines(given.x + t * given.stride * 4 + 64 * line, count, given.factor, given.cap, KIND)
            unit += count

    return _cut if KIND == 3 else scale_cap


def _cut(row, thread, threads):
    """See `cut_` in `kernels/scale_cap`."""
    given = read(ScaleCapArguments, row)
    rows, columns = step_number(row, given.rows_from), given.lines
    for t in range(rows * thread // threads, rows * (thread + 1) // threads):
        at = given.x + t * given.stride * 4
        mean = row_mean(at, columns)
        least, values = mean + given.factor / layer_scale(at, columns, mean, 0.0), float32_at(at)
        for column in range(columns):
            values[column] = max(values[column] - least, 0.0)
