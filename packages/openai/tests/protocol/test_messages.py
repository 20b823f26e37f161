# SPDX-License-Identifier: MIT
"""Messages: content forms, template form, and calls tied to their results."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types.chat import ChatCompletionMessage

from candle_vllm.core.errors import RequestError
from candle_vllm.openai import UnsupportedParameterError, parse_chat_request
from candle_vllm.openai.requests import read_chat
from candle_vllm.openai.task import ImagePart, Message, TextPart, template_messages

USER = {"role": "user", "content": "hi"}


SEEN = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}


def call(call_id: str, arguments: str = '{"city": "Ulm"}') -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": "weather", "arguments": arguments}}


def calls(*ids: str) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [call(one) for one in ids]}


def result(call_id: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": "sunny"}


def rendered(*messages: dict[str, Any]) -> list[dict[str, Any]]:
    return template_messages(read_chat(parse_chat_request({"messages": list(messages)})).messages)


SPOKEN = {"type": "output_text", "text": "ok", "annotations": [], "logprobs": []}


def test_template_form() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]
    assert rendered(
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": parts, "name": "Ann"},
        {"role": "assistant", "content": [SPOKEN], "reasoning": "hm"},
        calls("x", "y"),
        result("y"),
        result("x"),
        {"role": "system", "content": "later"},
    ) == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "a\nb", "name": "Ann"},
        {"role": "assistant", "content": "ok", "reasoning_content": "hm"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": one, "type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}
                for one in ("x", "y")
            ],
        },
        {"role": "tool", "content": "sunny", "tool_call_id": "y", "name": "weather"},
        {"role": "tool", "content": "sunny", "tool_call_id": "x", "name": "weather"},
        {"role": "system", "content": "later"},
    ]


@pytest.mark.parametrize("arguments", ["", " ", "{}", "null", " {\n}"])
def test_empty_arguments_are_no_arguments(arguments: str) -> None:
    message = {"role": "assistant", "tool_calls": [call("x", arguments)]}
    assert rendered(USER, message, result("x"))[1]["tool_calls"][0]["function"]["arguments"] == {}


@pytest.mark.parametrize(
    "arguments",
    [
        "{",
        '{"city": "Ul',
        "[1]",
        '"text"',
        "3",
        "no JSON",
        '{"a": 1, "a": 2}',
        '{"a": NaN}',
        "[" * 100_000,
        '"\\ud800"',
    ],
)
def test_arguments_that_are_no_object_stay_as_the_model_wrote_them(arguments: str) -> None:
    message = {"role": "assistant", "tool_calls": [call("x", arguments)]}
    assert rendered(USER, message, result("x"))[1]["tool_calls"][0]["function"]["arguments"] == arguments


def test_results_have_the_name_of_their_function_unless_they_bring_one() -> None:
    named = {**result("x"), "name": "forecast"}
    assert [message.get("name") for message in rendered(calls("x", "y"), named, result("y"))] == [
        None,
        "forecast",
        "weather",
    ]


def test_assistant_messages_in_a_row_are_one_answer_also_between_its_calls_and_their_results() -> None:
    text = {"role": "assistant", "content": "I look."}
    replayed = [USER, calls("x"), text, calls("y"), result("y"), result("x"), text]
    messages = rendered(*replayed)
    assert [message["role"] for message in messages] == [message["role"] for message in replayed]
    for wrong, param in (
        ([USER, calls("x"), text], "messages"),
        ([USER, calls("x"), text, USER, result("x")], "messages.3.role"),
        ([USER, calls("x", "y"), result("x"), text, result("y")], "messages.3.role"),
    ):
        with pytest.raises(RequestError, match="without a tool message") as caught:
            rendered(*wrong)
        assert caught.value.param == param


@pytest.mark.parametrize("content", ["", [], [{"type": "text", "text": ""}]])
def test_results_may_be_empty(content: object) -> None:
    assert rendered(calls("x"), {**result("x"), "content": content})[1]["content"] == ""


def test_a_refusal_is_text_that_the_model_sees() -> None:
    refused: dict[str, Any] = {"role": "assistant", "content": None, "refusal": "I will not."}
    assert rendered(USER, refused)[1] == {"role": "assistant", "content": "I will not."}
    assert rendered(USER, {**refused, "content": "Well."})[1]["content"] == "Well.\nI will not."
    parts = [{"type": "text", "text": "Well."}, {"type": "refusal", "refusal": "No."}]
    assert rendered(USER, {"role": "assistant", "content": parts})[1]["content"] == "Well.\nNo."
    assert rendered(USER, {"role": "assistant", "content": "Hm", "refusal": ""})[1]["content"] == "Hm"


def test_an_answer_can_be_sent_back_as_the_official_client_holds_it() -> None:
    answer = ChatCompletionMessage(role="assistant", content="hello", annotations=[]).model_dump()
    parsed = {**answer, "parsed": {"a": 1}, "audio": None, "function_call": None}
    for held in (answer, parsed):
        assert rendered(USER, held, USER)[1] == {"role": "assistant", "content": "hello"}
    held_call = {**call("x"), "index": 0}
    held_call["function"] = {**held_call["function"], "parsed_arguments": {"city": "Ulm"}}
    with_call = {**answer, "content": None, "tool_calls": [held_call]}
    assert rendered(USER, with_call, result("x"))[1] == rendered(USER, calls("x"), result("x"))[1]


@pytest.mark.parametrize(
    ("messages", "param", "message"),
    [
        ([calls("x")], "messages", "without a tool message: 'x'"),
        ([calls("x", "y"), result("x")], "messages", "'y'"),
        ([calls("x"), USER, result("x")], "messages.1.role", "'x'"),
        ([calls("x", "x"), result("x")], "messages.0.tool_calls.1.id", "already"),
        ([result("x")], "messages.0.tool_call_id", "is not the id of a tool call without a result"),
        ([calls("x"), result("x"), result("x")], "messages.2.tool_call_id", "is not the id of a tool call without a "
                                                                            "result"),
        ([calls("")], "messages.0.tool_calls.0.id", "must not be empty"),
        ([{**result("x"), "tool_calls": []}], "messages.0.tool_calls", "not a known field"),
        ([{"role": "system", "content": [SEEN]}], "messages.0.content.0.type", "only be in messages of users"),
        ([{"role": "assistant", "content": [SEEN]}], "messages.0.content.0.type", "only be in messages of users"),
        ([{"role": "tool", "content": "x"}], "messages.0.tool_call_id", "is required"),
        ([{"role": "assistant"}], "messages.0.content", "is required"),
        ([{"role": "user"}], "messages.0.content", "is required"),
        ([{"role": "user", "content": None}], "messages.0.content", "must be a string or a list, not null"),
        ([{"role": "user", "content": []}], "messages.0.content", "must not be empty"),
        ([{"role": "function", "content": "x", "name": "f"}], "messages.0.role", "by 'tool', with a tool_call_id"),
        ([{"role": "robot", "content": "x"}], "messages.0.role", "must be one of system, developer"),
        ([{**USER, "content": [{"type": "refusal", "refusal": "x"}]}], "messages.0.content.0.refusal", "not a known"),
        ([{"role": "assistant", "content": [{"type": "refusal"}]}], "messages.0.content.0.refusal", "is required"),
        ([{"role": "assistant", "refusal": ""}], "messages.0.content", "is required"),
        ([{"role": "assistant", "content": "x", "function_call": {"name": "f", "arguments": ""}}],
         "messages.0.function_call", "replaced it by tool_calls"),
        ([{"role": "assistant", "content": "x", "annotations": [{}]}], "messages.0.annotations", "cannot be shown"),
        ([calls("x"), {**result("x"), "content": None}], "messages.1.content", "must be a string or a list"),
        ([calls("x"), {**result("x"), "content": [{"type": "refusal", "refusal": "x"}]}],
         "messages.1.content.0.refusal", "not a known"),
        ([{"role": "user", "content": [{"type": "hologram"}]}], "messages.0.content.0.type", "must be one of 'text'"),
        ([{"role": "assistant", "tool_calls": [{"id": "x", "function": {"arguments": "{}"}}]}],
         "messages.0.tool_calls.0.function.name", "is required"),
        ([{"role": "assistant", "tool_calls": [{"id": "x", "function": {"name": "f", "arguments": {}}}]}],
         "messages.0.tool_calls.0.function.arguments", "must be a string"),
        ([{"content": "x"}], "messages.0.role", "must be one of"),
        (["hi"], "messages.0", "must be an object"),
        ([{"role": ["user"], "content": "x"}], "messages.0.role", "must be one of"),
        ([{**USER, "contents": "x"}], "messages.0.contents", "did you mean 'content'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages.0.content.0.text", "is required"),
        ([{"role": "user", "content": ["x"]}], "messages.0.content.0", "must be an object"),
        ([{"role": "assistant", "content": "a", "reasoning": "b", "reasoning_content": "c"}],
         "messages.0.reasoning", "must be equal"),
        ([{"role": "assistant", "tool_calls": [{**call("x"), "type": "tool"}]}, result("x")],
         "messages.0.tool_calls.0.type", "'function'"),
        ([{"role": "assistant", "tool_calls": [{**call("x"), "type": "custom"}]}, result("x")],
         "messages.0.tool_calls.0.function", "not a known"),
        ([{"role": "assistant", "tool_calls": [{"id": "x", "type": "custom", "custom": {"name": "c"}}]}, result("x")],
         "messages.0.tool_calls.0.custom.input", "is required"),
    ],
)  # fmt: skip
def test_refusals_name_the_place(messages: list[Any], param: str, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_chat_request({"messages": messages})
    assert caught.value.param == param
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "kind",
    ["input_audio", "file", "image_base64", "video_url", "thinking", "video", "input_video", "image", "image_embeds"],
)
def test_parts_that_are_no_text_are_unsupported(kind: str) -> None:
    parts = [{"type": "text", "text": "see"}, {"type": kind, kind: {"url": "http://x"}}]
    with pytest.raises(UnsupportedParameterError, match=f"'{kind}' parts are not supported") as caught:
        parse_chat_request({"messages": [{"role": "user", "content": parts}]})
    assert caught.value.param == "messages.0.content.1.type"


def test_texts_stay_parts_beside_an_image() -> None:
    image = Message(role="user", parts=(TextPart("What is this?"), ImagePart("data:image/png;base64,AA==")))
    assert template_messages([image])[0]["content"] == [{"type": "text", "text": "What is this?"}, {"type": "image"}]


@pytest.mark.parametrize(
    ("part", "detail", "path"),
    [
        ({"type": "image_url", "image_url": {"url": "data:x", "detail": "high"}}, "high", "image_url.url"),
        ({"type": "image_url", "image_url": "data:x", "uuid": "a"}, None, "image_url"),
        ({"type": "input_image", "image_url": "data:x", "detail": "low"}, "low", "image_url"),
    ],
)
def test_images_are_parts_of_a_task(part: dict[str, Any], detail: str | None, path: str) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "see"}, part]},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": [part]},
    ]
    task = read_chat(parse_chat_request({"messages": messages}))
    assert task.messages[0].parts == (TextPart("see"), ImagePart("data:x", detail, f"messages.0.content.1.{path}"))
    assert task.messages[2].parts == (ImagePart("data:x", detail, f"messages.2.content.0.{path}"),)


@pytest.mark.parametrize(
    ("part", "param"),
    [
        ({"type": "image_url"}, "image_url"),
        ({"type": "image_url", "image_url": None, "uuid": "a"}, "image_url"),
        ({"type": "image_url", "image_url": {}}, "image_url.url"),
        ({"type": "image_url", "image_url": {"url": ""}}, "image_url.url"),
        ({"type": "image_url", "image_url": {"url": "data:x", "detail": "most"}}, "image_url.detail"),
        ({"type": "image_url", "image_url": 5}, "image_url"),
        ({"type": "image_url", "image_url": "data:x", "text": "a"}, "text"),
    ],
)
def test_wrong_images_are_named(part: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_chat_request({"messages": [{"role": "user", "content": [part]}]})
    assert caught.value.param == f"messages.0.content.0.{param}"
