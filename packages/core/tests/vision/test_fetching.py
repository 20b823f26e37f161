# SPDX-License-Identifier: MIT
"""Images from elsewhere: what is fetched, what is refused, and that nothing of it leads inside. The server stands on
loopback, which is reached because its address is listed."""

from __future__ import annotations

import asyncio
import base64
import gc
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from candle_vllm.core import LLM, InferenceEngine, SamplingParams, targets
from candle_vllm.core.errors import (
    ConfigError,
    EngineOverloadedError,
    InvalidParameterError,
    UnsupportedParameterError,
)
from candle_vllm.core.vision import fetching
from candle_vllm.core.vision.fetching import ImageAddress, ImageSources
from packages.core.tests.toy_sight import write_toy_sight
from tests.waiting import PATIENCE, until

BODY = b"bytes of an image"


class Site:
    """An HTTP server that answers each path as it is told, and notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.answers: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {"/a.png": sends(BODY)}
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.asked.append((self.path, dict(self.headers)))
                with_answer = site.answers.get(self.path.partition("?")[0], lambda one: one.send_error(404))
                try:
                    with_answer(self)
                except OSError:
                    self.close_connection = True  # who asked has gone

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port
        self.host = f"127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def url(self, path: str = "/a.png", host: str | None = None) -> str:
        return f"http://{host or '127.0.0.1'}:{self.port}{path}"


def sends(body: bytes, status: int = 200, **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(one: BaseHTTPRequestHandler) -> None:
        one.send_response(status)
        for name, value in {"content_length": str(len(body)), **headers}.items():
            one.send_header(name.replace("_", "-"), value)
        one.end_headers()
        one.wfile.write(body)

    return answer


def moved(to: str) -> Callable[[BaseHTTPRequestHandler], None]:
    return sends(b"", 302, location=to)


def dripping(one: BaseHTTPRequestHandler) -> None:
    one.send_response(200)
    one.end_headers()
    while True:
        one.wfile.write(b"x")
        time.sleep(0.02)


def endless(one: BaseHTTPRequestHandler) -> None:
    one.send_response(200)
    one.end_headers()
    while True:
        one.wfile.write(bytes(1 << 20))


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site()
    yield made
    made.server.shutdown()
    made.server.server_close()


async def had(sources: ImageSources, *urls: str) -> list[bytes]:
    images = [sources.begin(ImageAddress(url, path=f"p{place}")) for place, url in enumerate(urls)]
    async with sources.had(images) as files:
        return list(files)


async def refused(sources: ImageSources, url: str) -> str:
    with pytest.raises(InvalidParameterError) as caught:
        await had(sources, url)
    assert str(caught.value).startswith("p0: ")
    assert caught.value.param == "p0"
    return str(caught.value)


def resolver(monkeypatch: pytest.MonkeyPatch, **names: Sequence[str]) -> list[str]:
    """Names of `.example` and what they come to mean, one after the other; what was asked."""
    asked: list[str] = []
    left = {f"{name}.example": list(answers) for name, answers in names.items()}
    really = targets.look_up

    def look_up(host: str, port: int) -> list[str]:
        if host not in left:
            return really(host, port)
        asked.append(host)
        return [left[host].pop(0) if len(left[host]) > 1 else left[host][0]]

    monkeypatch.setattr(targets, "look_up", look_up)
    return asked


async def test_what_is_listed_is_fetched_once(site: Site) -> None:
    counted: list[str] = []
    sources = ImageSources([site.host], count=counted.append)
    url = site.url("/a.png?signature=1")
    assert await had(sources, url, "data:;base64,QUJD", url) == [BODY, b"ABC", BODY]
    ((path, headers),) = list(site.asked)
    assert path == "/a.png?signature=1"
    assert headers["Host"] == site.host
    await refused(sources, "http://evil.example/")
    await refused(sources, site.url("/nothing"))
    assert counted == ["fetched", "refused", "failed"]
    assert not {"Cookie", "Authorization", "Referer"} & set(headers)


async def test_nothing_is_fetched_unless_it_is_listed(site: Site) -> None:
    for sources in (ImageSources(), ImageSources(folder=Path("/"))):
        with pytest.raises(UnsupportedParameterError, match=r"p0: images are not fetched .*--allowed-media-domains"):
            await had(sources, site.url())
    for domains in (["a.example"], ["127.0.0.1"], ["127.0.0.1:1"], ["*.a.example"]):
        assert "does not allow" in await refused(ImageSources(domains), site.url())
    with pytest.raises(UnsupportedParameterError, match="--allowed-local-media-path"):
        await had(ImageSources([site.host]), "file:///etc/passwd")
    assert site.asked == []


@pytest.mark.parametrize(
    "url",
    [
        "http://me:secret@{0}/a.png", "http://me@{0}/a.png", "http://{0}\\@evil.example/", "http://{0}#@evil.example/",
        "http://evil.example@{0}/", "http://{0}/\r\nX: y", "http://{0}/" + "x" * 8192, "HTTP://\u24e7.example/",
    ],
)  # fmt: skip
async def test_addresses_that_are_refused_as_they_are_written(url: str, site: Site) -> None:
    said = await refused(ImageSources([site.host, "evil.example", "x.example"]), url.format(site.host))
    assert "secret" not in said
    assert site.asked == []


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.0.0.1", "192.168.0.1", "172.16.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "240.0.0.1", "::1", "fe80::1", "fc00::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "64:ff9b::7f00:1",
        "2002:7f00:1::",
    ],
)  # fmt: skip
async def test_a_listed_name_that_leads_inside(address: str, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    resolver(monkeypatch, pics=[address])
    said = await refused(ImageSources([f"pics.example:{site.port}"]), site.url(host="pics.example"))
    assert said == ("p0: the image could not be fetched from pics.example: it has an address that may not be reached")
    assert site.asked == []


async def test_addresses_of_metadata_are_refused_though_they_are_listed() -> None:
    for host in ("169.254.169.254", "[fd00:ec2::254]", "168.63.129.16", "[::ffff:169.254.169.254]"):
        assert "may not be reached" in await refused(ImageSources([host]), f"http://{host}/")


async def test_dns_rebinding(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is asked for once, and the connection goes to what was checked, not to what it means next."""
    asked = resolver(monkeypatch, pics=["192.0.2.1", "127.0.0.1"])
    monkeypatch.setattr(targets, "is_allowed", lambda address, private: address == "192.0.2.1")
    monkeypatch.setattr(fetching, "SECONDS", 0.5)
    connected: list[Any] = []
    really = asyncio.get_running_loop().sock_connect

    async def connect(one: socket.socket, address: Any) -> None:
        connected.append(address[0])
        await really(one, address)

    monkeypatch.setattr(asyncio.get_running_loop(), "sock_connect", connect)
    said = await refused(ImageSources([f"pics.example:{site.port}"]), site.url(host="pics.example"))
    assert "pics.example: it " in said
    assert asked == ["pics.example"]
    assert connected == ["192.0.2.1"]
    assert site.asked == []


