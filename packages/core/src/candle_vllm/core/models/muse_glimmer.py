# SPDX-License-Identifier: MIT
"""Muse Glimmer: Llama's layers (`llama.py`) with a sigmoid gate on attention's output, and four norms in a block.

Queries and keys have norms without a weight; scores have a factor. Three of four layers have a window, the others no
rotary embedding. The embedding is normalised; logits are scaled and have a softcap. Source: Meta, 2026, the model card.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.side_by_side import side_by_side
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.config import gguf_windows, shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import plus_one
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models import afmoe, gemma_config, llama
from candle_vllm.core.models.attention_names import GG, HF, also_named
from candle_vllm.core.models.family import Architecture, Family
from candle_vllm.core.models.llama import Attention, Llama, LlamaConfig
from candle_vllm.core.models.local_layers import local_layers
from candle_vllm.core.models.olmo2 import full_layers

# ---- config ----------------------------------------------------------------------------------------------------------

# fmt: off
_USUAL = {  # defaults of transformers' config class, which published configs leave out
    "vocab_size": 202048, "hidden_size": 6656, "intermediate_size": 19968, "num_hidden_layers": 52, "head_dim": 128,
    "num_attention_heads": 32, "num_key_value_heads": 2, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "sliding_window": 2048,
}
# fmt: on


@dataclasses.dataclass(frozen=True, kw_only=True)
class MuseGlimmerConfig(LlamaConfig):
    """Config of Llama, the logits' softcap, and the epsilon of norms after attention and MLP.

    `query_norm` is the factor of scores besides D^-0.5; GGUF files have it as the weight of the query norms.
    """

    final_softcap: float
    post_norm_eps: float
    query_norm: float


def config_from_hf(fields: Fields, model_type: str) -> MuseGlimmerConfig:
    """Read `config.json` of muse_glimmer_text."""
    usual = {fields.prefix + key: value for key, value in _USUAL.items()}
    fields = Fields(usual | dict(fields.values), fields.path, fields.prefix)
    fields.choice("hidden_activation", "silu", "silu")
    shared, own = shared_from_hf(fields, model_type), {"logit_scale": fields.get("output_multiplier", float, 26**-0.5)}
    last = shared["num_layers"] - 1
    own |= local_layers(fields, last + 1, shared["rope"], first=last, full_rotates=False)
    scale, cap = fields.get("qk_scale_factor", float, 3.87), fields.get("final_logit_softcapping", float, 20.0)
    return _muse(shared | own, scale, cap, fields.get("post_norm_eps", float, 1e-8))


def _muse(shared: dict[str, Any], scale: float, cap: float, eps: float = 1e-8) -> MuseGlimmerConfig:
    own: dict[str, Any] = {"attention_scale": scale * shared["head_dim"] ** -0.5, "gate": "sigmoid", "wide_gate": True}
    return MuseGlimmerConfig(**shared | own, query_norm=scale, final_softcap=cap, post_norm_eps=eps)


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> MuseGlimmerConfig:
    """Read GGUF metadata of muse-glimmer, where the weight of the query norms is the factor of the scores."""
    shared, norm = shared_from_gguf(fields, checkpoint), checkpoint.tensors.get("blk.0.attn_q_norm.weight")
    windows = gguf_windows(fields, shared["num_layers"], fields.count("attention.sliding_window"), period=4)
    if norm is None or (factors := norm.load()).max() != factors.min():
        raise UnsupportedModelError(f"{fields.path}: blk.0.attn_q_norm.weight is missing or has several values")
    own: dict[str, Any] = {"model_type": "muse_glimmer_text", "sliding_windows": windows, "interleaved_rotary": True}
    own |= {"unrotated_layers": full_layers(windows, local=True), "logit_scale": fields.get("logit_scale", float)}
    return _muse(shared | own, float(factors[0]), fields.get("final_logit_softcapping", float, 20.0))


# ---- block and model -------------------------------------------------------------------------------------------------


class Block(afmoe.Block):
    """One decoder layer."""

    def __init__(self, config: MuseGlimmerConfig, layer: int, rotary: Rotary, placement: Placement) -> None:
        super().__init__(config, layer, rotary, placement)
        self.attention_post_norm.eps = self.mlp_post_norm.eps = config.post_norm_eps
        assert isinstance(self.attention, Attention)
        attend = self.attention.attend
        attend.q_norm = attend.k_norm = RMSNorm(config.head_dim, config.norm_eps, placement, weighted=False)


class MuseGlimmer(Llama):
    """The decoder: token ids [T] -> hidden states [T, E] -> logits [T, V]."""

    block = Block

    def __init__(self, config: MuseGlimmerConfig, placement: Placement, checkpoint: Checkpoint) -> None:
        super().__init__(config, placement, checkpoint)
        self.embed_norm = RMSNorm(config.hidden_size, config.norm_eps, placement, weighted=False)
        self.scoring.softcap = config.final_softcap

    def start(self, token_ids: Value, step: StepInput) -> Value:
        """See `DecoderStack.start`."""
        del step
        return side_by_side(self.embed_norm(self.embed(token_ids)))


# ---- weight names ----------------------------------------------------------------------------------------------------

_NORMS = {
    "layers.{i}.attention_norm:weight": ("input_layernorm", "attn_norm"),
    "layers.{i}.attention_post_norm:weight": ("post_attention_layernorm", "post_attention_norm"),
    "layers.{i}.mlp_norm:weight": ("pre_feedforward_layernorm", "ffn_norm"),
    "layers.{i}.mlp_post_norm:weight": ("post_feedforward_layernorm", "post_ffw_norm"),
}
_LINES = also_named(llama.WEIGHTS, {"attention.gate:weight": HF + "self_attn.gate_proj.weight"})
WEIGHTS = [
    *(line for line in _LINES if line.target not in _NORMS),
    *(WeightName(to, f"{HF}{hf}.weight", f"{GG}{gguf}.weight", plus_one) for to, (hf, gguf) in _NORMS.items()),
]


def ignored(config: MuseGlimmerConfig) -> list[str]:
    """Names that Llama ignores, and GGUF's QK norms: the config has their weight, which is a single factor."""
    return [*llama.ignored(config), r"blk\.\d+\.attn_[qk]_norm\.weight"]


def gguf_keys(config: MuseGlimmerConfig) -> dict[str, Any]:
    """The GGUF metadata of a Muse Glimmer in addition to the keys of every model."""
    return gemma_config.gemma3_keys(config) | {"logit_scale": float(config.logit_scale)}


FAMILY = Family(
    hf={"MuseGlimmerForCausalLM": "muse_glimmer_text"},
    gguf=("muse-glimmer",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=MuseGlimmer,
    weights=WEIGHTS,
    ignored=ignored,
    as_gguf={"muse_glimmer_text": Architecture(name="muse-glimmer", more=gguf_keys, reordered=True, head=True)},
)
