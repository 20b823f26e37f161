# SPDX-License-Identifier: MIT
"""HTTP metrics: pure ASGI middleware around all other middleware except the one that makes request ids.

Steps 1 and 10 of a request's life. Labels come from small sets: the template of the route, never the path, and the
methods of HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable

from prometheus_client import Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from candle_vllm.server.http.request_context import RequestContext, current_request
from candle_vllm.server.observing.exposition import EventCollector
from candle_vllm.server.observing.metrics import Metrics
from candle_vllm.server.observing.series import HTTP

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})
OTHER_METHOD = "other"
NO_STATUS = "none"


class HttpMetricsMiddleware:
    """Counts requests and their durations, and sets the `RequestContext` for the code that observes an engine."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
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
        status = NO_STATUS

        def note_status(message: Message) -> Awaitable[None]:
            nonlocal status
            if message["type"] == "http.response.start":
                status = f"{message['status'] // 100}xx"
            return send(message)

        context = RequestContext(scope)
        method = scope["method"] if scope["method"] in METHODS else OTHER_METHOD
        running = self._running.labels(method)
        token = current_request.set(context)
        start = time.perf_counter()
        running.inc()
        try:
            await self._app(scope, receive, note_status)
        finally:
            current_request.reset(token)
            running.dec()
            self._seconds.labels(method, context.route).observe(time.perf_counter() - start)
            self._requests.labels(method, context.route, status).inc()
