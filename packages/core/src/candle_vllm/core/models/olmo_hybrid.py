# SPDX-License-Identifier: MIT
"""OLMo Hybrid: gated delta nets in most layers; the other layers have attention, followed by a norm.

A delta net's corrections may have twice the usual strength, so that state transitions can have negative eigenvalues.
Its layer is x + net(norm(x)), then x + mlp(norm(x)). An attention layer is x + norm(attention(x)), then
x + norm(mlp(x)), with norms of q and k over all heads at once; in published models it has no rotary embedding.
Source: Grazzi et al., 2024, arXiv:2411.12537 (eigenvalues). Shapes as in `qwen3_next.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.layers.attention import PagedAttention, StepInput
from candle_vllm.core.layers.delta_net import DeltaSizes, GatedDeltaNet
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.mlp import GatedMLP
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.config import shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import flattened
from candle_vllm.core.loading.weights import Parameter, WeightName
from candle_vllm.core.models import llama
from candle_vllm.core.models.attention_names import HF
from candle_vllm.core.models.family import Family
from candle_vllm.core.models.qwen3_next_config import Qwen3NextConfig, convolution_taps, decay_of_log
from candle_vllm.core.models.qwen3_next_config import delta_layers as layers_with_nets
from candle_vllm.core.models.stack import DecoderStack

_EPS = 1e-5  # epsilon of a delta net's output norm, which does not depend on rms_norm_eps


@dataclasses.dataclass(frozen=True, kw_only=True)
class OlmoHybridConfig(Qwen3NextConfig):
    """Config of OLMo Hybrid: the fields in addition to those of Qwen3-Next.

    Attributes:
        rotates: queries and keys have a rotary embedding.
        strength: see `DeltaGates`.
        whole_norms: q and k are normalised over all heads at once, so heads cannot be divided among ranks.
    """

    rotates: bool
    strength: float
    whole_norms: bool = True


def config_from_hf(fields: Fields, model_type: str) -> OlmoHybridConfig:
    """Read `config.json` of olmo_hybrid."""
    fields.choice("hidden_act", "silu", "silu", "swish")
    shared = shared_from_hf(fields, model_type)
    heads = fields.count("linear_num_key_heads", shared["num_heads"])
    key = fields.count("linear_key_head_dim", int(0.75 * shared["hidden_size"] / heads))
    return OlmoHybridConfig(
        **shared,
        delta=DeltaSizes(
            key_heads=heads,
            heads=fields.count("linear_num_value_heads", shared["num_heads"]),
            key_dim=key,
            value_dim=fields.count("linear_value_head_dim", 2 * key),
            taps=convolution_taps(fields, "linear_conv_kernel_dim", 4),
        ),
        delta_layers=layers_with_nets(fields, shared["num_layers"]),
        attention_bias=fields.get("attention_bias", bool, False),
        rotates=fields.section("rope_parameters").values.get("rope_theta", 0) is not None,  # null in published files
        strength=2.0 if fields.get("linear_allow_neg_eigval", bool, True) else 1.0,
    )


class Attention:
    """Grouped-query attention with norms over all heads at once: x [T, E] -> [T, E]."""

    def __init__(self, config: OlmoHybridConfig, layer: int, rotary: Rotary, placement: Placement) -> None:
        heads, kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.sizes = (heads * self.head_dim, kv_heads * self.head_dim, kv_heads * self.head_dim)
        shards, bias = dict[str, int](zip("qkv", self.sizes, strict=True)), config.attention_bias
        self.qkv = Linear(config.hidden_size, shards, placement, bias=bias)
        self.output = Linear(self.sizes[0], config.hidden_size, placement, bias=bias)
        self.q_norm, self.k_norm = (RMSNorm(size, config.norm_eps, placement) for size in self.sizes[:2])
        self.attend = PagedAttention(layer, self.head_dim, rotary if config.rotates else None)

    def __call__(self, x: Value, step: StepInput) -> Value:
        q, k, v = self.qkv(x).split(self.sizes, dim=-1)
        q, k = (  # the norms read all elements as one head
            norm(part.unflatten(-1, (-1, size))).flatten(1)
            for norm, part, size in zip((self.q_norm, self.k_norm), (q, k), self.sizes)
        )
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))
        return self.output(self.attend(q, k, v, step).flatten(1))

    def parameters(self) -> Mapping[str, Parameter]:
        """Return no parameters: the parts have them all."""
        return {}


class Block:
    """One decoder layer. Its input [T, E] is x + residual, added in the first norm; residual is None in layer 0."""

    def __init__(self, config: OlmoHybridConfig, layer: int, rotary: Rotary, placement: Placement) -> None:
        self.attention_norm, self.mlp_norm = (RMSNorm(config.hidden_size, config.norm_eps, placement) for _ in range(2))
        self.delta = layer in config.delta_layers
        self.attention: GatedDeltaNet | Attention = (
            GatedDeltaNet(
                layer, config.hidden_size, config.delta, _EPS, placement, apart=True, strength=config.strength
            )
            if self.delta
            else Attention(config, layer, rotary, placement)
        )
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, placement)

    def __call__(self, x: Value, residual: Value | None, step: StepInput) -> tuple[Value, Value]:
        if self.delta:
            normed, residual = self.attention_norm.add(x, residual)
            normed, residual = self.mlp_norm.add(self.attention(normed, step), residual)
            return self.mlp(normed), residual
        x = x if residual is None else residual + x
        x = x + self.attention_norm(self.attention(x, step))
        return self.mlp_norm(self.mlp(x)), x


class OlmoHybrid(DecoderStack):
    """The decoder: token ids [T] -> hidden states [T, E] -> logits [T, V]."""

    def __init__(self, config: OlmoHybridConfig, placement: Placement, checkpoint: Checkpoint) -> None:
        del checkpoint
        self.config, vocabulary = config, (config.vocab_size, config.hidden_size)
        self.embed = Embedding(*vocabulary, placement)
        self.rotary = Rotary(config.rope, config.max_position, placement)
        self.layers = [Block(config, layer, self.rotary, placement) for layer in range(config.num_layers)]
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, placement)
        self.head = None if config.tie_embeddings else Embedding(*vocabulary, placement)


# ---- weight names ----------------------------------------------------------------------------------------------------

_TO, _MIX, _NET, _SELF = "layers.{i}.", "layers.{i}.attention", HF + "linear_attn.", HF + "self_attn."
_KEPT = ("embed:", "head:", "norm:", _TO + "mlp.", _MIX + ".qkv", _MIX + ".output", _MIX + ".q_norm", _MIX + ".k_norm")
# names in published files and in transformers; post_attention_layernorm precedes the mlp in delta net layers only
_NORMS = {
    "attention_norm": ("attention_layer_norm", "input_layernorm", "post_attention_layernorm", "feedforward_layer_norm"),
    "mlp_norm": ("post_feedforward_layernorm", "feedforward_layer_norm", "post_attention_layernorm"),
}
_INPUTS = {"q": "q", "k": "k", "v": "v", "z": "g", "b": "b", "a": "a"}

WEIGHTS = [
    *(dataclasses.replace(line, gguf=None) for line in llama.WEIGHTS if line.target.startswith(_KEPT)),
    *(
        WeightName(f"{_TO}{to}:weight", tuple(f"{HF}{name}.weight" for name in names), None)
        for to, names in _NORMS.items()
    ),
    *(WeightName(f"{_MIX}.inputs:{to}.weight", f"{_NET}{name}_proj.weight", None) for to, name in _INPUTS.items()),
    *(WeightName(f"{_MIX}:{part}.taps", f"{_NET}{part}_conv1d.weight", None, flattened) for part in "qkv"),
    WeightName(_MIX + ":decay", _NET + "A_log", None, decay_of_log),
    WeightName(_MIX + ":bias", _NET + "dt_bias", None),
    WeightName(_MIX + ".result:weight", _NET + "o_proj.weight", None),
    WeightName(_MIX + ".norm:weight", _NET + "o_norm.weight", None),
]

FAMILY = Family(
    hf={"OlmoHybridForCausalLM": "olmo_hybrid"},
    config_from_hf=config_from_hf,
    build=OlmoHybrid,
    weights=WEIGHTS,
    ignored=llama.ignored,
)
