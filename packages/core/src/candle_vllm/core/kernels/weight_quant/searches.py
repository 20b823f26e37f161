# SPDX-License-Identifier: MIT
"""Constants of the searches for scales and minima, by type; for `cpu.py`, `cpu_search.py` and the tests' reference."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from types import MappingProxyType

from candle_vllm.core.quantization.ggml_types import IQ4_VALUES

LARGEST = 65504.0
"""Larger elements, and elements that are not finite, cannot be quantised, because scales are float16."""

NOTHING = 3.0e38
"""Initial value of a minimum, a maximum or an error."""

OFFSET_STEP = 0.1  # difference between the step numbers of two tries, see `OffsetSearch`

SCALE_STEP, SCALE_STEPS = 0.1, 9
"""For types without a minimum: distance in codes between the tried scales, and their number to each side."""

TABLE_STEPS = 15
"""Number of integers around each end of a table that are tried as the value of the element farthest from 0."""

TABLE_STARTS = (min(IQ4_VALUES) - TABLE_STEPS // 2, max(IQ4_VALUES) - TABLE_STEPS // 2)
"""The first of these integers at each end."""

TABLE_MIDDLES = tuple((low + high) / 2 for low, high in itertools.pairwise(IQ4_VALUES))
"""Middles between adjacent values of the table: from a middle on, the higher value is the nearest."""

TABLE_FLOOR = 1.0
"""Minimum weight of an element in searches with a table, in mean squares of the group; see `OffsetSearch.floor`."""

LEAST_SPREAD = 4e-6
"""Minimum variance of codes relative to their mean square: nearly equal codes determine no scale and minimum."""


@dataclasses.dataclass(frozen=True)
class OffsetSearch:
    """Search for the scale and minimum of a group.

    Attributes:
        group: number of elements of a group.
        most: the largest code.
        stored: the largest integer that encodes a scale or a minimum.
        first: the first try divides a group's span into `most` + `first` steps.
        tries: number of tries, which differ by 0.1 steps.
        floor: minimum weight of an element without an importance matrix, in root mean squares of the group.
    """

    group: int
    most: int
    stored: int
    first: float
    tries: int
    floor: float


@dataclasses.dataclass(frozen=True)
class ScaleSearch:
    """Search for the scale of a group of 16.

    Attributes:
        half: codes are -half to half - 1.
        stored: integers from -stored to stored - 1 encode a scale.
        floor: minimum weight of an element without an importance matrix, in mean squares of the group.
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


TABLES: Mapping[str, int] = MappingProxyType({"IQ4_NL": 0, "IQ4_XS": 32})
"""Types whose codes are indices of a table: integers from -n to n - 1 encode a scale; 0 if the scale itself is stored.
"""

SIMPLE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
TYPES = (*SIMPLE, "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", *TABLES)
