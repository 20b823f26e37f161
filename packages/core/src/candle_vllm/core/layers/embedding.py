"""The embedding table and the output head, which may be the same matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from candle_vllm.core.kernels import gguf_linear
from candle_vllm.core.kernels.embedding import embedding
from candle_vllm.core.kernels.gguf_linear import GgufMatrix
from candle_vllm.core.kernels.linear import linear
from candle_vllm.core.kernels.recorded import Recorded, RecordedTokens, Value
from candle_vllm.core.kernels.scale_cap import scale_cap_
from candle_vllm.core.layers.parameters import DevicePart, MatrixPart, Placement, TensorPart
from candle_vllm.core.loading.weights import Part

if TYPE_CHECKING:
    from candle_vllm.core.kernels.recorded import Matrix
    from candle_vllm.core.layers.parameters import Weight


class Embedding:
    """Rows [T, E] of a table [V, E] for token ids [T]; as a head, logits [T, V] of hidden states [T, E].

    Args:
        vocab_size, size: V and E.
        placement: where the table lives.
        scale: of rows, not of logits; None is 1.
        bias: of logits: there is one.
        logit_scale: of logits, the bias included.
        softcap: c of logits z, which become c tanh(z / c); None leaves them.
    """

    def __init__(
        self,
        vocab_size: int,
        size: int,
        placement: Placement,
        *,
        scale: float | None = None,
        bias: bool = False,
        logit_scale: float = 1.0,
        softcap: float | None = None,
    ) -> None:
        self.shape = (vocab_size, size)
        self.scale, self.logit_scale, self.softcap = scale, logit_scale, softcap
        self.bias = torch.empty(vocab_size, device=placement.device, dtype=torch.float32) if bias else None
        self._placement = placement
        self.matrices: dict[str, Matrix] = {}
        device, dtype = placement.device, placement.dtype
        self.weights: dict[str, Weight] = {}
        if placement.stacked:
            self.weights["weight"] = torch.empty(self.shape, device=device, dtype=dtype)

    def __call__(self, token_ids: Value) -> Value:
        if isinstance(token_ids, RecordedTokens):
            return token_ids.embedding(self.matrices["weight"], self.scale)
        weight = self.weights["weight"]
        if isinstance(weight, torch.Tensor):
            rows = embedding(token_ids, weight)
        else:
            assert isinstance(weight, GgufMatrix)
            rows = gguf_linear.embedding(token_ids, weight, self._placement.dtype)
        return rows if self.scale is None else scale_cap_(rows, self.scale)

    def logits(self, hidden: Value, out: torch.Tensor | None = None) -> Value:
        """Scores [T, V] in fp32 of every token of the vocabulary; into `out` where it is given."""
        if isinstance(hidden, Recorded):
            options = {"bias": self.bias, "scale": self.logit_scale, "cap": self.softcap}
            return hidden.logits(self.matrices["weight"], **options)
        weight, invariant = self.weights["weight"], self._placement.invariant
        if isinstance(weight, torch.Tensor):
            scores = linear(hidden, weight, invariant=invariant)
        else:
            assert isinstance(weight, GgufMatrix)
            scores = gguf_linear.linear(hidden, weight, invariant=invariant)
        scores = scores.float() if out is None else out.copy_(scores)
        if self.bias is not None:
            scores += self.bias
        return scale_cap_(scores, self.logit_scale, self.softcap)

    def parts(self) -> Mapping[str, Part]:
        """Every part that must be loaded."""
        found: dict[str, Part] = {"weight": self._table()}
        return found if self.bias is None else {**found, "bias": TensorPart(self.bias)}

    def _table(self) -> Part:
        if self._placement.recorded:
            return MatrixPart(self.matrices, "weight", self.shape, self._placement)
        if self._placement.keeps_quantised:
            return DevicePart(self.weights, "weight", self.shape, self._placement)
        weight = self.weights["weight"]
        assert isinstance(weight, torch.Tensor)
        return TensorPart(weight)
