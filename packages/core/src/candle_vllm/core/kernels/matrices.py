# SPDX-License-Identifier: MIT
"""Matrices of a backend, and the product of an input with several that a checkpoint stores side by side.

Recorded steps multiply the matrices of `recorded.py`; outside them a `DeviceMatrix` knows its own kernels.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import torch

from candle_vllm.core.kernels import gguf_linear, group_linear
from candle_vllm.core.kernels.embedding import embedding
from candle_vllm.core.kernels.gguf_linear import GgufMatrix
from candle_vllm.core.kernels.gguf_linear.reference import dequantise
from candle_vllm.core.kernels.group_linear import GroupMatrix
from candle_vllm.core.kernels.group_linear.reference import dequantise as dequantise_groups
from candle_vllm.core.kernels.linear import linear

if TYPE_CHECKING:
    from candle_vllm.core.kernels.linear.triton_products import Operand

Piece: TypeAlias = Any
"""A matrix of a layer: a `kernels.recorded.Matrix` where steps are recorded, else a `DeviceMatrix`."""

Stored: TypeAlias = Literal["plain", "gguf", "floats", "codes"]
"""How numbers are stored: as they are, in GGUF's blocks, as small floats in groups, as whole numbers in groups."""


class DeviceMatrix(ABC):
    """A matrix [N, K] on a device; the experts' of a layer are one, whose rows stand behind each other.

    Attributes:
        data: as its kernels read it.
        rows, columns: N and K.
        stored: how its numbers are.
        kind: the same in words.
        form: matrices of one input whose forms are equal can be one.
    """

    data: Any
    rows: int
    columns: int
    stored: Stored
    kind: str
    form: Hashable
    _linear: ClassVar[Callable[..., torch.Tensor]]
    _stack: ClassVar[Callable[[list[Any]], Any]]

    @abstractmethod
    def decoded(self, dtype: torch.dtype) -> torch.Tensor:
        """The numbers [N, K]; plain ones stay what they are."""

    @abstractmethod
    def operand(self, columns: int) -> Operand:
        """The matrix as a launch of the GPU's kernels passes it; `columns` of a plain one are multiplied at a time."""

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

    stored, kind = "plain", "plain"
    _linear, _stack = staticmethod(linear), staticmethod(torch.cat)

    def __init__(self, data: torch.Tensor) -> None:
        super().__init__(data)
        (self.rows, self.columns), self.form = data.shape, data.dtype

    def decoded(self, dtype: torch.dtype) -> torch.Tensor:
        """See `DeviceMatrix.decoded`."""
        del dtype
        return self.data

    def operand(self, columns: int) -> Operand:
        """See `DeviceMatrix.operand`."""
        from candle_vllm.core.kernels.linear.triton_products import plain_operand

        return plain_operand(self.data, self.rows, self.columns, self.data.stride(0), columns)

    def take(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """See `DeviceMatrix.take`."""
        del dtype
        return embedding(ids, self.data)


class BlockMatrix(DeviceMatrix):
    """Blocks of a GGUF type; `order` says which number of an input meets each column, int64 [K], None the same one."""

    stored = "gguf"
    _linear, _stack = staticmethod(gguf_linear.linear), staticmethod(gguf_linear.stack)

    def __init__(self, data: GgufMatrix, order: torch.Tensor | None = None) -> None:
        super().__init__(data)
        self.rows, self.columns, self.kind, self._order = data.rows, data.columns, data.kind.name, order
        self.form = data.kind if order is None else id(data)

    def multiply(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, *, out: torch.Tensor | None = None, invariant: bool
    ) -> torch.Tensor:
        """See `DeviceMatrix.multiply`."""
        x = x if self._order is None else x.index_select(1, self._order)
        return super().multiply(x, bias, out=out, invariant=invariant)

    def decoded(self, dtype: torch.dtype) -> torch.Tensor:
        """See `DeviceMatrix.decoded`."""
        values = dequantise(self.data).to(dtype)
        return values if self._order is None else values[:, self._order.argsort()]

    def operand(self, columns: int) -> Operand:
        """See `DeviceMatrix.operand`."""
        from candle_vllm.core.kernels.gguf_linear.triton_codes import operand

        del columns
        assert self._order is None
        return operand(self.data)

    def take(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """See `DeviceMatrix.take`."""
        return gguf_linear.embedding(ids, self.data, dtype)


class CodeMatrix(DeviceMatrix):
    """Whole numbers in groups, or small floats with scales; those with an order of their own stay apart."""

    _linear, _stack = staticmethod(group_linear.linear), staticmethod(group_linear.stack)

    def __init__(self, data: GroupMatrix) -> None:
        super().__init__(data)
        self.rows, self.columns = data.rows, data.columns
        self.stored, self.kind = "codes" if data.numbers == "int" else "floats", f"{data.numbers} in {data.group}s"
        self.form = data.form if data.order is None else id(data)

    def decoded(self, dtype: torch.dtype) -> torch.Tensor:
        """See `DeviceMatrix.decoded`."""
        return dequantise_groups(self.data).to(dtype)

    def operand(self, columns: int) -> Operand:
        """See `DeviceMatrix.operand`."""
        from candle_vllm.core.kernels.group_linear.triton_codes import operand

        del columns
        return operand(self.data)


def joined(matrices: Sequence[DeviceMatrix]) -> list[DeviceMatrix]:
    """Matrices of one input, above each other; neighbours of one form become one, so that they take one launch."""
    groups = (list(group) for _, group in itertools.groupby(matrices, lambda matrix: matrix.form))
    return [group[0].joined(group) for group in groups]


def multiply(
    x: torch.Tensor, matrices: Sequence[DeviceMatrix], bias: torch.Tensor | None, *, invariant: bool
) -> torch.Tensor:
    """x [T, K] to x W^T + bias [T, N], where W is matrices above each other; see the kernels' contracts.

    The bias is added by the kernels, while they have the sums.
    """
    if len(matrices) == 1:
        return matrices[0].multiply(x, bias, invariant=invariant)
    sizes = [matrix.rows for matrix in matrices]
    out = torch.empty(len(x), sum(sizes), dtype=x.dtype, device=x.device)
    biases = [None] * len(sizes) if bias is None else bias.split(sizes)
    for matrix, own, place in zip(matrices, biases, out.split(sizes, 1)):
        matrix.multiply(x, own, out=place, invariant=invariant)
    return out
