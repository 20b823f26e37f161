# SPDX-License-Identifier: MIT
"""API keys guard every route but /health and /ready; CORS opens nothing else."""

from __future__ import annotations

import asyncio
import functools
import itertools
import re
from pathlib import Path
from typing import Any

import openai
import pytest
from starlette.applications import Starlette
from starlette.routing import Match, Mount, Route
from starlette.testclient import TestClient

from candle_vllm.core.progress import Progress
from candle_vllm.openai.fair_threads import asker
from candle_vllm.server import Settings, create_app
from candle_vllm.server.app import OPERATIONS, ROUTERS
from candle_vllm.server.http.auth import PAGES, ApiKeyMiddleware, HostMiddleware, OriginMiddleware
from candle_vllm.server.http.keys import Keyring
from candle_vllm.server.http.routing import Caller, caller_of, routed_path
from candle_vllm.server.models.slot import ModelState
from candle_vllm.server.openapi.operation import Access, operations_of, routing
from candle_vllm.server.settings.options import UsageError
from packages.server.tests.server_fakes import PacedEngine

ACCESS = Access(OPERATIONS)
KEYS = ("first-key", "second-key")
APP = create_app(PacedEngine(), Settings())
ROUTES = sorted({re.sub(r"\{.*?\}", "x", path) for path in APP.openapi()["paths"]} - ACCESS.public)
PATHS = [
    *ROUTES, "/docs", "/redoc", "/openapi.json",
    "/nothing", "/health/", "//health", "/health/../v1/models", "/HEALTH", "/v1/models?x=/health",
]  # fmt: skip


def test_nothing_is_reached_without_a_key(start) -> None:
    with start(api_key=KEYS).http() as client:
        for path, method in itertools.product(PATHS, ["GET", "POST", "OPTIONS", "HEAD", "PUT"]):
            response = client.request(method, path)
            assert response.status_code == 401, (method, path)
            page = method in ("GET", "HEAD") and path in PAGES
            assert response.headers["www-authenticate"] == ('Basic realm="candle-vllm"' if page else "Bearer")
            if method != "HEAD":
                error = response.json()["error"]  # in the words of the API that was asked
                if path.startswith("/api/"):
                    assert error.startswith("Missing or wrong API key")
                else:
                    assert error.get("code", error["type"]) in ("invalid_api_key", "authentication_error")


def test_the_routes_are_known_and_only_two_are_public() -> None:
    assert {"/v1/chat/completions", "/v1/models/load", "/v1/models/x", "/"} <= set(ROUTES)
    assert {"/health", "/v1/health", "/ping", "/ready"} == ACCESS.public


def test_health_needs_no_key(start) -> None:
    with start(api_key=KEYS).http() as client:
        assert client.get("/health").status_code == 200


@pytest.mark.parametrize("key", [None, "wrong", "first-key", "operator"])
def test_ready_is_open_and_tells_strangers_no_more_than_its_status(key: str | None) -> None:
    app = create_app(PacedEngine(), Settings(api_key=KEYS, management_key=("operator",)))
    with TestClient(app) as client:
        slot = app.state.manager.slots[app.state.manager.active]
        slot.state, slot.progress = ModelState.LOADING, Progress("reading secret.gguf")
        response = client.get("/ready", headers={} if key is None else {"authorization": f"Bearer {key}"})
        slot.state = ModelState.READY
    assert response.status_code == 503
    assert response.json()["status"] == "loading"
    assert ("loading" in response.json()) == (key in ("first-key", "operator"))
    assert ("secret" in response.text) == (key in ("first-key", "operator"))


@pytest.mark.parametrize("key", KEYS)
def test_each_key_opens(start, key: str) -> None:
    assert len(list(start(api_key=KEYS).openai(key).models.list())) == 1


WRONG = [
    "Bearer wrong", "Bearer first-ke", "Bearer first-key2", "Basic first-key", "first-key", "Bearer",
    "Bearer first-key,second-key", "Bearer \xe9", "",
]  # fmt: skip


def test_wrong_headers(start) -> None:
    with start(api_key=KEYS).http() as client:
        for header in WRONG:
            response = client.get("/v1/models", headers=[("authorization", header.encode("latin-1"))])
            assert response.status_code == 401, header


def test_what_a_proxy_asks_for_stands_beside_the_key(start) -> None:
    with start(api_key=KEYS).http() as client:
        basic = {"authorization": "Basic dXNlcjpwYXNzd29yZA=="}  # of nginx's auth_basic, which passes it on
        for given, status in (({"x-api-key": "second-key"}, 200), ({"x-api-key": "wrong"}, 401), ({}, 401)):
            assert client.get("/v1/models", headers=basic | given).status_code == status
        bearer = {"authorization": "Bearer wrong", "x-api-key": "second-key"}
        assert client.get("/v1/models", headers=bearer).status_code == 401


