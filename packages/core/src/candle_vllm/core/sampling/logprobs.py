"""Log-probabilities as the model gave them, before masks, penalties and temperature (step 7 of ten).

They are vLLM's `raw_logprobs`. They are worked out on the CPU, for the rows that ask for them only.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from candle_vllm.core.sampling import cpu


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


def logprob_rows(logits: torch.Tensor, token_ids: Sequence[int], tops: Sequence[int]) -> list[LogprobRow]:
    """One entry per row.

    Args:
        logits: [R, V] float32 on the CPU, contiguous, with a finite largest value in every row; not changed.
        token_ids: [R] ids below V.
        tops: [R] how many of the likeliest tokens to report.
    """
    table, row = logits.numpy(), np.arange(len(logits))
    largest = logits.amax(1)
    offset = largest.numpy() + cpu.log_masses(logits, largest)  # float64: logprob = logit - offset
    chosen = table[row, np.asarray(token_ids)]
    # The weights are float32: rounding must not make a probability greater than 1.
    logprobs = np.minimum(chosen - offset, 0.0).tolist()
    ranks = _ranks(table, chosen, token_ids).tolist()
    ids = _top_ids(logits, np.asarray(tops, np.int64))
    return [
        LogprobRow(token, logprob, rank, top.tolist(), np.minimum(table[at, top] - offset[at], 0.0).tolist())
        for at, (token, logprob, rank, top) in enumerate(zip(token_ids, logprobs, ranks, ids))
    ]


def _ranks(table: NDArray[np.float32], chosen: NDArray[np.float32], token_ids: Sequence[int]) -> NDArray[np.int64]:
    ranks = 1 + np.count_nonzero(table > chosen[:, None], axis=1)
    equal = np.count_nonzero(table == chosen[:, None], axis=1)
    for row in np.flatnonzero(equal > 1).tolist():
        ranks[row] += np.count_nonzero(table[row, : token_ids[row]] == chosen[row])
    return ranks


def _top_ids(logits: torch.Tensor, tops: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """The ids of each row's largest logits, falling, the lower id first among equals."""
    vocabulary = logits.shape[1]
    if not tops.any():
        return [np.zeros(0, np.int64)] * len(tops)
    places = cpu.largest_places(logits, tops.clip(1, vocabulary))
    owners, ids = np.divmod(places, vocabulary)
    order = np.lexsort((ids, -logits.numpy().reshape(-1)[places], owners))
    starts = np.searchsorted(owners, np.arange(len(tops) + 1))
    return [ids[order[start : min(start + top, end)]] for start, end, top in zip(starts, starts[1:], tops)]
