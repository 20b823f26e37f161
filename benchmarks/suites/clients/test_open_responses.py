# SPDX-License-Identifier: MIT
"""The demands of the Open Responses specification (2026-04-24) on the wire, and the scenarios of its acceptance tests.

No package has those tests; the types that judge responses and events come with openresponses-types.
"""

from __future__ import annotations

import base64
import json
import os
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

sys.path.append(str(Path(__file__).resolve().parents[3]))

from tests.response_judges import judge_events, judge_response

ADDRESS, SEEING = os.environ["SUITE_ADDRESS"], os.environ["SUITE_SEEING"]


def said(role: str, content: Any) -> dict[str, Any]:
    return {"type": "message", "role": role, "content": content}


HELLO = [said("user", "Say hello in exactly 3 words.")]
ASKS = [said("user", "What's the weather like in San Francisco?")]
WEATHER = {
    "type": "function", "name": "get_weather", "description": "Get the current weather for a location",
    "parameters": {
        "type": "object", "properties": {"location": {"type": "string", "description": "The city and state"}},
        "required": ["location"],
    },
}  # fmt: skip
TIME = {
    "type": "function", "name": "get_time", "description": "Get the time of day", "parameters": {
        "type": "object", "properties": {"zone": {"type": "string"}}, "required": ["zone"],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=240, trust_env=False) as client:
        yield client


def ask(http: httpx.Client, address: str = ADDRESS, **body: Any) -> dict[str, Any]:
    """A whole response, judged."""
    answer = http.post(f"{address}/v1/responses", json={"model": "qwen", "max_output_tokens": 80, **body})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].partition(";")[0] == "application/json"
    made = answer.json()
    judge_response(made)
    for item in made["output"]:
        assert item["id"]
        assert item["status"] in ("completed", "incomplete")
    return made


def stream(http: httpx.Client, **body: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The events of a stream and the response at its end, judged; its frames are as the specification has them."""
    body = {"model": "qwen", "max_output_tokens": 80, "stream": True, **body}
    with http.stream("POST", f"{ADDRESS}/v1/responses", json=body) as answer:
        assert answer.headers["content-type"].partition(";")[0] == "text/event-stream"
        frames = answer.read().decode().split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    events: list[dict[str, Any]] = []
    for frame in frames[:-2]:
        name, data = frame.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events, judge_events(events)


def words(made: dict[str, Any]) -> str:
    return "".join(p["text"] for item in made["output"] if item["type"] == "message" for p in item["content"])


def picture() -> str:
    """A red square of 32 x 32 pixels, as a data URL of a PNG."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head, rows = struct.pack(">IIBBBBB", 32, 32, 8, 2, 0, 0, 0), (b"\0" + b"\xff\0\0" * 32) * 32
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(png).decode()


# ---- the scenarios of the acceptance tests --------------------------------------------------------------------------


def test_text(http: Any) -> None:
    made = ask(http, input=HELLO)
    assert made["status"] == "completed"
    assert words(made)


def test_stream(http: Any) -> None:
    events, made = stream(http, input=[said("user", "Count from 1 to 5.")])
    assert [event["type"] for event in events[:4]] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"
    ]  # fmt: skip
    assert events[2]["item"]["status"] == "in_progress"
    assert made["status"] == "completed"


@pytest.mark.parametrize("role", ["system", "developer"])
def test_system_message(http: Any, role: str) -> None:
    pirate = said(role, "You are a pirate. Always respond in pirate speak.")
    made = ask(http, input=[pirate, said("user", "Say hello.")])
    assert made["status"] == "completed"
    assert words(made)


def test_call(http: Any) -> None:
    made = ask(http, input=ASKS, tools=[WEATHER])
    assert "function_call" in [item["type"] for item in made["output"]]


def test_call_in_a_stream(http: Any) -> None:
    events, made = stream(http, input=ASKS, tools=[WEATHER], tool_choice="required")
    (call,) = made["output"]
    kinds = [event["type"] for event in events]
    added = next(event for event in events if event["type"] == "response.output_item.added")
    assert (added["item"]["type"], added["item"]["name"]) == ("function_call", "get_weather")
    assert "response.function_call_arguments.delta" in kinds
    assert kinds[-3:] == ["response.function_call_arguments.done", "response.output_item.done", "response.completed"]
    assert "San Francisco" in json.loads(call["arguments"])["location"]


def test_image(http: Any) -> None:
    parts = [{"type": "input_text", "text": "What do you see?"}, {"type": "input_image", "image_url": picture()}]
    made = ask(http, SEEING, model="seeing", input=[said("user", parts)], max_output_tokens=16)
    bare = ask(http, SEEING, model="seeing", input=[said("user", parts[:1])], max_output_tokens=16)
    assert made["output"]
    assert made["usage"]["input_tokens"] > bare["usage"]["input_tokens"]


def test_conversation(http: Any) -> None:
    turns = [
        said("user", "My name is Alice."),
        said("assistant", "Hello Alice! Nice to meet you. How can I help you today?"),
        said("user", "What is my name?"),
    ]
    made = ask(http, input=turns)
    assert made["status"] == "completed"
    assert "Alice" in words(made)


# ---- what the specification demands beside them ---------------------------------------------------------------------


def test_a_string_is_a_users_message(http: Any) -> None:
    assert words(ask(http, input="Name a river.")) == words(ask(http, input=[said("user", "Name a river.")]))


def test_previous_response_stands_for_its_input_and_output(http: Any) -> None:
    first = ask(http, input=[said("user", "My name is Alice.")])
    second = ask(http, input=[said("user", "What is my name?")], previous_response_id=first["id"])
    whole = [said("user", "My name is Alice."), *first["output"], said("user", "What is my name?")]
    assert second["previous_response_id"] == first["id"]
    sent = ask(http, input=whole)
    assert words(second) == words(sent)
    assert second["usage"]["input_tokens"] == sent["usage"]["input_tokens"]


