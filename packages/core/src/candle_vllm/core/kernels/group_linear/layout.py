"""How weights of 4 or 8 bits in groups lie in a GPU's memory: what `pack.py` writes, and the kernels read.

Stands inside step 6 of a request's life. Codes lie as those of `kernels/gguf_linear` do, so that the same functions
take them out: K is cut into **steps** of 128 weights (64 for 8 bits), in parts of 32, and the step comes first.

    codes   [steps, N, 16]  int32; element i of a row holds, of each part p, the codes of weights 32 p + 2 i + h for
            h = 0 and 1, at bit bits * (p + parts * h)
    scales  [groups, N]  the scale's 16 bits, in int16; or where there are zeros in int32, the zero above them

Columns are filled up to whole steps with codes of 0, which meet zeros of x, and scales of 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

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
        scale_dtype: float16 or bfloat16, what the bits of a scale mean.
        codes, scales: the planes, contiguous.
        order: which number of x meets each column, int64 [K]; None where they stand as x does.
    """

    rows: int
    columns: int
    bits: int
    group: int
    scale_dtype: torch.dtype
    codes: torch.Tensor
    scales: torch.Tensor
    order: torch.Tensor | None = None

    @property
    def zeros(self) -> bool:
        """Whether every group has a zero of its own; else it is the middle of the codes."""
        return self.scales.dtype == torch.int32

    @property
    def zero(self) -> int:
        """The code of weight 0 where groups have none of their own."""
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
        return self.codes.nbytes + self.scales.nbytes + (0 if self.order is None else self.order.nbytes)

    @property
    def form(self) -> tuple[object, ...]:
        """What matrices must have in common to be one."""
        return self.columns, self.bits, self.group, self.scale_dtype, self.zeros


def stack(matrices: Sequence[GroupMatrix]) -> GroupMatrix:
    """Matrices of one form that read the same input, as one whose results stand side by side (q, k, v; gate, up)."""
    first = matrices[0]
    assert all(matrix.form == first.form and matrix.order is None for matrix in matrices)
    codes = torch.cat([matrix.codes for matrix in matrices], 1)
    scales = torch.cat([matrix.scales for matrix in matrices], 1)
    rows = sum(matrix.rows for matrix in matrices)
    return GroupMatrix(rows, first.columns, first.bits, first.group, first.scale_dtype, codes, scales)
