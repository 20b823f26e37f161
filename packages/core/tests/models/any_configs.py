# SPDX-License-Identifier: MIT
"""Tiny configurations of every causal type of transformers: sizes by the names of keys, and a row where that fails."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from candle_vllm.core.testing.toy_model import TOY_VOCAB_SIZE
from packages.core.tests.models.families import ROWS as FAMILIES
from packages.core.tests.models.tiny import SMALL

_SIZES: tuple[tuple[str, int], ...] = (
    (r".*vocab_size|ngram_vocab_size_base", TOY_VOCAB_SIZE),
    (r"num_hidden_layers|n_layers?|num_layers|(en|de)coder_layers|num_(en|de)coder_layers|depth", 2),
    (r"(.*_)?(num_key_value_heads|kv_heads)", 2),
    (r"(.*_)?(num_attention_heads|attention_heads|n_heads?|num_heads)|linear_num_\w+_heads|n_mamba_heads", 4),
    (
        r"hidden_size|hidden_size_global|d_model|n_embd|embedding_size|embedding_dim|hidden_dim|emb_dim|text_hidden_size|out_hidden_size",
        64,
    ),
    (r".*(intermediate_size|ffn_dim|d_ff|n_inner|dim_ff|ffn_hidden_size|mlp_dim)", 96),
    (r"(qk_)?rope_head_dim|rotary_dim", 8),
    (r".*head_dim|dim_head|d_kv|mamba_d_state|state_size|v_head_dim|mamba_d_head|linear_head_dim", 16),
    (r".*lora_rank|.*_rank", 16),
    (r"encoder_hash_byte_group_vocab", 300),
    (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_experts_per_group", 4),
    (r"num_experts_per_tok|moe_topk|moe_k|num_experts_per_token|top_k_experts", 2),
    (
        r"n_group|topk_group|num_expert_group|first_k_dense_replace|num_dense_layers|n_shared_experts|num_shared_experts",
        1,
    ),
    (r"max_position_embeddings|n_positions|max_seq_len|seq_length|model_max_length|max_(source|target)_positions", 512),
    (r"sliding_window|sliding_window_size", 24),
)
"""Sizes by the names that some config has for them; the first that matches counts."""


def _small(config: PreTrainedConfig) -> dict[str, Any]:
    """Sizes for a config, and for the configs inside it."""
    found: dict[str, Any] = {}
    for key in {*vars(config), *config.attribute_map}:
        try:
            value = getattr(config, key, None)
        except RuntimeError:  # which differs from layer to layer
            continue
        if isinstance(value, PreTrainedConfig):
            found[key] = _small(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            size = next((size for pattern, size in _SIZES if re.fullmatch(pattern, key)), None)
            spelled = key in vars(config) or key not in config.attribute_map.values()
            found |= {key: size} if size is not None and spelled else {}
    if "qk_rope_head_dim" in found:  # latent attention, whose rotated part transformers also calls a head
        found |= {key: size for key, size in (("head_dim", 8), ("qk_head_dim", 24)) if key in found}
        found["num_key_value_heads"] = 4
    return found


def tiny_config(name: str) -> dict[str, Any]:
    """What a tiny model of a type is made with beside `SMALL`."""
    row = next((row.config for row in FAMILIES.values() if row.model_type == name), None)
    if row is not None and name not in ROWS:
        return dict(row)
    found = _small(CONFIG_MAPPING[name]())
    for key in ("text_config", "decoder"):
        if isinstance(found.get(key), dict):
            found[key] = {**SMALL, **found[key]}
    return _merged(found, ROWS.get(name, {}))


def _merged(values: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    both = {key: _merged(values[key], each) if isinstance(each, dict) and isinstance(values.get(key), dict) else each
            for key, each in own.items()}  # fmt: skip
    return {**values, **both}


_DECODER = {"is_decoder": True, "pad_token_id": 257}  # positions count no padding tokens, which prompts have none of
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_ssm": 128}
_QWEN4 = {
    "layer_types": ["linear_attention", "indexed_attention"],
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 64,
    "indexer_compress_ratio": 2,
    "hc_lowrank": 16,
}
_TWO = ["linear_attention", "full_attention"]


def _text_of(name: str) -> dict[str, Any]:
    """The text config of a wrapper, as the first row of its text model has it."""
    return {"text_config": next(dict(row.config) for row in FAMILIES.values() if row.model_type == name)}


ROWS: dict[str, Mapping[str, Any]] = {
    **dict.fromkeys(
        ["bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
         "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta",
         "xlm-roberta-xl"],
        _DECODER,
    ),
    "bailing_hybrid": {"layer_types": _TWO},
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {"vision_config": {"per_layer_config": None, "mlp_layer_types": ["dense"] * 2}},
    "falcon_h1": _MAMBA,
    "gemma4": _text_of("gemma4_text"),
    "gemma4_unified": _text_of("gemma4_unified_text"),
    "inkling2_text": {"unpadded_vocab_size": 264},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 16},
    "kimi_linear": {"layer_types": _TWO},
    "lfm3": {"layer_types": ["conv", "sliding_attention", "full_attention"], "num_hidden_layers": 3},
    "mamba2": {"num_heads": 4, "head_dim": 32, "n_groups": 1, "state_size": 16},
    "prophetnet": {"num_hidden_layers": None},
    "qwen3_5": _text_of("qwen3_5_text"),
    "qwen3_5_moe": _text_of("qwen3_5_moe_text"),
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": _DECODER | {
        "axial_pos_embds_dim": [32, 32],
        "axial_pos_shape": [8, 16],
        "attn_layers": ["local", "local"],
        "local_attn_chunk_length": 16,
    },
    "xlnet": {"max_position_embeddings": None},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": _DECODER | {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""What the configs of some types have beside or in place of these sizes."""


