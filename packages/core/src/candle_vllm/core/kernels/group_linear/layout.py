# SPDX-License-Identifier: MIT
"""How weights of 4 or 8 bits in groups lie in a GPU's memory: what `pack.py` and `pack_floats.py` write.

Stands inside step 6 of a request's life. Codes lie as those of `kernels/gguf_linear` do, so that the same functions
take them out: K is cut into **steps** of 128 weights (64 for 8 bits), in parts of 32, and the step comes first.

    codes   [steps, N, 16]  int32; element i of a row holds, of each part p, the codes of weights 32 p + 2 i + h for
            h = 0 and 1, at bit bits * (p + parts * h)
    scales  [groups, N]  the scale's 16 bits, in int16; or where there are zeros in int32, the zero above them; of
            codes that are floats the scale itself, in float32
    inner   [steps, N, 2]  of e2m1, int32: byte b of the two words is the scale e4m3 of weights 16 b to 16 b + 15

Columns are filled up to whole steps with codes of 0, which meet zeros of x, and scales of 0. e4m3 has two codes that
are no number, and float16 has others in their place: a group with one has the scale NaN, and so the same products.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

Numbers: TypeAlias = Literal["int", "e4m3", "e5m2", "e2m1"]
"""What codes are: whole numbers from 0, or floats of 8 or 4 bits with a sign."""

PART = 32
"""Weights of a row that meet x at a time."""

WORDS = 16
"""Elements of a row in a step of codes."""


@dataclass(frozen=True, eq=False)
class GroupMatrix:
    """A quantised weight matrix [N, K] as the GPU reads it.

    Attributes:
        rows: N, outputs.
        columns: K, inputs.
        bits: of a code, 4 or 8.
        group: weights of a row that share a scale: a multiple of 32, or K.
        scale_dtype: float16 or bfloat16, what the bits of a scale mean; float32 where codes are floats.
        codes, scales: the planes, contiguous.
        order: which number of x meets each column, int64 [K]; None where they stand as x does.
        numbers: what the codes are.
        inner: a plane, contiguous; None but of e2m1.
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
        """Whether every group has a zero of its own; else it is the middle of the codes, or 0 where they are floats."""
        return self.scales.dtype == torch.int32

    @property
    def zero(self) -> int:
        """The code of weight 0 where codes are whole numbers and groups have none of their own."""
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
        """Parts of a step that share a scale for certain: 1, 2 or 4."""
        if self.group == self.columns:
            return self.parts
        return next(unit for unit in (4, 2, 1) if unit <= self.parts and self.group % (unit * PART) == 0)

    @property
    def groups(self) -> int:
        """Groups of a row, with those that fill up the last step."""
        return (self.steps * self.step - self.unit * PART) // self.group + 1

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        planes = (self.codes, self.scales, self.order, self.inner)
        return sum(plane.nbytes for plane in planes if plane is not None)

    @property
    def form(self) -> tuple[object, ...]:
        """What matrices must have in common to be one."""
        return self.columns, self.bits, self.group, self.scale_dtype, self.zeros, self.numbers


def stack(matrices: Sequence[GroupMatrix]) -> GroupMatrix:
    """Matrices of one form that read the same input, as one whose results stand side by side (q, k, v; gate, up)."""
    first = matrices[0]
    assert all(matrix.form == first.form and matrix.order is None for matrix in matrices)
    codes = torch.cat([matrix.codes for matrix in matrices], 1)
    scales = torch.cat([matrix.scales for matrix in matrices], 1)
    rows = sum(matrix.rows for matrix in matrices)
    planes = [matrix.inner for matrix in matrices if matrix.inner is not None]
    inner = torch.cat(planes, 1) if planes else None
    return dataclasses.replace(first, rows=rows, codes=codes, scales=scales, inner=inner)
