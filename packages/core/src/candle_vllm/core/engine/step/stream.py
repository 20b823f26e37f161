# SPDX-License-Identifier: MIT
"""Deliver outputs to callers: push, iterate, or collect them until the end (after step 9 of a request's life).

In an event loop, every output goes from the engine thread through a `RequestSink` and a chain of `Receiver`s; the last
receiver is an `Unread` if the consumer iterates.
"""

from __future__ import annotations

import asyncio
import dataclasses
import queue
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Generic, NoReturn, Protocol, Self, TypeVar

from candle_vllm.core.engine.outputs import FinishReason, GenerationOutput, OutputCollector, TokenOutput
from candle_vllm.core.engine.requests import GenerationRequest, PoolingRequest
from candle_vllm.core.engine.step.request_watchers import RequestWatch
from candle_vllm.core.engine.step.thread import Delivery, RequestRunner, Sink
from candle_vllm.core.errors import CandleVllmError, EngineOverloadedError, RequestAbortedError, RequestError

MAX_UNREAD = 1 << 16
"""Maximum number of queued items; more end the stream with an error, and reading the error aborts the request."""

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)

Bar = bool | Callable[..., Any]
"""Whether to show a progress bar on a terminal, or a function like tqdm that makes a progress bar."""


class Receiver(Protocol[T_contra]):
    """A stage of the chain through which outputs are pushed; called in the event loop of the stream.

    A stage neither waits nor raises: if it fails, it ends the next stage with the error.
    """

    def put(self, items: Sequence[T_contra], /) -> None: ...

    def end(self, error: Exception | None = None, /) -> None:
        """End the stream; called once, after the last item. With an error, items are missing."""


@dataclasses.dataclass(eq=False, repr=False)
class Unread(Generic[T]):
    """The last stage of a chain whose consumer iterates: a queue of items."""

    _items: deque[T] = dataclasses.field(default_factory=deque[T])
    _errors: list[Exception] = dataclasses.field(default_factory=list[Exception])
    _ended: bool = False
    _loop: asyncio.AbstractEventLoop | None = None
    _arrival: asyncio.Future[None] | None = None  # the consumer waits for this future

    def put(self, items: Sequence[T]) -> None:
        """Queue items; too many end the stream with a `RequestAbortedError`."""
        if not self._ended:
            self._items.extend(items)
            self._wake()
            if len(self._items) > MAX_UNREAD:
                self.end(RequestAbortedError(f"the stream was not read: {MAX_UNREAD} outputs were waiting"))

    def end(self, error: Exception | None = None) -> None:
        """End the stream; the consumer gets the error, if any, after all items."""
        if not self._ended:
            self._ended = True
            self._errors += [] if error is None else [error]
            self._wake()

    def clear(self) -> None:
        """Drop all items and end the stream."""
        self._items.clear()
        self._errors.clear()
        self.end()

    def pour(self, receiver: Receiver[T], is_held: Callable[[], bool]) -> bool:
        """Push the queued items and the end to `receiver`, until `is_held` returns True; return whether all ended."""
        while self._items and not is_held():
            receiver.put((self._items.popleft(),))
        if self._ended and not self._items:
            receiver.end(self._errors.pop() if self._errors else None)
        return self._ended and not self._items

    async def take(self) -> T:
        """Return the next item; at the end raise its error once, then `StopAsyncIteration`."""
        loop = self._loop = self._loop or asyncio.get_running_loop()  # finding the loop is a system call in Python 3.11
        while not self._items:
            if self._ended:
                raise self._errors.pop() if self._errors else StopAsyncIteration
            self._arrival = loop.create_future()
            await self._arrival
        return self._items.popleft()

    def _wake(self) -> None:
        arrival, self._arrival = self._arrival, None
        if arrival is not None and not arrival.done():
            arrival.set_result(None)


class PushStream(ABC, AsyncIterator[T]):
    """Items of a request for one consumer, which either gets them pushed (`push`) or iterates over them.

    Closing the stream aborts the request. So does cancelling the task that waits for an item, or dropping the stream if
    no stage of the chain refers to it.
    """

    _unread: Unread[T] | None = None

    @abstractmethod
    def push(self, receiver: Receiver[T]) -> None:
        """Push all items to `receiver` as they arrive; may be called once."""

    @abstractmethod
    def hold(self, held: bool) -> None:
        """Queue items in the sink if `held`, for a slow receiver; otherwise push queued items and all later ones."""

    @abstractmethod
    def close(self) -> None:
        """Abort the request unless it has finished; no further item is pushed."""

    async def __anext__(self) -> T:
        if self._unread is None:
            self._unread = Unread()
            self.push(self._unread)
        try:
            return await self._unread.take()
        except BaseException:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """Abort the request unless it has finished."""
        if self._unread is None:
            self._unread = Unread(_ended=True)
        else:
            self._unread.clear()
        self.close()


