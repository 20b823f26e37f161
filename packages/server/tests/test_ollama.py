# SPDX-License-Identifier: MIT
"""Ollama's API over HTTP, with the official client: chat, texts, vectors, models, and how it fails."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import ollama
import pytest
from msgspec.structs import replace

from candle_vllm.core.errors import EngineOverloadedError, NotReadyError
from candle_vllm.core.testing.toy_model import write_toy_model
from candle_vllm.core.text.tokenizer import ChatConventions
from candle_vllm.server import Settings, create_app
from candle_vllm.server.models import downloads
from candle_vllm.server.models.manager import ModelManager
from candle_vllm.server.routes.ollama_library import refuse_open_changes
from candle_vllm.server.serve import bind, bind_second, make_server
from candle_vllm.server.settings.catalogue import Catalogue, ModelEntry
from candle_vllm.server.settings.options import UsageError
from packages.server.tests.server_fakes import FakeLoader, PacedEngine
from tests.trusted import trusted
from tests.waiting import wait_for

HI: list[Any] = [{"role": "user", "content": "Hi"}]
ASK: dict[str, Any] = {"model": "scripted", "messages": HI}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>"
    "{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}{{ tools }}<tool_call><|im_start|>"
)


def weather(city: str) -> str:
    """The weather somewhere.

    Args:
        city: where.
    """
    return city


@contextmanager
def client_of(running: Any, **options: Any) -> Iterator[ollama.Client]:
    with ollama.Client(host=running.url, trust_env=False, timeout=20, verify=trusted(), **options) as client:
        yield client


def test_whole_and_streamed_are_the_same(start: Callable[..., Any]) -> None:
    with client_of(start(PacedEngine("Good day!"))) as client:
        whole = client.chat(**ASK)
        pieces = list(client.chat(**ASK, stream=True))
        text, texts = client.generate("scripted", "Hi"), list(client.generate("scripted:latest", "Hi", stream=True))
    assert whole.message.content == "".join(piece.message.content or "" for piece in pieces) == "Good day!"
    assert text.response == "".join(piece.response or "" for piece in texts) == "Good day!"
    assert text.context == texts[-1].context
    for one, last in ((whole, pieces[-1]), (text, texts[-1])):
        assert (one.done, one.done_reason, one.eval_count) == (True, "stop", 10)
        assert (last.done, last.done_reason, last.prompt_eval_count) == (True, "stop", one.prompt_eval_count)
        assert one.total_duration >= one.load_duration > 0  # type: ignore[operator]
        assert one.eval_duration == 750_000_000  # nanoseconds
    assert not any(piece.done for piece in (*pieces[:-1], *texts[:-1]))


def test_a_context_is_gone_on_from(start: Callable[..., Any]) -> None:
    running = start(PacedEngine("Good day!"))
    with client_of(running) as client:
        first = client.generate("scripted", "One")
        client.generate("scripted", "Two", context=first.context)
        client.generate("scripted", "Raw", raw=True)
    sent = [running.engine.detokenize(request.prompt_token_ids, False) for request in running.engine.requests]
    assert list(first.context or ())[: len(running.engine.requests[0].prompt_token_ids)] == list(
        running.engine.requests[0].prompt_token_ids
    )
    assert sent[1].startswith(sent[0] + "Good day!")
    assert "Two" in sent[1]
    assert sent[2].endswith("Raw")
    assert "user" not in sent[2]


@pytest.mark.parametrize(
    ("beginning", "left"), [("<|im_start|>", "<|im_start|>user\nTwo"), ("<|im_start|>user", "\nTwo")]
)
def test_a_context_is_followed_by_whole_turns(start: Callable[..., Any], beginning: str, left: str) -> None:
    """A beginning-of-sequence token is left out behind a context, and a token that begins every turn is not."""
    running = start(PacedEngine("Good day!"))
    running.engine.chat_conventions = ChatConventions(token_names={"bos_token": beginning})
    with client_of(running) as client:
        for text in ("Two", f"Two {beginning}"):
            client.generate("scripted", text, context=[1, 2, 3])
            prompt = running.engine.requests[-1].prompt_token_ids
            assert running.engine.detokenize(prompt[3:], False).startswith(left)


def test_tools_are_called_and_answered(start: Callable[..., Any]) -> None:
    running = start(PacedEngine(["I look.", CALL], chat_template=TEMPLATE), tool_parser="hermes")
    with client_of(running) as client:
        whole = client.chat(**ASK, tools=[weather])
        pieces = list(client.chat(**ASK, tools=[weather], stream=True))
        (call,) = whole.message.tool_calls or ()
        assert (call.function.name, call.function.arguments) == ("weather", {"city": "Köln"})
        assert [each.function for p in pieces for each in p.message.tool_calls or ()] == [call.function]
        result = {"role": "tool", "content": "22 C", "tool_name": "weather"}
        client.chat(model="scripted", messages=[*HI, whole.message, result], tools=[weather])
    prompt = running.engine.detokenize(running.engine.requests[-1].prompt_token_ids, False)
    assert "K\\u00f6ln" in prompt
    assert "22 C" in prompt


def test_thoughts_stand_apart(start: Callable[..., Any]) -> None:
    running = start(PacedEngine("<think>Let me see.</think>Four."), reasoning_parser="qwen3")
    with client_of(running) as client:
        for whole in (client.chat(**ASK, think=True), client.chat(**ASK, think="high")):
            assert (whole.message.thinking, whole.message.content) == ("Let me see.", "Four.")
        pieces = list(client.chat(**ASK, think=True, stream=True))
        assert "".join(piece.message.thinking or "" for piece in pieces) == "Let me see."
        assert client.chat(**ASK, think=False).message.thinking is None
        assert client.generate("scripted", "Hi", think=True).thinking == "Let me see."
        hidden = client.generate("scripted", "Hi", think=False)
    assert (hidden.thinking, hidden.response) == (None, "Four.")
    with running.http() as http:
        raw = {"model": "scripted", "prompt": "Hi", "raw": True, "think": True, "stream": False}
        assert "think has no effect" in http.post("/api/generate", json=raw).headers["x-warning"]
    assert "<think>Let me see.</think>Four." in running.engine.detokenize(list(hidden.context or ()), False)
    with client_of(start()) as client, pytest.raises(ollama.ResponseError, match="does not support thinking"):
        client.chat(**ASK, think=True)


def test_the_form_of_an_answer(start: Callable[..., Any]) -> None:
    running = start(PacedEngine("{}"))
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    with client_of(running) as client:
        client.chat(**ASK, format="json")
        client.generate("scripted", "Hi", format=schema)
    forms = [request.params.structured_outputs for request in running.engine.requests]
    assert (forms[0].json_object, forms[1].json) == (True, schema)


def test_a_gap_is_filled_by_a_model_that_can(start: Callable[..., Any]) -> None:
    with client_of(start()) as client, pytest.raises(ollama.ResponseError, match="suffix") as refusal:
        client.generate("scripted", "def f(", suffix="return 1")
    assert refusal.value.status_code == 400


def test_options_reach_the_engine(start: Callable[..., Any]) -> None:
    running = start(temperature=0.25)
    with client_of(running) as client:
        client.chat(**ASK)
        client.chat(**ASK, options={"temperature": 0.75, "num_predict": 3, "repeat_penalty": 1.5, "stop": ["x"]})
        assert client.chat(**ASK, options={"num_predict": 1 << 20}).done_reason == "stop"
        assert client.generate("scripted", "Hi", raw=True, options={"num_predict": 1 << 20}).done
    first, second, *_ = (request.params for request in running.engine.requests)
    assert (first.temperature, second.temperature) == (0.25, 0.75)
    assert (second.max_tokens, second.repetition_penalty, second.stop) == (3, 1.5, ["x"])
    with running.http() as client:
        asked = {**ASK, "stream": False, "options": {"num_ctx": 1 << 20}}
        assert "num_ctx is 1048576" in client.post("/api/chat", json=asked).headers["x-warning"]


def test_log_probabilities(start: Callable[..., Any]) -> None:
    with client_of(start(PacedEngine("ab"))) as client:
        whole = client.chat(**ASK, logprobs=True, top_logprobs=2)
        pieces = list(client.chat(**ASK, logprobs=True, top_logprobs=2, stream=True))
        generated = client.generate("scripted", "Hi", logprobs=True)
    assert [each.token for each in whole.logprobs or ()] == ["a", "b"]  # and not the token that ends the answer
    assert [each.token for each in generated.logprobs or ()] == ["a", "b"]
    assert [each for piece in pieces[:-1] for each in piece.logprobs or ()] == whole.logprobs


def test_vectors(start: Callable[..., Any]) -> None:
    running = start(PacedEngine(max_model_len=8))
    with client_of(running) as client:
        made = client.embed("scripted", ["a", "b"])
        assert len(made.embeddings) == 2
        assert sum(x * x for x in made.embeddings[0]) == pytest.approx(1)
        assert len(client.embeddings("scripted", "a").embedding) == len(made.embeddings[0])
        with pytest.raises(ollama.ResponseError) as refusal:
            client.embed("scripted", "too long a text", truncate=False)
        assert refusal.value.status_code == 400
        for more in ({}, {"truncate": True}):  # Ollama's default is true
            assert client.embed("scripted", "too long a text", **more).prompt_eval_count == 8
    with running.http() as plain:
        for nothing in ({}, {"input": None}, {"input": ""}, {"input": []}):  # only loads the model
            answer = plain.post("/api/embed", json={"model": "scripted", **nothing})
            assert (answer.status_code, answer.json()["embeddings"]) == (200, []), nothing


def test_what_there_is(start: Callable[..., Any]) -> None:
    with client_of(start(repetition_penalty=1.5)) as client:
        (listed,), (resident,) = client.list().models, client.ps().models
        assert (listed.model, listed.details.family) == ("scripted", "scripted")  # type: ignore[union-attr]
        assert (resident.model, resident.context_length, resident.expires_at.year) == ("scripted", 4096, 9999)  # type: ignore[union-attr]
        shown = client.show("scripted")
        assert shown.capabilities == ["completion", "embedding", "rerank"]
        assert (shown.parameters or "").split() == ["repeat_penalty", "1.5"]
        assert shown.modelinfo["general.architecture"] == "scripted"  # type: ignore[index]


def test_a_model_that_is_not_loaded_is_shown_by_its_files(start: Callable[..., Any], tmp_path: Path) -> None:
    folder, loader = write_toy_model(tmp_path / "toy"), FakeLoader()
    manager = ModelManager(Catalogue([ModelEntry("toy", Settings(model=str(folder)))]), loader)
    with client_of(start(manager)) as client:
        assert client.list().models[0].size == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        shown = client.show("toy")
        assert shown.modelinfo["general.architecture"] == "llama"  # type: ignore[index]
        assert shown.capabilities == ["completion"]  # its chat template shows no tools
        assert client.list().models[0].details.family == "llama"  # type: ignore[union-attr]
    assert loader.loads == []


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"model": "other"}, 404, "'other' is not served"),
        ({"options": {"mirostat": 3}}, 400, "options.mirostat"),
        ({"messages": [{"role": "user", "content": "x", "images": [b"x"]}]}, 400, "messages.0.images"),
        ({"keep_alive": "5 minutes"}, 400, "keep_alive"),
    ],
)
def test_wrong_requests_are_named(start: Callable[..., Any], change: Any, status: int, words: str) -> None:
    manager = ModelManager(Catalogue([ModelEntry("scripted", Settings()), ModelEntry("b", Settings())]), FakeLoader())
    with client_of(start(manager)) as client:
        for stream in (False, True):
            with pytest.raises(ollama.ResponseError, match=words) as refusal:
                list(client.chat(**{**ASK, **change}, stream=stream))
            assert refusal.value.status_code == status


def test_refusals_of_the_server_itself(start: Callable[..., Any]) -> None:
    running = start(PacedEngine(submit_error=EngineOverloadedError("full")), max_body_mb=1)
    with running.http() as client:
        for response, status in [
            (client.get("/api/chat"), 405),
            (client.post("/api/nothing"), 404),
            (client.post("/api/chat", content=b"{"), 400),
            (client.post("/api/chat", json={"x": "y" * (2 << 20)}), 413),
            (client.post("/api/chat", json=ASK), 503),
        ]:
            assert response.status_code == status
            assert list(response.json()) == ["error"]
            assert isinstance(response.json()["error"], str)


def test_a_stream_that_fails_ends_with_an_error(start: Callable[..., Any]) -> None:
    running = start(PacedEngine("abcdef", fail_after=3))
    with running.http() as client:
        *_, last = client.post("/api/chat", json=ASK).text.splitlines()
    assert list(json.loads(last)) == ["error"]
    with client_of(running) as client, pytest.raises(ollama.ResponseError, match="failed"):
        list(client.chat(**ASK, stream=True))


def test_documented_curl_lines_work_and_pages_from_elsewhere_do_not(start: Callable[..., Any]) -> None:
    running = start()

    def curl(*arguments: str) -> str:
        made = subprocess.run(["curl", "-s", "--noproxy", "*", *arguments], capture_output=True, text=True, timeout=20)
        assert made.returncode == 0
        return made.stdout

    body = json.dumps({**ASK, "stream": False})
    assert json.loads(curl(f"{running.url}/api/chat", "-d", body))["message"]["content"] == "Hello!"
    lines = curl(f"{running.url}/api/generate", "-d", '{"model": "scripted", "prompt": "Hi"}').splitlines()
    assert [json.loads(line)["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    refused = curl(f"{running.url}/api/chat", "-d", body, "-H", "Origin: http://elsewhere.example")
    assert "--cors-origin" in json.loads(refused)["error"]
    assert len(running.engine.requests) == 2
    own = curl(f"{running.url}/api/chat", "-d", body, "-H", f"Origin: {running.url}")
    assert json.loads(own)["done"]


def test_a_models_size_is_all_of_its_memory(start: Callable[..., Any]) -> None:
    running = start(PacedEngine())
    running.engine._info = replace(running.engine._info, weight_bytes=1, kv_cache_bytes=2, index_bytes=4)
    with running.http() as client:
        assert client.get("/api/ps").json()["models"][0]["size"] == 7


def test_keys_count_here_too(start: Callable[..., Any]) -> None:
    running = start(api_key=("right",))
    with client_of(running, headers={"authorization": "Bearer right"}) as client:
        assert client.chat(**ASK).done
    for path in ("/api/tags", "/api/ps", "/api/version"):
        with running.http() as client:
            refused = client.get(path)
            assert (refused.status_code, list(refused.json())) == (401, ["error"])


def test_a_model_stays_as_long_as_a_request_wants(start: Callable[..., Any]) -> None:
    loader = FakeLoader()
    manager = ModelManager(Catalogue([ModelEntry("scripted", Settings())]), loader)
    running = start(manager)
    with client_of(running) as client:
        assert client.generate("scripted", "").done_reason == "load"
        assert client.chat(model="scripted", messages=[], keep_alive="10m").done_reason == "load"
        (resident,) = client.ps().models
        assert resident.expires_at.year < 9999  # type: ignore[union-attr]
        client.chat(**ASK, keep_alive=-1)
        assert client.ps().models[0].expires_at.year == 9999  # type: ignore[union-attr]
        client.chat(**ASK, keep_alive=0)
        running.wait_for(lambda: not client.ps().models)
        assert client.chat(**ASK).message.content == "Hello!"  # loaded again, and it stays
        assert client.ps().models[0].expires_at.year == 9999  # type: ignore[union-attr]
        assert client.generate("scripted", "", keep_alive=0).done_reason == "unload"
        assert not client.ps().models
    assert loader.loads == ["scripted"] * 2


@pytest.mark.parametrize("named", [{"model": "", "name": "scripted"}, {"model": "scripted", "name": ""}])
def test_an_empty_name_is_as_none(start: Callable[..., Any], named: dict[str, str]) -> None:
    """Ollama's own client sends `model` and `name` with each request, one of them empty."""
    with start().http() as client:
        asked = {"system": "", "template": "", "options": None, **named}
        assert client.post("/api/show", json=asked).json()["modelfile"].endswith("FROM scripted\n")
        refused = client.post("/api/show", json={"model": "", "name": ""})
        assert (refused.status_code, "the name of a model" in refused.text) == (400, True)


