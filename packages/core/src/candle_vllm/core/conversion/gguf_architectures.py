# SPDX-License-Identifier: MIT
"""The architectures that GGUF files are written for: one row for each, with what its metadata says beyond the usual."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from candle_vllm.core.conversion.gguf_layout import BIASES, DIVISORS, Architecture, Keys
from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.layers.moe import Mixture
from candle_vllm.core.layers.rotary import attention_scale
from candle_vllm.core.loading.config import ModelConfig
from candle_vllm.core.models.mamba2 import MambaSizes

_GATING = {"softmax": 1, "sigmoid": 2}


def _window(config: ModelConfig) -> Keys:
    """One window for all layers; models with other patterns are refused when the keys are read again."""
    windows = [window for window in config.sliding_windows if window is not None]
    return {"attention.sliding_window": windows[0]} if windows else {}


# ---- dense -----------------------------------------------------------------------------------------------------------


def _gemma2(config: Any) -> Keys:
    caps = {"attn_logit_softcapping": config.attention_softcap, "final_logit_softcapping": config.final_softcap}
    missing = [key for key, cap in caps.items() if not cap]
    if missing:
        raise UnsupportedModelError(f"llama.cpp's gemma2 divides by {' and '.join(missing)}, and this model has none")
    return _window(config) | {key: float(cap) for key, cap in caps.items()}


def _gemma3(config: Any) -> Keys:
    cap = config.final_softcap
    return _local(config) | ({} if cap is None else {"final_logit_softcapping": float(cap)})


def _gemma4(config: Any) -> Keys:
    """Numbers that differ by layer are lists, and those of one kind of layer keys of their own."""
    window = next(layer for layer, has in enumerate(config.sliding_windows) if has is not None)
    dim, keys = config.shapes[window][1], _gemma3(config)
    keys |= {
        "feed_forward_length": [width * config.intermediate_size for width in config.widths],
        "attention.head_count_kv": [heads for heads, _ in config.shapes],
        "attention.key_length_swa": dim,
        "attention.value_length_swa": dim,
        "attention.shared_kv_layers": sum(layer != source for layer, source in enumerate(config.sources)),
        "rope.dimension_count_swa": config.local_rope.dim,
        "embedding_length_per_layer_input": config.input_size,
    }
    if config.mixture is not None:
        keys |= _counts(config.mixture) | {"expert_feed_forward_length": config.mixture.inner_size}
    return keys


def _phi3(config: Any) -> Keys:
    """Without a window, llama.cpp wants a 0: it takes the file for an old one otherwise."""
    keys: Keys = {"attention.sliding_window": 0} | _window(config)
    keys["rope.scaling.original_context_length"] = config.rope.original_max_position
    if config.rope.kind == "longrope":
        keys["rope.scaling.attn_factor"] = attention_scale(config.rope)
    return keys


def _mistral3(config: Any) -> Keys:
    """Queries that grow with their position."""
    return _window(config) | (
        {"attention.temperature_scale": config.rope.query_scale} if config.rope.query_scale else {}
    )


def _axes(config: Any) -> Keys:
    """How many frequencies time, height and width turn; llama.cpp has room for one axis more."""
    keys: Keys = {"rope.dimension_sections": [config.rope.axes.count(axis) for axis in range(4)]}
    deep = getattr(config, "deep", 0)
    return _window(config) | keys | ({"n_deepstack_layers": deep} if deep else {})


def _stablelm(config: Any) -> Keys:
    return {"use_parallel_residual": config.parallel}


def _granite(config: Any) -> Keys:
    """Four factors, of which that of logits divides."""
    keys: Keys = {
        "embedding_scale": float(config.embedding_scale),
        "residual_scale": float(config.residual_scale),
        "attention.scale": float(config.attention_scale),
        "logit_scale": 1 / config.logit_scale,
        "rope.scaling.finetuned": not config.unrotated_layers,
    }
    if config.mixture is None:
        return keys
    shared = config.mixture.shared_size
    return keys | _counts(config.mixture) | ({"expert_shared_feed_forward_length": shared} if shared else {})


def _granite_swa(config: Any) -> Keys:
    """Which layers turn; llama.cpp has no gate of what experts share in a tensor of its own."""
    turns = [layer not in config.unrotated_layers for layer in range(config.num_layers)]
    return _granite(config) | _local(config) | {"attention.rope_pattern": turns}


def _granite_hybrid(config: Any) -> Keys:
    """Layers with Mamba 2 have no key-value heads."""
    heads = [0 if layer in config.mamba_layers else config.num_kv_heads for layer in range(config.num_layers)]
    return _granite(config) | _mamba_keys(config.mamba) | {"attention.head_count_kv": heads}


def _nemotron_h(config: Any) -> Keys:
    """Key-value heads of the layers that have attention, and widths of the feed-forward layers; 0 for the others."""
    heads = [config.num_kv_heads if kind == "attention" else 0 for kind in config.kinds]
    own = {"mlp": config.intermediate_size, "moe": config.mixture.inner_size if config.mixture else 0}
    if {"mlp", "moe"} <= set(config.kinds):
        raise UnsupportedModelError("llama.cpp's nemotron_h_moe has experts in all feed-forward layers")
    widths = [own.get(kind, 0) for kind in config.kinds]
    keys = _mamba_keys(config.mamba) | {"attention.head_count_kv": heads, "feed_forward_length": widths}
    if config.mixture is None:
        return keys
    shared = {"expert_shared_count": 1, "expert_shared_feed_forward_length": config.mixture.shared_size}
    return keys | _routed(config.mixture) | shared


def _mamba_keys(sizes: MambaSizes) -> Keys:
    """Shapes of Mamba 2."""
    return {
        "ssm.conv_kernel": sizes.taps,
        "ssm.state_size": sizes.state,
        "ssm.group_count": sizes.groups,
        "ssm.time_step_rank": sizes.heads,
        "ssm.inner_size": sizes.inner,
    }


def _local(config: Any) -> Keys:
    """Which layers have a window. The rotary base of OLMo 3's is that of the others, which alone are stretched.

    llama.cpp has windows for EXAONE 4 of 64 layers alone.
    """
    pattern = [window is not None for window in config.sliding_windows]
    if any(pattern) and config.model_type == "exaone4" and config.num_layers != 64:
        raise UnsupportedModelError("llama.cpp's exaone4 has windows in models of 64 layers alone")
    keys = _window(config) | ({"attention.sliding_window_pattern": pattern} if any(pattern) else {})
    local = getattr(config, "local_rope", None)
    return keys | ({} if local is None else {"rope.freq_base_swa": float(local.theta)})


def _cohere(config: Any) -> Keys:
    """llama.cpp takes the embedding table for the head, and has norms of heads from 64 layers on."""
    if not config.tie_embeddings:
        raise UnsupportedModelError("llama.cpp's command-r and cohere2 have no head beside the embedding table")
    if config.model_type == "cohere" and config.head_norms != (config.num_layers >= 64):
        raise UnsupportedModelError("llama.cpp's command-r has norms of q and k in models of 64 layers or more alone")
    plain: Keys = {"rope.scaling.type": "none"} if config.rope.kind == "default" else {}
    return plain | {"logit_scale": float(config.logit_scale)} | _local(config)


def _apertus(config: Any) -> Keys:
    parts = zip(("alpha_p", "alpha_n", "beta", "eps"), zip(*config.xielu))
    return {f"xielu.{part}": list(numbers) for part, numbers in parts}


def _gpt_neox(config: Any) -> Keys:
    return {"use_parallel_residual": config.parallel}


def _falcon_names(config: Any) -> Sequence[str]:
    """A block's only norm is the first."""
    return ("attn_qkv.", "attn_norm.") if config.shared_norm else ("attn_qkv.",)


