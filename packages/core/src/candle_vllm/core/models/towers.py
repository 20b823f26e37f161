# SPDX-License-Identifier: MIT
"""Text model of a multimodal checkpoint: its configuration and the names of its tensors.

Vision tensors are separated, and `assembly/tower.py` loads them for supported families; audio tensors are dropped.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from candle_vllm.core.errors import InvalidFileError, WeightsError
from candle_vllm.core.fields import Fields
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.quantization.tensors import StoredTensor

_INTERNVL = MappingProxyType({
    "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM",
    "llama": "LlamaForCausalLM", "internlm2": "InternLM2ForCausalLM", "gpt_oss": "GptOssForCausalLM",
})  # fmt: skip
_LLAVA_NEXT = MappingProxyType({
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "granite": "GraniteForCausalLM",
})  # fmt: skip
_QWEN35 = MappingProxyType({"qwen3_5_text": "Qwen3_5ForCausalLM", "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM"})
_MISTRAL3 = MappingProxyType({
    "mistral": "MistralForCausalLM", "ministral3": "Ministral3ForCausalLM", "mistral4": "Mistral4ForCausalLM",
})  # fmt: skip
_KIMI = MappingProxyType({"kimi_k2": "DeepseekV3ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM"})

TOWERS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "Apertus1p5ForConditionalGeneration": {"apertus1p5_text": "ApertusForCausalLM"},
        "DeepseekOCR2ForCausalLM": {"deepseek_ocr2_text": "DeepseekOcr2ForCausalLM"},
        "DeepseekOCRForCausalLM": {"deepseek_ocr2_text": "DeepseekOcr2ForCausalLM"},
        "DeepseekOcr2ForConditionalGeneration": {"deepseek_ocr2_text": "DeepseekOcr2ForCausalLM"},
        "AyaVisionForConditionalGeneration": {"cohere2": "Cohere2ForCausalLM", "cohere": "CohereForCausalLM"},
        "Cohere2VisionForConditionalGeneration": {"cohere2": "Cohere2ForCausalLM"},
        "DotsOCRForCausalLM": {"qwen2": "Qwen2ForCausalLM"},
        "Exaone4_5_ForConditionalGeneration": dict.fromkeys(("exaone4", "exaone4_5_text"), "Exaone4ForCausalLM"),
        "Gemma3ForConditionalGeneration": {"gemma3_text": "Gemma3ForCausalLM"},
        "Gemma3nForConditionalGeneration": {"gemma3n_text": "Gemma3nForCausalLM"},
        "Gemma4ForConditionalGeneration": {"gemma4_text": "Gemma4ForCausalLM"},
        "Gemma4UnifiedForConditionalGeneration": {"gemma4_unified_text": "Gemma4UnifiedForCausalLM"},
        "InklingForConditionalGeneration": dict.fromkeys(("inkling_text", "inkling_model"), "InklingForCausalLM"),
        "InternVLChatModel": _INTERNVL,  # the class of the original repositories
        "InternVLForConditionalGeneration": _INTERNVL,
        "KimiK25ForConditionalGeneration": _KIMI,
        "Kimi_K25ForConditionalGeneration": _KIMI,  # the spelling of transformers
        "KimiVLForConditionalGeneration": {"deepseek_v3": "DeepseekV3ForCausalLM"},
        "Lfm2VlForConditionalGeneration": {"lfm2": "Lfm2ForCausalLM"},
        "LightOnOcrForConditionalGeneration": {"qwen3": "Qwen3ForCausalLM"},
        "Llama4ForConditionalGeneration": {"llama4_text": "Llama4ForCausalLM"},
        "LlavaForConditionalGeneration": {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"},
        "LlavaNextForConditionalGeneration": _LLAVA_NEXT,
        "LlavaOnevisionForConditionalGeneration": {"qwen2": "Qwen2ForCausalLM"},
        "Glm46VForConditionalGeneration": {"glm4v_text": "Glm4ForCausalLM"},
        "Glm4vForConditionalGeneration": {"glm4v_text": "Glm4ForCausalLM"},
        "Glm4vMoeForConditionalGeneration": {"glm4v_moe_text": "Glm4MoeForCausalLM"},
        "Glm5NextForConditionalGeneration": {"glm5_next_text": "Glm5NextForCausalLM"},
        "GlmOcrForConditionalGeneration": {"glm_ocr_text": "Glm4ForCausalLM"},
        "GOTQwenForCausalLM": {"qwen2": "Qwen2ForCausalLM"},  # the class of GOT-OCR 2.0's original repository
        "GotOcr2ForConditionalGeneration": {"qwen2": "Qwen2ForCausalLM"},
        "HunYuanVLForConditionalGeneration": {"hunyuan_vl_text": "HunYuanDenseV1ForCausalLM"},
        "Granite4VisionForConditionalGeneration": dict.fromkeys(
            ("granite4_vision_text", "granite"), "GraniteForCausalLM"
        ),
        "Idefics3ForConditionalGeneration": {"llama": "LlamaForCausalLM"},
        "SmolVLMForConditionalGeneration": {"llama": "LlamaForCausalLM"},
        "MiniCPMOcrForConditionalGeneration": _QWEN35,
        "MiniCPMV4_6ForConditionalGeneration": _QWEN35,
        "MiniCPMV4_7ForConditionalGeneration": _QWEN35,
        "MiniMaxM3SparseForConditionalGeneration": {"minimax_m3_vl_text": "MiniMaxM3VLForCausalLM"},
        "Mistral3ForConditionalGeneration": _MISTRAL3,
        "MuseGlimmerForConditionalGeneration": {"muse_glimmer_text": "MuseGlimmerForCausalLM"},
        "PaddleOCRVLForConditionalGeneration": {"paddleocr_vl_text": "Ernie4_5ForCausalLM"},
        "PaliGemmaForConditionalGeneration": {"gemma": "GemmaForCausalLM", "gemma2": "Gemma2ForCausalLM"},
        "Phi3VForCausalLM": {"phi3": "Phi3ForCausalLM"},
        "QianfanOCRForConditionalGeneration": {"qwen3": "Qwen3ForCausalLM"} | _INTERNVL,
        "Qwen2VLForConditionalGeneration": {"qwen2_vl_text": "Qwen2ForCausalLM"},
        "Qwen2_5_VLForConditionalGeneration": {"qwen2_5_vl_text": "Qwen2ForCausalLM"},
        "Qwen3VLForConditionalGeneration": {"qwen3_vl_text": "Qwen3ForCausalLM"},
        "Qwen3VLMoeForConditionalGeneration": {"qwen3_vl_moe_text": "Qwen3MoeForCausalLM"},
        "Step3p7ForConditionalGeneration": {"step3p5": "Step3p5ForCausalLM"},
        "UnlimitedOCRForCausalLM": {"unlimited_ocr_text": "UnlimitedOcrForCausalLM"},
        "UnlimitedOcrForConditionalGeneration": {"unlimited_ocr_text": "UnlimitedOcrForCausalLM"},
        "Qwen3_5ForConditionalGeneration": {"qwen3_5_text": "Qwen3_5ForCausalLM"},
        "Qwen3_5MoeForConditionalGeneration": {"qwen3_5_moe_text": "Qwen3_5MoeForCausalLM"},
        "Qwen4ExpForConditionalGeneration": {"qwen4_exp_text": "Qwen4ExpForCausalLM"},
    }
)
"""For each multimodal architecture: model_type of `text_config` (the first is the default), and text architecture."""

FLAT = frozenset({
    "DeepseekOCR2ForCausalLM", "DeepseekOCRForCausalLM", "DotsOCRForCausalLM", "GOTQwenForCausalLM",
    "Glm5NextForConditionalGeneration", "HunYuanVLForConditionalGeneration", "PaddleOCRVLForConditionalGeneration",
    "Phi3VForCausalLM", "Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration",
    "UnlimitedOCRForCausalLM",
})  # fmt: skip
"""Architectures whose published configs have the text model's keys beside `vision_config`, without a `text_config`."""

