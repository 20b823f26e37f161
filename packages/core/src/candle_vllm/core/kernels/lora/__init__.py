# SPDX-License-Identifier: MIT
"""LoRA adapters: the terms that an adapter adds to the products of a model's matrices; step 6 of a request's life.

A `Delta` changes one matrix W [N, K] of a `Linear`. For an input row x with this adapter the result is

    y = c * (x W^T + s (x A^T) B^T) + bias of W + own bias                                  c is 1 except for DoRA

where x is the unquantised input of the layer. A token's row of an embedding table is c * (W + s B A)[id].

**Contract.** An adapter has a scale t for each row, usually 1. Each adapter of a row adds in fp32 to the base model's
result:

    y += t * (c * s (x A^T) B^T + (c - 1) x W^T + own bias)

or, with a matrix that replaces W, t * (x full^T - x W^T + own bias). A and c * B are rounded to the adapter's number
type, F32 or BF16; so are x and s (x A^T) in torch and on a GPU, but in the compiled CPU operations these two stay fp32.
With I8, A and c * B are integers of -127 .. 127 with scales: one for each rank and quarter of A, and one for each row
of B (for each column of A, if a table is looked up). A scale is the largest element divided by 127, rounded up to BF16.
x and x A^T are then 16-bit integers. x has an fp32 scale for each row and up to 512 columns of a quarter of x; x A^T
has one for each row. Tables that are looked up, and matrices that replace W, are BF16, and are multiplied by x in fp32.
A step's rows are in groups, one for each adapter, in the order of `PackedAdapter.serial`; a row in several groups adds
them in this order. A row without an adapter is unchanged bit for bit. The terms added to a row depend only on the row,
its adapters and their scales.
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
"""Type in which an adapter is multiplied."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Delta:
    """Change of one matrix W [N, K] by an adapter; rows and columns are in the order of the model's own products.

    Attributes:
        a: [r, K]; None, like `b`, for a change without LoRA matrices.
        b: [N, r].
        scale: s, with the adapter's rank and alpha patterns applied.
        bias: [N], added to the result: B's bias times s, and the difference of the module's bias from the base model's.
        column_scale: c of each output [N] (DoRA: m / ||W + s B A||); biases are not multiplied by it.
        full: [N, K], replaces W, for a head or a table that was trained in full.
        rows: for a table: ids [n], and rows [n, K] that replace W's rows.
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
        """The rank r; 0 without A and B."""
        return 0 if self.a is None else self.a.shape[0]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FittedAdapter:
    """Adapter whose tensors are matched to the layers of a model.

    Attributes:
        digest: SHA-256 of the configuration's and the weights' bytes: the adapter's key in the prefix cache.
        alora: invocation tokens (activated LoRA): active from their last occurrence on; None for the whole sequence.
        deltas: by the layer's path ("layers.0.attention.qkv", "embed", "head"), then by the prefix of the part's name
            in `Linear.parameters` ("q.", "gate.3.", ""). "head" is the output layer, also if it shares the embedding
            table; "embed" is the lookup alone.
        rank: the largest r.
        nbytes: stored bytes of all tensors.
        norm: Frobenius norm of all s B A together.
        notes: remarks on the adapter for the user.
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
    """Adapter site: a layer's fused matrices, which adapters may change.

    Attributes:
        number: index among all sites of a model, from 0.
        columns: K.
        parts: (expert or 0, first row, end row) of each part, by the prefix of its parameters' names.
        experts: number of experts; 0 for a layer without experts.
        lookup: whether it is a table whose rows are looked up.
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
        modules: number of matrices that it changes.
        nbytes: size in memory.
        serial: packing number, unique in the process; adapters of a step are added in this order.
        apart: it needs the model's own products separately, before the sum with other terms (DoRA, `full`, `rows`).
        layout: the backend's representation of the matrices.
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
