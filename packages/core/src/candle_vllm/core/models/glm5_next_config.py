# SPDX-License-Identifier: MIT
"""Configuration of GLM-5.3-Flash: Kimi Linear's with residual streams, bounded decays and pooled index keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.layers.delta_net import DeltaSizes
from candle_vllm.core.loading.config import LatentSizes
from candle_vllm.core.loading.rope import RopeConfig
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.models import deepseek_config, kimi_linear_config, sparse_index
from candle_vllm.core.models.attention_names import kv_heads_by_layer
from candle_vllm.core.models.deepseek_config import DeepseekConfig
from candle_vllm.core.models.kimi_linear_config import KimiLinearConfig
from candle_vllm.core.models.local_layers import refuse_others
from candle_vllm.core.models.qwen3_next_config import convolution_taps
from candle_vllm.core.models.residual_streams import MOST_STREAMS, Streams

_LIMIT = 10.0  # of both factors of SwiGLU; the kernels are compiled for it
_POOLS = (2, 4, 8, 16)
_MOST_ROUNDS = 100  # of the Sinkhorn projection
_GGUF_STREAMS = 4
_LEAST_BOUND = -1000.0
_MOST_HEAD = 1024  # elements of a head
_UNROTATED = 2  # rotary dimensions in the config of DeepSeek, which needs some; no layer rotates
_IMPLEMENTED = {
    "mla_use_nope": True, "mhc": True, "qk_rope_head_dim": 0, "swiglu_limit": _LIMIT,
    "index_kpool_always_select_tail": True,
}  # fmt: skip
_USUAL = {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.5, "first_k_dense_replace": 3}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Glm5NextConfig(KimiLinearConfig):
    """Config of these models: the fields in addition to those of Kimi Linear.

    Attributes:
        streams: residual streams.
        decay_bound: lower bound of the logs of decays in delta attention; 0 without a bound.
    """

    streams: Streams
    decay_bound: float

    def __post_init__(self) -> None:
        super().__post_init__()
        streams, pool, top = self.streams, self.index_pool, self.index_top
        if not 1 < streams.count <= MOST_STREAMS or not 0 < streams.rounds <= _MOST_ROUNDS or not 0 < streams.eps < 1:
            raise InvalidFileError(
                f"{streams.count} residual streams, {streams.rounds} rounds and an epsilon of {streams.eps} are not "
                f"possible: 2 to {MOST_STREAMS} streams, 1 to {_MOST_ROUNDS} rounds, epsilon between 0 and 1"
            )
        if pool not in _POOLS:
            raise UnsupportedModelError(f"index keys pooled by {pool} are not implemented; implemented: {_POOLS}")
        if top % pool != pool - 1 or top < pool:
            raise InvalidFileError(f"index_topk {top - pool + 1} is not a multiple of index_kpool {pool}")
        if not self.q_rank:
            raise UnsupportedModelError("latent attention without q_lora_rank is not implemented for this model")
        latent = [layer for layer in range(self.num_layers) if layer not in self.delta_layers]
        if latent and latent[0] not in self.index_layers:
            raise InvalidFileError(f"the first layer with latent attention, {latent[0]}, has no indexer")

    @property
    def stream_count(self) -> int:
        return self.streams.count

    @property
    def shared_choices(self) -> Sequence[int]:
        """See `DeepseekConfig`; layers with delta attention choose no positions."""
        return [layer for layer in super().shared_choices if layer not in self.delta_layers]


def config_from_hf(fields: Fields, model_type: str) -> Glm5NextConfig:
    """Read `config.json` of glm5_next, in the published form or in that of transformers."""
    refuse_others(fields, _IMPLEMENTED)
    fields, layers = fields.with_absent(**_USUAL), fields.count("num_hidden_layers")
    nope = fields.count("qk_nope_head_dim", most=_MOST_HEAD)
    if nope <= _UNROTATED:
        raise InvalidFileError(f"{fields.path}: {fields.prefix}qk_nope_head_dim is {nope}, not above {_UNROTATED}")
    own: dict[str, Any] = {"rope_parameters": {}, "qk_nope_head_dim": nope - _UNROTATED}
    own |= dict.fromkeys(("head_dim", "qk_rope_head_dim"), _UNROTATED)
    values = {**fields.values, **{fields.prefix + key: value for key, value in own.items()}}
    config = deepseek_config.config_from_hf(Fields(values, fields.path, fields.prefix), "deepseek_v3")
    usual = [("linear" if layer % 4 != 3 else "full") + "_attention" for layer in range(layers)]
    kinds, known = fields.get("layer_types", list, usual), ("linear_attention", "indexed_attention", "full_attention")
    if len(kinds) != layers or not all(kind in known for kind in kinds):
        raise UnsupportedModelError(f"{fields.path}: {fields.prefix}layer_types must name {known} for each layer")
    nested = fields.section("linear_attn_config")
    at, names = (nested, ("num_heads", "head_dim", "short_conv_kernel_size")) if nested.values else (fields, _LINEAR)
    heads, dim, taps = at.count(names[0]), at.count(names[1]), convolution_taps(at, names[2])
    pool = fields.count("index_kpool", 16)
    return _config(
        config,
        model_type,
        delta=DeltaSizes(key_heads=heads, heads=heads, key_dim=dim, value_dim=dim, taps=taps, by_channel=True),
        delta_layers=frozenset(layer for layer, kind in enumerate(kinds) if kind == "linear_attention"),
        full=sparse_index.full_layers(fields, layers),
        index=(fields.count("index_n_heads"), fields.count("index_head_dim"), fields.count("index_topk"), pool),
        streams=(
            fields.count("hc_mult", 4, most=MOST_STREAMS),
            fields.count("hc_sinkhorn_iters", 20, most=_MOST_ROUNDS),
            fields.get("hc_eps", float, 1e-6),
        ),
        decay_bound=_bound(fields, nested),
    )


_LINEAR = ("linear_num_heads", "linear_head_dim", "linear_conv_kernel_dim")


def _bound(fields: Fields, nested: Fields) -> float:
    """The lower bound of the logs of decays, which null or a false `safe_gate` leaves out; 0 without a bound."""
    given = fields.values.get(f"{fields.prefix}linear_lower_bound", -5.0)
    given = nested.values.get("gate_lower_bound", given)
    safe = nested.get("safe_gate", bool, True) if nested.values else False
    return _checked_bound(Fields({"gate_lower_bound": given}, fields.path), "gate_lower_bound", -5.0 if safe else None)


def _checked_bound(fields: Fields, key: str, usual: float | None = None) -> float:
    """A lower bound of the logs of decays, below 0; 0 without the key, if `usual` is None."""
    bound = fields.get(key, float, usual)
    if bound is not None and not _LEAST_BOUND <= bound < 0:
        raise InvalidFileError(
            f"{fields.path}: the lower bound of decays is {bound}; it must be below 0, and at least {_LEAST_BOUND}"
        )
    return bound or 0.0


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> Glm5NextConfig:
    """Read GGUF metadata of glm5-next, in which layers with delta attention have 0 key-value heads."""
    at, (plain, counts) = "attention.indexer.", kv_heads_by_layer(fields)
    refuse_others(fields, {f"{at}kpool_select_tail": True, "rope.dimension_count": 0})
    for key in ("swiglu_clamp_exp", "swiglu_clamp_shexp"):
        if (limit := fields.get(key, float, 0.0)) != _LIMIT:
            raise UnsupportedModelError(f"{fields.path}: {fields.prefix}{key} is {limit}; implemented: {_LIMIT}")
    values = {**plain.values, f"{fields.prefix}rope.dimension_count": _UNROTATED}
    config = deepseek_config.config_from_gguf(Fields(values, fields.path, fields.prefix), checkpoint)
    layers, heads, dim = config.num_layers, config.num_heads, fields.count("kda.head_dim")
    taps = convolution_taps(fields, "ssm.conv_kernel")
    full, stream = fields.get(f"{at}types", list, [True] * layers), "hyper_connection."
    count, rounds = fields.count(f"{stream}count"), fields.count(f"{stream}sinkhorn_iterations")
    return _config(
        config,
        config.model_type,
        delta=DeltaSizes(key_heads=heads, heads=heads, key_dim=dim, value_dim=dim, taps=taps, by_channel=True),
        delta_layers=frozenset(layer for layer, kv_heads in enumerate(counts[:layers]) if not kv_heads),
        full=[kind in (1, "full") for kind in full],
        index=tuple(fields.count(at + key) for key in ("head_count", "key_length", "top_k", "kpool")),
        streams=(count, rounds, fields.get(f"{stream}epsilon", float)),
        decay_bound=_checked_bound(fields, "kda.gate_lower_bound"),
    )


def _config(
    config: DeepseekConfig,
    model_type: str,
    *,
    full: Sequence[bool],
    index: Sequence[int],
    streams: tuple[int, int, float],
    **own: Any,
) -> Glm5NextConfig:
    """Make the config from DeepSeek's; `full` says which layers have an indexer of their own, if they can have one."""
    flags = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    (count, rounds, eps), (heads, dim, top, pool) = streams, index
    if len(full) < config.num_layers:
        raise InvalidFileError(f"indexer types are given for {len(full)} of {config.num_layers} layers")
    indexed = frozenset(layer for layer in range(config.num_layers) if full[layer]) - own["delta_layers"]
    if config.mixture is not None:
        limited: dict[str, Any] = {"activation": "silu_10", "shared_activation": "silu_10"}
        flags["mixture"] = dataclasses.replace(config.mixture, **limited)
    flags |= {"model_type": model_type, "interleaved_rotary": False, "rope_dim": 0, "latent_eps": config.norm_eps}
    flags |= {"rope": RopeConfig(kind="proportional", dim=_UNROTATED), "index_layers": indexed}
    flags |= {"index_top": top + pool - 1, "index_pool": pool}
    flags["index"] = LatentSizes(heads=heads, nope=dim, rope=0, latent=2 * dim, value=0)
    return Glm5NextConfig(**flags, streams=Streams(count, config.hidden_size, rounds, eps, config.norm_eps), **own)


