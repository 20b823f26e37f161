# SPDX-License-Identifier: MIT
"""Opens an MCP connection over stdio, HTTP or SSE, detects its end, limits its rate, and repairs invalid messages."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any, Self

import anyio
import httpx2
from mcp.client.sse import sse_client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.message import SessionMessage
from mcp_types import JSONRPCResponse, methods
from pydantic import ValidationError

from candle_vllm.responses.mcp.http import MAX_BODY, HttpNotes, bare_address, http_client
from candle_vllm.responses.mcp.peer import Peer
from candle_vllm.responses.mcp.server_config import McpServerConfig, Transport
from candle_vllm.responses.mcp.stdio import StdioServer

NO_SUCH_TRANSPORT = frozenset({400, 404, 405})  # status of an SSE server's response to a POST at its address
CLOSED = "the server closed the connection"
MAX_PER_SECOND = 2000  # messages; a server that sends more is delayed, without effect on other servers
MAX_RUBBISH = 1000  # consecutive invalid messages


def kinds(config: McpServerConfig) -> tuple[Transport, ...]:
    """Return the transports to try, in order: for an address without a transport, streamable HTTP and then SSE."""
    if config.transport is not None:
        return (config.transport,)
    return ("http", "sse") if config.url else ("stdio",)


class Opening:
    """One attempt to connect to a server with one transport.

    `ended` is called with a sentence when the server closes the connection; `session_doubted` is as in `HttpNotes`.
    """

    def __init__(
        self, peer: Peer, kind: Transport, *, ended: Callable[[str], None], session_doubted: Callable[[], None]
    ) -> None:
        self._peer = peer
        self._kind: Transport = kind
        self._ended = ended
        self._notes = HttpNotes(session_doubted)
        self._program: StdioServer | None = None

    @property
    def status(self) -> int | None:
        return self._notes.status

    @asynccontextmanager
    async def transport(self) -> AsyncGenerator[tuple[Any, Any], None]:
        """Yield the transport's two streams, for the SDK's `Client`."""
        opened = {"stdio": self._stdio, "http": self._http, "sse": self._sse}[self._kind]
        async with opened() as (received, sent):
            yield WatchedStream(received, self._over, self._peer.log), sent

    def last_words(self) -> str:
        """Return what the program reported about its failure, to be appended to a sentence; "" without a report."""
        return self._program.last_words() if self._program is not None else ""

    def _over(self, why: str) -> None:
        note = self._program.ending() if self._program is not None else None
        self._ended(f"{why}: {note}" if note else why)

    def _stdio(self) -> Any:
        self._program = StdioServer(self._peer)
        return self._program.transport()

    @asynccontextmanager
    async def _http(self) -> AsyncGenerator[tuple[Any, Any], None]:
        assert self._peer.config.url is not None
        address = bare_address(self._peer.config.url)
        async with (
            http_client(self._peer, self._notes) as client,
            streamable_http_client(address, http_client=client, max_sse_event_size=MAX_BODY) as streams,
        ):
            yield streams

    def _sse(self) -> Any:
        assert self._peer.config.url is not None

        def client(*_: Any, **__: Any) -> httpx2.AsyncClient:
            return http_client(self._peer, self._notes, self._ended)  # the SDK sends nothing more after a failure

        return sse_client(bare_address(self._peer.config.url), httpx_client_factory=client)


MAX_MENDED = 2000  # maximum number of tools of a list, and of blocks of a result; the rest is left out or emptied
_LEFT_OUT = {"type": "text", "text": ""}  # replaces each further block, so that the number of blocks stays the same
_MAX_NOTES = 20
_ERA = "2025-11-25"  # the protocol version with the strictest formats
_OBJECT = "object"
_SHOWN = ("title", "description", "icons", "annotations", "execution", "outputSchema", "_meta", "size")
"""Optional fields of a tool or a block."""


def mend(result: dict[str, Any], note: Callable[[str], object]) -> None:
    """Remove the parts of a server's answer that violate the protocol, in place.

    The SDK checks an answer as a whole, so one invalid tool or optional field would invalidate the list, and one
    unknown block the result. Such a field is removed; a tool is repaired if its meaning is clear, and otherwise
    dropped; a text that names its kind replaces an invalid block. `note` is called with a sentence for each dropped
    tool (at most 20), and for a list that is too long.
    """
    content, structured = result.get("content"), result.get("structuredContent")
    for name, kind in _FIELDS.items():
        if name in result and (not isinstance(result[name], kind) or result[name] == ""):
            del result[name]
    if not content and structured is not None:
        content = json.dumps(structured, ensure_ascii=False)
    if isinstance(content, str):
        content = {"type": "text", "text": content}
    if isinstance(content, dict):
        result["content"] = [content]
    elif content is None and "content" in result:  # an empty list of Go
        result["content"] = []
    if isinstance(tools := result.get("tools"), list):
        notes: list[str] = []
        mended = [_mended_tool(tool, notes.append) for tool in tools[:MAX_MENDED]]
        result["tools"] = [tool for tool in mended if tool is not None]
        if len(tools) > MAX_MENDED:
            note(f"it lists {len(tools)} tools at once; those after the first {MAX_MENDED} are left out")
        for sentence in notes[:_MAX_NOTES]:
            note(sentence)
    if isinstance(content := result.get("content"), list):
        result["content"] = [_mended_block(block) for block in content[:MAX_MENDED]]
        result["content"] += [_LEFT_OUT] * (len(content) - MAX_MENDED)


def _fault(method: str, result: dict[str, Any]) -> str | None:
    """Return how a result violates the protocol, or None."""
    try:
        methods.validate_server_result(method, _ERA, result)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(str(part) for part in first['loc'][2:])[:100]}: {first['msg']}"
    return None


def _mended_tool(tool: Any, note: Callable[[str], object]) -> dict[str, Any] | None:
    fault = _fault("tools/list", {"tools": [tool]}) if isinstance(tool, dict) else "it is not an object"
    if fault is None:
        return tool
    if isinstance(tool, dict) and isinstance(tool.get("name"), str):
        schema = tool.get("inputSchema")
        schema = {} if schema is None or schema is True else schema
        if isinstance(schema, dict) and schema.get("type", _OBJECT) in (_OBJECT, [_OBJECT]):
            schema = {**schema, "type": _OBJECT}
        mended = {**tool, "inputSchema": schema}
        for name in _SHOWN:
            if name in mended and _fault("tools/list", {"tools": [{**_PLAIN, name: mended[name]}]}) is not None:
                del mended[name]
        if _fault("tools/list", {"tools": [mended]}) is None:
            return mended
    name = tool.get("name") if isinstance(tool, dict) else tool
    note(f"the tool {str(name)[:100]!r} is left out: it does not fit the protocol ({fault})")
    return None


_FIELDS = {"_meta": dict, "structuredContent": dict, "isError": bool, "nextCursor": str}
"""Types of the optional fields beside a list of tools or of blocks."""
_PLAIN = {"name": "a", "inputSchema": {"type": _OBJECT}}


def _mended_block(block: Any) -> Any:
    if isinstance(block, dict):
        for one in (block, {name: value for name, value in block.items() if name not in _SHOWN}):
            if _fault("tools/call", {"content": [one]}) is None:
                return one
    kind = block.get("type") if isinstance(block, dict) else type(block).__name__
    return {"type": "text", "text": f"[content of the kind {str(kind)[:50]!r}, which is not understood]"}


class WatchedStream:
    """A transport's read stream that reports its end.

    The SDK ends a connection's requests without notifying its owner, which would not reconnect until the next call.
    `ended` is called with a sentence when the stream ends, perhaps more than once; `log` is called with a line for each
    invalid message, and with the notes of `mend`.
    """

    def __init__(self, inner: Any, ended: Callable[[str], None], log: Callable[[str], object]) -> None:
        self._inner = inner
        self._ended = ended
        self._log = log
        self._rubbish = 0
        self._count = 0
        self._since = 0.0

    @property
    def last_context(self) -> Any:
        """Context of the sender, which the SDK uses if a stream has one."""
        return getattr(self._inner, "last_context", None)

    async def receive(self) -> SessionMessage | Exception:
        """Return the next message; `anyio.EndOfStream` at the end."""
        try:
            item = await self._inner.receive()
        except (anyio.EndOfStream, anyio.ClosedResourceError, anyio.BrokenResourceError):
            self._ended(CLOSED)
            raise
        await self._pace()
        self._rubbish = self._rubbish + 1 if isinstance(item, Exception) else 0
        if isinstance(item, Exception):
            self._log(f"not a message of the protocol: {str(item)[:300]}")
        if self._rubbish >= MAX_RUBBISH:
            self._ended(f"the server sent {MAX_RUBBISH} consecutive items that are not messages of the protocol")
            raise anyio.EndOfStream
        if isinstance(item, SessionMessage) and isinstance(item.message, JSONRPCResponse):
            mend(item.message.result, self._log)
        return item

    async def _pace(self) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._since >= 1.0:
            self._since, self._count = now, 0
        self._count += 1
        if self._count > MAX_PER_SECOND:
            await asyncio.sleep(max(0.0, self._since + 1.0 - now))

    async def aclose(self) -> None:
        await self._inner.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> SessionMessage | Exception:
        try:
            return await self.receive()
        except anyio.EndOfStream:
            raise StopAsyncIteration from None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
