# SPDX-License-Identifier: MIT
"""StableLM's layers: LayerNorm, SwiGLU, and a partial rotary embedding.

Each block is x + attention(norm(x)), then x + mlp(norm(x)); StableLM-2-12B instead has one norm for both, and a norm
of q and k with a separate weight for each head.
Source: Bellagente et al., 2024, arXiv:2402.17834.
Shapes: T tokens, H heads, K key-value heads, D head size, E hidden, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.layers.attention import PagedAttention, StepInput
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.layer_norm import HeadLayerNorm, LayerNorm
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.mlp import GatedMLP
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.config import ModelConfig, shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models import llama
from candle_vllm.core.models.attention_names import GG, HF, gguf_has_bias, pair, parallel_keys, projections
from candle_vllm.core.models.family import LAYER_NORM_EPS, Architecture, Family
from candle_vllm.core.models.stack import DecoderStack

_MAX_NORMED_HEADS = 128

# ---- config ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class StableLmConfig(ModelConfig):
    """Config of StableLM.

    Attributes:
        qkv_bias: the projections to queries, keys and values have biases.
        parallel: attention and the feed-forward layer read the same input.
        head_norms: QK norms before the rotation, with weights in one tensor ("whole") or in one per head ("cut").
        first_heads: indices of the first head of queries and of keys; above 0 on a rank with later heads.
    """

    qkv_bias: bool = False
    parallel: bool = False
    head_norms: Literal["none", "whole", "cut"] = "none"
    first_heads: tuple[int, int] = (0, 0)


def config_from_hf(fields: Fields, model_type: str) -> StableLmConfig:
    """Read `config.json` of stablelm, where by default a quarter of each head rotates."""
    fields.choice("hidden_act", "silu", "silu", "swish")
    fields = fields.with_absent(partial_rotary_factor=0.25)
    normed = fields.get("qk_layernorm", bool, False)
    if normed and (heads := fields.count("num_attention_heads")) > _MAX_NORMED_HEADS:
        raise UnsupportedModelError(
            f"{fields.path}: qk_layernorm is true with {heads} heads; at most {_MAX_NORMED_HEADS} are implemented"
        )
    return StableLmConfig(
        **shared_from_hf(fields, model_type, eps="layer_norm_eps"),
        qkv_bias=fields.get("use_qkv_bias", bool, False),
        parallel=fields.get("use_parallel_residual", bool, False),
        head_norms="cut" if normed else "none",
    )


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> StableLmConfig:
    """Read GGUF metadata of stablelm; the tensors show which parts a model has, as in llama.cpp."""
    return StableLmConfig(
        **shared_from_gguf(fields, checkpoint, eps="attention.layer_norm_epsilon"),
        qkv_bias=gguf_has_bias(checkpoint),
        parallel="blk.0.ffn_norm.weight" not in checkpoint.tensors,
        head_norms="whole" if "blk.0.attn_q_norm.weight" in checkpoint.tensors else "none",
    )


# ---- attention -------------------------------------------------------------------------------------------------------


class Attention:
    """Grouped-query attention with rotary positions: x [T, E] -> [T, E]."""

    def __init__(self, config: StableLmConfig, layer: int, rotary: Rotary, placement: Placement) -> None:
        heads, kv_heads, dim, eps = config.num_heads, config.num_kv_heads, config.head_dim, config.norm_eps
        self.sizes = (heads * dim, kv_heads * dim, kv_heads * dim)
        self.head_dim = dim
        shards = dict[str, int](zip("qkv", self.sizes, strict=True))
        self.qkv = Linear(config.hidden_size, shards, placement, bias=config.qkv_bias)
        self.output = Linear(heads * dim, config.hidden_size, placement)
        normed, cut = config.head_norms != "none", config.head_norms == "cut"
        q, k = config.first_heads
        self.q_norm = HeadLayerNorm(heads, dim, eps, placement, rows=cut, first=q) if normed else None
        self.k_norm = HeadLayerNorm(kv_heads, dim, eps, placement, rows=cut, first=k) if normed else None
        self.attend = PagedAttention(layer, dim, rotary, self.q_norm, self.k_norm, window=config.sliding_windows[layer])

    def __call__(self, x: Value, step: StepInput) -> Value:
        parts = self.qkv(x).split(self.sizes, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)  # [T, H, D] and twice [T, K, D]
        return self.output(self.attend(q, k, v, step).flatten(1))


# ---- block -----------------------------------------------------------------------------------------------------------


class Block:
    """One decoder layer. Its input [T, E] is x + residual, added in the first norm; residual is None in layer 0."""

    def __init__(self, config: StableLmConfig, layer: int, rotary: Rotary, placement: Placement) -> None:
        hidden, eps = config.hidden_size, config.norm_eps
        self.attention_norm = LayerNorm(hidden, eps, placement)
        self.attention = Attention(config, layer, rotary, placement)
        self.mlp_norm = None if config.parallel else LayerNorm(hidden, eps, placement)
        self.mlp = GatedMLP(hidden, config.intermediate_size, placement)

    def __call__(self, x: Value, residual: Value | None, step: StepInput) -> tuple[Value, Value]:
        normed, residual = self.attention_norm.add(x, residual)
        attended = self.attention(normed, step)
        if self.mlp_norm is None:
            return self.mlp(normed), residual + attended
        normed, residual = self.mlp_norm.add(attended, residual)
        return self.mlp(normed), residual


# ---- model -----------------------------------------------------------------------------------------------------------


class StableLm(DecoderStack):
    """The decoder: token ids [T] -> hidden states [T, E] -> logits [T, V]."""

    def __init__(self, config: StableLmConfig, placement: Placement, checkpoint: Checkpoint) -> None:
        del checkpoint
        self.config = config
        size = (config.vocab_size, config.hidden_size)
        self.embed = Embedding(*size, placement)
        self.rotary = Rotary(config.rope, config.max_position, placement)
        self.layers = [Block(config, layer, self.rotary, placement) for layer in range(config.num_layers)]
        self.norm = LayerNorm(config.hidden_size, config.norm_eps, placement)
        self.head = None if config.tie_embeddings else Embedding(*size, placement)


# ---- weight names ----------------------------------------------------------------------------------------------------


def _head_norms(part: str) -> list[WeightName]:
    """The table rows of QK norms: one tensor of all heads in GGUF files, one per head in Hugging Face's files."""
    target, hf = f"layers.{{i}}.attention.{part}_norm:", f"{HF}self_attn.{part}_layernorm.norms."
    each = [WeightName(f"{target}{head}.weight", f"{hf}{head}.weight", None) for head in range(_MAX_NORMED_HEADS)]
    return [WeightName(f"{target}weight", None, f"{GG}attn_{part}_norm.weight"), *each]


