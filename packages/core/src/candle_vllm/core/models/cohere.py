# SPDX-License-Identifier: MIT
"""Cohere's Command R, Aya and Command A: LayerNorm without bias, and a block whose two sublayers share one norm.

Each block is x + attention(norm(x)) + mlp(norm(x)); rotary pairs are interleaved; logits are scaled. Command R+
normalises each head of q and k with weights of its own. Three of four layers of Cohere 2 have a sliding window; the
others have no rotary embedding. Source: Cohere, 2025, arXiv:2504.00698. Shapes: see `llama.py`.
"""

from __future__ import annotations

import dataclasses
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.layer_norm import HeadLayerNorm, LayerNorm
from candle_vllm.core.layers.mlp import GatedMLP
from candle_vllm.core.layers.moe import SparseMLP
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.config import gguf_windows, shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import ColumnOrder
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models import llama
from candle_vllm.core.models.attention_names import gguf_has_bias, local_keys
from candle_vllm.core.models.family import LAYER_NORM_EPS, Architecture, Family
from candle_vllm.core.models.olmo2 import full_layers, windows_from_hf
from candle_vllm.core.models.stack import DecoderStack

_USUAL = MappingProxyType({
    "vocab_size": 256000, "hidden_size": 8192, "intermediate_size": 22528, "num_hidden_layers": 40,
    "num_attention_heads": 64, "max_position_embeddings": 8192, "layer_norm_eps": 1e-5,
})  # fmt: skip
"""Defaults of transformers for keys that a `text_config` leaves out."""

# ---- config ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class CohereConfig(llama.LlamaConfig):
    """Config of these models: the fields in addition to those of Llama.

    Attributes:
        head_norms: q and k are normalised per head, with weights [H, D] and [K, D], before rotation (Command R+).
    """

    head_norms: bool = False


def config_from_hf(fields: Fields, model_type: str) -> CohereConfig:
    """Read `config.json` of cohere and cohere2, and `text_config` of Aya Vision and Cohere 2 Vision."""
    if fields.prefix:
        fields = fields.with_absent(**_USUAL)
    fields.choice("hidden_act", "silu", "silu", "swish")
    if "model_max_length" in fields:  # Command R and R+: the other key has the length of training
        length = {f"{fields.prefix}max_position_embeddings": fields.count("model_max_length")}
        fields = Fields({**fields.values, **length}, fields.path, fields.prefix)
    local = model_type == "cohere2"
    shared = shared_from_hf(fields.with_absent(rope_theta=1e4 if local else 5e5), model_type, eps="layer_norm_eps")
    if local:
        shared["sliding_windows"] = windows_from_hf(fields.with_absent(sliding_window=4096), shared["num_layers"])
    shared["qkv_bias"] = shared["output_bias"] = fields.get("attention_bias", bool, False)
    shared["tie_embeddings"] = fields.get("tie_word_embeddings", bool, True)
    scale, head_norms = fields.get("logit_scale", float, 0.0625), fields.get("use_qk_norm", bool, False)
    return _config(shared, local, scale, head_norms and not local)


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> CohereConfig:
    """Read GGUF metadata of command-r and cohere2."""
    shared = shared_from_gguf(fields, checkpoint, eps="attention.layer_norm_epsilon")
    local = shared["model_type"] == "cohere2"
    if local:
        window = fields.count("attention.sliding_window")
        shared["sliding_windows"] = gguf_windows(fields, shared["num_layers"], window, period=4)
    shared["qkv_bias"] = gguf_has_bias(checkpoint)
    shared["output_bias"] = "blk.0.attn_output.bias" in checkpoint.tensors
    scale = fields.get("logit_scale", float, *([] if local else [1.0]))
    return _config(shared, local, scale, "blk.0.attn_q_norm.weight" in checkpoint.tensors)


def _config(shared: dict[str, Any], local: bool, scale: float, head_norms: bool) -> CohereConfig:
    shared["unrotated_layers"] = full_layers(shared["sliding_windows"], local)
    return CohereConfig(**shared, logit_scale=scale, head_norms=head_norms, interleaved_rotary=True)


