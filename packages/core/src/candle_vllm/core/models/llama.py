# SPDX-License-Identifier: MIT
"""The layers of Llama, and the families that differ from Llama by flags.

Llama 1 to 3.x, InternLM 3, SmolLM and Yi are unchanged; Seed-OSS and Qwen2 have biases on q, k, v; Mistral has a
sliding window, Ministral in some layers only; in Ministral 3 queries grow with their position; Qwen3 has a norm on
every head of q and k. Each block is x + attention(norm(x)), then x + mlp(norm(x)).
Shapes: T tokens, H heads, K key-value heads, D head size, E hidden, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, TypeAlias

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.recorded import GateKind, Recorded, Value
from candle_vllm.core.kernels.scale_cap import clamp_
from candle_vllm.core.kernels.side_by_side import first_of_heads
from candle_vllm.core.kernels.silu_mul import gated
from candle_vllm.core.layers.attention import PagedAttention, StepInput
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.layer_norm import HeadLayerNorm, LayerNorm
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.mlp import GatedMLP
from candle_vllm.core.layers.moe import Mixture, SparseMLP
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.cache_specs import CacheSpec, PagedSpec
from candle_vllm.core.loading.config import ModelConfig, layer_windows, shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.rope import RopeConfig
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import half_split
from candle_vllm.core.loading.weights import Parameter, WeightName
from candle_vllm.core.models.attention_names import GG, HF, axes_keys, gguf_has_bias, pair, projections, window_keys
from candle_vllm.core.models.family import Architecture, Family
from candle_vllm.core.models.stack import DecoderStack

# ---- config ----------------------------------------------------------------------------------------------------------


MLPGate: TypeAlias = Literal["silu", "silu_7", "silu_16", "silu_10", "swiglu_oai"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(ModelConfig):
    """Config of Llama and of families with its layers.

    Attributes:
        qkv_bias, output_bias, mlp_bias: which projections have biases.
        qkv_clip: maximum magnitude of q, k and v before the rotation (`olmo.py`); None for no limit.
        qk_norm: q and k are RMS-normalised per head before the rotation.
        norms_behind: these norms follow the rotation (`hunyuan.py`).
        whole_norms: q and k are normalised over all heads at once (`olmoe.py`), so heads cannot be divided among ranks.
        mixture, sparse_layers: the experts, and the layers that have them (`mixtral.py`, `qwen_moe.py`, `glm4_moe.py`).
        unrotated_layers: layers without rotary embedding (`smollm3.py`).
        deep: number of first layers after which the vision encoder's features are added to image rows (`qwen_vl.py`).
        deep_layers: layers before which they are added instead, in ascending order (`granite.py`).
        embedding_scale: factor of the embeddings (`granite.py`); None for 1.
        residual_scale: factor of the outputs of attention and of the feed-forward layer in the residual stream.
        attention_scale: factor of the attention scores; None for D^-0.5.
        logit_scale: factor of the logits.
        local_rope: rotary settings of the layers with a window, if they differ from `rope`.
        sink_layers: layers whose attention heads have sinks (`granite.py`).
        head_factors: query heads of each layer as multiples of `num_heads` (`laguna.py`); empty if all are 1.
        groups: in each layer, how many of `num_heads` share a key-value head (`mimo_v2.py`); empty if all are equal.
        gate: activation of a gate on attention's output, per head, or per element with `wide_gate`; None for no gate.
        value_dim: elements of a value head if they are fewer than `head_dim` (`mimo_v2.py`); 0 for `head_dim`.
        value_scale: factor of the values.
        mlp_gates: for each layer, the SwiGLU variants of its routed experts and of its shared expert or dense MLP
            (`step3p5.py`); empty if all are "silu".
    """

    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qkv_clip: float | None = None
    qk_norm: bool = False
    norms_behind: bool = False
    whole_norms: bool = False
    mixture: Mixture | None = None
    sparse_layers: frozenset[int] = frozenset()
    unrotated_layers: frozenset[int] = frozenset()
    deep: int = 0
    deep_layers: tuple[int, ...] = ()
    embedding_scale: float | None = None
    residual_scale: float = 1.0
    attention_scale: float | None = None
    logit_scale: float = 1.0
    local_rope: RopeConfig | None = None
    sink_layers: frozenset[int] = frozenset()
    head_factors: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()
    gate: GateKind | None = None
    wide_gate: bool = False
    value_dim: int = 0
    value_scale: float = 1.0
    mlp_gates: tuple[tuple[MLPGate, MLPGate], ...] = ()

    def heads(self, layer: int) -> tuple[int, int]:
        """H and K of a layer; a rank that has only a part of a group of query heads has the group's key-value head."""
        factor = self.head_factors[layer] if self.head_factors else 1
        kv_heads = max(1, self.num_heads // self.groups[layer]) if self.groups else self.num_kv_heads
        return factor * self.num_heads, kv_heads

    @property
    def cache_specs(self) -> tuple[CacheSpec, ...]:
        """See `ModelConfig.cache_specs`."""
        dim = self.head_dim
        return tuple(PagedSpec(self.heads(n)[1], dim, dim, window) for n, window in enumerate(self.sliding_windows))

    @property
    def stream_eps(self) -> float:
        """Epsilon of norms of the residual stream, which is stored divided by r = `residual_scale`.

        So only the embeddings must be scaled, and the norms give the same results as for the undivided stream a = r x:
        a / sqrt(mean(a^2) + eps) is x / sqrt(mean(x^2) + eps / r^2).
        """
        return self.norm_eps / self.residual_scale**2


def config_from_hf(fields: Fields, model_type: str) -> LlamaConfig:
    """Read `config.json` of llama, the Mistral family, qwen2, qwen3, seed_oss and internlm3."""
    fields.choice("hidden_act", "silu", "silu", "swish")
    if model_type == "internlm3":  # published files have their own keys
        biases = {"attention_bias": fields.get("qkv_bias", bool, False), "mlp_bias": fields.get("bias", bool, False)}
        if biases["attention_bias"] != biases["mlp_bias"]:
            raise UnsupportedModelError(f"{fields.path}: qkv_bias and bias that differ are not implemented")
        fields = Fields(biases | dict(fields.values), fields.path)
    if model_type == "ministral3":
        fields.get("rope_parameters", dict)  # required: transformers' default is a whole dict
    shared = shared_from_hf(fields, model_type)
    attention_bias = fields.get("attention_bias", bool, model_type == "seed_oss")
    output_bias = fields.get("attention_out_bias", bool, False) if model_type == "seed_oss" else attention_bias
    return LlamaConfig(
        **shared
        | {
            "model_type": f"{model_type}_vl" if shared["rope"].axes and "qwen" in model_type else model_type,
            "qkv_bias": model_type == "qwen2" or attention_bias,
            "output_bias": model_type != "qwen2" and output_bias,
            "mlp_bias": fields.get("mlp_bias", bool, False),
            "qk_norm": model_type == "qwen3",
            "sliding_windows": windows_from_hf(fields, model_type, shared["num_layers"]),
            "deep": fields.get("n_deepstack_layers", int, 0),
        }
    )


def windows_from_hf(fields: Fields, model_type: str, layers: int) -> tuple[int | None, ...]:
    """Each layer's sliding window, or None; by the model type, `layer_types`, and Qwen's flag and first layer."""
    qwen, usual = "qwen" in model_type, {} if model_type == "ministral3" else {"sliding_window": 4096}
    window = fields.with_absent(**usual).get("sliding_window", int, None)
    if not (qwen or model_type in ("mistral", "ministral", "ministral3")) or window is None:
        return (None,) * layers
    if qwen and not fields.get("use_sliding_window", bool, False):
        return (None,) * layers
    if (named := layer_windows(fields, layers, window)) is not None:
        return named
    if not qwen or model_type == "qwen3_moe":
        return (window,) * layers
    first = fields.get("max_window_layers", int, 28)
    return tuple(window if layer >= first else None for layer in range(layers))


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> LlamaConfig:
    """Read GGUF metadata of llama (with Mistral, SmolLM and Yi), mistral3, qwen2, qwen2vl, qwen3, qwen3vl, seed_oss."""
    shared, tensors = shared_from_gguf(fields, checkpoint), checkpoint.tensors
    return LlamaConfig(
        **shared,
        qkv_bias=gguf_has_bias(checkpoint),
        output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
        interleaved_rotary=shared["model_type"] in ("llama", "mistral3"),
        deep=fields.get("n_deepstack_layers", int, 0),
    )


# ---- attention -------------------------------------------------------------------------------------------------------


def times(x: Value, factor: float) -> Value:
    """Multiply x by a factor; recorded steps do so in place."""
    if factor == 1:
        return x
    return x.scaled(factor) if isinstance(x, Recorded) else x * factor


class Attention:
    """Grouped-query attention with rotary positions: x [T, E] -> [T, E].

    Args:
        config, rotary, placement: of the model.
        layer: index of the layer.
        inputs: columns of x, if they are not E.
    """

    def __init__(
        self, config: LlamaConfig, layer: int, rotary: Rotary, placement: Placement, inputs: int | None = None
    ) -> None:
        (heads, kv_heads), dim = config.heads(layer), config.head_dim
        self.sizes = (heads * dim, kv_heads * dim, kv_heads * dim)
        self.head_dim = dim
        shards = dict[str, int](zip("qkv", self.sizes, strict=True))
        self.qkv = Linear(inputs or config.hidden_size, shards, placement, bias=config.qkv_bias)
        self.clip = config.qkv_clip
        self.gate_kind: GateKind | None = config.gate
        gates = heads * dim if config.wide_gate else heads
        self.gate = None if config.gate is None else Linear(config.hidden_size, gates, placement)
        self.value_dim, self.value_scale = config.value_dim or dim, config.value_scale
        self.output = Linear(heads * self.value_dim, config.hidden_size, placement, bias=config.output_bias)
        widths = self.sizes[:2] if config.whole_norms else (dim, dim)
        norms = [RMSNorm(width, config.norm_eps, placement) if config.qk_norm else None for width in widths]
        self.q_norm: RMSNorm | HeadLayerNorm | None
        self.k_norm: RMSNorm | HeadLayerNorm | None
        self.q_norm, self.k_norm = norms
        self.whole = config.whole_norms
        of_heads = (None, None) if self.whole else norms
        window = config.sliding_windows[layer]
        turns = None if layer in config.unrotated_layers else rotary
        options: dict[str, Any] = {"window": window, "scale": config.attention_scale}
        options["sinks"] = placement.empty(heads) if layer in config.sink_layers else None
        self.attend = PagedAttention(layer, dim, turns, *of_heads, **options, norms_behind=config.norms_behind)

    def __call__(self, x: Value, step: StepInput) -> Value:
        qkv = self.qkv(x)
        parts = (qkv if self.clip is None else clamp_(qkv, -self.clip, self.clip)).split(self.sizes, dim=-1)
        if self.whole and self.q_norm is not None and self.k_norm is not None:  # each has one head with all elements
            q, k = (part.unflatten(-1, (-1, size)) for part, size in zip(parts, self.sizes[:2]))
            parts = (self.q_norm(q).flatten(1), self.k_norm(k).flatten(1), parts[2])
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)  # [T, H, D] and twice [T, K, D]
        y = self.attend(q, k, v, step)
        y = y.flatten(1) if self.value_dim == self.head_dim else first_of_heads(y, self.value_dim)
        y = times(y, self.value_scale)
        if self.gate is not None and self.gate_kind is not None:
            y = gated(y, self.gate(x), self.gate_kind)
        return self.output(y)

    def parameters(self) -> Mapping[str, Parameter]:
        """Return no parameters: the parts have them all."""
        return {}


