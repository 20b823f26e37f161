# SPDX-License-Identifier: MIT
"""Layout of quantised weights in a GPU's memory, which `pack.py` writes, and `triton.py` and `reference.py` read.

A **group** is 32 weights of a row along K, a **step** 4 groups (2 for codes of 8 bits). A matrix consists of a few
**planes**, tensors with the step as first dimension, so that the data of a step is contiguous for all rows:

    low     [steps, N, 16]  the lower 4 or 8 bits of the codes in int32, or the lower 2 bits in int16
    high    [steps, N, 16]  the upper two bits of 6-bit codes, in int16
            [steps / 2, N, 16]  the upper bit of 3-bit and 5-bit codes, of two steps in int16 (steps / 2 rounded up)
    scales  [steps, words, N]  int32, lowest bits first:
            Q4_0 Q5_0 Q8_0    scale f16 of two groups in a word
            Q4_1 Q5_1         scale f16, minimum f16: a word for each group
            Q4_K Q5_K         a word with the scales u8 of the four groups, one with their minima u8
            Q3_K Q6_K         two words with the scales i8 of the eight half groups
            Q2_K              the same, with scale | minimum << 4 in a byte
            IQ4_NL            the same as Q4_0
            IQ4_XS            a word with the scales i8 of the four groups
            IQ1, IQ2, IQ3     the same as IQ4_XS, or as Q6_K if 16 weights share a scale
    supers  [K / 256, N]  int32, K-quants, IQ types but IQ4_NL: super-scale f16, negated super-minimum f16 or 0

Element i of the 16 elements of a step has, for each group g, the codes of weights 32 g + 2 i + h for h = 0 and 1, a
**pair**, at bit bits * (g + groups * h), plus 8 for single bits of an odd step. The codes of a pair are half an int32
apart, if need be after `spread`: one mask extracts both, as the two 16-bit floats of a tensor core register.

A code is unsigned; a weight is scale * (code - zero) for the types without a minimum, else scale * code + minimum.
Codes of IQ types are indices of a table of values: a weight is scale * value. In IQ1, IQ2 and IQ3 files an index
selects several weights from a long list. In this layout each weight has a 4-bit code, which is exact and needs no
gathering, but takes 1.3 times (IQ3_S) to 2.8 times (IQ1_S) the file's bytes.

Rows are not padded; columns are padded to whole steps with scales of 0. The layout needs more memory than the file:
2.8 % for Q4_K, 2.3 % for Q5_K, 5.5 % for Q3_K, 2.9 % for IQ4_XS, 1 % for Q6_K. The other types but IQ1 to IQ3 have the
file's size if K is a multiple of 128 (for Q5_0 and Q5_1 of 256), and at most 16 % more from K = 576 on. All values are
exact. (With f16 scale and minimum for each group, Q4_K would need 11 % more, Q2_K 52 %, and scales would be rounded.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from candle_vllm.core.kernels.packed_linear.grids import GridLayout, values
from candle_vllm.core.kernels.packed_linear.layout import GROUP, LAYOUTS, AnyLayout, PackedKind, TileLayout, packed_kind
from candle_vllm.core.quantization.ggml_types import GGMLQuantizationType

WORDS = 16
"""Number of elements of a row in one step of a plane of codes."""

SUPER = 256
"""Number of weights that share a super-scale."""

_ELEMENTS: Mapping[int, torch.dtype] = MappingProxyType(
    {1: torch.int16, 2: torch.int16, 4: torch.int32, 8: torch.int32}
)


@dataclass(frozen=True)
class Planes:
    """Properties of a kind on the GPU.

    Attributes:
        low, high: bits of a code in the two planes; high may be 0.
        layout: the kind's `TileLayout`; for IQ1, IQ2 and IQ3, that of the 4-bit codes.
        factor: factor of the integers in `scales`, for types with super-scales.
    """

    low: int
    high: int
    layout: TileLayout
    factor: float = 1.0

    @property
    def groups(self) -> int:
        """Groups in a step."""
        return 2 if self.low == 8 else 4

    @property
    def step(self) -> int:
        """Weights of a row in a step."""
        return self.groups * GROUP

    @property
    def words(self) -> int:
        """Words of a row in a step of `scales`."""
        if self.layout.nested:
            return 1 if self.layout.lone else 2
        return self.groups if self.layout.minimum else self.groups // 2

    @property
    def bits_each(self) -> float:
        """Bits of memory per weight, without padding."""
        return self.low + self.high + 32 * self.words / self.step + (32 / SUPER if self.layout.nested else 0)

    def steps(self, columns: int) -> int:
        """Return the number of steps of a row."""
        return -(-columns // self.step)

    def empty(self, rows: int, columns: int, device: torch.device) -> dict[str, torch.Tensor | None]:
        """Allocate the planes of a matrix, by name."""
        steps = self.steps(columns)
        upper = -(-steps // 2) if self.high == 1 else steps

        def plane(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        return {
            "low": plane(_ELEMENTS[self.low], steps, rows, WORDS),
            "high": plane(_ELEMENTS[self.high], upper, rows, WORDS) if self.high else None,
            "scales": plane(torch.int32, steps, self.words, rows),
            "supers": plane(torch.int32, columns // SUPER, rows) if self.layout.nested else None,
        }


_LOW: Mapping[int, int] = MappingProxyType({2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 8: 8})
"""Bits of a code in the plane `low`, by the code's bits."""


