# SPDX-License-Identifier: MIT
"""LlamaIndex by its models (OpenAILike with both APIs, Ollama) and by its embeddings, with an index of documents."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import ollama
import openai
import pytest
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.ollama import OllamaEmbedding
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.ollama import Ollama
from llama_index.llms.openai_like import OpenAILike, OpenAILikeResponses
from pydantic import BaseModel

ADDRESS, EMBEDDER, SEEING = (os.environ[f"SUITE_{name}"] for name in ("ADDRESS", "EMBEDDER", "SEEING"))
OPENAI: Any = {"model": "qwen", "api_base": f"{ADDRESS}/v1", "api_key": "none", "max_retries": 0, "temperature": 0,
               "context_window": 8192, "is_function_calling_model": True}  # fmt: skip
MODELS: dict[str, Callable[[], Any]] = {
    "chat": lambda: OpenAILike(**OPENAI, is_chat_model=True, max_tokens=200, should_use_structured_outputs=True),
    "responses": lambda: OpenAILikeResponses(**OPENAI, max_output_tokens=200),
    "ollama": lambda: Ollama(model="qwen", base_url=ADDRESS, temperature=0, additional_kwargs={"num_predict": 200},
                             context_window=8192),
}  # fmt: skip
EMBEDDINGS: dict[str, Callable[[], Any]] = {
    "openai": lambda: OpenAILikeEmbedding("minilm", api_base=f"{EMBEDDER}/v1", api_key="none", max_retries=0),
    "ollama": lambda: OllamaEmbedding("minilm", base_url=EMBEDDER),
}
HELLO = [ChatMessage(role="user", content="Say hello.")]
ASKS = "What is the weather in Paris? Use the tool."
EXTRACT = PromptTemplate("{text} Extract as JSON.")
TEXT = "Bob is 41 years old."


class Person(BaseModel):
    """A person."""

    name: str
    age: int


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


@pytest.fixture(params=EMBEDDINGS)
def embedding(request: pytest.FixtureRequest) -> Any:
    return EMBEDDINGS[request.param]()


def weather_tool(asked: list[str]) -> FunctionTool:
    def weather(city: str) -> str:
        """The weather in a city."""
        asked.append(city)
        return f"It rains in {city}."

    return FunctionTool.from_defaults(weather)


# ---- answers ---------------------------------------------------------------------------------------------------------


def test_complete(model: Any) -> None:
    answer = model.complete("Say hello.")
    assert answer.text
    assert answer.text == model.chat(HELLO).message.content


def test_stream_complete(model: Any) -> None:
    whole = model.complete("Say hello.")
    chunks = list(model.stream_complete("Say hello."))
    assert "".join(chunk.delta or "" for chunk in chunks) == whole.text
    assert chunks[-1].text == whole.text


def test_chat(model: Any) -> None:
    said = [ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content="My name is Bob.")]
    first = model.chat(said)
    assert first.message.role == "assistant"
    assert first.message.content
    said += [first.message, ChatMessage(role="user", content="What is my name?")]
    assert "Bob" in model.chat(said).message.content


def test_stream_chat(model: Any) -> None:
    whole = model.chat(HELLO)
    chunks = list(model.stream_chat(HELLO))
    assert "".join(chunk.delta or "" for chunk in chunks) == whole.message.content
    assert chunks[-1].message.content == whole.message.content


async def test_asynchronous(model: Any) -> None:
    whole = await model.achat(HELLO)
    assert whole.message.content
    assert (await model.acomplete("Say hello.")).text == whole.message.content
    chunks = [chunk async for chunk in await model.astream_chat(HELLO)]
    assert "".join(chunk.delta or "" for chunk in chunks) == whole.message.content


# ---- tools -----------------------------------------------------------------------------------------------------------


def test_tool(model: Any) -> None:
    answer = model.chat_with_tools([weather_tool([])], user_msg=ASKS)
    (call,) = model.get_tool_calls_from_response(answer)
    assert (call.tool_name, list(call.tool_kwargs)) == ("weather", ["city"])
    assert "Paris" in call.tool_kwargs["city"]


def test_tool_in_a_stream(model: Any) -> None:
    last = list(model.stream_chat_with_tools([weather_tool([])], user_msg=ASKS))[-1]
    (call,) = model.get_tool_calls_from_response(last)
    assert call.tool_name == "weather"
    assert "Paris" in call.tool_kwargs["city"]


def test_predict_and_call(model: Any) -> None:
    asked: list[str] = []
    result = model.predict_and_call([weather_tool(asked)], user_msg=ASKS)
    assert "Paris" in asked[0]
    assert str(result) == f"It rains in {asked[0]}."


def test_tool_and_its_result(model: Any) -> None:
    tool = weather_tool([])
    first = model.chat_with_tools([tool], user_msg=ASKS)
    (call,) = model.get_tool_calls_from_response(first)
    result = ChatMessage(
        role="tool", content=str(tool(**call.tool_kwargs)),
        additional_kwargs={"tool_call_id": call.tool_id, "tool_name": "weather"},
    )  # fmt: skip
    second = model.chat([ChatMessage(role="user", content=ASKS), first.message, result])
    assert "rain" in second.message.content.lower()


async def test_agent(model: Any) -> None:
    asked: list[str] = []
    tool = weather_tool(asked)
    tool.metadata.return_direct = True
    answer = await FunctionAgent(tools=[tool], llm=model, system_prompt="Be brief.").run(ASKS)
    assert "Paris" in asked[0]
    assert "rain" in str(answer).lower()


# ---- structured output -----------------------------------------------------------------------------------------------


def test_structured_predict(model: Any) -> None:
    assert model.structured_predict(Person, EXTRACT, text=TEXT) == Person(name="Bob", age=41)


async def test_structured_predict_asynchronous(model: Any) -> None:
    assert await model.astructured_predict(Person, EXTRACT, text=TEXT) == Person(name="Bob", age=41)


def test_structured_predict_in_a_stream(model: Any) -> None:
    last: Any = list(model.stream_structured_predict(Person, EXTRACT, text=TEXT))[-1]
    assert (last.name, last.age) == ("Bob", 41)


def test_structured_model(model: Any) -> None:
    asked = [ChatMessage(role="user", content=f"{TEXT} Extract as JSON.")]
    assert model.as_structured_llm(Person).chat(asked).raw == Person(name="Bob", age=41)


# ---- what one API has ------------------------------------------------------------------------------------------------


def test_completions() -> None:
    model: Any = OpenAILike(**OPENAI, is_chat_model=False, max_tokens=8)
    whole = model.complete("1, 2, 3,")
    assert "4" in whole.text
    assert "".join(chunk.delta for chunk in model.stream_complete("1, 2, 3,")) == whole.text
    assert whole.raw.usage.completion_tokens == 8


def test_usage() -> None:
    chat = MODELS["chat"]().chat(HELLO).additional_kwargs
    assert chat["prompt_tokens"] + chat["completion_tokens"] == chat["total_tokens"]
    told = MODELS["ollama"]().chat(HELLO).raw["usage"]
    assert told == chat


def test_what_ollama_tells_of_a_model() -> None:
    assert Ollama(model="qwen", base_url=ADDRESS).get_context_window() == 8192


def test_last_response_goes_on() -> None:
    model: Any = OpenAILikeResponses(**OPENAI, max_output_tokens=60, track_previous_responses=True)
    model.chat([ChatMessage(role="user", content="My name is Bob.")])
    assert "Bob" in model.chat([ChatMessage(role="user", content="What is my name?")]).message.content


def test_image() -> None:
    dot = b"iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAEklEQVR4nGP4z8CAFWEXHbQSACj/P8Fu7N9hAAAAAElFTkSuQmCC"
    settings: Any = {**OPENAI, "model": "seeing", "api_base": f"{SEEING}/v1"}
    model: Any = OpenAILike(**settings, is_chat_model=True, max_tokens=8)
    text = TextBlock(text="What is this?")
    bare = model.chat([ChatMessage(role="user", blocks=[text])])
    seen = model.chat([ChatMessage(role="user", blocks=[ImageBlock(image=dot, image_mimetype="image/png"), text])])
    assert seen.raw.usage.prompt_tokens > bare.raw.usage.prompt_tokens + 8


@pytest.mark.parametrize("name", ["chat", "responses"])
def test_errors(name: str) -> None:
    model = MODELS[name]()
    with pytest.raises(openai.BadRequestError) as found:
        model.complete("Say hello.", temperature=-1)
    assert found.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as found:
        model.complete("word " * 20_000)
    assert found.value.code == "context_length_exceeded"


def test_errors_of_ollama() -> None:
    with pytest.raises(ollama.ResponseError) as found:
        MODELS["ollama"]().complete("word " * 20_000)
    assert found.value.status_code == 400


# ---- embeddings ------------------------------------------------------------------------------------------------------


def test_embedding(embedding: Any) -> None:
    cat, kitten, park = embedding.get_text_embedding_batch(["a cat", "a kitten", "a car park"])
    assert len(cat) == 384
    assert embedding.similarity(cat, kitten) > embedding.similarity(cat, park)
    assert embedding.get_text_embedding("a cat") == pytest.approx(cat, abs=1e-4)
    assert embedding.get_query_embedding("a cat") == pytest.approx(cat, abs=1e-4)


async def test_embedding_asynchronous(embedding: Any) -> None:
    made = await embedding.aget_text_embedding_batch(["a cat", "a kitten"])
    assert [len(vector) for vector in made] == [384, 384]
    assert await embedding.aget_query_embedding("a cat") == pytest.approx(made[0], abs=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_index(embedding: Any, name: str) -> None:
    texts = ["Bob lives in Paris.", "The cat sleeps on the roof.", "Gold is a metal."]
    index = VectorStoreIndex.from_documents([Document(text=text) for text in texts], embed_model=embedding)
    (found,) = index.as_retriever(similarity_top_k=1).retrieve("Where does the cat sleep?")
    assert found.text == texts[1]
    answer = index.as_query_engine(llm=MODELS[name](), similarity_top_k=1).query("Where does the cat sleep?")
    assert "roof" in str(answer)
