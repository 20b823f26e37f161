# SPDX-License-Identifier: MIT
"""Gemma 4: layers with and without a window differ in K and D; the last layers may read earlier layers' caches.

Values have a norm without a weight, scores are unscaled, and a layer's output is multiplied by a scalar. Layers may
have per-layer embeddings, and experts in addition to the dense MLP. Source: Gemma Team, 2026, "Gemma 4 model card".
Shapes: T tokens, H heads, K key-value heads, D head size, E hidden, P size of a per-layer embedding, V vocabulary.
"""

from __future__ import annotations

import dataclasses

from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.side_by_side import side_by_side
from candle_vllm.core.layers.attention import PagedAttention, StepInput
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.mlp import GatedMLP
from candle_vllm.core.layers.moe import SparseMLP
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models import gemma, gemma_parts
from candle_vllm.core.models.attention_names import GG, HF
from candle_vllm.core.models.experts import expert_names
from candle_vllm.core.models.family import Architecture, Family
from candle_vllm.core.models.gemma4_config import Gemma4Config, config_from_gguf, config_from_hf, gguf_keys
from candle_vllm.core.models.gemma_parts import LayerGate, LayerInputs, LayerScale, RouterNorm


class Attention:
    """Grouped-query attention over the layer's own cache or an earlier layer's: x [T, E] -> [T, E]."""

    def __init__(self, config: Gemma4Config, layer: int, rotary: Rotary, placement: Placement) -> None:
        (kv_heads, dim), source, eps = config.shapes[layer], config.sources[layer], config.norm_eps
        self.head_dim, self.twice, bias = dim, layer in config.keys_as_values, config.attention_bias
        self.sizes = (config.num_heads * dim, *(kv_heads * dim,) * 2)[: 3 if source == layer else 1]
        stored = self.sizes[:2] if self.twice else self.sizes
        self.qkv = Linear(config.hidden_size, dict(zip("qkv", stored)), placement, bias=bias)
        self.output = Linear(self.sizes[0], config.hidden_size, placement, bias=bias)
        self.q_norm, window = RMSNorm(dim, eps, placement), config.sliding_windows[layer]
        self.k_norm = RMSNorm(dim, eps, placement) if source == layer else None
        self.v_norm = RMSNorm(dim, eps, placement, weighted=False)
        self.attend = PagedAttention(source, dim, rotary, self.q_norm, self.k_norm, window=window, scale=1.0)
        self.attend.causal = window is None  # an image's tokens attend in both directions only with a window

    def __call__(self, x: Value, step: StepInput) -> Value:
        qkv = self.qkv(x)
        if self.twice:
            qkv = side_by_side(qkv, qkv.split(self.sizes[:2], dim=-1)[1])
        q, *kv = (part.unflatten(-1, (-1, self.head_dim)) for part in qkv.split(self.sizes, dim=-1))  # [T, H or K, D]
        k, v = (kv[0], self.v_norm(kv[1])) if kv else (None, None)
        return self.output(self.attend(q, k, v, step).flatten(1))


class Block:
    """One decoder layer. Its input [T, E] is x + residual, or only x in layer 0 and if layers have a scale."""

    def __init__(self, config: Gemma4Config, layer: int, rotary: Rotary, placement: Placement) -> None:
        size, eps, self.layer = config.hidden_size, config.norm_eps, layer
        self.attention_norm, self.attention_post_norm = (RMSNorm(size, eps, placement) for _ in range(2))
        self.attention = Attention(config, layer, rotary, placement)
        self.mlp_norm, self.mlp_post_norm = (RMSNorm(size, eps, placement) for _ in range(2))
        inner = config.intermediate_size * config.widths[layer]
        self.mlp: GatedMLP | SparseMLP = GatedMLP(size, inner, placement, activation="gelu_tanh")
        self.dense: GatedMLP | None = None
        if config.mixture is not None and layer in config.sparse_layers:
            self.dense, self.mlp = self.mlp, SparseMLP(size, config.mixture, placement)
            self.router_norm, self.experts_norm = (norm(size, eps, placement) for norm in (RouterNorm, RMSNorm))
            self.dense_post_norm, self.experts_post_norm = (RMSNorm(size, eps, placement) for _ in range(2))
        self.inputs = LayerGate(size, config.input_size, eps, placement) if config.input_size else None
        self.scale = LayerScale(placement) if config.layer_scales else None

    def __call__(self, x: Value, residual: Value | None, step: StepInput) -> tuple[Value, Value | None]:
        normed, residual = self.attention_norm.add(x, residual)
        normed, residual = self.mlp_norm.add(self.attention_post_norm(self.attention(normed, step)), residual)
        if self.dense is None:
            x = self.mlp_post_norm(self.mlp(normed))
        else:
            assert isinstance(self.mlp, SparseMLP)
            x = self.dense_post_norm(self.dense(normed))
            sparse = self.mlp(self.experts_norm(residual), routed=self.router_norm(residual))
            x = self.mlp_post_norm(x + self.experts_post_norm(sparse))
        if self.inputs is not None:
            residual = residual + x
            x = self.inputs(residual, step.layer_inputs[self.layer])
        return (x, residual) if self.scale is None else (self.scale(residual + x), None)


