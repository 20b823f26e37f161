# SPDX-License-Identifier: MIT
"""Models in tar archives and GGUF files at URLs (before step 1): parallel range downloads, verification, storage.

A model's folder is prepared under another name, and renamed once it is complete and has its marker file. An interrupted
download is resumed or repeated, and is never mistaken for a complete model. Archives are untrusted: only plain files
are extracted, only into the model's folder, and links between them become hard links.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import posixpath
import re
import shutil
import sys
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import IO, Any, NamedTuple
from urllib.parse import unquote, urlsplit

from candle_vllm.core.errors import HubUnreachableError, InvalidFileError, ModelNotFoundError
from candle_vllm.core.loading.gguf import split_names
from candle_vllm.core.progress import tell
from candle_vllm.core.shown import without_secrets
from candle_vllm.server.adapters.archives import MAX_RATIO, SLACK, SUM, UNREADABLE, opened_tar
from candle_vllm.server.adapters.fetching import steadily, sum_of
from candle_vllm.server.adapters.sources import Refused

logger = logging.getLogger(__name__)

MARKER = ".complete"
_PIECE = 16 << 20  # bytes of one range request
_AT_ONCE = 8
_TRIES = 4
_SECONDS = 30.0  # timeout of a single read
_MAX_MEMBERS = 20_000
_MOST_PARTS = 32  # maximum path depth of a member, because each component may create a folder
_COPIED = 1 << 20
_ENDINGS = (".tar.gz", ".tgz", ".tar")
_GGUF = ".gguf"


class Archive(NamedTuple):
    """Location of a model: the path of a tar archive, or the URL of a tar archive or GGUF file."""

    address: str
    sha256: str | None = None

    @classmethod
    def of(cls, text: str) -> Archive | None:
        """Parse a location with an optional suffix `#sha256=...`; None for a local path that is not an archive.

        Raises InvalidFileError if the checksum or the address is invalid.
        """
        address, mark, told = text.partition("#sha256=")
        sha256 = told.lower() if mark else None
        if sha256 is not None and not SUM.fullmatch(sha256):
            shown = without_secrets(address, alone=True)
            raise InvalidFileError(f"the SHA-256 of {shown} must have 64 hexadecimal digits, not {sha256!r:.80}")
        try:
            remote = urlsplit(address).scheme in ("http", "https")
        except ValueError:
            raise InvalidFileError(f"{without_secrets(address, alone=True)!r:.200} is not a valid address") from None
        return cls(address, sha256) if remote or address.lower().endswith(_ENDINGS) else None

    @property
    def is_remote(self) -> bool:
        """Whether the location is a URL."""
        return urlsplit(self.address).scheme in ("http", "https")

    @property
    def name(self) -> str:
        """Name of the model's folder: the path's last component without extension; for `model.tar`, the one before."""
        parts = [part for part in unquote(urlsplit(self.address).path).split("/") if part] or [""]
        last = next(
            (parts[-1][: -len(end)] for end in (*_ENDINGS, _GGUF) if parts[-1].lower().endswith(end)), parts[-1]
        )
        chosen = parts[-2] if last == "model" and len(parts) > 1 else last
        return re.sub(r"[^\w.-]", "_", chosen).lstrip(".") or self._mark

    @property
    def source(self) -> str:
        """The URL without credentials and query, which may have a signature."""
        return without_secrets(self.address, alone=True)

    @property
    def _mark(self) -> str:
        return hashlib.sha256(self.source.encode()).hexdigest()[:8]

    def folder_in(self, root: Path) -> Path:
        """Return the model's folder below `root`, existing or not; it has a suffix if another model has the name."""
        folder = root / self.name
        marker = _read_marker(folder)
        return folder if marker is None or self._is(marker) else root / f"{self.name}-{(self.sha256 or self._mark)[:8]}"

    def is_in(self, root: Path) -> bool:
        """Whether the complete model is stored below `root`."""
        marker = _read_marker(self.folder_in(root))
        return marker is not None and self._is(marker)

    def _is(self, marker: dict[str, Any]) -> bool:
        return marker.get("source") == self.source and self.sha256 in (None, marker.get("sha256"))


