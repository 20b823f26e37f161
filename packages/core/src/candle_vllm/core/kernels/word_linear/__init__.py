# SPDX-License-Identifier: MIT
"""Linear layer with F16 weights as whole numbers of 14 bits, on the CPU; step 6 of a request's life.

For many rows and CPUs that multiply numbers of 16 bits twice as fast as floats (a tower's patches). Contract.
Activations x [T, K] as `kernels/activation_rows` makes them in the form `WordForm`: in each group of 32 columns whole
numbers of at most 8191, and a float32 scale. Weights [N, K], 16 rows interleaved (`layout.py`): in each group of 32
columns whole numbers of at most 8192, and a scale that is a power of two. Result, float32:

    sums[t, n, g] = sum over k in group g of x[t, k] * weight[n, k]
    out[t, column + n] (+)= sum over g of sums[t, n, g] * (scale[n, g] * scale[t, g]) + bias[n]        t < T, n < N

The former are exact, as they stay below 2^31; the latter are added in order of g, each with one rounding (fma), so that
a row's result has the same bits on every CPU, whatever T, the other rows and the threads are. Nothing else of `out` is
written. `out` may not overlap the inputs.

What is lost is the rounding to 14 bits: of normally distributed numbers 7e-5 of a weight's deviation, for the largest
F16 numbers of a group are whole here, and 9e-5 of an activation's.
"""

from __future__ import annotations

from candle_vllm.core.kernels.word_linear.layout import WordMatrix, pack
from candle_vllm.core.kernels.word_linear.reference import unpack

__all__ = ["WordMatrix", "pack", "unpack"]
