# SPDX-License-Identifier: MIT
"""Activation-and-multiply in plain torch."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional

from candle_vllm.core.kernels.recorded import LIMITS

_ACTS = {
    **dict.fromkeys(("silu", *LIMITS), functional.silu),
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "gelu": functional.gelu,
    "sigmoid": torch.sigmoid,
    "softplus": functional.softplus,
}


def gated_product(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    """Multiply act(gate) by up, both clamped if the kind has a limit."""
    if kind == "swiglu_oai":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    act = _ACTS[kind](gate)
    if (limits := LIMITS.get(kind)) is not None:
        act, up = act.clamp(max=limits[0]), up.clamp(-limits[1], limits[1])
    return act * up


def gate_mul(x: torch.Tensor, kind: str) -> torch.Tensor:
    """See the contract in the package."""
    gate, up = x.float().chunk(2, dim=-1)
    return gated_product(gate, up, kind).to(x.dtype)


def gated(x: torch.Tensor, gate: torch.Tensor, kind: str) -> torch.Tensor:
    """See the contract in the package."""
    wide = x.float().unflatten(-1, (gate.shape[-1], -1)) * _ACTS[kind](gate.float()).unsqueeze(-1)
    return wide.flatten(-2).to(x.dtype)
