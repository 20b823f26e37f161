# SPDX-License-Identifier: MIT
"""Files and batches over HTTP: the official client's way, who owns what, ends before the end, and another server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import msgspec
import openai
import pytest
import pytest_asyncio

from candle_vllm.core.errors import EngineDeadError, NoMemoryError
from candle_vllm.openai import fair_threads
from candle_vllm.openai.fair_threads import asker
from candle_vllm.responses.store import sql
from candle_vllm.responses.store.backend import Held
from candle_vllm.responses.store.entries import (
    Entry,
    EntryItem,
    NotStoredError,
    StoreFullError,
    StoreLimitError,
    StoreUnavailableError,
    new_id,
)
from candle_vllm.server.batches import lines, records, run, service, store
from candle_vllm.server.batches.lines import PRIORITY, read_line
from candle_vllm.server.http.failures import store_refusal
from candle_vllm.server.http.routing import NOBODY
from candle_vllm.server.models.manager import ModelManager
from candle_vllm.server.routes.files import safe_name
from candle_vllm.server.settings import Settings
from candle_vllm.server.settings.catalogue import Catalogue, ModelEntry
from packages.server.tests.running_server import Running
from packages.server.tests.server_fakes import FakeLoader, PacedEngine

wait_for = Running.wait_for
URL = "/v1/completions"


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(run, "FLUSH_SECONDS", 0.01)
    for module in (run, lines):
        monkeypatch.setattr(module, "read_line", _off_the_loop, raising=False)


def _off_the_loop(data: bytes, endpoint: str | None = None) -> lines.Line:
    with pytest.raises(RuntimeError, match="no running event loop"):
        asyncio.get_running_loop()
    return read_line(data, endpoint)


def line(name: Any, url: str = URL, **body: Any) -> str:
    body = {"model": "default", "prompt": "hi", "max_tokens": 3} | body
    return json.dumps({"custom_id": name, "method": "POST", "url": url, "body": body})


def begin(client: openai.OpenAI, *lines: str, **options: Any) -> Any:
    file = client.files.create(file=("in.jsonl", "\n".join(lines).encode()), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h", **options)


def ended(client: openai.OpenAI, batch: Any) -> Any:
    wait_for(lambda: client.batches.retrieve(batch.id).status in ("completed", "failed", "expired", "cancelled"))
    return client.batches.retrieve(batch.id)


def results(client: openai.OpenAI, file_id: str) -> dict[str, Any]:
    lines = client.files.content(file_id).text.splitlines()
    made = {each["custom_id"]: each for each in map(json.loads, lines)}
    assert len(made) == len(lines)
    return made


def test_a_salt_in_a_batch_belongs_to_the_key_of_the_batch(start: Callable[..., Any]) -> None:
    running = start(PacedEngine("abc"), api_key=("one", "two"))
    salts: list[str] = []
    for key in ("one", "two"):
        client = running.openai(key)
        client.completions.create(model="default", prompt="hi", extra_body={"cache_salt": "mine"})
        assert ended(client, begin(client, line("a", cache_salt="mine"))).status == "completed"
        direct, batched = (each.params.cache_salt for each in running.engine.requests[-2:])
        assert direct == batched != "mine"
        salts.append(direct)
    assert salts[0] != salts[1]


def test_the_official_client_has_a_file_answered(start: Callable[..., Any]) -> None:
    running = start(PacedEngine("abc"))
    client = running.openai()
    batch = begin(client, *(line(str(n)) for n in range(20)), "", line("wrong", max_tokens=-2), metadata={"a": "b"})
    assert (batch.status, batch.metadata, batch.endpoint, batch.output_file_id) == ("validating", {"a": "b"}, URL, None)
    batch = ended(client, batch)
    assert batch.status == "completed"
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (21, 20, 1)
    assert all(name.startswith("file-") for name in (batch.input_file_id, batch.output_file_id, batch.error_file_id))
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at < batch.expires_at
    made = results(client, batch.output_file_id)
    assert set(made) == {str(n) for n in range(20)}
    assert made["7"]["response"]["body"]["choices"][0]["text"] == "abc"
    assert results(client, batch.error_file_id)["wrong"]["response"]["body"]["error"]["param"] == "max_tokens"
    assert {request.priority for request in running.engine.requests} == {PRIORITY}

    file = client.files.retrieve(batch.output_file_id)
    assert (file.purpose, file.status, file.filename) == ("batch_output", "processed", f"{batch.id}_output.jsonl")
    assert file.bytes == len(client.files.content(file.id).content)
    assert [each.purpose for each in client.files.list()] == ["batch_output", "batch_output", "batch"]
    assert [each.id for each in client.files.list(purpose="batch")] == [batch.input_file_id]
    assert [each.id for each in client.batches.list()] == [batch.id]
    assert client.files.delete(batch.input_file_id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(batch.input_file_id)


def test_a_file_that_is_deleted_while_it_is_read(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The client sees a cut, and the log says why in a line."""
    contents = store.BatchStore.contents

    async def deleting(self: store.BatchStore, owner: str, file_id: str) -> Any:
        async for part in contents(self, owner, file_id):
            yield part
            with contextlib.suppress(NotStoredError):
                await self.delete_file(owner, file_id)

    monkeypatch.setattr(store.BatchStore, "contents", deleting)
    monkeypatch.setattr(store, "AT_ONCE", 1)
    running = start(PacedEngine("abc"))
    file = running.openai().files.create(file=("a.jsonl", b"x" * (store.PIECE + 1)), purpose="batch")
    with running.http() as client, pytest.raises(httpx.RemoteProtocolError):
        client.get(f"/v1/files/{file.id}/content")
    running.stop()
    [record] = [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert f"File with id {file.id!r} was not found" in record.getMessage()
    assert not record.exc_info


def test_downloads_hold_a_part_of_a_file_and_are_bounded(start: Callable[..., Any]) -> None:
    running = start(PacedEngine("abc"), api_key=("mine", "theirs"), max_held_mb=2, max_body_mb=1)
    held, data = running.server.config.app.state.held, b"x" * (96 * store.PIECE)
    mine, theirs = ({"authorization": f"Bearer {key}"} for key in ("mine", "theirs"))
    path = f"/v1/files/{running.openai('mine').files.create(file=('a.jsonl', data), purpose='batch').id}/content"
    with running.http() as client, contextlib.ExitStack() as reading:
        for _ in range(4):
            assert reading.enter_context(client.stream("GET", path, headers=mine)).status_code == 200
        assert sum(held._by_key.values()) == 4 * store.PIECE
        refused = client.get(path, headers=mine)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert client.get("/v1/files", headers=theirs).status_code == 200
        reading.close()
        running.wait_for(lambda: not held._by_key)
        assert client.get(path, headers=mine).content == data


async def test_few_bytes_of_a_file_are_read_at_a_time() -> None:
    asked: list[int] = []

    class Parts:
        sizes = (*[10] * 40, *[store.PIECE] * 3, 10, 10)

        async def parts(self, *what: Any) -> list[EntryItem]:
            _, _, _, count, _, after = what
            asked.append(count)
            first = 0 if after is None else int(after) + 1
            numbers = range(first, min(first + count, len(self.sizes)))
            return [EntryItem(id=str(number), body=b"x" * self.sizes[number]) for number in numbers]

    files = store.BatchStore(store.FileOptions("memory"))
    files._backend = cast("Any", Parts())
    assert [len(part.body) async for part in files.contents("", "f")] == list(Parts.sizes)
    assert asked == [1, 2, 4, 8, 16, 16, 1]


async def test_a_full_file_is_no_full_conversation() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"x" * 1000

    files = store.BatchStore(store.FileOptions("memory", max_bytes=1000))
    with pytest.raises(StoreLimitError, match=r"into the upload: .* 1000 bytes .* --files-max-mb") as error:
        await files.upload("", "a.jsonl", pieces(), None)
    assert error.value.param is None
    await files.close()


async def test_a_store_that_is_being_opened_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    go, opened, open_backend = asyncio.Event(), list[Any](), store.open_backend

    async def slowly(*given: Any) -> Any:
        await go.wait()
        opened.append(await open_backend(*given))
        return opened[0]

    monkeypatch.setattr(store, "open_backend", slowly)
    files = store.BatchStore(store.FileOptions("memory"))
    opening = asyncio.create_task(files.owner("key"))
    await asyncio.sleep(0)
    closing = asyncio.create_task(files.close())
    await asyncio.sleep(0)
    go.set()
    await asyncio.gather(opening, closing)
    with pytest.raises(StoreUnavailableError):
        await opened[0].get("file", "a", "file-1")


async def test_files_of_a_purpose_are_found_in_few_looks() -> None:
    asked: list[int] = []

    class Pages:
        async def page(self, kind: str, owner: str, limit: int, after: str | None, order: str) -> list[Any]:
            asked.append(limit)
            first, about = int(after or 0), {"purpose": "batch", "filename": "f", "bytes": 1}
            last = min(first + limit, 4500)
            return [
                Entry(kind=kind, owner=owner, id=str(n + 1), created=1, status="", about=about)
                for n in range(first, last)
            ]

    files = store.BatchStore(store.FileOptions("memory"))
    files._backend = cast("Any", Pages())
    assert await files.files("", 1, None, "vision", "desc") == []
    assert len(asked) == 5
    assert len(await files.files("", 2, None, None, "desc")) == 2
    assert asked[5:] == [2]


def test_pages(start: Callable[..., Any]) -> None:
    client = start(PacedEngine("abc")).openai()
    batches = [begin(client, line("a")) for _ in range(3)]
    for batch in batches:
        ended(client, batch)
    newest = [batch.id for batch in reversed(batches)]
    first = client.batches.list(limit=2)
    assert ([each.id for each in first.data], first.has_more) == (newest[:2], True)
    assert [each.id for each in client.batches.list(limit=2)] == newest  # the client asks for the next page
    inputs = [batch.input_file_id for batch in reversed(batches)]
    assert [each.id for each in client.files.list(limit=2, purpose="batch")] == inputs
    oldest = [each.id for each in client.files.list(limit=2, purpose="batch", order="asc")]
    assert oldest == inputs[::-1]
    everything = [each.id for each in client.files.list()]
    assert [each.id for each in client.files.list(limit=1, order="asc")] == everything[::-1]


def test_nobody_sees_what_another_key_has(start: Callable[..., Any]) -> None:
    running = start(PacedEngine("abc"), api_key=("mine", "theirs"))
    mine, theirs = running.openai("mine"), running.openai("theirs")
    batch = ended(mine, begin(mine, line("a")))
    assert batch.status == "completed"
    assert (list(theirs.files.list()), list(theirs.batches.list())) == ([], [])
    for call in (
        lambda: theirs.files.retrieve(batch.input_file_id),
        lambda: theirs.files.content(batch.output_file_id),
        lambda: theirs.files.delete(batch.input_file_id),
        lambda: theirs.batches.retrieve(batch.id),
        lambda: theirs.batches.cancel(batch.id),
        lambda: theirs.batches.create(input_file_id=batch.input_file_id, endpoint=URL, completion_window="24h"),
    ):
        with pytest.raises(openai.NotFoundError):
            call()
    with pytest.raises(openai.AuthenticationError):
        running.openai("none").files.list()
    assert len(list(mine.files.list())) == 2


@pytest.mark.parametrize(
    ("lines", "code", "number"),
    [
        ([line("a"), "no JSON"], "invalid_json_line", 2),
        ([line("a"), "", line("a")], "duplicate_custom_id", 3),
        ([line("a", url="/v1/embeddings")], "invalid_url", 1),
        (["", " "], "empty_file", None),
    ],
)
def test_a_file_that_is_wrong_is_not_begun(
    lines: list[str], code: str, number: int | None, start: Callable[..., Any]
) -> None:
    running = start(PacedEngine("abc"))
    client = running.openai()
    batch = ended(client, begin(client, *lines))
    assert batch.status == "failed"
    assert [(error.code, error.line) for error in batch.errors.data] == [(code, number)]
    assert running.engine.requests == []


def test_a_line_is_as_long_as_it_is_in_the_file(start: Callable[..., Any]) -> None:
    """Its body is encoded anew, and must not grow beyond the limit of a body by that."""
    client = start(PacedEngine("abc", max_model_len=1 << 24), max_body_mb=1).openai()
    text = json.dumps(json.loads(line("a", prompt="中" * 300_000)), ensure_ascii=False)
    batch = ended(client, begin(client, text))
    assert (batch.status, batch.error_file_id) == ("completed", None)


def test_a_line_without_end_is_refused(start: Callable[..., Any]) -> None:
    running = start(PacedEngine("abc"), max_body_mb=1)
    client = running.openai()
    batch = ended(client, begin(client, line("a", prompt="x" * (3 << 19))))
    assert [error.code for error in batch.errors.data] == ["line_too_long"]


async def test_a_file_of_ends_of_lines_gives_others_their_turns() -> None:
    """Its parts have nothing to wait for: all of them would be one turn of the event loop."""
    parts, turns, over = 16, 0, False

    class Parts:
        async def file(self, owner: str, file_id: str) -> Any:
            del owner
            return SimpleNamespace(id=file_id)

        async def contents(self, owner: str, file_id: str) -> AsyncGenerator[Any]:
            del owner, file_id
            for number in range(parts):
                yield SimpleNamespace(body=b"\n" * 1000 + b"%d\n" % number)

    async def others() -> None:
        nonlocal turns
        while not over:
            turns += 1
            await asyncio.sleep(0)

    held: Any = SimpleNamespace(owner="", id="batch")
    reader = run.BatchRun(cast("store.BatchStore", Parts()), held, 1 << 20, 1.0, lambda: True)
    reader._record = cast("Any", SimpleNamespace(batch=SimpleNamespace(input_file_id="file")))
    beside = asyncio.create_task(others())
    lines_found = [line async for lines in reader._lines() for line in lines]
    over = True
    await beside
    assert lines_found == [(1001 * number + 1001, b"%d" % number) for number in range(parts)]
    assert turns >= parts


def test_big_lines_take_the_turn_of_big_bodies(start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of the key whose batch it is, in every step."""
    steps, turn = set[tuple[str, str]](), fair_threads._big.run

    async def take_turn(work: Any, who: str | None, ended: Any) -> Any:
        steps.add((work.func.__name__, asker.get() if who is None else who))
        return await turn(work, who, ended)

    monkeypatch.setattr(fair_threads._big, "run", take_turn)
    running = start(PacedEngine("abc"), api_key=("one", "two"))
    client = running.openai("two")
    assert ended(client, begin(client, line("a"), line("b", user="x" * 100_000))).status == "completed"
    names = {name for name, _ in steps}
    assert names == {"split", "_check", "_off_the_loop", "parse_completion_request"}
    assert {who for _, who in steps} == {"2"}


def test_a_batch_is_cancelled_in_the_middle(start: Callable[..., Any]) -> None:
    engine = PacedEngine("abc", pause=0.05)
    engine._info = msgspec.structs.replace(engine.model_info, max_num_seqs=4)
    running = start(engine)
    client = running.openai()
    batch = begin(client, *(line(str(n)) for n in range(200)))
    wait_for(lambda: client.batches.retrieve(batch.id).request_counts.completed)
    assert len(engine._live) <= 2  # half of the places are for others
    assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    batch = ended(client, batch)
    assert batch.status == "cancelled"
    assert batch.cancelling_at <= batch.cancelled_at
    good, wrong = results(client, batch.output_file_id), results(client, batch.error_file_id)
    assert 0 < len(good) < 200
    assert set(good) | set(wrong) == {str(n) for n in range(200)}
    assert {each["error"]["code"] for each in wrong.values()} == {"batch_cancelled"}
    with pytest.raises(openai.ConflictError, match="has ended already"):
        client.batches.cancel(batch.id)
    wait_for(lambda: not engine._live)


def test_a_batch_that_takes_too_long_expires(start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "COMPLETION_SECONDS", 0)
    running = start(PacedEngine("abc"))
    client = running.openai()
    batch = ended(client, begin(client, line("a"), line("b")))
    assert (batch.status, batch.output_file_id) == ("expired", None)
    codes = {name: each["error"]["code"] for name, each in results(client, batch.error_file_id).items()}
    assert codes == {"a": "batch_expired", "b": "batch_expired"}


def test_the_next_server_goes_on(start: Callable[..., Any], tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/kept.sqlite"
    engine = PacedEngine("abc", pause=0.05)
    engine._info = msgspec.structs.replace(engine.model_info, max_num_seqs=4)
    running = start(engine, responses_store=url, api_key=("old",))
    client = running.openai("old")
    batch = begin(client, *(line(str(n)) for n in range(300)))
    revoked = begin(client, line("a"))
    wait_for(lambda: client.batches.retrieve(batch.id).request_counts.completed)
    running.stop()
    first = len(engine.requests)
    assert 0 < first < 300

    other = PacedEngine("abc")
    client = start(other, responses_store=url, api_key=("new", "old")).openai("old")
    batch = ended(client, batch)
    assert batch.status == "completed"
    assert (batch.request_counts.completed, batch.request_counts.failed) == (300, 0)
    assert set(results(client, batch.output_file_id)) == {str(n) for n in range(300)}
    assert ended(client, revoked).status == "completed"
    assert first + len(other.requests) <= 301 + 4  # but for those that were under way, no line was asked twice


def test_a_batch_of_a_key_that_is_none_any_more_fails(start: Callable[..., Any], tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/kept.sqlite"
    running = start(PacedEngine("abc", pause=0.3), responses_store=url, api_key=("old",))
    batch = begin(running.openai("old"), *(line(str(n)) for n in range(500)))
    wait_for(lambda: running.engine.requests)
    running.stop()
    middle = start(PacedEngine("abc"), responses_store=url, api_key=("new",))
    wait_for(lambda: any(b"invalid_api_key" in path.read_bytes() for path in tmp_path.glob("kept.sqlite*")))
    assert middle.engine.requests == []
    last = start(PacedEngine("abc"), responses_store=url, api_key=("old",)).openai("old")
    batch = ended(last, batch)
    assert [error.code for error in batch.errors.data] == ["invalid_api_key"]


def test_a_batch_waits_while_the_model_sleeps(start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "LONGEST_PAUSE", 0.01)
    running = start(PacedEngine("abc"))
    client = running.openai()
    running.engine.sleep()
    batch = begin(client, *(line(str(n)) for n in range(5)))
    wait_for(lambda: client.batches.retrieve(batch.id).status == "in_progress")
    time.sleep(0.2)
    running.engine.wake_up()
    batch = ended(client, batch)
    assert (batch.status, batch.request_counts.completed, batch.error_file_id) == ("completed", 5, None)


@pytest.mark.parametrize("cause", ["death", "load"])
def test_a_batch_outlives_a_server_without_a_model(
    cause: str, start: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its engine has died, or it stops because its model cannot be loaded: the next one answers the lines."""
    monkeypatch.setattr(lines, "LONGEST_PAUSE", 0.01)
    url = f"sqlite:///{tmp_path}/kept.sqlite"
    engine = PacedEngine("abc", pause=0.1)
    engine._info = msgspec.structs.replace(engine.model_info, max_num_seqs=2)
    running = start(engine, responses_store=url)
    client = running.openai()
    batch = begin(client, *(line(str(n)) for n in range(50)))
    wait_for(lambda: engine.requests)
    if cause == "death":
        engine.alive = False
        engine.submit_error = EngineDeadError("the engine has stopped")
    else:
        running.stop()
        loader = FakeLoader()
        loader.broken["default"] = NoMemoryError("another process has the memory")
        running = start(ModelManager(Catalogue([ModelEntry("default", Settings())]), loader), responses_store=url)
        client = running.openai()
        loading = asyncio.run_coroutine_threadsafe(running.engine.start(), running.server.servers[0].get_loop())
        with pytest.raises(NoMemoryError):
            loading.result()
    time.sleep(0.3)
    assert client.batches.retrieve(batch.id).request_counts.failed == 0
    running.stop()
    client = start(PacedEngine("abc"), responses_store=url).openai()
    batch = ended(client, batch)
    assert (batch.status, batch.request_counts.completed, batch.error_file_id) == ("completed", 50, None)


def test_a_batch_that_is_stored_is_not_refused(start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise clients would create it again; it begins with the next look."""

    async def failing(*_: Any) -> Any:
        raise StoreUnavailableError("gone")

    client = start(PacedEngine("abc")).openai()
    with monkeypatch.context() as failed:
        failed.setattr(store.BatchStore, "lapsed", failing)
        batch = begin(client, line("a"))
    assert ended(client, batch).status == "completed"


def test_a_batch_fails_when_its_key_is_removed(start: Callable[..., Any], tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("old\nnew\n")
    engine = PacedEngine("abc", pause=0.05)
    engine._info = msgspec.structs.replace(engine.model_info, max_num_seqs=4)
    running = start(engine, api_key_file=keys)
    state, loop = running.server.config.app.state, running.server.servers[0].get_loop()
    client = running.openai("old")

    def reload(text: str) -> None:
        keys.write_text(text)
        assert asyncio.run_coroutine_threadsafe(state.keys.reload(), loop).result()

    batch = begin(client, *(line(str(n)) for n in range(300)))
    wait_for(lambda: client.batches.retrieve(batch.id).request_counts.completed)
    reload("new\n")
    wait_for(lambda: not state.batches._running)
    reload("new\nold\n")
    batch = client.batches.retrieve(batch.id)
    assert (batch.status, batch.error_file_id, batch.request_counts.failed) == ("failed", None, 0)
    assert [error.code for error in batch.errors.data] == ["invalid_api_key"]
    assert 0 < len(results(client, batch.output_file_id)) < 300


def test_a_server_whose_engine_dies_leaves_its_batches_to_another(
    start: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "LONGEST_PAUSE", 0.01)
    url = f"sqlite:///{tmp_path}/kept.sqlite"
    first = start(PacedEngine("abc", pause=0.1), responses_store=url)
    client = first.openai()
    batch = begin(client, *(line(str(n)) for n in range(400)))
    wait_for(lambda: client.batches.retrieve(batch.id).request_counts.completed)
    other = start(PacedEngine("abc"), responses_store=url)
    first.engine.alive = False
    batch = ended(client, batch)
    assert (batch.status, batch.request_counts.completed, batch.error_file_id) == ("completed", 400, None)
    assert other.engine.requests


def test_an_input_that_is_gone_ends_its_batch(start: Callable[..., Any]) -> None:
    engine = PacedEngine("abc", pause=0.05)
    engine._info = msgspec.structs.replace(engine.model_info, max_num_seqs=2)
    client = start(engine).openai()
    batch = begin(client, *(line(str(n), prompt="x" * 9000) for n in range(300)))
    wait_for(lambda: client.batches.retrieve(batch.id).status == "in_progress")
    client.files.delete(batch.input_file_id)
    batch = ended(client, batch)
    assert [error.code for error in batch.errors.data] == ["input_file_gone"]
    again = begin(client, *(line(str(n), prompt="x" * 9000) for n in range(300)))
    wait_for(lambda: client.batches.retrieve(again.id).status == "in_progress")
    client.batches.cancel(again.id)
    client.files.delete(again.input_file_id)
    again = ended(client, again)
    assert (again.status, again.errors) == ("cancelled", None)
    assert again.cancelled_at >= again.cancelling_at


# ---- a store with faults, without a server -------------------------------------------------------------------------


class Asked:
    """Answers lines by their `custom_id`; `before` is called first."""

    def __init__(self, before: Callable[[str], Awaitable[None]] | None = None) -> None:
        self.names: list[str] = []
        self._before = before

    async def read(self, data: bytes, endpoint: str | None = None) -> lines.Line:
        return read_line(data, endpoint)

    async def answer(self, data: bytes, **how: Any) -> lines.Result:
        name = read_line(data, how["endpoint"]).custom_id
        if self._before is not None:
            await self._before(name)
        self.names.append(name)
        said = lines.Answered(status_code=200, request_id="", body=msgspec.Raw(b"{}"))
        return lines.Result(id=name, custom_id=name, response=said, error=None)


class Stored:
    """A store in memory with one batch of the lines 0 to 4; a clock that stands; faults of single calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.now = 1_700_000_000.0
        self.store = store.BatchStore(store.FileOptions("memory", **options))
        self._patch = monkeypatch

    async def begin(self) -> None:
        self.backend: Any = await self.store.backend()
        self.backend._clock = lambda: self.now
        self.owner = await self.store.owner("key")

        async def pieces() -> AsyncIterator[bytes]:
            yield "\n".join(line(str(number)) for number in range(5)).encode()

        self.input = (await self.store.upload(self.owner, "in.jsonl", pieces(), 100)).id
        self.id = await self.add()

    async def add(self) -> str:
        """Add a batch, and return its id."""
        now = int(self.now)
        batch = records.Batch(
            id=new_id("batch"), endpoint=URL, input_file_id=self.input, created_at=now, expires_at=now + 86400,
            metadata={"name": "ü" * 500},
        )  # fmt: skip
        self.record = records.BatchRecord(
            batch=batch, output_id=store.new_file_id(), error_id=store.new_file_id(), result_seconds=30 * 86400
        )
        await self.store.add_batch(self.owner, self.record)
        return batch.id

    async def take(self, batch_id: str = "") -> run.BatchRun:
        """Take up a batch, as a server does whose predecessor died."""
        self.now += 31
        held = Held(self.owner, batch_id or self.id, new_id("server"))
        assert await self.backend.claim(store.BATCHES, held, self.backend.now + run.LEASE_MS)
        return run.BatchRun(self.store, held, 1 << 20, 3600.0, lambda: True)

    async def work(self, run_: run.BatchRun, asked: Asked) -> None:
        await run_.work(cast("Any", asked), NOBODY, contextlib.nullcontext, 1)

    def fail(self, name: str, error: BaseException, when: Callable[..., bool] = lambda *given: True) -> None:
        """Let the store's method fail the first time that its arguments fit."""
        method, failed = getattr(self.store, name), False

        async def call(*given: Any) -> Any:
            nonlocal failed
            if not failed and when(*given):
                failed = True
                raise error
            return await method(*given)

        self._patch.setattr(self.store, name, call)

    async def batch(self) -> records.Batch:
        return (await self.store.batch(self.owner, self.id)).batch

    async def lines(self, file_id: str | None, kind: str = store.FILE) -> list[str]:
        if file_id is None:
            return []
        return [json.loads(part.body)["custom_id"] async for part in self.store.contents(self.owner, file_id, kind)]

    async def hidden(self) -> list[Entry]:
        return await self.backend.page(store.RESULTS, self.owner, 10)

    async def occupy(self) -> None:
        """Fill the store with an upload in progress, up to some 100 bytes."""
        fill = Entry(kind=store.UPLOAD, owner="other", id="fill", created=1, status=store.ACTIVE, lease=1 << 62)
        await self.backend.put(fill)
        size = self.store.options.max_bytes
        while size:
            try:
                await self.backend.append(store.UPLOAD, "other", "fill", [EntryItem(id=new_id("p"), body=b"x" * size)])
            except StoreLimitError:
                size //= 2


@pytest_asyncio.fixture
async def stored(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stored]:
    monkeypatch.setattr(run, "FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(run, "FULL_PAUSES", (0, 0, 0), raising=False)
    made = Stored(monkeypatch, max_bytes=64 << 10)
    await made.begin()
    yield made
    await made.store.close()


@pytest.mark.parametrize("status", ["completed", "cancelled", "failed"])
async def test_a_batch_that_is_interrupted_while_it_ends_answers_nothing_again(stored: Stored, status: str) -> None:
    first = await stored.take()

    async def before(name: str) -> None:
        if name != "2":
            return
        if status == "failed":
            raise RuntimeError("broken")
        if status == "cancelled":
            await stored.store.cancel(stored.owner, stored.id)
            first.cancelled.set()
            await asyncio.Event().wait()

    stored.fail("write", StoreUnavailableError("gone"), lambda owner, record, lease: lease is None)
    with pytest.raises(RuntimeError if status == "failed" else StoreUnavailableError):
        await stored.work(first, Asked(before))
    await first.fail_for_good() if status == "failed" else None
    assert (await stored.batch()).status in records.WORKING
    stored.now += 2 * 86400  # the server comes back late
    asked = Asked()
    await stored.work(await stored.take(), asked)
    batch = await stored.batch()
    assert (batch.status, asked.names) == (status, [])
    good = ["0", "1", "2", "3", "4"] if status == "completed" else ["0", "1"]
    assert await stored.lines(batch.output_file_id) == good
    assert await stored.lines(batch.error_file_id) == (["2", "3", "4"] if status == "cancelled" else [])
    assert await stored.hidden() == []
    counts = batch.request_counts
    assert (counts.completed, counts.failed) == (len(good), 3 if status == "cancelled" else 0)


async def test_a_batch_that_fails_in_a_full_store_shows_its_results(stored: Stored) -> None:
    async def before(name: str) -> None:
        if name == "3":
            await stored.occupy()

    asked = Asked(before)
    await stored.work(await stored.take(), asked)
    batch = await stored.batch()
    assert batch.errors is not None
    assert (batch.status, [error.code for error in batch.errors.data]) == ("failed", ["store_limit"])
    assert await stored.lines(batch.output_file_id) == ["0", "1", "2"]
    assert (batch.error_file_id, await stored.hidden()) == (None, [])
    await stored.store.delete_file(stored.owner, batch.output_file_id or "")


@pytest.mark.parametrize("cause", [lines.InvalidKeyError(), NotStoredError("File", "file-1", "file_id")])
async def test_a_batch_that_fails_shows_results_that_were_not_written_yet(
    cause: Exception, stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "FLUSH_SECONDS", 3600.0)

    async def before(name: str) -> None:
        if name == "3":
            raise cause

    await stored.work(await stored.take(), Asked(before))
    batch = await stored.batch()
    assert (batch.status, batch.request_counts.completed) == ("failed", 3)
    assert await stored.lines(batch.output_file_id) == ["0", "1", "2"]


async def test_a_batch_with_a_line_that_the_next_server_finds_too_long_fails(stored: Stored) -> None:
    stored.fail("gather", EngineDeadError("dead"))  # once the input was valid
    first = await stored.take()
    with pytest.raises(EngineDeadError):
        await stored.work(first, Asked())
    second = await stored.take()
    second._longest = 10
    await stored.work(second, Asked())
    batch = await stored.batch()
    assert batch.errors is not None
    assert (batch.status, [error.code for error in batch.errors.data]) == ("failed", ["line_too_long"])


async def test_a_batch_without_input_that_another_server_has_just_cancelled_is_cancelled(stored: Stored) -> None:
    async def protect(*given: Any) -> None:
        await stored.store.cancel(stored.owner, stored.id)
        await stored.backend.delete(store.FILE, stored.owner, stored.input)

    work = await stored.take()
    stored._patch.setattr(stored.store, "protect", protect)
    await stored.work(work, Asked())
    batch = await stored.batch()
    assert (batch.status, batch.errors) == ("cancelled", None)


async def test_a_batch_without_results_fails_without_files(stored: Stored) -> None:
    async def before(name: str) -> None:
        raise RuntimeError(name)

    work = await stored.take()
    with pytest.raises(RuntimeError):
        await stored.work(work, Asked(before))
    await work.fail_for_good()
    batch = await stored.batch()
    assert (batch.status, batch.output_file_id, batch.error_file_id) == ("failed", None, None)
    assert await stored.hidden() == []


async def test_a_batch_waits_while_the_store_is_full(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, add = 0, stored.store.add_results

    async def before(name: str) -> None:
        if name == "3":
            await stored.occupy()

    async def adding(*given: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 6:  # the fourth call is refused, and the fifth
            await stored.backend.delete(store.UPLOAD, "other", "fill")
        await add(*given)

    monkeypatch.setattr(stored.store, "add_results", adding)
    asked = Asked(before)
    await stored.work(await stored.take(), asked)
    batch = await stored.batch()
    assert (batch.status, calls, asked.names) == ("completed", 7, ["0", "1", "2", "3", "4"])
    assert await stored.lines(batch.output_file_id) == asked.names


@pytest.mark.parametrize("call", ["add_results", "write"])
@pytest.mark.parametrize("error", [StoreUnavailableError("gone"), asyncio.CancelledError()])
async def test_no_answer_is_lost_between_two_writes(stored: Stored, call: str, error: BaseException) -> None:
    def when(*given: Any) -> bool:
        return call == "add_results" or given[1].batch.request_counts.completed == 1

    stored.fail(call, error, when)
    work, asked = await stored.take(), Asked()
    if isinstance(error, asyncio.CancelledError):
        with pytest.raises(asyncio.CancelledError):
            await stored.work(work, asked)
        await work.give_back()
        assert await stored.lines(stored.record.output_id, store.RESULTS) == asked.names == ["0"]
        assert (await stored.batch()).request_counts.completed == 1
        work = await stored.take()
    await stored.work(work, asked)
    batch = await stored.batch()
    assert (batch.status, batch.request_counts.completed) == ("completed", 5)
    assert await stored.lines(batch.output_file_id) == asked.names == ["0", "1", "2", "3", "4"]


async def test_an_input_is_protected_until_its_last_batch_has_ended(
    stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    second, going, over = await stored.take(await stored.add()), asyncio.Event(), asyncio.Event()

    async def before(name: str) -> None:
        going.set()
        await over.wait()

    first = await stored.take()
    second._pause = 0.0  # it renews its leases in every turn of the loop
    working = [asyncio.create_task(stored.work(first, Asked(before)))]
    await going.wait()
    going.clear()
    working.append(asyncio.create_task(stored.work(second, Asked(before))))
    await going.wait()
    working[0].cancel()
    await asyncio.wait(working[:1])
    await first.fail_for_good()
    renew, renewed = stored.store.renew, asyncio.Event()

    async def renewing(*given: Any) -> bool:
        found = await renew(*given)
        renewed.set()
        return found

    monkeypatch.setattr(stored.store, "renew", renewing)
    for _ in range(4):  # longer than the input is stored
        stored.now += 29
        renewed.clear()
        await renewed.wait()
        renewed.clear()
        await renewed.wait()  # this renewal began after the clock was moved
        await stored.backend.expire()
    assert (await stored.store.file(stored.owner, stored.input)).expires_at < stored.now
    await stored.occupy()
    assert (await stored.store.file(stored.owner, stored.input)).id == stored.input
    await stored.backend.delete(store.UPLOAD, "other", "fill")
    over.set()
    await working[1]
    assert (await stored.store.batch(stored.owner, second.held.id)).batch.status == "completed"
    stored.now += 31
    assert await stored.backend.expire()
    with pytest.raises(NotStoredError):
        await stored.store.file(stored.owner, stored.input)


async def test_a_batch_that_expires_while_batches_are_listed_is_left_out(
    stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, page = await stored.add(), stored.backend.page

    async def listing(*given: Any) -> Any:
        found = await page(*given)
        await stored.backend.delete(store.BATCHES, stored.owner, gone)
        return found

    monkeypatch.setattr(stored.backend, "page", listing)
    assert [each.id for each in await stored.store.batches(stored.owner, 10, None)] == [stored.id]


# ---- several keys ----------------------------------------------------------------------------------------------------


def test_one_key_has_half_of_the_batches(start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql, "ROWS_AT_ONCE", 2)  # more of one key wait than are looked at in one go
    engine = PacedEngine("abc", pause=0.05)
    engine._info = msgspec.structs.replace(engine.model_info, max_num_seqs=4)
    running = start(engine, api_key=("alice", "bob"))
    alice, bob = running.openai("alice"), running.openai("bob")
    floods = [begin(alice, *(line(str(n)) for n in range(500))) for _ in range(6)]
    wait_for(lambda: len(engine._live))
    assert ended(bob, begin(bob, line("a"))).status == "completed"
    states = [alice.batches.retrieve(batch.id).status for batch in floods]
    assert sorted(states) == ["in_progress"] * 2 + ["validating"] * 4


def test_lines_of_one_key_that_never_end_leave_places(start: Callable[..., Any]) -> None:
    engine = PacedEngine(lambda prompt: "abc" if "short" in prompt else "abc" * 1000, pause=0.05)
    engine._info = msgspec.structs.replace(engine.model_info, max_num_seqs=8)
    running = start(engine, api_key=("alice", "bob"))
    alice, bob = running.openai("alice"), running.openai("bob")
    for _ in range(2):
        begin(alice, *(line(str(n), max_tokens=3000) for n in range(50)))
    wait_for(lambda: len(engine._live) == 2)  # half of the four places that lines have
    assert ended(bob, begin(bob, line("a", prompt="short"))).status == "completed"
    assert len(engine._live) == 2


def test_the_lines_at_a_time_follow_the_models_that_are_loaded_now(start: Callable[..., Any]) -> None:
    engine = PacedEngine("abc" * 20, pause=0.02)
    engine._info = msgspec.structs.replace(engine.model_info, max_num_seqs=8)
    client = start(engine).openai()
    for most in (8, 2, 12):
        engine._info = msgspec.structs.replace(engine.model_info, max_num_seqs=most)
        batch = begin(client, *(line(str(n)) for n in range(9)))
        wait_for(lambda most=most: len(engine._live) == most // 2)
        assert ended(client, batch).status == "completed"


def test_one_key_has_half_of_the_store(start: Callable[..., Any]) -> None:
    engine = PacedEngine("abc", pause=0.05)
    engine._info = msgspec.structs.replace(engine.model_info, max_num_seqs=2)
    running = start(engine, api_key=("alice", "bob"), files_max_mb=2, file_max_mb=2)
    alice, bob = running.openai("alice"), running.openai("bob")

    def keep(client: openai.OpenAI, size: int) -> str:
        return client.files.create(file=("f", b"x" * size), purpose="batch").id

    theirs = keep(bob, 900_000)
    assert [keep(alice, 600_000) for _ in range(2)][1:] == [file.id for file in alice.files.list()]  # its own went
    with pytest.raises(openai.APIStatusError, match=r"1 MB.*--file-max-mb and --files-max-mb") as refused:
        keep(alice, 3 << 19)
    assert refused.value.status_code == 413
    batch = begin(alice, *(line(str(n), prompt="x" * 9000) for n in range(60)))
    wait_for(lambda: alice.batches.retrieve(batch.id).status == "in_progress")  # its input cannot make room now
    with pytest.raises(openai.RateLimitError, match="Your half of the store of files is full") as full:
        keep(alice, 700_000)
    assert int(full.value.response.headers["retry-after"])
    keep(bob, 100_000)
    assert theirs in [file.id for file in bob.files.list()]  # and nothing of it has hurt another


@pytest.mark.parametrize(("own", "status"), [(True, 429), (False, 503)])
def test_who_finds_a_store_full_is_told_to_come_again(own: bool, status: int) -> None:
    refusal = store_refusal(StoreFullError("Full.", own=own))
    assert refusal is not None
    assert (refusal.status, refusal.code, int(refusal.headers["retry-after"])) == (status, "store_limit", 30)


def unfinished(running: Any, key: str, size: int) -> socket.socket:
    """An upload whose last bytes do not come."""
    head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Length: {size + 50}\r\n"
    head += "Content-Type: multipart/form-data; boundary=a\r\n\r\n"
    part = b'--a\r\ncontent-disposition: form-data; name="file"; filename="f"\r\n\r\n'
    connection = socket.create_connection(("127.0.0.1", running.port), timeout=60)
    connection.sendall(head.encode() + part + b"x" * (size - len(part)))
    return connection


def test_uploads_under_way_are_bounded(start: Callable[..., Any]) -> None:
    running = start(PacedEngine("abc"), api_key=("alice", "bob", "carol"), files_max_mb=2, file_max_mb=1)
    batches, size = running.server.config.app.state.batches, (1 << 20) + service.FORM_OVERHEAD - 50
    with running.http() as client:

        def answer(key: str) -> httpx.Response:
            return send(client, {}, file=b"x", key=key)

        with contextlib.ExitStack() as stack:
            stack.enter_context(unfinished(running, "alice", size))
            wait_for(lambda: batches._uploaded == size)
            assert answer("alice").status_code == 429
            assert "unfinished uploads of one key may have 1 MB" in answer("alice").text
            assert answer("bob").status_code == 200
            beyond = (2 << 20) + service.FORM_OVERHEAD - size + 1
            other = stack.enter_context(unfinished(running, "bob", beyond))
            refused = other.recv(4096)
            assert refused.startswith(b"HTTP/1.1 503 ")
            assert b"retry-after: 30" in refused.lower()
            assert answer("carol").status_code == 200
        wait_for(lambda: not batches._uploads)  # who has gone counts no more
        assert (batches._uploaded, answer("alice").status_code) == (0, 200)
        with contextlib.ExitStack() as stack:
            for _ in range(service.UPLOADS_OF_A_KEY):
                stack.enter_context(unfinished(running, "alice", 1000))
            wait_for(lambda: batches._uploaded == 1000 * service.UPLOADS_OF_A_KEY)
            assert answer("alice").status_code == 429
            assert "8 uploads of one key" in answer("alice").text
            assert answer("bob").status_code == 200


def test_an_upload_is_a_request_of_its_key(start: Callable[..., Any]) -> None:
    running = start(PacedEngine("abc"), api_key=("alice", "bob"), requests_per_minute=1)
    with running.http() as client:
        codes = [send(client, {}, file=b"x", key=key).status_code for key in ("alice", "alice", "bob")]
    assert codes == [200, 429, 200]


# ---- forms -----------------------------------------------------------------------------------------------------------


def send(client: httpx.Client, more: Any = None, **form: Any) -> httpx.Response:
    files = {"file": ("in.jsonl", form.pop("file"))} if "file" in form else {"unnamed": b""}
    headers = {"authorization": f"Bearer {form.pop('key', 'none')}"}
    return client.post("/v1/files", data={"purpose": "batch"} | form | (more or {}), files=files, headers=headers)


def test_what_is_no_upload_is_refused_by_name(start: Callable[..., Any]) -> None:
    running = start(PacedEngine("abc"), file_max_mb=1)

    def refused(status: int, text: str, answer: httpx.Response) -> None:
        assert answer.status_code == status, answer.text
        assert text in answer.json()["error"]["message"]

    with running.http() as client:
        refused(400, "purpose must be batch", send(client, file=b"x", purpose="fine-tune"))
        refused(400, "'color' is not a field", send(client, file=b"x", color="red"))
        refused(400, "is not a field of this form", send(client))
        refused(400, "expires_after", send(client, file=b"x", more={"expires_after[seconds]": "5"}))
        refused(400, "anchor", send(client, file=b"x", more={"expires_after[anchor]": "never"}))
        refused(400, "The form cannot be read", client.post("/v1/files", content=b"x", headers={
            "content-type": "multipart/form-data; boundary=a"}))  # fmt: skip
        refused(400, "The form cannot be read", client.post("/v1/files", content=b"x", headers={
            "content-type": "multipart/form-data"}))  # fmt: skip
        refused(415, "must be a form", client.post("/v1/files", json={}))
        refused(413, "larger than 1 MB", send(client, file=b"x" * (2 << 20)))
        refused(400, "larger than 1 MB", send(client, file=b"x" * ((1 << 20) + 1)))
        refused(400, "order must be asc or desc", client.get("/v1/files?order=up"))
        refused(400, "limit must be", client.get("/v1/batches?limit=0"))
        refused(404, "was not found", client.get("/v1/batches?after=batch_x"))
        assert client.get("/v1/files").json()["data"] == []  # nothing of all that is left
        life = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
        kept = send(client, file=b"y" * 700_000, more=life).json()
        assert kept["expires_at"] - kept["created_at"] == 3600
        content = client.get(f"/v1/files/{kept['id']}/content")
        assert (len(content.content), content.headers["x-content-type-options"]) == (700_000, "nosniff")


def test_a_form_without_a_length_is_cut_off(start: Callable[..., Any]) -> None:
    running = start(PacedEngine("abc"), file_max_mb=1)

    def body() -> Any:
        yield b'--a\r\ncontent-disposition: form-data; name="file"; filename="f"\r\n\r\n'
        for _ in range(64):
            yield b"x" * 65536

    with running.http() as client:
        answer = client.post("/v1/files", content=body(), headers={"content-type": "multipart/form-data; boundary=a"})
    assert answer.status_code == 413


def test_the_oldest_files_make_room(start: Callable[..., Any]) -> None:
    client = start(PacedEngine("abc"), files_max_mb=2, file_max_mb=1).openai()
    ids = [client.files.create(file=(f"{n}", b"x" * 900_000), purpose="batch").id for n in range(3)]
    assert [each.id for each in client.files.list()] == ids[:0:-1]


def test_a_server_that_keeps_nothing_says_so(start: Callable[..., Any]) -> None:
    running = start(PacedEngine("abc"), responses_store="off")
    with running.http() as client:
        for path in ("/v1/files", "/v1/batches"):
            assert client.get(path).json()["error"]["code"] == "store_off"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("in.jsonl", "in.jsonl"),
        ("../../etc/passwd", "passwd"),
        ("C:\\files\\in.jsonl", "in.jsonl"),
        ("a\r\nset-cookie: x\0", "aset-cookie: x"),
        ("", "file.jsonl"),
        ("..", "file.jsonl"),
        ("n" * 500, "n" * 200),
    ],
)
def test_names_of_files(given: str, kept: str) -> None:
    assert safe_name(given) == kept
