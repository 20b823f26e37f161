"""The thread that runs the engine's steps, and how requests and pieces cross its boundary."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from candle_vllm.core.engine.engine import Engine
from candle_vllm.core.engine.live import LiveSequence
from candle_vllm.core.engine.request import TokenOutput
from candle_vllm.core.errors import EngineDeadError, EngineOverloadedError, InvalidParameterError

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Where the pieces of one request go."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The event loop in which `put` must be called; None for any thread."""
        ...

    def put(self, item: TokenOutput | EngineDeadError) -> None:
        """Takes one piece, or the error that ends everything."""
        ...


class EngineThread:
    """Runs steps while there is work and sleeps otherwise; wakes at once for a new request.

    Args:
        engine: the engine, which only this thread touches from now on.
        max_requests: most live requests before new ones are refused.
    """

    def __init__(self, engine: Engine, max_requests: int) -> None:
        self._engine = engine
        self._max_requests = max_requests
        self._sinks: dict[str, tuple[Sink, int]] = {}  # request id -> sink, sequences still running
        self._commands: list[Callable[[], None]] = []
        self._wake = threading.Condition()
        self._closing = False
        self._dead: EngineDeadError | None = None
        self._thread = threading.Thread(target=self._run, name="candle-vllm-engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """False once the thread has stopped or failed."""
        return self._thread.is_alive() and self._dead is None and not self._closing

    def submit(self, prepared: Sequence[LiveSequence], sink: Sink) -> None:
        """Hands a prepared request to the engine; its pieces go to `sink`.

        Raises:
            EngineOverloadedError: `max_requests` are live.
            EngineDeadError: the engine has stopped.
            InvalidParameterError: the request id is in use.
        """
        request_id = prepared[0].request.request_id
        with self._wake:
            if self._dead is not None or self._closing:
                raise self._dead or EngineDeadError("the engine is closed")
            if request_id in self._sinks:
                raise InvalidParameterError(f"request id {request_id!r} is in use", "request_id")
            if len(self._sinks) >= self._max_requests:
                raise EngineOverloadedError(
                    f"{len(self._sinks)} requests are running or waiting, which is the limit (--max-queued-requests): "
                    "try again later"
                )
            self._sinks[request_id] = (sink, len(prepared))
            self._commands.append(lambda: self._engine.add(prepared))
            self._wake.notify()

    def abort(self, request_id: str) -> None:
        """Ends a request before the next step; unknown or finished ids are ignored."""
        with self._wake:
            if request_id in self._sinks:
                self._commands.append(lambda: self._deliver(self._engine.abort(request_id)))
                self._wake.notify()

    def close(self) -> None:
        """Aborts what is left, stops the thread and waits for it."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    while not (self._commands or self._closing or self._engine.has_work):
                        self._wake.wait()
                    commands, self._commands = self._commands, []
                for command in commands:
                    command()
                if self._closing:
                    for request_id in list(self._sinks):
                        self._deliver(self._engine.abort(request_id))
                    return
                self._deliver(self._engine.step())
        except BaseException as error:
            logger.exception("the engine thread failed")
            self._die(EngineDeadError(f"the engine has stopped: {type(error).__name__}: {error}"))

    def _deliver(self, pieces: Iterable[TokenOutput]) -> None:
        """Hands the pieces of a step over; one wake-up per event loop, however many requests it has."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Sink, TokenOutput]]] = defaultdict(list)
        for piece in pieces:
            sink, unfinished = self._sinks[piece.request_id]
            if piece.finished:
                with self._wake:
                    if unfinished == 1:
                        del self._sinks[piece.request_id]
                    else:
                        self._sinks[piece.request_id] = (sink, unfinished - 1)
            if sink.loop is None:
                sink.put(piece)
            else:
                by_loop[sink.loop].append((sink, piece))
        for loop, items in by_loop.items():
            _call_in(loop, _put_all, items)

    def _die(self, error: EngineDeadError) -> None:
        with self._wake:
            self._dead = error
            sinks, self._sinks = list(self._sinks.values()), {}
        for sink, _ in sinks:
            if sink.loop is None:
                sink.put(error)
            else:
                _call_in(sink.loop, sink.put, error)


def _put_all(items: Sequence[tuple[Sink, TokenOutput]]) -> None:
    for sink, piece in items:
        sink.put(piece)


def _call_in(loop: asyncio.AbstractEventLoop, function: Callable[..., None], argument: object) -> None:
    try:
        loop.call_soon_threadsafe(function, argument)
    except RuntimeError:
        logger.debug("an event loop was closed before its requests ended")
