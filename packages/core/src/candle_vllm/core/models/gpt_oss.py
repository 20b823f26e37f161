# SPDX-License-Identifier: MIT
"""gpt-oss: attention with a learned sink for each head, a window in every other layer, and experts with biases.

Each block is x + attention(norm(x)), then x + experts(norm(x)). Experts have a clamped SwiGLU. Hugging Face
checkpoints store them in MXFP4 with outputs as rows, or plain and transposed; the rows of gate and up alternate.
Shapes: T tokens, H heads, K key-value heads, D head size, E hidden, F inner size, X experts, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.layers.attention import PagedAttention, StepInput
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.moe import Mixture, SparseMLP
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.config import ModelConfig, layer_windows, shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import chain, every_other, transposed
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models.attention_names import GG, HF, gguf_has_bias, pair, projections, window_keys
from candle_vllm.core.models.experts import expert_count, size_keys
from candle_vllm.core.models.family import DIVISORS, Architecture, Family
from candle_vllm.core.models.stack import DecoderStack
from candle_vllm.core.quantization.tensors import StoredTensor

# ---- config ----------------------------------------------------------------------------------------------------------


_ROPE = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GptOssConfig(ModelConfig):
    """Config of gpt-oss.

    Attributes:
        mixture: the experts.
        attention_bias: the q, k, v and output projections have biases.
    """

    mixture: Mixture
    attention_sinks: bool = True
    attention_bias: bool = True


def config_from_hf(fields: Fields, model_type: str) -> GptOssConfig:
    """Read `config.json` of gpt_oss."""
    fields.choice("hidden_act", "silu", "silu", "swish")
    for key, value in (("swiglu_limit", 7.0), ("swiglu_alpha", 1.702)):
        if fields.get(key, float, value) != value:
            raise UnsupportedModelError(f"{fields.path}: {key} is {fields.get(key, float)}; implemented: {value}")
    scaled = "rope_parameters" in fields or "rope_scaling" in fields
    usual = {"rope_theta": 150000.0} | ({} if scaled else {"rope_scaling": _ROPE})
    shared = shared_from_hf(fields.with_defaults(**usual), model_type)
    layers, window = shared["num_layers"], fields.with_absent(sliding_window=128).get("sliding_window", int, None)
    experts = expert_count(fields, "num_local_experts", "num_experts")
    mixture = _mixture(experts, fields.count("num_experts_per_tok"), shared)
    windows = layer_windows(fields, layers, window) or _alternating(layers, window)
    return GptOssConfig(
        **shared | {"sliding_windows": windows, "num_experts": mixture.experts},
        mixture=mixture,
        attention_bias=fields.get("attention_bias", bool, True),
    )


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> GptOssConfig:
    """Read GGUF metadata of gpt-oss, which does not store that yarn's band limits are not rounded."""
    shared = shared_from_gguf(fields, checkpoint)
    inner = {"intermediate_size": fields.count("expert_feed_forward_length", shared["intermediate_size"])}
    mixture = _mixture(fields.count("expert_count"), fields.count("expert_used_count"), shared | inner)
    windows = _alternating(shared["num_layers"], fields.get("attention.sliding_window", int, None) or None)
    rope = dataclasses.replace(shared["rope"], truncate=False)
    return GptOssConfig(
        **shared | {"sliding_windows": windows, "num_experts": mixture.experts, "rope": rope},
        mixture=mixture,
        attention_bias=gguf_has_bias(checkpoint),
    )


def _mixture(experts: int, top_k: int, shared: dict[str, Any]) -> Mixture:
    """Make the experts' config; a softmax over the chosen experts equals one over all, normalised to sum to 1."""
    return Mixture(
        experts=experts,
        top_k=top_k,
        inner_size=shared["intermediate_size"],
        activation="swiglu_oai",
        router_bias=True,
        expert_bias=True,
    )


def _alternating(layers: int, window: int | None) -> tuple[int | None, ...]:
    return tuple(None if layer % 2 else window for layer in range(layers))


# ---- attention -------------------------------------------------------------------------------------------------------


class Attention:
    """Grouped-query attention with rotary positions and sinks: x [T, E] -> [T, E]."""

    def __init__(self, config: GptOssConfig, layer: int, rotary: Rotary, placement: Placement) -> None:
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.sizes = (heads * dim, kv_heads * dim, kv_heads * dim)
        self.head_dim = dim
        shards = dict[str, int](zip("qkv", self.sizes, strict=True))
        self.qkv = Linear(config.hidden_size, shards, placement, bias=config.attention_bias)
        self.output = Linear(heads * dim, config.hidden_size, placement, bias=config.attention_bias)
        sinks, window = placement.empty(heads), config.sliding_windows[layer]
        self.attend = PagedAttention(layer, dim, rotary, window=window, sinks=sinks)

    def __call__(self, x: Value, step: StepInput) -> Value:
        parts = self.qkv(x).split(self.sizes, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)  # [T, H, D] and twice [T, K, D]
        return self.output(self.attend(q, k, v, step).flatten(1))


