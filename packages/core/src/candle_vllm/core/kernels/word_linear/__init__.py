# SPDX-License-Identifier: MIT
"""Linear layer with F16 or F32 weights as 14-bit integers, on the CPU; step 6 of a request's life.

It is used for many rows (a vision tower's patches, an encoder's tokens), on CPUs that multiply 16-bit integers twice as
fast as floats. Contract. Activations x [T, K] from `kernels/activation_rows` in I16: each group of 32 columns of
a row has integers from -8191 to 8191 and a float32 scale. Weights [N, K], 16 rows interleaved (`layout.py`): a group of
a row has integers from -8192 to 8192 and a scale that is a power of two. The result is float32:

    sums[t, n, g] = sum over k in group g of x[t, k] * weight[n, k]
    out[t, column + n] (+)= sum over g of sums[t, n, g] * (scale[n, g] * scale[t, g]) + bias[n]        t < T, n < N

The integer sums are exact, because they stay below 2^31. They are rounded to float32, and their products with scales
are added in order of g by fma, so a row's result has the same bits on every CPU, for any T, other rows and threads. No
other elements of `out` are written. `out` must not overlap the inputs.

The largest error is the rounding to 14 bits. For normally distributed elements it is 7e-5 of a weight's standard
deviation (the largest F16 weights of a group are exact), and 9e-5 of an activation's.
"""

from __future__ import annotations

from candle_vllm.core.kernels.word_linear.layout import WordMatrix, pack

__all__ = ["WordMatrix", "pack"]
