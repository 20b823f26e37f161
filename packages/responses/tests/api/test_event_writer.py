# SPDX-License-Identifier: MIT
"""Events of conversations become events of responses, in order and without gaps, and the response is what they told."""

from __future__ import annotations

import json
from typing import Any

import pytest

from candle_vllm.core.engine.outputs import FinishReason
from candle_vllm.core.errors import CandleVllmError
from candle_vllm.openai import to_json_bytes
from candle_vllm.openai.errors import ErrorBody
from candle_vllm.openai.protocol.custom_tools import custom_input
from candle_vllm.openai.task import Choice
from candle_vllm.responses.api.event_writer import EventWriter
from candle_vllm.responses.api.messages import encode_thoughts
from candle_vllm.responses.api.responder import begin_response
from candle_vllm.responses.api.tool_plan import PlannedTool, ToolPlan
from candle_vllm.responses.conversation import events as said
from candle_vllm.responses.conversation.options import ConversationResult, ConversationUsage, StopReason
from candle_vllm.responses.protocol.request import parse_responses_request
from candle_vllm.responses.tools.tool import ToolCall, ToolDefinition, ToolOutput, ToolResult
from tests.response_judges import judge_events

USAGE = ConversationUsage(
    prompt_tokens=10,
    completion_tokens=5,
    cached_tokens=4,
    reasoning_tokens=2,
    draft_tokens=7,
    accepted_draft_tokens=3,
)
PLAN = ToolPlan(
    by_name={
        "f": PlannedTool("function", "f", "tools.0"),
        "n__g": PlannedTool("function", "g", "tools.1.tools.0", namespace="n"),
        "c": PlannedTool("custom", "c", "tools.2"),
        "s__t": PlannedTool("mcp", "t", "tools.3", server="s"),
        "s__u": PlannedTool("mcp", "u", "tools.3", server="s"),
    },
    approval={"s__t": "never", "s__u": "always"},
)


def begin(name: str, index: int = 0, arguments: str = "{}") -> list[said.Event]:
    call_id = f"call_{name}_{index}"
    return [
        said.CallStarted(index=index, call_id=call_id, name=name),
        *(said.CallArgumentsDelta(index=index, call_id=call_id, delta=letter) for letter in arguments),
    ]


def turn(*events: said.Event, reason: FinishReason = FinishReason.STOP) -> list[said.Event]:
    finished = said.TurnFinished(number=1, message={"role": "assistant"}, finish_reason=reason, usage=USAGE)
    return [said.TurnStarted(number=1), *events, finished]


def end(reason: StopReason = FinishReason.STOP) -> said.Event:
    result = ConversationResult(
        final_message="", turns_taken=1, completed=reason is FinishReason.STOP, stop_reason=reason, usage=USAGE
    )
    return said.ConversationFinished(result=result, messages=())


def tool_call(name: str, index: int = 0) -> ToolCall:
    return ToolCall(id=f"call_{name}_{index}", name=name, arguments="{}")


def started(name: str, index: int = 0) -> said.Event:
    return said.ToolStarted(call=tool_call(name, index), definition=ToolDefinition(name=name))


def finished(name: str, index: int = 0, status: Any = "completed", text: str = "done") -> said.Event:
    result = ToolResult(call=tool_call(name, index), status=status, output=ToolOutput.of_text(text), text=text)
    return said.ToolFinished(result=result)


def text(*pieces: str) -> list[said.Event]:
    return [said.TextDelta(text=piece) for piece in pieces]


def thoughts(*pieces: str) -> list[said.Event]:
    return [said.ReasoningDelta(text=piece) for piece in pieces]


def writer(plan: ToolPlan = PLAN, **request: Any) -> EventWriter:
    wire = parse_responses_request({"input": "Hi", **request})
    response = begin_response(wire, model="m", stored=False, defaults={})
    told = bool(wire.return_draft_counts)
    return EventWriter(response, plan, encoded=wire.wants_encrypted, tells_drafts=told, clock=lambda: 1e9)


