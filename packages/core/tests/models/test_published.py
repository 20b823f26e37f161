# SPDX-License-Identifier: MIT
"""Checkpoints as they are published load: their configs with old keys and nulls, their tensors under the old names.

The shape of a model is shrunk and its structure kept; transformers makes and saves it, in the names of the published
files, and its logits are the reference.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from candle_vllm.core.models.registry import family_from_hf
from candle_vllm.core.testing.toy_model import write_toy_tokenizer
from packages.core.tests.models.published_configs import CONFIGS
from packages.core.tests.models.published_shelf import SHELF
from packages.core.tests.models.tiny import SMALL, eager_logits, error, randomise, some_tokens
from tests.common_run import few

TOKENS = some_tokens(56)
NAMES = {  # a name of each kind that transformers 5 changes as it reads, and that published files have
    "Mixtral-8x7B": "model.layers.1.block_sparse_moe.experts.3.w1.weight",
    "Qwen1.5-MoE-A2.7B": "model.layers.1.mlp.experts.3.gate_proj.weight",
    "Qwen3-30B-A3B": "model.layers.1.mlp.experts.3.down_proj.weight",
    "GLM-4.5-Air": "model.layers.1.mlp.experts.3.up_proj.weight",
    "Qwen3-Next-80B-A3B": "model.layers.1.mlp.experts.3.down_proj.weight",
    "DeepSeek-V2-Lite": "model.layers.1.mlp.experts.3.up_proj.weight",
    "DeepSeek-R1": "model.layers.3.mlp.experts.3.up_proj.weight",
    "LFM2-8B-A1B": "model.layers.3.feed_forward.experts.3.w1.weight",
    "granite-3.1-1b-a400m": "model.layers.1.block_sparse_moe.input_linear.weight",
    "OLMoE-1B-7B": "model.layers.1.mlp.experts.3.gate_proj.weight",
    "ERNIE-4.5-21B-A3B": "model.layers.1.mlp.moe_statics.e_score_correction_bias",
    "MiniMax-M2": "model.layers.1.block_sparse_moe.e_score_correction_bias",
    "GLM-4.7-Flash": "model.layers.1.mlp.experts.3.up_proj.weight",
    "Solar-Open-100B": "model.layers.1.mlp.experts.3.up_proj.weight",
    "Hy3": "model.layers.1.mlp.expert_bias",
}


KNOWN = {**CONFIGS, **SHELF}


def shrunk(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same keys with small numbers: as many dimensions a head, two heads, a few experts, layers and words."""
    small = dict(config)
    heads, layers = config["num_attention_heads"], max(2, config.get("first_k_dense_replace", 0) + 1)
    four = bool({"no_rope_layers", "conv_bias", "linear_conv_kernel_dim"} & config.keys())
    four |= len(set(config.get("layer_types") or [])) > 1
    layers = 7 if "sliding_window_pattern" in config else 4 if four else layers
    shared = heads // (config.get("num_key_value_heads") or heads)
    values: dict[str, Any] = {
        "num_attention_heads": 2,
        "num_key_value_heads": max(1, 2 // shared),
        "hidden_size": -(-config["hidden_size"] // heads * 2 // 16) * 16,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "vocab_size": SMALL["vocab_size"],
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 96,
        "kv_lora_rank": 32,
        "q_lora_rank": 48,
        "n_routed_experts": 16,
        "num_experts": 16,
        "num_local_experts": 16 if config.get("num_local_experts") else 0,
        "moe_num_experts": 16,
        "block_ff_dim": 96,
        "block_multiple_of": 32,
        "full_attn_idxs": [layer for layer in config.get("full_attn_idxs", []) if layer < layers],
        "layer_types": config.get("layer_types", [])[:layers],
        "no_rope_layers": config.get("no_rope_layers", [])[:layers],
        "linear_num_key_heads": 4 * config.get("linear_num_key_heads", 1) // config.get("linear_num_value_heads", 1),
        "linear_num_value_heads": 4,
        "linear_value_head_dim": config.get("linear_key_head_dim"),
        "bos_token_id": 256,
        "eos_token_id": 258,
        "pad_token_id": 0,
    }
    small |= {key: value for key, value in values.items() if config.get(key) is not None}
    window = config.get("sliding_window")
    if window is not None and window < 10000:
        small["sliding_window"] = 16
    small.pop("quantization_config", None)  # its tensors' own tests: `test_experts.py`
    small["torch_dtype"] = "float32"  # Gemma's factor of embeddings is rounded to it
    if "original_max_position_embeddings" in config:
        small["original_max_position_embeddings"] = 48  # transformers chooses factors by the text, which is longer
    return small


def write_published(folder: Path, config: dict[str, Any]) -> torch.Tensor:
    """The checkpoint that transformers makes of a config, saved by the old names, with that config beside it.

    Returns:
        Its logits [T, V] of `TOKENS`.
    """
    transformers_logging.set_verbosity_error()
    known = json.loads(json.dumps(config))
    known["model_type"] = {"kimi_k2": "deepseek_v3"}.get(known["model_type"], known["model_type"])  # by its own code
    if (scaling := known.get("rope_scaling")) and scaling.get("type") == "su":
        scaling["type"] = "longrope"  # transformers has forgotten the older name
    read = AutoConfig.for_model(**known)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(read, dtype=torch.float32, attn_implementation="eager").eval()
    randomise(model)
    model.save_pretrained(folder, save_original_format=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_toy_tokenizer(folder)
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].float()


@pytest.mark.parametrize("name", KNOWN)
def test_a_published_config_is_read(name: str) -> None:
    config = KNOWN[name]
    found = family_from_hf(config, Path("config.json"))[1]
    assert (found.num_layers, found.num_heads) == (config["num_hidden_layers"], config["num_attention_heads"])
    assert found.max_position >= config["max_position_embeddings"]


@pytest.mark.one_of_each(3)
@pytest.mark.parametrize("name", few(KNOWN, *CONFIGS))
def test_a_published_checkpoint_gives_transformers_logits(name: str, tmp_path: Path) -> None:
    theirs = write_published(tmp_path, shrunk(KNOWN[name]))
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert NAMES.get(name, "model.embed_tokens.weight") in file.keys()  # noqa: SIM118 (it is no mapping)
    assert error(eager_logits(tmp_path, TOKENS, [len(TOKENS)]), theirs) < 1e-4
