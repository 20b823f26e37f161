# SPDX-License-Identifier: MIT
"""What one user may learn or do of another's, of the machine, or of the log: nothing."""

from __future__ import annotations

import ast
import hashlib
import http.server
import logging
import os
import re
import socketserver
import threading
from array import array
from pathlib import Path
from typing import Any

import httpx
import pytest

from candle_vllm.core import InferenceEngine
from candle_vllm.core.engine.cache import block_manager
from candle_vllm.core.engine.step.sequence import block_hashes
from candle_vllm.core.testing import ScriptedEngine
from tests.live_server import ServerProcess
from tests.security.guarded_server import KEY, Guarded, Watch, chat_body, guarded

LONG = "The quick brown fox jumps over the lazy dog. " * 8  # several blocks


def cached(server: Guarded, prompt: str, key: str | None = None, **fields: Any) -> int:
    """Prompt tokens that came from the cache."""
    body = {"model": "default", "prompt": prompt, "max_tokens": 1, **fields}
    with server.http(key) as client:
        answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_cache_side_channel_by_timing(real: Guarded) -> None:
    """CVE-2025-46570: the time of an answer tells whether somebody has sent the prompt before. `cache_salt` keeps
    users apart: without the same salt nothing is found, not even what has none."""
    assert cached(real, LONG, cache_salt="alice") == 0
    assert cached(real, LONG, cache_salt="alice") > 0
    assert cached(real, LONG, cache_salt="mallory") == 0
    assert cached(real, LONG) == 0
    assert cached(real, LONG) > 0
    assert cached(real, LONG, cache_salt="alice2") == 0
    assert cached(real, LONG, cache_salt="salt:alice") == 0


def test_a_salt_belongs_to_its_key(engine: InferenceEngine) -> None:
    """Who knows or guesses somebody's salt finds nothing with a key of his own; without a salt all share, as ever."""
    prompt = "Of many keys. " + LONG
    with guarded(engine, api_key=("alice-key", "bob-key")) as server:
        assert cached(server, prompt, "alice-key", cache_salt="hers") == 0
        found = cached(server, prompt, "alice-key", cache_salt="hers")
        assert found > 0
        assert cached(server, prompt, "bob-key", cache_salt="hers") == 0
        assert cached(server, prompt, "bob-key") == 0
        assert cached(server, prompt, "alice-key") == found
    with guarded(engine, api_key=("other", "alice-key")) as server:  # another place in the list is the same key
        assert cached(server, prompt, "alice-key", cache_salt="hers") == found
    with guarded(engine) as server:
        assert cached(server, prompt, cache_salt="hers") == 0


def test_cache_side_channel_by_collision() -> None:
    """CVE-2025-25183: blocks were found by Python's `hash`, whose collisions can be made. Ours are chained SHA-256 over
    fixed-width token ids: no boundary moves, and nothing of it depends on the process."""
    assert block_hashes([1, 2], 2, None) != block_hashes([12], 1, None)[:1]
    assert block_hashes([-1], 1, None) != block_hashes([-2], 1, None)  # hash(-1) == hash(-2)
    seen: set[bytes] = set()
    for tokens in ([0], [1], [1 << 61], [(1 << 61) - 1], [-2], [-1], [256], [1 << 8], [1 << 16]):
        seen |= set(block_hashes(tokens, 1, None))
    assert len(seen) == 8  # 256 and 1 << 8 are one token
    salts = [None, "", "a", "salt:", "salt:a", "a\0"]
    assert len({block_hashes([1], 1, salt)[0] for salt in salts}) == len(salts)
    root = hashlib.sha256(b"").digest()
    first = hashlib.sha256(root + array("q", [7, 8]).tobytes()).digest()
    assert block_hashes([7, 8, 9, 10], 2, None) == [
        first,
        hashlib.sha256(first + array("q", [9, 10]).tobytes()).digest(),
    ]
    tree = ast.parse(Path(block_manager.__file__).read_text("utf-8"))
    assert not any(isinstance(node, ast.Call) and getattr(node.func, "id", "") == "hash" for node in ast.walk(tree))


# ---- model names -----------------------------------------------------------------------------------------------------

NAMES = [
    "../../etc/passwd", "/etc/passwd", "/", ".", "..", "~", "~root", "./model", "file:///etc/passwd", "C:\\x",
    "\\\\x\\y",
    "meta-llama/Llama-3.1-8B", "hf://meta-llama/Llama-3.1-8B", "https://evil.example/m.gguf", "evil/evil@main",
    "scripted/../scripted", "scripted\x00", "scripted\n", " scripted", "scripted ", "SCRIPTED", "${HOME}", "%2e%2e%2f",
    "model.gguf", "evil.bin", "scripted:latest", "default/..", "a" * 256,
]  # fmt: skip


