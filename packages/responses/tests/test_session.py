"""Conversations remember what was said, and only what was answered."""

from __future__ import annotations

from typing import Any

import pytest

from candle_vllm.core import CandleVllmError, InvalidParameterError
from candle_vllm.core.testing import ScriptedEngine
from candle_vllm.openai import OpenAIAdapter
from candle_vllm.responses import ConversationOptions, ResponsesSession


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


async def test_each_call_continues_the_last() -> None:
    engine = ScriptedEngine(lambda prompt: f"answer {prompt.count('<|im_start|>user')}")
    session = ResponsesSession(OpenAIAdapter(engine), [{"role": "system", "content": "be brief"}])
    first = await session.run_conversation([user("one")])
    second = await session.run_conversation([user("two")])
    assert (first.final_message, second.final_message) == ("answer 1", "answer 2")
    assert second.completed
    assert second.turns_taken == 1
    assert [message["role"] for message in session.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert second.prompt_tokens > first.prompt_tokens
    again = ResponsesSession(OpenAIAdapter(engine), session.messages)
    assert (await again.run_conversation([user("three")])).final_message == "answer 3"


async def test_a_cut_answer_is_not_complete() -> None:
    session = ResponsesSession(OpenAIAdapter(ScriptedEngine("a long answer")))
    result = await session.run_conversation([user("x")], ConversationOptions(request={"max_tokens": 2}))
    assert not result.completed
    assert result.stop_reason == "length"
    assert result.completion_tokens == 2


async def test_a_failed_turn_leaves_the_transcript_alone() -> None:
    session = ResponsesSession(OpenAIAdapter(ScriptedEngine("x", submit_error=CandleVllmError("no"))))
    with pytest.raises(CandleVllmError):
        await session.run_conversation([user("x")])
    with pytest.raises(InvalidParameterError):
        await session.run_conversation([{"role": "nobody", "content": "x"}])
    assert session.messages == []


def test_a_request_may_not_set_what_the_session_does() -> None:
    with pytest.raises(InvalidParameterError, match="must not set n, stream"):
        ConversationOptions(request={"n": 2, "stream": True})
