# SPDX-License-Identifier: MIT
"""Keys: nothing but /health and /ready answers without one, however a request is spelled; operators have their own."""

from __future__ import annotations

import hmac
import re
from itertools import product

import pytest
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from candle_vllm.core.testing import ScriptedEngine
from candle_vllm.server import Settings, create_app
from candle_vllm.server.app import OPERATIONS
from candle_vllm.server.openapi.operation import Access
from candle_vllm.server.settings import Settings as AllSettings
from tests.security.guarded_server import HEALTH, KEY, OPERATOR, Guarded, guarded, parse_answer

ACCESS = Access(OPERATIONS)  # which test_auth.py compares with a list
PUBLIC_PATHS = ACCESS.public
MANAGEMENT_PATHS = {path for path in ACCESS.managed if "{" not in path} - {"/lora-adapters"}  # clients may look there
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD")


def routes(server: Guarded) -> list[str]:
    """Every path that the application answers, found in its router and not in a list of ours."""
    found: set[str] = set()
    waiting = list(server.app.router.routes)
    while waiting:
        route = waiting.pop()
        inner = getattr(route, "original_router", None) or getattr(route, "app", None)
        if isinstance(route, Route):
            found.add(re.sub(r"\{.*?\}", "x", route.path))
        elif isinstance(route, WebSocketRoute):
            found.add(route.path)
        elif inner is not None:
            waiting += inner.routes
    return sorted(found)


# How a path can be spelled so that one reader takes it for /health and another for something else.
TARGETS = [
    "{path}", "http://x{path}", "http://x/health/..{path}", "http://health{path}", "https://x:1{path}?/health",
    "/{path}", "//health{path}", "/health{path}", "/health/..{path}", "/health/..;{path}", "/health;{path}",
    "/health/%2e%2e{path}", "/health%2f..{path}", "/health%2F%2E%2E{path}", "/health/%252e%252e{path}",
    "/./health/..{path}", "/%2e{path}", "{path}?/health", "{path}?x=/health", "{path}#/health", "{path};/health",
    "{path}/", "{path}/.", "{path}//", "{path}%00", "{path}%20", "{path}%0a", "{path}/../health/..{path}",
    "{path}/%2e%2e/health", "/health%00{path}", "/health%0d%0a{path}", "/health\\..{path}", "\\health{path}",
    "{path}\\..\\health", "{encoded}", "{upper}", "*", "health", "x:/health", "{path}.json", "/health.{path}",
]  # fmt: skip
MISLEADING = [
    "Host: /health", "Host: x/health", "Host: x/health?", "Host: health#", "Host: ", "Host: a\r\nHost: b/health",
    "Host: x\r\nX-Forwarded-Host: x/health", "Host: x\r\nX-Forwarded-Prefix: /health",
    "Host: x\r\nX-Forwarded-Path: /health", "Host: x\r\nX-Forwarded-Uri: /health", "Host: x\r\nX-Original-URL: /health",
    "Host: x\r\nX-Rewrite-URL: /health", "Host: x\r\nX-Forwarded-For: 127.0.0.1", "Host: x\r\nX-Real-IP: 127.0.0.1",
    "Host: x\r\nForwarded: for=127.0.0.1;host=x/health", "Host: x\r\nX-HTTP-Method-Override: OPTIONS",
    "Host: x\r\nX-Script-Name: /health", "Host: x\r\nOrigin: http://127.0.0.1", "Host: x\r\nReferer: http://x/health",
    "Host: x\r\nConnection: authorization", "Host: x\r\nUpgrade: websocket\r\nConnection: Upgrade",
]  # fmt: skip


def closed(data: bytes) -> bool:
    """Whether an answer gives nothing away: a refusal, no answer at all, or what /health says to everybody."""
    if not data:
        return True
    answer = parse_answer(data)
    return answer.status in (400, 401, 403) or (answer.status == 200 and answer.body in (HEALTH, b""))


