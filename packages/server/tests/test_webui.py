# SPDX-License-Identifier: MIT
"""The web UI's files: what is served, how it may be kept, and that nothing else is."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from candle_vllm.server.routes.webui import bundle_names, new_page_key, page_address, public_paths
from candle_vllm.server.settings import Settings

STATIC = files("candle_vllm.server") / "static"
TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml", "txt": "text/plain"}
MAX_GZIPPED = 150 * 1024  # as in build.mjs


@pytest.fixture
def client(start: Callable[..., Any]) -> Any:
    """A client of a server with the page."""
    with start(ui_server=True).http() as made:
        yield made


def path_of(name: str) -> str:
    """Where a file of the bundle is served."""
    return "/" if name == "index.html" else f"/{name}"


def test_the_manifest_is_true() -> None:
    listed = json.loads((STATIC / "manifest.json").read_text())["files"]
    for name, facts in listed.items():
        content = STATIC.joinpath(*name.split("/")).read_bytes()
        assert (hashlib.sha256(content).hexdigest(), len(content)) == (facts["sha256"], facts["bytes"]), name
    there = {f"assets/{file.name}" for file in (STATIC / "assets").iterdir()}
    there |= {file.name for file in STATIC.iterdir() if file.is_file()}
    assert there == {*listed, "manifest.json"}


def test_the_bundle_is_small() -> None:
    loaded = [name for name in bundle_names() if name != "licenses.txt"]  # read by people, never loaded by the page
    sizes = [len(gzip.compress(STATIC.joinpath(*name.split("/")).read_bytes())) for name in loaded]
    assert sum(sizes) <= MAX_GZIPPED


def test_the_page_loads_from_here_alone() -> None:
    page = (STATIC / "index.html").read_text()
    linked = set(re.findall(r'(?:src|href)="([^"]+)"', page))
    assert linked <= set(bundle_names())  # relative, so that the page works below a prefix
    assert len(linked) == 3
    assert not re.search(r"<script(?![^>]*src=)|<style|style=|\son\w+=|https?:", page)
    for name in bundle_names():
        if name.endswith(".css"):
            style = STATIC.joinpath(*name.split("/")).read_text()
            assert not re.search(r"url\(|@import", style)


def test_every_file_is_served_with_its_type(client: Any) -> None:
    for name in bundle_names():
        answer = client.get(path_of(name))
        assert answer.status_code == 200
        assert answer.headers["content-type"].split(";")[0] == TYPES[name.rpartition(".")[2]]
        assert answer.content == STATIC.joinpath(*name.split("/")).read_bytes()


def test_the_policy_is_strict(client: Any) -> None:
    for name in bundle_names():
        if name == "preview.html":
            continue
        headers = client.get(path_of(name)).headers
        policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
        assert policy == {
            "default-src": "'none'", "script-src": "'self'", "style-src": "'self'", "img-src": "'self' data: blob:",
            "connect-src": "'self'", "font-src": "'self'", "frame-src": "'self'",
            "base-uri": "'none'", "form-action": "'none'",
            "frame-ancestors": "'none'", "require-trusted-types-for": "'script'", "trusted-types": "'none'",
        }  # fmt: skip
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"


def test_code_in_a_preview_reaches_nothing(client: Any) -> None:
    headers = client.get("/preview.html").headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy == {
        "default-src": "'none'", "script-src": "'unsafe-inline'", "style-src": "'unsafe-inline'",
        "img-src": "data: blob:", "font-src": "data:", "media-src": "data: blob:", "connect-src": "'none'",
        "frame-src": "'none'", "base-uri": "'none'", "form-action": "'none'", "frame-ancestors": "'self'",
        "sandbox": "allow-scripts",
    }  # fmt: skip
    assert headers["connection-allowlist"] == "()"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


def test_what_may_be_kept(client: Any) -> None:
    for name in bundle_names():
        cache = client.get(path_of(name)).headers["cache-control"]
        assert cache == ("public, max-age=31536000, immutable" if name.startswith("assets/") else "no-cache")


def test_tags(client: Any) -> None:
    for name in bundle_names():
        for accepted in ("identity", "gzip"):
            first = client.get(path_of(name), headers={"accept-encoding": accepted})
            tag = first.headers["etag"]
            for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
                again = client.get(path_of(name), headers={"accept-encoding": accepted, "if-none-match": known})
                assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
                assert "content-security-policy" in again.headers
            other = client.get(path_of(name), headers={"accept-encoding": accepted, "if-none-match": '"other"'})
            assert other.status_code == 200


def test_packed_where_the_client_takes_it(client: Any) -> None:
    for accepted, packed in (
        ("gzip", True), ("br, gzip;q=0.5", True), ("GZIP", True), ("identity", False), ("gzip;q=0", False),
        ("gzip; q=0.0", False), ("x-gzip", False), ("", False),
    ):  # fmt: skip
        app = next(name for name in bundle_names() if name.startswith("assets/app-"))
        answer = client.get(path_of(app), headers={"accept-encoding": accepted})
        assert (answer.headers.get("content-encoding") == "gzip") is packed, accepted
        assert answer.headers["vary"] == "accept-encoding"
        assert answer.content == STATIC.joinpath(*app.split("/")).read_bytes()  # the client unpacks


def test_head(client: Any) -> None:
    answer = client.head("/")
    assert (answer.status_code, answer.content) == (200, b"")
    assert int(answer.headers["content-length"]) > 0


@pytest.mark.parametrize(
    "path",
    [
        "/assets/", "/assets/none.js", "/assets/../manifest.json", "/assets/..%2fmanifest.json",
        "/assets/%2e%2e%2findex.html",
        "/assets/..%5cindex.html", "/manifest.json", "/index.html",
        "/static/index.html", "/assets/app.js",
        "/assets//etc/passwd",
        "/assets/%00", "/%2e%2e/app.py", "/assets/index.html",
    ],
)  # fmt: skip
def test_no_other_file_is_served(client: Any, path: str) -> None:
    assert client.get(path).status_code == 404


def test_nothing_but_reading(client: Any) -> None:
    for path in public_paths():
        answer = client.post(path)
        assert (answer.status_code, answer.headers["allow"]) == (405, "GET")
        assert answer.json()["error"]["message"].endswith("it supports GET.")


def test_without_the_flag_the_root_is_json(start: Callable[..., Any]) -> None:
    with start().http() as client:
        assert client.get("/").json()["name"] == "candle-vllm"
        assert client.get("/icon.svg").status_code == 404


def test_the_page_needs_no_key_and_everything_else_does(start: Callable[..., Any]) -> None:
    with start(ui_server=True, api_key=("k",), management_key=("m",)).http() as client:
        for path in public_paths():
            assert client.get(path).status_code == 200
        for path in (
            "/v1/models",
            "/version",
            "/metrics",
            "/docs",
            "/assets/none.js",
            "/index.html",
            "/icon.svg/",
        ):
            assert client.get(path).status_code == 401, path
    with start(api_key=("k",)).http() as client:
        assert client.get("/").status_code == 401


def test_a_key_for_the_page_alone_where_nobody_has_one(tmp_path: Path) -> None:
    keys = {new_page_key(Settings(ui_server=True), True) for _ in range(3)}
    assert len(keys) == 3
    for key in keys:
        assert re.fullmatch(r"[\w-]{32}", key or ""), "the form that the page takes out of its address"
    assert page_address("http://127.0.0.1:2000", "k") == "http://127.0.0.1:2000/#key=k"
    assert page_address("http://127.0.0.1:2000", None) == "http://127.0.0.1:2000/"
    assert new_page_key(Settings(ui_server=True), False) is None
    assert new_page_key(Settings(), True) is None
    assert new_page_key(Settings(ui_server=True, api_key=("k",)), True) is None
    file = tmp_path / "keys"
    file.write_text("k\n")
    assert new_page_key(Settings(ui_server=True, api_key_file=file), True) is None


BY_NAME = {"host": "mybox.lan:2000", "accept": "text/html,*/*;q=0.8"}


@pytest.mark.parametrize(
    ("settings", "headers", "status"),
    [
        ({}, BY_NAME, 403),
        ({"api_key": ("k",)}, BY_NAME, 403),
        ({"cors_origin": ("http://mybox.lan:2000",)}, BY_NAME, 200),
        ({"cors_origin": ("*",)}, BY_NAME, 200),
        ({}, {**BY_NAME, "host": "192.168.1.5:2000"}, 200),
        ({}, {**BY_NAME, "sec-fetch-site": "none"}, 200),  # HTTPS before a proxy: its scripts say same-origin
        ({"api_key": ("k",)}, {"host": "mybox.lan:2000"}, 200),  # no browser
    ],
)
def test_a_page_whose_scripts_would_be_refused_says_which_flag_is_missing(
    start: Callable[..., Any], settings: Any, headers: dict[str, str], status: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A browser asks for scripts with an Origin, which a name over plain HTTP does not show to be the server's own."""
    with start(ui_server=True, **settings).http() as client:
        answers = [client.get("/", headers=headers) for _ in range(2)]
        script = client.get("/assets/x.js", headers={**headers, "origin": f"http://{headers['host']}"})
    assert {answer.status_code for answer in answers} == {status}
    if status == 403:
        assert "--cors-origin http://mybox.lan:2000" in answers[0].text
        assert script.status_code == 403
        assert caplog.text.count("--cors-origin allows it") == 1
