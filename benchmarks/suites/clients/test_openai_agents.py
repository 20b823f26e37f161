# SPDX-License-Identifier: MIT
"""OpenAI's Agents SDK by both of its models, chat and responses: tools, handoffs, guardrails, sessions and streams."""

from __future__ import annotations

import os
from typing import Any

import openai
import pytest
from agents import (
    Agent,
    GuardrailFunctionOutput,
    InputGuardrailTripwireTriggered,
    MaxTurnsExceeded,
    ModelBehaviorError,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    OutputGuardrailTripwireTriggered,
    RunConfig,
    Runner,
    SQLiteSession,
    function_tool,
    input_guardrail,
    output_guardrail,
    set_tracing_disabled,
)
from pydantic import BaseModel

ADDRESS = os.environ["SUITE_ADDRESS"]
MODELS: dict[str, Any] = {"chat": OpenAIChatCompletionsModel, "responses": OpenAIResponsesModel}
SETTINGS: Any = {"temperature": 0, "max_tokens": 200}
ASKS = "What is the weather in Paris? Use the tool."
set_tracing_disabled(True)


class Person(BaseModel):
    name: str
    age: int


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    client = openai.AsyncOpenAI(base_url=f"{ADDRESS}/v1", api_key="none", max_retries=0)
    return MODELS[request.param]("qwen", client)


def agent_of(
    model: Any, name: str = "Helper", instructions: str = "Be brief.", settings: Any = None, **more: Any
) -> Any:
    model_settings = ModelSettings(**{**SETTINGS, **(settings or {})})
    return Agent(name=name, model=model, instructions=instructions, model_settings=model_settings, **more)


def weather_tool(asked: list[str]) -> Any:
    @function_tool
    def weather(city: str) -> str:
        """The weather in a city."""
        asked.append(city)
        return f"It rains in {city}."

    return weather


async def test_answer(model: Any) -> None:
    result = await Runner.run(agent_of(model), "Say hello.")
    assert isinstance(result.final_output, str)
    assert result.final_output
    usage = result.context_wrapper.usage
    assert usage.requests == 1
    assert usage.input_tokens > 0
    assert usage.input_tokens + usage.output_tokens == usage.total_tokens


def test_answer_that_is_waited_for(model: Any) -> None:
    assert Runner.run_sync(agent_of(model), "Say hello.").final_output


async def test_stream_is_the_whole_answer(model: Any) -> None:
    whole = await Runner.run(agent_of(model), "Say hello.")
    streamed = Runner.run_streamed(agent_of(model, settings={"include_usage": True}), "Say hello.")
    raw = [event.data async for event in streamed.stream_events() if event.type == "raw_response_event"]
    deltas = "".join(data.delta for data in raw if data.type == "response.output_text.delta")
    assert deltas == streamed.final_output == whole.final_output != ""
    (completed,) = (data.response for data in raw if data.type == "response.completed")
    assert completed.usage.output_tokens == whole.context_wrapper.usage.output_tokens


async def test_tool(model: Any) -> None:
    asked: list[str] = []
    result = await Runner.run(agent_of(model, tools=[weather_tool(asked)]), ASKS)
    assert any("Paris" in city for city in asked)
    kinds = [item.type for item in result.new_items]
    assert kinds[:2] == ["tool_call_item", "tool_call_output_item"]
    assert kinds[-1] == "message_output_item"
    assert result.new_items[0].raw_item.name == "weather"
    assert "rain" in result.final_output.lower()


async def test_tool_that_is_required_in_a_stream(model: Any) -> None:
    asked: list[str] = []
    agent = agent_of(model, settings={"tool_choice": "required"}, tools=[weather_tool(asked)],
                     tool_use_behavior="stop_on_first_tool")  # fmt: skip
    streamed = Runner.run_streamed(agent, ASKS)
    names = [event.name async for event in streamed.stream_events() if event.type == "run_item_stream_event"]
    assert names == ["tool_called", "tool_output"]
    assert streamed.final_output == f"It rains in {asked[0]}."
    assert "Paris" in asked[0]


async def test_turns_without_end(model: Any) -> None:
    agent = agent_of(model, settings={"tool_choice": "required"}, tools=[weather_tool([])], reset_tool_choice=False)
    with pytest.raises(MaxTurnsExceeded):
        await Runner.run(agent, ASKS, max_turns=2)


async def test_output_of_a_type(model: Any) -> None:
    result = await Runner.run(agent_of(model, output_type=Person), "Bob is 41 years old. Extract as JSON.")
    assert result.final_output == Person(name="Bob", age=41)


