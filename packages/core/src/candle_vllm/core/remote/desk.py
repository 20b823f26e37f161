"""RequestDesk: where requests come into the engine's process (before step 4 of their life).

The desk has one socket and belongs to the process's main thread; the outbox has the other and belongs to the engine's
thread. What takes long (compiling a form) is done in threads beside both.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import zmq

from candle_vllm.core.engine.request import GenerationRequest
from candle_vllm.core.errors import CandleVllmError
from candle_vllm.core.remote.bell import Bell
from candle_vllm.core.remote.outbox import Outbox
from candle_vllm.core.remote.served import ServedEngine
from candle_vllm.core.remote.wire import Abort, Check, Checked, Reader, Refused, ToChild, describe_error, encode
from candle_vllm.core.sampling.structured import StructuredOutputsParams

logger = logging.getLogger(__name__)

_WORKERS: Final = 4
_MAX_AT_ONCE: Final = 64
_LOOK_UP: Final = 10_000  # ms


class RequestDesk:
    """Takes requests, aborts and questions, and answers those that the engine does not get.

    Args:
        engine: what serves them.
        outbox: where their pieces go.
        socket: to the parent; only the thread that calls `turn` uses it.
        bell: wakes that thread.
    """

    def __init__(self, engine: ServedEngine, outbox: Outbox, socket: zmq.Socket[bytes], bell: Bell) -> None:
        self._engine = engine
        self._outbox = outbox
        self._socket = socket
        self._bell = bell
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(bell.descriptor, zmq.POLLIN)
        self._reader = Reader(ToChild)
        self._workers = ThreadPoolExecutor(_WORKERS, "candle-vllm-forms")
        self._preparing: set[str] = set()  # tickets that a worker has
        self._done: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()

    def turn(self) -> None:
        """Waits for messages or for the bell, and takes care of what is there.

        Raises:
            MalformedMessageError: the parent sent what is no message.
        """
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
        """Ends the workers; what they have is not waited for."""
        self._workers.shutdown(wait=False, cancel_futures=True)

    def _take(self, message: ToChild) -> None:
        if isinstance(message, Abort):
            self._preparing.discard(message.ticket)
            self._engine.thread.abort(message.ticket)
        elif isinstance(message, Check):
            self._workers.submit(self._check, message.number, message.params)
        elif message.request.params.structured_outputs is not None:
            self._preparing.add(message.request.request_id)
            self._workers.submit(self._prepare, message.request)
        else:
            self._submit(message.request, self._prepared(message.request))

    def _prepared(self, request: GenerationRequest) -> Sequence[Any] | CandleVllmError:
        """What the engine makes of a request, or why it does not."""
        try:
            return self._engine.prepare(request)
        except CandleVllmError as error:
            return error
        except Exception as error:
            logger.exception("a request could not be prepared")
            return CandleVllmError(f"the engine failed on this request: {type(error).__name__}: {error}")

    def _submit(self, request: GenerationRequest, prepared: Sequence[Any] | CandleVllmError) -> None:
        try:
            if isinstance(prepared, CandleVllmError):
                raise prepared
            self._engine.thread.submit(prepared, self._outbox)
        except CandleVllmError as error:
            self._socket.send(encode(Refused(request.request_id, describe_error(error))))

    # ---- in a worker's thread ----------------------------------------------------------------------------------------

    def _prepare(self, request: GenerationRequest) -> None:
        prepared = self._prepared(request)

        def hand_over() -> None:
            if request.request_id in self._preparing:  # or it was aborted meanwhile
                self._preparing.remove(request.request_id)
                self._submit(request, prepared)

        self._hand_over(hand_over)

    def _check(self, number: int, params: StructuredOutputsParams) -> None:
        described = None
        try:
            self._engine.check_structured_outputs(params)
        except CandleVllmError as error:
            described = describe_error(error)
        except Exception as error:
            logger.exception("a form could not be checked")
            described = describe_error(CandleVllmError(f"the form could not be checked: {type(error).__name__}"))
        answer = encode(Checked(number, described))
        self._hand_over(lambda: self._socket.send(answer))

    def _hand_over(self, work: Callable[[], object]) -> None:
        """Has something done by the main thread, which alone may use the socket."""
        self._done.put(work)
        self._bell.ring()
