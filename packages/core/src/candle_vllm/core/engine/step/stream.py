# SPDX-License-Identifier: MIT
"""Where the pieces of requests go: into an async iterator, or to a caller that waits for all (behind step 8)."""

from __future__ import annotations

import asyncio
import dataclasses
import queue
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol, Self

from candle_vllm.core.engine.outputs import FinishReason, GenerationOutput, OutputCollector, TokenOutput
from candle_vllm.core.engine.requests import GenerationRequest, PoolingRequest
from candle_vllm.core.engine.step.thread import Delivery, RequestRunner, Sink
from candle_vllm.core.engine.step.watching import RequestWatch
from candle_vllm.core.errors import (
    CandleVllmError,
    EngineOverloadedError,
    RequestAbortedError,
    RequestError,
)

MAX_UNREAD = 1 << 16
"""Pieces of a request that wait for their reader; beyond them it is aborted."""

Shortcut = Callable[[TokenOutput], bool]
"""Takes a piece in the tick in which it comes, or leaves it to the reader: False."""


Bar = bool | Callable[..., Any]
"""Whether a progress bar is shown, on a terminal; or what makes one wherever it is, called as tqdm is."""


class Source(Protocol):
    """Where a `TokenStream` has its pieces from.

    Attributes:
        shortcut: asked first for a piece that the reader waits for; may be ignored.
    """

    shortcut: Shortcut | None

    async def take(self) -> TokenOutput | Exception:
        """The next piece, or the error that ends the request."""
        ...