def test_two_headers_are_refused(start) -> None:
    with start(api_key=KEYS).http() as client:
        headers = [("authorization", "Bearer first-key"), ("authorization", "Bearer wrong")]
        assert client.get("/v1/models", headers=headers).status_code == 401


@pytest.mark.parametrize("host", ["/health", "x/health", "localhost/health?", "health"])
def test_the_host_header_decides_nothing(start, host: str) -> None:
    with start(api_key=KEYS).http() as client:
        assert client.get("/v1/models", headers={"host": host}).status_code in (400, 401)


def test_a_wrong_key_as_the_openai_client_sees_it(start) -> None:
    with pytest.raises(openai.AuthenticationError) as refusal:
        start(api_key=KEYS).openai("wrong").models.list()
    assert refusal.value.code == "invalid_api_key"


def test_a_caller_is_shown_without_the_key() -> None:
    assert repr(Caller("2", KEYS[1])) == "Caller('2')"
    assert caller_of({"type": "http"}) == Caller("", "")


async def test_threads_are_shared_by_keys() -> None:
    """What runs beside the event loop knows whose request it is for, by the label of the key."""
    asking: list[str] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        asking.append(asker.get())

    guarded = ApiKeyMiddleware(application, Keyring(Settings(api_key=KEYS)), ACCESS)
    for key in KEYS:
        head = [(b"authorization", b"Bearer " + key.encode())]
        scope = {"type": "http", "path": "/v1/models", "method": "GET", "headers": head}
        await asyncio.create_task(guarded(scope, None, None))  # type: ignore[arg-type]
    assert asking == ["1", "2"]


def test_without_keys_everything_is_open(start) -> None:
    assert len(list(start().openai("whatever").models.list())) == 1


PREFLIGHT = {"origin": "https://app.example", "access-control-request-method": "POST"}


def test_no_cors_unless_configured(start) -> None:
    with start().http() as client:
        for answer in (client.get("/v1/models", headers=PREFLIGHT), client.options("/v1/models", headers=PREFLIGHT)):
            assert (answer.status_code, answer.json()["error"]["param"]) == (403, "Origin")
            assert "--cors-origin" in answer.json()["error"]["message"]
            assert not any(name.startswith("access-control") for name in answer.headers)


