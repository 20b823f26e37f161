# SPDX-License-Identifier: MIT
"""Phi-3, Phi-3.5 and Phi-4: Llama's layers (`llama.py`) with fused matrices and long-rope.

q, k and v are stored as one matrix, gate and up as another; Phi-4-mini rotates a part of each head. Models of 128k
tokens divide their frequencies by one of two sets of factors, for short and for long contexts; the context that is
served decides (`layers/rotary.py`). In GGUF files the sets are tensors.
Source: Abdin et al., 2024, arXiv:2404.14219; long-rope, Ding et al., 2024, arXiv:2402.13753.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.loading.config import shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.rope import RopeConfig, attention_scale
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import qkv_rows, row_part
from candle_vllm.core.loading.weights import Seen, WeightName
from candle_vllm.core.models import llama
from candle_vllm.core.models.attention_names import GG, HF, window_keys
from candle_vllm.core.models.family import Architecture, Family
from candle_vllm.core.models.llama import Llama, LlamaConfig

_SHORT, _LONG = "rope_factors_short.weight", "rope_factors_long.weight"

# ---- config ----------------------------------------------------------------------------------------------------------


def config_from_hf(fields: Fields, model_type: str) -> LlamaConfig:
    """Read `config.json` of phi3, whose default original context is 4096 tokens."""
    fields.choice("hidden_act", "silu", "silu", "swish")
    shared = shared_from_hf(fields.with_absent(original_max_position_embeddings=4096), model_type)
    kind = shared["rope"].kind
    if kind not in ("default", "longrope"):
        raise UnsupportedModelError(f"{fields.path}: rope_type is {kind!r}; Phi-3 has default, longrope or su")
    window = fields.get("sliding_window", int, None)
    return LlamaConfig(**shared | {"sliding_windows": (window,) * shared["num_layers"]})


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> LlamaConfig:
    """Read GGUF metadata of phi3."""
    shared = shared_from_gguf(fields, checkpoint)
    position, layers = shared["max_position"], shared["num_layers"]
    if "attention.sliding_window" not in fields and position == 4096 and layers in (32, 40):
        shared["sliding_windows"] = (2047,) * layers  # old files of Phi-3-4k do not have the key
    shared["rope"] = with_divisors(fields, checkpoint, shared["rope"], position)
    return LlamaConfig(**shared)


def with_divisors(fields: Fields, checkpoint: Checkpoint, rope: RopeConfig, position: int) -> RopeConfig:
    """Add long-rope's factors to the rotary settings, if the file has tensors of them."""
    if _LONG not in checkpoint.tensors and _SHORT not in checkpoint.tensors:
        return rope
    return dataclasses.replace(
        rope,
        kind="longrope",
        factor=max(1.0, position / rope.original_max_position),
        attention_factor=fields.get("rope.scaling.attn_factor", float, None),
        short_factor=_divisors(checkpoint, _SHORT, rope.dim),
        long_factor=_divisors(checkpoint, _LONG, rope.dim),
    )


def _divisors(checkpoint: Checkpoint, name: str, dim: int) -> tuple[float, ...]:
    stored = checkpoint.tensors.get(name)
    if stored is None:
        raise InvalidFileError(f"{checkpoint.path}: tensor {name} is missing; long-rope has {_SHORT} and {_LONG}")
    if stored.shape != (dim // 2,):
        raise InvalidFileError(
            f"{checkpoint.path}: tensor {name} has shape {list(stored.shape)}; {dim} rotary dimensions ask for "
            f"{[dim // 2]}"
        )
    return tuple(stored.load().tolist())


# ---- weight names ----------------------------------------------------------------------------------------------------

WEIGHTS = [
    WeightName("embed:weight", "model.embed_tokens.weight", "token_embd.weight"),
    WeightName("layers.{i}.attention_norm:weight", HF + "input_layernorm.weight", GG + "attn_norm.weight"),
    *[
        WeightName(
            f"layers.{{i}}.attention.qkv:{part}.weight",
            HF + "self_attn.qkv_proj.weight",
            (f"{GG}attn_{part}.weight", Seen(GG + "attn_qkv.weight", qkv_rows(part))),
            qkv_rows(part),
        )
        for part in "qkv"
    ],
    WeightName("layers.{i}.attention.output:weight", HF + "self_attn.o_proj.weight", GG + "attn_output.weight"),
    WeightName("layers.{i}.mlp_norm:weight", HF + "post_attention_layernorm.weight", GG + "ffn_norm.weight"),
    *[
        WeightName(
            f"layers.{{i}}.mlp.gate_up:{part}.weight",
            HF + "mlp.gate_up_proj.weight",
            GG + "ffn_up.weight",
            row_part(index, 2),
            row_part(index, 2),
        )
        for index, part in enumerate(("gate", "up"))
    ],
    WeightName("layers.{i}.mlp.down:weight", HF + "mlp.down_proj.weight", GG + "ffn_down.weight"),
    WeightName("norm:weight", "model.norm.weight", "output_norm.weight"),
    WeightName("head:weight", "lm_head.weight", "output.weight"),
]


def ignored(config: LlamaConfig) -> list[str]:
    """Names that Llama ignores, and long-rope's factors, which are in the config."""
    return [*llama.ignored(config), r"rope_factors_(short|long)\.weight"]


def gguf_keys(config: Any) -> dict[str, Any]:
    """The GGUF metadata; the window's key is always written: llama.cpp may take a file without it for an old one."""
    keys: dict[str, Any] = {"attention.sliding_window": 0} | window_keys(config)
    keys["rope.scaling.original_context_length"] = config.rope.original_max_position
    if config.rope.kind == "longrope":
        keys["rope.scaling.attn_factor"] = attention_scale(config.rope)
    return keys


FAMILY = Family(
    hf={"Phi3ForCausalLM": "phi3"},
    gguf=("phi3",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Llama,
    weights=WEIGHTS,
    ignored=ignored,
    as_gguf={"phi3": Architecture(name="phi3", more=gguf_keys, names=lambda _: ("attn_qkv",), square=True)},
)
