"""Blame for the fields of a chat request falls on those that the caller wrote."""

from __future__ import annotations

import pytest

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.responses.api.chat_fields import blame, chat_fields
from candle_vllm.responses.protocol.request import parse_responses_request


@pytest.mark.parametrize(
    ("chat", "own"),
    [
        ("messages", "input"),
        ("messages.0.content", "instructions"),
        ("messages.1.tool_calls.0.id", "input.3"),
        ("messages.9", "input"),
        ("tools.1.function.parameters.properties", "tools.4.parameters.properties"),
        ("tools.1.function.name", "tools.4.name"),
        ("tools.0", "tools.2"),
        ("response_format.json_schema.schema", "text.format.schema"),
        ("response_format", "text.format"),
        ("tool_choice.allowed_tools.tools.0.function.name", "tool_choice.tools.0.function.name"),
        ("reasoning_effort", "reasoning.effort"),
        ("max_completion_tokens", "max_output_tokens"),
        ("max_tokens", "max_output_tokens"),
        ("logprobs", "include"),
        ("temperature", "temperature"),
    ],
)
def test_paths(chat: str, own: str) -> None:
    error = InvalidParameterError(f"{chat} is wrong", chat)
    blame(error, ["instructions", "input.3"], ["tools.2", "tools.4"])
    assert (error.param, str(error)) == (own, f"{own} is wrong")


def test_the_limit_has_one_name() -> None:
    error = InvalidParameterError("the prompt has 9 tokens and max_tokens is 600", "max_completion_tokens")
    blame(error, [], [])
    assert str(error) == "the prompt has 9 tokens and max_output_tokens is 600"


def test_only_whole_names_change() -> None:
    error = InvalidParameterError("the max_tokens_x and max_tokens are wrong", "max_tokens")
    blame(error, [], [])
    assert str(error) == "the max_tokens_x and max_output_tokens are wrong"


def test_fields() -> None:
    wire = parse_responses_request({
        "input": "x", "temperature": 0.5, "max_output_tokens": 5, "text": {"format": {"type": "json_object"}},
        "reasoning": {"effort": "high"}, "include": ["message.output_text.logprobs"], "parallel_tool_calls": False,
    })  # fmt: skip
    assert chat_fields(wire, "auto") == {
        "tool_choice": "auto", "parallel_tool_calls": False, "reasoning_effort": "high", "temperature": 0.5,
        "max_completion_tokens": 5, "logprobs": True, "top_logprobs": 0, "response_format": {"type": "json_object"},
    }  # fmt: skip
