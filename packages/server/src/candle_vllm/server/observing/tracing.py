# SPDX-License-Identifier: MIT
"""Tracing: a span in OpenTelemetry's terms for each engine request (after step 10 of a request's life).

Off unless an endpoint is given; needs the extra `candle-vllm[telemetry]`. Spans are made when a request has ended. A
bounded queue drops its oldest span when it is full, so that a slow or missing collector delays no request.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from candle_vllm.core.errors import with_extra
from candle_vllm.core.shown import without_secrets
from candle_vllm.server.observing.request_record import RequestRecord
from candle_vllm.server.settings.options import UsageError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

EXPORT_SECONDS = 5.0  # time limit for a batch of spans to reach the collector
CLOSE_SECONDS = 2.0  # time limit for sending the last spans
MAX_QUEUED_SPANS = 2048
_TRACES = "/v1/traces"
_OPERATIONS: Mapping[str, str] = {"generate": "text_completion", "embed": "embeddings"}  # others keep their names


class Tracing:
    """An observer that makes spans, which `exporter` sends; UsageError if OpenTelemetry is not installed."""

    def __init__(self, exporter: SpanExporter) -> None:
        try:
            from opentelemetry.sdk.resources import OTELResourceDetector, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace import SpanKind, Status, StatusCode
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise missing_telemetry() from error
        release = version("candle-vllm-server")
        given = OTELResourceDetector().detect().attributes  # from the environment, such as OTEL_SERVICE_NAME
        resource = Resource.create({"service.name": "candle-vllm", "service.version": release, **given})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        processor = BatchSpanProcessor(
            exporter, max_queue_size=MAX_QUEUED_SPANS, export_timeout_millis=EXPORT_SECONDS * 1000
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("candle_vllm.server", release)
        self._kind = SpanKind.SERVER
        self._failed, self._status = StatusCode.ERROR, Status
        self._closing = False
        self._propagator = TraceContextTextMapPropagator()

    def __call__(self, request: RequestRecord) -> None:
        """Make the span of one request, as a child of the client's own span if its headers name one."""
        headers = {} if request.context is None else request.context.trace_headers()
        attributes = span_attributes(request)
        shift = time.time() - time.monotonic()
        span = self._tracer.start_span(
            f"{attributes['gen_ai.operation.name']} {request.model}",
            context=self._propagator.extract(headers),
            kind=self._kind,
            attributes=attributes,
            start_time=_nanoseconds(request.arrived + shift),
        )
        if request.first_token is not None:
            span.add_event("first token", timestamp=_nanoseconds(request.first_token + shift))
        if request.status == "failed":
            span.set_status(self._status(self._failed, request.failure))
        span.end(_nanoseconds(request.ended + shift))

    def close(self) -> None:
        """Send the queued spans, for at most `CLOSE_SECONDS`. Further calls have no effect."""
        if not self._closing:
            self._closing = True
            ending = threading.Thread(target=self._provider.shutdown, name="tracing-close", daemon=True)
            ending.start()
            ending.join(CLOSE_SECONDS)


def otlp_tracing(endpoint: str) -> Tracing:
    """Return an observer that sends spans to a collector by OTLP over HTTP.

    `endpoint` is the collector's URL; without a path, it gets `/v1/traces`. Raises UsageError if it is no http or https
    URL, or if OpenTelemetry is not installed.
    """
    try:
        parts = urlsplit(endpoint)
    except ValueError:  # as of http://[
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(
            f"--otlp-endpoint takes a URL such as http://127.0.0.1:4318, not {without_secrets(endpoint)!r:.200}"
        )
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise missing_telemetry() from error
    path = parts.path.rstrip("/") or _TRACES
    return Tracing(OTLPSpanExporter(endpoint=parts._replace(path=path).geturl(), timeout=EXPORT_SECONDS))


def missing_telemetry() -> UsageError:
    """Return the error for a missing extra."""
    return UsageError(f"--otlp-endpoint needs OpenTelemetry: {with_extra('telemetry')}")


def span_attributes(request: RequestRecord) -> dict[str, Any]:
    """Return the known attributes of a request by OpenTelemetry's names, without its content."""
    params, context = request.info.params, request.context
    known = {
        "gen_ai.operation.name": _operation(request),
        "gen_ai.provider.name": "candle_vllm",
        "gen_ai.request.model": request.model,
        "gen_ai.response.model": request.model,
        "gen_ai.response.id": request.info.request_id,
        "gen_ai.request.choice.count": request.info.count if params and request.info.count > 1 else None,
        "gen_ai.request.max_tokens": params and params.max_tokens,
        "gen_ai.request.temperature": params and params.temperature,
        "gen_ai.request.top_p": params and params.top_p,
        "gen_ai.request.top_k": params and params.top_k,
        "gen_ai.request.seed": params and params.seed,
        "gen_ai.usage.input_tokens": request.prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": request.cached_tokens if params else None,
        "gen_ai.usage.output_tokens": request.completion_tokens if params else None,
        "gen_ai.response.finish_reasons": request.finish_reasons if params else None,
        "gen_ai.response.time_to_first_chunk": _seconds(request.arrived, request.first_token),
        "gen_ai.latency.time_in_queue": _seconds(request.arrived, request.times.first_scheduled_time),
        "gen_ai.latency.e2e": request.ended - request.arrived,
        "http.route": context.route if context else None,
        "candle_vllm.http_request_id": (context.http_request_id if context else None) or None,
        "candle_vllm.key": context.key_label if context else None,
        "error.type": "engine_error" if request.status == "failed" else None,
    }
    return {name: value for name, value in known.items() if value is not None}


def _operation(request: RequestRecord) -> str:
    chats = ("/chat/completions", "/messages", "/responses", "/api/chat")
    if request.info.operation == "generate" and request.context and request.context.route.endswith(chats):
        return "chat"
    return _OPERATIONS.get(request.info.operation, request.info.operation)


def _seconds(start: float, end: float | None) -> float | None:
    return None if end is None else max(end - start, 0.0)


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
