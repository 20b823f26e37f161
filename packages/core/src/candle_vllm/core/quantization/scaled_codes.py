# SPDX-License-Identifier: MIT
"""Rows of a matrix in FP8 or NVFP4 checkpoints, as stored: small floats with scales.

A weight is its float, times the scale of its group for formats with groups, times the scale of its span in fp32. Spans
are runs of consecutive columns; the last one of a row may be shorter.
Source: Micikevicius et al., 2022, arXiv:2209.05433 (e4m3, e5m2); OCP Microscaling Formats 1.0, 2023 (e2m1).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias

import numpy as np

from candle_vllm.core.quantization.group_codes import nibbles
from candle_vllm.core.quantization.plain import read_plain

Floats: TypeAlias = Literal["e4m3", "e5m2", "e2m1"]
"""Types of codes: 8-bit floats, or 4-bit floats with an e4m3 scale for each group."""

GROUP = 16
"""Number of e2m1 weights that share an 8-bit scale."""

FLOAT_NAMES = MappingProxyType({"e4m3": "F8_E4M3", "e5m2": "F8_E5M2"})
"""Names in `plain.ELEMENTS` of the codes with 8 bits."""

_LARGEST = MappingProxyType({"e4m3": 448.0, "e5m2": 57344.0, "e2m1": 6 * 448.0})

E2M1 = tuple(sign * number for sign in (1.0, -1.0) for number in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))
"""The value of each code of e2m1; 8 is -0."""


@dataclass(frozen=True)
class ScaledCodes:
    """Some rows of a matrix.

    Attributes:
        numbers: type of the codes.
        codes: bits of the floats, uint8 [R, K]; e2m1: uint8 [R, K / 2], the first of two in the lower half of a byte.
        scales: float32 [R, spans].
        span: columns in a span; K for one scale per row.
        groups: for e2m1 the bits of the groups' e4m3 scales, uint8 [R, K / 16]; otherwise None.
    """

    numbers: Floats
    codes: np.ndarray
    scales: np.ndarray
    span: int
    groups: np.ndarray | None = None

    @property
    def columns(self) -> int:
        """K."""
        return self.codes.shape[1] * (2 if self.numbers == "e2m1" else 1)

    @property
    def largest(self) -> float:
        """Upper bound of the magnitudes of all finite weights with finite scales."""
        finite = np.abs(self.scales[np.isfinite(self.scales)])
        return _LARGEST[self.numbers] * float(finite.max(initial=0.0))

    def take(self, rows: np.ndarray | slice) -> ScaledCodes:
        """Select some of the rows."""
        groups = None if self.groups is None else self.groups[rows]
        return dataclasses.replace(self, codes=self.codes[rows], scales=self.scales[rows], groups=groups)

    @property
    def column_step(self) -> int:
        """Columns can be split at multiples of this number."""
        return math.lcm(self.span if self.scales.shape[1] > 1 else 1, GROUP if self.groups is not None else 1)

    def cut(self, first: int, last: int) -> ScaledCodes:
        """Select columns first to last - 1: multiples of `column_step`, or the end."""
        each = 2 if self.numbers == "e2m1" else 1
        spans = slice(first // self.span, -(-last // self.span)) if self.scales.shape[1] > 1 else slice(None)
        return dataclasses.replace(
            self,
            codes=self.codes[:, first // each : last // each],
            scales=self.scales[:, spans],
            span=min(self.span, last - first),
            groups=None if self.groups is None else self.groups[:, first // GROUP : last // GROUP],
        )

    def dequantise(self) -> np.ndarray:
        """Return the weights, float32 [R, K]; each product of float and scale is rounded once."""
        if self.numbers == "e2m1":
            assert self.groups is not None
            values = np.array(E2M1, np.float32)[nibbles(self.codes)]
            values *= np.repeat(_widened(self.groups, "e4m3"), GROUP, axis=1)  # exact: 6 significant bits at most
        else:
            values = _widened(self.codes, self.numbers)
        with np.errstate(all="ignore"):  # an infinite or NaN scale comes from the file and needs no warning
            spread = self.scales.shape[1] > 1
            values *= np.repeat(self.scales, self.span, axis=1)[:, : self.columns] if spread else self.scales
        return values


def _widened(codes: np.ndarray, numbers: Literal["e4m3", "e5m2"]) -> np.ndarray:
    """Convert bytes of floats to float32, newly allocated."""
    return read_plain(np.ascontiguousarray(codes), FLOAT_NAMES[numbers], codes.shape, "F32")
