# SPDX-License-Identifier: MIT
"""Gemma 4: layers with a window and layers without differ in heads, and the last layers may read others' keys.

Values have an RMSNorm without a weight, and scores are not scaled. A layer's result is multiplied by a number. Of a
token, each layer may also get an embedding of its own, and experts stand beside the dense feed-forward part.
Source: Gemma Team, 2026, the model card of Gemma 4 and transformers' `models/gemma4`.
Shapes: T tokens, H heads, K key-value heads, D head size, E hidden, P size of a layer's own embedding, V vocabulary.
"""

from __future__ import annotations

import dataclasses

from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.side_by_side import side_by_side
from candle_vllm.core.kernels.silu_mul import gelu_tanh_mul
from candle_vllm.core.layers.attention import PagedAttention, StepInput
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.mlp import GatedMLP
from candle_vllm.core.layers.moe import SparseMLP
from candle_vllm.core.layers.norm import LayerScale, RMSNorm
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import by_root
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models.attention_names import GG, HF, projections
from candle_vllm.core.models.experts import expert_names
from candle_vllm.core.models.family import Family
from candle_vllm.core.models.gemma4_config import Gemma4Config, config_from_gguf, config_from_hf
from candle_vllm.core.models.stack import DecoderStack


class Attention:
    """Grouped-query attention over the layer's own cache or an earlier layer's: x [T, E] -> [T, E]."""

    def __init__(self, config: Gemma4Config, layer: int, rotary: Rotary, placement: Placement) -> None:
        (kv_heads, dim), source, eps = config.shapes[layer], config.sources[layer], config.norm_eps
        self.head_dim, self.twice, bias = dim, layer in config.keys_as_values, config.attention_bias
        self.sizes = (config.num_heads * dim, *(kv_heads * dim,) * 2)[: 3 if source == layer else 1]
        stored = self.sizes[:2] if self.twice else self.sizes
        self.qkv = Linear(config.hidden_size, dict(zip("qkv", stored)), placement, bias=bias)
        self.output = Linear(self.sizes[0], config.hidden_size, placement, bias=bias)
        self.q_norm, self.k_norm = (RMSNorm(dim, eps, placement) for _ in range(2))
        self.v_norm = RMSNorm(dim, eps, placement, weighted=False)
        norms, window = (self.q_norm, self.k_norm if source == layer else None), config.sliding_windows[layer]
        self.attend = PagedAttention(source, dim, rotary, *norms, window=window, scale=1.0)
        if source != layer:
            del self.k_norm

    def __call__(self, x: Value, step: StepInput) -> Value:
        qkv = self.qkv(x)
        if self.twice:
            qkv = side_by_side(qkv, qkv.split(self.sizes[:2], dim=-1)[1])
        q, *kv = (part.unflatten(-1, (-1, self.head_dim)) for part in qkv.split(self.sizes, dim=-1))  # [T, H or K, D]
        k, v = (kv[0], self.v_norm(kv[1])) if kv else (None, None)
        return self.output(self.attend(q, k, v, step).flatten(1))


class LayerInputs:
    """Embeddings of each token for every layer: token ids [T] and embeddings [T, E] -> [T, P] for each layer.

    They are left larger by the root of 2, which the norm behind their use takes out.
    """

    def __init__(self, config: Gemma4Config, placement: Placement) -> None:
        size, self.sizes = config.input_size, (config.input_size,) * config.num_layers
        self.table = Embedding(config.vocab_size, sum(self.sizes), placement, scale=config.input_scale)
        self.projection = Linear(config.hidden_size, sum(self.sizes), placement)
        self.norm = RMSNorm(size, config.norm_eps * config.hidden_size, placement)  # as if divided by the root of E

    def __call__(self, token_ids: Value, x: Value) -> tuple[Value, ...]:
        projected = self.norm(self.projection(x).unflatten(-1, (-1, self.sizes[0]))).flatten(1)
        return tuple((projected + self.table(token_ids)).split(self.sizes, dim=-1))


class Block:
    """One decoder layer. x [T, E] comes as two summands, for a norm takes a sum: the second is None at first."""

    def __init__(self, config: Gemma4Config, layer: int, rotary: Rotary, placement: Placement) -> None:
        size, eps, inner, self.layer = config.hidden_size, config.norm_eps, config.inner_sizes[layer], layer
        self.attention_norm, self.attention_post_norm = (RMSNorm(size, eps, placement) for _ in range(2))
        self.attention = Attention(config, layer, rotary, placement)
        self.mlp_norm, self.mlp_post_norm = (RMSNorm(size, eps, placement) for _ in range(2))
        self.mlp: GatedMLP | SparseMLP = GatedMLP(size, inner, placement, activation="gelu_tanh")
        self.dense: GatedMLP | None = None
        if config.mixture is not None and layer in config.sparse_layers:
            self.dense, self.mlp = self.mlp, SparseMLP(size, config.mixture, placement)
            self.router_norm, self.experts_norm = (RMSNorm(size, eps, placement) for _ in range(2))
            self.dense_post_norm, self.experts_post_norm = (RMSNorm(size, eps, placement) for _ in range(2))
        self.input_gate = Linear(size, config.input_size, placement) if config.input_size else None
        if config.input_size:
            self.input_output = Linear(config.input_size, size, placement)
            self.input_norm = RMSNorm(size, 2 * eps, placement)  # as if inputs were divided by the root of 2
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
        if self.input_gate is not None:
            residual = residual + x
            given = side_by_side(self.input_gate(residual), step.layer_inputs[self.layer])
            x = self.input_norm(self.input_output(gelu_tanh_mul(given)))
        return (x, residual) if self.scale is None else (self.scale(residual + x), None)


