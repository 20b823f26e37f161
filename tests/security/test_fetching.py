# SPDX-License-Identifier: MIT
"""Addresses in requests: nothing is fetched for a request, and a webhook goes where the operator allows, or nowhere."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import msgspec
import pytest

from candle_vllm.core.targets import ForbiddenTarget, allowed_target, is_allowed, parse_target, resolve
from candle_vllm.core.testing import ScriptedEngine
from candle_vllm.server.mailbox.options import WebhookOptions
from candle_vllm.server.mailbox.store import Record, Status
from candle_vllm.server.mailbox.webhook import Message, Outcome, Sender
from tests.security.guarded_server import Watch, chat_body, guarded

# What has been fetched by other servers: metadata services, local files, and spellings that two parsers read apart.
URLS = [
    "http://169.254.169.254/latest/meta-data/", "http://[fd00:ec2::254]/", "http://metadata.google.internal/",
    "http://127.0.0.1:1/", "http://localhost/", "http://0/", "http://0x7f000001/", "http://2130706433/",
    "http://example.com\\@127.0.0.1/", "http://127.0.0.1\\@example.com/", "http://evil@127.0.0.1/",
    "file:///etc/passwd", "gopher://127.0.0.1:25/x", "ftp://127.0.0.1/x", "//127.0.0.1/x", "/etc/passwd",
    "https://evil.example/x.png", "dict://127.0.0.1:11211/stats", "data:image/png;base64,iVBORw0KGgo=",
    "data:application/x-pickle;base64,gASVIAAAAAAAAAA=", "data:,x", "jar:http://x!/y", "",
]  # fmt: skip
# A JPEG with 65535 x 65535 pixels, and a PNG that says the same: a decoder that looked at them would take gigabytes.
HUGE_JPEG = "data:image/jpeg;base64,/9j/4AAQSkZJRgABAQAAAQABAAD/wAARCP///wMBIgACEQEDEQH/2Q=="
HUGE_PNG = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUv////////8IBgAAAA=="


def openai_parts(url: str) -> list[dict[str, Any]]:
    """The parts of messages in which addresses or media have stood."""
    return [
        {"type": "image_url", "image_url": {"url": url, "detail": "high"}},
        {"type": "image_url", "image_url": url},
        {"type": "input_image", "image_url": url},
        {"type": "image_base64", "image_base64": url},
        {"type": "input_audio", "input_audio": {"data": url, "format": "wav"}},
        {"type": "audio_url", "audio_url": {"url": url}},
        {"type": "video_url", "video_url": {"url": url}},
        {"type": "file", "file": {"file_data": url, "filename": "x.pdf"}},
        {"type": "file", "file": {"file_id": url}},
        {"type": "input_file", "file_url": url},
        {"type": "image", "image": url},
        {"type": "image_embeds", "image_embeds": url},
        {"type": "audio_embeds", "audio_embeds": url},
        {"type": "text", "text": "a", "image_url": {"url": url}},
    ]


def anthropic_blocks(url: str) -> list[dict[str, Any]]:
    """The same in Anthropic's words."""
    return [
        {"type": "image", "source": {"type": "url", "url": url}},
        {"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": url.partition(",")[2]}},
        {"type": "image", "source": {"type": "file", "file_id": url}},
        {"type": "document", "source": {"type": "url", "url": url}},
        {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "JVBERi0="}},
        {"type": "container_upload", "file_id": url},
        {"type": "web_fetch_tool_result", "tool_use_id": "a", "content": {"type": "web_fetch_result", "url": url}},
    ]