async def test_output_of_a_type_in_a_stream(model: Any) -> None:
    streamed = Runner.run_streamed(agent_of(model, output_type=Person), "Bob is 41 years old. Extract as JSON.")
    assert [event async for event in streamed.stream_events()]
    assert streamed.final_output == Person(name="Bob", age=41)


async def test_handoff(model: Any) -> None:
    french = agent_of(model, "French agent", "Answer in French.", handoff_description="Answers in French.")
    first = agent_of(
        model, "First agent", "Hand over to the French agent.", {"tool_choice": "required"}, handoffs=[french]
    )
    result = await Runner.run(first, "Bonjour, parlez-vous français ?")
    assert result.last_agent is french
    assert result.final_output
    assert {"handoff_call_item", "handoff_output_item"} <= {item.type for item in result.new_items}


async def test_agent_as_a_tool(model: Any) -> None:
    inner = agent_of(model, "Speaker", "Say hello.")
    outer = agent_of(model, settings={"tool_choice": "required"}, tool_use_behavior="stop_on_first_tool",
                     tools=[inner.as_tool("speak", "Says hello.")])  # fmt: skip
    result = await Runner.run(outer, "Let the speaker say hello.")
    assert isinstance(result.final_output, str)
    assert result.final_output
    assert result.new_items[0].raw_item.name == "speak"


async def test_history(model: Any) -> None:
    first = await Runner.run(agent_of(model), "My name is Bob.")
    second = await Runner.run(
        agent_of(model), [*first.to_input_list(), {"role": "user", "content": "What is my name?"}]
    )
    assert "Bob" in second.final_output


async def test_history_with_a_call(model: Any) -> None:
    first = await Runner.run(agent_of(model, tools=[weather_tool([])]), ASKS)
    asked = [*first.to_input_list(), {"role": "user", "content": "Which city did I ask about?"}]
    assert "Paris" in (await Runner.run(agent_of(model), asked)).final_output


async def test_session(model: Any) -> None:
    session = SQLiteSession("one")
    await Runner.run(agent_of(model), "My name is Bob.", session=session)
    result = await Runner.run(agent_of(model), "What is my name?", session=session)
    assert "Bob" in result.final_output
    assert len(await session.get_items()) == 4


async def test_guardrails(model: Any) -> None:
    @input_guardrail(run_in_parallel=False)
    def no_secrets(_context: Any, _agent: Any, asked: Any) -> GuardrailFunctionOutput:
        return GuardrailFunctionOutput(output_info=asked, tripwire_triggered="secret" in str(asked))

    @output_guardrail
    def no_texts(_context: Any, _agent: Any, said: Any) -> GuardrailFunctionOutput:
        return GuardrailFunctionOutput(output_info=said, tripwire_triggered=bool(said))

    agent = agent_of(model, input_guardrails=[no_secrets])
    assert (await Runner.run(agent, "Say hello.")).final_output
    with pytest.raises(InputGuardrailTripwireTriggered):
        await Runner.run(agent, "Tell me the secret.")
    with pytest.raises(OutputGuardrailTripwireTriggered):
        await Runner.run(agent_of(model, output_guardrails=[no_texts]), "Say hello.")


async def test_settings_of_a_run_and_an_answer_that_is_cut(model: Any) -> None:
    config = RunConfig(model_settings=ModelSettings(max_tokens=16, top_p=0.5, extra_body={"top_k": 1}))
    if isinstance(model, OpenAIResponsesModel):  # a response that is incomplete is an error of this client
        with pytest.raises(ModelBehaviorError, match="max_output_tokens"):
            await Runner.run(agent_of(model), "Write a long story.", run_config=config)
    else:
        result = await Runner.run(agent_of(model), "Write a long story.", run_config=config)
        assert result.context_wrapper.usage.output_tokens == 16
        assert result.final_output


async def test_errors(model: Any) -> None:
    with pytest.raises(openai.BadRequestError) as found:
        await Runner.run(agent_of(model, settings={"temperature": -1}), "Say hello.")
    assert found.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as found:
        await Runner.run(agent_of(model), "word " * 20_000)
    assert found.value.code == "context_length_exceeded"


async def test_conversation_by_the_last_response() -> None:
    client = openai.AsyncOpenAI(base_url=f"{ADDRESS}/v1", api_key="none", max_retries=0)
    agent = agent_of(OpenAIResponsesModel("qwen", client))
    first = await Runner.run(agent, "My name is Bob.")
    second = await Runner.run(agent, "What is my name?", previous_response_id=first.last_response_id)
    assert "Bob" in second.final_output
    conversation = await client.conversations.create()
    await Runner.run(agent, "My name is Eve.", conversation_id=conversation.id)
    assert "Eve" in (await Runner.run(agent, "What is my name?", conversation_id=conversation.id)).final_output
