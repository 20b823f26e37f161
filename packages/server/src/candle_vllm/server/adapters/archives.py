# SPDX-License-Identifier: MIT
"""Adapters in untrusted tar archives on HTTP servers (before step 1): unpacks only one adapter's files, within limits.

Names in the archive never become paths: only the last part of a member's name is compared with an adapter's file names.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast
from urllib.parse import quote, urlsplit

from candle_vllm.core.shown import without_secrets
from candle_vllm.server.adapters import sources
from candle_vllm.server.adapters.disk_cache import DiskCache
from candle_vllm.server.adapters.fetching import FetchedSource, Pinned, cut_off, write_all

MAX_MEMBERS = 64
MAX_RATIO = 200  # maximum ratio of unpacked to fetched bytes; weights hardly compress
SLACK = 16 << 20  # unpacked bytes that are allowed beyond this ratio, for the padding of small archives
_MAX_HEAD = 64 << 10  # maximum bytes of a header with a long name or with extended attributes
_PIECE = 1 << 20
_GZIP = b"\x1f\x8b"
_HEADS = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
)  # fmt: skip
UNREADABLE = (tarfile.TarError, zlib.error, EOFError, OSError, ValueError, ArithmeticError, RecursionError)
_KEPT = (sources.CONFIG, sources.WEIGHTS)
_HTTP_SECONDS = 10.0  # timeout of connecting and of each read
_MAX_SUM = 4096  # maximum bytes of a checksum file
SUM = re.compile(r"[0-9a-f]{64}")
_NOTHING = (403, 404, 410)  # S3 answers 403 for a missing key if the client may not list keys


class TarSource(FetchedSource):
    """Archives at an http or https URL (`address`) with `{name}`, and perhaps `{revision}`.

    The URL with the suffix `.sha256` to its path serves the SHA-256 of the archive, which is its revision. The checksum
    is fetched first, and an archive that does not match it is not unpacked. Redirects are not followed.
    """

    kind = "tar"

    def __init__(self, address: str, cache: DiskCache, limits: sources.Limits) -> None:
        super().__init__(cache, limits)
        self._address = address
        self.pins = "{revision}" not in address

    def _may_have(self, name: sources.AdapterName) -> bool:
        return name.revision is None or "{revision}" in self._address or SUM.fullmatch(name.revision) is not None

    def _pin(self, name: sources.AdapterName, budget: sources.Budget) -> Pinned | None:
        wanted = name.revision if name.revision and "{revision}" not in self._address else None
        url = self._address.replace("{name}", quote(name.name)).replace("{revision}", quote(name.revision or ""))
        shown, parts = without_secrets(url), urlsplit(url)
        summed = parts._replace(path=f"{parts.path}.sha256").geturl()
        try:
            told = b"".join(_http(summed, budget, _MAX_SUM))[:64].decode("ascii", "replace").lower()
        except FileNotFoundError:
            return None
        except sources.Refused:  # longer than a checksum file
            told = ""
        if not SUM.fullmatch(told):
            raise sources.Unavailable(f"the checksum of {shown} does not begin with a SHA-256")
        if wanted is not None and told != wanted:
            return None

        def fill(folder: Path, budget: sources.Budget) -> str | None:
            archive, found = folder.parent / "archive", hashlib.sha256()
            try:
                with archive.open("xb") as stream:
                    for piece in _http(url, budget, budget.limits.max_bytes):
                        found.update(piece)
                        budget.store(len(piece))
                        stream.write(piece)
            except FileNotFoundError:
                raise sources.Unavailable(f"{shown} does not exist, although its checksum does") from None
            if found.hexdigest() != told:
                # maybe the server has replaced only one of the two yet
                raise sources.Unavailable(f"{shown} does not match its checksum")
            base = unpack(archive, folder, budget)
            size = archive.stat().st_size
            archive.unlink()
            budget.store(-size)
            return base

        return Pinned(told, fill, self._label(name))


def is_template(address: str) -> bool:
    """Whether a URL has `{name}` in its path, and no placeholder outside the path."""
    try:
        parts = urlsplit(address)
        host = parts.hostname
    except ValueError:
        return False
    rest = parts._replace(path="").geturl()
    return parts.scheme in ("http", "https") and bool(host) and "{name}" in parts.path and "{" not in rest


def _http(url: str, budget: sources.Budget, most: int) -> Iterator[bytes]:
    """Yield a body's chunks; FileNotFoundError if it does not exist, `Refused` after `most` bytes, or `Unavailable`."""
    import httpx

    shown, left = without_secrets(url), most
    asked: dict[str, Any] = {"follow_redirects": False, "headers": {"accept-encoding": "identity"}}
    patience = min(_HTTP_SECONDS, budget.seconds)
    try:
        with (
            cut_off(budget.seconds) as extensions,
            httpx.Client(timeout=patience, **asked) as client,
            client.stream("GET", url, extensions=extensions) as answer,
        ):
            if answer.status_code in _NOTHING:
                raise FileNotFoundError(shown)
            if answer.status_code != 200:
                raise sources.Unavailable(f"{shown} answered {answer.status_code}")
            told = answer.headers.get("content-length", "")
            if told.isascii() and told.isdigit() and len(told) < 16:
                budget.expect(min(int(told), most))
            for piece in answer.iter_raw():  # check the time for every chunk, so that a slow server cannot exceed it
                left -= len(piece)
                _ = budget.seconds
                if left < 0:
                    raise sources.Refused(f"it has more than {most >> 20} MiB, the most that this server fetches")
                yield piece
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        _ = budget.seconds
        raise sources.Unavailable(f"{shown} cannot be downloaded ({type(error).__name__})") from None


