# SPDX-License-Identifier: MIT
"""IBM Granite 3 and 4, dense and with experts: Llama's layers (`llama.py`) with four factors.

The factors scale embeddings, attention scores, outputs of attention and MLP, and logits. Granite SWA has, by
default, windows in three of four layers, and it has sinks. Granite 4 is in `granite_hybrid.py`.
Source: IBM, 2024, "Granite 3.0 Language Models".
"""

from __future__ import annotations

import dataclasses
from typing import Any

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.layers.moe import Mixture
from candle_vllm.core.loading.config import gguf_windows
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import row_part
from candle_vllm.core.loading.weights import Seen, WeightName
from candle_vllm.core.models import llama
from candle_vllm.core.models.attention_names import GG, HF, also_named, local_keys
from candle_vllm.core.models.experts import count_keys, expert_names, shared_names
from candle_vllm.core.models.family import Architecture, Family
from candle_vllm.core.models.llama import Llama, LlamaConfig
from candle_vllm.core.models.local_layers import local_layers

# ---- config ----------------------------------------------------------------------------------------------------------


def config_from_hf(fields: Fields, model_type: str) -> LlamaConfig:
    """Read `config.json` of granite, granitemoe, granite_swa, and of granitemoehybrid for `granite_hybrid.py`."""
    swa = model_type == "granite_swa"
    dense = llama.config_from_hf(fields.with_absent(tie_word_embeddings=swa), model_type)
    layers, hybrid = dense.num_layers, "layer_types" in fields and not swa
    experts = fields.get("num_local_experts", int, 0) if model_type != "granite" else 0
    shared_size = fields.get("shared_intermediate_size", int, 0)
    rotates = not hybrid or fields.get("position_embedding_type", str, "") == "rope"
    own: dict[str, Any] = {
        "model_type": model_type if swa else "granitemoe" if experts else "granite",
        "intermediate_size": shared_size if shared_size and not experts else dense.intermediate_size,
        "unrotated_layers": frozenset(() if rotates else range(layers)),
        "embedding_scale": _factor(fields, "embedding_multiplier", 1.0),
        "residual_scale": _factor(fields, "residual_multiplier", 1.0),
        "attention_scale": _factor(fields, "attention_multiplier", 1.0),
        "logit_scale": 1 / _factor(fields, "logits_scaling", 1.0),
    }
    own |= local_layers(fields, layers, dense.rope, first=0) if swa else {}
    own |= _deep(fields, [target for _, _, target in projectors_of(fields)][1:], layers)
    top = fields.count("num_experts_per_tok") if experts else 0
    return _granite(dataclasses.replace(dense, **own), experts, top, shared_size)


def _granite(dense: LlamaConfig, experts: int, top: int, shared_size: int) -> LlamaConfig:
    """Add experts, which all layers have, and the sinks of Granite SWA to the config."""
    layers, own = frozenset(range(dense.num_layers)), dict[str, Any]()
    if dense.model_type == "granite_swa":
        own |= {"attention_sinks": True, "sink_layers": layers}
    if experts:
        inner = dense.intermediate_size
        mixture = Mixture(experts=experts, top_k=top, inner_size=inner, shared_size=shared_size)
        own |= {"mixture": mixture, "num_experts": experts, "sparse_layers": layers}
    return dataclasses.replace(dense, **own)


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> LlamaConfig:
    """Read GGUF metadata of granite, granitemoe and granite_swa."""
    dense, experts = llama.config_from_gguf(fields, checkpoint), fields.get("expert_count", int, 0)
    layers, rotates = dense.num_layers, fields.get("rope.scaling.finetuned", bool, True)
    own: dict[str, Any] = {
        "unrotated_layers": frozenset(() if rotates else range(layers)),
        "embedding_scale": _factor(fields, "embedding_scale", 1.0),
        "residual_scale": _factor(fields, "residual_scale", 1.0),
        "attention_scale": _factor(fields, "attention.scale", dense.head_dim**-0.5),
        "logit_scale": 1 / _factor(fields, "logit_scale"),
        "interleaved_rotary": True,
    }
    numbers = fields.get("deepstack_mapping", list, [])
    targets = [layer for layer, number in enumerate(numbers) if number != -1]
    if [numbers[layer] for layer in targets] != list(range(1, len(targets) + 1)):
        raise UnsupportedModelError(f"{fields.path}: deepstack_mapping is {numbers!r:.80}, whose numbers must ascend")
    own |= _deep(fields, targets, layers)
    if dense.model_type == "granite_swa":
        windows = gguf_windows(fields, layers, fields.count("attention.sliding_window"), period=4)
        turned = fields.get("attention.rope_pattern", list, [True] * layers)
        if len(turned) != layers:
            raise InvalidFileError(f"{fields.path}: attention.rope_pattern must describe {layers} layers")
        unrotated = frozenset(layer for layer, turns in enumerate(turned) if not turns)
        own |= {"sliding_windows": windows, "unrotated_layers": unrotated}
    top = fields.count("expert_used_count") if experts else 0
    shared_size = fields.get("expert_shared_feed_forward_length", int, 0)
    return _granite(dataclasses.replace(dense, **own), experts, top, shared_size)


_SPATIAL = (12, 15, 18, 21)  # default of transformers


