"""RMSNorm.

Contract: x [T, ..., E] of any float dtype, weight [E]; y has x's shape and dtype, in new memory. The sum of squares and
the scaling are fp32, the result is rounded once. Source: Zhang and Sennrich, 2019, arXiv:1910.07467.
"""

from __future__ import annotations

import torch

from candle_vllm.core.kernels.recorded import Recorded, Value
from candle_vllm.core.kernels.rms_norm import reference


def rms_norm(x: Value, weight: torch.Tensor, eps: float) -> Value:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    if isinstance(x, Recorded):
        return x.rms_norm(weight, eps)
    assert weight.shape == x.shape[-1:]
    return reference.rms_norm(x, weight, eps)