def _planes(layout: AnyLayout) -> Planes | None:
    """Return the planes of a layout; None if planes cannot store its codes or scales."""
    if isinstance(layout, GridLayout):
        coded = TileLayout(4, layout.width, False, True, layout.groups, layout.zero, values(layout.name))
        return Planes(4, 0, coded, layout.unit)
    low = _LOW.get(layout.bits)
    if low is None or layout.float != "f16" or layout.nested != (layout.groups > 1):
        return None
    return Planes(low, layout.bits - low, layout)


PLANES: Mapping[PackedKind, Planes] = MappingProxyType(
    {kind: planes for kind, layout in LAYOUTS.items() if (planes := _planes(layout)) is not None}
)


def gguf_kind(ggml_type: GGMLQuantizationType) -> PackedKind:
    """Return the layout of a tensor type on a GPU; 8 bits for a type without a layout.

    Raises:
        UnsupportedModelError: the type is not quantised, or cannot be decoded.
    """
    kind = packed_kind(ggml_type)
    return kind if kind in PLANES else PackedKind(GGMLQuantizationType.Q8_0)


@dataclass(frozen=True, eq=False)
class GgufMatrix:
    """A quantised weight matrix [N, K] in the layout of the GPU.

    Attributes:
        rows: N, outputs.
        columns: K, inputs.
        kind: the layout, named by the ggml type whose weights it represents exactly.
        low, high, scales, supers: the planes, contiguous.
    """

    rows: int
    columns: int
    kind: PackedKind
    low: torch.Tensor
    high: torch.Tensor | None
    scales: torch.Tensor
    supers: torch.Tensor | None

    @property
    def planes(self) -> Planes:
        """Properties of the kind."""
        return PLANES[self.kind]

    @property
    def device(self) -> torch.device:
        """Device of the planes."""
        return self.low.device

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(plane.nbytes for plane in (self.low, self.high, self.scales, self.supers) if plane is not None)


def stack(matrices: Sequence[GgufMatrix]) -> GgufMatrix:
    """Join matrices of one kind with the same input to one matrix with adjacent results (q, k, v; gate, up)."""
    first = matrices[0]
    assert all(matrix.kind == first.kind and matrix.columns == first.columns for matrix in matrices)

    rows = sum(matrix.rows for matrix in matrices)
    low = torch.cat([matrix.low for matrix in matrices], 1)
    scales = torch.cat([matrix.scales for matrix in matrices], 2)
    high = [matrix.high for matrix in matrices if matrix.high is not None]
    supers = [matrix.supers for matrix in matrices if matrix.supers is not None]
    upper, above = (torch.cat(planes, 1) if planes else None for planes in (high, supers))
    return GgufMatrix(rows, first.columns, first.kind, low, upper, scales, above)
