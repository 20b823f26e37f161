# SPDX-License-Identifier: MIT
"""Models over HTTP: the `model` field routes, operators load, unload and choose, clients see it."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anthropic
import httpx
import msgspec
import pytest

from candle_vllm.core.errors import (
    ConfigError,
    InvalidFileError,
    ModelLoadError,
    ModelNotFoundError,
    NoMemoryError,
    UnsupportedModelError,
    WeightsError,
)
from candle_vllm.core.progress import tell
from candle_vllm.server import Settings
from candle_vllm.server.app import create_app
from candle_vllm.server.models.manager import ModelManager
from candle_vllm.server.models.slot import ModelState
from candle_vllm.server.models.switcher import NoRoomError
from candle_vllm.server.settings.catalogue import Catalogue, ModelEntry
from packages.server.tests.server_fakes import FakeLoader, ShortLimits
from tests.trusted import trusted
from tests.waiting import until, wait_for


def _manager(loader: FakeLoader, **limits: Any) -> ModelManager:
    entries = [
        ModelEntry("small", Settings(temperature=0.5), ("small", "tiny")),
        ModelEntry("org/large", Settings()),
        ModelEntry("broken", Settings()),
    ]
    loader.broken["broken"] = ModelLoadError("no such tensor in /models/broken.gguf")
    return ModelManager(Catalogue(entries), loader, ShortLimits(**limits))


def _chat(client: httpx.Client, model: str | None, **fields: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": "Hi"}], **({"model": model} if model else {}), **fields}
    return client.post("/v1/chat/completions", json=body)


def _states(client: httpx.Client) -> dict[str, str]:
    return {model["id"]: model["status"] for model in client.get("/v1/models/status").json()["models"]}


def test_the_model_field_routes(start) -> None:
    loader = FakeLoader()
    with start(_manager(loader)).http() as client:
        for name, answered in [("tiny", "tiny"), ("org/large", "org/large"), (None, "small"), ("default", "small")]:
            response = _chat(client, name)
            assert (response.status_code, response.json()["model"]) == (200, answered)
        assert loader.loads == ["small", "org/large"]
        refused = _chat(client, "other")
        assert refused.status_code == 404
        assert refused.json()["error"]["param"] == "model"
        assert refused.json()["error"]["code"] == "model_not_found"


def test_every_model_has_its_own_sampling_defaults(start) -> None:
    loader = FakeLoader()
    with start(_manager(loader)).http() as client:
        _chat(client, "small")
        _chat(client, "org/large")
        _chat(client, "small", temperature=1.5)
    small, large = loader.engines
    assert [request.params.temperature for request in small.requests] == [0.5, 1.5]
    assert [request.params.temperature for request in large.requests] == [1.0]


def test_the_list_shows_every_name_and_what_is_loaded(start) -> None:
    loader = FakeLoader()
    running = start(_manager(loader))
    with running.http() as client:
        listed = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
        assert list(listed) == ["small", "tiny", "org/large", "broken"]
        assert {card["status"] for card in listed.values()} == {"unloaded"}
        assert [card["default"] for card in listed.values()] == [True, True, False, False]
        _chat(client, "org/large")
        card = client.get("/v1/models/org/large").json()
        assert (card["status"], card["max_model_len"]) == ("ready", 4096)
        assert client.get("/v1/models/tiny").json()["status"] == "unloaded"
        assert client.get("/v1/models/none").status_code == 404
        loader.engines[0]._info = msgspec.structs.replace(
            loader.engines[0].model_info, num_parameters=135_000_000, quantization="Q4_1", dtype="f32", device="cpu",
            weight_bytes=92 << 20, kv_cache_bytes=640 << 20, state_bytes=64 << 20,
            index_bytes=16 << 20,
        )  # fmt: skip
        for field, size in (("state_bytes", 64 << 20), ("index_bytes", 16 << 20)):
            found = {each["id"]: each[field] for each in client.get("/v1/models/status").json()["models"]}
            assert (found["org/large"], found["small"]) == (size, 0)
        card = client.get("/v1/models/org/large").json()
        wanted = {"architecture": "scripted", "num_parameters": 135_000_000, "quantization": "Q4_1", "dtype": "f32"}
        assert wanted.items() <= card.items()
        assert (card["device"], card["weight_bytes"], card["kv_cache_bytes"]) == ("cpu", 92 << 20, 640 << 20)
    assert [model.id for model in running.openai().models.list()] == ["small", "tiny", "org/large", "broken"]


def test_who_unloads_waits_no_longer_than_for_any_answer(start) -> None:
    loader = FakeLoader()
    with start(_manager(loader), request_timeout=1).http() as client:
        loader.gate.clear()
        assert client.post("/v1/models/select", json={"model": "org/large"}).status_code == 202  # is loaded first
        asked = (("/v1/models/unload", {}), ("/api/generate", {"keep_alive": 0}))
        assert [client.post(path, json={"model": "small", **more}).status_code for path, more in asked] == [504] * 2
        loader.gate.set()


def test_operators_load_unload_and_choose(start) -> None:
    loader = FakeLoader()
    with start(_manager(loader)).http() as client:
        assert client.post("/v1/models/load", json={"model": "org/large"}).json()["status"] == "ready"
        assert _states(client) == {"small": "unloaded", "org/large": "ready", "broken": "unloaded"}
        assert client.post("/v1/models/unload", json={"model": "org/large"}).json()["status"] == "unloaded"
        assert loader.engines[0].closed
        loader.gate.clear()
        chosen = client.post("/v1/models/select", json={"model_id": "org/large"})
        assert (chosen.status_code, chosen.json()["status"]) == (202, "switching")
        assert client.get("/v1/models/status").json()["status"] == "Switching"
        loader.gate.set()
        assert _chat(client, "org/large").json()["model"] == "org/large"
        assert client.get("/v1/models/status").json()["active_model"] == "org/large"
        assert _chat(client, None).json()["model"] == "org/large"
        again = client.post("/v1/models/select", json={"model": "org/large"})
        assert (again.status_code, again.json()["status"]) == (200, "ready")
        status = client.get("/v1/models/status").json()
        assert (status["status"], status["switch_requested_at"], status["in_flight_requests"]) == ("Ready", None, 0)


async def test_a_model_that_is_about_to_be_unloaded_is_not_selected_at_once() -> None:
    manager = _manager(FakeLoader(room=1))
    running = await manager.acquire("small")
    other = asyncio.create_task(manager.acquire("org/large"))
    await until(lambda: manager.slots["small"].state is ModelState.DRAINING)
    transport = httpx.ASGITransport(create_app(manager))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        chosen = await client.post("/v1/models/select", json={"model": "small"})
    assert (chosen.status_code, chosen.json()["status"]) == (202, "switching")
    running.release()
    (await other).release()
    await until(lambda: manager.slots["small"].state is ModelState.READY)
    await manager.close()


@pytest.mark.parametrize("route", ["load", "unload", "select"])
@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "model"),
        ({"model": "small", "model_id": "small"}, 400, "model"),
        ({"model": 3}, 400, "model"),
        ({"model": ""}, 400, "model"),
        ({"modle": "small"}, 400, "modle"),
        ({"model": "other"}, 404, "model"),
        ([], 400, None),
    ],
)
def test_wrong_bodies_of_operators(start, route: str, body: Any, status: int, param: str | None) -> None:
    with start(_manager(FakeLoader())).http() as client:
        response = client.post(f"/v1/models/{route}", json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (status, param)


def test_a_load_that_fails_reaches_who_waits_and_tells_clients_no_paths(start) -> None:
    with start(_manager(FakeLoader())).http() as client:
        for response in (_chat(client, "broken"), client.post("/v1/models/load", json={"model": "broken"})):
            error = response.json()["error"]
            assert (response.status_code, error["code"]) == (503, "model_load_failed")
            assert "/models" not in error["message"]
            assert "retry-after" in response.headers
        status = client.get("/v1/models/status").json()
        assert "no such tensor" in status["last_error"]
        assert _states(client)["broken"] == "failed"
        assert _chat(client, "small").status_code == 200
        cards = {card["id"]: card.get("failure") for card in client.get("/v1/models").json()["data"]}
        assert cards == {"small": None, "tiny": None, "org/large": None, "broken": "other"}


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (NoMemoryError("set --mem 5"), "memory"),
        (NoRoomError("never"), "memory"),
        (ModelNotFoundError("no such id"), "not_found"),
        (UnsupportedModelError("no such architecture"), "unsupported"),
        (InvalidFileError("cut"), "damaged"),
        (WeightsError("missing"), "damaged"),
        (ConfigError("--dtype f99"), "settings"),
        (OSError("/secret"), "other"),
    ],
)
def test_clients_are_told_of_what_kind_a_failure_is(start, error: Exception, kind: str) -> None:
    loader = FakeLoader()
    with start(_manager(loader)).http() as client:
        loader.broken["broken"] = error
        _chat(client, "broken")
        card = client.get("/v1/models/broken").json()
        assert (card["status"], card["failure"]) == ("failed", kind)


def test_a_switch_under_load_loses_no_request(start) -> None:
    loader = FakeLoader(room=1, seconds=0.02)
    manager = _manager(loader)
    with start(manager).http() as client, ThreadPoolExecutor(16) as pool:
        names = ["small", "org/large"] * 40
        answers = list(pool.map(lambda name: _chat(client, name), names))
        assert [answer.status_code for answer in answers] == [200] * len(names)
        assert [answer.json()["model"] for answer in answers] == names
    assert loader.together == 1
    assert sum(slot.in_flight for slot in manager.slots.values()) == 0


def test_readiness_follows_the_default_model(start) -> None:
    loader = FakeLoader()
    with start(_manager(loader)).http() as client:
        assert client.get("/health").status_code == 200
        assert client.get("/ready").status_code == 503
        _chat(client, "small")
        assert client.get("/ready").json() == {"status": "ready"}
        loader.engines[0].alive = False
        assert (client.get("/ready").status_code, client.get("/health").status_code) == (503, 503)
    running = start(_manager(FakeLoader(), idle_unload_secs=0.1))
    with running.http() as client:
        _chat(client, "small")
        running.wait_for(lambda: _states(client)["small"] == "unloaded")
        assert client.get("/ready").status_code == 200  # it comes when it is asked for


def test_who_waits_is_told_what_loading_is_at(start) -> None:
    loader = FakeLoader()
    loader.gate.clear()
    loading = {"what": "testing, 43 %", "percent": 43}
    with start(_manager(loader)).http() as client, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(_chat, client, "small")
        wait_for(lambda: client.get("/ready").json() == {"status": "loading", "loading": loading})
        assert client.get("/ready").status_code == 503
        models = {each["id"]: each["loading"] for each in client.get("/v1/models/status").json()["models"]}
        assert models == {"small": loading, "org/large": None, "broken": None}
        cards = {card["id"]: card.get("loading") for card in client.get("/v1/models").json()["data"]}
        assert cards == {"small": loading, "tiny": loading, "org/large": None, "broken": None}
        loader.gate.set()
        asked.result(60)
        assert not any("loading" in card for card in client.get("/v1/models").json()["data"])
        assert not any(each["loading"] for each in client.get("/v1/models/status").json()["models"])


def test_a_download_before_room_is_made_is_told_too(start) -> None:
    class Downloading(FakeLoader):
        def check(self, entry: ModelEntry, beside: Any) -> None:
            tell("downloading org/large", 1, 4)
            assert entry.name != "org/large" or self.gate.wait(60)

    loader = Downloading()
    with start(_manager(loader)).http() as client, ThreadPoolExecutor(1) as pool:
        _chat(client, "small")
        loader.gate.clear()
        asked = pool.submit(_chat, client, "org/large")
        wanted = {"what": "downloading org/large, 25 %", "percent": 25}
        wait_for(lambda: client.get("/v1/models/org/large").json().get("loading") == wanted)
        loader.gate.set()
        assert asked.result(60).status_code == 200


def test_a_request_has_a_deadline(start) -> None:
    loader = FakeLoader()
    loader.gate.clear()
    with start(_manager(loader), request_timeout=1).http() as client:
        begin = time.monotonic()
        response = _chat(client, "small")
        assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
        assert time.monotonic() - begin > 0.9
    loader.gate.set()


def test_the_list_for_anthropic_s_clients(start) -> None:
    running = start(_manager(FakeLoader()))
    http = anthropic.DefaultHttpxClient(trust_env=False, verify=trusted())
    with anthropic.Anthropic(base_url=running.url, api_key="none", http_client=http) as client:
        assert [model.id for model in client.models.list()] == ["small", "tiny", "org/large", "broken"]
        model = client.models.retrieve("tiny")
        assert (model.type, model.display_name, model.created_at.year) == ("model", "tiny", 1970)
        with pytest.raises(anthropic.NotFoundError) as refusal:
            client.models.retrieve("nothing")
    assert refusal.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]


def test_who_waits_is_told_without_what_is_asked(start) -> None:
    loader = FakeLoader()
    loader.gate.clear()
    running = start(_manager(loader), api_key=("secret",), management_key=("operator",))
    key, operator = {"authorization": "Bearer secret"}, {"authorization": "Bearer operator"}
    with ThreadPoolExecutor() as pool, running.http(headers=key) as client, running.http(headers=operator) as manager:
        assert client.get("/v1/queues").status_code == client.get("/v1/queues/org/large").status_code == 401
        empty = manager.get("/v1/queues").json()
        assert empty == {"object": "list", "counts": {"small": 0, "org/large": 0, "broken": 0}, "data": []}
        body = {"model": "org/large", "messages": [{"role": "user", "content": "Hi"}]}
        began = time.time()
        asked = pool.submit(client.post, "/v1/chat/completions", json=body, headers={"x-request-id": "mine"})
        running.wait_for(lambda: manager.get("/v1/queues").json()["data"])
        (entry,) = manager.get("/v1/queues/org/large").json()["data"]
        assert {**entry, "queued_at": 0} == {
            "object": "queued_request", "id": "mine", "model": "org/large", "queued_at": 0, "waits_for": "model",
            "key": "1", "sequences": 1, "priority": 0,
        }  # fmt: skip
        assert began - 1 <= entry["queued_at"] <= time.time() + 1
        assert manager.get("/v1/queues").json()["counts"]["org/large"] == 1
        assert manager.get("/v1/queues/small").json() == {"object": "list", "counts": {"small": 0}, "data": []}
        loader.gate.set()
        assert asked.result().status_code == 200
        assert manager.get("/v1/queues").json() == empty
        assert manager.get("/v1/queues/other").status_code == 404
