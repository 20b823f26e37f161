# SPDX-License-Identifier: MIT
"""Draws for sequences whose rows of logits are divided among ranks (step 7 of ten).

What `kernels/sampling/shares.py` can draw is drawn there, and nothing but candidates and sums goes from rank to rank.
Rows that something edits before the draw are put together, and drawn from as with one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.kernels import sampling as kernels
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.sampling.contract import Control
from candle_vllm.core.kernels.sampling.shares import Shares, Wish, told
from candle_vllm.core.sampling.sampler import (
    Drawn,
    LogprobRow,
    SampledToken,
    Sampler,
    Token,
    drawn_tokens,
    logprob_rows,
    right_runs,
    run_controls,
)
from candle_vllm.core.sampling.state import SamplingState

Ints = NDArray[np.int64]


def wishes(states: Sequence[SamplingState], drafts: Sequence[Sequence[int]] | None) -> NDArray[np.float64]:
    """[R, 7] what is asked of the rows of a step, see `kernels.sampling.shares.Wish`.

    Args:
        states: one per sequence, at the position that is drawn.
        drafts: of each sequence, what is in its rows behind the first; None where each has one row.
    """
    own = [()] * len(states) if drafts is None else drafts
    asked = np.empty((sum(1 + len(each) for each in own), len(Control) + len(Wish)))
    asked[:, : len(Control)] = np.array(run_controls(states, own)).reshape(-1, len(Control))
    first = 0
    for state, each in zip(states, own, strict=True):
        end, logprobs = first + 1 + len(each), state.params.logprobs
        asked[first:end, Wish.LOGPROBS] = -1 if logprobs is None else logprobs
        asked[first:end, Wish.TOLD] = 0 if state.may_edit else told(state.controls, logprobs)
        first = end
    return asked


def draw_shared(
    shares: Shares,
    drafts: Sequence[Sequence[int]] | None,
    apart: Callable[[list[int], Value], Sequence[Drawn]],
    fetch: Callable[[Ints], Value],
) -> list[Drawn]:
    """What is drawn for each sequence.

    Args:
        shares: the rows of the step.
        drafts: see `wishes`.
        apart: draws for the sequences whose rows were put together, given their numbers and their logits.
        fetch: has all ranks put rows together, and gives them.
    """
    tokens, is_apart = _tokens(shares, fetch), shares.wishes[:, Wish.TOLD] == 0
    drawn: list[Drawn] = list(tokens)
    firsts = list(range(len(tokens)))
    if drafts is not None:
        firsts = np.cumsum([0, *(1 + len(own) for own in drafts[:-1])]).tolist()
        right = right_runs([SampledToken.of(token).token_id for token in tokens], drafts)
        drawn = [tuple(tokens[first : first + len(own)]) for first, own in zip(firsts, right)]
    numbers = [number for number, first in enumerate(firsts) if is_apart[first]]
    if numbers:
        for number, token in zip(numbers, apart(numbers, shares.gathered), strict=True):
            drawn[number] = token
    return drawn


def sample_some(
    sampler: Sampler,
    numbers: Sequence[int],
    logits: Value,
    states: Sequence[SamplingState],
    drafts: Sequence[Sequence[int]] | None,
) -> Sequence[Drawn]:
    """Draws for some of these sequences from the logits of all their rows."""
    some = [states[number] for number in numbers]
    if drafts is None:
        return sampler.sample(logits, some)
    return sampler.sample_runs(logits, some, [drafts[number] for number in numbers])


def _tokens(shares: Shares, fetch: Callable[[Ints], Value]) -> list[Token]:
    """One per row; those of rows that were put together anyway mean nothing."""
    ids, lacking = shares.ids.copy(), shares.lacking
    whole: Value = None
    if len(lacking):
        whole = fetch(lacking).contiguous()
        ids[lacking], _ = kernels.draw(whole, np.ascontiguousarray(shares.wishes[lacking, : len(Control)]))
    tokens = drawn_tokens(ids.tolist(), shares.largest.tolist())
    asked = shares.wishes[:, Wish.LOGPROBS].astype(int)
    for row, entry in _entries(shares, np.flatnonzero(asked >= 0), asked, lacking, whole, ids):
        if isinstance(tokens[row], int):
            tokens[row] = SampledToken(int(ids[row]), entry)
    return tokens


def _entries(
    shares: Shares, rows: Ints, asked: Ints, lacking: Ints, whole: Value, ids: Ints
) -> list[tuple[int, LogprobRow]]:
    """The log-probabilities of the rows that ask for them."""
    there = np.setdiff1d(rows, lacking)
    found, logits, top_logits = shares.standing(there)
    offsets, tops = found.offsets.tolist(), zip(found.top_ids.tolist(), top_logits.tolist())
    entries = [
        (row, LogprobRow.of(int(ids[row]), float(logit), offset, rank, zip(*top)))
        for row, logit, offset, rank, top in zip(there.tolist(), logits, offsets, found.ranks.tolist(), tops)
    ]
    late = [(place, row) for place, row in enumerate(lacking.tolist()) if asked[row] >= 0]
    if late:
        places, late_rows = zip(*late)
        named = logprob_rows(whole[list(places)], ids[list(late_rows)].tolist(), asked[list(late_rows)].tolist())
        entries += zip(late_rows, named)
    return entries
