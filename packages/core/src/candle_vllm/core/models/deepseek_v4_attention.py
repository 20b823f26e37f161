# SPDX-License-Identifier: MIT
"""Attention of DeepSeek V4: a window, compressed entries, an index of them, and an output projection in groups.

A token has one vector that is key and value for all heads (`kernels/compressed_attention`). As values are rotated, too,
the result is rotated back by the query's position. Source: DeepSeek-AI, 2026, DeepSeek-V4; transformers'
`DeepseekV4Attention`. Shapes: T tokens, E hidden, H heads of D elements, Hi index heads of Di elements.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from candle_vllm.core.kernels.attention.rows import DeviceRows, PagedCache, WindowedCache
from candle_vllm.core.kernels.compressed_attention import EntryParts, Groups, IndexQueries
from candle_vllm.core.kernels.recorded import Recorded, Value
from candle_vllm.core.kernels.side_by_side import side_by_side
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement, TensorParameter
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.weights import Parameter
from candle_vllm.core.models.deepseek_v4_config import DeepseekV4Config


class Compressor:
    """Turns groups of tokens into entries; its parameter "bias" is [ratio, W], see `kernels/compressed_attention`."""

    def __init__(self, groups: Groups, config: DeepseekV4Config, placement: Placement) -> None:
        self.groups = groups
        self.inputs = Linear(config.hidden_size, {"kv": groups.width, "gate": groups.width}, placement)
        self.norm = RMSNorm(groups.size, config.norm_eps, placement)
        self.bias = placement.empty(groups.ratio, groups.width)

    def parameters(self) -> Mapping[str, Parameter]:
        """Return every parameter that must be loaded."""
        return {"bias": TensorParameter(self.bias)}


class Index(Compressor):
    """Scores entries by compressed keys of their own."""

    def __init__(self, groups: Groups, config: DeepseekV4Config, placement: Placement) -> None:
        super().__init__(groups, config, placement)
        self.top, self.heads = config.index_top, config.index.heads
        self.queries = Linear(config.q_rank, self.heads * groups.size, placement)
        self.weights = Linear(config.hidden_size, self.heads, placement)


class Attention:
    """Attention of one layer: x [T, E] -> [T, E]. Its parameter "sinks" is [H]."""

    def __init__(self, config: DeepseekV4Config, layer: int, rotary: Rotary, placement: Placement) -> None:
        self.layer, self.log, self.window = layer, config.num_layers + layer, config.window
        self.head_dim, self.rotary = config.head_dim, rotary
        size, heads, groups = config.head_dim, config.num_heads, config.groups_of(layer)
        self.widths = (config.q_rank, size)
        self.down = Linear(config.hidden_size, dict(zip(("q", "kv"), self.widths, strict=True)), placement)
        self.q_norm, self.kv_norm = (RMSNorm(width, config.norm_eps, placement) for width in self.widths)
        self.q_up = Linear(config.q_rank, heads * size, placement)
        self.head_norm = RMSNorm(size, config.norm_eps, placement, weighted=False)
        self.compressor = None if groups is None else Compressor(groups, config, placement)
        keys = config.index_groups(layer)
        self.index = None if keys is None else Index(keys, config, placement)
        self.parts = [heads * size // config.output_groups] * config.output_groups
        self.output_down = [Linear(part, config.output_rank, placement) for part in self.parts]
        self.output = Linear(config.output_groups * config.output_rank, config.hidden_size, placement)
        self.sinks = placement.empty(heads)

    def __call__(self, x: Value, step: StepInput) -> Value:
        q, kv = self.down(x).split(self.widths, -1)
        low = self.q_norm(q)
        q, kv = (part.unflatten(-1, (-1, self.head_dim)) for part in (self.q_up(low), kv))
        cache, logs = step.caches[self.layer], step.caches[self.log]
        made = self._made(q, step, cache, logs)
        q = made.turned(self.head_norm(q))
        made.write([made.turned(self.kv_norm(kv))], cache.keys)
        both = [each for each in (self.compressor, self.index) if each is not None]
        if both:
            made.write([each.inputs(x) for each in both], cache.values)
        column, index = 0, None
        for each, log in zip(both, logs):
            made.compress(column, log, each.groups, EntryParts(each.bias, each.norm.weight, each.norm.eps))
            column += 2 * each.groups.width
        if self.index is not None:
            keys, weights = self.index.groups, self.index.weights(x)
            own = made.turned(self.index.queries(low).unflatten(-1, (-1, keys.size)))
            index = IndexQueries(own, weights, logs.values, keys, self.index.top)
        mixed = made.attend(q, self.sinks, self.window, self.head_dim**-0.5, both[0].groups if both else None, index)
        parts = mixed.flatten(1).split(self.parts, -1)
        return self.output(side_by_side(*(down(part) for down, part in zip(self.output_down, parts, strict=True))))

    def _made(self, q: Value, step: StepInput, cache: PagedCache, logs: PagedCache) -> Any:
        """Return the operations of the layer, recorded or in torch."""
        if isinstance(q, Recorded):
            from candle_vllm.core.kernels.compressed_attention.cpu_record import RecordedStep

            recorded: Any = q
            return RecordedStep(recorded.recorder, self.rotary.tables, cache, logs)
        from candle_vllm.core.kernels.compressed_attention.reference import TorchStep

        slots, rows = step.windowed[cache.pool] if isinstance(cache, WindowedCache) else (step.slots, step.rows)
        both = (each.on_host() if isinstance(each, DeviceRows) else each for each in (rows, step.rows))
        return TorchStep(step.positions, self.rotary.tables, cache, logs, slots, *both)

    def parameters(self) -> Mapping[str, Parameter]:
        """Return every parameter that must be loaded."""
        return {"sinks": TensorParameter(self.sinks)}
