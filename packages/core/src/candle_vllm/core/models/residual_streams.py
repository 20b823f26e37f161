# SPDX-License-Identifier: MIT
"""Hyper-connections: layers with several residual streams, which each sublayer reads, writes and mixes by token.

Streams are adjacent columns, x [T, N * E]. A block has a `HyperConnection` for each sublayer:

    read, weights = connection(x);  x = connection.write(x, sublayer(norm(read)), weights)

The mixing matrices are doubly stochastic (Sinkhorn and Knopp), so that the sum of the streams stays bounded.
Source: Xie et al., 2025, arXiv:2512.24880 (mHC); transformers' `DeepseekV4HyperConnection` and `DeepseekV4HyperHead`.
Shapes: T tokens, N streams, E hidden.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from candle_vllm.core.kernels.plain_linear import PlainKind
from candle_vllm.core.kernels.recorded import Recorded, Value
from candle_vllm.core.kernels.side_by_side import side_by_side
from candle_vllm.core.kernels.stream_mix import mix_streams, stream_weights
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement, TensorParameter, on_host
from candle_vllm.core.loading.weights import Parameter

MOST_STREAMS = 16


@dataclasses.dataclass(frozen=True)
class Streams:
    """Sizes and constants of hyper-connections.

    Attributes:
        count, size: N, at most `MOST_STREAMS`, and E.
        rounds: iterations of the Sinkhorn projection.
        eps: epsilon of the projection.
        norm_eps: epsilon of the norm of all streams together.
    """

    count: int
    size: int
    rounds: int
    eps: float
    norm_eps: float


class StreamScores:
    """Weights of the streams from all streams: x [T, N * E] -> [T, W], see `kernels/stream_mix`.

    Parameters: "base" [W] and "scale", an element for each kind of weight; of the layer `fn`, "weight" [W, N * E].
    """

    def __init__(self, streams: Streams, placement: Placement, *, read_only: bool) -> None:
        exact = dataclasses.replace(placement, dtype="F32", plain_kind=PlainKind.F32, keeps_quantised=False)
        count, self.streams = streams.count, streams
        self._kinds = [count] if read_only else [count, count, count**2]
        self.norm = RMSNorm(count * streams.size, streams.norm_eps, exact, weighted=False)
        self.fn = Linear(count * streams.size, sum(self._kinds), exact, kept=False)
        self._base, self._scale = placement.empty(sum(self._kinds)), placement.empty(len(self._kinds))
        self._constant = placement.constant

    def weights(self, x: Value) -> Value:
        """Return the weights of x, fp32."""
        streams, scores = self.streams, self.fn(self.norm(x if isinstance(x, Recorded) else x.float()))
        rounds = {"rounds": streams.rounds, "eps": streams.eps}
        return stream_weights(scores, self._scales, self._base, streams.count, **rounds)

    def finish(self) -> None:
        """See `Finishes`."""
        self._scales = self._constant(np.repeat(on_host(self._scale), self._kinds))

    def parameters(self) -> Mapping[str, Parameter]:
        """Return every parameter that must be loaded."""
        return {"base": TensorParameter(self._base), "scale": TensorParameter(self._scale)}


class HyperConnection(StreamScores):
    """Connection of one sublayer to the streams."""

    def __init__(self, streams: Streams, placement: Placement) -> None:
        super().__init__(streams, placement, read_only=False)

    def __call__(self, x: Value) -> tuple[Value, Value]:
        """Return the sublayer's input [T, E] from x [T, N * E], and the weights for `write` [T, N, N + 1]."""
        count = self.streams.count
        read, written = self.weights(x).split((count, count * (count + 1)), -1)
        return mix_streams(x, read.unflatten(-1, (-1, count)), level=False), written.unflatten(-1, (-1, count + 1))

    def write(self, x: Value, result: Value, weights: Value) -> Value:
        """Return the streams [T, N * E] after the sublayer's result [T, E]; a result of the wanted rows narrows x."""
        return mix_streams(side_by_side(x, result), weights, level=False)


class StreamHead(StreamScores):
    """The streams as one: x [T, N * E] -> [T, E], weighted by token as in DeepSeek V4."""

    def __init__(self, streams: Streams, placement: Placement) -> None:
        super().__init__(streams, placement, read_only=True)

    def __call__(self, x: Value) -> Value:
        return mix_streams(x, self.weights(x).unflatten(-1, (-1, self.streams.count)), level=False)


class StreamCopies:
    """The first streams, copies of x [T, E] -> [T, N * E], and the mean of streams [T, N * E] -> [T, E]."""

    def __init__(self, count: int, placement: Placement) -> None:
        self._ones = placement.constant(np.ones((1, count, 1), np.float32))
        self._mean = placement.constant(np.full((1, 1, count), 1 / count, np.float32))

    def __call__(self, x: Value) -> Value:
        return mix_streams(side_by_side(x), self._ones, level=False)

    def mean(self, x: Value) -> Value:
        """Return the mean of the streams, as at the end of GLM-5.3-Flash."""
        return mix_streams(x, self._mean, level=False)
