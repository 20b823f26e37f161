# SPDX-License-Identifier: MIT
"""Keys with names: a file of them, when they end, what they open, and the file read again while the server runs."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from candle_vllm.server import Settings, create_app
from candle_vllm.server.http import keys
from candle_vllm.server.http.keys import Keyring, read_named_keys
from candle_vllm.server.settings.options import UsageError
from packages.server.tests.server_fakes import PacedEngine
from tests.waiting import until

ALICE, BOB, OPS = "alice-secret-1", "bob-secret-2", "ops-secret-3"
FILE = f"""
keys:
  - name: alice
    key: {ALICE}
    requests_per_minute: 60
    expires: 2999-12-31
  - name: bob
    sha256: {hashlib.sha256(BOB.encode()).hexdigest()}
    tokens_per_minute: null
  - name: ops
    key: [{OPS}, {OPS}-next]
    manages: true
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "keys.yaml"
    path.write_text(FILE)
    return path


def _status(client: TestClient, url: str, key: str) -> int:
    return client.get(url, headers={"authorization": f"Bearer {key}"}).status_code


def test_each_opens_what_it_may(path: Path) -> None:
    with TestClient(create_app(PacedEngine(), Settings(api_keys_file=path, api_key=("plain",)))) as client:
        opened = {key: [_status(client, url, key) for url in ("/v1/models", "/v1/usage")]
                  for key in (ALICE, BOB, OPS, OPS + "-next", "plain", "other", "alice")}  # fmt: skip
    assert opened == {
        ALICE: [200, 401], BOB: [200, 401], OPS: [200, 200], OPS + "-next": [200, 200], "plain": [200, 200],
        "other": [401, 401], "alice": [401, 401],
    }  # fmt: skip


def test_who_may_not_manage_is_told_so(path: Path) -> None:
    with TestClient(create_app(PacedEngine(), Settings(api_keys_file=path))) as client:
        answer = client.get("/metrics", headers={"x-api-key": ALICE})
    assert (answer.status_code, "'alice' is not a management key" in answer.text) == (401, True)


def test_operators_keys_apart(path: Path) -> None:
    settings = Settings(api_keys_file=path, api_key=("plain",), management_key=("root",))
    with TestClient(create_app(PacedEngine(), settings)) as client:
        usage = {key: _status(client, "/v1/usage", key) for key in (ALICE, OPS, "plain", "root")}
        assert usage == {ALICE: 401, OPS: 200, "plain": 401, "root": 200}
        assert _status(client, "/v1/models", "root") == 401


def test_limits_are_their_own_or_those_of_all(path: Path) -> None:
    limits = {"requests_per_minute": 5, "tokens_per_minute": 1000}
    found = {key.caller.label: key.caller.limits for key in read_named_keys(path, limits)}
    assert found == {"alice": {**limits, "requests_per_minute": 60}, "bob": {"requests_per_minute": 5}, "ops": limits}


@pytest.mark.parametrize(
    ("expires", "seconds"),
    [
        ("2027-01-31", 1801440000.0), ("2027-01-31T12:00:00Z", 1801396800.0), ("2027-01-31 12:00:00", 1801396800.0),
        ("2027-01-31T12:00:00+02:00", 1801389600.0), ("'2027-01-31'", 1801440000.0),
        ("'2027-01-31T12:00:00Z'", 1801396800.0),
    ],
)  # fmt: skip
def test_when_they_end(tmp_path: Path, expires: str, seconds: float) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(f"keys:\n- {{name: a, key: s, expires: {expires}}}\n".replace("{name", "\n    {name"))
    assert [key.expires for key in read_named_keys(path, {})] == [seconds]


def test_a_key_whose_time_is_over_opens_nothing(path: Path) -> None:
    path.write_text(f"keys: [{{name: alice, key: {ALICE}, expires: 2020-01-01}}, {{name: bob, key: {BOB}}}]")
    with TestClient(create_app(PacedEngine(), Settings(api_keys_file=path))) as client:
        answer = client.get("/v1/models", headers={"x-api-key": ALICE})
        assert answer.status_code == 401
        assert "'alice' has expired" in answer.json()["error"]["message"]
        assert _status(client, "/v1/models", BOB) == 200


