# SPDX-License-Identifier: MIT
"""Adapters by the `model` of a request, through every API; the routes of vLLM and llama.cpp; keys that are bound."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from candle_vllm.core.engine.model_info import AdapterInfo
from candle_vllm.core.engine.requests import AdapterUse, LoRARequest
from candle_vllm.core.errors import AdapterError, InvalidParameterError
from candle_vllm.server.adapters.registry import BaseAdapters
from candle_vllm.server.models.manager import ModelManager
from candle_vllm.server.routes.ollama_library import refuse_open_changes
from candle_vllm.server.settings import Settings
from candle_vllm.server.settings.catalogue import Catalogue, ModelEntry
from candle_vllm.server.settings.options import UsageError
from packages.server.tests.adapters.adapter_fakes import CONFIG, WEIGHTS, files
from packages.server.tests.fake_hub import COMMIT
from packages.server.tests.running_server import Running, paths_of
from packages.server.tests.server_fakes import FakeLoader, PacedEngine

Start = Callable[..., Running]
CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}


@pytest.fixture
def hubbed(start: Start, fake_hub: Any, tmp_path: Path) -> Running:
    """A server whose adapters are those of one organisation of a hub."""
    fake_hub.repos = {
        "acme/tone": files(), "acme/wide": files(r=9999), "other/tone": files(),
        "acme/pickle": {CONFIG: files()[CONFIG], "adapter_model.bin": b"x"},
    }  # fmt: skip
    return start(
        PacedEngine("fine", name="base"), enable_lora=True, lora_resolver=("hf=acme/*",), lora_cache_dir=tmp_path / "c",
    )  # fmt: skip


def used(running: Running) -> list[tuple[str, float]]:
    """The adapters of the last request."""
    adapters: tuple[AdapterUse, ...] = running.engine.requests[-1].adapters
    return [(each.name, each.scale) for each in adapters]


def chat(running: Running, model: str | None, **more: Any) -> Any:
    with running.http() as http:
        return http.post("/v1/chat/completions", json={"model": model, **CHAT, **more})


# ---- the plan of a service of adapters -------------------------------------------------------------------------------


def test_the_base_an_adapter_and_the_adapter_from_the_cache(hubbed: Running, fake_hub: Any) -> None:
    with hubbed.http() as http:
        assert http.get("/health").status_code == 200
        assert http.get("/ready").status_code == 200
        assert http.post("/v1/completions", json={"model": "base", "prompt": "x", "max_tokens": 2}).status_code == 200
        assert used(hubbed) == []
        first = http.post("/v1/completions", json={"model": "acme/tone", "prompt": "x", "max_tokens": 2})
        assert (first.status_code, first.json()["model"]) == (200, "acme/tone")
        assert used(hubbed) == [(f"acme/tone@{COMMIT}", 1.0)]
        assert (Path(hubbed.engine.requests[-1].adapters[0].path) / WEIGHTS).read_bytes() == b"weights"
        fetched = list(fake_hub.asked)
        again = chat(hubbed, "acme/tone").json()
        assert again["choices"][0]["message"]["content"] == "fine"
        assert fake_hub.asked == fetched
        cards = {card["id"]: card for card in http.get("/v1/models").json()["data"]}
        card = cards["acme/tone"]
        assert (card["parent"], card["root"], card["revision"]) == ("base", f"acme/tone@{COMMIT}", COMMIT)
        assert http.get("/v1/models/acme/tone").json() == card
        metrics = http.get("/metrics").text
        assert 'candle_vllm:lora_resolutions_total{outcome="found",source="hf"} 1.0' in metrics
        # this engine says that a step has no adapters, so that no name has a label of its own
        assert 'candle_vllm:lora_requests_total{adapter="other",engine="0",model_name="base"} 2.0' in metrics
        assert hubbed.engine.requests[-1].adapters[0].name == f"acme/tone@{COMMIT}"


def test_an_adapter_of_a_hub_has_the_name_that_the_operator_gives_it(
    start: Start, fake_hub: Any, tmp_path: Path
) -> None:
    fake_hub.repos = {"acme/tone": files()}
    running = start(
        PacedEngine("fine", name="base"), enable_lora=True, lora_modules=("mine=acme/tone",),
        lora_resolver=("hf=acme/tone",), lora_cache_dir=tmp_path / "c",
    )  # fmt: skip
    assert chat(running, "mine").json()["choices"][0]["message"]["content"] == "fine"
    assert used(running) == [(f"mine@{COMMIT}", 1.0)]
    with running.http() as http:
        card = http.get("/v1/models/mine").json()
        assert (card["parent"], card["root"]) == ("base", f"acme/tone@{COMMIT}")
        assert http.get("/lora-adapters").json()[0]["name"] == "mine"
        scaled = {"model": "base", "prompt": "x", "max_tokens": 2, "lora": [{"id": 0, "scale": 0.5}]}
        assert http.post("/v1/completions", json=scaled).status_code == 200
    assert used(running) == [(f"mine@{COMMIT}", 0.5)]


@pytest.mark.parametrize(
    "name", ["../x", "/etc", "other/tone", "acme_tone", "gpt-4", "acme/none", "acme/tone/../x", "bas"]
)
def test_a_bad_name_is_404_and_never_the_base(hubbed: Running, fake_hub: Any, name: str) -> None:
    answer = chat(hubbed, name)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert "served models are: base" in answer.json()["error"]["message"]
    assert hubbed.engine.requests == []
    assert fake_hub.asked == []


def test_what_is_there_and_cannot_be_used_is_told_and_the_weights_never_come(hubbed: Running, fake_hub: Any) -> None:
    answer = chat(hubbed, "acme/wide")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "adapter_refused")
    assert "r is 9999: ranks up to 256" in answer.json()["error"]["message"]
    assert "a pickle" in chat(hubbed, "acme/pickle").json()["error"]["message"]
    assert {name for name, _ in fake_hub.asked} == {CONFIG}


def test_a_hub_that_is_not_there_is_told_apart_from_a_name_that_is_not(hubbed: Running, fake_hub: Any) -> None:
    assert chat(hubbed, "acme/tone").status_code == 200
    import huggingface_hub

    fake_hub.stop()
    huggingface_hub.close_session()
    assert chat(hubbed, "acme/tone").status_code == 200
    answer = chat(hubbed, "acme/new")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "adapter_unavailable")
    assert answer.headers["retry-after"] == "5"
    assert chat(hubbed, "base").status_code == 200


def test_near_names_are_said(start: Start) -> None:
    running = start(PacedEngine("fine", name="base"), enable_lora=True, lora_modules=("support=/srv/a", "poems=/srv/b"))
    message = chat(running, "suport").json()["error"]["message"]
    assert message.endswith("served models are: base. Known adapters: poems, support (did you mean support?).")


# ---- every API -------------------------------------------------------------------------------------------------------

USER = [{"role": "user", "content": "hello"}]
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", CHAT),
    "completions": ("/v1/completions", {"prompt": "x", "max_tokens": 2}),
    "streamed": ("/v1/completions", {"prompt": "x", "max_tokens": 2, "stream": True}),
    "responses": ("/v1/responses", {"input": "x", "max_output_tokens": 2}),
    "messages": ("/v1/messages", {"messages": USER, "max_tokens": 2}),
    "ollama chat": ("/api/chat", {"messages": USER, "stream": False}),
    "ollama generate": ("/api/generate", {"prompt": "x", "stream": False}),
    "ollama raw": ("/api/generate", {"prompt": "x", "stream": False, "raw": True}),
    "llama.cpp": ("/completion", {"prompt": "x", "n_predict": 2}),
}


@pytest.fixture
def given(start: Start) -> Running:
    """A server with two adapters that its operator names."""
    modules = ("tone=/srv/tone", '{"name": "poems", "path": "/srv/poems.gguf", "pinned": true}')
    return start(PacedEngine("fine", name="base"), enable_lora=True, lora_modules=modules, allow_runtime_lora=True)


@pytest.mark.parametrize("kind", REQUESTS)
def test_every_api_takes_an_adapters_name(given: Running, kind: str) -> None:
    path, body = REQUESTS[kind]
    with given.http() as http:
        for name, uses in (("base", []), ("tone", [("tone", 1.0)]), ("base:poems", [("poems", 1.0)])):
            answer = http.post(path, json={"model": name, **body})
            assert answer.status_code == 200, answer.text
            assert used(given) == uses
            assert f'"{name}"' in answer.text
        answer = http.post(path, json={"model": "none", **body})
        assert (answer.status_code, "none" in answer.text) == (404, True)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": ["a", "b"]}), ("/api/embed", {"input": "a"}), ("/api/embeddings", {"prompt": "a"}),
        ("/v1/score", {"text_1": "a", "text_2": "b"}), ("/v1/rerank", {"query": "a", "documents": ["b"]}),
        ("/pooling", {"input": "a"}),
    ],
)  # fmt: skip
def test_vectors_go_through_an_adapter(start: Start, path: str, body: dict[str, Any]) -> None:
    engine = PacedEngine(name="base", tasks=("embed", "score"))
    running = start(engine, enable_lora=True, lora_modules=("tone=/srv/tone",))
    with running.http() as http:
        assert http.post(path, json={"model": "tone", **body}).status_code == 200
        assert [each.lora_name for each, _ in engine.pooling_calls[-1].lora_request] == ["tone"]
        assert http.post(path, json={"model": "base", **body}).status_code == 200
        assert engine.pooling_calls[-1].lora_request == ()


@pytest.mark.parametrize("kind", REQUESTS)
def test_an_adapter_that_is_unloaded_while_its_request_is_prepared_is_404(
    given: Running, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def known(self: BaseAdapters, name: str) -> bool:
        found = self._adapters.find(name)
        if found is not None:
            self._adapters.forget(found)
        return found is not None

    monkeypatch.setattr(BaseAdapters, "is_known", known)
    path, body = REQUESTS[kind]
    asked = len(given.engine.requests)
    with given.http() as http:
        answer = http.post(path, json={"model": "tone", **body})
    assert answer.status_code == 404, answer.text
    assert "'tone' is not served" in answer.text
    assert len(given.engine.requests) == asked


def test_a_batch_has_lines_of_several_adapters(given: Running) -> None:
    lines = "".join(
        json.dumps(
            {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": {"model": name, **CHAT}}
        )
        + "\n"
        for name in ("base", "tone", "poems")
    )
    client = given.openai()
    kept = client.files.create(file=("in.jsonl", lines.encode()), purpose="batch")
    batch = client.batches.create(input_file_id=kept.id, endpoint="/v1/chat/completions", completion_window="24h")
    given.wait_for(lambda: client.batches.retrieve(batch.id).status in ("completed", "failed"))
    done = client.batches.retrieve(batch.id)
    assert done.output_file_id is not None
    answers = [json.loads(line) for line in client.files.content(done.output_file_id).text.splitlines()]
    assert {line["custom_id"]: line["response"]["body"]["model"] for line in answers} == {
        "base": "base", "tone": "tone", "poems": "poems",
    }  # fmt: skip
    assert sorted(tuple(use.name for use in request.adapters) for request in given.engine.requests) == [
        (), ("poems",), ("tone",),
    ]  # fmt: skip


def test_ollamas_names_may_end_with_latest_and_its_list_has_adapters(given: Running) -> None:
    with given.http() as http:
        assert http.post("/api/chat", json={"model": "tone:latest", "messages": USER}).status_code == 200
        assert used(given) == [("tone", 1.0)]
        assert [each["name"] for each in http.get("/api/tags").json()["models"]] == ["base", "poems", "tone"]
        assert http.post("/api/show", json={"model": "tone"}).status_code == 200


def test_an_adapter_may_be_named_beside_the_model_as_sglang_does(start: Start) -> None:
    engine = PacedEngine("fine", name="base", tasks=("generate", "embed", "score"))
    running = start(engine, enable_lora=True, lora_modules=("tone=/srv/tone",))
    requests = {
        "/v1/chat/completions": CHAT, "/v1/completions": {"prompt": "x", "max_tokens": 2},
        "/v1/embeddings": {"input": ["a", "b"]}, "/v1/rerank": {"query": "a", "documents": ["b"]},
    }  # fmt: skip
    with running.http() as http:
        for path, body in requests.items():
            for named in ({}, {"model": "base"}, {"model": "default"}, {"model": "tone"}, {"model": "base:tone"}):
                assert http.post(path, json=body | named | {"lora_path": "tone"}).status_code == 200
                given = engine.pooling_calls[-1].lora_request if "max_tokens" not in body else used(running)
                assert [getattr(each, "lora_name", each) for each, _ in given] == ["tone"], (path, named)
            for none in (None, [None, None], []):
                assert http.post(path, json=body | {"model": "base", "lora_path": none}).status_code == 200
                given = engine.pooling_calls[-1].lora_request if "max_tokens" not in body else used(running)
                assert list(given) == [], (path, none)
            for wrong, status, said in (
                ("none", 404, "none"), (["tone", None], 400, "one adapter for all prompts"), (5, 400, "lora_path"),
                ([5], 400, "lora_path"), ([["tone"]], 400, "lora_path"),
            ):  # fmt: skip
                answer = http.post(path, json=body | {"lora_path": wrong})
                assert (answer.status_code, said in answer.text) == (status, True), (path, wrong, answer.text)
        prompts = {"model": "base", "prompt": ["x", "y"], "max_tokens": 2, "lora_path": ["tone", "tone"]}
        assert http.post("/v1/completions", json=prompts).status_code == 200
        assert used(running) == [("tone", 1.0)]
    plain = start(PacedEngine("fine", name="base", tasks=("generate", "embed", "score")))
    with plain.http() as http:
        for path, body in requests.items():
            answer = http.post(path, json=body | {"lora_path": "tone"})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "lora_path"), "never the base"


def test_a_model_without_adapters_refuses_a_mix_and_answers_any_name_as_ever(start: Start) -> None:
    running = start(PacedEngine("fine", name="base"))
    assert chat(running, "gpt-4").json()["model"] == "base"
    answer = chat(running, "base", lora=[{"id": 0, "scale": 1.0}])
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "lora")
    assert chat(running, "base", lora=[]).status_code == 200


# ---- vLLM's routes ---------------------------------------------------------------------------------------------------


def test_an_adapter_is_loaded_replaced_and_unloaded_in_vllms_words(given: Running, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
    with given.http() as http:
        body = {"lora_name": "new", "lora_path": str(tmp_path / "new")}
        done = http.post(load, json=body)
        assert (done.status_code, done.text) == (200, "Success: LoRA adapter 'new' added successfully.")
        assert chat(given, "new").status_code == 200
        assert used(given) == [("new", 1.0)]
        again = http.post(load, json=body)
        assert (again.status_code, again.json()["error"]["code"]) == (400, "InvalidUserInput")
        assert "has already been loaded" in again.json()["error"]["message"]
        assert http.post(load, json={**body, "load_inplace": True}).status_code == 200
        assert given.engine.adapters["new"].path == str(tmp_path / "new")
        done = http.post(unload, json={"lora_name": "new"})
        assert (done.status_code, done.text) == (200, "Success: LoRA adapter 'new' removed successfully.")
        assert "new" not in given.engine.adapters
        assert chat(given, "new").status_code == 404
        gone = http.post(unload, json={"lora_name": "new"})
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "NotFoundError")
        for wrong, status in (
            ({"lora_name": "", "lora_path": "x"}, 400), ({"lora_name": "x"}, 400), ({**body, "lora_name": "base"}, 400),
            ({"lora_name": "x", "lora_path": "/none/there"}, 404), ({"lora_name": "x\n", "lora_path": "/"}, 400),
            ({**body, "base_model_name": "none"}, 404), ({**body, "lora_name": "base:x"}, 400),
            ({"lora_name": "x", "lora_path": "~nobody9/x"}, 404), ({"lora_name": "x", "lora_path": "x" * 300}, 404),
        ):  # fmt: skip
            assert http.post(load, json=wrong).status_code == status, wrong
        assert http.post(unload, json={}).status_code == 400


def test_requests_use_the_earlier_files_until_others_have_replaced_them(given: Running, tmp_path: Path) -> None:
    """The engine refuses a name with other files than it has: here nobody is between the two."""
    body, load = {"lora_path": str(tmp_path), "load_inplace": True}, given.engine.add_lora
    load(LoRARequest("poems", lora_path="/srv/poems.gguf"))
    asked = list[tuple[str, str]]()

    def slowly(request: LoRARequest) -> AdapterInfo:
        info = load(request)
        assert chat(given, "poems").status_code == 200
        use = given.engine.requests[-1].adapters[0]
        asked.append((use.name, use.path))
        return info

    given.engine.add_lora = slowly
    with given.http() as http:
        assert http.post("/v1/load_lora_adapter", json={"lora_name": "poems", **body}).status_code == 200
    assert asked == [("poems", "/srv/poems.gguf")]
    assert chat(given, "poems").status_code == 200
    ((name, _),) = used(given)
    assert name.startswith("poems@")
    there = given.engine.adapters
    assert (there[name].path, there[name].pinned, "poems" in there) == (str(tmp_path), True, False)


def test_a_task_of_a_models_folder_is_loaded_as_a_folder_is(given: Running, tmp_path: Path) -> None:
    with given.http() as http:
        for stored, task, status in (
            ('{"lora_adaptations": ["text-matching"]}', "text-matching", 200),
            ('{"lora_adaptations": ["text-matching"]}', "matching", 404),
            ("{", "text-matching", 404),
        ):
            (tmp_path / "config.json").write_text(stored, "utf-8")
            body = {"lora_name": "matching", "lora_path": str(tmp_path / task), "load_inplace": True}
            answer = http.post("/v1/load_lora_adapter", json=body)
            assert answer.status_code == status, (stored, task, answer.text)
    assert given.engine.adapters["matching"].path == str(tmp_path / "text-matching")


def test_of_requests_at_once_that_load_one_name_one_succeeds(given: Running, tmp_path: Path) -> None:
    together, load = threading.Barrier(3), given.engine.add_lora

    def at_once(request: LoRARequest) -> AdapterInfo:
        together.wait(30)
        return load(request)

    given.engine.add_lora = at_once
    body = {"lora_name": "new", "lora_path": str(tmp_path)}
    with given.http() as http, ThreadPoolExecutor(3) as pool:
        done = list(pool.map(lambda _: http.post("/v1/load_lora_adapter", json=body), range(3)))
    assert sorted(answer.status_code for answer in done) == [200, 400, 400]
    assert "new" in given.engine.adapters


def test_each_base_may_have_an_adapter_of_one_name(start: Start, tmp_path: Path) -> None:
    entries = [ModelEntry(name, Settings(enable_lora=True), (name,)) for name in ("first", "second")]
    running = start(ModelManager(Catalogue(entries), FakeLoader()), allow_runtime_lora=True)
    with running.http() as http:
        for base, status in (("first", 200), ("second", 200), ("first", 400), (None, 400)):
            body = {"lora_name": "tone", "lora_path": str(tmp_path), "base_model_name": base}
            assert http.post("/v1/load_lora_adapter", json=body).status_code == status, base
        names = ["first", "second", "tone", "second:tone"]
        assert [card["id"] for card in http.get("/v1/models").json()["data"]] == names
        assert {each["name"] for each in http.get("/api/tags").json()["models"]} == {*names}
        assert http.get("/v1/models/second:tone").json()["parent"] == "second"
        answer = http.post("/api/generate", json={"model": "second:tone", "keep_alive": 0})
        assert (answer.status_code, answer.json()["done_reason"]) == (200, "unload")
        assert [each["name"] for each in http.get("/api/ps").json()["models"]] == ["first"]


def test_an_adapter_that_cannot_be_loaded_is_named_and_not_served(given: Running, tmp_path: Path) -> None:
    def refuse(_: object) -> None:
        raise AdapterError("adapter_config.json: r is 0")

    given.engine.add_lora = refuse
    with given.http() as http:
        answer = http.post("/v1/load_lora_adapter", json={"lora_name": "new", "lora_path": str(tmp_path)})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].endswith("r is 0")
    assert chat(given, "new").status_code == 404


def test_a_path_that_is_none_of_this_machine_is_asked_of_the_resolvers_alone(
    start: Start, fake_hub: Any, tmp_path: Path
) -> None:
    fake_hub.repos = {"acme/tone": files(), "other/tone": files()}
    running = start(
        PacedEngine("fine", name="base"), enable_lora=True, allow_runtime_lora=True, lora_resolver=("hf=acme/*",),
        lora_cache_dir=tmp_path / "c",
    )  # fmt: skip
    with running.http() as http:
        for path, status in (("acme/tone", 200), ("other/tone", 404), ("https://example.com/x", 404)):
            answer = http.post("/v1/load_lora_adapter", json={"lora_name": "mine", "lora_path": path})
            assert answer.status_code == status, path
            if status == 200:
                assert chat(running, "mine").status_code == 200
                assert used(running) == [(f"mine@{COMMIT}", 1.0)]
                card = next(each for each in http.get("/v1/models").json()["data"] if each["id"] == "mine")
                assert card["revision"] == COMMIT
                assert http.post("/v1/unload_lora_adapter", json={"lora_name": "mine"}).status_code == 200


def test_the_routes_are_off_unless_allowed_and_for_operators(start: Start, tmp_path: Path) -> None:
    body = {"lora_name": "new", "lora_path": str(tmp_path)}
    off = start(PacedEngine("fine", name="base"), enable_lora=True)
    keyed = start(
        PacedEngine("fine", name="base"), enable_lora=True, allow_runtime_lora=True, api_key=("client",),
        management_key=("boss",), lora_modules=("a=/x",),
    )  # fmt: skip
    with off.http() as http:
        assert http.post("/v1/load_lora_adapter", json=body).status_code == 403
    with keyed.http() as http:
        for path, wanted in (("/v1/load_lora_adapter", body), ("/v1/unload_lora_adapter", {"lora_name": "new"}),
                             ("/lora-adapters", [{"id": 0, "scale": 1.0}])):  # fmt: skip
            for key, status in (("none", 401), ("client", 401), ("boss", 200)):
                answer = http.post(path, json=wanted, headers={"authorization": f"Bearer {key}"})
                assert answer.status_code == status, (path, key)
        assert http.get("/lora-adapters", headers={"authorization": "Bearer client"}).status_code == 200
    with pytest.raises(UsageError, match="--allow-runtime-lora"):
        refuse_open_changes(Settings(allow_runtime_lora=True, host="0.0.0.0"))


# ---- llama.cpp's -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/completion"])
def test_a_mix_that_the_engine_refuses_names_the_field_with_the_adapters(start: Start, path: str) -> None:
    engine = PacedEngine("fine", name="base")

    def refuse(*_: Any, **__: Any) -> Any:
        raise InvalidParameterError("the request combines 2 adapters", "lora_request")

    running = start(engine, enable_lora=True, lora_modules=("a=/srv/a", "b=/srv/b"))
    engine.stream = refuse  # type: ignore[method-assign]
    ask: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"}
    for mix, field in (({"lora": [{"id": 0, "scale": 1.0}, {"id": 1, "scale": 1.0}]}, "lora"), ({}, "model")):
        with running.http() as http:
            answer = http.post(path, json={"model": "base", **ask, **mix})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)


def test_a_mix_is_one_requests_or_everybodys(start: Start) -> None:
    modules = ('{"name": "a", "path": "/srv/a.gguf", "scale": 1}', "b=/srv/deep/b")
    running = start(PacedEngine("fine", name="base"), enable_lora=True, lora_modules=modules)
    with running.http() as http:
        assert http.get("/lora-adapters").json() == [
            {"id": 0, "path": "a.gguf", "scale": 1.0, "name": "a"}, {"id": 1, "path": "b", "scale": 0.0, "name": "b"},
        ]  # fmt: skip
        assert chat(running, "base").status_code == 200
        assert used(running) == [("a", 1.0)]
        assert chat(running, "base", lora=[{"id": 1, "scale": 0.5}, {"id": 0, "scale": 0}]).status_code == 200
        assert used(running) == [("b", 0.5)]
        body = {"prompt": "x", "n_predict": 2, "lora": [{"id": 0, "scale": 2.0}, {"id": 1, "scale": -1.0}]}
        assert http.post("/completion", json=body).status_code == 200
        assert used(running) == [("a", 2.0), ("b", -1.0)]
        assert http.post("/lora-adapters", json=[{"id": 1, "scale": 0.25}]).json() == {"success": True}
        assert chat(running, "base").status_code == 200
        assert used(running) == [("b", 0.25)]
        for wrong in ({}, [{"id": 7, "scale": 1}], [{"id": -1, "scale": 1}], [{"id": 0}], [{"id": 0, "scale": 1e9}],
                      [{"id": 0, "scale": 1}] * 2, "x"):  # fmt: skip
            assert http.post("/lora-adapters", json=wrong).status_code == 400, wrong
            if isinstance(wrong, list):
                assert chat(running, "base", lora=wrong).status_code == 400, wrong
        assert used(running) == [("b", 0.25)]


# ---- keys ------------------------------------------------------------------------------------------------------------


def test_a_key_opens_the_models_and_adapters_that_it_is_bound_to(start: Start, tmp_path: Path, fake_hub: Any) -> None:
    fake_hub.repos = {"acme/tone": files(), "secret/tone": files()}
    keys = tmp_path / "keys.yaml"
    keys.write_text(
        "keys:\n- {name: one, key: key-one, models: ['acme/*', poems]}\n- {name: all, key: key-all}\n"
        "- {name: base, key: key-base, models: base}\n"
    )
    running = start(
        PacedEngine("fine", name="base"), enable_lora=True, api_keys_file=keys, lora_resolver=("hf",),
        lora_cache_dir=tmp_path / "c", lora_modules=("poems=/srv/poems", "other=/srv/other"),
    )  # fmt: skip
    with running.http() as http:

        def status(key: str, model: str | None, path: str = "/v1/chat/completions", **more: Any) -> int:
            asked = CHAT if path.startswith("/v1") else {"messages": USER, "stream": False}
            body = {"model": model, **asked, **more}
            return http.post(path, json=body, headers={"authorization": f"Bearer key-{key}"}).status_code

        def listed(key: str) -> list[str]:
            answer = http.get("/v1/models", headers={"authorization": f"Bearer key-{key}"})
            return [card["id"] for card in answer.json()["data"]]

        assert [status("one", name) for name in ("acme/tone", "poems", "base:poems")] == [200, 200, 200]
        refused = ("base", None, "default", "other", "secret/tone", "gpt-4", "base:other")
        assert [status("one", name) for name in refused] == [403] * len(refused)
        assert "secret/tone" not in str(fake_hub.asked)
        assert status("one", "acme/none") == 404
        assert [status("base", name) for name in ("base", None, "poems", "acme/tone")] == [200, 200, 403, 403]
        assert status("base", "base", lora=[{"id": 1, "scale": 1.0}]) == 403
        body = {"model": "base", **CHAT, "lora": [{"id": 1, "scale": 1.0}]}
        told = http.post("/v1/chat/completions", json=body, headers={"authorization": "Bearer key-base"}).text
        assert "the adapter 1" in told
        assert "other" not in told
        assert status("all", "base", lora=[{"id": 1, "scale": 1.0}]) == 200
        assert status("one", "base", "/api/chat") == 403
        assert [status("one", name, "/api/chat") for name in ("poems", "poems:latest")] == [200, 200]
        assert [status("one", name, "/api/chat") for name in ("other:latest", "secret/tone:latest")] == [403, 403]
        assert listed("one") == ["acme/tone", "poems"]
        assert listed("base") == ["base"]
        assert listed("all") == ["base", "acme/tone", "other", "poems"]
        tags = http.get("/api/tags", headers={"authorization": "Bearer key-one"}).json()["models"]
        assert [each["name"] for each in tags] == ["acme/tone", "poems"]
        body = {"model": "base", "prompt": "x"}
        assert http.post("/tokenize", json=body, headers={"authorization": "Bearer key-one"}).status_code == 403
        assert http.get("/props", headers={"authorization": "Bearer key-one"}).status_code == 403


def test_what_a_key_may_not_use_is_told_nowhere(start: Start, tmp_path: Path) -> None:
    """Every route is asked, and every route of models for one that is not there."""
    keys = tmp_path / "keys.yaml"
    keys.write_text("keys:\n- {name: one, key: key-one, models: poems}\n- {name: all, key: key-all}\n")
    running = start(
        PacedEngine("fine", name="zebra-base"), enable_lora=True, api_keys_file=keys, log_requests=True,
        lora_modules=("poems=/srv/poems", "zebra-other=/srv/other"),
    )  # fmt: skip
    app = running.server.config.app
    with running.http(headers={"authorization": "Bearer key-one"}) as http:
        assert http.get("/", headers={"authorization": "Bearer key-all"}).json()["models"] == ["zebra-base"]
        assert http.get("/").json()["models"] == []
        answers = [http.get(path) for path in sorted(paths_of(app, "GET"))]
        for path in sorted(paths_of(app, "POST")):
            for model in ("nothing", "zebr", None):
                body = {"model": model, "messages": USER, "input": "x", "prompt": "x", "max_tokens": 1, "query": "x"}
                answers.append(http.post(path, json={name: value for name, value in body.items() if value is not None}))
        own = [each for each in answers if each.request.url.path != "/v1/models"]  # whose adapters name their base
        assert len(own) > 100
        assert {"/ready", "/v1/queues", "/metrics", "/v1/usage", "/"} <= {each.request.url.path for each in own}
        for answer in own:
            assert "zebra" not in answer.text + str(answer.headers), answer.request.url
