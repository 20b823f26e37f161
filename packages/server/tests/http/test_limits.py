# SPDX-License-Identifier: MIT
"""Requests and tokens per minute: what a key has used up is refused until it is filled up again, on every route."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import msgspec
import openai
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from candle_vllm.core.errors import EngineDeadError, ModelLoadError
from candle_vllm.server import Settings
from candle_vllm.server.http.errors import HttpError
from candle_vllm.server.http.limits import RateLimits, duration
from candle_vllm.server.http.routing import NOBODY, Caller
from candle_vllm.server.models.manager import ModelManager
from candle_vllm.server.openapi.document import RATE_LIMIT_HEADERS
from candle_vllm.server.settings.catalogue import Catalogue, ModelEntry
from candle_vllm.server.settings.options import Rate
from candle_vllm.server.settings.table import RATES
from packages.server.tests.running_server import Running
from packages.server.tests.server_fakes import FakeLoader, PacedEngine

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def _caller(label: str = "a", **limits: int) -> Caller:
    return Caller(label, "the key", {f"{unit}_per_minute": limit for unit, limit in limits.items()})


def test_requests_come_back_steadily() -> None:
    clock = Clock()
    limits, caller = RateLimits(clock=clock), _caller(requests=6)
    for _ in range(6):
        limits.admit(caller)
    with pytest.raises(HttpError, match="6 requests per minute") as refusal:
        limits.admit(caller)
    assert (refusal.value.status, refusal.value.code) == (429, "rate_limit_exceeded")
    assert refusal.value.headers == {"retry-after": "10"}
    clock.now += 10
    limits.admit(caller)
    with pytest.raises(HttpError):
        limits.admit(caller)


def test_a_request_that_is_refused_before_it_begins_does_not_count() -> None:
    limits, caller = RateLimits(clock=Clock()), _caller(requests=2)
    for failure in (HttpError(503, "full", "queue_full"), EngineDeadError("dead")) * 3:
        with pytest.raises(type(failure)), limits.counted(caller):
            raise failure
    for _ in range(2):
        with limits.counted(caller):
            pass
    with pytest.raises(HttpError, match="2 requests per minute"), limits.counted(caller):
        pass


def test_tokens_beyond_the_bucket_are_owed() -> None:
    clock = Clock()
    limits, caller = RateLimits(clock=clock), _caller(tokens=60)
    meter = limits.meter(caller)
    assert meter is not None
    meter.spend("tokens", 100)
    with pytest.raises(HttpError, match="60 tokens per minute") as refusal:
        limits.admit(caller)
    assert refusal.value.headers == {"retry-after": "41"}
    assert dict(meter.headers(clock.now))[b"x-ratelimit-remaining-tokens"] == b"0"
    clock.now += 41
    limits.admit(caller)


@given(st.integers(1, 50), st.lists(st.floats(0, 30), max_size=200))
@example(1, [1.897809938805155, 0.0])  # 60 seconds behind that are a little less in floats
def test_never_more_than_a_minutes_worth_and_what_has_come_since(limit: int, pauses: list[float]) -> None:
    clock, let_in = Clock(), 0
    limits, caller = RateLimits(clock=clock), _caller(requests=limit)
    for pause in pauses:
        clock.now += pause
        try:
            limits.admit(caller)
            let_in += 1
        except HttpError as refusal:
            clock.now += int(refusal.headers["retry-after"])
            limits.admit(caller)  # who waits as told is let in
            let_in += 1
        assert let_in <= limit + (clock.now - 1000) * limit / 60 + 1e-6


def test_keys_do_not_share_and_callers_without_one_do() -> None:
    limits = RateLimits({"requests_per_minute": 1})
    limits.admit(NOBODY)
    with pytest.raises(HttpError, match="This server allows 1 requests"):
        limits.admit(NOBODY)
    for label in "ab":
        limits.admit(_caller(requests=1, label=label))
    for _ in range(3):
        limits.admit(_caller())  # a key without limits


def test_only_limits_of_openai_have_names_without_their_window() -> None:
    assert RATES["tokens_per_minute"].label == "tokens"
    assert Rate("tokens", "day", 86400.0).label == "tokens-day"


def test_new_limits_of_a_name_begin_with_what_it_has_used() -> None:
    limits = RateLimits(clock=Clock())
    for _ in range(3):
        limits.admit(_caller(requests=4))
    for _ in range(5):
        limits.admit(_caller(requests=8))
    with pytest.raises(HttpError):
        limits.admit(_caller(requests=8))


def test_meters_of_keys_that_rest_are_let_go() -> None:
    clock = Clock()
    limits = RateLimits(clock=clock)
    for number in range(20_000):
        clock.now += 1
        limits.admit(_caller(requests=60, label=str(number)))
    assert len(limits._meters) <= 2048
    limits.admit(owing := _caller(tokens=1, label="owing"))
    limits.meter(owing).spend("tokens", 10**9)  # type: ignore[union-attr]
    for number in range(20_000):
        clock.now += 1
        limits.admit(_caller(requests=60, label=str(number)))
    with pytest.raises(HttpError):
        limits.admit(owing)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.0195, "20ms"), (1, "1s"), (8.64, "8.64s"), (59.999, "1m0s"), (60, "1m0s"), (864, "14m24s")],
)
def test_times_as_openai_writes_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# ---- over HTTP -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with a key `key-of-NAME` for each name: a few requests, few tokens, one of both, none."""
    path: Path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    names = dict.fromkeys(("chat", "messages", "completions", "responses", "mixed"), "{requests_per_minute: 2}")
    names |= dict.fromkeys(("whole", "streamed", "several", "background", "left"), "{tokens_per_minute: 12}")
    names |= {"free": "{requests_per_minute: null}", "ops": "{manages: true}"}
    rows = [f"- {{name: {name}, key: key-of-{name}, {more[1:]}" for name, more in names.items()]
    path.write_text("keys:\n" + "\n".join(rows))
    settings = Settings(port=0, api_keys_file=path, requests_per_minute=1000, tokens_per_minute=1_000_000)
    running = Running(PacedEngine(), settings)
    yield running
    running.stop()