def fetch_archive(archive: Archive, root: Path) -> Path:
    """Return the folder of an archive's model below `root`; fetch and unpack the archive if the model is missing.

    Processes that need the same model wait for one download. Progress is reported to `candle_vllm.core.progress`.

    Raises:
        ModelNotFoundError: the download failed; the next call resumes it if the server supports range requests.
        InvalidFileError: the archive does not match its checksum, cannot be unpacked, or has not exactly one model; or
            the model's folder has other files.
        OSError: the folder cannot be written.
    """
    if archive.is_in(root):  # also works on a read-only file system
        return model_folder(archive.folder_in(root))
    root.mkdir(parents=True, exist_ok=True)
    with _alone(root / f".{archive.name}.lock"):
        folder = archive.folder_in(root)
        if not archive.is_in(root):
            if folder.exists() and any(folder.iterdir()):
                raise InvalidFileError(
                    f"{folder} has files but no {MARKER}, so it is not a complete download of this program: remove the "
                    "folder, or name it as the model"
                )
            partial = root / f".{folder.name}.partial"
            file = _download(archive, partial) if archive.is_remote else Path(archive.address)
            try:
                sha256 = sum_of(file)
            except OSError as error:
                raise ModelNotFoundError(f"{archive.source} cannot be read: {error.strerror}") from None
            if archive.sha256 not in (None, sha256):
                if archive.is_remote:
                    file.unlink()
                    _pieces(file).unlink(missing_ok=True)
                raise InvalidFileError(f"{archive.source} has the SHA-256 {sha256}, not {archive.sha256}")
            fresh = root / f".{folder.name}.unpacking"
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir()
            try:
                if urlsplit(archive.address).path.lower().endswith(_GGUF):
                    _take_gguf(file, fresh / f"{archive.name}{_GGUF}")
                else:
                    unpack(file, fresh)
                model_folder(fresh)
                (fresh / MARKER).write_text(json.dumps({"source": archive.source, "sha256": sha256}), encoding="utf-8")
            except BaseException:
                shutil.rmtree(fresh, ignore_errors=True)
                raise
            if folder.exists():
                folder.rmdir()
            fresh.rename(folder)
            for left in (partial, _pieces(partial)):
                left.unlink(missing_ok=True)
    return model_folder(folder)


def model_folder(folder: Path) -> Path:
    """Return the only folder with model files, `folder` or one below it; InvalidFileError for none or several."""
    found = {path.parent for name in ("config.json", "*.gguf") for path in folder.rglob(name)}
    tops = [path for path in found if not any(path != other and path.is_relative_to(other) for other in found)]
    if len(tops) != 1:
        raise InvalidFileError(
            f"{folder.name} holds {len(tops) or 'no'} folders with a config.json or a .gguf file, not one"
        )
    return tops[0]


def model_at(address: str, cache: Path, *, offline: bool = False) -> Path:
    """Return the folder of a model from the operator's URL, `https://...` of a tar archive or a .gguf file.

    Args:
        address: URL; without the suffix `#sha256=...` its content is not verified.
        cache: folder of the stored models; each model is fetched only once.
        offline: whether only stored models are used.

    Raises:
        ModelNotFoundError: as `fetch_archive`; or the address is no URL, the model is missing and `offline`, or its
            folder cannot be written.
        InvalidFileError: as `fetch_archive` and `Archive.of`.
    """
    archive = Archive.of(address)
    if archive is None or not archive.is_remote:
        raise ModelNotFoundError(
            f"{without_secrets(address, alone=True)!r:.200} is not the address of a model: it must begin with https://"
        )
    root = cache / "archives"
    if not archive.is_in(root):
        if offline:
            raise ModelNotFoundError(f"{archive.source} is not in {root}, and nothing is fetched: leave out --offline")
        if archive.sha256 is None and archive.address.startswith("http:"):
            logger.warning(
                "%s is downloaded without encryption and without #sha256=, so anybody on the network path can replace "
                "the model",
                archive.source,
            )
    try:
        return fetch_archive(archive, root)
    except OSError as error:
        raise ModelNotFoundError(f"{archive.source} cannot be stored in {root}: {error.strerror or error}") from None


