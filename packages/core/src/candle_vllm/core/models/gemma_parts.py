# SPDX-License-Identifier: MIT
"""Parts of layers in Gemma 3n and 4: per-layer embeddings, a scale of a layer's output, a router's norm.

One table has a token's embeddings for all layers side by side; in recorded steps it is read from its file. A projection
of the token's ordinary embedding is added to them.
Source: Gemma Team, 2025, "Gemma 3n model overview" (per-layer embeddings).
Shapes: T tokens, V rows of the table, E hidden, L layers, P elements of a per-layer embedding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.kernels.recorded import RecordedTokens, Value
from candle_vllm.core.kernels.side_by_side import side_by_side
from candle_vllm.core.kernels.silu_mul import gate_mul
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement, TensorParameter, on_host
from candle_vllm.core.loading.views import Constant, entry
from candle_vllm.core.loading.weights import Parameter, WeightName
from candle_vllm.core.models.attention_names import GG, HF
from candle_vllm.core.models.llama import times
from candle_vllm.core.quantization.tensors import StoredTensor


class MappedTable:
    """Rows [T, L * P] of a table [V, L * P] for token ids [T] in recorded steps; the table stays in its file.

    The rows of a step's tokens are read and decoded before the step runs, so only these are in memory. This object is
    its own parameter "weight".

    Args:
        vocab_size, size: V and L * P.
        scale: factor of the rows.
    """

    sections = 1

    def __init__(self, vocab_size: int, size: int, scale: float) -> None:
        self.shape, self._scale = (vocab_size, size), np.float32(scale)

    def fill(self, stored: StoredTensor) -> str | None:
        """Keep the tensor's part of the file mapped."""
        kind, size = stored.type_name, stored.nbytes
        self._stored = Constant(stored.name, stored.shape, kind, size, stored.path, stored.raw())
        return None

    def rows(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows [T, L * P] for token ids [T]; row 0 for tokens without a row."""
        return self._stored.select(np.where(token_ids < self.shape[0], token_ids, 0)).load("F32") * self._scale

    def __call__(self, token_ids: RecordedTokens) -> Value:
        return token_ids.looked_up(self.rows, self.shape[1])

    def parameters(self) -> Mapping[str, Parameter]:
        """The table."""
        return {"weight": self}


class LayerInputs:
    """Token ids [T] and their embeddings [T, E] -> [T, P] for each layer.

    The model's definition divides the sum by the root of 2; here the epsilon of `LayerGate` accounts for that factor.

    Args:
        vocab_size, hidden_size, num_layers, size: V, E, L and P.
        eps: epsilon of the norm.
        scale: factor of the table's rows.
        placement: device and types of the weights.
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
        self.norm = RMSNorm(size, eps * hidden_size, placement)  # its input is not divided by the root of E

    def __call__(self, token_ids: Value, x: Value) -> tuple[Value, ...]:
        projected = self.norm(self.projection(x).unflatten(-1, (-1, self.sizes[0]))).flatten(1)
        return tuple((projected + self.table(token_ids)).split(self.sizes, dim=-1))


class LayerGate:
    """norm(output(gelu(gate(x)) * given)): the update [T, E] by a layer's embeddings `given` [T, P], for x [T, E]."""

    def __init__(self, hidden_size: int, size: int, eps: float, placement: Placement) -> None:
        self.gate = Linear(hidden_size, size, placement)
        self.output = Linear(size, hidden_size, placement)
        self.norm = RMSNorm(hidden_size, 2 * eps, placement)  # its input is not divided by the root of 2

    def __call__(self, x: Value, given: Value) -> Value:
        return self.norm(self.output(gate_mul(side_by_side(self.gate(x), given), "gelu_tanh")))


class LayerScale:
    """Multiplies a layer's output by a stored scalar, the parameter "factor" [1]; recorded steps do so in place."""

    def __init__(self, placement: Placement) -> None:
        self._stored, self._factor = placement.empty(1), 1.0

    def __call__(self, x: Value) -> Value:
        return times(x, self._factor)

    def finish(self) -> None:
        """See `Finishes`."""
        self._factor = float(on_host(self._stored)[0])

    def parameters(self) -> Mapping[str, Parameter]:
        """Every parameter that must be loaded."""
        return {"factor": TensorParameter(self._stored)}


class RouterNorm(RMSNorm):
    """The norm of a router's input; its result is divided by the root of E."""

    def finish(self) -> None:
        """See `Finishes`."""
        self.weight *= len(self.weight) ** -0.5


class PartsOfOne:
    """A parameter for a stored tensor [n, ...] whose entries fill n other parameters."""

    sections = 1

    def __init__(self, parts: Sequence[Parameter]) -> None:
        self._parts, self.shape = parts, (len(parts), *parts[0].shape)

    def fill(self, stored: StoredTensor) -> str | None:
        """Fill all parts."""
        reasons = [part.fill(entry(stored, number)) for number, part in enumerate(self._parts)]
        return next((why for why in reasons if why is not None), None)


def renamed(lines: Sequence[WeightName], part: str, new: str) -> list[WeightName]:
    """The rows of a table whose targets contain `part`, with `new` instead of it."""
    return [dataclasses.replace(each, target=each.target.replace(part, new)) for each in lines if part in each.target]


TABLES = ("model.embed_tokens_per_layer.weight", "per_layer_token_embd.weight")
"""Stored names of the table of per-layer embeddings."""

WEIGHTS = [
    WeightName("inputs.table:weight", *TABLES),
    WeightName("inputs.projection:weight", "model.per_layer_model_projection.weight", "per_layer_model_proj.weight"),
    WeightName("inputs.norm:weight", "model.per_layer_projection_norm.weight", "per_layer_proj_norm.weight"),
    WeightName("layers.{i}.inputs.gate:weight", HF + "per_layer_input_gate.weight", GG + "inp_gate.weight"),
    WeightName("layers.{i}.inputs.output:weight", HF + "per_layer_projection.weight", GG + "proj.weight"),
    WeightName("layers.{i}.scale:factor", HF + "layer_scalar", GG + "layer_output_scale.weight"),
    WeightName("layers.{i}.router_norm:weight", HF + "router.scale", GG + "ffn_gate_inp.scale"),
    WeightName("layers.{i}.inputs.norm:weight", HF + "post_per_layer_input_norm.weight", GG + "post_norm.weight"),
]
"""Names of a model's `inputs` (a `LayerInputs`) and of its layers' `inputs`, `scale` and `router_norm`."""
