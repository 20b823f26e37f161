# SPDX-License-Identifier: MIT
"""Admission: a bounded queue before a model's engine, shared fairly between API keys.

Between steps 1 and 2 of a request's life. The engine runs what it is given in order of arrival; so that one key's
thousand requests do not stand before another key's one, they wait here, and a free place goes to the key that has
fewest sequences running. Without keys there is one queue in order of arrival.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from candle_vllm.core.engine.requests import serving_rank
from candle_vllm.openai.fair_threads import asker
from candle_vllm.server.http.errors import HttpError
from candle_vllm.server.http.request_context import NO_KEY, current_request
from candle_vllm.server.observing.metrics import Rejection

MAX_RETRY_AFTER = 60  # seconds
_FADING = 0.9  # weight of the past in the mean time of a request


@dataclass
class Place:
    """The right of a request's sequences to be in the engine; `leave` gives it back, once."""

    admission: Admission
    key: str
    sequences: int
    since: float = field(default_factory=time.monotonic)

    def leave(self) -> None:
        """The request is over."""
        if self.sequences:
            self.admission.left(self)
            self.sequences = 0


class Queued(NamedTuple):
    """A request that waits, for operators; nothing of its content.

    Attributes:
        id: of the HTTP request; empty outside an HTTP request.
        key: label of its API key; "none" without a key.
        sequences: how many it makes, as far as that counts where it waits.
        priority: lower ones go first.
        since: Unix seconds.
    """

    id: str
    key: str
    sequences: int
    priority: int
    since: float

    @classmethod
    def now(cls, sequences: int = 1, priority: int = 0) -> Queued:
        """The request that is being answered begins to wait."""
        context = current_request.get()
        told = ("", NO_KEY) if context is None else (context.http_request_id, context.key_label)
        return cls(*told, sequences, priority, time.time())


@dataclass(eq=False)
class _Waiting:
    key: str
    sequences: int
    entered: asyncio.Future[Place]
    queued: Queued


class RetiredError(Exception):
    """The model has gone while a request waited for a place in it."""


class Admission:
    """The places of one model.

    Args:
        capacity: sequences that may be in the engine at a time. A request of more than half of them counts as half: so
            the engine need not be emptied for it, and what it has beyond waits in the engine.
        max_unfinished: sequences in the engine and before it; beyond, requests are refused with 503.
        max_per_key: the same of one key; beyond, its requests get 429. None is half of all, where there are
            several keys.
        refused: told of every refusal.
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
        self._taken = 0  # of the capacity
        self._counted: Counter[str] = Counter()  # of what may be unfinished: of a request, its share of the capacity
        self._unfinished: Counter[str] = Counter()
        self._queues: OrderedDict[tuple[int, str], deque[_Waiting]] = OrderedDict()  # by priority and key
        self._seconds = 1.0  # mean time of a request in the engine

    @property
    def running(self) -> int:
        """Sequences in the engine."""
        return self._running.total()

    @property
    def waiting(self) -> int:
        """Sequences before it."""
        return self._unfinished.total() - self.running

    @property
    def queue(self) -> list[Queued]:
        """The requests before it, in no order between keys."""
        return [one.queued for queue in self._queues.values() for one in queue]

    async def enter(self, key: str, sequences: int, priority: int = 0) -> Place:
        """Waits for a place. Cancelling it gives the wait up.

        Args:
            key: whose request it is.
            sequences: how many it makes, at least 1.
            priority: lower ones enter first.

        Raises:
            HttpError: 503 or 429 with Retry-After when too much is waiting.
        """
        self._check_room(key, sequences)
        self._unfinished[key] += sequences
        self._counted[key] += self._share(sequences)
        if not self._queues and self._fits(sequences):
            return self._begin(key, sequences)
        entered = asyncio.get_running_loop().create_future()
        waiting = _Waiting(key, sequences, entered, Queued.now(sequences, priority))
        self._queues.setdefault((priority, key), deque()).append(waiting)
        try:
            return await waiting.entered
        except asyncio.CancelledError:
            self._give_up(waiting)
            raise

    def close(self) -> None:
        """The model has gone: who waits for a place in it hears so (`RetiredError`)."""
        for queue in self._queues.values():
            for waiting in queue:
                if not waiting.entered.done():
                    waiting.entered.set_exception(RetiredError())
                self._end(waiting.key, waiting.sequences)
        self._queues.clear()

    def left(self, place: Place) -> None:
        """Takes a place back; called by `Place.leave`."""
        self._forget(self._running, place.key, place.sequences)
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
        """How long the engine will need for what is there, as far as the past tells."""
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
        """Fills free places. The next in line is waited for, also when a smaller request behind it would fit."""
        while self._queues:
            first = min(self._queues, key=lambda each: serving_rank(each[0], running=self._running[each[1]]))
            waiting = self._queues[first][0]
            if not waiting.entered.cancelled():
                if not self._fits(waiting.sequences):
                    return
                waiting.entered.set_result(self._begin(waiting.key, waiting.sequences))
            self._remove(waiting)

    def _give_up(self, waiting: _Waiting) -> None:
        if waiting.entered.done() and not waiting.entered.cancelled():
            if waiting.entered.exception() is not None:  # the model has gone
                return
            waiting.entered.result().leave()  # it was let in in the tick in which it was cancelled
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
        self._forget(self._unfinished, key, sequences)
        self._forget(self._counted, key, self._share(sequences))

    @staticmethod
    def _forget(counter: Counter[str], key: str, count: int) -> None:
        counter[key] -= count
        if not counter[key]:
            del counter[key]