def test_auth_bypass_by_path_and_host(locked: Guarded) -> None:
    """CVE-2026-48746: a key check whose path came from the Host header or the raw URL was walked round."""
    protected = "/v1/models"
    spelled = {
        "path": protected,
        "encoded": "".join(f"%{byte:02x}" for byte in protected.encode()),
        "upper": protected.upper(),
    }
    for target, version in product(TARGETS, ("1.1", "1.0")):
        line = f"GET {target.format(**spelled)} HTTP/{version}\r\nHost: x\r\nConnection: close\r\n\r\n"
        answer = locked.raw(line.encode("latin-1"))
        assert closed(answer), (target, version, answer)
        assert b"scripted" not in answer, (target, version)
    for headers, version in product(MISLEADING, ("1.1", "1.0")):
        line = f"GET {protected} HTTP/{version}\r\n{headers}\r\nConnection: close\r\n\r\n"
        answer = locked.raw(line.encode("latin-1"))
        assert closed(answer), (headers, version, answer)
        assert b"scripted" not in answer, (headers, version)
    answer = locked.raw(b"GET /v1/models\r\n\r\n")  # HTTP/0.9 has no headers, and so no key
    assert b"scripted" not in answer


def test_a_smuggled_second_request_needs_the_key_as_well(locked: Guarded) -> None:
    """CVE-2026-48746, by one connection: what stands behind a public request is a request of its own."""
    inner = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    framings = [
        b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" + inner,
        b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + inner,
        b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nContent-Length: 0\r\n\r\n" + inner,
        b"GET /health HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n\r\n" + inner,
        b"GET /health HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + KEY.encode() + b"\r\n\r\n" + inner,
    ]
    for framing in framings:
        answer = locked.raw(framing)
        assert b"scripted" not in answer, framing


def test_every_route_is_behind_the_key(locked: Guarded) -> None:
    """No auth at all, or for some routes alone (vLLM's outside of /v1): the routes come from the router itself."""
    paths = routes(locked)
    known = {"/v1/chat/completions", "/v1/messages", "/metrics", "/docs", "/openapi.json", "/tokenize", "/v1/usage"}
    assert known | MANAGEMENT_PATHS <= set(paths)
    with locked.http() as client:
        for path, method in product([*paths, "/redoc", "/nothing", "/static/x"], METHODS):
            if path not in PUBLIC_PATHS:
                assert client.request(method, path).status_code == 401, (method, path)
        assert client.get("/health").content == HEALTH
        assert client.get("/ready").content == b'{"status":"ready"}'


def test_unauthenticated_management(locked: Guarded) -> None:
    """Management routes that anybody, or any client's key, could use: they open with the operator's key alone."""
    with locked.http(KEY) as client, locked.http(OPERATOR) as operator:
        for path, method in product(sorted(MANAGEMENT_PATHS), METHODS):
            assert client.request(method, path).status_code == 401, (method, path)
        assert operator.get("/metrics").status_code == 200
        assert operator.get("/v1/models/status").status_code == 200
        assert operator.get("/v1/models").status_code == 401  # and it is no client's key
        spellings = ["/v1/models%2Fstatus", "/v1/models/%73tatus", "/v1/models/./status", "//v1/models/status"]
        spellings += ["/v1/models/status/", "/V1/models/status", "/v1/models/x/../status"]
        ends = ("%0a", "%0d%0a", "%0a%0a", "%0b", "%00", "%20", "%c2%85", "%e2%80%a8", "/", ";", "%3f", "%23")
        spellings += [path + end for path, end in product(sorted(MANAGEMENT_PATHS), ends)]
        for path, method in product(spellings, ("GET", "POST")):
            line = f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nConnection: close\r\n\r\n"
            assert parse_answer(locked.raw(line.encode())).status in (401, 404, 405), (method, path)


@pytest.mark.parametrize("root", ["/v", "/v1", "/v1/models", "/app", "/health", "/"])
@pytest.mark.parametrize("path", ["/v1/models/status", "/metrics", "/v1/models", "/health/metrics", "//metrics"])
def test_auth_bypass_by_root_path(root: str, path: str) -> None:
    """CVE-2026-48746, below a prefix: the key check and the router must take the same path from the same scope."""
    app = create_app(ScriptedEngine(), Settings(api_key=(KEY,), management_key=(OPERATOR,)))
    with TestClient(app, root_path=root) as client:
        for spelled in (path, root + path):
            assert client.get(spelled).status_code == 401 or client.get(spelled).content == HEALTH, spelled
            if path in MANAGEMENT_PATHS:
                answer = client.get(spelled, headers={"authorization": f"Bearer {KEY}"})
                assert answer.status_code in (401, 404), spelled


