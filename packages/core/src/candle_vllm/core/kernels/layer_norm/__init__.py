# SPDX-License-Identifier: MIT
"""LayerNorm of rows, and of heads with separate weights.

Contract: x is [T, ..., E] of any float dtype, weight [E] fp32, or [H, E] for x [T, H, E], and bias [E] fp32 or None.
The result (x - mean) / sqrt(variance + eps) * weight + bias over the last dimension has x's shape and dtype, in new
memory; the variance is the mean of the squared distances; the arithmetic is fp32, and the result is rounded once.
Recorded steps normalise heads in place, without a bias. Source: Ba, Kiros and Hinton, 2016, arXiv:1607.06450.
"""

from __future__ import annotations

from candle_vllm.core.kernels.recorded import Recorded, Value


def layer_norm(x: Value, weight: Value, bias: Value | None, eps: float) -> Value:
    """Return the norm of x; see above. Except in recorded steps torch computes it; no call waits for a GPU."""
    if isinstance(x, Recorded):
        return x.layer_norm(weight, bias, eps)
    assert weight.shape == x.shape[-weight.dim() :]
    from torch.nn import functional

    size = x.shape[-1:]
    if weight.dim() == 1:
        return functional.layer_norm(x.float(), size, weight, bias, eps).to(x.dtype)
    y = functional.layer_norm(x.float(), size, None, None, eps) * weight
    return (y if bias is None else y + bias).to(x.dtype)
