# SPDX-License-Identifier: MIT
"""Admission: a bounded queue before a model's engine, which API keys share fairly.

Between steps 1 and 2 of a request's life. The engine runs its requests in order of priority and arrival. Requests wait
here, so that one key's thousand requests do not delay another key's single request: of the requests with the best
priority, the one whose key has the fewest running sequences enters next. Without keys, the first to arrive enters.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from candle_vllm.core.engine.requests import admission_rank, arrival_time
from candle_vllm.openai.fair_threads import asker
from candle_vllm.server.http.errors import HttpError
from candle_vllm.server.http.routing import NO_KEY, current_request
from candle_vllm.server.observing.metrics import Rejection

MAX_RETRY_AFTER = 60  # seconds
_FADING = 0.9  # weight of earlier requests in the mean request time


@dataclass
class Place:
    """The admission of a request with all its sequences to the engine; the first call of `leave` ends it."""

    admission: Admission
    key: str
    sequences: int
    since: float = field(default_factory=time.monotonic)

    def leave(self) -> None:
        if self.sequences:
            self.admission.left(self)
            self.sequences = 0


class Queued(NamedTuple):
    """A waiting request, as operators see it; without its content. The fields are as in `QueuedRequest`.

    `id` is empty outside an HTTP request; `arrival_time` is the `time.monotonic()` at which it arrived.
    """

    id: str
    key: str
    sequences: int
    priority: int
    arrival_time: float

    @classmethod
    def now(cls, sequences: int = 1, priority: int = 0) -> Queued:
        """Describe the current request."""
        context = current_request.get()
        told = ("", NO_KEY) if context is None else (context.http_request_id, context.key_label)
        return cls(*told, sequences, priority, arrival_time())


@dataclass(eq=False)
class _Waiting:
    key: str
    sequences: int
    entered: asyncio.Future[Place]
    queued: Queued


class RetiredError(Exception):
    """The model was unloaded, or its engine died, while a request waited for a place in it."""


class Admission:
    """Admission control of one model.

    Args:
        capacity: maximum number of sequences in the engine. A request with more than half of them counts as half, so
            that the request can start before the engine is empty; its further sequences wait inside the engine.
        max_unfinished: maximum number of running and waiting sequences; further requests are refused with 503. A
            request is always accepted while no other runs or waits.
        max_per_key: the same limit for each key, with 429. None: half of `max_unfinished`, no limit for a single key.
        refused: called with the reason of every refusal.
    """

    def __init__(
        self,
        capacity: int,
        max_unfinished: int,
        max_per_key: int | None = None,
        refused: Callable[[Rejection], object] = lambda _: None,
    ) -> None:
        self._capacity = capacity
        self._max_unfinished = max_unfinished
        self._max_per_key = max_per_key
        self._refused = refused
        self._running: Counter[str] = Counter()
        self._taken = 0  # number of places in use, of `capacity`
        self._counted: Counter[str] = Counter()  # as `_unfinished`, but a large request counts as half of the capacity
        self._unfinished: Counter[str] = Counter()
        self._queues: OrderedDict[tuple[int, str], deque[_Waiting]] = OrderedDict()  # by priority and key
        self._seconds = 1.0  # mean time of a request in the engine

    @property
    def running(self) -> int:
        """Number of sequences in the engine."""
        return self._running.total()

    @property
    def waiting(self) -> int:
        """Number of sequences that wait for the engine."""
        return self._unfinished.total() - self.running

    @property
    def queue(self) -> list[Queued]:
        """The requests that wait for the engine; keys are in no particular order."""
        return [one.queued for queue in self._queues.values() for one in queue]

    async def enter(self, key: str, sequences: int, priority: int = 0) -> Place:
        """Wait for a place. Cancelling the coroutine removes the request from the queue.

        `key` is the label of the request's API key; requests with a lower `priority` enter first.

        Raises HttpError 503 or 429, with Retry-After, if too many sequences are running or waiting, and RetiredError if
        the model is unloaded or its engine dies while the request waits.
        """
        self._check_room(key, sequences)
        self._unfinished[key] += sequences
        self._counted[key] += self._share(sequences)
        if not self._queues and self._fits(sequences):
            return self._begin(key, sequences)
        waiting = _Waiting(key, sequences, asyncio.get_running_loop().create_future(), Queued.now(sequences, priority))
        self._queues.setdefault((priority, key), deque()).append(waiting)
        try:
            return await waiting.entered
        except asyncio.CancelledError:
            self._give_up(waiting)
            raise

    def close(self) -> None:
        """Fail all waiting requests with `RetiredError`, because the engine is closed."""
        for queue in self._queues.values():
            for waiting in queue:
                if not waiting.entered.done():
                    waiting.entered.set_exception(RetiredError())
                self._end(waiting.key, waiting.sequences)
        self._queues.clear()

    def left(self, place: Place) -> None:
        """Count a request as finished, and admit waiting ones; called by `Place.leave`."""
        self._running -= Counter({place.key: place.sequences})
        self._taken -= self._share(place.sequences)
        self._end(place.key, place.sequences)
        self._seconds = _FADING * self._seconds + (1 - _FADING) * (time.monotonic() - place.since)
        self._admit()

    def _check_room(self, key: str, sequences: int) -> None:
        total, own, added = self._counted.total(), self._unfinished[key], sequences
        most = self._max_per_key
        if most is None and asker.get():
            most, own, added = max(1, self._max_unfinished // 2), self._counted[key], self._share(sequences)
        if most is not None and own and own + added > most:
            message = (
                f"This key has {own} sequences running or waiting and may have {most}: wait for some of them to finish."
            )
            self._refused(Rejection.KEY_LIMIT)
            raise HttpError(429, message, "rate_limit_exceeded", self._retry_after(own))
        if total and total + self._share(sequences) > self._max_unfinished:
            message = f"{total} sequences are running or waiting and {self._max_unfinished} may be: try again later."
            self._refused(Rejection.QUEUE_FULL)
            raise HttpError(503, message, "overloaded", self._retry_after(total))

    def _retry_after(self, unfinished: int) -> dict[str, str]:
        """Return a header with the estimated seconds, 1 to 60, until the engine has finished `unfinished` sequences."""
        seconds = math.ceil(self._seconds * unfinished / self._capacity)
        return {"retry-after": str(max(1, min(seconds, MAX_RETRY_AFTER)))}

    def _share(self, sequences: int) -> int:
        return min(sequences, max(1, self._capacity // 2))

    def _fits(self, sequences: int) -> bool:
        return self._taken + self._share(sequences) <= self._capacity

    def _begin(self, key: str, sequences: int) -> Place:
        self._running[key] += sequences
        self._taken += self._share(sequences)
        return Place(self, key, sequences)

    def _admit(self) -> None:
        """Fill free places. No smaller request overtakes the first request in line, even if it would fit."""
        while self._queues:
            heads = (queue[0] for queue in self._queues.values())
            waiting = min(heads, key=lambda each: (admission_rank(each.queued), self._running[each.key]))
            if not waiting.entered.cancelled():
                if not self._fits(waiting.sequences):
                    return
                waiting.entered.set_result(self._begin(waiting.key, waiting.sequences))
            self._remove(waiting)

    def _give_up(self, waiting: _Waiting) -> None:
        if waiting.entered.done() and not waiting.entered.cancelled():
            if waiting.entered.exception() is not None:  # the engine was closed
                return
            waiting.entered.result().leave()  # it was admitted and cancelled in the same iteration of the event loop
            return
        self._remove(waiting)
        self._end(waiting.key, waiting.sequences)
        self._admit()

    def _remove(self, waiting: _Waiting) -> None:
        place = waiting.queued.priority, waiting.key
        queue = self._queues.get(place, deque())
        if waiting in queue:
            queue.remove(waiting)
            self._queues.move_to_end(place)
            if not queue:
                del self._queues[place]

    def _end(self, key: str, sequences: int) -> None:
        self._unfinished -= Counter({key: sequences})
        self._counted -= Counter({key: self._share(sequences)})
