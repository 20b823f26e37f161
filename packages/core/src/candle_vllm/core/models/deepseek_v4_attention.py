# SPDX-License-Identifier: MIT
"""Attention of DeepSeek V4: a window, compressed entries, an index of them, and an output projection in groups.

A token has one vector that is key and value for all heads (`kernels/compressed_attention`). As values are rotated, too,
the result is rotated back by the query's position. Source: DeepSeek-AI, 2026, DeepSeek-V4; transformers'
`DeepseekV4Attention`. Shapes: T tokens, E hidden, H heads of D elements, Hi index heads of Di elements.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from candle_vllm.core.kernels.attention.rows import DeviceRows, WindowedCache
from candle_vllm.core.kernels.compressed_attention import CompressedLayer, EntryParts, Groups, IndexQueries
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

    def __init__(self, groups: Groups, config: DeepseekV4Config, rotary: Rotary, placement: Placement) -> None:
        self.groups, self.rotary = groups, rotary
        self.inputs = Linear(config.hidden_size, {"kv": groups.width, "gate": groups.width}, placement)
        self.norm = RMSNorm(groups.size, config.norm_eps, placement)
        self.bias = placement.empty(groups.ratio, groups.width)

    @property
    def parts(self) -> EntryParts:
        """The weights for `compress`."""
        return EntryParts(self.bias, self.norm.weight, self.norm.eps, *self.rotary.tables)

    def parameters(self) -> Mapping[str, Parameter]:
        """Return every parameter that must be loaded."""
        return {"bias": TensorParameter(self.bias)}


class Index(Compressor):
    """Scores entries by compressed keys of their own."""

    def __init__(self, groups: Groups, config: DeepseekV4Config, rotary: Rotary, placement: Placement) -> None:
        super().__init__(groups, config, rotary, placement)
        self.top, self.heads = config.index_top, config.index_heads
        self.queries = Linear(config.q_rank, self.heads * groups.size, placement)
        self.weights = Linear(config.hidden_size, self.heads, placement)


class Attention:
    """Attention of one layer: x [T, E] -> [T, E]. Its parameter "sinks" is [H]."""

    def __init__(self, config: DeepseekV4Config, layer: int, rotary: Rotary, placement: Placement) -> None:
        self.layer, self.log, self.window = layer, config.num_layers + layer, config.window
        self.heads, self.head_dim, self.rotary = config.num_heads, config.head_dim, rotary
        size, heads, groups = config.head_dim, config.num_heads, config.groups_of(layer)
        self.widths = (config.q_rank, size)
        self.down = Linear(config.hidden_size, dict(zip(("q", "kv"), self.widths, strict=True)), placement)
        self.q_norm, self.kv_norm = (RMSNorm(width, config.norm_eps, placement) for width in self.widths)
        self.q_up = Linear(config.q_rank, heads * size, placement)
        self.head_norm = RMSNorm(size, config.norm_eps, placement, weighted=False)
        self.compressor = None if groups is None else Compressor(groups, config, rotary, placement)
        keys = config.index_groups(layer)
        self.index = None if keys is None else Index(keys, config, rotary, placement)
        self.parts = [heads * size // config.output_groups] * config.output_groups
        self.output_down = [Linear(part, config.output_rank, placement) for part in self.parts]
        self.output = Linear(config.output_groups * config.output_rank, config.hidden_size, placement)
        self.sinks = placement.empty(heads)

    def __call__(self, x: Value, step: StepInput) -> Value:
        q, kv = self.down(x).split(self.widths, -1)
        low = self.q_norm(q)
        q = self.head_norm(self.q_up(low).unflatten(-1, (-1, self.head_dim)))
        mixed = self._recorded(x, q, low, kv, step) if isinstance(q, Recorded) else self._eager(x, q, low, kv, step)
        parts = mixed.split(self.parts, -1)
        return self.output(side_by_side(*(down(part) for down, part in zip(self.output_down, parts, strict=True))))

    def _recorded(self, x: Value, q: Recorded, low: Value, kv: Value, step: StepInput) -> Recorded:
        both = [each for each in (self.compressor, self.index) if each is not None]
        index, norm, caches = self.index, self.kv_norm, (step.caches[self.layer], step.caches[self.log])
        more: dict[str, Any] = {}
        if index is not None:
            more = {"index_heads": index.heads, "index_size": index.groups.size, "top": index.top}
        layer = CompressedLayer(
            *(self.heads, self.head_dim, self.window, self.head_dim**-0.5, norm.weight, norm.eps),
            *(*self.rotary.tables, self.sinks, tuple((each.groups, each.parts) for each in both)),
            **more,
        )
        inputs = [each.inputs(x) for each in both]
        chooser = None if index is None else (index.queries(low), index.weights(x))
        return q.flatten(1).attend_compressed(kv, inputs, chooser, layer, caches)

    def _eager(self, x: Value, q: Value, low: Value, kv: Value, step: StepInput) -> Value:
        from candle_vllm.core.kernels.compressed_attention.reference import attend, turned, write_rows

        cos, sin = (table[step.positions] for table in self.rotary.tables)
        q = turned(q, cos, sin)
        rows = turned(self.kv_norm(kv).unsqueeze(1), cos, sin).squeeze(1)
        cache = step.caches[self.layer]
        slots, places = step.windowed[cache.pool] if isinstance(cache, WindowedCache) else (step.slots, step.rows)
        places, log_rows = (each.on_host() if isinstance(each, DeviceRows) else each for each in (places, step.rows))
        write_rows(rows, cache.keys, slots)
        more: dict[str, Any] = {}
        if self.compressor is not None:
            more = self._compressed(x, low, (cos, sin), step, (slots, places, log_rows))
        mixed = attend(q, cache.keys, places, self.sinks, window=self.window, scale=self.head_dim**-0.5, **more)
        return turned(mixed, cos, -sin).flatten(1)

    def _compressed(
        self, x: Value, low: Value, turns: tuple[Value, Value], step: StepInput, places: tuple[Value, Any, Any]
    ) -> dict[str, Any]:
        """Compress the groups that end in this step; return the arguments of `attend` for the entries."""
        from candle_vllm.core.kernels.compressed_attention.reference import compress, turned, write_rows

        cache, logs, (slots, rows, log_rows) = step.caches[self.layer], step.caches[self.log], places
        compressor, index, inputs = self.compressor, self.index, cache.values
        assert compressor is not None
        given = [each.inputs(x) for each in (compressor, index) if each is not None]
        write_rows(side_by_side(*given), inputs, slots)
        compress(inputs, 0, rows, logs.keys, log_rows, compressor.groups, compressor.parts)
        more = {"log": logs.keys, "log_rows": log_rows, "groups": compressor.groups}
        if index is None:
            return more
        first = 2 * compressor.groups.width
        compress(inputs, first, rows, logs.values, log_rows, index.groups, index.parts)
        q = turned(index.queries(low).unflatten(-1, (-1, index.groups.size)), *turns)
        return more | {"index": IndexQueries(q, index.weights(x), logs.values, index.groups.size, index.top)}

    def parameters(self) -> Mapping[str, Parameter]:
        """Return every parameter that must be loaded."""
        return {"sinks": TensorParameter(self.sinks)}