def _whole_head_norms(config: Any) -> Keys:
    """The norms of a layer's heads are one tensor."""
    return {"head_norms": "none" if config.head_norms == "none" else "whole"}


# ---- experts ---------------------------------------------------------------------------------------------------------


def _mixtral(config: Any) -> Keys:
    return _window(config) | _counts(config.mixture)


def _counts(mixture: Mixture) -> Keys:
    return {"expert_count": mixture.experts, "expert_used_count": mixture.top_k}


def _sizes(mixture: Mixture) -> Keys:
    return _counts(mixture) | {"expert_feed_forward_length": mixture.inner_size}


def _qwen_moe(config: Any) -> Keys:
    mixture = config.mixture
    keys = _window(config) | _sizes(mixture) | {"expert_weights_norm": mixture.renormalise}
    if mixture.shared_size:
        keys["expert_shared_feed_forward_length"] = mixture.shared_size
    return keys


def _qwen3_next(config: Any) -> Keys:
    """Shapes of delta nets, and which layers have one: the interval, which old readers want, is that of most models."""
    sizes = config.delta
    keys: Keys = {
        "ssm.conv_kernel": sizes.taps,
        "ssm.state_size": sizes.key_dim,
        "ssm.group_count": sizes.key_heads,
        "ssm.time_step_rank": sizes.heads,
        "ssm.inner_size": sizes.parts[2],
        "full_attention_interval": 4,
        "attention.recurrent_layers": [layer in config.delta_layers for layer in range(config.num_layers)],
    }
    return keys | ({} if config.mixture is None else _qwen_moe(config))


