# SPDX-License-Identifier: MIT
"""Read the config of DeepSeek V4 from `config.json`, as it is published or as transformers writes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import MAX_COUNT, Fields
from candle_vllm.core.kernels.compressed_attention import Groups, entry_share
from candle_vllm.core.kernels.moe import Scoring
from candle_vllm.core.layers.moe import Mixture
from candle_vllm.core.loading.cache_specs import CacheSpec, PagedSpec, SharedKVSpec
from candle_vllm.core.loading.config import LatentSizes, ModelConfig, shared_from_hf
from candle_vllm.core.loading.rope import RopeConfig, rope_from_hf, stretched_context
from candle_vllm.core.models.local_layers import listed, refuse_others
from candle_vllm.core.models.residual_streams import MOST_STREAMS, Streams

_SCORING: Mapping[str, Scoring] = {"sqrtsoftplus": "sqrt_softplus", "sigmoid": "sigmoid"}
_INDEXED, _HEAVY = "compressed_sparse_attention", "heavily_compressed_attention"
_KINDS = {0: "sliding_attention", 4: _INDEXED, 128: _HEAVY}
_MOST_ROUNDS, _MOST_RATIO, MOST_GROUPS, _MOST_INDEX_HEADS = 100, 4096, 64, 1024
_LIMIT = 10.0  # of SwiGLU: `silu_10`


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepseekV4Config(ModelConfig):
    """Config of DeepSeek V4; `rope` is for layers with entries, `local_rope` for layers with a window alone.

    Attributes:
        q_rank: elements of the vector from which queries are computed.
        window: positions of the window in every layer, the token included.
        ratios: for each layer the tokens of a group; 0 for a layer without entries.
        indexed: layers whose entries an index chooses; their groups overlap.
        output_groups, output_rank: groups of heads with an output projection of their own, and its rank.
        streams: the residual streams.
        mixture: experts of every layer.
        hash_layers: layers whose experts are chosen by token id.
    """

    local_rope: RopeConfig | None = None
    q_rank: int
    window: int
    ratios: tuple[int, ...]
    indexed: frozenset[int]
    index: LatentSizes
    output_groups: int
    output_rank: int
    streams: Streams
    mixture: Mixture
    hash_layers: frozenset[int]

    def __post_init__(self) -> None:
        super().__post_init__()
        refused = None
        for ratio in set(self.ratios) - {0}:
            if ratio & (ratio - 1) or not 1 < ratio <= _MOST_RATIO:
                refused = f"groups of {ratio} tokens are not implemented: a power of two up to {_MOST_RATIO} is"
        if not self.rope.dim <= min(self.index_size, self.head_dim):
            refused = f"index keys of {self.index_size} elements are smaller than the {self.rope.dim} that rotate"
        if not 0 < self.streams.eps < 1:
            refused = f"hc_eps is {self.streams.eps}; it must be between 0 and 1"
        if refused is not None:
            raise InvalidFileError(refused)

    @property
    def index_size(self) -> int:
        """Di, elements of an index key."""
        return self.index.nope + self.index.rope

    def groups_of(self, layer: int) -> Groups | None:
        """Return how a layer's tokens become entries; None for a layer without entries."""
        ratio = self.ratios[layer]
        return Groups(ratio, self.head_dim, layer in self.indexed) if ratio else None

    def index_groups(self, layer: int) -> Groups | None:
        """Return how a layer's tokens become index keys; None for a layer without an index."""
        return Groups(self.ratios[layer], self.index_size, True) if layer in self.indexed else None

    @property
    def stream_count(self) -> int:
        return self.streams.count

    @property
    def compresses(self) -> bool:
        """See `ModelConfig.compresses`."""
        return True

    @property
    def cache_specs(self) -> tuple[CacheSpec, ...]:
        """Rows of the window beside the inputs of groups, for each layer; then the logs of entries and index keys."""
        rows, logs = list[CacheSpec](), list[CacheSpec]()
        for layer, ratio in enumerate(self.ratios):
            groups = [each for each in (self.groups_of(layer), self.index_groups(layer)) if each is not None]
            span = ratio * (1 + (layer in self.indexed))
            inputs = sum(2 * each.width for each in groups)
            rows.append(PagedSpec(1, self.head_dim, inputs, max(self.window, span)))
            shares = [entry_share(each.size, ratio) for each in groups]
            logs.append(PagedSpec(1, *(*shares, 0)[:2]) if groups else SharedKVSpec(layer))
        return (*rows, *logs)


