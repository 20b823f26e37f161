# SPDX-License-Identifier: MIT
"""Memory layouts of packed weights, which `pack.py` writes, and `cpu.py` reads.

Terms, for a matrix of N rows of K weights:

    tile    16 consecutive rows; a thread reads a tile sequentially
    group   32 consecutive weights of each row of a tile
    block   one group (in most types with a simple head), or several (eight in K-quants): first the scales (the head),
            then the codes; a tile is consecutive blocks along K
    quad    4 consecutive weights of each row: quad j (0 to 7) of a group is its weights 4j to 4j + 3
    vector  64 bytes, 4 for each row: all codes of one or several quads, or some bits of the codes of several quads

Heads of a block:

    simple head   scale f16[16]  (minimum f16[16])           blocks of eight groups in TQ1_0, TQ2_0; four in Q1_0
                  scale f32[16]                              Q8_K, a block of eight groups
                  scale e8m0[16]                             MXFP4
                  scale e4m3[4][16]                          NVFP4, a block of two groups: a scale for 16 weights
    K-quant head  super-scale f16[16]  (negated super-minimum f16[16])  then 32 bytes for each group:
                  scale u8[16], minimum u8[16]             Q4_K, Q5_K (a scale for 32 weights)
                  scale i8[16], scale i8[16]               Q3_K, Q6_K (16 weights: first half, second half of the group)
                  scale | minimum << 4, u8[16][2]          Q2_K (16 weights: a row's two scales side by side)
                  scale i8[16], 16 bytes a group           IQ4_XS (a scale for 32 weights)

A group's codes are vectors; byte b of a row's 4 bytes belongs to weight 4j + b of quad j:

    8 bits        quad j is vector j
    nibbles       vector i holds quad i in the low and quad i + 4 in the high nibbles      (4 vectors; 4, 5 and 6 bits)
    pairs         vector p holds quad 4p + f in bits 2f and 2f + 1, for f = 0 to 3         (2 vectors; 2, 3 and 6 bits)
    single bits   bit j belongs to quad j; Q1_0's bits stand for the codes 0 and 2         (1 vector; 1, 3, 5 bits)
    triples       vector v holds quad 2v in bits 0 to 2 and quad 2v + 1 in bits 3 to 5, for v = 0 to 2; above them are
                  quad 6 (its low bits in vector 0, the highest in bit 6 of vector 1) and quad 7 (its low bits in vector
                  2, the highest in bit 7 of vector 1)              (3 vectors; 3-bit codes of a table, IQ1 and IQ2)
    trits         vector i holds the 5 quads of a block from 5i on: a byte is ceil(256 / 243 * n) for the base-3 number
                  n of five digits, the first digit highest, as in TQ1_0                   (13 vectors for eight groups)

A type whose codes are split into two of these parts stores the high bits first, so that memory is read sequentially. A
code is unsigned; a weight is scale * (code - zero) for the types without a minimum, otherwise scale * code + minimum.
IQ4_NL, IQ4_XS, MXFP4 and NVFP4 have a table of 16 values, in which a code is looked up: a weight is scale * value.

The other IQ types have two layouts with identical results. The layout of `grids.py` has the indices of the file; it is
used if the CPU can look up 64 bytes at once (VBMI). Other CPUs would have to gather from the grids, as VBMI CPUs do for
IQ1, which takes several times as long as reading the weights. Without VBMI a weight is packed as the code of its value
among the 16 (IQ3) or 6 values of its type (`*_CODES`), with the heads of K-quants: super-scale times the type's unit as
f32, and scales 2 * scale + 1 as i8.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

import numpy as np

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.kernels.activation_quant import Groups
from candle_vllm.core.kernels.cpu_runtime.kernel_cache import has_compiler
from candle_vllm.core.kernels.cpu_runtime.level import Isa, host_isa
from candle_vllm.core.kernels.cpu_runtime.operation import ROWS, Matrix
from candle_vllm.core.kernels.packed_linear.grids import FORMATS, GridLayout
from candle_vllm.core.quantization import ggml
from candle_vllm.core.quantization.ggml_types import CONTENTS, Float, GGMLQuantizationType

GROUP = 32
"""Weights along K that share one scale of the activations."""

VECTOR_BYTES = 64

TRITS = 5
"""Base-3 digits in a byte."""

_FLOAT_BYTES: Mapping[Float, int] = MappingProxyType({"f16": 2, "f32": 4, "e8m0": 1, "e4m3": 1})


class PackedKind(enum.IntEnum):
    """Packed layouts, with the name and number of the ggml type whose weights they represent exactly.

    Types with a grid have a second layout, `*_CODES`, whose number is 256 more.
    """

    _ignore_ = "each"
    for each in GGMLQuantizationType:
        if each in CONTENTS or each.name in FORMATS:
            vars()[each.name] = int(each)
        if each.name in FORMATS:
            vars()[f"{each.name}_CODES"] = 256 + each

    @property
    def type(self) -> GGMLQuantizationType:
        """The ggml type."""
        return GGMLQuantizationType(self % 256)

    @property
    def is_precompiled(self) -> bool:
        """Whether the kernels are in the wheels, instead of being compiled when a file has this kind."""
        return self.name in _PRECOMPILED


_PRECOMPILED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


def packed_kind(ggml_type: GGMLQuantizationType) -> PackedKind:
    """Return the layout that keeps the codes of a tensor type; the 8-bit layout for a type without its own layout.

    Raises:
        UnsupportedModelError: the type is not quantised, or cannot be decoded.
    """
    if ggml_type in ggml.PLAIN_TYPES:
        raise UnsupportedModelError(f"{ggml_type.name} is not a quantised type; its matrices are read as they are")
    if ggml_type.name in PackedKind.__members__:
        return PackedKind[ggml_type.name]
    ggml.check_decodable(ggml_type)
    return PackedKind(GGMLQuantizationType.Q8_0)


def host_kind(ggml_type: GGMLQuantizationType) -> PackedKind:
    """Return the layout of a tensor type for this CPU, at the level that kernels are compiled for.

    Raises:
        UnsupportedModelError: see `packed_kind`.
    """
    kind = packed_kind(ggml_type)
    if not kind.is_precompiled and not has_compiler():  # the 8-bit kernel is precompiled
        return PackedKind(GGMLQuantizationType.Q8_0)
    if kind.name in FORMATS and not host_isa() & Isa.VBMI:
        return PackedKind[f"{kind.name}_CODES"]
    return kind


@dataclass(frozen=True)
class TileLayout:
    """Properties of a layout.

    Attributes:
        bits: bits of a code; 0 for codes that are digits in base 3.
        width: number of weights that share a scale, 32 or 16.
        minimum: whether a minimum is added to the scaled code.
        nested: whether scales are small integers times a super-scale.
        groups: number of groups in a block, a power of two.
        zero: the code of weight 0 for types without a minimum; with a table, the offset that makes values unsigned.
        values: the table of values by code; None if a value is the code minus zero.
        float: type in which scales are stored.
    """

    bits: int
    width: int
    minimum: bool
    nested: bool
    groups: int
    zero: int
    values: tuple[int, ...] | None = None
    float: Float = "f16"

    @property
    def paired(self) -> bool:
        """Whether the scales of a group's two halves are adjacent bytes, so that both are multiplied at once."""
        return self.width < GROUP and self.minimum

    @property
    def lone(self) -> bool:
        """Whether a group of a nested kind has only one small scale."""
        return self.nested and self.width == GROUP and not self.minimum

    @property
    def small_bytes(self) -> int:
        """Bytes of a group's small scales and minima."""
        return 0 if not self.nested else ROWS if self.lone else 2 * ROWS

    @property
    def floats_bytes(self) -> int:
        """Bytes of the floats at the start of a block."""
        count = self.groups * GROUP // self.width if self.float == "e4m3" else 1 + self.minimum
        return ROWS * count * _FLOAT_BYTES[self.float]

    @property
    def head_bytes(self) -> int:
        """Bytes before a block's codes."""
        return self.floats_bytes + self.groups * self.small_bytes

    @property
    def code_bytes(self) -> int:
        """Bytes of a group's codes; 0 if the groups of a block share bytes."""
        return self.bits * VECTOR_BYTES

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        vectors = self.groups * self.bits or -(-8 * self.groups // TRITS)
        return self.head_bytes + vectors * VECTOR_BYTES

    def tile_bytes(self, columns: int) -> int:
        """Return the bytes of a tile of `columns` weights per row."""
        return columns // (GROUP * self.groups) * self.block_bytes


AnyLayout: TypeAlias = TileLayout | GridLayout
"""Layout of any kind; both classes have the attributes that all kernels use."""


_NUMBERS = {
    "IQ1": (-9, -7, -1, 1, 7, 9),
    "IQ2": (-43, -25, -8, 8, 25, 43),
    "IQ3_XXS": (-62, -52, -44, -36, -28, -20, -12, -4, 4, 12, 20, 28, 36, 44, 52, 62),
    "IQ3_S": tuple(range(-15, 16, 2)),
}
"""Values of a type's grid with both signs, in order of their codes; for IQ1, 8 times the grid's values plus or minus 1.
"""


def _layout(kind: PackedKind) -> AnyLayout:
    if kind.name in FORMATS:
        return FORMATS[kind.name]
    if grid := FORMATS.get(kind.type.name):
        found = next(numbers for name, numbers in _NUMBERS.items() if grid.name.startswith(name))
        bits = (len(found) - 1).bit_length()
        return TileLayout(bits, grid.width, False, True, grid.groups, grid.zero, found, "f32")
    found, nested = CONTENTS[kind.type], bool(CONTENTS[kind.type].small)
    minimum, groups = found.minimum is not None, kind.type.block[0] // GROUP
    zero = 0 if minimum else 128 if found.values or found.bits == 8 else found.zero
    return TileLayout(found.bits, found.width, minimum, nested, groups, zero, found.values, found.float)


LAYOUTS: Mapping[PackedKind, AnyLayout] = MappingProxyType({kind: _layout(kind) for kind in PackedKind})


@dataclass(frozen=True, eq=False)
class PackedMatrix(Matrix):
    """A quantised weight matrix, 16 rows interleaved.

    Attributes:
        data: see `Matrix`; the padding rows of the last tile have weights of 0.
        order: int64 [K], the input element that each column multiplies; None for the input's own order.
    """

    linear, embedding = "packed_linear.cpu:make_linear", "packed_linear.cpu:make_embedding"

    kind: PackedKind
    order: np.ndarray | None = None

    @property
    def length(self) -> int:
        """Groups of 32 weights in a row."""
        return self.columns // GROUP

    @property
    def input_form(self) -> Groups:
        return Groups(None if self.order is None else self.order.tobytes())


class GatedArguments(NamedTuple):
    """Arguments of an operation that gates one product with another and quantises the result.

    Attributes:
        rows_from: the `StepNumber` that gives T, the number of rows.
        gate, other: addresses of the tiles of two matrices of one kind and shape.
        tile_bytes: bytes from one tile to the next.
        outputs: N of each matrix, a multiple of 32.
        length: number of groups of 32 columns.
        x, scales, sums, ahead: see `LinearArguments`.
        q, q_scales, q_sums: addresses of the results: int8 [T, N], and float32 [T, N / 32] twice.
    """

    rows_from: int
    gate: int
    other: int
    tile_bytes: int
    outputs: int
    length: int
    x: int
    scales: int
    sums: int
    ahead: int
    q: int
    q_scales: int
    q_sums: int
