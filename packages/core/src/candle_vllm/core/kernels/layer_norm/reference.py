# SPDX-License-Identifier: MIT
"""LayerNorm in plain torch."""

from __future__ import annotations

import torch
from torch.nn import functional


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """See the contract in the package."""
    size = x.shape[-1:]
    if weight.dim() == 1:
        return functional.layer_norm(x.float(), size, weight, bias, eps).to(x.dtype)
    y = functional.layer_norm(x.float(), size, None, None, eps) * weight
    return (y if bias is None else y + bias).to(x.dtype)
