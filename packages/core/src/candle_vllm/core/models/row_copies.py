# SPDX-License-Identifier: MIT
"""Copies of rows by tables of row numbers, and columns beside those of attention heads, for vision encoders.

The tables are filled before a tile is encoded. Compiled steps copy as many rows as a layer has (`TileRows.lengths`);
in torch a copy has as many rows as its table was filled with.
Shapes: T rows, H query heads, K key heads, D elements of a head, M columns beside them, n rows of a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.kernels.cpu_runtime.operation import address_of, operation
from candle_vllm.core.kernels.recorded import Recorded, Value
from candle_vllm.core.kernels.side_by_side import CopyArguments, side_by_side


class RowNumbers:
    """Row numbers of `copies` copies of up to `most` rows; -1 stands for a row of zeros.

    Attributes:
        numbers: int64 [copies, most].
        count: n.
        stride: elements from one row to the next that `Run` multiplies; 0 in torch.
    """

    def __init__(self, most: int, copies: int = 1) -> None:
        self.numbers = np.full((copies, most), -1, np.int64)
        self.count = 0

    def fill(self, numbers: NDArray[np.int64]) -> None:
        """Set the row numbers [copies, n]; further rows are zeros."""
        self.count = numbers.shape[1]
        self.numbers[:, : self.count], self.numbers[:, self.count :] = numbers, -1

    @property
    def filled(self) -> NDArray[np.int64]:
        """The row numbers [copies, n]."""
        return self.numbers[:, : self.count]


def taken(x: Value, rows: RowNumbers) -> Value:
    """Rows of x [T, W], side by side for each of the copies: [n, copies * W]."""
    if not isinstance(x, Recorded):
        found = x[rows.filled.clip(0)]
        found[rows.filled < 0] = 0
        return side_by_side(*found)
    values: Any = x
    recorder, width, stride = values.recorder, values.width, values.buffer.stride
    made = recorder.buffer(width * len(rows.numbers))
    for copy, numbers in enumerate(rows.numbers):
        to = address_of(made.array) + 4 * width * copy
        row = CopyArguments(values.address, stride, width, to, made.stride, picked=recorder.keep_array(numbers))
        recorder.add(operation("side_by_side.cpu:copy"), row)
    return _value(values, made)


class Shared(NamedTuple):
    """Columns that all heads share: rows of a constant table [R, M] by their numbers."""

    table: Value
    rows: RowNumbers


class Runs(NamedTuple):
    """Columns of each head: `size` columns of `values`, H of [T, W], from the column `first` of each row on."""

    values: Sequence[Value]
    first: Starts
    size: int


class Starts:
    """The first column of a run in each row; compiled steps read the place of this column in the rows' memory."""

    def __init__(self, most: int) -> None:
        self.columns, self._places = np.zeros(most, np.int64), dict[int, NDArray[np.int64]]()
        self.count = 0

    def fill(self, columns: NDArray[np.int64]) -> None:
        """Set the columns [n]; runs of further rows are zeros."""
        self.count = len(columns)
        self.columns[: self.count] = columns
        for stride, places in self._places.items():
            places[: self.count], places[self.count :] = np.arange(self.count) * stride + columns, -1

    def places(self, stride: int) -> NDArray[np.int64]:
        """The places of the columns in rows that are `stride` elements apart, [most]."""
        return self._places.setdefault(stride, np.full(len(self.columns), -1, np.int64))


def widened(
    qkv: Value,
    heads: tuple[int, int],
    size: int,
    queries: Sequence[Shared | Runs],
    keys: Sequence[Shared],
    scale: float,
) -> Value:
    """Heads [T, (H + 2 K) * (D + M)] with columns beside those of queries and of keys, which are multiplied by `scale`.

    The columns beside values are not read: results have D columns of each head that mean something.

    Args:
        qkv: queries, keys and values, [T, (H + 2 K) * D].
        heads, size: H and K; D.
        queries, keys: the columns, M together for each of both.
    """
    count, shared = heads
    more = sum(each.table.shape[1] for each in keys)
    wide, all_heads = size + more, count + 2 * shared
    if not isinstance(qkv, Recorded):
        parts = qkv.unflatten(-1, (all_heads, size))
        made = parts.new_zeros(len(parts), all_heads, wide)
        made[..., :size] = parts
        made[:, count : count + shared, :size] *= scale
        for part, columns in ((made[:, :count], queries), (made[:, count : count + shared], keys)):
            first = size
            for each in columns:
                last = first + (each.size if isinstance(each, Runs) else each.table.shape[1])
                part[..., first:last] = _columns(each, part.dtype)
                first = last
        return made.flatten(1)
    values: Any = qkv
    keys_of: Any = values.split([count * size, shared * size, shared * size], -1)[1]
    keys_of.scaled(scale)
    recorder, made = values.recorder, values.recorder.buffer(all_heads * wide)
    base, copy = address_of(made.array), operation("side_by_side.cpu:copy")
    place = (values.address, values.buffer.stride, size, base, made.stride)
    recorder.add(copy, CopyArguments(*place, parts=all_heads, gap=size, spread=more))
    for columns, first_head, number in ((queries, 0, count), (keys, count, shared)):
        to = base + 4 * (first_head * wide + size)
        for each in columns:
            if isinstance(each, Runs):
                for head, run in enumerate(each.values):
                    picked = recorder.keep_array(each.first.places(run.buffer.stride))
                    place = (run.address, 1, each.size, to + 4 * head * wide, made.stride)
                    recorder.add(copy, CopyArguments(*place, picked=picked))
                to += 4 * each.size
            else:
                width, picked = each.table.shape[1], recorder.keep_array(each.rows.numbers)
                place = (recorder.keep(each.table), width, width, to, made.stride)
                recorder.add(copy, CopyArguments(*place, picked=picked, parts=number, spread=wide - width))
                to += 4 * width
    return _value(values, made)


def _columns(columns: Shared | Runs, dtype: Any) -> Value:
    """The columns in torch: [T, H, size], or [T, 1, M] of columns that all heads share."""
    if isinstance(columns, Shared):
        return columns.table[columns.rows.filled[0]][:, None].to(dtype)
    first = columns.first.columns[: columns.first.count, None] + np.arange(columns.size)
    rows = np.arange(len(first))[:, None]
    whole = side_by_side(*(values[rows, first] for values in columns.values))
    return whole.unflatten(-1, (len(columns.values), columns.size))


def _value(like: Any, made: Any) -> Value:
    """A value of all columns of a buffer that operations have written."""
    from candle_vllm.core.kernels.cpu_runtime.values import buffer_value

    return buffer_value(like.recorder, made)
