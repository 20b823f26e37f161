# SPDX-License-Identifier: MIT
"""The thread that runs the engine's steps, and how requests and outputs are passed to and from it."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Future
from functools import partial
from typing import Any, Protocol

from candle_vllm.core.engine.outputs import TokenOutput, joined
from candle_vllm.core.engine.requests import GenerationRequest
from candle_vllm.core.engine.runners.sleeping import TAGS
from candle_vllm.core.engine.stats import EngineStats
from candle_vllm.core.errors import (
    CandleVllmError,
    EngineDeadError,
    EngineOverloadedError,
    EngineSleepingError,
    InvalidParameterError,
)
from candle_vllm.core.threads import deep_stacks

logger = logging.getLogger(__name__)

SLEEPS = "the engine sleeps: wake it up (`wake_up`, POST /wake_up), or try again later"
_LOOK = 0.01  # seconds between two checks whether all requests have ended

BATCH = 8  # number of items that are passed to sinks before the event loop polls its sockets

Delivery = TokenOutput | CandleVllmError
"""What a caller gets: an output, or the error that ends its request."""


class Sink(Protocol):
    """Receiver of the outputs of a request; several requests may share a sink."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The event loop in which `put` must be called; None for any thread."""

    def put(self, item: Delivery) -> None:
        """Take one output, or the error that ends the request."""


_Item = tuple[Sink, TokenOutput]


class OutputQueue:
    """Output queue of an event loop `loop`: calls its sinks there, in batches. Items of one request keep their order.

    A step of a thousand sequences wakes a thousand readers. If all are woken at once, the loop does not poll its
    sockets until the last one has run. Between two batches it polls them, and reads requests that have arrived. First
    outputs are delivered before all others, because they determine the time to the first token.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._first: deque[tuple[Sink, Delivery]] = deque()
        self._others: deque[tuple[Sink, Delivery]] = deque()
        self._under_way = False

    def send(self, first: Sequence[tuple[Sink, Delivery]], others: Sequence[tuple[Sink, Delivery]]) -> None:
        """Queue the first items of sinks, and other items, with one wake-up of the loop; from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._hand_out, first, others)
        except RuntimeError:
            logger.debug("an event loop was closed before its requests ended")

    def _hand_out(
        self, first: Sequence[tuple[Sink, Delivery]] = (), others: Sequence[tuple[Sink, Delivery]] = ()
    ) -> None:
        """Queue the given items and hand out a batch, unless a call for the next batch is pending."""
        self._first.extend(first)
        self._others.extend(others)
        if self._under_way and (first or others):
            return
        try:
            for _ in range(BATCH):
                queue = self._first or self._others
                if not queue:
                    break
                sink, item = queue.popleft()
                sink.put(item)
        finally:  # the loop reports a sink's exception, and the other sinks get their items
            self._under_way = bool(self._first or self._others)
            if self._under_way:
                self._loop.call_soon(self._hand_out)


@dataclasses.dataclass(slots=True)
class _Client:
    """A live request: the sink of its caller, and its number of unfinished sequences."""

    sink: Sink
    unfinished: int
    interval: int = 1  # new tokens of each output that is delivered, after the first token
    begun: bool = False  # whether the sink has had an output
    held: dict[int, list[TokenOutput]] = dataclasses.field(default_factory=dict)  # by index, once it has had a token

    def due(self, piece: TokenOutput) -> TokenOutput | None:
        """Return an output, joined with those before it that were held back.

        Outputs with fewer than `interval` tokens are held back, unless the sequence ends; the result is then None.
        """
        if piece.index not in self.held:  # the first token is not held back
            if piece.token_ids:
                self.held[piece.index] = []
            return piece
        held = self.held[piece.index]
        held.append(piece)
        if piece.finish_reason is None and sum(len(each.token_ids) for each in held) < self.interval:
            return None
        self.held[piece.index] = []
        return joined(held)


