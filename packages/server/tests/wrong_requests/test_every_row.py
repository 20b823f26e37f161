# SPDX-License-Identifier: MIT
"""Each request with one thing wrong is refused by the name of the field, in the envelope, over a real connection."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from packages.server.tests.server_fakes import PacedEngine
from packages.server.tests.wrong_requests import generating, others, responses
from packages.server.tests.wrong_requests.rows import Route, changed

ROUTES: list[Route] = [*generating.ROUTES, *others.ROUTES, *responses.ROUTES]
LEAST_ROWS = 300

TASKS = ("generate", "embed", "score", "classify")


@pytest.fixture
def client(start: Callable[..., Any]) -> Iterator[httpx.Client]:
    # The template writes calls, so that a strict tool is one that can be called.
    with start(
        PacedEngine(chat_template="{{ tools }}<tool_call>", tasks=TASKS), strict_model_names=True
    ).http() as client:
        yield client


def test_there_are_enough() -> None:
    rows = {(route.path, str(row)) for route in ROUTES for row in route.rows}
    assert len(rows) >= LEAST_ROWS


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
def test_each_is_refused_by_name(client: httpx.Client, route: Route) -> None:
    status = 409 if route.path == "/v1/models/unload" else 200
    assert client.post(route.path, json=route.right).status_code == status, "the right request"
    wrong: list[str] = []
    for row in route.rows:
        answer = client.post(route.path, json=changed(route.right, row))
        if answer.status_code != row.status:
            wrong.append(f"{row}: status {answer.status_code}, not {row.status}: {answer.text[:200]}")
            continue
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert row.code in (None, error["code"]), f"{row}: {error}"
        if error["param"] != row.blamed:
            wrong.append(f"{row}: param {error['param']!r}, not {row.blamed!r}: {error['message'][:150]}")
        elif len(error["message"]) > 1000 or not error["message"][:1].strip():
            wrong.append(f"{row}: message of {len(error['message'])} characters")
    assert not wrong, "\n".join(wrong)
    assert client.get("/health").status_code == 200
