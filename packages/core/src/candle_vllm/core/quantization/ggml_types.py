# SPDX-License-Identifier: MIT
"""ggml's tensor types: one row per type, with its code in GGUF files and the size and contents of its blocks.

`ggml_blocks.take_apart` uses the contents to split blocks byte by byte, in numpy or torch, and
`kernels/packed_linear/split.py` to split them word by word. Layouts: ggml's `ggml-common.h` and `ggml-quants.c`.

A block has **codes** and the **floats** that they are multiplied with. A weight is scale * code, plus the minimum if
there is one. K-quants and IQ4_XS have a small scale, some also a small minimum, for every `width` weights: a weight is
(scale * small scale) * code - minimum * small minimum. A code is int8(stored bits - zero); TQ1_0 has base-3 digits.

The `gguf` package has the same codes and sizes, and a test compares the two. It is not imported here because its import
takes longer than opening a file: it includes the tensor names of every architecture and a YAML reader.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple, Self, TypeAlias

Float: TypeAlias = Literal["f16", "f32", "e8m0", "e4m3"]
"""Stored types of scales. The last two have one byte; the scale is half the e8m0 value, or half the e4m3 magnitude."""


class Fields(NamedTuple):
    """Bits of consecutive codes, which fill the lowest fields of a run of `width` bytes first, then its next fields.

    Attributes:
        start, stop: range of bytes in the block.
        width: bytes in a run.
        bits: bits of a field.
        shift: bit of the code at which a field begins.
        first: bit of the byte at which the lowest field begins.
    """

    start: int
    stop: int
    width: int
    bits: int
    shift: int = 0
    first: int = 0

    @property
    def places(self) -> range:
        """Bits of a byte at which its fields begin."""
        return range(self.first, 9 - self.bits, self.bits)

    @property
    def numbers(self) -> int:
        """Number of codes that have such a field."""
        return (self.stop - self.start) * len(self.places)


class BlockContents(NamedTuple):
    """Contents of a block.

    Attributes:
        codes: fields of a weight's code, lowest bits first. Empty: codes are base-3 digits.
        scale, minimum: byte range of a float, or of several floats.
        zero: stored bits that mean code 0.
        small: the small scales and minima in their order, in parts that are each described like `codes`.
        turn: number of small scales that precede the same number of minima, repeatedly; 0 without minima.
        small_zero: stored bits that mean the small scale 0.
        width: weights that share a scale.
        values: the element of each code, if it differs from the code.
        float: stored type of the scale and the minimum.
        digits: byte ranges of base-3 digits, and digits per byte; first the highest digit of every byte, then the next.
        unused: bytes at the end that are not needed, such as sums of codes.
    """

    codes: tuple[Fields, ...]
    scale: tuple[int, int]
    minimum: tuple[int, int] | None = None
    zero: int = 0
    small: tuple[tuple[Fields, ...], ...] = ()
    turn: int = 0
    small_zero: int = 0
    width: int = 32
    values: tuple[int, ...] | None = None
    float: Float = "f16"
    digits: tuple[tuple[int, int, int], ...] = ()
    unused: int = 0

    @property
    def bits(self) -> int:
        """Stored bits of a code; 0 for base-3 digits."""
        return sum(fields.bits for fields in self.codes)

    @property
    def floats(self) -> tuple[tuple[int, int], ...]:
        """Byte ranges of the floats: the scale, and the minimum if there is one."""
        return (self.scale,) if self.minimum is None else (self.scale, self.minimum)

    @property
    def block(self) -> tuple[int, int]:
        """Elements and bytes of a block."""
        digits = sum((stop - start) * count for start, stop, count in self.digits)
        ends = [stop for _, stop in self.floats] + [fields.stop for fields in sum(self.small, self.codes)]
        return digits or self.codes[0].numbers, max(ends) + self.unused


_SIX_BITS = ((Fields(4, 12, 8, 6),), (Fields(12, 16, 4, 4), Fields(4, 12, 8, 2, shift=4, first=6)))
"""Scales and minima of groups 0 to 3, then of groups 4 to 7, whose upper 2 bits are the upper bits of bytes 4 to 11."""

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""Elements of IQ4_NL's and IQ4_XS's codes: denser near 0, where most weights are."""