Mixer: TypeAlias = Callable[[Value, StepInput], Value]
"""x [T, E] -> [T, E], mixing the tokens of a sequence: attention, or a hybrid model's replacement for it."""

# ---- block -----------------------------------------------------------------------------------------------------------


class Block:
    """One decoder layer. Its input [T, E] is x + residual, added in the first norm; residual is None in layer 0."""

    def __init__(self, config: LlamaConfig, layer: int, rotary: Rotary, placement: Placement) -> None:
        self.attention_norm: RMSNorm | LayerNorm = RMSNorm(config.hidden_size, config.stream_eps, placement)
        self.attention = self.mixer(config, layer, rotary, placement)
        self.mlp_norm: RMSNorm | LayerNorm = RMSNorm(config.hidden_size, config.stream_eps, placement)
        self.mlp = self.feed_forward(config, layer, placement)

    def feed_forward(self, config: Any, layer: int, placement: Placement) -> Callable[[Value], Value]:
        """The feed-forward layer: x [T, E] -> [T, E], each token alone; families with a different one override it."""
        size, mixture, gates = config.hidden_size, config.mixture, config.mlp_gates[layer] if config.mlp_gates else ()
        if mixture is not None and layer in config.sparse_layers:
            own = dict(zip(("activation", "shared_activation"), gates))
            return SparseMLP(size, dataclasses.replace(mixture, **own), placement)
        activation = gates[1] if gates else "silu"
        return GatedMLP(size, config.intermediate_size, placement, bias=config.mlp_bias, activation=activation)

    def mixer(self, config: Any, layer: int, rotary: Rotary, placement: Placement) -> Mixer:
        """The layer that mixes the tokens of a sequence; hybrid families override it."""
        return Attention(config, layer, rotary, placement)

    def __call__(self, x: Value, residual: Value | None, step: StepInput) -> tuple[Value, Value]:
        normed, residual = self.attention_norm.add(x, residual)
        normed, residual = self.mlp_norm.add(self.attention(normed, step), residual)
        return self.mlp(normed), residual


