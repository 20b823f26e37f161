# SPDX-License-Identifier: MIT
"""The library's chat and the adapter give a template the same messages."""

from __future__ import annotations

from typing import Any

import pytest

from candle_vllm.core.text.prompts import one_conversation
from candle_vllm.core.text.prompts import template_messages as of_core
from candle_vllm.core.text.template_needs import TemplateNeeds, fit
from candle_vllm.openai.conversation import template_messages
from candle_vllm.openai.protocol.chat import ChatCompletionRequest
from candle_vllm.openai.requests import read_chat

MESSAGES: list[dict[str, Any]] = [
    {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    {"role": "user", "content": "c"},
    {
        "role": "assistant",
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1]}'}},
            {"id": "call_2", "type": "function", "function": {"name": "g", "arguments": ""}},
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "1"},
    {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "2"}]},
    {"role": "assistant", "content": "d", "refusal": "e", "reasoning_content": "f"},
    {"role": "user", "content": "g", "name": "h"},
]


@pytest.mark.parametrize("field", [None, "arguments_as_text", "content_forbidden", "short_ids"])
def test_both_write_the_same(field: str | None) -> None:
    given: dict[str, Any] = {field: True} if field else {}
    needs = TemplateNeeds(**given)
    task = read_chat(ChatCompletionRequest.model_validate({"model": "m", "messages": MESSAGES}))
    theirs = template_messages(task.messages, needs)
    ours = of_core(one_conversation(MESSAGES))
    fit(ours, needs)
    assert ours == theirs
    again = of_core(theirs)  # an engine gets what the adapter has made already
    fit(again, needs)
    assert again == theirs
