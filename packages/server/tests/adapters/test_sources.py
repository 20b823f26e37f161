# SPDX-License-Identifier: MIT
"""Where adapters come from: names that lead nowhere else, allow-lists, pinned revisions, faults, and the cache."""

from __future__ import annotations

import contextlib
import errno
import gzip
import json
import os
import shutil
import socket
import tarfile
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import httpx
import huggingface_hub
import pytest
from huggingface_hub import constants

from candle_vllm.server.adapters import archives, fetching
from candle_vllm.server.adapters.archives import MAX_MEMBERS, TarSource, unpack
from candle_vllm.server.adapters.disk_cache import DiskCache, Key
from candle_vllm.server.adapters.hub import HubSource
from candle_vllm.server.adapters.resolvers import BucketSource, read_source
from candle_vllm.server.adapters.sources import (
    AdapterName,
    Budget,
    Found,
    Limits,
    LocalSource,
    Refused,
    Room,
    Source,
    Unavailable,
    read_name,
)
from candle_vllm.server.settings import Settings
from candle_vllm.server.settings.options import UsageError
from packages.server.tests.adapters.adapter_fakes import CONFIG, WEIGHTS, Store, archive, config, files, member, whole
from packages.server.tests.fake_hub import COMMIT
from tests.waiting import PATIENCE

HOSTILE = (
    "../x", "/etc", "a/../b", "a//b", "a/", "", ".", "..", ".hidden", "a/.git", "a\\b", "a\0b", "a b", "a\nb", "~root",
    "a%2e%2e", "C:x", "a/b/c/d/e/f/g/h/i", "x" * 300, "ä", "a?b", "a#b", "x@", "x@../y", "@v1", "x@v1@v2", "a..b",
)  # fmt: skip


@pytest.fixture
def cache(tmp_path: Path) -> DiskCache:
    return DiskCache(tmp_path / "cache", 1 << 20)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with Store() as store:
        yield store


