# SPDX-License-Identifier: MIT
"""Threads and queues that API keys share fairly: keys take turns, however many requests each of them sends.

A thread that works on a large request can hold the interpreter lock for 0.1 s, to scan or copy a string. Several such
threads would delay every step of the event loop, so `apart` runs one of them at a time.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar, cast

from candle_vllm.core.errors import EngineOverloadedError

T = TypeVar("T")

MOST_WAITING = 60.0  # maximum number of seconds for which a request waits for a thread
BIG = 64 << 10  # bytes; the steps of larger requests run one at a time
MAX_STEPS = 4096  # maximum number of waiting jobs of each kind, see `apart`

asker: ContextVar[str] = ContextVar("asker", default="")
"""Label of the current request's API key; empty on a server that does not distinguish callers."""


@dataclass(eq=False)
class RequestBytes:
    """Counts the bytes of a request, and of the stored responses that it continues, until its prompt is tokenized.

    Attributes:
        size: all bytes; at first, the bytes of the body.
    """

    size: int = 0
    _count: Callable[[int], object] | None = None
    _counted: int = 0

    def add(self, size: int) -> None:
        """Add the bytes of a stored response that the request continues; raises what `count` of `hold` raises."""
        self.size += size
        self._count_all()

    def hold(self, count: Callable[[int], object]) -> None:
        """Pass the bytes beyond `BIG` to `count`, now and when they grow; `release` passes their negative sum.

        Bytes for which `count` raises are not counted.
        """
        if self._count is None:
            self._count = count
            self._count_all()

    def release(self) -> None:
        """Release the bytes, because the request is tokenized or has ended."""
        count, counted, self._count, self._counted = self._count, self._counted, None, 0
        if count is not None and counted:
            count(-counted)

    def moved(self) -> RequestBytes:
        """Move the account to a new object, for work that continues without the request."""
        other = RequestBytes(self.size, self._count, self._counted)
        self._count, self._counted = None, 0
        return other

    def _count_all(self) -> None:
        more = max(0, self.size - BIG) - self._counted
        if self._count is not None and more:
            self._count(more)
            self._counted += more


request_bytes: ContextVar[RequestBytes] = ContextVar("request_bytes")


def this_request() -> RequestBytes:
    """Return the account of the current request, which is created on first use."""
    mine = request_bytes.get(None)
    if mine is None:
        request_bytes.set(mine := RequestBytes())
    return mine


class FairQueue(Generic[T]):
    """A queue in which keys take turns; the items of one key are in order of arrival."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[T]] = {}  # ordered by turn, the next key first; every key has an item

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def count(self, key: str) -> int:
        return len(self._waiting.get(key, ()))

    def add(self, key: str, item: T) -> None:
        self._waiting.setdefault(key, deque()).append(item)

    def take(self, may_go: Callable[[str], bool] = lambda _: True) -> T | None:
        """Remove and return the next item of the first key for which `may_go` is true; the key becomes the last one."""
        key = next(filter(may_go, self._waiting), None)
        if key is None:
            return None
        items = self._waiting.pop(key)
        item = items.popleft()
        if items:
            self._waiting[key] = items
        return item

    def remove(self, key: str, item: T) -> None:
        """Remove an item if it is in the queue."""
        items = self._waiting.get(key, deque())
        if item in items:
            items.remove(item)
            if not items:
                del self._waiting[key]


class _Job(NamedTuple):
    asker: str
    work: Callable[[], Any]
    result: Future[Any]
    until: float  # `time.monotonic()` after which the job is not started


class FairThreads:
    """A few threads and a queue of jobs in which askers take turns; one asker uses half of the threads at most, or one.

    One asker's limits do not apply to the empty asker. A thread is busy until its job ends, even if `run` is cancelled.

    Args:
        name: name of the work, for messages.
        most: number of threads.
        waiting: maximum number of waiting jobs; one asker may have half of them.
    """

    def __init__(self, name: str, most: int, waiting: int) -> None:
        self._threads = ThreadPoolExecutor(most, f"candle-vllm-{name.replace(' ', '-')}")
        self._name, self._most, self._most_waiting = name, most, waiting
        self._lock = threading.Lock()  # guards the queue and the running jobs
        self._waiting = FairQueue[_Job]()
        self._running: Counter[str] = Counter()
        self._closed = False

    async def run(self, work: Callable[[], T], who: str | None = None, ended: Callable[[], object] | None = None) -> T:
        """Run a function in one of the threads, in the context of the caller, and return its result.

        Args:
            who: the asker; None uses the asker of this context.
            ended: called once the work has ended or can no longer start: before this coroutine ends, or later in the
                event loop if the coroutine was cancelled and the work continues.

        Raises:
            EngineOverloadedError: too many jobs wait, this job has waited too long, or the threads are closed.
        """
        step = cast("Callable[[], T]", partial(copy_context().run, work))
        job = _Job(asker.get() if who is None else who, step, Future(), time.monotonic() + MOST_WAITING)
        result = asyncio.wrap_future(job.result)
        try:
            with self._lock:
                mine, everyone = self._waiting.count(job.asker) if job.asker else 0, len(self._waiting)
                if self._closed or everyone >= self._most_waiting or mine >= self._most_waiting // 2:
                    job.result.cancel()
                    raise EngineOverloadedError(
                        f"{mine or everyone} requests wait for a thread ({self._name}), and no more are accepted: try "
                        "again later"
                    )
                self._waiting.add(job.asker, job)
            self._start()
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
                result.exception()  # mark the exception as retrieved if nobody waits for it
            if ended is not None:
                if job.result.done():
                    ended()
                else:
                    job.result.add_done_callback(partial(_call_back, asyncio.get_running_loop(), ended))
            del job, result, work, step  # an exception from this frame would keep itself and the request's body alive

    async def close(self) -> None:
        """Cancel the waiting jobs, and wait for the running jobs."""
        with self._lock:
            self._closed = True
            while (job := self._waiting.take()) is not None:
                job.result.cancel()
        await asyncio.to_thread(self._threads.shutdown)

    def _start(self) -> None:
        with self._lock:
            while self._running.total() < self._most:
                job = self._waiting.take(lambda who: not who or self._running[who] < max(1, self._most // 2))
                if job is None:
                    return
                if time.monotonic() >= job.until:  # the event loop was too busy to cancel the job in `run`
                    job.result.cancel()
                elif job.result.set_running_or_notify_cancel():
                    self._running[job.asker] += 1
                    self._threads.submit(self._run, [job])

    def _run(self, taken: list[_Job]) -> None:
        job = taken.pop()  # taken from a list, so that the frame of an exception does not keep the job alive
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
    """Run a step of a request in a thread, and return its result; steps of large requests run one at a time.

    `size` is the number of bytes that the step processes (None: of `this_request`). `who`, `ended` and
    EngineOverloadedError are as in `FairThreads.run`.
    """
    small = (this_request().size if size is None else size) <= BIG
    return await (_small if small else _big).run(partial(work, *arguments), who, ended)


def _call_back(loop: asyncio.AbstractEventLoop, ended: Callable[[], object], _: Future[Any]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(ended)
