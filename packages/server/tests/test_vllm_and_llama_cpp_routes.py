# SPDX-License-Identifier: MIT
"""Routes that clients of vLLM and of llama.cpp's server know."""

from __future__ import annotations

import base64
import json
import re
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from candle_vllm.core.testing.scripted_engine import ScriptedEngine
from candle_vllm.server import Settings
from candle_vllm.server.models.loader import serve_engine
from candle_vllm.server.models.manager import ModelManager
from candle_vllm.server.observing.metrics import Metrics
from candle_vllm.server.settings.catalogue import ModelEntry
from packages.server.tests.running_server import paths_of
from packages.server.tests.server_fakes import PacedEngine

MARKS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
MESSAGES = [{"role": "user", "content": "Hi"}]
GETS = ("/ping", "/load", "/server_info", "/tokenizer_info", "/props", "/slots")


@pytest.mark.parametrize("path", GETS)
def test_every_route_but_ping_needs_the_key(start: Callable[..., Any], path: str) -> None:
    with start(PacedEngine(), api_key=("secret",)).http() as client:
        assert client.get(path).status_code == (200 if path == "/ping" else 401)
        assert client.get(path, headers={"authorization": "Bearer secret"}).status_code == 200


def test_ping_is_health(start: Callable[..., Any]) -> None:
    running = start(PacedEngine())
    with running.http() as client:
        assert client.get("/ping").json() == {"status": "ok"}
        running.engine.die()
        assert client.get("/ping").status_code == client.get("/health").status_code == 503


def test_load_and_slots_count_what_runs(start: Callable[..., Any]) -> None:
    running = start(PacedEngine(["a"] * 400, pause=0.01))
    body = {"messages": MESSAGES, "stream": True, "n": 2}
    with running.http() as client, running.http() as other:
        assert other.get("/load").json() == {"server_load": 0}
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            assert answer.status_code == 200, answer.read()
            lines = answer.iter_lines()  # closed with it, the stream would end
            next(lines)
            assert other.get("/load").json() == {"server_load": 1}  # requests, as in vLLM, not their sequences
            slots = other.get("/slots").json()
        assert [slot["id"] for slot in slots] == list(range(len(slots)))
        assert slots[0]["is_processing"] is True
        running.wait_for(lambda: other.get("/load").json() == {"server_load": 0})


def test_what_is_told_of_a_model(start: Callable[..., Any]) -> None:
    settings = {"temperature": 0.25, "repetition_penalty": 1.5}
    running = start(PacedEngine(), **settings, served_model_name=("name", "other"))
    info = running.engine.model_info
    with running.http() as client:
        props = client.get("/props").json()
        assert props["default_generation_settings"]["n_ctx"] == info.max_model_len
        params = props["default_generation_settings"]["params"]
        assert (params["temperature"], params["repeat_penalty"]) == (0.25, 1.5)
        assert "repetition_penalty" not in params
        assert props["total_slots"] == info.max_num_seqs == len(client.get("/slots").json())
        assert props["model_alias"] == "name"
        assert props["chat_template"] == client.get("/tokenizer_info").json().get("chat_template", "")
        assert client.get("/props", params={"model": "other"}).json() == props
        told = client.get("/tokenizer_info").json()
        assert (told["vocab_size"], told["model_max_length"]) == (info.vocab_size, info.max_model_len)