def _qwen35(config: Any) -> Keys:
    """With axes also where the config names none, which llama.cpp wants: text turns alike by all."""
    count = config.rope.dim // 2
    usual: Keys = {"rope.dimension_sections": [-(-count // 3), (count + 1) // 3, count // 3, 0]}
    return _qwen3_next(config) | (_axes(config) if config.rope.axes else usual)


def _ernie(config: Any) -> Keys:
    """llama.cpp reads the size of what all tokens share from a key of its own."""
    mixture, sparse = config.mixture, config.sparse_layers
    dense = config.num_layers - len(sparse)
    if sparse != frozenset(range(dense, config.num_layers)):
        raise UnsupportedModelError("llama.cpp's ernie4_5-moe has all dense layers in front of the others")
    return _sizes(mixture) | {
        "expert_shared_count": mixture.shared_size // mixture.inner_size,
        "expert_shared_feed_forward_length": mixture.shared_size,
        "interleave_moe_layer_step": 1,
        "leading_dense_block_count": dense,
    }


def _hunyuan(config: Any) -> Keys:
    """llama.cpp has one size of experts, that of dense layers."""
    mixture = config.mixture
    if mixture.inner_size != config.intermediate_size:
        raise UnsupportedModelError("llama.cpp's hunyuan-moe has experts as wide as intermediate_size alone")
    return _sizes(mixture) | {"expert_shared_feed_forward_length": mixture.shared_size, "expert_shared_count": 1}


def _hy_v3(config: Any) -> Keys:
    return _glm4_moe(config) | {"expert_shared_feed_forward_length": config.mixture.shared_size}


def _laguna(config: Any) -> Keys:
    """Numbers of heads are a list."""
    keys = (
        _hy_v3(config)
        | _local(config)
        | {"attention.head_count": [config.heads(n)[0] for n in range(config.num_layers)]}
    )
    return keys | ({} if config.local_rope is None else {"rope.dimension_count_swa": config.local_rope.dim})


def _scored_by_sigmoids(config: Any) -> Keys:
    return _sizes(config.mixture) | {"expert_gating_func": _GATING["sigmoid"]}


def _gpt_oss(config: Any) -> Keys:
    """llama.cpp wants a window to be named."""
    return {"attention.sliding_window": 0} | _window(config) | _sizes(config.mixture)


def _routed(mixture: Mixture) -> Keys:
    """How DeepSeek and those that choose experts as it does describe them."""
    keys: Keys = _sizes(mixture) | {
        "expert_shared_count": mixture.shared_size // mixture.inner_size,
        "expert_gating_func": _GATING[mixture.scoring],
        "expert_weights_norm": mixture.renormalise,
        "expert_weights_scale": float(mixture.scale),
    }
    if _grouped(mixture):
        keys |= {"expert_group_count": mixture.groups, "expert_group_used_count": mixture.top_groups}
    return keys


def _grouped(mixture: Mixture) -> bool:
    """Whether groups take part in the choice: llama.cpp takes no file whose groups are all chosen."""
    return mixture.top_groups < mixture.groups


def _ungrouped(config: Any) -> Keys:
    mixture = config.mixture
    return (
        {}
        if mixture is None or _grouped(mixture)
        else {"mixture": dataclasses.replace(mixture, groups=1, top_groups=1)}
    )


def _glm4_moe(config: Any) -> Keys:
    """The dense layers are the first, as `first_k_dense_replace` has it."""
    return _routed(config.mixture) | {"leading_dense_block_count": config.num_layers - len(config.sparse_layers)}


def _deepseek(config: Any) -> Keys:
    """Sizes of cached keys and values, which all heads share, and of those that a head makes of them.

    A rank of queries of 0 says that they are made of the hidden state: llama.cpp wants the key. So it wants a size of
    experts, and how many are shared, where there are none.
    """
    keys: Keys = {
        "attention.head_count_kv": 1,
        "attention.key_length": config.kv_rank + config.rope_dim,
        "attention.value_length": config.kv_rank,
        "attention.key_length_mla": config.head_dim,
        "attention.value_length_mla": config.value_dim,
        "attention.q_lora_rank": config.q_rank,
        "attention.kv_lora_rank": config.kv_rank,
        "leading_dense_block_count": config.dense_layers,
    }
    if config.mixture is None:
        return keys | {"expert_feed_forward_length": config.intermediate_size, "expert_shared_count": 0}
    return keys | _routed(config.mixture)


def _query_names(config: Any) -> Sequence[str]:
    return () if config.q_rank else (".attn_q.",)


def _without_next_tokens(config: Any) -> Keys:
    """Layers that predict further tokens are left out."""
    return _ungrouped(config) | {"extra_layers": 0}


# ---- convolutions ----------------------------------------------------------------------------------------------------


def _lfm2(config: Any) -> Keys:
    """Layers with convolutions have no key-value heads; all weights of experts sum to 1, and all scores have a bias."""
    heads = [0 if layer in config.conv_layers else config.num_kv_heads for layer in range(config.num_layers)]
    keys: Keys = {"attention.head_count_kv": heads, "shortconv.l_cache": config.taps}
    mixture = config.mixture
    if mixture is None:
        return keys
    if not mixture.correction:
        raise UnsupportedModelError("llama.cpp's lfm2moe wants a bias of experts' scores, and this model has none")
    keys |= _scored_by_sigmoids(config)
    return keys | {"leading_dense_block_count": config.num_layers - len(config.sparse_layers)}


# ---- the rows --------------------------------------------------------------------------------------------------------

_LAYER_NORM = "attention.layer_norm_epsilon"
_PROJECTED = (".ssm_in.bias", ".ssm_out.bias")
_CONVOLVED = (DIVISORS, *(f".shortconv.{part}.bias" for part in ("in_proj", "conv", "out_proj")))
_LLAMA = Architecture(name="llama", more=_window, interleaved=True, unread=())
_GLM4_MOE = Architecture(name="glm4moe", more=_glm4_moe, otherwise=_ungrouped)
_OLMO2 = Architecture(name="olmo2", more=_local, head=True, square=True)
_GEMMA4 = Architecture(name="gemma4", more=_gemma4, unread=(), names=lambda _: ("gate_up_exps",))
_FUSED = {"names": lambda _: ("attn_qkv",), "eps": _LAYER_NORM, "square": True, "unread": (DIVISORS,)}
_DEEPSEEK = Architecture(
    name="deepseek2",
    more=_deepseek,
    otherwise=_without_next_tokens,
    interleaved=True,
    names=_query_names,
    log_multiplier=0.1,
)
_MISTRAL4 = dataclasses.replace(
    _DEEPSEEK,
    name="mistral4",
    more=lambda config: _deepseek(config) | _mistral3(config),
    names=lambda config: (*_query_names(config), "gate_up_exps"),
)

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "llama": _LLAMA,
        "mistral": _LLAMA,
        "ministral": _LLAMA,
        "ministral3": Architecture(name="mistral3", more=_mistral3, interleaved=True, log_multiplier=1.0, unread=()),
        "internlm3": _LLAMA,
        "mixtral": Architecture(name="llama", more=_mixtral, interleaved=True, unread=()),
        "qwen2": Architecture(name="qwen2", more=_window, square=True),
        "qwen2_vl": Architecture(name="qwen2vl", more=_axes, square=True),
        "qwen3": Architecture(name="qwen3", more=_window),
        "qwen3_vl": Architecture(name="qwen3vl", more=_axes),
        "qwen2_moe": Architecture(name="qwen2moe", more=_qwen_moe, head=True, square=True, every=True, norm=False),
        "qwen3_moe": Architecture(name="qwen3moe", more=_qwen_moe, every=True, norm=True),
        "qwen3_vl_moe": Architecture(
            name="qwen3vlmoe", more=lambda config: _qwen_moe(config) | _axes(config), every=True, norm=True
        ),
        "qwen3_next": Architecture(
            name="qwen3next", more=_qwen3_next, names=lambda _: ("ssm_ba",), every=True, norm=True
        ),
        "qwen3_5": Architecture(name="qwen35", more=_qwen35),
        "qwen3_5_moe": Architecture(name="qwen35moe", more=_qwen35, every=True, norm=True),
        "gemma": Architecture(name="gemma"),
        "gemma2": Architecture(name="gemma2", more=_gemma2),
        "gemma3_text": Architecture(name="gemma3", more=_gemma3),
        "gemma4_text": _GEMMA4,
        "gemma4_unified_text": _GEMMA4,
        "phi": Architecture(name="phi2", eps=_LAYER_NORM, head=True, square=True, unread=(DIVISORS,)),
        "phi3": Architecture(name="phi3", more=_phi3, names=lambda _: ("attn_qkv",), square=True),
        "stablelm": Architecture(
            name="stablelm", more=_stablelm, otherwise=_whole_head_norms, eps=_LAYER_NORM, head=True, square=True
        ),
        "smollm3": Architecture(name="smollm3", interleaved=True),
        "glm": Architecture(name="chatglm", interleaved=True, square=True),
        "glm4": Architecture(name="glm4", interleaved=True),
        "solar_open": _GLM4_MOE,
        "glm4_moe": _GLM4_MOE,
        "gpt_oss": Architecture(name="gpt-oss", more=_gpt_oss, head=True, unread=(DIVISORS,)),
        "deepseek_v2": _DEEPSEEK,
        "deepseek_v3": _DEEPSEEK,
        "glm4_moe_lite": _DEEPSEEK,
        "youtu": _DEEPSEEK,
        "mistral4": _MISTRAL4,
        "granite": Architecture(name="granite", more=_granite, interleaved=True, square=True, unread=()),
        "granitemoe": Architecture(name="granitemoe", more=_granite, interleaved=True, square=True, unread=()),
        "granite_swa": Architecture(
            name="granite_swa", more=_granite_swa, interleaved=True, square=True, unread=(".ffn_gate_shexp.weight",)
        ),
        "granitemoehybrid": Architecture(
            name="granitehybrid", more=_granite_hybrid, interleaved=True, square=True, unread=(".ssm_in.bias",)
        ),
        **{
            name: Architecture(name=name, more=_nemotron_h, eps=_LAYER_NORM, otherwise=_ungrouped, unread=_PROJECTED)
            for name in ("nemotron_h", "nemotron_h_moe")
        },
        "seed_oss": Architecture(name="seed_oss", names=lambda _: (".post_attention_norm.",)),
        "olmo2": _OLMO2,
        "olmo3": _OLMO2,
        "exaone4": Architecture(name="exaone4", more=_local, square=True, unread=BIASES),
        "olmoe": Architecture(
            name="olmoe", more=lambda config: _counts(config.mixture), head=True, square=True, norm=False
        ),
        "minimax_m2": Architecture(name="minimax-m2", more=_scored_by_sigmoids, head=True, norm=True),
        "cohere": Architecture(name="command-r", more=_cohere, eps=_LAYER_NORM, interleaved=True, square=True),
        "cohere2": Architecture(name="cohere2", more=_cohere, eps=_LAYER_NORM, interleaved=True, square=True),
        "exaone": Architecture(name="exaone", unread=BIASES),
        "internlm2": Architecture(name="internlm2", interleaved=True, square=True),
        "hunyuan_v1_dense": Architecture(name="hunyuan-dense"),
        "hunyuan_v1_moe": Architecture(name="hunyuan-moe", more=_hunyuan, norm=True),
        "hy_v3": Architecture(name="hy_v3", more=_hy_v3, otherwise=_ungrouped),
        "laguna": Architecture(name="laguna", more=_laguna),
        "ernie4_5": Architecture(name="ernie4_5", interleaved=True, unread=(DIVISORS, *BIASES[1:])),
        "ernie4_5_moe": Architecture(name="ernie4_5-moe", more=_ernie, interleaved=True, norm=True),
        "apertus": Architecture(name="apertus", more=_apertus, head=True, unread=()),
        "gpt2": Architecture(name="gpt2", **_FUSED),
        "gpt_bigcode": Architecture(name="starcoder", **_FUSED),
        "gpt_neox": Architecture(name="gptneox", more=_gpt_neox, head=True, **_FUSED),
        "bloom": Architecture(name="bloom", **_FUSED),
        "falcon": Architecture(name="falcon", names=_falcon_names, eps=_LAYER_NORM, square=True),
        "starcoder2": Architecture(name="starcoder2", more=_window, eps=_LAYER_NORM, square=True, unread=(DIVISORS,)),
        "lfm2": Architecture(name="lfm2", more=_lfm2, unread=_CONVOLVED, square=True),
        "lfm2_moe": Architecture(name="lfm2moe", more=_lfm2, unread=_CONVOLVED, square=True),
    }
)
"""By Hugging Face's model_type."""


def architecture(config: ModelConfig, path: Path) -> Architecture:
    """The row of a model.

    Raises:
        UnsupportedModelError: there is none.
    """
    row = ARCHITECTURES.get(config.model_type)
    if row is None:
        raise UnsupportedModelError(
            f"{path}: GGUF files are not written for {config.model_type} yet, but for {', '.join(ARCHITECTURES)}; "
            "such a model can be quantised while it is loaded, with `isq`"
        )
    return row