def _read_marker(folder: Path) -> dict[str, Any] | None:
    try:
        read = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return read if isinstance(read, dict) else None


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a file lock, also against other processes; the operating system releases it if its process ends."""
    with path.open("a") as file:
        if sys.platform != "win32":  # servers on Windows do not share a folder
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def folder_at(address: str, cache: Path) -> Path | None:
    """Return the folder of `model_at` if the model is stored already; otherwise None."""
    archive, root = Archive.of(address), cache / "archives"
    return model_folder(archive.folder_in(root)) if archive is not None and archive.is_in(root) else None


def _take_gguf(file: Path, target: Path) -> None:
    """Move a GGUF file to its final name; InvalidFileError if it is no GGUF file, or one part of a split model."""
    if len(split_names(target.name)) > 1:
        raise InvalidFileError(f"{target.name} is one file of a split model: put all its files into a tar archive")
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise InvalidFileError(f"the downloaded file {target.name} is not a GGUF file")
    file.rename(target)


# ---- fetching --------------------------------------------------------------------------------------------------------


def _pieces(partial: Path) -> Path:
    return partial.with_name(partial.name + ".pieces")


def _download(archive: Archive, partial: Path) -> Path:
    import httpx

    shown = archive.source
    asked: dict[str, Any] = {"follow_redirects": True, "timeout": _SECONDS, "headers": {"accept-encoding": "identity"}}

    def check(request: httpx.Request) -> None:
        if archive.address.lower().startswith("https:") and request.url.scheme != "https":
            raise ModelNotFoundError(f"{shown} redirects to an address without encryption, which is refused")

    asked["event_hooks"] = {"request": [check]}
    try:
        with httpx.Client(**asked) as client:
            with client.stream("GET", archive.address, headers={"range": "bytes=0-0"}) as answer:
                answer.raise_for_status()
                told = re.fullmatch(r"bytes 0-0/(\d+)", answer.headers.get("content-range", ""))
                version = answer.headers.get("etag") or answer.headers.get("last-modified") or ""
                if answer.status_code == 200:
                    _whole(answer, partial, shown)
                    return partial
            if answer.status_code != 206 or told is None:
                raise ModelNotFoundError(f"{shown} answered {answer.status_code} without a length")
            _ranges(client, archive.address, partial, int(told[1]), version)
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        kind = HubUnreachableError if status == 429 or status >= 500 else ModelNotFoundError
        raise kind(f"{shown} answered {status}") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise (HubUnreachableError if isinstance(error, httpx.TransportError) else ModelNotFoundError)(
            f"{shown} cannot be downloaded ({type(error).__name__}): the part that arrived is kept"
        ) from None
    return partial


def _whole(answer: Any, partial: Path, shown: str) -> None:
    """Download in one stream, from a server without range requests."""
    total = int(answer.headers.get("content-length") or 0)
    _check_room(partial, total)
    done, most = 0, total or shutil.disk_usage(partial.parent).free // 2
    with partial.open("wb") as out:
        for piece in steadily(answer.iter_raw()):
            out.write(piece)
            done += len(piece)
            if done > most:
                raise ModelNotFoundError(
                    f"{shown} does not report its length, and takes more than half of the free disk"
                )
            tell("downloading the model", done, max(total, done))
    if total and done != total:
        raise HubUnreachableError(f"{shown} ended after {done:,} of {total:,} bytes")


def _ranges(client: Any, address: str, partial: Path, total: int, version: str) -> None:
    """Download all missing ranges in parallel; a journal records each range that is complete."""
    shown, count = without_secrets(address, alone=True), -(-total // _PIECE)
    head = json.dumps({"source": shown, "bytes": total, "version": version, "piece": _PIECE}).encode() + b"\n"
    journal = _pieces(partial)
    kept = journal.read_bytes() if journal.exists() and partial.exists() else b""
    if not (kept.startswith(head) and len(kept) == len(head) + count and partial.stat().st_size == total):
        _check_room(partial, total)
        journal.unlink(missing_ok=True)
        with partial.open("wb") as out:
            out.truncate(total)
        kept = head + bytes(count)
        journal.write_bytes(kept)
    lock = Lock()  # protects the file position
    missing = [number for number in range(count) if not kept[len(head) + number]]
    with partial.open("r+b", buffering=0) as out, journal.open("r+b") as done, ThreadPoolExecutor(_AT_ONCE) as workers:

        def piece(number: int) -> int:
            first = number * _PIECE
            last = min(first + _PIECE, total) - 1
            _range(client, address, out, lock, first, last, version)
            return number

        futures = [workers.submit(piece, number) for number in missing]
        left = sum(min(_PIECE, total - number * _PIECE) for number in missing)
        try:
            for future in as_completed(futures):
                number = future.result()
                done.seek(len(head) + number)
                done.write(b"\1")
                done.flush()
                left -= min(_PIECE, total - number * _PIECE)
                tell("downloading the model", total - left, total)
        except BaseException:
            workers.shutdown(cancel_futures=True)
            raise


def _range(client: Any, address: str, out: IO[bytes], lock: Lock, first: int, last: int, version: str) -> None:
    """Download the bytes from `first` to `last`, both inclusive, to their position in `out`; retry transport errors."""
    import httpx

    shown = without_secrets(address, alone=True)
    for left in reversed(range(_TRIES)):
        try:
            at = first
            with client.stream("GET", address, headers={"range": f"bytes={first}-{last}"}) as answer:
                answer.raise_for_status()
                now = answer.headers.get("etag") or answer.headers.get("last-modified") or ""
                if answer.status_code != 206 or now != version:
                    raise HubUnreachableError(f"{shown} changed during the download: try again")
                if not answer.headers.get("content-range", "").startswith(f"bytes {first}-{last}/"):
                    raise ModelNotFoundError(f"{shown} sent other bytes than were requested")
                for piece in steadily(answer.iter_raw()):
                    if at + len(piece) > last + 1:
                        raise ModelNotFoundError(f"{shown} sent more than was requested")
                    with lock:
                        out.seek(at)
                        rest = memoryview(piece)
                        while rest:  # an unbuffered file may write less, for example on a nearly full disk
                            rest = rest[out.write(rest) :]
                    at += len(piece)
            if at == last + 1:
                return
        except (httpx.TransportError, httpx.HTTPStatusError):
            if not left:
                raise
        time.sleep(0.5 * (_TRIES - left))
    raise HubUnreachableError(f"{shown} closes the connection again and again: the part that arrived is kept")


def _check_room(path: Path, nbytes: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if nbytes > free:
        raise ModelNotFoundError(
            f"the model takes {nbytes >> 20:,} MiB, and {free >> 20:,} MiB are free in {path.parent}"
        )


# ---- unpacking -------------------------------------------------------------------------------------------------------


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a tar archive, plain or compressed with gzip, into an empty folder.

    Raises InvalidFileError if it is unreadable or exceeds a limit, has a path or link that leads out of it, or has a
    member that is no folder, link or plain file, or occurs twice.
    """
    most = min(archive.stat().st_size * MAX_RATIO + SLACK, shutil.disk_usage(folder).free)
    try:
        with opened_tar(archive, most) as (tar, bounded):
            _unpack(tar, folder)
            while bounded.read(_COPIED):  # the checksum of gzip is at the end
                pass
    except Refused as error:
        raise InvalidFileError(f"{archive.name}: {error}") from None
    except FileExistsError as error:
        raise InvalidFileError(f"{archive.name} has {Path(error.filename2 or error.filename).name!r} twice") from None
    except UNREADABLE as error:
        raise InvalidFileError(f"{archive.name} cannot be unpacked ({type(error).__name__}: {error!s:.200})") from None


