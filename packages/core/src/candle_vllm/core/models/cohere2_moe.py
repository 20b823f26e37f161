# SPDX-License-Identifier: MIT
"""Cohere 2 with experts (North): the block of `cohere.py`, whose MLP is experts in all but the first layers.

Experts are scored by sigmoids, or by a softmax over the chosen ones. The result is the sum of the routed and the shared
experts, or half of it ("average"). The norm is a LayerNorm or an RMSNorm. Dense layers without a window may rotate.
Source: Cohere, 2026, the model card of North-Mini-Code-1.0.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.silu_mul import gated
from candle_vllm.core.layers.mlp import GatedMLP
from candle_vllm.core.layers.moe import SparseMLP
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.models import cohere, glm4_moe
from candle_vllm.core.models.attention_names import local_keys
from candle_vllm.core.models.cohere import Cohere
from candle_vllm.core.models.cohere2_moe_config import RMS_EPS, Cohere2MoeConfig, config_from_gguf, config_from_hf
from candle_vllm.core.models.experts import routed_names
from candle_vllm.core.models.family import LAYER_NORM_EPS, Architecture, Family
from candle_vllm.core.models.llama import times

# ---- block and model -------------------------------------------------------------------------------------------------


class HalvedMLP(GatedMLP):
    """Half of the shared expert's result for x [T, E]."""

    def __init__(self, hidden_size: int, intermediate_size: int, placement: Placement) -> None:
        super().__init__(hidden_size, intermediate_size, placement)
        self._sizes = (intermediate_size, intermediate_size)

    def __call__(self, x: Value) -> Value:
        gate, up = self.gate_up(x).split(self._sizes, dim=-1)
        return self.down(gated(times(up, 0.5), gate, self._activation))


class Block(cohere.Block):
    """One decoder layer."""

    def __init__(self, config: Cohere2MoeConfig, layer: int, rotary: Rotary, placement: Placement) -> None:
        super().__init__(config, layer, rotary, placement)
        if config.rms:
            self.norm = RMSNorm(config.hidden_size, config.norm_eps, placement)
        size, mixture = config.hidden_size, config.mixture
        if mixture is not None and layer in config.sparse_layers:
            scale = mixture.scale * (0.5 if config.average else 1)
            self.mlp = SparseMLP(size, dataclasses.replace(mixture, scale=scale), placement)
            if config.average:
                self.mlp.shared = HalvedMLP(size, mixture.shared_size, placement)


class Cohere2Moe(Cohere):
    """The decoder: token ids [T] -> hidden states [T, E] -> logits [T, V]."""

    block = Block

    def __init__(self, config: Cohere2MoeConfig, placement: Placement, checkpoint: Checkpoint) -> None:
        super().__init__(config, placement, checkpoint)
        if config.rms:
            self.norm = RMSNorm(config.hidden_size, config.norm_eps, placement)


# ---- weight names ----------------------------------------------------------------------------------------------------


def gguf_keys(config: Any) -> dict[str, Any]:
    """The GGUF metadata of this model in addition to the keys of every model."""
    if config.mixture.scoring != "sigmoid":
        raise UnsupportedModelError("llama.cpp's cohere2moe scores experts by sigmoids, and this model by a softmax")
    keys = glm4_moe.gguf_keys(config) | local_keys(config) | {"logit_scale": float(config.logit_scale)}
    shared = {"expert_shared_feed_forward_length": config.mixture.shared_size} if config.mixture.shared_size else {}
    plain = {"rope.scaling.type": "none"} if config.rope.kind == "default" else {}
    return keys | shared | plain | ({RMS_EPS: float(config.norm_eps)} if config.rms else {})


FAMILY = Family(
    hf={"Cohere2MoeForCausalLM": "cohere2_moe"},
    gguf=("cohere2moe",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Cohere2Moe,
    weights=[*cohere.FAMILY.weights, *routed_names()],
    ignored=glm4_moe.ignored,
    as_gguf={"cohere2_moe": Architecture(name="cohere2moe", more=gguf_keys, eps=LAYER_NORM_EPS, interleaved=True)},
)
