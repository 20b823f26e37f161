# SPDX-License-Identifier: MIT
"""Ollama's Python client: every method, whole, streamed and asynchronous, with the errors that it raises."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ollama
import pytest
from ollama import AsyncClient, Client, ResponseError
from pydantic import BaseModel

ADDRESS, EMBEDDER, SEEING = (os.environ[f"SUITE_{name}"] for name in ("ADDRESS", "EMBEDDER", "SEEING"))
HELLO: Any = [{"role": "user", "content": "Say hello."}]
ASKED: Any = [{"role": "user", "content": "Bob is 41 years old. Extract as JSON."}]
ASKS: Any = [{"role": "user", "content": "What is the weather in Paris? Use the tool."}]
PNG = base64.b64decode(  # a red square
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAEklEQVR4nGP4z8CAFWEXHbQSACj/P8Fu7N9hAAAAAElFTkSuQmCC"
)
GREEDY: Any = {"temperature": 0, "num_predict": 100}


class Person(BaseModel):
    name: str
    age: int


def weather(city: str) -> str:
    """The weather in a city.

    Args:
        city: The name of the city.
    """
    return f"It rains in {city}."


TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture(scope="module")
def client() -> Client:
    return Client(ADDRESS)


@pytest.fixture(scope="module")
def embedder() -> Client:
    return Client(EMBEDDER)


@pytest.fixture(scope="module")
def seeing() -> Client:
    return Client(SEEING)


@pytest.fixture
def aclient() -> AsyncClient:
    return AsyncClient(ADDRESS)


def check_counts(answer: Any) -> None:
    """What Ollama reports with the end of an answer: counts of tokens, and durations in nanoseconds."""
    assert answer.done is True
    assert answer.prompt_eval_count > 0
    assert answer.eval_count > 0
    assert answer.total_duration >= answer.eval_duration > 0
    assert answer.prompt_eval_duration > 0


# ---- chat ------------------------------------------------------------------------------------------------------------


def test_chat(client: Client) -> None:
    answer = client.chat("qwen", HELLO, options=GREEDY)
    assert (answer.model, answer.message.role, answer.done_reason) == ("qwen", "assistant", "stop")
    assert answer["message"]["content"] == answer.message.content != ""
    assert answer.created_at
    check_counts(answer)


def test_chat_of_a_stream_is_the_whole_answer(client: Client) -> None:
    whole = client.chat("qwen", HELLO, options=GREEDY)
    chunks = list(client.chat("qwen", HELLO, options=GREEDY, stream=True))
    assert "".join(chunk.message.content or "" for chunk in chunks) == whole.message.content
    assert [chunk.done for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].done_reason == "stop"
    assert chunks[-1].eval_count == whole.eval_count
    check_counts(chunks[-1])


async def test_chat_asynchronous(aclient: AsyncClient) -> None:
    whole = await aclient.chat("qwen", HELLO, options=GREEDY)
    chunks = [chunk async for chunk in await aclient.chat("qwen", HELLO, options=GREEDY, stream=True)]
    assert "".join(chunk.message.content or "" for chunk in chunks) == whole.message.content != ""


def test_chat_goes_on(client: Client) -> None:
    said: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "My name is Bob."}]
    first = client.chat("qwen", said, options=GREEDY)
    second = client.chat(
        "qwen", [*said, first.message, {"role": "user", "content": "What is my name?"}], options=GREEDY
    )
    assert "Bob" in (second.message.content or "")
    assert (second.prompt_eval_count or 0) > (first.prompt_eval_count or 0)


def test_chat_options(client: Client) -> None:
    count: Any = [{"role": "user", "content": "Count from 1 to 9, separated by commas."}]
    cut = client.chat("qwen", count, options={"num_predict": 3})
    assert (cut.done_reason, cut.eval_count) == ("length", 3)
    stopped = client.chat("qwen", count, options=ollama.Options(temperature=0, num_predict=40, stop=["4"]))
    assert stopped.done_reason == "stop"
    assert "3" in (stopped.message.content or "")
    assert "4" not in (stopped.message.content or "")
    drawn: Any = {"seed": 7, "temperature": 1.5, "top_k": 50, "top_p": 0.9, "num_predict": 20, "repeat_penalty": 1.1}
    first, second = (client.chat("qwen", HELLO, options=drawn).message.content for _ in range(2))
    assert first == second


def test_chat_log_probabilities(client: Client) -> None:
    answer = client.chat("qwen", HELLO, options=GREEDY, logprobs=True, top_logprobs=3)
    assert answer.logprobs
    assert "".join(each.token for each in answer.logprobs) == answer.message.content
    for each in answer.logprobs:
        assert each.logprob <= 0
        assert each.top_logprobs
        assert len(each.top_logprobs) == 3
        assert each.top_logprobs[0].token == each.token


# ---- tools -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", [weather, TOOL], ids=["function", "schema"])
def test_tool(client: Client, tool: Any) -> None:
    (call,) = client.chat("qwen", ASKS, tools=[tool], options=GREEDY).message.tool_calls or []
    assert call.function.name == "weather"
    assert "Paris" in weather(**call.function.arguments)


def test_tool_in_a_stream(client: Client) -> None:
    chunks = list(client.chat("qwen", ASKS, tools=[weather], options=GREEDY, stream=True))
    (call,) = [call for chunk in chunks for call in chunk.message.tool_calls or ()]
    assert (call.function.name, list(call.function.arguments)) == ("weather", ["city"])
    assert chunks[-1].done


async def test_tool_asynchronous(aclient: AsyncClient) -> None:
    (call,) = (await aclient.chat("qwen", ASKS, tools=[weather], options=GREEDY)).message.tool_calls or []
    assert call.function.name == "weather"
    assert "Paris" in call.function.arguments["city"]


def test_tool_and_its_result(client: Client) -> None:
    first = client.chat("qwen", ASKS, tools=[weather], options=GREEDY).message
    (call,) = first.tool_calls or []
    result = {"role": "tool", "tool_name": "weather", "content": weather(**call.function.arguments)}
    second = client.chat("qwen", [*ASKS, first, result], options=GREEDY)
    assert "rain" in (second.message.content or "").lower()


# ---- formats ---------------------------------------------------------------------------------------------------------


def test_format_json(client: Client) -> None:
    answer = client.chat("qwen", ASKED, format="json", options=GREEDY)
    assert isinstance(json.loads(answer.message.content or ""), dict)


def test_format_of_a_schema(client: Client) -> None:
    answer = client.chat("qwen", ASKED, format=Person.model_json_schema(), options=GREEDY)
    assert Person.model_validate_json(answer.message.content or "") == Person(name="Bob", age=41)


async def test_format_of_a_schema_in_a_stream(aclient: AsyncClient) -> None:
    stream = await aclient.chat("qwen", ASKED, format=Person.model_json_schema(), options=GREEDY, stream=True)
    text = "".join([chunk.message.content or "" async for chunk in stream])
    assert Person.model_validate_json(text) == Person(name="Bob", age=41)


# ---- thinking --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("think", [True, "high"])
def test_think_with_a_model_that_cannot(client: Client, think: Any) -> None:
    with pytest.raises(ResponseError, match="think") as found:
        client.chat("qwen", HELLO, think=think)
    assert found.value.status_code == 400


def test_think_off_and_thoughts_of_the_past(client: Client) -> None:
    said: Any = [*HELLO, {"role": "assistant", "thinking": "A greeting.", "content": "Hello!"}, *HELLO]
    answer = client.chat("qwen", said, think=False, options=GREEDY)
    assert answer.message.content
    assert not answer.message.thinking


# ---- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bytes", "path", "base64"])
def test_image(seeing: Client, tmp_path: Path, kind: str) -> None:
    (tmp_path / "red.png").write_bytes(PNG)
    image = {"bytes": PNG, "path": str(tmp_path / "red.png"), "base64": base64.b64encode(PNG).decode()}[kind]
    settings: Any = {"options": {"temperature": 0, "num_predict": 8}}
    bare = seeing.chat("seeing", HELLO, **settings)
    seen = seeing.chat("seeing", [{**HELLO[0], "images": [image]}], **settings)
    assert seen.eval_count
    assert (seen.prompt_eval_count or 0) > (bare.prompt_eval_count or 0) + 8
    generated = seeing.generate("seeing", "Say hello.", images=[image], **settings)
    assert generated.response == seen.message.content


def test_image_for_a_model_of_texts(client: Client) -> None:
    with pytest.raises(ResponseError, match="image") as found:
        client.generate("qwen", "What is this?", images=[PNG])
    assert found.value.status_code == 400


def test_image_that_is_none(seeing: Client) -> None:
    with pytest.raises(ResponseError) as found:
        seeing.generate("seeing", "What is this?", images=[b"no image"])
    assert found.value.status_code == 400


# ---- generate --------------------------------------------------------------------------------------------------------


def test_generate(client: Client) -> None:
    answer = client.generate("qwen", "Say hello.", options=GREEDY)
    assert (answer.model, answer.done_reason) == ("qwen", "stop")
    assert answer["response"] == client.chat("qwen", HELLO, options=GREEDY).message.content != ""
    check_counts(answer)


def test_generate_of_a_stream_is_the_whole_answer(client: Client) -> None:
    whole = client.generate("qwen", "Say hello.", options=GREEDY)
    chunks = list(client.generate("qwen", "Say hello.", options=GREEDY, stream=True))
    assert "".join(chunk.response or "" for chunk in chunks) == whole.response
    assert chunks[-1].context == whole.context
    check_counts(chunks[-1])


async def test_generate_asynchronous(aclient: AsyncClient) -> None:
    whole = await aclient.generate("qwen", "Say hello.", options=GREEDY)
    chunks = [chunk async for chunk in await aclient.generate("qwen", "Say hello.", options=GREEDY, stream=True)]
    assert "".join(chunk.response or "" for chunk in chunks) == whole.response != ""


def test_generate_with_a_context(client: Client) -> None:
    first = client.generate("qwen", "My name is Bob.", system="Be brief.", options=GREEDY)
    assert first.context
    second = client.generate("qwen", "What is my name?", context=first.context, options=GREEDY)
    assert "Bob" in (second.response or "")


def test_generate_raw(client: Client) -> None:
    answer = client.generate("qwen", "1, 2, 3,", raw=True, options={"temperature": 0, "num_predict": 8})
    assert "4" in (answer.response or "")
    assert answer.done_reason == "length"


def test_generate_with_a_suffix(client: Client) -> None:
    answer = client.generate("qwen", "def add(a, b):\n    return a", suffix="\n\nprint(add(1, 2))", options=GREEDY)
    assert "b" in (answer.response or "")


def test_generate_a_schema(client: Client) -> None:
    answer = client.generate("qwen", ASKED[0]["content"], format=Person.model_json_schema(), options=GREEDY)
    assert Person.model_validate_json(answer.response or "") == Person(name="Bob", age=41)


def test_a_template_is_refused(client: Client) -> None:
    with pytest.raises(ResponseError, match="template") as found:
        client.generate("qwen", "Say hello.", template="{{ .Prompt }}")
    assert found.value.status_code == 400


def test_load_and_keep(client: Client) -> None:
    loaded = client.generate("qwen", keep_alive="5m")
    assert (loaded.done, loaded.done_reason, loaded.response) == (True, "load", "")
    loaded = client.chat("qwen", keep_alive=300)
    assert (loaded.done, loaded.done_reason, loaded.message.content) == (True, "load", "")
    assert client.generate("qwen", "Say hello.", keep_alive=-1, options=GREEDY).response


# ---- embeddings ------------------------------------------------------------------------------------------------------


def test_embed(embedder: Client) -> None:
    made = embedder.embed("minilm", ["a cat", "a kitten", "a car park"])
    cat, kitten, park = made.embeddings
    assert {len(vector) for vector in made.embeddings} == {384}
    assert sum(a * b for a, b in zip(cat, kitten, strict=True)) > sum(a * b for a, b in zip(cat, park, strict=True))
    assert sum(a * a for a in cat) == pytest.approx(1, abs=1e-4)
    assert made.prompt_eval_count
    assert made.total_duration
    (alone,) = embedder.embed("minilm", "a cat").embeddings
    assert alone == pytest.approx(cat, abs=1e-4)


async def test_embed_asynchronous() -> None:
    made = await AsyncClient(EMBEDDER).embed("minilm", ["a cat", "a car"])
    assert [len(vector) for vector in made.embeddings] == [384, 384]


def test_embed_a_text_that_is_too_long(embedder: Client) -> None:
    (vector,) = embedder.embed("minilm", "word " * 2000, truncate=True).embeddings
    assert len(vector) == 384
    with pytest.raises(ResponseError) as found:
        embedder.embed("minilm", "word " * 2000, truncate=False)
    assert found.value.status_code == 400


def test_embed_with_fewer_dimensions(embedder: Client) -> None:
    (whole,) = embedder.embed("minilm", "a cat").embeddings
    (short,) = embedder.embed("minilm", "a cat", dimensions=64).embeddings
    assert len(short) == 64
    length = sum(a * a for a in whole[:64]) ** 0.5
    assert short == pytest.approx([a / length for a in whole[:64]], abs=1e-4)


def test_embeddings(embedder: Client) -> None:
    vector = embedder.embeddings("minilm", "a cat").embedding
    (other,) = embedder.embed("minilm", "a cat").embeddings
    length = sum(a * a for a in vector) ** 0.5
    assert [a / length for a in vector] == pytest.approx(other, abs=1e-4)


# ---- models ----------------------------------------------------------------------------------------------------------


def test_list(client: Client) -> None:
    models = client.list().models
    assert [model.model for model in models] == ["qwen", "other"]
    for model in models:
        assert model.size
        assert model.digest
        assert model.modified_at
        assert model.details
        assert model.details.family


def test_show(client: Client) -> None:
    shown = client.show("qwen")
    assert {"completion", "tools"} <= set(shown.capabilities or ())
    assert shown.details
    assert shown.details.parameter_size
    family = (shown.modelinfo or {})["general.architecture"]
    assert (shown.modelinfo or {})[f"{family}.context_length"] > 0
    assert shown.template
    assert shown.modelfile


def test_show_what_a_model_can(embedder: Client, seeing: Client) -> None:
    assert "embedding" in (embedder.show("minilm").capabilities or ())
    assert "vision" in (seeing.show("seeing").capabilities or ())


def test_show_of_a_name_that_is_not_there(client: Client) -> None:
    with pytest.raises(ResponseError, match="nope") as found:
        client.show("nope:1b")
    assert found.value.status_code == 404


def test_ps(client: Client) -> None:
    client.generate("qwen")
    (model,) = client.ps().models
    assert model.model == model.name == "qwen"
    assert model.context_length == 8192
    assert model.size
    assert model.expires_at


async def test_models_asynchronous(aclient: AsyncClient) -> None:
    assert [model.model for model in (await aclient.list()).models] == ["qwen", "other"]
    assert [model.model for model in (await aclient.ps()).models] == ["qwen"]
    assert "completion" in ((await aclient.show("other:latest")).capabilities or ())


# ---- errors ----------------------------------------------------------------------------------------------------------


WET: Any = {"wet": {"type": "noul", "instructions": "Is it wet?"}}
CHANGES: dict[str, tuple[Callable[[Client], Any], int]] = {
    "pull": (lambda client: client.pull("qwen3:0.6b"), 403),
    "pull in a stream": (lambda client: list(client.pull("qwen3:0.6b", stream=True)), 403),
    "copy": (lambda client: client.copy("qwen", "mine"), 403),
    "delete": (lambda client: client.delete("qwen"), 403),
    "push": (lambda client: client.push("qwen"), 404),
    "create": (lambda client: client.create("mine", from_="qwen", system="Be brief."), 404),
    "create_blob": (lambda client: client.create_blob(__file__), 404),
    "systemone": (lambda client: client.systemone("qwen", "It rains.", WET), 404),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_no_client_may_do(client: Client, name: str) -> None:
    change, status = CHANGES[name]
    with pytest.raises(ResponseError) as found:
        change(client)
    assert found.value.status_code == status
    assert found.value.error
    assert [model.model for model in client.list().models] == ["qwen", "other"]


def test_errors(client: Client) -> None:
    wrong: Any = ({"options": {"temperature": -1}}, {"options": {"num_predict": "many"}}, {"top_logprobs": 1000})
    for settings in wrong:
        with pytest.raises(ResponseError) as found:
            client.chat("qwen", HELLO, **settings)
        assert found.value.status_code == 400
        assert next(iter(settings.get("options", settings))) in found.value.error


@pytest.mark.parametrize("stream", [False, True])
def test_prompt_that_is_too_long(client: Client, stream: bool) -> None:
    with pytest.raises(ResponseError, match="context") as found:
        list(client.chat("qwen", [{"role": "user", "content": "word " * 20_000}], stream=stream))
    assert found.value.status_code == 400


async def test_errors_asynchronous(aclient: AsyncClient) -> None:
    with pytest.raises(ResponseError) as found:
        await aclient.show("nope:1b")
    assert found.value.status_code == 404
    with pytest.raises(ResponseError) as found:
        await aclient.chat("qwen", HELLO, options={"temperature": -1})
    assert found.value.status_code == 400


def test_the_address_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", ADDRESS)
    monkeypatch.setenv("OLLAMA_API_KEY", hashlib.sha256(b"any").hexdigest())
    assert Client().chat("qwen", HELLO, options=GREEDY).message.content
