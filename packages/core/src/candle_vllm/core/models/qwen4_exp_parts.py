# SPDX-License-Identifier: MIT
"""Gated residual streams of Qwen4's layers.

A sublayer reads the mean of N streams x, normalised and gated for each element by a low-rank product; its result is
added to each stream with the factor 2 sigmoid of a score. Source: transformers' `Qwen4ExpTextGatedResidual`.
Shapes: T tokens, N streams, E hidden.
"""

from __future__ import annotations

import numpy as np

from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.side_by_side import side_by_side
from candle_vllm.core.kernels.silu_mul import gated
from candle_vllm.core.kernels.stream_mix import mix_streams
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.models.llama import times
from candle_vllm.core.models.ngram_layer import StreamNorms
from candle_vllm.core.models.qwen4_exp_config import Qwen4ExpConfig


class GatedResidual:
    """Connection of one sublayer to the streams x [T, N * E]; without `writes`, the last norm's input.

    The norm's result is divided by N, by which the definition divides the mean and the inputs of both gates.
    """

    def __init__(self, config: Qwen4ExpConfig, placement: Placement, *, writes: bool = True) -> None:
        count, size, rank = config.streams, config.hidden_size, config.mix_rank
        self.norm = StreamNorms(count, size, config.norm_eps, placement, divisor=count)
        self.down, self.up = Linear(count * size, rank, placement), Linear(rank, count * size, placement)
        self.inject = Linear(count * size, count, placement) if writes else None
        self._sum = placement.constant(np.ones((1, 1, count), np.float32))
        table = np.zeros((1 + count, count, count + 1), np.float32)  # 2 sigmoid(z) is 1 + tanh(z / 2)
        table[0, :, :count], table[0, :, count] = np.eye(count), 1
        table[1:, :, count] = np.eye(count)
        self._table = placement.constant(table)

    def __call__(self, x: Value) -> tuple[Value, Value | None]:
        """Return the sublayer's input [T, E], and the gates [T, N] for `write`."""
        normed = self.norm(x)
        gates = None if self.inject is None else times(self.inject(normed), 0.5)
        low = side_by_side(self.down(normed))
        low = gated(side_by_side(low), low, "sigmoid")
        return mix_streams(gated(normed, self.up(low), "sigmoid"), self._sum, level=False), gates

    def write(self, x: Value, result: Value, gates: Value | None) -> Value:
        """Return the streams after the sublayer's result [T, E]."""
        return mix_streams(side_by_side(x, result), self._table, gates, level=False)
