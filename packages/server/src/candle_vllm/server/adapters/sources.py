# SPDX-License-Identifier: MIT
"""Sources of LoRA adapters: the grammar of adapter names, the interface of a source, and the local folder.

Runs in threads before step 1 of a request's life. A source gets only names that match this grammar: no "..", no
absolute path, no empty component.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec

from candle_vllm.core.errors import AdapterError
from candle_vllm.core.loading.adapter_config import MAX_CONFIG_BYTES, parse_config

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
MAX_CONFIG = MAX_CONFIG_BYTES
MAX_NAME = 256  # characters
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._+-]{0,126}[A-Za-z0-9_+-])?"
_NAME = re.compile(rf"{_PART}(?:/{_PART}){{0,7}}", re.ASCII)
_MAX_LISTED = 1000  # names
_STEP = 16 << 20  # bytes that are reserved on disk at a time if the size is unknown


class Refused(Exception):
    """The adapter exists, but this server refuses it; the message is for the client."""


class Unavailable(Exception):
    """The source cannot tell now whether the adapter exists, or cannot deliver it; the message is for the log."""


class AdapterName(NamedTuple):
    """Name of an adapter in a request: `name` or `name@revision`; `told` is whether a source supplied the revision."""

    name: str
    revision: str | None = None
    told: bool = False

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


def read_name(text: str) -> AdapterName | None:
    """Parse the name of an adapter that a source may have; return None for any other text."""
    name, at, revision = text.partition("@")
    if len(text) > MAX_NAME or not _NAME.fullmatch(name) or (at and not _NAME.fullmatch(revision)):
        return None
    return None if ".." in text else AdapterName(name, revision if at else None)


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Limits for an adapter of a source; in a local folder, only those for its configuration.

    Attributes:
        max_bytes: maximum size of all its files together.
        max_rank: maximum rank in its configuration.
        bases: patterns, one of which the adapter's base model must match; empty allows every base model.
        seconds: maximum time of a lookup, and of fetching.
    """

    max_bytes: int = 1 << 30
    max_rank: int = 256
    bases: tuple[str, ...] = ()
    seconds: float = 120.0


class Room:
    """Bytes of the cache that are reserved (`size`) for one adapter while it is fetched.

    `reserve` gets this object, the minimum and the preferred number of bytes, and sets `size`.
    """

    def __init__(self, reserve: Callable[[Room, int, int], None]) -> None:
        self.size = 0
        self._reserve = reserve
        self._taken = 0

    def expect(self, size: int) -> None:
        """Reserve space for `size` further bytes; raises as `DiskCache.put`."""
        if self._taken + size > self.size:
            self._reserve(self, self._taken + size, self._taken + size)

    def take(self, size: int) -> None:
        """Count `size` written bytes, or deleted bytes if negative; raises as `DiskCache.put`."""
        self._taken += size
        if self._taken > self.size:
            self._reserve(self, self._taken, self._taken + _STEP)


class Budget:
    """The bytes and the seconds that are left for fetching one adapter; `disk` accounts for bytes on disk.

    Raises `Refused` when no bytes are left, `Unavailable` when no time is left, and the errors of `DiskCache.put`.
    """

    def __init__(self, limits: Limits, disk: Room | None = None) -> None:
        self.limits = limits
        self._disk = disk
        self._left = limits.max_bytes
        self._until = time.monotonic() + limits.seconds

    @property
    def seconds(self) -> float:
        """The seconds that are left; raises `Unavailable` at zero."""
        left = self._until - time.monotonic()
        if left <= 0:
            raise Unavailable(f"fetching took longer than {self.limits.seconds:g} seconds (--lora-fetch-timeout)")
        return left

    def check(self, size: int) -> None:
        """Raise `Refused` if files of `size` bytes exceed the limit."""
        if size > self._left:
            raise Refused(f"it has more than {self.limits.max_bytes >> 20} MiB, the most that this server fetches")

    def expect(self, size: int) -> None:
        """Check that `size` bytes are within the limit, and reserve disk space for them before they are fetched."""
        self.check(size)
        if self._disk is not None:
            self._disk.expect(size)

    def take(self, size: int) -> None:
        """Count `size` fetched bytes of the adapter's files."""
        self.check(size)
        self._left -= size
        self.store(size)

    def store(self, size: int) -> None:
        """Count `size` bytes on disk, also of temporary files; negative when they are deleted."""
        if self._disk is not None:
            self._disk.take(size)
        _ = self.seconds


