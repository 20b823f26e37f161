# SPDX-License-Identifier: MIT
"""Read the config of DeepSeek V2 to V3.2, and of models like them, from config.json or GGUF metadata."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.layers.moe import Mixture
from candle_vllm.core.loading.cache_specs import CacheSpec, PagedSpec
from candle_vllm.core.loading.config import MAX_LAYERS, LatentSizes, ModelConfig, shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.rope import rope_from_hf, stretched_context, yarn_scale
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.models import sparse_index
from candle_vllm.core.models.experts import dense_layers, routed_keys, ungrouped, without_next_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepseekConfig(ModelConfig):
    """Config of these models. `head_dim` is that of queries and keys computed in full, not of the latent vectors.

    Attributes:
        q_rank: elements of the latent vector from which queries are computed; 0 if they are computed from x.
        kv_rank: elements of the latent vector of keys and values; L.
        rope_dim: elements of a head that rotate; R.
        value_dim: elements of a value head; V.
        attention_bias: the projections to latent vectors and the output projection have biases.
        dense_layers: number of first layers without experts.
        mixture: experts of the other layers.
        extra_layers: number of multi-token prediction layers after the last layer, which are not loaded.
        index_layers: the layers with an indexer for sparse attention.
        latent_eps: epsilon of the norms of latent vectors; the code of most of these models ignores rms_norm_eps there.
        index_interleaved: rows of the indexer that rotate are stored in interleaved pairs.
    """

    q_rank: int
    kv_rank: int
    rope_dim: int
    value_dim: int
    attention_bias: bool = False
    dense_layers: int
    mixture: Mixture | None
    extra_layers: int = 0
    latent_eps: float = 1e-6
    index_layers: frozenset[int] = frozenset()
    index_interleaved: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rope_dim % 2 or not 0 <= self.rope_dim < self.head_dim:
            raise InvalidFileError(
                f"{self.rope_dim} rotary dimensions of {self.head_dim} are not possible: their number must be even, "
                "and some must be left that do not rotate"
            )
        if not 0 <= self.extra_layers <= MAX_LAYERS:
            raise InvalidFileError(f"the model has {self.extra_layers} multi-token prediction layers")
        if max(self.kv_rank, self.q_rank, self.value_dim) > 1 << 16:
            sizes = f"latent vectors of {self.kv_rank} and {self.q_rank} and value heads of {self.value_dim}"
            raise InvalidFileError(f"{sizes} are not possible: each has at most {1 << 16} elements")

    @property
    def latent(self) -> LatentSizes:
        """The sizes of latent attention."""
        nope = self.head_dim - self.rope_dim
        return LatentSizes(
            heads=self.num_heads, nope=nope, rope=self.rope_dim, latent=self.kv_rank, value=self.value_dim
        )

    @property
    def cache_specs(self) -> tuple[CacheSpec, ...]:
        """Latent rows, with index keys in layers that have an indexer."""
        rows, keys = self.kv_rank + self.rope_dim, 0 if self.index is None else self.index.rope + self.index.latent
        return tuple(PagedSpec(1, rows, keys * (layer in self.index_layers)) for layer in range(self.num_layers))

    @property
    def shared_choices(self) -> Sequence[int]:
        """The layers without an indexer, which use the positions that the last indexer before them has chosen."""
        return () if self.index is None else sorted(set(range(self.num_layers)) - self.index_layers)

    @property
    def score_scale(self) -> float:
        """Factor of the attention scores, with the part of yarn's factor that is not applied to cos and sin."""
        rope, scale = self.rope, self.head_dim**-0.5
        if rope.kind == "default" or not rope.mscale_all_dim:
            return scale
        return scale * yarn_scale(rope.factor, rope.mscale_all_dim) ** 2


_USUAL: dict[str, dict[str, Any]] = {  # transformers' defaults that configs may leave out
    "glm4_moe_lite": {"first_k_dense_replace": 1, "routed_scaling_factor": 1.8},
    "glm_moe_dsa": {"first_k_dense_replace": 3, "routed_scaling_factor": 2.5},
}
_USUAL["deepseek_v3"] = _USUAL["deepseek_v32"] = _USUAL["glm_moe_dsa"] | {"n_group": 8, "topk_group": 4}


