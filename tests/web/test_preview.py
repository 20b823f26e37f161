# SPDX-License-Identifier: MIT
"""The preview of code that a model wrote: it runs on a click alone, and reaches neither network nor page."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.common_run import few
from tests.web.actions import ask, button, findings
from tests.web.ui_server import Site, ui_server

SETTLED = 900  # milliseconds after which everything that is tried has been tried


ALLOWLISTED = "/page/allowlisted"
"""A page whose header refuses all connections to browsers that know it."""


class Outside:
    """A server elsewhere that counts who asks it, by HTTP and by datagrams."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.pages: dict[str, str] = {}  # that are no attempt to reach it
        outside = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                page = outside.pages.get(self.path, "")
                if not page:
                    outside.asked.append(self.path)
                self.send_response(200)
                self.send_header("access-control-allow-origin", "*")
                if self.path == ALLOWLISTED:
                    self.send_header("connection-allowlist", "()")
                self.send_header("content-type", "text/css" if "style" in self.path and not page else "text/html")
                self.end_headers()
                self.wfile.write(page.encode())

            do_POST = do_GET

            def log_message(self, format: str, *args: Any) -> None:
                """Says nothing."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", 0))
        self.stun = f"stun:127.0.0.1:{self.udp.getsockname()[1]}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while self.udp.recv(2000):
                self.asked.append("datagram")

    def close(self) -> None:
        """Ends both."""
        self.http.shutdown()
        self.http.server_close()
        with contextlib.suppress(OSError):
            self.udp.shutdown(socket.SHUT_RDWR)
        self.udp.close()


RTC = """<script>(async () => {
  const peer = new RTCPeerConnection({ iceServers: [{ urls: "STUN" }] });
  peer.createDataChannel("x");
  await peer.setLocalDescription(await peer.createOffer());
})();</script>"""
ESCAPES = {
    "fetch": "<script>fetch('OUT/fetch').catch(() => 0);</script>",
    "beacon": "<script>navigator.sendBeacon('OUT/beacon', 'x');</script>",
    "socket": "<script>try { new EventSource('OUT/events'); new WebSocket('OUT/socket'); } catch {}</script>",
    "image": "<img src='OUT/image'><svg><image href='OUT/inside'/></svg><video poster='OUT/poster'></video>",
    "style": "<link rel=stylesheet href='OUT/style'>",
    "import": "<style>@import 'OUT/style';</style>",
    "background": "<style>body { background: url(OUT/background); }</style>",
    "font": "<style>@font-face { font-family: f; src: url(OUT/font); } p { font-family: f; }</style><p>text</p>",
    "script": "<script src='OUT/script'></script>",
    "module": "<script type=module>import('OUT/module').catch(() => 0);</script>",
    "video": "<video src='OUT/video' preload=auto></video>",
    "object": "<object data='OUT/object'></object><embed src='OUT/embed'>",
    "frame": "<iframe src='OUT/frame'></iframe>",
    "inner": "<iframe srcdoc=\"<script>location = 'OUT/inner'</script>\"></iframe>",
    "prefetch": "<link rel=prefetch href='OUT/prefetch'><link rel=preload as=image href='OUT/preload'>",
    "base": "<base href='OUT/'><img src=relative>",
    "form": "<form action='OUT/form'></form><script>document.forms[0].submit();</script>",
    "navigation": "<script>location = 'OUT/navigation';</script>",
    "refresh": "<meta http-equiv=refresh content='0;url=OUT/refresh'>",
    "link": "<a href='OUT/link' ping='OUT/ping'>x</a><script>document.querySelector('a').click();</script>",
    "popup": "<script>window.open('OUT/popup');</script>",
    "blank": "<a href='OUT/blank' target=_blank>x</a><script>document.querySelector('a').click();</script>",
    "worker": "<script>new Worker(URL.createObjectURL(new Blob([\"fetch('OUT/worker')\"])));</script>",
    "rtc": RTC,
}
REACH = """<p id=said></p><script>
const said = [];
const attempt = (name, work) => {
  try { work(); said.push(name + " worked"); } catch (error) { said.push(name + " " + error.name); }
};
attempt("parent", () => parent.parent.document.title);
attempt("top", () => { top.location = "about:blank"; });
attempt("local", () => localStorage.setItem("a", "b"));
attempt("session", () => sessionStorage.setItem("a", "b"));
attempt("cookie", () => { document.cookie = "a=b"; });
attempt("database", () => indexedDB.open("a"));
attempt("peers", () => new RTCPeerConnection());
document.getElementById("said").textContent = said.join(", ");
top.postMessage({ all: "of them" }, "*");
</script>"""
PAGE = "<!doctype html><p id=said>waiting</p><script>document.getElementById('said').textContent = 1 + 1;</script>"
PICTURE = '<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><circle r="4"/></svg>'
LINKS = """<a href="#place">down</a> <a href="https://example.org/">away</a> <a href="#" id=own>own</a>
<p id=said></p><p id=place>place</p><script>
const show = (text) => { document.getElementById("said").textContent = text; };
addEventListener("hashchange", () => show("at " + location.hash));
document.getElementById("own").onclick = (event) => { event.preventDefault(); show("handled"); };
</script>"""
FORM = """<form><label>Name <input required></label><button value=Add>Add</button></form><p id=said></p><script>
document.forms[0].onsubmit = (event) => {
  event.preventDefault();
  document.getElementById("said").textContent = event.target[0].value + " by " + event.submitter.value;
};
</script>"""
BLOCKS = {
    "a page": ("html", PAGE), "a picture": ("svg", PICTURE), "some xml": ("xml", PICTURE),
    "links": ("html", LINKS), "a form": ("html", FORM),
    "other xml": ("xml", "<a/>"), "python": ("python", "print(1)"), "reach": ("html", REACH),
}  # fmt: skip


@pytest.fixture(scope="module")
def outside() -> Iterator[Outside]:
    """Where nothing may arrive."""
    made = Outside()
    yield made
    made.close()


def escape(name: str, outside: Outside) -> str:
    """The code of one attempt."""
    return ESCAPES[name].replace("OUT", outside.url).replace("STUN", outside.stun)


@pytest.fixture(scope="module")
def coding_site(browser: Any, outside: Outside) -> Iterator[Site]:
    """A server whose model answers with the block of code that is asked for."""

    def answer(prompt: str) -> str:
        asked = prompt.rsplit("<|im_start|>", 2)[-2].removeprefix("user").split("<|im_end|>")[0].strip()
        nested = asked.startswith("nested ")
        if asked.removeprefix("nested ") in ESCAPES:
            code = escape(asked.removeprefix("nested "), outside)
            quoted = code.replace("&", "&amp;").replace('"', "&quot;")
            return f'```html\n<iframe srcdoc="{quoted}"></iframe>\n```' if nested else f"```html\n{code}\n```"
        language, code = BLOCKS.get(asked, ("text", "a title"))
        return f"Here:\n\n```{language}\n{code}\n```"

    with ui_server(answer) as served:
        yield served


@pytest.fixture
def page(browser: Any, coding_site: Site) -> Iterator[Any]:
    """A page of that server; what fails in the frame fails there as it should."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, locale="en-US")
    context.set_default_timeout(60_000)
    opened = context.new_page()
    opened.goto(coding_site.url)
    yield opened
    context.close()


