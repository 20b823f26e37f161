# SPDX-License-Identifier: MIT
"""`/metrics` and `/v1/usage` over HTTP: sums are those that clients saw, gauges come back to zero."""

from __future__ import annotations

from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from packages.server.tests.server_fakes import PacedEngine

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}


def _samples(client: httpx.Client) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            handler = sample.labels.get("handler")
            found[sample.name + (f",{handler}" if handler else "")] = sample.value
    return found


def test_sums_are_those_of_usage(start) -> None:
    running = start(PacedEngine("Hello there", num_cached_tokens=2), api_key=("one", "two"))
    totals = {"prompt_tokens": 0, "completion_tokens": 0}
    cached = 0
    for key in ("one", "two", "two"):
        with running.http(headers={"authorization": f"Bearer {key}"}) as client:
            for body in (CHAT, {**CHAT, "n": 3}):
                usage = client.post("/v1/chat/completions", json=body).json()["usage"]
                cached += usage["prompt_tokens_details"]["cached_tokens"]
                for name in totals:
                    totals[name] += usage[name]
    with running.http(headers={"authorization": "Bearer one"}) as client:
        samples = _samples(client)
        assert samples["vllm:prompt_tokens_total"] == totals["prompt_tokens"]
        assert samples["vllm:generation_tokens_total"] == totals["completion_tokens"]
        assert samples["vllm:prefix_cache_hits_total"] == cached
        assert samples["vllm:num_requests_running"] == samples["vllm:num_requests_waiting"] == 0
        rows = {row["key"]: row["counts"] for row in client.get("/v1/usage").json()["data"]}
    assert set(rows) == {"1", "2"}
    for name in totals:
        assert sum(row[name] for row in rows.values()) == totals[name]
    assert (rows["1"]["requests"], rows["2"]["requests"]) == (2, 4)


def test_requests_are_counted_by_route_and_status(start) -> None:
    with start().http() as client:
        client.post("/v1/chat/completions", json=CHAT)
        client.post("/v1/chat/completions", json={})
        client.get("/some/path/that/is/not")
        samples = _samples(client)
    assert samples["http_requests_total,/v1/chat/completions"] >= 1
    assert samples["http_requests_total,none"] == 1
    assert not any("some" in name for name in samples)


def test_a_completion_that_only_scores_its_prompt_generates_nothing(start) -> None:
    with start().http() as client:
        body = {"prompt": "abc", "max_tokens": 0, "echo": True}
        usage = client.post("/v1/completions", json=body).json()["usage"]
        samples = _samples(client)
    assert usage["completion_tokens"] == samples["vllm:generation_tokens_total"] == 0
    assert samples["vllm:prompt_tokens_total"] == usage["prompt_tokens"]
