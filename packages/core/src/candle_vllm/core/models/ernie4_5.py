# SPDX-License-Identifier: MIT
"""ERNIE 4.5, dense and with experts: Llama's layers (`llama.py`) with interleaved rotary pairs.

PaddleOCR-VL's text model has M-RoPE and half-split pairs. Experts are scored by a softmax and chosen with a correction
bias; the chosen scores are normalised; a shared expert is added. Source: Baidu, 2025, "ERNIE 4.5 Technical Report".
"""

from __future__ import annotations

from typing import Any

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.layers.moe import Mixture
from candle_vllm.core.loading.config import shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import entry
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models import llama
from candle_vllm.core.models.attention_names import GG, HF, axes_keys, gguf_has_bias
from candle_vllm.core.models.experts import expert_count, expert_names, shared_names, size_keys, sparse_in_gguf
from candle_vllm.core.models.family import BIASES, DIVISORS, Architecture, Family
from candle_vllm.core.models.llama import Llama, LlamaConfig

# ---- config ----------------------------------------------------------------------------------------------------------


def config_from_hf(fields: Fields, model_type: str) -> LlamaConfig:
    """Read `config.json` of ernie4_5 and ernie4_5_moe, and of PaddleOCR-VL's text model, which has M-RoPE."""
    fields.choice("hidden_act", "silu", "silu", "swish")
    shared = shared_from_hf(fields.with_absent(rope_theta=5e5), model_type)
    bias = fields.get("use_bias", bool, False)
    own: dict[str, Any] = {
        "tie_embeddings": fields.get("tie_word_embeddings", bool, True),
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": bias,
        "interleaved_rotary": True,
    }
    if shared["rope"].axes:
        return LlamaConfig(**shared | own | {"model_type": "paddleocr", "interleaved_rotary": False})
    if model_type == "ernie4_5":
        return LlamaConfig(**shared | own)
    if bias:
        raise UnsupportedModelError(f"{fields.path}: use_bias is true, which is not implemented for this model")
    inner, shared_experts = fields.count("moe_intermediate_size"), fields.get("moe_num_shared_experts", int, 2)
    mixture = Mixture(
        experts=expert_count(fields, "moe_num_experts", "num_experts"),
        top_k=fields.count("moe_k" if "moe_k" in fields else "num_experts_per_tok", 6),
        inner_size=inner,
        correction=True,
        shared_size=inner * shared_experts,
    )
    last = fields.get("moe_layer_end_index", int, -1)
    first, layers = fields.get("moe_layer_start_index", int, 1), shared["num_layers"]
    step, last = fields.count("moe_layer_interval", 1), layers - 1 if last < 0 else last
    sparse = frozenset(layer for layer in range(layers) if first <= layer <= last and (layer + 1) % step == 0)
    return LlamaConfig(**shared | own, mixture=mixture, num_experts=mixture.experts, sparse_layers=sparse)


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> LlamaConfig:
    """Read GGUF metadata of ernie4_5, paddleocr and ernie4_5-moe; the tensors show which layers have experts."""
    shared, tensors = shared_from_gguf(fields, checkpoint), checkpoint.tensors
    name = shared["model_type"].replace("-", "_")
    own: dict[str, Any] = {
        "model_type": name,
        "qkv_bias": gguf_has_bias(checkpoint),
        "output_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "interleaved_rotary": name != "paddleocr",
    }
    if name in ("ernie4_5", "paddleocr"):
        return LlamaConfig(**shared | own)
    inner, sparse = fields.count("expert_feed_forward_length"), sparse_in_gguf(checkpoint, shared["num_layers"])
    mixture = Mixture(
        experts=fields.count("expert_count"),
        top_k=fields.count("expert_used_count"),
        inner_size=inner,
        scale=fields.get("expert_weights_scale", float, 0.0) or 1.0,
        correction=any(tensor.endswith("exp_probs_b.bias") for tensor in tensors),
        shared_size=inner * fields.get("expert_shared_count", int, 0),
    )
    return LlamaConfig(**shared | own, mixture=mixture, num_experts=mixture.experts, sparse_layers=sparse)


# ---- weight names ----------------------------------------------------------------------------------------------------

_CORRECTIONS = tuple(f"{HF}mlp.{at}moe_statics.e_score_correction_bias" for at in ("", "gate."))

WEIGHTS = [
    *llama.WEIGHTS,
    WeightName("layers.{i}.mlp.router:weight", HF + "mlp.gate.weight", GG + "ffn_gate_inp.weight"),
    WeightName(
        "layers.{i}.mlp.router:correction",
        _CORRECTIONS,
        GG + "exp_probs_b.bias",
        lambda stored, _: entry(stored, 0),  # [1, X]
    ),
    *expert_names("mlp.experts", "gate_proj", "up_proj", "down_proj"),
    *shared_names("mlp.shared_experts"),
]


def ignored(config: LlamaConfig) -> list[str]:
    """Names that Llama ignores, and multi-token prediction layers."""
    return [*llama.ignored(config), r"model\.mtp_(block|emb_norm|hidden_norm|linear_proj)\..*"]


def gguf_keys(config: Any) -> dict[str, Any]:
    """The GGUF metadata of the experts; llama.cpp has a separate key for the size of the shared expert."""
    mixture, sparse = config.mixture, config.sparse_layers
    dense = config.num_layers - len(sparse)
    if sparse != frozenset(range(dense, config.num_layers)):
        raise UnsupportedModelError("llama.cpp's ernie4_5-moe has all dense layers in front of the others")
    return size_keys(mixture) | {
        "expert_shared_count": mixture.shared_size // mixture.inner_size,
        "expert_shared_feed_forward_length": mixture.shared_size,
        "interleave_moe_layer_step": 1,
        "leading_dense_block_count": dense,
    }


FAMILY = Family(
    hf={"Ernie4_5ForCausalLM": "ernie4_5", "Ernie4_5_MoeForCausalLM": "ernie4_5_moe"},
    gguf=("ernie4_5", "ernie4_5-moe", "paddleocr"),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Llama,
    weights=WEIGHTS,
    ignored=ignored,
    as_gguf={
        "ernie4_5": Architecture(name="ernie4_5", interleaved=True, unread=(DIVISORS, *BIASES[1:])),
        "paddleocr": Architecture(name="paddleocr", more=axes_keys, unread=(DIVISORS, *BIASES[1:])),
        "ernie4_5_moe": Architecture(name="ernie4_5-moe", more=gguf_keys, interleaved=True, norm=True),
    },
)
