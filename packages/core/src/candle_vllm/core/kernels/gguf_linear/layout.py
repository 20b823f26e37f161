# SPDX-License-Identifier: MIT
"""How quantised weights lie in a GPU's memory: what `pack.py` writes, and `triton.py` and `reference.py` read.

Stands inside step 6 of a request's life. K is cut into **steps** of 128 weights (64 for 8 bits), in groups of 32. A
matrix is a few planes, each with the step first, so that what neighbouring rows need of a step lies side by side:

    low     [steps, N, 16]  the lower bits of the codes: 4 in int32, 2 in int16, 8 in int32 (of a step of 64)
    high    [steps, N, 16]  the two bits above of 6-bit codes, in int16
            [steps / 2, N, 16]  the bit above of 3 and 5 bits, of two steps in int16 (steps / 2 is rounded up)
    scales  [steps, words, N]  int32, lowest bits first:
            Q4_0 Q5_0 Q8_0    scale f16 of two groups in a word
            Q4_1 Q5_1         scale f16, minimum f16: a word for each group
            Q4_K Q5_K         a word with the scales u8 of the four groups, one with their minima u8
            Q3_K Q6_K         two words with the scales i8 of the eight half groups
            Q2_K              the same with scale | minimum << 4
            IQ4_NL            as Q4_0
            IQ4_XS            a word with the scales i8 of the four groups
            IQ1, IQ2, IQ3     the same, or where 16 weights share a scale as Q6_K
    supers  [K / 256, N]  int32, K-quants and IQ types: super-scale f16, negated super-minimum f16 or 0

Element i of a step's 16 holds, of each group g, the codes of weights 32 g + 2 i + h for h = 0 and 1, at bit
bits * (g + groups * h), plus 8 for single bits of an odd step. The two codes of a pair stand half an element apart, so
that one mask takes both out of an int32 as the two float16 or bfloat16 numbers that the tensor cores read as a
register.

A code is unsigned; a weight is scale * (code - zero) for the types without a minimum, else scale * code + minimum.
Codes of IQ types stand for the numbers of a table: there a weight is scale * number. IQ1, IQ2 and IQ3, whose indices
choose several weights from a long list, get a code of 4 bits for each weight, which is enough to name every size and
sign that a list has: exact, though 1.3 times (IQ3_S) to 2.8 times (IQ1_S) the file's bytes, and without gathering.

Rows are not filled up; columns are, to whole steps, with scales of 0. Against the file this takes 2.8 % more for Q4_K,
2.3 % for Q5_K, 5.5 % for Q3_K, 2.9 % for IQ4_XS, 1 % for Q6_K, nothing for the other types above IQ3 where K is a
multiple of 128 (at most 11 % from K = 576 on), and no number changes. (With a float16 scale and minimum for each group
instead of the small numbers, Q4_K would take 11 % more, Q2_K 52 %, and scales would be rounded.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from candle_vllm.core.kernels.packed_linear.grids import GridLayout, values
from candle_vllm.core.kernels.packed_linear.layout import (
    GROUP,
    LAYOUTS,
    AnyLayout,
    PackedKind,
    TileLayout,
    packed_kind,
)
from candle_vllm.core.quantization.ggml_types import GGMLQuantizationType

WORDS = 16
"""Elements of a row in a step of a plane of codes."""

SUPER = 256
"""Weights that share a super-scale."""

_ELEMENTS: Mapping[int, torch.dtype] = MappingProxyType(
    {1: torch.int16, 2: torch.int16, 4: torch.int32, 8: torch.int32}
)


@dataclass(frozen=True)
class Planes:
    """Facts of a kind on the GPU.

    Attributes:
        low, high: bits of a code in the two planes; high may be 0.
        layout: what is known of the kind everywhere; of IQ1, IQ2 and IQ3 what their codes here are.
        factor: what the small scales are multiplied with.
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
        """Bits of memory for a weight."""
        return self.low + self.high + 32 * self.words / self.step + (32 / SUPER if self.layout.nested else 0)

    def steps(self, columns: int) -> int:
        """Steps of a row."""
        return -(-columns // self.step)

    def empty(self, rows: int, columns: int, device: torch.device) -> dict[str, torch.Tensor | None]:
        """Memory for the planes of a matrix, by name."""
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


def _planes(layout: AnyLayout) -> Planes:
    if isinstance(layout, GridLayout):
        coded = TileLayout(4, layout.width, False, True, layout.groups, layout.zero, values(layout.name))
        return Planes(4, 0, coded, layout.unit)
    low = {2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 8: 8}[layout.bits]
    return Planes(low, layout.bits - low, layout)


PLANES: Mapping[PackedKind, Planes] = MappingProxyType(
    {kind: _planes(layout) for kind, layout in LAYOUTS.items() if kind < PackedKind.MXFP4}
)

OWN_FORMS = tuple(kind for kind in PLANES if kind <= PackedKind.IQ4_XS or kind is PackedKind.IQ2_S)
"""Kinds whose kernels differ by more than a table: the other IQ types are as IQ4_XS, or as IQ2_S."""


def gguf_kind(ggml_type: GGMLQuantizationType) -> PackedKind:
    """The layout of a tensor type on a GPU: its own, or 8 bits for a type without one.

    Raises:
        UnsupportedModelError: the type is not quantised, or nothing decodes it.
    """
    kind = packed_kind(ggml_type)
    return kind if kind in PLANES else PackedKind.Q8_0


@dataclass(frozen=True, eq=False)
class GgufMatrix:
    """A quantised weight matrix [N, K] as the GPU reads it.

    Attributes:
        rows: N, outputs.
        columns: K, inputs.
        kind: the layout, by the ggml type whose numbers it keeps exactly.
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
        """Facts of the kind."""
        return PLANES[self.kind]

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.low.device

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(plane.nbytes for plane in (self.low, self.high, self.scales, self.supers) if plane is not None)


def stack(matrices: Sequence[GgufMatrix]) -> GgufMatrix:
    """Matrices of one kind that read the same input, as one whose results stand side by side (q, k, v; gate, up)."""
    first = matrices[0]
    assert all(matrix.kind == first.kind and matrix.columns == first.columns for matrix in matrices)

    def joined(name: str, dim: int) -> torch.Tensor | None:
        planes = [getattr(matrix, name) for matrix in matrices]
        return None if planes[0] is None else torch.cat(planes, dim)

    low, scales = joined("low", 1), joined("scales", 2)
    assert low is not None
    assert scales is not None
    rows = sum(matrix.rows for matrix in matrices)
    return GgufMatrix(rows, first.columns, first.kind, low, joined("high", 1), scales, joined("supers", 1))
