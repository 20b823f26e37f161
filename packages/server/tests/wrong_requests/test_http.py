# SPDX-License-Identifier: MIT
"""What is wrong below the fields: content types, JSON, methods, sizes and lengths, on every route that takes a body."""

from __future__ import annotations

import gzip
import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from packages.server.tests.server_fakes import PacedEngine
from packages.server.tests.wrong_requests import generating, others
from tests.waiting import PATIENCE

BODIES = {route.path: json.dumps(route.right).encode() for route in (*generating.ROUTES, *others.ROUTES)}
JSON = {"content-type": "application/json"}


@pytest.fixture
def client(start: Callable[..., Any]) -> Iterator[httpx.Client]:
    engine = PacedEngine(tasks=("generate", "embed", "score", "classify"))
    with start(engine, max_body_mb=1).http() as client:
        yield client


def inside(body: bytes, more: bytes) -> bytes:
    """The right body with one more field."""
    return body[:-1] + b", " + more + b"}"


# What is done to a right body, and what the message must say.
BROKEN: list[tuple[str, Callable[[bytes], bytes], str]] = [
    ("empty", lambda _: b"", "not valid JSON"),
    ("blank", lambda _: b" \n", "not valid JSON"),
    ("cut", lambda body: body[:-1], "not valid JSON"),
    ("two values", lambda body: body + body, "not valid JSON"),
    ("comma at the end", lambda body: body[:-1] + b",}", "not valid JSON"),
    ("comment", lambda body: body + b" // x", "not valid JSON"),
    ("single quotes", lambda body: body.replace(b'"', b"'"), "not valid JSON"),
    ("name without quotes", lambda body: inside(body, b"user: 1"), "not valid JSON"),
    ("leading zero", lambda body: inside(body, b'"user": 01'), "not valid JSON"),
    ("plus sign", lambda body: inside(body, b'"user": +1'), "not valid JSON"),
    ("control character", lambda body: inside(body, b'"user": "a\nb"'), "not valid JSON"),
    ("NUL", lambda body: body + b"\0", "not valid JSON"),
    ("array", lambda body: b"[" + body + b"]", "one JSON object"),
    ("text", lambda _: b'"x"', "one JSON object"),
    ("null", lambda _: b"null", "one JSON object"),
    ("number", lambda _: b"1", "one JSON object"),
    ("name twice", lambda body: inside(body, b'"user": "a", "user": "a"'), "appears twice"),
    ("name twice inside", lambda body: inside(body, b'"metadata": {"a": "b", "a": "b"}'), "appears twice"),
    ("NaN", lambda body: inside(body, b'"user": NaN'), "not a JSON number"),
    ("Infinity", lambda body: inside(body, b'"user": Infinity'), "not a JSON number"),
    ("-Infinity", lambda body: inside(body, b'"user": -Infinity'), "not a JSON number"),
    ("digits", lambda body: inside(body, b'"user": ' + b"1" * 5000), "thousands of digits"),
    ("deep array", lambda body: inside(body, b'"user": ' + b"[" * 65 + b"]" * 65), "nested too deeply"),
    ("very deep array", lambda body: inside(body, b'"user": ' + b"[" * 100_000), "more than|nested too deeply"),
    ("deep object", lambda body: inside(body, b'"user": ' + b'{"a":' * 65 + b"1" + b"}" * 65), "nested too deeply"),
    ("half a surrogate pair", lambda body: inside(body, rb'"user": "\ud800"'), "surrogate"),
    ("latin-1", lambda body: inside(body, b'"user": "\xe9"'), "not valid UTF-8"),
    ("cut character", lambda body: inside(body, b'"user": "\xe2\x82"'), "not valid UTF-8"),
    ("overlong", lambda body: inside(body, b'"user": "\xc0\xaf"'), "not valid UTF-8"),
    ("byte order mark", lambda body: b"\xef\xbb\xbf" + body, "not valid JSON"),
    ("UTF-16", lambda body: body.decode().encode("utf-16"), "not valid UTF-8"),
    ("UTF-16 without a mark", lambda body: body.decode().encode("utf-16-le"), "not valid JSON"),
    ("compressed", gzip.compress, "not valid UTF-8"),
]


@pytest.mark.one_of_each(8)
@pytest.mark.parametrize("path", BODIES)
def test_broken_bodies(client: httpx.Client, path: str) -> None:
    for name, breaks, said in BROKEN:
        answer = client.post(path, content=breaks(BODIES[path]), headers=JSON)
        assert answer.status_code == 400, name
        error = answer.json()["error"]
        assert (error["code"], error["type"], error["param"]) == ("invalid_body", "invalid_request_error", None), name
        assert any(part in error["message"] for part in said.split("|")), (name, error["message"])
        assert len(error["message"]) < 300


