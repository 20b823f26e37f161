# SPDX-License-Identifier: MIT
"""SmolLM3: Llama's layers (`llama.py`) without rotary embedding in every fourth layer.

Source: Yang et al., 2025, arXiv:2501.18795 (RNoPE).
"""

from __future__ import annotations

from candle_vllm.core.errors import InvalidFileError
from candle_vllm.core.fields import Fields
from candle_vllm.core.loading.config import layer_windows, shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.models import llama
from candle_vllm.core.models.attention_names import gguf_has_bias
from candle_vllm.core.models.family import Architecture, Family
from candle_vllm.core.models.llama import Llama, LlamaConfig


def config_from_hf(fields: Fields, model_type: str) -> LlamaConfig:
    """Read `config.json` of smollm3."""
    fields.choice("hidden_act", "silu", "silu", "swish")
    shared = shared_from_hf(fields.with_absent(rope_theta=2e6), model_type)
    layers, bias = shared["num_layers"], fields.get("attention_bias", bool, False)
    unrotated = _unrotated(fields, layers)
    window = fields.get("sliding_window", int, None) if fields.get("use_sliding_window", bool, False) else None
    windows = tuple(window if layer in unrotated else None for layer in range(layers))
    return LlamaConfig(
        **shared
        | {
            "qkv_bias": bias,
            "output_bias": bias,
            "mlp_bias": fields.get("mlp_bias", bool, False),
            "tie_embeddings": fields.get("tie_word_embeddings", bool, True),
            "sliding_windows": layer_windows(fields, layers, window) or windows,
            "unrotated_layers": unrotated,
        }
    )


def _unrotated(fields: Fields, layers: int) -> frozenset[int]:
    """Layers with a 0 in `no_rope_layers` (1 means rotation); otherwise every `no_rope_layer_interval`-th layer."""
    if "no_rope_layers" not in fields:
        interval = fields.count("no_rope_layer_interval", 4)
        return frozenset(layer for layer in range(layers) if (layer + 1) % interval == 0)
    turns = fields.get("no_rope_layers", list)
    if len(turns) < layers or not all(turn in (0, 1) for turn in turns):
        raise InvalidFileError(
            f"{fields.path}: no_rope_layers is {turns!r:.80}; it must have a number for each of the {layers} layers: "
            "1 with rotary embedding, 0 without"
        )
    return frozenset(layer for layer in range(layers) if not turns[layer])


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> LlamaConfig:
    """Read GGUF metadata of smollm3, which does not store the unrotated layers: they are every fourth."""
    shared, tensors = shared_from_gguf(fields, checkpoint), checkpoint.tensors
    return LlamaConfig(
        **shared,
        qkv_bias=gguf_has_bias(checkpoint),
        output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
        unrotated_layers=frozenset(range(3, shared["num_layers"], 4)),
        interleaved_rotary=True,
    )


FAMILY = Family(
    hf={"SmolLM3ForCausalLM": "smollm3"},
    gguf=("smollm3",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Llama,
    weights=llama.WEIGHTS,
    ignored=llama.ignored,
    as_gguf={"smollm3": Architecture(name="smollm3", reordered=True)},
)
