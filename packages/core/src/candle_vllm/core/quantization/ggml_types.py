# SPDX-License-Identifier: MIT
"""ggml's tensor types: their type codes in GGUF files, and the size of their blocks.

The `gguf` package has the same tables, and a test compares the two. It is not imported here because its import takes
longer than opening a file: it includes the tensor names of every architecture and a YAML reader.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType


class GGMLQuantizationType(enum.IntEnum):
    """A type by its code; equal to the `gguf` package's member of the same name."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    NVFP4 = 40
    Q1_0 = 41


GGML_QUANT_SIZES: Mapping[GGMLQuantizationType, tuple[int, int]] = MappingProxyType(
    {
        GGMLQuantizationType[name]: size
        for name, size in (
            ("F32", (1, 4)), ("F16", (1, 2)), ("Q4_0", (32, 18)), ("Q4_1", (32, 20)), ("Q5_0", (32, 22)),
            ("Q5_1", (32, 24)), ("Q8_0", (32, 34)), ("Q8_1", (32, 40)), ("Q2_K", (256, 84)), ("Q3_K", (256, 110)),
            ("Q4_K", (256, 144)), ("Q5_K", (256, 176)), ("Q6_K", (256, 210)), ("Q8_K", (256, 292)),
            ("IQ2_XXS", (256, 66)), ("IQ2_XS", (256, 74)), ("IQ3_XXS", (256, 98)), ("IQ1_S", (256, 50)),
            ("IQ4_NL", (32, 18)), ("IQ3_S", (256, 110)), ("IQ2_S", (256, 82)), ("IQ4_XS", (256, 136)), ("I8", (1, 1)),
            ("I16", (1, 2)), ("I32", (1, 4)), ("I64", (1, 8)), ("F64", (1, 8)), ("IQ1_M", (256, 56)),
            ("BF16", (1, 2)), ("TQ1_0", (256, 54)), ("TQ2_0", (256, 66)), ("MXFP4", (32, 17)), ("NVFP4", (64, 36)),
            ("Q1_0", (128, 18)),
        )
    }
)  # fmt: skip
"""Elements and bytes of a block; (1, bytes of an element) for plain types."""


_FILES = """
Q4_0 Q4_1 - - - Q8_0 Q5_0 Q5_1 Q2_K Q3_K_S Q3_K_M Q3_K_L Q4_K_S Q4_K_M Q5_K_S Q5_K_M Q6_K IQ2_XXS IQ2_XS Q2_K_S IQ3_XS
IQ3_XXS IQ1_S IQ4_NL IQ3_S IQ3_M IQ2_S IQ2_M IQ4_XS IQ1_M - - - - TQ1_0 TQ2_0 MXFP4_MOE NVFP4 Q1_0"""
FILE_TYPES: Mapping[int, str] = MappingProxyType({n: name for n, name in enumerate(_FILES.split(), 2) if name != "-"})
"""Names of quantised files, by their `general.file_type`; a name may stand for a mixture of types, such as Q4_K_M."""
