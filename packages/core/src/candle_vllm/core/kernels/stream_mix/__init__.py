# SPDX-License-Identifier: MIT
"""Mix the residual streams of a token, by weights that depend on the token (AltUp).

Contract: x [T, N * E] of any float dtype has N streams in adjacent columns, table [1 + S, M, N] is fp32, gates [T, S]
are of any float dtype or left out (S = 0). y [T, M * E] has x's dtype, in new memory; stream m of token t is

    scale * sum over n of c[m, n] x[t, n],   c = table[0] + sum over s of tanh(gates[t, s]) * table[1 + s]

with scale [E] fp32, or 1. With `level`, all other streams are first scaled to the root mean square of the first one:
stream n is multiplied by rms(x[t, 0]) / sqrt(max(mean(x[t, n]^2), LEAST)). The arithmetic is fp32 or better. In
recorded steps E is a multiple of 16.
Source: Baykal et al., 2023, arXiv:2301.13310; Gemma 3n for `level`.
"""

from __future__ import annotations

from typing import NamedTuple

from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber
from candle_vllm.core.kernels.recorded import Recorded, Value

LEAST = 1e-5
"""Lower bound of the mean square of a stream in `level`."""


def mix_streams(
    x: Value, table: Value, gates: Value | None = None, scale: Value | None = None, *, level: bool
) -> Value:
    """Return y; on a GPU torch's own kernels compute it, without synchronisation."""
    if isinstance(x, Recorded):
        return x.mixed(table, gates, scale, level=level)
    import torch

    streams = x.float().unflatten(1, (table.shape[2], -1))  # [T, N, E]
    if level:
        squares = streams.square().mean(-1, keepdim=True)
        levelled = streams * squares[:, :1].sqrt() * squares.clamp(min=LEAST).rsqrt()
        streams = torch.cat([streams[:, :1], levelled[:, 1:]], 1)
    weights = table[0].expand(len(x), -1, -1)
    if gates is not None:
        weights = weights + (gates.float().tanh() @ table[1:].flatten(1)).unflatten(1, table.shape[1:])
    y = (weights[..., None] * streams[:, None]).sum(2)  # [T, M, E]
    return (y if scale is None else y * scale).flatten(1).to(x.dtype)


class MixArguments(NamedTuple):
    """Arguments of the operation.

    Attributes:
        x: address of float32 rows, `stride` floats apart, of `streams` times `columns` elements.
        table, made: address of the table, and M.
        gates, gate_stride, gate_count: address of the gates' float32 rows, row stride in floats, and S.
        scale, level: address of the scale, 0 for 1; whether streams are levelled.
        out, out_stride: address and row stride of the result.
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
