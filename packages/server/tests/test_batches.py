# SPDX-License-Identifier: MIT
"""Files and batches over HTTP: the official client's way, who owns what, ends before the end, and another server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import msgspec
import openai
import pytest

from candle_vllm.openai import fair_threads
from candle_vllm.openai.fair_threads import asker
from candle_vllm.responses.store import sql
from candle_vllm.responses.store.entries import Entry, EntryItem, NotStoredError, StoreFullError
from candle_vllm.server.batches import lines, records, run, service, store
from candle_vllm.server.batches.lines import PRIORITY, read_line
from candle_vllm.server.http.failures import store_refusal
from candle_vllm.server.routes.files import safe_name
from packages.server.tests.running_server import Running
from packages.server.tests.server_fakes import PacedEngine

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


async def test_files_of_a_purpose_are_found_in_few_looks() -> None:
    asked: list[int] = []

    class Pages:
        async def page(self, kind: str, owner: str, limit: int, after: str | None) -> list[Any]:
            asked.append(limit)
            first, about = int(after or 0), {"purpose": "batch", "filename": "f", "bytes": 1}
            last = min(first + limit, 4500)
            return [
                Entry(kind=kind, owner=owner, id=str(n + 1), created=1, status="", about=about)
                for n in range(first, last)
            ]

    files = store.BatchStore(store.FileOptions("memory"))
    files._backend = cast("Any", Pages())
    assert await files.files("", 1, None, "vision") == []
    assert len(asked) == 5
    assert len(await files.files("", 2, None, None)) == 2
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


def test_a_line_without_end_is_refused(start: Callable[..., Any]) -> None:
    running = start(PacedEngine("abc"), max_body_mb=1)
    client = running.openai()
    batch = ended(client, begin(client, line("a", prompt="x" * (3 << 19))))
    assert [error.code for error in batch.errors.data] == ["line_too_long"]


async def test_a_file_of_ends_of_lines_gives_others_their_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parts have nothing to wait for: all of them would be one turn of the event loop."""
    parts, turns, over = 16, 0, False

    class Parts:
        async def contents(self, owner: str, file_id: str) -> AsyncGenerator[Any]:
            del owner, file_id
            for number in range(parts):
                yield SimpleNamespace(body=b"\n" * 1000 + b"%d\n" % number)

    async def others() -> None:
        nonlocal turns
        while not over:
            turns += 1
            await asyncio.sleep(0)

    async def found() -> str:
        return "file"

    held: Any = SimpleNamespace(owner="", id="batch")
    reader = run.BatchRun(cast("store.BatchStore", Parts()), held, 1 << 20, 1.0)
    monkeypatch.setattr(reader, "_input", found)
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


def test_an_input_that_is_gone_ends_its_batch(start: Callable[..., Any]) -> None:
    engine = PacedEngine("abc", pause=0.05)
    engine._info = msgspec.structs.replace(engine.model_info, max_num_seqs=2)
    client = start(engine).openai()
    batch = begin(client, *(line(str(n), prompt="x" * 9000) for n in range(300)))
    wait_for(lambda: client.batches.retrieve(batch.id).status == "in_progress")
    client.files.delete(batch.input_file_id)
    batch = ended(client, batch)
    assert [error.code for error in batch.errors.data] == ["input_file_gone"]


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


def test_one_key_has_half_of_the_store(start: Callable[..., Any]) -> None:
    engine = PacedEngine("abc", pause=0.05)
    engine._info = msgspec.structs.replace(engine.model_info, max_num_seqs=2)
    running = start(engine, api_key=("alice", "bob"), files_max_mb=2, file_max_mb=2)
    alice, bob = running.openai("alice"), running.openai("bob")

    def keep(client: openai.OpenAI, size: int) -> str:
        return client.files.create(file=("f", b"x" * size), purpose="batch").id

    theirs = keep(bob, 900_000)
    assert [keep(alice, 600_000) for _ in range(2)][1:] == [file.id for file in alice.files.list()]  # its own went
    with pytest.raises(openai.APIStatusError, match="larger than 1 MB") as refused:
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
            assert "of one key that are under way may have 1 MB" in answer("alice").text
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
        refused(400, "order must be desc", client.get("/v1/files?order=asc"))
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
