# SPDX-License-Identifier: MIT
"""Files and batches over HTTP: the official client's way, who owns what, ends before the end, and another server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest

from candle_vllm.server.batches import run, service
from candle_vllm.server.batches.lines import PRIORITY
from candle_vllm.server.routes.files import safe_name
from packages.server.tests.running_server import Running
from packages.server.tests.server_fakes import PacedEngine

wait_for = Running.wait_for
URL = "/v1/completions"


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(run, "FLUSH_SECONDS", 0.01)


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


def test_the_official_client_has_a_file_answered(start: Callable[..., Any]) -> None:
    running = start(PacedEngine("abc"))
    client = running.openai()
    batch = begin(client, *(line(str(n)) for n in range(20)), "", line("wrong", max_tokens=-1), metadata={"a": "b"})
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
    monkeypatch.setattr(service, "COMPLETION_SECONDS", 0)
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


# ---- forms -----------------------------------------------------------------------------------------------------------


def send(client: httpx.Client, more: Any = None, **form: Any) -> httpx.Response:
    files = {"file": ("in.jsonl", form.pop("file"))} if "file" in form else {"unnamed": b""}
    return client.post("/v1/files", data={"purpose": "batch"} | form | (more or {}), files=files)


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