class Gemma4(gemma.Gemma):
    """The decoder: token ids [T] -> hidden states [T, E] -> logits [T, V]."""

    def __init__(self, config: Gemma4Config, placement: Placement, checkpoint: Checkpoint) -> None:
        self.config, self.narrows = config, config.mixture is None  # experts compute all rows
        size, cap = (config.vocab_size, config.hidden_size), config.final_softcap
        self.embed = Embedding(*size, placement, scale=config.embedding_scale, softcap=cap)
        rotaries = self.make_rotaries(config, placement, factors="rope_freqs.weight" in checkpoint.tensors)
        self.inputs: LayerInputs | None = None
        if config.input_size:
            shape, eps = (*size, config.num_layers, config.input_size), config.norm_eps
            self.inputs = LayerInputs(*shape, eps=eps, scale=config.input_scale, placement=placement)
        self.layers = [Block(config, layer, rotary, placement) for layer, rotary in enumerate(rotaries)]
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, placement)
        self.head = None if config.tie_embeddings else Embedding(*size, placement, softcap=cap)

    def begun(self, token_ids: Value, x: Value, step: StepInput) -> StepInput:
        """See `DecoderStack.begun`."""
        return step if self.inputs is None else dataclasses.replace(step, layer_inputs=self.inputs(token_ids, x))


# ---- weight names ----------------------------------------------------------------------------------------------------

_NAMES = {
    "dense_post_norm:weight": ("post_feedforward_layernorm_1.weight", "post_ffw_norm_1.weight"),
    "experts_norm:weight": ("pre_feedforward_layernorm_2.weight", "pre_ffw_norm_2.weight"),
    "experts_post_norm:weight": ("post_feedforward_layernorm_2.weight", "post_ffw_norm_2.weight"),
    "mlp.router:weight": ("router.proj.weight", "ffn_gate_inp.weight"),
    "mlp.router:expert_scale": ("router.per_expert_scale", "ffn_down_exps.scale"),
}
_SAME = [dataclasses.replace(line, hf_view=None) for line in gemma.WEIGHTS]  # here norm weights are stored as they are
WEIGHTS = [
    *_SAME,
    *gemma_parts.renamed(_SAME, ".mlp.", ".dense."),
    *(WeightName(f"layers.{{i}}.{target}", HF + hf, GG + gguf) for target, (hf, gguf) in _NAMES.items()),
    *expert_names("experts", "gate_proj", "up_proj", "down_proj"),
    *gemma_parts.WEIGHTS,
    WeightName("rotary:factors", None, "rope_freqs.weight"),
]


def ignored(config: Gemma4Config) -> list[str]:
    """Names of tensors that are not loaded: the copy of a tied head; k and v of layers that read earlier caches."""
    readers = "|".join(str(layer) for layer, source in enumerate(config.sources) if layer != source)
    hf, gguf = rf"model\.layers\.({readers})\.self_attn\.[kv]_.*", rf"blk\.({readers})\.attn_[kv](_norm)?\..*"
    return [*[r"lm_head\.weight"] * config.tie_embeddings, *([hf, gguf] if readers else [])]


FAMILY = Family(
    hf={"Gemma4ForCausalLM": "gemma4_text", "Gemma4UnifiedForCausalLM": "gemma4_unified_text"},
    gguf=("gemma4",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Gemma4,
    weights=WEIGHTS,
    ignored=ignored,
    as_gguf=dict.fromkeys(
        ("gemma4_text", "gemma4_unified_text"),
        Architecture(name="gemma4", more=gguf_keys, unread=(), names=lambda _: ("gate_up_exps",)),
    ),
)
