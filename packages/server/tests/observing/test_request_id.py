# SPDX-License-Identifier: MIT
"""What the outermost layer adds to answers: warnings, whose names are the client's, in headers that proxies take."""

from __future__ import annotations

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from candle_vllm.openai.remarks import MAX_REMARKS, remark
from candle_vllm.server.observing.metrics import Metrics
from candle_vllm.server.observing.middleware import MAX_WARNING, MAX_WARNINGS, ObservingMiddleware


@pytest.mark.parametrize("text", ["plain", "x" * 200_000, "\U0001f642" * 9_000, "a\r\nset-cookie: a=b\x00\x7f"])
@pytest.mark.parametrize("count", [1, MAX_REMARKS])
def test_warnings_are_short_and_plain(text: str, count: int) -> None:
    async def answer(_: Request) -> PlainTextResponse:
        remark(f"{number}: {text}" for number in range(count))
        return PlainTextResponse("")

    app = ObservingMiddleware(Starlette(routes=[Route("/", answer)]), Metrics())
    warnings = TestClient(app).get("/").headers.get_list("x-warning")
    assert 0 < len(warnings) <= count
    assert len(warnings) == count or len(text) > 100
    assert all(warning.isascii() and warning.isprintable() for warning in warnings)
    assert max(map(len, warnings)) <= MAX_WARNING
    assert sum(map(len, warnings)) <= MAX_WARNINGS
    assert warnings[0].startswith("0: ")
