# SPDX-License-Identifier: MIT
"""Requests become tasks, and whatever is wrong is said of what the caller wrote."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any

import pytest

from candle_vllm.core.errors import ChatTemplateError, InvalidParameterError, PromptTooLongError, RequestError
from candle_vllm.core.sampling.structured import StructuredOutputsParams
from candle_vllm.openai.task import Task, ThinkingLimit, ToolUse
from candle_vllm.responses.api.call_results import Placed
from candle_vllm.responses.api.responder import begin_response
from candle_vllm.responses.api.task_making import TaskMaker
from candle_vllm.responses.api.turn_model import fewer
from candle_vllm.responses.protocol.request import parse_responses_request

FUNCTION = {"type": "function", "name": "f"}
SCHEMA = {"type": "json_schema", "name": "a", "schema": {"type": "string"}}


REFUSED_FORM = InvalidParameterError("structured_outputs: no", "structured_outputs")


def called(call_id: str) -> list[dict[str, Any]]:
    return [
        {"type": "function_call", "call_id": call_id, "name": "f", "arguments": ""},
        {"type": "function_call_output", "call_id": call_id, "output": ""},
    ]


async def task(defaults: Mapping[str, Any] | None = None, **fields: Any) -> Task:
    wire = parse_responses_request({"input": [{"role": "user", "content": "x"}], **fields})
    assert isinstance(wire.input, list)
    placed = [Placed(item, f"input.{number}") for number, item in enumerate(wire.input)]
    task_maker = TaskMaker(None, defaults or {})
    async with AsyncExitStack() as stack:
        return (await task_maker.prepare(wire, placed, stack, check=True)).task()


async def test_system_messages_between_turns_stay_when_old_turns_are_left_out() -> None:
    turn = [{"role": role, "content": "x"} for role in ("user", "system", "assistant")]
    read = await task(truncation="auto", input=turn * 700)
    assert len(fewer(read.messages)) == 2048


async def test_a_json_object_follows_its_schema() -> None:
    text = {"format": {"type": "json_object", "schema": {"type": "object"}}}
    assert (await task(text=text)).form == StructuredOutputsParams(json={"type": "object"})
    wire = parse_responses_request({"input": "x", "text": text})
    assert begin_response(wire, model="m", stored=False, defaults={}).text == text


async def test_fields() -> None:
    read = await task(
        {"top_p": 0.5, "temperature": 2.0}, temperature=0.5, max_output_tokens=5, reasoning={"effort": "high"},
        text={"format": {"type": "json_object"}}, include=["message.output_text.logprobs"], priority=3, model="m",
        tools=[FUNCTION], parallel_tool_calls=False, stop=["a"],
    )  # fmt: skip
    assert read.sampling == {"top_p": 0.5, "temperature": 0.5, "max_tokens": 5, "logprobs": 0, "stop": ["a"]}
    assert read.form == StructuredOutputsParams(json_object=True)
    assert read.variables == {"reasoning_effort": "high", "thinking": True, "enable_thinking": True}
    assert (read.priority, read.model) == (3, "m")
    assert ([tool.name for tool in read.tools.tools], read.tools.parallel) == (["f"], False)
    assert (await task()).tools == ToolUse()
    assert (await task(reasoning={"max_tokens": 7})).thinking == ThinkingLimit(7)
    assert (await task(reasoning={"max_tokens": 0})).variables == {"thinking": False, "enable_thinking": False}
    off = {"reasoning_effort": "none", "thinking": False, "enable_thinking": False}
    assert (await task(reasoning={"effort": "none"})).variables == off
    assert (await task(reasoning={"effort": "none", "max_tokens": 0})).thinking == ThinkingLimit(0, required=False)


async def test_llama_cpps_samplers() -> None:
    asked = {
        "mirostat": 2,
        "xtc_probability": 0.5,
        "dry_multiplier": 0.8,
        "dry_sequence_breakers": [],
        "repeat_last_n": 9,
    }
    assert (await task(**asked)).sampling == asked
    with pytest.raises(RequestError) as caught:
        await task(typical_p=1.5)
    assert caught.value.param == "typical_p"


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs.messages", "cannot be set here"),
        ({"chat_template_kwargs": {"a b": 1}}, "chat_template_kwargs", "names template variables"),
        (
            {"reasoning": {"effort": "low"}, "chat_template_kwargs": {"reasoning_effort": "high"}},
            "reasoning.effort",
            "contradicts another setting of the template variable 'reasoning_effort'",
        ),
        ({"tool_choice": "required"}, "tool_choice", "needs tools: there is nothing to choose from"),
        (
            {"tools": [{**FUNCTION, "name": f"f{i}", "description": "x" * 30_000} for i in range(70)]},
            "tools",
            "have more than 2097152 characters of JSON; send fewer tools at once",
        ),
        (
            {
                "tools": [
                    {"type": "namespace", "name": f"n{i}", "tools": [{**FUNCTION, "name": f"f{j}"} for j in range(600)]}
                    for i in range(2)
                ]
            },
            "tools",
            "must have at most 1024 entries, not a list of 1200",
        ),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input", "must not be empty"),
        (
            {"truncation": "auto", "input": [item for number in range(1025) for item in called(str(number))]},
            "input",
            "must have at most 2048 entries, not a list of 2050",
        ),
    ],
)  # fmt: skip
async def test_refusals(fields: dict[str, Any], param: str, text: str) -> None:
    with pytest.raises(InvalidParameterError) as refusal:
        await task(**fields)
    assert refusal.value.param == param
    assert str(refusal.value).startswith(f"{param} {text}")


@pytest.mark.parametrize(
    ("fields", "error", "param", "text"),
    [
        (
            {"max_output_tokens": 600},
            PromptTooLongError("the prompt has 9 tokens and max_tokens is 600, not max_tokens_x", "max_tokens"),
            "max_output_tokens",
            "the prompt has 9 tokens and max_output_tokens is 600, not max_tokens_x",
        ),
        ({}, PromptTooLongError("max_tokens is 7", "max_tokens"), "input", "max_output_tokens is 7"),
        ({}, PromptTooLongError("the prompt has 9 tokens", "prompt"), "input", "the prompt has 9 tokens"),
        (
            {},
            ChatTemplateError("the template refused the messages: no messages", "messages"),
            "input",
            "the template refused the input: no messages",
        ),
        ({"text": {"format": SCHEMA}}, REFUSED_FORM, "text.format.schema", "text.format.schema: no"),
        ({"text": {"format": {"type": "json_object"}}}, REFUSED_FORM, "text.format", "text.format: no"),
        ({"text": {"format": {"type": "json_object", "schema": {"type": "string"}}}}, REFUSED_FORM,
         "text.format.schema", "text.format.schema: no"),
        ({}, REFUSED_FORM, "tools", "tools: no"),
        ({}, InvalidParameterError("temperature is wrong", "temperature"), "temperature", "temperature is wrong"),
    ],
)  # fmt: skip
async def test_late_blame(fields: dict[str, Any], error: RequestError, param: str, text: str) -> None:
    read = await task(**fields)
    with pytest.raises(type(error)) as told, read.paths.blamed():
        raise type(error)(str(error), error.param)
    assert (told.value.param, str(told.value)) == (param, text)


async def test_schemas_are_named_where_they_stand() -> None:
    namespace = {"type": "namespace", "name": "n", "tools": [{**FUNCTION, "name": "g"}]}
    read = await task(tools=[{"type": "web_search"}, namespace, FUNCTION])
    assert list(read.paths.schemas) == ["tools.1.tools.0.parameters", "tools.2.parameters"]