async def test_the_name_goes_into_the_request(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    resolver(monkeypatch, pics=["127.0.0.1"])
    monkeypatch.setattr(targets, "is_allowed", lambda address, private: True)
    host = f"pics.example:{site.port}"
    assert await had(ImageSources([host]), f"http://{host}/a.png") == [BODY]
    assert site.asked[0][1]["Host"] == host


async def test_redirects_are_checked_as_the_first_address_is(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = resolver(monkeypatch, inside=["127.0.0.1"])
    site.answers["/near"] = moved("/a.png")
    site.answers["/round"] = moved("/round")
    site.answers["/inside"] = moved(f"http://inside.example:{site.port}/a.png")
    site.answers["/metadata"] = moved("http://169.254.169.254/latest/")
    site.answers["/file"] = moved("file:///etc/passwd")
    site.answers["/me"] = moved(f"http://me:pw@{site.host}/a.png")
    site.answers["/odd"] = moved("http://[")
    sources = ImageSources([site.host, f"inside.example:{site.port}"])
    assert await had(sources, site.url("/near")) == [BODY]
    for path, why in (
        ("/round", "redirected more than 3 times"), ("/inside", "may not be reached"), ("/metadata", "does not allow"),
        ("/file", "must begin with https"), ("/me", "no user name"), ("/odd", "redirected"),
    ):  # fmt: skip
        said = await refused(sources, site.url(path))
        assert why in said, said
    assert asked == ["inside.example"]
    assert [path for path, _ in site.asked].count("/round") == 4
    assert [path for path, _ in site.asked].count("/a.png") == 1


async def test_a_proxy_of_the_environment_is_not_asked(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert await had(ImageSources([site.host]), site.url()) == [BODY]


async def test_a_slow_drip_ends_in_time(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.answers["/slow"] = dripping
    monkeypatch.setattr(fetching, "SECONDS", 0.3)
    assert "127.0.0.1: it did not arrive within 0.3 seconds" in await refused(
        ImageSources([site.host]), site.url("/slow")
    )


async def test_an_endless_body_ends_at_the_limit(site: Site) -> None:
    site.answers["/endless"] = endless
    site.answers["/said"] = sends(b"", content_length=str(1 << 40))
    site.answers["/zipped"] = sends(BODY, content_encoding="gzip")
    sources = ImageSources([site.host])
    assert "127.0.0.1 has more than 20 MB, the most" in await refused(sources, site.url("/endless"))
    assert "has more than 20 MB" in await refused(sources, site.url("/said"))
    assert "compressed" in await refused(sources, site.url("/zipped"))
    assert not sources._held


async def test_a_request_and_all_of_them_are_bounded(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = ImageSources([site.host])
    site.answers["/b.png"] = sends(BODY)
    monkeypatch.setattr(fetching, "MAX_REQUEST_BYTES", len(BODY) + 5)
    with pytest.raises(InvalidParameterError, match="in all"):
        await had(sources, site.url(), site.url("/b.png"))
    monkeypatch.setattr(fetching, "MAX_HELD_BYTES", len(BODY) + 5)
    async with sources.had([ImageAddress(site.url())]):
        with pytest.raises(EngineOverloadedError, match="try again later"):
            await had(sources, site.url("/b.png"))
    assert await had(sources, site.url("/b.png")) == [BODY]


async def test_files_that_came_with_a_request_count_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = ImageSources()
    monkeypatch.setattr(fetching, "MAX_HELD_BYTES", 2 * len(BODY))
    async with sources.had([BODY, BODY, BODY]) as files:  # one request alone may have more
        assert files == [BODY] * 3
        with pytest.raises(EngineOverloadedError, match="try again later"):
            async with sources.had([BODY]):
                pass
    assert not files  # work of a request that is over has none of them
    assert not sources._held


async def test_one_asker_has_half_of_the_files_and_of_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    asker = ["alice"]
    sources = ImageSources(who=lambda: asker[0])
    monkeypatch.setattr(fetching, "MAX_HELD_BYTES", 4 * len(BODY))
    monkeypatch.setattr(fetching, "MAX_PREPARED_BYTES", 40)

    def image(size: int) -> Any:
        return type("Image", (), {"tiles": b"x" * size})()

    async with sources.had([BODY]):
        sources.keep([first := image(15)])
        async with sources.had([BODY]):
            with pytest.raises(EngineOverloadedError, match="try again later"):
                async with sources.had([BODY]):
                    pass
            with pytest.raises(EngineOverloadedError, match="try again later"):
                sources.keep([image(15)])
            asker[0] = "bob"
            sources.keep([second := image(20)])
            async with sources.had([BODY]):
                pass
    del first, second
    gc.collect()
    assert not sources._held
    assert not sources._prepared


async def test_slow_addresses_of_one_asker_leave_connections_to_others() -> None:
    turns, taken = fetching._Turns(), list[str]()
    may_go = asyncio.Event()

    async def fetch(who: str) -> None:
        async with turns.of(who):
            taken.append(who)
            if who == "alice":
                await may_go.wait()

    alice = [asyncio.create_task(fetch("alice")) for _ in range(3 * fetching.AT_ONCE)]
    async with asyncio.timeout(PATIENCE):
        await until(lambda: len(taken) == fetching.AT_ONCE // 2)
        await fetch("bob")
    assert taken.count("alice") == fetching.AT_ONCE // 2
    may_go.set()
    await asyncio.gather(*alice)


async def test_few_are_fetched_at_a_time(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    running = most = 0
    lock = threading.Lock()

    def counted(one: BaseHTTPRequestHandler) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.05)
        with lock:
            running -= 1
        sends(BODY)(one)

    urls = [site.url(f"/{number}") for number in range(6)]
    site.answers.update({f"/{number}": counted for number in range(6)})
    monkeypatch.setattr(fetching, "AT_ONCE", 2)
    assert await had(ImageSources([site.host]), *urls) == [BODY] * 6
    assert 1 <= most <= 2


@pytest.mark.parametrize("status", [204, 304, 401, 404, 500])
async def test_what_a_host_answers_instead_is_said(status: int, site: Site) -> None:
    site.answers["/x"] = sends(b"", status)
    assert await refused(ImageSources([site.host]), site.url("/x?token=1")) == (
        f"p0: the image could not be fetched from 127.0.0.1: it answered {status}"
    )


async def test_a_host_that_is_not_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        host = f"127.0.0.1:{taken.getsockname()[1]}"
        assert "could not be reached (ConnectError)" in await refused(ImageSources([host]), f"http://{host}/")


async def test_a_request_that_ends_fetches_no_more(site: Site) -> None:
    site.answers["/slow"] = dripping
    sources = ImageSources([site.host])
    asked = asyncio.create_task(had(sources, site.url("/slow")))
    await until(lambda: site.asked)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert not sources._held


async def test_files_below_the_folder_are_read(tmp_path: Path) -> None:
    folder, outside = tmp_path / "media", tmp_path / "secret.png"
    (folder / "in").mkdir(parents=True)
    (folder / "in" / "a b.png").write_bytes(BODY)
    outside.write_bytes(b"secret")
    (folder / "link.png").symlink_to(outside)
    (folder / "up").symlink_to(tmp_path)
    (folder / "near.png").symlink_to(folder / "in" / "a b.png")
    (folder / "round").symlink_to(folder / "round")
    os.mkfifo(folder / "pipe")
    (tmp_path / "media2").mkdir()
    (tmp_path / "media2" / "a.png").write_bytes(b"other")
    sources = ImageSources(folder=folder)
    assert await had(sources, f"file://{folder}/in/a%20b.png", f"file://localhost{folder}/near.png") == [BODY] * 2
    nothing = "p0: there is no file of this name below the folder whose files this server reads"
    for path in (
        f"{folder}/../secret.png", f"{folder}/%2e%2e/secret.png", f"{folder}/link.png", f"{folder}/up/secret.png",
        str(outside), "/etc/passwd", f"{folder}/nothing", f"{folder}/in", f"{folder}/pipe", f"{folder}/round",
        f"{tmp_path}/media2/a.png", "/dev/zero", "/proc/self/environ",
    ):  # fmt: skip
        assert await refused(sources, f"file://{path}") == nothing, path
    for url in (
        "file:relative.png",
        "file://host/a.png",
        f"file://{folder}/a?x",
        "file:///%00",
        "file:///%ff",
        "file:////h/a",
    ):
        assert (await refused(sources, url)).startswith("p0: "), url
    (folder / "large").write_bytes(b"")
    os.truncate(folder / "large", (20 << 20) + 1)
    assert "more than 20 MB" in await refused(sources, f"file://{folder}/large")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="lists the process's open files")
async def test_what_is_not_read_is_closed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    os.mkfifo(tmp_path / "pipe")
    sources = ImageSources(folder=tmp_path)
    for name in ("in", "pipe"):
        await refused(sources, f"file://{tmp_path}/{name}")
    opened = [os.path.realpath(each) for each in Path("/proc/self/fd").iterdir()]
    assert [each for each in opened if each.startswith(str(tmp_path))] == []  # others come and go meanwhile


async def test_a_folder_that_becomes_a_link_while_a_file_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, found = tmp_path / "media", Path.resolve
    for place in (folder / "in", tmp_path / "secret"):
        place.mkdir(parents=True)
        (place / "a.png").write_bytes(place.name.encode())
    sources = ImageSources(folder=folder)

    def then_swapped(path: Path, strict: bool = False) -> Path:
        resolved = found(path, strict)
        (folder / "in").rename(tmp_path / "was")
        (folder / "in").symlink_to(tmp_path / "secret")
        return resolved

    monkeypatch.setattr(Path, "resolve", then_swapped)
    assert "there is no file of this name" in await refused(sources, f"file://{folder}/in/a.png")


async def test_a_file_that_is_read_for_a_request_that_is_over_is_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(BODY)
    sources, open_it = ImageSources(folder=tmp_path), fetching._opened_below
    begun, over, read = threading.Event(), threading.Event(), threading.Event()

    def slowly(*given: Path) -> int:
        begun.set()
        over.wait(60)
        read.set()
        return open_it(*given)

    monkeypatch.setattr(fetching, "_opened_below", slowly)
    asked = asyncio.create_task(had(sources, f"file://{tmp_path}/a.png"))
    await asyncio.to_thread(begun.wait, 60)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    over.set()
    await asyncio.to_thread(sources._threads.shutdown)
    assert read.is_set()
    assert not sources._held


async def test_kept_files_are_of_who_asks() -> None:
    async def stored(file_id: str, path: str) -> bytes:
        if file_id != "file-1":
            raise InvalidParameterError(f"{path}: no file {file_id}", path)
        return BODY

    keeping: Callable[[str, str], Awaitable[bytes]] = stored
    sources = ImageSources(stored=keeping)
    async with sources.had([sources.begin(ImageAddress("file-1", path="p0", stored=True))]) as files:
        assert files == [BODY]
    with pytest.raises(InvalidParameterError, match="no file file-2"):
        async with sources.had([ImageAddress("file-2", path="p0", stored=True)]):
            pass
    with pytest.raises(UnsupportedParameterError, match="this server stores no files"):
        ImageSources().begin(ImageAddress("file-1", path="p0", stored=True))


async def test_who_has_no_event_loop_is_served_as_well(site: Site, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(BODY[:5])
    sources = ImageSources([site.host], tmp_path)
    wanted = [ImageAddress(site.url()), ImageAddress(f"file://{tmp_path}/a.png"), ImageAddress("data:;base64,QUJD")]
    assert sources.files_now(wanted) == await sources.files(wanted) == [BODY, BODY[:5], b"ABC"]
    with pytest.raises(InvalidParameterError, match="image: the address names a host"):
        sources.files_now([ImageAddress("https://evil.example/")])
    assert not sources._held


def test_settings_that_are_none(tmp_path: Path) -> None:
    for domain in ("http://a.example", "*", "A.example", "a.example/x", ""):
        with pytest.raises(ConfigError, match="allowed_media_domains"):
            ImageSources([domain])
    with pytest.raises(ConfigError, match="allowed_local_media_path"):
        ImageSources(folder=tmp_path / "nothing")


# ---- conversations of the library ------------------------------------------------------------------------------------


async def test_chat_takes_pictures_from_where_they_may_come(site: Site, tmp_path: Path) -> None:
    model = write_toy_sight(tmp_path / "model")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    file = (tmp_path / "a.png").read_bytes()
    site.answers |= {"/a.png": sends(file), "/moved": moved("/a.png"), "/inside": moved("http://10.0.0.1/a.png")}
    params = SamplingParams(max_tokens=6, temperature=0)

    def asks(part: Any) -> list[Any]:
        return [{"role": "user", "content": [part, {"type": "text", "text": "What is this?"}]}]

    def at(url: str) -> list[Any]:
        return asks({"type": "image_url", "image_url": {"url": url}})

    data = at(f"data:;base64,{base64.b64encode(file).decode()}")
    allowed: dict[str, Any] = {"allowed_media_domains": site.host, "allowed_local_media_path": tmp_path}
    with InferenceEngine(model, threads=1, kv_cache_memory=16 << 20, **allowed) as engine:
        text = engine.chat(data, params).text
        elsewhere = [at(site.url()), at(f"file://{tmp_path}/a.png"), asks({"type": "image", "url": site.url("/moved")})]
        conversations = [*elsewhere, asks({"type": "image_pil", "image_pil": Image.fromarray(pixels)})]
        assert [each.text for each in engine.chat(conversations, params, use_tqdm=False)] == [text] * 4
        assert LLM(engine).chat(elsewhere[0], params, use_tqdm=False)[0].outputs[0].text == text
        assert "".join(piece.text for piece in engine.chat_stream(elsewhere[0], params)) == text
        assert (await engine.achat(elsewhere[1], params)).text == text
        with pytest.raises(InvalidParameterError, match=r"messages\[0\]\.content\[0\]: .* await engine\.fetch_images"):
            engine.achat_stream(elsewhere[0], params)
        messages = await engine.fetch_images(elsewhere[0])
        assert "".join([piece.text async for piece in engine.achat_stream(messages, params)]) == text
        for url in ("https://evil.example/", site.url("/inside"), site.url(host="localhost"), "file:///etc/passwd"):
            with pytest.raises(InvalidParameterError, match=r"^messages\[1\]\[0\]\.content\[0\]: ") as caught:
                engine.chat([data, at(url)], params, use_tqdm=False)
            assert "10.0.0.1" not in str(caught.value)
    with (
        InferenceEngine(model, threads=1, kv_cache_memory=16 << 20) as engine,
        pytest.raises(UnsupportedParameterError, match="in the library with allowed_media_domains"),
    ):
        engine.chat(at(site.url()), params)
    with pytest.raises(ConfigError, match="allowed_local_media_path is no folder"):
        InferenceEngine(model, allowed_local_media_path=tmp_path / "nothing")
