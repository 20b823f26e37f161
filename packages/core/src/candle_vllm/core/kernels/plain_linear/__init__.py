# SPDX-License-Identifier: MIT
"""Linear layer with plain weights, on the CPU; step 6 of a request's life.

Contract. Activations x [T, K] as `kernels/activation_rows` makes them: bfloat16 for BF16 weights, float32 for F16 and
F32 weights, each row zero behind K. Weights [N, K], 16 rows interleaved (`layout.py`). Result, float32:

    out[t, column + n] (+)= sum over k of x[t, k] * weight[n, k] + bias[n]                             t < T, n < N

F16 and F32: weights are widened exactly, and the products are added in order of k, each with one rounding (fma). BF16:
products of two neighbouring columns are added in order of k in float32, by the CPU's dot product where it has one
(which takes subnormal numbers as zero), else by fma; the two differ by roundings of float32. With one CPU a row's
result has the same bits whatever T, the other rows and the threads are. Nothing else of `out` is written. `out` may not
overlap the inputs.

`pack` makes a `PlainMatrix` from a stored tensor's bytes; `unpack` gives its numbers back. `reference.py` is the
contract in plain numpy. `cpu.py` has the compiled operations, and only a CPU engine imports it.
"""

from __future__ import annotations

from candle_vllm.core.kernels.plain_linear.layout import MAX_COLUMNS, PlainKind, PlainMatrix
from candle_vllm.core.kernels.plain_linear.pack import pack, plain_kind
from candle_vllm.core.kernels.plain_linear.reference import unpack

__all__ = ["MAX_COLUMNS", "PlainKind", "PlainMatrix", "pack", "plain_kind", "unpack"]
