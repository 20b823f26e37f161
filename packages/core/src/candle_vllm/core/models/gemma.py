# SPDX-License-Identifier: MIT
"""Gemma's layers: GeGLU, scaled embeddings, and, in safetensors, norm weights stored as the difference from 1.

Gemma 2 also normalises the outputs of attention and of the feed-forward layer, has softcaps of scores and logits, and a
sliding window in every other layer, beginning with the first. Gemma 3 normalises every head of q and k instead of the
softcaps; five of six layers have a sliding window and their own rotary settings.
Sources: Gemma Team, arXiv:2403.08295 (2024), arXiv:2408.00118 (2024) and arXiv:2503.19786 (2025).
Shapes: T tokens, H heads, K key-value heads, D head size, E hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.layers.attention import PagedAttention, StepInput
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.mlp import GatedMLP
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import plus_one
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models.attention_names import GG, HF, pair, projections
from candle_vllm.core.models.family import Architecture, Family
from candle_vllm.core.models.gemma_config import GemmaConfig, config_from_gguf, config_from_hf, gemma2_keys, gemma3_keys
from candle_vllm.core.models.stack import DecoderStack

# ---- attention -------------------------------------------------------------------------------------------------------


class Attention:
    """Grouped-query attention with rotary positions: x [T, E] -> [T, E]."""

    def __init__(self, config: GemmaConfig, layer: int, rotary: Rotary, placement: Placement) -> None:
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.sizes = (heads * dim, kv_heads * dim, kv_heads * dim)
        self.head_dim = dim
        shards = dict[str, int](zip("qkv", self.sizes, strict=True))
        self.qkv = Linear(config.hidden_size, shards, placement, bias=config.attention_bias)
        self.output = Linear(heads * dim, config.hidden_size, placement, bias=config.attention_bias)
        self.q_norm = RMSNorm(dim, config.norm_eps, placement) if config.qk_norm else None
        self.k_norm = RMSNorm(dim, config.norm_eps, placement) if config.qk_norm else None
        window, scale, cap = config.sliding_windows[layer], config.query_scale, config.attention_softcap
        self.attend = PagedAttention(
            layer, dim, rotary, self.q_norm, self.k_norm, window=window, scale=scale, softcap=cap
        )

    def __call__(self, x: Value, step: StepInput) -> Value:
        parts = self.qkv(x).split(self.sizes, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)  # [T, H, D] and twice [T, K, D]
        return self.output(self.attend(q, k, v, step).flatten(1))


# ---- block -----------------------------------------------------------------------------------------------------------


class Block:
    """One decoder layer. Its input [T, E] is x + residual, added in the first norm; residual is None in layer 0."""

    def __init__(self, config: GemmaConfig, layer: int, rotary: Rotary, placement: Placement) -> None:
        hidden, eps = config.hidden_size, config.norm_eps
        self.attention_norm = RMSNorm(hidden, eps, placement)
        self.attention = Attention(config, layer, rotary, placement)
        self.attention_post_norm = RMSNorm(hidden, eps, placement) if config.sandwich else None
        self.mlp_norm = RMSNorm(hidden, eps, placement)
        self.mlp = GatedMLP(hidden, config.intermediate_size, placement, activation="gelu_tanh")
        self.mlp_post_norm = RMSNorm(hidden, eps, placement) if config.sandwich else None

    def __call__(self, x: Value, residual: Value | None, step: StepInput) -> tuple[Value, Value]:
        normed, residual = self.attention_norm.add(x, residual)
        x = self.attention(normed, step)
        x = x if self.attention_post_norm is None else self.attention_post_norm(x)
        normed, residual = self.mlp_norm.add(x, residual)
        x = self.mlp(normed)
        return (x if self.mlp_post_norm is None else self.mlp_post_norm(x)), residual


# ---- model -----------------------------------------------------------------------------------------------------------


class Gemma(DecoderStack):
    """The decoder: token ids [T] -> hidden states [T, E] -> logits [T, V]."""

    def __init__(self, config: GemmaConfig, placement: Placement, checkpoint: Checkpoint) -> None:
        del checkpoint
        self.config: Any = config
        size, cap = (config.vocab_size, config.hidden_size), config.final_softcap
        self.embed = Embedding(*size, placement, scale=config.embedding_scale, softcap=cap)
        rotaries = self.make_rotaries(config, placement)
        self.layers = [Block(config, layer, rotary, placement) for layer, rotary in enumerate(rotaries)]
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, placement)
        self.head = None if config.tie_embeddings else Embedding(*size, placement, softcap=cap)


# ---- weight names ----------------------------------------------------------------------------------------------------

_TO = "layers.{i}."


def _norm(target: str, hf: str | tuple[str, str], gguf: str) -> WeightName:
    names = (hf,) if isinstance(hf, str) else hf
    stored = tuple(f"{HF}{name}.weight" for name in names)
    return WeightName(f"layers.{{i}}.{target}:weight", stored, f"{GG}{gguf}.weight", plus_one)


WEIGHTS = [
    WeightName("embed:weight", "model.embed_tokens.weight", "token_embd.weight"),
    _norm("attention_norm", "input_layernorm", "attn_norm"),
    *projections(),
    *pair(_TO + "attention.output:", HF + "self_attn.o_proj", GG + "attn_output"),
    _norm("attention.q_norm", "self_attn.q_norm", "attn_q_norm"),
    _norm("attention.k_norm", "self_attn.k_norm", "attn_k_norm"),
    _norm("attention_post_norm", "post_attention_layernorm", "post_attention_norm"),
    _norm("mlp_norm", ("pre_feedforward_layernorm", "post_attention_layernorm"), "ffn_norm"),  # second: Gemma 1
    *pair(_TO + "mlp.gate_up:gate.", HF + "mlp.gate_proj", GG + "ffn_gate"),
    *pair(_TO + "mlp.gate_up:up.", HF + "mlp.up_proj", GG + "ffn_up"),
    *pair(_TO + "mlp.down:", HF + "mlp.down_proj", GG + "ffn_down"),
    _norm("mlp_post_norm", "post_feedforward_layernorm", "post_ffw_norm"),
    WeightName("norm:weight", "model.norm.weight", "output_norm.weight", plus_one),
    WeightName("head:weight", "lm_head.weight", "output.weight"),
]


def ignored(config: GemmaConfig) -> list[str]:
    """Names of tensors that are not loaded: buffers that old converters saved, and the second copy of a tied head."""
    return [r".*rotary_emb\.inv_freq", *[r"lm_head\.weight"] * config.tie_embeddings]


FAMILY = Family(
    hf={"GemmaForCausalLM": "gemma", "Gemma2ForCausalLM": "gemma2", "Gemma3ForCausalLM": "gemma3_text"},
    gguf=("gemma", "gemma2", "gemma3"),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Gemma,
    weights=WEIGHTS,
    ignored=ignored,
    as_gguf={
        "gemma": Architecture(name="gemma"),
        "gemma2": Architecture(name="gemma2", more=gemma2_keys),
        "gemma3_text": Architecture(name="gemma3", more=gemma3_keys),
    },
)
