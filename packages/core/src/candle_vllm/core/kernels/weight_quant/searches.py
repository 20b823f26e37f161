# SPDX-License-Identifier: MIT
"""Constants of the searches for scales and minima, by type; shared by `cpu.py` and `reference.py`."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

import numpy as np

from candle_vllm.core.quantization.ggml_blocks import IQ4_VALUES

LARGEST = 65504.0
"""Numbers beyond it, and what is not finite, cannot be quantised: scales are float16."""


NOTHING = 3.0e38
"""Stands for no minimum, maximum or error yet."""


OFFSET_STEP = 0.1


SCALE_STEP, SCALE_STEPS = 0.1, 9
"""Distance between the step sizes that are tried, in codes, and how many to each side for a scale alone."""


TABLE_STEPS = 15
"""Whole numbers about each end of a table that the number farthest from 0 is tried at."""


TABLE_STARTS = (min(IQ4_VALUES) - TABLE_STEPS // 2, max(IQ4_VALUES) - TABLE_STEPS // 2)
"""The first of them."""


TABLE_MIDDLES = tuple((low + high) / 2 for low, high in itertools.pairwise(IQ4_VALUES))
"""From each of them on the next number of the table is the nearest."""


TABLE_FLOOR = 1.0
"""Weight of every number whose scale is searched with a table, in mean squares of the group."""


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


@dataclasses.dataclass(frozen=True)
class TableSearch:
    """How the scale of 32 numbers is searched that stand in a table.

    Attributes:
        stored: whole numbers from -stored to stored - 1 stand for a scale; 0 where it is stored itself.
    """

    stored: int


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


TABLES: Mapping[str, TableSearch] = MappingProxyType({"IQ4_NL": TableSearch(0), "IQ4_XS": TableSearch(32)})


SIMPLE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


TYPES = (*SIMPLE, "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", *TABLES)


class Quantise(Protocol):
    """(x float32 [N, elements per block], out uint8 [N, bytes per block]) -> whether every number could be quantised.

    With `importance`, float32 [C], of the columns of rows that x has one after the other, where the type has a search.
    """

    def __call__(self, x: np.ndarray, out: np.ndarray, importance: np.ndarray | None = None, /) -> bool: ...