_QWEN2_VL = MappingProxyType({
    "vocab_size": 152064, "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
})  # fmt: skip

_GEMMA4 = MappingProxyType({
    "vocab_size": 262144, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 30,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6, "sliding_window": 512,
})  # fmt: skip

_HUNYUAN = MappingProxyType({
    "vocab_size": 290943, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
})  # fmt: skip

_MINISTRAL3 = MappingProxyType({
    "vocab_size": 131072, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 34,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-5,
})  # fmt: skip

_LFM2 = MappingProxyType({
    "vocab_size": 65536, "hidden_size": 2560, "intermediate_size": 12288, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 128000, "norm_eps": 1e-5,
})  # fmt: skip

_LLAMA = MappingProxyType({
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
})  # fmt: skip

DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    "qwen2": {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6},
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text"), _QWEN2_VL),
    "gemma3_text": {
        "vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "query_pre_attn_scalar": 256,
    },
    "gemma4_text": _GEMMA4,
    "hunyuan_vl_text": _HUNYUAN,
    "lfm2": _LFM2,
    "glm4v_text": {"partial_rotary_factor": 1.0},
    "glm4v_moe_text": {"partial_rotary_factor": 1.0},
    "glm_ocr_text": {"partial_rotary_factor": 1.0, "attention_bias": False},
    "gemma4_unified_text": {**_GEMMA4, "max_position_embeddings": 262144, "sliding_window": 1024},
    "llama": _LLAMA,
    **dict.fromkeys(("granite", "granite4_vision_text"), _LLAMA),
    "mistral": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
    },
    "ministral3": _MINISTRAL3,
})  # fmt: skip
"""Keys that published configs omit in `text_config`, by model_type: the defaults in transformers."""

