"""What sequences want of a step's rows beside a token: log-probabilities of the prompt, or hidden states."""

from __future__ import annotations

import numpy as np

from candle_vllm.core.engine.live import LiveSequence
from candle_vllm.core.engine.model_runner import MAX_HIDDEN_ROWS, MAX_SCORED_ROWS, ModelRunner
from candle_vllm.core.engine.scheduler import ScheduledSequence
from candle_vllm.core.sampling.sampler import Sampler


def read_rows(live: LiveSequence, item: ScheduledSequence, offset: int, runner: ModelRunner, sampler: Sampler) -> None:
    """Reads what one scheduled sequence asks for, if anything, from the step that was launched last.

    Args:
        live: the sequence.
        item: which of its tokens the step has.
        offset: of the first of them among the step's rows.
        runner: has the rows.
        sampler: makes log-probabilities of them.

    Raises:
        RequestError: the rows cannot be what was asked for.
    """
    top = item.sequence.request.params.prompt_logprobs
    if top is not None and not item.sequence.index:
        _score_prompt(live, item, offset, top, runner, sampler)
    if item.sequence.is_pooled and live.pooler is not None:
        wanted = live.pooler.wanted(item.start, item.start + item.count)
        for first in range(0, len(wanted), MAX_HIDDEN_ROWS):
            rows = np.array(wanted[first : first + MAX_HIDDEN_ROWS], np.int64) + (offset - item.start)
            live.pooler.add(runner.hidden(rows))


def _score_prompt(
    live: LiveSequence, item: ScheduledSequence, offset: int, top: int, runner: ModelRunner, sampler: Sampler
) -> None:
    known = len(live.prompt_logprobs) - 1  # after a preemption the first positions are known already
    last = min(item.start + item.count, item.sequence.num_prompt_tokens - 1)
    for first in range(max(item.start, known), last, MAX_SCORED_ROWS):
        end = min(first + MAX_SCORED_ROWS, last)
        rows = np.arange(offset + first - item.start, offset + end - item.start)
        following = item.sequence.tokens[first + 1 : end + 1]
        scored = sampler.prompt_logprobs(runner.score(rows), following, top)
        live.prompt_logprobs += [live.describe(row) for row in scored]
