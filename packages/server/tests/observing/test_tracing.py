# SPDX-License-Identifier: MIT
"""Tracing: spans with the names of OpenTelemetry's conventions, and a collector that cannot hurt."""

from __future__ import annotations

import builtins
import http.server
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.trace import SpanKind, StatusCode

from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.server.observing import tracing as module
from candle_vllm.server.observing.tracing import Tracing, otlp_tracing
from candle_vllm.server.settings.options import UsageError
from packages.server.tests.server_fakes import PacedEngine, whole_answer

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
CHAT = {"messages": [{"role": "user", "content": "secret"}], "max_tokens": 4, "temperature": 0.5, "n": 2, "seed": 9}
OWN = ("gen_ai.latency.", "candle_vllm.", "http.route", "error.type")


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracing(exporter: InMemorySpanExporter) -> Any:
    made = Tracing(exporter)
    yield made
    made.close()


async def test_a_span_tells_of_its_request(noted: Any, tracing: Tracing, exporter: InMemorySpanExporter) -> None:
    setup = noted(PacedEngine("abcdef", pause=0.01, num_cached_tokens=2), tracing)
    headers = {"traceparent": PARENT, "x-request-id": "r-1", "x-key-number": "3"}
    before = time.time_ns()
    async with setup.client() as client:
        answer = (await client.post("/v1/chat/completions", json=CHAT, headers=headers)).json()
    tracing.close()
    (span,) = exporter.get_finished_spans()
    known: dict[str, Any] = dict(span.attributes or {})
    assert (span.name, span.kind) == ("chat scripted", SpanKind.SERVER)
    assert span.context is not None
    assert span.context.trace_id == 0x0AF7651916CD43DD8448EB211C80319C
    assert span.parent is not None
    assert span.parent.span_id == 0xB7AD6B7169203331
    assert known["gen_ai.response.id"] == answer["id"]
    assert known["gen_ai.usage.input_tokens"] == answer["usage"]["prompt_tokens"]
    assert known["gen_ai.usage.output_tokens"] == answer["usage"]["completion_tokens"] == 8
    assert known["gen_ai.usage.cache_read.input_tokens"] == 2
    assert known["gen_ai.response.finish_reasons"] == ("length", "length")
    asked = [known[f"gen_ai.request.{name}"] for name in ("choice.count", "max_tokens", "temperature", "seed")]
    assert asked == [2, 4, 0.5, 9]
    assert known["candle_vllm.http_request_id"] == "r-1"
    assert known["candle_vllm.key"] == "3"
    assert 0.01 <= known["gen_ai.response.time_to_first_chunk"] <= known["gen_ai.latency.e2e"]
    assert span.start_time is not None
    assert span.end_time is not None
    assert before - 50_000_000 <= span.start_time < span.end_time <= time.time_ns() + 50_000_000
    assert "secret" not in span.to_json()
    standard = {value for name, value in vars(gen_ai_attributes).items() if name.startswith("GEN_AI_")}
    assert {name for name in known if not name.startswith(OWN)} <= standard


async def test_without_a_parent_a_trace_begins(noted: Any, tracing: Tracing, exporter: InMemorySpanExporter) -> None:
    setup = noted(None, tracing)
    async with setup.client() as client:
        await client.post("/v1/completions", json={"prompt": "p"}, headers={"traceparent": "nonsense"})
        await client.post("/v1/embeddings", json={"input": ["a", "b"]})
        await client.post("/api/chat", json={"model": "scripted", "messages": [{"role": "user", "content": "p"}]})
    await setup.ascore([("a", "b")])
    tracing.close()
    spans = exporter.get_finished_spans()
    operations = ["text_completion", "embeddings", "chat", "score"]
    assert [span.name for span in spans] == [f"{operation} scripted" for operation in operations]
    assert all(span.parent is None for span in spans)
    assert (spans[1].attributes or {})["gen_ai.usage.input_tokens"] == 4
    assert "gen_ai.usage.output_tokens" not in (spans[1].attributes or {})