# ---- unpacking -------------------------------------------------------------------------------------------------------


def unpack(archive: Path, folder: Path, budget: sources.Budget) -> str | None:
    """Unpack the adapter of a tar archive, plain or compressed with gzip, into an empty folder; return its base model.

    Raises:
        Refused: the archive is unreadable, exceeds a limit, or has a forbidden member, no adapter or several.
        Unavailable: no time or no space in the cache is left.
        OSError: a file cannot be read or written.
    """
    most = min(archive.stat().st_size * MAX_RATIO, budget.limits.max_bytes) + SLACK
    try:
        with opened_tar(archive, most) as (tar, _):
            return _unpack(tar, folder, budget)
    except UNREADABLE as error:
        if isinstance(error, OSError) and error.errno is not None:  # from the disk; gzip's errors have no number
            raise
        raise sources.Refused(f"its archive cannot be read ({type(error).__name__})") from None


@contextmanager
def opened_tar(archive: Path, most: int) -> Iterator[tuple[tarfile.TarFile, BoundedStream]]:
    """Open a tar archive, plain or compressed with gzip, and its stream, which may unpack to `most` bytes.

    Raises `Refused`, or one of `UNREADABLE`, while it is read.
    """
    with archive.open("rb") as raw:
        zipped = raw.read(2) == _GZIP
        raw.seek(0)
        with gzip.open(raw) if zipped else raw as plain:
            bounded = BoundedStream(plain, most)
            with tarfile.open(fileobj=cast("IO[bytes]", bounded), mode="r|", tarinfo=BoundedMember) as tar:
                yield tar, bounded


def _unpack(tar: tarfile.TarFile, folder: Path, budget: sources.Budget) -> str | None:
    seen = dict[str, PurePosixPath]()
    base: str | None = None
    for number, member in enumerate(tar):
        if number >= MAX_MEMBERS:
            raise sources.Refused(f"its archive has more than {MAX_MEMBERS} members")
        path, shown = PurePosixPath(member.name), f"{member.name!r:.100}"
        if path.is_absolute() or ".." in path.parts:
            raise sources.Refused(f"its archive has {shown}, a path outside the archive")
        if member.isdir():
            continue
        if not member.isreg() or member.issparse() or member.size < 0:
            raise sources.Refused(f"its archive has {shown}, which is no plain file")
        if path.name == sources.PICKLED:
            raise sources.Refused(
                f"its archive has {shown}, a pickle, which is a program: save it as {sources.WEIGHTS}"
            )
        if path.name not in _KEPT:
            continue
        if path.name in seen or any(parent != path.parent for parent in seen.values()):
            raise sources.Refused(f"its archive has more than one adapter: {shown}")
        seen[path.name] = path.parent
        content = tar.extractfile(member)
        assert content is not None
        if path.name == sources.CONFIG:
            base = _config(content, member.size, folder, budget)
        else:
            budget.check(member.size)
            with (folder / path.name).open("xb") as out:
                write_all(iter(partial(content.read, _PIECE), b""), out, budget)
    if len(seen) != len(_KEPT):
        raise sources.Refused(f"its archive has no {next(name for name in _KEPT if name not in seen)}")
    return base


def _config(content: IO[bytes], size: int, folder: Path, budget: sources.Budget) -> str | None:
    if size > sources.MAX_CONFIG:
        raise sources.Refused(f"its {sources.CONFIG} has more than {sources.MAX_CONFIG >> 20} MiB")
    budget.take(size)
    text = content.read(size)
    base = sources.check_config(text, budget.limits)
    (folder / sources.CONFIG).write_bytes(text)
    return base


class BoundedStream:
    """The unpacked bytes of an archive, read sequentially; raises `Refused` after `most` bytes."""

    def __init__(self, plain: IO[bytes] | gzip.GzipFile, most: int) -> None:
        self._plain = plain
        self._most = most

    def read(self, size: int) -> bytes:
        piece = self._plain.read(size)
        self._most -= len(piece)
        if self._most < 0:
            raise sources.Refused("its archive unpacks to far more than it may")
        return piece


class BoundedMember(tarfile.TarInfo):
    """A member of an archive; an oversized header is refused before it is read into memory."""

    def _proc_member(self, tar: Any) -> Any:
        if self.type in _HEADS and not 0 <= self.size <= _MAX_HEAD:
            raise sources.Refused(f"its archive has a name or attributes of {self.size} bytes")
        if self.type == tarfile.GNUTYPE_SPARSE:
            raise sources.Refused("its archive has a sparse file, which is no plain file")
        return super()._proc_member(tar)  # type: ignore[misc]  # TarInfo documents this method for subclasses
