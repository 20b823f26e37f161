"""Adapters (LoRA): what one does to the matrices of a model; step 6 of a request's life.

A `Delta` changes one matrix W [N, K] of a `Linear`, whose result for a row x of the input that has this adapter is

    y = c * (x W^T + s (x A^T) B^T) + bias of W + own bias                                  c is 1 but for DoRA

with x as the layer was given it, unquantised. Of an embedding table a token's row is c * (W + s B A)[id].
Source: LoRA (arXiv 2106.09685), DoRA (arXiv 2402.09353).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.quantization.tensors import StoredTensor


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
    """

    digest: bytes
    alora: tuple[int, ...] | None
    deltas: Mapping[str, Mapping[str, Delta]]
    rank: int
    nbytes: int
    norm: float