class Inbox:
    """Where the engine puts the pieces of one request; without a shortcut it does not keep the stream alive."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.shortcut: Shortcut | None = None
        self._items: deque[Delivery] = deque()
        self._arrival: asyncio.Future[None] | None = None  # what a reader waits for; nothing is kept then

    def put(self, item: Delivery) -> None:
        """Takes one piece, or the error that ends the request; called in `loop`."""
        arrival = self._arrival
        if arrival is not None and not arrival.done():
            shortcut = self.shortcut
            if shortcut is not None and isinstance(item, TokenOutput) and shortcut(item):
                return  # the reader sleeps on: waking it costs more than all the rest
            arrival.set_result(None)
        self._arrival = None
        if len(self._items) < MAX_UNREAD:
            self._items.append(item)
        elif not isinstance(self._items[-1], Exception):  # what comes behind is dropped
            self._items[-1] = RequestAbortedError(f"the answer was not read: {MAX_UNREAD} pieces of it waited")

    async def take(self) -> Delivery:
        """The next item; for one reader."""
        while not self._items:  # no asyncio.Queue: it asks for the running loop each time, a system call in 3.11
            self._arrival = self.loop.create_future()
            await self._arrival
        return self._items.popleft()


class TokenStream(AsyncIterator[TokenOutput]):
    """Iterates over the pieces of a request's sequences in the order of the steps that made them.

    Ends when every sequence has finished. Closing it, cancelling the task that waits for it, or dropping it aborts the
    request. A class rather than a generator, so that a stream that is never iterated aborts as well.

    Args:
        request: the request it belongs to.
        abort: called when the consumer goes away early.
        source: gives the next piece, or the error that ends the request.
        watch: told of every piece on its way to the consumer, and of the end; None where nobody watches.
    """

    def __init__(
        self,
        request: GenerationRequest,
        abort: Callable[[], None],
        source: Source,
        watch: RequestWatch | None = None,
    ) -> None:
        self.request = request
        self._source = source
        self._abort = abort
        self._watch = watch
        self._unfinished = request.params.n
        self._closed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TokenOutput:
        if self._unfinished == 0 or self._closed:
            raise StopAsyncIteration
        try:
            item = await self._source.take()
        except asyncio.CancelledError:
            self._close()
            raise
        if isinstance(item, Exception):
            self._unfinished = 0
            if isinstance(item, RequestAbortedError):
                self._abort()  # the engine goes on where the reader was too slow
            if self._watch is not None:
                self._watch.fail(item)
            raise item
        self._unfinished -= item.finished
        if self._watch is not None:
            self._watch.take(item)
        return item

    def shortcut(self, take: Shortcut) -> None:
        """Offers `take` each piece that comes while the consumer waits for one, but the last of a sequence.

        What it takes, the consumer does not get. The stream must be closed then: dropping it is not enough.
        """
        watch = self._watch

        def pass_by(piece: TokenOutput) -> bool:
            if piece.finish_reason is not None or not take(piece):
                return False
            if watch is not None:
                watch.take(piece)
            return True

        self._source.shortcut = pass_by

    async def aclose(self) -> None:
        """Aborts the request unless it has finished."""
        self._close()

    def _close(self) -> None:
        self._source.shortcut = None
        if self._unfinished and not self._closed:
            self._closed = True
            if self._watch is not None:
                self._watch.close()
            self._abort()

    def __del__(self) -> None:
        if self._watch is not None:
            self._watch.drop()
            self._watch = None
        self._close()


class TokenIterator(Iterator[TokenOutput]):
    """`TokenStream` for programs without an event loop: the pieces of a request's sequences as they come.

    Closing it, leaving its `with` block or dropping it aborts what has not finished. A request that fails raises, as in
    `generate`.

    Args:
        thread: runs the request.
        request: the request it belongs to.
        prepared: what the engine's `prepare` made of it.

    Raises:
        EngineOverloadedError, EngineDeadError: the request was not taken.
    """

    def __init__(self, thread: RequestRunner, request: GenerationRequest, prepared: Sequence[Any]) -> None:
        self.request = request
        self._thread = thread
        self._mailbox = _Mailbox()
        self._unfinished = 0
        thread.submit(prepared, self._mailbox)
        self._unfinished = request.params.n

    def __repr__(self) -> str:
        state = "running" if self._unfinished else "ended"
        return f"<TokenIterator of request {self.request.request_id!r}, {state}>"

    def __iter__(self) -> Self:
        return self

    def __aiter__(self) -> NoReturn:
        """Says what an event loop uses."""
        raise TypeError("these are pieces for `for`: an event loop has stream and achat_stream for `async for`")

    def __next__(self) -> TokenOutput:
        if not self._unfinished:
            raise StopIteration
        try:
            piece = self._mailbox.items.get()
            if isinstance(piece, CandleVllmError):
                raise piece
            if not self._unfinished:  # closed by another thread meanwhile
                raise StopIteration
            raise_failure(piece)
        except BaseException:  # an interrupt as well
            self.close()
            raise
        self._unfinished -= piece.finished
        return piece

    def close(self) -> None:
        """Aborts the request unless it has finished."""
        if self._unfinished:
            self._unfinished = 0
            self._thread.abort(self.request.request_id, self._mailbox)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_unfinished", 0):
            self.close()


def run_all(
    thread: RequestRunner, todo: Sequence[tuple[GenerationRequest, Sequence[Any]]], use_tqdm: Bar
) -> Iterator[tuple[int, GenerationOutput]]:
    """Runs requests with no more in the engine at a time than its queue takes; yields each with its number, as it ends.

    Raises:
        RequestAbortedError: the engine was closed meanwhile.
        CandleVllmError: the engine failed on a request.
    """
    sink = _Mailbox()
    collectors: dict[str, tuple[int, OutputCollector]] = {}
    ahead = iter(enumerate(todo))
    try:
        with shown_bar("prompts", len(todo), use_tqdm) as advance:
            waiting = next(ahead, None)
            while waiting or collectors:
                if waiting is not None and _try_submit(thread, waiting, sink, collectors):
                    waiting = next(ahead, None)
                elif collectors:
                    yield sink.next_finished(collectors)
                    advance()
                else:
                    time.sleep(_PAUSE)
    finally:
        for request_id in collectors:
            thread.abort(request_id)


@contextmanager
def shown_bar(what: str, total: int, shown: Bar) -> Iterator[Callable[[], object]]:
    """A progress bar where one is shown; what it gives moves it on by one."""
    if not (callable(shown) or (shown and sys.stderr.isatty())):
        yield lambda: None
        return
    from tqdm import tqdm  # whoever streams shows none

    with (shown if callable(shown) else tqdm)(total=total, desc=what, dynamic_ncols=True) as bar:
        yield bar.update


def _try_submit(
    thread: RequestRunner,
    entry: tuple[int, tuple[GenerationRequest, Sequence[Any]]],
    sink: _Mailbox,
    collectors: dict[str, tuple[int, OutputCollector]],
) -> bool:
    position, (request, prepared) = entry
    try:
        thread.submit(prepared, sink)
    except EngineOverloadedError:
        return False
    collectors[request.request_id] = position, OutputCollector(request)
    return True


class _Mailbox:
    """Pieces for a caller that waits in its own thread."""

    loop = None

    def __init__(self) -> None:
        self.items: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        self.put = self.items.put

    def next_finished(self, collectors: dict[str, tuple[int, OutputCollector]]) -> tuple[int, GenerationOutput]:
        """Waits until one request is complete, and takes it out of `collectors`."""
        while True:
            item = self.items.get()
            if isinstance(item, CandleVllmError):
                raise item
            raise_failure(item)
            position, collector = collectors[item.request_id]
            if collector.add(item):
                del collectors[item.request_id]
                return position, collector.result()


async def whole(stream: TokenStream) -> GenerationOutput:
    """The pieces of a stream as one output; cancelling it aborts the request."""
    collector = OutputCollector(stream.request)
    try:
        async for piece in stream:
            raise_failure(piece)
            collector.add(piece)
    finally:
        await stream.aclose()
    return collector.result()


def raise_failure(piece: TokenOutput) -> None:
    """Raises the error that a piece carries, if it does."""
    if piece.error is not None:
        raise (
            RequestError(piece.error, piece.error_param)
            if piece.error_kind == "request"
            else CandleVllmError(piece.error)
        )
    if piece.finish_reason == FinishReason.ABORT:
        raise RequestAbortedError(f"request {piece.request_id} was aborted")


MAX_UNDER_WAY = 256
"""Requests of one call that the engine holds at a time."""

STEPS_UNDER_WAY = 2
"""Steps' worth of tokens that the engine holds of one call: one runs, and the next is full when it ends. What other
callers ask for meanwhile waits for no more than these."""

_PAUSE = 0.01  # seconds, while other callers fill the queue


@dataclasses.dataclass(frozen=True)
class Entry:
    """A request, and what the engine's `prepare` made of it."""

    request: PoolingRequest
    prepared: Sequence[Any]

    @property
    def length(self) -> int:
        """Tokens of the text."""
        return len(self.request.prompt_token_ids)


