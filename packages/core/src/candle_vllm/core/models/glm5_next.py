# SPDX-License-Identifier: MIT
"""GLM-5.3-Flash: Kimi delta attention and sparse latent attention between several residual streams, with experts.

Layers are those of Kimi Linear (`kimi_linear.py`), with a lower bound of decays, pooled index keys
(`pooled_index.py`) and a clamped SwiGLU. Each sublayer reads and writes the streams by a hyper-connection
(`models/residual_streams.py`); the last norm reads their mean. Nothing rotates. Its vision encoder
is in `glm5_next_tower.py`.
Source: transformers' `Glm5NextTextModel`. Shapes: T tokens, N streams, E hidden.
"""

from __future__ import annotations

import dataclasses

from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.mlp import GatedMLP
from candle_vllm.core.layers.moe import SparseMLP
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models import deepseek, kimi_linear, pooled_index
from candle_vllm.core.models.attention_names import GG, HF
from candle_vllm.core.models.family import Family
from candle_vllm.core.models.glm5_next_config import Glm5NextConfig, config_from_gguf, config_from_hf, gguf_keys
from candle_vllm.core.models.kimi_linear import GGUF as KIMI_GGUF
from candle_vllm.core.models.llama import Mixer
from candle_vllm.core.models.pooled_index import PooledIndex
from candle_vllm.core.models.residual_streams import HyperConnection, StreamCopies

# ---- attention -------------------------------------------------------------------------------------------------------


class DeltaAttention(kimi_linear.KimiDeltaAttention):
    """Kimi delta attention whose decays have a lower bound: x [T, E] -> [T, E]."""

    def __init__(self, layer: int, config: Glm5NextConfig, placement: Placement) -> None:
        super().__init__(layer, config, placement)
        self.gates = self.gates._replace(least=config.decay_bound)


class Attention(deepseek.Attention):
    """Latent attention to positions that are chosen in groups: x [T, E] -> [T, E]."""

    indexer = PooledIndex


# ---- block and model -------------------------------------------------------------------------------------------------


class Block:
    """One decoder layer: streams [T, N * E] -> [T, N * E], without a separate residual; layer 0 reads x [T, E]."""

    def __init__(self, config: Glm5NextConfig, layer: int, rotary: Rotary, placement: Placement) -> None:
        size, eps, streams = config.hidden_size, config.norm_eps, config.streams
        self.copies = None if layer else StreamCopies(streams.count, placement)
        self.attention_streams, self.mlp_streams = (HyperConnection(streams, placement) for _ in range(2))
        self.attention_norm, self.mlp_norm = RMSNorm(size, eps, placement), RMSNorm(size, eps, placement)
        self.attention: Mixer
        if layer in config.delta_layers:
            self.attention = DeltaAttention(layer, config, placement)
        else:
            self.attention = Attention(config, layer, rotary, placement)
        self.mlp: GatedMLP | SparseMLP
        if config.mixture is None or layer < config.dense_layers:
            self.mlp = GatedMLP(size, config.intermediate_size, placement, activation="silu_10")
        else:
            self.mlp = SparseMLP(size, config.mixture, placement)

    def __call__(self, x: Value, residual: Value | None, step: StepInput) -> tuple[Value, None]:
        assert residual is None
        x = x if self.copies is None else self.copies(x)
        read, weights = self.attention_streams(x)
        x = self.attention_streams.write(x, self.attention(self.attention_norm(read), step), weights)
        read, weights = self.mlp_streams(x)
        return self.mlp_streams.write(x, self.mlp(self.mlp_norm(read)), weights), None


class Glm5Next(deepseek.Deepseek):
    """The decoder: token ids [T] -> hidden states [T, E] -> logits [T, vocabulary]."""

    block = Block

    def __init__(self, config: Glm5NextConfig, placement: Placement) -> None:
        super().__init__(config, placement)
        self.streams = StreamCopies(config.streams.count, placement)

    def _normed(self, x: Value, residual: Value | None) -> Value:
        return super()._normed(self.streams.mean(x), residual)


# ---- weight names ----------------------------------------------------------------------------------------------------


def _streams(sublayer: str, name: str) -> list[WeightName]:
    """The table rows of a hyper-connection; `name` is the sublayer's in stored names."""
    return [
        WeightName(
            f"layers.{{i}}.{sublayer}_streams{to}",
            (f"{HF}hc_{name}_{part}", f"{HF}{name}_hc.{part}"),
            f"{GG}hc_{name}_{part}.weight",
        )
        for to, part in ((".fn:weight", "fn"), (":base", "base"), (":scale", "scale"))
    ]


WEIGHTS = [
    *(line for line in kimi_linear.WEIGHTS if ".attention.index." not in line.target),
    *pooled_index.WEIGHTS,
    *_streams("attention", "attn"),
    *_streams("mlp", "ffn"),
]


FAMILY = Family(
    hf={"Glm5NextForCausalLM": "glm5_next_text"},
    gguf=("glm5-next",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=lambda config, placement, _: Glm5Next(config, placement),
    weights=WEIGHTS,
    ignored=deepseek.ignored,
    as_gguf={"glm5_next_text": dataclasses.replace(KIMI_GGUF, name="glm5-next", more=gguf_keys, norm=None)},
)
