"""RemoteThread: the thread that reads what the engine process says and hands it to its callers (steps 8 to 10)."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future

from candle_vllm.core.engine.thread import EngineThread, Prepared, Sink
from candle_vllm.core.errors import EngineDeadError, EngineOverloadedError
from candle_vllm.core.remote.link import RemoteLink
from candle_vllm.core.remote.preparation import write_check
from candle_vllm.core.sampling.structured import StructuredOutputsParams

logger = logging.getLogger(__name__)

CALL_TIMEOUT = 120.0  # seconds that a caller waits for a form to be compiled


class RemoteThread(EngineThread):
    """Sends requests as they come, reads pieces as they come.

    Args:
        link: to the engine, which only this thread touches from now on.
        max_sequences: most live sequences before new requests are refused.
        on_end: called in this thread when the engine process has ended without being told to.
    """

    def __init__(self, link: RemoteLink, max_sequences: int, on_end: Callable[[], None]) -> None:
        self._link = link
        self._on_end = on_end
        self._numbers = itertools.count()
        self._calls: set[Future[None]] = set()
        self._callbacks: list[Callable[[], None]] = []
        link.on_refused = self._refuse
        super().__init__(link, max_sequences)

    def submit(self, prepared: Sequence[Prepared], sink: Sink) -> None:
        """See `EngineThread.submit`."""
        super().submit(prepared, sink)
        self._link.wake()

    def abort(self, request_id: str, sink: Sink | None = None) -> None:
        """See `EngineThread.abort`."""
        super().abort(request_id, sink)
        self._link.wake()

    def check(self, params: StructuredOutputsParams) -> None:
        """Asks the engine whether a form is possible, and waits for the answer.

        Raises:
            InvalidParameterError: it is not.
            EngineOverloadedError: too many wait already, or it takes too long.
            EngineDeadError: the engine has stopped.
        """
        answer: Future[None] = Future()
        number = next(self._numbers)
        data = write_check(number, params)
        with self._wake:
            if self._dead is not None or self._closing:
                raise self._dead or EngineDeadError("the engine is closed")
            if len(self._calls) >= self._max_sequences:
                raise EngineOverloadedError(f"{len(self._calls)} forms of texts wait to be checked: try again later")
            self._calls.add(answer)
            self._commands.append(lambda: self._link.call(number, data, answer))
        self._link.wake()
        try:
            answer.result(CALL_TIMEOUT)
        except TimeoutError:
            answer.cancel()
            raise EngineOverloadedError(
                f"the form could not be checked within {CALL_TIMEOUT:.0f} s: try again later"
            ) from None
        except CancelledError:
            raise self._dead or EngineDeadError("the engine is closed") from None
        finally:
            with self._wake:
                self._calls.discard(answer)

    def add_death_callback(self, callback: Callable[[], None]) -> None:
        """See `RemoteEngine.add_death_callback`."""
        with self._wake:
            waits = self._dead is None
            if waits:
                self._callbacks.append(callback)
        if not waits and not self._closing:
            _call(callback)

    def close(self) -> None:
        """See `EngineThread.close`."""
        with self._wake:
            self._closing = True
        self._link.wake()
        super().close()

    def _end(self, error: EngineDeadError) -> None:
        super()._end(error)
        with self._wake:
            calls, callbacks = list(self._calls), self._callbacks
            self._callbacks = []
        for answer in calls:
            answer.cancel()
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
