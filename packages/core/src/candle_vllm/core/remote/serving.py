# SPDX-License-Identifier: MIT
"""In the engine's process: receive requests, run them, and send outputs (steps 4 to 9 of a request's life).

`RequestDesk` has one socket, in the main thread; `Outbox` has the other one, in the engine's thread. Slow work, such as
compiling a grammar, runs in other threads.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final, TypeVar

import zmq

from candle_vllm.core.config import EngineConfig
from candle_vllm.core.engine.adapters.adapter_store import AdapterCall
from candle_vllm.core.engine.outputs import TokenOutput
from candle_vllm.core.engine.requests import GenerationRequest
from candle_vllm.core.engine.stats import EngineStats
from candle_vllm.core.engine.step.engine import Engine
from candle_vllm.core.engine.step.thread import Delivery, EngineThread, StepEngine
from candle_vllm.core.errors import CandleVllmError, EngineDeadError, RequestError
from candle_vllm.core.inference_engine import InferenceEngine
from candle_vllm.core.pooling import ModelPooling
from candle_vllm.core.remote import wire
from candle_vllm.core.remote.line import Bell
from candle_vllm.core.sampling.structured import StructuredOutputsParams
from candle_vllm.core.text.chat_template import ChatTemplate
from candle_vllm.core.text.tokenizer import Tokenizer
from candle_vllm.core.vision.prompts import VisionInput

STATS_EVERY: Final = 0.1  # seconds


class Outbox:
    """The sink of all requests: sends the outputs of one step as one message, or one by one if they are too large. Only
    the engine's thread uses its `socket` to the parent process."""

    loop = None

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._pieces: list[TokenOutput] = []
        self._sent: EngineStats | None = None
        self._sent_at = 0.0

    def put(self, item: Delivery) -> None:
        """Collect one output; see `Sink`."""
        if isinstance(item, TokenOutput):  # an error of the engine is sent by `fail`
            self._pieces.append(item)

    def flush(self, engine: StepEngine) -> list[str]:
        """Send the collected outputs, and the statistics if they are due or the engine is idle. Return the tickets
        (request ids in this process) whose outputs are too large to send; errors were sent instead."""
        pieces, self._pieces = self._pieces, []
        stats = self._due(engine)
        return self._send(pieces, stats) if pieces or stats is not None else []

    def fail(self, error: EngineDeadError) -> None:
        """Report that the engine cannot continue; the parent then ends this process."""
        self._socket.send(wire.encode(wire.Ended(wire.writable(str(error)))))

    def _send(self, pieces: list[TokenOutput], stats: EngineStats | None) -> list[str]:
        try:
            self._socket.send(wire.encode(wire.Pieces(pieces, stats)))
            return []
        except (ValueError, TypeError, OverflowError) as error:
            if len(pieces) != 1:
                return [ticket for piece in pieces for ticket in self._send([piece], stats)]
            (piece,) = pieces
            message = f"the answer cannot be sent: {error}; request fewer log-probabilities or a shorter text"
            self._socket.send(
                wire.encode(wire.Refused(piece.request_id, wire.describe_error(RequestError(wire.writable(message)))))
            )
            return [piece.request_id]

    def _due(self, engine: StepEngine) -> EngineStats | None:
        now = time.monotonic()
        if engine.has_work and now - self._sent_at < STATS_EVERY:
            return None
        stats = engine.stats()
        if stats == self._sent:
            return None
        self._sent, self._sent_at = stats, now
        return stats


MAX_SEQUENCES: Final = 1 << 20  # no limit here: the parent enforces the configured limit


class ServingThread(EngineThread):
    """An `EngineThread` that sends its outputs to the parent process, step by step."""

    def __init__(self, engine: StepEngine, outbox: Outbox) -> None:
        self._outbox = outbox
        super().__init__(engine, MAX_SEQUENCES, self._flush)

    def _flush(self) -> None:
        for ticket in self._outbox.flush(self._engine):
            self.abort(ticket)

    def _end(self, error: EngineDeadError) -> None:
        super()._end(error)
        if not self._closing:
            self._outbox.fail(error)


class ChildEngine(InferenceEngine):
    """The engine of this process."""

    def __init__(self, config: EngineConfig, outbox: Outbox) -> None:
        self._outbox = outbox
        super().__init__(config)
        self.thread = self._running_thread()

    @property
    def parts(self) -> tuple[Tokenizer, ChatTemplate | None, ModelPooling | None, VisionInput | None]:
        """The model's tokenizer, chat template, pooling and image processing."""
        loaded = self._require()[1]
        return loaded.tokenizer, loaded.template, loaded.pooling, loaded.vision

    @property
    def max_step_tokens(self) -> int:
        """Maximum number of tokens of one step."""
        return self._require()[0].max_step_tokens

    def prepare(self, request: GenerationRequest) -> Sequence[Any]:
        return self._require()[0].prepare(request)

    def _make_thread(self, engine: Engine) -> EngineThread:
        return ServingThread(engine, self._outbox)


logger = logging.getLogger(__name__)
T = TypeVar("T")

