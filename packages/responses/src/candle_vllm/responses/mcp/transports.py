"""How a connection to a server is opened: stdio, streamable HTTP, or the older SSE transport."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal

import httpx2
from mcp.client.sse import sse_client
from mcp.client.stdio import get_default_environment
from mcp.client.streamable_http import streamable_http_client

from candle_vllm.responses.mcp.credentials import bare_address, http_headers
from candle_vllm.responses.mcp.http import MAX_BODY, HttpNotes, http_client
from candle_vllm.responses.mcp.stdio import StdioServer
from candle_vllm.responses.mcp.watched_stream import WatchedStream

if TYPE_CHECKING:
    from candle_vllm.responses.mcp.server_config import McpServerConfig

Kind = Literal["stdio", "http", "sse"]
SSE_MAX_EVENT = 1024 * 1024  # bytes; the SDK's, which its SSE transport does not let anybody change
NO_SUCH_TRANSPORT = frozenset({400, 404, 405})  # what an SSE server answers to a POST at its address


def kinds(config: McpServerConfig) -> tuple[Kind, ...]:
    """What is tried, in order: an address without a named transport is streamable HTTP, then SSE."""
    if config.transport is not None:
        return (config.transport,)
    return ("http", "sse") if config.url else ("stdio",)


class Opening:
    """One attempt to connect.

    Args:
        config: of the server.
        kind: the transport.
        auth: of its HTTP requests.
        public_only: they go to public addresses alone.
        ended: called with a sentence when the server closes the connection.
        session_doubted: see `HttpNotes`.
        log: gets the lines that a server writes beside the protocol.
    """

    def __init__(
        self,
        config: McpServerConfig,
        kind: Kind,
        *,
        auth: httpx2.Auth | None,
        public_only: bool,
        ended: Callable[[str], None],
        session_doubted: Callable[[bool], None],
        log: Callable[[str], None],
    ) -> None:
        self._config = config
        self._kind: Kind = kind
        self._auth = auth
        self._public_only = public_only
        self._ended = ended
        self._log = log
        self._notes = HttpNotes(session_doubted)
        self._server: StdioServer | None = None

    @property
    def status(self) -> int | None:
        """The last HTTP status, or None."""
        return self._notes.status

    @asynccontextmanager
    async def transport(self) -> AsyncGenerator[tuple[Any, Any], None]:
        """The transport's two streams, for the SDK's `Client`."""
        opened = {"stdio": self._stdio, "http": self._http, "sse": self._sse}[self._kind]
        async with opened() as (received, sent):
            yield WatchedStream(received, self._over, self._log), sent

    def _over(self, why: str) -> None:
        note = self._process_note()
        self._ended(f"{why}: {note}" if note else why)

    def _process_note(self) -> str | None:
        """How a stdio server's program ended, or why it was given up."""
        if self._server is None or self._server.fault:
            return self._server and self._server.fault
        status = self._server.exit_status
        if status is None:
            return None
        return f"its program was ended by signal {-status}" if status < 0 else f"its program ended with status {status}"

    def _stdio(self) -> Any:
        config = self._config
        assert config.command is not None
        self._server = StdioServer(
            config.command,
            config.args,
            environment=get_default_environment() | dict(config.env),
            folder=str(config.cwd) if config.cwd is not None else None,
            log=self._log,
        )
        return self._server.transport()

    @asynccontextmanager
    async def _http(self) -> AsyncGenerator[tuple[Any, Any], None]:
        assert self._config.url is not None
        async with (
            self._client() as client,
            streamable_http_client(
                bare_address(self._config.url), http_client=client, max_sse_event_size=MAX_BODY
            ) as streams,
        ):
            yield streams

    @asynccontextmanager
    async def _sse(self) -> AsyncGenerator[tuple[Any, Any], None]:
        assert self._config.url is not None

        def client(*_: Any, **__: Any) -> httpx2.AsyncClient:
            return self._client()

        async with sse_client(bare_address(self._config.url), httpx_client_factory=client) as streams:
            yield streams

    def _client(self) -> httpx2.AsyncClient:
        return http_client(
            self._notes,
            headers=http_headers(self._config),
            auth=self._auth,
            connect_seconds=self._config.connect_timeout,
            public_only=self._public_only,
        )
