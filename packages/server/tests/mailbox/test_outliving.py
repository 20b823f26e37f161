# SPDX-License-Identifier: MIT
"""Answers that outlive their clients, over HTTP: kept, pushed, fetched, and plain requests end as before."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from candle_vllm.server import Settings
from candle_vllm.server.mailbox.options import MailboxOptions, WebhookOptions
from candle_vllm.server.mailbox.policy import DeliveryPolicy, Mode
from candle_vllm.server.mailbox.service import Mailbox
from candle_vllm.server.outliving import MailboxWriter, OutlivingAnswer, StoredForm, Wish
from candle_vllm.server.serve import bind
from candle_vllm.server.settings import Address
from packages.server.tests import running_server
from packages.server.tests.running_server import Running
from packages.server.tests.server_fakes import PacedEngine

BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
KEPT = {"x-mailbox-mode": "on_disconnect"}
ALWAYS = {"x-mailbox-mode": "always"}


@contextmanager
def _server(
    tmp_path: Path,
    engine: PacedEngine | None = None,
    webhook: WebhookOptions | None = None,
    shutdown_timeout: int = 1,
    **settings: Any,
) -> Iterator[Running]:
    url = f"sqlite:///{tmp_path / 'mailbox.sqlite'}"
    mailbox = Mailbox(MailboxOptions(url=url, webhook=webhook or WebhookOptions()))
    running = Running(
        engine or PacedEngine(["a"] * 20, pause=0.02),
        Settings(port=0, shutdown_timeout=shutdown_timeout, **settings),
        mailbox=mailbox,
    )
    try:
        yield running
    finally:
        running.stop()


def _leave_early(client: httpx.Client, body: dict[str, Any], headers: dict[str, str]) -> None:
    with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
        assert response.status_code == 200
        next(response.iter_bytes())


def _record(client: httpx.Client, request_id: str, seconds: float = 60.0) -> dict[str, Any]:
    end = time.monotonic() + seconds
    while True:
        response = client.get(f"/v1/mailbox/{request_id}")
        if response.status_code == 200 and response.json()["status"] != "streaming":
            return response.json()
        assert time.monotonic() < end, response.text
        time.sleep(0.02)


def test_the_answer_of_a_client_that_left_can_be_fetched(tmp_path: Path) -> None:
    with _server(tmp_path) as running, running.http() as client:
        _leave_early(client, {**BODY, "request_id": "mine"}, KEPT)
        seen = client.get("/v1/mailbox/chatcmpl-mine")
        assert seen.status_code in (200, 404)
        record = _record(client, "chatcmpl-mine")
        assert record["status"] == "completed"
        assert record["response"]["choices"][0]["message"]["content"] == "a" * 20
        assert record["response"]["usage"]["completion_tokens"] == 21
        assert running.engine.aborted == []
        assert client.get("/v1/mailbox/chatcmpl-mine?auto_delete=true").status_code == 200
        assert client.get("/v1/mailbox/chatcmpl-mine").status_code == 404


def test_a_client_that_left_before_its_whole_answer(tmp_path: Path) -> None:
    with _server(tmp_path) as running, running.http() as client:
        body = {**BODY, "stream": False, "request_id": "w"}
        running.leave("/v1/chat/completions", body, lambda: running.engine.stats().generation_tokens, KEPT)
        assert _record(client, "chatcmpl-w")["response"]["choices"][0]["message"]["content"] == "a" * 20


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_left_while_its_request_waited(tmp_path: Path, stream: bool) -> None:
    with _server(tmp_path) as running, running.http() as client:
        app: Any = running.server.config.app
        (slot,) = app.state.manager.slots.values()
        slot.model.admission._capacity = 1
        with client.stream("POST", "/v1/chat/completions", json=BODY) as first:
            chunks = first.iter_bytes()
            next(chunks)
            body = {**BODY, "stream": stream, "request_id": "late"}
            running.leave("/v1/chat/completions", body, lambda: slot.model.admission.waiting, KEPT)
            assert b"[DONE]" in b"".join(chunks)
        record = _record(client, "chatcmpl-late", 10)
        assert record["response"]["choices"][0]["message"]["content"] == "a" * 20


def test_a_plain_request_ends_with_its_client(tmp_path: Path) -> None:
    with _server(tmp_path) as running, running.http() as client:
        _leave_early(client, BODY, {})
        running.wait_for(lambda: running.engine.aborted)
        assert client.get("/v1/mailbox").json()["data"] == []


def test_an_answer_that_was_read_is_not_kept_unless_always(tmp_path: Path) -> None:
    with _server(tmp_path, PacedEngine("Hello")) as running, running.http() as client:
        for stream in (True, False):
            client.post("/v1/chat/completions", json={**BODY, "stream": stream}, headers=KEPT).raise_for_status()
        assert client.get("/v1/mailbox").json()["data"] == []
        client.post("/v1/chat/completions", json={**BODY, "request_id": "k"}, headers=ALWAYS).raise_for_status()
        body = {"prompt": "x", "request_id": "c"}
        client.post("/v1/completions", json=body, headers=ALWAYS).raise_for_status()
        assert _record(client, "chatcmpl-k")["response"]["object"] == "chat.completion"
        assert _record(client, "cmpl-c")["response"]["object"] == "text_completion"


@pytest.mark.parametrize("forced", [False, True])
def test_what_the_client_reads_does_not_change(tmp_path: Path, forced: bool) -> None:
    made = _server(tmp_path, PacedEngine("Hello"), enable_force_include_usage=forced)
    with made as running, running.http() as client:
        for body in (BODY, {**BODY, "stream_options": {"include_usage": True}}, {**BODY, "stream": False}):
            fields = {**body, "request_id": "same"}
            plain = client.post("/v1/chat/completions", json=fields)
            kept = client.post("/v1/chat/completions", json=fields, headers=ALWAYS)
            assert _settled(kept) == _settled(plain)


def _settled(response: httpx.Response) -> list[dict[str, Any]]:
    """What was sent, without the times; chunks that came together count as one text."""
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith(("data: {", "{"))]
    found = []
    for line in lines:
        value = httpx.Response(200, text=line).json()
        value.pop("created")
        for name in ("prompt_time_costs", "completion_time_costs"):
            (value.get("usage") or {}).pop(name, None)
        found.append(value)
    return found


def test_the_place_is_held_until_the_answer_is_complete(tmp_path: Path) -> None:
    with _server(tmp_path) as running, running.http() as client:
        _leave_early(client, {**BODY, "request_id": "p"}, KEPT)
        assert client.get("/v1/models/status").json()["in_flight_requests"] == 1
        _record(client, "chatcmpl-p")
        assert client.get("/v1/models/status").json()["in_flight_requests"] == 0


def test_an_answer_that_fails_is_kept_as_its_error(tmp_path: Path) -> None:
    engine = PacedEngine(["a"] * 20, pause=0.02, fail_after=5)
    with _server(tmp_path, engine) as running, running.http() as client:
        _leave_early(client, {**BODY, "request_id": "f"}, KEPT)
        record = _record(client, "chatcmpl-f")
        assert record["status"] == "model_error"
        assert "error" in record["response"]


def test_an_answer_has_a_deadline_without_its_client_too(tmp_path: Path) -> None:
    engine = PacedEngine(["a"] * 500, pause=0.02)
    with _server(tmp_path, engine, request_timeout=1) as running, running.http() as client:
        _leave_early(client, {**BODY, "request_id": "d"}, KEPT)
        assert _record(client, "chatcmpl-d")["status"] != "completed"
        assert len(running.engine.aborted) == 1


def test_headers_are_refused_where_nothing_is_kept(tmp_path: Path, start) -> None:
    with start().http() as client:
        refused = client.post("/v1/chat/completions", json=BODY, headers=KEPT)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "X-Mailbox-Mode")
    with _server(tmp_path) as running, running.http() as client:
        ask = {"model": "scripted", "max_tokens": 5, "messages": BODY["messages"]}
        assert client.post("/v1/messages", json=ask, headers=KEPT).status_code == 400
        compact = client.post("/v1/responses/compact", json={"model": "scripted", "input": "Hi"}, headers=KEPT)
        assert (compact.status_code, compact.json()["error"]["param"]) == (400, "X-Mailbox-Mode")
        vectors = client.post("/v1/embeddings", json={"input": "Hi"}, headers=KEPT)
        assert "answers of this route are not stored" in vectors.json()["error"]["message"]
        url = f"ws://127.0.0.1:{running.port}/v1/responses"
        with pytest.raises(InvalidStatus) as caught, connect(url, additional_headers=KEPT, proxy=None):
            pass
        assert caught.value.response.status_code == 400
        assert b"X-Mailbox-Mode" in (caught.value.response.body or b"")
        wrong = client.post("/v1/chat/completions", json=BODY, headers={"x-mailbox-mode": "sometimes"})
        assert wrong.json()["error"]["param"] == "X-Mailbox-Mode"


def test_a_server_that_stops_leaves_word(tmp_path: Path) -> None:
    with _server(tmp_path, PacedEngine(["a"] * 5000, pause=0.02)) as running, running.http() as client:
        _leave_early(client, {**BODY, "request_id": "s"}, KEPT)
        time.sleep(0.1)
    with _server(tmp_path) as running, running.http() as client:
        assert _record(client, "chatcmpl-s")["status"] != "completed"


def test_a_server_that_stops_completes_what_is_kept(tmp_path: Path) -> None:
    engine = PacedEngine(["a"] * 30, pause=0.03)
    with _server(tmp_path, engine, shutdown_timeout=20) as running, running.http() as client:
        _leave_early(client, {**BODY, "request_id": "s"}, KEPT)
        time.sleep(0.1)
    with _server(tmp_path) as running, running.http() as client:
        record = client.get("/v1/mailbox/chatcmpl-s").json()
        assert record["status"] == "completed"
        assert record["response"]["choices"][0]["message"]["content"] == "a" * 30


def test_a_second_signal_does_not_wait_for_what_is_kept(tmp_path: Path) -> None:
    engine = PacedEngine(["a"] * 5000, pause=0.02)
    with _server(tmp_path, engine, shutdown_timeout=60) as running, running.http() as client:
        _leave_early(client, {**BODY, "request_id": "s"}, KEPT)
        running.wait_for(lambda: client.get("/v1/mailbox/chatcmpl-s").status_code == 200)
        running.server.handle_exit(15, None)
        time.sleep(0.5)
        assert running.engine.aborted == []
        running.server.handle_exit(15, None)
        running.wait_for(lambda: running.engine.aborted)
    with _server(tmp_path) as running, running.http() as client:
        assert _record(client, "chatcmpl-s")["status"] == "internal_error"


def test_the_answer_of_a_slow_client_that_left_after_its_generation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the system's own buffers have taken counts as handed over, so they are made small here."""

    def bind_small(address: Address) -> socket.socket:
        listener = bind(address)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 << 10)
        return listener

    monkeypatch.setattr(running_server, "bind", bind_small)
    engine = PacedEngine(["x" * 5000] * 80, max_model_len=1 << 20)
    with _server(tmp_path, engine) as running, running.http() as client, socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", running.port))
        data = json.dumps({**BODY, "request_id": "slow"}).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"X-Mailbox-Mode: on_disconnect\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        slow.sendall(head.encode() + data)
        assert slow.recv(2000).startswith(b"HTTP/1.1 200")
        running.wait_for(lambda: engine.stats().num_running == 0)
        time.sleep(0.1)
        assert client.get("/v1/mailbox").json()["data"] == []
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        slow.close()
        assert _record(client, "chatcmpl-slow")["response"]["choices"][0]["message"]["content"] == "x" * 400_000


