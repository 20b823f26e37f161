"""Quantising activations in plain torch."""

from __future__ import annotations

import torch

from candle_vllm.core.kernels.activation_quant import GROUP


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x float32 [T, K] -> q int8 [T, K], s float32 [T, K/32], s * sum(q) float32 [T, K/32]. See the contract."""
    groups = x.float().unflatten(-1, (-1, GROUP))
    scales = groups.abs().amax(-1) / 127
    inverse = torch.where(scales > 0, 1 / scales, torch.zeros_like(scales))
    q = (groups * inverse.unsqueeze(-1)).round()
    return q.flatten(-2).to(torch.int8), scales, q.sum(-1) * scales