def test_timing_safe_key_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    """CVE-2025-59425: `==` tells how much of a key is right. Every key is compared, by hmac, whichever is right."""
    keys = tuple(f"key-number-{number}" for number in range(5))
    compared: list[tuple[bytes, bytes]] = []
    really = hmac.compare_digest

    def noted(given: bytes, key: bytes) -> bool:
        compared.append((bytes(given), bytes(key)))
        return really(given, key)

    monkeypatch.setattr(hmac, "compare_digest", noted)
    with TestClient(create_app(ScriptedEngine(), Settings(api_key=keys))) as client:
        for given, status in ((keys[0], 200), (keys[4], 200), ("key-number-x", 401), ("k", 401)):
            compared.clear()
            header = [(b"authorization", b"Bearer " + given.encode())]
            assert client.get("/v1/models", headers=header).status_code == status
            assert len(compared) == len(keys), given
            assert len({key for _, key in compared}) == len(keys), given
            assert {len(left) == len(right) for left, right in compared} == {True}, "its length shows in the time"


def test_websockets_are_closed_at_once() -> None:
    """A route that the check does not know: a WebSocket's handshake is no HTTP request."""
    app = create_app(ScriptedEngine(), Settings(api_key=(KEY,)))
    with TestClient(app) as client:
        for headers in ({}, {"authorization": f"Bearer {KEY}"}):
            with pytest.raises(WebSocketDisconnect), client.websocket_connect("/v1/chat/completions", headers=headers):
                pass


def test_no_page_of_another_origin_can_ask() -> None:
    """Whatever a browser sends for a page elsewhere, asked first or not, is refused before its route, at every one."""
    engine = ScriptedEngine()
    with guarded(engine) as server, server.http() as client:
        origin = {"origin": "https://evil.example"}
        simple = {"text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"}
        for path, method in product([*routes(server), "/nothing"], METHODS):
            kinds = simple | {"application/json"} if method == "POST" else {"text/plain"}
            for kind in kinds:
                sent = {**origin, "content-type": kind, "access-control-request-method": "POST"}
                answer = client.request(method, path, content=b'{"model":"default"}', headers=sent)
                assert answer.status_code == 403, (path, method, kind)
                assert method == "HEAD" or "--cors-origin" in answer.text
                assert not any(name.startswith("access-control") for name in answer.headers), path
        assert engine.requests == []
        kept = client.post("/v1/messages", json={}, headers=origin).json()
        assert (kept["type"], kept["error"]["type"]) == ("error", "permission_error")  # in the words of its API


def test_cors_never_allows_credentials() -> None:
    """CORS that mirrors any origin with credentials: even `*` allows none, and no origin gets round the key."""
    for allowed in (("*",), ("https://app.example",)):
        with guarded(api_key=(KEY,), cors_origin=allowed) as server, server.http() as client:
            for origin in ("https://evil.example", "null", "https://app.example.evil.example"):
                answer = client.get("/v1/models", headers={"origin": origin})
                assert answer.status_code == (401 if allowed == ("*",) else 403)
                assert "access-control-allow-credentials" not in answer.headers
                assert answer.headers.get("access-control-allow-origin") in (None, "*")
                assert (answer.headers.get("access-control-allow-origin") == "*") == (allowed == ("*",))


def test_keys_are_shown_nowhere(locked: Guarded) -> None:
    """Keys that leak: no answer, no page and no description of the settings has one."""
    with locked.http(KEY) as client, locked.http(OPERATOR) as operator:
        pages = [
            client.get(path).text for path in ("/", "/openapi.json", "/docs", "/v1/models", "/version", "/nothing")
        ]
        pages += [operator.get(path).text for path in sorted(MANAGEMENT_PATHS)]
        pages += [client.post("/v1/chat/completions", json={"model": "x"}).text]
    for page in pages:
        assert KEY not in page
        assert OPERATOR not in page
    shown = repr(AllSettings(api_key=(KEY,), management_key=(OPERATOR,), hf_token="hf_secret"))
    assert KEY not in shown
    assert OPERATOR not in shown
    assert "hf_secret" not in shown
