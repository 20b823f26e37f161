# SPDX-License-Identifier: MIT
"""AFMoE (Arcee Trinity): Llama's layers (`llama.py`) with gated attention, four norms in a block, and experts.

A sigmoid of a projection of attention's input gates each element of attention's output; each head of q and k has a
norm. Three of four layers have a window, the others no rotary embedding. Experts are scored by sigmoids and chosen
with a correction bias; a shared expert is added, and the first layers are dense. Source: Arcee, 2025, the model card.
"""

from __future__ import annotations

from typing import Any

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.moe import Mixture
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.config import gguf_windows, layer_windows, shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models import glm4_moe, llama
from candle_vllm.core.models.attention_names import GG, HF, also_named, local_keys
from candle_vllm.core.models.experts import routed_names, sigmoids_from_gguf, sparse_in_gguf
from candle_vllm.core.models.family import BIASES, Architecture, Family
from candle_vllm.core.models.llama import Llama, LlamaConfig

_PERIOD = 4

# ---- config ----------------------------------------------------------------------------------------------------------


def config_from_hf(fields: Fields, model_type: str) -> LlamaConfig:
    """Read `config.json` of afmoe."""
    fields.choice("hidden_act", "silu", "silu", "swish")
    fields.choice("score_func", "sigmoid", "sigmoid")
    if not fields.get("route_norm", bool, True) or fields.count("n_group", 1) > 1:
        raise UnsupportedModelError(
            f"{fields.path}: route_norm false and n_group above 1 are not implemented for afmoe"
        )
    shared = shared_from_hf(fields.with_absent(head_dim=128), model_type)
    layers, inner = shared["num_layers"], fields.count("moe_intermediate_size")
    window, period = fields.count("sliding_window", 1024), fields.count("global_attn_every_n_layers", _PERIOD)
    usual = tuple(window if (layer + 1) % period else None for layer in range(layers))
    shared["sliding_windows"] = windows = layer_windows(fields, layers, window) or usual
    bias = fields.get("attention_bias", bool, False)
    mixture = Mixture(
        experts=fields.count("num_experts"),
        top_k=fields.count("num_experts_per_tok"),
        inner_size=inner,
        scoring="sigmoid",
        scale=fields.get("route_scale", float, 1.0),
        correction=True,
        shared_size=inner * fields.count("num_shared_experts", 2),
    )
    dense, scaled = fields.get("num_dense_layers", int, 1), fields.get("mup_enabled", bool, False)
    full = frozenset(layer for layer in range(layers) if windows[layer] is None)
    own: dict[str, Any] = {"qkv_bias": bias, "output_bias": bias, "unrotated_layers": full}
    return _afmoe(shared | own, mixture, frozenset(range(max(dense, 0), layers)), scaled)


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> LlamaConfig:
    """Read GGUF metadata of afmoe: every fourth layer has no rotary embedding, and the embeddings have a factor."""
    shared = shared_from_gguf(fields, checkpoint)
    layers, inner = shared["num_layers"], fields.count("expert_feed_forward_length")
    window = fields.get("attention.sliding_window", int, 0) or None
    full = frozenset(range(_PERIOD - 1, layers, _PERIOD))
    windows = gguf_windows(fields, layers, window, period=_PERIOD)
    mixture = sigmoids_from_gguf(fields, shared_size=inner * fields.count("expert_shared_count"))
    own = {"sliding_windows": windows, "unrotated_layers": full}
    return _afmoe(shared | own, mixture, sparse_in_gguf(checkpoint, layers), scaled=True)


def _afmoe(shared: dict[str, Any], mixture: Mixture, sparse: frozenset[int], scaled: bool) -> LlamaConfig:
    own: dict[str, Any] = {"mixture": mixture, "num_experts": mixture.experts, "sparse_layers": sparse}
    own["embedding_scale"] = shared["hidden_size"] ** 0.5 if scaled else None
    return LlamaConfig(**shared | own, qk_norm=True, gate="sigmoid", wide_gate=True)


# ---- block and model -------------------------------------------------------------------------------------------------


class Block(llama.Block):
    """One decoder layer."""

    def __init__(self, config: LlamaConfig, layer: int, rotary: Rotary, placement: Placement) -> None:
        super().__init__(config, layer, rotary, placement)
        norm = (config.hidden_size, config.norm_eps, placement)
        self.attention_post_norm, self.mlp_post_norm = RMSNorm(*norm), RMSNorm(*norm)

    def __call__(self, x: Value, residual: Value | None, step: StepInput) -> tuple[Value, Value]:
        normed, residual = self.attention_norm.add(x, residual)
        normed, residual = self.mlp_norm.add(self.attention_post_norm(self.attention(normed, step)), residual)
        return self.mlp_post_norm(self.mlp(normed)), residual


class Afmoe(Llama):
    """The decoder: token ids [T] -> hidden states [T, E] -> logits [T, V]."""

    block = Block


# ---- weight names ----------------------------------------------------------------------------------------------------

_NORMS = {
    "layers.{i}.attention_post_norm:weight": ("post_attention_layernorm", "post_attention_norm"),
    "layers.{i}.mlp_norm:weight": ("pre_mlp_layernorm", "ffn_norm"),
    "layers.{i}.mlp_post_norm:weight": ("post_mlp_layernorm", "post_ffw_norm"),
}
_LINES = also_named(llama.WEIGHTS, {"attention.gate:weight": HF + "self_attn.gate_proj.weight"})
WEIGHTS = [
    *(line for line in _LINES if line.target not in _NORMS),
    *(WeightName(to, f"{HF}{hf}.weight", f"{GG}{gguf}.weight") for to, (hf, gguf) in _NORMS.items()),
    *routed_names("mlp.expert_bias", router="mlp.router.gate"),
]


def gguf_keys(config: LlamaConfig) -> dict[str, Any]:
    """The GGUF metadata of an AFMoE in addition to the keys of every model."""
    return glm4_moe.gguf_keys(config) | local_keys(config)


FAMILY = Family(
    hf={"AfmoeForCausalLM": "afmoe"},
    gguf=("afmoe",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Afmoe,
    weights=WEIGHTS,
    ignored=llama.ignored,
    as_gguf={"afmoe": Architecture(name="afmoe", more=gguf_keys, unread=BIASES)},
)
