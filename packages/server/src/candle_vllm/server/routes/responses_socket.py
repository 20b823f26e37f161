# SPDX-License-Identifier: MIT
"""`/v1/responses` over a WebSocket: steps 1 and 10 of the responses of one connection, which run one after the other.

A text message is a `response.create` event: the body of `POST /v1/responses` with that `type`. The server sends the
events of a stream, one per message. A response that is not stored can be continued on the same connection, from the
connection's memory. If a continuation fails, the memory drops the response that it continued.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from contextlib import aclosing

import msgspec
from fastapi import APIRouter
from starlette.websockets import WebSocket, WebSocketDisconnect

from candle_vllm.core.engine.requests import arrived
from candle_vllm.core.errors import CandleVllmError
from candle_vllm.openai import to_error, to_json_bytes
from candle_vllm.openai.errors import InvalidBodyError, UnsupportedParameterError
from candle_vllm.openai.fair_threads import apart
from candle_vllm.openai.json_body import decode_json
from candle_vllm.responses.api.connection import ConnectionMemory
from candle_vllm.responses.api.response_stream import ResponseStream
from candle_vllm.responses.api.stored_items import entry_of
from candle_vllm.responses.conversation.channel import end_task
from candle_vllm.responses.protocol.events import StreamEvent
from candle_vllm.responses.protocol.request import ResponsesRequest, parse_responses_request
from candle_vllm.server.answering import in_time
from candle_vllm.server.http.body import BIG_BODY, Held
from candle_vllm.server.http.errors import HttpError
from candle_vllm.server.http.failures import log_failure, store_refusal
from candle_vllm.server.http.protocol import DRAINING, STALL_SECONDS, UNDECODED
from candle_vllm.server.http.routing import RequestContext, caller_of, current_request
from candle_vllm.server.http.sse import KEEP_ALIVE_SECONDS
from candle_vllm.server.mailbox.policy import refuse_headers
from candle_vllm.server.models.manager import take_turn
from candle_vllm.server.outliving import NOT_HERE
from candle_vllm.server.routes.responses import detail_of, owner_of, responder_of
from candle_vllm.server.settings.derived import speak_in_flags
from candle_vllm.server.store_access import silent_event

router = APIRouter()
MAX_WAITING = 16  # messages that wait for the responses to earlier messages
MAX_WAITING_BYTES = 16 << 20  # bytes of the waiting messages; one alone may have more
MAX_SECONDS = 3600.0  # maximum age of a connection; a response that has begun by then is finished
_CREATE = "response.create"
_OLD = "websocket_connection_limit_reached"
_RESTART, _TOO_OLD, _TOO_MANY, _NOT_TEXT, _NOT_UTF8 = 1012, 1000, 1008, 1003, 1007  # close codes


@router.websocket("/{path:path}")
@router.websocket("/v1/responses")
async def respond(websocket: WebSocket) -> None:
    """Serve OpenAI's Responses API over one WebSocket connection; HttpError 404 on every other path."""
    if websocket.path_params:
        raise HttpError(404, "This server has a WebSocket at /v1/responses, and at no other path.", "not_found")
    refuse_headers(websocket.scope["headers"], NOT_HERE)
    await websocket.accept()
    with contextlib.suppress(WebSocketDisconnect):
        await _Connection(websocket).run()