def test_a_model_that_is_not_served_is_named(start: Callable[..., Any]) -> None:
    with start(PacedEngine(), strict_model_names=True).http() as client:
        for path in ("/props", "/slots", "/tokenizer_info"):
            refused = client.get(path, params={"model": "none-such"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found"), path


def test_what_the_server_was_started_with_has_no_secrets(start: Callable[..., Any]) -> None:
    running = start(PacedEngine(), api_key=("secret-1",), management_key=("secret-2",), request_timeout=77)
    with running.http() as client:
        assert client.get("/server_info", headers={"authorization": "Bearer secret-1"}).status_code == 401
        answer = client.get("/server_info", headers={"authorization": "Bearer secret-2"})
        assert answer.json()["vllm_config"]["request_timeout"] == 77
        assert answer.json()["vllm_config"]["api_key"] == ["***"]
        assert "secret" not in answer.text.replace("secret-key", "")


def test_no_route_shows_the_secrets_of_an_address(start: Callable[..., Any], tmp_path: Path) -> None:
    address = "https://user:HIDDENWORD@h.example/{name}.tar.gz?sig=HIDDENWORD#HIDDENWORD"
    running = start(
        PacedEngine(), model=address.replace("{name}", "m"), lora_resolver=("tar=" + address,), enable_lora=True,
        lora_modules=("poems=" + address,), lora_cache_dir=tmp_path / "c", mcp_args="--token HIDDENWORD",
    )  # fmt: skip
    with running.http() as client:
        told = client.get("/server_info").json()["vllm_config"]
        assert told["model"] == "https://h.example/m.tar.gz"
        assert told["lora_resolver"] == ["tar=https://h.example/{name}.tar.gz"]
        for path in sorted(paths_of(running.server.config.app, "GET")):
            assert "HIDDENWORD" not in client.get(path).text, path


def test_a_template_is_what_a_chat_request_begins_with(start: Callable[..., Any]) -> None:
    with start(PacedEngine()).http() as client:
        prompt = client.post("/apply-template", json={"messages": MESSAGES}).json()["prompt"]
        tokens = client.post("/tokenize", json={"messages": MESSAGES}).json()["tokens"]
        assert "Hi" in prompt
        assert client.post("/detokenize", json={"tokens": tokens}).json()["prompt"] == prompt


def test_pooling_is_an_embedding_in_other_words(start: Callable[..., Any]) -> None:
    with start(PacedEngine()).http() as client:
        body = {"input": ["one", "two"]}
        vectors = client.post("/v1/embeddings", json=body).json()
        pooled = client.post("/pooling", json={**body, "task": "embed"}).json()
        assert [each["data"] for each in pooled["data"]] == [each["embedding"] for each in vectors["data"]]
        assert {each["object"] for each in pooled["data"]} == {"pooling"}
        assert pooled["usage"] == vectors["usage"]
        packed = client.post("/pooling", json={**body, "encoding_format": "base64"}).json()["data"][0]["data"]
        numbers = struct.unpack(f"<{len(pooled['data'][0]['data'])}f", base64.b64decode(packed))
        assert numbers == pytest.approx(pooled["data"][0]["data"])
        for path in ("/v1/embeddings", "/pooling"):
            sent = client.post(path, json={**body, "encoding_format": "bytes", "embed_dtype": "float16"})
            assert sent.headers["content-type"] == "application/octet-stream"
            told = json.loads(sent.headers["metadata"])
            assert (told["usage"], told["data"][-1]["end"]) == (vectors["usage"], len(sent.content))
            halves = struct.unpack(f"<{len(sent.content) // 2}e", sent.content)
            assert halves[: len(numbers)] == pytest.approx(numbers, rel=1e-3)
            alone = client.post(path, json={**body, "encoding_format": "bytes_only", "endianness": "big"})
            assert "metadata" not in alone.headers
            assert struct.unpack(f">{len(numbers)}f", alone.content[: 4 * len(numbers)]) == numbers


def test_embeddings_in_llama_cpps_form(start: Callable[..., Any]) -> None:
    with start(PacedEngine()).http() as client:
        wanted = client.post("/v1/embeddings", json={"input": ["one", "two"], "normalize": True}).json()["data"]
        form = [{"index": each["index"], "embedding": [each["embedding"]]} for each in wanted]
        for path in ("/embedding", "/embeddings", "/v1/embeddings"):
            assert client.post(path, json={"content": ["one", "two"]}).json() == form, path
        assert client.post("/embeddings", json={"input": "one", "normalize": True}).json()["data"] == wanted[:1]
        assert client.post("/embedding", json={"input": "one"}).json() == form[:1]
        raw = client.post("/v1/embeddings", json={"input": "one", "normalize": False}).json()["data"][0]["embedding"]
        plain = client.post("/embedding", json={"content": "one", "normalize": False}).json()[0]["embedding"]
        assert plain == [raw] != form[0]["embedding"]
        for body, param in (
            ({"content": []}, "content"), ({"content": ["a", ""]}, "content.1"),
            ({"content": "a", "input": "b"}, "input"), ({"content": "a", "embd_normalize": -1}, "embd_normalize"),
        ):  # fmt: skip
            refused = client.post("/embedding", json=body)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/completion", {"prompt": "a", "n_predict": 1}),
        ("/tokenize", {"content": "a"}), ("/embedding", {"content": "a"}), ("/apply-template", {"messages": MESSAGES}),
    ],
)  # fmt: skip
def test_llama_cpps_own_routes_need_no_content_type(start: Callable[..., Any], path: str, body: Any) -> None:
    """As llama-server's; a page of another origin is refused by its origin."""
    with start(PacedEngine()).http() as client:
        content = json.dumps(body).encode()
        page = {"origin": "https://elsewhere.example"}
        assert client.post(path, content=content, headers=page).status_code == 403
        assert client.post(path, content=content).status_code == 200
        curls = {"content-type": "application/x-www-form-urlencoded"}
        assert client.post(path, content=content, headers=curls).status_code == 200
        assert client.post("/v1/completions", content=content).status_code == 415


