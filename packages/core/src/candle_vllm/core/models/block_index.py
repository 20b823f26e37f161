# SPDX-License-Identifier: MIT
"""Attention of Qwen3.5 to blocks of positions that an indexer chooses by pooled keys (QSA of Qwen4).

`kernels/compressed_attention` describes the cache of the indexer and its pooled keys.
Source: transformers' `Qwen4ExpTextQSAIndexer`.
Shapes: T tokens, E hidden, H heads of D elements, K key-value heads, Hi index heads of Di elements, R rotated elements.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from candle_vllm.core.kernels.compressed_attention import EntryParts, Groups, IndexQueries
from candle_vllm.core.kernels.latent_attention import latent_write
from candle_vllm.core.kernels.recorded import Recorded, Value
from candle_vllm.core.kernels.side_by_side import side_by_side
from candle_vllm.core.kernels.silu_mul import gated
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.models import qwen3_next
from candle_vllm.core.models.qwen4_exp_config import Qwen4ExpConfig


class BlockIndex:
    """Queries and keys by which blocks of positions are chosen."""

    def __init__(self, config: Qwen4ExpConfig, layer: int, rotary: Rotary, placement: Placement) -> None:
        assert config.index is not None
        self.cache, self.heads, self.size = config.num_layers + layer, config.index.heads, config.index.nope
        self.rotary, self.top, self.pool = rotary, config.index_top, config.index_pool
        self.groups = Groups(self.pool, self.size, gated=False)
        self.inputs = Linear(config.hidden_size, {"q": self.heads * self.size, "k": self.size}, placement)
        self.q_norm, self.k_norm = (RMSNorm(self.size, config.norm_eps, placement) for _ in range(2))

    def __call__(self, x: Value) -> tuple[Value, Value]:
        """Return normalised queries [T, Hi, Di], and keys [T, Di] of x [T, E]."""
        q, key = self.inputs(x).split((self.heads * self.size, self.size), -1)
        return self.q_norm(q.unflatten(-1, (-1, self.size))), key

    def choose(self, x: Value, step: StepInput) -> Any:
        """Write the step's keys; return the chosen positions [T, top], or None for all."""
        from candle_vllm.core.kernels.latent_attention.reference import choose

        (q, key), cache, pool, slots = self(x), step.caches[self.cache].keys, self.pool, step.slots
        turns = [table[step.positions].to(key.dtype) for table in self.rotary.tables]
        latent_write(key[:, :0], side_by_side(key, *turns), cache, slots)
        flat, half = cache.flatten(0, 2), turns[0].shape[1]
        ends = slots[(slots >= 0) & (slots % pool == pool - 1)].long()
        rows = flat[ends[:, None] - ends.new_tensor(range(pool - 1, -1, -1))]  # [N, pool, Di + R]
        mean = self.k_norm(rows[..., : self.size].float().mean(1).to(key.dtype))
        first, second, rest = mean.split((half, half, self.size - 2 * half), 1)
        cos, sin = rows[:, 0, self.size :].split(half, 1)
        pooled = side_by_side(first * cos - second * sin, second * cos + first * sin, rest)
        flat[ends, : self.size] = pooled.to(cache.dtype)
        q = self.rotary.queries(q, step.positions)
        return choose(q, q.new_ones(q.shape[:2]), cache, step.rows, self.top, pool)


class Attention(qwen3_next.Attention):
    """Attention of Qwen3.5 to chosen positions: x [T, E] -> [T, E]."""

    def __init__(self, config: Qwen4ExpConfig, layer: int, rotary: Rotary, placement: Placement) -> None:
        super().__init__(config, layer, rotary, placement)
        self.layer, self.index = layer, BlockIndex(config, layer, rotary, placement)

    def __call__(self, x: Value, step: StepInput) -> Value:
        q, gate, k, v = self.qkv(x).split(tuple(self.shards.values()), dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))  # [T, H, D] and twice [T, K, D]
        if isinstance(q, Recorded):
            return self.output(
                gated(self._record(self.q_norm(q), self.k_norm(k), v, self.index(x), step), gate, "sigmoid")
            )
        chosen = self.index.choose(x, step)
        if chosen is not None:
            step = dataclasses.replace(
                step, attend=functools.partial(_attend_chosen, step.attend, chosen, self.index.pool)
            )
        return self.output(gated(self.attend(q, k, v, step).flatten(1), gate, "sigmoid"))

    def _record(self, q: Any, k: Any, v: Any, index: tuple[Any, Any], step: StepInput) -> Recorded:
        """Record attention of normalised queries and keys, and values; `index` are its queries and keys."""
        from candle_vllm.core.kernels.compressed_attention.cpu_record import RecordedStep

        at, (index_q, key), cache, logs = self.index, index, step.caches[self.layer], step.caches[self.index.cache]
        made, groups = RecordedStep(q.recorder, at.rotary.tables, cache, logs, pairs=False), at.groups
        q, k, index_q = map(made.turned, (q, k, index_q))
        made.write([k], cache.keys)
        made.write([v], cache.values)
        made.write([key], logs.keys, turns=True)
        made.compress(0, logs.keys, groups, EntryParts(None, at.k_norm.weight, at.k_norm.eps))
        chooser = IndexQueries(index_q, None, logs.keys, groups, at.top // at.pool)
        return made.attend(q, None, None, self.attend.scale, groups, chooser).flatten(1)


def _attend_chosen(
    attend: Any, chosen: Any, pool: int, q: Any, keys: Any, values: Any, rows: Any, **scores: Any
) -> Any:
    """Return attention of tokens to chosen positions [T, top], by another function; see `kernels/attention`."""
    from candle_vllm.core.kernels.latent_attention.reference import chosen_rows

    made, both = q.new_empty(q.shape), (chosen_rows(each, rows, chosen, pool) for each in (keys, values))
    for (part, key_copies, own), (_, value_copies, _) in zip(*both, strict=True):
        made[part] = attend(q[part], key_copies, value_copies, own, **scores)
    return made
