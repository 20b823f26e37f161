"""Quantising weights: rows of floats to the blocks of ten of GGUF's types.

Contract: x float32 [R, C], C a multiple of the type's block, to uint8 [R, C / block * bytes per block], laid out as
ggml's `ggml-common.h` says. Each block depends on its own numbers alone.

  - q4_0, q5_0, q8_0 take the scale from the number that is farthest from 0, q4_1 and q5_1 scale and minimum from the
    smallest and the largest; then every number is rounded. Their bytes are those of the `gguf` package.
  - q2_K, q4_K, q5_K search a scale and a minimum for each group of 16 or 32, q3_K and q6_K a scale for each group of
    16: several step sizes are tried, each gives codes, the codes give the scale that fits them best by least squares,
    and the best of all is kept. Numbers far from 0 weigh more: floor * root mean square + |x|, and floor * mean square
    + x^2. Then a block's scales are stored as small whole numbers, and every number is rounded with what is stored.

`reference.py` says it in numpy; `cpu.py` is compiled, and has the same bytes on every CPU. The method is that of
llama.cpp's `ggml-quants.c`, without its importance matrix.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from gguf import GGMLQuantizationType

LARGEST = 65504.0
"""Numbers beyond it, and what is not finite, cannot be quantised: scales are float16."""

NOTHING = 3.0e38
"""Stands for no minimum, maximum or error yet."""

OFFSET_STEP = 0.1
SCALE_STEP, SCALE_STEPS = 0.1, 9
"""Distance between the step sizes that are tried, in codes, and how many to each side for a scale alone."""

LEAST_SPREAD = 4e-6
"""Codes whose variance is below this share of their mean square give no scale and minimum: they are all but equal."""


@dataclasses.dataclass(frozen=True)
class OffsetSearch:
    """How scale and minimum of a group are searched.

    Attributes:
        group: numbers of a group.
        most: the largest code.
        stored: the largest whole number that stands for a scale or a minimum.
        first: the first step size that is tried makes `most` + `first` steps of a group's span.
        tries: how many are tried, 0.1 steps apart.
        floor: weight of every number, in root mean squares of the group.
    """

    group: int
    most: int
    stored: int
    first: float
    tries: int
    floor: float


@dataclasses.dataclass(frozen=True)
class ScaleSearch:
    """How the scale of a group of 16 is searched.

    Attributes:
        half: codes are -half to half - 1.
        stored: whole numbers from -stored to stored - 1 stand for a scale.
        floor: weight of every number, in mean squares of the group.
    """

    half: int
    stored: int
    floor: float


OFFSETS: Mapping[str, OffsetSearch] = MappingProxyType(
    {
        "Q2_K": OffsetSearch(group=16, most=3, stored=15, first=-0.5, tries=16, floor=0.0),
        "Q4_K": OffsetSearch(group=32, most=15, stored=63, first=-1.0, tries=21, floor=1.0),
        "Q5_K": OffsetSearch(group=32, most=31, stored=63, first=-0.5, tries=16, floor=1.0),
    }
)
SCALES: Mapping[str, ScaleSearch] = MappingProxyType(
    {"Q3_K": ScaleSearch(half=4, stored=32, floor=1.0), "Q6_K": ScaleSearch(half=32, stored=128, floor=0.0)}
)
SIMPLE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
TYPES = (*SIMPLE, "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")

Quantise = Callable[[np.ndarray, np.ndarray], bool]
"""(x float32 [N, elements per block], out uint8 [N, bytes per block]) -> whether every number could be quantised."""


def quantiser(ggml_type: GGMLQuantizationType) -> Quantise:
    """What quantises blocks: compiled where Numba is, else in numpy, which is many times slower."""
    assert ggml_type.name in TYPES
    if importlib.util.find_spec("numba") is None:
        from candle_vllm.core.kernels.weight_quant import reference

        return reference.quantiser(ggml_type)
    from candle_vllm.core.kernels.weight_quant import cpu

    return cpu.quantiser(ggml_type)