E2M1_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice the floats of the codes of MXFP4 and NVFP4."""


class GGMLQuantizationType(enum.IntEnum):
    """A type by its code; equal to the `gguf` package's member of the same name.

    Attributes:
        block: elements and bytes of a block; (1, bytes of an element) for plain types.
        contents: contents of a block; None for plain types, and for types whose blocks are not described here.
    """

    block: tuple[int, int]
    contents: BlockContents | None

    def __new__(cls, code: int, row: BlockContents | tuple[int, int]) -> Self:
        kind = int.__new__(cls, code)
        kind._value_ = code
        if isinstance(row, BlockContents):
            kind.block, kind.contents = row.block, row
        else:
            kind.block, kind.contents = row, None
        return kind

    # fmt: off
    F32 = 0, (1, 4)
    F16 = 1, (1, 2)
    Q4_0 = 2, BlockContents((Fields(2, 18, 16, 4),), (0, 2), zero=8)
    Q4_1 = 3, BlockContents((Fields(4, 20, 16, 4),), (0, 2), (2, 4))
    Q5_0 = 6, BlockContents((Fields(6, 22, 16, 4), Fields(2, 6, 1, 1, shift=4)), (0, 2), zero=16)
    Q5_1 = 7, BlockContents((Fields(8, 24, 16, 4), Fields(4, 8, 1, 1, shift=4)), (0, 2), (2, 4))
    Q8_0 = 8, BlockContents((Fields(2, 34, 32, 8),), (0, 2))
    Q8_1 = 9, (32, 40)
    Q2_K = 10, BlockContents(
        (Fields(16, 80, 32, 2),), (80, 82), (82, 84), small=((Fields(0, 16, 16, 4),),), turn=16, width=16)
    Q3_K = 11, BlockContents(
        (Fields(32, 96, 32, 2), Fields(0, 32, 32, 1, shift=2)), (108, 110), zero=4,
        small=((Fields(96, 104, 8, 4), Fields(104, 108, 4, 2, shift=4)),), small_zero=32, width=16)
    Q4_K = 12, BlockContents((Fields(16, 144, 32, 4),), (0, 2), (2, 4), small=_SIX_BITS, turn=4)
    Q5_K = 13, BlockContents(
        (Fields(48, 176, 32, 4), Fields(16, 48, 32, 1, shift=4)), (0, 2), (2, 4), small=_SIX_BITS, turn=4)
    Q6_K = 14, BlockContents(
        (Fields(0, 128, 64, 4), Fields(128, 192, 32, 2, shift=4)), (208, 210), zero=32,
        small=((Fields(192, 208, 16, 8),),), width=16)
    Q8_K = 15, BlockContents((Fields(4, 260, 256, 8),), (0, 4), float="f32", unused=32)  # sums of 16 codes
    IQ2_XXS = 16, (256, 66)
    IQ2_XS = 17, (256, 74)
    IQ3_XXS = 18, (256, 98)
    IQ1_S = 19, (256, 50)
    IQ4_NL = 20, BlockContents((Fields(2, 18, 16, 4),), (0, 2), values=IQ4_VALUES)
    IQ3_S = 21, (256, 110)
    IQ2_S = 22, (256, 82)
    IQ4_XS = 23, BlockContents(
        (Fields(8, 136, 16, 4),), (0, 2), small=((Fields(4, 8, 1, 4), Fields(2, 4, 1, 2, shift=4)),), small_zero=32,
        values=IQ4_VALUES)
    I8 = 24, (1, 1)
    I16 = 25, (1, 2)
    I32 = 26, (1, 4)
    I64 = 27, (1, 8)
    F64 = 28, (1, 8)
    IQ1_M = 29, (256, 56)
    BF16 = 30, (1, 2)
    TQ1_0 = 34, BlockContents((), (52, 54), zero=1, digits=((0, 32, 5), (32, 48, 5), (48, 52, 4)))
    TQ2_0 = 35, BlockContents((Fields(0, 64, 32, 2),), (64, 66), zero=1)
    MXFP4 = 39, BlockContents((Fields(1, 17, 16, 4),), (0, 1), values=E2M1_VALUES, float="e8m0")
    NVFP4 = 40, BlockContents((Fields(4, 36, 8, 4),), (0, 4), width=16, values=E2M1_VALUES, float="e4m3")
    Q1_0 = 41, BlockContents((Fields(2, 18, 1, 1, shift=1),), (0, 2), zero=1)  # the codes are 1 and -1
    # fmt: on


CONTENTS: Mapping[GGMLQuantizationType, BlockContents] = MappingProxyType(
    {kind: kind.contents for kind in GGMLQuantizationType if kind.contents is not None}
)
"""Contents of the blocks of each type that is described."""


_FILES = """
Q4_0 Q4_1 - - - Q8_0 Q5_0 Q5_1 Q2_K Q3_K_S Q3_K_M Q3_K_L Q4_K_S Q4_K_M Q5_K_S Q5_K_M Q6_K IQ2_XXS IQ2_XS Q2_K_S IQ3_XS
IQ3_XXS IQ1_S IQ4_NL IQ3_S IQ3_M IQ2_S IQ2_M IQ4_XS IQ1_M - - - - TQ1_0 TQ2_0 MXFP4_MOE NVFP4 Q1_0"""
FILE_TYPES: Mapping[int, str] = MappingProxyType({n: name for n, name in enumerate(_FILES.split(), 2) if name != "-"})
"""Names of quantised files, by their `general.file_type`; a name may stand for a mixture of types, such as Q4_K_M."""
