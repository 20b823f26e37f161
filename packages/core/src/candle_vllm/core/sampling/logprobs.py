"""Log-probabilities as the model gave them, before masks, penalties and temperature (step 7 of ten).

They are vLLM's `raw_logprobs`. They are worked out on the CPU, for the rows that ask for them only.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def logprob_rows(logits: torch.Tensor, token_ids: Sequence[int], tops: Sequence[int]) -> list[LogprobRow]:
    """One entry per row.

    Args:
        logits: [R, V] float32 on the CPU, each row contiguous and with a finite largest value; not changed.
        token_ids: [R] ids below V.
        tops: [R] how many of the likeliest tokens to report.
    """
    standing = kernels.stand(logits, np.asarray(token_ids, np.int64), np.asarray(tops, np.int64))
    table = logits.numpy()
    return [
        LogprobRow(
            token,
            # The offset is rounded: that must not make a probability greater than 1.
            min(float(table[at, token] - offset), 0.0),
            rank,
            named := [entry for entry in ids if entry >= 0],
            np.minimum(table[at, named] - offset, 0.0).tolist(),
        )
        for at, (token, offset, rank, ids) in enumerate(
            zip(token_ids, standing.offsets, standing.ranks.tolist(), standing.top_ids.tolist())
        )
    ]
