# SPDX-License-Identifier: MIT
"""Requests whose fault is found by a real model: its vocabulary, its context, its grammars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from candle_vllm.server.settings import Settings
from candle_vllm.server.settings.derived import demo_model, load_engine
from packages.server.tests.wrong_requests.rows import Route, Row, changed

CONTEXT = 512
FAR = 1 << 30  # a token id beyond every vocabulary
WORDS = "word " * 2 * CONTEXT


def schema(value: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": value}}


SHARED = [
    Row("logit_bias", {str(FAR): 1}),
    Row("allowed_token_ids", [FAR]),
    Row("stop_token_ids", [FAR]),
    Row("min_tokens", CONTEXT),
    Row("response_format", schema({"$ref": "#"}), "response_format.json_schema.schema"),
    Row("response_format", schema({"type": "string", "pattern": "(a"}), "response_format.json_schema.schema"),
    Row("structured_outputs", {"grammar": 'start: "a" other'}, "structured_outputs.grammar"),
]
ROUTES = [
    Route(
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
        [
            *SHARED,
            Row("max_tokens", CONTEXT),
            Row("max_completion_tokens", CONTEXT, "max_tokens"),
            Row("messages.0.content", WORDS, "messages"),
            Row("chat_template", "{{ 1 }}"),
        ],
    ),
    Route(
        "/v1/completions",
        {"prompt": "Hi", "max_tokens": 2},
        [
            *SHARED,
            Row("max_tokens", CONTEXT),
            Row("prompt", WORDS),
            Row("prompt", [1, FAR]),
            Row("prompt", [1] * CONTEXT),
        ],
    ),
    Route("/detokenize", {"tokens": [1]}, [Row("tokens", [1, FAR], "tokens.1")]),
    Route("/tokenize", {"prompt": "Hi"}, [Row("prompt", "x" * 1_000_000)]),
]


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    model = demo_model()
    if model is None:
        pytest.skip("the demo model is not installed")
    with load_engine(Settings(model=str(model), max_model_len=CONTEXT, mem=64)) as engine:
        yield engine


@pytest.fixture
def client(start: Callable[..., Any], engine: Any) -> Iterator[httpx.Client]:
    with start(engine, strict_model_names=True).http() as client:
        yield client


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
def test_each_is_refused_by_name(client: httpx.Client, route: Route) -> None:
    assert client.post(route.path, json=route.right).status_code == 200
    for row in route.rows:
        answer = client.post(route.path, json=changed(route.right, row), timeout=60)
        assert answer.status_code == 400, f"{row}: {answer.text[:300]}"
        assert answer.json()["error"]["param"] == row.blamed, f"{row}: {answer.text[:300]}"


def test_tokens_there_and_back(client: httpx.Client) -> None:
    made = client.post("/tokenize", json={"prompt": " Héllo <|im_end|>", "return_token_strs": True}).json()
    assert made["count"] == len(made["tokens"]) == len(made["token_strs"])
    assert made["max_model_len"] == CONTEXT
    assert client.post("/detokenize", json={"tokens": made["tokens"]}).json()["prompt"] == " Héllo <|im_end|>"
    assert made["token_strs"][0].startswith("Ġ")  # as in the vocabulary
    assert made["token_strs"][-1] == "<|im_end|>"
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    counted = client.post("/tokenize", json=body).json()
    usage = client.post("/v1/chat/completions", json={**body, "max_tokens": 1}).json()["usage"]
    assert counted["count"] == usage["prompt_tokens"]
