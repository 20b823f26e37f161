# SPDX-License-Identifier: MIT
"""LoRA adapters: the terms that an adapter adds to the products of a model's matrices; step 6 of a request's life.

A `Delta` changes one matrix W [N, K] of a `Linear`. For an input row x with this adapter the result is

    y = c * (x W^T + s (x A^T) B^T) + bias of W + own bias                                  c is 1 except for DoRA

where x is the unquantised input of the layer. A token's row of an embedding table is (W + s B A)[id]; it has no DoRA.

**Contract.** A row of a step may have adapters, each with a scale t, usually 1. Each adds in fp32 to the base model's
result:

    y += t * (c * s (x A^T) B^T + (c - 1) x W^T + own bias)

or, with a matrix `full` that replaces W, t * (x full^T - x W^T + own bias). A and c * B are rounded to the adapter's
number type, F32 or BF16; for a decoder on a GPU, to the type of its activations. So are x and s (x A^T) in torch and on
a GPU, but in the compiled CPU operations x and s (x A^T) stay fp32. With I8, A and c * B are integers of -127 .. 127
with scales: for each row of A and quarter of its columns, and for each row of B. A scale is the largest magnitude
divided by 127, rounded up to BF16. x and x A^T are then 16-bit integers with fp32 scales: for each row and up to 512
columns of a quarter of x, and for each row of x A^T. `full` is then BF16 and multiplied by x in fp32. For an embedding
table, rows of B are looked up and multiplied by A; with I8 this B is BF16, and A has a scale for each column.
A **group** is the rows of a step that share an adapter; groups are in the order of `PackedAdapter.digest`, and a row's
adapters are added in this order. A row without an adapter is unchanged bit for bit. The terms added to a row depend
only on the row, its adapters and their scales.
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
"""Type in which an adapter is multiplied, except by a decoder on a GPU."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Delta:
    """Change of one matrix W [N, K] by an adapter; rows and columns are in the order of the model's own products.

    Attributes:
        a: [r, K]; None, like `b`, for a change without LoRA matrices.
        b: [N, r].
        scale: s, from the adapter's alpha and rank, patterns for single modules included.
        bias: [N], added to the result: B's bias times s, and the difference of the module's bias from the base model's.
        column_scale: c of each output [N] (DoRA: m / ||W + s B A||); biases are not multiplied by it.
        full: [N, K], replaces W, for a head or a table that was trained in full; when merging, any parameter.
        rows: for a head or a table: ids [n], and rows [n, K] that replace W's rows; the product of A and B is added.
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
        alora: invocation tokens: the adapter is active from their last occurrence on (activated LoRA); None if always.
        deltas: by the layer's path ("layers.0.attention.qkv", "embed", "head"), then by the prefix of the part's name
            in `Linear.parameters` ("q.", "gate.3.", ""). If the output layer shares the embedding table, "head" changes
            only the output layer, and "embed" only the lookup.
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
    """Adapter site: a layer's fused matrices, which adapters may change; a part is one of the matrices.

    Attributes:
        number: index among all sites of a model, from 0.
        columns: K.
        parts: (expert or 0, first row, end row) of each part, by the prefix of its parameters' names. The rows are
            counted in the fused matrix; with experts, in the fused matrix of the expert.
        experts: number of experts; 0 for a layer without experts.
        lookup: whether the matrix is an embedding table, of which rows are looked up.
    """

    number: int
    columns: int
    parts: Mapping[str, tuple[int, int, int]]
    experts: int = 0
    lookup: bool = False


Changes: TypeAlias = Mapping[int, tuple[Place, Mapping[str, Delta]]]
"""By number of an adapter site: the site, and the changes of its parts by prefix (`FittedAdapter.deltas`)."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class PackedAdapter:
    """An adapter that is ready for steps of one backend.

    Attributes:
        digest, alora, rank, norm: as in `FittedAdapter`; adapters of a step are added in the order of `digest`.
        modules: number of matrices that the adapter changes.
        nbytes: size in memory.
        serial: packing number, unique in the process.
        apart: whether it needs the model's own products separately, without other terms (DoRA, `full`, `rows`).
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
