# SPDX-License-Identifier: MIT
"""`config.json` files as their authors published them: old keys, nulls, and keys of nobody's; see `test_published.py`.

Written down from the models' pages and transformers' documentation; keys that say nothing of the arithmetic (dropout,
names of caches, versions) are kept where a reader could stumble over them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def _llama(**values: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    } | values


def _sizes(hidden: int, inner: int, layers: int, heads: int, kv_heads: int | None, vocabulary: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
    }


def _mistral(**values: Any) -> dict[str, Any]:
    same = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "bos_token_id": 1, "eos_token_id": 2}
    return _llama() | same | _sizes(4096, 14336, 32, 32, 8, 32000) | {"max_position_embeddings": 32768} | values


def _qwen2(name: str = "Qwen2ForCausalLM", kind: str = "qwen2", **values: Any) -> dict[str, Any]:
    windows = {"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 28, "use_mrope": False}
    same = {"architectures": [name], "model_type": kind, "rms_norm_eps": 1e-6, "attention_dropout": 0.0}
    return _llama(rope_theta=1000000.0, max_position_embeddings=32768) | same | windows | values


def _gemma(name: str, kind: str, **values: Any) -> dict[str, Any]:
    ids = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "torch_dtype": "bfloat16"}
    rest = {"head_dim": 256, "rms_norm_eps": 1e-6, "max_position_embeddings": 8192, "attention_bias": False}
    return {"architectures": [name], "model_type": kind, **ids, **rest, "attention_dropout": 0.0} | values


def _gemma2(**values: Any) -> dict[str, Any]:
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "cache_implementation": "hybrid"}
    acts = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "rope_theta": 10000.0}
    return _gemma("Gemma2ForCausalLM", "gemma2", **caps, **acts, sliding_window=4096) | values


def _phi3(**values: Any) -> dict[str, Any]:
    same = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "bos_token_id": 1, "eos_token_id": 32000}
    rest = {
        "attention_bias": False,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "pad_token_id": 32000,
        "rope_theta": 10000.0,
    }
    code = {
        "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
        "original_max_position_embeddings": 4096,
    }
    return _llama() | same | rest | code | values


def _stablelm(**values: Any) -> dict[str, Any]:
    return {
        "architectures": ["StableLmForCausalLM"],
        "model_type": "stablelm",
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000,
        "rotary_scaling_factor": 1.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    } | values


def _glm(name: str, kind: str, **values: Any) -> dict[str, Any]:
    ids = {"eos_token_id": [151329, 151336, 151338], "pad_token_id": 151329}
    rest = {"head_dim": 128, "partial_rotary_factor": 0.5, "rope_theta": 10000.0, "max_position_embeddings": 32768}
    return _llama(attention_bias=False, **ids, **rest) | {"architectures": [name], "model_type": kind} | values


def _deepseek(name: str, kind: str, **values: Any) -> dict[str, Any]:
    code = {"AutoConfig": "configuration_deepseek.DeepseekConfig", "AutoModel": "modeling_deepseek.DeepseekModel"}
    heads = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    idle = {"aux_loss_alpha": 0.001, "seq_aux": True, "pretraining_tp": 1, "ep_size": 1, "moe_layer_freq": 1}
    names = {"architectures": [name], "model_type": kind, "attention_bias": False, "attention_dropout": 0.0}
    return _llama(auto_map=code, rms_norm_eps=1e-6, rope_theta=10000) | names | heads | idle | values


def _yarn(scale: float, factor: int = 40) -> dict[str, Any]:
    bands = {"beta_fast": 32, "beta_slow": 1, "mscale": scale, "mscale_all_dim": scale}
    return {**bands, "factor": factor, "original_max_position_embeddings": 4096, "type": "yarn"}


def _lfm2(name: str, kind: str, **values: Any) -> dict[str, Any]:
    names = {"architectures": [name], "model_type": kind, "bos_token_id": 1, "eos_token_id": 7, "pad_token_id": 0}
    sizes = {"conv_L_cache": 3, "conv_bias": False, "max_position_embeddings": 128000, "norm_eps": 1e-5}
    return names | sizes | {"initializer_range": 0.02, "torch_dtype": "bfloat16", "use_cache": True} | values


def _qwen3_next(name: str, kind: str, **values: Any) -> dict[str, Any]:
    delta = {"linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128}
    heads = {"linear_num_key_heads": 16, "linear_num_value_heads": 32, "full_attention_interval": 4, "head_dim": 256}
    same = {"architectures": [name], "model_type": kind, "max_position_embeddings": 262144, "attention_bias": False}
    return _llama(rms_norm_eps=1e-6, attention_dropout=0.0) | same | delta | heads | values


_QWEN35_KINDS = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
_QWEN35_ROPE = {
    "mrope_interleaved": True,
    "mrope_section": [11, 11, 10],
    "partial_rotary_factor": 0.25,
    "rope_theta": 10000000,
    "rope_type": "default",
}
_QWEN35 = {
    "attn_output_gate": True,
    "layer_types": _QWEN35_KINDS * 8,
    "mamba_ssm_dtype": "float32",
    "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False,
    "rope_parameters": _QWEN35_ROPE,
}
_LFM2_BLOCKS = {
    "block_auto_adjust_ff_dim": True,
    "block_ffn_dim_multiplier": 1.0,
    "block_mlp_init_scale": 1.0,
    "block_multiple_of": 256,
    "block_norm_eps": 1e-5,
    "block_out_init_scale": 1.0,
    "block_use_swiglu": True,
    "block_use_xavier_init": True,
    "conv_use_xavier_init": True,
    "use_pos_enc": True,
}
_LFM2_KINDS = ["conv", "conv", "full_attention", "conv", "conv", "full_attention", *["conv", "conv", "full_attention"]]
_LFM2_KINDS += ["conv", "full_attention"] * 3 + ["conv"]
_LLAMA3 = {"high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}
_FACTORS = {"short_factor": [1.0 + 0.01 * i for i in range(48)], "long_factor": [1.0 + 0.5 * i for i in range(48)]}
_GPT_OSS_KINDS = ["sliding_attention", "full_attention"]
_MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "Llama-2-7b": _llama(max_position_embeddings=4096, pretraining_tp=1, rope_scaling=None, torch_dtype="float16")
    | _sizes(4096, 11008, 32, 32, 32, 32000),
    "LLaMA-7b": _llama(max_sequence_length=2048, max_position_embeddings=2048, pad_token_id=-1, rms_norm_eps=1e-6)
    | {key: value for key, value in _sizes(4096, 11008, 32, 32, 0, 32000).items() if key != "num_key_value_heads"},
    "Llama-3.1-8B": _llama(
        max_position_embeddings=131072,
        mlp_bias=False,
        attention_bias=False,
        eos_token_id=[128001, 128008, 128009],
        rope_theta=500000.0,
        rope_scaling={"factor": 8.0, **_LLAMA3, "rope_type": "llama3"},
    )
    | _sizes(4096, 14336, 32, 32, 8, 128256),
    "Llama-3.2-1B": _llama(
        max_position_embeddings=131072,
        head_dim=64,
        rope_theta=500000.0,
        tie_word_embeddings=True,
        rope_scaling={"factor": 32.0, **_LLAMA3, "rope_type": "llama3"},
    )
    | _sizes(2048, 8192, 16, 32, 8, 128256),
    "deepseek-coder-6.7b": _llama(
        max_position_embeddings=16384, rope_theta=100000, rope_scaling={"factor": 4.0, "type": "linear"}
    )
    | _sizes(4096, 11008, 32, 32, 32, 32256),
    "Yi-1.5-6B": _llama(
        max_position_embeddings=4096, rope_theta=5e6, pad_token_id=0, rope_scaling=None, pretraining_tp=1
    )
    | _sizes(4096, 11008, 32, 32, 4, 64000),
    "SmolLM2-135M": _llama(
        is_llama_config=True, max_position_embeddings=8192, rope_interleaved=False, rope_theta=100000
    )
    | {"tie_word_embeddings": True, "rope_scaling": None, "transformers.js_config": {"kv_cache_dtype": {}}}
    | _sizes(576, 1536, 30, 9, 3, 49152),
    "Mistral-7B-v0.1": _mistral(rope_theta=10000.0, sliding_window=4096),
    "Mistral-7B-v0.2": _mistral(rope_theta=1000000.0, sliding_window=None, head_dim=None),
    "Mistral-Nemo": _mistral(rope_theta=1000000.0, sliding_window=None, head_dim=128, max_position_embeddings=1024000)
    | _sizes(5120, 14336, 40, 32, 8, 131072),
    "Ministral-8B-2410": _mistral(rope_theta=1e8, sliding_window=32768, head_dim=128)
    | _sizes(4096, 12288, 36, 32, 8, 131072),
    "Mixtral-8x7B": _mistral(rope_theta=1e6, sliding_window=None, num_experts_per_tok=2, num_local_experts=8)
    | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "output_router_logits": False}
    | {"router_aux_loss_coef": 0.02},
    "Qwen2.5-0.5B": _qwen2(tie_word_embeddings=True) | _sizes(896, 4864, 24, 14, 2, 151936),
    "QwQ-32B": _qwen2(sliding_window=32768, max_window_layers=64, max_position_embeddings=40960)
    | {"rms_norm_eps": 1e-5}
    | _sizes(5120, 27648, 64, 40, 8, 152064),
    "Qwen3-0.6B": _qwen2("Qwen3ForCausalLM", "qwen3", head_dim=128, attention_bias=False, rope_scaling=None)
    | {"sliding_window": None, "tie_word_embeddings": True}
    | _sizes(1024, 3072, 28, 16, 8, 151936),
    "Qwen3-8B with YaRN": _qwen2("Qwen3ForCausalLM", "qwen3", head_dim=128, sliding_window=None)
    | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}
    | {"max_position_embeddings": 40960}
    | _sizes(4096, 12288, 36, 32, 8, 151936),
    "Qwen1.5-MoE-A2.7B": _qwen2("Qwen2MoeForCausalLM", "qwen2_moe", sliding_window=32768, max_window_layers=21)
    | {"num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "norm_topk_prob": False}
    | {"shared_expert_intermediate_size": 5632, "decoder_sparse_step": 1, "output_router_logits": False}
    | _sizes(2048, 5632, 24, 16, 16, 151936),
    "Qwen3-30B-A3B": _qwen2("Qwen3MoeForCausalLM", "qwen3_moe", sliding_window=None, max_window_layers=48)
    | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True}
    | {"mlp_only_layers": [], "decoder_sparse_step": 1, "attention_bias": False, "head_dim": 128, "rope_scaling": None}
    | _sizes(2048, 6144, 48, 32, 4, 151936),
    "gemma-2b": _gemma("GemmaForCausalLM", "gemma", hidden_act="gelu", rope_theta=10000.0, rope_scaling=None)
    | {"hidden_activation": None}
    | _sizes(2048, 16384, 18, 8, 1, 256000),
    "gemma-2-2b": _gemma2(query_pre_attn_scalar=256) | _sizes(2304, 9216, 26, 8, 4, 256000),
    "gemma-2-27b": _gemma2(query_pre_attn_scalar=144, head_dim=128, use_cache=True)
    | _sizes(4608, 36864, 46, 32, 16, 256000),
    "gemma-3-1b": _gemma("Gemma3ForCausalLM", "gemma3_text", hidden_activation="gelu_pytorch_tanh", rope_theta=1000000)
    | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "cache_implementation": "hybrid"}
    | {"query_pre_attn_scalar": 256, "rope_local_base_freq": 10000, "rope_scaling": None, "sliding_window": 512}
    | {"eos_token_id": [1, 106], "sliding_window_pattern": 6, "max_position_embeddings": 32768}
    | _sizes(1152, 6912, 26, 4, 1, 262144),
    "phi-2": {
        "architectures": ["PhiForCausalLM"],
        "model_type": "phi",
        "attention_dropout": 0.0,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "embd_pdrop": 0.0,
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "partial_rotary_factor": 0.4,
        "qk_layernorm": False,
        "resid_pdrop": 0.1,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    }
    | _sizes(2560, 10240, 32, 32, 32, 51200),
    "phi-1_5": {
        "architectures": ["PhiForCausalLM"],
        "model_type": "phi",
        "bos_token_id": None,
        "eos_token_id": None,
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "partial_rotary_factor": 0.5,
        "qk_layernorm": False,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    | _sizes(2048, 8192, 24, 32, None, 51200),
    "Phi-3-mini-4k": _phi3(rope_scaling=None, sliding_window=2047, max_position_embeddings=4096)
    | _sizes(3072, 8192, 32, 32, 32, 32064),
    "Phi-3-mini-128k": _phi3(rope_scaling=_FACTORS | {"type": "su"}, sliding_window=262144)
    | {"max_position_embeddings": 131072}
    | _sizes(3072, 8192, 32, 32, 32, 32064),
    "phi-4": _phi3(rope_scaling=None, sliding_window=None, rope_theta=250000, original_max_position_embeddings=16384)
    | {"max_position_embeddings": 16384, "bos_token_id": 100257, "eos_token_id": 100265, "pad_token_id": 100351}
    | _sizes(5120, 17920, 40, 40, 10, 100352),
    "Phi-4-mini": _phi3(rope_scaling=_FACTORS | {"type": "longrope"}, sliding_window=262144, mlp_bias=False)
    | {"partial_rotary_factor": 0.75, "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False}
    | {"tie_word_embeddings": True, "max_position_embeddings": 131072, "eos_token_id": 199999, "pad_token_id": 199999}
    | _sizes(3072, 8192, 32, 24, 8, 200064),
    "stablelm-2-1_6b": _stablelm(use_qkv_bias=True, eos_token_id=100257, bos_token_id=100257, hidden_dropout=0.0)
    | _sizes(2048, 5632, 24, 32, 32, 100352),
    "stablelm-zephyr-3b": _stablelm(use_qkv_bias=False) | _sizes(2560, 6912, 32, 32, 32, 50304),
    "SmolLM3-3B": _llama(
        architectures=["SmolLM3ForCausalLM"],
        model_type="smollm3",
        rms_norm_eps=1e-6,
        bos_token_id=None,
        eos_token_id=128012,
        pad_token_id=128004,
        max_position_embeddings=65536,
        max_window_layers=28,
        no_rope_layer_interval=4,
        no_rope_layers=[1, 1, 1, 0] * 9,
        layer_types=["full_attention"] * 36,
        pretraining_tp=2,
        rope_scaling=None,
        rope_theta=5000000.0,
        sliding_window=None,
        use_sliding_window=False,
        mlp_bias=False,
        attention_bias=False,
        tie_word_embeddings=True,
    )
    | _sizes(2048, 11008, 36, 16, 4, 128256),
    "GLM-4-9B-0414": _glm("Glm4ForCausalLM", "glm4") | _sizes(4096, 13696, 40, 32, 2, 151552),
    "glm-4-9b-chat-hf": _glm("GlmForCausalLM", "glm", attention_bias=True, max_position_embeddings=131072)
    | {"rms_norm_eps": 1.5625e-07}
    | _sizes(4096, 13696, 40, 32, 2, 151552),
    "GLM-4.5-Air": _glm("Glm4MoeForCausalLM", "glm4_moe", attention_bias=True, max_position_embeddings=131072)
    | {"moe_intermediate_size": 1408, "norm_topk_prob": True, "n_group": 1, "topk_group": 1, "n_routed_experts": 128}
    | {"n_shared_experts": 1, "routed_scaling_factor": 1.0, "num_experts_per_tok": 8, "first_k_dense_replace": 1}
    | {"num_nextn_predict_layers": 1, "rope_scaling": None, "rope_theta": 1000000, "use_qk_norm": False}
    | _sizes(4096, 10944, 46, 96, 8, 151552),
    "GLM-4.5": _glm("Glm4MoeForCausalLM", "glm4_moe", attention_bias=True, max_position_embeddings=131072)
    | {"moe_intermediate_size": 1536, "norm_topk_prob": True, "n_group": 1, "topk_group": 1, "n_routed_experts": 160}
    | {"n_shared_experts": 1, "routed_scaling_factor": 2.5, "num_experts_per_tok": 8, "first_k_dense_replace": 3}
    | {"num_nextn_predict_layers": 1, "rope_scaling": None, "rope_theta": 1000000, "use_qk_norm": True}
    | _sizes(5120, 12288, 92, 96, 8, 151552),
    "DeepSeek-V2-Lite": _deepseek("DeepseekV2ForCausalLM", "deepseek_v2", rope_scaling=_yarn(0.707), q_lora_rank=None)
    | {"first_k_dense_replace": 1, "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 64}
    | {"n_shared_experts": 2, "norm_topk_prob": False, "num_experts_per_tok": 6, "routed_scaling_factor": 1.0}
    | {"scoring_func": "softmax", "topk_group": 1, "topk_method": "greedy", "max_position_embeddings": 163840}
    | _sizes(2048, 10944, 27, 16, 16, 102400),
    "DeepSeek-V2-Chat": _deepseek("DeepseekV2ForCausalLM", "deepseek_v2", rope_scaling=_yarn(0.707), q_lora_rank=1536)
    | {"first_k_dense_replace": 1, "moe_intermediate_size": 1536, "n_group": 8, "n_routed_experts": 160}
    | {"n_shared_experts": 2, "norm_topk_prob": False, "num_experts_per_tok": 6, "routed_scaling_factor": 16.0}
    | {"scoring_func": "softmax", "topk_group": 3, "topk_method": "group_limited_greedy"}
    | {"max_position_embeddings": 163840}
    | _sizes(5120, 12288, 60, 128, 128, 102400),
    "DeepSeek-R1": _deepseek("DeepseekV3ForCausalLM", "deepseek_v3", rope_scaling=_yarn(1.0), q_lora_rank=1536)
    | {"first_k_dense_replace": 3, "moe_intermediate_size": 2048, "n_group": 8, "n_routed_experts": 256}
    | {"n_shared_experts": 1, "norm_topk_prob": True, "num_experts_per_tok": 8, "routed_scaling_factor": 2.5}
    | {"scoring_func": "sigmoid", "topk_group": 4, "topk_method": "noaux_tc", "num_nextn_predict_layers": 1}
    | {"max_position_embeddings": 163840}
    | _sizes(7168, 18432, 61, 128, 128, 129280),
    "Moonlight-16B-A3B": _deepseek("DeepseekV3ForCausalLM", "deepseek_v3", rope_scaling=None, q_lora_rank=None)
    | {"first_k_dense_replace": 1, "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 64}
    | {"n_shared_experts": 2, "norm_topk_prob": True, "num_experts_per_tok": 6, "routed_scaling_factor": 2.446}
    | {"scoring_func": "sigmoid", "topk_group": 1, "topk_method": "noaux_tc", "num_nextn_predict_layers": 0}
    | {"max_position_embeddings": 8192, "rope_theta": 50000.0, "rms_norm_eps": 1e-5}
    | _sizes(2048, 11264, 27, 16, 16, 163840),
    "Kimi-K2": _deepseek("DeepseekV3ForCausalLM", "kimi_k2", q_lora_rank=1536, first_k_dense_replace=1)
    | {"rope_scaling": _yarn(1.0, 32) | {"beta_fast": 1.0, "beta_slow": 1.0}, "rope_theta": 50000.0}
    | {"moe_intermediate_size": 2048, "n_group": 1, "n_routed_experts": 384, "topk_group": 1, "n_shared_experts": 1}
    | {"norm_topk_prob": True, "num_experts_per_tok": 8, "routed_scaling_factor": 2.827, "scoring_func": "sigmoid"}
    | {"topk_method": "noaux_tc", "num_nextn_predict_layers": 0, "max_position_embeddings": 131072}
    | _sizes(7168, 18432, 61, 64, 64, 163840),
    "gpt-oss-20b": {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": 200002,
        "pad_token_id": 199999,
        "experts_per_token": 4,
        "num_experts_per_tok": 4,
        "num_local_experts": 32,
        "head_dim": 64,
        "hidden_act": "silu",
        "initial_context_length": 4096,
        "initializer_range": 0.02,
        "layer_types": _GPT_OSS_KINDS * 12,
        "max_position_embeddings": 131072,
        "output_router_logits": False,
        "quantization_config": _MXFP4,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096}
        | {"rope_type": "yarn", "truncate": False},
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
    }
    | _sizes(2880, 2880, 24, 64, 8, 201088),
    "Qwen3-Next-80B-A3B": _qwen3_next("Qwen3NextForCausalLM", "qwen3_next", bos_token_id=151643, eos_token_id=151645)
    | {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True, "partial_rotary_factor": 0.25}
    | {"rope_scaling": None, "rope_theta": 10000000, "use_sliding_window": False, "router_aux_loss_coef": 0.001}
    | {"moe_intermediate_size": 512, "num_experts": 512, "num_experts_per_tok": 10, "output_router_logits": False}
    | {"shared_expert_intermediate_size": 512}
    | _sizes(2048, 5120, 48, 16, 2, 151936),
    "Qwen3.5-9B": _qwen3_next("Qwen3_5ForCausalLM", "qwen3_5_text", eos_token_id=248044)
    | _QWEN35
    | _sizes(4096, 12288, 32, 16, 4, 248320),
    "Qwen3.5-35B-A3B": _qwen3_next("Qwen3_5MoeForCausalLM", "qwen3_5_moe_text", eos_token_id=248044)
    | _QWEN35
    | {"layer_types": _QWEN35_KINDS * 10, "moe_intermediate_size": 512, "num_experts": 256, "num_experts_per_tok": 8}
    | {"shared_expert_intermediate_size": 512, "router_aux_loss_coef": 0.001}
    | {key: value for key, value in _sizes(2048, 0, 40, 16, 2, 248320).items() if key != "intermediate_size"},
    "Olmo-Hybrid-7B": _llama(architectures=["OlmoHybridForCausalLM"], model_type="olmo_hybrid", rms_norm_eps=1e-6)
    | {"eos_token_id": 100257, "pad_token_id": 100277, "max_position_embeddings": 65536, "attention_bias": False}
    | {"layer_types": _QWEN35_KINDS * 8, "linear_conv_kernel_dim": 4, "linear_allow_neg_eigval": True}
    | {"linear_num_key_heads": 30, "linear_num_value_heads": 30, "linear_key_head_dim": 96}
    | {"linear_value_head_dim": 192, "rope_parameters": {"rope_theta": None, "rope_type": "default"}}
    | _sizes(3840, 11008, 32, 30, 30, 100352),
    "LFM2-1.2B": _lfm2("Lfm2ForCausalLM", "lfm2", rope_theta=1000000.0, full_attn_idxs=[2, 5, 8, 10, 12, 14])
    | _LFM2_BLOCKS
    | {"block_dim": 2048, "block_ff_dim": 12288, "conv_dim": 2048, "conv_dim_out": 2048, "num_heads": 32}
    | {key: value for key, value in _sizes(2048, 0, 16, 32, 8, 65536).items() if key != "intermediate_size"},
    "LFM2.5-350M": _lfm2("Lfm2ForCausalLM", "lfm2", layer_types=_LFM2_KINDS, tie_embedding=True)
    | _LFM2_BLOCKS
    | {"block_dim": 1024, "block_ff_dim": 6656, "conv_dim": 1024, "num_heads": 16}
    | {"rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}}
    | _sizes(1024, 6656, 16, 16, 8, 65536),
    "LFM2-8B-A1B": _lfm2("Lfm2MoeForCausalLM", "lfm2_moe", rope_theta=1000000.0)
    | {"layer_types": ["conv", "conv", "full_attention", "conv"] * 6, "moe_intermediate_size": 1792}
    | {"norm_topk_prob": True, "num_dense_layers": 2, "num_experts": 32, "num_experts_per_tok": 4}
    | {"routed_scaling_factor": 1.0, "use_expert_bias": True}
    | _sizes(2048, 7168, 24, 32, 8, 65536),
}
"""By the model's name."""