def _post(client: httpx.Client, name: str, url: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
    return client.post(url, json=body or CHAT, headers={"authorization": f"Bearer key-of-{name}"})


ASKED = {
    "chat": ("/v1/chat/completions", CHAT),
    "messages": ("/v1/messages", {**CHAT, "model": "default"}),
    "completions": ("/v1/completions", {"prompt": "Hi", "max_tokens": 5}),
    "responses": ("/v1/responses", {"input": "Hi", "max_output_tokens": 5}),
}


@pytest.mark.parametrize("name", ASKED)
def test_the_third_request_is_refused_on_every_route(limited: Running, name: str) -> None:
    url, body = ASKED[name]
    with limited.http() as client:
        answers = [_post(client, name, url, **body) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["1", "0", "0"]
    assert answers[0].headers["x-ratelimit-limit-requests"] == "2"
    assert 25 <= int(answers[2].headers["retry-after"]) <= 30
    assert "'" + name + "' allows 2 requests per minute" in answers[2].json()["error"]["message"]


def test_routes_share_and_what_asks_no_model_is_free(limited: Running) -> None:
    with limited.http() as client:
        headers = {"authorization": "Bearer key-of-mixed"}
        for _ in range(3):
            told = client.get("/v1/models", headers=headers)
            assert told.headers["x-ratelimit-remaining-requests"] == "2"
        assert _post(client, "mixed", **CHAT, model="unknown").status_code in (200, 404)  # where one is all there is
        before = int(client.get("/v1/models", headers=headers).headers["x-ratelimit-remaining-requests"])
        assert _post(client, "mixed", **CHAT, temperature="hot").status_code == 400
        statuses = [_post(client, "mixed", *ASKED["completions"][:1], **ASKED["completions"][1]).status_code
                    for _ in range(before + 1)]  # fmt: skip
        assert statuses == [200] * before + [429]


def test_a_model_that_does_not_load_uses_nothing_up(tmp_path: Path, start: Callable[..., Running]) -> None:
    path, loader = tmp_path / "keys.yaml", FakeLoader()
    path.write_text("keys:\n- {name: chat, key: key-of-chat, requests_per_minute: 2}")
    settings = Settings(api_keys_file=path)
    loader.broken["scripted"] = ModelLoadError("no memory")
    running = start(ModelManager(Catalogue([ModelEntry("scripted", settings)]), loader), api_keys_file=path)
    with running.http() as client:
        for url, body in [*ASKED.values(), ("/v1/responses", {"input": "Hi", "background": True})]:
            answer = _post(client, "chat", url, **body)
            assert answer.status_code == 503
            assert answer.headers["x-ratelimit-remaining-requests"] == "2"


def _until_used_up(limited: Running, name: str, url: str, body: dict[str, Any]) -> int:
    """Asks until it is refused; the tokens of the answers by what the server counts."""
    with limited.http() as client:
        statuses = []
        while len(statuses) < 9 and 429 not in statuses:
            statuses.append(_post(client, name, url, **body).status_code)
        assert statuses[-1] == 429
        rows = client.get("/v1/usage", headers={"authorization": "Bearer key-of-ops"}).json()
    counts = next(row["counts"] for row in rows["data"] if row["key"] == name)
    return counts["prompt_tokens"] + counts["completion_tokens"]


@pytest.mark.parametrize(
    ("name", "url", "body"),
    [
        ("whole", "/v1/chat/completions", CHAT),
        ("streamed", "/v1/chat/completions", {**CHAT, "stream": True}),
        ("several", "/v1/completions", {"prompt": ["Hi", "Ho"], "max_tokens": 3, "n": 2}),
    ],
)
def test_tokens_are_those_of_the_answers(limited: Running, name: str, url: str, body: dict[str, Any]) -> None:
    used = _until_used_up(limited, name, url, body)
    meter = limited.server.config.app.state.limits._meters[name]  # type: ignore[union-attr]
    assert used >= 12
    (bucket,) = (each for each in meter.buckets if each.rate.unit == "tokens")
    assert bucket.level(bucket._at) == pytest.approx(12 - used, abs=3)  # a fifth of a token comes back every second


def test_a_response_in_the_background_is_refused_at_once(limited: Running) -> None:
    with limited.http() as client:
        asked = {"input": "Hi", "background": True, "max_output_tokens": 40}
        first = _post(client, "background", "/v1/responses", **asked)
        assert first.status_code == 200
        url, headers = f"/v1/responses/{first.json()['id']}", {"authorization": "Bearer key-of-background"}
        limited.wait_for(lambda: client.get(url, headers=headers).json()["status"] == "completed")
        assert _post(client, "background", "/v1/responses", **asked).status_code == 429


def test_the_clients_of_openai_and_anthropic_understand(limited: Running) -> None:
    _until_used_up(limited, "left", "/v1/chat/completions", CHAT)
    with pytest.raises(openai.RateLimitError) as refusal:
        limited.openai("key-of-left").chat.completions.create(model="default", **CHAT)  # type: ignore[call-overload]
    assert refusal.value.code == "rate_limit_exceeded"
    client = anthropic.Anthropic(base_url=limited.url, api_key="key-of-left", max_retries=0)
    with pytest.raises(anthropic.RateLimitError):
        client.messages.create(model="default", **CHAT)  # type: ignore[call-overload]


def test_who_has_no_limit_is_told_none_and_metrics_name_the_name(limited: Running) -> None:
    with limited.http() as client:
        free = _post(client, "free")
        told = {name for name in free.headers if name in RATE_LIMIT_HEADERS}
        assert told == {name for name in RATE_LIMIT_HEADERS if name.endswith("tokens")}
        _post(client, "chat")
        text = client.get("/metrics", headers={"authorization": "Bearer key-of-ops"}).text
    assert 'candle_vllm:rate_limited_requests_total{key="chat",limit="requests"}' in text
    assert "key-of" not in text


def test_the_lines_of_a_batch_are_its_makers_requests(start, tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    digest = hashlib.sha256(b"alices-key").hexdigest()
    path.write_text(f"keys:\n- {{name: alice, sha256: {digest}, requests_per_minute: 60, tokens_per_minute: 9000}}")
    running = start(PacedEngine("abc"), api_keys_file=path)
    limits = running.server.config.app.state.limits
    limits.clock = Clock()  # stands still: nothing is filled up
    client = running.openai("alices-key")
    lines = [
        {"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions", "body": CHAT} for number in range(3)
    ]
    file = client.files.create(file=("in.jsonl", b"\n".join(map(msgspec.json.encode, lines))), purpose="batch")
    made = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    running.wait_for(lambda: client.batches.retrieve(made.id).status == "completed")
    assert client.batches.retrieve(made.id).request_counts.completed == 3  # type: ignore[union-attr]
    requests, tokens = limits._meters["alice"].buckets
    assert requests._level == 60 - 4  # the lines and the upload of their file
    assert tokens._level < 9000
