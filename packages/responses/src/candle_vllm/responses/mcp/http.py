# SPDX-License-Identifier: MIT
"""HTTP below a connection: who the client says it is, bounded bodies, what the statuses say, and public addresses."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit, urlunsplit

import httpx2
import msgspec
from mcp.client.auth.extensions.client_credentials import ClientCredentialsOAuthProvider
from mcp.shared.exceptions import MCPDeprecationWarning

from candle_vllm.core.targets import is_allowed, look_up
from candle_vllm.responses.mcp.peer import Peer
from candle_vllm.responses.mcp.server_config import McpServerConfig
from candle_vllm.responses.mcp.server_values import OAuthClient

if TYPE_CHECKING:
    from mcp.shared.auth import OAuthClientInformationFull, OAuthToken

MAX_BODY = 10 * 1024 * 1024  # bytes of a reply that is no event stream, and of one event
_WRITE_SECONDS = 30.0
_NOTICE_SECONDS = 10.0  # for the answer to a notification, behind which the SDK lets everything else wait
_LEAVE_SECONDS = 3.0  # for the answer to the end of a session
_RESOLVE_SECONDS = 10.0
_MAX_ADDRESSES = 4  # of one name that are tried
_PORTS = {"http": 80, "https": 443}


def http_client(peer: Peer, notes: HttpNotes) -> httpx2.AsyncClient:
    """A client for one connection, maybe to public addresses alone. A reply may take as long as its caller waits."""
    headers = {"accept-encoding": "identity", **peer.config.headers}
    if isinstance(peer.config.auth, str):
        headers["Authorization"] = f"Bearer {peer.config.auth}"
    return httpx2.AsyncClient(
        headers=headers,
        auth=peer.auth,
        timeout=httpx2.Timeout(peer.config.connect_timeout, read=None, write=_WRITE_SECONDS),
        transport=PublicTransport() if peer.public_only else None,
        trust_env=not peer.public_only,
        event_hooks={"request": [notes.on_request], "response": [notes.on_response]},
    )


def bare_address(url: str) -> str:
    """The address without user, password and fragment, as it is sent."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, parts.query, ""))


def http_auth(config: McpServerConfig) -> httpx2.Auth | None:
    """The credentials of a server's requests beside its headers, or None: Basic ones of its address, or a token that
    is got when the server asks for one (OAuth), and again when that has run out."""
    if not config.url:
        return None
    if isinstance(config.auth, OAuthClient):
        with warnings.catch_warnings():
            # without an issuer the server chooses who gets the secret: mcp.json's documentation says so
            warnings.simplefilter("ignore", MCPDeprecationWarning)
            return _ClientCredentials(config.auth, bare_address(config.url))
    parts = urlsplit(config.url)
    if parts.username is None:
        return None
    return httpx2.BasicAuth(unquote(parts.username), unquote(parts.password or ""))


class _Memory:
    """Keeps the token as long as the connection lives; nothing is written to a disk."""

    def __init__(self) -> None:
        self._tokens: OAuthToken | None = None
        self._client: OAuthClientInformationFull | None = None

    async def get_tokens(self) -> OAuthToken | None:
        return self._tokens

    async def set_tokens(self, tokens: OAuthToken) -> None:
        self._tokens = tokens

    async def get_client_info(self) -> OAuthClientInformationFull | None:
        return self._client

    async def set_client_info(self, client_info: OAuthClientInformationFull) -> None:
        self._client = client_info


class _ClientCredentials(ClientCredentialsOAuthProvider):
    """Asks for the scopes of the configuration; the SDK would take those that the servers name in their place."""

    def __init__(self, client: OAuthClient, url: str) -> None:
        self._scopes = " ".join(client.scopes) or None
        super().__init__(
            server_url=url,
            storage=_Memory(),
            client_id=client.client_id,
            client_secret=client.client_secret,
            scope=self._scopes,
            issuer=client.issuer,
        )

    async def _perform_authorization(self) -> httpx2.Request:
        if self._scopes is not None:
            self.context.client_metadata.scope = self._scopes
        return await super()._perform_authorization()


