# SPDX-License-Identifier: MIT
"""Activations of feed-forward layers without a gate.

Contract: x [T, F] of any float dtype; y = act(x) has x's shape and dtype, in new memory; the arithmetic is fp32.
    gelu        x Phi(x), by the error function
    gelu_tanh   0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), which configs call gelu_new or gelu_pytorch_tanh
    quick_gelu  x sigmoid(1.702 x)
    relu        max(x, 0)
    relu2       max(x, 0)^2
    tanh        tanh(x), in heads after the layers
Outside recorded steps these are torch's own kernels, which do not synchronise with the host.
Source: Hendrycks and Gimpel, 2016, arXiv:1606.08415.
"""

from __future__ import annotations

from candle_vllm.core.kernels.recorded import Activation, Recorded, Value

__all__ = ["Activation", "activation"]


def activation(x: Value, kind: Activation) -> Value:
    """Return act(x), element by element."""
    if isinstance(x, Recorded):
        return x.activation(kind)
    from torch.nn import functional

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