class _Connection:
    """One WebSocket connection."""

    def __init__(self, websocket: WebSocket) -> None:
        self._websocket = websocket
        self._state = websocket.app.state
        self._memory = ConnectionMemory()
        self._waiting: deque[bytes | HttpError] = deque()  # messages, or the error of a message that was refused
        self._held: Held = self._state.held
        self._caller = caller_of(websocket.scope)
        self._news = asyncio.Event()
        self._gone = False  # whether the client has disconnected
        self._stream: ResponseStream | None = None
        self._number = 0  # sequence number of the latest event of the current response
        self._draining: asyncio.Event = websocket.scope.get("extensions", {}).get(DRAINING) or asyncio.Event()

    async def run(self) -> None:
        """Answer messages until the client disconnects, the server stops, or the connection is too old."""
        ends = time.monotonic() + MAX_SECONDS
        reader = asyncio.create_task(self._read(), name="reader of a WebSocket")
        stop = asyncio.create_task(self._draining.wait(), name="drain of a WebSocket")
        stop.add_done_callback(lambda _: self._news.set())
        try:
            while await self._has_message(ends):
                await self._answer_next()
            if self._draining.is_set():
                await self._websocket.close(_RESTART, "the server is stopping")
            elif not self._gone:
                message = "The connection was open for an hour, the most that is allowed: open another."
                await self._send_bytes(_error_event(HttpError(400, message, _OLD)))
                await self._websocket.close(_TOO_OLD)
        except asyncio.CancelledError:  # the drain's time limit is over
            await self._cut_off()
        finally:
            await end_task(stop)
            await end_task(reader)
            for message in self._waiting:
                if isinstance(message, bytes):
                    self._held.add(self._caller, -_counted(message))

    async def _read(self) -> None:
        """Receive messages, even while a response is sent, so that a disconnect is noticed."""
        try:
            while True:
                message = await self._websocket.receive()
                if message["type"] == "websocket.disconnect":
                    return
                if "bytes" in message:
                    await self._websocket.close(_NOT_TEXT, "a message must be a text")
                    return
                # A str may need four bytes per character, so messages are held as bytes.
                data: bytes = message[UNDECODED] if UNDECODED in message else message["text"].encode()
                del message
                size = len(data) + sum(len(each) for each in self._waiting if isinstance(each, bytes))
                if len(self._waiting) >= MAX_WAITING or (self._waiting and size > MAX_WAITING_BYTES):
                    most = f"{MAX_WAITING} messages, or {MAX_WAITING_BYTES >> 20} MB of them,"
                    message = f"More than {most} wait for an earlier response to end."
                    await self._send_bytes(_error_event(HttpError(429, message, "too_many_messages")))
                    await self._websocket.close(_TOO_MANY)
                    return
                try:
                    self._held.add(self._caller, _counted(data))
                    self._waiting.append(data)
                except HttpError as full:
                    self._waiting.append(full)
                del data  # only the queue may refer to it
                self._news.set()
        except (WebSocketDisconnect, RuntimeError):  # the client disconnected
            pass
        finally:
            self._gone = True
            self._news.set()

    async def _take(self) -> ResponsesRequest:
        message = self._waiting.popleft()
        try:
            if isinstance(message, HttpError):
                raise message
            return await self._held.parse(self._caller, message, _request_of)
        finally:
            del message

    async def _has_message(self, ends: float) -> bool:
        """Wait for the next message; return False if none will come."""
        while not self._waiting or self._draining.is_set():
            left = ends - time.monotonic()
            if self._gone or self._draining.is_set() or left <= 0:
                return False
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._news.wait()
        return not self._gone and time.monotonic() < ends

    async def _answer_next(self) -> None:
        """Answer one message, or cancel the answer when the client disconnects."""
        answering = asyncio.create_task(self._answer(), name="response over a WebSocket")
        try:
            while not answering.done() and not self._gone:
                self._news.clear()
                news = asyncio.create_task(self._news.wait())
                await asyncio.wait({answering, news}, return_when=asyncio.FIRST_COMPLETED)
                await end_task(news)
        finally:
            if not answering.done():
                await end_task(answering)
        try:
            if not answering.cancelled():
                answering.result()
        finally:
            del answering  # its exception refers to this frame

    async def _answer(self) -> None:
        previous: str | None = None
        self._number = 0
        filling = asyncio.create_task(self._fill_silence(), name="silence of a WebSocket")
        try:
            wire = await self._take()
            previous = wire.previous_response_id
            await self._generate(wire)
        except (WebSocketDisconnect, asyncio.CancelledError):
            raise
        except _NotUtf8Error:
            await self._websocket.close(_NOT_UTF8, "a text is not valid UTF-8")
            self._gone = True
        except Exception as failure:
            await self._fail(failure)
        finally:
            await end_task(filling)
        if previous is not None and (self._stream is None or self._stream.failure is not None):
            self._memory.forget(previous)
        self._stream = None

    async def _fill_silence(self) -> None:
        """Send an event for each `KEEP_ALIVE_SECONDS` without one: clients do not count the connection's own pings."""
        with contextlib.suppress(WebSocketDisconnect):
            while True:
                before = self._number
                await asyncio.sleep(KEEP_ALIVE_SECONDS)
                if self._number == before:
                    await self._send_bytes(silent_event(before))

    async def _generate(self, wire: ResponsesRequest) -> None:
        scope = {**self._websocket.scope, "state": {**self._websocket.scope.get("state", {})}}
        if self._caller.label:  # the connection may last longer than its key, or than what the key may do
            key = self._state.keys.find_caller(self._caller)
            if key is None:
                message = "The API key of this connection is no longer valid: open a connection with another key."
                raise HttpError(401, message, "invalid_api_key")
            scope["state"]["caller"] = key.caller
        current_request.set(RequestContext(scope))  # in the metrics, each response is a request of its own
        arrived.set(time.monotonic())
        async with in_time(time.monotonic() + self._state.settings.request_timeout, self._websocket):
            turn = await take_turn(scope, wire.model, priority=wire.priority or 0)
            try:
                owner = await owner_of(self._websocket, wire)
                responder = responder_of(self._state, turn.model, wire.model, self._memory)
                async with aclosing(await responder.create_stream(wire, owner=owner)) as stream:
                    self._stream = stream
                    async for event in stream:
                        await self._send(event)
            finally:
                turn.release()
        if stream.failure is None:
            self._memory.remember(await apart(entry_of, owner, stream.response, stream.input_items))

    async def _fail(self, failure: Exception) -> None:
        """Send a failure: as the end of a response that has begun, otherwise as an error event."""
        stream, self._stream = self._stream, None
        if stream is None:
            await self._send_bytes(_error_event(failure))
            return
        for event in stream.stop(detail_of(_refused(failure))):
            await self._send(event)

    async def _cut_off(self) -> None:
        """Send the last messages of a connection that the end of the drain cancels."""
        error = HttpError(503, "The server was stopped before the response was complete.", "shutting_down")
        with contextlib.suppress(Exception):
            if self._stream is not None:
                await self._fail(error)
            await self._websocket.close(_RESTART, "the server has stopped")

    async def _send(self, event: StreamEvent) -> None:
        self._number = event.sequence_number
        await self._send_bytes(to_json_bytes(event))

    async def _send_bytes(self, data: bytes) -> None:
        """Send a message; a client that does not read it within `STALL_SECONDS` counts as disconnected."""
        try:
            async with asyncio.timeout(STALL_SECONDS):
                await self._websocket.send_text(data.decode())
        except (TimeoutError, RuntimeError):
            self._gone = True
            raise WebSocketDisconnect(1006) from None


