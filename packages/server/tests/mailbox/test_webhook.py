# SPDX-License-Identifier: MIT
"""One push: what is sent, signed and checked, and how the receiver's behaviour is taken."""

from __future__ import annotations

import asyncio
import hmac
import json
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from candle_vllm.core.targets import allowed_target, parse_target
from candle_vllm.server.mailbox.options import WebhookAuth, WebhookOptions, sign
from candle_vllm.server.mailbox.store import Record, Status
from candle_vllm.server.mailbox.webhook import Message, Outcome, Sender

RECORD = Record(
    request_id="chatcmpl-1", model="m", created=1, status=Status.COMPLETED, response=msgspec.Raw(b'{"id":"chatcmpl-1"}')
)
DOCS = Path(__file__).parents[4] / "docs" / "mailbox.md"


@pytest_asyncio.fixture
async def sender() -> AsyncIterator[Any]:
    made: list[Sender] = []

    def sender(tls: ssl.SSLContext | None = None, clock: Any = time.time, **options: Any) -> Sender:
        made.append(Sender(WebhookOptions(**{"timeout_secs": 5.0, **options}), clock, tls))
        return made[-1]

    yield sender
    for each in made:
        await each.close()


def _own(receiver: Any) -> Message:
    return Message(RECORD, "d1", parse_target(receiver.url))


def _clients(receiver: Any, url: str | None = None, **fields: Any) -> Message:
    return Message(RECORD, "d1", allowed_target(url or receiver.url, (receiver.host,), True), **fields)


async def test_what_arrives(sender, receiver, clock) -> None:
    attempt = await sender(clock=clock).send(_clients(receiver, bearer="tok", headers={"x-request-id": "r"}))
    assert attempt.outcome is Outcome.DELIVERED
    (received,) = receiver.received
    assert json.loads(received.body) == {
        "request_id": "chatcmpl-1", "model": "m", "created": 1, "status": "completed", "response": {"id": "chatcmpl-1"},
    }  # fmt: skip
    assert received.path == "/hook"
    headers = {name: received.headers.get(name) for name in ("host", "authorization", "x-request-id", "content-type")}
    assert headers == {
        "host": receiver.host, "authorization": "Bearer tok", "x-request-id": "r", "content-type": "application/json",
    }  # fmt: skip
    assert (received.headers["idempotency-key"], received.headers["x-webhook-timestamp"]) == ("d1", "1700000000")


async def test_the_operators_header_is_sent_once(sender, receiver) -> None:
    message = Message(RECORD, "d1", parse_target(receiver.url), headers={"x-request-id": "client", "x-trace": "t"})
    sent = sender(headers={"X-Request-Id": "operator"})._headers(message, b"")
    assert [(name, value) for name, value in sent.items() if name.lower() in ("x-request-id", "x-trace")] == [
        ("x-trace", "t"), ("X-Request-Id", "operator"),
    ]  # fmt: skip


STATUSES = [(200, "DELIVERED"), (204, "DELIVERED"), (299, "DELIVERED"), (301, "REFUSED"), (302, "REFUSED"),
            (307, "REFUSED"), (400, "REFUSED"), (401, "REFUSED"), (404, "REFUSED"), (410, "REFUSED"),
            (408, "FAILED"), (425, "FAILED"), (429, "FAILED"), (500, "FAILED"), (503, "FAILED")]  # fmt: skip


async def test_statuses(sender, receiver) -> None:
    receiver.headers = {"location": receiver.url}
    receiver.answer = b""
    receiver.statuses = [status for status, _ in STATUSES]
    ends = [(await sender().send(_clients(receiver))).outcome.name for _ in STATUSES]
    assert ends == [name for _, name in STATUSES]
    assert len(receiver.received) == len(STATUSES), "redirects are not followed"


