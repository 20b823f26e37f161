# SPDX-License-Identifier: MIT
"""The caller's connection to an engine in another process, and its thread (steps 3 to 10 of a request's life).

`RemoteThread` drives a `RemoteLink` as `EngineThread` drives `Engine`: `add` and `abort` send messages, `step` waits
for messages. Only that thread uses the socket.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import msgspec
import zmq

from candle_vllm.core.engine.adapters.adapter_store import AdapterCall
from candle_vllm.core.engine.model_info import AdapterInfo
from candle_vllm.core.engine.outputs import FinishReason, TokenOutput
from candle_vllm.core.engine.requests import GenerationRequest
from candle_vllm.core.engine.stats import EngineStats
from candle_vllm.core.engine.step.thread import EngineThread
from candle_vllm.core.errors import CandleVllmError, EngineDeadError, EngineOverloadedError
from candle_vllm.core.remote import wire
from candle_vllm.core.remote.line import Bell
from candle_vllm.core.remote.payloads import Payload, RequestWriter, write_check
from candle_vllm.core.remote.process import EngineProcess
from candle_vllm.core.sampling.structured import StructuredOutputsParams

_LOOK_UP = 1000  # ms without a message after which the process is checked
_MAX_AT_ONCE = 64  # maximum number of messages that are read before their outputs are delivered


@dataclasses.dataclass
class _Live:
    """A request that was sent to the engine and has not ended."""

    request: GenerationRequest
    ticket: str
    unfinished: set[int]
    begun: bool = False


class RemoteLink:
    """A `StepEngine` whose engine is in another process, over a socket.

    Args:
        process: the child process, which has loaded its model.
        ready: the message that it sent after loading.
        writer: checks and serialises requests.

    Attributes:
        wake: makes `step` return soon; thread-safe.
        on_refused: called with the request id and the error if the child refuses a request.
        on_begun: called with the request id at the first output that does not report progress.
        on_over: called with the request id at the end of the request, unless the child has ended.
    """

    waits = False
    has_work = True  # the thread always waits in `step`: for outputs, requests and the end

    def __init__(self, process: EngineProcess, ready: wire.Ready, writer: RequestWriter) -> None:
        self.max_model_len = ready.info.max_model_len
        self.max_step_tokens = ready.max_step_tokens
        self.prepare = writer.prepare
        self.on_refused: Callable[[str, CandleVllmError], None] = lambda _id, _error: None
        self.on_begun: Callable[[str], None] = lambda _id: None
        self.on_over: Callable[[str], None] = lambda _id: None
        self._process = process
        self._stats = ready.stats
        self._reader = wire.Reader(wire.FromChild)
        self._by_ticket: dict[str, _Live] = {}
        self._by_id: dict[str, _Live] = {}
        self._calls: dict[int, Future[Any]] = {}
        self._failure: EngineDeadError | None = None
        self._bell = Bell()
        self.wake = self._bell.ring
        self._poller = zmq.Poller()
        self._poller.register(process.socket, zmq.POLLIN)
        self._poller.register(process.alive, zmq.POLLIN | zmq.POLLERR)
        self._poller.register(self._bell.descriptor, zmq.POLLIN)

    def close(self) -> None:
        """Close the sockets of `wake`; the thread must have ended."""
        self._bell.close()

    def stats(self) -> EngineStats:
        """Return the child's last statistics, sent after steps, at most every 0.1 s, and when it becomes idle."""
        return self._stats

    # ---- sending -----------------------------------------------------------------------------------------------------

    def add(self, prepared: Sequence[Payload]) -> None:
        """Send a request."""
        payload = prepared[0]
        live = _Live(payload.request, payload.ticket, set(range(payload.request.params.n)))
        self._by_ticket[payload.ticket] = self._by_id[payload.request.request_id] = live
        self._send(payload.data)

    def abort(self, request_id: str) -> list[TokenOutput]:
        """Send an abort to the child; make the last outputs here, and ignore the child's outputs."""
        live = self._by_id.get(request_id)
        if live is None:
            return []
        self._forget(live)
        self._send(wire.encode(wire.Abort(live.ticket)))
        length = len(live.request.prompt_token_ids)
        return [
            TokenOutput(request_id=request_id, index=index, finish_reason=FinishReason.ABORT, num_prompt_tokens=length)
            for index in sorted(live.unfinished)
        ]

    def reset_prefix_cache(self) -> None:
        """Send a reset to the child, which reads it before later requests."""
        self._send(wire.encode(wire.Reset()))

    def sleep(self, level: int) -> list[TokenOutput]:
        """Not used: `RemoteThread` sends a message and waits for the answer."""
        raise NotImplementedError

    def wake_up(self, tags: Sequence[str]) -> None:
        """See `sleep`."""
        raise NotImplementedError

    def call(self, number: int, data: bytes, answer: Future[Any]) -> None:
        """Send a call; `answer` is set when the child has answered."""
        self._calls[number] = answer
        self._send(data)

    def _send(self, data: bytes) -> None:
        if self._failure is not None:  # the child may have ended, but its reason is known
            raise self._failure
        self._process.send(data)

    # ---- receiving ---------------------------------------------------------------------------------------------------

    def step(self) -> list[TokenOutput]:
        """Wait for messages; return the outputs in them, with the callers' request ids. Raises EngineDeadError if the
        child or its engine has ended, does not respond, or has sent an invalid message."""
        if self._failure is not None:
            raise self._failure
        events = dict(self._poller.poll(_LOOK_UP))
        if self._bell.descriptor in events:
            self._bell.clear()
        pieces: list[TokenOutput] = []
        for data in self._process.received(_MAX_AT_ONCE):
            self._take(data, pieces)
        silent = not pieces and self._failure is None
        if silent and (self._process.alive in events or not events) and not self._process.has_more():
            self._process.check()
        return pieces

    def _take(self, data: bytes, pieces: list[TokenOutput]) -> None:
        try:
            message = self._reader.read(data)
        except wire.MalformedMessageError as error:
            raise EngineDeadError(f"the engine process sent a malformed message and is ended: {error}") from None
        if isinstance(message, wire.Pieces):
            self._stats = message.stats or self._stats
            for piece in message.pieces:
                self._take_piece(piece, pieces)
        elif isinstance(message, wire.Refused):
            live = self._by_ticket.get(message.ticket)
            if live is not None:
                self._forget(live)
                pieces[:] = [piece for piece in pieces if piece.request_id != live.request.request_id]
                self.on_refused(live.request.request_id, wire.make_error(message.error))
        elif isinstance(message, wire.Told):
            self._answer(message)
        else:
            assert isinstance(message, wire.Ended)
            self._failure = EngineDeadError(message.message)  # raised by the next step: outputs are delivered first

    def _take_piece(self, piece: TokenOutput, pieces: list[TokenOutput]) -> None:
        live = self._by_ticket.get(piece.request_id)
        if live is None:  # aborted meanwhile
            return
        if piece.index not in live.unfinished:
            raise EngineDeadError("the engine process sent an output of an unknown or finished sequence, and is ended")
        if not live.begun and piece.progress is None:
            live.begun = True
            self.on_begun(live.request.request_id)
        if piece.finished:
            live.unfinished.remove(piece.index)
            if not live.unfinished:
                self._forget(live)
        msgspec.structs.force_setattr(piece, "request_id", live.request.request_id)
        pieces.append(piece)

    def _answer(self, message: wire.Told) -> None:
        answer = self._calls.pop(message.number, None)
        if answer is None or not answer.set_running_or_notify_cancel():  # the caller has timed out
            return
        if message.error is None:
            answer.set_result(message.infos)
        else:
            answer.set_exception(wire.make_error(message.error))

    def _forget(self, live: _Live) -> None:
        del self._by_ticket[live.ticket]
        del self._by_id[live.request.request_id]
        self.on_over(live.request.request_id)


