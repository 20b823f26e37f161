# SPDX-License-Identifier: MIT
"""Linear layer with small-float weights and scales (FP8, NVFP4) on the CPU (step 6 of a request's life).

Contract. Activations x [T, K] are bfloat16 rows of `kernels/activation_rows`, zero beyond K. Weights [N, K] are e4m3,
e5m2, or e2m1 with one e4m3 scale for each 16 elements of a row. K is divided into spans of at most 256 columns; each
row has one float32 scale for each span (`layout.py`). The result is float32:

    out[t, column + n] (+)= sum over spans s of scale[n, s] * (sum over k in s of x[t, k] * weight[n, k]) + bias[n]

Weights are exact: an e2m1 times an e4m3 scale has at most 6 significant bits, so it is a bfloat16. A span's products
are added from zero as `kernels/plain_linear` adds products of bfloat16 weights, with AMX's order only if spans are
multiples of 32 columns; spans are added in order by fma. The bits of out[t] do not depend on T, on other rows of x, or
on the threads. A NaN in row n of the weights makes out[:, n] NaN; infinite weights (e5m2) are refused. No other
elements of `out` are written, and `out` must not overlap the inputs.

`pack` converts the codes of a checkpoint to a `ScaledMatrix`. `cpu.py` has the compiled operation.
Source: Micikevicius et al., 2022, arXiv:2209.05433; OCP Microscaling Formats 1.0, 2023.
"""

from __future__ import annotations

from candle_vllm.core.kernels.scaled_linear.layout import ScaledKind, ScaledMatrix
from candle_vllm.core.kernels.scaled_linear.pack import LEAST_SPAN, check_span, pack

__all__ = ["LEAST_SPAN", "ScaledKind", "ScaledMatrix", "check_span", "pack"]
