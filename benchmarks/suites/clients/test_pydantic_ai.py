# SPDX-License-Identifier: MIT
"""pydantic-ai by four models: chat, responses, Ollama's provider and Anthropic's."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, PromptedOutput, ToolOutput
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.ollama import OllamaProvider
from pydantic_ai.providers.openai import OpenAIProvider

ADDRESS = os.environ["SUITE_ADDRESS"]
OPENAI = {"base_url": f"{ADDRESS}/v1", "api_key": "none"}
MODELS: dict[str, Callable[[], Any]] = {
    "chat": lambda: OpenAIChatModel("qwen", provider=OpenAIProvider(**OPENAI)),
    "responses": lambda: OpenAIResponsesModel("qwen", provider=OpenAIProvider(**OPENAI)),
    "ollama": lambda: OpenAIChatModel("qwen", provider=OllamaProvider(**OPENAI)),
    "anthropic": lambda: AnthropicModel("qwen", provider=AnthropicProvider(api_key="none", base_url=ADDRESS)),
}
SETTINGS: Any = {"temperature": 0, "max_tokens": 200}


class Person(BaseModel):
    name: str
    age: int


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


async def test_answer(model: Any) -> None:
    result = await Agent(model, model_settings=SETTINGS, instructions="Be brief.").run("Say hello.")
    assert result.output
    assert result.usage.output_tokens > 0


async def test_stream(model: Any) -> None:
    async with Agent(model, model_settings=SETTINGS).run_stream("Say hello.") as result:
        texts = [text async for text in result.stream_text(delta=True)]
    assert "".join(texts)


async def test_history(model: Any) -> None:
    agent = Agent(model, model_settings=SETTINGS)
    first = await agent.run("My name is Bob.")
    second = await agent.run("What is my name?", message_history=first.all_messages())
    assert "Bob" in second.output


@pytest.mark.parametrize("form", [ToolOutput, NativeOutput, PromptedOutput])
async def test_output(model: Any, form: Any) -> None:
    agent = Agent(model, output_type=form(Person), model_settings=SETTINGS)
    result = await agent.run("Bob is 41 years old.")
    assert result.output == Person(name="Bob", age=41)


async def test_tool(model: Any) -> None:
    agent, asked = Agent(model, model_settings=SETTINGS), list[str]()

    @agent.tool_plain
    def weather(city: str) -> str:
        """The weather in a city."""
        asked.append(city)
        return "It rains."

    result = await agent.run("What is the weather in Paris? Use the tool.")
    assert any("Paris" in city for city in asked)
    assert result.output


async def test_streamed_output(model: Any) -> None:
    agent = Agent(model, output_type=ToolOutput(Person), model_settings=SETTINGS)
    async with agent.run_stream("Bob is 41 years old.") as result:
        assert await result.get_output() == Person(name="Bob", age=41)
