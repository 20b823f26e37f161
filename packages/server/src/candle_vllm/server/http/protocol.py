# SPDX-License-Identifier: MIT
"""uvicorn's protocols: HTTP with limits on request heads, in bytes and in time, and on connections; web sockets.

Below step 1 of a request's life. Without the limits, clients that never end their headers would fill the memory or
hold connections for ever. A server that stops closes idle web sockets at once; one on which an answer is written is
told, and has the time of the drain for it.
"""

from __future__ import annotations

import asyncio
import importlib.util
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from candle_vllm.server.http.sse import DIRECT_BODY

if TYPE_CHECKING:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

MAX_HEAD = 64 << 10  # bytes of request line and headers, besides the last piece read from the socket
HEAD_SECONDS = 30.0  # from the connection, or the first byte of a later request, to the end of the head
MAX_CONNECTIONS = 4096  # at the same time; later ones are closed
STALL_SECONDS = 60.0  # a client that leaves what was sent unread for so long is cut off
DRAINING = "candle_vllm.draining"  # extension of the scope: an event that is set when the server stops
CHUNK_OVERHEAD = 6  # bytes on the wire per byte of a body that is sent in chunks of one


def http_protocol() -> type[asyncio.Protocol]:
    """The fastest protocol that is installed: httptools with a limit on the head, else h11, which has one."""
    return _timed(H11Protocol if importlib.util.find_spec("httptools") is None else _limited())


def _timed(base: Any) -> type[asyncio.Protocol]:
    class TimedProtocol(base):
        """Closes a connection on which no request has begun and no head has ended within `HEAD_SECONDS`.

        uvicorn's own timer runs between an answer and the next byte; this one runs where that does not. A client that
        does not read its answer is cut off after `STALL_SECONDS`, and its request is aborted as for any that leaves.
        """

        _late: asyncio.TimerHandle | None = None
        _stalled: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            if len(self.connections) > MAX_CONNECTIONS:
                transport.abort()
                return
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stalled = self.loop.call_later(STALL_SECONDS, self.transport.abort)

        def resume_writing(self) -> None:
            self._move_on()
            super().resume_writing()

        def connection_lost(self, exc: Exception | None) -> None:
            self._unwatch()
            self._move_on()
            super().connection_lost(exc)

        def _watch(self) -> None:
            if self not in self.connections:  # it became a WebSocket, whose protocol has limits of its own
                self._unwatch()
                return
            answering = self.cycle is not None and not self.cycle.response_complete
            if answering or self.timeout_keep_alive_task is not None or self.transport.is_closing():
                self._unwatch()
            elif self._late is None:
                self._late = self.loop.call_later(HEAD_SECONDS, self._end_wait)

        def _unwatch(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

        def _move_on(self) -> None:
            if self._stalled is not None:
                self._stalled.cancel()
                self._stalled = None

        def _end_wait(self) -> None:
            self._late = None
            self.transport.close()

    return TimedProtocol


class _ChunkedBody:
    """A `DirectBody` over one of uvicorn's answers, in the form of its own `send`."""

    __slots__ = ("_cycle", "_transport")

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._transport = cycle.transport

    def is_free(self) -> bool:
        cycle = self._cycle
        paused = cycle.flow.write_paused or cycle.disconnected
        return not paused and cycle.chunked_encoding is True and not cycle.response_complete

    def write(self, data: bytes) -> None:
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))


def _limited() -> type[HttpToolsProtocol]:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    class LimitedHttpToolsProtocol(HttpToolsProtocol):
        """Closes a connection whose request has too many bytes that are not body: headers, trailers, framing.

        And keeps requests that were sent one behind the other apart, where uvicorn knows only the last of them: when
        the client goes, the one that is being answered is told, and what is no request is not answered in its place.
        """

        _seen = 0  # bytes of a request that has not ended
        _body = 0  # those of its body
        _ended = False  # a request ended in the current piece
        _broken = False  # what came last is no request, and what comes after it is not read
        _answering: RequestResponseCycle | None = None

        def data_received(self, data: bytes) -> None:
            if self._broken:
                return
            self._ended = False
            super().data_received(data)
            if self._ended or self not in self.connections:  # or it became a WebSocket
                return
            self._seen += len(data)
            if self._seen - CHUNK_OVERHEAD * self._body > MAX_HEAD and not self.transport.is_closing():
                self.send_400_response("The request head is too large.")

        def on_headers_complete(self) -> None:
            super().on_headers_complete()
            assert self.parser is not None
            if self.parser.should_upgrade() and self._should_upgrade():
                if self._unanswered():
                    raise ValueError("a connection cannot be upgraded while an answer is written")  # 400
                return
            extensions: dict[str, Any] = {DIRECT_BODY: _ChunkedBody(self.cycle)}
            self.cycle.scope["extensions"] = extensions
            if not self.pipeline:
                self._answering = self.cycle

        def on_body(self, body: bytes) -> None:
            self._body += len(body)
            super().on_body(body)

        def on_message_complete(self) -> None:
            self._seen = self._body = 0
            self._ended = True
            super().on_message_complete()

        def on_response_complete(self) -> None:
            self._answering = self.pipeline[-1][0] if self.pipeline else None
            super().on_response_complete()

        def send_400_response(self, msg: str) -> None:
            """Refuses what came last; the requests before it are answered first, and the connection ends after them."""
            self._broken = True
            before = self._unanswered()
            broken = before.pop() if before and before[-1].more_body else None  # its body broke, not the next head
            if before:
                before[-1].keep_alive = False
                if broken is not None:
                    self.pipeline.popleft()
            elif broken is not None and broken.response_started:
                self.transport.close()
            else:
                super().send_400_response(msg)

        def connection_lost(self, exc: Exception | None) -> None:
            for cycle in self._unanswered():
                cycle.disconnected = True
                cycle.message_event.set()
            self.pipeline.clear()
            super().connection_lost(exc)

        def _unanswered(self) -> list[RequestResponseCycle]:
            """The requests that have no whole answer yet, in order of arrival."""
            first = [] if self._answering is None or self._answering.response_complete else [self._answering]
            return first + [cycle for cycle, _ in reversed(self.pipeline)]

    return LimitedHttpToolsProtocol


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """Leaves it to the route to end a connection when the server stops."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._draining = asyncio.Event()

    def handle_connect(self, event: Any) -> None:
        super().handle_connect(event)
        if hasattr(self, "scope"):  # the handshake was right; the route has not begun
            extensions: dict[str, Any] = self.scope.setdefault("extensions", {})  # type: ignore[assignment]
            extensions[DRAINING] = self._draining

    def shutdown(self) -> None:
        if self.handshake_complete and not self.close_sent and not self.disconnected:
            self._draining.set()
        else:
            super().shutdown()