WRONG = [
    ("", "must be a mapping"),
    ("keys: []", "at least one key"),
    ("keys:\n- name: a\n", "line 2: the key 'a' has neither key nor sha256"),
    ("keys:\n- {name: a, key: SECRET}\n- {name: a, key: SECRET2}", "line 3: 'a' appears twice"),
    ("keys:\n- {name: a, key: SECRET}\n- {name: b, key: SECRET}", "line 3: the key of 'b' stands in the file twice"),
    ("keys:\n- name: a\n  kee: SECRET", "line 3: unknown key 'kee' (did you mean key?)"),
    ("keys:\n- name: 7\n  key: SECRET", "line 2: name must have"),
    ("keys:\n- name: m7\n  key: SECRET", "line 2: name must have"),
    ("keys:\n- name: a b\n  key: SECRET", "line 2: name must have"),
    ("keys:\n- name: a\n  key: 12345678", "line 3: key of 'a' must be text"),
    ("keys:\n- name: a\n  key: 'SECRET 2'", "line 3: key of 'a' must be 1 to"),
    ("keys:\n- name: a\n  key: *SECRET", "line 3: not valid YAML"),
    ("keys:\n- name: a\n  key: !SECRET x", "line 3: not valid YAML"),
    ("keys:\n- name: a\n  sha256: SECRET", "line 3: sha256 of 'a' must be 64"),
    ("keys:\n- name: a\n  key: SECRET\n  expires: soon", "line 4: expires of 'a' must be a day"),
    ("keys:\n- name: a\n  key: SECRET\n  expires: 2027-02-30", "line 4: not valid YAML"),
    ("keys:\n- name: a\n  key: SECRET\n  expires: 9999-12-31", "line 4: expires of 'a' must be a day"),
    ("keys:\n- name: a\n  key: SECRET\n  requests_per_minute: 0", "line 4: requests_per_minute of 'a' must be"),
    ("keys:\n- name: a\n  key: SECRET\n  tokens_per_minute: true", "line 4: tokens_per_minute of 'a' must be"),
    ("keys:\n- name: a\n  key: SECRET\n  manages: 1", "line 4: manages of 'a' must be true or false"),
    ("keys:\n- name: a\n  key: []", "line 3: key of 'a' is empty"),
    ("keys: " + "[" * 3000, "nested too deeply"),
]


