# SPDX-License-Identifier: MIT
"""Activation-and-multiply, the gates of SwiGLU and GeGLU.

Contract: x [T, 2F] holds gate then up, of any float dtype; y [T, F] = act(gate) * up has x's dtype, in new memory; the
arithmetic is fp32. act is SiLU, or GELU in its tanh form: 0.5 g (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3))).
Source: Shazeer, 2020, arXiv:2002.05202; Hendrycks and Gimpel, 2016, arXiv:1606.08415.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from candle_vllm.core.kernels.dispatch import on_gpu
from candle_vllm.core.kernels.recorded import Recorded, Value

if TYPE_CHECKING:
    import torch


def silu_mul(x: Value) -> Value:
    """silu(x[:, :F]) * x[:, F:]."""
    if isinstance(x, Recorded):
        return x.silu_mul()
    _check(x)
    if on_gpu(x):
        from candle_vllm.core.kernels.silu_mul import triton

        return triton.silu_mul(x)
    from candle_vllm.core.kernels.silu_mul import reference

    return reference.silu_mul(x)


def gelu_tanh_mul(x: Value) -> Value:
    """gelu(x[:, :F]) * x[:, F:]."""
    if isinstance(x, Recorded):
        return x.gelu_tanh_mul()
    _check(x)
    if on_gpu(x):
        from candle_vllm.core.kernels.silu_mul import triton

        return triton.gelu_tanh_mul(x)
    from candle_vllm.core.kernels.silu_mul import reference

    return reference.gelu_tanh_mul(x)


def _check(x: torch.Tensor) -> None:
    assert x.dim() == 2
    assert x.shape[1] % 2 == 0
