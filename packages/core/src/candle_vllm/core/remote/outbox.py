"""In the engine's process: where the pieces of a step go (step 8 of a request's life)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import zmq

from candle_vllm.core.engine.request import EngineStats, TokenOutput
from candle_vllm.core.engine.thread import Delivery, StepEngine
from candle_vllm.core.errors import EngineDeadError, RequestError
from candle_vllm.core.remote.wire import Ended, Pieces, Refused, describe_error, encode, writable

STATS_EVERY: Final = 0.1  # seconds


class Outbox:
    """Where the pieces of all requests go: what one step made is sent as one message.

    Args:
        socket: to the parent; only the engine's thread uses it.
        wake: wakes the main thread.

    Attributes:
        failed: the engine has ended by itself.
    """

    loop = None

    def __init__(self, socket: zmq.Socket[bytes], wake: Callable[[], None]) -> None:
        self.failed = False
        self._socket = socket
        self._wake = wake
        self._pieces: list[TokenOutput] = []
        self._sent: EngineStats | None = None
        self._sent_at = 0.0

    def put(self, item: Delivery) -> None:
        """Takes one piece; see `Sink`."""
        if isinstance(item, TokenOutput):  # an engine's end is told by `fail`
            self._pieces.append(item)

    def flush(self, engine: StepEngine) -> list[str]:
        """Sends what there is, with the counters when they are due or the engine comes to rest.

        Returns:
            Tickets whose pieces no message can hold; the parent has been told.
        """
        pieces, self._pieces = self._pieces, []
        stats = self._due(engine)
        return self._send(pieces, stats) if pieces or stats is not None else []

    def fail(self, error: EngineDeadError) -> None:
        """The engine has failed for good."""
        self._socket.send(encode(Ended(writable(str(error)))))
        self.failed = True
        self._wake()

    def _send(self, pieces: list[TokenOutput], stats: EngineStats | None) -> list[str]:
        try:
            self._socket.send(encode(Pieces(pieces, stats)))
            return []
        except (ValueError, TypeError, OverflowError) as error:
            if len(pieces) != 1:
                return [ticket for piece in pieces for ticket in self._send([piece], stats)]
            (piece,) = pieces
            message = f"the answer cannot be handed over: {error}; ask for fewer log-probabilities or a shorter text"
            self._socket.send(encode(Refused(piece.request_id, describe_error(RequestError(writable(message))))))
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