def preview(page: Any, text: str) -> Any:
    """Asks for a block, opens its preview, and gives the frame in which the code is."""
    ask(page, text)
    button(page, "Preview").last.click()
    return page.frame_locator(".preview iframe").last.frame_locator("iframe")


def test_code_runs_on_a_click_alone(page: Any) -> None:
    ask(page, "a page")
    page.wait_for_timeout(300)
    assert len(page.frames) == 1
    button(page, "Preview").click()
    inside = page.frame_locator(".preview iframe").frame_locator("iframe")
    inside.get_by_text("2", exact=True).wait_for()
    assert page.locator(".preview iframe").get_attribute("sandbox") == "allow-scripts"
    button(page, "Preview").click()
    page.locator(".preview").wait_for(state="detached")
    assert len(page.frames) == 1


def test_links_lead_within_the_code(page: Any) -> None:
    inside = preview(page, "links")
    inside.get_by_text("down").click()
    inside.get_by_text("at #place").wait_for()
    inside.get_by_text("away").click()
    inside.get_by_text("own", exact=True).click()
    inside.get_by_text("handled").wait_for()


def test_a_form_is_heard_of_and_sent_nowhere(page: Any) -> None:
    inside = preview(page, "a form")
    inside.get_by_label("Name").press("Enter")
    page.wait_for_timeout(100)
    assert inside.locator("#said").inner_text() == ""  # the field is empty, and has to be filled
    inside.get_by_label("Name").fill("Ada")
    inside.get_by_label("Name").press("Enter")
    inside.get_by_text("Ada by Add").wait_for()


