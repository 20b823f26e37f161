"""Rotary position embedding, in the half-split order of GPT-NeoX (pair i is dimensions i and i + R/2).

Contract: x [T, N, D] of any float dtype, cos and sin [P, R/2] fp32 with R <= D, positions [T] int64 below P. The first
R dimensions of every head rotate, the rest pass through; the arithmetic is fp32; y has x's shape and dtype, in new
memory.
Source: Su et al., 2021, arXiv:2104.09864.
"""

from __future__ import annotations

import torch

from candle_vllm.core.kernels.recorded import Recorded, Value
from candle_vllm.core.kernels.rotary import reference


def rotary(x: Value, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Value:
    """Rotates every head of x by its token's position."""
    if isinstance(x, Recorded):
        return x.rotary(cos, sin)
    assert x.dim() == 3
    assert cos.shape == sin.shape
    assert 2 * cos.shape[1] <= x.shape[2]
    return reference.rotary(x, positions, cos, sin)