# ---- model -----------------------------------------------------------------------------------------------------------


class Llama(DecoderStack):
    """The decoder: token ids [T] -> hidden states [T, E] -> logits [T, V]. `block` is the class of its layers."""

    block: ClassVar[type[Block]] = Block

    def __init__(self, config: LlamaConfig, placement: Placement, checkpoint: Checkpoint) -> None:
        self.config = config
        size, scale = (config.vocab_size, config.hidden_size), config.embedding_scale
        scale = scale if config.residual_scale == 1 else (scale or 1.0) / config.residual_scale
        self.embed = Embedding(*size, placement, scale=scale, logit_scale=config.logit_scale)
        factors = "rope_freqs.weight" in checkpoint.tensors
        rotaries = self.make_rotaries(config, placement, factors=factors)
        self.layers = layers = [self.block(config, layer, rotary, placement) for layer, rotary in enumerate(rotaries)]
        self.norm = RMSNorm(config.hidden_size, config.stream_eps, placement)
        self.head = None if config.tie_embeddings else Embedding(*size, placement, logit_scale=config.logit_scale)
        last = layers[-1]
        self.deep = {layer - 1: number for number, layer in enumerate(config.deep_layers)} or None
        self.narrows = not isinstance(last.mlp, SparseMLP) and isinstance(last.attention, Attention)


