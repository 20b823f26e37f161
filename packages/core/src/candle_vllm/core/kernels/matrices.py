# SPDX-License-Identifier: MIT
"""Matrices of layers that are not recorded, and the product of an input with several of them.

The matrices of recorded steps are subclasses of `cpu_runtime.operation.Matrix`.
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
"""A matrix of a layer: a `cpu_runtime.operation.Matrix` if steps are recorded, else a `DeviceMatrix`."""

Stored: TypeAlias = Literal["plain", "gguf", "floats", "codes"]
"""Storage of a matrix: plain elements, GGUF blocks, small floats in groups, or integer codes in groups."""


class DeviceMatrix(ABC):
    """A matrix [N, K] on a device; all experts of a layer are one matrix of consecutive rows.

    Attributes:
        data: the matrix in the layout of its kernels.
        kind: name of its format, for logs.
        form: matrices with the same input and equal forms can be joined into one.
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
        """Return the elements [N, K] in dtype; plain elements keep their own dtype."""

    @abstractmethod
    def operand(self, columns: int) -> Operand:
        """Return the matrix as an argument of Triton kernels; `columns` of a plain matrix are multiplied at a time."""

    def take(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the rows [T, K] of ids [T] in dtype; plain elements keep their own dtype."""
        raise AssertionError(f"a table of {self.kind} was not decoded to {dtype}: its {len(ids)} rows cannot be read")

    def multiply(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, *, out: torch.Tensor | None = None, invariant: bool
    ) -> torch.Tensor:
        """Return x W^T + bias [T, N] for x [T, K], in `out` if it is given; see the kernels' contracts."""
        return self._linear(x, self.data, bias, out=out, invariant=invariant)

    @classmethod
    def joined(cls, matrices: Sequence[DeviceMatrix]) -> DeviceMatrix:
        """Concatenate the rows of matrices of one form; a single matrix is not copied."""
        return matrices[0] if len(matrices) == 1 else cls(cls._stack([matrix.data for matrix in matrices]))

    def __init__(self, data: Any) -> None:
        self.data = data


class TensorMatrix(DeviceMatrix):
    """Plain elements."""

    stored, kind = "plain", "plain"
    _linear, _stack = staticmethod(linear), staticmethod(torch.cat)

    def __init__(self, data: torch.Tensor) -> None:
        super().__init__(data)
        (self.rows, self.columns), self.form = data.shape, data.dtype

    def decoded(self, dtype: torch.dtype) -> torch.Tensor:
        del dtype
        return self.data

    def operand(self, columns: int) -> Operand:
        from candle_vllm.core.kernels.linear.triton_products import plain_operand

        return plain_operand(self.data, self.rows, self.columns, self.data.stride(0), columns)

    def take(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        del dtype
        return embedding(ids, self.data)


class BlockMatrix(DeviceMatrix):
    """Blocks of a GGUF type; `order` int64 [K] or None: column i is multiplied by input element `order[i]`, or i."""

    stored = "gguf"
    _linear, _stack = staticmethod(gguf_linear.linear), staticmethod(gguf_linear.stack)

    def __init__(self, data: GgufMatrix, order: torch.Tensor | None = None) -> None:
        super().__init__(data)
        self.rows, self.columns, self.kind, self._order = data.rows, data.columns, data.kind.name, order
        self.form = data.kind if order is None else id(data)

    def multiply(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, *, out: torch.Tensor | None = None, invariant: bool
    ) -> torch.Tensor:
        x = x if self._order is None else x.index_select(1, self._order)
        return super().multiply(x, bias, out=out, invariant=invariant)

    def decoded(self, dtype: torch.dtype) -> torch.Tensor:
        values = dequantise(self.data).to(dtype)
        return values if self._order is None else values[:, self._order.argsort()]

    def operand(self, columns: int) -> Operand:
        from candle_vllm.core.kernels.gguf_linear.triton import operand

        del columns
        assert self._order is None
        return operand(self.data)

    def take(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return gguf_linear.embedding(ids, self.data, dtype)


class CodeMatrix(DeviceMatrix):
    """Integer codes in groups, or small floats with scales; a matrix with its own column order is never joined."""

    _linear, _stack = staticmethod(group_linear.linear), staticmethod(group_linear.stack)

    def __init__(self, data: GroupMatrix) -> None:
        super().__init__(data)
        self.rows, self.columns = data.rows, data.columns
        self.stored, self.kind = "codes" if data.numbers == "int" else "floats", f"{data.numbers} in {data.group}s"
        self.form = data.form if data.order is None else id(data)

    def decoded(self, dtype: torch.dtype) -> torch.Tensor:
        values, order = dequantise_groups(self.data).to(dtype), self.data.order
        return values if order is None else values[:, order.argsort()]

    def operand(self, columns: int) -> Operand:
        from candle_vllm.core.kernels.group_linear.triton import operand

        del columns
        return operand(self.data)


def joined(matrices: Sequence[DeviceMatrix]) -> list[DeviceMatrix]:
    """Join adjacent matrices of one form, which have the same input, so that their product is one launch."""
    groups = (list(group) for _, group in itertools.groupby(matrices, lambda matrix: matrix.form))
    return [group[0].joined(group) for group in groups]


def multiply(
    x: torch.Tensor, matrices: Sequence[DeviceMatrix], bias: torch.Tensor | None, *, invariant: bool
) -> torch.Tensor:
    """Return x W^T + bias [T, N] for x [T, K], where W has the rows of all matrices; see the kernels' contracts."""
    if len(matrices) == 1:
        return matrices[0].multiply(x, bias, invariant=invariant)
    sizes = [matrix.rows for matrix in matrices]
    out = torch.empty(len(x), sum(sizes), dtype=x.dtype, device=x.device)
    biases = [None] * len(sizes) if bias is None else bias.split(sizes)
    for matrix, own, place in zip(matrices, biases, out.split(sizes, 1)):
        matrix.multiply(x, own, out=place, invariant=invariant)
    return out
