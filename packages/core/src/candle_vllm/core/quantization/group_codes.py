# SPDX-License-Identifier: MIT
"""Integers in groups that share a scale: the unpacked form of GPTQ, AWQ and similar formats.

A weight is scale * (code - zero) in fp32, which is exact for scales of 16 bits: the product has at most 11 + 9
significant bits.

If the groups allow it, the weights are converted exactly to blocks of a ggml type, which CPU and GPU kernels multiply:
symmetric codes of 4 bits become Q4_0, of 8 bits Q8_0, and asymmetric codes of 4 bits become Q5_0, because code - zero
is in -15..15. Asymmetric codes of 8 bits become Q8_0 if code - zero is in -128..127. (Q4_1 would take 5.0 bits per
weight instead of 5.5, but would round scale * zero to float16, with the same error for all weights of a group.)
Shapes: R rows, K columns, G groups.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from candle_vllm.core.quantization.ggml_blocks import BlockParts, put_together, take_apart
from candle_vllm.core.quantization.ggml_types import CONTENTS, GGMLQuantizationType

BLOCK = 32
"""Weights in a block of Q4_0, Q5_0 and Q8_0."""

_TYPES = MappingProxyType({4: GGMLQuantizationType.Q4_0, 5: GGMLQuantizationType.Q5_0, 8: GGMLQuantizationType.Q8_0})


class Blocks(NamedTuple):
    """Rows as blocks of a ggml type, uint8 [R, bytes of a row]; `order`: original columns, if reordered."""

    type: GGMLQuantizationType
    raw: np.ndarray
    order: np.ndarray | None = None

    def as_type(self, type: GGMLQuantizationType) -> np.ndarray:
        """Return the rows as blocks of Q5_0 if these are Q4_0, or of the same type: uint8 [R, bytes of a row]."""
        if type is self.type:
            return self.raw
        parts = take_apart(self.raw.reshape(len(self.raw), -1, self.type.block[1]), CONTENTS[self.type], np)
        return put_together(parts, CONTENTS[type]).reshape(len(self.raw), -1)


@dataclass(frozen=True)
class GroupCodes:
    """Some rows of a matrix.

    Attributes:
        codes: uint8 [R, K], each below 2^bits.
        scales: float32 [R, G].
        zeros: the codes of weight 0, int32 [R, G]; None for the middle, 2^(bits - 1).
        bits: 4, 5 or 8.
        scale_dtype: type of the stored scales, one of `plain.ELEMENTS`; F32 for the exponents of MXFP4.
        group_of: the group of each column, int64 [K]; None for G groups of K / G adjacent columns.
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    bits: int
    scale_dtype: str
    group_of: np.ndarray | None = None

    @property
    def columns(self) -> int:
        """K."""
        return self.codes.shape[1]

    @property
    def middle(self) -> int:
        """The code of weight 0, if groups have no zeros."""
        return 1 << (self.bits - 1)

    def take(self, rows: np.ndarray | slice) -> GroupCodes:
        """Select some of the rows."""
        zeros = None if self.zeros is None else self.zeros[rows]
        return dataclasses.replace(self, codes=self.codes[rows], scales=self.scales[rows], zeros=zeros)

    @property
    def column_step(self) -> int:
        """Columns can be split at multiples of this number."""
        groups = self.scales.shape[1]
        return 1 if self.group_of is not None or groups == 1 else self.columns // groups

    def cut(self, first: int, last: int) -> GroupCodes:
        """Select columns first to last - 1, both multiples of `column_step`."""
        codes, step = self.codes[:, first:last], self.column_step
        if step == 1 and (self.group_of is not None or self.scales.shape[1] == 1):
            group_of = None if self.group_of is None else self.group_of[first:last]
            return dataclasses.replace(self, codes=codes, group_of=group_of)
        groups = slice(first // step, last // step)
        zeros = None if self.zeros is None else self.zeros[:, groups]
        return dataclasses.replace(self, codes=codes, scales=self.scales[:, groups], zeros=zeros)

    def dequantise(self) -> np.ndarray:
        """Return the weights, float32 [R, K]."""
        values = self.codes.astype(np.float32)
        zeros = np.float32(self.middle) if self.zeros is None else self._by_column(self.zeros.astype(np.float32))
        with np.errstate(all="ignore"):  # an infinite or NaN scale comes from the file and needs no warning
            values -= zeros
            values *= self._by_column(self.scales)
        return values

    def _by_column(self, numbers: np.ndarray) -> np.ndarray:
        """Expand values per group [R, G] to [R, K]."""
        if self.group_of is not None:
            return numbers[:, self.group_of]
        return np.repeat(numbers, self.columns // numbers.shape[1], axis=1)

    def in_order(self) -> tuple[GroupCodes, np.ndarray | None]:
        """Sort columns by group unless `in_runs`; return the codes, and the original columns (None if not sorted)."""
        if self.group_of is None or in_runs(self.group_of):
            return self, None
        order = np.argsort(self.group_of, kind="stable")
        return dataclasses.replace(self, codes=self.codes[:, order], group_of=self.group_of[order]), order

    def blocks(self) -> Blocks | None:
        """Convert the weights to blocks of a ggml type; None if no type holds them exactly."""
        found, order = self.in_order()
        blocks = found._blocks()
        return None if blocks is None else blocks._replace(order=order)

    def _blocks(self) -> Blocks | None:
        group_of = self._group_of_blocks()
        if group_of is None:
            return None
        scales, numbers = self.scales[:, group_of], self._signed(group_of)
        if numbers is None:
            return None
        numbers = numbers.reshape(len(numbers), -1, BLOCK)
        with np.errstate(over="ignore"):
            halves = scales.astype(np.float16)
        wrong = halves.astype(np.float32) != scales
        if wrong.any():
            if numbers[wrong].any():
                return None
            halves[wrong] = 0  # a block of zeros, whatever its scale
        type = _TYPES[self._block_bits()]
        parts = BlockParts(numbers.view(np.uint8), halves[..., None].view(np.uint8))
        raw = put_together(parts, CONTENTS[type])
        return Blocks(type, raw.reshape(len(raw), -1))

    def _group_of_blocks(self) -> np.ndarray | None:
        """Return the group of each block of a row; None if a block has several groups or is incomplete."""
        groups, columns = self.scales.shape[1], self.columns
        if columns % BLOCK:
            return None
        if self.group_of is None:
            group = columns // groups
            return None if group % BLOCK and groups > 1 else np.arange(columns // BLOCK) * BLOCK // group
        return self.group_of[::BLOCK] if in_runs(self.group_of) else None

    def _block_bits(self) -> int:
        return 5 if self.bits == 4 and self.zeros is not None else self.bits

    def _signed(self, group_of: np.ndarray) -> np.ndarray | None:
        """Return code - zero, int8 [R, K]; None if a value exceeds the block's type."""
        if self.zeros is None:
            return (self.codes - np.uint8(self.middle)).view(np.int8)
        lowest = 1 << (self._block_bits() - 1)
        zeros = self.zeros[:, group_of]
        numbers = self.codes.reshape(len(self.codes), -1, BLOCK).astype(np.int16)
        numbers -= zeros[:, :, None].astype(np.int16)
        if numbers.size and (numbers.min() < -lowest or numbers.max() >= lowest):
            return None
        return numbers.astype(np.int8).reshape(self.codes.shape)


def in_runs(group_of: np.ndarray) -> bool:
    """Whether the columns are whole blocks of adjacent columns, each in one group."""
    each = group_of[: len(group_of) // BLOCK * BLOCK].reshape(-1, BLOCK)
    return len(group_of) % BLOCK == 0 and bool((each == each[:, :1]).all())


def zeros_or_middle(zeros: np.ndarray, bits: int) -> np.ndarray | None:
    """Return zeros of codes of `bits` bits as `GroupCodes.zeros`: int32, or None if all are the middle."""
    return None if (zeros == 1 << (bits - 1)).all() else zeros.astype(np.int32)


def nibbles(packed: np.ndarray) -> np.ndarray:
    """Split bytes [..., B] into their halves, the lower first: uint8 [..., 2 B]."""
    both = np.empty((*packed.shape, 2), np.uint8)
    np.bitwise_and(packed, 15, out=both[..., 0])
    np.right_shift(packed, 4, out=both[..., 1])
    return both.reshape(*packed.shape[:-1], -1)


def fields(words: np.ndarray, bits: int) -> np.ndarray:
    """Unpack codes of 4 or 8 bits from int32 [..., W], the lowest first: uint8 [..., W * 32 / bits]."""
    data = np.ascontiguousarray(words).view(np.uint8)
    return data if bits == 8 else nibbles(data)
