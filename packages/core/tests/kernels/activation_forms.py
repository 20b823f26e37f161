# SPDX-License-Identifier: MIT
"""Prologues, and their result in the forms that matrices read, in plain torch: the reference of the tests."""

from __future__ import annotations

import torch

from candle_vllm.core.kernels.activation import activation
from candle_vllm.core.kernels.activation_quant import GROUP, Prologue
from candle_vllm.core.kernels.activation_rows import RowForm, row_elements
from candle_vllm.core.kernels.layer_norm import layer_norm
from candle_vllm.core.kernels.rms_norm.reference import rms_norm
from candle_vllm.core.kernels.silu_mul import GATES
from candle_vllm.core.kernels.silu_mul.reference import gate_mul


def behind(prologue: Prologue, x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 0.0) -> torch.Tensor:
    """Return y of the contract; `weight` of LAYER_NORM is its weight followed by its bias."""
    if prologue is Prologue.NONE:
        return x
    if (kind := next((kind for kind, own in GATES.items() if own is prologue), None)) is not None:
        return gate_mul(x, kind)
    if not prologue.norm:
        return activation(x, prologue.name.lower())
    assert weight is not None
    if prologue is Prologue.NORM:
        return rms_norm(x, weight, eps)
    factor, bias = weight.chunk(2)
    return layer_norm(x, factor, bias, eps)


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantise x float32 [T, K] to q int8 [T, K], s and s * sum(q) float32 [T, K/32]; see the contract."""
    groups = x.float().unflatten(-1, (-1, GROUP))
    scales = groups.abs().amax(-1) / 127
    inverse = torch.where(scales > 0, 1 / scales, torch.zeros_like(scales))
    q = (groups * inverse.unsqueeze(-1)).round()
    return q.flatten(-2).to(torch.int8), scales, q.sum(-1) * scales


def rows(y: torch.Tensor, form: RowForm) -> torch.Tensor:
    """Convert y float32 [T, K], the result of the prologue, to [T, row_elements(K)] in `form`; see the contract."""
    padded = torch.nn.functional.pad(y, (0, row_elements(y.shape[1]) - y.shape[1]))
    return padded.bfloat16() if form is RowForm.BF16 else padded
