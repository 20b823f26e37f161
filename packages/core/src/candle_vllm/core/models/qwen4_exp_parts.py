# SPDX-License-Identifier: MIT
"""Parts of Qwen4's layers: gated residual streams, and attention to blocks that an indexer chooses.

A sublayer reads the mean of N streams x, normalised and gated for each element by a low-rank product; its result is
added to each stream with the factor 2 sigmoid of a score. Queries and keys of attention are those of Qwen3.5.
Source: transformers' `Qwen4ExpTextGatedResidual` and `Qwen4ExpTextQSAIndexer`.
Shapes: T tokens, N streams, E hidden, H heads of D elements, Hi index heads of Di elements.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from candle_vllm.core.kernels.indexed_attention import IndexedLayer
from candle_vllm.core.kernels.recorded import Recorded, Value
from candle_vllm.core.kernels.side_by_side import side_by_side
from candle_vllm.core.kernels.silu_mul import gated
from candle_vllm.core.kernels.stream_mix import mix_streams
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.models import qwen3_next
from candle_vllm.core.models.llama import times
from candle_vllm.core.models.ngram_embeddings import StreamNorms
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


class BlockIndex:
    """Scores blocks of positions; see `kernels/indexed_attention`."""

    def __init__(self, config: Qwen4ExpConfig, layer: int, placement: Placement) -> None:
        assert config.index is not None
        self.cache, self.size = config.num_layers + layer, config.index.nope
        self.widths = (config.index.heads * self.size, self.size)
        self.inputs = Linear(config.hidden_size, sum(self.widths), placement)
        self.q_norm, self.k_norm = (RMSNorm(self.size, config.norm_eps, placement) for _ in range(2))

    def __call__(self, x: Value) -> tuple[Value, Value]:
        """Return normalised queries [T, Hi, Di] and keys [T, Di] of x [T, E]."""
        q, key = self.inputs(x).split(self.widths, -1)
        return self.q_norm(q.unflatten(-1, (-1, self.size))), key


class Attention(qwen3_next.Attention):
    """Attention of Qwen3.5 to chosen positions: x [T, E] -> [T, E]."""

    def __init__(self, config: Qwen4ExpConfig, layer: int, rotary: Rotary, placement: Placement) -> None:
        super().__init__(config, layer, rotary, placement)
        self.layer, self.rotary, self.top, self.pool = layer, rotary, config.index_top, config.index_pool
        self.index = BlockIndex(config, layer, placement)

    def __call__(self, x: Value, step: StepInput) -> Value:
        q, gate, k, v = self.qkv(x).split(tuple(self.shards.values()), dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))  # [T, H, D] and twice [T, K, D]
        index_q, key = self.index(x)
        norm, cache = self.index.k_norm, step.caches[self.index.cache]
        layer = IndexedLayer(self.attend.scale, self.top, self.pool, norm.weight, norm.eps, *self.rotary.tables)
        if isinstance(q, Recorded):
            from candle_vllm.core.kernels.indexed_attention.cpu_record import record_attention

            q, k = self.q_norm(q), self.k_norm(k)
            caches = step.caches[self.layer], cache
            return self.output(gated(record_attention(q, k, v, index_q, key, layer, caches), gate, "sigmoid"))
        from candle_vllm.core.kernels.indexed_attention.reference import attend_chosen, choose_blocks, write_keys

        write_keys(key, layer, cache.keys, step.positions, step.slots)
        chosen = choose_blocks(self.rotary.queries(index_q, step.positions), layer, cache.keys, step.rows)
        if chosen is not None:
            step = dataclasses.replace(step, attend=attend_chosen(step.attend, chosen, self.pool))
        return self.output(gated(self.attend(q, k, v, step).flatten(1), gate, "sigmoid"))
