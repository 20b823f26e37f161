# SPDX-License-Identifier: MIT
"""Ling 3.0 as published: queries from a latent vector, names of tensors, experts in MXFP4, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.bailing_hybrid.modeling_bailing_hybrid import BailingHybridRMSNorm

from candle_vllm.core.errors import CandleVllmError
from candle_vllm.core.loading.gguf import open_gguf
from candle_vllm.core.models.registry import family_from_gguf, family_from_hf
from packages.core.tests.models.families import LING3
from packages.core.tests.models.gguf_export import export_gguf
from packages.core.tests.models.tiny import (
    config_of,
    cuts,
    eager_logits,
    error,
    recorded_logits,
    settled,
    some_tokens,
    spread,
    their_logits,
    write_tiny,
)
from packages.core.tests.quantization.format_writers import fp8, mxfp4

TOKENS, PATH, RANK = some_tokens(), Path("config.json"), 24
CONFIG: dict[str, Any] = {
    "architectures": ["BailingMoeV3ForCausalLM"], "model_type": "bailing_hybrid", "attention_dropout": 0.0,
    "eos_token_id": 156895, "expert_swiglu_limit_list": None, "first_k_dense_replace": 1,
    "gated_attention_proj_granularity_type": "head_wise", "group_norm_size": 1, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 1536, "intermediate_size": 4608, "kda_lower_bound": -5, "kda_safe_gate": True, "kv_lora_rank": 512,
    "layer_group_size": 4, "linear_silu": True, "max_position_embeddings": 131072, "moe_intermediate_size": 512,
    "moe_router_enable_expert_bias": True, "moe_shared_expert_intermediate_size": 512, "n_group": 8,
    "no_kda_lora": True, "norm_topk_prob": True, "num_attention_heads": 16, "num_experts": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 24, "num_key_value_heads": 16, "num_kv_heads_for_linear_attn": 0,
    "num_nextn_predict_layers": 0, "num_shared_experts": 1, "partial_rotary_factor": 0.5, "q_lora_rank": 256,
    "qk_head_dim": 192, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_interleave": True, "rope_theta": 6000000, "rotary_dim": 64, "routed_scaling_factor": 2.5,
    "rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 6000000, "rope_type": "default"},
    "score_function": "sigmoid", "scoring_func": "sigmoid", "share_expert_swiglu_limit_list": None,
    "short_conv_kernel_size": 4, "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc",
    "up_proj_norm": False, "use_bias": False, "use_kda_lora": False, "use_mla_nope": False, "use_nGPT": False,
    "use_qk_norm": True, "use_qkv_bias": False, "v_head_dim": 128, "value_norm": False, "vocab_size": 157184,
}  # fmt: skip
"""As models of Ling-3.0-tiny's sizes are published."""


def test_the_published_config_is_read() -> None:
    config: Any = family_from_hf(CONFIG, PATH)[1]
    assert (config.head_dim, config.rope_dim, config.value_dim, config.q_rank) == (192, 64, 128, 256)
    assert (config.rope.dim, config.rope.theta, config.interleaved_rotary) == (64, 6e6, True)
    assert sorted({*range(24)} - config.delta_layers) == [3, 7, 11, 15, 19, 23]
    assert (config.delta.heads, config.delta.key_dim, config.decay_bound, config.dense_layers) == (16, 128, -5.0, 1)
    assert (config.mixture.experts, config.mixture.groups, config.mixture.shared_size) == (128, 8, 512)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gated_attention_proj_granularity_type": "element_wise"}, "granularity_type is 'element_wise'"),
        ({"no_kda_lora": False}, "no_kda_lora is False"),
        ({"use_mla_nope": True}, "use_mla_nope is True"),
        ({"rope_interleave": False}, "rope_interleave is False"),
        ({"use_nGPT": True}, "use_nGPT is True"),
        ({"pregate_inference": True}, "pregate_inference is True"),
        ({"expert_swiglu_limit_list": [0, 7.0]}, "expert_swiglu_limit_list has limits"),
        ({"kda_lower_bound": 5.0}, "lower bound of decays is 5.0"),
        ({"kda_lower_bound": 0.0}, "lower bound of decays is 0.0"),
        ({"layer_group_size": 5}, "layer_group_size is 5; implemented: a divisor of num_hidden_layers, 24"),
        ({"layer_types": ["sliding_attention"] * 24}, "layer_types must name"),
        ({"score_function": "softmax"}, "score_function is 'softmax'"),
        ({"short_conv_kernel_size": 64}, "short_conv_kernel_size is 64"),
        ({"rope_parameters": {"mrope_section": [8, 12, 12]}}, "mrope_section"),
        ({"architectures": ["BailingMoeV2_5ForCausalLM"]}, "'BailingMoeV2_5ForCausalLM' is not implemented"),
    ],
)
def test_other_models_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(CandleVllmError, match=said):
        family_from_hf(CONFIG | changes, PATH, impl="native")


