# SPDX-License-Identifier: MIT
"""RequestRecord: the counts and times of one engine request; and token counts of ended requests by model and key.

It is updated during steps 3 to 10 of a request's life. Outputs are counted only in the caller's event loop, so a token
needs no lock (only the first one takes the model's lock); `drop` may be called by a finaliser in any thread. A scrape
of the metrics reads the records, and adds the running requests to the ended ones.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from candle_vllm.core import errors
from candle_vllm.core.engine.outputs import FinishReason, RequestMetrics, TokenOutput
from candle_vllm.core.engine.requests import arrival_time
from candle_vllm.core.engine.stats import Histogram
from candle_vllm.core.engine.step.request_watchers import Pooled, RequestInfo
from candle_vllm.server.http.routing import RequestContext, Spender

MAX_KEYS = 1000
OTHER_KEYS = "other"
"""Label under which the keys or adapters beyond the maximum number are counted together."""


class Counts(Protocol):
    """The counts of a model, to which a request is added.

    `gap_bounds` are the bounds of the histogram of times between outputs. The records that have ended are appended to
    `ended` without a lock.
    """

    name: str
    gap_bounds: tuple[float, ...]
    ended: deque[RequestRecord]

    def first_token(self, seconds: float) -> None: ...

    def refused(self, reason: str, record: RequestRecord) -> None: ...

    def settle(self) -> None: ...


@dataclass(eq=False, repr=False, slots=True)
class RequestRecord:
    """Observes one request for the metrics, the log and the traces. It ends once; ending it again has no effect.

    Attributes:
        arrived, ended: `time.monotonic()` at which the server got the request and finished it; `ended` is 0 until then.
        first_token: time of its first token; None for an answer without tokens.
        prompt_tokens, cached_tokens: token counts as in `usage`.
        tokens, sequence_times: for each sequence, its number of tokens and, once it has ended, the engine's times.
        finish_reasons: how each sequence ended; empty until all have ended.
        times: the engine's times of an ended request: from the first sequence that begins to the last that ends.
        gaps: times between outputs of a sequence.
    """

    counts: Counts
    info: RequestInfo
    context: RequestContext | None
    arrived: float = field(default_factory=arrival_time, init=False)
    first_token: float | None = None
    ended: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: list[int] = field(init=False)
    finish_reasons: list[FinishReason] = field(default_factory=list[FinishReason])
    sequence_times: list[RequestMetrics | None] = field(init=False)
    times: RequestMetrics = field(init=False)
    gaps: Histogram = field(init=False)
    failure: str | None = None
    _reasons: list[FinishReason | None] = field(init=False)
    _last: list[float] = field(init=False)
    _meter: Spender | None = field(init=False)
    _counted: int = field(init=False)

    def __post_init__(self) -> None:
        context, count = self.context, self.info.count
        self.tokens, self._last = [0] * count, [0.0] * count
        self.sequence_times = [None] * count
        self._reasons = [None] * count
        self.gaps = Histogram(self.counts.gap_bounds)
        self._meter = None if context is None else context.meter
        self._counted = 0 if context is not None and context.prompt_only else 1

    @property
    def model(self) -> str:
        """Name of the model."""
        return self.counts.name

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

    def take(self, piece: TokenOutput) -> None:
        """Count an output that goes to the caller."""
        count = len(piece.token_ids)
        if count and not self.ended:
            index, now = piece.index, time.monotonic()
            last = self._last[index]
            if last:
                self.gaps.observe(now - last)
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
        if not self.ended:
            self._end(reason)
            self.counts.settle()

    def reject(self, error: Exception) -> None:
        """End a request that the engine did not accept but answered with an exception."""
        reason = _refusal(error, errors.EngineDeadError)
        if reason is None:
            self.fail(error)
        else:
            self._forget(reason)

    def fail(self, error: Exception) -> None:
        """End the unfinished sequences as failed or aborted; before the first token, count a refusal only as such."""
        reason = _refusal(error) if self.first_token is None else None
        if self.ended:
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
        if not self.ended:
            self._end(FinishReason.ABORT)

    def _first(self, piece: TokenOutput, now: float) -> None:
        """Record the first tokens of a sequence, whose prompt has been computed."""
        if piece.index == 0:  # the other sequences find the prompt in the cache, which usage does not count
            self.cached_tokens = piece.num_cached_tokens
        if self.first_token is None:
            self.first_token = now
            self._count_prompt(piece.num_prompt_tokens)
            self.counts.first_token(now - self.arrived)

    def _count_prompt(self, tokens: int) -> None:
        self.prompt_tokens = tokens
        if self._meter is not None:
            self._meter.spend("tokens", tokens)

    def _finish(self, piece: TokenOutput) -> None:
        if self.ended or self._reasons[piece.index] is not None:
            return
        self._reasons[piece.index] = piece.finish_reason
        self.sequence_times[piece.index] = piece.metrics
        self.failure = self.failure or piece.error
        if None not in self._reasons:
            self.close()

    def _forget(self, reason: str) -> None:
        """Count the request only as refused."""
        self.ended = time.monotonic()
        self.counts.refused(reason, self)

    def _end(self, reason: FinishReason) -> None:
        self.finish_reasons = [known or reason for known in self._reasons]
        known = [each for each in self.sequence_times if each is not None]
        self.times = RequestMetrics(
            self.arrived,
            min((each.first_scheduled_time for each in known if each.first_scheduled_time is not None), default=None),
            min((each.first_token_time for each in known if each.first_token_time is not None), default=None),
            max((each.finished_time for each in known if each.finished_time is not None), default=None),
        )
        self.ended = time.monotonic()
        self.counts.ended.append(self)


def _refusal(error: Exception, *more: type[Exception]) -> str | None:
    """Return why a request was refused, a value of `Rejection`; None if it was not refused."""
    if isinstance(error, errors.EngineOverloadedError):
        return "queue_full"
    if isinstance(error, errors.EngineSleepingError):
        return "model_not_ready"
    if isinstance(error, errors.RequestError):
        return "invalid_request"
    return "engine_dead" if isinstance(error, more) else None


# --- sums of records --------------------------------------------------------------------------------------------------


def token_buckets(most: int) -> tuple[float, ...]:
    """Return the bounds 1, 2, 5, 10, 20, 50 ... up to `most` tokens."""
    bounds: list[float] = []
    step = 1
    while True:
        for factor in (1, 2, 5):
            if factor * step > most:
                return tuple(bounds) or (1,)
            bounds.append(factor * step)
        step *= 10


class UsageCounts(msgspec.Struct, frozen=True):
    """Requests that have ended, and their tokens."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def plus(self, other: UsageCounts) -> UsageCounts:
        """Return the sum of both."""
        return UsageCounts(**{name: getattr(self, name) + getattr(other, name) for name in self.__struct_fields__})


class UsageRow(msgspec.Struct, frozen=True):
    """The counts of one API key with one model, or of one adapter, whose name is then `key`."""

    model: str
    key: str
    counts: UsageCounts


class UsageTable:
    """Counts of finished requests by model and key label, for `GET /v1/usage`, or by model and adapter. Thread-safe."""

    def __init__(self, max_keys: int = MAX_KEYS) -> None:
        self.max_keys = max_keys
        self._lock = threading.Lock()
        self._keys: set[str] = set()
        self._rows: dict[tuple[str, str], UsageCounts] = {}

    def add(self, model: str, key: str, counts: UsageCounts) -> None:
        """Add the counts of one request."""
        with self._lock:
            if key not in self._keys:
                if len(self._keys) >= self.max_keys:
                    key = OTHER_KEYS
                else:
                    self._keys.add(key)
            self._rows[model, key] = self._rows.get((model, key), UsageCounts()).plus(counts)

    def rows(self) -> list[UsageRow]:
        """Return the rows in order of model and key."""
        with self._lock:
            return [UsageRow(model, key, counts) for (model, key), counts in sorted(self._rows.items())]
