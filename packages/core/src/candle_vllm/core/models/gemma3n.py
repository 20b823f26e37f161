# SPDX-License-Identifier: MIT
"""Gemma 3n: four residual streams, one of which is active (AltUp), and a low-rank path (LAuReL).

A layer predicts all streams from each other, computes the active one, and corrects all of them by the result. In the
first layers the feed-forward gate is sparse. Caches, per-layer embeddings and attention are those of Gemma 4.
Sources: Google, 2025, "Gemma 3n model overview"; Baykal et al., 2023, arXiv:2301.13310 (AltUp);
Menghani et al., 2024, arXiv:2411.07501 (LAuReL).
Shapes: T tokens, E hidden, N streams, R rank of LAuReL, P size of a layer's own embedding.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from candle_vllm.core.kernels.recorded import RecordedTokens, Value
from candle_vllm.core.kernels.side_by_side import side_by_side
from candle_vllm.core.kernels.stream_mix import mix_streams
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models import gemma, gemma4
from candle_vllm.core.models.attention_names import GG, HF
from candle_vllm.core.models.family import Architecture, Family
from candle_vllm.core.models.gemma3n_config import Gemma3nConfig, config_from_gguf, config_from_hf, gguf_keys, otherwise
from candle_vllm.core.models.gemma3n_parts import Projections, SparseGatedMLP, StreamNorm, StreamRouter, TableRows
from candle_vllm.core.models.gemma_parts import TABLES, LayerGate, LayerInputs
from candle_vllm.core.models.llama import times


class Block:
    """One decoder layer. Its input x [T, N * E] is the streams side by side, without a separate residual."""

    def __init__(self, config: Gemma3nConfig, layer: int, rotary: Rotary, placement: Placement) -> None:
        size, eps, self.layer = config.hidden_size, config.norm_eps, layer
        self.sizes, self.active = (size,) * config.streams, config.active
        self.stream_norm, self.router = StreamNorm(size, eps, placement), StreamRouter(config, placement)
        self.attention_norm, self.attention_post_norm = (RMSNorm(size, eps, placement) for _ in range(2))
        self.attention = gemma4.Attention(config, layer, rotary, placement)
        self.laurel_down, self.laurel_up = Linear(size, config.rank, placement), Linear(config.rank, size, placement)
        self.laurel_norm, self.mlp_norm, self.mlp_post_norm = (RMSNorm(size, eps, placement) for _ in range(3))
        self.mlp = SparseGatedMLP(size, config.intermediate_size, placement)
        self.mlp.deviations = config.deviations[layer]
        self.inputs = LayerGate(size, config.input_size, eps, placement)

    def __call__(self, x: Value, residual: Value | None, step: StepInput) -> tuple[Value, Value | None]:
        assert residual is None
        router = self.router
        gates = router(self.stream_norm(x.split(self.sizes, dim=-1)[self.active]))
        predicted = mix_streams(x, router.predict, gates, level=False)
        active = predicted.split(self.sizes, dim=-1)[self.active]
        normed = self.attention_norm(active)
        made = side_by_side(active) + normed + self.laurel_norm(self.laurel_up(self.laurel_down(normed)))
        made = made + self.attention_post_norm(self.attention(normed, step))
        made = times(made, 0.5**0.5)
        made = made + self.mlp_post_norm(self.mlp(self.mlp_norm(made)))
        gates = router(self.stream_norm(made))
        first = mix_streams(side_by_side(active, made), router.first, gates, router.scale, level=False)
        own = self.inputs(first, step.layer_inputs[self.layer])
        return mix_streams(side_by_side(predicted, made, own), router.correct, gates, level=False), None


class Gemma3n(gemma.Gemma):
    """The decoder: token ids [T] -> hidden states [T, E] -> logits [T, V]."""

    config: Gemma3nConfig

    def __init__(self, config: Gemma3nConfig, placement: Placement, checkpoint: Checkpoint) -> None:
        del checkpoint
        self.config, self.narrows, self.sizes = config, True, (config.hidden_size,) * config.streams
        size, cap, others = (config.vocab_size, config.hidden_size), config.final_softcap, config.streams - 1
        self.embed = Embedding(*size, placement, scale=config.embedding_scale, softcap=cap)
        self.enter, self.leave = (Projections(others, config.hidden_size, placement) for _ in range(2))
        self._apart = placement.constant(np.eye(config.streams, dtype=np.float32)[None])
        self._mean = placement.constant(np.full((1, 1, config.streams), 1 / config.streams, np.float32))
        shape, eps = (config.input_rows, config.hidden_size, config.num_layers, config.input_size), config.norm_eps
        self.inputs = LayerInputs(*shape, eps=eps, scale=config.input_scale, placement=placement)
        rotaries = self.make_rotaries(config, placement)
        self.layers = [Block(config, layer, rotary, placement) for layer, rotary in enumerate(rotaries)]
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, placement)
        self.head = None if config.tie_embeddings else Embedding(*size, placement, softcap=cap)

    def start(self, token_ids: Value, step: StepInput) -> Value:
        """See `DecoderStack.start`; the result is the streams side by side, [T, N * E]."""
        x = super().start(token_ids, step)
        return mix_streams(side_by_side(x, *self.enter([x] * len(self.enter.each))), self._apart, level=True)

    def begun(self, token_ids: Value, x: Value, step: StepInput) -> StepInput:
        """See `DecoderStack.begun`."""
        if not isinstance(token_ids, RecordedTokens):
            token_ids = token_ids.where(token_ids < self.config.input_rows, 0)
        return dataclasses.replace(step, layer_inputs=self.inputs(token_ids, x.split(self.sizes, dim=-1)[0]))

    def _normed(self, x: Value, residual: Value | None) -> Value:
        first, *others = x.split(self.sizes, dim=-1)
        return super()._normed(mix_streams(side_by_side(first, *self.leave(others)), self._mean, level=True), residual)


# ---- weight names ----------------------------------------------------------------------------------------------------

_LAYER = {
    "stream_norm:weight": ("altup.router_norm.weight", "altup_router_norm"),
    "router:weight": ("altup.modality_router.weight", "altup_router"),
    "router:predict": ("altup.prediction_coefs.weight", "altup_predict_coef"),
    "router:correct": ("altup.correction_coefs.weight", "altup_correct_coef"),
    "router:scale": ("altup.correct_output_scale", "altup_correct_scale"),
    "laurel_down:weight": ("laurel.linear_left.weight", "laurel_l"),
    "laurel_up:weight": ("laurel.linear_right.weight", "laurel_r"),
    "laurel_norm:weight": ("laurel.post_laurel_norm.weight", "laurel_post_norm"),
}
_ENDS = {"enter": ("altup_projections", "altup_proj"), "leave": ("altup_unembed_projections", "altup_unembd_proj")}
WEIGHTS = [
    *(line for line in gemma4.WEIGHTS if line.target != "inputs.table:weight"),
    WeightName("inputs.table:weight", *TABLES, gguf_view=TableRows()),
    *(WeightName(f"layers.{{i}}.{to}", HF + hf, f"{GG}{gguf}.weight") for to, (hf, gguf) in _LAYER.items()),
    *(
        WeightName(f"{to}:{n}.weight", f"model.{hf}.{n}.weight", None)
        for to, (hf, _) in _ENDS.items()
        for n in range(8)
    ),
    *(WeightName(f"{to}:weight", None, f"{gguf}.weight") for to, (_, gguf) in _ENDS.items()),
]


def ignored(config: Gemma3nConfig) -> list[str]:
    """Names of tensors that are not loaded: those of Gemma 4, and output scales if the config does not apply them."""
    return [*gemma4.ignored(config), *[r".*\.altup\.correct_output_scale"] * (not config.scales_output)]


FAMILY = Family(
    hf={"Gemma3nForCausalLM": "gemma3n_text"},
    gguf=("gemma3n",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Gemma3n,
    weights=WEIGHTS,
    ignored=ignored,
    as_gguf={"gemma3n_text": Architecture(name="gemma3n", more=gguf_keys, otherwise=otherwise)},
)