def test_latest_is_no_part_of_a_name(start: Callable[..., Any]) -> None:
    names = ("org/two", "second")
    entries = [ModelEntry("one", Settings()), ModelEntry("org/two", Settings(served_model_name=names), names)]
    manager = ModelManager(Catalogue(entries), FakeLoader())
    with client_of(start(manager, allow_model_changes=True)) as client:
        for name in ("one", "org/two"):
            answer = client.chat(f"{name}:latest", HI)
            assert (answer.model, answer.message.content) == (name, "Hello!")
            assert client.generate(f"{name}:latest", "Hi").response == "Hello!"
            assert f"FROM {name}" in (client.show(f"{name}:latest").modelfile or "")
        client.copy("org/two:latest", "mine:latest")
        assert client.chat("mine", HI).model == "mine"
        client.delete("mine:latest")
        for wrong in (" ", "a\nb", " a", ":latest"):
            with pytest.raises(ollama.ResponseError, match="is not a valid name"):
                client.copy("one", wrong)
        with pytest.raises(ollama.ResponseError, match="cannot be called 'default'"):
            client.copy("org/two", "default")
        with pytest.raises(ollama.ResponseError, match="was not downloaded by this server"):
            client.delete("second")  # a name that the operator gave
        client.copy("one", "mine")
        with pytest.raises(ollama.ResponseError, match="was not downloaded by this server"):
            client.delete("default")  # which is no name of a copy
        client.delete("mine")
        assert [model.model for model in client.list().models] == ["one", *names]
        with pytest.raises(ollama.ResponseError, match="'three:latest' is not served here; served models are: one"):
            client.chat("three:latest", HI)


