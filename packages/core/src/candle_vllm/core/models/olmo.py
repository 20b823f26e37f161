# SPDX-License-Identifier: MIT
"""OLMo 1: Llama's layers (`llama.py`) with LayerNorm without weight and bias, and an optional clip of q, k and v.

Source: Groeneveld et al., 2024, arXiv:2402.00838. Shapes: see `llama.py`.
"""

from __future__ import annotations

from typing import Any

from candle_vllm.core.fields import Fields
from candle_vllm.core.layers.layer_norm import LayerNorm
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.config import shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.models import llama
from candle_vllm.core.models.family import LAYER_NORM_EPS, Architecture, Family
from candle_vllm.core.models.llama import Llama, LlamaConfig

# ---- config ----------------------------------------------------------------------------------------------------------

_EPS = 1e-5  # config.json does not have it


def config_from_hf(fields: Fields, model_type: str) -> LlamaConfig:
    """Read `config.json` of olmo."""
    fields.choice("hidden_act", "silu", "silu", "swish")
    shared = shared_from_hf(fields.with_absent(rms_norm_eps=_EPS), model_type)
    bias = fields.get("attention_bias", bool, False)
    own: dict[str, Any] = {"norm_eps": _EPS, "qkv_clip": fields.get("clip_qkv", float, None)}
    return LlamaConfig(**shared | own, qkv_bias=bias, output_bias=bias)


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> LlamaConfig:
    """Read GGUF metadata of olmo; a clip of 0 means no clip, as in llama.cpp."""
    shared = shared_from_gguf(fields, checkpoint, eps=LAYER_NORM_EPS)
    clip = fields.get("attention.clamp_kqv", float, None)
    return LlamaConfig(**shared, qkv_clip=clip or None, interleaved_rotary=True)


# ---- block and model -------------------------------------------------------------------------------------------------


class Block(llama.Block):
    """One decoder layer."""

    def __init__(self, config: LlamaConfig, layer: int, rotary: Rotary, placement: Placement) -> None:
        super().__init__(config, layer, rotary, placement)
        self.attention_norm, self.mlp_norm = (_norm(config, placement) for _ in range(2))


class Olmo(Llama):
    """The decoder: token ids [T] -> hidden states [T, E] -> logits [T, V]."""

    block = Block

    def __init__(self, config: LlamaConfig, placement: Placement, checkpoint: Checkpoint) -> None:
        super().__init__(config, placement, checkpoint)
        self.norm = _norm(config, placement)


def _norm(config: LlamaConfig, placement: Placement) -> LayerNorm:
    return LayerNorm(config.hidden_size, config.norm_eps, placement, weighted=False, bias=False)


# ---- weight names ----------------------------------------------------------------------------------------------------

_NORMS = ("layers.{i}.attention_norm:weight", "layers.{i}.mlp_norm:weight", "norm:weight")


def gguf_keys(config: Any) -> dict[str, Any]:
    """The GGUF key of the clip, if the model has one."""
    return {} if config.qkv_clip is None else {"attention.clamp_kqv": float(config.qkv_clip)}


FAMILY = Family(
    hf={"OlmoForCausalLM": "olmo"},
    gguf=("olmo",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Olmo,
    weights=[line for line in llama.WEIGHTS if line.target not in _NORMS],
    ignored=llama.ignored,
    as_gguf={"olmo": Architecture(name="olmo", more=gguf_keys, eps=LAYER_NORM_EPS, reordered=True, square=True)},
)
