# SPDX-License-Identifier: MIT
"""Architectures that GGUF files are written for: one row for each, with its metadata beyond the common keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from candle_vllm.core.conversion.gguf_layout import BIASES, DIVISORS, Architecture, Keys
from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.loading.config import ModelConfig
from candle_vllm.core.models import (
    apertus,
    codestral_mamba,
    cohere,
    deepseek_config,
    ernie4_5,
    falcon,
    falcon_h1_config,
    gemma3n_config,
    gemma4_config,
    gemma_config,
    glm4_moe,
    gpt_oss,
    granite,
    granite_hybrid,
    hunyuan,
    hy_v3,
    jamba,
    kimi_linear_config,
    laguna,
    lfm2_config,
    llama,
    llama4_config,
    mamba,
    mimo_v2,
    muse_glimmer,
    nemotron_h_config,
    phi3,
    phimoe,
    qwen3_next_config,
    qwen_moe,
    stablelm,
    step3p5,
)
from candle_vllm.core.models.attention_names import axes_keys, local_keys, window_keys
from candle_vllm.core.models.experts import count_keys, sigmoid_keys, ungrouped


def _parallel(config: Any) -> Keys:
    return {"use_parallel_residual": config.parallel}


# ---- the rows --------------------------------------------------------------------------------------------------------

_LAYER_NORM = "attention.layer_norm_epsilon"
_PROJECTED = (".ssm_in.bias", ".ssm_out.bias")
_CONVOLVED = (DIVISORS, *(f".shortconv.{part}.bias" for part in ("in_proj", "conv", "out_proj")))
_LLAMA = Architecture(name="llama", more=window_keys, interleaved=True, unread=())
_GLM4_MOE = Architecture(name="glm4moe", more=glm4_moe.gguf_keys, otherwise=ungrouped)
_OLMO2 = Architecture(name="olmo2", more=local_keys, head=True, square=True)
_GEMMA4 = Architecture(name="gemma4", more=gemma4_config.gguf_keys, unread=(), names=lambda _: ("gate_up_exps",))
_FUSED = {"names": lambda _: ("attn_qkv",), "eps": _LAYER_NORM, "square": True, "unread": (DIVISORS,)}
_DEEPSEEK = Architecture(
    name="deepseek2",
    more=deepseek_config.gguf_keys,
    otherwise=deepseek_config.without_further_layers,
    interleaved=True,
    names=lambda config: () if config.q_rank else (".attn_q.",),
    log_multiplier=0.1,
)
_MAMBA = Architecture(name="mamba", more=mamba.gguf_keys, unread=_PROJECTED)
_MISTRAL4 = dataclasses.replace(
    _DEEPSEEK,
    name="mistral4",
    more=lambda config: deepseek_config.gguf_keys(config) | llama.mistral3_keys(config),
    names=lambda config: (*_DEEPSEEK.names(config), "gate_up_exps"),
)

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "llama": _LLAMA,
        "mistral": _LLAMA,
        "ministral": _LLAMA,
        "ministral3": Architecture(
            name="mistral3", more=llama.mistral3_keys, interleaved=True, log_multiplier=1.0, unread=()
        ),
        "internlm3": _LLAMA,
        "llama4_text": Architecture(name="llama4", more=llama4_config.gguf_keys, interleaved=True, unread=()),
        "mixtral": Architecture(
            name="llama",
            more=lambda config: window_keys(config) | count_keys(config.mixture),
            interleaved=True,
            unread=(),
        ),
        "qwen2": Architecture(name="qwen2", more=window_keys, square=True),
        "qwen2_vl": Architecture(name="qwen2vl", more=axes_keys, square=True),
        "qwen3": Architecture(name="qwen3", more=window_keys),
        "qwen3_vl": Architecture(name="qwen3vl", more=axes_keys),
        "qwen2_moe": Architecture(
            name="qwen2moe", more=qwen_moe.gguf_keys, head=True, square=True, every=True, norm=False
        ),
        "qwen3_moe": Architecture(name="qwen3moe", more=qwen_moe.gguf_keys, every=True, norm=True),
        "qwen3_vl_moe": Architecture(
            name="qwen3vlmoe", more=lambda config: qwen_moe.gguf_keys(config) | axes_keys(config), every=True, norm=True
        ),
        "qwen3_next": Architecture(
            name="qwen3next", more=qwen3_next_config.gguf_keys, names=lambda _: ("ssm_ba",), every=True, norm=True
        ),
        "qwen3_5": Architecture(name="qwen35", more=qwen3_next_config.qwen35_keys),
        "qwen3_5_moe": Architecture(name="qwen35moe", more=qwen3_next_config.qwen35_keys, every=True, norm=True),
        "gemma": Architecture(name="gemma"),
        "gemma2": Architecture(name="gemma2", more=gemma_config.gemma2_keys),
        "gemma3_text": Architecture(name="gemma3", more=gemma_config.gemma3_keys),
        "gemma3n_text": Architecture(
            name="gemma3n", more=gemma3n_config.gguf_keys, otherwise=lambda config: {"input_rows": config.vocab_size}
        ),
        "gemma4_text": _GEMMA4,
        "gemma4_unified_text": _GEMMA4,
        "phi": Architecture(name="phi2", eps=_LAYER_NORM, head=True, square=True, unread=(DIVISORS,)),
        "phi3": Architecture(name="phi3", more=phi3.gguf_keys, names=lambda _: ("attn_qkv",), square=True),
        "phimoe": Architecture(name="phimoe", more=phimoe.gguf_keys, square=True, head=True, norm=False, unread=()),
        "stablelm": Architecture(
            name="stablelm",
            more=_parallel,
            otherwise=stablelm.whole_head_norms,
            eps=_LAYER_NORM,
            head=True,
            square=True,
        ),
        "smollm3": Architecture(name="smollm3", interleaved=True),
        "glm": Architecture(name="chatglm", interleaved=True, square=True),
        "glm4": Architecture(name="glm4", interleaved=True),
        "solar_open": _GLM4_MOE,
        "glm4_moe": _GLM4_MOE,
        "gpt_oss": Architecture(name="gpt-oss", more=gpt_oss.gguf_keys, head=True, unread=(DIVISORS,)),
        "deepseek_v2": _DEEPSEEK,
        "deepseek_v3": _DEEPSEEK,
        "deepseek_v32": dataclasses.replace(_DEEPSEEK, name="deepseek32"),
        "glm_moe_dsa": dataclasses.replace(_DEEPSEEK, name="glm-dsa"),
        "glm4_moe_lite": _DEEPSEEK,
        "youtu": _DEEPSEEK,
        "mistral4": _MISTRAL4,
        "granite": Architecture(name="granite", more=granite.gguf_keys, interleaved=True, square=True, unread=()),
        "granitemoe": Architecture(name="granitemoe", more=granite.gguf_keys, interleaved=True, square=True, unread=()),
        "granite_swa": Architecture(
            name="granite_swa", more=granite.swa_keys, interleaved=True, square=True, unread=(".ffn_gate_shexp.weight",)
        ),
        "granitemoehybrid": Architecture(
            name="granitehybrid", more=granite_hybrid.gguf_keys, interleaved=True, square=True, unread=(".ssm_in.bias",)
        ),
        "mamba": _MAMBA,
        "falcon_mamba": _MAMBA,
        "jamba": Architecture(name="jamba", more=jamba.gguf_keys, square=True, norm=False, unread=_PROJECTED),
        "mamba2": Architecture(name="mamba2", more=codestral_mamba.gguf_keys, unread=_PROJECTED),
        "kimi_linear": dataclasses.replace(
            _DEEPSEEK, name="kimi-linear", more=kimi_linear_config.gguf_keys, interleaved=False, head=True, norm=True
        ),
        "falcon_h1": Architecture(
            name="falcon-h1", more=falcon_h1_config.gguf_keys, otherwise=falcon_h1_config.otherwise, unread=()
        ),
        **{
            name: Architecture(
                name=name, more=nemotron_h_config.gguf_keys, eps=_LAYER_NORM, otherwise=ungrouped, unread=_PROJECTED
            )
            for name in ("nemotron_h", "nemotron_h_moe")
        },
        "seed_oss": Architecture(name="seed_oss", names=lambda _: (".post_attention_norm.",)),
        "olmo2": _OLMO2,
        "olmo3": _OLMO2,
        "exaone4": Architecture(name="exaone4", more=local_keys, square=True, unread=BIASES),
        "olmoe": Architecture(
            name="olmoe", more=lambda config: count_keys(config.mixture), head=True, square=True, norm=False
        ),
        "minimax_m2": Architecture(name="minimax-m2", more=sigmoid_keys, head=True, norm=True),
        "cohere": Architecture(name="command-r", more=cohere.gguf_keys, eps=_LAYER_NORM, interleaved=True, square=True),
        "cohere2": Architecture(name="cohere2", more=cohere.gguf_keys, eps=_LAYER_NORM, interleaved=True, square=True),
        "exaone": Architecture(name="exaone", unread=BIASES),
        "internlm2": Architecture(name="internlm2", interleaved=True, square=True),
        "hunyuan_v1_dense": Architecture(name="hunyuan-dense"),
        "hunyuan_v1_moe": Architecture(name="hunyuan-moe", more=hunyuan.gguf_keys, norm=True),
        "hy_v3": Architecture(name="hy_v3", more=hy_v3.gguf_keys, otherwise=ungrouped),
        "laguna": Architecture(name="laguna", more=laguna.gguf_keys),
        "muse_glimmer_text": Architecture(
            name="muse-glimmer", more=muse_glimmer.gguf_keys, interleaved=True, head=True
        ),
        "mimo_v2_flash": Architecture(name="mimo2", more=mimo_v2.gguf_keys, otherwise=ungrouped, head=True, norm=True),
        "step3p5": Architecture(name="step35", more=step3p5.gguf_keys, head=True, unread=BIASES),
        "ernie4_5": Architecture(name="ernie4_5", interleaved=True, unread=(DIVISORS, *BIASES[1:])),
        "ernie4_5_moe": Architecture(name="ernie4_5-moe", more=ernie4_5.gguf_keys, interleaved=True, norm=True),
        "apertus": Architecture(name="apertus", more=apertus.gguf_keys, head=True, unread=()),
        "gpt2": Architecture(name="gpt2", **_FUSED),
        "gpt_bigcode": Architecture(name="starcoder", **_FUSED),
        "gpt_neox": Architecture(name="gptneox", more=_parallel, head=True, **_FUSED),
        "bloom": Architecture(name="bloom", **_FUSED),
        "falcon": Architecture(name="falcon", names=falcon.gguf_names, eps=_LAYER_NORM, square=True),
        "starcoder2": Architecture(
            name="starcoder2", more=window_keys, eps=_LAYER_NORM, square=True, unread=(DIVISORS,)
        ),
        "lfm2": Architecture(name="lfm2", more=lfm2_config.gguf_keys, unread=_CONVOLVED, square=True),
        "lfm2_moe": Architecture(name="lfm2moe", more=lfm2_config.gguf_keys, unread=_CONVOLVED, square=True),
    }
)
"""Rows by Hugging Face's model_type."""


def architecture(config: ModelConfig, path: Path) -> Architecture:
    """Return the table's row of a model.

    Raises:
        UnsupportedModelError: the table has no row for the model's type.
    """
    row = ARCHITECTURES.get(config.model_type)
    if row is None:
        raise UnsupportedModelError(
            f"{path}: GGUF files are not written for {config.model_type} yet, but for {', '.join(ARCHITECTURES)}; "
            "such a model can be quantised while it is loaded, with `isq`"
        )
    return row