def config_from_hf(fields: Fields, model_type: str) -> DeepseekConfig:
    """Read `config.json` of the family's model types; youtu has no experts."""
    fields.choice("hidden_act", "silu", "silu", "swish")
    fields = fields.with_absent(**_USUAL.get(model_type, {}))
    shared = shared_from_hf(fields, model_type)
    rope_dim, nope = fields.count("qk_rope_head_dim"), fields.count("qk_nope_head_dim")
    position = fields.count("max_position_embeddings")
    turning = fields
    if model_type == "mistral4":  # its partial_rotary_factor repeats qk_rope_head_dim
        # required, because transformers' default is a whole dict
        key = "rope_scaling" if "rope_scaling" in fields and "rope_parameters" not in fields else "rope_parameters"
        nested = dict(fields.get(key, dict)) | {"partial_rotary_factor": 1.0}
        turning = Fields({**fields.values, fields.prefix + key: nested}, fields.path, fields.prefix)
    rope = rope_from_hf(turning, rope_dim, position)
    q_rank, bias = fields.count("q_lora_rank", 0), fields.get("attention_bias", bool, False)
    if bias and not q_rank:
        raise UnsupportedModelError(f"{fields.path}: attention_bias without q_lora_rank is not implemented")
    if fields.get("mlp_bias", bool, False):
        raise UnsupportedModelError(f"{fields.path}: mlp_bias is not implemented for this model")
    dense, mixture = _mixture_from_hf(fields, model_type, shared["num_layers"])
    own: dict[str, Any] = {
        "num_kv_heads": 1,
        "head_dim": nope + rope_dim,
        "rope": rope,
        "tie_embeddings": fields.get("tie_word_embeddings", bool, model_type == "youtu"),
        "max_position": stretched_context(rope, position),
        "num_experts": mixture.experts if mixture else 0,
        "interleaved_rotary": model_type == "deepseek_v2" or fields.get("rope_interleave", bool, True),
    }
    return DeepseekConfig(
        **shared | own,
        q_rank=q_rank,
        kv_rank=fields.count("kv_lora_rank"),
        rope_dim=rope_dim,
        value_dim=fields.count("v_head_dim"),
        attention_bias=bias,
        dense_layers=dense,
        mixture=mixture,
        extra_layers=fields.get("num_nextn_predict_layers", int, 0),
        **sparse_index.from_hf(fields, model_type, shared["num_layers"], rope_dim),
    )


def _mixture_from_hf(fields: Fields, model_type: str, layers: int) -> tuple[int, Mixture | None]:
    """The number of dense layers, and the experts of the other layers."""
    dense = dense_layers(fields, layers, 0)
    if "n_routed_experts" not in fields or dense >= layers:
        return layers, None
    if fields.get("moe_layer_freq", int, 1) != 1:
        raise UnsupportedModelError(f"{fields.path}: moe_layer_freq other than 1 is not implemented")
    newer = model_type != "deepseek_v2"
    method = fields.choice(
        "topk_method",
        "noaux_tc" if newer else "greedy",
        *(("noaux_tc",) if newer else ("greedy", "group_limited_greedy")),
    )
    if model_type == "mistral4":
        newer = False
        if fields.count("n_group", 1) != 1:
            raise UnsupportedModelError(f"{fields.path}: n_group is not 1, which is not implemented for {model_type}")
    scoring = "sigmoid" if newer else "softmax"
    fields.choice("scoring_func", scoring, scoring)
    renormalise = fields.get("norm_topk_prob", bool, newer or model_type == "mistral4")
    if renormalise and model_type == "deepseek_v2":
        raise UnsupportedModelError(f"{fields.path}: norm_topk_prob is not implemented for {model_type}")
    grouped = method != "greedy"
    inner = fields.count("moe_intermediate_size")
    shared = fields.get("n_shared_experts", int, 0)
    if shared < 0 or dense < 0:
        raise InvalidFileError(f"{fields.path}: n_shared_experts and first_k_dense_replace must not be negative")
    return dense, Mixture(
        experts=fields.count("n_routed_experts"),
        top_k=fields.count("num_experts_per_tok"),
        inner_size=inner,
        scoring=scoring,
        renormalise=renormalise,
        groups=fields.count("n_group", 1) if grouped else 1,
        top_groups=fields.count("topk_group", 1) if grouped else 1,
        scale=fields.get("routed_scaling_factor", float, 1.0),
        correction=newer,
        shared_size=shared * inner,
    )


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> DeepseekConfig:
    """Read GGUF metadata of deepseek2 and the like; newer files store the head sizes under keys that end in `_mla`."""
    shared = shared_from_gguf(fields, checkpoint)
    layers = without_next_tokens(fields, shared["num_layers"])
    rope, scale = shared["rope"], fields.get("rope.scaling.yarn_log_multiplier", float, 0.0) / 0.1
    if rope.kind == "yarn" and scale:  # the file stores 0.1 times mscale, which mscale_all_dim equals
        rope = dataclasses.replace(rope, mscale=scale, mscale_all_dim=scale)
    rope_dim = fields.count("rope.dimension_count")
    head_dim = fields.count("attention.key_length_mla", fields.count("attention.key_length"))
    dense, mixture = _mixture_from_gguf(fields, checkpoint, layers)
    own: dict[str, Any] = {
        "num_kv_heads": 1,
        "head_dim": head_dim,
        "rope": rope,
        "num_layers": layers,
        "sliding_windows": (None,) * layers,
        "num_experts": mixture.experts if mixture else 0,
        "interleaved_rotary": True,
    }
    return DeepseekConfig(
        **shared | own,
        q_rank=fields.count("attention.q_lora_rank", 0),
        kv_rank=fields.count("attention.kv_lora_rank"),
        rope_dim=rope_dim,
        value_dim=fields.count("attention.value_length_mla", fields.count("attention.value_length")),
        dense_layers=dense,
        mixture=mixture,
        extra_layers=shared["num_layers"] - layers,
        **sparse_index.from_gguf(fields, shared["model_type"], layers, rope_dim),
    )


