# SPDX-License-Identifier: MIT
"""Fetched adapters on disk: limited in bytes, evicted in LRU order, and visible only when they are complete.

An adapter is written to a staging folder, which is renamed at the end. Its bytes are reserved before they are written,
so that complete and incomplete adapters together stay within the limit. A folder is named after the SHA-256 of source,
name and revision, so that two adapters never share a folder. Several servers may share a cache.
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

from candle_vllm.server.adapters.sources import Refused, Room, Unavailable

_ENTRY = "entry.json"
_FILES = "adapter"
_STAGED = ".staged-"
_LEFT_SECONDS = 3600.0  # age after which an unfinished download counts as abandoned
_MAX_ENTRY = 64 << 10


class Key(NamedTuple):
    """Identity of a fetched adapter: `FetchedSource.keeps` of its source, its name, and its pinned revision."""

    kind: str
    name: str
    revision: str

    @property
    def digest(self) -> str:
        """Name of the adapter's folder in the cache."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """Metadata of a cached adapter; `size` is the number of bytes of its files.

    `asked` is the revision in the request that fetched it, "" without one; `base` is the base model that its
    configuration names.
    """

    key: Key
    asked: str
    size: int
    base: str | None = None


class DiskCache:
    """Cache of adapters in one folder, which is created if necessary. Thread-safe.

    `max_bytes` is the maximum size of all files together.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._held = Counter[str]()
        self._rooms: dict[str, Room] = {}  # reservations of running fetches, by staging folder

    def find(self, key: Key) -> tuple[Path, Entry] | None:
        """Return a complete adapter and mark it as used now."""
        place = self._folder / key.digest
        entry = _read(place)
        if entry is None or entry.key != key:
            return None
        _mark_used(place)
        return place / _FILES, entry

    def latest(self, kind: str, is_it: Callable[[str], bool], asked: str) -> Key | None:
        """Return the most recently used key with this kind, a name that passes `is_it`, and `asked` as a revision."""
        found = [(used, entry) for used, _, entry in self._entries() if entry.key.kind == kind]
        found = [(used, entry) for used, entry in found if is_it(entry.key.name)]
        found = [(used, entry) for used, entry in found if asked in (entry.asked, entry.key.revision)]
        return max(found, key=lambda each: each[0])[1].key if found else None

    def put(self, key: Key, asked: str, fill: Callable[[Path, Room], str | None]) -> Path:
        """Let `fill` write an adapter to a new folder; evict other adapters if there is too little space.

        `fill` writes the files to an empty folder, reports every byte to the `Room`, and returns the base model that
        the configuration names. If it raises, nothing is stored.

        Raises:
            Refused: the adapter is larger than the cache.
            Unavailable: adapters in use and running fetches leave too little space.
        """
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        staged = self._folder / f"{_STAGED}{secrets.token_hex(8)}"
        room = Room(self._reserve)
        with self._lock:
            self._rooms[staged.name] = room
        try:
            (staged / _FILES).mkdir(parents=True, mode=0o700)
            base = fill(staged / _FILES, room)
            size = _size(staged / _FILES)
            entry = Entry(key=key, asked=asked, size=size, base=base)
            (staged / _ENTRY).write_bytes(msgspec.json.encode(entry))
            place = self._folder / key.digest
            with self._lock:
                self._make_room(room, size, size, key.digest)
                if _read(place) is None:  # else another server has already stored it
                    shutil.rmtree(place, ignore_errors=True)
                    staged.rename(place)
                del self._rooms[staged.name]
        finally:
            shutil.rmtree(staged, ignore_errors=True)
            with self._lock:
                self._rooms.pop(staged.name, None)
        return place / _FILES

    def hold(self, path: Path) -> Callable[[], None]:
        """Protect an adapter of `find` or `put` from eviction until the returned function is called.

        This call and that function mark the adapter as used now.
        """
        digest = path.parent.name
        with self._lock:
            self._held[digest] += 1
        _mark_used(path.parent)

        def let_go() -> None:
            _mark_used(path.parent)
            with self._lock:
                self._held[digest] -= 1
                self._held += Counter()  # removes entries that are zero

        return let_go

    def clear_left(self) -> None:
        """Remove unfinished downloads to which no server has written for an hour."""
        with self._lock:
            self._elsewhere()

    def _reserve(self, room: Room, least: int, most: int) -> None:
        with self._lock:
            self._make_room(room, least, most)

    def _make_room(self, room: Room, least: int, most: int, own: str = "") -> None:
        """Reserve between `least` and `most` bytes; evict adapters if fewer than `least` are free. Needs the lock.

        The reservation replaces the previous one of `room`. `own` is a folder that is about to be replaced.
        """
        entries = sorted((each for each in self._entries() if each[1].name != own), key=lambda each: each[0])
        coming = sum(other.size for other in self._rooms.values() if other is not room) + self._elsewhere()
        total, leaving = sum(entry.size for _, _, entry in entries) + coming, list[Path]()
        free = self._max_bytes - total
        if free >= least:
            room.size = max(least, min(most, free))
            return
        for _, place, entry in entries:
            if total + least > self._max_bytes and not self._held[place.name]:
                leaving.append(place)
                total -= entry.size
        if total + least > self._max_bytes:  # evict nothing if the adapter would not fit anyway
            said = f"it needs {least >> 20} MiB, and the cache has {self._max_bytes >> 20} MiB"
            if least > self._max_bytes:
                raise Refused(f"{said} (--lora-cache-bytes)")
            raise Unavailable(f"{said}, adapters in use or being fetched included (--lora-cache-bytes)")
        for place in leaving:
            gone = self._folder / f"{_STAGED}{secrets.token_hex(8)}"
            with contextlib.suppress(OSError):
                place.rename(gone)  # so that nobody finds an adapter of which some files are deleted
            shutil.rmtree(gone, ignore_errors=True)
        room.size = least

    def _elsewhere(self) -> int:
        """Return the bytes of other servers' unfinished downloads, after the abandoned ones are removed."""
        total = 0
        for staged in self._folder.glob(_STAGED + "*"):
            if staged.name in self._rooms:
                continue
            with contextlib.suppress(OSError):
                if time.time() - max(path.stat().st_mtime for path in (staged, *staged.rglob("*"))) > _LEFT_SECONDS:
                    shutil.rmtree(staged, ignore_errors=True)
                total += _size(staged)
        return total

    def _entries(self) -> Iterator[tuple[float, Path, Entry]]:
        with contextlib.suppress(OSError):
            for place in list(self._folder.iterdir()):
                if place.name.startswith(".") or (entry := _read(place)) is None:
                    continue
                with contextlib.suppress(OSError):
                    yield (place / _ENTRY).stat().st_mtime, place, entry


def _mark_used(place: Path) -> None:
    with contextlib.suppress(OSError):
        os.utime(place / _ENTRY)


def _read(place: Path) -> Entry | None:
    if not (place / _FILES).is_dir():
        return None
    try:
        with (place / _ENTRY).open("rb") as stream:
            return msgspec.json.decode(stream.read(_MAX_ENTRY), type=Entry)
    except (OSError, msgspec.MsgspecError):
        return None


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # the file has been deleted meanwhile
            total += path.stat().st_size if path.is_file() else 0
    return total