class Window:
    """Runs entries to their end; every request has one piece.

    Args:
        thread: the engine.
        entries: in the order of the answers.
        step_tokens: tokens of a full step.
    """

    def __init__(self, thread: RequestRunner, entries: Sequence[Entry], step_tokens: int) -> None:
        self._thread = thread
        self._entries = entries
        self._max_tokens = STEPS_UNDER_WAY * step_tokens
        self._tokens = 0  # of the requests under way
        self._next = 0
        self._under_way: dict[str, int] = {}
        self._pieces: list[TokenOutput | None] = [None] * len(entries)

    def run(self, *, use_tqdm: Bar) -> list[TokenOutput]:
        """The pieces in order, for a caller that waits.

        Raises:
            RequestAbortedError: the engine was closed meanwhile.
            CandleVllmError: the engine failed on a request.
        """
        mailbox = _Mailbox()
        try:
            with shown_bar("texts", len(self._entries), use_tqdm) as advance:
                while self._submit(mailbox, patient=True):
                    if self._under_way:
                        self._take(mailbox.items.get())
                        advance()
                    else:
                        time.sleep(_PAUSE)
        finally:
            self._abort(mailbox)
        return [piece for piece in self._pieces if piece is not None]

    async def arun(self) -> list[TokenOutput]:
        """The same in an event loop; cancelling it aborts what has not ended.

        Raises:
            EngineOverloadedError: the queue is full at the start.
        """
        inbox = Inbox(asyncio.get_running_loop())
        try:
            while self._submit(inbox, patient=False):
                if self._under_way:
                    self._take(await inbox.take())
                else:
                    await asyncio.sleep(_PAUSE)
        finally:
            self._abort(inbox)
        return [piece for piece in self._pieces if piece is not None]

    def _submit(self, sink: Sink, *, patient: bool) -> bool:
        """Hands over as many requests as the window and the queue take; False when all have ended."""
        while self._next < len(self._entries) and self._has_room(self._entries[self._next]):
            entry = self._entries[self._next]
            try:
                self._thread.submit(entry.prepared, sink)
            except EngineOverloadedError:
                if not (patient or self._next):
                    raise
                break
            self._under_way[entry.request.request_id] = self._next
            self._tokens += entry.length
            self._next += 1
        return bool(self._under_way) or self._next < len(self._entries)

    def _has_room(self, entry: Entry) -> bool:
        """Whether one more request may be under way; one alone always may, however long it is."""
        if not self._under_way:
            return True
        return len(self._under_way) < MAX_UNDER_WAY and self._tokens + entry.length <= self._max_tokens

    def _take(self, item: Delivery) -> None:
        if isinstance(item, CandleVllmError):
            raise item
        place = self._under_way.pop(item.request_id)
        self._tokens -= self._entries[place].length
        raise_failure(item)
        self._pieces[place] = item

    def _abort(self, sink: Sink) -> None:
        for request_id in self._under_way:
            self._thread.abort(request_id, sink)
