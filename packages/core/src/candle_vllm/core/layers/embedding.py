# SPDX-License-Identifier: MIT
"""Embedding table and output layer, which may share a matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from candle_vllm.core.kernels.collectives import VocabularyShare
from candle_vllm.core.kernels.lora import Place
from candle_vllm.core.kernels.recorded import Recorded, RecordedTokens, Value
from candle_vllm.core.kernels.scale_cap import scale_cap_
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.parameters import Placement, TensorParameter
from candle_vllm.core.loading.weights import Parameter


class Embedding:
    """Rows [T, E] of a table [V, E] for token ids [T]; as a head, logits [T, V] of hidden states [T, E].

    Args:
        vocab_size, size: V and E.
        scale: factor of the looked-up rows, not of the logits; None for 1.
        bias: whether logits have a bias.
        logit_scale: factor of the logits, the bias included.
        softcap: c of logits z, which become c tanh(z / c); None without a cap.
        wide: rows are fp32 whatever the table's type is.

    Attributes:
        share: this rank's rows of a table that is divided among ranks; None if the rank has all rows.
        place: adapter site of lookups; products have the site of the table's `Linear`.
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
        wide: bool = False,
    ) -> None:
        self.scale, self.logit_scale, self.softcap, self._wide = scale, logit_scale, softcap, wide
        self.bias = placement.empty(vocab_size) if bias else None
        self._placement = placement
        self.table = Linear(size, vocab_size, replace(placement, words=()), kept=False)
        self.place: Place | None = None
        self.share: VocabularyShare | None = None
        self._gathered: Value | None = None

    def __call__(self, token_ids: Value) -> Value:
        return self.rows(token_ids, self.scale)

    def rows(self, token_ids: Value, scale: float | None = None) -> Value:
        """Look up rows [T, E] times `scale`, which replaces the table's own scale; None for 1."""
        (matrix,) = self.table.matrices
        if isinstance(token_ids, RecordedTokens):
            return token_ids.embedding(matrix, scale, self.place)
        share, others = self.share, None
        if share is not None:
            token_ids = token_ids - share.first
            others = (token_ids < 0) | (token_ids >= matrix.rows)  # tokens whose rows other ranks have
            token_ids = token_ids.masked_fill(others, 0)
        rows = matrix.take(token_ids, self._placement.torch_dtype)
        if self.table.adapters is not None:
            rows = self.table.adapters.look_up(self.place, token_ids, rows)
        rows = rows.float() if self._wide else rows
        if share is not None and others is not None:
            rows = share.collective.sum(rows.masked_fill(others.unsqueeze(-1), 0))
        return rows if scale is None else scale_cap_(rows, scale)

    def logits(self, hidden: Value, out: Value | None = None) -> Value:
        """Compute logits [T, V] in fp32, into `out` if it is given; in a recorded step only of `Recorded.wanted` rows.

        With a divided table and without `out`, the next call may overwrite the result.
        """
        if isinstance(hidden, Recorded):
            return self.table(hidden.wanted()).logits(self.bias, self.logit_scale, self.softcap)
        scores, share = self.table(hidden), self.share
        scores = scores.float() if out is None or share is not None else out.copy_(scores)
        if self.bias is not None:
            scores += self.bias
        scores = scale_cap_(scores, self.logit_scale, self.softcap)
        if share is None:
            return scores
        if out is not None:
            return out.copy_(share.whole(scores))
        if (gathered := self._gathered) is None or len(gathered) < len(scores):
            gathered = self._gathered = scores.new_empty(len(scores), share.most * share.collective.size)
        return share.whole(scores, gathered[: len(scores)])

    def finish(self) -> None:
        self.table.finish()

    def parameters(self) -> Mapping[str, Parameter]:
        found = self.table.parameters()
        return found if self.bias is None else {**found, "bias": TensorParameter(self.bias)}
