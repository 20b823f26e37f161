# SPDX-License-Identifier: MIT
"""HTTP below an MCP connection: credentials, limits of bodies and times, status codes, and public addresses."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import warnings
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from functools import cache
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

import httpx2
import msgspec
from mcp.client.auth import TokenStorage
from mcp.client.auth.extensions.client_credentials import ClientCredentialsOAuthProvider
from mcp.shared.exceptions import MCPDeprecationWarning

from candle_vllm.core.targets import PORTS, is_allowed, look_up
from candle_vllm.responses.mcp.peer import Peer
from candle_vllm.responses.mcp.server_config import McpServerConfig
from candle_vllm.responses.mcp.server_values import OAuthClient

MAX_BODY = 10 * 1024 * 1024  # bytes of a response that is no event stream, or of an event; for the SSE transport, 1 MB
_WRITE_SECONDS = 30.0
_NOTICE_SECONDS = 10.0  # to accept a notification or a response; meanwhile, the SDK sends no other message
_LEAVE_SECONDS = 3.0  # for the answer to the request that ends a session
_RESOLVE_SECONDS = 10.0
_MAX_ADDRESSES = 4  # addresses of one name that are tried
_tls = cache(httpx2.create_ssl_context)  # reading the certificate authorities blocks the event loop for tens of ms


def _without_traceback(record: logging.LogRecord) -> bool:
    """Drop the SDK's traceback, in whose last line is the body of the answer: it may have a token or the secret."""
    record.exc_info = record.exc_text = None  # a record of `start_logging` has the text already
    return True


logging.getLogger("mcp.client.auth.oauth2").addFilter(_without_traceback)


class _Client(httpx2.AsyncClient):
    """Calls `failed` with a sentence when the server refuses a message, or a request gets no response."""

    def __init__(self, peer: Peer, failed: Callable[[str], None], **options: Any) -> None:
        super().__init__(**options)
        self._peer = peer
        self._failed = failed

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        try:
            response = await super().send(request, **options)
        except httpx2.HTTPError as error:
            self._failed(self._peer.sentence(error))
            raise
        if response.status_code >= 400 and request.method == "POST":
            self._failed(self._peer.status_sentence(response.status_code))
        return response


def http_client(peer: Peer, notes: HttpNotes, failed: Callable[[str], None] = lambda _: None) -> httpx2.AsyncClient:
    """Return a client for one connection; `notes` limits reads that no caller limits, `failed` is as in `_Client`."""
    headers = {"accept-encoding": "identity", **peer.config.headers}
    if isinstance(peer.config.auth, str):
        headers["Authorization"] = f"Bearer {peer.config.auth}"
    return _Client(
        peer,
        failed,
        headers=headers,
        auth=peer.auth,
        timeout=httpx2.Timeout(peer.config.connect_timeout, read=None, write=_WRITE_SECONDS),
        verify=_tls(trust_env=not peer.public_only),
        transport=PublicTransport() if peer.public_only else None,
        trust_env=not peer.public_only,
        event_hooks={"request": [notes.on_request], "response": [notes.on_response]},
    )