class Found(NamedTuple):
    """An adapter that is on this machine: its folder or GGUF file, and its origin, as clients see it.

    `revision` is a commit, checksum or version; `base` is the base model that the adapter's configuration names.
    """

    path: Path
    root: str
    revision: str | None = None
    base: str | None = None


Fetch = Callable[[], Found]
"""Fetches an adapter that a source has found to this machine; raises as `Source.find`."""


class Source(Protocol):
    """A place from which adapters are loaded, of the `kind` local, hf, s3 or tar.

    `pins` is whether the revision in `Found` finds the same adapter again later.
    """

    kind: str
    pins: bool

    def find(self, name: AdapterName) -> Found | Fetch | None:
        """Return the adapter, or a slow function that fetches it; None if the source has no adapter of this name.

        Raises `Refused` if this server refuses the adapter, and `Unavailable` if the source cannot deliver it now.
        """

    def names(self) -> Sequence[str]:
        """Names of adapters that the source knows without a network request."""


def check_config(text: bytes, limits: Limits) -> str | None:
    """Check a configuration and return the base model that it names; raises `Refused` for an unsupported one.

    The engine checks later whether the weights fit the base model.
    """
    try:
        base = parse_config(text, Path(CONFIG), limits.max_rank).base
    except AdapterError as error:
        raise Refused(str(error)) from None
    check_base(base, limits)
    return base


def check_base(base: str | None, limits: Limits) -> None:
    """Raise `Refused` for an adapter whose base model is not allowed."""
    if limits.bases and not any(fnmatchcase(base or "", pattern) for pattern in limits.bases):
        named = "no base" if base is None else f"{base!r:.100}"
        raise Refused(
            f"{CONFIG} names the base model {named}, and this server accepts adapters of {', '.join(limits.bases)} only"
        )


class LocalSource:
    """A folder of adapters, named by their paths without `.gguf`; `name@version` is `version` in the folder `name`."""

    kind = "local"
    pins = False

    def __init__(self, folder: Path, limits: Limits) -> None:
        self._folder = folder
        self._limits = limits

    def find(self, name: AdapterName) -> Found | None:
        """As `Source.find`; a link that leads out of the folder counts as missing."""
        root = self._folder.resolve()
        path = root.joinpath(*name.name.split("/"), *(name.revision or "").split("/"))
        path = path if path.exists() else path.with_name(path.name + ".gguf")
        if not _is_inside(path, root) or not holds_adapter(path):
            return None
        files = [path] if path.is_file() else [path / CONFIG, path / WEIGHTS]
        if not all(_is_inside(file, root) for file in files if file.exists()):
            return None
        base = None if path.is_file() else check_config(_head(path / CONFIG), self._limits)
        return Found(path, str(name), name.revision, base)

    def names(self) -> Sequence[str]:
        """Names of adapters that `find` accepts, down to three levels, at most `_MAX_LISTED`."""
        root, found = self._folder.resolve(), list[str]()
        for path in _below(root, 3):
            if len(found) >= _MAX_LISTED:
                break
            name = path.relative_to(root).as_posix()
            name = read_name(name.removesuffix(".gguf") if path.suffix == ".gguf" else name)
            with contextlib.suppress(Refused, OSError):  # the server may not read it, or it has just gone
                if name is not None and holds_adapter(path) and self.find(name) is not None:
                    found.append(str(name))
        return tuple(sorted(found))


def _below(folder: Path, depth: int) -> Sequence[Path]:
    """List files and folders down to `depth` levels, breadth-first; none hidden, none in a linked folder."""
    level, found = [folder], list[Path]()
    for _ in range(depth):
        below = list[Path]()
        for each in level:
            try:
                below += sorted(path for path in each.iterdir() if not path.name.startswith("."))
            except OSError:
                continue
            if len(below) > 4 * _MAX_LISTED:
                break
        found += below
        level = [path for path in below if os.path.isdir(path) and not path.is_symlink()]
    return found


def holds_adapter(path: Path) -> bool:
    """Whether a path is a PEFT adapter folder or a GGUF file."""
    return path.is_file() if path.suffix == ".gguf" else (path / CONFIG).is_file()


def _is_inside(path: Path, root: Path) -> bool:
    try:
        return path.resolve().is_relative_to(root)
    except (OSError, RuntimeError):  # symbolic links form a cycle, a RuntimeError before Python 3.13
        return False


def _head(path: Path) -> bytes:
    """Read a configuration file; raises `Refused` if it is too large."""
    with path.open("rb") as stream:
        text = stream.read(MAX_CONFIG + 1)
    if len(text) > MAX_CONFIG:
        raise Refused(f"its {CONFIG} has more than {MAX_CONFIG >> 20} MiB")
    return text