TYPES: list[str | None] = [
    None, "", "text/plain", "text/json", "application/jsonx", "application/x-www-form-urlencoded", "application/xml",
    "multipart/form-data; boundary=x", "application/octet-stream", "json", "*/*", "application",
]  # fmt: skip


UNTYPED = ("/completion", "/completions", "/infill", "/tokenize", "/detokenize", "/apply-template", "/embedding")


@pytest.mark.one_of_each(16)
@pytest.mark.parametrize("path", [path for path in BODIES if path not in UNTYPED])
def test_other_content_types(client: httpx.Client, path: str) -> None:
    for kind in TYPES:
        headers = {} if kind is None else {"content-type": kind}
        answer = client.post(path, content=BODIES[path], headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type"), kind
    for kind in ("application/json; charset=utf-8", "Application/JSON"):
        assert client.post(path, content=BODIES[path], headers={"content-type": kind}).status_code in (200, 409)


@pytest.mark.parametrize("path", BODIES)
def test_too_large(client: httpx.Client, path: str) -> None:
    body = BODIES[path].ljust((1 << 20) + 1)
    answer = client.post(path, content=body, headers=JSON)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    answer = client.post(path, content=iter([body[: 1 << 19], body[1 << 19 :]]), headers=JSON)  # without a length
    assert answer.status_code == 413
    assert client.post(path, content=body[:-1], headers=JSON).status_code in (200, 409)  # white space


@pytest.mark.parametrize("path", BODIES)
def test_other_methods(client: httpx.Client, path: str) -> None:
    for method in ("GET", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "PROPFIND"):
        answer = client.request(method, path)
        if method in ("GET", "HEAD") and path.startswith("/v1/models/"):
            assert answer.status_code == 404  # there is none of that name
            assert method == "HEAD" or answer.json()["error"]["param"] == "model"
            continue
        assert answer.status_code == 405, method
        assert "POST" in answer.headers["allow"]
        assert method == "HEAD" or answer.json()["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    "path",
    ["/v1/chat/completion", "/chat/completion", "/v1/chat/completions/", "//tokenize", "/v1//score", "/v1/%00", "/%"],
)
def test_other_paths(client: httpx.Client, path: str) -> None:
    answer = client.post(path, json={})
    assert answer.status_code in (404, 405)
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_numbers_that_are_infinite(client: httpx.Client) -> None:
    for number in ("1e999", "-1e999"):
        body = inside(BODIES["/v1/completions"], f'"temperature": {number}'.encode())
        answer = client.post("/v1/completions", content=body, headers=JSON)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "temperature")


HEAD = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
RAW = [
    HEAD + b"Content-Length: abc\r\n\r\n{}",
    HEAD + b"Content-Length: -1\r\n\r\n{}",
    HEAD + b"Content-Length: +2\r\n\r\n{}",
    HEAD + b"Content-Length: 2, 3\r\n\r\n{}",
    HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    HEAD + b"Content-Length: 99999999999999999999999999\r\n\r\n{}",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    HEAD + b"Transfer-Encoding: gzip\r\n\r\n{}",
    b"POST /tokenize\r\n\r\n",
    b"POST /tokenize HTTP/9.9\r\n\r\n",
    b"P\x00ST /tokenize HTTP/1.1\r\nHost: x\r\n\r\n",
    HEAD + b"Bad Header: x\r\n\r\n",
    HEAD + b"X: a\x00b\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
]


def exchange(port: int, sent: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_broken_http(start: Callable[..., Any]) -> None:
    running = start()
    for sent in RAW:
        answer = exchange(running.port, sent)
        assert answer.startswith(b"HTTP/1.1 4"), (sent[:200], answer[:200])
    with running.http() as client:
        assert client.post("/tokenize", json={"prompt": "a"}).status_code == 200


def test_a_body_that_ends_early_reaches_no_model(start: Callable[..., Any]) -> None:
    running = start()
    body = BODIES["/v1/completions"]
    head = HEAD.replace(b"/tokenize", b"/v1/completions") + f"Content-Length: {len(body) + 10}\r\n\r\n".encode()
    assert b"200" not in exchange(running.port, head + body)[:20]
    with running.http() as client:
        assert client.get("/health").status_code == 200
    assert not running.engine.requests
