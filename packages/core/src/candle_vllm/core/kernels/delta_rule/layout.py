# SPDX-License-Identifier: MIT
"""Sizes of the gated delta rule, parameters of its gates, and arguments of its compiled operations."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

COLUMNS = 16
"""Columns in a tile of a state."""
EPS = 1e-6
"""Epsilon of the norms of q and k."""


class DeltaGates(NamedTuple):
    """Parameters of a layer's decays and strengths, and its skip.

    Attributes:
        decay: fp32, below 0: -exp(A_log), as GGUF files store it. [Hv]; or [Hv * Dk], one for each row of S; or, for
            Mamba 1, one for each element of S, in the state's layout.
        bias: dt_bias, fp32, in the shape of a token's `a`.
        strength: maximum strength of a correction: 1, or 2 if a state may have negative eigenvalues.
        skip: fp32, D of Mamba 2 [Hv] or of Mamba 1 [Hv * Dv]; None for the delta rule.
        least: lower bound of the logs of decays for each row of S, below 0; 0 without a bound.
    """

    decay: Any
    bias: Any
    strength: float = 1.0
    skip: Any = None
    least: float = 0.0


def state_shape(value_heads: int, key_dim: int, value_dim: int) -> tuple[int, int, int, int]:
    """Return the shape of a sequence's state."""
    return value_heads, -(-value_dim // COLUMNS), key_dim, COLUMNS


def kept_inputs(key_heads: int, value_heads: int, key_dim: int, value_dim: int, *, gates: int = 2) -> int:
    """Return the number of elements of a kept row.

    `gates` counts the decays and strengths of a value head: 2; with a decay for each row of S, Dk + 1; in Mamba 1, Dv.
    """
    return key_heads * key_dim + value_heads * (value_dim + gates)


def gate_sizes(gates: DeltaGates, heads: int) -> tuple[int, int]:
    """Return the numbers of decays and of strengths in a kept row; in Mamba 1, `a` counts as strengths."""
    count = math.prod(gates.bias.shape)
    return (0, count) if len(gates.decay.shape) > 1 else (count, heads)


class DeltaArguments(NamedTuple):
    """Arguments of the three operations; `Recorder.state_arguments` returns the fields from `states` on.

    Attributes:
        q, q_stride, k, k_stride: addresses of float32 rows of key heads, and their row strides in floats.
        v, v_stride: the same for rows of value heads.
        a, a_stride, b, b_stride: the same for rows of a, and of b.
        decay, bias: addresses of float32 [decays] each; for Mamba 1, decay in the state's layout, bias [strengths].
        strength: maximum strength of a correction.
        least: lower bound of the logs of decays, or 0.
        skip: address of float32 [Hv], for Mamba 1 [Hv * Dv]; 0 for the delta rule.
        normed: 1 if q and k are normed, else 0.
        scale: factor of q.
        key_heads, heads, key_dim, value_dim: Hk, Hv, Dk and Dv.
        decays, strengths: see `gate_sizes`.
        gates, gates_stride: address and row stride of float32 [maximum tokens, decays + strengths], which `prepare`
            writes; for Mamba 1, address and row stride of a.
        out, out_stride: address and row stride of the result, in the shape of v.
    """

    q: int
    q_stride: int
    k: int
    k_stride: int
    v: int
    v_stride: int
    a: int
    a_stride: int
    b: int
    b_stride: int
    decay: int
    bias: int
    strength: float
    least: float
    skip: int
    normed: int
    scale: float
    key_heads: int
    heads: int
    key_dim: int
    value_dim: int
    decays: int
    strengths: int
    gates: int
    gates_stride: int
    out: int
    out_stride: int
    states: int
    slot_bytes: int
    kept: int
    kept_bytes: int
    kept_row_bytes: int
    query_start: int
    slots: int
    sources: int
    replays: int
    stores: int
    keeps: int