def _mixture_from_gguf(fields: Fields, checkpoint: Checkpoint, layers: int) -> tuple[int, Mixture | None]:
    """The number of dense layers, and the experts of the other layers. Only newer files store groups."""
    dense = fields.get("leading_dense_block_count", int, 0)
    if dense >= layers or not fields.get("expert_count", int, 0):
        return layers, None
    correction = f"blk.{dense}.exp_probs_b.bias" in checkpoint.tensors
    gating = fields.get("expert_gating_func", int, 0)
    if gating not in (0, 1, 2):
        raise UnsupportedModelError(
            f"{fields.path}: {fields.prefix}expert_gating_func is {gating}; implemented: 1 (softmax), 2 (sigmoid)"
        )
    inner = fields.count("expert_feed_forward_length")
    scale = fields.get("expert_weights_scale", float, 1.0)
    return dense, Mixture(
        experts=fields.count("expert_count"),
        top_k=fields.count("expert_used_count"),
        inner_size=inner,
        scoring="sigmoid" if gating == 2 or (gating == 0 and correction) else "softmax",
        renormalise=fields.get("expert_weights_norm", bool, False),
        groups=fields.count("expert_group_count", 1),
        top_groups=fields.count("expert_group_used_count", 1),
        scale=scale or 1.0,
        correction=correction,
        shared_size=fields.get("expert_shared_count", int, 0) * inner,
    )


def gguf_keys(config: Any) -> dict[str, Any]:
    """The GGUF keys, with sizes of the cached keys and values, which all heads share, and of those of a head (`_mla`).

    A query rank of 0 means that queries are projected from the hidden state: llama.cpp requires the key. It also
    requires the size of experts and the number of shared experts, even of models without experts.
    """
    keys: dict[str, Any] = {
        "attention.head_count_kv": 1,
        "attention.key_length": config.kv_rank + config.rope_dim,
        "attention.value_length": config.kv_rank,
        "attention.key_length_mla": config.head_dim,
        "attention.value_length_mla": config.value_dim,
        "attention.q_lora_rank": config.q_rank,
        "attention.kv_lora_rank": config.kv_rank,
        "leading_dense_block_count": config.dense_layers,
        **sparse_index.gguf_keys(config),
    }
    if config.mixture is None:
        return keys | {"expert_feed_forward_length": config.intermediate_size, "expert_shared_count": 0}
    return keys | routed_keys(config.mixture)


def without_further_layers(config: Any) -> dict[str, Any]:
    """Config fields of a GGUF file: no multi-token prediction layers, and groups as in `ungrouped`."""
    return ungrouped(config) | {"extra_layers": 0}
