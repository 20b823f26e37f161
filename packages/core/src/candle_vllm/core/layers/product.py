"""One product of an input with matrices of several types, as a checkpoint stores them side by side."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from candle_vllm.core.kernels import gguf_linear, group_linear
from candle_vllm.core.kernels.gguf_linear import GgufMatrix
from candle_vllm.core.kernels.group_linear import GroupMatrix
from candle_vllm.core.kernels.linear import linear

if TYPE_CHECKING:
    from candle_vllm.core.layers.parameters import Weight


class Product:
    """y [T, O] = x [T, I] W^T + b, where W is matrices above each other, each plain or quantised.

    Neighbours of one type become one matrix, so that they take one launch.

    Args:
        weights: [O1, I], [O2, I], ...; what is joined is copied, and the parts are let go of.
        bias: [O] or None.
        invariant: see the kernels' contracts.
    """

    def __init__(self, weights: Sequence[Weight], bias: torch.Tensor | None, *, invariant: bool) -> None:
        self._pieces = [_joined(list(group)) for _, group in itertools.groupby(weights, _type)]
        sizes = [_rows(piece) for piece in self._pieces]
        self._width = sum(sizes)
        self._biases = [None] * len(sizes) if bias is None else list(bias.split(sizes))
        self._invariant = invariant

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if len(self._pieces) == 1:
            return self._multiply(0, x, None)
        out = torch.empty(len(x), self._width, dtype=x.dtype, device=x.device)
        first = 0
        for index, piece in enumerate(self._pieces):
            last = first + _rows(piece)
            self._multiply(index, x, out[:, first:last])
            first = last
        return out

    def _multiply(self, index: int, x: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        piece, bias = self._pieces[index], self._biases[index]
        if isinstance(piece, torch.Tensor):
            return linear(x, piece, bias, out=out, invariant=self._invariant)
        if isinstance(piece, GroupMatrix):
            return group_linear.linear(x, piece, bias, out=out, invariant=self._invariant)
        return gguf_linear.linear(x, piece, bias, out=out, invariant=self._invariant)


def _type(weight: Weight) -> object:
    if isinstance(weight, GroupMatrix):
        return weight.form if weight.order is None else id(weight)
    return weight.dtype if isinstance(weight, torch.Tensor) else weight.kind


def _rows(weight: Weight) -> int:
    return weight.shape[0] if isinstance(weight, torch.Tensor) else weight.rows


def _joined(weights: list[Weight]) -> Weight:
    if len(weights) == 1:
        return weights[0]
    tensors = [weight for weight in weights if isinstance(weight, torch.Tensor)]
    if tensors:
        return torch.cat(tensors)
    groups = [weight for weight in weights if isinstance(weight, GroupMatrix)]
    if groups:
        return group_linear.stack(groups)
    return gguf_linear.stack([weight for weight in weights if isinstance(weight, GgufMatrix)])
