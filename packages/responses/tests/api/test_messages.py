# SPDX-License-Identifier: MIT
"""Items become messages: merged, in order, each call with its result, and what does not fit is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.responses.api.call_results import DENIED, NOT_APPROVED, NOT_RUN, Placed
from candle_vllm.responses.api.messages import encode_thoughts, translate
from candle_vllm.responses.conversation.chat_form import chat_message
from candle_vllm.responses.protocol.request import parse_responses_request


class Names:
    def mcp_name(self, label: str, name: str) -> str:
        return f"{label}__{name}"


class Made(NamedTuple):
    """What items become; the messages in OpenAI's form."""

    messages: list[dict[str, Any]]
    approved: Mapping[str, str]
    listed: frozenset[str]


def made(items: list[dict[str, Any]], instructions: str | None = None) -> Made:
    wire = parse_responses_request({"input": items})
    assert isinstance(wire.input, list)
    placed = [Placed(item, f"input.{i}") for i, item in enumerate(wire.input)]
    translated = translate(placed, instructions, Names())
    return Made(list(map(chat_message, translated.messages)), translated.approved, translated.listed)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def call(name: str, call_id: str, **more: Any) -> dict[str, Any]:
    return {"type": "function_call", "call_id": call_id, "name": name, "arguments": "{}", **more}


def result(call_id: str, output: Any = "ok") -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call_id, "output": output}


def request(item_id: str = "r1") -> dict[str, Any]:
    return {"type": "mcp_approval_request", "id": item_id, "server_label": "s", "name": "t", "arguments": "{}"}


def answer(approve: bool, item_id: str = "r1", **more: Any) -> dict[str, Any]:
    return {"type": "mcp_approval_response", "approval_request_id": item_id, "approve": approve, **more}


def calls(message: dict[str, Any]) -> list[tuple[str, str]]:
    return [(one["id"], one["function"]["name"]) for one in message["tool_calls"]]


def test_instructions_and_first_system_messages_are_one() -> None:
    items = [{"role": "developer", "content": "b"}, {"role": "system", "content": "c"}, user("x"), user("y")]
    assert made(items, "a").messages == [{"role": "system", "content": "a\nb\nc"}, user("x\ny")]


def test_later_system_messages_stay_where_they_are() -> None:
    items = [user("x"), {"role": "assistant", "content": "y"}, {"role": "developer", "content": "z"}]
    assert made(items).messages[-1] == {"role": "system", "content": "z"}


def test_an_answer_of_several_items_is_one_message() -> None:
    items = [
        user("x"),
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "I call."}]},
        call("f", "1"),
        call("g", "2", namespace="n"),
        result("2", [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]),
        result("1"),
    ]
    _, said, first, second = made(items).messages
    assert (said["content"], said["reasoning_content"]) == ("I call.", "hm")
    assert calls(said) == [("1", "f"), ("2", "n__g")]
    assert [(one["tool_call_id"], one["content"]) for one in (first, second)] == [("1", "ok"), ("2", "a\nb")]


def test_calls_behind_results_are_another_turn() -> None:
    roles = [
        one["role"] for one in made([user("x"), call("f", "1"), result("1"), call("f", "2"), result("2")]).messages
    ]
    assert roles == ["user", "assistant", "tool", "assistant", "tool"]


def test_a_result_that_comes_late_stands_behind_its_call() -> None:
    roles = [one["role"] for one in made([call("f", "1"), user("still there?"), result("1")]).messages]
    assert roles == ["assistant", "tool", "user"]


def test_ids_may_come_again() -> None:
    items = [call("f", "1"), result("1", "a"), call("f", "1"), result("1", "b"), user("x"), call("g", "1"), result("1")]
    assert [one["content"] for one in made(items).messages if one["role"] == "tool"] == ["a", "b", "ok"]


def test_custom_tools_are_functions_of_one_text() -> None:
    items = [
        {"type": "custom_tool_call", "call_id": "1", "name": "c", "input": 'say "hi"'},
        {"type": "custom_tool_call_output", "call_id": "1", "output": "hi"},
    ]
    function = made(items).messages[0]["tool_calls"][0]["function"]
    assert function == {"name": "c", "arguments": '{"input": "say \\"hi\\""}'}


@pytest.mark.parametrize(
    ("item", "thoughts"),
    [
        ({"encrypted_content": encode_thoughts("a\nb – ü")}, "a\nb – ü"),
        ({"encrypted_content": "gAAAA-of-another-server"}, None),
        ({"encrypted_content": "candle-vllm-1.???"}, None),
        ({"summary": [{"type": "summary_text", "text": "short"}]}, "short"),
        ({"content": [{"type": "reasoning_text", "text": "long"}], "encrypted_content": encode_thoughts("x")}, "long"),
    ],
)
def test_thoughts_come_back(item: dict[str, Any], thoughts: str | None) -> None:
    messages = made([{"type": "reasoning", **item}, {"role": "assistant", "content": "x"}]).messages
    assert messages[0].get("reasoning_content") == thoughts


