# SPDX-License-Identifier: MIT
"""Memory layout of an adapter for the compiled CPU operations, which `pack.py` writes.

An adapter is not padded to the size of a slot. Terms:

    table    of an adapter: for each adapter site, 0 or the address of the site's description (for experts, of an array
             of such addresses). A description is [A, R, parts], and for each part (matrix of the site)
             [begin, rows, rank offset, steps, B, scale, bias, less, full, ids, count, new, r]
    entry    a row of a step with one of the row's adapters; a **group** is the entries of one adapter
    quarter  of A: a quarter of the columns K, which are padded to a multiple of 32
    block    of A: 16 ranks of a quarter; 8 or 4 remaining ranks are one block
    panel    of B: 64 rows, the last panel padded
    step     of a block of g ranks: 64 bytes, [g][64 / g bytes of neighbouring columns]; of a panel: 256 bytes

**A** of all parts that read the same input is one matrix [R, K], each part's ranks padded to a multiple of 4. Quarters
are consecutive, each consists of blocks, and a block of consecutive steps; the quarters' sums are added as (0 + 1) +
(2 + 3). **B** consists of panels, and a panel of consecutive steps: [r][64] float32, or [r / 2][64][2] bfloat16.

With 8-bit integers, a step of A is 32 bytes in the order of 32 bfloat16; before each quarter of a block are 16 scales
in bfloat16, one for each lane. A panel of B is the scales of its 64 rows, then [r / 4][2][64][2]. `full` of a product,
and B of a table that is looked up, are then BF16.

A table that is looked up stores B as [V][r] in place of A, and the transpose of A in place of B.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import numpy as np

from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber


class NumberForm(enum.IntEnum):
    """Type in which an adapter is multiplied, by the names of `NumberType`."""

    BF16 = 0
    F32 = 1
    I8 = 2

    @property
    def bytes(self) -> int:
        """Bytes of an element."""
        return (2, 4, 1)[self]

    @property
    def whole(self) -> NumberForm:
        """Type of `full` of a product, and of B of a table that is looked up."""
        return NumberForm.BF16 if self is NumberForm.I8 else self

    @property
    def per_step(self) -> int:
        """Ranks in a step of B."""
        return 4 // self.bytes

    @property
    def step_bytes(self) -> int:
        """Bytes of a step of A, which becomes one or two vectors of floats, or one of 16-bit integers."""
        return 32 if self is NumberForm.I8 else 64

    @property
    def row_bytes(self) -> int:
        """Bytes from one row of B to the next within a step."""
        return 2 if self is NumberForm.I8 else 4

    @property
    def block_scales(self) -> int:
        """Bytes of scales before a quarter of a block."""
        return 32 if self is NumberForm.I8 else 0

    @property
    def panel_scales(self) -> int:
        """Bytes of scales before a panel's steps."""
        return 2 * PANEL if self is NumberForm.I8 else 0


QUARTERS = 4
HEAD = 3
"""Number of elements of a description before its parts."""

BEGIN, ROWS, OFFSET, STEPS, MATRIX, SCALE, BIAS, LESS, FULL, IDS, COUNT, NEW, RANK, PART = range(14)
"""Indices of a part's elements in a description, and their number. FULL is 1 if MATRIX is `full` instead of B; LESS is
the address of c - 1 of the contract, or of -1 for `full`. The COUNT rows at NEW, float32, replace the model's rows IDS,
which are sorted, or all rows if IDS is 0."""

PANEL, PANEL_BYTES = 64, 256
"""Rows of B in a panel, and bytes of a step of a panel."""

SPAN, MOST_16 = 512, np.float32(32767)
"""For integers: how many columns of a quarter of x share a scale, and the largest 16-bit input. A sum of SPAN products
fits in 32 bits."""

BLOCK_BYTES = QUARTERS * 64
"""Bytes of the sums of a row and a block of ranks."""

DONE_BYTES = 64
"""Bytes of a thread's mark (`BeginArguments.done`): a cache line."""

GPU_FIELDS, GPU_RANKS, GPU_COLUMNS = 4, 16, 16
"""On a GPU: number of addresses of a part (A, c * B, c - 1, bias; 0 for one that is absent); multiples to which the
ranks in B and the columns in A are padded with zeros."""


def most_blocks(rank: int) -> int:
    """Return the maximum number of blocks of at most `rank` ranks: 16 ranks are one block, 12 are two."""
    return (rank + 4) // 16 + 1


