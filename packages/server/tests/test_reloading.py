# SPDX-License-Identifier: MIT
"""models.yaml read again while the server runs: models come, change and go, and what is asked of them is finished."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import re
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from candle_vllm.openai import ModelNotServedError
from candle_vllm.server.http.keys import Keyring
from candle_vllm.server.models.manager import ModelManager
from candle_vllm.server.models.slot import ModelState
from candle_vllm.server.reloading import Reloader, warn_of_missing
from candle_vllm.server.settings import Settings
from candle_vllm.server.settings.catalogue import Catalogue, ModelEntry
from candle_vllm.server.settings.configuration import load_configuration
from candle_vllm.server.settings.options import UsageError
from candle_vllm.server.settings.sources import SettingsSource
from candle_vllm.server.settings.table import ManagerOptions
from packages.server.tests.server_fakes import FakeLoader
from tests.waiting import until

FILE = """
default_model: a
models:
- {name: a, hf_id: x/a, params: {temperature: 0.5}}
- {name: b, hf_id: x/b}
- {name: c, hf_id: x/c}
"""


class Served:
    """A manager of the models of a file, and what reads it again."""

    def __init__(self, folder: Path, loader: FakeLoader, **command_line: Any) -> None:
        self.path = folder / "models.yaml"
        self.path.write_text(FILE)
        self.loader = loader
        given = SettingsSource("the command line", command_line, {})
        self.configuration = load_configuration(given, {}, folder=folder, home=folder)
        self.manager = ModelManager(self.configuration.catalogue, loader, ManagerOptions(model_drain_timeout=5))
        self.reloader = Reloader(self.configuration, self.manager, Keyring(self.configuration.settings))

    async def change(self, old: str, new: str) -> Any:
        text = self.path.read_text()
        assert old in text
        self.path.write_text(text.replace(old, new))
        return await self.reloader.reload_models()


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    made = Served(tmp_path, FakeLoader())
    yield made
    await made.manager.close()
    assert all(engine.closed for engine in made.loader.engines)


async def test_models_come_and_go_and_those_that_are_as_before_stay(served: Served) -> None:
    (await served.manager.acquire("b")).release()
    changes = await served.change("- {name: c, hf_id: x/c}", "- {name: d, hf_id: x/d}")
    assert (changes.added, changes.changed, changes.removed) == (("d",), (), ("c",))
    assert list(served.manager.slots) == ["a", "b", "d"]
    (await served.manager.acquire("b")).release()
    (await served.manager.acquire("d")).release()
    assert served.loader.loads == ["b", "d"]
    with pytest.raises(ModelNotServedError, match="served models are: a, b, d"):
        await served.manager.acquire("c")


async def test_a_model_with_one_name_more_or_less_stays_loaded(served: Served) -> None:
    (await served.manager.acquire("b")).release()
    for before, now in (("b", "[b, second]"), ("[b, second]", "[b, third]"), ("[b, third]", "b")):
        if "served_model_name" in served.path.read_text():
            changes = await served.change(f"served_model_name: {before}}}", f"served_model_name: {now}}}")
        else:
            changes = await served.change("hf_id: x/b}", f"hf_id: x/b, params: {{served_model_name: {now}}}}}")
        assert changes.changed == ("b",)
        entry = served.manager.find("b").entry
        assert entry.names == entry.settings.served_model_name  # whose names /api/delete leaves
        (await served.manager.acquire(entry.names[-1])).release()
    copied = dataclasses.replace(served.manager.find("b").entry, aliases=("b", "copy"))  # as /api/copy makes it
    entries = [copied if slot.entry.name == "b" else slot.entry for slot in served.manager.slots.values()]
    served.manager.adopt(Catalogue(entries, served.manager.catalogue.default.name))
    assert (await served.change("served_model_name: b}", "served_model_name: [b, copy]}")).changed == ()
    assert served.manager.find("copy").entry.settings.served_model_name == ("b", "copy")
    assert served.loader.loads == ["b"]


async def test_what_a_removed_model_was_asked_is_finished_by_it(served: Served) -> None:
    lease = await served.manager.acquire("b")
    await served.change("- {name: b, hf_id: x/b}\n", "")
    with pytest.raises(ModelNotServedError):
        await served.manager.acquire("b")
    await asyncio.sleep(0.05)
    assert not served.loader.engines[0].closed
    (await served.manager.acquire("c")).release()  # others are loaded meanwhile
    assert served.loader.loads == ["b", "c"]
    lease.release()
    await until(lambda: served.loader.engines[0].closed)
    assert [model.entry.name for model in served.manager._switcher.loaded] == ["c"]  # type: ignore[union-attr]


async def test_a_changed_model_is_loaded_again_beside_what_it_still_answers(served: Served) -> None:
    lease = await served.manager.acquire("a")
    changes = await served.change("temperature: 0.5", "temperature: 0.9")
    assert changes.changed == ("a",)
    new = await served.manager.acquire("a")
    assert (lease.model.entry.settings.temperature, new.model.entry.settings.temperature) == (0.5, 0.9)
    assert not served.loader.engines[0].closed
    lease.release()
    await until(lambda: served.loader.engines[0].closed)
    assert not served.loader.engines[1].closed
    new.release()


async def test_without_room_for_both_the_old_one_finishes_first(tmp_path: Path) -> None:
    served = Served(tmp_path, FakeLoader(room=1))
    lease = await served.manager.acquire("a")
    await served.change("temperature: 0.5", "temperature: 0.9")
    waiting = asyncio.create_task(served.manager.acquire("a"))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    lease.release()
    new = await waiting
    assert new.model.entry.settings.temperature == 0.9
    new.release()
    await served.manager.close()


async def test_who_waits_gets_what_has_the_name_now(tmp_path: Path) -> None:
    served = Served(tmp_path, FakeLoader())
    served.loader.gate.clear()
    loading = asyncio.create_task(served.manager.acquire("b"))
    waiting = asyncio.create_task(served.manager.acquire("c"))
    await until(lambda: served.manager.slots["b"].state is ModelState.LOADING)
    await served.change("- {name: b, hf_id: x/b}\n- {name: c, hf_id: x/c}", "- {name: b, hf_id: y/b}")
    assert len(served.manager.slots["b"].arrivals) == 1
    served.loader.gate.set()
    lease = await loading
    assert lease.model.entry.settings.model == "y/b"
    assert not served.manager.slots["b"].arrivals
    lease.release()
    with pytest.raises(ModelNotServedError, match="'c' is not served any more"):
        await waiting
    await until(lambda: served.loader.engines[0].closed)
    await served.manager.close()
    assert len(served.loader.engines) == 2


async def test_the_default_follows_the_file_unless_another_one_was_chosen(served: Served) -> None:
    await served.change("default_model: a", "default_model: b")
    assert served.manager.find(None).entry.name == "b"
    await served.manager.load("c")
    served.manager.select("c")
    await served.change("default_model: b", "default_model: a")
    assert served.manager.find(None).entry.name == "c"
    await served.change("- {name: c, hf_id: x/c}\n", "")
    assert served.manager.find(None).entry.name == "a"


BROKEN = [
    ("{name: b, hf_id: x/b}", "{name: b, hf_id: x/b", "line 6: not valid YAML"),
    ("{name: b, hf_id: x/b}", "{name: b, hf_idd: x/b}", "line 5: unknown key 'hf_idd'"),
    ("{temperature: 0.5}", "{temperature: hot}", "line 4: temperature"),
    ("{temperature: 0.5}", "{tool_parser: nothing}", "model 'a' of .*tool_parser is 'nothing'"),
    ("{name: b, hf_id: x/b}", "{name: b, hf_id: x/b, params: {served_model_name: c}}", "both called 'c'"),
]


@pytest.mark.parametrize(("old", "new", "message"), BROKEN, ids=[message for *_, message in BROKEN])
async def test_a_broken_file_changes_nothing(
    served: Served, caplog: pytest.LogCaptureFixture, old: str, new: str, message: str
) -> None:
    slots = dict(served.manager.slots)
    with pytest.raises(UsageError, match=message):
        await served.change(old, new)
    await served.reloader.reload()
    assert "the models stay as they were" in caplog.text
    assert re.search(message, caplog.text)
    assert served.manager.slots == slots


async def test_a_file_that_is_gone_changes_nothing(served: Served) -> None:
    served.path.unlink()
    with pytest.raises(UsageError, match="no longer exists"):
        await served.reloader.reload_models()
    assert list(served.manager.slots) == ["a", "b", "c"]


async def test_the_model_of_the_command_line_must_stay(tmp_path: Path) -> None:
    served = Served(tmp_path, FakeLoader(), model="b")
    with pytest.raises(UsageError, match="started with"):
        await served.change("- {name: b, hf_id: x/b}\n", "")
    await served.manager.close()


async def test_what_counts_from_the_next_start_is_said(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    slots = dict(served.manager.slots)
    await served.change("default_model: a", "default_model: a\nidle_unload_secs: 60")
    assert "idle_unload_secs in" in caplog.text
    assert "takes effect at the next start" in caplog.text
    assert served.manager.slots == slots


async def test_a_signal_reads_everything_again(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    before = signal.getsignal(signal.SIGHUP)
    served.reloader.listen(lambda: pytest.fail("no terminal was closed"))
    try:
        served.path.write_text(FILE.replace("name: c", "name: d"))
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: list(served.manager.slots) == ["a", "b", "d"])
        await until(lambda: "added d, removed c" in caplog.text)
    finally:
        asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)
        signal.signal(signal.SIGHUP, before)


async def test_keys_of_a_dotenv_file_are_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    dotenv = tmp_path / ".env"

    def loaded(environ: dict[str, str]) -> Reloader:
        given = SettingsSource("the command line", {"model": "demo"}, {})
        configuration = load_configuration(given, environ, folder=tmp_path, home=tmp_path)
        manager = ModelManager(configuration.catalogue, FakeLoader())
        return Reloader(configuration, manager, Keyring(configuration.settings))

    dotenv.write_text("CANDLE_VLLM_API_KEY=old\n")
    reloader = loaded({})
    dotenv.write_text("CANDLE_VLLM_API_KEY=new\nCANDLE_VLLM_PORT=2001\n")
    await reloader.reload()
    keys = reloader._keys
    assert keys.find(b"old") is None
    assert keys.find(b"new") is not None
    assert "replaced: 1" in caplog.text
    assert f"port in {dotenv} takes effect at the next start" in caplog.text
    for wrong, said in (
        ("", "take effect at the next start"),
        ("CANDLE_VLLM_API_KEY=a b\n", "the models stay as they were"),
    ):
        dotenv.write_text(wrong)
        await reloader.reload()
        assert said in caplog.text
        assert keys.find(b"new") is not None  # an invalid file never opens the server
    dotenv.unlink()
    caplog.clear()
    await loaded({"CANDLE_VLLM_API_KEY": "fixed"}).reload()
    assert "the API key of the environment stays until the next start" in caplog.text


# ---- over HTTP -------------------------------------------------------------------------------------------------------


def _started(start: Any, folder: Path, **settings: Any) -> tuple[Served, Any]:
    served = Served(folder, FakeLoader())
    running = start(served.manager, management_key=("root",), api_key=("user",), **settings)
    running.server.config.app.state.reloader = served.reloader
    return served, running.http(headers={"authorization": "Bearer root"})


async def test_an_added_model_has_the_defaults_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "models.yaml").write_text("global_params: {temperature: 0.3}" + FILE)
    given = SettingsSource("the command line", {}, {})
    configuration = load_configuration(given, {}, folder=tmp_path, home=tmp_path)
    assert configuration.entry_of is not None
    added = configuration.entry_of({"name": "d", "hf_id": "x/d", "params": {"top_k": 4}}, [])
    assert (added.settings.temperature, added.settings.top_k, added.settings.model) == (0.3, 4, "x/d")


def _served_names(client: Any) -> list[str]:
    return [card["id"] for card in client.get("/v1/models", headers={"authorization": "Bearer user"}).json()["data"]]


def test_models_are_added_and_removed_over_http(start: Any, tmp_path: Path) -> None:
    served, client = _started(start, tmp_path, allow_model_changes=True)
    with client:
        added = client.post("/v1/models/add", json={"name": "d", "hf_id": "x/d", "params": {"temperature": 0.3}})
        assert (added.status_code, added.json()["id"], added.json()["status"]) == (200, "d", "unloaded")
        assert served.manager.slots["d"].entry.settings.temperature == 0.3
        assert client.post("/v1/models/load", json={"model": "d"}).json()["status"] == "ready"
        removed = client.post("/v1/models/remove", json={"model": "c"})
        assert removed.json() == {"added": [], "changed": [], "removed": ["c"]}
        assert _served_names(client) == ["a", "b", "d"]
        served.path.write_text(FILE.replace("name: b", "name: e"))
        assert client.post("/v1/models/reload").json() == {"added": ["e", "c"], "changed": [], "removed": ["b"]}
        assert _served_names(client) == ["a", "e", "c", "d"]  # what was added stays
        assert served.manager.slots["d"].model is not None


WRONG = [
    ("add", {"name": "a", "hf_id": "x/a"}, 400, "both called 'a'"),
    ("add", {"name": "d"}, 400, "exactly one of hf_id and local_path"),
    ("add", {"name": "d", "hf_id": "x/d", "local_path": "/d"}, 400, "exactly one of hf_id and local_path"),
    ("add", {"name": "default", "hf_id": "x/d"}, 400, "always means default_model"),
    ("add", {"name": "d", "hf_id": "x/d", "params": {"temprature": 1}}, 400, "did you mean temperature?"),
    ("add", {"name": "d", "hf_id": "x/d", "params": {"temperature": "hot"}}, 400, "temperature must be a number"),
    ("add", {"name": "d", "hf_id": "x/d", "params": {"tool_parser": "nothing"}}, 400, "is not a known format"),
    ("add", {"name": "d", "hf_id": "x/d", "parms": {}}, 400, "parms"),
    ("add", {"name": 7, "hf_id": "x/d"}, 400, "name"),
    ("remove", {"model": "a"}, 400, "the default model, which cannot be removed"),
    ("remove", {"model": "z"}, 404, "not served here"),
]


def test_wrong_changes_are_named_and_change_nothing(start: Any, tmp_path: Path) -> None:
    served, client = _started(start, tmp_path, allow_model_changes=True)
    with client:
        for route, body, status, message in WRONG:
            answer = client.post(f"/v1/models/{route}", json=body)
            assert (answer.status_code, message in answer.json()["error"]["message"]) == (status, True), answer.text
        served.path.write_text("models: [")
        answer = client.post("/v1/models/reload")
        assert (answer.status_code, "line 1: not valid YAML" in answer.json()["error"]["message"]) == (400, True)
        assert _served_names(client) == ["a", "b", "c"]


def test_models_stay_as_they_are_unless_the_operator_allows_changes(start: Any, tmp_path: Path) -> None:
    _, client = _started(start, tmp_path)
    with client:
        body = {"add": {"name": "c", "hf_id": "a/b"}, "remove": {"model": "c"}}
        for route in ("reload", "add", "remove"):
            answer = client.post(f"/v1/models/{route}", json=body.get(route))
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "model_changes_off")
            refused = client.post(f"/v1/models/{route}", headers={"authorization": "Bearer user"})
            assert refused.status_code == 401
        assert client.post("/v1/models/add", json={"model": "c"}).status_code == 400  # named before it is refused


async def test_a_terminal_that_is_closed_still_ends_the_server(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    before, stopped = signal.getsignal(signal.SIGHUP), list[bool]()
    monkeypatch.setattr("candle_vllm.server.reloading._has_terminal", lambda: True)
    served.reloader.listen(lambda: stopped.append(True))
    monkeypatch.setattr("candle_vllm.server.reloading._has_terminal", lambda: False)
    try:
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: bool(stopped))
    finally:
        asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)
        signal.signal(signal.SIGHUP, before)


def test_files_whose_headers_cannot_be_read_are_named_at_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Else the first client of the model would find out."""
    cut, text, none = tmp_path / "cut.gguf", tmp_path / "README.md", tmp_path / "none.gguf"
    cut.write_bytes(b"GGUF\3\0\0\0")
    text.write_text("not a model")
    entries = [ModelEntry(path.stem, Settings(model=str(path))) for path in (tmp_path / "first.gguf", cut, text, none)]
    reading = warn_of_missing(Catalogue(entries))
    assert reading is not None
    reading.join()
    said = [record.getMessage() for record in caplog.records]
    for name, reason in (("cut", "cut.gguf"), ("README", "not a GGUF file"), ("none", "there is no")):
        assert any(line.startswith(f"the model {name} cannot be loaded: ") and reason in line for line in said), said
