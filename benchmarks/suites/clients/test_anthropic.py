# SPDX-License-Identifier: MIT
"""Anthropic's SDK: answers, stream helpers, the runner of tools, parsing, counting, models, betas and errors."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anthropic
import pytest
from anthropic import beta_async_tool, beta_tool
from anthropic.lib.tools import ToolError
from pydantic import BaseModel

ADDRESS, SEEING = os.environ["SUITE_ADDRESS"], os.environ["SUITE_SEEING"]
HELLO: Any = [{"role": "user", "content": "Say hello."}]
ASKED: Any = [{"role": "user", "content": "Bob is 41 years old. Extract as JSON."}]
ASKS: Any = [{"role": "user", "content": "What is the weather in Paris? Use the tool."}]
STORY: Any = [{"role": "user", "content": "Write a long story."}]
TOOL: Any = {"name": "weather", "description": "The weather in a city.", "input_schema": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}  # fmt: skip
SETTINGS: Any = {"model": "qwen", "max_tokens": 100}
# A red square.
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAEklEQVR4nGP4z8CAFWEXHbQSACj/P8Fu7N9hAAAAAElFTkSuQmCC"


class Person(BaseModel):
    name: str
    age: int


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with anthropic.Anthropic(base_url=ADDRESS, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def aclient() -> AsyncIterator[Any]:
    async with anthropic.AsyncAnthropic(base_url=ADDRESS, api_key="none", max_retries=0) as client:
        yield client


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


# ---- answers ---------------------------------------------------------------------------------------------------------


def test_create(client: Any) -> None:
    message = client.messages.create(messages=HELLO, **SETTINGS)
    assert isinstance(message, anthropic.types.Message)
    assert (message.type, message.role, message.model, message.stop_reason) == (
        "message",
        "assistant",
        "qwen",
        "end_turn",
    )
    (block,) = message.content
    assert isinstance(block, anthropic.types.TextBlock)
    assert block.text
    assert message.id.startswith("msg_")
    assert message.usage.input_tokens > 0
    assert message.usage.output_tokens > 0
    assert message._request_id


def test_create_with_what_has_no_effect(client: Any) -> None:
    cached: Any = {"cache_control": {"type": "ephemeral"}}
    said = [{"role": "user", "content": [{"type": "text", "text": "Say hello.", **cached}]}]
    message = client.messages.create(
        messages=said, system=[{"type": "text", "text": "Be brief.", **cached}], metadata={"user_id": "bob"},
        service_tier="auto", **SETTINGS,
    )  # fmt: skip
    assert text_of(message)
    assert text_of(client.messages.create(messages=HELLO, system="Be brief.", **SETTINGS)) == text_of(message)


def test_stop_sequences_and_length(client: Any) -> None:
    count = [{"role": "user", "content": "Count from 1 to 9, separated by commas."}]
    stopped = client.messages.create(messages=count, stop_sequences=["4", "zebra"], **SETTINGS)
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "4")
    assert "3" in text_of(stopped)
    assert "4" not in text_of(stopped)
    cut = client.messages.create(model="qwen", messages=count, max_tokens=3)
    assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 3)


def test_conversation_and_beginning_of_an_answer(client: Any) -> None:
    said: Any = [{"role": "user", "content": "My name is Bob."}]
    first = client.messages.create(messages=said, **SETTINGS)
    said += [{"role": "assistant", "content": first.content}, {"role": "user", "content": "What is my name?"}]
    assert "Bob" in text_of(client.messages.create(messages=said, **SETTINGS))
    begun = [{"role": "user", "content": "Count from 1 to 5."}, {"role": "assistant", "content": "1, 2, 3,"}]
    assert text_of(client.messages.create(messages=begun, **SETTINGS)).lstrip().startswith("4")


@pytest.mark.parametrize(
    "thinking", [{"type": "enabled", "budget_tokens": 1024}, {"type": "adaptive"}, {"type": "disabled"}]
)
def test_thinking_with_a_model_that_cannot(client: Any, thinking: Any) -> None:
    message = client.messages.create(model="qwen", messages=HELLO, thinking=thinking, max_tokens=2000)
    assert [block.type for block in message.content] == ["text"]
    assert text_of(message) == text_of(client.messages.create(messages=HELLO, **SETTINGS))


def test_document_of_text(client: Any) -> None:
    source = {"type": "text", "media_type": "text/plain", "data": "Bob lives in Paris. Eve lives in Rome."}
    said = [{"role": "user", "content": [{"type": "document", "source": source, "title": "Who lives where"},
             {"type": "text", "text": "In which city does Bob live? Answer with the city."}]}]  # fmt: skip
    assert "Paris" in text_of(client.messages.create(messages=said, **SETTINGS))


def test_image() -> None:
    client: Any = anthropic.Anthropic(base_url=SEEING, api_key="none", max_retries=0)
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}
    parts = [image, {"type": "text", "text": "What is this?"}]
    seen = client.messages.create(model="seeing", messages=[{"role": "user", "content": parts}], max_tokens=8)
    bare = client.messages.create(model="seeing", messages=[{"role": "user", "content": parts[1:]}], max_tokens=8)
    assert seen.usage.input_tokens > bare.usage.input_tokens + 8
    counted = client.messages.count_tokens(model="seeing", messages=[{"role": "user", "content": parts}])
    assert counted.input_tokens == seen.usage.input_tokens


async def test_asynchronous(aclient: Any) -> None:
    whole = await aclient.messages.create(messages=HELLO, **SETTINGS)
    stream = await aclient.messages.create(messages=HELLO, stream=True, **SETTINGS)
    texts = [event.delta.text async for event in stream if event.type == "content_block_delta"]
    assert "".join(texts) == text_of(whole) != ""


# ---- streams ---------------------------------------------------------------------------------------------------------


def test_stream_of_events(client: Any) -> None:
    whole = client.messages.create(messages=HELLO, **SETTINGS)
    events = list(client.messages.create(messages=HELLO, stream=True, **SETTINGS))
    kinds = [event.type for event in events if event.type != "ping"]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert "".join(event.delta.text for event in events if event.type == "content_block_delta") == text_of(whole)
    assert events[0].message.usage.input_tokens == whole.usage.input_tokens
    assert events[-2].usage.output_tokens == whole.usage.output_tokens
    assert events[-2].delta.stop_reason == "end_turn"


def test_stream_helper(client: Any) -> None:
    whole = client.messages.create(messages=HELLO, **SETTINGS)
    with client.messages.stream(messages=HELLO, **SETTINGS) as stream:
        assert "".join(stream.text_stream) == text_of(whole)
        final = stream.get_final_message()
        assert stream.get_final_text() == text_of(whole)
        assert stream.request_id
    assert final.usage.input_tokens == whole.usage.input_tokens
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert final.stop_reason == "end_turn"


def test_stream_helper_by_events(client: Any) -> None:
    with client.messages.stream(messages=HELLO, **SETTINGS) as stream:
        events = list(stream)
        snapshot = stream.current_message_snapshot
    texts = [event for event in events if event.type == "text"]
    assert "".join(event.text for event in texts) == texts[-1].snapshot == text_of(snapshot)
    (stop,) = (event for event in events if event.type == "content_block_stop")
    assert stop.content_block.text == texts[-1].snapshot
    assert events[-1].type == "message_stop"
    assert events[-1].message.stop_reason == "end_turn"


async def test_stream_helper_asynchronous(aclient: Any) -> None:
    async with aclient.messages.stream(messages=HELLO, **SETTINGS) as stream:
        text = "".join([part async for part in stream.text_stream])
        assert text == text_of(await stream.get_final_message()) != ""


def test_a_stream_that_is_left_ends_the_answer(client: Any) -> None:
    with client.messages.stream(model="qwen", messages=STORY, max_tokens=4000) as stream:
        next(stream.text_stream)
    until = time.monotonic() + 10
    while client.get("/load", cast_to=object)["server_load"]:
        assert time.monotonic() < until
        time.sleep(0.1)


# ---- tools -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["any", "tool", "auto"])
def test_tool(client: Any, choice: str) -> None:
    chosen: Any = {"type": choice, **({"name": "weather"} if choice == "tool" else {})}
    message = client.messages.create(messages=ASKS, tools=[TOOL], tool_choice=chosen, **SETTINGS)
    assert message.stop_reason == "tool_use"
    (call,) = (block for block in message.content if block.type == "tool_use")
    assert (call.name, list(call.input)) == ("weather", ["city"])
    assert "Paris" in call.input["city"]


def test_tool_and_its_result(client: Any) -> None:
    first = client.messages.create(messages=ASKS, tools=[TOOL], tool_choice={"type": "any"}, **SETTINGS)
    (call,) = first.content
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "It rains."}]}
    said = [*ASKS, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    second = client.messages.create(messages=said, tools=[TOOL], tool_choice={"type": "none"}, **SETTINGS)
    assert "rain" in text_of(second).lower()
    assert second.stop_reason == "end_turn"


def test_tool_in_a_stream(client: Any) -> None:
    with client.messages.stream(messages=ASKS, tools=[TOOL], tool_choice={"type": "any"}, **SETTINGS) as stream:
        events = list(stream)
        final = stream.get_final_message()
    deltas = [event for event in events if event.type == "input_json"]
    assert deltas[-1].snapshot == final.content[0].input
    raw = "".join(event.partial_json for event in deltas)
    assert (
        anthropic.types.ToolUseBlock.model_validate_json(
            f'{{"type": "tool_use", "id": "a", "name": "weather", "input": {raw}}}'
        ).input
        == final.content[0].input
    )
    assert "Paris" in final.content[0].input["city"]
    assert final.stop_reason == "tool_use"


# ---- the runner of tools ---------------------------------------------------------------------------------------------


def weather_tool(asked: list[str], make: Any = beta_tool, failing: bool = False) -> Any:
    def answered(city: str) -> str:
        asked.append(city)
        if failing:
            raise ToolError("The station is broken.")
        return f"It rains in {city}."

    if make is beta_tool:

        def weather(city: str) -> str:
            """The weather in a city.

            Args:
                city: The name of the city.
            """
            return answered(city)

        return beta_tool(weather)

    async def weather_later(city: str) -> str:
        """The weather in a city.

        Args:
            city: The name of the city.
        """
        return answered(city)

    return beta_async_tool(weather_later, name="weather")


def then_answers(params: Any) -> Any:
    """The parameters of the next turn: this model would call the tool for ever."""
    return {**params, "tool_choice": {"type": "none"}}


def test_tool_runner(client: Any) -> None:
    asked: list[str] = []
    messages: list[Any] = []
    runner = client.beta.messages.tool_runner(messages=ASKS, tools=[weather_tool(asked)], **SETTINGS)
    for message in runner:
        messages.append(message)
        runner.set_messages_params(then_answers)
    assert [message.stop_reason for message in messages] == ["tool_use", "end_turn"]
    assert "Paris" in asked[0]
    assert "rain" in text_of(messages[-1]).lower()


def test_tool_runner_until_done(client: Any) -> None:
    asked: list[str] = []
    runner = client.beta.messages.tool_runner(
        messages=ASKS, tools=[weather_tool(asked)], max_iterations=2, tool_choice={"type": "any"}, **SETTINGS
    )
    assert next(runner).stop_reason == "tool_use"
    (result,) = runner.generate_tool_call_response()["content"]
    assert result["content"] == f"It rains in {asked[0]}."
    runner.set_messages_params(then_answers)
    assert "rain" in text_of(runner.until_done()).lower()


def test_tool_runner_in_streams(client: Any) -> None:
    asked: list[str] = []
    texts: list[str] = []
    runner = client.beta.messages.tool_runner(messages=ASKS, tools=[weather_tool(asked)], stream=True, **SETTINGS)
    for stream in runner:
        texts.append("".join(event.text for event in stream if event.type == "text"))
        runner.set_messages_params(then_answers)
    assert "Paris" in asked[0]
    assert "rain" in texts[-1].lower()


async def test_tool_runner_asynchronous(aclient: Any) -> None:
    asked: list[str] = []
    runner = aclient.beta.messages.tool_runner(messages=ASKS, tools=[weather_tool(asked, beta_async_tool)], **SETTINGS)
    async for message in runner:
        assert message.stop_reason == ("tool_use" if not asked else "end_turn")
        runner.set_messages_params(then_answers)
    assert "Paris" in asked[0]
    assert "rain" in text_of(await runner.until_done()).lower()


def test_tool_runner_with_a_tool_that_fails(client: Any) -> None:
    asked: list[str] = []
    runner = client.beta.messages.tool_runner(
        messages=ASKS, tools=[weather_tool(asked, failing=True)], max_iterations=2, **SETTINGS
    )
    messages = list(runner)
    assert asked
    assert messages[0].stop_reason == "tool_use"
    assert len(messages) == 2


# ---- formats ---------------------------------------------------------------------------------------------------------


def test_parse(client: Any) -> None:
    message = client.messages.parse(messages=ASKED, output_format=Person, **SETTINGS)
    assert message.parsed_output == Person(name="Bob", age=41)


async def test_parse_asynchronous(aclient: Any) -> None:
    message = await aclient.messages.parse(messages=ASKED, output_format=Person, **SETTINGS)
    assert message.parsed_output == Person(name="Bob", age=41)


def test_parse_in_a_stream(client: Any) -> None:
    with client.messages.stream(messages=ASKED, output_format=Person, **SETTINGS) as stream:
        final = stream.get_final_message()
    assert final.parsed_output == Person(name="Bob", age=41)


def test_format_of_a_schema(client: Any) -> None:
    schema = {**Person.model_json_schema(), "additionalProperties": False}
    config = {"format": {"type": "json_schema", "schema": schema}, "effort": "low"}
    message = client.messages.create(messages=ASKED, output_config=config, **SETTINGS)
    assert Person.model_validate_json(text_of(message)) == Person(name="Bob", age=41)


# ---- counting, models, betas -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"system": "Be brief."}, {"tools": [TOOL]}], ids=["plain", "system", "tools"])
def test_count_tokens(client: Any, more: Any) -> None:
    counted = client.messages.count_tokens(model="qwen", messages=HELLO, **more)
    message = client.messages.create(messages=HELLO, **more, **SETTINGS)
    usage = message.usage
    read = (usage.cache_read_input_tokens or 0) + (usage.cache_creation_input_tokens or 0)
    assert counted.input_tokens == usage.input_tokens + read
    assert client.beta.messages.count_tokens(model="qwen", messages=HELLO, **more).input_tokens == counted.input_tokens


@pytest.mark.parametrize("beta", [False, True])
def test_models(client: Any, beta: bool) -> None:
    models = client.beta.models if beta else client.models
    assert [model.id for model in models.list()] == ["qwen", "other"]
    model = models.retrieve("qwen")
    assert (model.id, model.type) == ("qwen", "model")
    assert model.display_name
    assert model.created_at.year >= 1970
    with pytest.raises(anthropic.NotFoundError):
        models.retrieve("nobody")


def test_betas(client: Any) -> None:
    betas: Any = ["interleaved-thinking-2025-05-14", "fine-grained-tool-streaming-2025-05-14"]
    whole = client.beta.messages.create(messages=HELLO, betas=betas, **SETTINGS)
    assert text_of(whole) == text_of(client.messages.create(messages=HELLO, **SETTINGS))
    with client.beta.messages.stream(messages=HELLO, betas=betas, **SETTINGS) as stream:
        assert "".join(stream.text_stream) == text_of(whole)
    parsed = client.beta.messages.parse(messages=ASKED, output_format=Person, betas=betas, **SETTINGS)
    assert parsed.parsed_output == Person(name="Bob", age=41)


def test_raw_and_streaming_responses(client: Any) -> None:
    raw = client.messages.with_raw_response.create(messages=HELLO, **SETTINGS)
    assert raw.headers["request-id"] == raw.request_id
    assert text_of(raw.parse())
    with client.messages.with_streaming_response.create(messages=HELLO, stream=True, **SETTINGS) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[0] == "event: message_start"
    assert "event: message_stop" in lines


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_errors(client: Any) -> None:
    with pytest.raises(anthropic.BadRequestError) as found:
        client.messages.create(messages=HELLO, extra_body={"temperature": 2}, **SETTINGS)
    assert found.value.status_code == 400
    assert found.value.type == "invalid_request_error"
    assert "temperature" in found.value.message
    assert found.value.request_id
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        client.messages.create(model="qwen", messages=HELLO, max_tokens=-1)
    with pytest.raises(anthropic.BadRequestError, match="messages"):
        client.messages.create(messages=[], **SETTINGS)
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}
    with pytest.raises(anthropic.BadRequestError, match="image"):
        client.messages.create(messages=[{"role": "user", "content": [image]}], **SETTINGS)


@pytest.mark.parametrize("stream", [False, True])
def test_prompt_that_is_too_long(client: Any, stream: bool) -> None:
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        client.messages.create(messages=[{"role": "user", "content": "word " * 20_000}], stream=stream, **SETTINGS)


def test_what_belongs_to_the_service(client: Any) -> None:
    with pytest.raises(anthropic.NotFoundError):
        client.messages.batches.list()
    server: Any = {"type": "url", "url": "https://example.com", "name": "any"}
    with pytest.raises(anthropic.BadRequestError, match="mcp_servers"):
        client.beta.messages.create(messages=HELLO, mcp_servers=[server], **SETTINGS)


async def test_errors_asynchronous(aclient: Any) -> None:
    with pytest.raises(anthropic.BadRequestError):
        await aclient.messages.create(messages=[], **SETTINGS)
    with pytest.raises(anthropic.BadRequestError):
        await aclient.messages.stream(messages=[], **SETTINGS).__aenter__()
