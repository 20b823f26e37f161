# SPDX-License-Identifier: MIT
"""Failures as answers: the envelope of the API that was asked, and what is left to the server."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from candle_vllm.core.errors import EngineOverloadedError, PromptTooLongError
from candle_vllm.responses.store.entries import StoreUnavailableError
from candle_vllm.server.http.errors import HttpError
from candle_vllm.server.http.failures import FailureMiddleware, anthropic_error_event, ollama_error_line, refusal
from candle_vllm.server.http.routing import RequestContext, current_request
from candle_vllm.server.settings.options import UsageError


def _scope(path: str, root: str = "") -> dict[str, Any]:
    state = {"request_id": "mine"}
    return {"type": "http", "method": "POST", "path": path, "root_path": root, "headers": [], "state": state}


@pytest.mark.parametrize(
    ("path", "root", "anthropic"),
    [
        ("/v1/messages", "", True),
        ("/v1/messages/count_tokens", "", True),
        ("/v1/messages\n", "", True),
        ("/api/v1/messages", "/api", True),
        ("/v1/messages", "/v1", False),
        ("/v1/messagesx", "", False),
        ("/v1/messages", "/v", True),  # no folder of the path
    ],
)
def test_whose_words_a_refusal_speaks(path: str, root: str, anthropic: bool) -> None:
    body = json.loads(bytes(refusal(_scope(path, root), HttpError(503, "Stopped.", "shutting_down")).body))
    assert (body.get("type") == "error") is anthropic
    assert (body.get("request_id") == "mine") is anthropic


@pytest.mark.parametrize("failure", [HttpError(504, "Late.", "timeout"), EngineOverloadedError("full"), RuntimeError()])
def test_an_event_of_a_failure_names_the_request(failure: Exception) -> None:
    def event() -> dict[str, Any]:
        return json.loads(anthropic_error_event(failure).split(b"data: ")[1])

    assert event().get("request_id") is None
    token = current_request.set(RequestContext(_scope("/v1/messages")))
    try:
        assert event()["request_id"] == "mine"
    finally:
        current_request.reset(token)


@pytest.mark.parametrize(
    ("failure", "lines"),
    [(StoreUnavailableError("The disk is full."), 1), (EngineOverloadedError("full"), 1), (RuntimeError("x"), 2)],
)
def test_a_failure_of_many_requests_is_one_line_of_the_log(
    failure: Exception, lines: int, caplog: pytest.LogCaptureFixture
) -> None:
    ollama_error_line(failure)
    assert len(caplog.text.splitlines()) == lines
    assert str(failure) in caplog.text


async def _through(app: Any, scope: dict[str, Any]) -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("nothing is read")

    try:
        await FailureMiddleware(app)(scope, receive, send)
    except ZeroDivisionError as failure:
        sent.append({"raised": failure})
    return sent


async def test_what_fails_before_its_first_byte_is_answered() -> None:
    async def app(*_: Any) -> None:
        raise ZeroDivisionError("secret")

    start, body = await _through(app, _scope("/v1/completions"))
    assert start["status"] == 500
    assert json.loads(body["body"])["error"]["type"] == "server_error"
    assert b"secret" not in body["body"]


@pytest.mark.parametrize("scope", [{"type": "lifespan"}, {"type": "websocket"}])
async def test_a_cancelled_task_without_a_request_stays_cancelled(scope: dict[str, Any]) -> None:
    async def app(*_: Any) -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await FailureMiddleware(app)(scope, _nothing, _nothing)


async def _nothing(*_: Any) -> Any:
    raise AssertionError


async def test_what_fails_later_is_cut() -> None:
    async def app(_: Any, __: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ZeroDivisionError

    sent = await _through(app, _scope("/v1/completions"))
    assert [message.get("status") for message in sent] == [200, None]
    assert "raised" in sent[-1]


@pytest.mark.parametrize(
    ("failure", "told"), [(UsageError("wrong file"), "wrong file"), (ZeroDivisionError(), "Traceback: at length")]
)
async def test_a_failed_start_is_told_in_short_where_the_user_can_help(failure: Exception, told: str) -> None:
    async def app(_: Any, __: Any, send: Any) -> None:
        await send({"type": "lifespan.startup.failed", "message": "Traceback: at length"})

    application = SimpleNamespace(state=SimpleNamespace(failure=failure))
    assert await _through(app, {"type": "lifespan", "app": application}) == [
        {"type": "lifespan.startup.failed", "message": told}
    ]


async def test_settings_are_spelt_as_the_operator_sets_them() -> None:
    async def app(*_: Any) -> None:
        raise PromptTooLongError("load the model with a larger `max_model_len`", "prompt")

    start, body = await _through(app, _scope("/v1/completions"))
    assert start["status"] == 400
    assert json.loads(body["body"])["error"]["message"] == "load the model with a larger --max-model-len"