# ---- block and model -------------------------------------------------------------------------------------------------


class Block:
    """One decoder layer. Its input [T, E] is x + residual, added in its norm; residual is None in layer 0."""

    def __init__(self, config: CohereConfig, layer: int, rotary: Rotary, placement: Placement) -> None:
        self.norm: LayerNorm | RMSNorm = LayerNorm(config.hidden_size, config.norm_eps, placement, bias=False)
        self.attention = llama.Attention(config, layer, rotary, placement)
        if config.head_norms:
            counts, attend = (config.num_heads, config.num_kv_heads), self.attention.attend
            norms = [HeadLayerNorm(count, config.head_dim, config.norm_eps, placement) for count in counts]
            self.attention.q_norm, self.attention.k_norm = attend.q_norm, attend.k_norm = norms
        self.mlp: GatedMLP | SparseMLP = GatedMLP(config.hidden_size, config.intermediate_size, placement)

    def __call__(self, x: Value, residual: Value | None, step: StepInput) -> tuple[Value, Value]:
        normed, residual = self.norm.add(x, residual)
        return self.mlp(normed), residual + self.attention(normed, step)


class Cohere(DecoderStack):
    """The decoder: token ids [T] -> hidden states [T, E] -> logits [T, V]. `block` is the class of its layers."""

    block: ClassVar[type[Block]] = Block

    def __init__(self, config: CohereConfig, placement: Placement, checkpoint: Checkpoint) -> None:
        del checkpoint
        self.config, size, scale = config, (config.vocab_size, config.hidden_size), config.logit_scale
        self.embed = Embedding(*size, placement, logit_scale=scale)
        self.rotary = Rotary(config.rope, config.max_position, placement)
        self.layers = [self.block(config, layer, self.rotary, placement) for layer in range(config.num_layers)]
        self.norm = LayerNorm(config.hidden_size, config.norm_eps, placement, bias=False)
        self.head = None if config.tie_embeddings else Embedding(*size, placement, logit_scale=scale)


# ---- weight names ----------------------------------------------------------------------------------------------------

_TO = "layers.{i}."


def _half_split(config: CohereConfig) -> np.ndarray:
    """The position of each element of a head after `half_split`, which reorders the rows of q and k."""
    turned = config.rope.dim
    return np.argsort([*range(0, turned, 2), *range(1, turned, 2), *range(turned, config.head_dim)])


def _own(line: WeightName) -> WeightName:
    """A row of Llama's table with this block's target and view."""
    if line.target.startswith((_TO + "attention.q_norm", _TO + "attention.k_norm")):
        return dataclasses.replace(line, hf_view=ColumnOrder(_half_split), gguf_view=ColumnOrder(_half_split))
    return dataclasses.replace(line, target=line.target.replace(".attention_norm:", ".norm:"))


def gguf_keys(config: Any) -> dict[str, Any]:
    """GGUF metadata; llama.cpp uses the embedding table as head, and QK norms only in models of 64 layers or more."""
    if not config.tie_embeddings:
        raise UnsupportedModelError("llama.cpp's command-r and cohere2 have no head beside the embedding table")
    if config.model_type == "cohere" and config.head_norms != (config.num_layers >= 64):
        raise UnsupportedModelError("llama.cpp's command-r has norms of q and k only in models of 64 layers or more")
    plain: dict[str, Any] = {"rope.scaling.type": "none"} if config.rope.kind == "default" else {}
    return plain | {"logit_scale": float(config.logit_scale)} | local_keys(config)


FAMILY = Family(
    hf={"CohereForCausalLM": "cohere", "Cohere2ForCausalLM": "cohere2"},
    gguf=("command-r", "cohere2"),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Cohere,
    weights=[_own(line) for line in llama.WEIGHTS if line.target != _TO + "mlp_norm:weight"],
    ignored=llama.ignored,
    as_gguf={
        "cohere": Architecture(name="command-r", more=gguf_keys, eps=LAYER_NORM_EPS, interleaved=True, square=True),
        "cohere2": Architecture(name="cohere2", more=gguf_keys, eps=LAYER_NORM_EPS, interleaved=True, square=True),
    },
)
