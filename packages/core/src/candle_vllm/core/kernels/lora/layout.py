# SPDX-License-Identifier: MIT
"""Memory layout of an adapter for the compiled CPU operations, which `pack.py` writes.

An adapter has its own size, and is not padded to the size of a slot. Every adapter has a **table** with a number for
each adapter site: 0, or the address of its description (for experts, of an array of such addresses):

    [A, R, parts]  and for each part  [begin, rows, rank offset, steps, B, scale, bias, less, full, ids, count, new, r]

**A** of all parts that read the same input is one matrix [R, K], each part's ranks padded to a multiple of 4. K is
padded to a multiple of 32 and divided into 4 quarters: a row's sum is the sum of the quarters' sums, in order. Quarters
are consecutive, each in blocks of 16 ranks, and one block of 8 or 4 for the remaining ranks. A block is a run of steps
of 64 bytes, [g ranks][64 / g bytes of neighbouring columns], so that a step is one vector instruction; each lane has
the sum of a rank and a share of its columns. **B** consists of panels of 64 rows, the last one padded: each is a run of
steps of 256 bytes, [r][64] of floats, or [r / 2][64][2] of bfloat16.

With 8-bit integers, a step of A is 32 bytes in the order of 32 bfloat16; the 16 scales of its lanes, in bfloat16, are
before each quarter of a block. A panel of B is the scales of its 64 rows, then [r / 4][2][64][2]. Matrices other than A
and B, and tables that are looked up, are BF16 then.

A table that is looked up stores B as [V][r] in place of A, and A in place of B.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, c_function, operation


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
        """Type of matrices that replace the model's, and of tables that are looked up."""
        return NumberForm.BF16 if self is NumberForm.I8 else self

    @property
    def per_step(self) -> int:
        """Ranks in a step of B."""
        return 4 // self.bytes

    @property
    def step_bytes(self) -> int:
        """Bytes of A that are converted at a time, to one or two vectors of floats, or one of 16-bit pairs."""
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
"""Indices of a part's elements, and their number. LESS is c - 1 of the contract. The COUNT rows at NEW replace the
model's rows IDS, or all rows."""

PANEL, PANEL_BYTES = 64, 256
"""Rows of B in a panel, and bytes of a step of a panel."""

SPAN, MOST_16 = 512, np.float32(32767)
"""For integers: the number of columns of a quarter whose 16-bit inputs share a scale, and the largest input. A sum
of SPAN products fits in 32 bits."""

BLOCK_BYTES = QUARTERS * 64
"""Bytes of the sums of a row and a block of ranks."""

DONE_BYTES = 64
"""Size of a cache line, one for each thread."""

GPU_FIELDS, GPU_RANKS, GPU_COLUMNS = 4, 16, 16
"""On a GPU: number of addresses of a part (A, c * B, c - 1, bias; 0 without a bias), and the multiples to which rows
are padded with zeros: ranks in B, columns in A."""


def most_blocks(rank: int) -> int:
    """Return the maximum number of blocks of `rank` ranks."""
    return rank // 16 + (rank >> 3 & 1) + (rank >> 2 & 1)


def filled(rank: int) -> int:
    """Return the number of ranks after padding."""
    return -(-rank // 4) * 4


def blocks_of(matrix: np.ndarray, form: NumberForm, scales: np.ndarray | None = None) -> np.ndarray:
    """Return A [R, K] in quarters of blocks; R is a multiple of 4 and K of 32. For I8, scales [R, 4, 2] as bytes."""
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
    """Return steps of a panel, and B [N, r] as panels. For I8, scales [N, 2] as bytes."""
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
    made = np.zeros((rows, columns), matrix.dtype)
    made[: matrix.shape[0], : matrix.shape[1]] = matrix
    return made


class ShrinkArguments(NamedTuple):
    """Arguments of the operations that multiply inputs by A, or look up their products.

    Attributes:
        place: number of the adapter site.
        groups_from: which `StepNumber` is the number of groups.
        starts, tables: addresses of int64 [G + 1], first entry of each group, and [G], the tables of their adapters.
        x, x_bytes: address of the rows' inputs, float32, and their row stride in bytes; or of row numbers to look up.
        rows: address of int64, the row of each entry.
        h, h_bytes: address of the sums, and bytes of an entry's sums.
        places, top_k, experts: for experts: addresses of int64 [T, k], each pair's place and expert; k.
        by_place: whether x has a row for each place of a pair.
        done: address of int64, `DONE_BYTES` apart: whether a thread's share is done; see `BeginArguments`.
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
    """The arguments of the operation that runs before `shrink` and a barrier; see `cpu_shrink.begin`.

    Attributes:
        done: as in `ShrinkArguments`.
    """

    done: int


class ExpandArguments(NamedTuple):
    """Arguments of the operations that add the sums' products with B to a result.

    Attributes:
        place, groups_from, starts, tables, x, x_bytes, h, h_bytes, rows, places, experts, top_k, done: as in
            `ShrinkArguments`.
        scales: address of the entries' scales, float32.
        out, row_bytes: address of the result, float32, and its row stride in bytes.
        first, columns: range of columns that are added to; a nested operation, if any, computes the same columns.
        base, base_bytes: address of the model's own products, if they are separate, and their row stride; or 0.
        rows_from: which `StepNumber` is the number of the product's rows.
        accumulate, bias: whether the products are added to the result; address of the product's own bias or 0.
        numbers: address of the step's row numbers, for lookups.
        inputs: K.
        back: bytes to the row of `shrink`, which is in the same group of operations; 0 if `shrink` is complete.
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


def shrink_operation(form: NumberForm, isa: int) -> int:
    """Return the address of the compiled operation."""
    return operation("lora.cpu_shrink:make_shrink", form, isa)


def begin_operation() -> int:
    """Return the address of the compiled operation."""
    return operation("lora.cpu_shrink:begin")


def expand_operation(form: NumberForm, isa: int) -> int:
    """Return the address of the compiled operation."""
    return operation("lora.cpu_expand:make_expand", form, isa)


def lookup_operation(form: NumberForm) -> int:
    """Return the address of the compiled operation."""
    return operation("lora.cpu_tables:make_lookup", form)


def replace_operation() -> int:
    """Return the address of the compiled operation, whose arguments are those of `expand`."""
    return operation("lora.cpu_tables:replace")


def shrink_experts_operation(form: NumberForm, isa: int) -> int:
    """Return the address of the compiled operation."""
    return operation("lora.cpu_experts:make_shrink", form, isa)


def expand_experts_operation(form: NumberForm, isa: int) -> int:
    """Return the address of the compiled operation."""
    return operation("lora.cpu_experts:make_expand", form, isa)


def quantise_function(form: NumberForm) -> Callable[..., None]:
    """Return the compiled function of `cpu_quantise.make_quantise` for bfloat16 or float32 numbers."""
    return c_function("lora.cpu_quantise:make_quantise", 4, form)