def _unpack(tar: tarfile.TarFile, folder: Path) -> None:
    files, links = set[str](), dict[str, str]()
    for number, member in enumerate(tar):
        if number >= _MAX_MEMBERS:
            raise Refused(f"its archive has more than {_MAX_MEMBERS:,} members")
        path, shown = PurePosixPath(member.name), f"{member.name!r:.100}"
        if path.is_absolute() or ".." in path.parts or "\\" in member.name:
            raise Refused(f"its archive has {shown}, a path outside the archive")
        if len(path.parts) > _MOST_PARTS:
            raise Refused(f"its archive has {shown}, which is more than {_MOST_PARTS} folders deep")
        if member.isdir():
            continue
        if member.issym() or member.islnk():
            base = "" if member.islnk() else path.parent.as_posix()
            links[path.as_posix()] = posixpath.normpath(posixpath.join(base, member.linkname))
            continue
        content = tar.extractfile(member) if member.isreg() and not member.issparse() else None
        if content is None:
            raise Refused(f"its archive has {shown}, which is no plain file")
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as out:
            shutil.copyfileobj(content, out, _COPIED)
        files.add(path.as_posix())
    _link(folder, files, links)


def _link(folder: Path, files: set[str], links: dict[str, str]) -> None:
    """Make hard links to files of the archive in place of its links, also of links to links."""
    while ready := [name for name, target in links.items() if target in files]:
        for name in ready:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(folder / links.pop(name), folder / name)
            files.add(name)
    if links:
        name, target = next(iter(links.items()))
        raise Refused(f"its archive has {name!r:.100}, a link to {target!r:.100}, which is no file of it")
