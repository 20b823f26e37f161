# SPDX-License-Identifier: MIT
"""Embeddings that each layer of a decoder gets of its own for every token (Gemma 3n, Gemma 4).

One table has a token's embeddings for all layers side by side, and stays in its file in recorded steps. What a
projection makes of the token's own embedding is added.
Source: Gemma Team, 2025, "Gemma 3n model overview" (per-layer embeddings).
Shapes: T tokens, E hidden, L layers, P numbers of an embedding.
"""

from __future__ import annotations

from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.side_by_side import side_by_side
from candle_vllm.core.kernels.silu_mul import gelu_tanh_mul
from candle_vllm.core.layers.embedding import Embedding, MappedTable
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models.attention_names import GG, HF


class LayerInputs:
    """Token ids [T] and their embeddings [T, E] -> [T, P] for each layer.

    The definition divides the sum by the root of 2; here `LayerGate` takes that factor out of it.

    Args:
        vocab_size, hidden_size, num_layers, size: V, E, L and P.
        eps: of the norm.
        scale: of the table's rows.
        placement: where the weights live.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        num_layers: int,
        size: int,
        *,
        eps: float,
        scale: float,
        placement: Placement,
    ) -> None:
        self.sizes = (size,) * num_layers
        shape = vocab_size, sum(self.sizes)
        mapped = placement.recorded
        self.table = MappedTable(*shape, scale) if mapped else Embedding(*shape, placement, scale=scale)
        self.projection = Linear(hidden_size, sum(self.sizes), placement)
        self.norm = RMSNorm(size, eps * hidden_size, placement)  # as of a projection over the root of E

    def __call__(self, token_ids: Value, x: Value) -> tuple[Value, ...]:
        projected = self.norm(self.projection(x).unflatten(-1, (-1, self.sizes[0]))).flatten(1)
        return tuple((projected + self.table(token_ids)).split(self.sizes, dim=-1))


class LayerGate:
    """norm(output(gelu(gate(x)) * given)): what a layer adds of its own embeddings, [T, E] of x [T, E] and [T, P]."""

    def __init__(self, hidden_size: int, size: int, eps: float, placement: Placement) -> None:
        self.gate = Linear(hidden_size, size, placement)
        self.output = Linear(size, hidden_size, placement)
        self.norm = RMSNorm(hidden_size, 2 * eps, placement)  # as of embeddings over the root of 2

    def __call__(self, x: Value, given: Value) -> Value:
        return self.norm(self.output(gelu_tanh_mul(side_by_side(self.gate(x), given))))


TABLES = ("model.embed_tokens_per_layer.weight", "per_layer_token_embd.weight")
"""Stored names of the table."""

WEIGHTS = [
    WeightName("inputs.table:weight", *TABLES),
    WeightName("inputs.projection:weight", "model.per_layer_model_projection.weight", "per_layer_model_proj.weight"),
    WeightName("inputs.norm:weight", "model.per_layer_projection_norm.weight", "per_layer_proj_norm.weight"),
    WeightName("layers.{i}.inputs.gate:weight", HF + "per_layer_input_gate.weight", GG + "inp_gate.weight"),
    WeightName("layers.{i}.inputs.output:weight", HF + "per_layer_projection.weight", GG + "proj.weight"),
    WeightName("layers.{i}.inputs.norm:weight", HF + "post_per_layer_input_norm.weight", GG + "post_norm.weight"),
]
"""Of a model's `inputs`, a `LayerInputs`, and of its layers' `inputs`, each a `LayerGate`."""