_DEEP = ("deepstack_layer_map", "spatial_vision_layer", "spatial_target_layers")  # keys of Granite 4 Vision
_CARRIED = ("dtype", "torch_dtype")  # keys of the whole model that also apply to the text model
_TEXT = re.compile(r"(?:language_model\.(?=model\.|lm_head\.|output\.)|model\.(?:language_model|text_model)\.)(.*)")
_PARTS = (
    "vit|vision_(?:tower(?:_high)?|model|embedder|embed_tokens|adapter|projection|encoder|tokenizer)|connector|visual"
    "|(?:(?:multi_modal|mm)_)?projector(?:_vary)?|(?:layerwise|spatial)_projectors|vit_large_projector|sam_model|merger"
    "|embed_(?:vision|audio)|audio_to(?:wer|kenizer)|mlp_AR|mlp1|patch_merge_mlp|qwen2_model"
)
_UNUSED = re.compile(r"[^.]*audio|visual\.vision_model\.(?:head|embeddings\.packing_position_embedding)\.")
"""Prefixes of tensors that are not loaded: audio towers, and two unused parts of PaddleOCR-VL's vision tower."""
_OTHER = re.compile(rf"(?:model\.)?((?:{_PARTS})\..*|image_newline|view_sep[ae]rator)")


def text_fields(
    architecture: str, config: Mapping[str, Any], path: Path, tensors: Collection[str] | None = None
) -> tuple[str, Fields]:
    """Return architecture and fields of the text model; a model that is not multimodal is its own text model.

    Args:
        architecture: the architecture in `config`.
        config, path: contents and path of config.json.
        tensors: names of the text model's tensors, as in the checkpoint that `split_towers` returns. Without
            `tie_word_embeddings` they show whether embeddings are tied. None if the names are not known.

    Raises:
        InvalidFileError, UnsupportedModelError: text_config is missing, or describes an unsupported model.
        WeightsError: the checkpoint has no text model.
    """
    if architecture not in TOWERS:
        return architecture, Fields(config, path)
    key = "llm_config" if architecture == "InternVLChatModel" else "text_config"
    text, prefix = Fields(config, path).section(key).values, f"{key}."
    allowed = TOWERS[architecture]
    if not text and architecture in FLAT:
        text, prefix = {key: value for key, value in config.items() if key != "model_type"}, ""
    if not text:
        raise InvalidFileError(f"{path}: {key} is missing: {architecture} keeps its text model's keys there")
    model_type = Fields({prefix + key: value for key, value in text.items()}, path, prefix).choice(
        "model_type", next(iter(allowed)), *allowed
    )
    if tensors is not None and not any(name.startswith("model.") for name in tensors):
        raise WeightsError(
            f"{path.parent}: the checkpoint has no tensor of the text model (language_model.*): "
            f"download the checkpoint of the whole {architecture}"
        )
    values = {key: config[key] for key in _CARRIED if key in config} | dict(DEFAULTS.get(model_type, {}))
    values |= {key: value for key, value in text.items() if value is not None or key not in values}
    deep = Fields(config, path).section("vision_config").get("deepstack_visual_indexes", list, [])
    values["n_deepstack_layers"] = len(deep)  # GGUF's name of the key
    values |= {key: config[key] for key in _DEEP if architecture.startswith("Granite4Vision") and key in config}
    values["text_eos_token_id"] = [*_ids(text, path)]  # which begins n-grams, whatever ends an answer
    values["eos_token_id"] = [*_ids(config, path), *_ids(text, path)]
    values["tie_word_embeddings"] = _tied((Fields(config, path), Fields(text, path)), tensors)
    return allowed[model_type], Fields({prefix + key: value for key, value in values.items()}, path, prefix)


