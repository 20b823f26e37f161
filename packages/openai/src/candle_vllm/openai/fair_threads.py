# SPDX-License-Identifier: MIT
"""Threads and queues that API keys share fairly: keys take turns, whatever each of them sends.

A thread that works on a big request keeps the interpreter for up to 0.1 s at a time (the scan of a string, a copy).
Several such threads make every step of the event loop wait for each of them, so `apart` runs one of them at a time.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar, cast

from candle_vllm.core.errors import EngineOverloadedError

T = TypeVar("T")

MOST_WAITING = 60.0  # seconds for which a request waits for a thread
BIG = 64 << 10  # bytes of a request whose steps are done one at a time
MAX_STEPS = 4096  # requests that wait for their next step, one for each connection

asker: ContextVar[str] = ContextVar("asker", default="")
"""Whose request this is, as the label of an API key; empty where nobody is told from others."""


class RequestBytes:
    """Bytes of a request, with those of stored responses that it continues; counted until its prompt is made.

    Args:
        size: of its body.

    Attributes:
        size: of all.
    """

    def __init__(self, size: int = 0) -> None:
        self.size = size
        self._count: Callable[[int], object] | None = None
        self._counted = 0

    def add(self, size: int) -> None:
        """The request continues something of a store. Raises what `hold` raises."""
        self.size += size
        self._count_all()

    def hold(self, count: Callable[[int], object]) -> None:
        """Count what is more than `BIG`, until `release`.

        Args:
            count: called with more bytes, or with fewer than none at the end. It may raise, and has not counted then.
        """
        if self._count is None:
            self._count = count
            self._count_all()

    def release(self) -> None:
        """The request is tokens, or over."""
        count, counted, self._count, self._counted = self._count, self._counted, None, 0
        if count is not None:
            count(-counted)

    def moved(self) -> RequestBytes:
        """The same for work that goes on without the request, which counts no more."""
        other = RequestBytes(self.size)
        other._count, other._counted, self._count, self._counted = self._count, self._counted, None, 0
        return other

    def _count_all(self) -> None:
        if self._count is not None:
            more = max(0, self.size - BIG) - self._counted
            self._count(more)
            self._counted += more


request_bytes: ContextVar[RequestBytes] = ContextVar("request_bytes")


def this_request() -> RequestBytes:
    """Bytes of the request that is worked on."""
    mine = request_bytes.get(None)
    if mine is None:
        request_bytes.set(mine := RequestBytes())
    return mine


class FairQueue(Generic[T]):
    """What waits, by keys: keys take turns, and what a key added first goes first."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[T]] = {}  # the key whose turn is next stands first; no key without an item

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def count(self, key: str) -> int:
        """How many items of a key wait."""
        return len(self._waiting.get(key, ()))

    def add(self, key: str, item: T) -> None:
        """Put an item behind those of its key."""
        self._waiting.setdefault(key, deque()).append(item)

    def take(self, may_go: Callable[[str], bool] = lambda _: True) -> T | None:
        """Remove the next item of the first key that may go, which has its next turn behind all others; else None."""
        key = next(filter(may_go, self._waiting), None)
        if key is None:
            return None
        items = self._waiting.pop(key)
        item = items.popleft()
        if items:
            self._waiting[key] = items
        return item

    def remove(self, key: str, item: T) -> None:
        """Remove an item, if it waits."""
        items = self._waiting.get(key, deque())
        if item in items:
            items.remove(item)
            if not items:
                del self._waiting[key]


class _Job(NamedTuple):
    asker: str
    work: Callable[[], Any]
    result: Future[Any]
    until: float  # it is not begun later, by `time.monotonic`


