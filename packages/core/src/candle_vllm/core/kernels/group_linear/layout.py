# SPDX-License-Identifier: MIT
"""Layout of weights of 4 or 8 bits in groups in a GPU's memory, which `pack.py` writes.

The order of codes is that of `kernels/gguf_linear`, so that the same functions extract them. A **part** is 32 weights
of a row along K, a **step** 4 parts (2 for codes of 8 bits); a **plane** is a tensor with the step or the group first:

    codes   [steps, N, 16]  int32; element i of a row has, for each part p, the codes of weights 32 p + 2 i + h for
            h = 0 and 1, at bit bits * (p + parts * h)
    scales  [groups, N]  int16, the scale's bits; int32 if groups have zeros, which are the upper 16 bits; float32 for
            codes that are floats
    inner   [steps, N, 2]  int32, for e2m1: byte b of the two words is the e4m3 scale of weights 16 b to 16 b + 15

Columns are padded to whole steps with codes of 0, which are multiplied by zeros of x; groups of padding alone have
scales of 0. The kernels would read e4m3's two NaN codes as finite numbers: a group with one has the scale NaN.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

Numbers: TypeAlias = Literal["int", "e4m3", "e5m2", "e2m1"]
"""Type of codes: unsigned integers, or signed floats of 8 or 4 bits."""

PART = 32
"""Number of weights in a part of a step."""

WORDS = 16
"""Number of elements of a row in a step of codes."""


@dataclass(frozen=True, eq=False)
class GroupMatrix:
    """A quantised weight matrix [N, K] in the layout of the GPU.

    Attributes:
        rows: N, outputs.
        columns: K, inputs.
        bits: bits of a code, 4 or 8.
        group: number of adjacent weights of a row that share a scale: a multiple of 32, or K.
        scale_dtype: type of scales: float16 or bfloat16, or float32 if codes are floats.
        codes, scales, inner: the planes, contiguous; `inner` is None except for e2m1.
        order: int64 [K], the element of x by which each column is multiplied; None if columns have the order of x.
        numbers: type of the codes.
    """

    rows: int
    columns: int
    bits: int
    group: int
    scale_dtype: torch.dtype
    codes: torch.Tensor
    scales: torch.Tensor
    order: torch.Tensor | None = None
    numbers: Numbers = "int"
    inner: torch.Tensor | None = None

    @property
    def zeros(self) -> bool:
        """Whether each group has its own zero; otherwise all have `zero`, or 0 for floats."""
        return self.scales.dtype == torch.int32

    @property
    def zero(self) -> int:
        """The integer code of weight 0 if groups have no zeros of their own: the middle of the codes."""
        return 1 << (self.bits - 1)

    @property
    def parts(self) -> int:
        """Parts in a step."""
        return 16 // self.bits

    @property
    def step(self) -> int:
        """Weights of a row in a step."""
        return self.parts * PART

    @property
    def steps(self) -> int:
        """Steps of a row."""
        return -(-self.columns // self.step)

    @property
    def unit(self) -> int:
        """Largest number of adjacent parts of a step, 1, 2 or 4, whose weights always share a scale."""
        if self.group == self.columns:
            return self.parts
        return next(unit for unit in (4, 2, 1) if unit <= self.parts and self.group % (unit * PART) == 0)

    @property
    def groups(self) -> int:
        """Number of groups of a row, including padding of the last step."""
        return (self.steps * self.step - self.unit * PART) // self.group + 1

    @property
    def device(self) -> torch.device:
        """Device of the planes."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        planes = (self.codes, self.scales, self.order, self.inner)
        return sum(plane.nbytes for plane in planes if plane is not None)

    @property
    def form(self) -> tuple[object, ...]:
        """Key that is equal for matrices that can be stacked, if none of them has an `order`."""
        return self.columns, self.bits, self.group, self.scale_dtype, self.zeros, self.numbers


def stack(matrices: Sequence[GroupMatrix]) -> GroupMatrix:
    """Join matrices of one form with the same input to one matrix with adjacent results (q, k, v; gate, up)."""
    first = matrices[0]
    assert all(matrix.form == first.form and matrix.order is None for matrix in matrices)
    codes = torch.cat([matrix.codes for matrix in matrices], 1)
    scales = torch.cat([matrix.scales for matrix in matrices], 1)
    rows = sum(matrix.rows for matrix in matrices)
    planes = [matrix.inner for matrix in matrices if matrix.inner is not None]
    inner = torch.cat(planes, 1) if planes else None
    return dataclasses.replace(first, rows=rows, codes=codes, scales=scales, inner=inner)