def test_cors_for_the_configured_origin_only(start) -> None:
    with start(api_key=KEYS, cors_origin=("https://app.example",)).http() as client:
        assert client.options("/v1/models", headers=PREFLIGHT).status_code == 200
        assert client.options("/v1/models", headers={**PREFLIGHT, "origin": "https://evil.example"}).status_code == 400
        refused = client.get("/v1/models", headers={"origin": "https://app.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://app.example"
        exposed = set(refused.headers["access-control-expose-headers"].split(", "))
        assert {"x-request-id", "request-id", "x-should-retry", "retry-after", "x-warning", "x-error-code"} <= exposed
        assert client.options("/v1/models").status_code == 401
        elsewhere = client.get("/v1/models", headers={"origin": "https://evil.example"})
        assert elsewhere.status_code == 403
        assert "access-control-allow-origin" not in elsewhere.headers


OWN, LAN = "http://127.0.0.1:2000", {"host": "192.168.1.5:8000"}
ORIGINS = [  # what a page is, what its request has besides, whether it may ask
    (OWN, {}, True),
    ("http://localhost:2000", {}, True),
    ("http://[::1]:2000", {}, True),
    ("https://127.0.0.1:2000", {}, False),
    ("http://127.0.0.1:2001", {}, False),
    ("http://127.0.0.1", {}, False),
    ("https://evil.example", {}, False),
    ("null", {}, False),
    ("", {}, False),
    # a name that leads here, which the page's owner can arrange; a number, which nobody can
    ("http://evil.example:2000", {"host": "evil.example:2000"}, False),
    ("http://192.168.1.5:8000", LAN, True),
    ("http://192.168.1.6:8000", LAN, False),
    ("https://192.168.1.5:8000", LAN, False),
    ("http://[fd00::1]:8000", {"host": "[fd00::1]:8000"}, True),
    ("http://1.2.3.4.evil.example", {"host": "1.2.3.4.evil.example"}, False),
    ("http://2130706433", {"host": "2130706433"}, False),
    # what a browser says of a page behind a proxy
    ("https://llm.example", {"host": "127.0.0.1:2000", "sec-fetch-site": "same-origin"}, True),
    ("https://llm.example", {"host": "llm.example"}, False),
    ("https://evil.example", {"sec-fetch-site": "same-site"}, False),
    ("null", {"sec-fetch-site": "cross-site"}, False),
    # those of --cors-origin
    ("https://app.example", {}, True),
    ("https://app.example.evil.example", {}, False),
    ("https://appxexample", {}, False),
    ("https://a.b.team.example", {}, True),
    ("https://evil.example/.team.example", {}, False),
    ("vscode-webview://0f3c", {}, True),
    ("xvscode-webview://0f3c", {}, False),
    ("vscode-webview://" + "x" * 600, {}, False),
]


async def asked_by(
    headers: list[tuple[str, str]],
    allowed: tuple[str, ...],
    kind: str = "http",
    layer: Any = OriginMiddleware,
    **changes: Any,
) -> bool:
    """Whether a request comes as far as the application."""
    came: list[str] = []
    sent: list[int] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        came.append(scope["type"])

    async def receive() -> Any:
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message.get("status"))

    raw = [(name.encode(), value.encode()) for name, value in headers]
    scope = {"type": kind, "scheme": "ws" if kind == "websocket" else "http", "path": "/v1/models", "headers": raw,
             "server": ("127.0.0.1", 2000), "method": "GET", **changes}  # fmt: skip
    await layer(application, allowed=allowed)(scope, receive, send)
    assert sent[:1] == ([] if came else [403])
    return bool(came)


@pytest.mark.parametrize("kind", ["http", "websocket"])
async def test_whose_page_it_is_that_asks(kind: str) -> None:
    allowed = ("https://app.example", "https://*.team.example", "vscode-webview://*")
    for origin, more, may in ORIGINS:
        assert await asked_by([("origin", origin), *more.items()], allowed, kind) == may, (origin, more)
        assert await asked_by([("origin", origin), *more.items()], ("*",), kind), origin
    twice = [("origin", OWN), ("origin", "https://evil.example")]
    assert not await asked_by(twice, allowed, kind)
    said = [("origin", "https://evil.example"), ("sec-fetch-site", "cross-site"), ("sec-fetch-site", "same-origin")]
    assert not await asked_by(said, allowed, kind)
    assert await asked_by([], allowed, kind)  # a program


OWN_NAMES = [
    "127.0.0.1", "127.0.0.1:2000", "192.168.1.5:8000", "8.8.8.8", "[::1]:2000", "[fd00::1]", "localhost",
    "LOCALHOST:80", "app.localhost:2000", "candle-vllm:8000", "x", "box.local", "a.b.svc", "vllm.default.svc:8000",
    "candle-vllm.default.svc.cluster.local:80",
    "host.docker.internal:2000", "nas.home.arpa", "bound.example:2000", "app.example", "App.Example.:8443",
    "a.team.example:1", "localhost.",
]  # fmt: skip
OTHER_NAMES = [
    "evil.example", "evil.example:2000", "127.0.0.1.evil.example", "127.0.0.1.evil.example:80",
    "localhost.evil.example", "app.example.evil.example", "evilapp.example", "local.evil.example",
    "x.notlocal", "[::1].evil.example", "vllm.default:8000",
    "bound.example.evil.example:2000", "team.example", "0x7f.1", "127.1",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["http", "websocket"])
async def test_names_of_a_server_without_keys(kind: str) -> None:
    """DNS rebinding: a page whose name leads here asks by that name, and sends no Origin with a GET."""

    async def passes(*hosts: str, **changes: Any) -> bool:
        more = [("sec-fetch-site", said)] if (said := changes.pop("site", "")) else []
        allowed = ("http://app.example:2000", "https://*.team.example")
        layer = functools.partial(HostMiddleware, own="bound.example", public=ACCESS.public)
        return await asked_by([*(("host", host) for host in hosts), *more], allowed, kind, layer, **changes)

    assert [host for host in OWN_NAMES if not await passes(host)] == []
    assert [host for host in OTHER_NAMES if await passes(host)] == []
    assert await passes()  # HTTP/1.0, which no browser speaks
    assert not await passes("a" * 60_000 + ".local")  # it would be kept for the next time
    assert not await passes("127.0.0.1", "evil.example")
    for path in ACCESS.public:
        assert await passes("evil.example", path=path)
    for said, may in (("same-origin", True), ("none", True), ("cross-site", False), ("same-site", False)):
        assert await passes("llm.example", site=said) == may
    assert await passes("llm.example", scheme="wss" if kind == "websocket" else "https")
    assert await passes("llm.example", server=("/run/candle.sock", None))


@pytest.mark.parametrize(
    ("settings", "status"),
    [
        ({}, 403),
        ({"management_key": ("operator",)}, 403),
        ({"api_key": KEYS}, 401),
        ({"cors_origin": ("https://other.example",)}, 403),
        ({"cors_origin": ("https://evil.example",)}, 200),
        ({"cors_origin": ("*",)}, 200),
        ({"host": "127.0.0.1"}, 403),
    ],
)
def test_a_name_is_refused_with_the_flag_that_allows_it(settings: dict[str, Any], status: int) -> None:
    with TestClient(create_app(PacedEngine(), Settings(**settings)), base_url="http://evil.example:2000") as client:
        for path in ACCESS.public:
            assert client.get(path).status_code == 200
        for method in ("GET", "HEAD", "POST", "DELETE", "OPTIONS"):
            refused = client.request(method, "/v1/files")
            assert (refused.status_code == 403) == (status == 403), method
        answer = client.get("/v1/models")
        assert answer.status_code == status
        if status == 403:
            assert answer.json()["error"]["param"] == "Host"
            assert "--cors-origin" in answer.json()["error"]["message"]
            assert client.get("/v1/models", headers={"host": "127.0.0.1:2000"}).status_code == 200


def test_a_kind_of_origin_may_be_allowed(start) -> None:
    with start(cors_origin=("vscode-webview://*", "https://*.team.example")).http() as client:
        for origin, may in (("vscode-webview://0f3c", True), ("https://a.team.example", True), ("https://x", False)):
            preflight = client.options("/v1/models", headers={**PREFLIGHT, "origin": origin})
            assert preflight.status_code == (200 if may else 400)
            answer = client.get("/v1/models", headers={"origin": origin})
            assert answer.status_code == (200 if may else 403)
            assert answer.headers.get("access-control-allow-origin") == (origin if may else None)


def test_the_header_of_anthropic_clients_opens_as_well(start) -> None:
    with start(api_key=KEYS).http() as client:
        assert client.get("/v1/models", headers={"x-api-key": "second-key"}).status_code == 200
        assert client.get("/v1/models", headers={"x-api-key": "second"}).status_code == 401
        both = {"x-api-key": "second-key", "authorization": "Bearer wrong"}
        assert client.get("/v1/models", headers=both).status_code == 401


def test_routes_of_operators_want_their_own_key(start) -> None:
    with start(api_key=KEYS, management_key=("operator",)).http() as client:
        for path in sorted(ACCESS.managed - {"/lora-adapters"}):  # which clients may look at
            for key in (*KEYS, "wrong"):
                assert client.get(path, headers={"authorization": f"Bearer {key}"}).status_code == 401, path
            assert client.get(path, headers={"authorization": "Bearer operator"}).status_code != 401, path
        refused = client.get("/v1/models", headers={"authorization": "Bearer operator"})
        assert refused.status_code == 401
        assert refused.json()["error"]["message"].startswith("This route needs a client's API key (--api-key)")


def test_routes_of_operators_are_known() -> None:
    managed = {
        "/metrics", "/v1/models/load", "/v1/models/unload", "/v1/models/select", "/v1/models/reload",
        "/v1/models/add", "/v1/models/remove", "/v1/models/status", "/v1/models/inventory", "/v1/usage",
        "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/server_info", "/reset_prefix_cache", "/v1/queues",
        "/sleep", "/wake_up", "/is_sleeping", "/api/pull", "/api/copy", "/api/delete",
    }  # fmt: skip
    assert ACCESS.managed == managed | {"/v1/queues/{model_id:path}", "/lora-adapters"}
    for method in ("GET", "POST", "PUT", "DELETE", None):
        for path in (*managed, "/v1/queues/", "/v1/queues/a/b"):
            assert ACCESS.manages(method, path), path
        for path in ("/v1/models", "/v1/models/x", "/v1/queue", "/metrics/", "/health", "/"):
            assert not ACCESS.manages(method, path), path
        assert ACCESS.manages(method, "/lora-adapters") == (method != "GET")


PIN, _pin = routing(tag="operators", manages=True)
for _at, _manages in (
    ("GET /v1/models/status", True), ("POST /v1/models/{name}/pin", True), ("GET /v1/models/{name:path}", False),
    ("GET /v1/open/mine", False), ("POST /v1/open/mine", True), ("GET /v1/open/{name}", True),
):  # fmt: skip
    _pin(_at, manages=_manages)(lambda: None)


@pytest.mark.parametrize(
    ("asked", "manages"),
    [
        ("POST /v1/models/x/pin", True), ("PUT /v1/models/x/pin", True), ("DELETE /v1/models/x/pin", True),
        ("OPTIONS /v1/models/x/pin", True), ("HEAD /v1/models/x/pin", True), ("WEBSOCKET /v1/models/x/pin", True),
        ("GET /v1/models/x/pin", False), ("GET /v1/models/x", False), ("POST /v1/models/x", False),
        ("POST /v1/models/x/pin\n", True), ("POST /v1/models/\n/pin", True), ("POST /v1/models/x\ny/pin", True),
        ("POST /v1/models/../pin", True), ("POST /v1/models/%2F/pin", True),
        ("POST /v1/models/org/name/pin", False), ("POST /v1/models//pin", False), ("POST /v1/models/x/pin/", False),
        ("POST //v1/models/x/pin", False), ("POST /V1/models/x/pin", False), ("POST /v1/models/x/pin\n\n", False),
        ("GET /v1/models/status", True), ("GET /v1/models/status\n", True), ("POST /v1/models/status", True),
        ("GET /v1/open/mine", True), ("GET /v1/open/x", True), ("PUT /v1/open/x", True), ("GET /v1/open/", False),
        ("GET /v1/open/\n", True), ("GET /v1/open/x\n", True), ("HEAD /v1/open/mine", True),
    ],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("root", ["", "/v1", "/app"])
async def test_a_path_parameter_guards_what_its_route_matches(asked: str, manages: bool, root: str) -> None:
    """And nothing else below its prefix; a client's request reaches no operators' route, below any prefix."""
    method, path = asked.split(" ", 1)
    head = [(b"authorization", b"Bearer " + KEYS[0].encode())]
    kind: dict[str, Any] = {"type": "http", "method": method} if method != "WEBSOCKET" else {"type": "websocket"}
    scope = {**kind, "path": root + path, "root_path": root, "headers": head}
    reached: list[bool] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        served = [route for route in PIN.routes if route.matches(scope)[0] is Match.FULL]
        reached.append(any(operations[method, route.path].manages for route in served if isinstance(route, Route)))

    async def send(message: Any) -> None:
        assert message.get("status", 401) == 401

    operations, keys = operations_of([PIN]), Keyring(Settings(api_key=KEYS, management_key=("operator",)))
    await ApiKeyMiddleware(application, keys, Access(operations))(scope, None, send)  # type: ignore[arg-type]
    assert reached == ([] if manages else [False])


def test_no_spelling_opens_an_operators_route() -> None:
    """The router matches the same path of the same scope."""
    routes = [route for router in ROUTERS for route in router.routes]
    values = ("x", "a/b", "\n", "x\n", "", "..", "%2F", "a\nb")
    paths = {re.sub(r"\{.*?\}", value.replace("\n", r"\n"), at) for at in ACCESS.managed for value in values}
    for path, root, method in itertools.product(
        sorted(paths), ("", "/v1", "/v1/queues"), ("GET", "POST", "PUT", "DELETE")
    ):
        for spelt in (root + path, root + path + "\n", root + path + "/", root + "/" + path, path):
            scope = {"type": "http", "method": method, "path": spelt, "root_path": root, "headers": []}
            if not ACCESS.manages(method, routed_path(scope)):
                found = next((each for each in routes if each.matches(scope)[0] is Match.FULL), None)
                served = OPERATIONS.get((method, getattr(found, "path", "")))
                assert served is None or not served.manages, (method, spelt, root)


def test_a_management_key_alone_leaves_the_other_routes_open(start) -> None:
    with start(management_key=("operator",)).http() as client:
        assert client.get("/v1/models").status_code == 200
        assert client.get("/v1/models/status").status_code == 401


def test_an_application_in_another_one_keeps_its_keys() -> None:
    outer = Starlette(routes=[Mount("/inner", app=create_app(PacedEngine(), Settings(management_key=("operator",))))])
    with TestClient(outer) as client:
        assert client.get("/inner/v1/models").status_code == 200
        assert client.get("/inner/v1/models/status").status_code == 401


def test_keys_from_a_file(start, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("first-key\n\n# people\n  second-key  \n", "utf-8-sig")  # as from Windows
    running = start(api_key_file=path)
    with running.http() as client:
        assert client.get("/v1/models").status_code == 401
        for key in KEYS:
            assert client.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# none\n", "holds no key"),
        ("# people\n\na\ntwo words\n", "keys, line 4: a key must be"),
        ("a\n" * 10_001, "more than"),
    ],
)
def test_key_files_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        create_app(PacedEngine(), Settings(api_key_file=path))


def test_a_key_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the API keys"):
        create_app(PacedEngine(), Settings(api_key_file=tmp_path / "none"))
