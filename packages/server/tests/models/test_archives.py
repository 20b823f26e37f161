# SPDX-License-Identifier: MIT
"""Models in tar archives: names, ranges, what broke off, hostile archives."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import os
import tarfile
import threading
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from candle_vllm.core.errors import HubUnreachableError, InvalidFileError, ModelNotFoundError
from candle_vllm.server.adapters import fetching
from candle_vllm.server.models import archives
from candle_vllm.server.models.archives import MARKER, Archive, fetch_archive, model_at, unpack
from candle_vllm.server.reloading import warn_of_missing
from candle_vllm.server.settings import Settings
from candle_vllm.server.settings.catalogue import Catalogue, ModelEntry, source_name
from candle_vllm.server.settings.derived import engine_config
from tests.waiting import wait_for

WEIGHTS = os.urandom(300_000)


def tar_of(*members: tuple[str, bytes] | tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            head = tarfile.TarInfo(member[0])
            head.size = len(member[1])
            tar.addfile(head, io.BytesIO(member[1]))
    return buffer.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    head = tarfile.TarInfo(name)
    head.type, head.linkname = kind, target
    return head


MODEL = tar_of(("config.json", b"{}"), ("model.safetensors", WEIGHTS))


class Place(http.server.ThreadingHTTPServer):
    """A server of one archive, which counts what it sent, and may break off."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content, self.ranges, self.tells, self.version = MODEL, True, True, '"1"'
        self.sent = self.moved = 0
        self.asked: list[str] = []
        self.breaks: Callable[[str], bool] = lambda asked: False

    @property
    def url(self) -> str:
        return self.at("tiny/model.tar")

    def at(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/models/{path}?signature=1"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Place

    def do_GET(self) -> None:
        place, asked = self.server, self.headers.get("range", "")
        place.asked.append(asked)
        if place.breaks(asked):
            self.send_error(503)
            return
        content, whole = place.content, len(place.content)
        if place.ranges and asked:
            first, last = map(int, asked.removeprefix("bytes=").split("-"))
            first, last = (each + (last > 0) * place.moved for each in (first, last))
            content = content[first : last + 1]
            self.send_response(206)
            self.send_header("content-range", f"bytes {first}-{last}/{whole}")
        else:
            self.send_response(200)
        if place.tells:
            self.send_header("content-length", str(len(content)))
        self.send_header("etag", place.version)
        self.end_headers()
        self.wfile.write(content)
        place.sent += len(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setattr(archives, "_PIECE", 32 << 10)
    monkeypatch.setattr(archives.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Place() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("https://weights.example/a/llama/model.tar", "llama"),
        ("https://weights.example/a/qwen.tar.gz?x=1", "qwen"),
        ("https://weights.example/a/b%20c.tgz", "b_c"),
        ("/srv/big.tar", "big"),
        ("https://weights.example/model.tar", "model"),
        ("https://weights.example/a/tiny.Q4_0.gguf?x=1", "tiny.Q4_0"),
    ],
)
def test_names(address: str, name: str) -> None:
    archive = Archive.of(address)
    assert archive is not None
    assert archive.name == name


def test_what_is_no_archive() -> None:
    assert Archive.of("Qwen/Qwen3-0.6B") is None
    assert Archive.of("/srv/models/tiny") is None
    with pytest.raises(InvalidFileError, match="must have 64 hexadecimal digits, not 'abc'"):
        Archive.of("https://weights.example/a.tar#sha256=abc")
    with pytest.raises(InvalidFileError, match="64 hexadecimal digits"):  # as of a variable that is not set
        Archive.of("https://weights.example/a.tar#sha256=")
    with pytest.raises(InvalidFileError, match="is not a valid address"):
        Archive.of("https://[weights.example/a.tar")


@pytest.mark.parametrize("ranges", [True, False])
def test_fetched_once(ranges: bool, place: Place, tmp_path: Path) -> None:
    place.ranges = ranges
    archive = Archive.of(f"{place.url}#sha256={hashlib.sha256(MODEL).hexdigest()}")
    assert archive is not None
    folder = fetch_archive(archive, tmp_path / "checkpoints")
    assert folder == tmp_path / "checkpoints" / "tiny"
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert "signature" not in (folder / MARKER).read_text()
    assert len(place.asked) == (1 + -(-len(MODEL) // (32 << 10)) if ranges else 1)
    place.asked.clear()
    assert fetch_archive(archive, tmp_path / "checkpoints") == folder
    assert place.asked == []
    assert {path.name for path in folder.parent.iterdir()} == {"tiny", ".tiny.lock"}


@pytest.mark.parametrize("ranges", [True, False])
def test_a_drip_is_left_and_what_came_is_kept(
    ranges: bool, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.ranges = ranges
    with monkeypatch.context() as patched:
        patched.setattr(fetching, "_BEGINNING", -1.0)
        patched.setattr(fetching, "_SLOWEST", 1 << 50)
        with pytest.raises(
            ModelNotFoundError, match=r"cannot be downloaded \(ReadTimeout\): the part that arrived is kept"
        ):
            fetch_archive(Archive(place.url), tmp_path)
    assert (fetch_archive(Archive(place.url), tmp_path) / "model.safetensors").read_bytes() == WEIGHTS


def test_an_endless_answer_does_not_fill_the_disk(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.ranges = place.tells = False
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=2 * len(MODEL) - 2))
    with pytest.raises(ModelNotFoundError, match="takes more than half of the free disk"):
        fetch_archive(Archive(place.url), tmp_path)


def test_goes_on_where_it_broke_off(place: Place, tmp_path: Path) -> None:
    archive, journal = Archive(place.url), tmp_path / ".tiny.partial.pieces"

    def breaks(asked: str) -> bool:
        if not asked.startswith(f"bytes={5 * (32 << 10)}-"):
            return False
        wait_for(lambda: journal.read_bytes().count(b"\1") == len(MODEL) // (32 << 10))  # all others have come
        return True

    place.breaks = breaks
    with pytest.raises(HubUnreachableError, match="answered 503"):
        fetch_archive(archive, tmp_path)
    assert not (tmp_path / "tiny").exists()
    before = place.sent
    place.breaks = lambda asked: False
    assert (fetch_archive(archive, tmp_path) / "model.safetensors").read_bytes() == WEIGHTS
    assert 0 < place.sent - before < len(MODEL) // 2  # what had come was not asked for again


def test_a_file_that_takes_less_than_it_is_given(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Thin(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(bytes(data)[: max(1, len(data) // 2)])

    opened = Path.open

    def thinly(path: Path, mode: str = "r", *given: Any, **named: Any) -> Any:
        return (
            Thin(path, "r+")
            if path.name.endswith(".partial") and mode == "r+b"
            else opened(path, mode, *given, **named)
        )

    monkeypatch.setattr(Path, "open", thinly)
    assert (fetch_archive(Archive(place.url), tmp_path) / "model.safetensors").read_bytes() == WEIGHTS


def test_a_server_that_sends_another_range(place: Place, tmp_path: Path) -> None:
    place.moved = 1
    with pytest.raises(ModelNotFoundError, match="sent other bytes than were requested"):
        fetch_archive(Archive(place.url), tmp_path)


def test_another_version_begins_anew(place: Place, tmp_path: Path) -> None:
    place.breaks = lambda asked: asked.startswith(f"bytes={5 * (32 << 10)}-")
    with pytest.raises(ModelNotFoundError):
        fetch_archive(Archive(place.url), tmp_path)
    place.breaks, place.version = lambda asked: False, '"2"'
    place.content = tar_of(("config.json", b"{}"), ("model.safetensors", WEIGHTS[::-1]))
    assert (fetch_archive(Archive(place.url), tmp_path) / "model.safetensors").read_bytes() == WEIGHTS[::-1]


def test_many_ask_and_one_fetches(place: Place, tmp_path: Path) -> None:
    found = list[Path]()
    threads = [
        threading.Thread(target=lambda: found.append(fetch_archive(Archive(place.url), tmp_path))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "tiny"] * 4
    assert place.sent == len(MODEL) + 1


def test_a_wrong_sum_leaves_nothing(place: Place, tmp_path: Path) -> None:
    with pytest.raises(InvalidFileError, match=f"has the SHA-256 {hashlib.sha256(MODEL).hexdigest()}, not 0000"):
        fetch_archive(Archive(place.url, "0" * 64), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".tiny.lock"]


def test_two_of_one_name_are_two_models(place: Place, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    one = tmp_path / "there" / "tiny.tar"
    one.write_bytes(tar_of(("deep/config.json", b"1")))
    assert fetch_archive(Archive(str(one)), tmp_path) == tmp_path / "tiny" / "deep"
    other = fetch_archive(Archive(place.url), tmp_path)
    assert other.name.startswith("tiny-")
    assert (other / "model.safetensors").exists()
    assert fetch_archive(Archive(str(one)), tmp_path) == tmp_path / "tiny" / "deep"


def test_a_folder_of_somebody_else_is_left_alone(place: Place, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "model.safetensors").write_bytes(b"half")
    with pytest.raises(InvalidFileError, match="remove the folder, or name it as the model"):
        fetch_archive(Archive(place.url), tmp_path)
    assert place.asked == []


def test_links_within_are_files(tmp_path: Path) -> None:
    links = special("a/link", tarfile.SYMTYPE, "../b"), special("b", tarfile.LNKTYPE, "config.json")
    path = tmp_path / "m.tar.gz"
    path.write_bytes(gzip.compress(tar_of(*links, ("config.json", b"{}"))))
    (tmp_path / "out").mkdir()
    unpack(path, tmp_path / "out")
    assert (tmp_path / "out" / "a" / "link").read_bytes() == b"{}"
    assert not (tmp_path / "out" / "a" / "link").is_symlink()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (tar_of(("/etc/passwd", b"")), "a path outside the archive"),
        (tar_of(("a/../../b", b"")), "a path outside the archive"),
        (tar_of(("a\\..\\..\\b", b"")), "a path outside the archive"),
        (tar_of(special("a", tarfile.SYMTYPE, "/etc/passwd")), "a link to '/etc/passwd', which is no file of it"),
        (tar_of(special("a", tarfile.SYMTYPE, ".."), ("a/b", b"")), "a link to '..', which is no file of it"),
        (tar_of(special("a", tarfile.LNKTYPE, "../x")), "which is no file of it"),
        (tar_of(special("a", tarfile.SYMTYPE, "b"), special("b", tarfile.SYMTYPE, "a")), "which is no file of it"),
        (tar_of(("a/" * 32 + "b", b"")), "more than 32 folders deep"),
        (tar_of(special("a", tarfile.CHRTYPE)), "no plain file"),
        (tar_of(special("a", tarfile.FIFOTYPE)), "no plain file"),
        (tar_of(("a", b"1"), ("a", b"2")), "has 'a' twice"),
        (tar_of(("a", b"1"), ("a/b", b"2")), "has .a. twice"),
        (tar_of(("a", b"1"), ("b", b"2"), special("b", tarfile.LNKTYPE, "a")), "has 'b' twice"),
        (MODEL[:100_000], "cannot be unpacked"),
        (gzip.compress(bytes(64 << 20), 9), "unpacks to far more than it may|cannot be unpacked"),
        (gzip.compress(MODEL)[:-100], "cannot be unpacked"),
        (b"nothing", "cannot be unpacked"),
        (tar_of(("readme", b"")), "holds no folders with a config.json"),
        (tar_of(("a/config.json", b""), ("b/config.json", b"")), "holds 2 folders"),
    ],
)
def test_hostile_archives(content: bytes, said: str, tmp_path: Path) -> None:
    path, root = tmp_path / "m.tar", tmp_path / "root"
    path.write_bytes(content)
    with pytest.raises(InvalidFileError, match=said):
        fetch_archive(Archive(str(path)), root)
    assert [each.name for each in root.iterdir()] == [".m.lock"]
    assert {each.name for each in tmp_path.iterdir()} == {"m.tar", "root"}


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(HubUnreachableError, match="cannot be downloaded"):
        fetch_archive(Archive("http://127.0.0.1:9/a/model.tar"), tmp_path)


# ---- an operator's address -------------------------------------------------------------------------------------------


def test_a_gguf_file_is_fetched_once_and_found_without_writing(
    place: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place.content = b"GGUF" + WEIGHTS
    with pytest.raises(ModelNotFoundError, match="and nothing is fetched: leave out --offline"):
        model_at(place.at("tiny.gguf"), tmp_path, offline=True)
    folder = model_at(place.at("tiny.gguf"), tmp_path)
    assert folder == tmp_path / "archives" / "tiny"
    assert (folder / "tiny.gguf").read_bytes() == place.content
    assert "without encryption and without #sha256=" in caplog.text
    assert "signature" not in caplog.text
    place.asked.clear()
    (folder.parent / ".tiny.lock").unlink()
    assert model_at(place.at("tiny.gguf"), tmp_path, offline=True) == folder
    assert (place.asked, [path.name for path in folder.parent.iterdir()]) == ([], ["tiny"])


@pytest.mark.parametrize(
    ("address", "content", "said"),
    [
        ("tiny.gguf", b"<html>", "the downloaded file tiny.gguf is not a GGUF file"),
        ("tiny-00001-of-00002.gguf", b"GGUF", "one file of a split model"),
        ("model.tar", b"GGUF", "cannot be unpacked"),
    ],
)
def test_what_is_no_model(address: str, content: bytes, said: str, place: Place, tmp_path: Path) -> None:
    place.content = content
    with pytest.raises(InvalidFileError, match=said):
        model_at(place.at(address), tmp_path)
    assert not any(path.is_dir() for path in (tmp_path / "archives").iterdir())


def test_addresses_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelNotFoundError, match=r"'ftp://weights.example/a.tar' is not the address of a model"):
        model_at("ftp://user:secret@weights.example/a.tar", tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ModelNotFoundError, match=r"cannot be stored in .*: Not a directory"):
        model_at("https://weights.example/a.tar", tmp_path / "file")

    def to_plain(request: httpx.Request) -> httpx.Response:
        assert request.url.scheme == "https"
        return httpx.Response(302, headers={"location": "http://weights.example/b.tar"})

    monkeypatch.setattr(httpx, "Client", partial(httpx.Client, transport=httpx.MockTransport(to_plain)))
    with pytest.raises(ModelNotFoundError, match="redirects to an address without encryption"):
        model_at("https://weights.example/a.tar", tmp_path)


def test_a_server_calls_it_as_its_file_is_called() -> None:
    assert source_name(Settings(model="https://me:secret@weights.example/llama/model.tar?key=1"), None) == "llama"


def test_only_a_load_fetches(place: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither what is told of a model to clients, nor what the settings are, is a reason to."""
    settings = Settings(model=place.at("tiny.gguf"), download_dir=tmp_path)
    assert engine_config(settings, fetch=False).model == place.at("tiny.gguf").partition("?")[0]
    with pytest.raises(ModelNotFoundError, match="nothing is fetched"):
        engine_config(settings, offline=True)
    warn_of_missing(Catalogue([ModelEntry("tiny", Settings(model=place.at("tiny.gguf").partition("?")[0]))]))
    assert (place.asked, caplog.text) == ([], "")
    place.content = b"GGUF" + WEIGHTS
    kept = str(tmp_path / "archives" / "tiny")
    assert engine_config(settings).model == engine_config(settings, fetch=False).model == kept
