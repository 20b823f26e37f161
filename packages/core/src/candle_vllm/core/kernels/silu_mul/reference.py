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


def gate_mul(x: torch.Tensor, kind: str) -> torch.Tensor:
    """See the contract in the package."""
    (gate, up), limit = x.float().chunk(2, dim=-1), LIMITS.get(kind, torch.inf)
    return (_ACTS[kind](gate).clamp(max=limit) * up.clamp(-limit, limit)).to(x.dtype)


def gated(x: torch.Tensor, gate: torch.Tensor, kind: str) -> torch.Tensor:
    """See the contract in the package."""
    wide = x.float().unflatten(-1, (gate.shape[-1], -1)) * _ACTS[kind](gate.float()).unsqueeze(-1)
    return wide.flatten(-2).to(x.dtype)