def other_requests(url: str) -> list[tuple[str, dict[str, Any]]]:
    """Addresses in other routes, and in fields that name files or servers."""
    return [
        ("/v1/embeddings", {"model": "default", "input": [{"type": "image_url", "image_url": {"url": url}}]}),
        ("/v1/embeddings", {"model": "default", "messages": [{"role": "user", "content": openai_parts(url)[:1]}]}),
        ("/v1/rerank", {"model": "default", "query": "a", "documents": [{"text": "a", "image": url}]}),
        ("/v1/score", {"model": "default", "text_1": {"content": openai_parts(url)[:1]}, "text_2": "a"}),
        ("/tokenize", {"model": "default", "messages": [{"role": "user", "content": openai_parts(url)[:1]}]}),
        ("/v1/chat/completions", chat_body(mm_processor_kwargs={"url": url})),
        ("/v1/chat/completions", chat_body(media_io_kwargs={"video": {"url": url}})),
        ("/v1/chat/completions", chat_body(web_search_options={"url": url})),
        ("/v1/chat/completions", chat_body(file_url=url)),
        ("/v1/chat/completions", chat_body(tools=[{"type": "mcp", "server_url": url, "server_label": "x"}])),
        ("/v1/chat/completions", chat_body(kv_transfer_params={"remote_host": url, "remote_port": 1})),
        ("/v1/messages", chat_body(mcp_servers=[{"type": "url", "url": url, "name": "x"}])),
        ("/v1/completions", {"model": "default", "prompt": {"url": url}}),
    ]


