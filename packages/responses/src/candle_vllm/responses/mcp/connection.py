# SPDX-License-Identifier: MIT
"""One connection to a server, from its opening to its end, held by a task of its own.

The SDK's client belongs to the task that enters it: when a transport fails, that task is cancelled, whatever it does
at the moment. So one owner task alone enters and leaves the client, and each request runs in a task of its own that
races the connection's end; a caller is never cancelled by a server.
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
from candle_vllm.responses.mcp.transports import CLOSED, Kind, Opening

_END_SECONDS = 1.0  # for the owner to learn why the connection ended, once it is known that it did
_CANCEL_SECONDS = 1.0  # that a caller who gives up waits until the server was told; the telling goes on after that
_REQUEST_SECONDS = 6.0  # for requests to end when the connection does; the SDK takes 5 at most to tell the server
_CLOSE_SECONDS = 10.0  # for the whole end of a connection, before its owner is cancelled
_T = TypeVar("_T")


class ConnectionLostError(Exception):
    """The connection ended before the answer came; the text says why."""


class McpConnection:
    """One connection.

    Args:
        peer: the server.
        kind: the transport; a server object of this process takes its place.
        mode: how a protocol version is agreed on: "auto" asks in the newer era's way first, "legacy" in the older era's
            alone.
        wake: called when the connection has gone down, when the tools changed, and when a session is in doubt.
    """

    def __init__(self, peer: Peer, kind: Kind, *, mode: str, wake: Callable[[], None]) -> None:
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
        self.tools_changed = False
        """The server said that its tools are others now; whoever lists them again resets it."""
        self.in_doubt = False
        """The server refused a request in a way that may mean the whole session."""

    @property
    def client(self) -> Client:
        """The SDK's client; requests of it run within `run` alone."""
        assert self._client is not None
        return self._client

    @property
    def is_down(self) -> bool:
        """It has ended or is about to."""
        return self._down.is_set()

    @property
    def why(self) -> str:
        """Why it could not be opened or has ended."""
        return self._why or "the connection was closed"

    @property
    def status(self) -> int | None:
        """The last HTTP status, or None."""
        return self._opening.status

    async def open(self, seconds: float) -> bool:
        """Connects and agrees on a protocol version. False, with `why`, where that fails or takes too long."""
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
        """Awaits one request.

        Raises:
            ConnectionLostError: the connection ended first, or was closed.
            TimeoutError: it took longer; the server was told that nobody waits.
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
            if task.done() and not task.cancelled() and not self._is_loss(task.exception()):
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
        """Ends it: requests under way, the session, the server's program. Idempotent."""
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
        """The owner task: nobody else enters or leaves the client. It never fails, it tells why it ended."""
        try:
            async with self._make_client() as client:
                self._client = client
                # the SDK's check of structured outputs throws the output away, and runs patterns without a limit
                client.session.validate_tool_result = _accept
                self._opened.set()
                try:
                    await self._stop.wait()
                finally:
                    self._down.set()
        except asyncio.CancelledError:
            pass  # by `close`, which has said why
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
        """The connection ends; the first reason counts."""
        if self._why is None:
            self._why = why
        self._down.set()
        self._stop.set()
        self._wake()

    def _doubted(self, certain: bool) -> None:
        if certain:
            self.end("the server does not know the session any more")
        else:
            self.in_doubt = True
            self._wake()

    async def _on_message(self, message: Any) -> None:
        if isinstance(message, types.ToolListChangedNotification):
            self.note_tools_changed()

    def note_tools_changed(self) -> None:
        """The server says that its tools are others now."""
        self.tools_changed = True
        self._wake()

    def _is_loss(self, error: BaseException | None) -> bool:
        return isinstance(error, MCPError) and error.code == types.CONNECTION_CLOSED and self.is_down

    def _forget(self, request: asyncio.Task[Any]) -> None:
        self._requests.discard(request)
        if not request.cancelled():
            request.exception()  # looked at, so that asyncio does not complain of one that nobody waits for any more


async def _abandon(task: asyncio.Task[Any], seconds: float = _CANCEL_SECONDS) -> None:
    """Cancels a request and waits until it has told its server; its outcome is of no interest any more."""
    if not task.done():
        task.cancel()
        await to_the_end(asyncio.wait({task}, timeout=seconds))


async def _accept(name: str, result: types.CallToolResult) -> None:
    del name, result
