# SPDX-License-Identifier: MIT
"""Vectors, scores and rankings over real connections: the official client, keys, limits and errors."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import openai
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

from candle_vllm.core.errors import EngineOverloadedError
from candle_vllm.openai.embedding import parse_embedding_request, parse_rerank_request, parse_score_request
from candle_vllm.openai.protocol.cohere import CohereEmbedRequest
from candle_vllm.server.answering import texts_of
from candle_vllm.server.app import create_app
from packages.server.tests.server_fakes import PacedEngine

TEXTS = ["one", "two", "three and four"]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"input": "a"},
    "/v1/score": {"text_1": "a", "text_2": "b"},
    "/score": {"text_1": "a", "text_2": ["b"]},
    "/v1/rerank": {"query": "a", "documents": ["b", "a"]},
    "/rerank": {"query": "a", "documents": [{"text": "b"}]},
    "/v2/rerank": {"query": "a", "documents": ["b"], "top_n": 1},
    "/reranking": {"query": "a", "documents": ["b"]},
}


def test_the_clients_own_default_gives_the_same_numbers(start: Callable[..., Any]) -> None:
    client = start(PacedEngine()).openai()
    packed = client.embeddings.create(model="scripted", input=TEXTS)
    plain = client.embeddings.create(model="scripted", input=TEXTS, encoding_format="float")
    assert [entry.embedding for entry in packed.data] == [entry.embedding for entry in plain.data]
    assert [entry.index for entry in plain.data] == [0, 1, 2]
    assert plain.usage.total_tokens == plain.usage.prompt_tokens == sum(len(text) + 1 for text in TEXTS)
    assert len(client.embeddings.create(model="scripted", input=[1, 2], dimensions=4).data[0].embedding) == 4


@pytest.mark.parametrize("path", BODIES)
def test_every_route_answers_and_needs_the_key(start: Callable[..., Any], path: str) -> None:
    with start(PacedEngine(), api_key=("secret",)).http() as client:
        assert client.post(path, json=BODIES[path]).status_code == 401
        answer = client.post(path, json=BODIES[path], headers={"authorization": "Bearer secret"})
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/json"
        assert client.get(path, headers={"authorization": "Bearer secret"}).status_code == 405


@pytest.mark.parametrize("path", BODIES)
def test_errors_are_in_the_envelope(start: Callable[..., Any], path: str) -> None:
    with start(PacedEngine(), strict_model_names=True).http() as client:
        for body, code in (
            (BODIES[path] | {"model": "other"}, "model_not_found"),
            (BODIES[path] | {"no_such_field": 1}, "unknown_parameter"),
            (BODIES[path] | {"additional_data": 1}, "unsupported_parameter"),
            ([], "invalid_body"),
        ):
            error = client.post(path, json=body).json()["error"]
            assert (error["code"], error["type"]) == (code, "invalid_request_error")
        assert client.post(path, content=b"{}").status_code == 415


def test_the_version_of_cohere_s_api_is_that_of_the_route() -> None:
    """Not of the path at which another application mounts this one."""
    with TestClient(Starlette(routes=[Mount("/v1/inner", app=create_app(PacedEngine()))])) as client:
        for version in ("1", "2"):
            answer = client.post(f"/v1/inner/v{version}/embed", json={"texts": ["a"], "input_type": "search_query"})
            assert answer.json()["meta"]["api_version"]["version"] == version


def test_a_full_engine_says_so(start: Callable[..., Any]) -> None:
    client = start(PacedEngine(submit_error=EngineOverloadedError("full"))).openai()
    with pytest.raises(openai.InternalServerError) as caught:
        client.embeddings.create(model="scripted", input="a")
    assert caught.value.status_code == 503


def test_what_is_too_long_names_its_place(start: Callable[..., Any]) -> None:
    client = start(PacedEngine(max_model_len=8)).openai()
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="scripted", input=["a", "b" * 20])
    assert (caught.value.param, caught.value.code) == ("input.1", "context_length_exceeded")


def test_an_embedding_model_does_not_chat(start: Callable[..., Any]) -> None:
    client = start(PacedEngine(tasks=("embed", "score"))).openai()
    for ask in (
        lambda: client.chat.completions.create(model="scripted", messages=[{"role": "user", "content": "Hi"}]),
        lambda: client.completions.create(model="scripted", prompt="Hi"),
    ):
        with pytest.raises(
            openai.BadRequestError, match=r"is an embedding model and generates no text: .*/v1/embeddings"
        ):
            ask()


def test_a_client_that_leaves_cancels_the_call(start: Callable[..., Any]) -> None:
    begun, cancelled = list[bool](), list[bool]()

    class Slow(PacedEngine):
        async def aembed(self, *args: Any, **options: Any) -> Any:
            try:
                begun.append(True)
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancelled.append(True)
                raise

    running = start(Slow())
    running.leave("/v1/embeddings", {"model": "scripted", "input": "a"}, lambda: begun)
    running.wait_for(lambda: cancelled)


@pytest.mark.parametrize(
    ("parse", "fields"),
    [
        (parse_score_request, {"queries": "q", "items": ["a"] * 9}),
        (parse_score_request, {"data_1": "q", "data_2": ["a"] * 9}),
        (parse_score_request, {"text_1": ["q"] * 9, "text_2": ["a"] * 9}),
        (parse_score_request, {"queries": "q", "documents": ["a"] * 9}),
        (parse_rerank_request, {"query": "q", "documents": ["a"] * 9}),
        (parse_embedding_request, {"input": ["a"] * 9}),
        (parse_embedding_request, {"input": [[1]] * 9}),
        (CohereEmbedRequest.model_validate, {"texts": ["a"] * 9}),
    ],
)
def test_every_text_of_a_request_is_a_sequence(parse: Any, fields: Any) -> None:
    assert texts_of(parse(fields)) == 9
    assert texts_of(parse_embedding_request({"input": [1] * 9})) == 1
