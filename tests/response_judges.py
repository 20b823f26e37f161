# SPDX-License-Identifier: MIT
"""Check responses and their events by the types of the Open Responses specification and of OpenAI's client."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import openresponses_types.types as spec
from openai.types.responses import Response, ResponseStreamEvent
from openai.types.responses.response_output_item import ResponseOutputItem
from pydantic import TypeAdapter

_REASONS = ("max_output_tokens", "content_filter")
_OFFICIAL_EVENT = TypeAdapter[Any](ResponseStreamEvent)
_OFFICIAL_ITEM = TypeAdapter[Any](ResponseOutputItem)
_OPEN_ITEMS = ("message", "function_call", "reasoning")  # the specification's own
_OPEN_EVENTS = {
    "response.created": spec.ResponseCreatedStreamingEvent,
    "response.queued": spec.ResponseQueuedStreamingEvent,
    "response.in_progress": spec.ResponseInProgressStreamingEvent,
    "response.completed": spec.ResponseCompletedStreamingEvent,
    "response.incomplete": spec.ResponseIncompleteStreamingEvent,
    "response.failed": spec.ResponseFailedStreamingEvent,
    "response.output_item.added": spec.ResponseOutputItemAddedStreamingEvent,
    "response.output_item.done": spec.ResponseOutputItemDoneStreamingEvent,
    "response.content_part.added": spec.ResponseContentPartAddedStreamingEvent,
    "response.content_part.done": spec.ResponseContentPartDoneStreamingEvent,
    "response.output_text.delta": spec.ResponseOutputTextDeltaStreamingEvent,
    "response.output_text.done": spec.ResponseOutputTextDoneStreamingEvent,
    "response.function_call_arguments.delta": spec.ResponseFunctionCallArgumentsDeltaStreamingEvent,
    "response.function_call_arguments.done": spec.ResponseFunctionCallArgumentsDoneStreamingEvent,
    "error": spec.ErrorStreamingEvent,
}


def judge_response(made: dict[str, Any]) -> None:
    """Fail if a response does not have the types of both.

    The specification defines functions as the only tools, three kinds of items, and (by mistake) schemas that are null;
    only the client's types check everything else.
    """
    Response.model_validate(_official(made))
    for item in made["output"]:
        _OFFICIAL_ITEM.validate_python(item)
    required = {info.alias or name for name, info in spec.ResponseResource.model_fields.items() if info.is_required()}
    assert len(required) == 31
    assert required <= made.keys()
    spec.ResponseResource.model_validate(_known(made))


def _official(made: dict[str, Any]) -> dict[str, Any]:
    """Return the response with a reason of OpenAI's: the specification leaves reasons open, the client checks none."""
    details = made["incomplete_details"]
    if details is None or details["reason"] in _REASONS:
        return made
    assert details["reason"] in ("max_tool_calls", "max_turns", "timeout", "loop")
    return {**made, "incomplete_details": {"reason": _REASONS[0]}}


def _known(made: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of a response that the specification defines."""
    known = {
        **made,
        "output": [item for item in made["output"] if item["type"] in _OPEN_ITEMS],
        "tools": [tool for tool in made["tools"] if tool["type"] == "function"],
    }
    if not isinstance(made["tool_choice"], str) and made["tool_choice"]["type"] in ("mcp", "custom"):
        known["tool_choice"] = "auto"
    if made["text"]["format"]["type"] == "json_schema":
        known["text"] = {"format": {**made["text"]["format"], "schema": None}}
    return known


def judge_event(event: dict[str, Any]) -> None:
    """Fail if an event does not have the types of both."""
    known = event
    if "response" in event:
        judge_response(event["response"])
        known = {**event, "response": _known(event["response"])}
        event = {**event, "response": _official(event["response"])}
    _OFFICIAL_EVENT.validate_python(event)
    if event["type"] in _OPEN_EVENTS and event.get("item", {}).get("type", "message") in _OPEN_ITEMS:
        _OPEN_EVENTS[event["type"]].model_validate(known)


def judge_events(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Fail if a stream's events are invalid; return the response at its end."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in events:
        judge_event(event)
    assert events[0]["type"] == "response.created"
    assert events[-1]["type"] in ("response.completed", "response.incomplete", "response.failed")
    made = events[-1]["response"]
    assert fold(events) == made["output"]
    assert {event["response"]["id"] for event in events if "response" in event} == {made["id"]}
    return made


def fold(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the output of the events; assert that deltas add up to the text of `.done` and of the item."""
    items: dict[int, dict[str, Any]] = {}
    done: set[str] = set()
    grown: dict[str, str] = {}
    for event in events:
        name = event["type"].removeprefix("response.")
        if name == "output_item.added":
            assert event["output_index"] == len(items), "an item is added at the end"
            items[event["output_index"]] = event["item"]
        elif name == "output_item.done":
            begun = items[event["output_index"]]
            assert (begun["id"], begun["type"]) == (event["item"]["id"], event["item"]["type"])
            items[event["output_index"]] = event["item"]
            done.add(begun["id"])
        elif "item_id" in event:
            item_id = event["item_id"]
            assert items[event["output_index"]]["id"] == item_id
            assert item_id not in done, f"{name} behind the end of its item"
            if name.endswith(".delta"):
                grown[item_id] = grown.get(item_id, "") + event["delta"]
            elif whole := next((event[key] for key in ("text", "arguments", "input") if key in event), None):
                assert grown.get(item_id, "") == whole
    assert done == {item["id"] for item in items.values()}, "every item has its end"
    for item in items.values():
        content = "".join(part["text"] for part in item.get("content") or ())
        text = content or item.get("arguments") or item.get("input") or ""
        assert item["type"] == "mcp_approval_request" or grown.get(item["id"], "") == text
    return [items[place] for place in sorted(items)]
