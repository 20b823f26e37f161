# SPDX-License-Identifier: MIT
"""Attention of MiniMax M3 to blocks of keys that an index chooses, other blocks for each key-value head.

`kernels/attention/cpu_choice.py` describes the index, its cache and the choice, and computes it in recorded steps,
`minimax_m3_choice.py` op by op.
Source: transformers' `MiniMaxM3VLIndexer`.
Shapes: T tokens, E hidden, H heads, K key-value heads, D head size, Di size of an index head, B blocks of S slots.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from candle_vllm.core.kernels.attention.cpu_cache import HEADER
from candle_vllm.core.kernels.attention.cpu_record import ChoiceArguments
from candle_vllm.core.kernels.cpu_runtime.operation import address_of, operation
from candle_vllm.core.kernels.recorded import Recorded, Value
from candle_vllm.core.kernels.whole_attention.cpu_record import WholeHeads, record_turn
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.config import LatentSizes
from candle_vllm.core.loading.weights import Parameter
from candle_vllm.core.models import llama
from candle_vllm.core.models.minimax_m3_choice import choose


class BlockIndex:
    """Queries for each key-value head, and keys, by which blocks are chosen."""

    def __init__(self, config: Any, layer: int, rotary: Rotary, placement: Placement) -> None:
        index: LatentSizes = config.index
        self.cache, self.size, self.blocks, self.rotary = config.num_layers + layer, index.nope, config.blocks, rotary
        self.heads = config.heads(layer)[1]
        shards = {"q": self.heads * self.size, "k": self.size}
        self.inputs = Linear(config.hidden_size, shards, placement)
        self.q_norm, self.k_norm = (RMSNorm(self.size, config.norm_eps, placement) for _ in range(2))

    def __call__(self, x: Value, step: StepInput) -> tuple[ChoiceArguments | None, Any]:
        """Write the keys of x [T, E] to the cache, and choose blocks.

        Return the recorded choice, and the memory of its result, which must be kept until attention is recorded. Op by
        op return None, and a function that computes attention to the blocks, or None for attention to all.
        """
        row = self.inputs(x)
        q, key = (
            part.unflatten(-1, (-1, self.size)) for part in row.split((self.heads * self.size, self.size), dim=-1)
        )
        q, key = self.q_norm(q), self.k_norm(key)  # [T, K, Di] and [T, 1, Di]
        cache = step.caches[self.cache].keys
        if isinstance(q, Recorded):
            return self._record(q, cache)
        q, key = self.rotary(q, key, step.positions)
        there = step.slots >= 0
        cache.flatten(0, 1)[step.slots[there].long()] = key[there].to(cache.dtype)
        return None, choose(q, cache, step.rows, step.attend, self.blocks)

    def _record(self, q: Any, cache: Any) -> tuple[ChoiceArguments, Any]:
        recorder, blocks, heads, size = q.recorder, self.blocks, self.heads, self.size
        arrays, limits = recorder.arrays, recorder.limits
        whole = -(-limits.table_width * limits.block_size // blocks.size)
        count = min(blocks.top, whole) * (blocks.size // limits.block_size)
        made = tables, contexts = recorder.memory(heads * count, np.int64), recorder.memory(1, np.int64)
        index = WholeHeads(q.address, q.buffer.stride, heads, 1, size)
        record_turn(recorder, index, arrays.positions, self.rotary.tables, arrays.turns)
        row = ChoiceArguments(
            index=index.address,
            stride=index.stride,
            heads=heads,
            size=size,
            positions=address_of(arrays.positions),
            slots=address_of(arrays.slots),
            cache=address_of(cache),
            query_start=address_of(arrays.query_start),
            block_tables=address_of(arrays.block_tables),
            table_stride=limits.table_width,
            block_shift=limits.block_shift,
            shift=blocks.size.bit_length() - 1,
            top=blocks.top,
            local=blocks.local,
            scores=HEADER + recorder.scratch(HEADER + 4 * limits.tokens * heads * whole),
            blocks=whole,
            tables=address_of(tables),
            contexts=address_of(contexts),
            count=count,
        )
        recorder.add(operation("attention.cpu_choice:write_keys"), row)
        if whole > blocks.top:
            recorder.add(operation("attention.cpu_choice:make_score", recorder.isa), row)
        recorder.add(operation("attention.cpu_choice:choose"), row)
        return row, made


class Attention(llama.Attention):
    """Attention of Llama, in some layers to chosen blocks: x [T, E] -> [T, E]."""

    def __init__(self, config: Any, layer: int, rotary: Rotary, placement: Placement) -> None:
        super().__init__(config, layer, rotary, placement)
        self.index = BlockIndex(config, layer, rotary, placement) if layer in config.index_layers else None

    def __call__(self, x: Value, step: StepInput) -> Value:
        chosen, made = (None, None) if self.index is None else self.index(x, step)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv(x).split(self.sizes, dim=-1))
        if chosen is None and made is not None:
            step = dataclasses.replace(step, attend=made)
        return self.output(self.attend(q, k, v, step, chosen=chosen).flatten(1))

    def parameters(self) -> Mapping[str, Parameter]:
        """Return no parameters: the parts have them all."""
        return {}
