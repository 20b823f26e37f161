# SPDX-License-Identifier: MIT
"""Tool calls of a real small model: a named tool with a strict schema gives valid arguments, streamed and whole."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import jsonschema
import pytest

from candle_vllm.core import InferenceEngine
from candle_vllm.openai import OpenAIAdapter, parse_chat_request

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "minLength": 1, "maxLength": 40},
        "priority": {"enum": ["low", "normal", "high"]},
        "hours": {"type": "integer", "minimum": 1, "maximum": 40},
        "due": {"type": ["string", "null"], "pattern": "^20[0-9]{2}-(0[1-9]|1[0-2])$"},
        "owner": {
            "type": "object",
            "properties": {"id": {"type": "integer"}},
            "required": ["id"],
            "additionalProperties": False,
        },
    },
    "required": ["title", "priority", "hours", "due", "owner"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "add_task", "description": "Adds a task.", "strict": True,
                                      "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "list_tasks", "parameters": {"type": "object", "properties": {}}}},
]  # fmt: skip
THINGS = ("paint the fence", "fix the build", "write to Ann", "read a book", "learn Polish", "say \"no\"", "buy {milk}",
          "plan the trip", "clean C:\\temp", "test </tool_call>")  # fmt: skip


@pytest.fixture(scope="module")
def adapter(coder: InferenceEngine) -> OpenAIAdapter:
    return OpenAIAdapter(coder)


def request(number: int) -> dict[str, Any]:
    wish = f"I want to {THINGS[number % len(THINGS)]}, number {number}. Take it down."
    return {
        "messages": [{"role": "user", "content": wish}],
        "tools": TOOLS,
        "tool_choice": {"type": "function", "function": {"name": "add_task"}},
        "temperature": 0.0 if number // len(THINGS) % 2 else 1.0,
        "seed": number,
        "max_completion_tokens": 200,
    }


async def whole(adapter: OpenAIAdapter, number: int) -> tuple[str, str, str]:
    choice = (await adapter.chat(parse_chat_request(request(number)))).choices[0]
    assert choice.message.content is None
    assert len(choice.message.tool_calls) == 1
    function = choice.message.tool_calls[0].function
    return function.name, function.arguments, choice.finish_reason


async def streamed(adapter: OpenAIAdapter, number: int) -> tuple[str, str, str]:
    names, arguments, reason = [], [], ""
    async for chunk in await adapter.chat_stream(parse_chat_request(request(number) | {"stream": True})):
        for choice in chunk.choices:
            for call in choice.delta.tool_calls or ():
                assert call.index == 0
                names += [call.function.name] if call.function.name else []
                arguments.append(call.function.arguments)
            assert not choice.delta.content
            reason = choice.finish_reason or reason
    return "".join(names), "".join(arguments), reason


@pytest.mark.every_case
@pytest.mark.peer
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "numbers", [range(5, 15), pytest.param(range(100), marks=pytest.mark.every_case)], ids=["once", "often"]
)
async def test_named_strict_calls_are_always_valid(adapter: OpenAIAdapter, numbers: range) -> None:
    """Each thing once, the half with quotes and braces by lot."""
    asked = asyncio.gather(*(whole(adapter, number) for number in numbers))
    streams = await asyncio.gather(*(streamed(adapter, number) for number in numbers))
    wholes = await asked
    check = jsonschema.Draft202012Validator(SCHEMA)
    for one, other in zip(wholes, streams, strict=True):
        assert one == other
        name, arguments, reason = one
        assert (name, reason) == ("add_task", "tool_calls")
        check.validate(json.loads(arguments))


def test_a_gap_between_two_texts_is_filled(coder: InferenceEngine) -> None:
    body = {
        "prompt": "def add(a, b):\n    return ",
        "suffix": "\n\nprint(add(1, 2))\n",
        "max_tokens": 16,
        "temperature": 0,
    }
    answer = asyncio.run(OpenAIAdapter(coder).complete(body))
    assert answer.choices[0].text.startswith("a + b")