class HttpNotes:
    """What the answers of one connection said beside their bodies.

    Attributes:
        status: the last answer's, or None.

    Args:
        session_doubted: called when the server refuses a request of a session: with True where it says that the
            session is not there (404), with False where it may mean the request (400).
    """

    def __init__(self, session_doubted: Callable[[bool], None]) -> None:
        self.status: int | None = None
        self._session_doubted = session_doubted

    async def on_request(self, request: httpx2.Request) -> None:
        """Gives an answer that nobody waits for a time of its own: a call's is the caller's matter."""
        if request.method == "DELETE":
            _limit(request, _LEAVE_SECONDS)
        elif request.method == "POST" and _is_notice(_content(request)):
            _limit(request, _NOTICE_SECONDS)

    async def on_response(self, response: httpx2.Response) -> None:
        """Notes the status and bounds the body."""
        self.status = response.status_code
        if response.status_code in (400, 404) and "mcp-session-id" in response.request.headers:
            self._session_doubted(response.status_code == 404)
        stream = response.stream
        if isinstance(stream, httpx2.AsyncByteStream):
            kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
            encoding = response.headers.get("content-encoding", "identity").strip().lower()
            limit = None if kind == "text/event-stream" else MAX_BODY
            response.stream = _BoundedStream(stream, limit, encoding)


def _limit(request: httpx2.Request, seconds: float) -> None:
    request.extensions["timeout"] = {**request.extensions.get("timeout", {}), "read": seconds}


def _content(request: httpx2.Request) -> bytes:
    """The body; b"" of a request that follows a redirect, whose body is a stream."""
    try:
        return request.content
    except httpx2.RequestNotRead:
        return b""


def _is_notice(body: bytes) -> bool:
    """A JSON-RPC message without an id; a long one is a request, whose answer is waited for."""
    if len(body) > 4096:
        return False
    try:
        message = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return False
    return isinstance(message, dict) and "id" not in message


class _BoundedStream(httpx2.AsyncByteStream):
    """A body that fails beyond its limit; also one that came compressed, whose real size nobody knows before."""

    def __init__(self, inner: httpx2.AsyncByteStream, limit: int | None, encoding: str) -> None:
        self._inner = inner
        self._limit = limit
        self._encoding = encoding

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if self._encoding not in ("", "identity"):
            raise httpx2.StreamError(f"the reply is compressed ({self._encoding[:20]}), which was not asked for")
        size = 0
        async for chunk in self._inner:
            size += len(chunk)
            if self._limit is not None and size > self._limit:
                raise httpx2.StreamError(f"the reply has more than {self._limit} bytes, the most that are read")
            yield chunk

    async def aclose(self) -> None:
        await self._inner.aclose()


class PublicTransport(httpx2.AsyncBaseTransport):
    """Sends requests to the public addresses of their hosts; a host that has another one is not reached at all.

    It is for servers that somebody else than the operator has named. A name is looked up once, and the address that was
    checked is the one that is connected to, so that a name which is somewhere else a moment later reaches nothing.

    Args:
        inner: connects; None is a transport without proxies, which would look the name up once more.
    """

    def __init__(self, inner: httpx2.AsyncBaseTransport | None = None) -> None:
        self._inner = inner or httpx2.AsyncHTTPTransport(trust_env=False)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Sends one request.

        Raises:
            httpx2.ConnectError: the host has no address, or one that is not public.
        """
        url = request.url
        *others, last = await _public_addresses(url, request)
        request.extensions = {**request.extensions, "sni_hostname": url.host}
        for address in others:
            try:
                return await self._send(request, url, address)
            except (httpx2.ConnectError, httpx2.ConnectTimeout):  # nothing has been sent
                continue
        return await self._send(request, url, last)

    async def _send(self, request: httpx2.Request, url: httpx2.URL, address: str) -> httpx2.Response:
        """The connection goes to the address; the name stays in Host and TLS, and in the request afterwards."""
        request.url = url.copy_with(host=address)
        try:
            return await self._inner.handle_async_request(request)
        finally:
            request.url = url

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._inner.aclose()


async def _public_addresses(url: httpx2.URL, request: httpx2.Request) -> list[str]:
    host, port = url.host, url.port or _PORTS.get(url.scheme, 443)
    try:
        async with asyncio.timeout(_RESOLVE_SECONDS):
            found = await asyncio.to_thread(look_up, host, port)
    except (OSError, UnicodeError, TimeoutError):
        found = []
    if not found:
        raise httpx2.ConnectError("its name has no address", request=request)
    if not all(is_allowed(address, private=False) for address in found):
        raise httpx2.ConnectError("its address is not public", request=request)
    return found[:_MAX_ADDRESSES]
