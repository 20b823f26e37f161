"""The Llama wiring and the families that differ from it by flags.

Llama 1 to 3.x, SmolLM and Yi as they are; Mistral adds a sliding window; Qwen2 biases on q, k, v; Qwen3 a norm on every
head of q and k. Each block is x + attention(norm(x)), then x + mlp(norm(x)).
Shapes: T tokens, H heads, K key-value heads, D head size, E hidden, V vocabulary.
"""

from __future__ import annotations

import torch

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.layers.attention import PagedAttention, StepInput
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.mlp import GatedMLP
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.config import (
    MAX_LAYERS,
    Fields,
    ModelConfig,
    rope_from_gguf,
    rope_from_hf,
    stretched_context,
)
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import WeightName

# ---- config ----------------------------------------------------------------------------------------------------------


def config_from_hf(fields: Fields, model_type: str) -> ModelConfig:
    """Reads `config.json` of llama, mistral, qwen2 and qwen3."""
    fields.choice("hidden_act", "silu", "silu", "swish")
    hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    layers, position = fields.count("num_hidden_layers", most=MAX_LAYERS), fields.count("max_position_embeddings")
    head_dim = fields.count("head_dim", hidden // heads)
    rope = rope_from_hf(fields, head_dim, position)
    attention_bias = fields.get("attention_bias", bool, False)
    return ModelConfig(
        model_type=model_type,
        vocab_size=fields.count("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.count("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=fields.count("num_key_value_heads", heads),
        head_dim=head_dim,
        max_position=stretched_context(rope, position),
        norm_eps=fields.get("rms_norm_eps", float),
        rope=rope,
        tie_embeddings=fields.get("tie_word_embeddings", bool, False),
        qkv_bias=model_type == "qwen2" or attention_bias,
        output_bias=model_type != "qwen2" and attention_bias,
        mlp_bias=fields.get("mlp_bias", bool, False),
        qk_norm=model_type == "qwen3",
        sliding_windows=_windows(fields, model_type, layers),
        eos_token_ids=fields.token_ids("eos_token_id"),
    )


def _windows(fields: Fields, model_type: str, layers: int) -> tuple[int | None, ...]:
    """Which layers look back only so far; Qwen says so by flag and layer, Mistral for all layers at once."""
    window = fields.get("sliding_window", int, None)
    if model_type == "llama" or window is None:
        return (None,) * layers
    if "layer_types" in fields:
        kinds = fields.get("layer_types", list)
        if len(kinds) != layers or not all(kind in ("full_attention", "sliding_attention") for kind in kinds):
            raise UnsupportedModelError(f"{fields.path}: layer_types must name full or sliding attention per layer")
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    if model_type == "mistral":
        return (window,) * layers
    if not fields.get("use_sliding_window", bool, False):
        return (None,) * layers
    first = fields.get("max_window_layers", int, layers)
    return tuple(window if layer >= first else None for layer in range(layers))


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> ModelConfig:
    """Reads GGUF metadata of llama (which includes Mistral, SmolLM and Yi), qwen2 and qwen3."""
    architecture = Fields(fields.values, fields.path).get("general.architecture", str)
    hidden, heads = fields.count("embedding_length"), fields.count("attention.head_count")
    layers, position = fields.count("block_count", most=MAX_LAYERS), fields.count("context_length")
    head_dim = fields.count("attention.key_length", hidden // heads)
    rope = rope_from_gguf(fields, head_dim, position)
    embedding = checkpoint.tensors.get("token_embd.weight")
    rows = embedding.shape[0] if embedding and embedding.shape else fields.count("vocab_size")
    return ModelConfig(
        model_type=architecture,
        vocab_size=rows,
        hidden_size=hidden,
        intermediate_size=fields.count("feed_forward_length"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=fields.count("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position=stretched_context(rope, position) if rope.kind == "yarn" else position,
        norm_eps=fields.get("attention.layer_norm_rms_epsilon", float),
        rope=rope,
        tie_embeddings="output.weight" not in checkpoint.tensors,
        qkv_bias="blk.0.attn_q.bias" in checkpoint.tensors,
        output_bias="blk.0.attn_output.bias" in checkpoint.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in checkpoint.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in checkpoint.tensors,
        sliding_windows=(fields.get("attention.sliding_window", int, None) or None,) * layers,
    )


# ---- attention -------------------------------------------------------------------------------------------------------


class Attention:
    """Grouped-query attention with rotary positions: x [T, E] -> [T, E]."""

    def __init__(self, config: ModelConfig, layer: int, rotary: Rotary, placement: Placement) -> None:
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.sizes = (heads * dim, kv_heads * dim, kv_heads * dim)
        self.head_dim = dim
        shards = dict(zip("qkv", self.sizes, strict=True))
        self.qkv = Linear(config.hidden_size, shards, placement, bias=config.qkv_bias)
        self.output = Linear(heads * dim, config.hidden_size, placement, bias=config.output_bias)
        self.q_norm = RMSNorm(dim, config.norm_eps, placement) if config.qk_norm else None
        self.k_norm = RMSNorm(dim, config.norm_eps, placement) if config.qk_norm else None
        window = config.sliding_windows[layer]
        self.attend = PagedAttention(layer, dim, rotary, self.q_norm, self.k_norm, window=window)

    def __call__(self, x: Value, step: StepInput) -> Value:
        parts = self.qkv(x).split(self.sizes, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)  # [T, H, D], [T, K, D] twice
        return self.output(self.attend(q, k, v, step).flatten(1))


# ---- block -----------------------------------------------------------------------------------------------------------


class Block:
    """One decoder layer. x [T, E] comes as two summands, for a norm takes a sum: the second is None at first."""

    def __init__(self, config: ModelConfig, layer: int, rotary: Rotary, placement: Placement) -> None:
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps, placement)
        self.attention = Attention(config, layer, rotary, placement)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps, placement)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, placement, bias=config.mlp_bias)

    def __call__(self, x: Value, residual: Value | None, step: StepInput) -> tuple[Value, Value]:
        normed, residual = self.attention_norm.add(x, residual)
        normed, residual = self.mlp_norm.add(self.attention(normed, step), residual)
        return self.mlp(normed), residual


# ---- model -----------------------------------------------------------------------------------------------------------


class Llama:
    """The decoder: token ids [T] -> hidden states [T, E] -> logits [T, V]."""

    def __init__(self, config: ModelConfig, placement: Placement, checkpoint: Checkpoint) -> None:
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size, placement)
        factors = "rope_freqs.weight" in checkpoint.tensors
        self.rotary = Rotary(config.rope, config.max_position, placement, factors=factors)
        self.layers = [Block(config, layer, self.rotary, placement) for layer in range(config.num_layers)]
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, placement)
        tied = config.tie_embeddings
        self.head = None if tied else Embedding(config.vocab_size, config.hidden_size, placement)

    def prepare(self, positions: int) -> None:
        """See `Decoder.prepare`."""
        self.rotary.prepare(positions)

    def forward(self, token_ids: Value, step: StepInput) -> Value:
        """Hidden states [T, E] behind the last norm."""
        x, residual = self.embed(token_ids), None
        for layer in self.layers:
            x, residual = layer(x, residual, step)
        return self.norm.add(x, residual)[0]

    def logits(self, hidden: Value, out: torch.Tensor | None = None) -> Value:
        """Scores [T, V] in fp32."""
        return (self.embed if self.head is None else self.head).logits(hidden, out)


