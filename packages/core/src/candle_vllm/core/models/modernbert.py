# SPDX-License-Identifier: MIT
"""ModernBERT: an encoder of long texts, most of whose layers see a window around each token.

Norms stand in front (the first layer's is that of the embeddings) and have no biases, gates are GELU, positions
rotate, by another base in layers with a window. Source: Warner et al., 2024, arXiv:2412.13663.
Shapes: T tokens, E hidden.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.rotary import Turned
from candle_vllm.core.kernels.whole_attention import whole_attention
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.layer_norm import LayerNorm
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.mlp import GatedMLP
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.config import EncoderConfig
from candle_vllm.core.loading.rope import RopeConfig, rope_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models.encoder_parts import (
    ACTIVATIONS,
    both,
    head_of,
    prefix_of,
    read_part,
    sizes_from_gguf,
    sizes_from_hf,
    thirds,
)
from candle_vllm.core.models.family import EncoderFamily
from candle_vllm.core.pooled_head import Dense, DenseActivation

# ---- config ----------------------------------------------------------------------------------------------------------


_KINDS = ("full_attention", "sliding_attention")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModernBertConfig(EncoderConfig):
    """What differs from model to model.

    Attributes:
        windows: of each layer, most tokens between a token and one that it sees; None is all.
        rope, local_rope: of layers without a window, and with one.
        norm_bias, attention_bias, mlp_bias, head_bias: there are biases.
        head_activation: of a head.
    """

    windows: tuple[int | None, ...]
    rope: RopeConfig
    local_rope: RopeConfig
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    head_activation: DenseActivation = "gelu"


def config_from_hf(fields: Fields, model_type: str, *, scores: bool) -> ModernBertConfig:
    """Reads `config.json` of modernbert."""
    fields.choice("hidden_activation", "gelu", "gelu")
    sizes, position = sizes_from_hf(fields), fields.count("max_position_embeddings", 8192)
    period, half = fields.count("global_attn_every_n_layers", 3), fields.count("local_attention", 128) // 2
    kinds = fields.get("layer_types", list, [_KINDS[bool(n % period)] for n in range(sizes["num_layers"])])
    if len(kinds) != sizes["num_layers"] or any(kind not in _KINDS for kind in kinds):
        raise UnsupportedModelError(f"{fields.path}: layer_types is {kinds!r:.80}, which is not implemented")

    def rope(kind: str, key: str, theta: float) -> RopeConfig:
        own = {"rope_theta": fields.get(key, float, theta), **fields.section("rope_parameters").section(kind).values}
        settings = Fields({"rope_parameters": own}, fields.path)
        return rope_from_hf(settings, sizes["hidden_size"] // sizes["num_heads"], position)

    flags = {name: fields.get(name, bool, False) for name in ("norm_bias", "attention_bias", "mlp_bias")}
    pooling: Any = fields.choice("classifier_pooling", "cls", "cls", "mean") if scores else None
    return ModernBertConfig(
        model_type=model_type,
        max_position=position,
        norm_eps=fields.get("norm_eps", float, 1e-5),
        windows=tuple(half if kind == _KINDS[1] else None for kind in kinds),
        rope=rope(_KINDS[0], "global_rope_theta", 160000.0),
        local_rope=rope(_KINDS[1], "local_rope_theta", 10000.0),
        head_bias=fields.get("classifier_bias", bool, False),
        head_activation=ACTIVATIONS[fields.choice("classifier_activation", "gelu", *ACTIVATIONS)],
        head_pooling=pooling,
        **sizes,
        **flags,
        **head_of(fields, scores=scores),
    )


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> ModernBertConfig:
    """Reads GGUF metadata of modern-bert, whose first of every three layers has no window."""
    sizes = sizes_from_gguf(fields, checkpoint)
    half, period = fields.count("attention.sliding_window") // 2, fields.count("attention.sliding_window_pattern", 3)
    bases = {"rope": ("rope.freq_base", 160000.0), "local_rope": ("rope.freq_base_swa", 10000.0)}
    dim = sizes["hidden_size"] // sizes["num_heads"]
    ropes = {name: RopeConfig(theta=fields.get(key, float, base), dim=dim) for name, (key, base) in bases.items()}
    windows = tuple(half if layer % period else None for layer in range(sizes["num_layers"]))
    return ModernBertConfig(model_type="modernbert", windows=windows, **ropes, **sizes)


# ---- attention -------------------------------------------------------------------------------------------------------


class Attention:
    """Every token of a text sees those within the layer's window: x [T, E] -> [T, E]."""

    def __init__(self, config: ModernBertConfig, layer: int, placement: Placement) -> None:
        size, bias = config.hidden_size, config.attention_bias
        self.heads, self.window = config.num_heads, config.windows[layer]
        self.qkv = Linear(size, {"q": size, "k": size, "v": size}, placement, bias=bias)
        self.output = Linear(size, size, placement, bias=bias)

    def __call__(self, x: Value, turned: Turned, lengths: Sequence[int]) -> Value:
        return self.output(whole_attention(self.qkv(x), self.heads, lengths, turned, window=self.window))