def test_queries_from_a_latent_vector(tmp_path: Path) -> None:
    """Which transformers' class lacks: its projection of queries is replaced by two, with DeepSeek's norm between."""
    folder = write_tiny(tmp_path, "bailing_hybrid", **dict[str, Any](LING3))
    config = config_of(folder) | {"q_lora_rank": RANK}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    stored, at = load_file(folder / "model.safetensors"), "model.layers.1.attention."
    hidden, (rows, _) = config["hidden_size"], stored.pop(f"{at}q_proj.weight").shape
    first, norm = torch.nn.Linear(hidden, RANK, bias=False), BailingHybridRMSNorm(RANK)
    second = torch.nn.Linear(RANK, rows, bias=False)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(RANK) + 0.5)
    model.model.layers[1].self_attn.q_proj = torch.nn.Sequential(first, norm, second)
    stored |= {f"{at}q_a_proj.weight": first.weight.data, f"{at}q_a_layernorm.weight": norm.weight.data}
    save_file(stored | {f"{at}q_b_proj.weight": second.weight.data}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    with torch.inference_mode():
        theirs = model(torch.tensor([TOKENS])).logits[0]
    for chunks in cuts():
        assert error(eager_logits(folder, TOKENS, chunks), theirs) < 1e-5
    assert spread(*settled(recorded_logits(folder, TOKENS, [len(TOKENS)]), theirs, 0.1)) < 1e-2


def test_published_names_and_experts_in_mxfp4(tmp_path: Path) -> None:
    """Names of embeddings and of the last matrix of delta attention, layers for draft tokens, FP8 beside MXFP4."""
    folder = write_tiny(tmp_path / "plain", "bailing_hybrid", **dict[str, Any](LING3))
    meant, made = load_file(folder / "model.safetensors"), dict[str, torch.Tensor]()
    for name, tensor in meant.items():
        if ".experts." in name or name.endswith("mlp.down_proj.weight"):
            written = mxfp4(tensor) if ".experts." in name else fp8(tensor, block=(32, 32))
            meant[name] = written.weight
            for end, part in written.parts.items():
                end = {".weight_packed": ".weight", ".weight_scale": ".weight_scale_inv"}.get(end, end)
                made[name.removesuffix(".weight") + end] = part
        else:
            made[name] = tensor
    save_file(meant, folder / "model.safetensors", {"format": "pt"})
    assert "model.word_embeddings.weight" in made
    made["model.layers.0.attention.o_proj.weight"] = made.pop("model.layers.0.attention.dense.weight")
    made |= {f"model.layers.2.{name}": torch.ones(3) for name in ("eh_proj.weight", "attention.dense.weight")}
    published = tmp_path / "published"
    published.mkdir()
    quantised = {"quant_method": "fp8", "weight_block_size": [32, 32], "routed_experts_quant_method": "mxfp4"}
    config = config_of(folder) | {"architectures": ["BailingMoeV3ForCausalLM"], "quantization_config": quantised}
    (published / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    (published / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    save_file({name: each.contiguous() for name, each in made.items()}, published / "model.safetensors")
    assert error(eager_logits(published, TOKENS, [len(TOKENS)]), their_logits(folder, TOKENS)) < 1e-5


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("kda.safe_gate", False, "kda.safe_gate is False"),
        ("kda.gate_lower_bound", 1.0, "lower bound of decays is 1.0"),
        ("kda.gate_lower_bound", 0.0, "lower bound of decays is 0.0"),
        ("swiglu_clamp_exp", [0.0, 7.0], "swiglu_clamp_exp has limits"),
        ("attention.head_count_kv", [0, 1, 1], "has 3 entries for 2 layers"),
        ("ssm.conv_kernel", 99, "ssm.conv_kernel is 99"),
    ],
)
def test_other_gguf_files_are_refused(key: str, value: Any, said: str, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m", "bailing_hybrid", **dict[str, Any](LING3))
    with open_gguf(export_gguf(folder, tmp_path / "model.gguf", "bailingmoe3")) as stored:
        found: Any = family_from_gguf(stored.metadata, stored)[1]
        assert (found.decay_bound, found.delta_layers, found.mixture.shared_size) == (-5.0, {0}, 32)
        with pytest.raises(CandleVllmError, match=said):
            family_from_gguf({**stored.metadata, f"bailingmoe3.{key}": value}, stored)
