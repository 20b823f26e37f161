# SPDX-License-Identifier: MIT
"""OLMo 2, OLMo 3 and EXAONE 4: the attention of `llama.py` in blocks with norms after attention and MLP.

Each block is x + norm(attention(x)), then x + norm(mlp(x)). OLMo normalises q and k over all heads at once, EXAONE 4
each head. Three of four layers of OLMo 3 and EXAONE 4 (32B) have a sliding window: OLMo 3 extends the rotary
embedding of the other layers only, and EXAONE 4 has no rotary embedding in these.
Sources: OLMo Team, arXiv:2501.00656; LG AI Research, arXiv:2507.11407. Shapes: T tokens, E hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.mlp import GatedMLP
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.config import gguf_windows, layer_windows, shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.rope import RopeConfig, rope_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models import llama
from candle_vllm.core.models.attention_names import GG, HF, local_keys
from candle_vllm.core.models.family import BIASES, Architecture, Family
from candle_vllm.core.models.llama import Attention, LlamaConfig
from candle_vllm.core.models.stack import DecoderStack

# ---- config ----------------------------------------------------------------------------------------------------------


def config_from_hf(fields: Fields, model_type: str) -> LlamaConfig:
    """Read `config.json` of olmo2, olmo3 and exaone4."""
    fields.choice("hidden_act", "silu", "silu", "swish")
    fields = fields.with_absent(sliding_window=4096)
    shared, position = shared_from_hf(fields, model_type), fields.count("max_position_embeddings")
    windows = shared["sliding_windows"] if model_type == "olmo2" else windows_from_hf(fields, shared["num_layers"])
    own: dict[str, Any] = {"sliding_windows": windows, "qk_norm": True, "whole_norms": model_type != "exaone4"}
    if model_type == "exaone4":
        local = fields.get("sliding_window", int, None) is not None
        return LlamaConfig(**shared | own, unrotated_layers=full_layers(windows, local))
    bias = fields.get("attention_bias", bool, False)
    own |= {"qkv_bias": bias, "output_bias": bias}
    if model_type == "olmo3":  # settings without kinds of layers scale only the layers without a window
        kinds, theta = fields.section("rope_parameters"), fields.get("rope_theta", float, 5e5)
        full, local = (kinds.section(f"{kind}_attention").values for kind in ("full", "sliding"))
        full, scaling = full or ({} if local else kinds.values), fields.section("rope_scaling").values
        for name, values, added in (("rope", full, scaling), ("local_rope", local, {})):
            one = Fields({"rope_parameters": {"rope_theta": theta, **values}, "rope_scaling": added}, fields.path)
            own[name] = rope_from_hf(one, shared["head_dim"], position)
            theta = own[name].theta
        own["max_position"] = position
    return LlamaConfig(**shared | own)


def windows_from_hf(fields: Fields, layers: int) -> tuple[int | None, ...]:
    """Windows by `layer_types`; otherwise all but the last of every four (or `sliding_window_pattern`) layers."""
    window = fields.get("sliding_window", int, None)
    if window is None:
        return (None,) * layers
    period = 4 if "layer_types" in fields else fields.count("sliding_window_pattern", 4)
    usual = tuple(window if (layer + 1) % period else None for layer in range(layers))
    return layer_windows(fields, layers, window) or usual


def full_layers(windows: tuple[int | None, ...], local: bool) -> frozenset[int]:
    """The layers without a window if only layers with a window rotate (`local`); otherwise no layers."""
    return frozenset(layer for layer, window in enumerate(windows) if local and window is None)


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> LlamaConfig:
    """Read GGUF metadata of exaone4 and of olmo2, which is also OLMo 3's architecture."""
    shared, position = shared_from_gguf(fields, checkpoint), fields.count("context_length")
    olmo, window = shared["model_type"] == "olmo2", fields.get("attention.sliding_window", int, 0) or None
    windows = gguf_windows(fields, shared["num_layers"], window, period=4)
    own: dict[str, Any] = {"sliding_windows": windows, "qk_norm": True, "whole_norms": olmo}
    if not olmo:
        return LlamaConfig(**shared | own, unrotated_layers=full_layers(windows, window is not None))
    if window is not None:
        theta = fields.get("rope.freq_base_swa", float, shared["rope"].theta)
        local = RopeConfig(theta=theta, dim=shared["rope"].dim, original_max_position=position)
        own |= {"max_position": position, "local_rope": local}
    return LlamaConfig(**shared | own)


# ---- block and model -------------------------------------------------------------------------------------------------


class Block:
    """One decoder layer. Its input and its output [T, E] are each x + residual; residual is None in layer 0."""

    def __init__(self, config: LlamaConfig, layer: int, rotary: Rotary, placement: Placement) -> None:
        self.attention = Attention(config, layer, rotary, placement)
        self.attention_norm, self.mlp_norm = (RMSNorm(config.hidden_size, config.norm_eps, placement) for _ in range(2))
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, placement)

    def __call__(self, x: Value, residual: Value | None, step: StepInput) -> tuple[Value, Value]:
        x = x if residual is None else residual + x
        x = x + self.attention_norm(self.attention(x, step))
        return self.mlp_norm(self.mlp(x)), x


class Olmo2(DecoderStack):
    """The decoder: token ids [T] -> hidden states [T, E] -> logits [T, V]."""

    def __init__(self, config: LlamaConfig, placement: Placement, checkpoint: Checkpoint) -> None:
        self.config, size = config, (config.vocab_size, config.hidden_size)
        self.embed = Embedding(*size, placement)
        factors = "rope_freqs.weight" in checkpoint.tensors
        rotaries = self.make_rotaries(config, placement, factors=factors)
        self.layers = [Block(config, layer, rotary, placement) for layer, rotary in enumerate(rotaries)]
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, placement)
        self.head = None if config.tie_embeddings else Embedding(*size, placement)


# ---- weight names ----------------------------------------------------------------------------------------------------

_NORMS = {
    "layers.{i}.attention_norm:weight": ("post_attention_layernorm", "post_attention_norm"),
    "layers.{i}.mlp_norm:weight": ("post_feedforward_layernorm", "post_ffw_norm"),
}
WEIGHTS = [
    *(line for line in llama.WEIGHTS if line.target not in _NORMS),
    *(WeightName(to, f"{HF}{hf}.weight", f"{GG}{gguf}.weight") for to, (hf, gguf) in _NORMS.items()),
]

FAMILY = Family(
    hf={"Olmo2ForCausalLM": "olmo2", "Olmo3ForCausalLM": "olmo3", "Exaone4ForCausalLM": "exaone4"},
    gguf=("olmo2", "exaone4"),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Olmo2,
    weights=WEIGHTS,
    ignored=llama.ignored,
    as_gguf={
        **dict.fromkeys(("olmo2", "olmo3"), Architecture(name="olmo2", more=local_keys, head=True, square=True)),
        "exaone4": Architecture(name="exaone4", more=local_keys, square=True, unread=BIASES),
    },
)
