# SPDX-License-Identifier: MIT
"""The table of errors."""

from __future__ import annotations

import json

import pytest

from candle_vllm.core import errors as core
from candle_vllm.openai import GenerationFailedError, InvalidBodyError, ModelNotServedError, to_error, to_json_bytes

CASES = [
    (core.InvalidParameterError("n must be 1", "n"), 400, "invalid_request_error", "invalid_value"),
    (core.PromptTooLongError("too long", "max_tokens"), 400, "invalid_request_error", "context_length_exceeded"),
    (core.ChatTemplateError("no template", "messages"), 400, "invalid_request_error", "invalid_request"),
    (InvalidBodyError("not JSON"), 400, "invalid_request_error", "invalid_body"),
    (ModelNotServedError("not here", "model"), 404, "invalid_request_error", "model_not_found"),
    (core.EngineOverloadedError("the queue is full"), 503, "server_error", "overloaded"),
    (core.EngineDeadError("/secret"), 503, "server_error", "engine_dead"),
    (core.RequestAbortedError("aborted"), 503, "server_error", "request_aborted"),
    (GenerationFailedError("/secret"), 500, "server_error", "generation_failed"),
    (core.ConfigError("/secret"), 500, "server_error", "internal_error"),
    (OSError("/secret"), 500, "server_error", "internal_error"),
    (KeyError("/secret"), 500, "server_error", "internal_error"),
]


@pytest.mark.parametrize(("error", "status", "kind", "code"), CASES)
def test_table(error: Exception, status: int, kind: str, code: str) -> None:
    answer = to_error(error)
    body = json.loads(to_json_bytes(answer.body))
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert (answer.status, body["error"]["type"], body["error"]["code"]) == (status, kind, code)
    assert body["error"]["param"] == getattr(error, "param", None)
    assert body["error"]["message"]
    assert "/secret" not in body["error"]["message"]


def test_user_errors_keep_their_message_and_overload_says_when_to_come_back() -> None:
    assert to_error(core.InvalidParameterError("n must be 1", "n")).body.error.message == "n must be 1"
    assert to_error(core.EngineOverloadedError("full")).headers == {"retry-after": "1"}
    assert to_error(core.RequestError("")).body.error.message


def test_an_adapter_is_named_by_the_field_model() -> None:
    assert (
        to_error(core.InvalidParameterError("adapter 'tone' cannot be used", "lora_request")).body.error.param
        == "model"
    )
