# SPDX-License-Identifier: MIT
"""IBM Granite 4: Granite (`granite.py`), in models named H with Mamba 2 instead of attention in most layers.

Source: IBM, 2025, "Granite 4.0 Language Models".
"""

from __future__ import annotations

import dataclasses
from typing import Any

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.cache_specs import CacheSpec
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.models import granite, llama
from candle_vllm.core.models.attention_names import HF, kv_heads_by_layer
from candle_vllm.core.models.family import Architecture, Family
from candle_vllm.core.models.llama import Llama, LlamaConfig, Mixer
from candle_vllm.core.models.mamba2 import (
    HYBRID_KEYS,
    Mamba2Mixer,
    MambaSizes,
    mamba_keys,
    mixer_names,
    sizes_from_gguf,
    sizes_from_hf,
)

# ---- config ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraniteHybridConfig(LlamaConfig):
    """Config of these models: the fields in addition to those of Granite.

    Attributes:
        mamba: shapes of Mamba 2; None if no layer has it.
        mamba_layers: the layers with Mamba 2; the others have attention.
    """

    mamba: MambaSizes | None = None
    mamba_layers: frozenset[int] = frozenset()

    @property
    def cache_specs(self) -> tuple[CacheSpec, ...]:
        """See `ModelConfig`."""
        specs, mamba = super().cache_specs, self.mamba
        return (
            specs if mamba is None else tuple(mamba.spec if n in self.mamba_layers else s for n, s in enumerate(specs))
        )


def config_from_hf(fields: Fields, model_type: str) -> GraniteHybridConfig:
    """Read `config.json` of granitemoehybrid."""
    key = "layer_types" if "layer_types" in fields else "layers_block_type"
    kinds = fields.get(key, list, ["mamba"] * fields.count("num_hidden_layers"))
    if len(kinds) != fields.count("num_hidden_layers") or not all(
        kind in ("attention", "full_attention", "mamba", "linear_attention") for kind in kinds
    ):
        raise UnsupportedModelError(f"{fields.path}: {key} must name attention or mamba for each layer")
    plain = Fields(dict(fields.values) | {"layer_types": ["attention"] * len(kinds)}, fields.path, fields.prefix)
    shared = _flags(granite.config_from_hf(plain, model_type))
    layers = frozenset(n for n, kind in enumerate(kinds) if kind in ("mamba", "linear_attention"))
    if not layers:
        return GraniteHybridConfig(**shared)
    inner = fields.count("mamba_expand", 2) * shared["hidden_size"]
    mamba = sizes_from_hf(fields, HYBRID_KEYS, inner=inner)
    shared["model_type"] = "granitemoehybrid"
    return GraniteHybridConfig(**shared, mamba=mamba, mamba_layers=layers)


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> GraniteHybridConfig:
    """Read GGUF metadata of granitehybrid, in which layers with Mamba 2 have no key-value heads."""
    plain, counts = kv_heads_by_layer(fields)
    shared = _flags(granite.config_from_gguf(plain, checkpoint))
    layers = frozenset(n for n, count in enumerate(counts) if not count)
    mamba = sizes_from_gguf(fields, checkpoint.tensors, [*layers])
    return GraniteHybridConfig(**shared, mamba=mamba, mamba_layers=layers)


def _flags(config: LlamaConfig) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


# ---- block and model -------------------------------------------------------------------------------------------------


class Block(llama.Block):
    """One decoder layer: Llama's, with attention or with Mamba 2."""

    def mixer(self, config: GraniteHybridConfig, layer: int, rotary: Rotary, placement: Placement) -> Mixer:
        if config.mamba is None or layer not in config.mamba_layers:
            return super().mixer(config, layer, rotary, placement)
        return Mamba2Mixer(layer, config.hidden_size, config.mamba, config.norm_eps, placement)


class GraniteHybrid(Llama):
    """The decoder: token ids [T] -> hidden states [T, E] -> logits [T, V]."""

    block = Block


def gguf_keys(config: Any) -> dict[str, Any]:
    """The GGUF metadata; layers with Mamba 2 have 0 key-value heads."""
    heads = [0 if layer in config.mamba_layers else config.num_kv_heads for layer in range(config.num_layers)]
    return granite.gguf_keys(config) | mamba_keys(config.mamba) | {"attention.head_count_kv": heads}


FAMILY = Family(
    hf={"GraniteMoeHybridForCausalLM": "granitemoehybrid"},
    gguf=("granitehybrid",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=GraniteHybrid,
    weights=[*granite.WEIGHTS, *mixer_names("attention", HF + "mamba")],
    ignored=llama.ignored,
    as_gguf={
        **granite.FAMILY.as_gguf,  # models without Mamba
        "granitemoehybrid": Architecture(
            name="granitehybrid", more=gguf_keys, reordered=True, square=True, unread=(".ssm_in.bias",)
        ),
    },
)