def written(*events: said.Event, **request: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The events as they are sent, judged, and the response at the end."""
    made = writer(**request)
    wire = [*made.start(), *made.resume()]
    for event in events:
        wire += made.add(event)
    wire += made.conclude()
    sent = [json.loads(to_json_bytes(event)) for event in wire]
    return sent, judge_events(sent)


def kinds(response: dict[str, Any]) -> list[tuple[str, str]]:
    return [(item["type"], item["status"]) for item in response["output"]]


def test_a_text() -> None:
    sent, response = written(*turn(*text("Good ", "day")), end())
    assert [event["type"].removeprefix("response.") for event in sent] == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert response["output"][0]["content"] == [
        {"type": "output_text", "text": "Good day", "annotations": [], "logprobs": []}
    ]
    assert response["usage"] == {
        "input_tokens": 10, "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0}, "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 2}, "total_tokens": 15,
    }  # fmt: skip
    assert response["completed_at"] == 10**9


def test_counts_of_guesses_are_told_where_they_are_asked_for() -> None:
    _, response = written(*turn(*text("Good day")), end(), return_draft_counts=True)
    details = {"reasoning_tokens": 2, "draft_tokens": 7, "accepted_draft_tokens": 3}
    assert response["usage"]["output_tokens_details"] == details


def test_thoughts_text_and_calls_follow_each_other() -> None:
    events = [*thoughts("Hm", "."), *text("\n\n", "I call", ".", "\n"), *begin("f", 0, '{"a": 1}'), *begin("n__g", 1)]
    _, response = written(*turn(*events, reason=FinishReason.TOOL_CALLS), end("client_tools"))
    assert [item["type"] for item in response["output"]] == ["reasoning", "message", "function_call", "function_call"]
    first, second = response["output"][2:]
    assert (first["name"], first["arguments"], first["call_id"]) == ("f", '{"a": 1}', "call_f_0")
    assert "namespace" not in first
    assert (second["name"], second["namespace"]) == ("g", "n")


def phases(*events: said.Event, plan: ToolPlan = PLAN) -> list[tuple[Any, Any]]:
    """What each message is said to be when it begins and when it ends; the whole response says the latter."""
    sent, response = written(*events, plan=plan)
    begun, ended = (
        [event["item"].get("phase") for event in sent if event["type"] == kind and event["item"]["type"] == "message"]
        for kind in ("response.output_item.added", "response.output_item.done")
    )
    assert [item.get("phase") for item in response["output"] if item["type"] == "message"] == ended
    return list(zip(begun, ended, strict=True))


COMMENTARY, FINAL, OPEN = (None, "commentary"), (None, "final_answer"), (None, None)


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        (turn(*text("Yes")), [FINAL]),
        (turn(), [FINAL]),
        (turn(*text("Let me see."), *begin("f")), [COMMENTARY]),
        (turn(*begin("f"), *text("and"), *begin("f", 1)), [COMMENTARY]),
        (turn(*begin("f"), *text("I wait.")), [COMMENTARY]),
        (turn(*text("Hm."), *thoughts("so"), *text("Yes")), [COMMENTARY, FINAL]),
        (turn(*text("Looking."), *begin("s__t")) + turn(*text("Found")), [COMMENTARY, FINAL]),
        (turn(*text("Ye"), reason=FinishReason.LENGTH), [OPEN]),
    ],
)
def test_messages_say_whether_they_are_the_answer(events: list[said.Event], expected: list[Any]) -> None:
    assert phases(*events, end()) == expected


def test_where_nothing_can_be_called_a_message_is_the_answer_from_its_beginning() -> None:
    told = ("final_answer", "final_answer")
    for plan in (ToolPlan(), ToolPlan(by_name=PLAN.by_name, choice=Choice("none"))):
        assert phases(*turn(*text("Yes")), end(), plan=plan) == [told]
        assert phases(*turn(*text("Ye"), reason=FinishReason.LENGTH), end(FinishReason.LENGTH), plan=plan) == [told]


def test_white_space_between_items_is_no_item() -> None:
    _, response = written(
        *turn(*thoughts("Hm"), *text("\n", "\n"), *begin("f"), reason=FinishReason.TOOL_CALLS), end("client_tools")
    )
    assert [item["type"] for item in response["output"]] == ["reasoning", "function_call"]
    _, response = written(*turn(*text(" \n")), end())
    assert response["output"][0]["content"][0]["text"] == " \n"
    _, response = written(*turn(), end())
    assert response["output"][0]["content"][0]["text"] == ""


def test_thoughts_come_encoded_where_they_are_asked_for() -> None:
    asked = {"include": ["reasoning.encrypted_content"]}
    _, response = written(*turn(*thoughts("a", "b"), *text("c")), end(), **asked)
    assert response["output"][0]["encrypted_content"] == encode_thoughts("ab")


def test_custom_tools_get_their_text() -> None:
    _, response = written(
        *turn(*begin("c", 0, '{"input": "a\\nb"}'), reason=FinishReason.TOOL_CALLS), end("client_tools")
    )
    item = response["output"][0]
    assert (item["type"], item["input"], item["call_id"]) == ("custom_tool_call", "a\nb", "call_c_0")
    for arguments, given in [
        ('{"input": 1}', "1"), ('{"other": "x\\ny"}', "x\ny"), ('{"other": 1}', '{"other": 1}'), ("{}", "{}"),
        ('{"a": "x", "b": "y"}', '{"a": "x", "b": "y"}'), ('{"inp', '{"inp'), ("", ""),
    ]:  # fmt: skip
        assert custom_input(arguments) == given


def test_calls_that_run_here() -> None:
    events = [
        *turn(*begin("s__t", 0), *begin("s__t", 1), reason=FinishReason.TOOL_CALLS),
        started("s__t", 0), started("s__t", 1), finished("s__t", 1, "failed", "no"), finished("s__t", 0),
        *turn(*text("Done.")), end(),
    ]  # fmt: skip
    sent, response = written(*events)
    assert kinds(response) == [("mcp_call", "completed"), ("mcp_call", "failed"), ("message", "completed")]
    first, second = response["output"][:2]
    assert (first["name"], first["server_label"], first["output"]) == ("t", "s", "done")
    assert (second["output"], second["error"]["type"]) == (None, "mcp_tool_execution_error")
    names = [event["type"].removeprefix("response.") for event in sent]
    for wanted in ("mcp_call.in_progress", "mcp_call_arguments.done", "mcp_call.completed", "mcp_call.failed"):
        assert wanted in names


def test_a_call_that_waits_for_agreement() -> None:
    asked = said.ApprovalRequested(call=tool_call("s__u"), definition=ToolDefinition(name="s__u"))
    _, response = written(*turn(*begin("s__u"), reason=FinishReason.TOOL_CALLS), asked, end("approval"))
    assert [item["type"] for item in response["output"]] == ["mcp_approval_request"]
    assert response["status"] == "completed"


def test_a_call_that_was_agreed_to_before() -> None:
    _, response = written(started("s__u"), finished("s__u"), *turn(*text("ok")), end())
    item = response["output"][0]
    assert (item["type"], item["name"], item["approval_request_id"]) == ("mcp_call", "u", "call_s__u_0")


def test_wrong_arguments_of_a_call_that_needs_agreement() -> None:
    _, response = written(
        *turn(*begin("s__u"), reason=FinishReason.TOOL_CALLS),
        finished("s__u", 0, "invalid_arguments", "no"),
        *turn(*text("x")),
        end(),
    )
    assert kinds(response)[0] == ("mcp_call", "failed")
    assert response["output"][0]["error"]["type"] == "mcp_protocol_error"
    assert response["output"][0]["approval_request_id"] is None  # nobody was asked


def test_a_tool_that_the_model_made_up_is_between_it_and_the_loop() -> None:
    _, response = written(
        *turn(*begin("made_up"), reason=FinishReason.TOOL_CALLS),
        finished("made_up", 0, "unknown"),
        *turn(*text("Sorry.")),
        end(),
    )
    assert [item["type"] for item in response["output"]] == ["message"]


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        (text("Once upon"), [("message", "incomplete")]),
        (thoughts("Hm"), [("reasoning", "incomplete")]),
        ([], []),
        ([*begin("f"), *begin("f", 1, '{"a')], [("function_call", "completed"), ("function_call", "incomplete")]),
    ],
)
def test_an_answer_that_was_cut(events: list[said.Event], expected: list[tuple[str, str]]) -> None:
    _, response = written(*turn(*events, reason=FinishReason.LENGTH), end(FinishReason.LENGTH))
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert kinds(response) == expected


def test_a_call_that_was_cut_before_it_could_run() -> None:
    events = turn(*begin("s__t", 0), *begin("s__t", 1, '{"'), reason=FinishReason.LENGTH)
    refused = [finished("s__t", index, "invalid_arguments", "cut") for index in (0, 1)]
    _, response = written(*events, *refused, end(FinishReason.LENGTH))
    assert kinds(response) == [("mcp_call", "failed"), ("mcp_call", "incomplete")]


@pytest.mark.parametrize("reason", ["max_tool_calls", "max_turns", "timeout", "loop"])
def test_limits(reason: StopReason) -> None:
    _, response = written(*turn(*begin("s__t"), reason=FinishReason.TOOL_CALLS), end(reason))
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": reason})
    assert kinds(response) == [("mcp_call", "incomplete")]


def test_a_failure_ends_what_has_begun() -> None:
    made = writer()
    events = made.start()
    for event in (said.TurnStarted(number=1), *text("Hel")):
        events += made.add(event)
    events += made.fail(ErrorBody(type="server_error", code="x", message="broken", param=None), "server_error")
    sent = [json.loads(to_json_bytes(event)) for event in events]
    response = judge_events(sent)
    assert [event["type"] for event in sent[-2:]] == ["error", "response.failed"]
    assert (response["status"], response["error"]) == ("failed", {"code": "server_error", "message": "broken"})
    assert response["usage"] is None  # what was made is not known: no zeros
    assert kinds(response) == [("message", "incomplete")]


def test_servers_are_listed() -> None:
    made = writer()
    events = made.start()
    tool = ToolDefinition(name="s__t", original_name="t", server="s", description="d", read_only=True)
    events += made.list_server("s", [tool], None)
    events += made.list_server("gone", [], "nobody answers")
    for event in (*turn(*text("x")), end()):
        events += made.add(event)
    events += made.conclude()
    response = judge_events([json.loads(to_json_bytes(event)) for event in events])
    first, second = response["output"][:2]
    assert [one["name"] for one in first["tools"]] == ["t"]
    assert (second["error"], second["tools"]) == ("nobody answers", [])


def test_a_response_of_the_background_is_queued_first() -> None:
    made = writer(background=True)
    types = [event.event_name for event in made.start()]
    assert types == ["response.created", "response.queued"]
    assert made.response.status == "queued"
    assert [event.event_name for event in made.resume()] == ["response.in_progress"]


@pytest.mark.parametrize("name", ["f", "s__t"])
def test_arguments_that_are_mixed_up(name: str) -> None:
    """They would be lost: the item of the first call has been told, or the second call's would go to it."""
    made = writer()
    for event in (*begin(name), *begin(name, 1)):
        made.add(event)
    with pytest.raises(CandleVllmError, match="mixes the arguments"):
        made.add(said.CallArgumentsDelta(index=0, call_id=f"call_{name}_0", delta="x"))