class PreparingEngine(Protocol):
    """The part of an engine that prepares requests, before they are submitted to a `RequestRunner`."""

    max_model_len: int

    @property
    def max_step_tokens(self) -> int: ...

    def prepare(self, request: GenerationRequest) -> Sequence[Any]: ...

    def stats(self) -> EngineStats: ...


class RequestRunner(Protocol):
    """Runs prepared requests: an `EngineThread`, whose methods these are, or a fleet of them."""

    @property
    def is_sleeping(self) -> bool: ...

    def submit(self, prepared: Sequence[Any], sink: Sink) -> None: ...

    def abort(self, request_id: str, sink: Sink | None = None) -> None: ...

    def reset_prefix_cache(self) -> None: ...

    def sleep(self, level: int, mode: str) -> None: ...

    def wake_up(self, tags: frozenset[str]) -> None: ...


class StepEngine(PreparingEngine, Protocol):
    """The engine that an `EngineThread` drives: `Engine` or `RemoteLink`."""

    @property
    def has_work(self) -> bool: ...

    @property
    def waits(self) -> bool:
        """True while a step would do nothing, until `wake` or another command."""

    def add(self, prepared: Sequence[Any]) -> None: ...

    def abort(self, request_id: str) -> list[TokenOutput]: ...

    def reset_prefix_cache(self) -> None: ...

    def sleep(self, level: int) -> list[TokenOutput]: ...

    def wake_up(self, tags: Sequence[str]) -> None: ...

    def step(self) -> list[TokenOutput]: ...


