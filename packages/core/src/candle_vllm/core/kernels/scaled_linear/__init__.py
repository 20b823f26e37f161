# SPDX-License-Identifier: MIT
"""Linear layer with weights that are small floats with scales (FP8, NVFP4), on the CPU; step 6 of a request's life.

Contract. Activations x [T, K], bfloat16, as `kernels/activation_rows` makes them, each row zero behind K. Weights
[N, K] of e4m3, e5m2, or e2m1 with a scale e4m3 for each 16 of a row; K is cut into spans of at most 256 columns, which
share one float32 scale for each row (`layout.py`). Result, float32:

    out[t, column + n] (+)= sum over spans s of scale[n, s] * (sum over k in s of x[t, k] * weight[n, k]) + bias[n]

Weights are exact: an e2m1 times its group's e4m3 has 6 significant bits at most, so each weight is a bfloat16. A span's
products are added as `kernels/plain_linear` adds those of bfloat16 weights, in order of k from zero, and the spans in
their order by fma. A row's result has the same bits whatever T, the other rows and the threads are. A weight that is
NaN makes its row of the weights give NaN; infinite ones (e5m2) are refused. Nothing else
of `out` is written. `out` may not overlap the inputs.

`pack` makes a `ScaledMatrix` of what a checkpoint holds; `unpack` gives its numbers back. `reference.py` is the
contract in plain numpy. `cpu.py` has the compiled operations, and only a CPU engine imports it.
Source: Micikevicius et al., 2022, arXiv:2209.05433; OCP Microscaling Formats 1.0, 2023.
"""

from __future__ import annotations

from candle_vllm.core.kernels.scaled_linear.layout import ScaledKind, ScaledMatrix
from candle_vllm.core.kernels.scaled_linear.pack import LEAST_SPAN, check_span, pack
from candle_vllm.core.kernels.scaled_linear.reference import unpack

__all__ = ["LEAST_SPAN", "ScaledKind", "ScaledMatrix", "check_span", "pack", "unpack"]
