# SPDX-License-Identifier: MIT
"""GLM-4's layers: part of each head rotates, in interleaved pairs; gate and up are one matrix.

GLM-4-0414 also normalises the outputs of attention and of the feed-forward layer; GLM-4-9B-Chat does not.
Source: Team GLM, 2024, arXiv:2406.12793.
Shapes: T tokens, H heads, K key-value heads, D head size, E hidden, V vocabulary.
"""

from __future__ import annotations

import dataclasses

from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.layers.attention import PagedAttention, StepInput
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.mlp import GatedMLP
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.config import ModelConfig, shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import half_split
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models.attention_names import GG, HF, axes_keys, gguf_has_bias, projections
from candle_vllm.core.models.experts import without_next_tokens
from candle_vllm.core.models.family import Architecture, Family
from candle_vllm.core.models.glm4_moe import later_layers
from candle_vllm.core.models.stack import DecoderStack

# ---- config ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlmConfig(ModelConfig):
    """Config of GLM-4 models.

    Attributes:
        qkv_bias: the projections to queries, keys and values have biases.
        sandwich: the outputs of attention and of the feed-forward layer are normalised too.
    """

    qkv_bias: bool = True
    sandwich: bool = True


def config_from_hf(fields: Fields, model_type: str) -> GlmConfig:
    """Read `config.json` of glm and glm4, where by default half of each head rotates."""
    fields.choice("hidden_act", "silu", "silu", "swish")
    return GlmConfig(
        **shared_from_hf(fields.with_absent(partial_rotary_factor=0.5), model_type),
        qkv_bias=fields.get("attention_bias", bool, True),
        sandwich=model_type == "glm4",
        interleaved_rotary=True,
    )


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> GlmConfig:
    """Read GGUF metadata of glm4 and chatglm."""
    shared = shared_from_gguf(fields, checkpoint)
    layers = without_next_tokens(fields, shared["num_layers"])
    shared |= {"num_layers": layers, "sliding_windows": shared["sliding_windows"][:layers]}
    return GlmConfig(
        **shared,
        qkv_bias=gguf_has_bias(checkpoint),
        sandwich=shared["model_type"] == "glm4",
        interleaved_rotary=not shared["rope"].axes,  # the converter splits the pairs of models with M-RoPE
    )


# ---- attention -------------------------------------------------------------------------------------------------------


class Attention:
    """Grouped-query attention with rotary positions: x [T, E] -> [T, E]."""

    def __init__(self, config: GlmConfig, layer: int, rotary: Rotary, placement: Placement) -> None:
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.sizes, self.head_dim = (heads * dim, kv_heads * dim, kv_heads * dim), dim
        self.qkv = Linear(config.hidden_size, dict(zip("qkv", self.sizes)), placement, bias=config.qkv_bias)
        self.output = Linear(heads * dim, config.hidden_size, placement)
        self.attend = PagedAttention(layer, dim, rotary, window=config.sliding_windows[layer])

    def __call__(self, x: Value, step: StepInput) -> Value:
        parts = self.qkv(x).split(self.sizes, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)  # [T, H, D] and twice [T, K, D]
        return self.output(self.attend(q, k, v, step).flatten(1))


# ---- block -----------------------------------------------------------------------------------------------------------


class Block:
    """One decoder layer. Its input [T, E] is x + residual, added in the first norm; residual is None in layer 0."""

    def __init__(self, config: GlmConfig, layer: int, rotary: Rotary, placement: Placement) -> None:
        hidden, eps = config.hidden_size, config.norm_eps
        self.attention_norm = RMSNorm(hidden, eps, placement)
        self.attention = Attention(config, layer, rotary, placement)
        self.attention_post_norm = RMSNorm(hidden, eps, placement) if config.sandwich else None
        self.mlp_norm = RMSNorm(hidden, eps, placement)
        self.mlp = GatedMLP(hidden, config.intermediate_size, placement, fused=True)
        self.mlp_post_norm = RMSNorm(hidden, eps, placement) if config.sandwich else None

    def __call__(self, x: Value, residual: Value | None, step: StepInput) -> tuple[Value, Value]:
        normed, residual = self.attention_norm.add(x, residual)
        x = self.attention(normed, step)
        x = x if self.attention_post_norm is None else self.attention_post_norm(x)
        normed, residual = self.mlp_norm.add(x, residual)
        x = self.mlp(normed)
        return (x if self.mlp_post_norm is None else self.mlp_post_norm(x)), residual


# ---- model -----------------------------------------------------------------------------------------------------------


class Glm(DecoderStack):
    """The decoder: token ids [T] -> hidden states [T, E] -> logits [T, V]."""

    def __init__(self, config: GlmConfig, placement: Placement, checkpoint: Checkpoint) -> None:
        del checkpoint
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size, placement)
        self.rotary = Rotary(config.rope, config.max_position, placement)
        self.layers = [Block(config, layer, self.rotary, placement) for layer in range(config.num_layers)]
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, placement)
        self.head = None if config.tie_embeddings else Embedding(config.vocab_size, config.hidden_size, placement)


# ---- weight names ----------------------------------------------------------------------------------------------------


def _plain(target: str, hf: str, gguf: str) -> WeightName:
    return WeightName(f"layers.{{i}}.{target}:weight", f"{HF}{hf}.weight", f"{GG}{gguf}.weight")


WEIGHTS = [
    WeightName("embed:weight", "model.embed_tokens.weight", "token_embd.weight"),
    _plain("attention_norm", "input_layernorm", "attn_norm"),
    *projections({"q": half_split("num_heads"), "k": half_split("num_kv_heads")}),
    _plain("attention.output", "self_attn.o_proj", "attn_output"),
    _plain("attention_post_norm", "post_self_attn_layernorm", "post_attention_norm"),
    _plain("mlp_norm", "post_attention_layernorm", "ffn_norm"),
    _plain("mlp.gate_up", "mlp.gate_up_proj", "ffn_up"),
    _plain("mlp.down", "mlp.down_proj", "ffn_down"),
    _plain("mlp_post_norm", "post_mlp_layernorm", "post_ffw_norm"),
    WeightName("norm:weight", "model.norm.weight", "output_norm.weight"),
    WeightName("head:weight", "lm_head.weight", "output.weight"),
]


def ignored(config: GlmConfig) -> list[str]:
    """Names of tensors that are not loaded: old converters' buffers, a tied head's copy, GLM-OCR's MTP layer."""
    own = [r".*rotary_emb\.inv_freq", *[r"lm_head\.weight"] * config.tie_embeddings]
    return [*own, *(later_layers(config.num_layers) if config.rope.axes else ())]


FAMILY = Family(
    hf={"GlmForCausalLM": "glm", "Glm4ForCausalLM": "glm4"},
    gguf=("glm4", "chatglm"),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Glm,
    weights=WEIGHTS,
    ignored=ignored,
    as_gguf={
        "glm": Architecture(name="chatglm", interleaved=True, square=True),
        "glm4": Architecture(
            name="glm4",
            more=axes_keys,
            otherwise=lambda config: {"interleaved_rotary": not config.rope.axes},
        ),
    },
)
