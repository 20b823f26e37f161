# SPDX-License-Identifier: MIT
"""HTTP clients on plain sockets, so cheap that a thousand of them can run beside the server that they measure.

Each client sends one request over a connection of its own, and parses the response body as it arrives: in chunks, with
a content length, or up to the end of the connection.
"""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
import time
from collections.abc import Mapping
from typing import Any, cast
from urllib.parse import unquote, urlsplit

from candle_vllm.core.shown import without_secrets
from candle_vllm.server.settings.options import UsageError

BUFFER = 1 << 20  # maximum bytes of an incomplete head, chunk or event
CONNECT_SECONDS = 30.0  # time limit for opening a connection


class AnswerClient(asyncio.Protocol):
    """One request and its response.

    Attributes:
        sent: `time.monotonic()` when the request was sent; 0 before.
        done: future of the seconds from `sent` to the end of the response; NaN if the request failed, or after `leave`.
        text: deltas of the generated text, including reasoning and arguments of calls; filled by `EventClient`.
        times: seconds from `sent` to the arrival of each delta in `text`.
    """

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._buffer = b""
        self._left: int | None = 0  # remaining bytes of the body; None means until the connection closes
        self._chunked = self._in_body = False
        self._status = b""
        self.sent = 0.0
        self.failure: str | None = None
        self.text: list[str] = []
        self.times: list[float] = []
        self.usage: Mapping[str, Any] = {}
        self.transport: asyncio.Transport | None = None
        self.done: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    # ---- for subclasses ----------------------------------------------------------------------------------------------

    def received(self, data: bytes, now: float) -> None:
        """Handle data of the body of a response with status 200; of a chunked body, one whole chunk."""

    def failed(self, why: str) -> None:
        """Handle the failure of the request; called once."""

    # ---- the connection ----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's class does not inherit from it
        self.sent = time.monotonic()
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        if self.done.done():
            return
        data = self._buffer + data
        if not self._in_body:
            head, mark, data = data.partition(b"\r\n\r\n")
            if not mark:
                self._buffer = head
                self._bound()
                return
            self._begin(head)
        try:
            self._buffer = self._chunks(data, now) if self._chunked else self._plain(data, now)
        except ValueError:
            self.fail("the chunks of the answer cannot be read")
        self._bound()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._in_body and (b" 200" not in self._status or not (self._chunked or self._left is not None or exc)):
            self._finish(time.monotonic())
        else:
            self.fail("the connection was closed" + (f": {exc}" if exc else ""))

    def _begin(self, head: bytes) -> None:
        self._in_body = True
        first, *lines = head.split(b"\r\n")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
        self._status = first[:40]
        self._chunked = headers.get(b"transfer-encoding", b"").lower() == b"chunked"
        length = headers.get(b"content-length")
        self._left = int(length) if length is not None and length.isdigit() and len(length) < 16 else None

    def _plain(self, data: bytes, now: float) -> bytes:
        self._take(data, now)
        if self._left is not None:
            self._left -= len(data)
            if self._left <= 0:
                self._finish(now)
        return b""

    def _chunks(self, data: bytes, now: float) -> bytes:
        at = 0
        while True:
            line = data.find(b"\r\n", at)
            if line < 0:
                return data[at:]
            digits = data[at:line].partition(b";")[0].strip()
            if digits.strip(b"0123456789abcdefABCDEF"):
                raise ValueError("not a chunk's size")
            size = int(digits, 16)
            start, end = line + 2, line + 2 + size
            if len(data) < end + 2:
                return data[at:]
            if size == 0:
                self._finish(now)
                return b""
            self._take(data[start:end], now)
            at = end + 2

    def _take(self, data: bytes, now: float) -> None:
        if b" 200" in self._status:
            self.received(data, now)
        elif data:  # empty if the head arrived alone
            self.fail(f"{self._status.decode('latin-1')}: {data[:300].decode('utf-8', 'replace')}")

    def _finish(self, now: float) -> None:
        if b" 200" not in self._status:
            self.fail(self._status.decode("latin-1"))
        elif not self.done.done():
            self.done.set_result(now - self.sent)
        self.close()

    def _bound(self) -> None:
        if len(self._buffer) > BUFFER:
            self.fail("the head or a chunk is larger than 1 MB")

    def fail(self, why: str) -> None:
        if not self.done.done():
            self.failure = why
            self.done.set_result(float("nan"))
            self.failed(why)
        self.close()

    def close(self) -> None:
        """Abort the connection without a TLS shutdown, because the event loop may end before the peer responds."""
        if self.transport is not None:
            self.transport.abort()

    def leave(self) -> None:
        """Disconnect before the end of the response, which is no failure."""
        if not self.done.done():
            self.done.set_result(float("nan"))
        self.close()


