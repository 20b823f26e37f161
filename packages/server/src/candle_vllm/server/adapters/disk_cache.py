# SPDX-License-Identifier: MIT
"""Fetched adapters on disk: bounded by bytes, the least used goes first, and nothing half fetched is ever found.

An adapter is filled beside its place and renamed into it when it is whole; what comes has its bytes reserved, so that
all that is there and all that comes stay within the bound together. Its folder is called after the SHA-256 of its
source, name and revision, so that no two names share one. Several servers may share a cache.
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
_STEP = 16 << 20  # bytes that are reserved at a time where it is not known how many will come


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
        asked: the revision that was asked for when it was fetched; "" without a revision.
        size: bytes of its files.
        base: the base that its configuration names.
    """

    key: Key
    asked: str
    size: int
    base: str | None = None


class Room:
    """Bytes of a cache that an adapter on its way has to itself.

    Args:
        reserve: sets bytes of the cache aside for it: at least so many, and so many where they are free.

    Attributes:
        size: that are set aside.
    """

    def __init__(self, reserve: Callable[[Room, int, int], None]) -> None:
        self.size = 0
        self._reserve = reserve
        self._taken = 0

    def expect(self, size: int) -> None:
        """So many bytes are about to come; raises as `DiskCache.put`."""
        if self._taken + size > self.size:
            self._reserve(self, self._taken + size, self._taken + size)

    def take(self, size: int) -> None:
        """So many have come, or have gone below zero; raises as `DiskCache.put`."""
        self._taken += size
        if self._taken > self.size:
            self._reserve(self, self._taken, self._taken + _STEP)


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
        self._rooms: dict[str, Room] = {}  # of what is fetched now, by its folder

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

    def put(self, key: Key, asked: str, fill: Callable[[Path, Room], str | None]) -> Path:
        """Fills a folder with an adapter, and makes room for it.

        Args:
            key: what it is.
            asked: the revision that was asked for.
            fill: puts its files into an empty folder, tells the room of each byte, and gives the base that its
                configuration names; where it raises, nothing is kept.

        Raises:
            Refused: it is larger than the cache.
            Unavailable: what is in use, and what is fetched beside it, leaves no room.
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
                if _read(place) is None:  # else another server was first
                    shutil.rmtree(place, ignore_errors=True)
                    staged.rename(place)
                del self._rooms[staged.name]
        finally:
            shutil.rmtree(staged, ignore_errors=True)
            with self._lock:
                self._rooms.pop(staged.name, None)
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

    def clear_left(self) -> None:
        """Removes what a server that ended in between did not finish."""
        with contextlib.suppress(OSError):
            for path in self._folder.glob(_STAGED + "*"):
                if time.time() - path.stat().st_mtime > _LEFT_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)

    def _reserve(self, room: Room, least: int, most: int) -> None:
        with self._lock:
            self._make_room(room, least, most)

    def _make_room(self, room: Room, least: int, most: int, own: str = "") -> None:
        """Sets `least` bytes aside, and `most` where nothing has to go for that; with the lock.

        Args:
            room: whose they are; what it has is given back.
            least, most: see above.
            own: folder that is about to be replaced.
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
        if total + least > self._max_bytes:  # nothing goes for what would not fit
            said = f"it has {least >> 20} MiB, and the cache holds {self._max_bytes >> 20} MiB"
            if least > self._max_bytes:
                raise Refused(f"{said} (--lora-cache-bytes)")
            raise Unavailable(f"{said} with what is in use and what is fetched (--lora-cache-bytes)")
        for place in leaving:
            shutil.rmtree(place, ignore_errors=True)
        room.size = least

    def _elsewhere(self) -> int:
        """Bytes of what other servers fetch into this cache."""
        total = 0
        with contextlib.suppress(OSError):
            for staged in self._folder.glob(_STAGED + "*"):
                if staged.name not in self._rooms:
                    total += _size(staged)
        return total

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
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # it has gone meanwhile
            total += path.stat().st_size if path.is_file() else 0
    return total