async def test_the_environments_proxy_is_not_asked(sender, receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert (await sender().send(_own(receiver))).outcome is Outcome.DELIVERED


async def test_a_receiver_that_is_not_there(sender, receiver) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    attempt = await sender().send(Message(RECORD, "d1", parse_target(f"http://127.0.0.1:{port}/")))
    assert (attempt.outcome, attempt.detail) == (Outcome.FAILED, "the webhook could not be reached (ConnectError)")


async def test_a_slow_receiver_has_the_whole_time_and_no_more(sender, receiver) -> None:
    receiver.pause = 30.0
    attempt = await sender(timeout_secs=0.2).send(_own(receiver))
    assert attempt.outcome is Outcome.FAILED


async def test_an_endless_answer_is_not_read(sender, receiver) -> None:
    receiver.answer = b"x" * (32 << 20)
    begin = time.monotonic()
    assert (await sender().send(_own(receiver))).outcome is Outcome.DELIVERED
    assert time.monotonic() - begin < 30


async def test_a_trickling_answer_is_cut_off(sender) -> None:
    """Each piece comes in time, the whole does not."""
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def trickle() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 10000\r\n\r\n")
                while not stop.wait(0.05):
                    try:
                        connection.sendall(b"x")
                    except OSError:
                        return

        thread = threading.Thread(target=trickle)
        thread.start()
        target = parse_target(f"http://127.0.0.1:{server.getsockname()[1]}/")
        attempt = await sender(timeout_secs=0.3).send(Message(RECORD, "d1", target))
        stop.set()
        thread.join()
    assert attempt.outcome is Outcome.FAILED


async def test_an_answer_that_is_not_http(sender) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"SSH-2.0-x\r\n" + b"y" * 200_000)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        target = parse_target(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/")
        assert (await sender().send(Message(RECORD, "d1", target))).outcome is Outcome.FAILED


async def test_the_name_is_resolved_once_and_the_checked_address_used(sender, receiver, monkeypatch) -> None:
    """DNS rebinding: a second answer of the resolver would lead elsewhere."""
    asked: list[str] = []
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, **options: Any) -> Any:
        if host != "rebind.example":
            return real(host, port, **options)
        asked.append(host)
        address = "127.0.0.1" if len(asked) == 1 else "169.254.169.254"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    pattern = f"rebind.example:{receiver.port}"
    message = Message(RECORD, "d1", allowed_target(f"http://{pattern}/hook", (pattern,), True))
    assert (await sender().send(message)).outcome is Outcome.DELIVERED
    assert asked == ["rebind.example"]
    assert receiver.received[0].headers["host"] == pattern
    assert (await sender().send(message)).outcome is Outcome.FORBIDDEN
    assert len(receiver.received) == 1


async def test_the_next_address_is_tried_where_nobody_listens(sender, receiver, monkeypatch) -> None:
    def getaddrinfo(host: Any, port: Any, **_: Any) -> Any:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in ("127.0.0.9", "127.0.0.1")]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    receiver.statuses = [500]
    message = Message(RECORD, "d1", parse_target(f"http://hooks.example:{receiver.port}/"))
    assert (await sender().send(message)).detail == "the webhook answered 500"
    assert len(receiver.received) == 1


async def test_loopback_is_forbidden_without_the_switch(sender, receiver) -> None:
    message = Message(RECORD, "d1", allowed_target(receiver.url, (receiver.host,), False))
    attempt = await sender().send(message)
    assert attempt.outcome is Outcome.FORBIDDEN
    assert receiver.received == []


async def test_kinds_of_auth(sender, receiver) -> None:
    await sender(auth=WebhookAuth("bearer", "tok"), headers={"X-Team": "core"}).send(_own(receiver))
    await sender(auth=WebhookAuth("api_key", "k")).send(_own(receiver))
    await sender(auth=WebhookAuth("api_key", "k", "X-Mine")).send(_own(receiver))
    await sender(auth=WebhookAuth("bearer", "tok"), signing_secret="s").send(_own(receiver))
    first, second, third, fourth = (each.headers for each in receiver.received)
    assert (first["authorization"], first["x-team"]) == ("Bearer tok", "core")
    assert (second["x-api-key"], third["x-mine"]) == ("k", "k")
    assert "authorization" not in second
    assert "x-signature-256" not in first
    assert fourth["authorization"] == "Bearer tok"
    assert fourth["x-signature-256"].startswith("sha256=")


