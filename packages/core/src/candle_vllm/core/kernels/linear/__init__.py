"""Linear layer with a plain weight.

Contract: x [T, I] and weight [O, I] of one float dtype, bias [O] or None; y [T, O] = x weight^T + bias has x's dtype,
in new memory. Sums are at least fp32.
"""

from __future__ import annotations

import torch

from candle_vllm.core.kernels.linear import reference


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x times the transpose of weight, plus bias."""
    assert x.shape[-1] == weight.shape[1]
    return reference.linear(x, weight, bias)