def test_classes_of_texts(start: Callable[..., Any]) -> None:
    running = start(ScriptedEngine(tasks=("classify",)))
    with running.http() as client:
        found = client.post("/classify", json={"input": [[5, 8], [3, 6, 9], [4, 5, 1]]}).json()
        assert [each["index"] for each in found["data"]] == [0, 1, 2]
        assert (found["data"][1]["label"], found["data"][1]["probs"]) == ("first", [1.0, 0.0, 0.0])
        assert found["data"][2]["label"] == "second"
        assert {each["num_classes"] for each in found["data"]} == {3}
        assert found["usage"]["prompt_tokens"] == found["usage"]["total_tokens"] == 8
        refused = client.post("/v1/embeddings", json={"input": "a"})
        assert refused.status_code == 400
        assert "use /classify" in refused.json()["error"]["message"]
        metrics = client.get("/metrics").text
    assert running.engine.pooling_calls
    assert re.search(r"vllm:prompt_tokens_total\{[^}]*\} 8\b", metrics)
    with start(PacedEngine()).http() as client:
        refused = client.post("/classify", json={"input": "a"})
        assert refused.status_code == 400
        assert "does not classify texts" in refused.json()["error"]["message"]


def test_a_reset_of_the_prefix_cache_is_for_operators(start: Callable[..., Any]) -> None:
    running = start(PacedEngine(), api_key=("key",), management_key=("operator",))
    with running.http() as client:
        assert client.post("/reset_prefix_cache", headers={"authorization": "Bearer key"}).status_code == 401
        assert running.engine.prefix_cache_resets == 0
        answer = client.post("/reset_prefix_cache", headers={"authorization": "Bearer operator"})
        assert (answer.status_code, answer.content) == (204, b"")
        assert running.engine.prefix_cache_resets == 1