def projectors_of(fields: Fields) -> list[tuple[int, int, int]]:
    """The projectors of Granite 4 Vision: number, vision layer and text layer; none for a config of text alone.

    Spatial projectors have their offset in a cell, 0 to 3, as number, and the others -1, -2, .... They are in the order
    of text layers, of which layer 0 is the first.
    """
    if (mapped := fields.get("deepstack_layer_map", list, None)) is None:
        return []
    spatial, targets = fields.get("spatial_vision_layer", int, -1), fields.get("spatial_target_layers", list, None)
    pairs = [(-1 - number, *pair) if isinstance(pair, list) else (pair,) for number, pair in enumerate(mapped)]
    made: list[Any] = [
        *pairs,
        *((offset, spatial, target) for offset, target in enumerate(_SPATIAL if targets is None else targets)),
    ]
    if not all(len(each) == 3 and all(type(number) is int for number in each) for each in made):
        raise InvalidFileError(f"{fields.path}: deepstack_layer_map and spatial_target_layers must name layers")
    found = sorted(made, key=lambda each: each[2])
    if not found or found[0][2] or len({each[2] for each in found}) != len(found) or len(targets or ()) > 4:
        raise UnsupportedModelError(
            f"{fields.path}: deepstack_layer_map and spatial_target_layers must name layer 0 and up to four layers for "
            f"offsets, each layer once; they are {mapped!r:.80} and {targets!r:.60}"
        )
    return found


def _deep(fields: Fields, targets: list[int], layers: int) -> dict[str, Any]:
    if targets and targets[-1] >= layers:
        raise InvalidFileError(f"{fields.path}: images are added before layer {targets[-1]}; there are {layers} layers")
    return {"deep": len(targets), "deep_layers": tuple(targets)}


def _factor(fields: Fields, key: str, *default: float) -> float:
    """A factor, which must be above 0 and at most 1e6."""
    factor = fields.get(key, float, *default)
    if not 0 < factor <= 1e6:
        raise InvalidFileError(f"{fields.path}: {fields.prefix}{key} is {factor}; it must be above 0 and at most 1e6")
    return factor


# ---- weight names ----------------------------------------------------------------------------------------------------

_SPARSE, _SHARED = HF + "block_sparse_moe.", HF + "shared_mlp."
_ROUTERS = (_SPARSE + "router.layer.weight", _SPARSE + "router.weight")
_FUSED: dict[str, str | Seen] = {  # published files have gate and up as one matrix; keys are ends of targets
    "gate_up:gate.weight": Seen(_SHARED + "input_linear.weight", row_part(0, 2)),
    "gate_up:up.weight": Seen(_SHARED + "input_linear.weight", row_part(1, 2)),
    "down:weight": _SHARED + "output_linear.weight",
    "experts:gate.{e}.weight": Seen(_SPARSE + "input_linear.weight", row_part(0, 2)),
    "experts:up.{e}.weight": Seen(_SPARSE + "input_linear.weight", row_part(1, 2)),
    "experts:down.{e}.weight": _SPARSE + "output_linear.weight",
}
_LINES = [*llama.WEIGHTS, *expert_names("block_sparse_moe.experts", "w1", "w3", "w2"), *shared_names("shared_mlp")]
WEIGHTS = [
    *also_named(_LINES, {f"mlp.{part}{end}": name for part in ("", "shared.") for end, name in _FUSED.items()}),
    WeightName("layers.{i}.mlp.router:weight", _ROUTERS, GG + "ffn_gate_inp.weight"),
]


def gguf_keys(config: Any) -> dict[str, Any]:
    """The GGUF metadata with the four factors; `logit_scale` is a divisor there."""
    keys: dict[str, Any] = {
        "embedding_scale": float(config.embedding_scale),
        "residual_scale": float(config.residual_scale),
        "attention.scale": float(config.attention_scale),
        "logit_scale": 1 / config.logit_scale,
        "rope.scaling.finetuned": not config.unrotated_layers,
    }
    if config.deep_layers:
        places = {layer: number for number, layer in enumerate(config.deep_layers, 1)}
        keys["deepstack_mapping"] = [places.get(layer, -1) for layer in range(config.num_layers)]
    if config.mixture is None:
        return keys
    shared = config.mixture.shared_size
    return keys | count_keys(config.mixture) | ({"expert_shared_feed_forward_length": shared} if shared else {})


def swa_keys(config: Any) -> dict[str, Any]:
    """The keys of `gguf_keys`, and the layers with a window and with a rotary embedding."""
    rotates = [layer not in config.unrotated_layers for layer in range(config.num_layers)]
    return gguf_keys(config) | local_keys(config) | {"attention.rope_pattern": rotates}


FAMILY = Family(
    hf={
        "GraniteForCausalLM": "granite",
        "GraniteMoeForCausalLM": "granitemoe",
        "GraniteMoeSharedForCausalLM": "granitemoe",
        "GraniteSWAForCausalLM": "granite_swa",
        "GraniteMoeSWAForCausalLM": "granite_swa",
    },
    gguf=("granite", "granitemoe", "granite_swa"),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Llama,
    weights=WEIGHTS,
    ignored=llama.ignored,
    as_gguf={
        "granite": Architecture(name="granite", more=gguf_keys, reordered=True, square=True, unread=()),
        "granitemoe": Architecture(name="granitemoe", more=gguf_keys, reordered=True, square=True, unread=()),
        "granite_swa": Architecture(
            name="granite_swa", more=swa_keys, reordered=True, square=True, unread=(".ffn_gate_shexp.weight",)
        ),
    },
)
