# SPDX-License-Identifier: MIT
"""One connection to an MCP server, owned by one task.

The SDK's client belongs to the task that enters it: if a transport fails, that task is cancelled, whatever it is doing.
So only the owner task enters and leaves the client. Each request runs in a task of its own that is awaited together
with the connection's end; a server can never cancel a caller.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from importlib.metadata import version
from typing import Any, TypeVar

import mcp_types as types
from mcp import Client, MCPError

from candle_vllm.responses.mcp.peer import Peer, leaf
from candle_vllm.responses.mcp.processes import to_the_end
from candle_vllm.responses.mcp.server_config import Transport
from candle_vllm.responses.mcp.transports import CLOSED, Opening

_END_SECONDS = 1.0  # wait for the owner task to set `why`
_CANCEL_SECONDS = 1.0  # maximum wait of a cancelled caller until the server is notified
_REQUEST_SECONDS = 6.0  # wait for requests after the connection ended; the SDK takes up to 5 s to notify the server
_CLOSE_SECONDS = 10.0  # wait for the end of a connection, before its owner task is cancelled
_POLL = 0.02
SESSION_LOST = "the server no longer accepts the session"
_T = TypeVar("_T")


class ConnectionLostError(Exception):
    """The connection ended before the answer arrived; the message is the reason."""


class McpConnection:
    """One connection; a server in this process needs no transport.

    The `mode` "auto" negotiates the newer protocol first, "legacy" uses only the older one. `wake` is called when the
    connection ends, when the tools change, and when `in_doubt` is set.
    """

    def __init__(self, peer: Peer, kind: Transport, *, mode: str, wake: Callable[[], None]) -> None:
        self._peer = peer
        self._wake = wake
        self._opening = Opening(peer, kind, ended=self.end, session_doubted=self._doubted)
        self._mode = mode
        self._client: Client | None = None
        self._opened = asyncio.Event()
        self._stop = asyncio.Event()
        self._down = asyncio.Event()
        self._why: str | None = None
        self._closing = False
        self._owner: asyncio.Task[None] | None = None
        self._requests: set[asyncio.Task[Any]] = set()
        self.tools_changed = False  # whether the server sent a notification; whoever lists the tools resets it
        self.in_doubt = False  # whether the server refused a request in a way that may concern the whole session

    @property
    def client(self) -> Client:
        """The SDK's client; use it for requests only within `run`."""
        assert self._client is not None
        return self._client

    @property
    def is_down(self) -> bool:
        return self._down.is_set()

    @property
    def was_refused(self) -> bool:
        """Whether the server closed the connection before a protocol version was negotiated."""
        return self._client is None and self.why.startswith(CLOSED)

    @property
    def why(self) -> str:
        """Why the connection could not be opened or has ended."""
        return self._why or "the connection was closed"

    @property
    def status(self) -> int | None:
        return self._opening.status

    async def open(self, seconds: float) -> bool:
        """Connect and negotiate a protocol version. If that fails or times out, set `why` and return False."""
        self._owner = asyncio.ensure_future(self._own())
        waits = [asyncio.ensure_future(event.wait()) for event in (self._opened, self._down)]
        try:
            await asyncio.wait({self._owner, *waits}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            await self.close(patience=0.0)
            raise
        finally:
            for wait in waits:
                wait.cancel()
        if self._opened.is_set() and not self.is_down:
            return True
        if not self.is_down:
            self._why = f"it did not answer within {seconds:g} seconds (connect_timeout){self._opening.last_words()}"
            await self.close(patience=0.0)
        await self.close(patience=_END_SECONDS)
        return False

    async def run(self, work: Coroutine[Any, Any, _T], seconds: float) -> _T:
        """Await one request; ConnectionLostError if the connection ended first, or was closed.

        TimeoutError is raised after `seconds`, and up to 1 further second to notify the server.
        """
        if self.is_down:
            work.close()
            raise ConnectionLostError(self.why)
        task = asyncio.ensure_future(work)
        self._requests.add(task)
        task.add_done_callback(self._forget)
        down = asyncio.ensure_future(self._down.wait())
        try:
            await asyncio.wait({task, down}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if task.done() and not task.cancelled():
                error = task.exception()
                if not (isinstance(error, MCPError) and error.code == types.CONNECTION_CLOSED and self.is_down):
                    return task.result()
            if not task.done() and not down.done():
                raise TimeoutError
            if self._owner is not None:
                await asyncio.wait({self._owner}, timeout=_END_SECONDS)
            raise ConnectionLostError(self.why)
        finally:
            down.cancel()
            await _abandon(task)

    async def close(self, *, patience: float = _CLOSE_SECONDS) -> None:
        """End the connection: its requests, the session, and the server's process. Idempotent."""
        self._closing = True
        self.end("the connection was closed")
        if self._owner is not None:
            await to_the_end(self._finish(self._owner, patience))

    async def _finish(self, owner: asyncio.Task[None], patience: float) -> None:
        if patience:
            await asyncio.wait({owner}, timeout=patience)
        if not owner.done():
            owner.cancel()
            await asyncio.wait({owner}, timeout=_CLOSE_SECONDS)
        for request in list(self._requests):
            await _abandon(request, _REQUEST_SECONDS)

    async def _own(self) -> None:
        """Run the owner task. It raises no errors; it sets `why` instead."""
        try:
            async with self._make_client() as client:
                self._client = client
                # the SDK's check raises rather than return a failing output, and matches patterns without a time limit
                client.session.validate_tool_result = _accept
                self._opened.set()
                try:
                    await self._stop.wait()
                finally:
                    self._down.set()
        except asyncio.CancelledError:
            pass  # by `close`, which has set the reason
        except (Exception, BaseExceptionGroup) as error:
            if self._why in (None, CLOSED) or not (self._opened.is_set() or self._closing):
                self._why = self._reason(error)
        finally:
            self.end("the connection was closed")

    def _make_client(self) -> Client:
        return Client(
            self._peer.server if self._peer.server is not None else self._opening.transport(),
            mode=self._mode,
            cache=None,
            client_info=types.Implementation(name="candle-vllm", version=version("candle-vllm-responses")),
            message_handler=self._on_message,
        )

    def _reason(self, error: BaseException) -> str:
        error, status = leaf(error), self.status
        if isinstance(error, MCPError) and status is not None and status >= 400 and self._peer.config.url:
            return self._peer.status_sentence(status)
        if isinstance(error, MCPError) and error.code == types.CONNECTION_CLOSED:
            return self._why or "it closed the connection before it answered"
        return self._peer.sentence(error)

    def end(self, why: str) -> None:
        """End the connection; only the first reason is recorded."""
        if self._why is None:
            self._why = why
        self._down.set()
        self._stop.set()
        self._wake()

    def _doubted(self) -> None:
        self.in_doubt = True
        self._wake()

    async def has_lost_session(self) -> bool:
        """Whether the server no longer knows the session; waits for the ping that finds out."""
        while self.in_doubt and not self.is_down:
            await asyncio.sleep(_POLL)
        return self._why == SESSION_LOST

    async def _on_message(self, message: Any) -> None:
        if isinstance(message, types.ToolListChangedNotification):
            self.note_tools_changed()

    def note_tools_changed(self) -> None:
        self.tools_changed = True
        self._wake()

    def _forget(self, request: asyncio.Task[Any]) -> None:
        self._requests.discard(request)
        if not request.cancelled():
            request.exception()  # asyncio logs an exception that nobody retrieves


async def _abandon(task: asyncio.Task[Any], seconds: float = _CANCEL_SECONDS) -> None:
    """Cancel a request, and wait at most `seconds` until it has notified its server; its outcome is ignored."""
    if not task.done():
        task.cancel()
        await to_the_end(asyncio.wait({task}, timeout=seconds))


async def _accept(name: str, result: types.CallToolResult) -> None:
    del name, result