def test_pushes_are_counted(tmp_path: Path, receiver) -> None:
    receiver.statuses = [200, 404]
    webhook = WebhookOptions(url=receiver.url, on_complete=True)
    with _server(tmp_path, PacedEngine("Hello"), webhook) as running, running.http() as client:
        for _ in range(2):
            client.post("/v1/chat/completions", json=BODY, headers=ALWAYS).raise_for_status()
        for outcome in ("ok", "failed"):
            line = f'candle_vllm:webhook_deliveries_total{{outcome="{outcome}"}} 1.0'
            running.wait_for(lambda line=line: line in client.get("/metrics").text)


# ---- one answer alone ------------------------------------------------------------------------------------------------


class Notes:
    """A mailbox that notes what it is given."""

    def __init__(self) -> None:
        self.kept: list[bool] = []
        self.begun = 0

    async def begin(self, *_: Any) -> None:
        self.begun += 1

    async def keep(self, *_: Any, disconnected: bool) -> bool:
        self.kept.append(disconnected)
        return True


def _answer(
    notes: Any, mode: Mode = Mode.ON_DISCONNECT, seconds: float = 5.0, webhook: Mode = Mode.NEVER
) -> OutlivingAnswer:
    wish = Wish(DeliveryPolicy(mode, webhook), "", "1")
    form = StoredForm("chatcmpl-", lambda chunks: {"all": "".join(chunks)})
    return OutlivingAnswer(notes, wish, form, "m", time.monotonic() + seconds)


