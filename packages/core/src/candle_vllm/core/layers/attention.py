# SPDX-License-Identifier: MIT
"""Attention over the paged cache, and `StepInput`, the tensors of a step that all layers use."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.kernels.attention import paged_attention
from candle_vllm.core.kernels.attention.rows import AttentionRows, DeviceRows, WindowedCache
from candle_vllm.core.kernels.collectives import Collective
from candle_vllm.core.kernels.recorded import Recorded, Value
from candle_vllm.core.kernels.rms_norm import HeadNorms
from candle_vllm.core.kernels.rotary_write import rotary_write
from candle_vllm.core.kernels.side_by_side import side_by_side
from candle_vllm.core.kernels.states import StateRows
from candle_vllm.core.layers.layer_norm import HeadLayerNorm
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement, TensorParameter
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.weights import Parameter

_MOST_SLOPES = 4096


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """Return the ALiBi slopes of H heads: powers of 2^(-8 / n), n being the largest power of two up to H.

    The heads beyond n have every other slope of 2 n heads. Source: Press et al., 2021, arXiv:2108.12409.

    Raises:
        UnsupportedModelError: there are more than 4,096 heads.
    """
    if heads > _MOST_SLOPES:
        raise UnsupportedModelError(f"ALiBi of {heads} heads is not implemented; at most {_MOST_SLOPES} are")
    most = 1 << (heads.bit_length() - 1)
    first = tuple(2.0 ** (-8 / most * power) for power in range(1, most + 1))
    return first + alibi_slopes(2 * most)[: 2 * (heads - most) : 2] if heads > most else first


class Taps:
    """Copies of hidden states before some layers, stored until the next step; see `models/stack.py`.

    Args:
        layers: indices of these layers; an index equal to the number of layers means the output of the last layer.

    Attributes:
        values: the stored hidden states [T, E] of each layer.
    """

    def __init__(self, layers: Iterable[int]) -> None:
        self.layers = frozenset(layers)
        self.values: dict[int, Value] = {}

    def keep(self, layer: int, x: Value, residual: Value | None) -> tuple[Value, Value | None]:
        """Return a layer's input; before a chosen layer, store a copy of residual + x and return it as x."""
        if layer not in self.layers:
            return x, residual
        total = x if residual is None else residual + x
        self.values[layer] = side_by_side(total)
        return total, None


class GivenRows(Protocol):
    """Rows of a step that have given embeddings (of images) instead of rows of the embedding table."""

    vectors: Value

    def put(self, x: Value, ranks: Collective | None) -> Value:
        """Write the embeddings to their rows of x [T, E]; the first rank sends them to the other ranks."""

    def add(self, layer: int, x: Value, residual: Value | None) -> tuple[Value, Value | None]:
        """Add the vectors for these rows to a layer's result, which is x [T, E] and its residual.

        Source: Meng et al., 2024, arXiv:2406.04334 (DeepStack).
        """


@dataclasses.dataclass(frozen=True)
class StepInput:
    """Tensors of one step for all layers. While a step is recorded, `slots`, `rows`, `states` and `windowed` are unset:
    the plan reads them when it runs.

    Attributes:
        positions: [T] int64, each token's position in its sequence, or, for a model with M-RoPE, its row of the rotary
            tables; on a GPU int32. In a recorded step a `RecordedTokens`: the row of the tables that each token reads.
        slots: [T] int64, the cache slot of each token's key and value; on a GPU int32, -1 for no slot.
        rows: the sequences to which the tokens belong, with their lengths and block tables.
        caches: each layer's cache, then second caches: a `PagedCache`, or a `StateCache` for each part of the state.
        cache_scales: scales of keys and values in float8 caches, for layers without their own (`kernels/kv_write`).
        attend: attention function; see `kernels/attention`.
        taps: stores hidden states before some layers; None if they are not needed.
        given: rows of image embeddings; None without images.
        may_divide: ranks may divide the tokens among themselves; see `TokenShares.begin`.
        narrows: index of the last layer that writes the cache: after its write, a recorded step computes only rows
            whose next token is sampled; None if all layers compute all rows.
        narrowed: index of the layer before which rows whose next token is not sampled are dropped, because it and all
            later layers only read the caches of earlier layers; None if no rows are dropped.
        layer_inputs: [T, P] for each layer, P elements besides x; empty for families without such inputs.
        states: the step's use of layers' states, see `kernels/states`; None without states, and in a recorded step.
        windowed: slots and rows of each page pool of layers with a `WindowedCache`; empty in a recorded step.
        shared: values that a layer computes for later layers, by name, such as the positions that an indexer chose.
    """

    positions: Value
    slots: Value
    rows: AttentionRows | DeviceRows
    caches: tuple[Any, ...]
    cache_scales: tuple[Value, Value] | None = None
    attend: Callable[..., Value] = paged_attention
    taps: Taps | None = None
    given: GivenRows | None = None
    may_divide: bool = False
    narrows: int | None = None
    narrowed: int | None = None
    states: StateRows | None = None
    windowed: Sequence[tuple[Value, AttentionRows | DeviceRows]] = ()
    layer_inputs: tuple[Value, ...] = ()
    shared: dict[str, Any] = dataclasses.field(default_factory=dict)


