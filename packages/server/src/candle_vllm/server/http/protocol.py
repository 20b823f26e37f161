# SPDX-License-Identifier: MIT
"""uvicorn's protocols: HTTP and WebSockets with limits on request heads, bodies, frames and connections.

Below step 1 of a request's life. Without the limits, a client without a key could fill the memory, use up all
connections, or keep the event loop busy with chunks and frames of a few bytes. A stopping server closes idle
WebSockets at once; on other WebSockets, the answer that is being sent may be finished during the drain.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.exceptions import WebSocketException
from websockets.frames import CTRL_OPCODES, Frame

from candle_vllm.server.http.body import BIG_BODY, Held
from candle_vllm.server.http.errors import HttpError
from candle_vllm.server.http.routing import NOBODY, caller_of
from candle_vllm.server.http.sse import WRITE_PART, WritePart

MAX_HEAD = 64 << 10  # bytes of an incomplete request besides its body: request line, headers, trailers, framing
HEAD_SECONDS = 30.0  # from the connection, or the first byte of a later request, to the end of the head
MAX_CONNECTIONS = 4096  # at the same time
MAX_FILES = 1 << 16  # highest limit on open files that the process sets for itself
CROWDED_SECONDS = 1.0  # time for a request head if a connection is opened while more than half of them are in use
STALL_SECONDS, STALL_BYTES = 60.0, 32 << 10  # least bytes that a client must read in this time while its buffer is full
TLS_PART = 64 << 10  # bytes of a body after which the server waits until a TLS client has read enough
UNDECODED = "candle_vllm.undecoded"  # key of a large WebSocket text in a received message, as bytes
DRAINING = "candle_vllm.draining"  # extension of the scope: an event that is set when the server stops
MAX_PIECES, PIECE_BYTES = 4096, 64  # maximum number of chunks of a body, plus one for each 64 bytes
CHUNK_OVERHEAD = 12  # bytes of framing that a chunk may have
MAX_PIPELINED = 64  # requests on one connection that wait for the answers to earlier ones
LINGER_SECONDS, LINGER_BYTES = 5.0, 16 << 20  # limits on the discarded rest of a body after its answer
MAX_FRAGMENTS = 1024  # frames of one WebSocket message
MAX_FRAMES = 1024  # frames of less than 1 KiB from a WebSocket's client in a second
CONTROL_WEIGHT = 16  # a control frame counts as this number of small frames, because it is answered

_HOST = re.compile(rb"[A-Za-z0-9._~!$&'()*+,;=%-]*(:[0-9]*)?|\[[0-9A-Fa-f:.]+\](:[0-9]*)?")  # RFC 9112, section 3.2


class _ReadInTime(asyncio.Protocol):
    """Disconnects a client that reads less than `STALL_BYTES` in `STALL_SECONDS`; its request is aborted."""

    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    _stalled: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_reading()

    def _expect_reading(self, most: float = math.inf) -> None:
        """Disconnect a client for which more than `most` bytes wait; otherwise check again in `STALL_SECONDS`."""
        waiting = self.transport.get_write_buffer_size()
        if waiting > most:
            self.transport.abort()
        else:
            self._stalled = self.loop.call_later(STALL_SECONDS, self._expect_reading, waiting - STALL_BYTES)

    def resume_writing(self) -> None:
        self._move_on()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._move_on()
        super().connection_lost(exc)

    def _move_on(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None


def most_connections() -> int:
    """Return `MAX_CONNECTIONS`, or seven eighths of the limit on open files if that is less.

    The process raises its limit on open files to the hard limit, at most `MAX_FILES`, because shells set 1,024 or less.
    """
    if sys.platform == "win32":
        return MAX_CONNECTIONS
    import resource

    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(MAX_FILES, hard)
    if files != resource.RLIM_INFINITY and files < wanted:
        with contextlib.suppress(ValueError, OSError):  # macOS has a lower limit that it does not report here
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            files = wanted
    return MAX_CONNECTIONS if files == resource.RLIM_INFINITY else max(1, min(MAX_CONNECTIONS, files * 7 // 8))


def _part_writer(cycle: RequestResponseCycle) -> WritePart:
    """Return the `WritePart` of one uvicorn response, which writes chunks (RFC 9112, 7.1) as uvicorn does."""
    flow = cycle.flow

    def write(data: bytes) -> bool:
        if flow.write_paused or cycle.disconnected or cycle.response_complete or not cycle.chunked_encoding:
            return False
        cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        return True

    return write


async def _send_parts(send: Any, message: Any) -> None:
    """Send a body in parts: a TLS transport takes any write at once, and drops the rest when the connection ends."""
    rest = memoryview(message.get("body", b""))
    while len(rest) > TLS_PART:
        await send({**message, "body": rest[:TLS_PART], "more_body": True})
        rest = rest[TLS_PART:]
    await send({**message, "body": rest})


class _UnknownLength(int):
    """The remaining length of a response that ends with its connection; every part fits into it."""

    def __sub__(self, sent: int) -> _UnknownLength:
        return self

    def __lt__(self, sent: int) -> bool:
        return False


class _UnreadTransport(asyncio.Transport):
    """The transport of an answer to a client that may still be sending; `close` leaves time to read the answer."""

    def __init__(self, transport: asyncio.Transport, linger: Callable[[], None]) -> None:
        super().__init__()
        self.write, self.is_closing = transport.write, transport.is_closing
        self.close = linger


def _fault(version: str, headers: Sequence[tuple[bytes, bytes]], upgrades: bool) -> str | None:
    """Return why RFC 9112 (sections 2.3, 3.2 and 6.1) forbids a request that llhttp accepts; None for a valid one.

    Also refuses a body after an upgrade to a WebSocket or after CONNECT, which llhttp would parse as the next request.
    """
    names, values = [name for name, _ in headers], dict(headers)
    if version not in ("1.1", "1.0"):
        return "This server speaks HTTP/1.1 and HTTP/1.0."
    if (hosts := names.count(b"host")) != 1 and (hosts or version == "1.1"):
        return "A request has one Host header."
    if version == "1.0" and b"transfer-encoding" in names:
        return "HTTP/1.0 has no Transfer-Encoding."
    if hosts and _HOST.fullmatch(values[b"host"]) is None:
        return "The Host header must be a host, with or without a port."
    if upgrades and (b"transfer-encoding" in values or values.get(b"content-length", b"").strip(b"0")):
        return "A request with a body cannot ask for another protocol: ask for HTTP/1.1 alone."
    return None


class _LimitedHttpToolsProtocol(HttpToolsProtocol):
    """Closes a connection whose request has too many bytes that are not body: headers, trailers, framing.

    It also closes a connection whose body has too many small chunks, or is incomplete when the answer begins. When the
    client disconnects, all of its unanswered requests are notified; uvicorn notifies only the last of several pipelined
    requests. An invalid request after unanswered ones gets no error: the connection ends after their answers.
    """

    _piece = b""  # the data that is being parsed
    _seen = 0  # bytes of the incomplete request
    _body = 0  # bytes of its body
    _pieces = 0  # chunks of its body
    _ended = False  # whether a request ended in the current data
    _broken = False  # whether the last data was no valid request; further data is ignored
    _fault: str | None = None  # why the last data was no valid request
    _keep_alive = False  # whether the connection stays open after the body of the last request
    _unread: _UnreadTransport
    _lingering: asyncio.TimerHandle | None = None
    _answering: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.scheme == "https":
            transport.set_write_buffer_limits(TLS_PART)  # as over TCP; at the end, the unsent rest has 30 s
        self._unread = _UnreadTransport(transport, lambda: self._linger(transport))

    def data_received(self, data: bytes) -> None:
        if self._broken:
            self._seen += len(data)
            if self._lingering is not None and self._seen > LINGER_BYTES:
                self.transport.abort()
            return
        self._ended = False
        self._piece = data
        super().data_received(data)
        self._piece = b""
        if self._ended or self._broken or self not in self.connections:  # or it became a WebSocket
            return
        self._seen += len(data)
        if self._seen - self._body - CHUNK_OVERHEAD * self._pieces > MAX_HEAD and not self.transport.is_closing():
            self.send_400_response("The request head is too large.")

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value.rstrip(b" \t"))  # llhttp strips only the blanks before a value; RFC 9110, 5.5

    def _leaves_upgrade(self) -> bool:
        """Whether the request asks for an upgrade that the server does not support, such as h2c, and ignores."""
        parser = self.parser
        return parser.should_upgrade() and parser.get_method() != b"CONNECT" and not self._should_upgrade()

    def _unsupported_upgrade_warning(self) -> None:
        """Parse a request again without its `Upgrade`, because llhttp parses nothing after a request with one."""
        upgrade = sys.exception()
        if not self._leaves_upgrade() or not isinstance(upgrade, httptools.HttpParserUpgrade):
            return
        version = self.parser.get_http_version().encode()
        head = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        head += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn sets it
        self._piece = b"\r\n".join([*head, b"", self._piece[upgrade.args[0] :]])
        super().data_received(self._piece)

    def on_headers_complete(self) -> None:
        assert self.parser is not None
        if self._leaves_upgrade():
            return
        upgrades = self.parser.should_upgrade()
        self._fault = _fault(self.parser.get_http_version(), self.headers, upgrades)
        if self._fault is not None:
            raise ValueError(self._fault)  # 400, here and below
        super().on_headers_complete()
        if upgrades and self._should_upgrade():
            if self._unanswered():
                raise ValueError("a connection cannot be upgraded while an answer is written")
            return
        if len(self.pipeline) > MAX_PIPELINED:
            raise ValueError("too many pipelined requests")
        cycle = self.cycle
        cycle.scope["extensions"] = {WRITE_PART: _part_writer(cycle)}  # type: ignore[typeddict-item]
        if self.scheme == "https":
            cycle.send = partial(_send_parts, cycle.send)
        if not self.pipeline:
            self._answering = cycle
        # An answer before the end of the body closes the connection, and has `Connection: close`.
        self._keep_alive, cycle.keep_alive = cycle.keep_alive, False
        if self.parser.get_http_version() == "1.0":  # no chunks (RFC 9112, 6.1): closing ends the answer
            cycle.chunked_encoding, cycle.expected_content_length = False, _UnknownLength()
            self._keep_alive = False
        cycle.transport = self._unread

    def on_body(self, body: bytes) -> None:
        self._body += len(body)
        self._pieces += 1
        if self._pieces > MAX_PIECES + self._body // PIECE_BYTES:
            self._fault = "The body came in too many small chunks."
            raise ValueError(self._fault)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._leaves_upgrade():
            return
        self._seen = self._body = self._pieces = 0
        self._ended = True
        cycle = self.cycle
        if cycle is not None and cycle.transport is self._unread:
            cycle.transport = self.transport
            if not cycle.response_started:
                cycle.keep_alive = self._keep_alive
        super().on_message_complete()

    def shutdown(self) -> None:
        self._keep_alive = False
        super().shutdown()

    def _linger(self, transport: asyncio.Transport) -> None:
        """End a connection whose client is still sending: read its data for a while, and discard them.

        Closing a socket with unread bytes would reset the connection, and the answer could be lost.
        """
        if transport.is_closing() or self._lingering is not None:
            return
        self._broken, self._seen = True, 0
        self._drop_unanswered()
        self._lingering = self.loop.call_later(LINGER_SECONDS, transport.abort)
        if transport.can_write_eof():
            transport.write_eof()

    def on_response_complete(self) -> None:
        self._answering = self.pipeline[-1][0] if self.pipeline else None
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse the last request; if earlier requests wait for answers, only end the connection after these."""
        self._broken = True
        before = self._unanswered()
        broken = before.pop() if before and before[-1].more_body else None  # its body is invalid, not a new head
        if before:
            before[-1].keep_alive = False
            if broken is not None:
                self.pipeline.popleft()
        elif broken is not None and broken.response_started:
            self.transport.close()
        else:
            transport, self.transport = self.transport, self._unread
            super().send_400_response(self._fault or msg)
            self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self._lingering is not None:
            self._lingering.cancel()
        self._drop_unanswered()
        super().connection_lost(exc)

    def _drop_unanswered(self) -> None:
        for cycle in self._unanswered():
            cycle.disconnected = True
            cycle.message_event.set()
        self.pipeline.clear()

    def _unanswered(self) -> list[RequestResponseCycle]:
        """The requests whose answers are incomplete, in order of arrival."""
        first = [] if self._answering is None or self._answering.response_complete else [self._answering]
        return first + [cycle for cycle, _ in reversed(self.pipeline)]


