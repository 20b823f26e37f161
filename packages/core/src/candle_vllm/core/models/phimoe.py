# SPDX-License-Identifier: MIT
"""Phi-3.5-MoE: Llama's attention in a block with LayerNorm instead of RMSNorm, and experts routed by SparseMixer.

The published checkpoint uses longrope with equal `short_mscale` and `long_mscale`; unequal ones are refused.
Sources: Abdin et al., 2024, arXiv:2404.14219; Liu et al., 2024, arXiv:2409.12136 (SparseMixer).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.layer_norm import LayerNorm
from candle_vllm.core.layers.moe import Mixture, SparseMLP
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.config import shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models import llama, phi3
from candle_vllm.core.models.attention_names import GG, HF, gguf_has_bias, pair
from candle_vllm.core.models.experts import count_keys, expert_count, expert_names, in_all_layers
from candle_vllm.core.models.family import Architecture, Family
from candle_vllm.core.models.llama import Attention, LlamaConfig
from candle_vllm.core.models.stack import DecoderStack

# ---- config ----------------------------------------------------------------------------------------------------------

_JITTER = 0.01  # in published files; GGUF has no key for it


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhiMoeConfig(LlamaConfig):
    """Config of Llama; `head_bias`: the head has a bias."""

    head_bias: bool = False


def config_from_hf(fields: Fields, model_type: str) -> PhiMoeConfig:
    """Read `config.json` of phimoe."""
    fields.choice("hidden_act", "silu", "silu", "swish")
    shared = shared_from_hf(_with_one_scale(fields.with_absent(rope_theta=1e6)), model_type)
    shared["sliding_windows"] = (fields.get("sliding_window", int, None),) * shared["num_layers"]
    bias = fields.get("attention_bias", bool, False)
    experts, top = expert_count(fields, "num_local_experts", "num_experts"), fields.count("num_experts_per_tok", 2)
    mixture = _mixture(shared, experts, top, fields.get("router_jitter_noise", float, _JITTER))
    own: dict[str, Any] = {"qkv_bias": bias, "output_bias": bias, "head_bias": fields.get("lm_head_bias", bool, False)}
    return PhiMoeConfig(**shared | own, **mixture)


def _with_one_scale(fields: Fields) -> Fields:
    """Return the config with the scale of cos and sin under the key that other longrope models use."""
    key = "rope_parameters" if "rope_parameters" in fields else "rope_scaling"
    scaling = dict(fields.section(key).values)
    scale, long = (scaling.pop(name, None) for name in ("short_mscale", "long_mscale"))
    if scale != long:
        raise UnsupportedModelError(f"{fields.path}: short_mscale and long_mscale that differ are not implemented")
    own = {} if scale is None else {"attention_factor": scale}
    return Fields({**fields.values, key: scaling | own}, fields.path) if scaling else fields


def _mixture(shared: dict[str, Any], experts: int, top_k: int, jitter: float = _JITTER) -> dict[str, Any]:
    """The config fields of experts in all layers."""
    how: dict[str, Any] = {"scoring": "sparsemixer", "jitter": jitter, "renormalise": False}
    mixture = Mixture(experts=experts, top_k=top_k, inner_size=shared["intermediate_size"], **how)
    return in_all_layers(mixture, shared["num_layers"])


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> PhiMoeConfig:
    """Read GGUF metadata of phimoe."""
    shared, tensors = shared_from_gguf(fields, checkpoint), checkpoint.tensors
    shared["rope"] = phi3.with_divisors(fields, checkpoint, shared["rope"], shared["max_position"])
    own: dict[str, Any] = {"output_bias": "blk.0.attn_output.bias" in tensors, "head_bias": "output.bias" in tensors}
    own["qkv_bias"] = gguf_has_bias(checkpoint)
    experts, top = fields.count("expert_count"), fields.count("expert_used_count")
    return PhiMoeConfig(**shared | own, **_mixture(shared, experts, top))


# ---- block and model -------------------------------------------------------------------------------------------------


class Block:
    """One decoder layer. Its input [T, E] is x + residual, added in the first norm; residual is None in layer 0."""

    def __init__(self, config: PhiMoeConfig, layer: int, rotary: Rotary, placement: Placement) -> None:
        assert config.mixture is not None
        size, eps = config.hidden_size, config.norm_eps
        self.attention_norm, self.mlp_norm = (LayerNorm(size, eps, placement) for _ in range(2))
        self.attention = Attention(config, layer, rotary, placement)
        self.mlp = SparseMLP(size, config.mixture, placement)

    def __call__(self, x: Value, residual: Value | None, step: StepInput) -> tuple[Value, Value]:
        normed, residual = self.attention_norm.add(x, residual)
        normed, residual = self.mlp_norm.add(self.attention(normed, step), residual)
        return self.mlp(normed), residual


class PhiMoe(DecoderStack):
    """The decoder: token ids [T] -> hidden states [T, E] -> logits [T, V]."""

    def __init__(self, config: PhiMoeConfig, placement: Placement, checkpoint: Checkpoint) -> None:
        del checkpoint
        self.config, size, tied = config, (config.vocab_size, config.hidden_size), config.tie_embeddings
        self.embed = Embedding(*size, placement, bias=config.head_bias and tied and config.has_head)
        self.rotary = Rotary(config.rope, config.max_position, placement)
        self.layers = [Block(config, layer, self.rotary, placement) for layer in range(config.num_layers)]
        self.norm = LayerNorm(config.hidden_size, config.norm_eps, placement)
        self.head = None if tied else Embedding(*size, placement, bias=config.head_bias)
        self.scorer = self.embed if self.head is None else self.head


# ---- weight names ----------------------------------------------------------------------------------------------------

_TO, _ROUTERS = "layers.{i}.", (HF + "block_sparse_moe.gate.weight", HF + "mlp.router.weight")
_NORMS = [
    *pair(_TO + "attention_norm:", HF + "input_layernorm", GG + "attn_norm"),
    *pair(_TO + "mlp_norm:", HF + "post_attention_layernorm", GG + "ffn_norm"),
    *pair("norm:", "model.norm", "output_norm"),
]
WEIGHTS = [
    *(line for line in llama.WEIGHTS if line.target not in {norm.target for norm in _NORMS}),
    *_NORMS,
    WeightName("scorer:bias", "lm_head.bias", "output.bias"),
    WeightName("layers.{i}.mlp.router:weight", _ROUTERS, GG + "ffn_gate_inp.weight"),
    *expert_names("block_sparse_moe.experts", "w1", "w3", "w2"),
]


def gguf_keys(config: PhiMoeConfig) -> dict[str, Any]:
    """The GGUF metadata of a Phi-3.5-MoE in addition to the keys of every model."""
    if config.mixture is None or not (config.head_bias and config.output_bias):
        raise UnsupportedModelError("llama.cpp's phimoe needs biases of the head and of attention's output")
    return phi3.gguf_keys(config) | count_keys(config.mixture)


FAMILY = Family(
    hf={"PhimoeForCausalLM": "phimoe", "PhiMoEForCausalLM": "phimoe"},
    gguf=("phimoe",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=PhiMoe,
    weights=WEIGHTS,
    ignored=phi3.ignored,
    as_gguf={"phimoe": Architecture(name="phimoe", more=gguf_keys, square=True, head=True, norm=False, unread=())},
)