def filled(rank: int) -> int:
    """Return the number of ranks after padding."""
    return -(-rank // 4) * 4


def blocks_of(matrix: np.ndarray, form: NumberForm, scales: np.ndarray | None = None) -> np.ndarray:
    """Return A [R, K] as blocks; R is a multiple of 4 and K of 32. `scales`: for I8, uint8 [R, 4, 2], bfloat16 bits."""
    rank, columns = matrix.shape
    made, first = [], 0
    while first < rank:
        height = next(size for size in (16, 8, 4) if size <= rank - first)
        width = form.step_bytes // form.bytes // height
        block = matrix[first : first + height].reshape(height, QUARTERS, columns // QUARTERS // width, width)
        if scales is not None:
            lanes = scales[first : first + height].repeat(16 // height, 0)
            made.append(lanes.swapaxes(0, 1).reshape(QUARTERS, -1))
        made.append(block.transpose(1, 2, 0, 3).reshape(QUARTERS, -1))
        first += height
    return np.concatenate(made, 1)


def panels_of(matrix: np.ndarray, form: NumberForm, scales: np.ndarray | None = None) -> tuple[int, np.ndarray]:
    """Return the number of steps of a panel, and B [N, r] as panels. `scales`: for I8, uint8 [N, 2], bfloat16 bits."""
    each, height = form.per_step, -(-len(matrix) // PANEL) * PANEL
    steps = -(-matrix.shape[1] // each)
    panels = filled_with_zeros(matrix, height, steps * each).reshape(-1, PANEL, steps, each)
    if scales is None:
        return steps, panels.swapaxes(1, 2)
    numbers = panels.reshape(-1, PANEL, steps, each // 2, 2).transpose(0, 2, 3, 1, 4).reshape(len(panels), -1)
    before = filled_with_zeros(scales, height, 2).reshape(len(panels), -1)
    return steps, np.concatenate((before, numbers), 1)


def filled_with_zeros(matrix: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Pad a matrix with zeros after its rows and columns."""
    if matrix.shape == (rows, columns):
        return matrix
    return np.pad(matrix, [(0, rows - matrix.shape[0]), (0, columns - matrix.shape[1])])


class ShrinkArguments(NamedTuple):
    """Arguments of the operations that compute x A^T: `shrink`, also for experts, and the lookup in a table.

    Attributes:
        place: number of the adapter site.
        groups_from: which `StepNumber` is the number of groups.
        starts: address of int64 [G + 1]: first entry of each of G groups, and the end of the last group.
        tables: address of int64 [G]: the address of the table of each group's adapter.
        x, x_bytes: address of the inputs, float32, and their row stride in bytes; or of row numbers to look up.
        rows: address of int64, the row of each entry.
        h, h_bytes: address of the sums, and maximum bytes of an entry's sums (of its k pairs, for experts).
        places, experts, top_k: for experts: addresses of int64 [T, k], the place and the expert of each pair; k.
        by_place: whether x has a row for each place of a pair.
        done: address of int64, `DONE_BYTES` apart: whether a thread's share is done; only for `shrink` without experts.
    """

    place: int
    groups_from: int
    starts: int
    tables: int
    x: int
    x_bytes: int
    h: int
    h_bytes: int
    rows: int
    places: int = 0
    experts: int = 0
    top_k: int = 0
    by_place: int = 0
    done: int = 0


class BeginArguments(NamedTuple):
    """Arguments of the operation that runs before `shrink`; see `cpu_shrink.begin`; `done` as in `ShrinkArguments`."""

    done: int


class ExpandArguments(NamedTuple):
    """Arguments of the operations that add the sums' products with B to a result.

    Attributes:
        place, groups_from, starts, tables, x, x_bytes, h, h_bytes, rows, places, experts, top_k, done: as in
            `ShrinkArguments`.
        scales: address of the entries' scales, float32.
        out, row_bytes: address of the result, float32, and its row stride in bytes.
        first, columns: first column and number of columns; a nested operation, if any, computes the same columns.
        base, base_bytes: address, or 0, and row stride of the model's own products if they are separate from `out`.
        rows_from: which `StepNumber` is the number of the product's rows.
        accumulate, bias: if `base` is not 0: whether products are added to the result; address of their bias or 0.
        numbers: address of the step's row numbers, for lookups.
        inputs: K.
        back: bytes back to the plan row of `shrink`, if no barrier follows `shrink`; otherwise 0.
        beside: see `LinearArguments`; passed to the nested operation.
    """

    place: int
    groups_from: int
    starts: int
    tables: int
    x: int
    x_bytes: int
    h: int
    h_bytes: int
    rows: int
    scales: int
    out: int
    row_bytes: int
    columns: int
    first: int = 0
    base: int = 0
    base_bytes: int = 0
    rows_from: int = StepNumber.TOKENS
    accumulate: int = 0
    bias: int = 0
    numbers: int = 0
    inputs: int = 0
    places: int = 0
    experts: int = 0
    top_k: int = 0
    done: int = 0
    back: int = 0
    beside: int = 0
