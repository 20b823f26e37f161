# SPDX-License-Identifier: MIT
"""Residual streams of a token, mixed by weights that the token itself decides (AltUp).

Contract: x [T, N * E] of any float dtype holds N streams side by side, table [1 + S, M, N] is fp32, gates [T, S] are of
any float dtype or left out (S = 0). y [T, M * E] in x's dtype, in new memory, has as stream m of token t

    scale * sum over n of c[m, n] x[t, n],   c = table[0] + sum over s of tanh(gates[t, s]) * table[1 + s]

with scale [E] fp32, or 1. With `level`, streams behind the first are brought to its root mean square before that:
stream n is multiplied by rms(x[t, 0]) / sqrt(max(mean(x[t, n]^2), LEAST)). The arithmetic is fp32. In recorded steps E
is a multiple of 16.
Source: Baykal et al., 2023, arXiv:2301.13310; Gemma 3n for `level`.
"""

from __future__ import annotations

from typing import NamedTuple

from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, operation
from candle_vllm.core.kernels.recorded import Recorded, Value

LEAST = 1e-5
"""Of the mean square of a stream that is brought to another's."""


def mix_streams(
    x: Value, table: Value, gates: Value | None = None, scale: Value | None = None, *, level: bool
) -> Value:
    """y; on a GPU by torch's own kernels, without synchronisation."""
    if isinstance(x, Recorded):
        return x.mixed(table, gates, scale, level=level)
    from candle_vllm.core.kernels.stream_mix import reference

    return reference.mix_streams(x, table, gates, scale, LEAST if level else None)


class MixArguments(NamedTuple):
    """Arguments of the operation.

    Attributes:
        x: address of float32 rows, `stride` floats apart, of `streams` times `columns` numbers.
        table, made: its address, and M.
        gates, gate_stride, gate_count: address of float32 rows, floats from one to the next, and S.
        scale: address of the scale; 0 for 1.
        level: whether streams are brought to the first one's root mean square.
        out, out_stride: the result.
        rows_from: the `StepNumber` that is T.
    """

    x: int
    stride: int
    streams: int
    columns: int
    table: int
    made: int
    gates: int
    gate_stride: int
    gate_count: int
    scale: int
    level: int
    out: int
    out_stride: int
    rows_from: int = StepNumber.TOKENS


def mix_operation() -> int:
    """Return the address of the compiled operation."""
    return operation("stream_mix.cpu:mix")