def http_protocol() -> type[asyncio.Protocol]:
    """Return the protocol class of one server: httptools, with limits; its connections share `silent` and `idle`."""
    most = most_connections()
    silent: dict[Any, float] = {}  # connections that wait for a request head, and since when; oldest first
    idle: dict[Any, None] = {}  # connections that were answered and send nothing; longest idle first

    class TimedProtocol(_ReadInTime, _LimitedHttpToolsProtocol):
        """Closes a connection whose next request head is not complete within `HEAD_SECONDS`.

        uvicorn's own timer runs between an answer and the next byte. This timer runs from the connection, or from the
        first byte of a later head. When too many connections are open, `_make_place` closes one.
        """

        _late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            silent[self] = self.loop.time()
            if len(self.connections) > most // 2:
                self._make_place()
            if self in silent:
                self._watch()

        def _make_place(self) -> None:
            """Close connections that were silent for `CROWDED_SECONDS`; beyond the limit, close one more.

            This last one is the longest silent connection, else the longest idle one, else the new one.
            """
            patience = self.loop.time() - CROWDED_SECONDS
            while (oldest := next(iter(silent), self)) is not self and silent[oldest] < patience:
                oldest._give_place()
            if len(self.connections) > most:
                (oldest if oldest is not self else next(iter(idle), self))._give_place()

        def _give_place(self) -> None:
            silent.pop(self, None)
            idle.pop(self, None)
            self.connections.discard(self)
            self.transport.abort()

        def data_received(self, data: bytes) -> None:
            idle.pop(self, None)
            super().data_received(data)
            self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.timeout_keep_alive_task is not None:
                idle[self] = None

        def connection_lost(self, exc: Exception | None) -> None:
            silent.pop(self, None)
            idle.pop(self, None)
            self._unwatch()
            super().connection_lost(exc)

        def _watch(self) -> None:
            upgraded = self not in self.connections  # to a WebSocket, whose protocol has its own limits
            answering = self.cycle is not None and not self.cycle.response_complete
            if upgraded or answering or self.timeout_keep_alive_task is not None or self.transport.is_closing():
                silent.pop(self, None)
                self._unwatch()
                return
            silent.setdefault(self, self.loop.time())  # also after an answer, once the next head has begun
            if self._late is None:
                self._late = self.loop.call_later(HEAD_SECONDS, self._end_wait)

        def _unwatch(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

        def _end_wait(self) -> None:
            self._late = None
            self.transport.close()

    return TimedProtocol


class WebSocketProtocol(_ReadInTime, WebSocketsSansIOProtocol):
    """Lets the route close a connection when the server stops, and limits what a client may send.

    Limits apply to the frames of a message, small frames per second, the bytes of incomplete messages (`Held`), and the
    parts of large messages per iteration of the loop (`Pieces`). While a client does not read, its frames are not read.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._draining = asyncio.Event()
        self._receive_frame = self.conn.recv_frame
        self.conn.recv_frame = self._count  # type: ignore[method-assign]
        self._fragments = self._partial = 0  # frames of the incomplete message, and their bytes
        self._frame: Frame | None = None  # the last frame of a message that was just received
        self._frames, self._second = 0, 0.0  # small frames in the current second, and its beginning
        self._held, self._owner = 0, NOBODY  # bytes that `Held` counts, and their owner
        self._waits = False  # whether the connection waits for its turn to read more of a large message

    def _count(self, frame: Frame) -> None:
        """Receive a frame, or close the connection after too many frames."""
        control = frame.opcode in CTRL_OPCODES
        if not control:
            self._fragments += 1
            self._partial += len(frame.data)
        if control or len(frame.data) < 1024:
            now = self.loop.time()
            if now >= self._second + 1.0:
                self._frames, self._second = 0, now
            self._frames += CONTROL_WEIGHT if control else 1
        if self._fragments > MAX_FRAGMENTS:
            self._refuse(1008, f"a message has at most {MAX_FRAGMENTS} frames")
        elif self._frames > MAX_FRAMES:
            self._refuse(1008, "too many small frames in a second")
        else:
            self._receive_frame(frame)
            if not control:
                self._frame = frame
                if frame.fin:
                    self._fragments = self._partial = 0

    def _refuse(self, code: int, reason: str) -> None:
        """Close the connection, even while data is parsed; `data_received` notifies the route."""
        self.conn.fail(code, reason)
        self.conn.parser_exc = WebSocketException(reason)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._frame is not None:
            self._frame.data = b""  # the parser of websockets refers to its last frame until the next one
            self._frame = None
        if self.conn.handshake_exc is not None and not self.handshake_initiated:  # uvicorn would keep waiting
            said = b"".join(self.conn.data_to_send())  # empty with websockets before version 17
            self.transport.write(said or b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
            self.transport.close()
        pending = len(self.conn.reader.buffer) + self._partial
        if pending > BIG_BODY or self._held:
            self._hold(0 if self.close_sent else max(0, pending - BIG_BODY))
        if pending > BIG_BODY and not self._waits and not self.transport.is_closing():
            self._waits = True
            self.transport.pause_reading()
            self._all_held.pieces.add(self._owner.label, self._read_on)

    def handle_parser_exception(self) -> None:
        if self.conn.close_sent is None:  # the WebSocket is not open yet, so it cannot be closed with a reason
            self.transport.abort()
        else:
            super().handle_parser_exception()

    @property
    def _all_held(self) -> Held:
        return self.config.app.state.held  # type: ignore[union-attr]

    def _hold(self, pending: int) -> None:
        """Count the bytes of an incomplete message."""
        if not self._held:
            self._owner = caller_of(getattr(self, "scope", {}))
        try:
            self._all_held.add(self._owner, pending - self._held)
            self._held = pending
        except HttpError:
            self._refuse(1013, "too many bytes of messages are held")
            self.handle_parser_exception()
            self._hold(0)

    def send_receive_event_to_app(self) -> None:
        """Queue the message for the route, a large text undecoded; another text closes the connection if not UTF-8."""
        if self.curr_msg_data_type != "text" or self.close_sent:
            super().send_receive_event_to_app()
            return
        data, self.frames = b"".join(self.frames), []
        try:
            given = {"text": data.decode()} if len(data) <= BIG_BODY else {UNDECODED: data}
            self.queue.put_nowait({"type": "websocket.receive", **given})  # type: ignore[typeddict-item]
        except UnicodeDecodeError:
            self.logger.warning("a message over a WebSocket is not valid UTF-8: its connection is closed")
            self._refuse(1007, "a text is not valid UTF-8")
            self.handle_parser_exception()
        else:
            self.read_paused = True
            self.transport.pause_reading()

    def handle_connect(self, event: Any) -> None:
        super().handle_connect(event)
        if hasattr(self, "scope"):  # the handshake succeeded; the route has not begun
            extensions: dict[str, Any] = self.scope.setdefault("extensions", {})  # type: ignore[assignment]
            extensions[DRAINING] = self._draining

    def shutdown(self) -> None:
        if self.handshake_complete and not self.close_sent and not self.disconnected:
            self._draining.set()
        else:
            super().shutdown()

    def pause_writing(self) -> None:
        super().pause_writing()
        if not self.transport.is_closing():
            self.transport.pause_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._resume()

    def _read_on(self) -> None:
        self._waits = False
        self._resume()

    def _resume(self) -> None:
        """Resume reading, unless there is another reason to wait."""
        if not (self._waits or self.read_paused or self.transport.is_closing()) and self.writable.is_set():
            self.transport.resume_reading()

    async def receive(self) -> Any:
        message = await self.queue.get()
        if self.read_paused and self.queue.empty():
            self.read_paused = False
            self._resume()
        return message

    def connection_lost(self, exc: Exception | None) -> None:
        if self._held:
            self._hold(0)
        super().connection_lost(exc)
