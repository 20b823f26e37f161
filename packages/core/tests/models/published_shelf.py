# SPDX-License-Identifier: MIT
"""More published `config.json` files, of families that few people run each; see `published_configs.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def _config(name: str, kind: str, sizes: tuple[int, int, int, int, int, int], **values: Any) -> dict[str, Any]:
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    same = {"architectures": [name], "model_type": kind, "attention_dropout": 0.0, "torch_dtype": "bfloat16"}
    usual = {"hidden_act": "silu", "initializer_range": 0.02, "rms_norm_eps": 1e-5, "use_cache": True}
    return same | usual | dict(zip((*keys, "vocab_size"), sizes, strict=True)) | values


_GRANITE = {
    "attention_bias": False,
    "attention_multiplier": 0.015625,
    "bos_token_id": 0,
    "embedding_multiplier": 12.0,
    "eos_token_id": 0,
    "max_position_embeddings": 131072,
    "residual_multiplier": 0.22,
    "rope_scaling": None,
    "rope_theta": 10000000.0,
    "tie_word_embeddings": True,
}
_MAMBA = {
    "mamba_chunk_size": 256,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_head": "auto",
    "mamba_d_state": 128,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_n_heads": 32,
    "mamba_proj_bias": False,
}
_THREE_OF_FOUR = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
_OLMO = {"attention_bias": False, "eos_token_id": 100257, "pad_token_id": 100277, "rope_theta": 500000}
_COHERE = {
    "attention_bias": False,
    "bos_token_id": 5,
    "eos_token_id": 255001,
    "pad_token_id": 0,
    "layer_norm_eps": 1e-5,
}
_ERNIE = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "rope_theta": 500000.0, "use_bias": False}
_LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "attention_bias": False}
_GLM_EXPERTS = {
    "moe_intermediate_size": 1536,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 4,
    "routed_scaling_factor": 1.8,
    "topk_group": 1,
}

SHELF: Mapping[str, dict[str, Any]] = {
    "granite-3.3-2b": _config("GraniteForCausalLM", "granite", (2048, 8192, 40, 32, 8, 49159), **_GRANITE)
    | {"logits_scaling": 8.0, "mlp_bias": False, "pad_token_id": 0},
    "granite-3.1-1b-a400m": _config("GraniteMoeForCausalLM", "granitemoe", (1024, 512, 24, 16, 8, 49155), **_GRANITE)
    | {"logits_scaling": 6.0, "num_local_experts": 32, "num_experts_per_tok": 8, "rope_theta": 1500000.0}
    | {"output_router_logits": False, "router_aux_loss_coef": 0.0},
    "granite-4.0-350m": _config(
        "GraniteMoeHybridForCausalLM", "granitemoehybrid", (1024, 2048, 28, 16, 4, 100352), **_GRANITE, **_MAMBA
    )
    | {"layer_types": ["attention"] * 28, "position_embedding_type": "rope", "shared_intermediate_size": 2048}
    | {"num_local_experts": 0, "num_experts_per_tok": 0, "logits_scaling": 3.0, "normalization_function": "rmsnorm"},
    "OLMo-2-7B": _config("Olmo2ForCausalLM", "olmo2", (4096, 11008, 32, 32, 32, 100352), **_OLMO)
    | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_scaling": None, "tie_word_embeddings": False},
    "Olmo-3-7B": _config("Olmo3ForCausalLM", "olmo3", (4096, 11008, 32, 32, 32, 100278), **_OLMO)
    | {"layer_types": _THREE_OF_FOUR * 8, "sliding_window": 4096, "max_position_embeddings": 65536}
    | {
        "rope_scaling": {
            "attention_factor": 1.2079441541679836,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "yarn",
        },
        "tie_word_embeddings": False,
    },
    "OLMoE-1B-7B": _config("OlmoeForCausalLM", "olmoe", (2048, 1024, 16, 16, 16, 50304), eos_token_id=50279)
    | {"clip_qkv": None, "norm_topk_prob": False, "num_experts": 64, "num_experts_per_tok": 8, "rope_theta": 10000.0}
    | {"attention_bias": False, "max_position_embeddings": 4096, "rope_scaling": None, "tie_word_embeddings": False},
    "EXAONE-4.0-32B": _config("Exaone4ForCausalLM", "exaone4", (5120, 27392, 64, 40, 8, 102400), head_dim=128)
    | {"layer_types": _THREE_OF_FOUR * 16, "sliding_window": 4096, "sliding_window_pattern": "LLLG"}
    | {"max_position_embeddings": 131072, "rope_theta": 1000000, "bos_token_id": 1, "eos_token_id": 361}
    | {
        "rope_scaling": {
            "factor": 16.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "tie_word_embeddings": False,
    },
    "command-r": _config("CohereForCausalLM", "cohere", (8192, 22528, 40, 64, 64, 256000), **_COHERE)
    | {"logit_scale": 0.0625, "max_position_embeddings": 8192, "model_max_length": 131072, "rope_theta": 8000000.0},
    "command-r7b": _config("Cohere2ForCausalLM", "cohere2", (4096, 14336, 32, 32, 8, 256000), **_COHERE)
    | {"head_dim": 128, "layer_switch": 4, "logit_scale": 0.25, "max_position_embeddings": 8192, "rotary_pct": 1.0}
    | {"order_of_interleaved_layers": "local_attn_first", "position_embedding_type": "rope_gptj"}
    | {"rope_scaling": None, "rope_theta": 50000, "sliding_window": 4096, "sliding_window_pattern": 4},
    "ERNIE-4.5-0.3B": _config("Ernie4_5ForCausalLM", "ernie4_5", (1024, 3072, 18, 16, 2, 103424), **_ERNIE)
    | {"head_dim": 128, "max_position_embeddings": 131072, "tie_word_embeddings": True},
    "ERNIE-4.5-21B-A3B": _config("Ernie4_5_MoeForCausalLM", "ernie4_5_moe", (2560, 12288, 28, 20, 4, 103424), **_ERNIE)
    | {"max_position_embeddings": 131072, "moe_intermediate_size": 1536, "moe_k": 6, "moe_layer_interval": 1}
    | {"moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_num_experts": 64, "moe_num_shared_experts": 2}
    | {"moe_capacity": [64, 64, 64], "moe_gate": "topk", "moe_use_aux_free": True, "tie_word_embeddings": True},
    "Seed-OSS-36B": _config("SeedOssForCausalLM", "seed_oss", (5120, 27648, 64, 80, 8, 155136), attention_bias=True)
    | {"attention_out_bias": False, "head_dim": 128, "max_position_embeddings": 524288, "mlp_bias": False}
    | {"residual_dropout": 0.1, "rms_norm_eps": 1e-6, "rope_scaling": {"rope_type": "default"}, "rope_theta": 1e7},
    "MiniMax-M2": _config("MiniMaxM2ForCausalLM", "minimax_m2", (3072, 1536, 62, 48, 8, 200064), head_dim=128)
    | {"attn_type_list": [1] * 62, "max_position_embeddings": 196608, "mtp_transformer_layers": 1, "use_mtp": True}
    | {"num_experts_per_tok": 8, "num_local_experts": 256, "num_mtp_modules": 3, "qk_norm_type": "per_layer"}
    | {"rms_norm_eps": 1e-6, "rope_theta": 5000000, "rotary_dim": 64, "scoring_func": "sigmoid", "use_qk_norm": True}
    | {"shared_intermediate_size": 0, "sliding_window": None, "use_routing_bias": True, "tie_word_embeddings": False},
    "GLM-4.7-Flash": _config(
        "Glm4MoeLiteForCausalLM", "glm4_moe_lite", (2048, 10240, 47, 20, 20, 154880), **_LATENT, **_GLM_EXPERTS
    )
    | {"first_k_dense_replace": 1, "q_lora_rank": 768, "qk_nope_head_dim": 192, "v_head_dim": 256}
    | {"topk_method": "noaux_tc", "num_nextn_predict_layers": 1, "partial_rotary_factor": 1.0, "rope_scaling": None}
    | {"rope_theta": 1000000, "max_position_embeddings": 202752, "eos_token_id": [154820, 154827, 154829]},
    "Solar-Open-100B": _config("SolarOpenForCausalLM", "solar_open", (4096, 10240, 48, 64, 8, 196608), **_GLM_EXPERTS)
    | {"attention_bias": False, "head_dim": 128, "max_position_embeddings": 131072, "rope_theta": 1000000},
    "Youtu-LLM-2B": _config("YoutuForCausalLM", "youtu", (2048, 6144, 32, 16, 16, 128256), **_LATENT)
    | {"q_lora_rank": 1536, "qk_nope_head_dim": 128, "v_head_dim": 128, "mlp_bias": False, "rope_interleave": True}
    | {"rms_norm_eps": 1e-6, "rope_theta": 1600000, "max_position_embeddings": 131072, "tie_word_embeddings": True},
    "Hy3": _config("HYV3ForCausalLM", "hy_v3", (4096, 13312, 80, 64, 8, 120832), attention_bias=False, head_dim=128)
    | {"first_k_dense_replace": 1, "moe_intermediate_size": 1536, "num_experts": 192, "num_experts_per_tok": 8}
    | {"num_shared_experts": 1, "qk_norm": True, "route_norm": True, "router_scaling_factor": 2.826}
    | {"max_position_embeddings": 131072, "rope_parameters": {"rope_theta": 11158840.0, "rope_type": "default"}},
}