def split_towers(config: Mapping[str, Any], checkpoint: Checkpoint) -> tuple[Checkpoint, Checkpoint | None]:
    """Split a checkpoint into the text model's tensors, named as in a text-only model, and the vision tensors.

    Vision names lose the prefix "model.". A checkpoint that is not multimodal is returned unchanged, with None.

    Raises:
        InvalidFileError: two tensors would get the same name.
    """
    names = config.get("architectures")
    if not isinstance(names, list) or not any(isinstance(name, str) and name in TOWERS for name in names):
        return checkpoint, None
    made: dict[str, StoredTensor] = {}
    others: dict[str, StoredTensor] = {}
    for name, tensor in checkpoint.tensors.items():
        other, found = _OTHER.fullmatch(name), _TEXT.fullmatch(name)
        if other is not None and _UNUSED.match(other[1]):
            continue
        plain = name if found is None else ("" if name.startswith("language_model.") else "model.") + found.group(1)
        plain = plain.replace("model.encoder.layers.", "model.layers.", 1)  # as transformers saves Qianfan-OCR
        plain, part = (plain, made) if other is None else (other[1], others)
        if plain in part:
            raise InvalidFileError(f"{checkpoint.path}: tensor {plain} is stored under two names")
        part[plain] = dataclasses.replace(tensor, name=plain)
    return checkpoint.with_tensors(made), checkpoint.with_tensors(others)


def of_tower(name: str) -> bool:
    """Whether a tensor or a module of a multimodal model is outside its text model."""
    return _OTHER.match(name) is not None


def _ids(config: Mapping[str, Any], path: Path) -> tuple[int, ...]:
    return Fields(config, path).token_ids("eos_token_id", lowest=-1)


def _tied(parts: Iterable[Fields], tensors: Collection[str] | None) -> bool:
    """Whether embeddings are tied by either part of the config; without the key, whether no output layer is stored."""
    said = [part.get("tie_word_embeddings", bool) for part in parts if "tie_word_embeddings" in part]
    return any(said) if said else tensors is None or not any(name.startswith("lm_head.") for name in tensors)
