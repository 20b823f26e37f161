# SPDX-License-Identifier: MIT
"""How an adapter lies in memory for the compiled CPU operations: `pack.py` writes what they read.

An adapter takes what it has, and is not padded to a slot's size. Every adapter has a **table** with a number for each
place of the model: 0, or where the place is described (of experts, where the descriptions of all of them stand):

    [A, R, parts]  and for each part  [begin, rows, rank offset, steps, B, scale, bias, less, full, ids, count, new, r]

**A** of all parts that read the same input is one matrix [R, K], each part's ranks filled up to a multiple of 4. K is
filled up to a multiple of 32, and cut into 4 quarters: the sums of a row are quarters', added in order. Quarters follow
each other, each in blocks of 16 ranks, and one of 8 or 4 where such are left. A block is a run of steps of 64 bytes, [g
ranks][64 / g bytes of neighbouring columns], so that a step is one vector instruction, whose lanes are the sums of a
rank and a share of its columns. **B** is panels of 64 rows, whose last is filled up: each a run of steps of 256 bytes,
[r][64] of floats, or [r / 2][64][2] of bfloat16.

Of whole numbers of 8 bits a step of A is 32 bytes, as 32 of bfloat16 lie, and before a block's quarter stand 16 scales
of its lanes, in bfloat16; a panel of B is [r / 4][2][64][2] behind the scales of its 64 rows. What is multiplied is
BF16 there where it is no A or B, and where a table's rows are looked up.

A table that is looked up has B as [V][r] in the place of A, and A in the place of B.
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
        """Ranks of a step of B."""
        return 4 // self.bytes

    @property
    def step_bytes(self) -> int:
        """Bytes of A that are made a vector of floats, or two, or one of pairs of 16 bits, at a time."""
        return 32 if self is NumberForm.I8 else 64

    @property
    def row_bytes(self) -> int:
        """Bytes from one row of B to the next in a step."""
        return 2 if self is NumberForm.I8 else 4

    @property
    def block_scales(self) -> int:
        """Bytes of scales before a block's quarter."""
        return 32 if self is NumberForm.I8 else 0

    @property
    def panel_scales(self) -> int:
        """Bytes of scales before a panel's steps."""
        return 2 * PANEL if self is NumberForm.I8 else 0


QUARTERS = 4
HEAD = 3
"""Numbers of a description before its parts."""

BEGIN, ROWS, OFFSET, STEPS, MATRIX, SCALE, BIAS, LESS, FULL, IDS, COUNT, NEW, RANK, PART = range(14)
"""Where a part's numbers stand, and how many there are. LESS is c - 1 of the contract; COUNT rows NEW stand in the
place of the model's rows IDS, or of all of them."""

PANEL, PANEL_BYTES = 64, 256
"""Rows of B that lie together, and bytes of a step of them."""

SPAN, MOST_16 = 512, np.float32(32767)
"""Of whole numbers: columns of a quarter whose inputs, of 16 bits, have one scale, and the largest of these; sums of
so many products fit 32 bits."""

BLOCK_BYTES = QUARTERS * 64
"""Sums of a row and a block of ranks."""

DONE_BYTES = 64
"""A cache line for each thread."""

GPU_FIELDS, GPU_RANKS, GPU_COLUMNS = 4, 16, 16
"""On a GPU: addresses of a part (A, c * B, c - 1, bias; 0 without a bias), and the multiples to which rows are padded
with zeros: of ranks in B, of K in A."""


def most_blocks(rank: int) -> int:
    """Blocks of so many ranks."""
    return rank // 16 + (rank >> 3 & 1) + (rank >> 2 & 1)


def filled(rank: int) -> int:
    """Ranks with those that fill them up."""
    return -(-rank // 4) * 4


def blocks_of(matrix: np.ndarray, form: NumberForm, scales: np.ndarray | None = None) -> np.ndarray:
    """A [R, K] in quarters of blocks; R is a multiple of 4 and K of 32. Of I8, scales [R, 4, 2], bytes as `matrix`."""
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
    """B [N, r] as panels, and how many steps each has. Of I8, scales [N, 2], bytes as `matrix`."""
    each, height = form.per_step, -(-len(matrix) // PANEL) * PANEL
    steps = -(-matrix.shape[1] // each)
    panels = filled_with_zeros(matrix, height, steps * each).reshape(-1, PANEL, steps, each)
    if scales is None:
        return steps, panels.swapaxes(1, 2)
    numbers = panels.reshape(-1, PANEL, steps, each // 2, 2).transpose(0, 2, 3, 1, 4).reshape(len(panels), -1)
    before = filled_with_zeros(scales, height, 2).reshape(len(panels), -1)
    return steps, np.concatenate((before, numbers), 1)


def filled_with_zeros(matrix: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """A matrix with zeros behind its rows and columns."""
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
        starts, tables: addresses of int64 [G + 1], where each group's entries begin, and [G], their adapters' tables.
        x, x_bytes: address of the rows' inputs, float32, and their row stride in bytes; or of row numbers to look up.
        rows: address of int64: the row of each entry.
        h, h_bytes: address of the sums, and bytes of an entry's sums.
        places, top_k, experts: for experts: addresses of int64 [T, k], the places of a token's pairs, and the pairs'
            experts; k.
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
    """The arguments of the operation that comes before `shrink` and a barrier; see there.

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
        first, columns: columns that are added to, and that the nested operation computes, if there is one.
        base, base_bytes: address of the model's own products, if they are separate, and their row stride; or 0.
        rows_from: which `StepNumber` is the number of their rows.
        accumulate, bias: whether the products are added to the result; address of the product's own bias or 0.
        numbers: address of the step's row numbers, for lookups.
        inputs: K.
        back: bytes to the row of `shrink`, which is in the same group of operations; 0 if `shrink` is complete.
        beside: as in `LinearArguments`, of the nested operation.
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
    """Address of the compiled operation."""
    return operation("lora.cpu_shrink:make_shrink", form, isa)


def begin_operation() -> int:
    """Address of the compiled operation."""
    return operation("lora.cpu_shrink:begin")


def expand_operation(form: NumberForm, isa: int) -> int:
    """Address of the compiled operation."""
    return operation("lora.cpu_expand:make_expand", form, isa)


def lookup_operation(form: NumberForm) -> int:
    """Address of the compiled operation."""
    return operation("lora.cpu_tables:make_lookup", form)


def replace_operation() -> int:
    """Address of the compiled operation, which takes what `expand` takes."""
    return operation("lora.cpu_tables:replace")


def shrink_experts_operation(form: NumberForm, isa: int) -> int:
    """Address of the compiled operation."""
    return operation("lora.cpu_experts:make_shrink", form, isa)


def expand_experts_operation(form: NumberForm, isa: int) -> int:
    """Address of the compiled operation."""
    return operation("lora.cpu_experts:make_expand", form, isa)


def quantise_function(form: NumberForm) -> Callable[..., None]:
    """The compiled function `cpu_quantise.make_quantise`, of bfloat16 or float32 numbers."""
    return c_function("lora.cpu_quantise:make_quantise", 4, form)
