# SPDX-License-Identifier: MIT
"""AI21 Jamba: a Llama without positions; most layers have Mamba 1 instead of attention, and some have experts.

Norms of dt, B and C have weights. Source: AI21, 2024, arXiv:2403.19887.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from candle_vllm.core.errors import InvalidFileError
from candle_vllm.core.fields import Fields
from candle_vllm.core.layers.moe import Mixture
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.config import shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models import llama
from candle_vllm.core.models.attention_names import GG, HF, kv_heads_by_layer
from candle_vllm.core.models.experts import count_keys, expert_count, expert_names, sparse_in_gguf
from candle_vllm.core.models.family import MAMBA_BIASES, Architecture, Family
from candle_vllm.core.models.llama import Llama, Mixer
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
    "expand": "mamba_expand",
    "state": "mamba_d_state",
    "rank": "mamba_dt_rank",
    "taps": "mamba_d_conv",
    "bias": "mamba_proj_bias",
    "conv_bias": "mamba_conv_bias",
}


def _periodic(fields: Fields, name: str, layers: int, period: int, offset: int) -> frozenset[int]:
    """The layers that `config.json` gives by a period and the first index; `period` and `offset` are the defaults."""
    period = fields.count(f"{name}_layer_period", period)
    offset = fields.get(f"{name}_layer_offset", int, offset)
    if not 0 <= offset < period:
        raise InvalidFileError(f"{fields.path}: {name}_layer_offset is {offset}; it must be 0 to {period - 1}")
    return frozenset(range(offset, layers, period))


def config_from_hf(fields: Fields, model_type: str) -> SelectiveConfig:
    """Read `config.json` of jamba."""
    fields = fields.with_absent(rms_norm_eps=1e-6, num_key_value_heads=8, max_position_embeddings=1 << 18)
    fields.choice("hidden_act", "silu", "silu")
    shared = shared_from_hf(fields, model_type)
    layers, experts = shared["num_layers"], fields.with_defaults(num_experts=16, num_experts_per_tok=2)
    attended, sparse = _periodic(fields, "attn", layers, 8, 4), _periodic(fields, "expert", layers, 2, 1)
    count = expert_count(experts, "num_local_experts", "num_experts")
    mixture = _mixture(count, experts.count("num_experts_per_tok"), shared) if count > 1 and sparse else None
    mamba = sizes_from_hf(fields, _KEYS, eps=shared["norm_eps"], weighted=True)
    return _config(shared, attended, sparse, mixture, mamba)


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> SelectiveConfig:
    """Read GGUF metadata of jamba, in which layers with Mamba have no key-value heads."""
    fields, counts = kv_heads_by_layer(fields)
    shared, sparse = shared_from_gguf(fields, checkpoint), sparse_in_gguf(checkpoint, len(counts))
    mixture = None
    if sparse:
        mixture = _mixture(fields.count("expert_count"), fields.count("expert_used_count"), shared)
    mamba = sizes_from_gguf(fields, checkpoint, eps=shared["norm_eps"], weighted=True)
    return _config(shared, frozenset(n for n, count in enumerate(counts) if count), sparse, mixture, mamba)


def _mixture(experts: int, top_k: int, shared: dict[str, Any]) -> Mixture:
    return Mixture(experts=experts, top_k=top_k, inner_size=shared["intermediate_size"], renormalise=False)


def _config(
    shared: dict[str, Any],
    attended: frozenset[int],
    sparse: frozenset[int],
    mixture: Mixture | None,
    mamba: SelectiveSizes,
) -> SelectiveConfig:
    every = frozenset(range(shared["num_layers"]))
    own: dict[str, Any] = {}
    if mixture:
        own = {"mixture": mixture, "sparse_layers": sparse, "num_experts": mixture.experts}
    return SelectiveConfig(**shared | own, mamba=mamba, mamba_layers=every - attended, unrotated_layers=every)


def gguf_keys(config: Any) -> dict[str, Any]:
    """The GGUF metadata; layers with Mamba have 0 key-value heads."""
    heads = [0 if layer in config.mamba_layers else config.num_kv_heads for layer in range(config.num_layers)]
    keys = selective_keys(config) | {"attention.head_count_kv": heads}
    return keys if config.mixture is None else keys | count_keys(config.mixture)


# ---- block and model -------------------------------------------------------------------------------------------------


class Block(llama.Block):
    """One decoder layer: Llama's, with attention or with Mamba."""

    def mixer(self, config: SelectiveConfig, layer: int, rotary: Rotary, placement: Placement) -> Mixer:
        if layer in config.mamba_layers:
            return MambaMixer(layer, config.hidden_size, config.mamba, placement)
        return super().mixer(config, layer, rotary, placement)


class Jamba(Llama):
    """The decoder: token ids [T] -> hidden states [T, E] -> logits [T, V]."""

    block = Block

    def prepare(self, positions: int) -> None:
        """Do nothing: without rotation there are no tables."""


# ---- weight names ----------------------------------------------------------------------------------------------------

_RENAMED = {"mlp.": "feed_forward.", "post_attention_layernorm": "pre_ff_layernorm", "l.norm": "l.final_layernorm"}


def _line(line: WeightName) -> WeightName:
    """A row of Llama's table, with the names of these models."""
    hf = line.hf
    for usual, own in _RENAMED.items():
        hf = hf.replace(usual, own) if isinstance(hf, str) else hf
    return dataclasses.replace(line, hf=hf)


FAMILY = Family(
    hf={"JambaForCausalLM": "jamba"},
    gguf=("jamba",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Jamba,
    weights=[
        *map(_line, llama.WEIGHTS),
        WeightName("layers.{i}.mlp.router:weight", HF + "feed_forward.router.weight", GG + "ffn_gate_inp.weight"),
        *expert_names("feed_forward.experts", "gate_proj", "up_proj", "down_proj"),
        *selective_names("attention", HF + "mamba"),
    ],
    ignored=llama.ignored,
    as_gguf={"jamba": Architecture(name="jamba", more=gguf_keys, square=True, norm=False, unread=MAMBA_BIASES)},
)