@dataclasses.dataclass(eq=False, repr=False, slots=True)
class RequestSink:
    """The sink of one request in an event loop: pushes the engine's outputs to its receiver.

    It does not refer to the stream, so dropping the stream aborts the request.

    Args:
        loop: event loop in which all methods are called; a finaliser may call `close` in any thread.
        unfinished: number of sequences of the request.
        abort: aborts the request in the engine; called with this sink.
        watch: notified of every output and of the end; None without an observer.
    """

    loop: asyncio.AbstractEventLoop | None
    _unfinished: int
    _abort: Callable[[RequestSink], None]
    _watch: RequestWatch | None = None
    _over: bool = False
    _held: bool = True
    _kept: Unread[TokenOutput] = dataclasses.field(default_factory=Unread[TokenOutput])  # queue while `_held`
    _receiver: Receiver[TokenOutput] = dataclasses.field(init=False)

    def put(self, item: Delivery) -> None:
        """Push one output, or the error that ends the request."""
        if self._over:
            return
        receiver, watch = self._kept if self._held else self._receiver, self._watch
        if isinstance(item, Exception):
            self._over, self._unfinished = True, 0
            if watch is not None:
                watch.fail(item)
            receiver.end(item)
            return
        if watch is not None:
            watch.take(item)
        self._unfinished -= item.finish_reason is not None
        receiver.put((item,))
        if not self._unfinished and not self._over:
            self._over = True
            (self._kept if self._held else receiver).end()

    def start(self, receiver: Receiver[TokenOutput]) -> None:
        """Push to `receiver` from now on."""
        self._receiver = receiver
        self.hold(False)

    def hold(self, held: bool) -> None:
        """Queue outputs if `held`, as before `start`; otherwise push the queued outputs and all later ones."""
        self._held = held
        if held:
            return
        closed = self._kept  # `close` makes it the receiver
        if closed.pour(self._receiver, lambda: self._held or self._receiver is closed):
            self._receiver = closed  # nothing may follow the end, even if the engine generates more

    def close(self, *, dropped: bool = False) -> None:
        """Abort the request unless it has finished; push no further output. A finaliser sets `dropped`."""
        self._receiver = self._kept
        if self._over and not self._held:  # all outputs have been pushed
            return
        self._over, unfinished, self._unfinished = True, self._unfinished, 0
        self._kept.clear()
        if self._watch is not None and dropped:
            self._watch.drop()
        elif self._watch is not None and unfinished:
            self._watch.close()
        if unfinished:
            self._abort(self)


@dataclasses.dataclass(eq=False, repr=False)
class TokenStream(PushStream[TokenOutput]):
    """The outputs of a request's sequences in the order of steps; ends when every sequence has ended.

    Attributes:
        request: the request.
        sink: the sink to which the engine delivers the outputs.
    """

    request: GenerationRequest
    sink: RequestSink

    def push(self, receiver: Receiver[TokenOutput]) -> None:
        self.sink.start(receiver)

    def hold(self, held: bool) -> None:
        self.sink.hold(held)

    def close(self) -> None:
        self.sink.close()

    def __del__(self) -> None:
        self.sink.close(dropped=True)


