# SPDX-License-Identifier: MIT
"""RequestRecord: the counts and times of one engine request, and its summary when it ends.

Beside steps 4 to 9 of a request's life. Only the task that reads the request's outputs writes here, so that a token
needs no lock; a scrape of the metrics reads, and adds the running requests to the ended ones.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from candle_vllm.core import errors
from candle_vllm.core.engine.outputs import FinishReason, RequestMetrics, TokenOutput
from candle_vllm.core.engine.stats import Histogram
from candle_vllm.core.engine.step.request_watchers import Pooled, RequestInfo
from candle_vllm.server.http.request_context import RequestContext


@dataclass(frozen=True)
class FinishedRequest:
    """A request that has ended, for the log and the traces.

    Attributes:
        info: the request as the engine got it.
        context: the HTTP request, if there is one.
        arrived, ended: `time.monotonic()` at which the server got the request and finished it.
        first_token: time of its first token; None for an answer without tokens.
        times: the engine's own times, as far as it reported them.
        prompt_tokens, cached_tokens: token counts as in `usage`.
        tokens, sequence_times: for each sequence, its number of tokens and the engine's times.
        failure: the error message.
    """

    info: RequestInfo
    model: str
    context: RequestContext | None
    arrived: float
    ended: float
    first_token: float | None
    times: RequestMetrics
    prompt_tokens: int
    cached_tokens: int
    tokens: tuple[int, ...]
    sequence_times: tuple[RequestMetrics | None, ...]
    finish_reasons: tuple[FinishReason, ...]
    failure: str | None = None

    @property
    def completion_tokens(self) -> int:
        """Tokens of all sequences, as in `usage`."""
        return sum(self.tokens)

    @property
    def status(self) -> str:
        """Status: "failed" or "aborted" if a sequence is, in this order; otherwise "ok"."""
        if FinishReason.ERROR in self.finish_reasons:
            return "failed"
        return "ok" if all(reason.complete for reason in self.finish_reasons) else "aborted"


class Counts(Protocol):
    """The counts of a model, to which a request is added.

    Attributes:
        gap_bounds: bounds of the histogram of times between outputs.
        ended: the records that have ended; appended to without a lock.
    """

    name: str
    gap_bounds: tuple[float, ...]
    ended: deque[RequestRecord]

    def first_token(self, seconds: float) -> None: ...

    def refused(self, reason: str, record: RequestRecord) -> None: ...

    def settle(self) -> None: ...


class RequestRecord:
    """Observes one request for the metrics. It ends once; ending it again has no effect.

    Args:
        model: counts of its model.
        info: the request as the engine got it.
        context: the HTTP request, if there is one.
    """

    __slots__ = (
        "_bounds",
        "_counted",
        "_last",
        "_meter",
        "_unfinished",
        "cached_tokens",
        "context",
        "ended",
        "failure",
        "first_token",
        "gaps",
        "info",
        "metrics",
        "model",
        "prompt_tokens",
        "reasons",
        "started",
        "tokens",
    )

    def __init__(self, model: Counts, info: RequestInfo, context: RequestContext | None) -> None:
        arrived = None if context is None else context.arrived
        self.model = model
        self.info = info
        self.context = context
        self.started = time.monotonic() if arrived is None else arrived
        self.first_token: float | None = None
        self.ended: float | None = None
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.tokens = [0] * info.count
        self.reasons: list[FinishReason | None] = [None] * info.count
        self.metrics: list[RequestMetrics | None] = [None] * info.count
        self.gaps = Histogram(model.gap_bounds)
        self.failure: str | None = None
        self._bounds = model.gap_bounds
        self._last = [0.0] * info.count
        self._unfinished = info.count
        self._meter = None if context is None else context.meter
        self._counted = 0 if context is not None and context.prompt_only else 1

    def take(self, piece: TokenOutput) -> None:
        """Count an output that goes to the caller."""
        count = len(piece.token_ids)
        if count and self.ended is None:
            index, now = piece.index, time.monotonic()
            last = self._last[index]
            if last:
                gap = now - last
                gaps = self.gaps
                gaps.counts[bisect_left(self._bounds, gap)] += 1
                gaps.total += gap
            else:
                self._first(piece, now)
            self._last[index] = now
            self.tokens[index] += count * self._counted
            if self._meter is not None:
                self._meter.spend("tokens", count * self._counted)
        if piece.finish_reason is not None:
            self._finish(piece)

    def pooled(self, outputs: Pooled) -> None:
        """Count embeddings or scores that go to the caller: every text or pair has ended successfully."""
        self._count_prompt(sum(each.num_tokens for each in outputs))
        self.close(FinishReason.STOP)

    def close(self, reason: FinishReason = FinishReason.ABORT) -> None:
        """End the sequences that have not finished."""
        if self.ended is None:
            self._end(reason)
            self.model.settle()

    def reject(self, error: Exception) -> None:
        """End a request that the engine did not accept but answered with an exception."""
        reason = _refusal(error, errors.EngineDeadError)
        if reason is None:
            self.fail(error)
        else:
            self._forget(reason)

    def fail(self, error: Exception) -> None:
        """End the unfinished sequences with an exception; a late refusal does not count as a failure of the engine."""
        reason = _refusal(error) if self.first_token is None else None
        if self.ended is not None:
            return
        if reason is not None:
            self._forget(reason)
        elif isinstance(error, errors.RequestAbortedError):
            self.close()
        else:
            self.failure = str(error)
            self.close(FinishReason.ERROR)

    def drop(self) -> None:
        """End the request without a lock, because a finaliser may run anywhere; the next `settle` counts it."""
        if self.ended is None:
            self._end(FinishReason.ABORT)

    def summary(self) -> FinishedRequest:
        """Return the summary of the request, which must have ended."""
        assert self.ended is not None
        return FinishedRequest(
            info=self.info,
            model=self.model.name,
            context=self.context,
            arrived=self.started,
            ended=self.ended,
            first_token=self.first_token,
            times=self.times(),
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            tokens=tuple(self.tokens),
            sequence_times=tuple(self.metrics),
            finish_reasons=tuple(reason or FinishReason.ABORT for reason in self.reasons),
            failure=self.failure,
        )

    def times(self) -> RequestMetrics:
        """Return the engine's times of the whole request: from the first sequence that begins to the last that ends."""
        known = [each for each in self.metrics if each is not None]
        return RequestMetrics(
            self.started,
            min((each.first_scheduled_time for each in known if each.first_scheduled_time is not None), default=None),
            min((each.first_token_time for each in known if each.first_token_time is not None), default=None),
            max((each.finished_time for each in known if each.finished_time is not None), default=None),
        )

    def _first(self, piece: TokenOutput, now: float) -> None:
        """Record the first tokens of a sequence, whose prompt has been computed."""
        if piece.index == 0:  # the other sequences find the prompt in the cache, which usage does not count
            self.cached_tokens = piece.num_cached_tokens
        if self.first_token is None:
            self.first_token = now
            self._count_prompt(piece.num_prompt_tokens)
            self.model.first_token(now - self.started)

    def _count_prompt(self, tokens: int) -> None:
        self.prompt_tokens = tokens
        if self._meter is not None:
            self._meter.spend("tokens", tokens)

    def _finish(self, piece: TokenOutput) -> None:
        if self.ended is not None or self.reasons[piece.index] is not None or piece.finish_reason is None:
            return
        self.reasons[piece.index] = piece.finish_reason
        self.metrics[piece.index] = piece.metrics
        self.failure = self.failure or piece.error
        self._unfinished -= 1
        if not self._unfinished:
            self.close()

    def _forget(self, reason: str) -> None:
        """Count the request only as refused."""
        self.ended = time.monotonic()
        self.model.refused(reason, self)

    def _end(self, reason: FinishReason) -> None:
        self.reasons = [known or reason for known in self.reasons]
        self.ended = time.monotonic()
        self.model.ended.append(self)


def _refusal(error: Exception, *more: type[Exception]) -> str | None:
    """Return why a request was refused, a value of `Rejection`; None if it was not refused."""
    if isinstance(error, errors.EngineOverloadedError):
        return "queue_full"
    if isinstance(error, errors.EngineSleepingError):
        return "model_not_ready"
    if isinstance(error, errors.RequestError):
        return "invalid_request"
    return "engine_dead" if isinstance(error, more) else None
