# SPDX-License-Identifier: MIT
"""Read the config of Gemma, Gemma 2, Gemma 3 and EmbeddingGemma from config.json or GGUF metadata."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.loading.config import ModelConfig, gguf_windows, layer_windows, shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.rope import RopeConfig, rope_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.models.attention_names import local_keys, window_keys
from candle_vllm.core.quantization.plain import rounded

ROUNDED = {"bfloat16": "BF16", "float16": "F16"}
_LARGEST = {"gemma2": 46, "gemma3": 62}
"""Layers of the 27B models, whose attention scale differs and is not stored in GGUF files."""
_USUAL = {"vocab_size": 256000, "head_dim": 256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6}
_OF_PALIGEMMA: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    "gemma": {
        **_USUAL, "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 16, "hidden_act": "gelu_pytorch_tanh",
    },
    "gemma2": {
        **_USUAL, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
        "num_key_value_heads": 4, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
    },
})  # fmt: skip
"""Defaults of transformers, by model_type, for keys that PaliGemma's `text_config` leaves out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemmaConfig(ModelConfig):
    """The config of Gemma, Gemma 2 and Gemma 3.

    Attributes:
        embedding_scale: factor of the embeddings: the square root of the hidden size, which `_shared_from_hf` rounds.
        query_scale: factor of the attention scores.
        final_softcap, attention_softcap: softcap of the logits and of the attention scores; None for no cap.
        sandwich: the outputs of attention and of the feed-forward layer are normalised too (Gemma 2 and 3).
        qk_norm: q and k are RMS-normalised per head before rotation (Gemma 3).
        local_rope: rotary settings of layers with a window, if they differ from `rope` (Gemma 3).
        attention_bias: the q, k, v and output projections have biases.
    """

    embedding_scale: float
    query_scale: float
    final_softcap: float | None = None
    attention_softcap: float | None = None
    sandwich: bool = True
    qk_norm: bool = False
    local_rope: RopeConfig | None = None
    attention_bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, cap in (("final", self.final_softcap), ("attn", self.attention_softcap)):
            if cap is not None and not cap > 0:
                raise InvalidFileError(f"the model's config says {name}_logit_softcapping is {cap}; it must be above 0")


# ---- config.json -----------------------------------------------------------------------------------------------------


def config_from_hf(fields: Fields, model_type: str) -> GemmaConfig:
    """Read `config.json` of gemma, gemma2 and gemma3_text, and `text_config` of PaliGemma and of Gemma 3."""
    if fields.prefix:
        fields = fields.with_absent(**_OF_PALIGEMMA.get(model_type, {}))
    if model_type == "gemma2":
        fields = fields.with_absent(attn_logit_softcapping=50.0, final_logit_softcapping=30.0)
    shared = _shared_from_hf(fields, model_type)
    if model_type == "gemma":
        return GemmaConfig(**shared, sandwich=False)
    layers, period = shared["num_layers"], 2
    if model_type == "gemma3_text":
        period = fields.count("sliding_window_pattern", 6)
    shared["sliding_windows"] = _windows(fields, layers, period)
    cap = fields.get("attn_logit_softcapping", float, None)
    if model_type == "gemma2":
        return GemmaConfig(**shared, attention_softcap=cap)
    if cap is not None:
        raise UnsupportedModelError(f"{fields.path}: attn_logit_softcapping is {cap}; Gemma 3 has none: set it to null")
    shared["max_position"] = fields.count("max_position_embeddings")  # it already includes rope scaling
    shared["rope"] = layer_rope(fields, shared, "full_attention")
    return GemmaConfig(**shared, qk_norm=True, local_rope=layer_rope(fields, shared, "sliding_attention"))