def test_who_cannot_unload_is_told(start: Callable[..., Any]) -> None:
    manager = ModelManager(Catalogue([ModelEntry("scripted", Settings())]), FakeLoader())
    asked = {**ASK, "stream": False, "keep_alive": 0}
    for running in (start(manager, management_key=("operator",)), start()):
        with running.http() as client:
            assert "keep_alive has no effect" in client.post("/api/chat", json=asked).headers["x-warning"]
            assert len(client.get("/api/ps").json()["models"]) == 1


def test_a_key_that_opens_no_routes_of_operators_unloads_nothing(start: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("keys: [{name: a, key: client}, {name: b, key: operator, manages: true}]")
    for keys in ({"api_keys_file": tmp_path / "keys"}, {"management_key": ("operator",)}):
        running = start(ModelManager(Catalogue([ModelEntry("scripted", Settings())]), FakeLoader()), **keys)
        for key, said, loaded in (("client", "load", 1), ("operator", "unload", 0)):
            with client_of(running, headers={"authorization": f"Bearer {key}"}) as client:
                assert client.generate("scripted", "", keep_alive=0).done_reason == said
                assert len(client.ps().models) == loaded


# ---- changing which models there are ---------------------------------------------------------------------------------

REPO = "org/model-GGUF"


@pytest.fixture
def changing(start: Callable[..., Any], fake_hub: Any, tmp_path: Path) -> Callable[..., Any]:
    """Starts servers whose models clients may change, with a repository to fetch."""
    fake_hub.repos[REPO] = {"model-Q4_K_M.gguf": os.urandom(1 << 20), "model-Q8_0.gguf": b"x", "config.json": b"{}"}

    def changing(**settings: Any) -> Any:
        settings = {"allow_model_changes": True, "download_dir": tmp_path / "hub", **settings}
        return start(ModelManager(Catalogue([ModelEntry("scripted", Settings(**settings))]), FakeLoader()), **settings)

    return changing


def test_a_model_is_pulled_asked_copied_and_deleted(changing: Callable[..., Any], fake_hub: Any) -> None:
    with client_of(changing()) as client:
        told = list(client.pull(f"hf.co/{REPO}:Q4_K_M", stream=True))
        assert (told[0].status, told[-1].status) == ("pulling manifest", "success")
        assert "fits: needs at least" in (told[1].status or "")
        sums = [line for line in told if line.total]
        assert sums[-1].completed == sums[-1].total == 1 << 20
        assert (sums[-1].digest or "").removeprefix("sha256:") == fake_hub.told(REPO, "model-Q4_K_M.gguf")
        assert client.pull(f"{REPO}:Q8_0").status == "success"
        names = [f"{REPO}:Q4_K_M", f"hf.co/{REPO}:Q4_K_M", f"{REPO}:Q8_0"]
        assert [model.model for model in client.list().models] == ["scripted", *names]
        for name in names[:2]:
            assert client.chat(name, HI).message.content == "Hello!"
        for copy in ("mine", "yours"):
            client.copy(names[0], copy)
            answer = client.chat(copy, HI)
            assert (answer.model, answer.message.content) == (copy, "Hello!")
        client.delete("yours")
        with pytest.raises(ollama.ResponseError, match="not served"):
            client.chat("yours", HI)
        with pytest.raises(ollama.ResponseError, match="both called 'scripted'"):
            client.copy(names[0], "scripted")
        client.delete("mine")
        client.delete(names[1])
        assert [model.model for model in client.list().models] == ["scripted", names[2]]
        with pytest.raises(ollama.ResponseError, match="not served") as gone:
            client.chat(names[0], HI)
        assert gone.value.status_code == 404
        with pytest.raises(ollama.ResponseError, match="was not downloaded by this server"):
            client.delete("scripted")


def test_a_model_is_deleted_by_the_name_of_its_pull(changing: Callable[..., Any]) -> None:
    """Also by one without a tag, and by one that a later pull brought."""
    name = f"hf.co/{REPO}"
    with client_of(changing()) as client:
        for names in ((name,), (f"{REPO}:Q4_K_M", name)):
            for each in names:
                assert client.pull(each).status == "success"
            assert client.chat(name, HI).message.content == "Hello!"
            client.delete(name)
            assert [model.model for model in client.list().models] == ["scripted"]
            with pytest.raises(ollama.ResponseError, match="not served"):
                client.delete(name)


def test_models_of_one_repository_are_deleted_one_after_the_other(
    changing: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, together = downloads._repos, list[int]()

    def slow(settings: Any) -> Any:
        together.append(1)
        time.sleep(0.1)
        assert len(together) == 1
        repos = list(found(settings))
        together.pop()
        return repos

    names = [f"{REPO}:Q4_K_M", f"{REPO}:Q8_0"]
    with client_of(changing()) as client:
        for name in names:
            client.pull(name)
        monkeypatch.setattr(downloads, "_repos", slow)
        with ThreadPoolExecutor() as threads:
            list(threads.map(client.delete, names))
        assert [model.model for model in client.list().models] == ["scripted"]


def test_a_pull_that_fails_says_why(changing: Callable[..., Any], fake_hub: Any) -> None:
    fake_hub.sums[REPO, "model-Q4_K_M.gguf"] = "0" * 64
    running = changing()
    with client_of(running) as client:
        for name, status, why in [
            ("org/other", 404, "Hugging Face has no model"),
            (REPO + ":Q2_K", 404, "no file 'Q2_K'"),
            ("nothing", 404, "there is no model 'nothing'"),
            (REPO, 502, "does not match Hugging Face's checksum"),
        ]:
            with pytest.raises(ollama.ResponseError, match=why) as refusal:
                client.pull(name)
            assert refusal.value.status_code == status
        with pytest.raises(ollama.ResponseError, match="does not match Hugging Face's checksum"):
            list(client.pull(REPO, stream=True))
        assert len(client.list().models) == 1
        fake_hub.stop()
        huggingface_hub.close_session()
        with pytest.raises(ollama.ResponseError, match="Hugging Face, which cannot be reached") as refusal:
            client.pull(REPO)
        assert refusal.value.status_code == 502, "a 404 says that there is no such model"


def test_a_pull_is_followed_stopped_and_gone_on_with(
    changing: Callable[..., Any], fake_hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 16)
    name, released = f"{REPO}:Q4_K_M", threading.Event()
    fake_hub.held = (1 << 19, released)
    with changing().http() as client:

        def pulls() -> Any:
            return client.get("/v1/models/inventory").json()["pulls"]

        def begin(model: str) -> None:  # and leaves
            with client.stream("POST", "/api/pull", json={"model": model}) as answer:
                assert answer.status_code == 200

        begin(f"hf.co/{name}")
        wait_for(lambda: any(0 < each["done"] <= 1 << 19 for each in pulls()))
        (told,) = pulls()
        assert (told["model"], told["asked"], told["state"]) == (name, f"hf.co/{name}", "downloading")
        assert (told["total"], told["fits"], told["failure"]) == (1 << 20, "now", None)
        begin(f"{REPO}:Q8_0")  # which waits for its turn
        begin(name)  # which is the same
        assert [each["state"] for each in pulls()] == ["downloading", "waiting"]
        assert client.request("DELETE", "/api/pull", json={"model": f"{REPO}:Q8_0", "remove": True}).status_code == 200
        assert client.request("DELETE", "/api/pull", json={"model": name}).status_code == 200
        assert [each["state"] for each in pulls()] == ["stopping"]
        released.set()
        wait_for(lambda: [each["state"] for each in pulls()] == ["stopped"])
        begin(name)
        wait_for(lambda: pulls() == [])
        ranges = [wanted for file, wanted in fake_hub.asked if file == "model-Q4_K_M.gguf"]
        assert ranges[0] is None
        assert int((ranges[1] or "").removeprefix("bytes=").rstrip("-")) > 0
        assert client.post("/api/chat", json={**ASK, "model": name}).status_code == 200
        gone = client.request("DELETE", "/api/pull", json={"model": name})
        assert (gone.status_code, gone.headers["x-error-code"]) == (404, "model_not_found")


def test_what_there_is_is_told_to_operators(changing: Callable[..., Any], fake_hub: Any) -> None:
    fake_hub.repos["Qwen/Qwen3-0.6B-GGUF"] = {"Qwen3-0.6B-Q8_0.gguf": b"y" * 999}
    with changing(api_key=("client",), management_key=("operator",)).http() as client:
        assert client.get("/v1/models/inventory", headers={"authorization": "Bearer client"}).status_code == 401
        client.headers["authorization"] = "Bearer operator"
        foreign = {"origin": "http://elsewhere.example"}
        assert client.get("/v1/models/inventory", headers=foreign).status_code == 403
        refused = client.post("/api/pull", json={"model": f"{REPO}:Q2_K"})
        assert (refused.status_code, refused.headers["x-error-code"]) == (404, "no_such_file")
        fake_hub.sums[REPO, "model-Q8_0.gguf"] = "0" * 64
        assert client.post("/api/pull", json={"model": f"{REPO}:Q8_0", "stream": False}).status_code == 502
        assert client.post("/api/pull", json={"model": "qwen3:0.6b", "stream": False}).status_code == 200
        shown = client.post("/api/show", json={"model": "qwen3:0.6b"}, headers={"authorization": "Bearer client"})
        assert (shown.status_code, shown.headers["x-error-code"]) == (409, "model_unusable")
        told = client.get("/v1/models/inventory").json()
        assert told["changes"] is True
        assert 0 < told["memory_free"] <= told["memory_most"]
        assert [(each["id"], each["removable"]) for each in told["models"]] == [
            ("scripted", False), ("Qwen/Qwen3-0.6B-GGUF:Q8_0", True)
        ]  # fmt: skip
        fetched = told["models"][1]
        assert (fetched["size"], fetched["needed"], fetched["fits"]) == (999, 999 + (512 << 20), "now")
        known = {each["name"]: each for each in told["known"]}
        assert known["qwen3:0.6b"]["served"] == "Qwen/Qwen3-0.6B-GGUF:Q8_0"
        assert (known["qwen3:8b"]["served"], known["qwen3:8b"]["needed"]) == (None, 5300 << 20)
        (failed,) = told["pulls"]
        assert (failed["state"], failed["failure"]) == ("failed", "damaged")
        assert "does not match Hugging Face's checksum" in failed["error"]
        client.request("DELETE", "/api/pull", json={"model": failed["model"], "remove": True})
        assert client.get("/v1/models/inventory").json()["pulls"] == []


def test_what_there_is_where_models_stay(start: Callable[..., Any]) -> None:
    with start().http() as client:
        told = client.get("/v1/models/inventory").json()
    assert (told["changes"], told["pulls"]) == (False, [])
    assert [(each["id"], each["fits"], each["removable"]) for each in told["models"]] == [("scripted", None, False)]


def test_models_are_changed_where_the_operator_allows_it_alone(
    start: Callable[..., Any], changing: Callable[..., Any], fake_hub: Any
) -> None:
    asked = [("POST", "/api/pull", {"model": REPO}), ("DELETE", "/api/pull", {"model": REPO}),
             ("DELETE", "/api/delete", {"model": "scripted"}),
             ("POST", "/api/copy", {"source": "scripted", "destination": "x"})]  # fmt: skip
    with start().http() as client:
        for method, path, body in asked:
            refused = client.request(method, path, json=body)
            assert refused.status_code == 403
            assert "--allow-model-changes" in refused.json()["error"]
    with changing(api_key=("client",), management_key=("operator",)).http() as client:
        for method, path, body in asked:
            for key, status in (("client", 401), ("wrong", 401)):
                headers = {"authorization": f"Bearer {key}"}
                assert client.request(method, path, json=body, headers=headers).status_code == status
    assert fake_hub.asked == []
    with pytest.raises(UsageError, match="--allow-model-changes lets everybody who reaches"):
        refuse_open_changes(Settings(allow_model_changes=True, host="0.0.0.0"))
    refuse_open_changes(Settings(allow_model_changes=True, host="0.0.0.0", api_key=("k",)))
    refuse_open_changes(Settings(allow_model_changes=True))


def test_ollama_s_own_port() -> None:
    """A second port of the same server, where `/` says what Ollama's clients look for."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = Settings(port=0, ollama_port=port, shutdown_timeout=1, api_key=("right",))
    first = bind(settings.address)
    listeners = [first, *bind_second(settings, first)]
    server = make_server(create_app(PacedEngine(), settings), settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": listeners}, daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started)
        own, usual = (f"http://127.0.0.1:{each}" for each in (port, first.getsockname()[1]))
        with httpx.Client(trust_env=False, verify=trusted(), headers={"authorization": "Bearer right"}) as client:
            assert client.get(own).text == "Ollama is running"
            assert client.head(own).status_code == 200
            assert client.get(usual).json()["name"] == "candle-vllm"
            assert [client.get(f"{each}/api/tags").status_code for each in (own, usual)] == [200, 200]
        assert httpx.get(f"{own}/api/tags", trust_env=False).status_code == 401
        with pytest.raises(NotReadyError, match="in use"):
            bind_second(settings, first)
    finally:
        server.should_exit = True
        thread.join(60)
    assert bind_second(Settings(port=11434, ollama_port=11434), first) == []


# ---- the client of another language ----------------------------------------------------------------------------------

SCRIPT = """
const { Ollama } = require("ollama");
(async () => {
  const client = new Ollama({ host: process.argv[2] });
  const messages = [{ role: "user", content: "Hi" }];
  const whole = await client.chat({ model: "scripted", messages });
  let pieces = "";
  for await (const part of await client.chat({ model: "scripted", messages, stream: true }))
    pieces += part.message.content;
  const text = await client.generate({ model: "scripted", prompt: "Hi", keep_alive: "5m" });
  const vectors = await client.embed({ model: "scripted", input: ["a", "b"] });
  const listed = await client.list(), resident = await client.ps(), shown = await client.show({ model: "scripted" });
  let refused = "";
  const options = { mirostat: 3 };
  try { await client.chat({ model: "scripted", messages, options }); } catch (error) { refused = String(error); }
  console.log(JSON.stringify([whole.message.content, pieces, text.response, vectors.embeddings.length,
    listed.models[0].name, resident.models[0].name, shown.capabilities[0], refused]));
})();
"""


def test_the_client_for_javascript(start: Callable[..., Any], tmp_path: Path) -> None:
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm is None or node is None:
        pytest.skip("npm is not installed")
    command = [npm, "install", "--silent", "--no-audit", "--no-fund", "--ignore-scripts", "ollama@0.6.4"]
    installed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    if installed.returncode != 0:
        pytest.skip(f"the package cannot be installed: {installed.stderr[-200:]}")
    (tmp_path / "ask.js").write_text(SCRIPT)
    running = start(PacedEngine("Good day!"))
    environment = {**os.environ, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    asked = subprocess.run(
        [node, "ask.js", running.url], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert asked.returncode == 0, asked.stderr
    *said, refused = json.loads(asked.stdout)
    assert said == [*["Good day!"] * 3, 2, "scripted", "scripted", "completion"]
    assert "options.mirostat" in refused


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_lines_of_streams_are_lines_for_every_reader(start: Callable[..., Any], path: str) -> None:
    """Ollama's client, httpx and requests cut where Python does; models copy such characters from what they read."""
    running, answer = start(PacedEngine("a\u2028b\u2029c\x85d")), ""
    asked: dict[str, Any] = {"input": "Hi"} if path == "/v1/responses" else {"messages": HI}
    asked |= {"max_tokens": 20} if path == "/v1/messages" else {}
    fields = {"model": "scripted", "stream": True, **asked}
    with httpx.stream("POST", running.url + path, json=fields, trust_env=False, verify=trusted()) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            data = line.removeprefix("data: ")
            if data.startswith("{"):
                answer += json.dumps(json.loads(data), ensure_ascii=False)
    assert [end in answer for end in ("\u2028", "\u2029", "\x85")] == [True] * 3
