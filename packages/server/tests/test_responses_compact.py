# SPDX-License-Identifier: MIT
"""`/v1/responses/compact`, and what follows from what it gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import openresponses_types.types as spec
import pytest

from packages.server.tests.running_server import Running
from packages.server.tests.server_fakes import PacedEngine

ASKED: list[dict[str, Any]] = [
    {"type": "message", "role": "user", "content": "We agreed to launch on Tuesday."},
    {"type": "message", "role": "assistant", "content": "Understood. The launch is on Tuesday."},
]


def compact(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = http.post("/v1/responses/compact", json={"model": "scripted", "prompt_cache_key": "k", **fields})
    assert answer.status_code == 200, answer.text
    made = answer.json()
    spec.CompactResource.model_validate(made)
    return made


def said(server: Running) -> str:
    return server.engine.tokenizer.decode(server.engine.requests[-1].prompt_token_ids)


def test_a_conversation_becomes_what_users_said_and_a_summary(start: Callable[..., Running]) -> None:
    server = start(PacedEngine("Tuesday it is."))
    with server.http() as http:
        made = compact(http, input=ASKED, instructions="Be brief.")
        assert [item["type"] for item in made["output"]] == ["message", "compaction"]
        assert made["usage"]["output_tokens"] > 0
        assert server.engine.requests[-1].params.max_tokens == 128
        assert ["Be brief." in said(server), "Understood." in said(server), "Summarise" in said(server)] == [True] * 3
        more = {"role": "user", "content": "And?"}
        body = {"model": "scripted", "input": [*made["output"], more], "store": False}
        answer = http.post("/v1/responses", json=body)
        assert answer.status_code == 200, answer.text
        assert ["Tuesday it is." in said(server), "Understood." in said(server)] == [True, False]
        again = compact(http, input=body["input"])
        assert [item["type"] for item in again["output"]] == ["message", "message", "compaction"]
        assert http.get(f"/v1/responses/{made['id']}").status_code == 404


def test_openai_s_client_compacts(start: Callable[..., Running]) -> None:
    server = start(PacedEngine("Tuesday it is."))
    made = server.openai().responses.compact(model="scripted", input="We launch on Tuesday.")
    assert made.output[-1].type == "compaction"
    items: list[Any] = [item.to_dict(warnings=False) for item in made.output]
    server.openai().responses.create(model="scripted", input=items)
    assert "Tuesday it is." in said(server)


def test_codex_s_fields_have_no_effect(start: Callable[..., Running]) -> None:
    server = start(PacedEngine("Tuesday it is."))
    fields: dict[str, Any] = {
        "tools": [{"type": "function", "name": "shell", "parameters": {"type": "object"}}, {"type": "web_search"}],
        "parallel_tool_calls": True,
        "reasoning": {"effort": "high", "summary": "auto"},
        "text": {"verbosity": "low"},
        "service_tier": "ultrafast",
    }
    with server.http() as http:
        compact(http, input=ASKED, **fields)
        asked = said(server)
        compact(http, input=ASKED)
    assert said(server) == asked


def test_a_kept_response_can_be_compacted(start: Callable[..., Running]) -> None:
    server = start(PacedEngine("Yes."))
    with server.http() as http:
        first = http.post("/v1/responses", json={"model": "scripted", "input": "zinc"}).json()
        made = compact(http, previous_response_id=first["id"])
        assert "zinc" in json.dumps(made["output"][0])
        assert "zinc" in said(server)
        compact(http, input=[*ASKED, {"role": "user", "content": "x " * 1000}])
        assert 250 < (server.engine.requests[-1].params.max_tokens or 0) < 400


def test_thoughts_take_no_part_of_a_summary(start: Callable[..., Running]) -> None:
    server = start(PacedEngine("<think>" + "Hm. " * 99), reasoning_parser="think")
    with server.http() as http:
        answer = http.post("/v1/responses/compact", json={"model": "scripted", "input": ASKED})
    assert server.engine.requests[-1].params.thoughts.tokens == 0  # this engine thinks all the same
    assert answer.status_code == 400
    assert "no summary" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": ASKED}, "model"),
        ({"model": "scripted"}, "input"),
        ({"model": "scripted", "input": ASKED, "stream": True}, "stream"),
        ({"model": "scripted", "input": ASKED, "temperature": 1}, "temperature"),
        ({"model": "scripted", "input": ASKED, "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"model": "scripted", "input": [{"type": "compaction", "encrypted_content": "xyz"}]}, "input.0"),
    ],
)
def test_what_cannot_be_compacted_is_refused_by_name(
    start: Callable[..., Running], body: dict[str, Any], param: str
) -> None:
    with start(PacedEngine("Yes.")).http() as http:
        answer = http.post("/v1/responses/compact", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith(param)