# ---- weight names ----------------------------------------------------------------------------------------------------

_TO = "layers.{i}."

WEIGHTS = [
    WeightName("embed:weight", "model.embed_tokens.weight", "token_embd.weight"),
    WeightName("rotary:factors", None, "rope_freqs.weight"),
    WeightName("layers.{i}.attention_norm:weight", HF + "input_layernorm.weight", GG + "attn_norm.weight"),
    *projections({"q": half_split("num_heads"), "k": half_split("num_kv_heads")}),
    WeightName("layers.{i}.attention.q_norm:weight", HF + "self_attn.q_norm.weight", GG + "attn_q_norm.weight"),
    WeightName("layers.{i}.attention.k_norm:weight", HF + "self_attn.k_norm.weight", GG + "attn_k_norm.weight"),
    *pair(_TO + "attention.output:", HF + "self_attn.o_proj", GG + "attn_output"),
    WeightName("layers.{i}.attention.attend:sinks", HF + "self_attn.sinks", GG + "attn_sinks.weight"),
    WeightName("layers.{i}.attention.gate:weight", HF + "self_attn.g_proj.weight", GG + "attn_gate.weight"),
    WeightName(
        "layers.{i}.mlp_norm:weight",
        HF + "post_attention_layernorm.weight",
        (GG + "ffn_norm.weight", GG + "post_attention_norm.weight"),  # the second name in files of Seed-OSS
    ),
    *pair(_TO + "mlp.gate_up:gate.", HF + "mlp.gate_proj", GG + "ffn_gate"),
    *pair(_TO + "mlp.gate_up:up.", HF + "mlp.up_proj", GG + "ffn_up"),
    *pair(_TO + "mlp.down:", HF + "mlp.down_proj", GG + "ffn_down"),
    WeightName("norm:weight", "model.norm.weight", "output_norm.weight"),
    WeightName("head:weight", "lm_head.weight", "output.weight"),
]


def ignored(config: ModelConfig) -> list[str]:
    """Names of tensors that are not loaded: old converters' buffers, a copy of a tied head, layers for draft tokens."""
    buffers = [r".*rotary_emb\.inv_freq", r".*\.attn_rot_embd\.weight", r"mtp\..*"]
    return [*buffers, r"lm_head\.weight"] if config.tie_embeddings else buffers


def mistral3_keys(config: Any) -> dict[str, Any]:
    """The GGUF metadata of Mistral 3: the window, and by how much queries grow with their position."""
    return window_keys(config) | (
        {"attention.temperature_scale": config.rope.query_scale} if config.rope.query_scale else {}
    )


FAMILY = Family(
    hf={
        "LlamaForCausalLM": "llama",
        "MistralForCausalLM": "mistral",
        "MinistralForCausalLM": "ministral",
        "Ministral3ForCausalLM": "ministral3",
        "Qwen2ForCausalLM": "qwen2",
        "Qwen3ForCausalLM": "qwen3",
        "SeedOssForCausalLM": "seed_oss",
        "InternLM3ForCausalLM": "internlm3",
    },
    gguf=("llama", "mistral3", "qwen2", "qwen2vl", "qwen3", "qwen3vl", "seed_oss"),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Llama,
    weights=WEIGHTS,
    ignored=ignored,
    as_gguf={
        **dict.fromkeys(
            ("llama", "mistral", "ministral", "internlm3"),
            Architecture(name="llama", more=window_keys, reordered=True, unread=()),
        ),
        "ministral3": Architecture(name="mistral3", more=mistral3_keys, reordered=True, log_multiplier=1.0, unread=()),
        "qwen2": Architecture(name="qwen2", more=window_keys, square=True),
        "qwen2_vl": Architecture(name="qwen2vl", more=axes_keys, square=True),
        "qwen3": Architecture(name="qwen3", more=window_keys),
        "qwen3_vl": Architecture(name="qwen3vl", more=axes_keys),
        "seed_oss": Architecture(name="seed_oss", names=lambda _: (".post_attention_norm.",)),
    },
)