class EngineThread:
    """The thread that runs an engine's steps. Without work it waits, until a request arrives.

    Args:
        engine: the engine; other threads may call only its methods that may run in any thread.
        max_sequences: maximum number of live sequences; a request beyond it is refused, unless no request is live.
        after_step: called in the thread after each step, when its outputs have been delivered.
        stream_interval: minimum of `SamplingParams.stream_interval`.
    """

    def __init__(
        self,
        engine: StepEngine,
        max_sequences: int,
        after_step: Callable[[], None] | None = None,
        stream_interval: int = 1,
    ) -> None:
        self._engine = engine
        self._after_step = after_step
        self._max_sequences, self._stream_interval = max_sequences, stream_interval
        self._clients: dict[str, _Client] = {}
        self._live_sequences = 0
        self._commands: list[Callable[[], None]] = []
        self._queues: dict[asyncio.AbstractEventLoop, OutputQueue] = {}  # used by this thread only
        self._lock = threading.RLock()  # guards the attributes that callers and the engine's thread use
        self._wake = threading.Condition(self._lock)
        self._asleep: frozenset[str] = frozenset()  # tags of freed memory; unless it is empty, requests are refused
        self._answers: set[Future[Any]] = set()  # calls that wait
        self._sleep_lock = threading.Lock()  # serialises `sleep` and `wake_up`
        self._closing = False
        self._dead: str | None = None  # the message: an error that is raised again keeps the frames of every caller
        self._owner = os.getpid()
        self._thread = threading.Thread(target=self._run, name="candle-vllm-engine", daemon=True)
        with deep_stacks():
            self._thread.start()

    @property
    def is_alive(self) -> bool:
        """False if the thread has stopped or failed."""
        return self._thread.is_alive() and self._dead is None and not self._closing

    def submit(self, prepared: Sequence[Any], sink: Sink) -> None:
        """Submit a request's prepared sequences (`Live`, `Payload`) to the engine; its outputs go to `sink`.

        Raises:
            EngineOverloadedError: too many sequences are live.
            EngineDeadError: the engine has stopped.
            EngineSleepingError: the engine sleeps.
            InvalidParameterError: the request id is in use.
        """
        request_id = prepared[0].request.request_id
        with self._wake:
            if self._dead is not None or self._closing:
                raise EngineDeadError(self._dead or "the engine is closed")
            if self._asleep:
                raise EngineSleepingError(SLEEPS)
            if request_id in self._clients:
                raise InvalidParameterError(f"request id {request_id!r} is in use", "request_id")
            if self._clients and self._live_sequences + len(prepared) > self._max_sequences:
                raise EngineOverloadedError(
                    f"{self._live_sequences} sequences are running or waiting, and at most {self._max_sequences} are "
                    "allowed (`max_queued_requests`): try again later"
                )
            interval = max(self._stream_interval, prepared[0].request.params.stream_interval or 1)
            self._clients[request_id] = _Client(sink, len(prepared), interval)
            self._live_sequences += len(prepared)
            self._command(lambda: self._engine.add(prepared))

    def abort(self, request_id: str, sink: Sink | None = None) -> None:
        """End a request before the next step; unknown or finished ids are ignored.

        With `sink`, the request ends only if it still belongs to `sink`, because ids may be used again.
        """
        if os.getpid() != self._owner:  # called by the finaliser of a stream in a forked child
            return
        with self._wake:
            client = self._clients.get(request_id)
            if client is not None and sink in (None, client.sink):
                self._command(lambda: self._abort(request_id, client))

    def reset_prefix_cache(self) -> None:
        """Clear the prefix cache before the next step and before every later request."""
        with self._wake:
            if self._dead is not None or self._closing:
                raise EngineDeadError(self._dead or "the engine is closed")
            self._command(self._engine.reset_prefix_cache)

    @property
    def is_sleeping(self) -> bool:
        """Whether any memory of the engine is freed by `sleep`."""
        return bool(self._asleep)

    def sleep(self, level: int, mode: str) -> None:
        """Refuse new requests, abort all others or wait until they end, then free memory; see `InferenceEngine.sleep`.

        Raises:
            CandleVllmError: the engine cannot sleep at this level, or memory is too small.
            EngineDeadError: the engine has stopped.
        """
        with self._sleep_lock:
            with self._wake:
                before, self._asleep = self._asleep, TAGS
            try:
                while mode == "wait" and self._clients and self.is_alive:
                    time.sleep(_LOOK)
                self._engine_sleep(level)
            except EngineSleepingError:  # neither asleep nor awake: only `wake_up` helps
                raise
            except BaseException:
                with self._wake:
                    self._asleep = before
                raise

    def wake_up(self, tags: frozenset[str]) -> None:
        """Restore the memory of these tags; requests are accepted when all tags are restored. Raises as `sleep`."""
        with self._sleep_lock:
            try:
                self._engine_wake_up(tags)
            except BaseException:
                with self._wake:
                    self._asleep = self._asleep and TAGS  # all of the engine stays asleep
                raise
            with self._wake:
                self._asleep -= tags

    def _engine_sleep(self, level: int) -> None:
        self._call(partial(_settle, lambda: self._deliver(self._engine.sleep(level))))

    def _engine_wake_up(self, tags: frozenset[str]) -> None:
        self._call(partial(_settle, lambda: self._engine.wake_up(sorted(tags))))

    def _call(self, ask: Callable[[Future[Any]], None], patience: float | None = None, most: float = math.inf) -> Any:
        """Have the thread run `ask` between two steps, and wait for the answer that it sets. Raises EngineDeadError if
        the engine has stopped, EngineOverloadedError if `most` other calls wait already, and TimeoutError without an
        answer within `patience` seconds."""
        answer: Future[Any] = Future()
        with self._wake:
            if self._dead is not None or self._closing:
                raise EngineDeadError(self._dead or "the engine is closed")
            if len(self._answers) >= most:
                raise EngineOverloadedError(f"{len(self._answers)} calls to the engine are waiting: try again later")
            self._answers.add(answer)
            self._command(partial(ask, answer))
        try:
            return answer.result(patience)
        except TimeoutError:
            answer.cancel()
            raise
        except CancelledError:
            raise EngineDeadError(self._dead or "the engine is closed") from None
        finally:
            with self._wake:
                self._answers.discard(answer)
            del answer  # its exception refers to this frame

    def _command(self, command: Callable[[], None]) -> None:
        """Have the thread run `command` before its next step."""
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def wake(self) -> None:
        """Run a step even if the engine waits; from any thread."""
        self._command(lambda: None)

    def fail(self, error: EngineDeadError) -> None:
        """End the engine with an error before its next step; from any thread."""

        def end() -> None:
            raise error

        self._command(end)

    def close(self) -> None:
        """Abort the remaining requests, stop the thread and wait for it."""
        with self._wake:
            self._closing = True
            self._command(lambda: None)
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        end = EngineDeadError("the engine is closed")
        try:
            while True:
                with self._lock:  # the RLock itself: a `Condition` costs two more calls for each step
                    while not (self._commands or self._closing or (self._engine.has_work and not self._engine.waits)):
                        self._wake.wait()
                    commands, self._commands = self._commands, []
                    closing = self._closing
                for command in commands:
                    command()
                if closing:
                    for request_id in list(self._clients):
                        self._deliver(self._engine.abort(request_id))
                    return
                self._deliver(self._engine.step())
                if self._after_step is not None:
                    self._after_step()
        except EngineDeadError as error:  # an engine in another process has died
            logger.error("%s", error)
            end = error
        except BaseException as error:
            logger.exception("the engine thread failed")
            end = EngineDeadError(f"the engine has stopped: {type(error).__name__}: {error}")
        finally:
            self._end(end)

    def _refuse(self, request_id: str, error: CandleVllmError) -> None:
        """End a request with an error in place of outputs."""
        with self._wake:
            client = self._clients.pop(request_id)
            self._live_sequences -= client.unfinished
        self._put(client.sink, error)

    def _abort(self, request_id: str, client: _Client) -> None:
        if self._clients.get(request_id) is client:
            self._deliver(self._engine.abort(request_id))

    def _deliver(self, pieces: Iterable[TokenOutput]) -> None:
        """Deliver the outputs of a step, with one wake-up for each event loop."""
        by_loop: dict[asyncio.AbstractEventLoop, tuple[list[_Item], list[_Item]]] = {}
        for piece in pieces:
            client = self._clients[piece.request_id]
            if piece.finish_reason is not None:
                with self._lock:
                    client.unfinished -= 1
                    self._live_sequences -= 1
                    if client.unfinished == 0:
                        del self._clients[piece.request_id]
            loop = client.sink.loop
            if loop is None:
                client.sink.put(piece)
            elif (due := piece if client.interval == 1 else client.due(piece)) is not None:
                first, others = by_loop.get(loop) or by_loop.setdefault(loop, ([], []))
                (others if client.begun else first).append((client.sink, due))
                client.begun = True
        for loop, (first, others) in by_loop.items():
            (self._queues.get(loop) or self._output_queue(loop)).send(first, others)

    def _put(self, sink: Sink, item: Delivery) -> None:
        if sink.loop is None:
            sink.put(item)
        else:
            self._output_queue(sink.loop).send((), [(sink, item)])

    def _output_queue(self, loop: asyncio.AbstractEventLoop) -> OutputQueue:
        if loop not in self._queues:
            self._queues = {known: at for known, at in self._queues.items() if not known.is_closed()}
            self._queues[loop] = OutputQueue(loop)
        return self._queues[loop]

    def _end(self, error: EngineDeadError) -> None:
        """Refuse further requests, and send the error to every caller that still waits."""
        with self._wake:
            self._dead = str(error)
            clients, self._clients = list(self._clients.values()), {}
            self._live_sequences = 0
            answers = list(self._answers)
        for answer in answers:
            answer.cancel()
        for client in clients:
            self._put(client.sink, EngineDeadError(str(error)))


def _settle(work: Callable[[], None], answer: Future[Any]) -> None:
    try:
        work()
    except Exception as error:
        answer.set_exception(error)
    else:
        answer.set_result(None)