# ---- block -----------------------------------------------------------------------------------------------------------


class Block:
    """One decoder layer. Its input [T, E] is x + residual, added in the first norm; residual is None in layer 0."""

    def __init__(self, config: GptOssConfig, layer: int, rotary: Rotary, placement: Placement) -> None:
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps, placement)
        self.attention = Attention(config, layer, rotary, placement)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps, placement)
        self.mlp = SparseMLP(config.hidden_size, config.mixture, placement)

    def __call__(self, x: Value, residual: Value | None, step: StepInput) -> tuple[Value, Value]:
        normed, residual = self.attention_norm.add(x, residual)
        normed, residual = self.mlp_norm.add(self.attention(normed, step), residual)
        return self.mlp(normed), residual


# ---- model -----------------------------------------------------------------------------------------------------------


class GptOss(DecoderStack):
    """The decoder: token ids [T] -> hidden states [T, E] -> logits [T, V]."""

    def __init__(self, config: GptOssConfig, placement: Placement, checkpoint: Checkpoint) -> None:
        del checkpoint
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size, placement)
        self.rotary = Rotary(config.rope, config.max_position, placement)
        self.layers = [Block(config, layer, self.rotary, placement) for layer in range(config.num_layers)]
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, placement)
        tied = config.tie_embeddings
        self.head = None if tied else Embedding(config.vocab_size, config.hidden_size, placement)


# ---- weight names ----------------------------------------------------------------------------------------------------


def _outputs_first(stored: StoredTensor, config: GptOssConfig) -> StoredTensor:
    """An expert's matrix with outputs as rows: an unquantised one is transposed, a quantised one is stored so."""
    return stored if stored.dtype is None else transposed(stored, config)


def _experts(part: str, hf: str, first: int | None) -> list[WeightName]:
    """The table rows of every expert's matrix and bias; with `first`, every other stored row from `first` on."""
    target, stored, gguf = f"layers.{{i}}.mlp.experts:{part}.{{e}}.", f"{HF}mlp.experts.{hf}", f"{GG}ffn_{part}_exps."
    some = () if first is None else (every_other(first),)
    return [
        WeightName(target + "weight", stored, gguf + "weight", chain(_outputs_first, *some)),
        WeightName(target + "bias", stored + "_bias", gguf + "bias", chain(*some)),
    ]


WEIGHTS = [
    WeightName("embed:weight", "model.embed_tokens.weight", "token_embd.weight"),
    WeightName("layers.{i}.attention_norm:weight", HF + "input_layernorm.weight", GG + "attn_norm.weight"),
    *projections(),
    *pair("layers.{i}.attention.output:", HF + "self_attn.o_proj", GG + "attn_output"),
    WeightName("layers.{i}.attention.attend:sinks", HF + "self_attn.sinks", GG + "attn_sinks.weight"),
    WeightName("layers.{i}.mlp_norm:weight", HF + "post_attention_layernorm.weight", GG + "post_attention_norm.weight"),
    *pair("layers.{i}.mlp.router:", HF + "mlp.router", GG + "ffn_gate_inp"),
    *_experts("gate", "gate_up_proj", 0),
    *_experts("up", "gate_up_proj", 1),
    *_experts("down", "down_proj", None),
    WeightName("norm:weight", "model.norm.weight", "output_norm.weight"),
    WeightName("head:weight", "lm_head.weight", "output.weight"),
]


def ignored(config: GptOssConfig) -> list[str]:
    """Names of stored tensors that are not loaded: the copy of a tied head."""
    return [r"lm_head\.weight"] if config.tie_embeddings else []


def gguf_keys(config: Any) -> dict[str, Any]:
    """The GGUF metadata of windows and experts; llama.cpp requires the window's key."""
    return {"attention.sliding_window": 0} | window_keys(config) | size_keys(config.mixture)


FAMILY = Family(
    hf={"GptOssForCausalLM": "gpt_oss"},
    gguf=("gpt-oss",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=GptOss,
    weights=WEIGHTS,
    ignored=ignored,
    as_gguf={"gpt_oss": Architecture(name="gpt-oss", more=gguf_keys, head=True, unread=(DIVISORS,))},
)
