# SPDX-License-Identifier: MIT
"""HTTP metrics: labels of bounded sets, and gauges that come back to zero."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from candle_vllm.server.http.routing import Caller, RequestContext, current_request
from candle_vllm.server.observing.metrics import Metrics
from candle_vllm.server.observing.middleware import ObservingMiddleware
from packages.server.tests.server_fakes import PacedEngine
from tests.waiting import until


async def test_requests_are_counted_by_template_method_and_status(noted: Any) -> None:
    setup = noted()
    async with setup.client() as client:
        for name in ("a", "b/c", "d"):
            assert (await client.get(f"/v1/models/{name}")).status_code == 200
        assert (await client.get("/metrics")).status_code == 200
        assert (await client.put("/v1/completions")).status_code == 405
        assert (await client.post("/v1/completions", json={"prompt": [1] * 5000})).status_code == 400
        for number in range(20):
            assert (await client.request("BREW" if number else "GET", f"/no/{number}")).status_code == 404
    samples = setup.samples()
    count = "http_requests_total"
    assert samples.sum(count, method="GET", handler="/v1/models/{name:path}", status="2xx") == 3
    assert samples.sum(count, method="GET", handler="/metrics", status="2xx") == 1
    assert samples.sum(count, method="PUT", status="4xx") == 1
    assert samples.sum(count, method="POST", handler="/v1/completions", status="4xx") == 1
    assert samples.sum(count, method="other", handler="none", status="4xx") == 19
    assert samples.sum(count, method="GET", handler="none", status="4xx") == 1
    assert samples.values("handler") == {"/v1/models/{name:path}", "/metrics", "/v1/completions", "none"}
    assert samples.sum("http_request_duration_seconds_count") == samples.sum(count) == 26
    assert samples.sum("http_requests_in_progress") == 0


async def test_a_request_is_in_progress_until_its_answer_has_ended(noted: Any) -> None:
    setup = noted(PacedEngine("abc", pause=0.02))
    async with setup.client() as client:
        running = asyncio.create_task(client.post("/v1/completions", json={"prompt": "p", "stream": True}))
        await until(lambda: setup.samples().sum("http_requests_in_progress", method="POST") == 1)
        await running
    samples = setup.samples()
    assert samples.sum("http_requests_in_progress") == 0
    assert samples.sum("http_request_duration_seconds_sum", handler="/v1/completions") >= 0.05


async def _nothing(*_: Any) -> Any: ...


async def test_an_application_that_fails_before_it_answers_has_no_status() -> None:
    metrics = Metrics()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("broken")

    middleware = ObservingMiddleware(app, metrics)
    with pytest.raises(RuntimeError):
        await middleware({"type": "http", "method": "GET", "path": "/x", "headers": []}, _nothing, _nothing)
    labels = {"method": "GET", "handler": "none", "status": "none"}
    assert metrics.registry.get_sample_value("http_requests_total", labels) == 1
    assert metrics.registry.get_sample_value("http_requests_in_progress", {"method": "GET"}) == 0


async def test_other_scopes_pass_unseen() -> None:
    metrics = Metrics()
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    await ObservingMiddleware(app, metrics)({"type": "lifespan"}, _nothing, _nothing)
    assert seen == ["lifespan"]
    assert metrics.registry.get_sample_value("http_requests_in_progress", {"method": "GET"}) is None


async def test_the_context_is_there_within_a_request_and_gone_after_it() -> None:
    found: list[RequestContext | None] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["prompt_only"] = True
        found.append(await asyncio.create_task(_current()))

    headers = [(b"x-request-id", b"r-1")]
    scope = {"type": "http", "method": "GET", "headers": headers, "state": {"caller": Caller("3")}}
    await ObservingMiddleware(app, Metrics())(scope, _nothing, _nothing)
    context = found[0]
    assert context is not None
    assert (context.http_request_id, context.key_label, context.route) == ("r-1", "3", "none")
    assert context.prompt_only
    assert context.first_of_request()
    assert not context.first_of_request()
    assert current_request.get() is None


async def _current() -> RequestContext | None:
    return current_request.get()


@pytest.mark.parametrize(
    ("headers", "known"),
    [
        ([(b"traceparent", b"00-1-2-01"), (b"tracestate", b"a=1")], {"traceparent": "00-1-2-01", "tracestate": "a=1"}),
        ([(b"traceparent", b"one"), (b"traceparent", b"two")], {}),
        ([(b"tracestate", b"x" * 513)], {}),
        ([(b"authorization", b"Bearer secret")], {}),
    ],
)
def test_trace_headers(headers: list[tuple[bytes, bytes]], known: dict[str, str]) -> None:
    assert RequestContext({"type": "http", "headers": headers}).trace_headers() == known
