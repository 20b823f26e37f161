# SPDX-License-Identifier: MIT
"""Mix the residual streams of a token, by weights that depend on the token (AltUp, hyper-connections).

Contract of `mix_streams`: x [T, N * E] of any float dtype has N streams in adjacent columns, table [1 + S, M, N] is
fp32, gates [T, S] are of any float dtype or left out (S = 0). y [T, M * E] has x's dtype, in new memory; stream m of
token t is

    scale * sum over n of c[m, n] x[t, n],   c = table[0] + sum over s of tanh(gates[t, s]) * table[1 + s]

with scale [E] fp32, or 1. Without gates, table may be [T, M, N], a table of each token. With `level`, all other streams
are first scaled to the root mean square of the first one: stream n is multiplied by rms(x[t, 0]) / sqrt(max(mean(x[t,
n]^2), LEAST)). The arithmetic is fp32 or better. In recorded steps E is a multiple of 16.

Contract of `stream_weights`, the tables of manifold-constrained hyper-connections of N streams: logits [T, W] are
scores, W = N * (N + 2), of any float dtype, scale and base [W] are fp32, all in the order pre [N], post [N], comb
[N, N]. With z = scale * logits + base the result [T, W] fp32, in new memory, is

    pre[n] = sigmoid(z) + eps, followed for each stream m by comb[0, m] .. comb[N - 1, m], post[m] = 2 sigmoid(z)

where comb is softmax(z) over its last index plus eps, then divided by its sums over the first index plus eps, and
`rounds` - 1 times by its sums over the last index plus eps and over the first index plus eps (Sinkhorn and Knopp). If W
is N, the result is pre alone. The arithmetic is fp32 or better.
Source: Baykal et al., 2023, arXiv:2301.13310; Gemma 3n for `level`; Xie et al., 2025, arXiv:2512.24880, and
transformers' `DeepseekV4HyperConnection` for `stream_weights`.
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
    weights = table.expand(len(x), -1, -1) if gates is None else table[0].expand(len(x), -1, -1)
    if gates is not None:
        weights = weights + (gates.float().tanh() @ table[1:].flatten(1)).unflatten(1, table.shape[1:])
    y = (weights[..., None] * streams[:, None]).sum(2)  # [T, M, E]
    return (y if scale is None else y * scale).flatten(1).to(x.dtype)


def stream_weights(logits: Value, scale: Value, base: Value, streams: int, *, rounds: int, eps: float) -> Value:
    """Return pre, and comb and post of each stream; on a GPU torch's own kernels compute it."""
    if isinstance(logits, Recorded):
        return logits.stream_weights(scale, base, streams, rounds=rounds, eps=eps)
    import torch

    z = logits.float() * scale + base
    pre = z[:, :streams].sigmoid() + eps
    if z.shape[1] == streams:
        return pre
    post, comb = z[:, streams : 2 * streams].sigmoid() * 2, z[:, 2 * streams :].unflatten(1, (streams, streams))
    comb = comb.softmax(-1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(rounds - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    return torch.cat([pre, torch.cat([comb.transpose(1, 2), post[..., None]], -1).flatten(1)], 1)


class MixArguments(NamedTuple):
    """Arguments of the operation.

    Attributes:
        x: address of float32 rows, `stride` floats apart, of `streams` times `columns` elements.
        table, made: address of the table, and M.
        gates, gate_stride, gate_count: address of the gates' float32 rows, row stride in floats, and S.
        scale, level: address of the scale, 0 for 1; whether streams are levelled.
        out, out_stride: address and row stride of the result.
        rows_from: the `StepNumber` that is T.
        table_stride: floats from one token's table to the next; 0 for a common table.
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
    table_stride: int = 0


class WeightArguments(NamedTuple):
    """Arguments of the operation of `stream_weights`.

    Attributes:
        x, stride: address of the float32 logits, and row stride in floats.
        columns, streams: W and N.
        scale, base: addresses of float32 [W].
        rounds, eps: arguments of the projection.
        out, out_stride: address and row stride of the result.
        rows_from: the `StepNumber` that is T.
    """

    x: int
    stride: int
    columns: int
    streams: int
    scale: int
    base: int
    rounds: int
    eps: float
    out: int
    out_stride: int
    rows_from: int = StepNumber.TOKENS