_WORKERS: Final = 4  # number of threads that prepare requests with grammars, and check structured outputs
_CALLERS: Final = 16  # number of threads for calls that wait: adapter loads, sleep and wake-up
_MAX_AT_ONCE: Final = 64  # maximum number of messages that are handled between two polls
_LOOK_UP: Final = 10_000  # ms that a poll waits


class RequestDesk:
    """Receives requests, aborts and calls from the parent process, and answers calls and refused requests.

    Args:
        outbox: the sink of all requests.
        socket: socket to the parent; only the thread that calls `turn` uses it.
        bell: wakes that thread.
    """

    def __init__(self, engine: ChildEngine, outbox: Outbox, socket: zmq.Socket[bytes], bell: Bell) -> None:
        self._engine = engine
        self._outbox = outbox
        self._socket = socket
        self._bell = bell
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(bell.descriptor, zmq.POLLIN)
        self._reader = wire.Reader(wire.ToChild)
        self._workers = ThreadPoolExecutor(_WORKERS, "candle-vllm-grammars")
        self._callers = ThreadPoolExecutor(_CALLERS, "candle-vllm-adapter-calls")  # also sleep and wake-up
        self._preparing: set[str] = set()  # tickets of requests that a worker prepares
        self._done: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()

    def turn(self) -> None:
        """Wait for messages or the bell, then handle messages and finished work. Raises MalformedMessageError if the
        parent sent an invalid message."""
        self._poller.poll(_LOOK_UP)
        self._bell.clear()
        while not self._done.empty():
            self._done.get()()
        for _ in range(_MAX_AT_ONCE):
            try:
                data = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._take(self._reader.read(data))

    def close(self) -> None:
        """End the worker threads, without waiting for their work."""
        self._workers.shutdown(wait=False, cancel_futures=True)
        self._callers.shutdown(wait=False, cancel_futures=True)

    def _take(self, message: wire.ToChild) -> None:
        if isinstance(message, wire.Abort):
            self._preparing.discard(message.ticket)
            self._engine.thread.abort(message.ticket)
        elif isinstance(message, wire.Reset):
            self._engine.thread.reset_prefix_cache()
        elif isinstance(message, wire.Sleep):
            self._callers.submit(self._sleep, message)
        elif isinstance(message, wire.Check):
            self._workers.submit(self._check, message.number, message.params)
        elif isinstance(message, wire.Ask):
            if message.call.what in ("list", "remove"):  # these do not block
                self._call(message.number, message.call)
            else:
                self._callers.submit(self._call, message.number, message.call)
        elif message.request.params.structured_outputs is not None:
            self._preparing.add(message.request.request_id)
            self._workers.submit(self._prepare, message.request)
        else:
            self._submit(message.request, *self._prepared(message.request))

    def _prepared(self, request: GenerationRequest) -> tuple[Sequence[Any] | None, wire.WireError | None]:
        return _tried(lambda: self._engine.prepare(request), "the engine failed on this request")

    def _submit(
        self, request: GenerationRequest, prepared: Sequence[Any] | None, error: wire.WireError | None = None
    ) -> None:
        if prepared is not None:
            submit = partial(self._engine.thread.submit, prepared, self._outbox)
            _, error = _tried(submit, "the engine failed on this request")
        if error is not None:
            self._socket.send(wire.encode(wire.Refused(request.request_id, error)))

    # ---- in a worker thread ------------------------------------------------------------------------------------------

    def _prepare(self, request: GenerationRequest) -> None:
        prepared = self._prepared(request)

        def hand_over() -> None:
            if request.request_id in self._preparing:  # else it was aborted meanwhile
                self._preparing.remove(request.request_id)
                self._submit(request, *prepared)

        self._hand_over(hand_over)

    def _sleep(self, message: wire.Sleep) -> None:
        def work() -> None:
            if message.level:
                self._engine.sleep(message.level)
            else:
                self._engine.wake_up(message.tags)

        _, error = _tried(work, "the engine could not sleep or wake up")
        self._answer(wire.Told(message.number, error=error))

    def _check(self, number: int, params: StructuredOutputsParams) -> None:
        _, error = _tried(lambda: self._engine.check_structured_outputs(params), "a grammar could not be checked")
        self._answer(wire.Told(number, error=error))

    def _call(self, number: int, call: AdapterCall) -> None:
        infos, error = _tried(lambda: self._engine.call_adapters(call), "a call about adapters failed")
        self._engine.thread.wake()  # sends the new statistics
        self._answer(wire.Told(number, infos or (), error))

    def _answer(self, message: wire.Told) -> None:
        data = wire.encode(message)
        self._hand_over(lambda: self._socket.send(data))

    def _hand_over(self, work: Callable[[], object]) -> None:
        """Run work in the main thread, the only one that may use the socket."""
        self._done.put(work)
        self._bell.ring()


def _tried(work: Callable[[], T], what: str) -> tuple[T | None, wire.WireError | None]:
    """Return the result of `work`, or its error; an unexpected error is logged as `what`."""
    try:
        return work(), None
    except CandleVllmError as error:
        return None, wire.describe_error(error)
    except Exception as error:
        logger.exception(what)
        return None, wire.describe_error(CandleVllmError(f"{what}: {type(error).__name__}: {error}"))
