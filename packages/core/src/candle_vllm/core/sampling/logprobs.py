"""Log-probabilities as the model gave them, before masks, penalties and temperature (step 7 of ten).

They are vLLM's `raw_logprobs`, worked out for the rows that ask for them only, where their logits are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
import numpy as np
import torch

from candle_vllm.core.kernels import sampling as kernels


class LogprobRow(msgspec.Struct, frozen=True):
    """The log-probabilities of one position.

    Attributes:
        token_id: the token that stands there.
        logprob: natural logarithm of its probability, at most 0.
        rank: 1 for the likeliest token; among equals the lower id comes first, as in `top_ids`.
        top_ids: the likeliest tokens in falling order, as many as asked for; tokens of probability 0 are left out.
        top_logprobs: their log-probabilities.
    """

    token_id: int
    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]

    @classmethod
    def of(cls, token_id: int, logit: float, offset: float, rank: int, top: Iterable[tuple[int, float]]) -> LogprobRow:
        """An entry from logits.

        Args:
            token_id, logit, rank: of the token that stands there.
            offset: what is taken off a logit to make it a logarithm.
            top: ids and logits of the likeliest; an id below 0 is none.
        """
        named = [(token, value) for token, value in top if token >= 0]
        # The offset is rounded: that must not make a probability greater than 1.
        return cls(
            token_id,
            min(logit - offset, 0.0),
            rank,
            [token for token, _ in named],
            [min(value - offset, 0.0) for _, value in named],
        )


def logprob_rows(logits: torch.Tensor, token_ids: Sequence[int], tops: Sequence[int]) -> list[LogprobRow]:
    """One entry per row.

    Args:
        logits: [R, V] float32, each row contiguous and with a finite largest value; not changed. On a GPU this waits
            for it, and only what is named comes back.
        token_ids: [R] ids below V.
        tops: [R] how many of the likeliest tokens to report.
    """
    if logits.is_cuda:
        return _rows_on_gpu(logits, token_ids, tops)
    standing = kernels.stand(logits, np.asarray(token_ids, np.int64), np.asarray(tops, np.int64))
    table = logits.numpy()
    return [
        LogprobRow.of(token, float(table[at, token]), float(offset), rank, ((i, float(table[at, i])) for i in ids))
        for at, (token, offset, rank, ids) in enumerate(
            zip(token_ids, standing.offsets, standing.ranks.tolist(), standing.top_ids.tolist())
        )
    ]


def _rows_on_gpu(logits: torch.Tensor, token_ids: Sequence[int], tops: Sequence[int]) -> list[LogprobRow]:
    with torch.cuda.device(logits.device):  # the engine's thread has a device of its own
        ids, asked = (torch.tensor(numbers, device=logits.device) for numbers in (token_ids, tops))
        found = kernels.stand_tensors(logits, ids, asked, max(tops))
        columns = (found.logits, found.offsets, found.ranks, found.top_ids, found.top_logits)
        rows = zip(token_ids, *(column.tolist() for column in columns))
    return [
        LogprobRow.of(token, logit, offset, rank, zip(top, values)) for token, logit, offset, rank, top, values in rows
    ]
