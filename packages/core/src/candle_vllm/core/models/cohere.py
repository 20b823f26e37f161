# SPDX-License-Identifier: MIT
"""Cohere's Command R, Aya and Command A: LayerNorm without bias, and a block whose two sublayers share one norm.

Each block is x + attention(norm(x)) + mlp(norm(x)); rotary pairs are neighbours, and logits are scaled. Command R+
normalises each head of q and k with weights of its own. In three of four layers of Cohere 2 a token sees a window
alone, and the others have no rotary embedding. Source: Cohere, 2025, arXiv:2504.00698.
Shapes: T tokens, H heads, K key-value heads, D head size, E hidden, V vocabulary.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.layers.attention import PagedAttention, StepInput
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.layer_norm import HeadLayerNorm, LayerNorm
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.mlp import GatedMLP
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.config import ModelConfig, gguf_windows, layer_windows, shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import ColumnOrder
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models import llama
from candle_vllm.core.models.attention_names import gguf_has_bias
from candle_vllm.core.models.family import Family
from candle_vllm.core.models.stack import DecoderStack

# ---- config ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class CohereConfig(ModelConfig):
    """The flags of these families.

    Attributes:
        logit_scale: factor of logits.
        bias: of the four projections of attention.
        head_norms: q and k are normalised per head, with weights [H, D] and [K, D], before rotation.
        local: layers without a window have no rotary embedding (Cohere 2).
    """

    logit_scale: float
    bias: bool = False
    head_norms: bool = False
    local: bool = False


def config_from_hf(fields: Fields, model_type: str) -> CohereConfig:
    """Reads `config.json` of cohere and cohere2."""
    fields.choice("hidden_act", "silu", "silu", "swish")
    shared = shared_from_hf(fields, model_type, eps="layer_norm_eps")
    layers, local = shared["num_layers"], model_type == "cohere2"
    if local:
        window, period = fields.count("sliding_window", 4096), fields.count("sliding_window_pattern", 4)
        usual = tuple(window if (layer + 1) % period else None for layer in range(layers))
        shared["sliding_windows"] = layer_windows(fields, layers, window) or usual
    return CohereConfig(
        **shared | {"tie_embeddings": fields.get("tie_word_embeddings", bool, True)},
        logit_scale=fields.get("logit_scale", float, 0.0625),
        bias=fields.get("attention_bias", bool, False),
        head_norms=not local and fields.get("use_qk_norm", bool, False),
        local=local,
        interleaved_rotary=True,
    )


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> CohereConfig:
    """Reads GGUF metadata of command-r and cohere2."""
    shared = shared_from_gguf(fields, checkpoint, eps="attention.layer_norm_epsilon")
    layers, local = shared["num_layers"], shared["model_type"] == "cohere2"
    if local:
        window = fields.count("attention.sliding_window")
        shared["sliding_windows"] = gguf_windows(fields, layers, window, period=4)
    return CohereConfig(
        **shared,
        logit_scale=fields.get("logit_scale", float, *([] if local else [1.0])),
        bias=gguf_has_bias(checkpoint),
        head_norms="blk.0.attn_q_norm.weight" in checkpoint.tensors,
        local=local,
        interleaved_rotary=True,
    )


# ---- attention -------------------------------------------------------------------------------------------------------


class Attention:
    """Grouped-query attention with rotary positions: x [T, E] -> [T, E]."""

    def __init__(self, config: CohereConfig, layer: int, rotary: Rotary, placement: Placement) -> None:
        heads, kv_heads, dim, eps = config.num_heads, config.num_kv_heads, config.head_dim, config.norm_eps
        self.sizes, self.head_dim = (heads * dim, kv_heads * dim, kv_heads * dim), dim
        self.qkv = Linear(config.hidden_size, dict(zip("qkv", self.sizes)), placement, bias=config.bias)
        self.output = Linear(heads * dim, config.hidden_size, placement, bias=config.bias)
        self.q_norm = HeadLayerNorm(heads, dim, eps, placement) if config.head_norms else None
        self.k_norm = HeadLayerNorm(kv_heads, dim, eps, placement) if config.head_norms else None
        window = config.sliding_windows[layer]
        turns = None if config.local and window is None else rotary
        self.attend = PagedAttention(layer, dim, turns, self.q_norm, self.k_norm, window=window)

    def __call__(self, x: Value, step: StepInput) -> Value:
        parts = self.qkv(x).split(self.sizes, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)  # [T, H, D], [T, K, D] twice
        return self.output(self.attend(q, k, v, step).flatten(1))


# ---- block and model -------------------------------------------------------------------------------------------------


class Block:
    """One decoder layer. x [T, E] comes as two summands, for a norm takes a sum: the second is None at first."""

    def __init__(self, config: CohereConfig, layer: int, rotary: Rotary, placement: Placement) -> None:
        self.norm = LayerNorm(config.hidden_size, config.norm_eps, placement, bias=False)
        self.attention = Attention(config, layer, rotary, placement)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, placement)

    def __call__(self, x: Value, residual: Value | None, step: StepInput) -> tuple[Value, Value]:
        normed, residual = self.norm.add(x, residual)
        return self.mlp(normed), residual + self.attention(normed, step)


class Cohere(DecoderStack):
    """The decoder: token ids [T] -> hidden states [T, E] -> logits [T, V]."""

    def __init__(self, config: CohereConfig, placement: Placement, checkpoint: Checkpoint) -> None:
        del checkpoint
        self.config, size, scale = config, (config.vocab_size, config.hidden_size), config.logit_scale
        self.embed = Embedding(*size, placement, logit_scale=scale)
        self.rotary = Rotary(config.rope, config.max_position, placement)
        self.layers = [Block(config, layer, self.rotary, placement) for layer in range(config.num_layers)]
        self.norm = LayerNorm(config.hidden_size, config.norm_eps, placement, bias=False)
        self.head = None if config.tie_embeddings else Embedding(*size, placement, logit_scale=scale)


# ---- weight names ----------------------------------------------------------------------------------------------------

_TO = "layers.{i}."
_HEAD_NORMS = (_TO + "attention.q_norm:weight", _TO + "attention.k_norm:weight")


def _half_split(config: CohereConfig) -> np.ndarray:
    """Where each dimension of a head stands behind `half_split`, which orders the rows of q and k."""
    turned = config.rope.dim
    return np.argsort([*range(0, turned, 2), *range(1, turned, 2), *range(turned, config.head_dim)])


def _own(line: WeightName) -> WeightName:
    """Llama's line, as this block has it."""
    if line.target in _HEAD_NORMS:
        order = ColumnOrder(_half_split)
        return dataclasses.replace(line, hf_view=order, gguf_view=order)
    return dataclasses.replace(line, target=line.target.replace(".attention_norm:", ".norm:"))


WEIGHTS = [_own(line) for line in llama.WEIGHTS if line.target != _TO + "mlp_norm:weight"]

FAMILY = Family(
    hf={"CohereForCausalLM": "cohere", "Cohere2ForCausalLM": "cohere2"},
    gguf=("command-r", "cohere2"),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Cohere,
    weights=WEIGHTS,
    ignored=llama.ignored,
)
