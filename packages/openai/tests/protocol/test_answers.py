# SPDX-License-Identifier: MIT
"""Every answer is read by the official client's own types, whole and in pieces."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types import Completion as OfficialCompletion
from openai.types import Model
from openai.types.chat import ChatCompletion as OfficialChat
from openai.types.chat import ChatCompletionChunk as OfficialChunk
from openai.types.chat import ChatCompletionMessage

from candle_vllm.openai import ChatCompletion, ChatCompletionChunk, Completion, ModelCard, Usage, to_json_bytes
from candle_vllm.openai.protocol.chat import (
    ChatChoice,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatTokenLogprob,
    ChunkChoice,
    FunctionCallDelta,
    FunctionCallOut,
    ToolCallDelta,
    ToolCallOut,
    TopLogprob,
)
from candle_vllm.openai.protocol.completions import CompletionChoice, CompletionLogprobs
from candle_vllm.openai.protocol.usage import CompletionTokensDetails, PromptTokensDetails
from candle_vllm.openai.requests import parse_chat_request, read_chat
from candle_vllm.openai.task import template_messages

HEAD = {"id": "chatcmpl-1", "created": 1, "model": "m", "system_fingerprint": "fp"}
USAGE = Usage(
    prompt_tokens=3,
    completion_tokens=4,
    total_tokens=7,
    prompt_tokens_details=PromptTokensDetails(2),
    completion_tokens_details=CompletionTokensDetails(1),
)
CALLS = (
    ToolCallOut(id="call_a", function=FunctionCallOut("weather", '{"city": "Ulm"}')),
    ToolCallOut(id="call_b", function=FunctionCallOut("now", "{}")),
)


def wire(value: msgspec.Struct) -> dict[str, Any]:
    return json.loads(to_json_bytes(value))


def whole(message: ChatMessage, finish_reason: str) -> OfficialChat:
    logprob = ChatTokenLogprob("a", -1.0, (97,), (TopLogprob("a", -1.0, (97,)),))
    choice = ChatChoice(
        index=0, message=message, finish_reason=finish_reason, logprobs=ChatLogprobs((logprob,)), token_ids=(5,)
    )
    return OfficialChat.model_validate_json(to_json_bytes(ChatCompletion(**HEAD, choices=(choice,), usage=USAGE)))


def test_a_whole_answer_with_calls_and_thoughts() -> None:
    answer = whole(ChatMessage(content=None, reasoning_content="hm", tool_calls=CALLS), "tool_calls")
    message = answer.choices[0].message
    assert (message.role, message.content, message.refusal) == ("assistant", None, None)
    assert [(call.id, call.type) for call in message.tool_calls or ()] == [
        ("call_a", "function"),
        ("call_b", "function"),
    ]
    assert message.tool_calls is not None
    first = message.tool_calls[0]
    assert first.type == "function"
    assert (first.function.name, first.function.arguments) == ("weather", '{"city": "Ulm"}')
    assert (message.model_extra or {})["reasoning_content"] == "hm"
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.reasoning_tokens == 1
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 2


def test_what_is_not_there_is_left_out() -> None:
    assert wire(ChatMessage(content="hi")) == {"role": "assistant", "content": "hi", "refusal": None}
    assert wire(ChatDelta()) == {}
    assert wire(ChatDelta(content="")) == {"content": ""}
    assert wire(ChatDelta(tool_calls=(ToolCallDelta(index=0, function=FunctionCallDelta(arguments="")),))) == {
        "tool_calls": [{"index": 0, "function": {"arguments": ""}}]
    }
    usage = Usage(prompt_tokens=1, completion_tokens=1, total_tokens=2, prompt_tokens_details=PromptTokensDetails(0))
    assert "completion_tokens_details" not in wire(usage)
    card = ModelCard(id="m", created=1, root="m", max_model_len=8)
    assert not {"tool_parser", "reasoning_parser"} & set(wire(card))


DELTAS = [
    ChatDelta(role="assistant", content=""),
    ChatDelta(reasoning_content="h"),
    ChatDelta(reasoning_content="m"),
    ChatDelta(content="So: "),
    ChatDelta(content="two calls."),
    ChatDelta(
        tool_calls=(
            ToolCallDelta(
                index=0, id="call_a", type="function", function=FunctionCallDelta(name="weather", arguments="")
            ),
        )
    ),
    ChatDelta(tool_calls=(ToolCallDelta(index=0, function=FunctionCallDelta(arguments='{"city"')),)),
    ChatDelta(
        tool_calls=(
            ToolCallDelta(index=0, function=FunctionCallDelta(arguments=': "Ulm"}')),
            ToolCallDelta(
                index=1, id="call_b", type="function", function=FunctionCallDelta(name="now", arguments="{}")
            ),
        )
    ),
]


def test_chunks_add_up_in_the_official_client() -> None:
    last = ChunkChoice(index=0, delta=ChatDelta(), finish_reason="tool_calls", stop_reason=None, token_ids=())
    choices = [*(ChunkChoice(index=0, delta=delta) for delta in DELTAS), last]
    chunks = [ChatCompletionChunk(**HEAD, choices=(choice,), usage=None) for choice in choices]
    chunks.append(ChatCompletionChunk(**HEAD, choices=(), usage=USAGE))
    state = ChatCompletionStreamState()
    for chunk in chunks:
        state.handle_chunk(OfficialChunk.model_validate_json(to_json_bytes(chunk)))
    added = state.get_final_completion()
    message = added.choices[0].message
    assert (message.role, message.content, added.choices[0].finish_reason) == (
        "assistant",
        "So: two calls.",
        "tool_calls",
    )
    assert [(one.id, one.function.name, one.function.arguments) for one in message.tool_calls or ()] == [
        (one.id, one.function.name, one.function.arguments) for one in CALLS
    ]
    assert (message.model_extra or {})["reasoning_content"] == "hm"
    assert added.usage is not None
    assert added.usage.total_tokens == 7


@pytest.mark.parametrize("content", ["So:", None])
def test_an_answer_with_calls_can_be_sent_back_however_the_client_holds_it(content: str | None) -> None:
    message = ChatMessage(content=content, reasoning_content="hm", tool_calls=CALLS)
    whole_answer = whole(message, "tool_calls").choices[0].message
    state = ChatCompletionStreamState()
    deltas = DELTAS if content else [DELTAS[0], *DELTAS[1:3], *DELTAS[5:]]
    for choice in [*(ChunkChoice(index=0, delta=delta) for delta in deltas)]:
        chunk = ChatCompletionChunk(**HEAD, choices=(choice,))
        state.handle_chunk(OfficialChunk.model_validate_json(to_json_bytes(chunk)))
    streamed = state.current_completion_snapshot.choices[0].message
    results = [{"role": "tool", "tool_call_id": call.id, "content": ""} for call in CALLS]
    for held in (
        wire(message),
        whole_answer.model_dump(),
        whole_answer.model_dump(exclude_unset=True),
        streamed.model_dump(),
        ChatCompletionMessage.model_validate(streamed.model_dump()).model_dump(),
    ):
        request = parse_chat_request({"messages": [{"role": "user", "content": "hi"}, held, *results]})
        shown = template_messages(read_chat(request).messages)[1]
        assert shown["reasoning_content"] == "hm"
        assert [call["function"] for call in shown["tool_calls"]] == [
            {"name": "weather", "arguments": {"city": "Ulm"}},
            {"name": "now", "arguments": {}},
        ]


def test_completions_and_models() -> None:
    logprobs = CompletionLogprobs(tokens=("a",), token_logprobs=(-1.0,), top_logprobs=({"a": -1.0},), text_offset=(0,))
    choice = CompletionChoice(index=0, text="a", logprobs=logprobs, finish_reason="stop", stop_reason=None)
    read = OfficialCompletion.model_validate_json(to_json_bytes(Completion(**HEAD, choices=(choice,), usage=USAGE)))
    assert (read.choices[0].text, read.choices[0].finish_reason) == ("a", "stop")
    card = ModelCard(id="m", created=1, root="r", max_model_len=8, tool_parser="hermes", reasoning_parser=None)
    model = Model.model_validate_json(to_json_bytes(card))
    assert (model.id, model.owned_by) == ("m", "candle-vllm")
    assert {"tool_parser": "hermes", "reasoning_parser": None}.items() <= (model.model_extra or {}).items()
