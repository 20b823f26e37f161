# SPDX-License-Identifier: MIT
"""LiteLLM by the names of seven providers, and its embeddings, rerank and responses."""

from __future__ import annotations

import json
import os
from typing import Any

import litellm
import pytest

ADDRESS, EMBEDDER = os.environ["SUITE_ADDRESS"], os.environ["SUITE_EMBEDDER"]
PROVIDERS = {
    "openai/qwen": f"{ADDRESS}/v1", "hosted_vllm/qwen": f"{ADDRESS}/v1", "lm_studio/qwen": f"{ADDRESS}/v1",
    "llamafile/qwen": f"{ADDRESS}/v1", "ollama/qwen": ADDRESS, "ollama_chat/qwen": ADDRESS, "anthropic/qwen": ADDRESS,
}  # fmt: skip
HELLO = [{"role": "user", "content": "Say hello."}]
TOOL = {"type": "function", "function": {"name": "weather", "description": "The weather in a city.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}  # fmt: skip
ASKS = [{"role": "user", "content": "What is the weather in Paris? Use the tool."}]
SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
          "required": ["name", "age"], "additionalProperties": False}  # fmt: skip


@pytest.fixture(params=PROVIDERS)
def named(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"model": request.param, "api_base": PROVIDERS[request.param], "api_key": "none", "max_tokens": 200,
            "temperature": 0}  # fmt: skip


def test_answer(named: dict[str, Any]) -> None:
    answer = litellm.completion(messages=HELLO, **named)
    assert answer.choices[0].message.content
    assert answer.usage.completion_tokens > 0


def test_stream(named: dict[str, Any]) -> None:
    chunks = list(litellm.completion(messages=HELLO, stream=True, **named))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"


async def test_asynchronous(named: dict[str, Any]) -> None:
    answer = await litellm.acompletion(messages=HELLO, **named)
    assert answer.choices[0].message.content


def test_tool(named: dict[str, Any]) -> None:
    (call,) = litellm.completion(messages=ASKS, tools=[TOOL], **named).choices[0].message.tool_calls
    assert call.function.name == "weather"
    assert "Paris" in json.loads(call.function.arguments)["city"]


def test_schema(named: dict[str, Any]) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    asked = [{"role": "user", "content": "Bob is 41 years old. Extract as JSON."}]
    answer = litellm.completion(messages=asked, response_format=form, **named)
    assert json.loads(answer.choices[0].message.content).keys() == {"name", "age"}


def test_prompt_that_is_too_long(named: dict[str, Any]) -> None:
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(messages=[{"role": "user", "content": "word " * 20_000}], **named)


def test_embedding() -> None:
    made = litellm.embedding(model="openai/minilm", input=["a", "b"], api_base=f"{EMBEDDER}/v1", api_key="none")
    assert [len(each["embedding"]) for each in made.data] == [384, 384]


def test_rerank() -> None:
    made = litellm.rerank(model="hosted_vllm/minilm", query="cat", documents=["kitten", "car"], api_base=EMBEDDER)
    assert {each["index"] for each in made.results} == {0, 1}


def test_responses() -> None:
    made = litellm.responses(model="openai/qwen", input="Say hello.", api_base=f"{ADDRESS}/v1", api_key="none")
    assert made.output[0].content[0].text