def test_models_sleep_and_wake(start: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    running = start(PacedEngine(), api_key=("key",), management_key=("operator",))
    operator, body = {"authorization": "Bearer operator"}, {"messages": [{"role": "user", "content": "hello"}]}
    with running.http() as client:
        for method, path in (("POST", "/sleep"), ("POST", "/wake_up"), ("GET", "/is_sleeping")):
            assert client.request(method, path, headers={"authorization": "Bearer key"}).status_code == 401
        for wrong, code in {"level=3": "wrong_level", "level=": "wrong_level", "mode=keep": "wrong_mode"}.items():
            refused = client.post(f"/sleep?{wrong}", headers=operator)
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, code)
        assert client.post("/wake_up?tags=cache", headers=operator).json()["error"]["code"] == "wrong_tags"
        assert client.post("/sleep?model=other", headers=operator).status_code == 404
        assert client.get("/is_sleeping", headers=operator).json() == {"is_sleeping": False}
        assert client.post("/sleep?level=2", headers=operator).status_code == 200
        assert client.get("/is_sleeping", headers=operator).json() == {"is_sleeping": True}
        asked = client.get("/ready")
        assert (asked.status_code, asked.json()) == (503, {"status": "sleeping"}), "a load balancer would go on sending"
        refused = client.post("/v1/chat/completions", json=body, headers={"authorization": "Bearer key"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_sleeping")
        assert "/wake_up" in refused.json()["error"]["message"]
        assert not [record for record in caplog.records if record.levelname == "ERROR"]  # an operator wanted it so
        metrics = client.get("/metrics", headers=operator).text
        assert re.search(r'vllm:engine_sleep_state\{[^}]*sleep_state="discard_all"[^}]*\} 1\b', metrics)
        assert client.post("/wake_up?tags=weights", headers=operator).status_code == 200
        assert client.get("/is_sleeping", headers=operator).json() == {"is_sleeping": True}
        assert client.post("/wake_up", headers=operator).status_code == 200
        answered = client.post("/v1/chat/completions", json=body, headers={"authorization": "Bearer key"})
        assert answered.status_code == 200
        metrics = client.get("/metrics", headers=operator).text
        assert re.search(r'vllm:engine_sleep_state\{[^}]*sleep_state="awake"[^}]*\} 1\b', metrics)


def test_a_model_finishes_what_waits_before_it_sleeps(start: Callable[..., Any]) -> None:
    """Requests that have not reached the engine, too; new ones are refused."""
    engine = PacedEngine(["a"] * 20, pause=0.05)
    engine._info = msgspec.structs.replace(engine.model_info, max_num_seqs=1)  # one more waits in the engine
    running, body, answers = start(engine), {"messages": MESSAGES}, list[int]()

    def ask() -> None:
        with running.http() as client:
            answers.append(client.post("/v1/chat/completions", json=body).status_code)

    asking = [threading.Thread(target=ask) for _ in range(4)]
    with running.http() as client:
        for thread in asking:
            thread.start()
        running.wait_for(lambda: client.get("/load").json() == {"server_load": 4})
        sleeping = threading.Thread(target=lambda: answers.append(client.post("/sleep?mode=wait").status_code))
        sleeping.start()
        with running.http() as other:
            running.wait_for(lambda: other.get("/is_sleeping").json()["is_sleeping"])
            assert other.get("/ready").json() == {"status": "sleeping"}
            refused = other.post("/v1/chat/completions", json=body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_sleeping")
            for thread in (*asking, sleeping):
                thread.join()
            assert answers == [200] * 5
            assert (
                other.post("/wake_up").status_code == other.post("/v1/chat/completions", json=body).status_code == 200
            )


def test_an_operator_who_leaves_ends_the_wait_before_sleep(start: Callable[..., Any]) -> None:
    """Only their own: while another operator waits, new requests are refused."""
    metrics, engine = Metrics(), PacedEngine(["a"] * 400, pause=0.05)
    manager = ModelManager.of_loaded(serve_engine(engine, ModelEntry("scripted", Settings()), metrics), metrics)
    running, body, [slot] = start(manager), {"messages": MESSAGES, "max_tokens": 1}, manager.slots.values()

    def status() -> int:
        with running.http() as client:
            return client.post("/v1/chat/completions", json=body).status_code

    def second() -> bool:
        running.leave("/sleep?mode=wait", {}, lambda: slot.resting == 2)
        running.wait_for(lambda: slot.resting == 1)
        assert status() == 503
        return True

    with running.http() as client:
        asked = {**body, "max_tokens": 400, "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=asked) as answer:
            next(lines := answer.iter_lines())  # closing the iterator would close the answer
            running.leave("/sleep?mode=wait", {}, lambda: slot.resting and second())
            running.wait_for(lambda: not slot.resting)
            assert status() == 200
            next(lines)


def pieces(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.headers["content-type"].startswith("text/event-stream")
    return [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line]


# What an editor's plugin for llama.cpp's server sends.
EDITOR: dict[str, Any] = {
    "input_prefix": "def add(a, b):\n",
    "input_suffix": "\n\nprint(add(1, 2))\n",
    "input_extra": [{"text": "import math", "filename": "other.py", "time": [5, 7]}],
    "prompt": "    ret",
    "n_predict": 128,
    "n_indent": 4,
    "top_k": 40,
    "top_p": 0.99,
    "stream": False,
    "samplers": ["top_k", "top_p", "infill"],
    "cache_prompt": True,
    "t_max_prompt_ms": 500,
    "t_max_predict_ms": 1000,
}


@pytest.mark.parametrize("prefix", ["", "/behind/a/proxy"])
def test_routes_of_openai_without_their_version(start: Callable[..., Any], prefix: str) -> None:
    """llama-server has them, and clients whose base URL lacks /v1 ask for them; keys and counts are as with it."""
    running = start(PacedEngine("Good day!"), api_key=("key",), **({"root_path": prefix} if prefix else {}))
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    with running.http(headers={"authorization": "Bearer key"}) as client:
        answer = client.post(prefix + "/chat/completions", json=body).json()
        assert answer["choices"][0]["message"]["content"] == "Good day!"
        assert client.get(prefix + "/models").json() == client.get("/v1/models").json()
        assert client.post(prefix + "/responses", json={"input": "Hi"}).json()["object"] == "response"
        assert client.post(prefix + "/models", json={}).status_code == 405
        assert 'handler="/v1/chat/completions"' in client.get("/metrics").text
    with running.http() as stranger:
        assert stranger.post(prefix + "/chat/completions", json=body).status_code == 401
        assert stranger.get(prefix + "/models").status_code == 401


def test_tokens_in_llama_cpps_words(start: Callable[..., Any]) -> None:
    running = start(PacedEngine())
    with running.http() as client:
        plain = client.post("/tokenize", json={"content": "Hi é"}).json()
        ids = client.post("/tokenize", json={"prompt": "Hi é", "add_special_tokens": False}).json()["tokens"]
        assert plain == {"tokens": ids}
        special = client.post("/tokenize", json={"content": "Hi é", "add_special": True, "parse_special": True}).json()
        assert special == {"tokens": client.post("/tokenize", json={"prompt": "Hi é"}).json()["tokens"]}
        pieces = client.post("/tokenize", json={"content": "Hi", "with_pieces": True}).json()["tokens"]
        assert [piece["piece"] for piece in pieces] == ["H", "i"]
        assert [piece["id"] for piece in pieces] == ids[:2]
        assert client.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "Hi é", "content": "Hi é"}
        for wrong in ({"content": 3}, {"content": "a", "parse_special": False}, {"content": "a", "prompt": "b"}):
            assert client.post("/tokenize", json=wrong).status_code == 400


def test_an_editor_fills_a_gap(start: Callable[..., Any]) -> None:
    running = start(PacedEngine(["    return ", "a + b"], special_tokens=MARKS))
    with running.http() as client:
        answer = client.post("/infill", json=EDITOR)
        assert answer.status_code == 200, answer.text
        whole = answer.json()
        assert (whole["content"], whole["stop"], whole["stop_type"]) == ("    return a + b", True, "eos")
        assert "'t_max_predict_ms' has no effect" in answer.headers["x-warning"]
        read = running.engine.tokenizer.decode(running.engine.requests[-1].prompt_token_ids, skip_special_tokens=False)
        assert read.startswith(
            "<|bos|><|fim_prefix|>\n\n--- snippet ---\n\nimport math\n\ndef add(a, b):\n    ret<|fim_suffix|>"
        )
        streamed = pieces(client.post("/infill", json={**EDITOR, "stream": True}))
        assert [piece["content"] for piece in streamed] == ["    return ", "a + b", ""]
        assert [piece["stop"] for piece in streamed] == [False, False, True]
        nothing = client.post("/infill", json={**EDITOR, "n_predict": 0}).json()
        assert (nothing["content"], nothing["generation_settings"]["n_predict"]) == ("", 0)


def test_a_gap_in_mistrals_words(start: Callable[..., Any]) -> None:
    running = start(PacedEngine(["    return ", "a + b"], special_tokens=MARKS))
    body: dict[str, Any] = {
        "model": "default", "prompt": "def add(a, b):\n", "suffix": "\nprint(1)", "random_seed": 7, "min_tokens": 1,
        "metadata": {"a": "b"},
    }  # fmt: skip
    with running.http() as client:
        answer = client.post("/v1/fim/completions", json=body)
        assert answer.status_code == 200, answer.text
        whole = answer.json()
        (choice,) = whole["choices"]
        assert (whole["object"], choice["finish_reason"]) == ("chat.completion", "stop")
        assert (choice["message"]["role"], choice["message"]["content"]) == ("assistant", "    return a + b")
        asked = running.engine.requests[-1]
        assert (asked.params.seed, asked.params.min_tokens) == (7, 1)
        read = running.engine.tokenizer.decode(asked.prompt_token_ids, skip_special_tokens=False)
        assert read.startswith("<|bos|><|fim_prefix|>def add(a, b):\n<|fim_suffix|>\nprint(1)")
        *chunks, done = [
            line.removeprefix("data: ")
            for line in client.post("/v1/fim/completions", json={**body, "stream": True}).text.splitlines()
            if line
        ]
        assert done == "[DONE]"
        told = [json.loads(chunk) for chunk in chunks]
        assert "".join(one["choices"][0]["delta"].get("content", "") for one in told) == "    return a + b"
        assert told[0]["choices"][0]["delta"]["role"] == "assistant"
        assert [one["choices"][0]["finish_reason"] for one in told] == [None, None, None, "stop"]
        assert told[-1]["usage"] == whole["usage"]
        assert "usage" not in told[0]
        short = client.post("/v1/fim/completions", json={"prompt": "x", "max_tokens": 3}).json()
        assert (short["choices"][0]["finish_reason"], short["usage"]["completion_tokens"]) == ("length", 3)


def test_a_completion_in_llama_cpps_words(start: Callable[..., Any]) -> None:
    running = start(PacedEngine(["one ", "two ", "three"]), temperature=0.25)
    with running.http() as client:
        body = {"prompt": "count: ", "n_predict": 50, "stop": ["three"], "repeat_penalty": 1.1, "seed": -1}
        whole = client.post("/completion", json=body).json()
        assert (whole["content"], whole["stop_type"], whole["stopping_word"]) == ("one two ", "word", "three")
        assert whole["tokens_evaluated"] == whole["timings"]["prompt_n"] + whole["tokens_cached"]
        params = running.engine.requests[-1].params
        assert (params.max_tokens, params.repetition_penalty, params.seed) == (50, 1.1, None)
        assert params.temperature == 0.25
        idle = {"n_cache_reuse": 0, "backend_sampling": True, "samplers": ["top_k"]}
        cut = client.post("/completion", json={"prompt": [1, 2], "max_tokens": 1, **idle}).json()
        assert (cut["stop_type"], cut["tokens_predicted"], cut["truncated"]) == ("limit", 1, False)
        endless = client.post("/completion", json={"prompt": "a", "n_predict": -1, "temperature": 0.5}).json()
        assert endless["content"] == "one two three"
        assert running.engine.requests[-1].params.temperature == 0.5
        streamed = pieces(client.post("/completion", json={**body, "stream": True}))
        assert "".join(piece["content"] for piece in streamed) == "one two "
        last = {**streamed[-1], "timings": None, "content": whole["content"], "tokens": []}
        assert last == {**whole, "timings": None}


def test_tokens_and_times_in_llama_cpps_words(start: Callable[..., Any]) -> None:
    """What llama.cpp's clients read of an answer: ids, probabilities, settings, timings, and a choice of fields."""
    running = start(PacedEngine(["one ", "two\n", "three"]), temperature=0.25)
    body: dict[str, Any] = {"prompt": "count: ", "n_predict": 3, "n_probs": 2, "return_tokens": True}
    with running.http() as client:
        whole = client.post("/completion", json=body).json()
        assert (len(whole["tokens"]), whole["prompt"], whole["has_new_line"]) == (3, "count: ", False)
        (first, *_) = found = whole["completion_probabilities"]
        assert [each["id"] for each in found] == whole["tokens"]
        assert first["token"] == chr(first["id"]) == bytes(first["bytes"]).decode()
        assert first["logprob"] <= 0
        assert len(first["top_logprobs"]) == 2
        assert set(first["top_logprobs"][0]) == {"id", "token", "bytes", "logprob"}
        settings = whole["generation_settings"]
        assert (settings["n_predict"], settings["temperature"], settings["seed"], settings["n_probs"]) == (
            3,
            0.25,
            -1,
            2,
        )
        times = whole["timings"]
        assert times["predicted_per_second"] == 1000 * 3 / max(times["predicted_ms"], 1)
        streamed = pieces(client.post("/completion", json={**body, "stream": True, "timings_per_token": True}))
        assert [token for piece in streamed for token in piece["tokens"]] == whole["tokens"]
        assert sum(len(piece["tokens"]) for piece in streamed[:-1]) == streamed[-2]["timings"]["predicted_n"] == 3
        plain = client.post("/completion", json={"prompt": [1, 2], "n_predict": 9}).json()
        assert (plain["tokens"], plain["has_new_line"]) == ([], True)
        assert not plain.keys() & {"completion_probabilities", "prompt"}
        fields = ["content", "generation_settings/n_predict", "none/such"]
        chosen = client.post("/completion", json={**body, "response_fields": fields}).json()
        assert chosen == {"content": whole["content"], "generation_settings/n_predict": 3}


def test_a_bias_in_llama_cpps_words(start: Callable[..., Any]) -> None:
    running = start(PacedEngine(["one"]))
    with running.http() as client:
        for bias in ([["ab", False], [5, 1.5]], {"ab": -100, "5": 1.5}):
            answer = client.post("/completion", json={"prompt": "a", "logit_bias": bias})
            assert answer.status_code == 200, answer.text
            assert running.engine.requests[-1].params.logit_bias == {97: -100, 98: -100, 5: 1.5}
            told = answer.json()["generation_settings"]["logit_bias"]
            assert {each["token"]: each["bias"] for each in told} == {97: -100, 98: -100, 5: 1.5}
        answer = client.post("/completion", json={"prompt": "a", "ignore_eos": True})
        told = answer.json()["generation_settings"]["logit_bias"]
        assert told == [{"token": token, "bias": None} for token in running.engine.model_info.eos_token_ids]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "timings_per_token": True}),
        ("/v1/completions", {"prompt": "a" * 19}),
        ("/v1/completions", {"prompt": "a" * 19, "echo": True, "logprobs": 1}),
        ("/completion", {"prompt": "a" * 19, "timings_per_token": True}),
        ("/v1/responses", {"input": "a", "timings_per_token": True}),
    ],
)
def test_progress_with_a_prompt_precedes_the_answer(start: Callable[..., Any], path: str, body: dict[str, Any]) -> None:
    running = start(PacedEngine(["one ", "two"], num_cached_tokens=2))
    with running.http() as client:
        plain = client.post(path, json={**body, "stream": True}).text
        assert "prompt_progress" not in plain
        assert not running.engine.requests[-1].params.prompt_progress
        answer = client.post(path, json={**body, "stream": True, "return_progress": True})
        assert answer.status_code == 200, answer.text
        assert "x-warning" not in answer.headers
        told = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        reports = [each["prompt_progress"] for each in told if "prompt_progress" in each]
        total = len(running.engine.requests[-1].prompt_token_ids)
        assert reports == [
            {"total": total, "cache": 2, "processed": 2, "time_ms": 0},
            {"total": total, "cache": 2, "processed": total, "time_ms": 250},
        ]
        first = told.index(next(each for each in told if "one" in json.dumps(each)))
        assert all("prompt_progress" not in each for each in told[first:])
        if "timings_per_token" in body:
            timings = [each["timings"] for each in told if "timings" in each]
            assert timings[-1]["predicted_n"] == 8
            assert [each["predicted_n"] for each in timings] == sorted(each["predicted_n"] for each in timings)
        whole = client.post(path, json={**body, "return_progress": True})
        assert (whole.status_code, "prompt_progress" in whole.text) == (200, False)


