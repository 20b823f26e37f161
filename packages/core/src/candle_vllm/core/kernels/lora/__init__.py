# SPDX-License-Identifier: MIT
"""Adapters (LoRA): what one does to the matrices of a model; step 6 of a request's life.

A `Delta` changes one matrix W [N, K] of a `Linear`, whose result for a row x of the input that has this adapter is

    y = c * (x W^T + s (x A^T) B^T) + bias of W + own bias                                  c is 1 but for DoRA

with x as the layer was given it, unquantised. Of an embedding table a token's row is c * (W + s B A)[id].

**Contract.** An adapter has a scale t in each row, 1 for most, and adds in fp32 to what the model itself gives, in a
row that may have several:

    y += t * (c * s (x A^T) B^T + (c - 1) x W^T + own bias)

or, with a matrix in W's place, t * (x full^T - x W^T + own bias). A and c * B are rounded to the type in which the
adapter is multiplied, F32 or BF16, and so are x and s (x A^T) in torch and on a GPU; in the compiled CPU operations
these two stay fp32. In I8, A and c * B are whole numbers of -127 .. 127 with scales, one for each rank and quarter of A
and one for each row of B (for each column of A, where a table is looked up): the largest number by 127, rounded up to
BF16. x and x A^T are whole numbers of 16 bits there, with an fp32 scale for each row and up to 512 columns of a quarter
of x, and for each row of x A^T. The numbers of a table that is looked up, and matrices in W's place, are BF16, and x is
fp32 where it meets these. A step's rows stand in groups, one for each adapter, in the order of `PackedAdapter.serial`,
in which they are added where a row stands in several. A row that stands in none keeps its bits, and what is added to
one depends on nothing but the row, its adapters and their scales.
Source: LoRA (arXiv 2106.09685), DoRA (arXiv 2402.09353).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.quantization.tensors import StoredTensor

NumberType: TypeAlias = Literal["F32", "BF16", "I8"]
"""In what an adapter is multiplied."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Delta:
    """What an adapter does to one matrix W [N, K], whose rows and columns are those that the model multiplies.

    Attributes:
        a: [r, K], or None with `b`: nothing is multiplied.
        b: [N, r].
        scale: s; patterns are applied.
        bias: [N], added to the result: that of B, times s, and what the module's own bias differs by from the base's.
        column_scale: c of each output [N] (DoRA: m / ||W + s B A||); biases are not multiplied by it.
        full: [N, K] in W's place: a head or a table that was trained whole.
        rows: of a table: ids [n], and rows [n, K] in place of W's.
    """

    a: StoredTensor | None = None
    b: StoredTensor | None = None
    scale: float = 1.0
    bias: NDArray[np.float32] | None = None
    column_scale: NDArray[np.float32] | None = None
    full: StoredTensor | None = None
    rows: tuple[NDArray[np.int64], NDArray[np.float32]] | None = None

    @property
    def rank(self) -> int:
        """r; 0 where there are no A and B."""
        return 0 if self.a is None else self.a.shape[0]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FittedAdapter:
    """An adapter whose tensors have found their places in a model.

    Attributes:
        digest: SHA-256 of the configuration's and the weights' bytes: what it is to a prefix cache.
        alora: tokens from whose last occurrence on it acts; None: it acts on all of a sequence.
        deltas: by the layer's path ("layers.0.attention.qkv", "embed", "head"), then by the beginning of the part's
            name, as in `Linear.parameters` ("q.", "gate.3.", ""). "head" stands for the head also where that is the
            embedding table, and "embed" for looking up alone.
        rank: the largest r.
        nbytes: bytes that are stored for all of it.
        norm: Frobenius norm of all s B A together.
        notes: what is to be told of it.
    """

    digest: bytes
    alora: tuple[int, ...] | None
    deltas: Mapping[str, Mapping[str, Delta]]
    rank: int
    nbytes: int
    norm: float
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Place:
    """A layer's matrices, side by side, which adapters may change.

    Attributes:
        number: of all places of a model, from 0.
        columns: K.
        parts: by the beginnings of their parameters' names, the expert, or 0, where its rows begin and end.
        experts: how many there are; 0 where every token meets the same matrix.
        lookup: it is a table whose rows are looked up.
    """

    number: int
    columns: int
    parts: Mapping[str, tuple[int, int, int]]
    experts: int = 0
    lookup: bool = False


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class PackedAdapter:
    """An adapter that is ready for steps of one backend.

    Attributes:
        digest, alora, rank, norm: as in `FittedAdapter`.
        modules: matrices that it changes.
        nbytes: of memory.
        serial: number of packing, unique in the process; adapters of a step are added in its order.
        apart: it needs the model's own products, apart from what they are added to (DoRA, `full`, `rows`).
        layout: what the backend multiplies.
    """

    digest: bytes
    alora: tuple[int, ...] | None
    rank: int
    norm: float
    modules: int
    nbytes: int
    serial: int
    apart: bool
    layout: Any
