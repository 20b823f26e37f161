# SPDX-License-Identifier: MIT
"""Common code of the remote sources: pin the revision of an adapter, then take it from the cache or fetch it.

Runs in threads before step 1 of a request's life. A source fetches only from the location that the operator named; a
request supplies only a name below it. The revision is pinned to one that identifies the content (a commit, a checksum,
an entity tag) before anything is fetched. The configuration is checked before separate weights are fetched.
"""

from __future__ import annotations

import hashlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

from candle_vllm.server.adapters.disk_cache import DiskCache, Key, Room
from candle_vllm.server.adapters.sources import AdapterName, Budget, Fetch, Found, Limits, Unavailable, check_base

logger = logging.getLogger(__name__)

_SLOWEST = 1024  # minimum average transfer rate in bytes per second
_BEGINNING = 60.0  # seconds of tolerance for a slow start


class Pinned(NamedTuple):
    """An existing adapter: its revision, a function that writes its files to a folder, and its name in the source."""

    revision: str
    fill: Callable[[Path, Budget], str | None]
    label: str


class FetchedSource:
    """A source whose adapters are fetched into a cache; cached adapters are found even if the source is unreachable.

    `kind` and `pins` are as in `Source`; `usual` is the revision of names without one.
    """

    kind = ""
    pins = True
    usual = ""

    def __init__(self, cache: DiskCache, limits: Limits) -> None:
        self._cache = cache
        self._limits = limits

    @property
    def keeps(self) -> str:
        """Kind in the cache keys of its adapters."""
        return self.kind

    def find(self, name: AdapterName) -> Found | Fetch | None:
        if not self._may_have(name):
            return None
        label, asked = self._label(name), name.revision or ""
        asked = "" if asked == self.usual else asked
        if self.pins and asked and (here := self._here(Key(self.keeps, label, asked))) is not None:
            return here  # the revision identifies the content, so the source need not be asked
        try:
            pinned = self._pin(name, Budget(self._limits))
        except Unavailable as error:
            key = self._cache.latest(self.keeps, lambda kept: self._is(kept, label), asked)
            here = None if key is None else self._here(key)
            if here is None:
                raise
            logger.warning("%s is used from the cache without an update: %s", here.root, error)
            return here
        if pinned is None:
            return None
        key = Key(self.keeps, pinned.label, pinned.revision)
        return self._here(key) or partial(self._fetched, key, asked, pinned)

    def _fetched(self, key: Key, asked: str, pinned: Pinned) -> Found:
        here = self._here(key)
        if here is not None:  # another thread has fetched it meanwhile
            return here
        base: str | None = None

        def fill(folder: Path, room: Room) -> str | None:
            nonlocal base
            base = pinned.fill(folder, Budget(self._limits, room))
            return base

        logger.info("fetching the adapter %s@%s (%s)", key.name, key.revision, self.kind)
        try:
            path = self._cache.put(key, asked, fill)
        except OSError as error:
            raise Unavailable(f"{key.name} cannot be stored in the cache: {error.strerror or error}") from None
        return Found(path, f"{key.name}@{key.revision}", key.revision, base)

    def _here(self, key: Key) -> Found | None:
        """Return a cached adapter; `Refused` if the limits no longer allow it."""
        here = self._cache.find(key)
        if here is None:
            return None
        path, entry = here
        check_base(entry.base, self._limits)  # the operator may have changed the allowed bases since it was fetched
        return Found(path, f"{key.name}@{key.revision}", key.revision, entry.base)

    def names(self) -> Sequence[str]:
        """Return no names, because a list would need a network request."""
        return ()

    def _may_have(self, name: AdapterName) -> bool:  # noqa: ARG002  # by default a source may have every name
        return True

    def _label(self, name: AdapterName) -> str:
        return name.name

    def _is(self, kept: str, label: str) -> bool:
        """Whether the cached name `kept` means the same adapter as the requested name `label`."""
        return kept == label

    def _pin(self, name: AdapterName, budget: Budget) -> Pinned | None:
        raise NotImplementedError


def write_all(pieces: Iterable[bytes], stream: IO[bytes], budget: Budget) -> None:
    """Write an adapter's file, each piece after it is counted in the budget."""
    for piece in pieces:
        budget.take(len(piece))
        stream.write(piece)


@contextmanager
def cut_off(seconds: float) -> Iterator[dict[str, Any]]:
    """Shut down the connections of HTTP requests after `seconds`, even while data still arrives.

    Yields the `extensions` for an httpx request. They see only connections that the request opens, not reused ones.
    """
    opened, counting, over = list[socket.socket](), threading.Lock(), False

    def traced(event: str, info: dict[str, Any]) -> None:
        if event.endswith(".connect_tcp.complete"):
            with counting:
                opened.append(info["return_value"].get_extra_info("socket").dup())  # TLS detaches the original socket
            if over:
                end()

    def end() -> None:
        nonlocal over
        over = True
        with counting:
            for each in opened:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield {"trace": traced}
    finally:
        timer.cancel()
        with counting:
            for each in opened:
                each.close()
            opened.clear()


def steadily(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the chunks of a response of any duration; raises httpx.ReadTimeout if the average rate is too low."""
    import httpx

    begun, size = time.monotonic(), 0
    for piece in pieces:
        size += len(piece)
        if time.monotonic() - begun > _BEGINNING + size / _SLOWEST:
            raise httpx.ReadTimeout(f"less than {_SLOWEST} bytes of it arrive in a second")
        yield piece


def sum_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
