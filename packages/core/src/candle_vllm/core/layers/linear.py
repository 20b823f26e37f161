"""Linear layers. Several stored matrices that read the same input are one product (q, k, v; gate, up)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from candle_vllm.core.kernels.recorded import Recorded, Value
from candle_vllm.core.layers.parameters import DevicePart, MatrixPart, Placement, TensorPart
from candle_vllm.core.layers.product import Product
from candle_vllm.core.loading.weights import Part

if TYPE_CHECKING:
    from candle_vllm.core.kernels.recorded import Matrix
    from candle_vllm.core.layers.parameters import Weight


class Linear:
    """y [T, O] = x [T, I] W^T + b.

    Args:
        in_features: I.
        out_features: O, or the sizes of the named matrices that are stacked into O, in order.
        bias: whether there is one.
        placement: where the weights live.
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
        self._placement = placement
        device, dtype = placement.device, placement.dtype
        self.matrices: dict[str, Matrix] = {}
        self.weights: dict[str, Weight] = {}  # parts on a GPU, until `_product` has joined them
        self.weight = torch.empty(end, in_features, device=device, dtype=dtype) if placement.stacked else None
        self.bias = torch.empty(end, device=device, dtype=dtype) if bias else None
        self._product: Product | None = None

    def __call__(self, x: Value) -> Value:
        if isinstance(x, Recorded):
            return x.linear([self.matrices[name] for name in self._rows], self.bias)
        if self._product is None:
            self.finish()
        assert self._product is not None
        return self._product(x)

    def finish(self) -> None:
        """See `Finishes`: on a GPU the parts become one product."""
        if not self._placement.recorded:
            weights = [self.weight] if self.weight is not None else [self.weights.pop(name) for name in self._rows]
            self._product = Product(weights, self.bias, invariant=self._placement.invariant)

    def parts(self) -> Mapping[str, Part]:
        """Every part that must be loaded."""
        found: dict[str, Part] = {}
        for prefix, rows in self._rows.items():
            shape = (rows.stop - rows.start, self.in_features)
            if self.weight is not None:
                found[prefix + "weight"] = TensorPart(self.weight[rows])
            elif self._placement.recorded:
                found[prefix + "weight"] = MatrixPart(
                    self.matrices, prefix, shape, self._placement, ordered=True, floats=True
                )
            else:
                part = DevicePart(self.weights, prefix, shape, self._placement, groups=True, floats=True)
                found[prefix + "weight"] = part
            if self.bias is not None:
                found[prefix + "bias"] = TensorPart(self.bias[rows])
        return found
