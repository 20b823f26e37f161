# SPDX-License-Identifier: MIT
"""Mamba and Falcon Mamba: Mamba 1 in all layers, without feed-forward layers and key-value caches.

Falcon Mamba normalises dt, B and C. Sources: Gu and Dao, 2023, arXiv:2312.00752; TII, 2024, arXiv:2410.05355.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.config import shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.models import llama, nemotron_h
from candle_vllm.core.models.family import MAMBA_BIASES, Architecture, Family
from candle_vllm.core.models.mamba1 import (
    MambaMixer,
    SelectiveConfig,
    SelectiveSizes,
    selective_keys,
    selective_names,
    sizes_from_gguf,
    sizes_from_hf,
)

# ---- config ----------------------------------------------------------------------------------------------------------

_KEYS = {
    "expand": "expand",
    "state": "state_size",
    "rank": "time_step_rank",
    "taps": "conv_kernel",
    "bias": "use_bias",
    "conv_bias": "use_conv_bias",
}
_HEADS = 64  # no layer has heads, but ranks must divide a number of heads
_CONTEXT = 1 << 20  # default of llama.cpp's files: a state does not limit the context


def config_from_hf(fields: Fields, model_type: str) -> SelectiveConfig:
    """Read `config.json` of mamba and falcon_mamba."""
    fields = fields.with_defaults(layer_norm_epsilon=1e-5, tie_word_embeddings=True)
    fields.choice("hidden_act", "silu", "silu")
    norms = {"eps": fields.get("mixer_rms_eps", float, 1e-6)} if model_type == "falcon_mamba" else {}
    mamba, size = sizes_from_hf(fields, _KEYS, **norms), fields.count("hidden_size")
    inner = fields.count("intermediate_size", mamba.inner)  # as in transformers: Falcon Mamba's `expand` is wrong
    mamba = dataclasses.replace(mamba, inner=inner)
    unused = {"num_attention_heads": _HEADS, "num_key_value_heads": _HEADS, "head_dim": 64, "intermediate_size": size}
    fields = Fields({**fields.values, **unused}, fields.path, fields.prefix)
    fields = fields.with_defaults(max_position_embeddings=_CONTEXT)
    return _config(shared_from_hf(fields, model_type, eps="layer_norm_epsilon"), mamba)


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> SelectiveConfig:
    """Read GGUF metadata of mamba, in which the number of heads and the width of feed-forward layers are 0."""
    unused = {"attention.head_count": _HEADS, "attention.head_count_kv": _HEADS, "attention.key_length": 64}
    unused |= {"feed_forward_length": fields.count("embedding_length")}
    values = {**fields.values, **{fields.prefix + key: value for key, value in unused.items()}}
    shared = shared_from_gguf(Fields(values, fields.path, fields.prefix), checkpoint)
    norms = {"eps": shared["norm_eps"]} if fields.get("ssm.dt_b_c_rms", bool, False) else {}
    return _config(shared, sizes_from_gguf(fields, checkpoint, **norms))


def _config(shared: dict[str, Any], mamba: SelectiveSizes) -> SelectiveConfig:
    layers = frozenset(range(shared["num_layers"]))
    return SelectiveConfig(**shared, mamba=mamba, mamba_layers=layers, unrotated_layers=layers)


def gguf_keys(config: Any) -> dict[str, Any]:
    """Shapes of Mamba 1, and zeros for sizes that llama.cpp requires and these models do not have."""
    zeros = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
    return selective_keys(config) | dict.fromkeys(zeros, 0) | {"ssm.dt_b_c_rms": config.mamba.eps is not None}


# ---- block and model -------------------------------------------------------------------------------------------------


class Block:
    """One layer. Its input [T, E] is x + residual, added in the norm; residual is None in layer 0."""

    def __init__(self, config: SelectiveConfig, layer: int, rotary: Rotary, placement: Placement) -> None:
        del rotary
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, placement)
        self.attention = MambaMixer(layer, config.hidden_size, config.mamba, placement)

    def __call__(self, x: Value, residual: Value | None, step: StepInput) -> tuple[Value, Value]:
        normed, residual = self.norm.add(x, residual)
        return self.attention(normed, step), residual


class Mamba(nemotron_h.NemotronH):
    """The decoder: token ids [T] -> hidden states [T, E] -> logits [T, V]."""

    block = Block


_COMMON = ("embed:weight", "layers.{i}.norm:weight", "norm:weight", "head:weight")
_MIXERS = tuple(f"{stem}.layers.{{i}}.mixer" for stem in ("backbone", "model"))

FAMILY = Family(
    hf={"MambaForCausalLM": "mamba", "FalconMambaForCausalLM": "falcon_mamba"},
    gguf=("mamba",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Mamba,
    weights=[
        *(line for line in nemotron_h.WEIGHTS if line.target in _COMMON),
        *selective_names("attention", *_MIXERS),
    ],
    ignored=llama.ignored,
    as_gguf=dict.fromkeys(("mamba", "falcon_mamba"), Architecture(name="mamba", more=gguf_keys, unread=MAMBA_BIASES)),
)