def test_what_has_a_preview(page: Any) -> None:
    preview(page, "a picture").locator("svg circle").wait_for()
    preview(page, "some xml").locator("svg circle").wait_for()
    for text in ("other xml", "python"):
        ask(page, text)
        assert page.locator(".answer").last.get_by_role("button", name="Preview").count() == 0


def test_it_reaches_neither_the_page_nor_what_is_kept(page: Any) -> None:
    said = preview(page, "reach").locator("#said")
    said.filter(has_text="peers").wait_for()
    assert said.inner_text() == (
        "parent SecurityError, top SecurityError, local SecurityError, session SecurityError, cookie SecurityError, "
        "database SecurityError, peers ReferenceError"
    )
    assert ask(page, "a page")  # the page is where it was


@pytest.mark.parametrize("scheme", few(["light", "dark"], "light"))
def test_axe_finds_nothing(page: Any, axe: str, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    preview(page, "a page").get_by_text("2", exact=True).wait_for()
    page.locator(".answer").get_by_role("button", name="Answer again").hover()
    page.locator(".tip").wait_for()
    assert findings(page, axe) == []


@pytest.mark.parametrize("half", [0, 1])  # a page draws the last thirty messages
def test_nothing_gets_out(page: Any, outside: Outside, half: int) -> None:
    outside.asked.clear()
    names = list(ESCAPES)[half::2]
    for name in names:
        preview(page, name)
    page.wait_for_timeout(SETTLED)
    assert page.locator(".preview iframe").count() == len(names)
    assert outside.asked == []
    assert len(page.context.pages) == 1
    assert page.url.startswith(page.evaluate("location.origin"))


def knows_allowlists(browser: Any, outside: Outside) -> bool:
    """Whether the browser keeps a page elsewhere, with that header, from WebRTC."""
    outside.pages[ALLOWLISTED] = escape("rtc", outside)
    outside.asked.clear()
    context = browser.new_context()
    context.new_page().goto(outside.url + ALLOWLISTED)
    context.pages[0].wait_for_timeout(SETTLED)
    context.close()
    return outside.asked == []


@pytest.mark.parametrize("name", ["fetch", "rtc"])
def test_frames_inside_get_no_further(page: Any, browser: Any, outside: Outside, name: str) -> None:
    if name == "rtc" and not knows_allowlists(browser, outside):
        pytest.skip("this browser does not know Connection-Allowlist, which alone keeps frames inside from WebRTC")
    outside.asked.clear()
    ask(page, f"nested {name}")
    with contextlib.suppress(Exception):  # a browser may end a page where a connection was refused
        button(page, "Preview").click()
        page.wait_for_timeout(SETTLED)
    assert outside.asked == []


def test_each_of_them_gets_out_of_a_page_without_that(browser: Any, outside: Outside) -> None:
    context = browser.new_context()
    for name in ESCAPES:
        outside.pages[f"/page/{name}"] = escape(name, outside).replace(outside.url, f"{outside.url}/{name}")
    outside.asked.clear()
    for name in ESCAPES:
        context.new_page().goto(f"{outside.url}/page/{name}")
    context.pages[0].wait_for_timeout(SETTLED)
    reached = {asked.split("/")[1] if "/" in asked else "rtc" for asked in outside.asked}
    assert set(ESCAPES) - reached == set()
    context.close()
