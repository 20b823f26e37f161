# SPDX-License-Identifier: MIT
"""Anthropic's API over HTTP, with the official client: whole, streamed, counted, and how it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anthropic
import pytest

from candle_vllm.core.errors import EngineOverloadedError, ModelLoadError
from candle_vllm.server import Settings
from candle_vllm.server.models.manager import ModelManager
from candle_vllm.server.settings.catalogue import Catalogue, ModelEntry
from packages.server.tests.server_fakes import FakeLoader, PacedEngine
from tests.trusted import trusted

ASK: dict[str, Any] = {"max_tokens": 50, "messages": [{"role": "user", "content": "Hi"}], "model": "scripted"}


@contextmanager
def _client(running: Any, key: str = "none") -> Iterator[anthropic.Anthropic]:
    http = anthropic.DefaultHttpxClient(trust_env=False, verify=trusted())
    with anthropic.Anthropic(base_url=running.url, api_key=key, max_retries=0, http_client=http) as client:
        yield client


def test_whole_and_streamed_are_the_same(start) -> None:
    with _client(start(PacedEngine("Good day!"))) as client:
        whole = client.messages.create(**ASK)
        with client.messages.stream(**ASK) as stream:
            pieces = list(stream.text_stream)
            streamed = stream.get_final_message()
    assert whole.content[0].text == "".join(pieces) == streamed.content[0].text == "Good day!"  # type: ignore[union-attr]
    assert (whole.stop_reason, whole.usage.output_tokens) == (streamed.stop_reason, streamed.usage.output_tokens)


def test_counts_are_those_of_the_answer(start) -> None:
    with _client(start()) as client:
        counted = client.messages.count_tokens(model="scripted", messages=ASK["messages"])
        usage = client.messages.create(**ASK).usage
        assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_the_client_s_own_header_carries_the_key(start) -> None:
    running = start(api_key=("right",))
    with _client(running, "right") as client:
        assert client.messages.create(**ASK).role == "assistant"
    with _client(running, "wrong") as client, pytest.raises(anthropic.AuthenticationError) as refusal:
        client.messages.create(**ASK)
    assert refusal.value.body["error"]["type"] == "authentication_error"  # type: ignore[index]


@pytest.mark.parametrize(
    ("change", "kind", "param"),
    [
        ({"max_tokens": 0}, anthropic.BadRequestError, "max_tokens"),
        ({"model": "other"}, anthropic.NotFoundError, "model"),
        ({"messages": [{"role": "user", "content": 3}]}, anthropic.BadRequestError, "messages.0.content"),
        ({"extra_body": {"max_token": 3}}, anthropic.BadRequestError, "max_token"),
    ],
)
def test_wrong_requests_in_anthropic_s_envelope(start, change: Any, kind: type[Exception], param: str) -> None:
    with _client(start(strict_model_names=True)) as client, pytest.raises(kind) as refusal:
        client.messages.create(**{**ASK, **change})
    error = refusal.value.body  # type: ignore[attr-defined]
    assert (error["type"], error["error"]["param"]) == ("error", param)
    assert error["request_id"]


def test_the_server_s_own_refusals_in_anthropic_s_envelope(start) -> None:
    running = start(PacedEngine(submit_error=EngineOverloadedError("full")), max_body_mb=1)
    with running.http() as client:
        for response, status, kind in [
            (client.get("/v1/messages"), 405, "invalid_request_error"),
            (client.post("/v1/messages/nothing"), 404, "not_found_error"),
            (client.post("/v1/messages", content=b"{}"), 415, "invalid_request_error"),
            (client.post("/v1/messages", json={"x": "y" * (2 << 20)}), 413, "request_too_large"),
            (client.post("/v1/messages", json=ASK), 529, "overloaded_error"),
        ]:
            body = response.json()
            assert (response.status_code, body["type"], body["error"]["type"]) == (status, "error", kind)


def test_a_model_that_cannot_be_loaded(start) -> None:
    loader = FakeLoader()
    loader.broken["scripted"] = ModelLoadError("broken")
    manager = ModelManager(Catalogue([ModelEntry("scripted", Settings())]), loader)
    with start(manager).http() as client:
        response = client.post("/v1/messages", json=ASK)
    assert (response.status_code, response.json()["error"]["type"]) == (503, "api_error")


def test_a_stream_that_fails_ends_with_an_error_event(start) -> None:
    with start(PacedEngine("abcdef", fail_after=3)).http() as client:
        text = client.post("/v1/messages", json={**ASK, "stream": True}).text
    assert text.rstrip().split("\n\n")[-1].startswith("event: error\ndata: {")
    assert "message_stop" not in text
    assert "[DONE]" not in text


def test_sampling_defaults_of_the_operator_count(start) -> None:
    running = start(temperature=0.25)
    with _client(running) as client:
        client.messages.create(**ASK)
        client.messages.create(**ASK, extra_body={"temperature": 0.75})
    assert [request.params.temperature for request in running.engine.requests] == [0.25, 0.75]
