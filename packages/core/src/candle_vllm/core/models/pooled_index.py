# SPDX-License-Identifier: MIT
"""The indexer of GLM-5.3-Flash, which chooses groups of neighbouring positions by pooled keys.

A position has a key and a gate for each element of the key; the key of a group is the mean of its keys, weighted by a
softmax over the gates plus a learned vector of the place in the group. A token attends to the groups with the largest
scores, see `sparse_index.py`, and to all positions after the last whole group. Nothing rotates.
Source: transformers' `Glm5NextTextIndexer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from candle_vllm.core.kernels.latent_attention import latent_write
from candle_vllm.core.kernels.latent_attention.layout import LatentParts
from candle_vllm.core.kernels.recorded import Recorded, Value
from candle_vllm.core.kernels.side_by_side import side_by_side
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.layer_norm import LayerNorm
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.parameters import Placement, TensorParameter
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.weights import Parameter, WeightName
from candle_vllm.core.models.attention_names import GG, HF
from candle_vllm.core.models.sparse_index import KEY_EPS, Index


class PooledIndex(Index):
    """Chooses the positions that each token of a step attends to."""

    def __init__(self, config: Any, layer: int, rotary: Rotary, placement: Placement) -> None:
        self.sizes, self.layer, self.rotary, self.top = config.index, layer, rotary, config.index_top
        heads, dim, self.pool = config.index.heads, config.index.nope, config.index_pool
        self.widths = (dim, dim, heads)
        self.inputs = Linear(config.hidden_size, dict(zip("kgw", self.widths)), placement)
        self.queries = Linear(config.q_rank, heads * dim, placement)
        self.norm = LayerNorm(dim, KEY_EPS, placement)
        self.places = placement.empty(self.pool, dim)

    def __call__(self, x: Value, q: Value, step: StepInput) -> Any:
        """See `Index`."""
        cache, q = step.caches[self.layer].values, self.queries(q)
        key, gate, weights = self.inputs(x).split(self.widths, -1)
        row = side_by_side(self.norm(key), gate)
        if isinstance(q, Recorded):
            tables = self.rotary.tables
            parts = LatentParts(
                self.sizes, self.norm.weight, KEY_EPS, *tables, (), (), pool=self.pool, places=self.places
            )
            return q.choose_positions(row, weights, parts, cache, self.top)
        from candle_vllm.core.kernels.latent_attention.reference import choose, pool_keys

        latent_write(row[:, :0], row, cache, step.slots)
        pool_keys(cache, step.slots, self.places)
        return choose(q.unflatten(-1, (-1, self.sizes.nope)), weights, cache, step.rows, self.top, self.pool)

    def parameters(self) -> Mapping[str, Parameter]:
        """Every parameter that must be loaded."""
        return {"places": TensorParameter(self.places)}


_AT, _HF, _GG = "layers.{i}.attention.index", HF + "self_attn.indexer.", GG + "indexer"
WEIGHTS = [
    WeightName(f"{_AT}.inputs:k.weight", _HF + "wk.weight", _GG + ".attn_k.weight"),
    WeightName(f"{_AT}.inputs:g.weight", _HF + "index_kpool_compress_gate", _GG + "_compressor_gate.weight"),
    WeightName(f"{_AT}.inputs:w.weight", _HF + "weights_proj.weight", _GG + ".proj.weight"),
    WeightName(f"{_AT}.queries:weight", _HF + "wq_b.weight", _GG + ".attn_q_b.weight"),
    WeightName(f"{_AT}.norm:weight", _HF + "k_norm.weight", _GG + ".k_norm.weight"),
    WeightName(f"{_AT}.norm:bias", _HF + "k_norm.bias", _GG + ".k_norm.bias"),
    WeightName(f"{_AT}:places", _HF + "index_kpool_compress_ape", _GG + "_compressor_ape.weight"),
]