# ---- block -----------------------------------------------------------------------------------------------------------


class Block:
    """One layer, attention and feed-forward: x [T, E] -> [T, E] in fp32."""

    def __init__(self, config: ModernBertConfig, layer: int, placement: Placement) -> None:
        size, eps, bias = config.hidden_size, config.norm_eps, config.norm_bias
        self.window = config.windows[layer]
        self.attention_norm = LayerNorm(size, eps, placement, bias=bias) if layer else None
        self.attention = Attention(config, layer, placement)
        self.mlp_norm = LayerNorm(size, eps, placement, bias=bias)
        self.mlp = GatedMLP(
            size, config.intermediate_size, placement, bias=config.mlp_bias, activation="gelu", fused=True
        )

    def __call__(self, x: Value, turned: Turned, lengths: Sequence[int]) -> Value:
        x = x + self.attention(x if self.attention_norm is None else self.attention_norm(x), turned, lengths)
        return x + self.mlp(self.mlp_norm(x))


# ---- model -----------------------------------------------------------------------------------------------------------


class ModernBert:
    """The encoder; see `Encoder`."""

    def __init__(self, config: ModernBertConfig, placement: Placement) -> None:
        size, eps, bias = config.hidden_size, config.norm_eps, config.norm_bias
        self.config = config
        self.embed = Embedding(config.vocab_size, size, placement, wide=True)
        self.embed_norm = LayerNorm(size, eps, placement, bias=bias)
        self.rotary, self.local = (
            Rotary(rope, config.max_position, placement) for rope in (config.rope, config.local_rope)
        )
        self.layers = [Block(config, layer, placement) for layer in range(config.num_layers)]
        self.norm = LayerNorm(size, eps, placement, bias=bias)

    def forward(self, token_ids: Value, positions: Value, types: Value, lengths: Sequence[int]) -> Value:
        """Hidden states [T, E] in fp32; see `Bert.forward`."""
        del types
        far, near = (Turned(positions, *rotary.tables) for rotary in (self.rotary, self.local))
        x = self.embed_norm(self.embed(token_ids))
        for layer in self.layers:
            x = layer(x, far if layer.window is None else near, lengths)
        return self.norm(x)

    def scores(self, first: Value) -> Value:
        """Heads stand behind the pooling; see `behind`."""
        raise NotImplementedError


# ---- weight names ----------------------------------------------------------------------------------------------------


def weights(config: ModernBertConfig, stored: Iterable[str]) -> list[WeightName]:
    """The table of names."""
    del config
    at = prefix_of(stored, "embeddings.tok_embeddings.weight")
    layer, block = f"{at}layers.{{i}}.", "blk.{i}."
    return [
        WeightName("embed:weight", f"{at}embeddings.tok_embeddings.weight", "token_embd.weight"),
        *both("embed_norm:", f"{at}embeddings.norm", "token_embd_norm"),
        *both("layers.{i}.attention_norm:", f"{layer}attn_norm", f"{block}attn_norm"),
        *thirds(dict.fromkeys("qkv", ()), (f"{layer}attn.Wqkv",), f"{block}attn_qkv"),
        *both("layers.{i}.attention.output:", f"{layer}attn.Wo", f"{block}attn_output"),
        *both("layers.{i}.mlp_norm:", f"{layer}mlp_norm", f"{block}ffn_norm"),
        *both("layers.{i}.mlp.gate_up:", f"{layer}mlp.Wi", f"{block}ffn_up"),
        *both("layers.{i}.mlp.down:", f"{layer}mlp.Wo", f"{block}ffn_down"),
        *both("norm:", f"{at}final_norm", "output_norm"),
    ]


def ignored(config: ModernBertConfig) -> list[str]:
    """Stored names that a vector does not need, and those of a head, which `behind` reads."""
    del config
    return [r"(head|classifier|decoder)\..*", r"(model\.)?layers\.0\.attn_norm\.weight", r"cls\..*"]


def behind(config: ModernBertConfig, checkpoint: Checkpoint) -> tuple[Dense, ...]:
    """The layers of a head: norm(gelu(dense(x))), then the classifier."""
    size, bias = config.hidden_size, config.head_bias
    norm = read_part(checkpoint, "head.norm.weight", size)
    shapes = {"head.dense": (size, size), "classifier": (len(config.labels), size)}
    (dense, first), (classes, second) = (
        (
            read_part(checkpoint, f"{name}.weight", *shape),
            read_part(checkpoint, f"{name}.bias", shape[0]) if has else None,
        )
        for (name, shape), has in zip(shapes.items(), (bias, True), strict=True)
    )
    activation, eps = config.head_activation, config.norm_eps
    return Dense(weight=dense, bias=first, activation=activation, norm=norm, eps=eps), Dense(
        weight=classes, bias=second
    )


FAMILY = EncoderFamily(
    hf={
        "ModernBertModel": ("modernbert", False),
        "ModernBertForMaskedLM": ("modernbert", False),
        "ModernBertForSequenceClassification": ("modernbert", True),
    },
    gguf=("modern-bert",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=ModernBert,
    weights=weights,
    ignored=ignored,
    behind=behind,
)