class Gemma4(DecoderStack):
    """The decoder: token ids [T] -> hidden states [T, E] -> logits [T, V]."""

    def __init__(self, config: Gemma4Config, placement: Placement, checkpoint: Checkpoint) -> None:
        self.config = config
        size, cap = (config.vocab_size, config.hidden_size), config.final_softcap
        self.embed = Embedding(*size, placement, scale=config.embedding_scale, softcap=cap)
        factors = "rope_freqs.weight" in checkpoint.tensors
        self.rotary = Rotary(config.rope, config.max_position, placement, factors=factors)
        self.local_rotary = Rotary(config.local_rope, config.max_position, placement)
        rotaries = [self.rotary if window is None else self.local_rotary for window in config.sliding_windows]
        self.inputs = LayerInputs(config, placement) if config.input_size else None
        self.layers = [Block(config, layer, rotary, placement) for layer, rotary in enumerate(rotaries)]
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, placement)
        self.head = None if config.tie_embeddings else Embedding(*size, placement, softcap=cap)

    def prepare(self, positions: int) -> None:
        """See `Decoder.prepare`."""
        super().prepare(positions)
        self.local_rotary.prepare(positions)

    def begun(self, token_ids: Value, x: Value, step: StepInput) -> StepInput:
        """See `DecoderStack.begun`."""
        return step if self.inputs is None else dataclasses.replace(step, layer_inputs=self.inputs(token_ids, x))


# ---- weight names ----------------------------------------------------------------------------------------------------

_NAMES = {
    "attention_norm:weight": ("input_layernorm.weight", "attn_norm.weight"),
    "attention_post_norm:weight": ("post_attention_layernorm.weight", "post_attention_norm.weight"),
    "attention.q_norm:weight": ("self_attn.q_norm.weight", "attn_q_norm.weight"),
    "attention.k_norm:weight": ("self_attn.k_norm.weight", "attn_k_norm.weight"),
    "attention.output:weight": ("self_attn.o_proj.weight", "attn_output.weight"),
    "attention.output:bias": ("self_attn.o_proj.bias", "attn_output.bias"),
    "mlp_norm:weight": ("pre_feedforward_layernorm.weight", "ffn_norm.weight"),
    "mlp_post_norm:weight": ("post_feedforward_layernorm.weight", "post_ffw_norm.weight"),
    "dense_post_norm:weight": ("post_feedforward_layernorm_1.weight", "post_ffw_norm_1.weight"),
    "experts_norm:weight": ("pre_feedforward_layernorm_2.weight", "pre_ffw_norm_2.weight"),
    "experts_post_norm:weight": ("post_feedforward_layernorm_2.weight", "post_ffw_norm_2.weight"),
    "mlp.router:weight": ("router.proj.weight", "ffn_gate_inp.weight"),
    "mlp.router:expert_scale": ("router.per_expert_scale", "ffn_down_exps.scale"),
    "input_gate:weight": ("per_layer_input_gate.weight", "inp_gate.weight"),
    "input_output:weight": ("per_layer_projection.weight", "proj.weight"),
    "input_norm:weight": ("post_per_layer_input_norm.weight", "post_norm.weight"),
    "scale:factor": ("layer_scalar", "layer_output_scale.weight"),
    **{
        f"{mlp}.{target}weight": (f"mlp.{name}_proj.weight", f"ffn_{name}.weight")
        for mlp in ("mlp", "dense")
        for target, name in (("gate_up:gate.", "gate"), ("gate_up:up.", "up"), ("down:", "down"))
    },
}
_INPUTS, _OF_INPUTS = "model.", "per_layer_"
WEIGHTS = [
    WeightName("embed:weight", "model.embed_tokens.weight", "token_embd.weight"),
    WeightName("inputs.table:weight", "model.embed_tokens_per_layer.weight", "per_layer_token_embd.weight"),
    WeightName("inputs.projection:weight", "model.per_layer_model_projection.weight", "per_layer_model_proj.weight"),
    WeightName("inputs.norm:weight", "model.per_layer_projection_norm.weight", "per_layer_proj_norm.weight"),
    WeightName("rotary:factors", None, "rope_freqs.weight"),
    *projections(),
    *(WeightName(f"layers.{{i}}.{target}", HF + hf, GG + gguf) for target, (hf, gguf) in _NAMES.items()),
    WeightName("layers.{i}.router_norm:weight", HF + "router.scale", GG + "ffn_gate_inp.scale", by_root, by_root),
    *expert_names("experts", "gate_proj", "up_proj", "down_proj"),
    WeightName("norm:weight", "model.norm.weight", "output_norm.weight"),
    WeightName("head:weight", "lm_head.weight", "output.weight"),
]


def ignored(config: Gemma4Config) -> list[str]:
    """Stored names that carry nothing: the second copy of a tied head, and keys of layers that read others'."""
    readers = "|".join(str(layer) for layer, source in enumerate(config.sources) if layer != source)
    unused = [rf"model\.layers\.({readers})\.self_attn\.[kv]_(proj|norm)\..*", rf"blk\.({readers})\.attn_[kv](_norm)?\..*"]
    return [*[r"lm_head\.weight"] * config.tie_embeddings, *(unused if readers else [])]


FAMILY = Family(
    hf={"Gemma4ForCausalLM": "gemma4_text", "Gemma4UnifiedForCausalLM": "gemma4_unified_text"},
    gguf=("gemma4",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Gemma4,
    weights=WEIGHTS,
    ignored=ignored,
)