def bare_address(url: str) -> str:
    """Return the address as it is sent: without user, password and fragment."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, parts.query, ""))


def http_auth(config: McpServerConfig) -> httpx2.Auth | None:
    """Return the credentials for requests, in addition to the configured headers and bearer token, or None.

    They are the user and password in its address (Basic), or an OAuth token, which is requested when the server asks
    for one, and again when it has expired.
    """
    if not (config.url and config.enabled):
        return None
    if isinstance(config.auth, OAuthClient):
        with warnings.catch_warnings():
            # the SDK warns: without an issuer, the MCP server decides who gets the secret (documented for mcp.json)
            warnings.simplefilter("ignore", MCPDeprecationWarning)
            return _ClientCredentials(config.auth, bare_address(config.url))
    parts = urlsplit(config.url)
    if parts.username is None:
        return None
    return httpx2.BasicAuth(unquote(parts.username), unquote(parts.password or ""))


class _Unstored(TokenStorage):
    """Has the methods of the protocol, which do nothing: the provider keeps the token for all connections itself."""


class _ClientCredentials(ClientCredentialsOAuthProvider):
    """Requests the configured scopes, if any; the SDK would request the scopes that the servers name.

    Requests with a token are sent at the same time; the SDK would send each after the response to the one before.
    """

    def __init__(self, client: OAuthClient, url: str) -> None:
        unstored = _Unstored()  # type: ignore[abstract]
        self._scopes = scopes = " ".join(client.scopes) or None
        super().__init__(url, unstored, client.client_id, client.client_secret, scope=scopes, issuer=client.issuer)

    async def _initialize(self) -> None:
        self.context.client_info, self._initialized = self._fixed_client_info, True  # the token is not stored

    async def _auth_flow(self, request: httpx2.Request) -> AsyncGenerator[httpx2.Request, httpx2.Response]:
        old: Any = None
        last = False  # whether a refusal of the next token is the answer
        while True:
            if self._has_newer(old):
                self._add_auth_header(request)
                given = yield request
                if last or not _wants_token(given):
                    return
            old = self.context.current_tokens
            # The SDK's flow holds a lock, so it is left as soon as there is a newer token, before that is sent.
            async with contextlib.aclosing(super()._auth_flow(request)) as flow:
                asked = await anext(flow)
                while asked is not request or not self._has_newer(old):
                    last = last or asked is request  # it is sent without a newer token; if refused, the flow gets one
                    given = yield asked
                    try:
                        asked = await flow.asend(given)
                    except StopAsyncIteration:
                        return

    def _has_newer(self, old: Any) -> bool:
        return self.context.is_token_valid() and self.context.current_tokens is not old

    async def _perform_authorization(self) -> httpx2.Request:
        client, server = self._fixed_client_info, self.context.oauth_metadata
        methods = (server and server.token_endpoint_auth_methods_supported) or ()
        posted = "client_secret_post" in methods and "client_secret_basic" not in methods
        client.token_endpoint_auth_method = "client_secret_post" if posted else "client_secret_basic"
        if self._scopes is not None:
            self.context.client_metadata.scope = self._scopes
        return await super()._perform_authorization()


def _wants_token(response: httpx2.Response) -> bool:
    """Whether a response refuses the token or its scopes."""
    wanted = response.headers.get("www-authenticate", "")
    return response.status_code == 401 or (response.status_code == 403 and "insufficient_scope" in wanted)


class HttpNotes:
    """Records the status of a connection's responses, and limits their sizes and times.

    `status` is the status of the last response, or None. `session_doubted` is called when the server refuses a request
    of a session with 404, or with 400, as servers of the TypeScript SDK do: the session may no longer exist.
    """

    def __init__(self, session_doubted: Callable[[], None]) -> None:
        self.status: int | None = None
        self._session_doubted = session_doubted

    async def on_request(self, request: httpx2.Request) -> None:
        """Set a timeout for responses that no caller awaits; calls have their caller's timeout."""
        if request.method == "DELETE":
            _limit(request, _LEAVE_SECONDS)
        elif request.method == "POST" and _is_notice(request):
            _limit(request, _NOTICE_SECONDS)

    async def on_response(self, response: httpx2.Response) -> None:
        self.status = response.status_code
        if response.status_code in (400, 404) and "mcp-session-id" in response.request.headers:
            self._session_doubted()
        stream = response.stream
        if isinstance(stream, httpx2.AsyncByteStream):
            kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
            encoding = response.headers.get("content-encoding", "identity").strip().lower()
            response.stream = _BoundedStream(stream, None if kind == "text/event-stream" else MAX_BODY, encoding)


def _limit(request: httpx2.Request, seconds: float) -> None:
    request.extensions["timeout"] = {**request.extensions.get("timeout", {}), "read": seconds}


def _is_notice(request: httpx2.Request) -> bool:
    """Whether a body is a JSON-RPC notification or response, which gets no response; False for a long body."""
    try:
        message = msgspec.json.decode(request.content) if len(request.content) <= 4096 else None
    except (httpx2.RequestNotRead, msgspec.DecodeError):  # after a redirect, the body is a stream
        return False
    return isinstance(message, dict) and not ("id" in message and "method" in message)


class _BoundedStream(httpx2.AsyncByteStream):
    """A body that fails beyond its limit, or if it is compressed, because its real size is not known in advance."""

    def __init__(self, inner: httpx2.AsyncByteStream, limit: int | None, encoding: str) -> None:
        self._inner = inner
        self._limit = limit
        self._encoding = encoding

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if self._encoding not in ("", "identity"):
            raise httpx2.StreamError(f"the reply is compressed ({self._encoding[:20]}), which was not requested")
        size = 0
        async for chunk in self._inner:
            size += len(chunk)
            if self._limit is not None and size > self._limit:
                raise httpx2.StreamError(f"the reply has more than {self._limit} bytes, the most that are read")
            yield chunk

    async def aclose(self) -> None:
        await self._inner.aclose()


class PublicTransport(httpx2.AsyncBaseTransport):
    """Sends requests only to public addresses; refuses a host with any other address.

    It is used for servers that a client and not the operator has named. A name is looked up once for each request,
    which goes to the address that was checked, so that a name that changes a moment later cannot lead elsewhere.
    """

    def __init__(self) -> None:
        # without proxies, which would look the name up again
        self._inner = httpx2.AsyncHTTPTransport(verify=_tls(trust_env=False), trust_env=False)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send one request; httpx2.ConnectError if the host has no address, or an address that is not public."""
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
        """Connect to the address; Host and TLS use the name, and the request's URL has the name again afterwards."""
        request.url = url.copy_with(host=address)
        try:
            return await self._inner.handle_async_request(request)
        finally:
            request.url = url

    async def aclose(self) -> None:
        await self._inner.aclose()


async def _public_addresses(url: httpx2.URL, request: httpx2.Request) -> list[str]:
    host, port = url.host, url.port or PORTS.get(url.scheme, 443)
    try:
        async with asyncio.timeout(_RESOLVE_SECONDS):
            found = await asyncio.to_thread(look_up, host, port)
    except (OSError, UnicodeError) as error:
        later = isinstance(error, TimeoutError) or getattr(error, "errno", None) == socket.EAI_AGAIN
        why = "cannot be looked up now (DNS failure or timeout)" if later else "has no address"
        raise httpx2.ConnectError(f"its name {why}", request=request) from None
    if not all(is_allowed(address, private=False) for address in found):
        raise httpx2.ConnectError("its address is not public", request=request)
    return found[:_MAX_ADDRESSES]