def _shared_from_hf(fields: Fields, model_type: str) -> dict[str, Any]:
    """Read the fields that all Gemma versions share.

    transformers rounds the factor of embeddings to the type of the weights, and the models were trained that way.
    """
    two_way = fields.get("use_bidirectional_attention", bool, False)
    if two_way and not (fields.prefix and model_type in _OF_PALIGEMMA):  # of PaliGemma, whose tower sees to it
        raise UnsupportedModelError(f"{fields.path}: use_bidirectional_attention is true, which is not implemented")
    if model_type == "gemma":
        fields.choice("hidden_act", "gelu_pytorch_tanh", "gelu_pytorch_tanh", "gelu")  # both mean the tanh form
    else:
        fields.choice("hidden_activation", "gelu_pytorch_tanh", "gelu_pytorch_tanh")
    shared = shared_from_hf(fields, model_type)
    scalar = shared["head_dim"] if model_type == "gemma" else fields.get("query_pre_attn_scalar", float)
    if not scalar > 0:
        raise InvalidFileError(f"{fields.path}: query_pre_attn_scalar is {scalar}; it must be above 0")
    stored = fields.get("dtype", str, fields.get("torch_dtype", str, "float32"))
    return shared | {
        "head_dim": fields.count("head_dim"),
        "tie_embeddings": fields.get("tie_word_embeddings", bool, True),
        "embedding_scale": rounded(math.sqrt(shared["hidden_size"]), ROUNDED.get(stored, "F64")),
        "query_scale": scalar**-0.5,
        "final_softcap": fields.get("final_logit_softcapping", float, None),
        "attention_bias": fields.get("attention_bias", bool, False),
    }


def _windows(fields: Fields, layers: int, period: int) -> tuple[int | None, ...]:
    """The windows by `layer_types`; without this key, the last of every `period` layers has no window."""
    local = layer_windows(fields, layers, 1) or tuple((layer + 1) % period or None for layer in range(layers))
    window = fields.get("sliding_window", int) if any(local) else None
    return tuple(window if has else None for has in local)


def layer_rope(fields: Fields, shared: dict[str, Any], kind: str) -> RopeConfig:
    """The rotary settings of one kind of layer, from `rope_parameters` (transformers 5) or from the older flat keys.

    `rope_scaling` applies to layers without a window, also beside `rope_parameters`.
    """
    local = kind == "sliding_attention"
    theta = fields.get("rope_local_base_freq", float, 1e4) if local else fields.get("rope_theta", float, 1e6)
    stored = {"rope_theta": theta, **fields.section("rope_parameters").section(kind).values}
    scaling = {} if local else fields.section("rope_scaling").values
    one = Fields({"rope_parameters": stored, "rope_scaling": scaling}, fields.path)
    return rope_from_hf(one, shared["head_dim"], shared["max_position"])


# ---- GGUF ------------------------------------------------------------------------------------------------------------


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> GemmaConfig:
    """Read GGUF metadata of gemma, gemma2 and gemma3; optional keys have llama.cpp's defaults."""
    shared = shared_from_gguf(fields, checkpoint)
    family, layers, position = shared["model_type"], shared["num_layers"], fields.count("context_length")
    hidden, dim = shared["hidden_size"], shared["head_dim"]
    scalar = hidden // shared["num_heads"] if layers == _LARGEST.get(family) else dim
    shared |= {"embedding_scale": math.sqrt(hidden), "query_scale": scalar**-0.5, "max_position": position}
    if family == "gemma":
        return GemmaConfig(**shared, sandwich=False)
    window = fields.get("attention.sliding_window", int, 4096 if family == "gemma2" else 0) or None
    shared["sliding_windows"] = gguf_windows(fields, layers, window, period=2 if family == "gemma2" else 6)
    cap = fields.get("final_logit_softcapping", float, 30.0 if family == "gemma2" else 0.0)
    shared["final_softcap"] = cap or None
    if family == "gemma2":
        cap = fields.get("attn_logit_softcapping", float, 50.0)
        return GemmaConfig(**shared, attention_softcap=cap or None)
    local = RopeConfig(theta=fields.get("rope.freq_base_swa", float, 1e4), dim=shared["rope"].dim)
    return GemmaConfig(**shared, qk_norm=True, local_rope=local)


def gemma2_keys(config: Any) -> dict[str, Any]:
    """The GGUF metadata of a Gemma 2 in addition to the keys of every model."""
    caps = {"attn_logit_softcapping": config.attention_softcap, "final_logit_softcapping": config.final_softcap}
    missing = [key for key, cap in caps.items() if not cap]
    if missing:
        raise UnsupportedModelError(f"llama.cpp's gemma2 needs {' and '.join(missing)}, which this model lacks")
    return window_keys(config) | {key: float(cap) for key, cap in caps.items()}


def gemma3_keys(config: Any) -> dict[str, Any]:
    """The GGUF metadata of a Gemma 3 in addition to the keys of every model."""
    cap = config.final_softcap
    return local_keys(config) | ({} if cap is None else {"final_logit_softcapping": float(cap)})
