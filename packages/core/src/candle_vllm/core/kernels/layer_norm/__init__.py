# SPDX-License-Identifier: MIT
"""LayerNorm of rows, and of heads that have weights of their own.

Contract: x [T, ..., E] of any float dtype, weight [E] fp32, or [H, E] for x [T, H, E], and bias [E] fp32 or None; y has
x's shape and dtype, in new memory: (x - mean) / sqrt(variance + eps) * weight + bias over the last dimension, with the
mean of the squared distances as the variance; the arithmetic is fp32, the result is rounded once.
Source: Ba, Kiros and Hinton, 2016, arXiv:1607.06450.
"""

from __future__ import annotations

from candle_vllm.core.kernels.recorded import Recorded, Value


def layer_norm(x: Value, weight: Value, bias: Value | None, eps: float) -> Value:
    """y, see above; on a GPU by torch's own kernels, which wait for nothing."""
    if isinstance(x, Recorded):
        return x.layer_norm(weight, bias, eps)
    assert weight.shape == x.shape[-weight.dim() :]
    from candle_vllm.core.kernels.layer_norm import reference

    return reference.layer_norm(x, weight, bias, eps)
