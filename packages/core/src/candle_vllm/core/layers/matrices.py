"""Matrices of a backend outside recorded steps, and one product with several that a checkpoint stores side by side.

Recorded steps multiply the matrices of `kernels/recorded.py` in the same way: several that read one input at once.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar, TypeAlias

import torch

from candle_vllm.core.kernels import gguf_linear, group_linear
from candle_vllm.core.kernels.embedding import embedding
from candle_vllm.core.kernels.gguf_linear import GgufMatrix
from candle_vllm.core.kernels.gguf_linear.reference import dequantise
from candle_vllm.core.kernels.group_linear import GroupMatrix
from candle_vllm.core.kernels.group_linear.reference import dequantise as dequantise_groups
from candle_vllm.core.kernels.linear import linear

Piece: TypeAlias = Any
"""A matrix of a layer: a `kernels.recorded.Matrix` where steps are recorded, else a `DeviceMatrix`."""


class DeviceMatrix(ABC):
    """A matrix [N, K] on a device.

    Attributes:
        data: as its kernels read it.
        rows: N.
        kind: how its numbers are kept, in words.
        form: matrices of one input whose forms are equal can be one.
    """

    data: Any
    rows: int
    kind: str
    form: Hashable
    _linear: ClassVar[Callable[..., torch.Tensor]]
    _stack: ClassVar[Callable[[list[Any]], Any]]

    @abstractmethod
    def decoded(self, dtype: torch.dtype) -> torch.Tensor:
        """The numbers [N, K]; plain ones stay what they are."""

    def take(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The rows [T, K] of ids [T]; those of plain numbers stay what they are."""
        raise AssertionError(f"a table of {self.kind} for {dtype} was not decoded: {len(ids)} rows are wanted of it")

    def multiply(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, *, out: torch.Tensor | None = None, invariant: bool
    ) -> torch.Tensor:
        """x [T, K] to x W^T + bias [T, N], into `out` where it is given; see the kernels' contracts."""
        return self._linear(x, self.data, bias, out=out, invariant=invariant)

    @classmethod
    def joined(cls, matrices: Sequence[DeviceMatrix]) -> DeviceMatrix:
        """Matrices of one form above each other; copied where they are several."""
        return matrices[0] if len(matrices) == 1 else cls(cls._stack([matrix.data for matrix in matrices]))

    def __init__(self, data: Any) -> None:
        self.data = data


class TensorMatrix(DeviceMatrix):
    """Plain numbers."""

    kind = "plain"
    _linear, _stack = staticmethod(linear), staticmethod(torch.cat)

    def __init__(self, data: torch.Tensor) -> None:
        super().__init__(data)
        self.rows, self.form = len(data), data.dtype

    def decoded(self, dtype: torch.dtype) -> torch.Tensor:
        """See `DeviceMatrix.decoded`."""
        del dtype
        return self.data

    def take(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """See `DeviceMatrix.take`."""
        del dtype
        return embedding(ids, self.data)


class BlockMatrix(DeviceMatrix):
    """Blocks of a GGUF type."""

    _linear, _stack = staticmethod(gguf_linear.linear), staticmethod(gguf_linear.stack)

    def __init__(self, data: GgufMatrix) -> None:
        super().__init__(data)
        self.rows, self.kind, self.form = data.rows, data.kind.name, data.kind

    def decoded(self, dtype: torch.dtype) -> torch.Tensor:
        """See `DeviceMatrix.decoded`."""
        return dequantise(self.data).to(dtype)

    def take(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """See `DeviceMatrix.take`."""
        return gguf_linear.embedding(ids, self.data, dtype)


class CodeMatrix(DeviceMatrix):
    """Whole numbers in groups, or small floats with scales; those with an order of their own stay apart."""

    _linear, _stack = staticmethod(group_linear.linear), staticmethod(group_linear.stack)

    def __init__(self, data: GroupMatrix) -> None:
        super().__init__(data)
        self.rows, self.kind = data.rows, f"{data.numbers} in {data.group}s"
        self.form = data.form if data.order is None else id(data)

    def decoded(self, dtype: torch.dtype) -> torch.Tensor:
        """See `DeviceMatrix.decoded`."""
        return dequantise_groups(self.data).to(dtype)


class Product:
    """y [T, O] = x [T, I] W^T + b, where W is matrices above each other, each plain or quantised.

    Neighbours of one form become one matrix, so that they take one launch.

    Args:
        matrices: [O1, I], [O2, I], ...; what is joined is copied, and the parts are let go of.
        bias: [O] or None.
        invariant: see the kernels' contracts.
    """

    def __init__(self, matrices: Sequence[DeviceMatrix], bias: torch.Tensor | None, *, invariant: bool) -> None:
        groups = (list(group) for _, group in itertools.groupby(matrices, lambda matrix: matrix.form))
        self.pieces = [group[0].joined(group) for group in groups]
        self._sizes = [piece.rows for piece in self.pieces]
        self._biases = [None] * len(self._sizes) if bias is None else list(bias.split(self._sizes))
        self._invariant = invariant

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if len(self.pieces) == 1:
            return self.pieces[0].multiply(x, self._biases[0], invariant=self._invariant)
        out = torch.empty(len(x), sum(self._sizes), dtype=x.dtype, device=x.device)
        for piece, bias, place in zip(self.pieces, self._biases, out.split(self._sizes, 1)):
            piece.multiply(x, bias, out=place, invariant=self._invariant)
        return out
