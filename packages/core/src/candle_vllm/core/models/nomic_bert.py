# SPDX-License-Identifier: MIT
"""Encoders with rotary positions that normalise behind each sum: nomic-bert, GTE and jina-embeddings-v3.

nomic-bert has no biases and a gate of SiLU; GTE has a gate of GELU; jina v3, as the repository jina-embeddings-v3-hf
has it, has no gate. Each is a `Bert` without a table of positions.
Sources: Nussbaum et al., 2024, arXiv:2402.01613; Zhang et al., 2024, arXiv:2407.19669; Sturua et al., 2024,
arXiv:2409.10173.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.loading.rope import RopeConfig, rope_from_gguf, rope_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import row_part
from candle_vllm.core.loading.weights import Seen, WeightName
from candle_vllm.core.models.bert import Bert, BertConfig
from candle_vllm.core.models.encoder_parts import (
    ACTIVATIONS,
    both,
    head_of,
    prefix_of,
    sizes_from_gguf,
    sizes_from_hf,
    thirds,
    types_from_gguf,
)
from candle_vllm.core.models.family import EncoderFamily

# ---- config ----------------------------------------------------------------------------------------------------------

NOMIC, GTE, JINA = "nomic_bert", "gte", "jina_embeddings_v3"
_THETAS = {NOMIC: 1000.0, GTE: 160000.0, JINA: 20000.0}
_BIASES = ("qkv_bias", "output_bias", "mlp_bias", "down_bias")
_FLAGS: Mapping[str, dict[str, Any]] = MappingProxyType(
    {NOMIC: dict.fromkeys(_BIASES, False) | {"gate": "silu"}, GTE: {"mlp_bias": False, "gate": "gelu"}, JINA: {}}
)
# nomic's repositories have GPT-2's names for sizes; what they may say of the model, and what is implemented
_PUBLISHED = MappingProxyType({
    "n_embd": "hidden_size", "n_inner": "intermediate_size", "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads", "n_positions": "max_position_embeddings", "layer_norm_epsilon": "layer_norm_eps",
    "rotary_emb_base": "rope_theta",
})  # fmt: skip
_ONLY = MappingProxyType({
    "activation_function": "swiglu", "qkv_proj_bias": False, "mlp_fc1_bias": False, "mlp_fc2_bias": False,
    "prenorm": False, "causal": False, "use_rms_norm": False, "rotary_emb_interleaved": False,
    "rotary_emb_fraction": 1.0, "num_experts": 0, "moe_every_n_layers": 0, "parallel_block": False,
    "logn_attention_scale": False, "logn_attention_clip1": False, "layer_norm_type": "layer_norm",
    "rotary_emb_scale_base": None,
})  # fmt: skip


def config_from_hf(fields: Fields, model_type: str, *, scores: bool) -> BertConfig:
    """Reads `config.json`, of transformers' classes or of the published repositories."""
    for key, value in _ONLY.items():
        if fields.values.get(key, value) not in (value, None):
            said = f"{fields.path}: {key} is {fields.values[key]!r:.40}"
            raise UnsupportedModelError(f"{said}, which is not implemented for {model_type}")
    fields = Fields(
        {"rope_theta": _THETAS[model_type]} | {_PUBLISHED.get(key, key): value for key, value in fields.values.items()},
        fields.path,
    )
    size, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    position = fields.count("max_position_embeddings", 8192)
    if fields.get("rotary_scaling_factor", float, None) is not None:  # stretches texts beyond these alone
        position = fields.count("max_trained_positions", 2048)
    types = fields.get("type_vocab_size", int, 2 if model_type == NOMIC else 1)
    activation = fields.choice("hidden_act", "silu" if model_type == NOMIC else "gelu", "silu", *ACTIVATIONS)
    flags = dict(_FLAGS[model_type])
    if "gate" in flags:
        flags["gate"] = {**ACTIVATIONS, "silu": "silu"}[activation]
    if flags.get("gate", activation) == "relu" or (activation == "silu" and "gate" not in flags):
        raise UnsupportedModelError(f"{fields.path}: hidden_act is {activation}, which is not implemented")
    return BertConfig(
        model_type=model_type,
        **sizes_from_hf(fields),
        max_position=position - 2 if model_type == JINA else position,
        norm_eps=fields.get("layer_norm_eps", float, 1e-5 if model_type == JINA else 1e-12),
        token_types=max(types, 1),
        typed=types > 0,
        placed=False,
        rope=_rope(fields, size // heads, position),
        activation="gelu" if activation == "silu" else activation,
        **flags,
        **head_of(fields, scores=scores),
    )


def _rope(fields: Fields, head_dim: int, position: int) -> RopeConfig:
    """The rotary settings; "ntk" of GTE's repositories raises the base and divides all frequencies, for all texts."""
    scaling = fields.section("rope_scaling")
    if scaling.get("type", str, "") != "ntk":
        return rope_from_hf(fields, head_dim, position)
    factor = scaling.get("factor", float)
    if scaling.get("mixed_b", float, None) is not None or not 1 <= factor <= 1e6:
        raise UnsupportedModelError(f"{fields.path}: rope_scaling is {scaling.values!r:.80}, which is not implemented")
    theta, divisor = fields.get("rope_theta", float) * factor, factor ** (2 / head_dim)
    return RopeConfig(theta=theta, dim=head_dim, kind="linear", factor=divisor)


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> BertConfig:
    """Reads GGUF metadata of nomic-bert and jina-bert-v3."""
    tensors, sizes = checkpoint.tensors, sizes_from_gguf(fields, checkpoint)
    model_type = JINA if fields.prefix.startswith("jina") else NOMIC
    stems = dict(zip(_BIASES, ("attn_qkv", "attn_output", "ffn_up", "ffn_down"), strict=True))
    there: dict[str, Any] = {name: f"blk.0.{stem}.bias" in tensors for name, stem in stems.items()}
    return BertConfig(
        model_type=model_type,
        **sizes,
        **types_from_gguf(checkpoint),
        placed=False,
        rope=rope_from_gguf(fields, sizes["hidden_size"] // sizes["num_heads"], sizes["max_position"]),
        gate="silu" if model_type == NOMIC else "",
        **there,
    )


# ---- weight names ----------------------------------------------------------------------------------------------------


def weights(config: BertConfig, stored: Iterable[str]) -> list[WeightName]:
    """The table of names, transformers' and those of the published repositories."""
    del config
    at = prefix_of(stored, "embeddings.word_embeddings.weight")
    new, old, gte, block = f"{at}layers.{{i}}.", f"{at}encoder.layers.{{i}}.", f"{at}encoder.layer.{{i}}.", "blk.{i}."
    alone = {part: (f"{new}self_attn.{part}_proj",) for part in "qkv"}
    fused = (f"{old}attn.Wqkv", f"{old}mixer.Wqkv", f"{gte}attention.qkv_proj")
    outputs = (f"{new}self_attn.o_proj", f"{old}attn.out_proj", f"{old}mixer.out_proj", f"{gte}attention.o_proj")
    gates = tuple(Seen(f"{gte}mlp.up_gate_proj.weight", row_part(half, 2)) for half in (1, 0))
    ups = (f"{new}mlp.fc1", f"{old}mlp.fc1")
    return [
        WeightName("embed:weight", f"{at}embeddings.word_embeddings.weight", "token_embd.weight"),
        WeightName("types:weight", f"{at}embeddings.token_type_embeddings.weight", "token_types.weight"),
        *both("norm:", (f"{at}embeddings.LayerNorm", f"{at}emb_ln"), "token_embd_norm"),
        *thirds(alone, fused, f"{block}attn_qkv"),
        *both("layers.{i}.attention.output:", outputs, f"{block}attn_output"),
        *both("layers.{i}.attention_norm:", (f"{new}post_attention_layernorm", f"{old}norm1", f"{gte}attn_ln"),
              f"{block}attn_output_norm"),
        WeightName("layers.{i}.mlp.gate_up:gate.weight",
                   (f"{new}mlp.gate_proj.weight", f"{old}mlp.fc12.weight", gates[0]), f"{block}ffn_gate.weight"),
        WeightName("layers.{i}.mlp.gate_up:up.weight",
                   (f"{new}mlp.up_proj.weight", f"{old}mlp.fc11.weight", gates[1]), f"{block}ffn_up.weight"),
        *both("layers.{i}.mlp.up:", ups, f"{block}ffn_up"),
        *both("layers.{i}.mlp.down:", (f"{new}mlp.down_proj", f"{new}mlp.fc2", f"{old}mlp.fc2", f"{gte}mlp.down_proj"),
              f"{block}ffn_down"),
        *both("layers.{i}.output_norm:", (f"{new}post_mlp_layernorm", f"{old}norm2", f"{gte}mlp_ln"),
              f"{block}layer_output_norm"),
        *both("head:", f"{at}pooler.dense"),
        *both("score:", "classifier"),
    ]  # fmt: skip


def ignored(config: BertConfig) -> list[str]:
    """Stored names that a vector does not need: poolers and the heads of pre-training."""
    return [
        r"(.*\.)?(inv_freq|position_ids)",
        r"(cls|lm_head)\..*",
        *([] if config.scores else [r"(\w+\.)?pooler\..*", r"classifier\..*"]),
    ]


FAMILY = EncoderFamily(
    hf={
        "NomicBertModel": (NOMIC, False),
        "NomicBertForSequenceClassification": (NOMIC, True),
        "GteModel": (GTE, False),
        "GteForSequenceClassification": (GTE, True),
        "NewModel": (GTE, False),
        "NewForSequenceClassification": (GTE, True),
        "JinaEmbeddingsV3Model": (JINA, False),
    },
    gguf=("nomic-bert", "jina-bert-v3"),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Bert,
    weights=weights,
    ignored=ignored,
)
