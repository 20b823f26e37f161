"""The embedding table and the output head, which may be the same matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from candle_vllm.core.kernels import gguf_linear
from candle_vllm.core.kernels.embedding import embedding
from candle_vllm.core.kernels.linear import linear
from candle_vllm.core.kernels.recorded import Recorded, RecordedTokens, Value
from candle_vllm.core.layers.parameters import DevicePart, MatrixPart, Part, Placement, TensorPart

if TYPE_CHECKING:
    from candle_vllm.core.kernels.recorded import Matrix
    from candle_vllm.core.layers.parameters import Weight


class Embedding:
    """Rows [T, E] of a table [V, E] for token ids [T]; as a head, logits [T, V] of hidden states [T, E]."""

    def __init__(self, vocab_size: int, size: int, placement: Placement) -> None:
        self.shape = (vocab_size, size)
        self._placement = placement
        self.matrices: dict[str, Matrix] = {}
        device, dtype = placement.device, placement.dtype
        self.weights: dict[str, Weight] = {}
        if placement.stacked:
            self.weights["weight"] = torch.empty(self.shape, device=device, dtype=dtype)

    def __call__(self, token_ids: Value) -> Value:
        if isinstance(token_ids, RecordedTokens):
            return token_ids.embedding(self.matrices["weight"])
        weight = self.weights["weight"]
        if isinstance(weight, torch.Tensor):
            return embedding(token_ids, weight)
        return gguf_linear.embedding(token_ids, weight, self._placement.dtype)

    def logits(self, hidden: Value, out: torch.Tensor | None = None) -> Value:
        """Scores [T, V] in fp32 of every token of the vocabulary; into `out` where it is given."""
        if isinstance(hidden, Recorded):
            return hidden.logits(self.matrices["weight"])
        weight, invariant = self.weights["weight"], self._placement.invariant
        if isinstance(weight, torch.Tensor):
            scores = linear(hidden, weight, invariant=invariant)
        else:
            scores = gguf_linear.linear(hidden, weight, invariant=invariant)
        return scores.float() if out is None else out.copy_(scores)

    def parts(self) -> Mapping[str, Part]:
        """Every part that must be loaded."""
        if self._placement.recorded:
            return {"weight": MatrixPart(self.matrices, "weight", self.shape, self._placement)}
        if self._placement.keeps_quantised:
            return {"weight": DevicePart(self.weights, "weight", self.shape, self._placement)}
        weight = self.weights["weight"]
        assert isinstance(weight, torch.Tensor)
        return {"weight": TensorPart(weight)}
