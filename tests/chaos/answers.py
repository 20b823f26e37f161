# SPDX-License-Identifier: MIT
"""Answers without what differs from one time to the next, so that they can be compared."""

from __future__ import annotations

import json
from typing import Any

from tests.chaos.wire import Answer

_PASSING = {
    "id", "created", "created_at", "model", "request_id", "system_fingerprint", "prompt_time_costs",
    "completion_time_costs", "prompt_tokens_details", "cached_tokens",
}  # fmt: skip


def essence(answer: Answer) -> Any:
    """What an answer says: of a JSON body its lasting fields, of a stream the whole that its pieces make."""
    if answer.header("content-type").startswith("text/event-stream"):
        return folded(events(answer.body))
    if answer.header("content-type").startswith("application/json"):
        return _lasting(json.loads(answer.body))
    return answer.body


def events(body: bytes) -> list[dict[str, Any]]:
    """The data of the events that are complete, the closing mark left out."""
    whole = body[: body.rfind(b"\n\n") + 2]
    lines = [line[6:] for line in whole.split(b"\n") if line.startswith(b"data: ")]
    return [json.loads(line) for line in lines if line != b"[DONE]"]


def error_of(answer: Answer) -> dict[str, Any] | None:
    """The error in an answer or at the end of a stream."""
    kind = answer.header("content-type")
    if not answer.complete:
        return None
    if kind.startswith("text/event-stream"):
        failed = [event["error"] for event in events(answer.body) if "error" in event]
        return failed[0] if failed else None
    if answer.status is not None and answer.status >= 400 and kind.startswith("application/json"):
        return json.loads(answer.body)["error"]
    return None


def usage_of(answer: Answer) -> tuple[str, int, int] | None:
    """Model, prompt tokens and completion tokens, as a generation's complete answer tells them."""
    if not answer.complete or answer.status != 200 or not answer.body or error_of(answer) is not None:
        return None
    if answer.header("content-type").startswith("text/event-stream"):
        told = events(answer.body)
    else:
        told = [json.loads(answer.body)]
    usage: dict[str, Any] = {}
    model = ""
    for event in told:
        message = event.get("message") if isinstance(event.get("message"), dict) else event
        model = message.get("model") or model
        usage |= message.get("usage") or event.get("usage") or {}
    if not model or not usage:
        return None
    prompt = usage["prompt_tokens"] if "prompt_tokens" in usage else sum(_anthropic_prompt(usage))
    return model, prompt, usage.get("completion_tokens", usage.get("output_tokens", 0))


def _anthropic_prompt(usage: dict[str, Any]) -> list[int]:
    names = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
    return [usage.get(name) or 0 for name in names]


def folded(told: list[dict[str, Any]]) -> dict[str, Any]:
    """What the events of a stream say together, whatever pieces it came in."""
    whole: dict[str, Any] = {}
    for event in told:
        for choice in event.get("choices", ()):
            _add_choice(whole.setdefault(f"choice {choice['index']}", {}), choice)
        if event.get("type", "").startswith("content_block"):
            _add_block(whole.setdefault(f"block {event['index']}", {}), event)
        if event.get("type") == "message_delta":
            whole |= {"end": event["delta"], "output_tokens": event["usage"]["output_tokens"]}
        if "choices" in event and event.get("usage"):
            whole["usage"] = _lasting(event["usage"])
    return whole


def _add_choice(whole: dict[str, Any], choice: dict[str, Any]) -> None:
    delta = choice.get("delta", choice)
    text = (delta.get("content") if "delta" in choice else choice.get("text")) or ""
    whole["text"] = whole.get("text", "") + text
    if choice.get("finish_reason"):
        whole["end"] = choice["finish_reason"]
    for call in delta.get("tool_calls") or ():
        made = whole.setdefault(f"call {call['index']}", {"name": "", "arguments": ""})
        for name, piece in call.get("function", {}).items():
            made[name] += piece or ""
    scores = choice.get("logprobs") or {}
    for name, values in scores.items():
        if values:
            whole.setdefault(name, []).extend(values)


def _add_block(whole: dict[str, Any], event: dict[str, Any]) -> None:
    delta = event.get("delta") or {}
    whole["text"] = whole.get("text", "") + delta.get("text", "") + delta.get("partial_json", "")
    if "content_block" in event:
        whole["type"] = event["content_block"]["type"]


def _lasting(value: Any) -> Any:
    """Without fields that differ each time; Anthropic's counts of prompt tokens are added up, cached or not."""
    if isinstance(value, list):
        return [_lasting(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {name: _lasting(item) for name, item in value.items() if name not in _PASSING}
    if isinstance(value.get("input_tokens"), int):
        kept |= {"input_tokens": sum(_anthropic_prompt(value)), "cache_read_input_tokens": 0}
        kept["cache_creation_input_tokens"] = 0
    return kept
