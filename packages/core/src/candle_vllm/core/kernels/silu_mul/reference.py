# SPDX-License-Identifier: MIT
"""Activation-and-multiply in plain torch."""

from __future__ import annotations

import torch


def silu_mul(x: torch.Tensor) -> torch.Tensor:
    """See the contract in the package."""
    gate, up = x.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


def gelu_tanh_mul(x: torch.Tensor) -> torch.Tensor:
    """See the contract in the package."""
    gate, up = x.float().chunk(2, dim=-1)
    return (torch.nn.functional.gelu(gate, approximate="tanh") * up).to(x.dtype)


def gelu_mul(x: torch.Tensor) -> torch.Tensor:
    """See the contract in the package."""
    gate, up = x.float().chunk(2, dim=-1)
    return (torch.nn.functional.gelu(gate) * up).to(x.dtype)


def gated(x: torch.Tensor, gate: torch.Tensor, kind: str) -> torch.Tensor:
    """See the contract in the package."""
    wide = gate.float()
    if kind == "gelu_tanh":
        return (x.float() * torch.nn.functional.gelu(wide, approximate="tanh")).to(x.dtype)
    return (x.float() * (torch.nn.functional.silu(wide) if kind == "silu" else wide.sigmoid())).to(x.dtype)