@pytest.mark.parametrize("sees", [False, True])
def test_ssrf_in_media_fetch(sees: bool, network: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """CVE-2025-6242, CVE-2026-24779, CVE-2026-34753, CVE-2026-33626, CVE-2026-0599: an address in a request was
    fetched. Here each is refused by name, and nothing is looked up, connected to or opened for it."""
    opened: list[str] = []
    really = open

    def noted(name: Any, *arguments: Any, **options: Any) -> Any:
        opened.append(str(name))
        return really(name, *arguments, **options)

    monkeypatch.setattr("builtins.open", noted)
    engine = ScriptedEngine(sees=sees)
    with guarded(engine) as server, server.http() as client:
        for url in URLS:
            asked = [
                ("/v1/chat/completions", chat_body(messages=[{"role": "user", "content": [part]}]))
                for part in openai_parts(url)
            ]
            asked += [
                ("/v1/messages", chat_body(messages=[{"role": "user", "content": [block]}]))
                for block in anthropic_blocks(url)
            ]
            for path, body in asked + other_requests(url):
                answer = client.post(path, json=body)
                assert answer.status_code == 400, (path, body, answer.text)
                assert answer.json()["error"]["message"]
    assert engine.requests == []
    assert network.outgoing == []
    assert not any("passwd" in name for name in opened)


@pytest.mark.parametrize("sees", [False, True])
def test_media_parsing(sees: bool) -> None:
    """CVE-2026-22778, CVE-2026-5497, CVE-2026-22773, CVE-2026-34755: images were decoded, with the decoder's faults.
    Here only models that see decode any, sizes are looked at before pixels are, and errors hold no address of memory.
    """
    engine = ScriptedEngine(sees=sees)
    with guarded(engine) as server, server.http() as client:
        for url in (HUGE_JPEG, HUGE_PNG, "data:image/png;base64,AAAA", "data:video/jpeg;base64,/9j/4A==,/9j/4A=="):
            for part in openai_parts(url):
                answer = client.post(
                    "/v1/chat/completions", json=chat_body(messages=[{"role": "user", "content": [part]}])
                )
                assert answer.status_code == 400
                assert " at 0x" not in answer.text
                assert "object at" not in answer.text
            for block in anthropic_blocks(url):
                answer = client.post("/v1/messages", json=chat_body(messages=[{"role": "user", "content": [block]}]))
                assert answer.status_code == 400
                assert " at 0x" not in answer.text
    assert engine.requests == []


def test_media_libraries_are_no_dependencies() -> None:
    """CVE-2026-22778: what is not imported cannot be attacked. Pillow is asked in one room, for one format by name."""
    from tests.security.test_code_from_files import SOURCES

    for path in SOURCES:
        text, pillow = path.read_text("utf-8"), () if "/core/vision/" in path.as_posix() else ("PIL",)
        assert "PIL" not in text or "Image.open(" not in text or "formats=(file.format,)" in text, path
        for library in (*pillow, "cv2", "torchvision", "librosa", "soundfile", "av", "imageio", "requests", "aiohttp"):
            assert f"import {library}\n" not in text, path
            assert f"from {library} import" not in text, path
            assert f"from {library}." not in text, path


# ---- webhooks --------------------------------------------------------------------------------------------------------

ALLOWED = ("hooks.example", "*.partner.example", "127.0.0.1")
NOT_A_TARGET = [
    "http://2130706433/", "http://0x7f000001/", "http://0x7f.1/", "http://0177.0.0.1/", "http://017700000001/",
    "http://127.1/", "http://127.0.1/", "http://0/", "http://0.0.0.0/", "http://127.0.0.1.nip.example/",
    "http://hooks.example@127.0.0.1/", "http://hooks.example:80@evil.example/", "http://hooks.example&@evil.example/",
    "http://evil.example\\@hooks.example/", "http://hooks.example\\@evil.example/",
    "http://hooks.example\\.evil.example/",
    "http://hooks.example%2eevil.example/", "http://hooks.example#@evil.example/",
    "http://evil.example#.partner.example/", "http://hooks.example.evil.example/", "http://evilhooks.example/",
    "http://partner.example/", "http://evil-partner.example/", "http://hooks.example./", "http://hooks.example:22/",
    "http://[::ffff:127.0.0.1]/", "http://[::ffff:7f00:1]/", "http://[64:ff9b::7f00:1]/", "http://[2002:7f00:1::]/",
    "http://[::127.0.0.1]/", "http://[::]/", "http://[::1]/", "http://[fe80::1]/", "http://[fe80::1%25eth0]/",
    "http://[fd00:ec2::254]/", "http://169.254.169.254/", "http://168.63.129.16/", "http://100.100.100.200/",
    "file:///etc/passwd", "ftp://hooks.example/", "gopher://hooks.example/", "unix:///run/docker.sock",
    "http:hooks.example", "http:///hooks.example", "https:/\\hooks.example", "http://hooks.example\r\nHost: evil/",
    "http://hooks.example\t.evil.example/", "http://hooks.exa\u00admple/", "http://ⓗooks.example/",
    "http://hooks。example/",
]  # fmt: skip


def _allowed(url: str) -> bool:
    try:
        allowed_target(url, ("hooks.example", "*.partner.example"), False)
    except ForbiddenTarget:
        return False
    return True


def test_ssrf_by_webhook_url() -> None:
    """CVE-2026-24779 (two parsers that disagree on a backslash) and its kin: one parser, and what is odd is refused."""
    assert _allowed("https://hooks.example/x?y=@z") is True
    assert _allowed("http://a.partner.example/") is True
    behind = allowed_target("http://hooks.example?@evil.example/", ("hooks.example",), False)
    assert (behind.host, behind.url.host) == ("hooks.example", "hooks.example")
    for url in NOT_A_TARGET:
        assert _allowed(url) is False, url


INSIDE = [
    "127.0.0.1", "127.255.255.254", "0.0.0.0", "10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.1.1",
    "169.254.169.254", "100.64.0.1", "100.100.100.200", "192.0.0.192", "198.18.0.1", "224.0.0.1", "240.0.0.1",
    "255.255.255.255", "168.63.129.16", "::", "::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1",
    "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::", "2002:a9fe:a9fe::", "2001::1",
    "fe80::1", "fe80::1%eth0", "fec0::1", "fc00::1", "fd00:ec2::254", "ff02::1", "100::1", "2001:db8::1", "3fff::1",
]  # fmt: skip


class Resolver:
    """A name server of our own: each question gets the next answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> None:
        self.answers = list(answers)
        self.asked = 0
        really = socket.getaddrinfo

        def look_up(host: Any, port: Any, *arguments: Any, **options: Any) -> Any:
            if host not in ("hooks.example", b"hooks.example"):
                return really(host, port, *arguments, **options)
            addresses = self.answers[min(self.asked, len(self.answers) - 1)]
            self.asked += 1
            kind = socket.SOCK_STREAM
            return [(socket.AF_INET6 if ":" in a else socket.AF_INET, kind, 6, "", (a, port)) for a in addresses]

        monkeypatch.setattr(socket, "getaddrinfo", look_up)


async def test_ssrf_by_webhook_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """CVE-2025-6242, CVE-2026-34753: an allowed name that leads inside is refused, in every form of the address, also
    where one address of several is public."""
    target = allowed_target("http://hooks.example/", ("hooks.example",), False)
    with ThreadPoolExecutor(1) as threads:
        for address in INSIDE:
            assert is_allowed(address, False) is False, address
            for answers in ([address], ["93.184.216.34", address], [address, "93.184.216.34"]):
                Resolver(monkeypatch, answers)
                with pytest.raises(ForbiddenTarget):
                    await resolve(target, threads)
        Resolver(monkeypatch, ["93.184.216.34"])
        assert list(await resolve(target, threads)) == ["93.184.216.34"]


@pytest.fixture
def inside() -> Iterator[list[str]]:
    """A server inside, and what it was asked; its address stands first."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            self.send_response(302)
            self.send_header("Location", asked[0] + "redirected")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        asked.append(f"http://127.0.0.1:{server.server_port}/")
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield asked
        server.shutdown()
        thread.join()


async def _push(url: str, patterns: tuple[str, ...], private: bool) -> Outcome:
    record = Record(request_id="r", model="m", created=1, status=Status.COMPLETED, response=msgspec.Raw(b"{}"))
    sender = Sender(WebhookOptions(timeout_secs=60.0))
    try:
        async with asyncio.timeout(120):
            return (await sender.send(Message(record, "d", allowed_target(url, patterns, private)))).outcome
    finally:
        await sender.close()


async def test_ssrf_by_dns_rebinding(monkeypatch: pytest.MonkeyPatch, inside: list[str]) -> None:
    """The name is public when it is checked and leads inside when it is connected to: it is asked for once, and the
    address that was checked is the one that is used."""
    port = inside[0].rsplit(":", 1)[1].strip("/")
    resolver = Resolver(monkeypatch, ["127.0.0.1"], ["93.184.216.34"])
    assert await _push(f"http://hooks.example:{port}/", (f"hooks.example:{port}",), False) is Outcome.FORBIDDEN
    assert (resolver.asked, inside[1:]) == (1, [])
    resolver = Resolver(monkeypatch, ["192.0.2.1"], ["127.0.0.1"])  # TEST-NET: refused as well
    assert await _push(f"http://hooks.example:{port}/", (f"hooks.example:{port}",), False) is Outcome.FORBIDDEN
    assert (resolver.asked, inside[1:]) == (1, [])
    # Where the operator allows private addresses, the name is still asked for once alone.
    resolver = Resolver(monkeypatch, ["127.0.0.1"], ["10.255.255.1"])
    assert await _push(f"http://hooks.example:{port}/hook", (f"hooks.example:{port}",), True) is Outcome.REFUSED
    assert (resolver.asked, inside[1:]) == (1, ["/hook"])


async def test_ssrf_by_redirect(monkeypatch: pytest.MonkeyPatch, inside: list[str]) -> None:
    """LMDeploy's CVE-2026-33626 followed redirects inside: an answer with a Location ends the push."""
    host = inside[0].removeprefix("http://").strip("/")
    assert await _push(inside[0] + "hook", (host,), True) is Outcome.REFUSED
    assert inside[1:] == ["/hook"]


async def test_ssrf_by_environment(monkeypatch: pytest.MonkeyPatch, inside: list[str]) -> None:
    """A proxy in the environment would look the name up again, behind the check."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, inside[0])
    Resolver(monkeypatch, ["127.0.0.1"])
    assert await _push("http://hooks.example/hook", ("hooks.example",), False) is Outcome.FORBIDDEN
    assert inside[1:] == []


def test_the_operators_own_webhook_is_not_checked() -> None:
    """The operator is trusted: a webhook of the settings may be inside, and no request can become one."""
    assert parse_target("http://127.0.0.1:8080/hook").trusted is True
    assert allowed_target("http://hooks.example/", ALLOWED, True).trusted is False
