"""The HTTP client below a connection: headers, credentials, bounded bodies, and what the statuses say."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping

import httpx2
import msgspec

from candle_vllm.responses.mcp.public_transport import PublicTransport

MAX_BODY = 10 * 1024 * 1024  # bytes of a reply that is no event stream, and of one event
_WRITE_SECONDS = 30.0
_NOTICE_SECONDS = 10.0  # for the answer to a notification, behind which the SDK lets everything else wait
_LEAVE_SECONDS = 3.0  # for the answer to the end of a session


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


def http_client(
    notes: HttpNotes,
    *,
    headers: Mapping[str, str],
    auth: httpx2.Auth | tuple[str, str] | None,
    connect_seconds: float,
    public_only: bool = False,
) -> httpx2.AsyncClient:
    """A client for one connection, maybe to public addresses alone. A reply may take as long as its caller waits."""
    return httpx2.AsyncClient(
        headers={"accept-encoding": "identity", **headers},
        auth=auth,
        timeout=httpx2.Timeout(connect_seconds, read=None, write=_WRITE_SECONDS),
        transport=PublicTransport() if public_only else None,
        trust_env=not public_only,
        event_hooks={"request": [notes.on_request], "response": [notes.on_response]},
    )


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
