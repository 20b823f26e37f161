"""API keys guard every route but /health; CORS opens nothing else."""

from __future__ import annotations

import itertools

import openai
import pytest
from starlette.routing import Route

from candle_vllm.server import Settings, create_app
from candle_vllm.server.auth import PUBLIC_PATHS

KEYS = ("first-key", "second-key")
PATHS = [
    "/", "/version", "/docs", "/redoc", "/openapi.json", "/v1/models", "/v1/models/scripted", "/v1/chat/completions",
    "/v1/completions", "/nothing", "/health/", "//health", "/health/../v1/models", "/HEALTH", "/v1/models?x=/health",
]  # fmt: skip


def test_nothing_is_reached_without_a_key(start) -> None:
    with start(api_key=KEYS).http() as client:
        for path, method in itertools.product(PATHS, ["GET", "POST", "OPTIONS", "HEAD", "PUT"]):
            response = client.request(method, path)
            assert response.status_code == 401, (method, path)
            assert response.headers["www-authenticate"] == "Bearer"
            assert method == "HEAD" or response.json()["error"]["code"] == "invalid_api_key"


def test_every_route_of_the_application_is_among_the_tested_ones() -> None:
    from server_fakes import PacedEngine

    app = create_app(PacedEngine(), Settings())
    paths = set(app.openapi()["paths"]) | {route.path for route in app.routes if isinstance(route, Route)}
    assert paths <= {
        *PATHS,
        "/health",
        "/v1/models/{model_id}",
        "/v1/models/{model_id:path}",
    }
    assert {"/health"} == PUBLIC_PATHS


def test_health_needs_no_key(start) -> None:
    with start(api_key=KEYS).http() as client:
        assert client.get("/health").status_code == 200


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


def test_without_keys_everything_is_open(start) -> None:
    assert len(list(start().openai("whatever").models.list())) == 1


PREFLIGHT = {"origin": "https://app.example", "access-control-request-method": "POST"}


def test_no_cors_unless_configured(start) -> None:
    with start().http() as client:
        response = client.get("/v1/models", headers={"origin": "https://app.example"})
        assert not any(name.startswith("access-control") for name in response.headers)
        assert client.options("/v1/models", headers=PREFLIGHT).status_code == 405


def test_cors_for_the_configured_origin_only(start) -> None:
    with start(api_key=KEYS, cors_origin=("https://app.example",)).http() as client:
        assert client.options("/v1/models", headers=PREFLIGHT).status_code == 200
        assert client.options("/v1/models", headers={**PREFLIGHT, "origin": "https://evil.example"}).status_code == 400
        refused = client.get("/v1/models", headers={"origin": "https://app.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://app.example"
        assert client.options("/v1/models").status_code == 401
