"""LayerNorm with its weight and bias."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from candle_vllm.core.layers.parameters import Part, Placement, TensorPart


class LayerNorm:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension of x [T, size], in fp32.

    Source: Ba, Kiros and Hinton, 2016, arXiv:1607.06450.
    """

    def __init__(self, size: int, eps: float, placement: Placement) -> None:
        self.eps = eps
        self.weight = torch.empty(size, device=placement.device, dtype=torch.float32)
        self.bias = torch.empty(size, device=placement.device, dtype=torch.float32)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(x.float(), self.weight.shape, self.weight, self.bias, self.eps)

    def parts(self) -> Mapping[str, Part]:
        """Every part that must be loaded."""
        return {"weight": TensorPart(self.weight), "bias": TensorPart(self.bias)}
