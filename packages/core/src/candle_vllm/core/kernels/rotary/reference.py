# SPDX-License-Identifier: MIT
"""Rotary position embedding in plain torch."""

from __future__ import annotations

import torch


def rotary(x: torch.Tensor, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """See the contract in the package."""
    half = cos.shape[1]
    c, s = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)  # [T, 1, R/2]
    wide = x.float()
    a, b, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    return torch.cat([a * c - b * s, b * c + a * s, rest], dim=-1).to(x.dtype)