def _names(text: str) -> list[str]:
    return text.split()


IN_BATCHES = _names("""
    afmoe apertus arcee aria_text axk1 beam bert bert-generation bitnet camembert cohere cohere2 cohere2_moe
    cohere_compass_text ctrl cwm data2vec-text deepseek_v2 deepseek_v3 diffllama dots1 electra emu3 ernie ernie4_5
    ernie4_5_moe exaone4 exaone_moe flex_olmo flint fuyu gemma gemma2 gemma3 gemma3_text gemma3n_text gemma4
    gemma4_text gemma4_unified gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite got_ocr2 gpt-sw3 gpt2 gpt_bigcode
    gpt_neox gpt_oss granite granite_swa granitemoe granitemoe_swa granitemoeshared helium hrm_text hunyuan_v1_dense
    hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2 kolibri1 laguna llama llama4 llama4_text
    longcat_flash mellum mimo_v2_flash minicpm3 minimax_m2 ministral ministral3 mistral mixtral
    mllama modernbert-decoder moshi moss_transcribe_diarize nanochat nemotron olmo olmo2 olmo3 olmoe opt persimmon
    phi phi3 phi4_multimodal phimoe qwen2 qwen2_moe qwen3 qwen3_moe roberta roberta-prelayernorm roc_bert seed_oss
    smollm3 solar_open starcoder2 vaultgemma xlm-roberta xlm-roberta-xl xmod youtu
""")
"""Types whose keys and values are in this engine's pages."""

ALONE = _names("""
    axk2 bailing_hybrid bamba bart big_bird bigbird_pegasus biogpt blenderbot blenderbot-small bloom blt codegen
    cpmant dbrx deepseek_v32 deepseek_v4 doge dots3_note_text falcon falcon_h1 falcon_mamba git glm_moe_dsa gpt_neo
    gpt_neox_japanese gptj granitemoehybrid hy_v4 inkling2_text inkling_text jamba jetmoe kimi_linear lfm2 lfm2_moe
    lfm3 mamba mamba2 marian mbart megatron-bert minimax minimax_m3_vl_text mpt mvp nemotron_h olmo_hybrid openai-gpt
    pegasus plbart
    qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp qwen4_exp_text recurrent_gemma reformer
    rembert roformer rwkv stablelm trocr whisper xglm xlm xlnet xlstm zamba zaya
""")
"""Types that run one sequence at a time, with a tiny config; some of them in batches with another one."""

REFUSED = {
    "dots3_note": "its audio and vision towers have no tiny config here",
    "gemma3n": "its vision tower needs the package timm; its text model is gemma3n_text",
    "gemma4_assistant": "it drafts for another model, whose keys and values it reads",
    "gemma4_unified_assistant": "it drafts for another model, whose keys and values it reads",
    "musicgen": "transformers builds no causal class of its config",
    "musicgen_melody": "transformers builds no causal class of its config",
    "prophetnet": "its head reads a second result of its layers",
    "zamba2": "its cache goes on to other logits than those of the whole text, by a thousandth",
}
"""Types that are not tested, or fail, and why."""
