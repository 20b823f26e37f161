# SPDX-License-Identifier: MIT
"""Config of Inkling: Llama's, with relative logits, convolutions, and experts of which every token uses the last ones.

Source: transformers' `InklingTextConfig`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import MAX_COUNT, Fields
from candle_vllm.core.kernels.short_conv import state_shape
from candle_vllm.core.layers.moe import Mixture
from candle_vllm.core.loading.cache_specs import CacheSpec, PagedSpec, StatePart, StateSpec
from candle_vllm.core.loading.config import shared_from_hf
from candle_vllm.core.models.llama import LlamaConfig
from candle_vllm.core.models.local_layers import heads_by_layer, listed, refuse_others
from candle_vllm.core.models.qwen3_next_config import convolution_taps

MOST_SHARED = 16

# fmt: off
_USUAL = {  # defaults of transformers' config class, which published configs may leave out
    "vocab_size": 201024, "hidden_size": 6144, "num_hidden_layers": 66, "num_attention_heads": 64,
    "num_key_value_heads": 8, "head_dim": 128, "swa_num_attention_heads": 64, "swa_num_key_value_heads": 16,
    "swa_head_dim": 128, "sliding_window_size": 512, "d_rel": 16, "rel_extent": 1024, "log_scaling_alpha": 0.1,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "conv_kernel_size": 4, "intermediate_size": 24576,
    "moe_intermediate_size": 3072, "n_routed_experts": 256, "num_experts_per_tok": 6, "n_shared_experts": 2,
    "route_scale": 8.0, "logits_mup_width_multiplier": 24.0, "rope_parameters": {},
}
# fmt: on
_IMPLEMENTED = {  # keys of transformers and of published files, with the only value that is implemented
    **dict.fromkeys(("shared_expert_sink", "use_embed_norm", "use_sconv", "use_gate_bias", "use_global_scale"), True),
    **dict.fromkeys(("norm_after_topk", "inference_moe_w13_interleaved"), True),
    "hidden_act": "silu",
    "gate_activation": "sigmoid",
    "q_bias": False,
    "o_bias": False,
    "final_logit_softcapping": 0.0,
}  # fmt: skip
_ALIASES = {  # transformers' `attribute_map`
    "embedding_multiplier": "logits_mup_width_multiplier",
    "sliding_window": "sliding_window_size",
    "num_local_experts": "n_routed_experts",
    "sconv_kernel_size": "conv_kernel_size",
    "model_max_length": "max_position_embeddings",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class InklingConfig(LlamaConfig):
    """Config of Inkling. `num_experts` counts the routed experts, `mixture.experts` the shared experts, too.

    Attributes:
        tokens: tokens with logits; the stored tables may have further rows, which are not loaded.
        head_dims: D of each layer.
        relative_size: P of the relative logits, see `kernels/attention`.
        extents: X of the relative logits of each layer.
        taps: kernel size of the convolutions.
        growth: in layers without a window the scores of the n-th token of a sequence have the factor
            1 + b ln(max(n / a, 1)), for growth = (a, b); None for 1.
    """

    tokens: int
    head_dims: tuple[int, ...]
    relative_size: int
    extents: tuple[int, ...]
    taps: int
    growth: tuple[int, float] | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 < dim <= 1024 for dim in self.head_dims):
            raise InvalidFileError(f"heads of {max(self.head_dims)} elements are not possible; at most 1024 are")

    @property
    def delta_layers(self) -> frozenset[int]:
        """Layers whose states need all tokens on each rank: all layers."""
        return frozenset(range(self.num_layers))

    @property
    def cache_specs(self) -> tuple[CacheSpec, ...]:
        """See `ModelConfig.cache_specs`: the pages of all layers, then the states of their convolutions."""
        pages, states = list[CacheSpec](), list[CacheSpec]()
        for layer, (dim, window) in enumerate(zip(self.head_dims, self.sliding_windows, strict=True)):
            kv_heads = self.heads(layer)[1]
            pages.append(PagedSpec(kv_heads, dim, dim, window))
            widths = (2 * kv_heads * dim, self.hidden_size, self.hidden_size)
            parts = (StatePart(state_shape(width, self.taps), width, exact=False) for width in widths)
            states.append(StateSpec(tuple(parts)))
        return (*pages, *states)


def config_from_hf(fields: Fields, model_type: str) -> InklingConfig:
    """Read `config.json` of inkling_text."""
    aliases = {fields.prefix + alias: fields.prefix + name for alias, name in _ALIASES.items()}
    values = {aliases.get(key, key): value for key, value in fields.values.items()}
    fields = Fields(values, fields.path, fields.prefix).with_defaults(**_USUAL)
    same = {"v_head_dim": fields.count("head_dim"), "swa_v_head_dim": fields.count("swa_head_dim")}
    refuse_others(fields, _IMPLEMENTED | same)
    shared = shared_from_hf(fields, model_type)
    layers, window = shared["num_layers"], fields.count("sliding_window_size")
    kinds = _kinds(fields, "layer_types", layers, ("hybrid", "hybrid_sliding"))
    if kinds is None:
        usual = [layer for layer in range(layers) if (layer + 1) % 6]
        local = {each for each in fields.get("local_layer_ids", list, usual) if type(each) is int}
        kinds = ["hybrid_sliding" if layer in local else "hybrid" for layer in range(layers)]
    windows = tuple(window if kind == "hybrid_sliding" else None for kind in kinds)
    dense = fields.get("dense_mlp_idx", int, 0)
    mlps = _kinds(fields, "mlp_layer_types", layers, ("dense", "sparse"))
    mlps = mlps or ["dense" if layer < dense else "sparse" for layer in range(layers)]
    inner, intermediate = fields.count("moe_intermediate_size"), shared["intermediate_size"]
    if "dense_intermediate_size" in fields:  # files with this key call the experts' size intermediate_size
        inner, intermediate = intermediate, fields.count("dense_intermediate_size")
    routed, common = fields.count("n_routed_experts"), fields.count("n_shared_experts", most=MOST_SHARED)
    scale, last = fields.get("logits_mup_width_multiplier", float), fields.get("unpadded_vocab_size", int, None)
    floor, tokens = fields.get("log_scaling_n_floor", int, None), shared["vocab_size"]
    if scale <= 0 or (floor is not None and not 0 < floor <= MAX_COUNT) or (last is not None and last < 1):
        raise InvalidFileError(
            f"{fields.path}: logits_mup_width_multiplier, log_scaling_n_floor or unpadded_vocab_size is not positive"
        )
    tokens = tokens if last is None else min(tokens, last)
    sizes = [
        [fields.count(prefix + key) for prefix in ("", "swa_")]
        for key in ("num_attention_heads", "num_key_value_heads", "head_dim")
    ]
    heads, kv_heads, dims = ([pair[each is not None] for each in windows] for pair in sizes)
    mixture = Mixture(
        experts=routed + common,
        top_k=fields.count("num_experts_per_tok", most=routed) + common,
        inner_size=inner,
        scoring="sigmoid",
        scale=fields.get("route_scale", float),
        correction=True,
        expert_scale=True,
    )
    own = heads_by_layer(heads, 1)
    if any(own["num_heads"] % count for count in kv_heads):
        raise UnsupportedModelError(
            f"{fields.path}: layers have {heads!r:.80} query heads and {kv_heads!r:.80} key-value heads; a layer's "
            f"key-value heads must divide {own['num_heads']}, which divides the query heads of each layer"
        )
    return InklingConfig(
        **shared
        | own
        | {
            "vocab_size": tokens,
            "intermediate_size": intermediate,
            "num_kv_heads": min(kv_heads),
            "head_dim": max(*dims, shared["head_dim"]),
            "tie_embeddings": False,
            "sliding_windows": windows,
        },
        tokens=tokens,
        groups=tuple(own["num_heads"] // count for count in kv_heads),
        head_dims=tuple(dims),
        qk_norm=True,
        unrotated_layers=frozenset(range(layers)),
        logit_scale=1 / scale,
        mixture=mixture,
        num_experts=routed,
        sparse_layers=frozenset(layer for layer, kind in enumerate(mlps) if kind == "sparse"),
        relative_logits=True,
        relative_size=fields.count("d_rel", most=256),
        extents=tuple(fields.count("rel_extent") if each is None else each for each in windows),
        taps=convolution_taps(fields, "conv_kernel_size"),
        growth=None if floor is None else (floor, fields.get("log_scaling_alpha", float)),
    )


def _kinds(fields: Fields, key: str, layers: int, known: tuple[str, ...]) -> list[Any] | None:
    """The kind of each layer in a list that may be longer than the layers; None without the list."""
    found = listed(fields, key, layers, None) if key in fields else None
    if found is not None and any(kind not in known for kind in found):
        raise UnsupportedModelError(f"{fields.path}: {key} has kinds of layers other than {', '.join(known)}")
    return found
