"""Linear layers. Several stored matrices that read the same input are one product (q, k, v; gate, up)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from candle_vllm.core.kernels.linear import linear
from candle_vllm.core.layers.parameters import Placement


class Linear:
    """y [T, O] = x [T, I] W^T + b.

    Args:
        in_features: I.
        out_features: O, or the sizes of the named matrices that are stacked into O, in order.
        bias: whether there is one.
        placement: device and dtype.
    """

    def __init__(
        self, in_features: int, out_features: int | Mapping[str, int], placement: Placement, *, bias: bool = False
    ) -> None:
        sizes = {"": out_features} if isinstance(out_features, int) else dict(out_features)
        self.in_features = in_features
        self._rows: dict[str, slice] = {}
        end = 0
        for name, size in sizes.items():
            prefix = f"{name}." if name else ""
            self._rows[prefix] = slice(end, end + size)
            end += size
        self.weight = torch.empty(end, in_features, device=placement.device, dtype=placement.dtype)
        self.bias = torch.empty(end, device=placement.device, dtype=placement.dtype) if bias else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)

    def parts(self) -> Mapping[str, torch.Tensor]:
        """Every part that must be loaded, with the tensor that it is copied into."""
        found = {prefix + "weight": self.weight[rows] for prefix, rows in self._rows.items()}
        if self.bias is not None:
            found |= {prefix + "bias": self.bias[rows] for prefix, rows in self._rows.items()}
        return found