def test_a_verbose_chat_has_its_prompt(start: Callable[..., Any]) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "verbose": True}
    with start(PacedEngine(["one"])).http() as client:
        whole = client.post("/chat/completions", json=body).json()
        assert whole["__verbose"] == client.post("/apply-template", json={"messages": body["messages"]}).json()
        lines = client.post("/chat/completions", json=body | {"stream": True}).text.splitlines()
        told = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert [each.get("__verbose") for each in told] == [whole["__verbose"], *[None] * (len(told) - 1)]
        assert "__verbose" not in client.post("/chat/completions", json=body | {"verbose": False}).text


def test_chat_with_llama_cpps_fields(start: Callable[..., Any]) -> None:
    running = start(PacedEngine(["one ", "two"]))
    body = {"messages": MESSAGES, "n_predict": 9, "timings_per_token": True}
    with running.http() as client:
        whole = client.post("/v1/chat/completions", json=body).json()
        assert running.engine.requests[-1].params.max_tokens == 9
        assert whole["timings"]["predicted_n"] == whole["usage"]["completion_tokens"]
        lines = client.post("/v1/chat/completions", json={**body, "stream": True}).text.splitlines()
        told = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert "timings" not in told[0]
        counts = [each["timings"]["predicted_n"] for each in told[1:]]
        assert counts == sorted(counts)
        assert counts[-1] == whole["timings"]["predicted_n"]
        assert "usage" not in told[-1]
        grammar = 'root ::= "a"'
        assert client.post("/v1/chat/completions", json={**body, "grammar": grammar}).status_code == 200
        assert running.engine.requests[-1].params.structured_outputs.grammar == grammar
        assert client.post("/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": -1}).status_code == 200
        assert running.engine.requests[-1].params.max_tokens is None
        for limits, wanted in (
            ({"n_predict": -1}, None),
            ({"max_tokens": -1}, None),
            ({"max_tokens": None, "n_predict": 9}, 9),
            ({"max_tokens": None}, 16),
        ):
            assert client.post("/v1/completions", json={"prompt": "a", **limits}).status_code == 200
            assert running.engine.requests[-1].params.max_tokens == wanted
        refused = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 8, "n_predict": 9})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n_predict")


def test_several_prompts_are_answered_in_llama_cpps_words(start: Callable[..., Any]) -> None:
    with start(PacedEngine(["one"])).http() as client:
        body = {"prompt": ["a", [1, 2], {"prompt_string": "<__media__>"}], "n_predict": 4}
        answers = client.post("/completions", json=body).json()
        assert [(each["index"], each["content"], each["tokens_evaluated"]) for each in answers] == [
            (0, "one", 2), (1, "one", 2), (2, "one", 12)
        ]  # fmt: skip
        assert client.post("/completions", json={**body, "prompt": ["a"]}).json()["content"] == "one"
        refused = client.post("/completions", json={**body, "stream": True})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "stream")


def test_an_answer_follows_a_schema(start: Callable[..., Any]) -> None:
    running = start(PacedEngine(["{}"]))
    with running.http() as client:
        assert client.post("/completion", json={"prompt": "a", "json_schema": {"type": "object"}}).status_code == 200
        form = running.engine.requests[-1].params.structured_outputs
        assert form is not None
        assert form.json == {"type": "object"}