class TokenIterator(Iterator[TokenOutput]):
    """`TokenStream` for programs without an event loop: the outputs of a request's sequences as they arrive.

    Closing it, leaving its `with` block or dropping it aborts unfinished sequences. Errors are raised as in `generate`.

    Args:
        thread: thread that runs the request.
        request: the request.
        prepared: the request's sequences, from the engine's `prepare`.

    Raises:
        CandleVllmError: the request was refused; see `EngineThread.submit`.
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
        """Raise a TypeError that names the methods for an event loop."""
        raise TypeError("TokenIterator is not an async iterator: in an event loop use `stream` or `achat_stream`")

    def __next__(self) -> TokenOutput:
        if not self._unfinished:
            raise StopIteration
        try:
            output = self._mailbox.items.get()
            if isinstance(output, CandleVllmError):
                raise output
            if not self._unfinished:  # another thread has closed the iterator
                raise StopIteration
            raise_failure(output)
        except BaseException:  # also KeyboardInterrupt
            self.close()
            raise
        self._unfinished -= output.finished
        return output

    def close(self) -> None:
        """Abort the request unless it has finished."""
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
    """Run requests, as many at once as the engine's queue accepts; yield index and output of each when it ends.

    Raises:
        RequestAbortedError: a request was aborted, such as by closing the engine.
        CandleVllmError: a request was refused or failed, or the engine has stopped.
    """
    sink = _Mailbox()
    collectors: dict[str, tuple[int, OutputCollector]] = {}
    ahead = deque(enumerate(todo))
    try:
        with shown_bar("prompts", len(todo), use_tqdm) as advance:
            while ahead or collectors:
                with suppress(EngineOverloadedError):
                    while ahead:
                        position, (request, prepared) = ahead[0]
                        thread.submit(prepared, sink)
                        collectors[request.request_id] = position, OutputCollector(request)
                        ahead.popleft()
                if collectors:
                    yield sink.next_finished(collectors)
                    advance()
                else:
                    time.sleep(_PAUSE)
    finally:
        for request_id in collectors:
            thread.abort(request_id)


@contextmanager
def shown_bar(what: str, total: int, shown: Bar) -> Iterator[Callable[[], object]]:
    """Show a progress bar by `shown`, see `Bar`; yield a function that advances it by one."""
    if not (callable(shown) or (shown and sys.stderr is not None and sys.stderr.isatty())):
        yield lambda: None
        return
    from tqdm import tqdm  # imported here because streaming does not need it

    with (shown if callable(shown) else tqdm)(total=total, desc=what, dynamic_ncols=True) as bar:
        yield bar.update


class _Mailbox:
    """Sink for a caller that waits in its own thread."""

    loop = None

    def __init__(self) -> None:
        self.items: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        self.put = self.items.put

    def next_finished(self, collectors: dict[str, tuple[int, OutputCollector]]) -> tuple[int, GenerationOutput]:
        """Wait until a request is complete; remove it from `collectors`, and return its index and output."""
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
    """Collect a stream into one output; cancelling this aborts the request."""
    collector = OutputCollector(stream.request)
    try:
        async for output in stream:
            raise_failure(output)
            collector.add(output)
    finally:
        await stream.aclose()
    return collector.result()


def raise_failure(output: TokenOutput) -> None:
    """Raise the error of an output, if it has one, and `RequestAbortedError` if the request was aborted."""
    if output.error is not None and output.error_kind == "request":
        raise RequestError(output.error, output.error_param)
    if output.error is not None:
        raise CandleVllmError(output.error)
    if output.finish_reason == FinishReason.ABORT:
        raise RequestAbortedError(f"request {output.request_id} was aborted")


MAX_UNDER_WAY = 256
"""Maximum number of requests that one call has in the engine at a time."""

STEPS_UNDER_WAY = 2
"""Number of steps whose tokens one call may have in the engine, unless a single text is longer."""

_PAUSE = 0.01  # seconds between attempts while other callers fill the queue


@dataclasses.dataclass(frozen=True)
class Entry:
    """A pooling request and its prepared sequence."""

    request: PoolingRequest
    prepared: Sequence[Any]

    @property
    def length(self) -> int:
        """Number of tokens of the text."""
        return len(self.request.prompt_token_ids)


class Window:
    """Runs pooling requests, a limited number at once; each has one output.

    Args:
        thread: thread of the engine.
        entries: the requests, in the order of the results.
        step_tokens: maximum number of tokens of a step.
    """

    def __init__(self, thread: RequestRunner, entries: Sequence[Entry], step_tokens: int) -> None:
        self._thread = thread
        self._entries = entries
        self._max_tokens = STEPS_UNDER_WAY * step_tokens
        self._tokens = 0  # tokens of the running requests
        self._next = 0
        self._under_way: dict[str, int] = {}
        self._outputs: list[TokenOutput | None] = [None] * len(entries)

    def run(self, *, use_tqdm: Bar) -> list[TokenOutput]:
        """Run all requests and return their outputs in order; blocks the calling thread. Raises as `run_all`."""
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
        return [output for output in self._outputs if output is not None]

    async def arun(self) -> list[TokenOutput]:
        """Like `run`, in an event loop; cancelling it aborts the unfinished requests. Raises EngineOverloadedError if
        the queue is full at the start."""
        outputs = Unread[TokenOutput]()
        sink = RequestSink(asyncio.get_running_loop(), len(self._entries), lambda _: None)
        sink.start(outputs)
        try:
            while self._submit(sink, patient=False):
                if self._under_way:
                    self._take(await outputs.take())
                else:
                    await asyncio.sleep(_PAUSE)
        finally:
            self._abort(sink)
        return [output for output in self._outputs if output is not None]

    def _submit(self, sink: Sink, *, patient: bool) -> bool:
        """Submit as many requests as the window and the queue accept; return False when all have ended."""
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
        """Return whether another request may run; a request of any length may run if no other runs."""
        if not self._under_way:
            return True
        return len(self._under_way) < MAX_UNDER_WAY and self._tokens + entry.length <= self._max_tokens

    def _take(self, item: Delivery) -> None:
        if isinstance(item, CandleVllmError):
            raise item
        place = self._under_way.pop(item.request_id)
        self._tokens -= self._entries[place].length
        raise_failure(item)
        self._outputs[place] = item

    def _abort(self, sink: Sink) -> None:
        for request_id in self._under_way:
            self._thread.abort(request_id, sink)
