# SPDX-License-Identifier: MIT
"""Activations in plain torch."""

from __future__ import annotations

import torch
from torch.nn import functional


def activation(x: torch.Tensor, kind: str) -> torch.Tensor:
    """See the contract in the package."""
    wide = x.float()
    if kind == "gelu":
        return functional.gelu(wide).to(x.dtype)
    if kind == "gelu_tanh":
        return functional.gelu(wide, approximate="tanh").to(x.dtype)
    if kind == "quick_gelu":
        return (wide * (1.702 * wide).sigmoid()).to(x.dtype)
    if kind == "tanh":
        return wide.tanh().to(x.dtype)
    assert kind in ("relu", "relu2"), kind
    wide = functional.relu(wide)
    return (wide * wide if kind == "relu2" else wide).to(x.dtype)
