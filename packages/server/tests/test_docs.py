# SPDX-License-Identifier: MIT
"""The pages: from this server alone, and behind the key."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from typing import Any

import pytest

FILES = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon-32x32.png": "image/png",
    "start.js": "text/javascript",
}
PAGES = ("/openapi.json", "/docs", *(f"/docs/{name}" for name in FILES))


def basic(password: str, user: str = "") -> dict[str, str]:
    return {"authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


def test_the_page_loads_from_here_alone(start: Callable[..., Any]) -> None:
    with start().http() as client:
        page = client.get("/docs")
        assert page.headers["content-type"].startswith("text/html")
        linked = set(re.findall(r'(?:src|href)="([^"]+)"', page.text))
        assert linked == {f"docs/{name}" for name in FILES}  # below the page's own folder, under any prefix
        assert not re.search(r"<script(?![^>]*src=)|<style|style=|\son\w+=|//", page.text)
        for name, kind in FILES.items():
            file = client.get(f"/docs/{name}")
            assert (file.status_code, file.headers["content-type"].split(";")[0]) == (200, kind)
            assert len(file.content) > 100
        assert 'url: "openapi.json"' in client.get("/docs/start.js").text
        assert "validatorUrl: null" in client.get("/docs/start.js").text


def test_the_policy_is_strict(start: Callable[..., Any]) -> None:
    with start().http() as client:
        for path in PAGES[1:]:
            headers = client.get(path).headers
            policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
            assert policy["default-src"] == "'none'"
            assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
            assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
            assert headers["x-content-type-options"] == "nosniff"


def test_the_document_is_served(start: Callable[..., Any]) -> None:
    with start().http() as client:
        assert client.get("/openapi.json").json()["openapi"] == "3.1.0"


@pytest.mark.parametrize("name", ["none.js", "..%2f__init__.py", "%2e%2e%2fmain.py", "__init__.py", "..%5cmain.py", ""])
def test_no_other_file_is_served(start: Callable[..., Any], name: str) -> None:
    with start().http() as client:
        assert client.get(f"/docs/{name}").status_code == 404


def test_the_pages_take_the_key_as_a_password(start: Callable[..., Any]) -> None:
    with start(api_key=("first", "sec:ond")).http() as client:
        for path in PAGES:
            refused = client.get(path)
            assert (refused.status_code, refused.headers["www-authenticate"]) == (401, 'Basic realm="candle-vllm"')
            for headers in (
                basic("first"),
                basic("sec:ond", "me"),
                {"authorization": "Bearer first"},
                {"x-api-key": "first"},
            ):
                assert client.get(path, headers=headers).status_code == 200
                assert client.head(path, headers=headers).status_code == 200


WRONG = [
    basic("wrong"), basic("first2"), basic("firs"), basic("first "), basic(""), basic("", "first"), basic("second"),
    {"authorization": "Basic first"}, {"authorization": "Basic"}, {"authorization": "Basic Zmlyc3Q="},
    {"authorization": "Basic !!!"}, {"authorization": "Basic OmZpcnN0 OmZpcnN0"}, {"authorization": "Digest OmZpcnN0"},
]  # fmt: skip


@pytest.mark.parametrize("headers", WRONG)
def test_wrong_passwords(start: Callable[..., Any], headers: dict[str, str]) -> None:
    with start(api_key=("first", "sec:ond")).http() as client:
        for path in PAGES:
            assert client.get(path, headers=headers).status_code == 401


def test_two_headers_are_refused(start: Callable[..., Any]) -> None:
    with start(api_key=("first",)).http() as client:
        both = [*basic("first").items(), *basic("wrong").items()]
        assert client.get("/docs", headers=both).status_code == 401


def test_no_other_route_takes_a_password(start: Callable[..., Any]) -> None:
    with start(api_key=("first",)).http() as client:
        for method, path in (
            ("GET", "/v1/models"), ("GET", "/"), ("POST", "/v1/chat/completions"), ("POST", "/docs"),
            ("POST", "/openapi.json"), ("GET", "/docsx"), ("GET", "/x/docs/"), ("GET", "/redoc"),
        ):  # fmt: skip
            answer = client.request(method, path, headers=basic("first"))
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), path


def test_an_operators_key_is_no_key_for_the_pages(start: Callable[..., Any]) -> None:
    with start(api_key=("first",), management_key=("operator",)).http() as client:
        assert client.get("/docs", headers=basic("operator")).status_code == 401
        assert client.get("/v1/models/status", headers=basic("operator")).status_code == 401
