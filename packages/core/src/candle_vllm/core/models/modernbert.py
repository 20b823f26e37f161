# SPDX-License-Identifier: MIT
"""ModernBERT: an encoder of long texts; most layers have a window around each token.

Norms precede attention and MLP, all without biases by default; gates are GELU; layers with a window have another
rotary base. Source: Warner et al., 2024, arXiv:2412.13663.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.loading.rope import RopeConfig, rope_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import row_part
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models.attention_names import pair
from candle_vllm.core.models.encoder_parts import (
    ACTIVATIONS,
    classifier,
    head_of,
    prefix_of,
    read_part,
    sizes_from_gguf,
    sizes_from_hf,
    thirds,
)
from candle_vllm.core.models.encoder_stack import PlainEncoder, StackConfig
from candle_vllm.core.models.family import EncoderFamily
from candle_vllm.core.models.local_layers import rope_of_kind
from candle_vllm.core.pooled_head import Dense

# ---- config ----------------------------------------------------------------------------------------------------------

_KINDS = ("full_attention", "sliding_attention")
_BIASES = {"norm_bias": ("norm_bias",), "attention_bias": ("qkv_bias", "output_bias")}
_BIASES |= {"mlp_bias": ("mlp_bias", "down_bias")}


def _flags(fields: Fields) -> dict[str, Any]:
    """Flags that all models share, and those of biases, for which GGUF files have no keys."""
    biases = {name: fields.get(key, bool, False) for key, names in _BIASES.items() for name in names}
    return {"typed": False, "placed": False, "prenorm": True, "gate": "gelu", **biases}


def config_from_hf(fields: Fields, model_type: str, *, scores: bool) -> StackConfig:
    """Read `config.json` of modernbert."""
    fields.choice("hidden_activation", "gelu", "gelu")
    sizes, position = sizes_from_hf(fields), fields.count("max_position_embeddings", 8192)
    period, half = fields.count("global_attn_every_n_layers", 3), fields.count("local_attention", 128) // 2
    kinds = fields.get("layer_types", list, [_KINDS[bool(n % period)] for n in range(sizes["num_layers"])])
    if len(kinds) != sizes["num_layers"] or any(kind not in _KINDS for kind in kinds):
        raise UnsupportedModelError(f"{fields.path}: layer_types is {kinds!r:.80}, which is not implemented")

    def rope(kind: str, key: str, theta: float) -> RopeConfig:
        own = {"rope_theta": fields.get(key, float, theta), **rope_of_kind(fields, kind)}
        settings = Fields({"rope_parameters": own | dict(fields.section("rope_scaling").values)}, fields.path)
        return rope_from_hf(settings, sizes["hidden_size"] // sizes["num_heads"], position)

    pooling: Any = fields.choice("classifier_pooling", "cls", "cls", "mean") if scores else None
    return StackConfig(
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
        **_flags(fields),
        **head_of(fields, scores=scores),
    )


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> StackConfig:
    """Read GGUF metadata of modern-bert; the first of every n layers has no window, where n is 3 by default."""
    sizes = sizes_from_gguf(fields, checkpoint)
    half, period = fields.count("attention.sliding_window") // 2, fields.count("attention.sliding_window_pattern", 3)
    bases = {"rope": ("rope.freq_base", 160000.0), "local_rope": ("rope.freq_base_swa", 10000.0)}
    dim = sizes["hidden_size"] // sizes["num_heads"]
    ropes: dict[str, Any] = {
        name: RopeConfig(theta=fields.get(key, float, base), dim=dim) for name, (key, base) in bases.items()
    }
    windows = tuple(half if layer % period else None for layer in range(sizes["num_layers"]))
    return StackConfig(model_type="modernbert", windows=windows, **ropes, **sizes, **_flags(fields))


# ---- weight names ----------------------------------------------------------------------------------------------------


def weights(config: StackConfig, stored: Iterable[str]) -> list[WeightName]:
    """The table of weight names."""
    del config
    at = prefix_of(stored, "embeddings.tok_embeddings.weight")
    layer, block = f"{at}layers.{{i}}.", "blk.{i}."
    wi, up = f"{layer}mlp.Wi", f"{block}ffn_up"
    return [
        WeightName("embed:weight", f"{at}embeddings.tok_embeddings.weight", "token_embd.weight"),
        *pair("embed_norm:", f"{at}embeddings.norm", "token_embd_norm"),
        *pair("layers.{i}.attention_norm:", f"{layer}attn_norm", f"{block}attn_norm"),
        *thirds(dict.fromkeys("qkv", ()), (f"{layer}attn.Wqkv",), f"{block}attn_qkv"),
        *pair("layers.{i}.attention.output:", f"{layer}attn.Wo", f"{block}attn_output"),
        *pair("layers.{i}.mlp_norm:", f"{layer}mlp_norm", f"{block}ffn_norm"),
        *(
            WeightName(f"layers.{{i}}.mlp.gate_up:{part}.{kind}", f"{wi}.{kind}", f"{up}.{kind}", half, half)
            for part, half in (("gate", row_part(0, 2)), ("up", row_part(1, 2)))
            for kind in ("weight", "bias")
        ),
        *pair("layers.{i}.mlp.down:", f"{layer}mlp.Wo", f"{block}ffn_down"),
        *pair("norm:", f"{at}final_norm", "output_norm"),
    ]


def ignored(config: StackConfig) -> list[str]:
    """Names of tensors that an embedding does not need, and of a head's tensors, which `behind` reads."""
    del config
    return [r"(head|classifier|decoder)\..*", r"(model\.)?layers\.0\.attn_norm\.weight", r"cls\..*"]


def behind(config: StackConfig, checkpoint: Checkpoint) -> tuple[Dense, ...]:
    """The layers of a head: norm(activation(dense(x))), then the classifier."""
    size = config.hidden_size
    dense = Dense(
        weight=read_part(checkpoint, "head.dense.weight", size, size),
        bias=read_part(checkpoint, "head.dense.bias", size) if config.head_bias else None,
        activation=config.head_activation,
        norm=read_part(checkpoint, "head.norm.weight", size),
        norm_bias=read_part(checkpoint, "head.norm.bias", size) if config.norm_bias else None,
        eps=config.norm_eps,
    )
    return dense, *classifier(config, checkpoint)


FAMILY = EncoderFamily(
    hf={
        "ModernBertModel": ("modernbert", False),
        "ModernBertForMaskedLM": ("modernbert", False),
        "ModernBertForSequenceClassification": ("modernbert", True),
    },
    gguf=("modern-bert",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=PlainEncoder,
    weights=weights,
    ignored=ignored,
    behind=behind,
)
