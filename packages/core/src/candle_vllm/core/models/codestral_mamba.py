# SPDX-License-Identifier: MIT
"""Mamba 2 and Codestral Mamba: Nemotron-H (`nemotron_h.py`) with Mamba 2 in all layers, without key-value caches.

Source: Dao and Gu, 2024, arXiv:2405.21060.
"""

from __future__ import annotations

from typing import Any

from candle_vllm.core.fields import Fields
from candle_vllm.core.loading.config import shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.models import llama
from candle_vllm.core.models.family import MAMBA_BIASES, Architecture, Family
from candle_vllm.core.models.mamba2 import MambaSizes, mamba_keys, sizes_from_gguf, sizes_from_hf
from candle_vllm.core.models.nemotron_h import WEIGHTS, NemotronH
from candle_vllm.core.models.nemotron_h_config import NemotronHConfig

_KEYS = {
    "heads": "num_heads",
    "head_dim": "head_dim",
    "groups": "n_groups",
    "state": "state_size",
    "taps": "conv_kernel",
    "bias": "use_bias",
    "conv_bias": "use_conv_bias",
}
_DEFAULTS = {"n_groups": 8, "state_size": 128, "num_heads": 128, "head_dim": 64, "layer_norm_epsilon": 1e-5}
_CONTEXT = 1 << 20  # default of llama.cpp's files: a state does not limit the context


def config_from_hf(fields: Fields, model_type: str) -> NemotronHConfig:
    """Read `config.json` of mamba2."""
    fields = fields.with_defaults(**_DEFAULTS)
    fields.choice("hidden_act", "silu", "silu")
    size = fields.count("hidden_size")
    mamba = sizes_from_hf(fields, _KEYS, inner=fields.count("expand", 2) * size)
    unused = {"num_attention_heads": mamba.heads, "intermediate_size": size, "max_position_embeddings": _CONTEXT}
    return _config(shared_from_hf(fields.with_defaults(**unused), model_type, eps="layer_norm_epsilon"), mamba)


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> NemotronHConfig:
    """Read GGUF metadata of mamba2, in which the numbers of heads and the width of feed-forward layers are 0."""
    mamba = sizes_from_gguf(fields, checkpoint.tensors, range(fields.count("block_count")))
    unused = {"attention.head_count": mamba.heads, "attention.head_count_kv": mamba.heads}
    unused |= {"attention.key_length": mamba.head_dim, "feed_forward_length": fields.count("embedding_length")}
    values = {**fields.values, **{fields.prefix + key: value for key, value in unused.items()}}
    return _config(shared_from_gguf(Fields(values, fields.path, fields.prefix), checkpoint), mamba)


def _config(shared: dict[str, Any], mamba: MambaSizes) -> NemotronHConfig:
    layers = range(shared["num_layers"])
    own: dict[str, Any] = {"kinds": ("mamba",) * len(layers), "mamba": mamba, "mamba_layers": frozenset(layers)}
    return NemotronHConfig(**shared | own, unrotated_layers=frozenset(layers))


def gguf_keys(config: Any) -> dict[str, Any]:
    """Shapes of Mamba 2, and zeros for sizes that llama.cpp requires and these models do not have."""
    zeros = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
    return mamba_keys(config.mamba) | dict.fromkeys(zeros, 0)


FAMILY = Family(
    hf={"Mamba2ForCausalLM": "mamba2"},
    gguf=("mamba2",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=NemotronH,
    weights=WEIGHTS,
    ignored=llama.ignored,
    as_gguf={"mamba2": Architecture(name="mamba2", more=gguf_keys, unread=MAMBA_BIASES)},
)