def config_from_hf(fields: Fields, model_type: str) -> DeepseekV4Config:
    """Read `config.json` of deepseek_v4."""
    plain = dict.fromkeys(("rope_parameters", "rope_scaling", "partial_rotary_factor"))
    values = {**fields.values, **{fields.prefix + key: value for key, value in plain.items()}}
    size = fields.count("moe_intermediate_size")
    values |= {fields.prefix + "intermediate_size": size, fields.prefix + "num_key_value_heads": 1}
    shared = shared_from_hf(Fields(values, fields.path, fields.prefix), model_type)
    layers, dim = shared["num_layers"], shared["head_dim"]
    fields.choice("hidden_act", "silu", "silu", "swish")
    usual: dict[str, Any] = {
        "attention_bias": False,
        "mlp_bias": False,
        "norm_topk_prob": True,
        "num_key_value_heads": 1,
    }
    usual |= {"n_shared_experts": 1, "swiglu_limit": _LIMIT, "n_group": 1, "topk_group": 1, "topk_method": "noaux_tc"}
    refuse_others(fields, usual)
    if shared["num_heads"] % (output_groups := fields.count("o_groups", 8, most=MOST_GROUPS)):
        raise InvalidFileError(
            f"{fields.path}: {shared['num_heads']} heads cannot be divided into {output_groups} groups"
        )
    kinds = _kinds(fields, layers)
    rates = {_INDEXED: 4, _HEAVY: 128} | fields.get("compress_rates", dict, {})
    rates |= {_INDEXED: fields.get("compress_rate_csa", int, rates[_INDEXED])}
    rates |= {_HEAVY: fields.get("compress_rate_hca", int, rates[_HEAVY])}
    if not all(type(rates[kind]) is int and rates[kind] > 0 for kind in (_INDEXED, _HEAVY)):
        raise InvalidFileError(f"{fields.path}: compress_rates is {rates!r:.80}, not positive whole numbers")
    rates[_KINDS[0]] = 0
    ropes = _ropes(fields, dim)
    window = fields.count("sliding_window", 128)
    return DeepseekV4Config(
        **shared
        | {
            "rope": ropes[1],
            "max_position": stretched_context(ropes[1], shared["max_position"]),
            "sliding_windows": tuple(window if kind == _KINDS[0] else None for kind in kinds),
            "num_experts": fields.count("n_routed_experts"),
        },
        attention_sinks=True,
        local_rope=ropes[0],
        q_rank=fields.count("q_lora_rank"),
        window=window,
        ratios=tuple(rates[kind] for kind in kinds),
        indexed=frozenset(layer for layer, kind in enumerate(kinds) if kind == _INDEXED),
        index_top=fields.count("index_topk", 512),
        index=_index_sizes(fields, ropes[1].dim),
        output_groups=output_groups,
        output_rank=fields.count("o_lora_rank", 1024),
        streams=Streams(
            count=fields.count("hc_mult", 4, most=MOST_STREAMS),
            size=shared["hidden_size"],
            rounds=fields.count("hc_sinkhorn_iters", 20, most=_MOST_ROUNDS),
            eps=fields.get("hc_eps", float, 1e-6),
            norm_eps=shared["norm_eps"],
        ),
        mixture=Mixture(
            experts=fields.count("n_routed_experts"),
            top_k=fields.count("num_experts_per_tok"),
            inner_size=size,
            scoring=_SCORING[fields.choice("scoring_func", "sqrtsoftplus", *_SCORING)],
            scale=fields.get("routed_scaling_factor", float, 1.5),
            correction=True,
            activation="silu_10",
            shared_activation="silu_10",
            shared_size=size,
        ),
        hash_layers=_hash_layers(fields, layers),
    )


def _index_sizes(fields: Fields, rope: int) -> LatentSizes:
    heads, size = fields.count("index_n_heads", 64, most=_MOST_INDEX_HEADS), fields.count("index_head_dim", 128)
    return LatentSizes(heads=heads, nope=size - rope, rope=rope, latent=size - rope, value=0)


def _kinds(fields: Fields, layers: int) -> list[str]:
    """The kind of each layer, by `layer_types`, `compress_ratios`, or as in V4 Pro."""
    if "layer_types" not in fields and "compress_ratios" in fields:
        ratios = listed(fields, "compress_ratios", layers, 0)
        kinds = [next((kind for known, kind in _KINDS.items() if known == ratio), None) for ratio in ratios]
    else:
        usual = [_HEAVY if layer < 2 or layer % 2 == 0 else _INDEXED for layer in range(layers)]
        kinds = listed(fields, "layer_types", layers, None) if "layer_types" in fields else usual
    if any(kind not in _KINDS.values() for kind in kinds):
        raise UnsupportedModelError(f"{fields.path}: layers of other kinds than {', '.join(_KINDS.values())}")
    return [str(kind) for kind in kinds]


def _hash_layers(fields: Fields, layers: int) -> frozenset[int]:
    """The layers that route by token id, by `mlp_layer_types` or `num_hash_layers`."""
    usual = fields.get("num_hash_layers", int, 3)
    kinds = listed(fields, "mlp_layer_types", layers, None) if "mlp_layer_types" in fields else []
    if any(kind not in ("hash_moe", "moe") for kind in kinds) or not 0 <= usual <= MAX_COUNT:
        raise UnsupportedModelError(f"{fields.path}: mlp_layer_types other than hash_moe and moe, or num_hash_layers")
    return frozenset(n for n in range(layers) if (kinds[n] == "hash_moe" if kinds else n < usual))


def _ropes(fields: Fields, dim: int) -> list[RopeConfig]:
    """Rotary settings of layers with a window alone, and of layers with entries."""
    position, nested = fields.count("max_position_embeddings"), fields.section("rope_parameters")
    if "partial_rotary_factor" in fields or "qk_rope_head_dim" not in fields:
        share = fields.get("partial_rotary_factor", float, 64 / 512)
    else:
        share = fields.count("qk_rope_head_dim") / dim
    flat = fields.section("rope_scaling").values or nested.values
    scaling = {key: value for key, value in flat.items() if not isinstance(value, dict)}
    main = {"rope_theta": fields.get("rope_theta", float, 10000.0), "partial_rotary_factor": share}
    own = {"attention_factor": 1.0, **scaling, "partial_rotary_factor": share}  # YaRN's frequencies alone
    own["rope_theta"] = fields.get("compress_rope_theta", float, 160000.0)
    given = [nested.section(kind).values or other for kind, other in (("main", main), ("compress", own))]
    return [rope_from_hf(Fields({"rope_parameters": {**one}}, fields.path), dim, position) for one in given]