class EventClient(AnswerClient):
    """A streamed response of OpenAI's chat or text completions."""

    def __init__(self, request: bytes) -> None:
        super().__init__(request)
        self._rest = b""
        self._ended = False

    def received(self, data: bytes, now: float) -> None:
        *events, self._rest = (self._rest + data).replace(b"\r\n", b"\n").split(b"\n\n")
        if len(self._rest) > BUFFER:
            self.fail("an event is larger than 1 MB")
        for event in events:
            for line in event.split(b"\n"):
                if line.startswith(b"data:"):
                    self._read(line[5:].strip(), now)

    def _read(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self._ended = True
            return
        try:
            chunk = json.loads(data)
        except (ValueError, RecursionError):
            self.fail(f"an event is not JSON: {data[:200]!r}")
            return
        if not isinstance(chunk, dict) or chunk.get("error"):
            self.fail(f"the stream failed: {data[:300].decode('utf-8', 'replace')}")
            return
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk.get("choices") or ():
            text = _content(choice)
            if text:
                self.text.append(text)
                self.times.append(now - self.sent)
            self._ended = self._ended or choice.get("finish_reason") is not None

    def whole(self) -> bool:
        """Whether the response is complete; if the stream ended early, this sets `failure`."""
        if self.failure is None and not self._ended:
            self.failure = "the stream ended before its last event"
        return self.failure is None


class WholeClient(AnswerClient):
    """A response that is not streamed, such as embeddings or scores."""

    def __init__(self, request: bytes) -> None:
        super().__init__(request)
        self._body: list[bytes] = []

    def received(self, data: bytes, now: float) -> None:  # noqa: ARG002
        self._body.append(data)

    def whole(self) -> bool:
        """Whether the request succeeded with a JSON response; reads its usage."""
        try:
            value = json.loads(b"".join(self._body)) if self.failure is None else None
        except (ValueError, RecursionError):
            self.failure = "the answer is not JSON"
            value = None
        self.usage = (value.get("usage") or {}) if isinstance(value, dict) else {}
        return self.failure is None


def _content(choice: Mapping[str, Any]) -> str:
    """Return the text of a choice: content, reasoning and arguments of tool calls, or the text of a completion."""
    delta = choice.get("delta")
    if not isinstance(delta, dict):
        return choice.get("text") or ""
    calls = "".join((call.get("function") or {}).get("arguments") or "" for call in delta.get("tool_calls") or ())
    return (delta.get("content") or "") + (delta.get("reasoning_content") or delta.get("reasoning") or "") + calls


class Target:
    """A server; UsageError if `base_url` is not `http://` or `https://` with a host, and perhaps user, port and prefix.

    `insecure` turns the verification of certificates off. `tls` is the TLS context with this machine's certificate
    authorities; None without HTTPS.
    """

    def __init__(self, base_url: str, headers: Mapping[str, str] | None = None, insecure: bool = False) -> None:
        try:
            parts = urlsplit(base_url)
            self._port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError:
            parts = urlsplit("")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or not base_url.isascii():
            raise UsageError(
                f"--base-url must be http://HOST:PORT or https://HOST, not {without_secrets(base_url)!r:.200}"
            )
        self.base_url = base_url.rstrip("/")
        self._host, self._netloc, self._prefix = parts.hostname, parts.netloc.rpartition("@")[2], parts.path.rstrip("/")
        self._headers = dict(headers or {})
        if parts.username or parts.password:
            pair = unquote(f"{parts.username or ''}:{parts.password or ''}").encode()
            self._headers["authorization"] = f"Basic {base64.b64encode(pair).decode()}"  # not a key, as in httpx
        self.tls: ssl.SSLContext | None = None
        if parts.scheme == "https":
            self.tls = ssl.create_default_context()
            if insecure:
                self.tls.check_hostname, self.tls.verify_mode = False, ssl.CERT_NONE

    def post(self, path: str, body: Mapping[str, Any]) -> bytes:
        data = json.dumps(body).encode()
        headers = {
            "host": self._netloc, "content-type": "application/json", "content-length": str(len(data)),
            "connection": "close", **self._headers,
        }  # fmt: skip
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f"POST {self._prefix}{path} HTTP/1.1\r\n{lines}\r\n".encode() + data

    async def send(self, client: AnswerClient) -> None:
        """Connect a client, which then sends its request; if the connection fails, the request has failed."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await loop.create_connection(lambda: client, self._host, self._port, ssl=self.tls)
        except (OSError, UnicodeError) as error:  # UnicodeError: the host is no name
            client.fail(f"no connection: {error or type(error).__name__}")
