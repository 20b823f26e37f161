# SPDX-License-Identifier: MIT
"""The ASGI layer for request ids, warnings (`x-warning`), the log and HTTP metrics.

Steps 1 and 10 of a request's life. A client's own `x-request-id` is used if all its characters are safe. The log has
method, path, status, time, id, the client's address and its key's label, never content or headers. Labels of metrics
come from small sets: the template of the route, never the path, and the methods of HTTP.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Awaitable, Iterable, Iterator

from prometheus_client import Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from candle_vllm.core.shown import FIELDS
from candle_vllm.openai.remarks import collect_remarks
from candle_vllm.server.http.routing import RequestContext, caller_of, current_request
from candle_vllm.server.observing.metrics import EventCollector, Metrics
from candle_vllm.server.observing.series import HTTP

_SAFE_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
MAX_WARNING, MAX_WARNINGS = 500, 3_000  # bytes of one `x-warning` and of all: proxies accept 4 KB of headers
_PROBES = ("/health", "/v1/health", "/ready", "/ping", "/metrics")
_PRINTABLE = bytes(byte if 0x20 <= byte < 0x7F else ord("?") for byte in range(256))
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})
OTHER_METHOD = "other"
NO_STATUS = "none"

logger = logging.getLogger("candle_vllm.server.requests")


class ObservingMiddleware:
    """Adds request ids and `x-warning` to responses, logs and counts requests, and sets their `RequestContext`.

    Args:
        log: whether each request is logged; successful probes such as `/health` only at level DEBUG.
        unknown_fields: whether unknown fields cause a warning; otherwise they are refused.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, log: bool = False, unknown_fields: bool = False) -> None:
        self._app = app
        self._log = log
        self._unknown_fields = unknown_fields
        total, duration, running = HTTP
        self._requests = Counter(total.name, total.help, total.labels, registry=None)
        self._seconds = Histogram(
            duration.name, duration.help, duration.labels, registry=None, buckets=duration.buckets
        )
        self._running = Gauge(running.name, running.help, running.labels, registry=None)
        metrics.registry.register(EventCollector((self._requests, self._seconds, self._running)))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        request_id = given if _SAFE_ID.fullmatch(given) else uuid.uuid4().hex.encode()
        scope.setdefault("state", {})["request_id"] = request_id.decode()
        status = 0
        remarks = collect_remarks(unknown_fields=self._unknown_fields)

        def send_with_id(message: Message) -> Awaitable[None]:
            """Send a message with the headers; not a coroutine, because it may be called for every token."""
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                ids = ((b"x-request-id", request_id), (b"request-id", request_id))  # OpenAI's name, Anthropic's
                message["headers"] = [*message.get("headers", ()), *ids, *_warnings(remarks)]
            return send(message)

        context = RequestContext(scope)
        method = scope["method"] if scope["method"] in METHODS else OTHER_METHOD
        running = self._running.labels(method)
        token = current_request.set(context)
        start = time.perf_counter()
        running.inc()
        try:
            await self._app(scope, receive, send_with_id)
        finally:
            current_request.reset(token)
            running.dec()
            seconds = time.perf_counter() - start
            self._seconds.labels(method, context.route).observe(seconds)
            self._requests.labels(method, context.route, f"{status // 100}xx" if status else NO_STATUS).inc()
            if self._log:
                _log(scope, status, seconds, request_id.decode())


def _warnings(remarks: Iterable[str]) -> Iterator[tuple[bytes, bytes]]:
    """Yield the headers with warnings, truncated: they may contain names that the client chose."""
    room = MAX_WARNINGS
    for text in remarks:
        value = text[:MAX_WARNING].encode("ascii", "backslashreplace")[:MAX_WARNING].translate(_PRINTABLE)
        room -= len(value)
        if room >= 0:
            yield b"x-warning", value


def _log(scope: Scope, status: int, seconds: float, request_id: str) -> None:
    key, client = caller_of(scope).label, (scope.get("client") or ("unknown",))[0]
    fields = {
        "method": scope["method"][:20], "path": scope["path"][:200], "status": status or None,
        "seconds": round(seconds, 3), "http_request_id": request_id, "client": client, "key": key or None,
    }  # fmt: skip
    probe = status == 200 and scope["path"] in _PROBES  # requested every few seconds by load balancers and Prometheus
    logger.log(
        logging.DEBUG if probe else logging.INFO, "%s %r %s %.3f s %s from %s%s",
        scope["method"][:20], scope["path"][:200], status or "no answer", seconds, request_id, client,
        f" with key {key}" if key else "", extra={FIELDS: fields},
    )  # fmt: skip