class PagedAttention:
    """QK norm, RoPE, KV-cache write and attention: q [T, H, D], k and v [T, K, D] -> [T, H, D].

    `relative` is the relative logits' r [T, H, P] and profiles [P, X] (`kernels/attention`); None without them.
    `chosen` are the blocks to which tokens attend in a recorded step (`attention/cpu_record.py`); None for all.
    A layer that reads the cache of another layer (`SharedKVSpec`) is called without k and v, and writes nothing.

    Args:
        layer: index of the layer's cache.
        head_dim: D.
        q_norm, k_norm: QK norm of each head, if the model has it; a layer without keys has no k_norm.
        window: positions that a token attends to, itself included; -n for a chunk of n tokens; None for all.
        scale: factor of the scores; None for D^-0.5.
        sinks: parameter "sinks", [H] fp32 on the device: an additional score of each head (`kernels/attention`).
        slopes: [H] fp32 on the model's device, ALiBi slopes of the heads.
        causal: attention is causal in this layer also within images.
        norms_behind: QK norm follows RoPE; not for a layer without keys.

    Attributes:
        cache_scales: scales of keys and of values in a float8 cache, [1] fp32 each; None for the step's scales.
    """

    def __init__(
        self,
        layer: int,
        head_dim: int,
        rotary: Rotary | None,
        q_norm: RMSNorm | HeadLayerNorm | None = None,
        k_norm: RMSNorm | HeadLayerNorm | None = None,
        *,
        window: int | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: Value | None = None,
        slopes: Value | None = None,
        causal: bool = False,
        norms_behind: bool = False,
    ) -> None:
        self.layer, self.causal, self.norms_behind = layer, causal, norms_behind
        self.head_dim = head_dim
        self.rotary = rotary
        self.q_norm, self.k_norm = q_norm, k_norm
        self.window = window
        self.scale = head_dim**-0.5 if scale is None else scale
        self.softcap = softcap
        self.sinks, self.slopes = sinks, slopes
        self.cache_scales: tuple[Value, Value] | None = None

    def scale_cache(self, keys: float, values: float, placement: Placement) -> None:
        """Set the layer's own cache scales for keys and values."""
        self.cache_scales = k, v = placement.empty(1), placement.empty(1)
        k[0], v[0] = keys, values

    def __call__(
        self,
        q: Value,
        k: Value | None,
        v: Value | None,
        step: StepInput,
        relative: tuple[Value, Value] | None = None,
        chosen: Any = None,
    ) -> Value:
        assert k is not None or (self.k_norm is None and not self.norms_behind)
        cache = step.caches[self.layer]
        scores = {"scale": self.scale, "window": self.window, "softcap": self.softcap, "sinks": self.sinks}
        scores |= {} if self.slopes is None else {"slopes": self.slopes}
        scores |= {} if relative is None else {"relative": relative}
        norms, scales = None, step.cache_scales and (self.cache_scales or step.cache_scales)
        rotary = self.rotary
        if self.norms_behind and rotary is not None and k is not None:
            q, k = rotary(q, k, step.positions)
            rotary = None
        if isinstance(self.q_norm, RMSNorm) and self.k_norm is not None and not isinstance(q, Recorded):
            norms = HeadNorms(self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)
        else:
            q = q if self.q_norm is None else self.q_norm(q)
            k = k if self.k_norm is None else self.k_norm(k)
        if isinstance(q, Recorded):
            if rotary is not None:
                q = rotary.scaled(q, step.positions)
                if k is None:
                    q = rotary.queries(q, step.positions)
                else:
                    q, k = rotary(q, k, step.positions)
            narrows = self.layer == step.narrows
            return q.attend(k, v, cache, **scores, narrows=narrows, causal=self.causal, chosen=chosen)
        slots, rows = step.windowed[cache.pool] if isinstance(cache, WindowedCache) else (step.slots, step.rows)
        rows = rows.causal() if self.causal else rows
        if k is None or v is None:
            q = q if rotary is None else rotary.queries(q, step.positions)
        else:
            tables = None if rotary is None else rotary.tables
            q = rotary_write(q, k, v, step.positions, tables, cache, slots, norms=norms, cache_scales=scales)
        if rotary is not None:
            q = rotary.scaled(q, step.positions)
        return step.attend(q, *cache, rows, cache_scales=scales, **scores)

    def parameters(self) -> Mapping[str, Parameter]:
        return {} if self.sinks is None else {"sinks": TensorParameter(self.sinks)}
