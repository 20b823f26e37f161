# SPDX-License-Identifier: MIT
"""Texts and conversations to tokens and back, over a scripted engine."""

from __future__ import annotations

from typing import Any

import pytest

from candle_vllm.core.errors import RequestError
from candle_vllm.core.testing import ScriptedEngine
from candle_vllm.openai import OpenAIAdapter, to_error
from candle_vllm.openai.protocol.tokenizing import MAX_DETOKENIZED
from candle_vllm.openai.requests import parse_chat_request, read_chat
from candle_vllm.openai.tokenizing import parse_detokenize_request, parse_tokenize_request

MESSAGES = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


async def test_a_text() -> None:
    adapter = OpenAIAdapter(ScriptedEngine(max_model_len=100))
    made = await adapter.tokenize({"prompt": "ab"})
    assert (made.tokens, made.count, made.max_model_len, made.token_strs) == ((256, 97, 98), 3, 100, None)
    assert (await adapter.tokenize({"prompt": "ab", "add_special_tokens": False})).tokens == (97, 98)
    assert (await adapter.tokenize({"prompt": ""})).tokens == (256,)
    assert (await adapter.tokenize({"prompt": "x" * 1000})).count == 1001  # longer than the context


async def test_tokens_by_their_entries_in_the_vocabulary_and_by_their_texts() -> None:
    adapter = OpenAIAdapter(ScriptedEngine())
    made = await adapter.tokenize({"prompt": "a é", "add_special_tokens": False, "return_token_strs": True})
    assert made.token_strs == ("61", "20", "c3", "a9")
    pieces = await adapter.tokenize({"content": "a é<|eos|>", "with_pieces": True, "add_special": True})
    assert [piece.piece for piece in pieces.tokens] == ["<|bos|>", "a", " ", (0xC3,), (0xA9,), "<|eos|>"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"add_generation_prompt": False},
        {"continue_final_message": True},
        {"tools": [TOOL]},
        {"chat_template": "{{ messages[0]['content'] }}!{{ mood }}", "chat_template_kwargs": {"mood": "x"}},
        {"add_special_tokens": True},
        {"enable_thinking": False},
        {"documents": [{"text": "a"}]},
    ],
)
async def test_a_conversation_is_the_prompt_of_the_same_chat_request(fields: dict[str, Any]) -> None:
    engine = ScriptedEngine()
    adapter = OpenAIAdapter(engine)
    body = {"messages": MESSAGES, **fields}
    made = await adapter.tokenize(body)
    asked = list(engine.template_calls)
    await adapter.chat(body)
    assert made.tokens == tuple(engine.requests[0].prompt_token_ids)
    assert made.count == await adapter.count_tokens(lambda: read_chat(parse_chat_request(body)))
    assert engine.template_calls[len(asked) : 2 * len(asked)] == asked


async def test_back_to_text() -> None:
    adapter = OpenAIAdapter(ScriptedEngine())
    assert (await adapter.detokenize({"tokens": [256, 72, 105, 257]})).prompt == "<|bos|>Hi<|eos|>"
    assert (await adapter.detokenize({"tokens": []})).prompt == ""


WRONG: list[tuple[dict[str, Any], str | None]] = [
    ({}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": ["a"]}, "prompt"),
    ({"prompt": "a", "model": "other"}, "model"),
    ({"prompt": "a", "add_special_tokens": 1}, "add_special_tokens"),
    ({"prompt": "a", "return_token_strs": "yes"}, "return_token_strs"),
    ({"prompt": "a", "tools": []}, "tools"),
    ({"prompt": "a", "messages": MESSAGES}, "prompt"),
    ({"messages": []}, "messages"),
    ({"messages": "a"}, "messages"),
    ({"messages": [{"role": "bot", "content": "a"}]}, "messages.0.role"),
    ({"messages": MESSAGES, "temperature": 1}, "temperature"),
    ({"messages": MESSAGES, "tools": [TOOL, TOOL]}, "tools.1.function.name"),
    ({"messages": MESSAGES, "chat_template": "{%"}, "chat_template"),
    ({"messages": MESSAGES, "chat_template_kwargs": {"tools": 1}}, "chat_template_kwargs.tools"),
    (
        {"messages": MESSAGES, "add_generation_prompt": True, "continue_final_message": True},
        "continue_final_message",
    ),
]


@pytest.mark.parametrize(("body", "param"), WRONG)
async def test_what_is_wrong_is_named(body: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        await OpenAIAdapter(ScriptedEngine(), strict_model_names=True).tokenize(body)
    assert caught.value.param == param


async def test_a_template_of_the_request_needs_permission() -> None:
    adapter = OpenAIAdapter(ScriptedEngine(), allow_chat_template=False)
    with pytest.raises(RequestError, match="--trust-request-chat-template"):
        await adapter.tokenize({"messages": MESSAGES, "chat_template": "x"})


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "tokens"),
        ({"tokens": "a"}, "tokens"),
        ({"tokens": ["a"]}, "tokens.0"),
        ({"tokens": [1, True]}, "tokens.1"),
        ({"tokens": [-1]}, "tokens.0"),
        ({"tokens": [1, 260]}, "tokens.1"),
        ({"tokens": [1 << 31]}, "tokens.0"),
        ({"tokens": [0] * (MAX_DETOKENIZED + 1)}, "tokens"),
        ({"tokens": [1], "model": "other"}, "model"),
        ({"tokens": [1], "skip_special_tokens": True}, "skip_special_tokens"),
    ],
)
async def test_wrong_tokens_are_named(body: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        await OpenAIAdapter(ScriptedEngine(), strict_model_names=True).detokenize(body)
    assert caught.value.param == param


@pytest.mark.parametrize("parse", [parse_tokenize_request, parse_detokenize_request])
@pytest.mark.parametrize("body", [b"[]", b"1", b"null", b"{", b""])
def test_bodies_that_are_no_object(parse: Any, body: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        parse(body)
    assert to_error(caught.value).body.error.code == "invalid_body"