def gguf_keys(config: Any) -> dict[str, Any]:
    """The GGUF metadata in addition to that of Kimi Linear."""
    at, index, streams = "attention.indexer.", config.index, config.streams
    if streams.count != _GGUF_STREAMS:
        raise UnsupportedModelError(f"llama.cpp's glm5-next has {_GGUF_STREAMS} residual streams, not {streams.count}")
    full = [layer in config.index_layers or layer in config.delta_layers for layer in range(config.num_layers)]
    keys = kimi_linear_config.gguf_keys(config) | {
        f"{at}head_count": index.heads,
        f"{at}key_length": index.nope,
        f"{at}top_k": config.index_top - config.index_pool + 1,
        f"{at}kpool": config.index_pool,
        f"{at}kpool_select_tail": True,
        f"{at}types": full,
        "hyper_connection.count": streams.count,
        "hyper_connection.sinkhorn_iterations": streams.rounds,
        "hyper_connection.epsilon": streams.eps,
        "attention.layer_norm_epsilon": sparse_index.KEY_EPS,
        "swiglu_clamp_exp": [_LIMIT] * config.num_layers,
        "swiglu_clamp_shexp": [_LIMIT] * config.num_layers,
        "rope.dimension_count": 0,
    }
    return keys | ({"kda.gate_lower_bound": config.decay_bound} if config.decay_bound else {})
