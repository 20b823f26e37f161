# SPDX-License-Identifier: MIT
"""Linear layer with plain weights, on the CPU; step 6 of a request's life.

Contract. Activations x [T, K] from `kernels/activation_rows`: bfloat16 for BF16 weights, float32 for F16 and F32
weights, each row padded with zeros after K. Weights [N, K], 16 rows interleaved (`layout.py`). The result is float32:

    out[t, column + n] (+)= sum over k of x[t, k] * weight[n, k] + bias[n]                             t < T, n < N

F16 and F32: weights are widened exactly, and the products are added in order of k, each with one rounding (fma). BF16:
products of two adjacent columns are added in order of k in float32, by the CPU's dot product instruction if it has one
(which treats subnormal numbers as zero), else by fma; the two differ by float32 rounding. On one CPU, the bits of a
row's result do not depend on T, the other rows or the threads. No other elements of `out` are written. `out` must not
overlap the inputs.

`pack` makes a `PlainMatrix` from a stored tensor's bytes; `unpack` returns its weights. `reference.py` implements the
contract in plain numpy. `cpu.py` has the compiled operations; only a CPU engine imports it.
"""

from __future__ import annotations

from candle_vllm.core.kernels.plain_linear.layout import MAX_COLUMNS, PlainKind, PlainMatrix
from candle_vllm.core.kernels.plain_linear.pack import pack, plain_kind
from candle_vllm.core.kernels.plain_linear.reference import unpack

__all__ = ["MAX_COLUMNS", "PlainKind", "PlainMatrix", "pack", "plain_kind", "unpack"]
