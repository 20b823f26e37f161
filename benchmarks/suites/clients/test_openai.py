# SPDX-License-Identifier: MIT
"""openai-python by route: every method that has a route here, and its helpers, each with a property that must hold."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel, ConfigDict

ADDRESS, EMBEDDER, CLASSIFIER = (os.environ[f"SUITE_{name}"] for name in ("ADDRESS", "EMBEDDER", "CLASSIFIER"))
HELLO: Any = [{"role": "user", "content": "Say hello."}]
ASKED: Any = [{"role": "user", "content": "Bob is 41 years old. Extract as JSON."}]
ASKS: Any = [{"role": "user", "content": "What is the weather in Paris? Use the tool."}]


class Person(BaseModel):
    name: str
    age: int


class Weather(BaseModel):
    """The weather in a city."""

    model_config = ConfigDict(extra="forbid")
    city: str


CHAT_TOOL = openai.pydantic_function_tool(Weather)
RESPONSES_TOOL = {
    "type": "function", "name": "Weather", "description": "The weather in a city.", "strict": True,
    "parameters": Weather.model_json_schema(),
}  # fmt: skip


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{ADDRESS}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def aclient() -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{ADDRESS}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def embedder() -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{EMBEDDER}/v1", api_key="none", max_retries=0)


# ---- chat ------------------------------------------------------------------------------------------------------------


def test_chat(client: Any) -> None:
    answer = client.chat.completions.create(model="qwen", messages=HELLO, max_completion_tokens=40)
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    usage = answer.usage
    assert usage
    assert usage.prompt_tokens + usage.completion_tokens == usage.total_tokens


def test_chat_of_a_stream_is_the_whole_answer(client: Any) -> None:
    settings: Any = {"model": "qwen", "messages": HELLO, "max_completion_tokens": 40}
    whole = client.chat.completions.create(**settings)
    chunks = list(client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


async def test_chat_asynchronous(aclient: Any) -> None:
    stream = await aclient.chat.completions.create(model="qwen", messages=HELLO, max_tokens=40, stream=True)
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_chat_choices_and_log_probabilities(client: Any) -> None:
    answer = client.chat.completions.create(
        model="qwen", messages=HELLO, max_tokens=4, n=2, seed=1, temperature=1.0, logprobs=True, top_logprobs=3
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        found = choice.logprobs.content
        assert "".join(each.token for each in found) == choice.message.content
        for each in found:
            assert len(each.top_logprobs) == 3
            assert all(top.logprob <= 0 for top in each.top_logprobs)
            assert bytes(each.bytes).decode() == each.token


def test_chat_stop_and_length(client: Any) -> None:
    count: Any = [{"role": "user", "content": "Count from 1 to 9, separated by commas."}]
    stopped = client.chat.completions.create(model="qwen", messages=count, max_tokens=40, stop=["4"]).choices[0]
    assert "3" in stopped.message.content
    assert "4" not in stopped.message.content
    assert stopped.finish_reason == "stop"
    cut = client.chat.completions.create(model="qwen", messages=count, max_tokens=3)
    assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 3)


def test_chat_parse(client: Any) -> None:
    answer = client.chat.completions.parse(model="qwen", messages=ASKED, response_format=Person, max_tokens=60)
    assert answer.choices[0].message.parsed == Person(name="Bob", age=41)


def test_chat_parse_of_an_answer_that_is_cut(client: Any) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model="qwen", messages=ASKED, response_format=Person, max_tokens=3)


def test_chat_parse_of_a_call(client: Any) -> None:
    answer = client.chat.completions.parse(
        model="qwen", messages=ASKS, tools=[CHAT_TOOL], tool_choice="required", max_tokens=60
    )
    (call,) = answer.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Weather)
    assert "Paris" in call.function.parsed_arguments.city
    assert answer.choices[0].finish_reason == "tool_calls"


def test_chat_call_and_its_result(client: Any) -> None:
    settings: Any = {"model": "qwen", "tools": [CHAT_TOOL], "max_tokens": 100}
    first = client.chat.completions.create(messages=ASKS, tool_choice="required", **settings).choices[0].message
    (call,) = first.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": "It rains."}
    second = client.chat.completions.create(messages=[*ASKS, first, result], tool_choice="none", **settings)
    assert "rain" in second.choices[0].message.content.lower()


def test_chat_stream_helper(client: Any) -> None:
    with client.chat.completions.stream(
        model="qwen", messages=ASKED, response_format=Person, max_tokens=60, stream_options={"include_usage": True}
    ) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    deltas = "".join(event.delta for event in events if event.type == "content.delta")
    (done,) = (event for event in events if event.type == "content.done")
    assert deltas == done.content == final.choices[0].message.content
    assert done.parsed == final.choices[0].message.parsed == Person(name="Bob", age=41)
    assert final.usage.total_tokens > 0


def test_chat_stream_helper_with_a_call(client: Any) -> None:
    with client.chat.completions.stream(
        model="qwen", messages=ASKS, tools=[CHAT_TOOL], tool_choice="required", max_tokens=60
    ) as stream:
        events = list(stream)
    deltas = "".join(event.arguments_delta for event in events if event.type == "tool_calls.function.arguments.delta")
    (done,) = (event for event in events if event.type == "tool_calls.function.arguments.done")
    assert deltas == done.arguments
    assert "Paris" in done.parsed_arguments.city


def test_raw_and_streaming_responses(client: Any) -> None:
    raw = client.chat.completions.with_raw_response.create(model="qwen", messages=HELLO, max_tokens=5)
    assert raw.headers["x-request-id"] == raw.request_id
    assert raw.parse().choices[0].message.content
    with client.chat.completions.with_streaming_response.create(
        model="qwen", messages=HELLO, max_tokens=5, stream=True
    ) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith("data: ") for line in lines)


def test_a_stream_that_is_closed_ends_the_answer(client: Any) -> None:
    stream = client.chat.completions.create(
        model="qwen", messages=[{"role": "user", "content": "Write a long story."}], max_tokens=4000, stream=True
    )
    next(iter(stream))
    stream.close()
    until = time.monotonic() + 10
    while client.get(f"{ADDRESS}/load", cast_to=object)["server_load"]:
        assert time.monotonic() < until
        time.sleep(0.1)


# ---- completions -----------------------------------------------------------------------------------------------------


def test_completions(client: Any) -> None:
    settings: Any = {
        "model": "qwen",
        "prompt": ["1, 2, 3,", "The capital of France is"],
        "max_tokens": 8,
        "temperature": 0,
    }
    whole = client.completions.create(**settings)
    assert "4" in whole.choices[0].text
    assert "Paris" in whole.choices[1].text
    texts = ["", ""]
    for chunk in client.completions.create(**settings, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]


def test_completions_of_tokens_with_echo(client: Any) -> None:
    tokens = client.post(f"{ADDRESS}/tokenize", cast_to=object, body={"model": "qwen", "prompt": "1, 2, 3,"})["tokens"]
    made = client.completions.create(model="qwen", prompt=tokens, max_tokens=2, temperature=0, echo=True, logprobs=2)
    found = made.choices[0].logprobs
    assert made.choices[0].text.startswith("1, 2, 3,")
    assert "".join(found.tokens) == made.choices[0].text
    assert len(found.token_logprobs) == len(tokens) + 2
    assert found.token_logprobs[0] is None


def test_completions_with_a_suffix(client: Any) -> None:
    made = client.completions.create(
        model="qwen", prompt="def add(a, b):\n    return a", suffix="\n\nprint(add(1, 2))", max_tokens=8, temperature=0
    )
    assert "b" in made.choices[0].text


# ---- embeddings, moderations, models ---------------------------------------------------------------------------------


def test_embeddings(embedder: Any) -> None:
    texts = ["a cat", "a kitten", "a car park"]
    plain = [each.embedding for each in embedder.embeddings.create(model="minilm", input=texts).data]
    floats = embedder.embeddings.create(model="minilm", input=texts, encoding_format="float")
    assert [each.index for each in floats.data] == [0, 1, 2]
    for one, other in zip(plain, floats.data, strict=True):
        assert one == pytest.approx(other.embedding, abs=1e-6)
    cat, kitten, park = plain
    assert sum(a * b for a, b in zip(cat, kitten, strict=True)) > sum(a * b for a, b in zip(cat, park, strict=True))
    assert sum(a * a for a in cat) == pytest.approx(1, abs=1e-4)
    assert floats.usage.prompt_tokens == floats.usage.total_tokens > 0


def test_moderations() -> None:
    client: Any = openai.OpenAI(base_url=f"{CLASSIFIER}/v1", api_key="none", max_retries=0)
    made = client.moderations.create(model="classifier", input=["What a wonderful film!", "I want my money back."])
    assert len(made.results) == 2
    for result in made.results:
        scores = result.category_scores.model_dump()["toxic"]
        assert 0 <= scores <= 1
        assert result.flagged is (scores >= 0.5)


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["qwen", "other"]
    assert client.models.retrieve("qwen").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_errors(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as found:
        client.chat.completions.create(model="qwen", messages=HELLO, temperature=-1)
    assert found.value.param == "temperature"
    assert found.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as found:
        client.chat.completions.create(model="qwen", messages=[{"role": "user", "content": "word " * 20_000}])
    assert found.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as found:
        client.responses.create(model="qwen", input=HELLO, max_output_tokens=-1)
    assert found.value.param == "max_output_tokens"
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_nobody")


# ---- responses -------------------------------------------------------------------------------------------------------


def test_responses(client: Any) -> None:
    first = client.responses.create(model="qwen", input="My name is Bob.", max_output_tokens=60)
    assert first.output_text
    second = client.responses.create(
        model="qwen", input="What is my name?", previous_response_id=first.id, max_output_tokens=60
    )
    assert "Bob" in second.output_text
    assert second.previous_response_id == first.id
    assert second.usage.input_tokens + second.usage.output_tokens == second.usage.total_tokens


def test_responses_stored(client: Any) -> None:
    made = client.responses.create(
        model="qwen", input=HELLO, instructions="Be brief.", metadata={"a": "b"}, max_output_tokens=40
    )
    kept = client.responses.retrieve(made.id)
    assert kept.output_text == made.output_text
    assert kept.metadata == {"a": "b"}
    (item,) = client.responses.input_items.list(made.id)
    assert item.content[0].text == "Say hello."
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_responses_that_are_cut(client: Any) -> None:
    made = client.responses.create(model="qwen", input="Write a story.", max_output_tokens=16)
    assert (made.status, made.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert made.usage.output_tokens == 16


def test_responses_parse(client: Any) -> None:
    made = client.responses.parse(model="qwen", input=ASKED, text_format=Person, max_output_tokens=60)
    assert made.output_parsed == Person(name="Bob", age=41)


def test_responses_call_and_its_result(client: Any) -> None:
    settings: Any = {"model": "qwen", "tools": [RESPONSES_TOOL], "max_output_tokens": 100}
    first = client.responses.create(input=ASKS, tool_choice="required", **settings)
    (call,) = first.output
    assert (call.type, call.name) == ("function_call", "Weather")
    assert "Paris" in json.loads(call.arguments)["city"]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "It rains."}
    second = client.responses.create(input=[*ASKS, *first.output, result], tool_choice="none", **settings)
    assert "rain" in second.output_text.lower()


def test_responses_stream(client: Any) -> None:
    events = list(client.responses.create(model="qwen", input=HELLO, max_output_tokens=40, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    final = events[-1]
    assert final.type == "response.completed"
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == final.response.output_text


async def test_responses_asynchronous(aclient: Any) -> None:
    stream = await aclient.responses.create(model="qwen", input=HELLO, max_output_tokens=40, stream=True)
    events = [event async for event in stream]
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text


def test_responses_stream_helper(client: Any) -> None:
    with client.responses.stream(model="qwen", input=ASKED, text_format=Person, max_output_tokens=60) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_parsed == Person(name="Bob", age=41)
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert deltas == final.output_text


def test_responses_stream_helper_with_a_call(client: Any) -> None:
    with client.responses.stream(
        model="qwen", input=ASKS, tools=[openai.pydantic_function_tool(Weather)["function"] | {"type": "function"}],
        tool_choice="required", max_output_tokens=60,
    ) as stream:  # fmt: skip
        events = list(stream)
        (call,) = stream.get_final_response().output
    deltas = "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
    assert deltas == call.arguments
    assert "Paris" in json.loads(deltas)["city"]


def test_responses_in_the_background(client: Any) -> None:
    made = client.responses.create(model="qwen", input=HELLO, max_output_tokens=40, background=True)
    assert made.status in ("queued", "in_progress")
    events = list(client.responses.retrieve(made.id, stream=True))
    assert events[-1].type == "response.completed"
    later = list(client.responses.retrieve(made.id, stream=True, starting_after=events[-3].sequence_number))
    assert [event.sequence_number for event in later] == [event.sequence_number for event in events[-2:]]
    assert client.responses.retrieve(made.id).output_text == events[-1].response.output_text


def test_responses_cancel(client: Any) -> None:
    made = client.responses.create(model="qwen", input="Write a long story.", max_output_tokens=6000, background=True)
    assert client.responses.cancel(made.id).status == "cancelled"
    assert client.responses.retrieve(made.id).status == "cancelled"


def test_responses_count(client: Any) -> None:
    counted = client.responses.input_tokens.count(model="qwen", input=HELLO)
    made = client.responses.create(model="qwen", input=HELLO, max_output_tokens=16)
    assert counted.input_tokens == made.usage.input_tokens


def test_responses_compact(client: Any) -> None:
    said = [*({"role": "user", "content": f"My friend {n} is called Bob{n}."} for n in range(3)), *HELLO]
    compacted = client.responses.compact(model="qwen", input=said)
    assert compacted.output
    assert compacted.usage.total_tokens > 0
    made = client.responses.create(model="qwen", input=[*compacted.output, *HELLO], max_output_tokens=40)
    assert made.output_text


def test_responses_socket(client: Any) -> None:
    with client.responses.connect() as connection:
        for asked in ("Say hello.", "Say goodbye."):
            connection.response.create(model="qwen", input=asked, max_output_tokens=40)
            for event in connection:
                if event.type == "response.completed":
                    assert event.response.output_text
                    break
                assert not event.type.endswith(("failed", "error"))


# ---- conversations ---------------------------------------------------------------------------------------------------


def test_conversations(client: Any) -> None:
    made = client.conversations.create(
        items=[{"type": "message", "role": "user", "content": "My name is Bob."}], metadata={"a": "b"}
    )
    answer = client.responses.create(model="qwen", input="What is my name?", conversation=made.id, max_output_tokens=60)
    assert "Bob" in answer.output_text
    roles = [item.role for item in client.conversations.items.list(made.id, order="asc")]
    assert roles == ["user", "user", "assistant"]
    added = client.conversations.items.create(
        made.id, items=[{"type": "message", "role": "user", "content": "And now?"}]
    ).data[0]
    assert client.conversations.items.retrieve(added.id, conversation_id=made.id).content[0].text == "And now?"
    pages = list(client.conversations.items.list(made.id, limit=2, order="desc"))
    assert len(pages) == 4
    assert pages[0].id == added.id
    client.conversations.items.delete(added.id, conversation_id=made.id)
    assert len(list(client.conversations.items.list(made.id))) == 3
    assert client.conversations.update(made.id, metadata={"c": "d"}).metadata == {"c": "d"}
    assert client.conversations.retrieve(made.id).metadata == {"c": "d"}
    assert client.conversations.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.conversations.retrieve(made.id)


# ---- files and batches -----------------------------------------------------------------------------------------------


def _line(number: int, url: str, body: dict[str, Any]) -> str:
    return json.dumps({"custom_id": str(number), "method": "POST", "url": url, "body": {"model": "qwen", **body}})


def test_files(client: Any) -> None:
    content = _line(1, "/v1/completions", {"prompt": "1, 2, 3,", "max_tokens": 4}).encode()
    made = client.files.create(file=("in.jsonl", content), purpose="batch")
    assert (made.filename, made.bytes) == ("in.jsonl", len(content))
    assert client.files.wait_for_processing(made.id, poll_interval=0.1).status == "processed"
    assert client.files.retrieve(made.id).purpose == "batch"
    assert made.id in [each.id for each in client.files.list(purpose="batch")]
    assert client.files.content(made.id).read() == content
    assert client.files.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(made.id)


def test_batches(client: Any) -> None:
    lines = "\n".join(
        [
            _line(1, "/v1/chat/completions", {"messages": HELLO, "max_tokens": 20}),
            _line(2, "/v1/chat/completions", {"messages": HELLO, "temperature": -1}),
        ]
    )
    file = client.files.create(file=("in.jsonl", lines.encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    assert batch.id in [each.id for each in client.batches.list()]
    while batch.status in ("validating", "in_progress", "finalizing"):
        time.sleep(0.2)
        batch = client.batches.retrieve(batch.id)
    assert batch.status == "completed"
    assert (batch.request_counts.completed, batch.request_counts.failed, batch.request_counts.total) == (1, 1, 2)
    (good,) = (json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines())
    assert good["custom_id"] == "1"
    assert good["response"]["body"]["choices"][0]["message"]["content"]
    (bad,) = (json.loads(line) for line in client.files.content(batch.error_file_id).text.splitlines())
    assert bad["custom_id"] == "2"
    assert bad["response"]["status_code"] == 400


def test_batches_cancel(client: Any) -> None:
    body = {"messages": [{"role": "user", "content": "Write a long story."}], "max_tokens": 6000}
    lines = "\n".join(_line(number, "/v1/chat/completions", body) for number in range(4))
    file = client.files.create(file=("in.jsonl", lines.encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    for _ in range(100):
        if client.batches.retrieve(batch.id).status == "cancelled":
            return
        time.sleep(0.2)
    raise AssertionError(client.batches.retrieve(batch.id))