@pytest.mark.parametrize(("text", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_is_wrong_is_named_with_its_line_and_no_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as refusal:
        read_named_keys(path, {})
    assert message in str(refusal.value)
    assert "SECRET" not in str(refusal.value)


async def test_a_changed_file_is_read_again_and_a_broken_one_is_not(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(keys, "LOOK_SECONDS", 0.01)
    caplog.set_level(logging.INFO)
    ring = Keyring(Settings(api_keys_file=path))
    watch = asyncio.create_task(ring.watch())

    async def written(text: str, line: str) -> None:
        caplog.clear()
        new = path.with_suffix(".new")
        new.write_text(text)
        os.replace(new, path)
        await until(lambda: line in caplog.text)

    await written(
        FILE.replace(ALICE, "alice-secret-9") + "  - {name: carol, key: carol-secret}\n", "5 keys; new: carol"
    )
    assert ring.find(ALICE.encode()) is None
    assert (found := ring.find(b"alice-secret-9")) is not None
    assert found.caller.key == "the name alice"
    await written("keys:\n- name: alice\n  key: ", "keys from before stay valid")
    assert "line 3" in caplog.text
    assert ring.find(b"alice-secret-9") is not None
    await written("keys: [{name: bob, key: carol-secret}]", "1 keys; gone: alice, carol, ops")
    assert ring.find(b"alice-secret-9") is None
    assert "secret" not in caplog.text
    with monkeypatch.context() as patched:
        patched.setattr(keys, "read_yaml", lambda *_, **__: 1 // 0)
        await written(FILE, "could not be read again (ZeroDivisionError)")
    await written(FILE + "  - {name: dora, key: dora-secret}\n", "new: alice, dora, ops")
    watch.cancel()


def test_what_a_name_has_stays_its_own_when_its_key_changes(path: Path) -> None:
    app = create_app(PacedEngine(), Settings(api_keys_file=path))
    with TestClient(app) as client:

        def ask(method: str, url: str, key: str, **more: Any) -> Any:
            return client.request(method, url, headers={"authorization": f"Bearer {key}"}, **more)

        made = ask("POST", "/v1/conversations", ALICE, json={"metadata": {"a": "b"}}).json()["id"]
        path.write_text(FILE.replace(ALICE, "alice-secret-9"))
        assert asyncio.run(app.state.keys.reload())
        assert ask("GET", f"/v1/conversations/{made}", ALICE).status_code == 401
        assert ask("GET", f"/v1/conversations/{made}", BOB).status_code == 404
        assert ask("GET", f"/v1/conversations/{made}", "alice-secret-9").json()["metadata"] == {"a": "b"}


def test_a_key_that_is_no_longer_valid_asks_nothing_over_an_open_connection(path: Path) -> None:
    app = create_app(PacedEngine("abc"), Settings(api_keys_file=path))
    head = {"authorization": f"Bearer {ALICE}"}
    with TestClient(app) as client, client.websocket_connect("/v1/responses", headers=head) as socket:

        def ask() -> Any:
            socket.send_json({"type": "response.create", "model": "default", "input": "hi"})
            while (event := socket.receive_json())["type"] not in ("response.completed", "error"):
                pass
            return event.get("error", {}).get("code")

        assert ask() is None
        path.write_text(FILE.replace("2999", "2020"))
        assert asyncio.run(app.state.keys.reload())
        assert ask() == "invalid_api_key"
        path.write_text(FILE.replace("name: alice", "name: alice\n    models: [other]"))
        assert asyncio.run(app.state.keys.reload())
        assert ask() == "model_not_allowed"
        path.write_text(FILE.replace("name: alice", "name: carol"))
        assert asyncio.run(app.state.keys.reload())
        assert ask() == "invalid_api_key"


def _salts(settings: Settings, key: str) -> list[str | None]:
    """The salts that an engine gets with requests that have the salt `mine`, one of each kind."""
    engine, salt = PacedEngine("abc"), {"cache_salt": "mine"}
    with TestClient(create_app(engine, settings), headers={"authorization": f"Bearer {key}"}) as client:
        chat = {"messages": [{"role": "user", "content": "hi"}], **salt}
        for streams in (False, True):
            for url, body in (
                ("/v1/completions", {"prompt": ["a", "b"], **salt}),
                ("/v1/chat/completions", {**chat, "n": 2}),
                ("/v1/responses", {"input": "hi", **salt}),
                ("/v1/responses", {"input": "hi", "background": True, **salt}),
            ):
                answer = client.post(url, json={"model": "default", "stream": streams, **body})
                assert answer.status_code == 200, answer.text
        with client.websocket_connect("/v1/responses") as socket:
            socket.send_json({"type": "response.create", "model": "default", "input": "hi", **salt})
            while socket.receive_json()["type"] != "response.completed":
                pass
    given = [request.params.cache_salt for request in engine.requests]
    assert len(given) == 2 * 5 + 1
    return given


def test_a_salt_belongs_to_the_name_of_its_key(path: Path) -> None:
    """However it is asked: nobody else can send it, and neither key nor name nor salt can be read in it."""
    settings = Settings(api_keys_file=path, api_key=("plain",))
    of = {key: set(_salts(settings, key)) for key in (ALICE, BOB, OPS, OPS + "-next", "plain")}
    assert all(len(salts) == 1 for salts in of.values())
    assert of[OPS] == of[OPS + "-next"] != of[ALICE]
    assert len({str(salts) for salts in of.values()}) == 4
    assert all(re.fullmatch("[0-9a-f]{64}", str(salt)) for salts in of.values() for salt in salts)
    assert set(_salts(Settings(api_key=("first", "plain")), "plain")) == of["plain"]
    assert set(_salts(Settings(), "plain")) == {"mine"}


def test_many_keys_are_found_in_time(path: Path) -> None:
    lines = [f"- {{name: u{number}, key: k{number}}}" for number in range(2000)]
    path.write_text("keys:\n" + "\n".join(lines))
    ring = Keyring(Settings(api_keys_file=path))
    began = time.process_time()
    assert [ring.find(key) is None for key in (b"k0", b"k1999", b"k2000")] == [False, False, True]
    assert time.process_time() - began < 1
