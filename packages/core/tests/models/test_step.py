# SPDX-License-Identifier: MIT
"""Step 3.5 beyond the table of families: files as they are published, and configs that are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.models.llama import LlamaConfig
from candle_vllm.core.models.registry import family_from_hf
from candle_vllm.core.testing.toy_model import write_toy_tokenizer
from packages.core.tests.models.families import STEP
from packages.core.tests.models.tiny import config_of, eager_logits, error, some_tokens, their_logits, write_tiny

PATH = Path("config.json")
TOKENS = some_tokens(40)
FOUR = ["full_attention", *["sliding_attention"] * 3]
FLASH: dict[str, Any] = {  # as Step 3.5 Flash is published: three layers behind the last predict further tokens
    "architectures": ["Step3p5ForCausalLM"],
    "model_type": "step3p5",
    "att_impl_type": "GQA",
    "attention_other_setting": {
        "attention_type": "sliding_attention",
        "head_dim": 128,
        "num_attention_groups": 8,
        "num_attention_heads": 96,
        "true_head_dim": 128,
    },
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 11264,
    "layer_types": FOUR * 12,
    "max_position_embeddings": 262144,
    "max_seq_len": 262144,
    "moe_every_n_layer": 1,
    "moe_intermediate_size": 1280,
    "moe_layer_offset": 0,
    "moe_layers_enum": ",".join(map(str, range(3, 45))),
    "moe_num_experts": 288,
    "moe_router_activation": "sigmoid",
    "moe_router_scaling_factor": 3.0,
    "moe_top_k": 8,
    "need_fp32_gate": True,
    "norm_expert_weight": True,
    "num_attention_groups": 8,
    "num_attention_heads": 64,
    "num_hidden_layers": 45,
    "num_nextn_predict_layers": 3,
    "partial_rotary_factors": [0.5, 1.0, 1.0, 1.0] * 12,
    "rope_scaling": {
        "factor": 2.0,
        "high_freq_factor": 32.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 131072,
        "rope_type": "llama3",
    },
    "rope_theta": [5000000.0, 10000.0, 10000.0, 10000.0] * 12,
    "share_expert_dim": 1280,
    "sliding_window": 512,
    "swiglu_limits": [0.0] * 43 + [7, 7] + [0.0] * 3,
    "swiglu_limits_shared": [0.0] * 43 + [16, 16] + [0.0] * 3,
    "torch_dtype": "bfloat16",
    "use_head_wise_attn_gate": True,
    "use_moe_router_bias": True,
    "use_rope_layers": [],
    "vocab_size": 128896,
    "yarn_only_types": ["full_attention"],
}


def read(**changes: Any) -> LlamaConfig:
    config = family_from_hf(FLASH | changes, PATH)[1]
    assert isinstance(config, LlamaConfig)
    return config


def test_a_published_config_is_read() -> None:
    config = read()
    assert [config.heads(layer) for layer in range(5)] == [(64, 8), (96, 8), (96, 8), (96, 8), (64, 8)]
    assert config.sliding_windows == (None, 512, 512, 512) * 11 + (None,)
    assert config.sparse_layers == frozenset(range(3, 45))
    assert config.mlp_gates == (("silu", "silu"),) * 43 + (("silu_7", "silu_16"),) * 2
    assert (config.rope.kind, config.rope.theta, config.rope.dim, config.max_position) == ("llama3", 5e6, 64, 262144)
    local, mixture = config.local_rope, config.mixture
    assert local is not None
    assert mixture is not None
    assert (local.kind, local.theta, local.dim) == ("default", 1e4, 128)
    assert (mixture.experts, mixture.top_k, mixture.scale, mixture.shared_size) == (288, 8, 3.0, 1280)
    assert config == read(norm_expert_weight=None, use_rope_layers=None, att_impl_type=None)


def test_published_keys_and_names_give_transformers_logits(tmp_path: Path) -> None:
    """Gate and up of experts are tensors of their own, and a layer behind the last predicts further tokens."""
    usual, folder = write_tiny(tmp_path / "usual", "step3p5", **STEP), tmp_path / "published"
    stored, layers = load_file(usual / "model.safetensors"), STEP["num_hidden_layers"]
    tensors = {f"model.layers.{layers}.eh_proj.weight": torch.ones(2, 4)}
    for name, data in stored.items():
        name = name.replace("mlp.gate.e_score_correction_bias", "moe.router_bias")
        name = name.replace("mlp.gate.", "moe.gate.").replace("mlp.shared_experts.", "share_expert.")
        if name.endswith("mlp.experts.gate_up_proj"):
            start = name.removesuffix("mlp.experts.gate_up_proj")
            tensors |= {
                f"{start}moe.{part}_proj.weight": half.contiguous()
                for part, half in zip(("gate", "up"), data.chunk(2, 1), strict=True)
            }
        elif name.endswith("mlp.experts.down_proj"):
            tensors[name.replace("mlp.experts.down_proj", "moe.down_proj.weight")] = data
        else:
            tensors[name] = data
    full, local = (STEP["rope_parameters"][kind] for kind in ("full_attention", "sliding_attention"))
    ropes = {"rope_theta": "rope_theta", "partial_rotary_factors": "partial_rotary_factor"}
    own = {name: [full[key], local[key], local[key], full[key]] for name, key in ropes.items()}
    scaling = {key: value for key, value in full.items() if key not in ropes.values()}
    other = {"attention_type": "sliding_attention", "num_attention_heads": 6, "num_attention_groups": 2, "head_dim": 32}
    config = {
        "architectures": ["Step3p5ForCausalLM"],
        **{key: value for key, value in config_of(usual).items() if not isinstance(value, (dict, list))},
        "moe_num_experts": 6,
        "moe_top_k": 3,
        "num_attention_groups": 2,
        "moe_layers_enum": "1,2",
        **{key: [*STEP[key], 0.0] for key in ("swiglu_limits", "swiglu_limits_shared")},
        "layer_types": [*STEP["layer_types"], "full_attention"],
        "attention_other_setting": other,
        "rope_scaling": scaling,
        "num_nextn_predict_layers": 1,
        **own,
    }
    for key in ("n_routed_experts", "num_experts_per_tok", "num_key_value_heads", "num_sliding_attention_heads"):
        config.pop(key)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    write_toy_tokenizer(folder)
    theirs = their_logits(usual, TOKENS)
    assert error(eager_logits(folder, TOKENS, [40]), theirs) < 1e-5
    without = config | {"swiglu_limits": None, "swiglu_limits_shared": None}
    (folder / "config.json").write_text(json.dumps(without))
    assert error(eager_logits(folder, TOKENS, [40]), theirs) > 1e-2, "no factor is beyond its limit"


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"num_hidden_layers": 1 << 24}, InvalidFileError, "num_hidden_layers is 16777216; it must be 1 to 4096"),
        ({"swiglu_limits": [9.0] * 45}, UnsupportedModelError, r"swiglu_limits is \[9\.0.*implemented: 7 and 16"),
        ({"swiglu_limits_shared": [7.0] * 3}, InvalidFileError, "swiglu_limits_shared has 3 entries for 45 layers"),
        ({"moe_layers_enum": "3,x"}, InvalidFileError, "moe_layers_enum is '3,x', not numbers"),
        ({"rope_theta": [5e6, 1e4, 1e3, 1e4] * 12}, UnsupportedModelError, "rope_theta has several numbers"),
        ({"use_head_wise_attn_gate": False}, UnsupportedModelError, "use_head_wise_attn_gate is False; implemented"),
        ({"moe_router_activation": "softmax"}, UnsupportedModelError, "is 'softmax'; implemented: 'sigmoid'"),
        ({"use_rope_layers": [True, False]}, UnsupportedModelError, r"use_rope_layers is \[True, False\]"),
        (
            {"attention_other_setting": {"num_attention_groups": 4}},
            UnsupportedModelError,
            "groups is 4; implemented: 8",
        ),
        ({"num_attention_groups": 7, "attention_other_setting": None}, InvalidFileError, "7 key-value heads"),
        ({"layer_types": FOUR}, InvalidFileError, "layer_types has 4 entries for 45 layers"),
    ],
)
def test_wrong_configs_are_named(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        read(**changes)
