# SPDX-License-Identifier: MIT
"""Scaling and soft-capping in plain torch."""

from __future__ import annotations

import torch


def scale_cap_(x: torch.Tensor, scale: float, cap: float | None = None) -> torch.Tensor:
    """See the contract in the package."""
    if cap is None:
        return x if scale == 1 else x.mul_(scale)
    return x.mul_(scale / cap).tanh_().mul_(cap)


def cut(x: torch.Tensor, deviations: float) -> torch.Tensor:
    """Return the result of `cut_`; see the contract in the package."""
    std, mean = torch.std_mean(x.float(), -1, correction=0, keepdim=True)
    return (x.float() - (mean + std * deviations)).clamp(min=0).to(x.dtype)