def test_calls_that_ran_here_have_their_results() -> None:
    ran = {"type": "mcp_call", "server_label": "s", "name": "t", "arguments": "{}"}
    items = [
        {"type": "mcp_list_tools", "server_label": "s", "tools": []},
        {**ran, "id": "1", "output": "one"},
        {**ran, "id": "2", "error": {"type": "http_error", "code": 500}},
        {**ran, "id": "3"},
        {"role": "assistant", "content": "done"},
    ]
    translated = made(items)
    said, *results, last = translated.messages
    assert calls(said) == [("1", "s__t"), ("2", "s__t"), ("3", "s__t")]
    assert [one["content"] for one in results] == [
        "one",
        '{"type": "http_error", "code": 500}',
        "This call was not run.",
    ]
    assert last["content"] == "done"
    assert translated.listed == {"s"}


def test_approvals() -> None:
    asked = [user("x"), call("f", "1"), request()]
    agreed = made([*asked, result("1"), answer(True)])
    assert set(agreed.approved) == {"r1"}
    assert [one["role"] for one in agreed.messages] == ["user", "assistant", "tool"]  # the call is still open
    refused = made([*asked, result("1"), answer(False, reason=" too dear ")])
    assert refused.messages[-1]["content"] == f"{DENIED} too dear"
    ignored = made([request(), user("never mind")])
    assert ignored.messages[1]["content"] == NOT_APPROVED
    assert not refused.approved
    assert not ignored.approved


_RAN = {"type": "mcp_call", "id": "m1", "server_label": "s", "name": "t", "arguments": "{}", "output": "ok"}
_RAN |= {"approval_request_id": "r1"}


@pytest.mark.parametrize("thinks", [False, True])
@pytest.mark.parametrize(
    ("between", "told"),
    [([answer(True), _RAN], "ok"), ([_RAN], "ok"), ([answer(False)], DENIED), ([answer(True)], NOT_RUN)],
)
def test_an_answer_follows_the_result_of_a_call_that_needed_approval(
    between: list[dict[str, Any]], told: str, thinks: bool
) -> None:
    """An approved call has no item if its server was down."""
    thoughts = {"type": "reasoning", "id": "t", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
    behind = [*([thoughts] if thinks else []), {"role": "assistant", "content": "Noon."}, user("thanks")]
    translated = made([request(), *between, *behind])
    asked, result_of_call, said, _ = translated.messages
    assert [one["role"] for one in translated.messages] == ["assistant", "tool", "assistant", "user"]
    assert (calls(asked), asked["content"]) == ([("r1", "s__t")], None)
    assert result_of_call["content"] == told
    assert (said["content"], said.get("reasoning_content")) == ("Noon.", "hm" if thinks else None)
    assert not translated.approved


@pytest.mark.parametrize(
    ("items", "param"),
    [
        ([result("1")], "input.0.call_id"),
        ([result("1"), call("f", "1")], "input.0.call_id"),
        ([call("f", "1")], "input.0.call_id"),
        ([call("f", "1"), call("f", "1"), result("1")], "input.1.call_id"),
        ([call("f", "1"), result("1"), result("1")], "input.2.call_id"),
        ([answer(True)], "input.0.approval_request_id"),
        ([request(), answer(True), answer(False)], "input.2.approval_request_id"),
        ([request(), answer(True), user("and more")], "input.1.approval_request_id"),
        ([request(), request()], "input.1.id"),
        *(
            ([{"type": "compaction", "encrypted_content": f"candle-vllm-1.{damaged}"}], "input.0.encrypted_content")
            for damaged in ("", "dGV4d", "/w==", "dGV4dA==\n")
        ),
    ],
)
def test_what_does_not_belong_together(items: list[dict[str, Any]], param: str) -> None:
    with pytest.raises(InvalidParameterError) as refusal:
        made(items)
    assert refusal.value.param == param
    assert str(refusal.value).startswith(param)


def test_an_answer_with_too_many_calls_is_named_by_its_first_item() -> None:
    several = [user("x"), *(call("f", str(i)) for i in range(129)), *(result(str(i)) for i in range(129))]
    with pytest.raises(InvalidParameterError) as refusal:
        made(several)
    told = ("input.1", "input.1: an answer may have at most 128 calls, not 129")
    assert (refusal.value.param, str(refusal.value)) == told