class FairThreads:
    """A few threads, of which one asker has half at most (of one thread, all of it), and a queue of askers.

    A thread is busy until its work ends, whether somebody waits for that or not.

    Args:
        name: of what is worked on.
        most: threads.
        waiting: the most that wait, half of them of one asker.
    """

    def __init__(self, name: str, most: int, waiting: int) -> None:
        self._threads = ThreadPoolExecutor(most, f"candle-vllm-{name.replace(' ', '-')}")
        self._name, self._most, self._most_waiting = name, most, waiting
        self._lock = threading.Lock()  # guards what waits and what runs
        self._waiting = FairQueue[_Job]()
        self._running: Counter[str] = Counter()
        self._closed = False

    async def run(self, work: Callable[[], T], who: str | None = None, ended: Callable[[], object] | None = None) -> T:
        """What a function gives in one of the threads, in the context of the caller.

        Args:
            work: the function.
            who: the asker; None is the one of this context.
            ended: called in the event loop when the work has ended or is not begun any more, whether or not somebody
                waits for it.

        Raises:
            EngineOverloadedError: too many wait, this one has waited too long, or the threads are closed.
        """
        step = cast("Callable[[], T]", partial(copy_context().run, work))
        job = _Job(asker.get() if who is None else who, step, Future(), time.monotonic() + MOST_WAITING)
        if ended is not None:
            job.result.add_done_callback(partial(_call_back, asyncio.get_running_loop(), ended))
        with self._lock:
            self._enter(job)
        self._start()
        result = asyncio.wrap_future(job.result)
        try:
            await asyncio.wait((result,), timeout=MOST_WAITING)
            if job.result.cancel():
                raise EngineOverloadedError(
                    f"the request has waited {MOST_WAITING:.0f} seconds for a thread ({self._name}): try again later"
                )
            return await result
        finally:
            if job.result.cancel():
                with self._lock:
                    self._waiting.remove(job.asker, job)
            if not result.cancel() and not result.cancelled():
                result.exception()  # looked at, where nobody waits for it any more
            del job, result, work, step  # an error that this frame raises would hold itself, and the request's body

    async def close(self) -> None:
        """Wait for what is running; what waits is dropped."""
        with self._lock:
            self._closed = True
            while (job := self._waiting.take()) is not None:
                job.result.cancel()
        await asyncio.to_thread(self._threads.shutdown)

    def _enter(self, job: _Job) -> None:
        mine, everyone = self._waiting.count(job.asker) if job.asker else 0, len(self._waiting)
        if self._closed or everyone >= self._most_waiting or mine >= self._most_waiting // 2:
            job.result.cancel()
            raise EngineOverloadedError(
                f"the {self._name} of {mine or everyone} requests wait for a thread, and no more may: try again later"
            )
        self._waiting.add(job.asker, job)

    def _start(self) -> None:
        """Give free threads to those who wait."""
        with self._lock:
            while self._running.total() < self._most:
                job = self._waiting.take(self._has_room)
                if job is None:
                    return
                if time.monotonic() >= job.until:  # the event loop was too busy to say so
                    job.result.cancel()
                elif job.result.set_running_or_notify_cancel():
                    self._running[job.asker] += 1
                    self._threads.submit(self._run, [job])

    def _has_room(self, who: str) -> bool:
        return not who or self._running[who] < max(1, self._most // 2)

    def _run(self, taken: list[_Job]) -> None:
        job = taken.pop()  # an error holds the frames of the thread, and these hold what they were called with
        who = job.asker
        try:
            job.result.set_result(job.work())
        except BaseException as error:
            job.result.set_exception(error)
        finally:
            del job
            with self._lock:
                self._running[who] -= 1
            self._start()


_big = FairThreads("big bodies", 1, MAX_STEPS)
_small = FairThreads("small steps", 4, MAX_STEPS)


async def apart(
    work: Callable[..., T],
    *arguments: object,
    size: int | None = None,
    who: str | None = None,
    ended: Callable[[], object] | None = None,
) -> T:
    """What a step of a request gives in a thread; of big requests, one step runs at a time.

    Args:
        work, arguments: the step.
        size: bytes that it works on; None is those of `this_request`.
        who, ended: as of `FairThreads.run`.

    Raises:
        EngineOverloadedError: as `FairThreads.run`.
    """
    small = (this_request().size if size is None else size) <= BIG
    return await (_small if small else _big).run(partial(work, *arguments), who, ended)


def _call_back(loop: asyncio.AbstractEventLoop, ended: Callable[[], object], _: Future[Any]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(ended)