async def test_who_begins_to_read_at_the_end_reads_everything() -> None:
    answer = _answer(Notes())
    for chunk in "abc":
        await answer.take(chunk)
    finishing = asyncio.create_task(answer.finish(RuntimeError("no")))
    await asyncio.sleep(0)
    assert [await anext(answer) for _ in range(3)] == ["a", "b", "c"]
    with pytest.raises(RuntimeError, match="no"):
        await anext(answer)
    answer.delivered()
    assert await finishing is None


@pytest.mark.parametrize(("mode", "seconds"), [(Mode.ON_DISCONNECT, 0.2), (Mode.ALWAYS, 30.0)])
async def test_a_client_is_waited_for_to_the_deadline_and_only_where_it_matters(mode: Mode, seconds: float) -> None:
    notes = Notes()
    answer = _answer(notes, mode, seconds)
    begin = time.monotonic()
    await answer.finish(RuntimeError("no"))
    took = time.monotonic() - begin
    assert took >= 0.15 if mode is Mode.ON_DISCONNECT else took < 20
    assert notes.kept == [True]


async def test_the_end_of_the_server_waits_for_no_client() -> None:
    async def chunks() -> AsyncIterator[str]:
        yield "a"

    notes, metrics = Notes(), SimpleNamespace(count=lambda *_: None)
    entry, form = SimpleNamespace(names=["m"]), StoredForm("chatcmpl-", lambda chunks: cast("Any", "".join(chunks)))
    turn = SimpleNamespace(model=SimpleNamespace(entry=entry), release=lambda: None)
    writer = MailboxWriter(cast("Any", notes), cast("Any", metrics))
    wish = Wish(DeliveryPolicy(Mode.ON_DISCONNECT, Mode.NEVER), "", "1")
    answer = writer.keep(wish, chunks(), form, cast("Any", turn), time.monotonic() + 600)
    assert await answer._whole() == "a"
    await asyncio.wait_for(writer.close(), 60)
    assert (notes.kept, writer.busy) == ([True], False)


@pytest.mark.parametrize("mode", [Mode.ON_DISCONNECT, Mode.ALWAYS])
async def test_only_what_is_certain_to_be_stored_is_listed(mode: Mode) -> None:
    notes = Notes()
    answer = _answer(notes, mode, webhook=Mode.ALWAYS)
    for _ in range(5):
        await asyncio.sleep(0)
    assert notes.begun == (mode is Mode.ALWAYS)
    await answer.aclose()
    await answer.finish(None)


@pytest.mark.parametrize("leaves", [True, False])
async def test_a_whole_answer_is_delivered_when_its_last_byte_was_taken(leaves: bool) -> None:
    notes, gone = Notes(), asyncio.Event()
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)
        if leaves and message.get("more_body"):
            gone.set()
            await asyncio.sleep(0.01)

    answer = _answer(notes)
    await answer.take("a")
    finishing = asyncio.create_task(answer.finish(None))
    response = await answer.response()
    assert not finishing.done()
    await response({"type": "http"}, receive, send)
    assert b"".join(message.get("body", b"") for message in sent) == b'{"all":"a"}'
    assert [message.get("more_body") for message in sent] == [None, True, False]
    await finishing
    assert notes.kept == [leaves]