def _counted(message: bytes) -> int:
    """Return the number of bytes of a message that `Held` counts."""
    return max(0, len(message) - BIG_BODY)


class _NotUtf8Error(InvalidBodyError):
    """A message is not valid UTF-8."""


def _request_of(message: bytes) -> ResponsesRequest:
    try:
        text = message.decode()
    except UnicodeDecodeError:  # the cause is dropped, because it refers to the message
        raise _NotUtf8Error("a text is not valid UTF-8") from None
    body = decode_json(text)
    del text
    if not isinstance(body, dict):
        raise InvalidBodyError("a message must be a JSON object with a type")
    if body.get("type") != _CREATE:
        raise UnsupportedParameterError(f"type must be {_CREATE!r}, not {body.get('type')!r:.80}", "type")
    for name, neutral in (("stream", True), ("background", False), ("stream_options", None)):
        if body.get(name) not in (None, neutral):
            said = f"{name} belongs to POST /v1/responses: over a WebSocket every response is a stream"
            raise UnsupportedParameterError(said, name)
    fields = {name: value for name, value in body.items() if name != "type"}
    return parse_responses_request({**fields, "stream": True})


def _refused(failure: Exception) -> Exception:
    failure = store_refusal(failure) or failure
    if isinstance(failure, CandleVllmError):
        speak_in_flags(failure)
    return failure


def _error_event(failure: Exception) -> bytes:
    failure = _refused(failure)
    if isinstance(failure, HttpError):
        status, error = failure.status, msgspec.json.decode(failure.body)["error"]
    else:
        log_failure("a response over a WebSocket failed", failure)
        told = to_error(failure)
        status, body = told.status, told.body.error
        error = {"type": body.type, "code": body.code or body.type, "message": body.message, "param": body.param}
    return msgspec.json.encode({"type": "error", "status": status, "error": error})