WEIGHTS = [
    WeightName("embed:weight", "model.embed_tokens.weight", "token_embd.weight"),
    *pair("layers.{i}.attention_norm:", HF + "input_layernorm", GG + "attn_norm"),
    *projections(),
    *_head_norms("q"),
    *_head_norms("k"),
    *pair("layers.{i}.attention.output:", HF + "self_attn.o_proj", GG + "attn_output"),
    *pair("layers.{i}.mlp_norm:", HF + "post_attention_layernorm", GG + "ffn_norm"),
    *pair("layers.{i}.mlp.gate_up:gate.", HF + "mlp.gate_proj", GG + "ffn_gate"),
    *pair("layers.{i}.mlp.gate_up:up.", HF + "mlp.up_proj", GG + "ffn_up"),
    *pair("layers.{i}.mlp.down:", HF + "mlp.down_proj", GG + "ffn_down"),
    *pair("norm:", "model.norm", "output_norm"),
    WeightName("head:weight", "lm_head.weight", "output.weight"),
]


def whole_head_norms(config: Any) -> dict[str, Any]:
    """The config fields that differ in a GGUF file: each layer's QK norm is one tensor of all heads."""
    return {"head_norms": "none" if config.head_norms == "none" else "whole"}


FAMILY = Family(
    hf={"StableLmForCausalLM": "stablelm"},
    gguf=("stablelm",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=StableLm,
    weights=WEIGHTS,
    ignored=llama.ignored,
    as_gguf={
        "stablelm": Architecture(
            name="stablelm",
            more=parallel_keys,
            otherwise=whole_head_norms,
            eps=LAYER_NORM_EPS,
            head=True,
            square=True,
        )
    },
)
