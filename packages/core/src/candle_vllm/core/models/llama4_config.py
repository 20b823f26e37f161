# SPDX-License-Identifier: MIT
"""Read the config of Llama 4 from config.json or GGUF metadata, for `llama4.py`."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.layers.moe import Mixture
from candle_vllm.core.loading.config import shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.models.experts import size_keys, sparse_in_gguf
from candle_vllm.core.models.llama import LlamaConfig

_CHUNK, _TEMPERATURE = 8192, (8192, 0.1)  # of published models; GGUF files do not store them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama4Config(LlamaConfig):
    """Config of Llama 4; `sliding_windows` has the layers' chunk sizes.

    Attributes:
        chunked: some layers attend within chunks, see `AttentionNeeds`.
        same_length: heads of q and k have a norm without a weight in layers with rotary positions.
        temperature: L and s: in layers without rotary positions, queries at position p are multiplied by
            1 + s ln(1 + floor((p + 1) / L)); None for no factor.
    """

    chunked: ClassVar[bool] = True
    same_length: bool = True
    temperature: tuple[int, float] | None = None


def config_from_hf(fields: Fields, model_type: str) -> Llama4Config:
    """Read `config.json` of llama4_text."""
    fields.choice("hidden_act", "silu", "silu")
    shared = shared_from_hf(fields.with_absent(rope_theta=5e5), model_type)
    layers, inner = shared["num_layers"], shared["intermediate_size"]
    every = fields.count("no_rope_layer_interval", 4)
    turned = fields.get("no_rope_layers", list, []) or [(n + 1) % every for n in range(layers)]
    kinds = fields.get("layer_types", list, ["chunked_attention" if each else "full_attention" for each in turned])
    sparse = fields.get("moe_layers", list, None)
    if sparse is None:
        step = fields.count("interleave_moe_layer_step", 1)
        sparse = [*range(step - 1, layers, step)]
    known = all(kind in ("chunked_attention", "full_attention") for kind in kinds)
    if len(kinds) != layers or len(turned) < layers or not known:
        raise InvalidFileError(f"{fields.path}: layer_types and no_rope_layers must describe {layers} layers")
    if not all(layer in range(layers) for layer in sparse):
        raise InvalidFileError(f"{fields.path}: moe_layers names layers that the model does not have")
    chunk = fields.get("attention_chunk_size", int, _CHUNK)
    tuning = fields.values.get(f"{fields.prefix}attn_temperature_tuning", True)  # 4 in older files
    own: dict[str, Any] = {
        "intermediate_size": fields.count("intermediate_size_mlp", 16384),
        "sliding_windows": tuple(chunk if kind == "chunked_attention" else None for kind in kinds),
        "unrotated_layers": frozenset(layer for layer in range(layers) if not turned[layer]),
        "qkv_bias": fields.get("attention_bias", bool, False),
        "output_bias": fields.get("attention_bias", bool, False),
        "same_length": fields.get("use_qk_norm", bool, True),
        "temperature": (fields.count("floor_scale", 8192), fields.get("attn_scale", float, 0.1)) if tuning else None,
    }
    if not sparse:  # Llama Guard 4, whose counts of experts are 0
        return Llama4Config(**shared | own, interleaved_rotary=True)
    top = fields.count("num_experts_per_tok", 1)
    return _config(fields, shared | own, frozenset(sparse), (fields.count("num_local_experts"), top, inner))


def _config(
    fields: Fields, values: dict[str, Any], sparse: frozenset[int], sizes: tuple[int, int, int]
) -> Llama4Config:
    """Make the config; `sizes` are the number of experts, the experts per token, and the size of an expert."""
    count, top, inner = sizes
    if top != 1:
        raise UnsupportedModelError(f"{fields.path}: {top} experts per token are not supported, only one")
    mixture = Mixture(
        experts=count,
        top_k=1,
        inner_size=inner,
        scoring="sigmoid",
        renormalise=False,
        scales_input=True,
        shared_size=inner,
    )
    own: dict[str, Any] = {"num_experts": count, "mixture": mixture, "sparse_layers": sparse}
    return Llama4Config(**values | own, interleaved_rotary=True)


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> Llama4Config:
    """Read GGUF metadata of llama4; chunk size and temperature are those of published models, as in llama.cpp."""
    shared, count = shared_from_gguf(fields, checkpoint), fields.count("expert_count")
    layers, chunked = shared["num_layers"], fields.get("attention.sliding_window", int, _CHUNK) > 0
    full = {layer for layer in range(layers) if (layer + 1) % 4 == 0}
    own = {
        "sliding_windows": tuple(None if layer in full or not chunked else _CHUNK for layer in range(layers)),
        "unrotated_layers": frozenset(full if chunked else ()),
        "same_length": count != 128,  # Maverick has 128 experts
        "temperature": _TEMPERATURE,
    }
    sizes = count, fields.count("expert_used_count"), fields.count("expert_feed_forward_length")
    return _config(fields, shared | own, sparse_in_gguf(checkpoint, layers), sizes)


def gguf_keys(config: Llama4Config) -> dict[str, Any]:
    """The GGUF metadata of a Llama 4 in addition to the keys of every model."""
    if config.mixture is None:
        raise UnsupportedModelError("llama.cpp's llama4 has experts, and this model has none")
    step = config.num_layers // max(1, len(config.sparse_layers))
    if config.sparse_layers != frozenset(range(step - 1, config.num_layers, step)):
        raise UnsupportedModelError("llama.cpp's llama4 has experts in every layer, or in every nth")
    return size_keys(config.mixture) | {"interleave_moe_layer_step": step}
