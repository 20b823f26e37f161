# SPDX-License-Identifier: MIT
"""A browser, pages in it that report every violation and error, and servers with the web UI.

Needs the package `playwright` and Debian's chromium-headless-shell (or chromium); without them these tests skip.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from candle_vllm.core.testing.toy_model import write_toy_model
from packages.server.tests.fake_hub import FakeHub, installed
from tests.registry_packages import npm_file
from tests.web.ui_server import BIG, REPO, TOY, Site, ui_server

_WATCH = """
window.violations = [];
addEventListener("securitypolicyviolation", ({ violatedDirective, blockedURI }) => {
  window.violations.push(`${violatedDirective} ${blockedURI}`);
});
"""


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium without a window."""
    playwright = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium-headless-shell") or shutil.which("chromium")
    if program is None:
        pytest.skip("no chromium-headless-shell and no chromium (apt-get install chromium-headless-shell)")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def axe() -> str:
    """axe-core's program."""
    with tarfile.open(npm_file("axe-core@4.14.1", "axe-core-4.14.1.tgz")) as archive:
        program = archive.extractfile("package/axe.min.js")
        assert program is not None
        return program.read().decode()


@pytest.fixture(scope="session")
def site(browser: Any) -> Iterator[Site]:
    """A server whose engine answers at once."""
    with ui_server() as served:
        yield served


@pytest.fixture(scope="session")
def slow_site(browser: Any) -> Iterator[Site]:
    """A server whose engine takes 4 ms for each character."""
    with ui_server(pause=0.004) as served:
        yield served


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A hub on loopback with a toy model, and with files that are no model."""
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 16)
    folder = write_toy_model(tmp_path / "toy")
    for fake in installed(monkeypatch):
        fake.repos[TOY] = {file.name: file.read_bytes() for file in folder.iterdir()}
        fake.repos[REPO] = {"model-Q4_K_M.gguf": os.urandom(BIG), "model-Q8_0.gguf": b"x" * 99, "config.json": b"{}"}
        yield fake


_PAGES = pytest.StashKey[list[tuple[Any, list[str]]]]()
_TOLD_REQUESTS = 20


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
    """The report of a failure shows each page's text, the element in focus, and the last requests with their status."""
    report = yield
    if report.when == "call" and report.failed:
        for page, requests in item.stash.get(_PAGES, []):
            with contextlib.suppress(Exception):  # a page may be closed, or busy
                focus = page.evaluate("document.activeElement?.cloneNode().outerHTML")
                told = [page.inner_text("body", timeout=5_000), f"focus: {focus}", *requests[-_TOLD_REQUESTS:]]
                report.sections.append((f"page {page.url}", "\n".join(told)))
    return report


@pytest.fixture
def open_page(browser: Any, request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """`open_page(url, **options of the context)`: a page in an empty profile.

    With `titles`, the model names conversations, as it does where nobody says otherwise; each is a request more.
    After the test the page must have met no violation of its policy, no script error, and asked nobody else.
    """
    with contextlib.ExitStack() as stack:
        opened: list[tuple[Any, list[str]]] = []

        def open_page(url: str, titles: bool = False, **options: Any) -> Any:
            context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, "locale": "en-US", **options})
            stack.callback(context.close)
            context.set_default_timeout(60_000)
            context.add_init_script(_WATCH)
            if not titles:
                context.add_init_script(_UNNAMED)
            page = context.new_page()
            wrong: list[str] = []
            requests: list[str] = []
            request.node.stash.setdefault(_PAGES, []).append((page, requests))
            page.on("request", lambda sent: requests.append(f"{sent.method} {sent.url}"))
            page.on("response", lambda told: requests.append(f"{told.status} {told.url}"))
            page.on("requestfailed", lambda lost: requests.append(f"{lost.failure} {lost.url}"))
            own = "/".join(url.split("/")[:3])
            page.on("pageerror", lambda error: wrong.append(f"script error: {error}"))
            page.on("request", lambda sent: wrong.append(sent.url) if _is_foreign(sent.url, own) else None)
            opened.append((page, wrong))
            page.goto(url)
            return page

        yield open_page
        for page, wrong in opened:
            assert not page.is_closed()
            assert page.evaluate("window.violations") == []
            assert wrong == []


_UNNAMED = """
localStorage.getItem("candle-vllm.preferences") ?? localStorage.setItem("candle-vllm.preferences", '{"titles":false}');
"""


def _is_foreign(url: str, own: str) -> bool:
    return not url.startswith((own, "data:", "blob:"))


@pytest.fixture
def chat(site: Site, open_page: Callable[..., Any]) -> Any:
    """A page on the site whose engine answers at once."""
    return open_page(site.url)
