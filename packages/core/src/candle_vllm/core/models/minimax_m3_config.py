# SPDX-License-Identifier: MIT
"""Configuration of MiniMax M3: Llama's, with the sizes of an index that chooses blocks of keys."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.layers.moe import Mixture
from candle_vllm.core.loading.cache_specs import CacheSpec, PagedSpec, SharedKVSpec
from candle_vllm.core.loading.config import LatentSizes, shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.models.experts import expert_count, sigmoids_from_gguf, sparse_in_gguf
from candle_vllm.core.models.llama import LlamaConfig
from candle_vllm.core.models.local_layers import listed, refuse_others

_USUAL: dict[str, Any] = {
    "swiglu_alpha": 1.702, "swiglu_limit": 7.0, "swiglu_beta": 1.0, "scoring_func": "sigmoid",
    "qk_norm_type": "per_head", "use_qk_norm": True, "use_gemma_norm": True, "use_routing_bias": True,
    "attention_output_gate": False, "n_shared_experts": 1,
}  # fmt: skip
_INDEX_USUAL = {"use_sparse_attention": True, "sparse_score_type": "max", "sparse_init_block": 0}
_MOST = 1024  # maximum of heads of an index, of elements of a head, of positions of a block and of chosen blocks


class KeyBlocks(NamedTuple):
    """Sizes of a choice of key blocks: positions of a block, blocks that are chosen, and how many are the last ones."""

    size: int
    top: int
    local: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class MiniMaxM3Config(LlamaConfig):
    """Config of these models: the fields in addition to Llama's.

    Attributes:
        blocks: sizes of the choice of blocks.
        index_layers: layers that attend to chosen blocks.
    """

    blocks: KeyBlocks
    index_layers: frozenset[int]

    @property
    def cache_specs(self) -> tuple[CacheSpec, ...]:
        """Keys and values of each layer, then keys of the index of each layer that has one."""
        if self.index is None:
            return super().cache_specs
        keys = PagedSpec(1, self.index.nope, 0, exact=True)
        layers = range(self.num_layers)
        return (*super().cache_specs, *(keys if n in self.index_layers else SharedKVSpec(n) for n in layers))


def config_from_hf(fields: Fields, model_type: str) -> MiniMaxM3Config:
    """Read `config.json` of minimax_m3_vl_text, in transformers' form or with the keys of published files."""
    fields.choice("hidden_act", "silu", "silu", "swigluoai")
    refuse_others(fields, _USUAL)
    part = 1.0  # transformers, whose files have `rope_parameters`, reads no `rotary_dim`
    if "rope_parameters" not in fields:
        part = fields.count("rotary_dim", 64) / fields.count("head_dim", 128)
    usual = {"rope_theta": 5e6, "partial_rotary_factor": part, "num_key_value_heads": 4, "head_dim": 128}
    shared = shared_from_hf(fields.with_defaults(**usual, rms_norm_eps=1e-6), model_type)
    layers, inner = shared["num_layers"], shared["intermediate_size"]
    mixture = Mixture(
        experts=expert_count(fields, "num_local_experts", "num_experts"),
        top_k=fields.count("num_experts_per_tok", 4),
        inner_size=inner,
        scoring="sigmoid",
        scale=fields.get("routed_scaling_factor", float, 2.0),
        correction=True,
        shared_size=fields.count("shared_intermediate_size", inner),
    )
    nested = fields.section("sparse_attention_config")
    refuse_others(nested, _INDEX_USUAL if nested.values else {})

    def size(name: str, published: str, usual: int) -> int:
        return nested.count(published) if published in nested else fields.count(name, usual)

    heads, dim = size("index_n_heads", "sparse_num_index_heads", 4), size("index_head_dim", "sparse_index_dim", 128)
    blocks = KeyBlocks(
        size("index_block_size", "sparse_block_size", 128),
        size("index_topk_blocks", "sparse_topk_blocks", 16),
        size("index_local_blocks", "sparse_local_block", 1),
    )
    chosen = _layers(fields, "layer_types", "minimax_m3_sparse", nested.get("sparse_attention_freq", list, []), layers)
    sparse = _layers(fields, "mlp_layer_types", "sparse", fields.get("moe_layer_freq", list, [1] * layers), layers)
    shared["intermediate_size"] = fields.count("dense_intermediate_size", 12288)
    return _config(shared, mixture, sparse, heads, dim, blocks, chosen, fields)


def _layers(fields: Fields, key: str, kind: str, flags: list[Any], layers: int) -> frozenset[int]:
    """The layers of a kind by the list `key`, or by the flags of published files."""
    if key in fields:
        return frozenset(n for n, found in enumerate(listed(fields, key, layers, "")) if found == kind)
    if len(flags) not in (0, layers):
        raise InvalidFileError(f"{fields.path}: a list of {len(flags)} flags does not cover the {layers} layers")
    return frozenset(n for n, flag in enumerate(flags) if flag)


def _config(
    shared: dict[str, Any],
    mixture: Mixture,
    sparse: frozenset[int],
    heads: int,
    dim: int,
    blocks: KeyBlocks,
    chosen: frozenset[int],
    fields: Fields,
) -> MiniMaxM3Config:
    own: dict[str, Any] = {"index_layers": chosen, "blocks": blocks}
    if chosen:
        possible = shared["rope"].dim <= dim <= _MOST and dim % 16 == 0 and 0 < blocks.local <= blocks.top <= _MOST
        possible = possible and heads == shared["num_kv_heads"] <= _MOST
        if not possible or blocks.size not in (16, 32, 64, 128, 256, 512, _MOST):
            raise UnsupportedModelError(
                f"{fields.path}: an index of {heads} heads of {dim} elements for {shared['num_kv_heads']} key-value "
                f"heads, with {blocks}, is not implemented"
            )
        own["index"] = LatentSizes(heads=heads, nope=dim, rope=0, latent=dim, value=0)
        own |= {"index_top": blocks.top * blocks.size, "index_block": blocks.size}
    gates = (("swiglu_oai", "swiglu_oai"),) * shared["num_layers"]
    return MiniMaxM3Config(
        **shared | own,
        qk_norm=True,
        mixture=mixture,
        num_experts=mixture.experts,
        sparse_layers=sparse,
        mlp_gates=gates,
    )


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> MiniMaxM3Config:
    """Read GGUF metadata of minimax-m3."""
    shared, at = shared_from_gguf(fields, checkpoint), "attention.indexer."
    shared |= {"model_type": "minimax_m3_vl_text"}
    layers, inner = range(shared["num_layers"]), fields.count("expert_feed_forward_length")
    mixture = sigmoids_from_gguf(fields, shared_size=inner * fields.count("expert_shared_count", 1))
    dense = checkpoint.tensors.get("blk.0.ffn_gate.weight")
    if dense is not None and dense.shape:
        shared["intermediate_size"] = dense.shape[0]
    chosen = frozenset(n for n in layers if f"blk.{n}.indexer.k_proj.weight" in checkpoint.tensors)
    sizes = (fields.count(at + key) if chosen else 1 for key in ("block_size", "top_k", "local_blocks"))
    heads, dim = (fields.count(at + key) if chosen else 1 for key in ("head_count", "key_length"))
    sparse = sparse_in_gguf(checkpoint, len(layers))
    return _config(shared, mixture, sparse, heads, dim, KeyBlocks(*sizes), chosen, fields)