async def test_clients_get_neither_keys_nor_signatures_of_the_operator(sender, receiver) -> None:
    options = {"auth": WebhookAuth("bearer", "tok"), "headers": {"X-Team": "core"}, "signing_secret": "s"}
    await sender(**options).send(_clients(receiver))
    (received,) = receiver.received
    assert not {"authorization", "x-team", "x-signature-256"} & set(received.headers)


def _documented_check() -> Any:
    """The function in docs/mailbox.md with which a receiver checks a signature."""
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text("utf-8"), re.DOTALL)
    (code,) = [block for block in blocks if "def is_genuine" in block]
    names: dict[str, Any] = {}
    exec(compile(code, str(DOCS), "exec"), names)
    return names["is_genuine"]


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
async def test_the_documented_check_takes_our_signature_and_no_other(sender, receiver, algorithm: Any) -> None:
    is_genuine = _documented_check()
    auth = WebhookAuth("hmac", "secret", algorithm=algorithm)
    await sender(auth=auth).send(_own(receiver))
    (received,) = receiver.received
    signature, timestamp = received.headers[auth.header_name.lower()], received.headers["x-webhook-timestamp"]
    assert is_genuine(b"secret", received.body, signature, timestamp)
    assert not is_genuine(b"other", received.body, signature, timestamp)
    assert not is_genuine(b"secret", received.body + b" ", signature, timestamp)
    assert not is_genuine(b"secret", received.body, signature, str(int(timestamp) + 1))
    assert not is_genuine(b"secret", received.body, signature[:-1] + "!", timestamp)
    assert not is_genuine(b"secret", received.body, "md5=" + "0" * 32, timestamp)
    old = str(int(time.time()) - 3600)
    assert not is_genuine(b"secret", received.body, sign(auth, old, received.body), old)
    assert not is_genuine(b"secret", received.body, signature, "soon")


def test_a_known_signature() -> None:
    """`printf '1700000000.{}' | openssl dgst -sha256 -hmac secret`"""
    expected = "sha256=b8569b78799ff9e3cbff0fc2d63a33a2b57f3282abd07c37ae5e8e7d79a5f163"
    assert sign(WebhookAuth("hmac", "secret"), "1700000000", b"{}") == expected


def test_a_signature_of_the_body_alone_does_not_depend_on_the_time() -> None:
    """`printf '{}' | openssl dgst -sha256 -hmac secret`: what candle-vllm's receivers check."""
    auth = WebhookAuth("hmac", "secret", signs="body")
    expected = "sha256=" + hmac.new(b"secret", b"{}", "sha256").hexdigest()
    assert {sign(auth, when, b"{}") for when in ("1700000000", "1")} == {expected}


def _certificate(folder: Path, name: str) -> tuple[Path, Path]:
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("openssl, which makes the certificate, is not installed")
    certificate, key = folder / "cert.pem", folder / "key.pem"
    command = [
        program, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
        "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}", "-keyout", str(key), "-out", str(certificate),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return certificate, key


async def test_tls_checks_the_name_though_the_address_is_connected_to(sender, tmp_path: Path, monkeypatch) -> None:
    certificate, key = _certificate(tmp_path, "hooks.example")
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(certificate, key)
    names: list[str | None] = []
    server_side.sni_callback = lambda _, name, __: names.append(name)
    trusting = ssl.create_default_context(cafile=str(certificate))
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, **options: Any) -> Any:
        return real("127.0.0.1" if str(host).endswith(".example") else host, port, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=server_side)
    async with server:
        port = server.sockets[0].getsockname()[1]
        patterns = (f"hooks.example:{port}", f"other.example:{port}")
        good, bad = (Message(RECORD, "d1", allowed_target(f"https://{each}/", patterns, True)) for each in patterns)
        assert (await sender(tls=trusting).send(good)).outcome is Outcome.DELIVERED
        assert (await sender(tls=trusting).send(bad)).outcome is Outcome.FAILED
        assert (await sender().send(good)).outcome is Outcome.FAILED, "the certificate is nobody's"
    assert names == ["hooks.example", "other.example", "hooks.example"]