logger = logging.getLogger(__name__)

CALL_TIMEOUT = 120.0  # maximum seconds that a caller waits for a grammar to be compiled, or an adapter to be loaded


class RemoteThread(EngineThread):
    """Sends requests to an engine in another process, and delivers its outputs.

    Args:
        link: the connection to the engine, which only this thread may use from now on.
        max_sequences: maximum number of live sequences, see `EngineThread`, and of waiting calls.
        on_end: called in this thread when the engine process has ended without `close`.
        stream_interval: see `EngineThread`.
    """

    def __init__(
        self, link: RemoteLink, max_sequences: int, on_end: Callable[[], None], stream_interval: int = 1
    ) -> None:
        self._link = link
        self._on_end = on_end
        self._numbers = itertools.count()
        self._callbacks: list[Callable[[], None]] = []
        link.on_refused = self._refuse
        super().__init__(link, max_sequences, stream_interval=stream_interval)

    def _command(self, command: Callable[[], None]) -> None:
        super()._command(command)
        self._link.wake()

    def check(self, params: StructuredOutputsParams) -> None:
        """Have the engine check structured outputs, and wait for the answer.

        Raises:
            InvalidParameterError: the schema or grammar is wrong or not supported.
            EngineOverloadedError: too many callers wait already, or the check takes too long.
            EngineDeadError: the engine has stopped.
        """
        self._ask(lambda number: write_check(number, params), "the structured outputs", "checked")

    def call_adapters(self, call: AdapterCall) -> tuple[AdapterInfo, ...]:
        """Send a call to the engine's adapter store, and wait for the answer; raises as `AdapterStore.call` and
        `check`."""
        return self._ask(lambda number: wire.encode(wire.Ask(number, call)), "an adapter", "loaded")

    def _engine_sleep(self, level: int) -> None:
        self._ask(lambda number: wire.encode(wire.Sleep(number, level)), "the engine", "put to sleep", None)

    def _engine_wake_up(self, tags: frozenset[str]) -> None:
        self._ask(lambda number: wire.encode(wire.Sleep(number, 0, tuple(sorted(tags)))), "the engine", "woken", None)

    def _ask(
        self, write: Callable[[int], bytes], what: str, done: str, patience: float | None = CALL_TIMEOUT
    ) -> tuple[AdapterInfo, ...]:
        """Send a numbered call and return its answer; after `patience` seconds, raise that `what` is not `done`."""
        number = next(self._numbers)
        try:
            return self._call(partial(self._link.call, number, write(number)), patience, self._max_sequences)
        except TimeoutError:
            raise EngineOverloadedError(
                f"{what} could not be {done} within {CALL_TIMEOUT:.0f} s: try again later"
            ) from None

    def add_death_callback(self, callback: Callable[[], None]) -> None:
        """See `RemoteEngine.add_death_callback`."""
        with self._wake:
            waits = self._dead is None
            if waits:
                self._callbacks.append(callback)
        if not waits and not self._closing:
            _call(callback)

    def _end(self, error: EngineDeadError) -> None:
        super()._end(error)
        with self._wake:
            callbacks, self._callbacks = self._callbacks, []
        if self._closing:
            return
        self._on_end()
        for callback in callbacks:
            _call(callback)


def _call(callback: Callable[[], None]) -> None:
    try:
        callback()
    except Exception:
        logger.exception("a callback for the engine's death failed")
