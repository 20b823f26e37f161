# SPDX-License-Identifier: MIT
"""Sizes of the gated delta rule, what makes its gates, and its compiled operations by their addresses."""

from __future__ import annotations

from typing import Any, NamedTuple

from candle_vllm.core.kernels.cpu_runtime.operation import operation

COLUMNS = 16
"""Of a state's tile."""
EPS = 1e-6
"""Of the norms of q and k."""


class DeltaGates(NamedTuple):
    """What makes the decay and the strength of a value head.

    Attributes:
        decay: [Hv] fp32, below 0: -exp(A_log), as GGUF files have it; or [Hv * Dk], of each channel of a key.
        bias: of the decay's shape, fp32, dt_bias.
        strength: of a correction at most: 1, or 2 where a state may have negative eigenvalues.
        skip: [Hv] fp32, D of Mamba 2, whose states are not corrected; None for the delta rule.
    """

    decay: Any
    bias: Any
    strength: float = 1.0
    skip: Any = None


def state_shape(value_heads: int, key_dim: int, value_dim: int) -> tuple[int, int, int, int]:
    """Of a sequence's state."""
    return value_heads, -(-value_dim // COLUMNS), key_dim, COLUMNS


def kept_inputs(key_heads: int, value_heads: int, key_dim: int, value_dim: int, *, channels: bool = False) -> int:
    """Numbers of a kept row; where `channels` decay by themselves, with a decay of each."""
    return key_heads * key_dim + value_heads * (value_dim + 1 + (key_dim if channels else 1))


class DeltaArguments(NamedTuple):
    """The arguments of the three operations; from `states` on as `Recorder.state_arguments` gives them.

    Attributes:
        q, q_stride: address of float32 rows of key heads, and floats from one to the next.
        k, k_stride: the same.
        v, v_stride: the same of value heads.
        a, a_stride: the same of what makes decays.
        b, b_stride: the same of what makes strengths, a number of each value head.
        decay, bias: addresses of float32 [decays].
        strength: of a correction at most.
        skip: address of float32 [Hv], or 0.
        normed: q and k are.
        scale: of q.
        key_heads, heads, key_dim, value_dim: Hk, Hv, Dk and Dv.
        decays: of a token: Hv, or Hv * Dk.
        gates: address of float32 [most tokens, decays + Hv], between the operations: decays and strengths.
        out, out_stride: as v.
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
    skip: int
    normed: int
    scale: float
    key_heads: int
    heads: int
    key_dim: int
    value_dim: int
    decays: int
    gates: int
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


def prepare_operation() -> int:
    """Address of the operation that makes q, k and gates ready."""
    return operation("delta_rule.cpu:prepare")


def scan_operation(corrects: bool, channels: bool) -> int:
    """Address of the operation that takes tokens in, by the delta rule or by Mamba 2's."""
    return operation("delta_rule.cpu:make_scan", corrects, channels)


def keep_operation() -> int:
    """Address of the operation that writes kept rows."""
    return operation("delta_rule.cpu:keep")
