"""Linear layers. Several stored matrices that read the same input are one product (q, k, v; gate, up)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from candle_vllm.core.kernels.recorded import Recorded, Value
from candle_vllm.core.layers.matrices import Piece, Product, TensorMatrix
from candle_vllm.core.layers.parameters import MatrixPart, Placement, TensorPart
from candle_vllm.core.loading.weights import Part


class Linear:
    """y [T, O] = x [T, I] W^T + b.

    Args:
        in_features: I.
        out_features: O, or the sizes of the named matrices that are stacked into O, in order.
        bias: whether there is one.
        placement: where the weights live.
        kept: whether small floats, and whole numbers in an order of their own, may stay what they are.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int | Mapping[str, int],
        placement: Placement,
        *,
        bias: bool = False,
        kept: bool = True,
    ) -> None:
        sizes = {"": out_features} if isinstance(out_features, int) else dict(out_features)
        self.in_features = in_features
        self._rows: dict[str, slice] = {}
        end = 0
        for name, size in sizes.items():
            prefix = f"{name}." if name else ""
            self._rows[prefix] = slice(end, end + size)
            end += size
        self._placement, self._kept = placement, kept
        device, dtype = placement.device, placement.dtype
        self.pieces: dict[str, Piece] = {}  # outside recorded steps, until `product` has joined them
        self.weight = torch.empty(end, in_features, device=device, dtype=dtype) if placement.stacked else None
        self.bias = torch.empty(end, device=device, dtype=dtype) if bias else None
        self.product: Product | None = None

    def __call__(self, x: Value) -> Value:
        if isinstance(x, Recorded):
            return x.linear([self.pieces[name] for name in self._rows], self.bias)
        if self.product is None:
            self.finish()
        assert self.product is not None
        return self.product(x)

    def finish(self) -> None:
        """See `Finishes`: on a GPU the parts become one product."""
        if not self._placement.recorded:
            if self.weight is not None:
                pieces = [TensorMatrix(self.weight)]
            else:
                pieces = [self.pieces.pop(name) for name in self._rows]
            self.product = Product(pieces, self.bias, invariant=self._placement.invariant)

    def parts(self) -> Mapping[str, Part]:
        """Every part that must be loaded."""
        found: dict[str, Part] = {}
        for prefix, rows in self._rows.items():
            shape = (rows.stop - rows.start, self.in_features)
            if self.weight is not None:
                found[prefix + "weight"] = TensorPart(self.weight[rows])
            else:
                backend = self._placement.backend(groups=self._kept, floats=self._kept)
                found[prefix + "weight"] = MatrixPart(self.pieces, prefix, shape, backend)
            if self.bias is not None:
                found[prefix + "bias"] = TensorPart(self.bias[rows])
        return found
