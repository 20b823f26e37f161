# SPDX-License-Identifier: MIT
"""Parts of Gemma 3n's layers: the mixing of residual streams, a sparse gate, and views of their stored forms.

Shapes: T tokens, E hidden, N streams.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from candle_vllm.core.kernels.plain_linear import PlainKind
from candle_vllm.core.kernels.recorded import Recorded, Value
from candle_vllm.core.kernels.scale_cap import cut_
from candle_vllm.core.kernels.silu_mul import gate_mul
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.mlp import GatedMLP
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement, TensorParameter, on_host
from candle_vllm.core.loading.weights import Parameter
from candle_vllm.core.models.gemma3n_config import Gemma3nConfig
from candle_vllm.core.models.gemma_parts import PartsOfOne
from candle_vllm.core.quantization.tensors import StoredTensor


class StreamNorm(RMSNorm):
    """The norm of a router's input; its result is divided by E."""

    def finish(self) -> None:
        """See `Finishes`."""
        self.weight /= len(self.weight)


class StreamRouter:
    """Gates [T, N] of a stream x [T, E], before tanh, and the tables to mix streams by them; see `kernels/stream_mix`.

    Attributes:
        predict: [1 + N, N, N], predicts all streams from each other.
        first: [1 + N, 1, 2], corrects the active stream by its prediction and the layer's result.
        correct: [1 + N, N, N + 2], corrects all streams by their predictions, the result and the per-layer embedding.
        scale: [E], scale of the active stream before it gates the per-layer embedding; None for 1.
    """

    def __init__(self, config: Gemma3nConfig, placement: Placement) -> None:
        exact = dataclasses.replace(placement, dtype="F32", plain_kind=PlainKind.F32, keeps_quantised=False)
        count, self._active, self._constant = config.streams, config.active, placement.constant
        self.scores = Linear(config.hidden_size, count, exact, kept=False)
        self._predict, self._correct = placement.empty(count**2, count), placement.empty(count, count)
        self.scale = placement.empty(config.hidden_size) if config.scales_output else None

    def __call__(self, x: Value) -> Value:
        return self.scores(x if isinstance(x, Recorded) else x.float())

    def finish(self) -> None:
        """See `Finishes`."""
        self.scores.finish()
        predict, correct, active = on_host(self._predict), on_host(self._correct), self._active
        count = len(correct)
        streams = np.eye(count, dtype=np.float32)
        self.predict = self._constant(np.concatenate([streams[None], predict.T.reshape(count, count, count)]))
        table = np.zeros((1 + count, count, count + 2), np.float32)
        table[1:, :, count], table[0, :, count] = correct.T, 1  # share of the new result for each stream
        table[:, :, active] = -table[:, :, count]
        table[0, :, :count] += streams
        table[0, 1:, count + 1] = 1
        self.correct = self._constant(table)
        self.first = self._constant(np.ascontiguousarray(table[:, active : active + 1, [active, count]]))

    def parameters(self) -> Mapping[str, Parameter]:
        """Every parameter that must be loaded."""
        own = {"predict": self._predict, "correct": self._correct, "scale": self.scale}
        found = {name: TensorParameter(each) for name, each in own.items() if each is not None}
        return {**self.scores.parameters(), **found}


class SparseGatedMLP(GatedMLP):
    """GeGLU, whose gate `cut_` makes sparse with d = `deviations`, unless that is None; see `kernels/scale_cap`."""

    deviations: float | None = None

    def __call__(self, x: Value) -> Value:
        gate_up = self.gate_up(x)
        if self.deviations is not None:
            cut_(gate_up.split([self.down.in_features] * 2, dim=-1)[0], self.deviations)
        return self.down(gate_mul(gate_up, "gelu_tanh"))


class Projections:
    """A matrix for each stream but the first: N - 1 values [T, E] -> N - 1. GGUF files store them as one tensor."""

    def __init__(self, count: int, size: int, placement: Placement) -> None:
        self.each = [Linear(size, size, placement) for _ in range(count)]

    def __call__(self, values: Sequence[Value]) -> list[Value]:
        return [matrix(x) for matrix, x in zip(self.each, values, strict=True)]

    def finish(self) -> None:
        """See `Finishes`."""
        for matrix in self.each:
            matrix.finish()

    def parameters(self) -> Mapping[str, Parameter]:
        """Every parameter that must be loaded, by either format's names."""
        parts = [matrix.parameters()["weight"] for matrix in self.each]
        return {"weight": PartsOfOne(parts), **{f"{number}.weight": part for number, part in enumerate(parts)}}


class TableRows:
    """A table to which GGUF files add a row for each missing token: a copy of the row of token 0."""

    def __call__(self, stored: StoredTensor, config: Gemma3nConfig) -> StoredTensor:
        """Return the table as it is stored."""
        del config
        return stored

    def undone(self, stored: StoredTensor, config: Gemma3nConfig) -> StoredTensor:
        """Return the table with the added rows."""
        rows = np.arange(config.vocab_size)
        return stored.select(np.where(rows < stored.shape[0], rows, 0))
