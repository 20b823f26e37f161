"""uvicorn's HTTP protocol with limits on request heads, in bytes and in time, and on connections.

Below step 1 of a request's life. Without the limits, clients that never end their headers would fill the memory or
hold connections for ever.
"""

from __future__ import annotations

import asyncio
import importlib.util
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.h11_impl import H11Protocol

if TYPE_CHECKING:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD = 64 << 10  # bytes of request line and headers, besides the last piece read from the socket
HEAD_SECONDS = 30.0  # from the connection, or the first byte of a later request, to the end of the head
MAX_CONNECTIONS = 4096  # at the same time; later ones are closed
CHUNK_OVERHEAD = 6  # bytes on the wire per byte of a body that is sent in chunks of one


def http_protocol() -> type[asyncio.Protocol]:
    """The fastest protocol that is installed: httptools with a limit on the head, else h11, which has one."""
    return _timed(H11Protocol if importlib.util.find_spec("httptools") is None else _limited())


def _timed(base: Any) -> type[asyncio.Protocol]:
    class TimedProtocol(base):
        """Closes a connection on which no request has begun and no head has ended within `HEAD_SECONDS`.

        uvicorn's own timer runs between an answer and the next byte; this one runs where that does not.
        """

        _late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            if len(self.connections) > MAX_CONNECTIONS:
                transport.abort()
                return
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._unwatch()
            super().connection_lost(exc)

        def _watch(self) -> None:
            answering = self.cycle is not None and not self.cycle.response_complete
            if answering or self.timeout_keep_alive_task is not None or self.transport.is_closing():
                self._unwatch()
            elif self._late is None:
                self._late = self.loop.call_later(HEAD_SECONDS, self._end_wait)

        def _unwatch(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

        def _end_wait(self) -> None:
            self._late = None
            self.transport.close()

    return TimedProtocol


def _limited() -> type[HttpToolsProtocol]:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    class LimitedHttpToolsProtocol(HttpToolsProtocol):
        """Closes a connection whose request has too many bytes that are not body: headers, trailers, framing."""

        _seen = 0  # bytes of a request that has not ended
        _body = 0  # those of its body
        _ended = False  # a request ended in the current piece

        def data_received(self, data: bytes) -> None:
            self._ended = False
            super().data_received(data)
            if self._ended:
                return
            self._seen += len(data)
            if self._seen - CHUNK_OVERHEAD * self._body > MAX_HEAD and not self.transport.is_closing():
                self.send_400_response("The request head is too large.")

        def on_body(self, body: bytes) -> None:
            self._body += len(body)
            super().on_body(body)

        def on_message_complete(self) -> None:
            self._seen = self._body = 0
            self._ended = True
            super().on_message_complete()

    return LimitedHttpToolsProtocol