async def test_failures_are_errors(noted: Any, tracing: Tracing, exporter: InMemorySpanExporter) -> None:
    setup = noted(PacedEngine(fail_after=1, failure="broken"), tracing)
    async for _ in setup.stream("p", SamplingParams(max_tokens=5)):
        pass
    tracing.close()
    (span,) = exporter.get_finished_spans()
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description == "broken"
    assert (span.attributes or {})["error.type"] == "engine_error"


class _Stuck(SpanExporter):
    """A collector that does not answer."""

    def __init__(self) -> None:
        self.released = threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.released.wait()
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None: ...


async def test_a_collector_that_hangs_delays_no_request(
    noted: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "MAX_QUEUED_SPANS", 600)
    monkeypatch.setattr(module, "CLOSE_SECONDS", 0.3)
    stuck = _Stuck()
    tracing = Tracing(stuck)
    setup = noted(PacedEngine("a"), tracing)
    for _ in range(1500):  # more than the queue holds
        async for _ in setup.stream("p", SamplingParams(max_tokens=1)):
            pass
    assert setup.samples().sum("vllm:request_success_total", finished_reason="length") == 1500
    tracing.close()
    stuck.released.set()


class _Collector(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.got.append((self.path, ExportTraceServiceRequest.FromString(body)))  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({}, "candle-vllm"),
        ({"OTEL_SERVICE_NAME": "vllm-server"}, "vllm-server"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=chat,deployment.environment.name=test"}, "chat"),
    ],
)
def test_the_environment_names_the_service(
    variables: dict[str, str], name: str, exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    tracing = Tracing(exporter)
    tracing._tracer.start_span("a span").end()
    tracing.close()
    attributes = exporter.get_finished_spans()[0].resource.attributes
    assert attributes["service.name"] == name
    assert {"service.version", "telemetry.sdk.name"} <= attributes.keys()


async def test_spans_reach_a_collector_over_http(noted: Any) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Collector) as server:
        server.got = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        tracing = otlp_tracing(f"http://127.0.0.1:{server.server_address[1]}")
        setup = noted(None, tracing)
        await whole_answer(setup.engine, "p", SamplingParams(max_tokens=2), watcher=setup.watcher)
        tracing.close()
        server.shutdown()
        thread.join(60)
        ((path, request),) = server.got  # type: ignore[attr-defined]
    assert path == "/v1/traces"
    resource = request.resource_spans[0]
    names = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
    assert names["service.name"] == "candle-vllm"
    assert resource.scope_spans[0].spans[0].name == "text_completion scripted"


async def test_a_collector_that_is_not_there_is_no_failure(noted: Any, caplog: pytest.LogCaptureFixture) -> None:
    tracing = otlp_tracing("http://127.0.0.1:9/v1/traces")
    setup = noted(None, tracing)
    output = await whole_answer(setup.engine, "p", SamplingParams(max_tokens=2), watcher=setup.watcher)
    assert len(output.token_ids) == 2
    tracing.close()


@pytest.mark.parametrize("endpoint", ["", "collector:4318", "grpc://x:4317", "http://", "file:///tmp/x", "http://[::1"])
def test_an_endpoint_is_a_url(endpoint: str) -> None:
    with pytest.raises(UsageError, match="--otlp-endpoint takes a URL"):
        otlp_tracing(endpoint)


def test_the_path_of_traces_is_added_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def exporter(endpoint: str, timeout: float) -> Any:
        asked.append(endpoint)
        return InMemorySpanExporter()

    monkeypatch.setattr(OTLPSpanExporter, "__new__", lambda cls, **options: exporter(**options))
    for endpoint in ("http://c:4318", "http://c:4318/", "https://c/otlp/v1/traces"):
        otlp_tracing(endpoint).close()
    assert asked == ["http://c:4318/v1/traces", "http://c:4318/v1/traces", "https://c/otlp/v1/traces"]


def test_without_the_extra_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"pip install 'candle-vllm\[telemetry\]'"):
        otlp_tracing("http://127.0.0.1:4318")
    with pytest.raises(UsageError, match=r"pip install 'candle-vllm\[telemetry\]'"):
        Tracing(InMemorySpanExporter())
