"""Fetched adapters on disk: bounded by bytes, the least used goes first, and nothing half fetched is ever found.

An adapter is filled beside its place and renamed into it when it is whole. Its folder is called after the SHA-256 of
its source, name and revision, so that no two names share one. Several servers may share a cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from candle_vllm.server.adapters.sources import Refused, Unavailable

_ENTRY = "entry.json"
_FILES = "adapter"
_STAGED = ".staged-"
_LEFT_SECONDS = 3600.0  # after which what was not finished is nobody's any more
_MAX_ENTRY = 64 << 10


class Key(NamedTuple):
    """What was fetched: whence, by which name, and the revision that it was pinned to."""

    kind: str
    name: str
    revision: str

    @property
    def digest(self) -> str:
        """Name of its folder."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept of one.

    Attributes:
        key: what it is.
        asked: the revision that was asked for when it was fetched, "" where none was.
        size: bytes of its files.
        base: the base that its configuration names.
    """

    key: Key
    asked: str
    size: int
    base: str | None = None


class DiskCache:
    """The adapters of one folder. Safe for threads.

    Args:
        folder: made where need be.
        max_bytes: most of all files together.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._held = Counter[str]()

    def find(self, key: Key) -> tuple[Path, Entry] | None:
        """An adapter that is whole; it counts as used now."""
        place = self._folder / key.digest
        entry = _read(place)
        if entry is None or entry.key != key or not (place / _FILES).is_dir():
            return None
        with contextlib.suppress(OSError):
            os.utime(place / _ENTRY)
        return place / _FILES, entry

    def latest(self, kind: str, is_it: Callable[[str], bool], asked: str) -> Key | None:
        """What a name without a pinned revision meant when it was last fetched; `is_it` knows the name."""
        found = [(used, entry) for used, _, entry in self._entries() if entry.key.kind == kind]
        found = [(used, entry) for used, entry in found if is_it(entry.key.name)]
        found = [(used, entry) for used, entry in found if asked in (entry.asked, entry.key.revision)]
        return max(found, key=lambda each: each[0])[1].key if found else None

    def put(self, key: Key, asked: str, fill: Callable[[Path], str | None]) -> Path:
        """Fills a folder with an adapter, and makes room for it.

        Args:
            key: what it is.
            asked: the revision that was asked for.
            fill: puts its files into an empty folder, and gives the base that its configuration names; where it
                raises, nothing is kept.

        Raises:
            Refused: it is larger than the cache.
            Unavailable: what is in use leaves no room.
        """
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        staged = self._folder / f"{_STAGED}{secrets.token_hex(8)}"
        try:
            (staged / _FILES).mkdir(parents=True, mode=0o700)
            base = fill(staged / _FILES)
            size = _size(staged / _FILES)
            entry = Entry(key=key, asked=asked, size=size, base=base)
            (staged / _ENTRY).write_bytes(msgspec.json.encode(entry))
            place = self._folder / key.digest
            with self._lock:
                self._make_room(size, key.digest)
                if _read(place) is None:  # else another server was first
                    shutil.rmtree(place, ignore_errors=True)
                    staged.rename(place)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        return place / _FILES

    def hold(self, path: Path) -> Callable[[], None]:
        """Keeps an adapter of `find` or `put` from making room until what this gives is called."""
        digest = path.parent.name
        with self._lock:
            self._held[digest] += 1

        def let_go() -> None:
            with self._lock:
                self._held[digest] -= 1
                self._held += Counter()  # keeps those above zero

        return let_go

    def size(self) -> tuple[int, int]:
        """How many adapters there are, and their bytes."""
        entries = list(self._entries())
        return len(entries), sum(entry.size for _, _, entry in entries)

    def clear_left(self) -> None:
        """Removes what a server that ended in between did not finish."""
        with contextlib.suppress(OSError):
            for path in self._folder.glob(_STAGED + "*"):
                if time.time() - path.stat().st_mtime > _LEFT_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)

    def _make_room(self, size: int, own: str) -> None:
        entries = sorted((each for each in self._entries() if each[1].name != own), key=lambda each: each[0])
        total, leaving = sum(entry.size for _, _, entry in entries), list[Path]()
        for _, place, entry in entries:
            if total + size > self._max_bytes and not self._held[place.name]:
                leaving.append(place)
                total -= entry.size
        if total + size > self._max_bytes:  # nothing goes for what would not fit
            said = f"it has {size >> 20} MiB, and the cache holds {self._max_bytes >> 20} MiB"
            if size > self._max_bytes:
                raise Refused(f"{said} (--lora-cache-bytes)")
            raise Unavailable(f"{said} with what is in use (--lora-cache-bytes)")
        for place in leaving:
            shutil.rmtree(place, ignore_errors=True)

    def _entries(self) -> Iterator[tuple[float, Path, Entry]]:
        """When each was used last, its folder, and what is kept of it."""
        with contextlib.suppress(OSError):
            for place in list(self._folder.iterdir()):
                if place.name.startswith(".") or (entry := _read(place)) is None:
                    continue
                with contextlib.suppress(OSError):
                    yield (place / _ENTRY).stat().st_mtime, place, entry


def _read(place: Path) -> Entry | None:
    try:
        with (place / _ENTRY).open("rb") as stream:
            return msgspec.json.decode(stream.read(_MAX_ENTRY), type=Entry)
    except (OSError, msgspec.MsgspecError):
        return None


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