def test_call_and_its_result(http: Any) -> None:
    first = ask(http, input=ASKS, tools=[WEATHER], tool_choice="required")
    (call,) = first["output"]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "64 degrees and clear"}
    sent = ask(http, input=[*ASKS, call, result], tools=[WEATHER], tool_choice="none")
    kept = ask(http, input=[result], previous_response_id=first["id"], tools=[WEATHER], tool_choice="none")
    assert "64" in words(sent)
    assert words(sent) == words(kept)


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("none", set()),
        ("required", {"get_weather", "get_time"}),
        ({"type": "function", "name": "get_time"}, {"get_time"}),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_time"}]},
            {"get_time"},
        ),
        ({"type": "allowed_tools", "tools": [{"type": "function", "name": "get_time"}]}, {"get_time"}),
    ],
)
def test_tool_choice_is_a_hard_limit(http: Any, choice: Any, names: set[str]) -> None:
    made = ask(http, input=ASKS, tools=[WEATHER, TIME], tool_choice=choice)
    called = {item["name"] for item in made["output"] if item["type"] == "function_call"}
    assert called <= names
    if choice == "required" or (isinstance(choice, dict) and choice.get("mode") != "auto" and choice.get("name")):
        assert called
    assert {tool["name"] for tool in made["tools"]} == {"get_weather", "get_time"}


@pytest.mark.parametrize("whole", [True, False])
def test_an_answer_that_is_cut_is_incomplete_as_its_last_item(http: Any, whole: bool) -> None:
    body: Any = {"input": "Write a long story.", "max_output_tokens": 16}
    if whole:
        made = ask(http, **body)
    else:
        events, made = stream(http, **body)
        assert events[-1]["type"] == "response.incomplete"
    assert (made["status"], made["output"][-1]["status"]) == ("incomplete", "incomplete")
    assert made["incomplete_details"] == {"reason": "max_output_tokens"}


def test_truncation(http: Any) -> None:
    turns = [said("user", "Remember apples. " * 1200), said("assistant", "Yes. " * 2500), said("user", "Say hello.")]
    body = {"model": "qwen", "input": [*turns[:2], *turns], "max_output_tokens": 16, "truncation": "disabled"}
    answer = http.post(f"{ADDRESS}/v1/responses", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"].keys() >= {"message", "type", "param", "code"}
    assert ask(http, **{**body, "truncation": "auto"})["usage"]["input_tokens"] < 8192


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"input": "Hello.", "previous_response_id": "resp_nobody"}, 400, "previous_response_id"),
        ({"input": "Hello.", "temperature": 3}, 400, "temperature"),
        (
            {"input": "Hello.", "tool_choice": {"type": "function", "name": "nobody"}, "tools": [WEATHER]},
            400,
            "tool_choice",
        ),
        ({"input": [{"type": "message", "role": "nobody", "content": "Hello."}]}, 400, "input"),
        ({"input": [{"type": "function_call_output", "call_id": "nobody", "output": "1"}]}, 400, "input"),
    ],
)
def test_errors_say_what_is_wrong(http: Any, body: Any, status: int, param: str) -> None:
    for streamed in (False, True):
        answer = http.post(f"{ADDRESS}/v1/responses", json={"model": "qwen", "stream": streamed, **body})
        assert answer.status_code == status
        error = answer.json()["error"]
        assert error["message"]
        assert error["type"]
        assert (error["param"] or "").startswith(param)


def test_what_was_asked_is_repeated(http: Any) -> None:
    asked = {
        "temperature": 0.5, "top_p": 0.9, "max_output_tokens": 16, "instructions": "Be brief.", "metadata": {"a": "b"},
        "parallel_tool_calls": False, "tool_choice": "none", "truncation": "auto", "presence_penalty": 0.5,
        "frequency_penalty": 0.25, "top_logprobs": 2, "safety_identifier": "s", "prompt_cache_key": "k", "store": False,
        "max_tool_calls": 3,
    }  # fmt: skip
    made = ask(http, input="Say hello.", tools=[WEATHER], **asked)
    assert {name: made[name] for name in asked} == asked


def test_a_schema_is_followed(http: Any) -> None:
    schema = {
        "type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"], "additionalProperties": False,
    }  # fmt: skip
    form = {"type": "json_schema", "name": "person", "schema": schema, "strict": True}
    made = ask(http, input="Bob is 41 years old. Extract as JSON.", text={"format": form})
    assert json.loads(words(made)) == {"name": "Bob", "age": 41}


def test_log_probabilities(http: Any) -> None:
    made = ask(http, input=HELLO, include=["message.output_text.logprobs"], top_logprobs=2)
    (part,) = made["output"][0]["content"]
    tokens = "".join(each["token"] for each in part["logprobs"])
    assert tokens == part["text"] + "<|im_end|>"  # the token that ends an answer has an entry, as in vLLM
    assert {len(each["top_logprobs"]) for each in part["logprobs"]} == {2}


def test_compaction(http: Any) -> None:
    first = ask(http, input=[said("user", "We launch on Tuesday.")], max_output_tokens=30)
    body = {"model": "qwen", "previous_response_id": first["id"]}
    answer = http.post(f"{ADDRESS}/v1/responses/compact", json=body)
    assert answer.status_code == 200, answer.text
    made = answer.json()
    assert made["object"] == "response.compaction"
    assert "compaction" in [item["type"] for item in made["output"]]
    asked = ask(http, input=[*made["output"], said("user", "On which day do we launch?")])
    assert "Tuesday" in words(asked)
