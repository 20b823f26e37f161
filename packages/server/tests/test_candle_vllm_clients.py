# SPDX-License-Identifier: MIT
"""What candle-vllm's three example programs send, as they send it: they run unchanged.

A chat on a terminal that names no model, a program of the official client with the name of its author's model, and a
benchmark that calls every model "any".
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from packages.server.tests.server_fakes import PacedEngine

PIECES = ["Hel", "lo", "!"]


def test_the_program_of_the_official_client(start: Callable[..., Any]) -> None:
    client = start(PacedEngine(PIECES)).openai("EMPTY")
    asked: dict[str, Any] = {
        "model": "llama7b",
        "messages": [{"role": "user", "content": "Explain how to best learn Rust."}],
        "max_tokens": 64,
    }
    answer = client.chat.completions.create(**asked)
    assert (answer.model, answer.choices[0].message.content) == ("scripted", "Hello!")
    with client.chat.completions.create(**asked, stream=True) as stream:
        chunks = list(stream)
    assert {chunk.model for chunk in chunks} == {"scripted"}
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Hello!"


@pytest.mark.parametrize("thinking", [True, False])
def test_the_chat_on_a_terminal(start: Callable[..., Any], thinking: bool) -> None:
    engine = PacedEngine(PIECES)
    client = start(engine).openai("EMPTY")
    history: list[Any] = [{"role": "system", "content": "You are helpful."}]
    for turn in ("Hi", "And again"):
        history.append({"role": "user", "content": turn})
        with client.chat.completions.create(
            model="",
            messages=history,
            stream=True,
            max_tokens=64,
            temperature=0.7,
            top_p=0.9,
            frequency_penalty=0.1,
            presence_penalty=0.1,
            extra_body={"top_k": 40, "min_p": 0.05, "repeat_last_n": 64, "thinking": thinking},
        ) as stream:
            said = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
        assert said == "Hello!"
        history.append({"role": "assistant", "content": said})
    params = engine.requests[-1].params
    assert (params.top_k, params.min_p, params.repeat_last_n, params.frequency_penalty) == (40, 0.05, 64, 0.1)


def test_the_benchmark(start: Callable[..., Any]) -> None:
    engine = PacedEngine(PIECES)

    def ask(number: int) -> list[str]:
        body = {
            "model": "any",
            "messages": [{"role": "user", "content": f"{number} " + "word " * 64}],
            "max_tokens": 16,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            assert answer.status_code == 200
            return [line.removeprefix("data: ") for line in answer.iter_lines() if line]

    with start(engine).http(headers={"authorization": "Bearer EMPTY"}) as client, ThreadPoolExecutor(8) as pool:
        for events in pool.map(ask, range(8)):
            assert events[-1] == "[DONE]"
            usage = json.loads(events[-2])["usage"]
            assert usage["completion_tokens"] == 16  # "ignore_eos" is honoured
            assert usage["completion_time_costs"] >= 0
    assert len(engine.requests) == 8


def test_its_own_fields(start: Callable[..., Any]) -> None:
    body = {"model": "default", "messages": "Hi", "conversation_id": "c", "resource_id": "r", "max_tokens": 8}
    with start(PacedEngine(PIECES)).http() as client:
        answer = client.post("/v1/chat/completions", json=body).json()
        assert (answer["conversation_id"], answer["resource_id"], answer["model"]) == ("c", "r", "scripted")
        assert client.get("/v1/queues").json() == {"object": "list", "counts": {"scripted": 0}, "data": []}
        wrong = client.post("/v1/chat/completions", json={**body, "conversation_id": ""}).json()
        assert wrong["error"]["param"] == "conversation_id"
