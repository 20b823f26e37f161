"""The embedding table and the output head, which may be the same matrix."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from candle_vllm.core.kernels.embedding import embedding
from candle_vllm.core.kernels.linear import linear
from candle_vllm.core.layers.parameters import Placement


class Embedding:
    """Rows [T, E] of a table [V, E] for token ids [T]; as a head, logits [T, V] of hidden states [T, E]."""

    def __init__(self, vocab_size: int, size: int, placement: Placement) -> None:
        self.weight = torch.empty(vocab_size, size, device=placement.device, dtype=placement.dtype)

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        return embedding(token_ids, self.weight)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores [T, V] in fp32 of every token of the vocabulary."""
        return linear(hidden, self.weight).float()

    def parts(self) -> Mapping[str, torch.Tensor]:
        """Every part that must be loaded, with the tensor that it is copied into."""
        return {"weight": self.weight}
