# SPDX-License-Identifier: MIT
"""The table of families: for each a few tiny configurations, among them every flag that changes the arithmetic.

A row is what transformers' config is made with, beside `tiny.SMALL`. The row's name begins with the family's line in
`docs/models.md`. Families whose tests live in files of their own say so there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from candle_vllm.core.testing.toy_model import TOY_VOCAB_SIZE
from tests.common_run import few


@dataclasses.dataclass(frozen=True)
class Row:
    """One tiny model.

    Attributes:
        model_type: Hugging Face's.
        config: keys of its config.
        gguf: the GGUF architecture, where files of this kind are published; None leaves GGUF out.
        recorded: the compiled CPU kernels serve it.
        interpreted: the Triton kernels serve it.
        common: its tests are in the common run; else behind the marker `every_case`.
        undecided: share of tokens that may go to other experts where attention in bfloat16 decides a near tie.
    """

    model_type: str
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    gguf: str | None = None
    recorded: bool = True
    interpreted: bool = True
    common: bool = True
    undecided: float = 0.0


QWEN2_VL_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
QWEN3_VL_ROPE = QWEN2_VL_ROPE | {"mrope_section": [6, 5, 5], "mrope_interleaved": True}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

DEEPSEEK = {
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "moe_intermediate_size": 32,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
    "rms_norm_eps": 1e-5,
}
DEEPSEEK_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}

DEEPSEEK_INDEX = DEEPSEEK | {  # a choice of 24 positions from prompts of 70 tokens; GLM's second layer has no index
    "index_n_heads": 16,
    "index_head_dim": 32,
    "index_topk": 24,
    "rope_parameters": DEEPSEEK_YARN,
}
AX = {"gated_norm_rank": 8, "index_n_heads": 16, "index_head_dim": 32, "index_topk": 24}
GLM_INDEX = DEEPSEEK_INDEX | {
    "num_hidden_layers": 3,
    "n_group": 1,
    "topk_group": 1,
    "indexer_types": ["full", "shared", "full"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}

DEEPSEEK_V4 = {  # all kinds of layers, a choice of 8 entries from 17, and experts by token id and by scores
    "num_key_value_heads": 1,
    "intermediate_size": None,
    "num_hidden_layers": 3,
    "head_dim": 32,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 32,
    "o_groups": 2,
    "o_lora_rank": 32,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 32},
    "mlp_layer_types": ["hash_moe", "moe", "moe"],
    "index_n_heads": 16,
    "index_head_dim": 32,
    "index_topk": 8,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    },
}
DEEPSEEK_V4_OTHER = DEEPSEEK_V4 | {  # other sizes: groups longer and shorter than a block, three streams, no choice
    "compress_rates": {"compressed_sparse_attention": 8, "heavily_compressed_attention": 16},
    "hc_mult": 3,
    "hc_sinkhorn_iters": 3,
    "index_topk": 512,
    "sliding_window": 5,
    "scoring_func": "sigmoid",
    "rope_parameters": None,
    "layer_types": ["heavily_compressed_attention"] * 2 + ["compressed_sparse_attention"],
    "mlp_layer_types": ["moe"] * 3,
}

MINISTRAL_LAYERS = ["full_attention", "sliding_attention"]
MINISTRAL3_ROPE = {  # with an original context so short that queries grow within these prompts
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 24,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.3,
}

# every second layer looks back 16 tokens; softer caps than published ones, so that they bend these small numbers
GEMMA2 = {
    "head_dim": 32,
    "num_hidden_layers": 4,
    "query_pre_attn_scalar": 32,
    "sliding_window": 16,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
}

GEMMA3 = {
    "head_dim": 32,
    "num_hidden_layers": 3,
    "query_pre_attn_scalar": 32,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
}

# windows of 16 tokens and one layer in three without; heads as large as published ones, and others
GEMMA4 = {
    "head_dim": 32,
    "global_head_dim": 64,
    "num_hidden_layers": 3,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 3.0,
}
GEMMA4_31B = GEMMA4 | {"num_global_key_value_heads": 1, "attention_k_eq_v": True}
GEMMA4_WIDE = GEMMA4_31B | {"head_dim": 256, "global_head_dim": 512, "num_hidden_layers": 2, "layer_types": None}
GEMMA4_E4B = GEMMA4 | {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_kv_shared_layers": 3,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": TOY_VOCAB_SIZE,
    "num_key_value_heads": 1,
}
GEMMA4_MOE = GEMMA4 | {
    "enable_moe_block": True,
    "num_experts": 6,
    "top_k_experts": 3,
    "moe_intermediate_size": 64,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
}

# streams, gates of which little is left, keys of earlier layers, and a table that lacks the last tokens
GEMMA3N = {
    "head_dim": 32,
    "num_hidden_layers": 6,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_kv_shared_layers": 2,
    "laurel_rank": 32,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": TOY_VOCAB_SIZE - 8,
    "activation_sparsity_pattern": [0.6, 0.8, 0.0, 0.0, 0.0, 0.0],
    "final_logit_softcapping": 3.0,
}
GEMMA3N_OWN = {"altup_num_inputs": 3, "altup_active_idx": 1, "altup_correct_scale": False, "num_kv_shared_layers": 0}
GEMMA3N_OWN |= {"activation_sparsity_pattern": None, "layer_types": None, "attention_bias": True}

# chunks of 16 tokens, and queries that grow from position 23 on
LLAMA4 = {
    "rope_parameters": LLAMA3 | {"high_freq_factor": 1.0},
    "head_dim": 32,
    "num_hidden_layers": 4,
    "intermediate_size": 64,
    "intermediate_size_mlp": 96,
    "num_local_experts": 6,
    "interleave_moe_layer_step": 2,
}
LLAMA_GUARD4 = {"moe_layers": [], "interleave_moe_layer_step": 0, "num_local_experts": 0, "num_experts_per_tok": 0}
LLAMA4_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64}
LLAMA4_CHUNKS = {"attention_chunk_size": 16, "floor_scale": 24, "attn_scale": 0.3, "interleave_moe_layer_step": 1}
LLAMA4_CHUNKS |= {"no_rope_layers": [1, 0, 1], "num_hidden_layers": 3, "use_qk_norm": False, "attention_bias": True}

MIXTRAL = {"num_local_experts": 6, "num_experts_per_tok": 4}
QWEN_MOE = {
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 96,
    "decoder_sparse_step": 1,
}
SPARSE_STEPS = {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3], "norm_topk_prob": True}
GLM_MOE = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "attention_bias": True,
}
GLM_GROUPS = {"n_group": 4, "topk_group": 2, "use_qk_norm": True, "norm_topk_prob": False, "first_k_dense_replace": 0}
GPT_OSS = {
    "num_local_experts": 6,
    "num_experts_per_tok": 4,
    "sliding_window": 16,
    "num_hidden_layers": 3,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 8.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 64,
    },
}

LFM2 = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    "block_multiple_of": 32,
}
LFM2_MOE = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "layer_types": ["conv", "conv", "full_attention", "conv"],
    "num_dense_layers": 1,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
}
LFM2_BIAS = {"conv_bias": True, "conv_L_cache": 4, "block_auto_adjust_ff_dim": False, "tie_word_embeddings": False}
LFM2_PLAIN = {"use_expert_bias": False, "norm_topk_prob": False, "routed_scaling_factor": 1.7, "conv_bias": True}

YI = {"hidden_size": 128, "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e6}}
QWQ = {
    "hidden_size": 128,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "use_sliding_window": False,
    "sliding_window": 16,
    "max_window_layers": 1,
}

# heads of 96, 80 and 32 dimensions; texts of 70 tokens are beyond the original context
PHI3 = {"hidden_size": 192, "num_attention_heads": 2, "num_key_value_heads": 2, "sliding_window": 16}
PHI4_MINI = {
    "hidden_size": 128,
    "tie_word_embeddings": True,
    "original_max_position_embeddings": 48,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0 + 0.1 * i for i in range(12)],
        "long_factor": [1.0 + 1.5 * i for i in range(12)],
    },
}
PHI2 = {
    "hidden_size": 160,
    "intermediate_size": 640,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.4,
}
STABLELM = {"hidden_size": 160, "num_attention_heads": 2, "num_key_value_heads": 2}
STABLELM_12B = {"hidden_size": 128, "use_parallel_residual": True, "qk_layernorm": True}
SMOLLM3 = {"hidden_size": 128, "num_hidden_layers": 4}
SMOLLM3_WINDOWS = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "no_rope_layers": [0, 1, 0],
    "use_sliding_window": True,
    "sliding_window": 16,
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": False,
}

# value heads that share key heads; small delta nets make much of what quantised weights differ by, so there is one
QWEN3_NEXT = {
    "head_dim": 32,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
NEXT_STEPS = {
    "num_hidden_layers": 4,
    "layer_types": None,
    "linear_value_head_dim": 24,
    "decoder_sparse_step": 2,
    "mlp_only_layers": [3],
    "norm_topk_prob": False,
    "linear_conv_kernel_dim": 3,
}
EVEN_HEADS = {
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "tie_word_embeddings": True,
    "num_hidden_layers": 4,
    "layer_types": None,
}
OLMO_HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,  # transformers writes kernels of q, k and v as if they were of one size
    "rope_parameters": {"rope_type": "default", "rope_theta": None},
}
OLMO_TURNED = {
    "num_hidden_layers": 3,
    "layer_types": ["full_attention", "linear_attention", "full_attention"],
    "linear_allow_neg_eigval": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
QWEN35_ROPE = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.25,
    "mrope_section": [2, 1, 1],
    "mrope_interleaved": True,
}
QWEN35 = QWEN3_NEXT | {"rope_parameters": QWEN35_ROPE}

QWEN4_EXP = {  # a choice of 6 groups of 4 positions, and up to 3 more positions; n-grams that some tokens end
    "num_hidden_layers": 3,
    "head_dim": 32,
    "layer_types": ["linear_attention", "linear_attention", "indexed_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "hc_lowrank": 32,
    "ple_layer_ids": [2],
    "ple_embed_dim": 128,
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 50,
    "split_ngram_parts": 4,
    "indexer_n_heads": 16,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 24,
    "indexer_compress_ratio": 4,
    "output_gate_type": "sigmoid",
    "rope_parameters": QWEN35_ROPE,
    "eos_token_id": 7,
}
QWEN4_EXP_PLAIN = {  # other sizes: groups of 16, two streams, fewer heads of n-grams, SiLU gates
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "hc_count": 2,
    "hc_lowrank": 24,
    "ple_layer_ids": [1, 3],
    "ple_embed_dim": 48,
    "ple_conv_kernel_size": 2,
    "heads_per_ngram": 1,
    "seed": 5,
    "split_ngram_parts": 1,
    "indexer_budget": 32,
    "indexer_compress_ratio": 16,
    "indexer_head_dim": 32,
    "output_gate_type": None,
    "norm_topk_prob": False,
    "tie_word_embeddings": True,
}

# published factors scale by up to 12 and 0.22; the scores' must differ from D^-0.5
GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.11,
    "logits_scaling": 4.0,
}
GRANITE_MOE = GRANITE | {"num_local_experts": 6, "num_experts_per_tok": 3}
GRANITE_BIASES = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "residual_multiplier": 1.0}
GRANITE_HYBRID = GRANITE | {
    "layer_types": ["attention", "attention"],
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "shared_intermediate_size": 96,
    "position_embedding_type": "rope",
}
GRANITE_MAMBA = GRANITE_HYBRID | {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "position_embedding_type": None,
    "mamba_expand": 3,
    "mamba_n_heads": 6,
    "mamba_d_head": 32,
    "mamba_n_groups": 2,
    "mamba_d_state": 16,
}
NEMOTRON_H = {
    "num_hidden_layers": 5,
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention", "mlp"],
    "head_dim": 32,
    "expand": 4,
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
    "n_groups": 2,
    "ssm_state_size": 16,
    "time_step_min": 1e-30,  # by which transformers limits dt in prompts alone, where published models have no limit
}
NEMOTRON_MOE = NEMOTRON_H | {
    "num_hidden_layers": 4,
    "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 96,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
}
NEMOTRON_LATENT = NEMOTRON_MOE | {"moe_latent_size": 32}
FALCON_H1 = {
    "mamba_d_ssm": 128,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 16,
    "embedding_multiplier": 2.5,
    "lm_head_multiplier": 0.3,
    "attention_in_multiplier": 1.3,
    "key_multiplier": 0.6,
    "attention_out_multiplier": 0.8,
    "ssm_in_multiplier": 1.4,
    "ssm_multipliers": [0.5, 0.8, 1.2, 0.7, 1.5],
    "ssm_out_multiplier": 0.7,
    "mlp_multipliers": [0.9, 0.6],
}
FALCON_NORMS = FALCON_H1 | {"mamba_rms_norm": True, "mamba_norm_before_gate": False, "tie_word_embeddings": True}
FALCON_GATES = {"mamba_d_ssm": 96, "mamba_n_heads": 6, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 16}
FALCON_GATES |= {"mamba_rms_norm": True, "mamba_norm_before_gate": True, "mamba_conv_bias": False}
MAMBA2 = {
    "expand": 4,
    "num_heads": 8,
    "head_dim": 32,
    "n_groups": 2,
    "state_size": 16,
    "num_attention_heads": None,
    "num_key_value_heads": None,
    "intermediate_size": None,
    "max_position_embeddings": None,
}
MAMBA = {"time_step_rank": 32} | dict.fromkeys(
    ("num_attention_heads", "num_key_value_heads", "intermediate_size", "max_position_embeddings")
)
MAMBA_ODD = MAMBA | {"expand": 1, "state_size": 10, "time_step_rank": 5, "conv_kernel": 3, "hidden_size": 72}
JAMBA = {
    "num_hidden_layers": 3,
    "attn_layer_period": 3,
    "attn_layer_offset": 1,
    "expert_layer_period": 3,
    "expert_layer_offset": 2,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "mamba_dt_rank": 32,
}
KIMI_LINEAR = {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "linear_head_dim": 32,
    "linear_num_heads": 4,
    "num_experts": 8,
    "num_experts_per_token": 3,
    "num_shared_experts": 2,
    "moe_intermediate_size": 32,
    "routed_scaling_factor": 1.7,
}
GLM5_NEXT = {  # a choice of 6 groups of 4 positions, and up to 3 more positions
    "num_key_value_heads": 4,
    "layer_types": ["linear_attention", "indexed_attention"],
    "indexer_types": ["full", "full"],
    "mlp_layer_types": ["dense", "sparse"],
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 24,
    "linear_head_dim": 32,
    "linear_num_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "moe_intermediate_size": 32,
    "routed_scaling_factor": 1.7,
    "index_n_heads": 16,
    "index_head_dim": 32,
    "index_topk": 24,
    "index_kpool": 4,
}
GLM5_NEXT_POOLS = {  # groups of 16, a shared choice, decays without a bound, two streams, groups of experts
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "indexed_attention", "indexed_attention", "linear_attention"],
    "indexer_types": ["full", "full", "shared", "full"],
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    "index_topk": 32,
    "index_kpool": 16,
    "linear_lower_bound": None,
    "linear_num_heads": 2,
    "hc_mult": 2,
    "hc_sinkhorn_iters": 3,
    "n_group": 4,
    "topk_group": 2,
}
NEMOTRON_BIASES = {"mlp_bias": True, "use_bias": True, "use_conv_bias": False}
GRANITE_MAMBA_MOE = {
    "num_local_experts": 6,
    "num_experts_per_tok": 3,
    "position_embedding_type": "rope",
    "mamba_proj_bias": False,
    "mamba_conv_bias": False,
}

EVERY_THIRD = ["sliding_attention", "sliding_attention", "full_attention"]
WINDOWS = {"num_hidden_layers": 3, "layer_types": EVERY_THIRD, "sliding_window": 16}
FIRST_FULL = ["full_attention", "sliding_attention", "sliding_attention"]
GRANITE_SWA = GRANITE | {
    "num_hidden_layers": 3,
    "layer_types": FIRST_FULL,
    "sliding_window": 16,
    "layer_rope_theta": [0, 1e4, 1e4],
}
LAGUNA = {
    "head_dim": 32,
    "num_hidden_layers": 3,
    "layer_types": FIRST_FULL,
    "num_attention_heads_per_layer": [4, 6, 6],
    "sliding_window": 16,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 96,
    "moe_routed_scaling_factor": 2.5,
    "rope_parameters": {
        "full_attention": {
            "rope_type": "yarn",
            "rope_theta": 5e4,
            "factor": 8.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "attention_factor": 1.2,
            "partial_rotary_factor": 0.5,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
    },
}
LAGUNA_WIDE = {
    "head_dim": 32,
    "gating": "per-element",
    "mlp_layer_types": ["dense", "sparse"],
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}
# a softer cap than the published one, and scores that are less sharp, which bfloat16 rounds
MUSE = {
    "head_dim": 32,
    "num_hidden_layers": 5,
    "sliding_window": 16,
    "final_logit_softcapping": 3.0,
    "qk_scale_factor": 1.3,
}
MUSE_BASES = {"layer_types": FIRST_FULL, "num_hidden_layers": 3, "layer_rope_theta": [1e4, 0, 1e4]}
PHIMOE = {"hidden_size": 128, "num_local_experts": 6, "attention_bias": True, "lm_head_bias": True}
PHIMOE_LONG = {
    "router_jitter_noise": 0.2,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.1 * i for i in range(16)],
        "long_factor": [1.0 + 1.5 * i for i in range(16)],
        "short_mscale": 1.2,
        "long_mscale": 1.2,
        "original_max_position_embeddings": 512,
    },
}
MIMO = {
    "head_dim": 48,
    "v_head_dim": 32,
    "num_key_value_heads": 1,
    "num_hidden_layers": 3,
    "layer_types": FIRST_FULL,
    "sliding_window": 16,
    "n_routed_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
}
LING3 = {
    "num_hidden_layers": 2,
    "layer_group_size": 2,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "head_dim": 32,
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "num_mtp_layers": 0,
}
# each limit in experts, in what they share, and in a dense layer
STEP = {
    "head_dim": 32,
    "num_hidden_layers": 3,
    "layer_types": FIRST_FULL,
    "num_sliding_attention_heads": 6,
    "sliding_window": 16,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "n_routed_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "share_expert_dim": 96,
    "moe_router_scaling_factor": 2.5,
    "swiglu_limits": [None, 7.0, 16.0],
    "swiglu_limits_shared": [16.0, 0.0, 7.0],
    "rope_parameters": {
        "full_attention": LLAMA3 | {"rope_theta": 5e4, "partial_rotary_factor": 0.5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
    },
}
STEP_PLAIN = {"layer_types": None, "attention_bias": True, "swiglu_limits": None, "swiglu_limits_shared": None}
OLMO3_ROPE = {
    "full_attention": {
        "rope_type": "yarn",
        "rope_theta": 5e4,
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "attention_factor": 1.2,
    },
    "sliding_attention": {"rope_type": "default", "rope_theta": 5e4},
}
OLMO = {"hidden_size": 128, "rms_norm_eps": 1e-5}
EXAONE4 = {"sliding_window": None, "layer_types": ["full_attention"] * 2, "rope_parameters": LLAMA3}
K_EXAONE = WINDOWS | {
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "num_shared_experts": 2,
    "moe_intermediate_size": 64,
    "n_group": 2,
    "topk_group": 1,
}
DOTS1 = {
    "head_dim": 32,
    "num_key_value_heads": 4,
    "n_routed_experts": 6,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
DOTS1_WINDOWS = {"num_key_value_heads": 2, "sliding_window": 16, "max_window_layers": 1, "attention_bias": True}
DOTS1_WINDOWS |= {"norm_topk_prob": False, "n_group": 2, "topk_group": 1}
AFMOE = {
    "head_dim": 32,
    "num_hidden_layers": 4,
    "sliding_window": 16,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "num_shared_experts": 2,
    "moe_intermediate_size": 64,
    "route_scale": 2.826,
    "mup_enabled": True,
}
AFMOE_PLAIN = {"mup_enabled": False, "num_dense_layers": 2, "attention_bias": True, "tie_word_embeddings": True}
OLMOE = OLMO | {"num_experts": 6, "num_experts_per_tok": 3, "num_key_value_heads": 4}
MINIMAX_M2 = {
    "head_dim": 32,
    "num_local_experts": 6,
    "num_experts_per_tok": 3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
}
MINIMAX_M3 = MINIMAX_M2 | {  # a choice of 3 of 5 blocks
    "num_hidden_layers": 3,
    "dense_intermediate_size": 128,
    "shared_intermediate_size": 96,
    "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "index_n_heads": 2,
    "index_head_dim": 32,
    "index_block_size": 16,
    "index_topk_blocks": 3,
    "rms_norm_eps": 1e-5,
}
MINIMAX_M3_FIRST = MINIMAX_M3 | {  # index heads that rotate whole; blocks of two pages; last layers without index
    "layer_types": ["minimax_m3_sparse", "full_attention", "full_attention"],
    "mlp_layer_types": ["sparse", "dense", "dense"],
    "shared_intermediate_size": 48,
    "index_head_dim": 16,
    "index_block_size": 32,
    "index_topk_blocks": 2,
    "index_local_blocks": 1,
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": True,
}
COHERE = {"hidden_size": 128, "logit_scale": 0.25}
COHERE_MOE = COHERE | {
    "head_dim": 32,
    "num_hidden_layers": 4,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    "sliding_window": 16,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "num_shared_experts": 2,
    "intermediate_size": 64,
    "prefix_dense_intermediate_size": 96,
    "expert_selection_fn": "sigmoid",
}
NORTH_SOFTMAX = {"expert_selection_fn": "softmax", "shared_expert_combination_strategy": "sum", "attention_bias": True}
NORTH_SOFTMAX |= {"prefix_dense_sliding_window_pattern": 2, "tie_word_embeddings": False}
ERNIE_MOE = {
    "head_dim": 32,
    "moe_num_experts": 6,
    "moe_k": 3,
    "moe_intermediate_size": 64,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
}
YOUTU = {key: value for key, value in DEEPSEEK.items() if "expert" not in key and "group" not in key}
YOUTU = {
    key: value for key, value in YOUTU.items() if key not in ("first_k_dense_replace", "routed_scaling_factor")
} | {"pad_token_id": None}
SOLAR = {key: value for key, value in GLM_MOE.items() if key not in ("first_k_dense_replace", "attention_bias")}
HY3 = {
    "head_dim": 32,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "num_shared_experts": 2,
    "moe_intermediate_size": 64,
    "router_scaling_factor": 1.8,
}
# of their own keys for the sizes of heads and MLPs
CLASSIC = {"hidden_size": 128, "num_key_value_heads": None, "intermediate_size": None}
GPT2_SCALES = CLASSIC | {"scale_attn_by_inverse_layer_idx": True, "activation_function": "relu"}
GPT_NEO = CLASSIC | {"hidden_size": 64, "attention_types": [[["global", "local"], 1]], "window_size": 16}
NEOX_SEQUENTIAL = CLASSIC | {"intermediate_size": 96, "use_parallel_residual": False}
FALCON = CLASSIC | {"ffn_hidden_size": 96}
FALCON_40B = FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}
FALCON_11B = FALCON_40B | {"num_ln_in_parallel_attn": 1, "tie_word_embeddings": False}
FALCON_1B = FALCON | {"parallel_attn": False, "bias": True, "multi_query": False}  # with rotary positions
OPT = {"hidden_size": 128, "ffn_dim": 96}
OPT_350M = OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 64, "enable_bias": False}
STARCODER2 = {"hidden_size": 128, "sliding_window": 16, "use_bias": False, "tie_word_embeddings": False}

HUNYUAN = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 50.0, "factor": 1.0}}
HUNYUAN_MOE = {"head_dim": 32, "num_experts": 6, "moe_topk": 3}

INKLING = {  # windows of 16 tokens with other heads; profiles shorter than the prompt; scores grow from token 30 on
    "num_hidden_layers": 3,
    "head_dim": 32,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 1,
    "swa_head_dim": 16,
    "sliding_window_size": 16,
    "d_rel": 8,
    "rel_extent": 40,
    "log_scaling_n_floor": 30,
    "log_scaling_alpha": 0.5,
    "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"],
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "route_scale": 1.7,
    "logits_mup_width_multiplier": 3.0,
}
INKLING_DENSE = INKLING | {  # no window in any layer, no growth, other taps, and a head of fewer tokens
    "layer_types": ["hybrid"] * 3,
    "mlp_layer_types": ["dense", "sparse", "dense"],
    "conv_kernel_size": 3,
    "log_scaling_n_floor": None,
    "n_shared_experts": 1,
    "rel_extent": 128,
    "unpadded_vocab_size": 264,
}

DEEPSEEK_OCR = {
    "num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32,
    "n_shared_experts": 2, "mlp_layer_types": ["dense", "sparse"], "routed_scaling_factor": 1.5,
}  # fmt: skip
DEEPSEEK_OCR_GROUPS = DEEPSEEK_OCR | {
    "num_key_value_heads": 2, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
    "attention_bias": True,
}  # fmt: skip

ROWS: Mapping[str, Row] = {
    "Llama": Row("llama", {"head_dim": 32}, "llama"),
    "Llama 3 rope": Row("llama", {"head_dim": 32, "rope_parameters": LLAMA3}, "llama", common=False),
    "Mistral": Row("mistral", {"head_dim": 32, "sliding_window": 16}, "llama"),
    "Ministral": Row(
        "ministral", {"head_dim": 32, "sliding_window": 16, "layer_types": MINISTRAL_LAYERS}, common=False
    ),
    "Ministral 3": Row("ministral3", {"head_dim": 32, "rope_parameters": MINISTRAL3_ROPE}, "mistral3"),
    "Qwen2": Row("qwen2", {"hidden_size": 128}, "qwen2"),
    "Qwen2-VL": Row("qwen2", {"hidden_size": 128, "rope_parameters": QWEN2_VL_ROPE}, "qwen2vl"),
    "Qwen3": Row("qwen3", {"head_dim": 32}, "qwen3"),
    "Qwen3-VL": Row("qwen3", {"head_dim": 32, "rope_parameters": QWEN3_VL_ROPE}, "qwen3vl"),
    "Gemma": Row("gemma", {"head_dim": 32, "hidden_act": "gelu_pytorch_tanh"}, "gemma"),
    "Gemma-2": Row("gemma2", GEMMA2, "gemma2"),
    "Gemma-2 scale": Row(
        "gemma2", GEMMA2 | {"query_pre_attn_scalar": 24, "attn_logit_softcapping": None}, common=False
    ),
    "Gemma-3": Row("gemma3_text", GEMMA3, "gemma3"),
    "Gemma-3 stretched": Row("gemma3_text", GEMMA3 | {"rope_parameters": GEMMA3_ROPE}, "gemma3", common=False),
    "Llama-4": Row("llama4_text", LLAMA4, "llama4", undecided=0.1),
    "Llama-4 chunks": Row("llama4_text", LLAMA4 | LLAMA4_CHUNKS, undecided=0.1),
    "Llama-4 yarn": Row("llama4_text", LLAMA4 | {"rope_parameters": LLAMA4_YARN}, undecided=0.1, common=False),
    "Llama-4 Guard": Row("llama4_text", LLAMA4 | LLAMA_GUARD4, common=False),
    "Gemma-3n": Row("gemma3n_text", GEMMA3N, "gemma3n"),
    "Gemma-3n own keys": Row("gemma3n_text", GEMMA3N | GEMMA3N_OWN, common=False),
    "Gemma-4": Row("gemma4_text", GEMMA4_31B, "gemma4"),
    "Gemma-4 wide heads": Row("gemma4_text", GEMMA4_WIDE, "gemma4", common=False),
    "Gemma-4 shared keys": Row("gemma4_text", GEMMA4_E4B, "gemma4"),
    "Gemma-4 shared keys as values": Row(
        "gemma4_text", GEMMA4_E4B | {"attention_k_eq_v": True}, "gemma4", common=False
    ),
    "Gemma-4 experts": Row("gemma4_text", GEMMA4_MOE, "gemma4", undecided=0.1),
    "Gemma-4 biases": Row("gemma4_text", GEMMA4 | {"attention_bias": True, "attention_k_eq_v": True}, common=False),
    "Gemma-4 unified": Row("gemma4_unified_text", GEMMA4 | {"tie_word_embeddings": False}, common=False),
    "GLM-4": Row("glm4", {"head_dim": 32, "attention_bias": True}, "glm4"),
    "GLM-4 chat": Row(
        "glm", {"head_dim": 32, "attention_bias": True, "partial_rotary_factor": 0.25}, "chatglm", common=False
    ),
    "DeepSeek-V2": Row("deepseek_v2", DEEPSEEK | {"topk_method": "group_limited_greedy"}, "deepseek2", undecided=0.1),
    "DeepSeek-V2 Lite": Row(
        "deepseek_v2", DEEPSEEK | {"q_lora_rank": None, "rope_parameters": DEEPSEEK_YARN}, "deepseek2", undecided=0.1
    ),
    "DeepSeek-OCR 2": Row("deepseek_ocr2_text", DEEPSEEK_OCR, "deepseek2-ocr", undecided=0.1, common=False),
    "DeepSeek-OCR 2 groups": Row("deepseek_ocr2_text", DEEPSEEK_OCR_GROUPS, undecided=0.1, common=False),
    "Unlimited-OCR": Row(
        "unlimited_ocr_text", DEEPSEEK_OCR | {"sliding_window": 24}, "deepseek2-ocr", undecided=0.1, common=False
    ),
    "DeepSeek-V3": Row("deepseek_v3", DEEPSEEK | {"rope_parameters": DEEPSEEK_YARN}, "deepseek2", undecided=0.1),
    "DeepSeek-V3.2": Row("deepseek_v32", DEEPSEEK_INDEX, "deepseek32", undecided=0.2),
    "A.X K2": Row("axk2", DEEPSEEK | AX | {"n_group": None, "topk_group": None}, undecided=0.2, common=False),
    "A.X K2 groups": Row(
        "axk2", DEEPSEEK | AX | {"attention_bias": True, "rope_parameters": DEEPSEEK_YARN}, undecided=0.2, common=False
    ),
    "DeepSeek-V4": Row("deepseek_v4", DEEPSEEK_V4, common=False, undecided=0.1),
    "DeepSeek-V4 other sizes": Row("deepseek_v4", DEEPSEEK_V4_OTHER, common=False, undecided=0.1),
    "GLM-5": Row("glm_moe_dsa", GLM_INDEX, "glm-dsa", undecided=0.2),
    "DeepSeek-V3 halves": Row(
        "deepseek_v3",
        DEEPSEEK
        | {"rope_interleave": False, "norm_topk_prob": False, "rope_parameters": DEEPSEEK_YARN | {"mscale": 1.3}},
        undecided=0.1,
    ),
    "GLM-4.7-Flash": Row(
        "glm4_moe_lite", DEEPSEEK | {"n_group": 1, "topk_group": 1}, "deepseek2", common=False, undecided=0.1
    ),
    "Mistral Small 4": Row(
        "mistral4",
        DEEPSEEK
        | {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}
        | {"rope_parameters": DEEPSEEK_YARN | {"llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0}},
        "mistral4",
        common=False,
        undecided=0.1,
    ),
    "DeepSeek-V3 dense": Row(
        "deepseek_v3", DEEPSEEK | {"first_k_dense_replace": 2, "q_lora_rank": None}, "deepseek2", common=False
    ),
    "Mixtral": Row("mixtral", {"head_dim": 32} | MIXTRAL, "llama", undecided=0.1),
    "Mixtral window": Row(
        "mixtral",
        {"head_dim": 32, "sliding_window": 16} | MIXTRAL | {"num_experts_per_tok": 2},
        undecided=0.1,
        common=False,
    ),
    "Qwen2-MoE": Row("qwen2_moe", {"hidden_size": 128} | QWEN_MOE, "qwen2moe", undecided=0.1),
    "Qwen2-MoE sparse steps": Row("qwen2_moe", {"hidden_size": 128} | QWEN_MOE | SPARSE_STEPS, undecided=0.1),
    "Qwen3-MoE": Row("qwen3_moe", {"head_dim": 32} | QWEN_MOE | {"norm_topk_prob": True}, "qwen3moe", undecided=0.1),
    "Qwen3-MoE window": Row(
        "qwen3_moe",
        {"head_dim": 32, "use_sliding_window": True, "sliding_window": 16} | QWEN_MOE,
        undecided=0.1,
        common=False,
    ),
    "Qwen3-VL-MoE": Row(
        "qwen3_moe",
        {"head_dim": 32, "rope_parameters": QWEN3_VL_ROPE} | QWEN_MOE | {"norm_topk_prob": True},
        "qwen3vlmoe",
        undecided=0.1,
        common=False,
    ),
    "Qwen3.5": Row("qwen3_5_text", QWEN35, "qwen35"),
    "Qwen3.5 even heads": Row("qwen3_5_text", QWEN35 | EVEN_HEADS, "qwen35", common=False),
    "Qwen3.5-MoE": Row("qwen3_5_moe_text", QWEN35 | QWEN_MOE, "qwen35moe", undecided=0.1),
    "Qwen3-Next": Row("qwen3_next", QWEN3_NEXT | QWEN_MOE, "qwen3next", undecided=0.1),
    "OLMo Hybrid": Row("olmo_hybrid", OLMO_HYBRID),
    "OLMo Hybrid turned": Row("olmo_hybrid", OLMO_HYBRID | OLMO_TURNED, common=False),
    "Qwen3-Next sparse steps": Row("qwen3_next", QWEN3_NEXT | QWEN_MOE | NEXT_STEPS, undecided=0.1, common=False),
    "GLM-4-MoE": Row("glm4_moe", {"head_dim": 32} | GLM_MOE, "glm4moe", undecided=0.1),
    "GLM-4-MoE groups": Row("glm4_moe", {"head_dim": 32} | GLM_MOE | GLM_GROUPS, "glm4moe", undecided=0.1),
    "Yi": Row("llama", YI, "llama", common=False),
    "QwQ": Row("qwen2", QWQ, "qwen2", common=False),
    "Phi-2": Row("phi", PHI2, "phi2"),
    "Phi-3": Row("phi3", PHI3, "phi3"),
    "Phi-3.5-MoE": Row("phimoe", PHIMOE, "phimoe", undecided=0.1, common=False),
    "Phi-3.5-MoE long": Row("phimoe", PHIMOE | PHIMOE_LONG, undecided=0.1, common=False),
    "Phi-3.5-MoE tied": Row("phimoe", PHIMOE | {"tie_word_embeddings": True}, undecided=0.1, common=False),
    "Phi-4-mini": Row("phi3", PHI4_MINI, "phi3"),
    "StableLM": Row("stablelm", STABLELM, "stablelm"),
    "StableLM-2": Row("stablelm", STABLELM | {"hidden_size": 128, "use_qkv_bias": True}, "stablelm", common=False),
    "StableLM-2-12B": Row("stablelm", STABLELM_12B, "stablelm"),
    "SmolLM3": Row("smollm3", SMOLLM3, "smollm3"),
    "SmolLM3 windows": Row("smollm3", SMOLLM3_WINDOWS, common=False),
    "gpt-oss": Row("gpt_oss", {"head_dim": 32} | GPT_OSS, "gpt-oss", undecided=0.1),
    "LFM2": Row("lfm2", LFM2, "lfm2"),
    "LFM2 biases": Row("lfm2", LFM2 | LFM2_BIAS, common=False),
    "LFM2-MoE": Row("lfm2_moe", LFM2_MOE, "lfm2moe", undecided=0.1),
    "LFM2-MoE plain": Row("lfm2_moe", LFM2_MOE | LFM2_PLAIN, undecided=0.1),
    "Granite": Row("granite", GRANITE, "granite", common=False),
    "Granite biases": Row("granite", GRANITE | GRANITE_BIASES, "granite", common=False),
    "Granite without a window": Row("granite", GRANITE | {"sliding_window": 16}, common=False),
    "Granite-MoE": Row("granitemoe", GRANITE_MOE, "granitemoe", undecided=0.1, common=False),
    "Granite-MoE shared": Row(
        "granitemoeshared", GRANITE_MOE | {"shared_intermediate_size": 64}, "granitemoe", undecided=0.1, common=False
    ),
    "Granite SWA": Row("granite_swa", GRANITE_SWA, "granite_swa", common=False),
    "Granite SWA bases": Row("granite_swa", GRANITE_SWA | {"layer_rope_theta": [5e5, 1e4, 1e4]}, common=False),
    "Granite SWA experts": Row(
        "granitemoe_swa",
        GRANITE_SWA | {"num_local_experts": 6, "num_experts_per_tok": 3},
        "granite_swa",
        undecided=0.1,
        common=False,
    ),
    "Granite 4": Row("granitemoehybrid", GRANITE_HYBRID, "granite", common=False),
    "Granite 4 unrotated": Row(
        "granitemoehybrid", GRANITE_HYBRID | {"position_embedding_type": None}, "granite", common=False
    ),
    "Granite 4 H": Row("granitemoehybrid", GRANITE_MAMBA, "granitehybrid"),
    "Granite 4 H experts": Row(
        "granitemoehybrid", GRANITE_MAMBA | GRANITE_MAMBA_MOE, "granitehybrid", undecided=0.1, common=False
    ),
    "Nemotron-H": Row("nemotron_h", NEMOTRON_H, "nemotron_h"),
    "Nemotron 3 experts": Row("nemotron_h", NEMOTRON_MOE, "nemotron_h_moe", undecided=0.1),
    "Nemotron 3 latent experts": Row("nemotron_h", NEMOTRON_LATENT, "nemotron_h_moe", undecided=0.1, common=False),
    "Falcon-H1": Row("falcon_h1", FALCON_H1, "falcon-h1"),
    "Falcon-H1 norms": Row("falcon_h1", FALCON_NORMS, "falcon-h1", common=False),
    "Falcon-H1 gates": Row("falcon_h1", FALCON_GATES, common=False),
    "Mamba 2": Row("mamba2", MAMBA2, "mamba2"),
    "Mamba 2 biases": Row("mamba2", MAMBA2 | {"use_bias": True, "tie_word_embeddings": True}, common=False),
    "Mamba": Row("mamba", MAMBA, "mamba"),
    "Mamba biases": Row(
        "mamba", MAMBA_ODD | {"use_bias": True, "use_conv_bias": False, "tie_word_embeddings": False}, common=False
    ),
    "Falcon Mamba": Row("falcon_mamba", MAMBA | {"mixer_rms_eps": 1e-5}, "mamba"),
    "Falcon Mamba epsilon": Row("falcon_mamba", MAMBA | {"mixer_rms_eps": 1e-2}, common=False),
    "Jamba": Row("jamba", JAMBA, "jamba", undecided=0.1),
    "Jamba dense": Row(
        "jamba", JAMBA | {"num_experts": 1, "mamba_proj_bias": True, "tie_word_embeddings": True}, common=False
    ),
    "GLM-5.3-Flash": Row("glm5_next_text", GLM5_NEXT, "glm5-next", undecided=0.2, common=False),
    "GLM-5.3-Flash pools": Row("glm5_next_text", GLM5_NEXT | GLM5_NEXT_POOLS, undecided=0.2, common=False),
    "Ling 3.0": Row("bailing_hybrid", LING3, "bailingmoe3", undecided=0.1, common=False),
    "Ling 3.0 free decays": Row(
        "bailing_hybrid",
        LING3 | {"kda_safe_gate": False, "norm_topk_prob": False, "n_shared_experts": 2, "rope_theta": 1e4},
        undecided=0.1,
        common=False,
    ),
    "Inkling": Row("inkling_text", INKLING, undecided=0.1, common=False),
    "Inkling full layers": Row("inkling_text", INKLING_DENSE, undecided=0.1, common=False),
    "Kimi Linear": Row("kimi_linear", KIMI_LINEAR, "kimi-linear", undecided=0.1),
    "Nemotron-H biases": Row("nemotron_h", NEMOTRON_H | NEMOTRON_BIASES, common=False),
    "Qwen4": Row("qwen4_exp_text", QWEN4_EXP, "qwen4exp", undecided=0.2, common=False),
    "Qwen4 plain": Row("qwen4_exp_text", QWEN4_EXP | QWEN4_EXP_PLAIN, undecided=0.2, common=False),
    "OLMo": Row("olmo", {"hidden_size": 128}, "olmo", common=False),
    "OLMo clip": Row("olmo", {"hidden_size": 128, "clip_qkv": 0.5}, "olmo"),
    "OLMo biases": Row("olmo", {"attention_bias": True, "clip_qkv": 0.5}, common=False),
    "OLMo 2": Row("olmo2", OLMO, "olmo2", common=False),
    "OLMo 2 biases": Row("olmo2", OLMO | {"attention_bias": True}, common=False),
    "OLMo 3": Row("olmo3", OLMO | WINDOWS | {"rope_parameters": OLMO3_ROPE}, "olmo2"),
    "OLMoE": Row("olmoe", OLMOE, "olmoe", undecided=0.1, common=False),
    "EXAONE 4": Row("exaone4", OLMO | EXAONE4, "exaone4", common=False),
    "EXAONE 4 full layers": Row("exaone4", OLMO | {"layer_types": ["full_attention"] * 2}, common=False),
    "EXAONE 4 windows": Row("exaone4", OLMO | WINDOWS, "exaone4", common=False),
    "K-EXAONE": Row("exaone_moe", K_EXAONE, "exaone-moe", undecided=0.1, common=False),
    "K-EXAONE full layers": Row(
        "exaone_moe",
        K_EXAONE | {"layer_types": ["full_attention"] * 3},
        common=False,
        undecided=0.1,
    ),
    "dots.llm1": Row("dots1", DOTS1, "dots1", undecided=0.1, common=False),
    "dots.llm1 windows": Row("dots1", DOTS1 | DOTS1_WINDOWS, undecided=0.1, common=False),
    "Apertus": Row("apertus", {"rope_parameters": LLAMA3}, "apertus", common=False),
    "Apertus biases": Row("apertus", {"attention_bias": True}, "apertus", common=False),
    "Laguna": Row("laguna", LAGUNA, "laguna", undecided=0.1, common=False),
    "Laguna wide gates": Row("laguna", LAGUNA_WIDE, "laguna", undecided=0.1, common=False),
    "Arcee": Row("arcee", {"rope_parameters": LLAMA3}, "arcee", common=False),
    "Arcee biases": Row("arcee", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}, common=False),
    "Nemotron": Row("nemotron", {"hidden_size": 128}, "nemotron", common=False),
    "Nemotron biases": Row(
        "nemotron", {"hidden_size": 128, "attention_bias": True, "mlp_bias": True}, "nemotron", common=False
    ),
    "AFMoE": Row("afmoe", AFMOE, "afmoe", undecided=0.1, common=False),
    "AFMoE biases": Row("afmoe", AFMOE | WINDOWS | AFMOE_PLAIN, undecided=0.1, common=False),
    "Muse Glimmer": Row("muse_glimmer_text", MUSE, "muse-glimmer", common=False),
    "Muse Glimmer bases": Row("muse_glimmer_text", MUSE | MUSE_BASES, common=False),
    "MiMo V2": Row("mimo_v2_flash", MIMO, "mimo2", undecided=0.1, common=False),
    "MiMo V2 biases": Row(
        "mimo_v2_flash",
        MIMO
        | {"attention_bias": True, "attention_value_scale": None, "n_group": 2, "topk_group": 1}
        | {"routed_scaling_factor": 1.7},
        undecided=0.1,
        common=False,
    ),
    "Step 3.5": Row("step3p5", STEP, "step35", undecided=0.1, common=False),
    "Step 3.5 biases": Row("step3p5", STEP | STEP_PLAIN, undecided=0.1, common=False),
    "MiniMax-M2": Row("minimax_m2", MINIMAX_M2, "minimax-m2", undecided=0.1, common=False),
    "MiniMax-M3": Row("minimax_m3_vl_text", MINIMAX_M3, "minimax-m3", undecided=0.2, common=False),
    "MiniMax-M3 first": Row("minimax_m3_vl_text", MINIMAX_M3_FIRST, undecided=0.2, common=False),
    "MiniMax-M3 plain": Row(
        "minimax_m3_vl_text", MINIMAX_M3 | {"layer_types": None, "mlp_layer_types": None}, undecided=0.1, common=False
    ),
    "Command R": Row("cohere", COHERE, "command-r", common=False),
    "Command R+": Row("cohere", COHERE | {"use_qk_norm": True, "attention_bias": True}, "command-r", common=False),
    "Command R7B": Row("cohere2", COHERE | WINDOWS, "cohere2"),
    "Command R7B full layers": Row("cohere2", COHERE | {"layer_types": ["full_attention"] * 2}, common=False),
    "North": Row("cohere2_moe", COHERE_MOE, "cohere2moe", undecided=0.1, common=False),
    "North RMS": Row("cohere2_moe", COHERE_MOE | {"rms_norm_eps": 1e-5}, "cohere2moe", undecided=0.1, common=False),
    "North softmax": Row("cohere2_moe", COHERE_MOE | NORTH_SOFTMAX, undecided=0.1, common=False),
    "Seed-OSS": Row("seed_oss", {"head_dim": 32}, "seed_oss", common=False),
    "Seed-OSS biases": Row("seed_oss", {"head_dim": 32, "attention_out_bias": True, "mlp_bias": True}, common=False),
    "ERNIE 4.5": Row("ernie4_5", {"head_dim": 32}, "ernie4_5", common=False),
    "ERNIE 4.5 biases": Row("ernie4_5", {"head_dim": 32, "use_bias": True}, common=False),
    "ERNIE 4.5 MoE": Row("ernie4_5_moe", ERNIE_MOE, "ernie4_5-moe", undecided=0.1),
    "Hy3": Row("hy_v3", HY3, "hy_v3", undecided=0.1, common=False),
    "Youtu": Row("youtu", YOUTU, "deepseek2", common=False),
    "Solar-Open": Row("solar_open", {"head_dim": 32} | SOLAR, "glm4moe", undecided=0.1, common=False),
    "GPT-2": Row("gpt2", CLASSIC | {"n_inner": 96}, "gpt2"),
    "GPT-2 scales": Row("gpt2", GPT2_SCALES, common=False),
    "GPT-BigCode": Row("gpt_bigcode", CLASSIC | {"n_inner": 96}, "starcoder", common=False),
    "GPT-BigCode heads": Row("gpt_bigcode", CLASSIC | {"multi_query": False}, common=False),
    "GPT-Neo": Row("gpt_neo", GPT_NEO, common=False),
    "GPT-NeoX": Row("gpt_neox", CLASSIC | {"intermediate_size": 96}, "gptneox"),
    "GPT-NeoX sequential": Row("gpt_neox", NEOX_SEQUENTIAL, "gptneox", common=False),
    "GPT-J": Row("gptj", CLASSIC | {"rotary_dim": 12}, common=False),
    "OPT": Row("opt", OPT, common=False),
    "OPT-350m": Row("opt", OPT_350M, common=False),
    "Falcon": Row("falcon", FALCON, "falcon", common=False),
    "Falcon-40B": Row("falcon", FALCON_40B, "falcon", common=False),
    "Falcon-11B": Row("falcon", FALCON_11B, "falcon", common=False),
    "Falcon-1B": Row("falcon", FALCON_1B, common=False),
    "Falcon-RW": Row("falcon", FALCON_1B | {"alibi": True}, common=False),
    "Hunyuan": Row("hunyuan_v1_dense", {"head_dim": 32} | HUNYUAN, "hunyuan-dense", common=False),
    "Hunyuan A13B": Row("hunyuan_v1_moe", HUNYUAN | HUNYUAN_MOE, "hunyuan-moe", undecided=0.1, common=False),
    "BLOOM": Row("bloom", CLASSIC, "bloom"),
    "StarCoder2": Row("starcoder2", {"hidden_size": 128}, "starcoder2", common=False),
    "StarCoder2 window": Row("starcoder2", STARCODER2, common=False),
}

FORMATS: Mapping[str, str] = {
    "GPTQ": "gptq asymmetric",
    "AWQ": "awq",
    "compressed-tensors int4": "ct int4",
    "compressed-tensors int8": "ct int8",
    "FP8": "fp8 blocks of 32",
    "MXFP4": "mxfp4",
    "NVFP4": "nvfp4",
}
"""Formats of quantised safetensors, by the writer in `tests/quantization/format_writers.py` that stands for each."""

ISQ_TYPES: Mapping[str, float] = {"q8_0": 0.05, "q4_0": 0.5}
"""In-situ types that stand for all, and the most that they may change the logits of random weights."""


TOWERS: Mapping[str, str] = {
    "Apertus1p5ForConditionalGeneration": "ApertusForCausalLM",
    "DeepseekOcr2ForConditionalGeneration": "DeepseekOcr2ForCausalLM",
    "UnlimitedOcrForConditionalGeneration": "UnlimitedOcrForCausalLM",
    "Gemma3ForConditionalGeneration": "Gemma3ForCausalLM",
    "Gemma3nForConditionalGeneration": "Gemma3nForCausalLM",
    "Gemma4ForConditionalGeneration": "Gemma4ForCausalLM",
    "Gemma4UnifiedForConditionalGeneration": "Gemma4UnifiedForCausalLM",
    "Glm5NextForConditionalGeneration": "Glm5NextForCausalLM",
    "GotOcr2ForConditionalGeneration": "Qwen2ForCausalLM",
    "InklingForConditionalGeneration": "InklingForCausalLM",
    "Llama4ForConditionalGeneration": "Llama4ForCausalLM",
    "MiniMaxM3SparseForConditionalGeneration": "MiniMaxM3VLForCausalLM",
    "Mistral3ForConditionalGeneration": "Ministral3ForCausalLM",
    "MuseGlimmerForConditionalGeneration": "MuseGlimmerForCausalLM",
    "Qwen3_5ForConditionalGeneration": "Qwen3_5ForCausalLM",
    "Qwen3_5MoeForConditionalGeneration": "Qwen3_5MoeForCausalLM",
    "Qwen4ExpForConditionalGeneration": "Qwen4ExpForCausalLM",
    "Step3p7ForConditionalGeneration": "Step3p5ForCausalLM",
}
"""Classes of multimodal models, and those whose rows stand for their text towers; see `test_towers.py`."""

RENAMED: Mapping[str, str] = {
    "BailingMoeV2ForCausalLM": "bailingmoe2",
    "SarvamMoEForCausalLM": "bailingmoe2",
    "ChatGLMForConditionalGeneration": "chatglm",
    "ChatGLMModel": "chatglm",
    "ExaoneForCausalLM": "exaone",
    "InternLM2ForCausalLM": "internlm2",
    "InternLM3ForCausalLM": "llama",
    "DeciLMForCausalLM": "deci",
    "MiMoV2ForCausalLM": "mimo2",
    "PicoDecoderHF": "llama",
    "QWenLMHeadModel": "qwen",
}
"""Classes that transformers does not have and that are others under other names, with the GGUF architecture; see
`test_renamed.py`."""

CUDA_FORMATS: Mapping[str, tuple[str, ...]] = {
    "AWQ": ("Llama",),
    "compressed-tensors int4": ("Llama",),
    "compressed-tensors int8": ("Llama",),
    "FP8": ("Llama", "DeepSeek-V3"),
    "MXFP4": ("Llama",),
    "NVFP4": ("Llama", "Qwen3-MoE"),
}
"""Rows that `tests/kernels/triton/test_families_triton.py` runs in these formats: the layouts that formats share with
GPTQ and GGUF are run there for every family."""


CUDA_ISQ = ("Llama", "Mixtral", "DeepSeek-V2")
"""Rows that it quantises while loading: to GGUF's types, which its tests of GGUF run for every family."""


def cuda_rows(format: str) -> list[str]:
    """Rows that it runs in a format of quantised safetensors."""
    return list(CUDA_FORMATS.get(format, first_rows()))


def cases(names: Iterable[str]) -> list[Any]:
    """For `parametrize`: rows by their names, with the marker where they are not common."""
    names = list(names)
    return few(names, *(name for name in names if ROWS[name].common))


def first_rows() -> list[str]:
    """One row for every kind of model, the first: flags change no format."""
    seen: dict[str, str] = {}
    for name, row in ROWS.items():
        seen.setdefault(row.model_type, name)
    return list(seen.values())