def write(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    for name, content in files(**changes).items():
        (folder / name).write_bytes(content)
    return folder


def named(text: str) -> AdapterName:
    name = read_name(text)
    assert name is not None
    return name


def had(source: Source, name: AdapterName) -> Found | None:
    """What a source has, fetched where need be."""
    found = source.find(name)
    return found if found is None or isinstance(found, Found) else found()


def kept(folder: Path) -> tuple[int, int]:
    """How many adapters a cache has, and their bytes."""
    whole = [path / "adapter" for path in folder.iterdir() if not path.name.startswith(".")] if folder.exists() else []
    return len(whole), sum(file.stat().st_size for path in whole for file in path.iterdir())


# ---- names and the local folder --------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_text_is_no_name(text: str) -> None:
    assert read_name(text) is None


def test_a_name_may_have_folders_and_a_revision() -> None:
    assert read_name("acme/tone") == AdapterName("acme/tone")
    assert read_name("tone@v1.2/x") == AdapterName("tone", "v1.2/x")


def test_the_local_folder_has_what_is_in_it_and_nothing_else(tmp_path: Path) -> None:
    outside, root = write(tmp_path / "outside"), tmp_path / "root"
    write(root / "a" / "b_c")
    write(root / "linked_files").joinpath(WEIGHTS).unlink()
    (root / "linked_files" / WEIGHTS).symlink_to(outside / WEIGHTS)
    (root / "out").symlink_to(outside)
    (root / "circle").symlink_to(root / "circle")
    (root / "plain").mkdir()
    (root / "small.gguf").write_bytes(b"GGUF")
    source = LocalSource(root, Limits())
    found = had(source, named("a/b_c"))
    assert found is not None
    assert (found.path, found.root, found.base) == (root / "a" / "b_c", "a/b_c", "acme/base")
    gguf = had(source, named("small"))
    assert gguf is not None
    assert gguf.path == root / "small.gguf"
    others = "a_b/c a out linked_files circle circle/x plain a/b_c/adapter_config.json none"
    for other in others.split():
        assert had(source, named(other)) is None, other
    write(root / "wide", r=4000)
    write(root / "large")
    os.truncate(root / "large" / CONFIG, 1 << 30)
    listed = source.names()
    assert listed == ("a/b_c", "small")  # each of them, and nothing that is refused when it is named
    assert all(had(source, named(name)) for name in listed)


def test_a_folder_that_the_server_may_not_read_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a")
    write(tmp_path / "lost")

    def read(path: Path) -> bool:
        if "lost" in path.parts:
            raise PermissionError(path)
        return os.path.isfile(path)

    monkeypatch.setattr(Path, "is_file", read)
    assert LocalSource(tmp_path, Limits()).names() == ("a",)


def test_a_version_is_a_folder_below_the_name(tmp_path: Path) -> None:
    write(tmp_path / "tone" / "v1")
    write(tmp_path / "tone" / "v2")
    source = LocalSource(tmp_path, Limits())
    found = had(source, named("tone@v2"))
    assert found is not None
    assert (found.path, found.revision) == (tmp_path / "tone" / "v2", "v2")
    assert had(source, named("tone")) is None
    assert source.names() == ("tone/v1", "tone/v2")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, "'IA3'"), ({"r": 0}, "r is 0"), ({"r": -5}, "r is -5"), ({"r": 64}, "ranks up to 16"),
        ({"r": True}, "r is True"), ({"r": "8"}, "r is '8'"), ({"base_model_name_or_path": 3}, "path is 3"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"), ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"base_model_name_or_path": "other/base"}, "acme/*"), ({"base_model_name_or_path": None}, "acme/*"),
    ],
)  # fmt: skip
def test_what_a_configuration_cannot_have_is_named(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    write(tmp_path / "x", **changes)
    with pytest.raises(Refused, match=said.replace("*", r"\*")):
        had(LocalSource(tmp_path, Limits(max_rank=16, bases=("acme/*",))), named("x"))


def test_a_configuration_of_a_gigabyte_is_not_read(tmp_path: Path) -> None:
    write(tmp_path / "x")
    os.truncate(tmp_path / "x" / CONFIG, 1 << 30)
    with pytest.raises(Refused, match="more than 1 MiB"):
        had(LocalSource(tmp_path, Limits()), named("x"))


# ---- Hugging Face ----------------------------------------------------------------------------------------------------


def hub(cache: DiskCache, pattern: str = "acme/*", limits: Limits | None = None, **settings: Any) -> HubSource:
    return HubSource(pattern, Settings(**settings), cache, limits or Limits())


def test_a_repository_is_pinned_to_its_commit_and_fetched_once(fake_hub: Any, cache: DiskCache) -> None:
    fake_hub.repos["acme/tone"] = {**files(), "adapter_model.bin": b"pickle", "README.md": b"x"}
    fake_hub.repos["acme/many"] = {f"sub/{name}": content for name, content in files().items()}
    found = had(hub(cache), named("acme/tone"))
    assert found is not None
    assert (found.revision, found.root, found.base) == (COMMIT, f"acme/tone@{COMMIT}", "acme/base")
    assert {path.name: path.read_bytes() for path in found.path.iterdir()} == files()
    assert [name for name, _ in fake_hub.asked] == [CONFIG, WEIGHTS]
    assert had(hub(cache), named(f"acme/tone@{COMMIT}")) == found
    assert len(fake_hub.asked) == 2
    assert had(hub(cache, offline=True), named("acme/tone@main")) == found
    below = had(hub(cache), named("acme/many/sub"))
    assert below is not None
    assert had(hub(cache), named("acme/many")) is None


def test_nothing_outside_the_pattern_is_asked_for(cache: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: pytest.fail("the hub was asked"))
    for name in ("other/tone", "acmex/tone", "tone", "a_b/c", "acme"):
        assert had(hub(cache), named(name)) is None
        assert had(hub(cache, "acme/tone"), named("acme/tone2")) is None


@pytest.mark.parametrize("revision", ["refs/pr/1", "refs/heads/main", "pr/1"])
def test_what_is_proposed_to_a_repository_is_not_of_it(
    revision: str, cache: DiskCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: pytest.fail("the hub was asked"))
    assert had(hub(cache), named(f"acme/tone@{revision}")) is None
    assert had(hub(cache, "acme/tone"), named(f"acme/tone@{revision}")) is None


PROPOSED, OLD, TAGGED = "b" * 40, "c" * 40, "d" * 40


def test_a_commit_that_was_proposed_to_a_repository_is_not_of_it(fake_hub: Any, cache: DiskCache) -> None:
    """The hub has it under the repository's name all the same; only `hf` alone takes whatever there is."""
    fake_hub.repos["acme/tone"] = files()
    fake_hub.branches["acme/tone"] = {"v2": [TAGGED], "main": [COMMIT, "e" * 40, OLD]}
    fake_hub.commits |= {("acme/tone", commit): commit for commit in (PROPOSED, OLD, TAGGED)}
    fake_hub.commits["acme/tone", PROPOSED[:8]] = PROPOSED
    for revision in (PROPOSED, PROPOSED[:8]):
        assert had(hub(cache), named(f"acme/tone@{revision}")) is None
    assert had(hub(cache, "*"), named(f"acme/tone@{PROPOSED}")) is not None
    assert had(hub(cache), named(f"acme/tone@{PROPOSED}")) is None, "nor is it out of the cache"
    assert had(hub(cache, offline=True, pattern="*"), named(f"acme/tone@{PROPOSED}")) is not None
    for commit in (COMMIT, OLD, TAGGED):
        found = had(hub(cache), named(f"acme/tone@{commit}"))
        assert found is not None
        assert found.revision == commit


def test_a_hub_that_does_not_say_whose_a_commit_is_is_not_believed(fake_hub: Any, cache: DiskCache) -> None:
    fake_hub.repos["acme/tone"] = files()
    fake_hub.branches["acme/tone"] = {"main": [COMMIT] * 3, "gone": []}  # of which nothing can be told
    fake_hub.commits["acme/tone", OLD] = OLD
    with pytest.raises(Unavailable, match="does not report the branches of"):
        had(hub(cache), named(f"acme/tone@{OLD}"))
    told = AdapterName("acme/tone", OLD, told=True)  # by the hub itself, when the name was resolved
    found = had(hub(cache), told)
    assert found is not None
    assert found.revision == OLD


def test_a_base_that_is_taken_no_more_is_not_taken_out_of_the_cache(fake_hub: Any, cache: DiskCache) -> None:
    fake_hub.repos["acme/tone"] = files()
    assert had(hub(cache), named("acme/tone")) is not None
    for name in ("acme/tone", f"acme/tone@{COMMIT}"):
        with pytest.raises(Refused, match="accepts adapters of other"):
            had(hub(cache, limits=Limits(bases=("other",))), named(name))


def test_names_that_differ_in_case_are_one_and_a_repository_that_moved_is_none(
    fake_hub: Any, cache: DiskCache, tmp_path: Path
) -> None:
    fake_hub.repos |= {"acme/tone": files(), "other/tone": files()}
    fake_hub.moved = {"acme/Tone": "acme/tone", "acme/gone": "other/tone"}
    found = had(hub(cache), named("acme/Tone"))
    assert found is not None
    assert found.root == f"acme/tone@{COMMIT}"
    assert had(hub(cache), named("acme/tone")) == found
    assert had(hub(cache, offline=True), named("acme/Tone")) == found
    assert kept(tmp_path / "cache")[0] == 1
    assert had(hub(cache), named("acme/gone")) is None


def test_what_cannot_be_is_refused_before_the_weights_come(fake_hub: Any, cache: DiskCache, tmp_path: Path) -> None:
    fake_hub.repos["acme/wide"] = files(r=512)
    with pytest.raises(Refused, match="r is 512"):
        had(hub(cache), named("acme/wide"))
    assert [name for name, _ in fake_hub.asked] == [CONFIG]
    fake_hub.repos["acme/pickle"] = {CONFIG: config(), "adapter_model.bin": b"x"}
    with pytest.raises(Refused, match="a pickle"):
        had(hub(cache), named("acme/pickle"))
    fake_hub.repos["acme/large"] = files(b"x" * 5000)
    with pytest.raises(Refused, match="the most that this server fetches"):
        had(hub(cache, limits=Limits(max_bytes=4000)), named("acme/large"))
    assert kept(tmp_path / "cache") == (0, 0)


def test_a_fault_leaves_nothing_and_the_next_time_is_whole(fake_hub: Any, cache: DiskCache, tmp_path: Path) -> None:
    fake_hub.repos["acme/tone"] = files(b"x" * 1000)
    fake_hub.sums["acme/tone", WEIGHTS] = "0" * 64
    with pytest.raises(Unavailable, match="does not match Hugging Face's checksum"):
        had(hub(cache), named("acme/tone"))
    assert list((tmp_path / "cache").iterdir()) == []
    del fake_hub.sums["acme/tone", WEIGHTS]
    assert had(hub(cache), named("acme/tone")) is not None
    with pytest.raises(Unavailable, match="longer than 0 seconds"):
        had(hub(cache, limits=Limits(seconds=0)), named("acme/other"))


def test_what_is_in_the_cache_is_found_without_the_hub(fake_hub: Any, cache: DiskCache) -> None:
    fake_hub.repos["acme/tone"] = files()
    found = had(hub(cache), named("acme/tone"))
    assert had(hub(cache, offline=True), named("acme/tone")) == found
    assert had(hub(cache, offline=True), named(f"acme/tone@{COMMIT}")) == found
    with pytest.raises(Unavailable, match="--offline"):
        had(hub(cache, offline=True), named("acme/other"))
    with pytest.raises(Unavailable, match="--offline"):
        had(hub(cache, offline=True), named("acme/tone@" + "b" * 40))
    fake_hub.stop()
    huggingface_hub.close_session()  # its connections are still answered
    assert had(hub(cache), named("acme/tone")) == found
    with pytest.raises(Unavailable, match="Hugging Face cannot be reached"):
        had(hub(cache), named("acme/other"))


# ---- peers that hang -------------------------------------------------------------------------------------------------

HEAD = b'HTTP/1.1 200 OK\r\nlast-modified: Wed, 21 Oct 2026 07:28:00 GMT\r\netag: "x"\r\ncontent-length: 100000\r\n'
OBJECT = HEAD + b"x-whole: yes\r\n\r\n"
AWS = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "key", "AWS_REGION": "us-east-1"}


class Dripping:
    """Answers requests on loopback: with some bytes and then one more, again and again, or with a whole answer."""

    def __init__(self, answers: dict[str, bytes]) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._answers = answers
        self._over = threading.Event()
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._listen, daemon=True)]
        self._threads[0].start()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                thread = threading.Thread(target=self._drip, args=(self._listener.accept()[0],), daemon=True)
                thread.start()
                self._threads.append(thread)

    def _drip(self, end: socket.socket) -> None:
        with end, contextlib.suppress(OSError):
            asked = end.recv(1 << 16).decode().partition("\r\n")[0]
            answer = next(answer for part, answer in self._answers.items() if part in asked)
            end.sendall(answer)
            while b"x-whole" not in answer and not self._over.wait(0.02):
                end.sendall(b"x")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()  # another listener may get its file descriptor


def said(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nx-whole: yes\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)


SUM = said(b"0" * 64)
INFO = said(
    json.dumps({"id": "acme/tone", "sha": COMMIT, "siblings": [{"rfilename": CONFIG}, {"rfilename": WEIGHTS}]}).encode()
)


@pytest.mark.parametrize("kind", ["tar", "hub", "bucket"])
@pytest.mark.parametrize("piece", [HEAD, HEAD + b"\r\n"], ids=["head", "body"])
@pytest.mark.parametrize("step", ["look", "fetch"])
def test_a_peer_that_drips_is_left_when_the_time_is_over(
    kind: str, piece: bytes, step: str, cache: DiskCache, monkeypatch: pytest.MonkeyPatch, fake_hub: Any, tmp_path: Path
) -> None:
    """And with it the place of the look or the fetch is free: each byte would begin another ten seconds."""
    first = {"tar": (".sha256 ", SUM), "hub": ("/api/", INFO), "bucket": ("HEAD ", OBJECT)}[kind]
    if (kind, step) == ("bucket", "look"):
        piece = HEAD  # the answer to a look has no body
    answers = {"": piece} if step == "look" else {first[0]: first[1], "": piece}
    limits = Limits(seconds=0.3)
    with Dripping(answers) as peer:
        monkeypatch.setattr(constants, "ENDPOINT", peer.url)
        # As on the first day of a machine, in a process that imported huggingface_hub before candle_vllm.server.
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
        monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(tmp_path / "harnesses.json"))
        monkeypatch.setattr("huggingface_hub.utils._detect_agent._registry", None)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", peer.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        source: Source = TarSource(peer.url + "/{name}.tar", cache, limits)
        if kind == "hub":
            source = hub(cache, limits=limits)
        if kind == "bucket":
            pytest.importorskip("obstore")
            for name, value in AWS.items():
                monkeypatch.setenv(name, value)
            monkeypatch.setenv("AWS_ENDPOINT_URL", peer.url)
            source = BucketSource("bucket", cache, limits)
        with pytest.raises(Unavailable, match=r"longer than 0\.3 seconds"):
            had(source, named("acme/tone"))


def test_a_large_file_may_take_hours_and_a_drip_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(fetching, "time", types.SimpleNamespace(monotonic=lambda: now[0]))

    def pieces(size: int, seconds: float) -> Iterator[bytes]:
        for _ in range(5000):
            now[0] += seconds
            yield bytes(size)

    assert sum(map(len, fetching.steadily(pieces(8192, 4.0)))) == 5000 * 8192
    now[0] = 0.0
    with pytest.raises(httpx.ReadTimeout):
        list(fetching.steadily(pieces(1, 9.0)))
    assert now[0] < 2 * fetching._BEGINNING


def test_of_a_refusal_of_the_hub_nothing_is_read(
    cache: DiskCache, monkeypatch: pytest.MonkeyPatch, fake_hub: Any
) -> None:
    refusal = b"HTTP/1.1 404 Not Found\r\nx-error-code: RepoNotFound\r\ncontent-length: 100000\r\n\r\n"
    with Dripping({"": refusal}) as peer:
        monkeypatch.setattr(constants, "ENDPOINT", peer.url)
        assert had(hub(cache, limits=Limits(seconds=PATIENCE)), named("acme/tone")) is None


def test_a_hub_that_sends_what_it_was_not_asked_for(
    cache: DiskCache, monkeypatch: pytest.MonkeyPatch, fake_hub: Any
) -> None:
    """Compressed answers, whose size nobody knows before they are unpacked, and endless ones."""
    for answer, match in (
        (
            b"HTTP/1.1 200 OK\r\nx-whole: yes\r\ncontent-encoding: gzip\r\n\r\n" + gzip.compress(bytes(1 << 20)),
            "compressed",
        ),
        (said(b" " * 200_000), "more than 0 MiB"),
    ):
        monkeypatch.setattr("candle_vllm.server.adapters.hub._MAX_TOLD", 100_000)
        with Dripping({"": answer}) as peer:
            monkeypatch.setattr(constants, "ENDPOINT", peer.url)
            with pytest.raises(Unavailable, match=match):
                had(hub(cache), named("acme/tone"))


# ---- archives --------------------------------------------------------------------------------------------------------


def test_an_archive_comes_with_its_sum(store: Store, cache: DiskCache) -> None:
    told = store.put_archive("/acme/tone.tar.gz", whole("tone/"))
    source = TarSource(store.url + "/{name}.tar.gz", cache, Limits())
    found = had(source, named("acme/tone"))
    assert found is not None
    assert (found.revision, found.base) == (told, "acme/base")
    assert {path.name: path.read_bytes() for path in found.path.iterdir()} == files()
    asked = len(store.asked)
    assert had(source, named("acme/tone")) == found
    assert had(source, named(f"acme/tone@{told}")) == found  # which is this one for ever: nobody is asked
    assert [path for _, path in store.asked[asked:]] == ["/acme/tone.tar.gz.sha256"]
    assert had(source, named("acme/tone@" + "0" * 64)) is None
    assert had(source, named("acme/tone@v1")) is None
    assert had(source, named("none")) is None


def test_an_address_may_have_a_query(store: Store, cache: DiskCache) -> None:
    store.put_archive("/x.tar", whole())
    assert had(TarSource(store.url + "/{name}.tar?key=1", cache, Limits()), named("x")) is not None


def test_the_log_has_neither_passwords_nor_signatures(store: Store, cache: DiskCache) -> None:
    address = store.url.replace("://", "://me:secret@") + "/{name}?sig=secret"
    source = TarSource(address, cache, Limits())
    store.files["/x.sha256"] = b"<html>"
    with pytest.raises(Unavailable, match="does not begin with a SHA-256") as told:
        had(source, named("x"))
    assert "secret" not in str(told.value)
    store.status = 500
    with pytest.raises(Unavailable, match=r"/x\.sha256 answered 500") as told:
        had(source, named("x"))
    assert "secret" not in str(told.value)


def test_an_archive_with_another_sum_or_none_is_not_unpacked(store: Store, cache: DiskCache, tmp_path: Path) -> None:
    store.put_archive("/x.tar", whole(zipped=False))
    source = TarSource(store.url + "/{name}.tar", cache, Limits())
    store.files["/x.tar"] += b"x"
    with pytest.raises(Unavailable, match="does not match its checksum"):  # it may be about to be another
        had(source, named("x"))
    for page in (b"<html>", b"<html>" * 10_000):
        store.files["/x.tar.sha256"] = page
        with pytest.raises(Unavailable, match="does not begin with a SHA-256"):
            had(source, named("x"))
    store.status = 302
    with pytest.raises(Unavailable, match="answered 302"):
        had(source, named("x"))
    assert ("GET", "/elsewhere") not in store.asked
    assert kept(tmp_path / "cache") == (0, 0)


def test_a_full_disk_is_no_fault_of_an_archive(store: Store, cache: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store.put_archive("/x.tar", whole())
    monkeypatch.setattr(archives, "write_all", full)
    with pytest.raises(Unavailable, match="cannot be stored in the cache: No space left"):
        had(TarSource(store.url + "/{name}.tar", cache, Limits()), named("x"))


ADAPTER = [member(name, content) for name, content in files().items()]
HOSTILE_ARCHIVES = {
    "up": ([member("../" + CONFIG, b"{}"), *ADAPTER], "outside the archive"),
    "absolute": ([member("/etc/passwd", b"x"), *ADAPTER], "outside the archive"),
    "link": ([member(WEIGHTS, kind=tarfile.SYMTYPE, linkname="/etc/passwd"), *ADAPTER], "no plain file"),
    "hard link": ([member(WEIGHTS, kind=tarfile.LNKTYPE, linkname="/etc/passwd"), *ADAPTER], "no plain file"),
    "device": ([member("null", kind=tarfile.CHRTYPE), *ADAPTER], "no plain file"),
    "pipe": ([member("pipe", kind=tarfile.FIFOTYPE), *ADAPTER], "no plain file"),
    "sparse": ([member("s", kind=tarfile.GNUTYPE_SPARSE), *ADAPTER], "no plain file|cannot be read"),
    "two": ([*ADAPTER, member("b/" + CONFIG, config())], "more than one"),
    "many": ([member(f"f{n}") for n in range(MAX_MEMBERS)] + ADAPTER, f"more than {MAX_MEMBERS} members"),
    "pickle": ([member("adapter_model.bin", b"x"), *ADAPTER], "a pickle"),
    "half": (ADAPTER[:1], "has no adapter_model"),
    "nothing": ([], "has no adapter_config"),
    "bomb": ([member("zeros", bytes(30 << 20)), *ADAPTER], "far more than it may"),
    "long name": ([member("x" * 100_000), *ADAPTER], "name or attributes of"),
    "wide": ([member(CONFIG, config(r=9999)), ADAPTER[1]], "r is 9999"),
    "long config": ([member(CONFIG, b" " * (2 << 20)), ADAPTER[1]], "more than 1 MiB"),
}


@pytest.mark.parametrize("kind", HOSTILE_ARCHIVES)
def test_a_hostile_archive_is_refused(kind: str, tmp_path: Path) -> None:
    members, said = HOSTILE_ARCHIVES[kind]
    path, out = tmp_path / "archive", tmp_path / "out"
    path.write_bytes(archive(*members))
    out.mkdir()
    with pytest.raises(Refused, match=said):
        unpack(path, out, Budget(Limits()))
    assert {file.name for file in out.iterdir()} <= {CONFIG, WEIGHTS}
    assert not any(file.is_symlink() for file in out.iterdir())


@pytest.mark.parametrize("cut", [0, 1, 100, 600, 1500])
def test_an_archive_that_is_cut_or_none_is_refused(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "archive"
    for content in (whole(zipped=False)[:cut], whole()[: min(cut, 200)], b"\x1f\x8b" + os.urandom(cut), b"x" * cut):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        out.mkdir()
        path.write_bytes(content)
        with pytest.raises(Refused):
            unpack(path, out, Budget(Limits()))


# ---- buckets ---------------------------------------------------------------------------------------------------------


def test_a_bucket_is_asked_for_two_files_by_name(
    store: Store, cache: DiskCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("obstore")
    for name, value in {
        "AWS_ENDPOINT_URL": store.url, "AWS_ALLOW_HTTP": "true", "AWS_ACCESS_KEY_ID": "key", "AWS_REGION": "x",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    store.files = {f"/bucket/below/acme/tone/{name}": content for name, content in files().items()}
    source = BucketSource("bucket/below", cache, Limits())
    found = had(source, named("acme/tone"))
    assert found is not None
    assert found.root.startswith("s3://bucket/below/acme/tone@")
    assert {path.name: path.read_bytes() for path in found.path.iterdir()} == files()
    asked = len(store.asked)
    assert had(source, named("acme/tone")) == found
    assert {method for method, _ in store.asked[asked:]} == {"HEAD"}
    assert had(source, named("none")) is None
    store.files[f"/bucket/below/acme/tone/{WEIGHTS}"] = b"others"
    other = had(source, named("acme/tone"))
    assert other is not None
    assert other.revision != found.revision
    store.files[f"/bucket/below/acme/tone/{WEIGHTS}"] = b"first"
    fetch = source.find(named("acme/tone"))
    store.files[f"/bucket/below/acme/tone/{WEIGHTS}"] = b"later"
    assert callable(fetch)
    with pytest.raises(Unavailable, match="was replaced while the adapter was fetched"):
        fetch()


# ---- the cache -------------------------------------------------------------------------------------------------------


def filled(size: int) -> Any:
    def fill(folder: Path, room: Room) -> None:
        room.take(size)
        (folder / WEIGHTS).write_bytes(b"x" * size)

    return fill


def test_the_least_used_makes_room_unless_it_is_in_use(cache: DiskCache, tmp_path: Path) -> None:
    keys = [Key("hf", f"acme/{n}", "r") for n in range(4)]
    paths = [cache.put(key, "", filled(300 << 10)) for key in keys[:3]]
    for place, when in zip(paths, (1, 2, 3), strict=True):
        os.utime(place.parent / "entry.json", (when, when))
    assert cache.find(keys[0]) is not None  # used now
    let_go = cache.hold(paths[1])
    cache.put(keys[3], "", filled(300 << 10))
    assert [cache.find(key) is not None for key in keys] == [True, True, False, True]
    with pytest.raises(Refused, match="--lora-cache-bytes"):
        cache.put(Key("hf", "acme/big", "r"), "", filled(2 << 20))
    with pytest.raises(Unavailable, match="adapters in use or being fetched"):
        cache.put(Key("hf", "acme/big", "r"), "", filled(800 << 10))
    assert [cache.find(key) is not None for key in keys] == [True, True, False, True]  # nothing went for it
    let_go()
    cache.put(Key("hf", "acme/big", "r"), "", filled(800 << 10))
    assert kept(tmp_path / "cache") == (1, 800 << 10)
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")] == []


def test_an_adapter_that_requests_use_was_not_used_least_recently(cache: DiskCache) -> None:
    keys = [Key("hf", f"acme/{n}", "r") for n in range(3)]
    paths = [cache.put(key, "", filled(400 << 10)) for key in keys[:2]]
    let_go = cache.hold(paths[0])
    for place, when in zip(paths, (1, 2), strict=True):
        os.utime(place.parent / "entry.json", (when, when))
    let_go()
    cache.put(keys[2], "", filled(400 << 10))
    assert [cache.find(key) is not None for key in keys] == [True, False, True]


def test_what_is_evicted_is_never_found_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, key = DiskCache(tmp_path / "cache", 1 << 20), Key("hf", "acme/tone", "r")
    path = cache.put(key, "", filled(600 << 10))

    def ends(*_: object, **__: object) -> None:
        """The server ends after the first file."""
        (path / WEIGHTS).unlink(missing_ok=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", ends)
        with pytest.raises(KeyboardInterrupt):
            cache.put(Key("hf", "acme/other", "r"), "", filled(600 << 10))
    cache = DiskCache(tmp_path / "cache", 2 << 20)
    assert cache.find(key) is None
    shutil.rmtree(cache.put(key, "", filled(3)))  # by somebody else
    assert cache.find(key) is None
    assert cache.put(key, "", filled(3)).is_dir()
    assert cache.find(key) is not None


def test_all_that_comes_at_once_stays_within_the_bound(tmp_path: Path) -> None:
    """Room is made before the bytes come, what has no room is refused, and what breaks off gives its room back."""
    cache = DiskCache(tmp_path / "cache", 100 << 10)
    old = cache.put(Key("hf", "acme/old", "r"), "", filled(30 << 10))
    held = cache.put(Key("hf", "acme/held", "r"), "", filled(10 << 10))
    let_go = cache.hold(held)
    seen = list[str]()

    def small(folder: Path, room: Room) -> None:
        with pytest.raises(Unavailable, match="being fetched"):
            room.expect(40 << 10)
        with pytest.raises(Refused, match="--lora-cache-bytes"):
            room.expect(101 << 10)
        room.take(20 << 10)
        (folder / WEIGHTS).write_bytes(bytes(20 << 10))
        seen.append("small")

    def large(folder: Path, room: Room) -> None:
        room.expect(65 << 10)
        assert not old.exists(), "it made room before anything came"
        assert held.exists()
        cache.put(Key("hf", "acme/small", "r"), "", small)
        seen.append("large")
        raise KeyError  # it breaks off

    with pytest.raises(KeyError):
        cache.put(Key("hf", "acme/large", "r"), "", large)
    assert seen == ["small", "large"]
    cache.put(Key("hf", "acme/other", "r"), "", filled(70 << 10))
    assert kept(tmp_path / "cache") == (3, 100 << 10)
    let_go()


def test_what_another_server_fetches_into_the_cache_counts(tmp_path: Path) -> None:
    one, other = DiskCache(tmp_path / "cache", 100 << 10), DiskCache(tmp_path / "cache", 100 << 10)

    def fill(folder: Path, room: Room) -> None:
        filled(60 << 10)(folder, room)
        with pytest.raises(Unavailable, match="being fetched"):
            other.put(Key("hf", "acme/other", "r"), "", filled(60 << 10))

    one.put(Key("hf", "acme/tone", "r"), "", fill)
    assert kept(tmp_path / "cache") == (1, 60 << 10)


def test_what_an_ended_server_left_counts_for_an_hour(tmp_path: Path) -> None:
    cache, left = DiskCache(tmp_path / "cache", 100 << 10), tmp_path / "cache" / ".staged-x"
    (left / "adapter").mkdir(parents=True)
    (left / "adapter" / WEIGHTS).write_bytes(bytes(60 << 10))
    for path in (left / "adapter", left):
        os.utime(path, (1, 1))
    with pytest.raises(Unavailable, match="being fetched"):  # its weights have just been written
        cache.put(Key("hf", "acme/tone", "r"), "", filled(60 << 10))
    os.utime(left / "adapter" / WEIGHTS, (1, 1))
    cache.put(Key("hf", "acme/tone", "r"), "", filled(60 << 10))
    assert not left.exists()


def test_an_archive_and_what_is_unpacked_of_it_have_room_together(store: Store, tmp_path: Path) -> None:
    content = archive(*(member(name, content) for name, content in files(os.urandom(60 << 10)).items()), zipped=False)
    store.put_archive("/x.tar", content)
    source = TarSource(store.url + "/{name}.tar", DiskCache(tmp_path / "narrow", 100 << 10), Limits())
    with pytest.raises((Refused, Unavailable), match="--lora-cache-bytes"):
        had(source, named("x"))
    source = TarSource(store.url + "/{name}.tar", DiskCache(tmp_path / "wide", 150 << 10), Limits())
    assert had(source, named("x")) is not None


def test_names_that_differ_never_share_a_folder(cache: DiskCache) -> None:
    names = ["a/b_c", "a_b/c", "a-b-c", "A/b_c"]
    paths = {cache.put(Key("hf", name, "r"), "", filled(1)) for name in names}
    assert len(paths) == len(names)


def test_what_a_server_left_in_the_middle_is_nothing_and_goes(cache: DiskCache, tmp_path: Path) -> None:
    key = Key("hf", "acme/tone", "r")

    def broken(folder: Path, _: Room) -> None:
        (folder / WEIGHTS).write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.put(key, "", broken)
    left = tmp_path / "cache" / ".staged-x"
    left.mkdir()
    (tmp_path / "cache" / key.digest).mkdir()  # a place without an entry
    assert cache.find(key) is None
    cache.clear_left()
    assert left.exists()
    os.utime(left, (1, 1))
    cache.clear_left()
    assert not left.exists()
    assert cache.put(key, "", filled(3)).parent.name == key.digest
    assert cache.find(key) is not None


def test_two_that_fetch_the_same_leave_one(cache: DiskCache, tmp_path: Path) -> None:
    key, barrier = Key("hf", "acme/tone", "r"), threading.Barrier(2)

    def fill(folder: Path, _: Room) -> None:
        (folder / WEIGHTS).write_bytes(b"x")
        barrier.wait(PATIENCE)

    threads = [threading.Thread(target=cache.put, args=(key, "", fill)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kept(tmp_path / "cache") == (1, 1)


@pytest.mark.parametrize(
    "spec", ["", "local", "local=", "local=/none/there", "local=~nobody", "hf=", "s3", "s3=", "tar",
             "tar=https://x/y.tar", "git=x",
             "tar=file:///{name}", "tar=/{name}", "tar=https://{name}.host/x", "tar=https://{name}.host/{name}",
             "tar=https://{name}@host/{name}", "tar=https://host{revision}/{name}", "tar=https:///{name}",
             "tar=https://host/x?{name}", "tar=https://host/{name}?{revision}", "tar=https://host/{name}#{name}",
             "tar=https://[x/{name}", "tar=https://host\\{name}"],
)  # fmt: skip
def test_a_resolver_that_is_none_is_refused(spec: str, cache: DiskCache) -> None:
    with pytest.raises(UsageError, match="--lora-resolver"):
        read_source(spec, Settings(), cache, Limits())
