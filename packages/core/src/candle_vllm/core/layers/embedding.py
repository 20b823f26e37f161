"""The embedding table and the output head, which may be the same matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from candle_vllm.core.kernels.embedding import embedding
from candle_vllm.core.kernels.linear import linear
from candle_vllm.core.kernels.recorded import Recorded, RecordedTokens, Value
from candle_vllm.core.layers.parameters import MatrixPart, Part, Placement, TensorPart

if TYPE_CHECKING:
    from candle_vllm.core.kernels.recorded import Matrix


class Embedding:
    """Rows [T, E] of a table [V, E] for token ids [T]; as a head, logits [T, V] of hidden states [T, E]."""

    def __init__(self, vocab_size: int, size: int, placement: Placement) -> None:
        self.shape = (vocab_size, size)
        self._placement = placement
        self.matrices: dict[str, Matrix] = {}
        device, dtype = placement.device, placement.dtype
        self.weight = None if placement.recorded else torch.empty(self.shape, device=device, dtype=dtype)

    def __call__(self, token_ids: Value) -> Value:
        if isinstance(token_ids, RecordedTokens):
            return token_ids.embedding(self.matrices["weight"])
        assert self.weight is not None
        return embedding(token_ids, self.weight)

    def logits(self, hidden: Value) -> Value:
        """Scores [T, V] in fp32 of every token of the vocabulary."""
        if isinstance(hidden, Recorded):
            return hidden.logits(self.matrices["weight"])
        assert self.weight is not None
        return linear(hidden, self.weight).float()

    def parts(self) -> Mapping[str, Part]:
        """Every part that must be loaded."""
        if self.weight is None:
            return {"weight": MatrixPart(self.matrices, "weight", self.shape, self._placement)}
        return {"weight": TensorPart(self.weight)}
