# SPDX-License-Identifier: MIT
"""Linear layer with BF16, F16, F32 or W8A8 weights, on the CPU; step 6 of a request's life.

Contract. Activations x [T, K] from `kernels/activation_rows`: bfloat16 for BF16 weights, float32 for F16 and F32
weights, int8 with a scale for each segment of 128 for W8A8; each row is padded with zeros after K. Weights [N, K], 16
rows interleaved (`layout.py`). The result is float32, and with `accumulate` is added to `out`:

    out[t, column + n] (+)= sum over k of x[t, k] * weight[n, k] + bias[n]                             t < T, n < N

F16 and F32: weights are widened exactly, and the products are added in order of k, each with one rounding (fma). BF16:
products of two adjacent columns are added in order of k in float32, by the CPU's dot product instruction if it has one
(which treats subnormal numbers as zero), else by fma; with AMX, by squares of 32 columns (`cpu_squares.py`). These
differ by float32 rounding. W8A8: weights are int8 with one float32 scale per row. The sum over a segment is an exact
integer; sums times the segments' scales are added in order by fma, and the total is multiplied by the row's scale. So
W8A8 has the same bits on every CPU. On one CPU, the bits of a row's result do not depend on T, the other rows or the
threads. No other elements of `out` are written. `out` must not overlap the inputs.

`pack` makes a `PlainMatrix` from a stored tensor's bytes, `pack_rows` one of W8A8 from blocks of Q8_0 whose rows have
one scale each. `cpu.py` has the compiled operations.
"""

from __future__ import annotations

from candle_vllm.core.kernels.plain_linear.layout import MAX_COLUMNS, PlainKind, PlainMatrix
from candle_vllm.core.kernels.plain_linear.pack import pack, pack_rows, plain_kind

__all__ = ["MAX_COLUMNS", "PlainKind", "PlainMatrix", "pack", "pack_rows", "plain_kind"]