# ---- weight names ----------------------------------------------------------------------------------------------------

_HF, _GG = "model.layers.{i}.", "blk.{i}."


def _pair(target: str, hf: str, gguf: str, heads: str | None = None) -> list[WeightName]:
    """A matrix and its optional bias."""
    return [
        WeightName(f"layers.{{i}}.{target}{kind}", f"{_HF}{hf}.{kind}", f"{_GG}{gguf}.{kind}", heads)
        for kind in ("weight", "bias")
    ]


WEIGHTS = [
    WeightName("embed:weight", "model.embed_tokens.weight", "token_embd.weight"),
    WeightName("rotary:factors", None, "rope_freqs.weight"),
    WeightName("layers.{i}.attention_norm:weight", _HF + "input_layernorm.weight", _GG + "attn_norm.weight"),
    *_pair("attention.qkv:q.", "self_attn.q_proj", "attn_q", "num_heads"),
    *_pair("attention.qkv:k.", "self_attn.k_proj", "attn_k", "num_kv_heads"),
    *_pair("attention.qkv:v.", "self_attn.v_proj", "attn_v"),
    WeightName("layers.{i}.attention.q_norm:weight", _HF + "self_attn.q_norm.weight", _GG + "attn_q_norm.weight"),
    WeightName("layers.{i}.attention.k_norm:weight", _HF + "self_attn.k_norm.weight", _GG + "attn_k_norm.weight"),
    *_pair("attention.output:", "self_attn.o_proj", "attn_output"),
    WeightName("layers.{i}.mlp_norm:weight", _HF + "post_attention_layernorm.weight", _GG + "ffn_norm.weight"),
    *_pair("mlp.gate_up:gate.", "mlp.gate_proj", "ffn_gate"),
    *_pair("mlp.gate_up:up.", "mlp.up_proj", "ffn_up"),
    *_pair("mlp.down:", "mlp.down_proj", "ffn_down"),
    WeightName("norm:weight", "model.norm.weight", "output_norm.weight"),
    WeightName("head:weight", "lm_head.weight", "output.weight"),
]


def ignored(config: ModelConfig) -> list[str]:
    """Stored names that carry nothing: buffers that old converters saved, and the second copy of a tied head."""
    buffers = [r".*rotary_emb\.inv_freq", r".*\.attn_rot_embd\.weight"]
    return [*buffers, r"lm_head\.weight"] if config.tie_embeddings else buffers