def test_model_names_as_paths(network: Watch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ollama's CVE-2026-42248 and its kin: the name of a model in a request is looked up in the catalogue, and never on
    the disk or on the hub, whatever it looks like and whatever lies there."""
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    looked: list[str] = []
    for function in ("stat", "open", "listdir", "scandir"):
        really = getattr(os, function)

        def noted(path: Any = ".", *arguments: Any, really: Any = really, **options: Any) -> Any:
            looked.append(str(path))
            return really(path, *arguments, **options)

        monkeypatch.setattr(os, function, noted)
    engine = ScriptedEngine()
    with guarded(engine, strict_model_names=True) as server, server.http() as client:
        looked.clear()
        for name in [*NAMES, str(tmp_path / "model.gguf"), str(tmp_path / "model")]:
            for path, body in (
                ("/v1/chat/completions", chat_body(model=name)),
                ("/v1/completions", {"model": name, "prompt": "a"}),
                ("/v1/messages", chat_body(model=name)),
                ("/v1/embeddings", {"model": name, "input": "a"}),
                ("/v1/rerank", {"model": name, "query": "a", "documents": ["a"]}),
                ("/tokenize", {"model": name, "prompt": "a"}),
                ("/v1/models/load", {"model": name}),
                ("/v1/models/unload", {"model": name}),
                ("/v1/models/select", {"model": name}),
            ):
                answer = client.post(path, json=body)
                assert answer.status_code in (400, 404), (path, name, answer.text)
            for spelled in (name, "".join(f"%{byte:02x}" for byte in name.encode())):
                line = f"GET /v1/models/{spelled} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
                if " " in spelled:  # a parser of request lines takes that for its end
                    continue
                answer = server.raw(line.encode())
                known = name == "scripted\n"  # the router takes a last newline for none
                assert answer.split(b" ", 2)[1] in ((b"200", b"400") if known else (b"404", b"400")), (spelled, answer)
        asked = [path for path in looked if "passwd" in path or path in NAMES or path.startswith(str(tmp_path))]
    assert asked == []
    assert engine.requests == []
    with guarded(engine) as server, server.http() as client:
        looked.clear()
        for name in NAMES:  # the only model answers, and says its own name
            answer = client.post("/v1/completions", json={"model": name, "prompt": "a"})
            assert answer.status_code in (200, 400, 404), (name, answer.text)
            assert answer.status_code != 200 or answer.json()["model"] == "scripted"
        assert [path for path in looked if "passwd" in path or path in NAMES or path.startswith(str(tmp_path))] == []
    assert network.outgoing == []


def test_pages_are_no_way_to_files() -> None:
    """Files of the machine by a path: the pages have three files, and no other name reaches the disk."""
    spellings = ["../auth.py", "..%2fauth.py", "%2e%2e/%2e%2e/etc/passwd", "/etc/passwd", "....//x", "a.css%00",
                 "__init__.py", ".", "..", "swagger-ui.css/../__init__.py", "..\\x", "swagger-ui.css.map"]  # fmt: skip
    with guarded() as server:
        for spelled in spellings:
            for base in ("/docs/", "/v1/mailbox/", "/static/"):
                line = f"GET {base}{spelled} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
                answer = server.raw(line.encode("latin-1"))
                assert b" 404 " in answer.split(b"\r\n")[0] or b" 400 " in answer.split(b"\r\n")[0], (base, spelled)
                assert b"root:" not in answer


# ---- the log ---------------------------------------------------------------------------------------------------------

INJECTIONS = [
    "a\r\n2026-01-01 INFO forged: line", "a\n\nforged", "\x1b[2J\x1b]0;forged\x07", "a\x00b", "a\u2028forged",
    "a\u202eb",
    "%s%s%n{0}${jndi:ldap://x}", "a" * 5000,
]  # fmt: skip


def test_log_injection(toy_model: Path, tmp_path: Path) -> None:
    """What a client sends cannot begin a line of the log or steer a terminal: ids, paths, model names, fields."""
    process = ServerProcess(tmp_path, "--m", str(toy_model), "--threads", "1", "--log-requests", "--log-prompts")
    try:
        with httpx.Client(base_url=process.url, trust_env=False, timeout=60) as client:
            for text in INJECTIONS:
                quoted = "".join(f"%{byte:02x}" for byte in text.encode())[:3000]
                quoted = quoted[: len(quoted) // 3 * 3]
                client.get(f"/{quoted}")
                client.get(f"/v1/models/{quoted}")
                client.post(f"/v1/models/load?{quoted}", json={"model": text[:200]})
                client.post("/v1/chat/completions", json=chat_body(model=text[:200]))
                client.post("/v1/chat/completions", json=chat_body(request_id=text))
                client.post("/v1/completions", json={"model": "default", "prompt": text[:500], "max_tokens": 1})
                raw = text.encode("utf-8", "replace").replace(b"\r", b" ").replace(b"\n", b" ").replace(b"\0", b" ")
                client.get("/health", headers=[(b"x-request-id", raw[:500]), (b"user-agent", raw[:500])])
    finally:
        assert process.stop() == 0
    log = (tmp_path / "server.log").read_bytes().decode("utf-8", "replace")
    lines = log.splitlines()
    assert len(lines) > 20
    for line in lines:
        assert not line.startswith(("forged", "2026-01-01")), line
        assert all(character.isprintable() for character in line), ascii(line)[:300]
    assert not any("forged" in line and line.split("forged")[0].strip() == "" for line in lines)


def test_request_ids_cannot_split_an_answer() -> None:
    """Headers that go back: an id that is not plain is replaced, and never repeated."""
    with guarded(api_key=(KEY,)) as server:
        for given in (b"a\tb", b"a b", b"a" * 200, b"\xff\xfe", b"<script>", b"a;b", b"a,b"):
            line = b"GET /health HTTP/1.1\r\nHost: x\r\nX-Request-Id: " + given + b"\r\nConnection: close\r\n\r\n"
            head = server.raw(line).split(b"\r\n\r\n")[0]
            assert given not in head, given
            assert head.lower().count(b"x-request-id:") == 1


def test_names_of_a_schema_are_cut(real: Guarded, caplog: pytest.LogCaptureFixture) -> None:
    """A property's name stands in a remark on its bound: neither the log nor a header has 200,000 characters of it."""
    schema = {"type": "object", "properties": {"n" * 200_000: {"type": "number", "maximum": 10**20}}}
    body = chat_body(max_tokens=1, structured_outputs={"json": schema})
    with caplog.at_level(logging.INFO), real.http() as client:
        answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert "is enforced as" in answer.headers["x-warning"]
    assert len(answer.headers["x-warning"]) < 500
    assert not any("nnnn" in record.getMessage() for record in caplog.records)


def test_failures_say_nothing_of_the_machine(caplog: pytest.LogCaptureFixture) -> None:
    """CVE-2026-22778 began with an error that held an address: what goes wrong unexpectedly answers with fixed text."""
    secret = "secret at 0x7fdeadbeef in /srv/models"
    engine = ScriptedEngine(submit_error=RuntimeError(secret))
    with caplog.at_level(logging.CRITICAL), guarded(engine) as server:
        for path, body in (
            ("/v1/chat/completions", chat_body()),
            ("/v1/completions", {"model": "default", "prompt": "a"}),
            ("/v1/messages", chat_body()),
        ):
            with server.http() as client:  # the connection of a failure is closed
                answer = client.post(path, json=body)
            assert answer.status_code == 500
            assert "secret" not in answer.text
            assert "0x" not in answer.text
            assert "Traceback" not in answer.text
            assert "RuntimeError" not in answer.text


def test_every_log_is_started_in_one_place() -> None:
    """Which takes the secrets of addresses out of every record, in the server, its engines and its ranks."""
    from tests.security.test_code_from_files import SOURCES

    starting = re.compile(r"\b(basicConfig|setLogRecordFactory|dictConfig|fileConfig)\(")
    assert ["/".join(path.parts[-2:]) for path in SOURCES if starting.search(path.read_text("utf-8"))] == [
        "core/shown.py"
    ]


def test_addresses_of_settings_in_the_log(toy_model: Path, tmp_path: Path) -> None:
    """A server at level debug that asks an address with secrets: neither its lines nor those of httpx have them."""
    with socketserver.TCPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as source:
        threading.Thread(target=source.serve_forever, daemon=True).start()
        place = f"127.0.0.1:{source.server_address[1]}/{{name}}.tar.gz"
        resolver = f"tar=http://user:HIDDENWORD@{place}?sig=HIDDENWORD#HIDDENWORD"
        model = ("--m", str(toy_model), "--threads", "1", "--enable-lora", "--lora-resolver", resolver)
        process = ServerProcess(tmp_path, *model, "--log-level", "debug")
        try:
            with httpx.Client(base_url=process.url, timeout=60, trust_env=False) as client:
                assert client.post("/v1/completions", json={"model": "tone", "prompt": "x"}).status_code == 503
                assert client.get("/server_info").json()["vllm_config"]["lora_resolver"] == [f"tar=http://{place}"]
        finally:
            assert process.stop() == 0
            source.shutdown()
    log = (tmp_path / "server.log").read_text()
    assert f"GET http://{place.format(name='tone')}" in log
    assert "HIDDENWORD" not in log + "".join(process.banner)
