# SPDX-License-Identifier: MIT
"""Where adapters come from: the grammar of their names, what a source is, and the local folder.

Before step 1 of a request's life, in threads. A name from a request reaches a source only in the grammar of
`AdapterName`, which has no way up, no absolute path and no empty part; a source that is not sure reports no adapter.
"""

from __future__ import annotations

import contextlib
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
_MAX_LISTED = 1000  # names of a folder


class Refused(Exception):
    """The adapter is there and is not taken; the message is for whoever asked for it."""


class Unavailable(Exception):
    """It cannot be known now whether the adapter is there, or it cannot be had; the message is for the log."""


class AdapterName(NamedTuple):
    """What a request calls an adapter: `name`, or `name@revision`.

    Attributes:
        told: a source has said the revision, and no request.
    """

    name: str
    revision: str | None = None
    told: bool = False

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


def read_name(text: str) -> AdapterName | None:
    """The name of an adapter that a source may be asked for; None of any other text."""
    name, at, revision = text.partition("@")
    if len(text) > MAX_NAME or not _NAME.fullmatch(name) or (at and not _NAME.fullmatch(revision)):
        return None
    return None if ".." in text else AdapterName(name, revision if at else None)


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a fetched adapter may be.

    Attributes:
        max_bytes: of all its files.
        max_rank: of its configuration.
        bases: patterns, one of which the base that it names must match; without patterns any base will do.
        seconds: that fetching it may take.
    """

    max_bytes: int = 1 << 30
    max_rank: int = 256
    bases: tuple[str, ...] = ()
    seconds: float = 120.0


class Disk(Protocol):
    """Where the bytes of a fetched adapter go; see `Room` in `disk_cache.py`."""

    def expect(self, size: int) -> None:
        """So many bytes are about to come."""
        ...

    def take(self, size: int) -> None:
        """So many have come; below zero, so many have gone."""
        ...


class Budget:
    """What is left of the bytes and of the time of one adapter.

    Raises `Refused` and `Unavailable` where nothing is.

    Args:
        limits: of the adapter.
        disk: told of what comes; None where nothing is kept.
    """

    def __init__(self, limits: Limits, disk: Disk | None = None) -> None:
        self.limits = limits
        self._disk = disk
        self._left = limits.max_bytes
        self._until = time.monotonic() + limits.seconds

    @property
    def seconds(self) -> float:
        """That are left."""
        left = self._until - time.monotonic()
        if left <= 0:
            raise Unavailable(f"fetching took longer than {self.limits.seconds:g} seconds (--lora-fetch-timeout)")
        return left

    def check(self, size: int) -> None:
        """Whether files of that many bytes may come."""
        if size > self._left:
            raise Refused(f"it has more than {self.limits.max_bytes >> 20} MiB, the most that this server fetches")

    def expect(self, size: int) -> None:
        """Checks that, and sees to it that there is room on the disk before any of them comes."""
        self.check(size)
        if self._disk is not None:
            self._disk.expect(size)

    def take(self, size: int) -> None:
        """That many bytes have come."""
        self.check(size)
        self._left -= size
        self.store(size)

    def store(self, size: int) -> None:
        """That many are on the disk for a while and no part of the adapter; below zero, they are gone."""
        if self._disk is not None:
            self._disk.take(size)
        _ = self.seconds


class Found(NamedTuple):
    """An adapter that is on this machine.

    Attributes:
        path: its folder, or its GGUF file.
        root: what is said of where it is from.
        revision: the commit, checksum or version that `path` has; None without a revision.
        base: the base that its configuration names.
    """

    path: Path
    root: str
    revision: str | None = None
    base: str | None = None


Fetch = Callable[[], Found]
"""Brings an adapter that there is to this machine; raises as `Source.find`."""


class Source(Protocol):
    """Somewhere that adapters come from.

    Attributes:
        kind: local, hf, s3 or tar, for logs and counts.
        pins: the revision of what it found can be asked for.
    """

    kind: str
    pins: bool

    def find(self, name: AdapterName) -> Found | Fetch | None:
        """The adapter, or what fetches it, which may take long; None where there is none of that name.

        Raises:
            Refused, Unavailable: it is not taken, or cannot be had now.
        """
        ...

    def names(self) -> Sequence[str]:
        """What there is, as far as it is known without asking anybody."""
        ...


def check_config(text: bytes, limits: Limits) -> str | None:
    """The base that a configuration names, once the configuration is one that is honoured; raises `Refused`.

    That is known before the weights come; whether they fit the base, the engine finds out.
    """
    try:
        base = parse_config(text, Path(CONFIG), limits.max_rank).base
    except AdapterError as error:
        raise Refused(str(error)) from None
    check_base(base, limits)
    return base


def check_base(base: str | None, limits: Limits) -> None:
    """Raises `Refused` for an adapter of a base that is not allowed."""
    if limits.bases and not any(fnmatchcase(base or "", pattern) for pattern in limits.bases):
        named = "no base" if base is None else f"{base!r:.100}"
        raise Refused(f"{CONFIG} names {named}, and this server takes adapters of {', '.join(limits.bases)}")


class LocalSource:
    """A folder of adapters; a name is a path in it, and `name@version` the folder `version` of the one of that name."""

    kind = "local"
    pins = False

    def __init__(self, folder: Path, limits: Limits) -> None:
        self._folder = folder
        self._limits = limits

    def find(self, name: AdapterName) -> Found | None:
        """As `Source.find`; a link that leads out of the folder is nothing."""
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
        """The adapters of the folder and of the folders in it that `find` gives."""
        root, found = self._folder.resolve(), list[str]()
        for path in _below(root, 3):
            if len(found) >= _MAX_LISTED:
                break
            name = path.relative_to(root).as_posix()
            name = read_name(name.removesuffix(".gguf") if path.suffix == ".gguf" else name)
            with contextlib.suppress(Refused):
                if name is not None and holds_adapter(path) and self.find(name) is not None:
                    found.append(str(name))
        return tuple(sorted(found))


def _below(folder: Path, depth: int) -> Sequence[Path]:
    """Folders and GGUF files below a folder; those of every level before those of the next."""
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
        level = [path for path in below if path.is_dir() and not path.is_symlink()]
    return found


def holds_adapter(path: Path) -> bool:
    """Whether a path is a folder of PEFT's or a GGUF file."""
    return path.is_file() if path.suffix == ".gguf" else (path / CONFIG).is_file()


def _is_inside(path: Path, root: Path) -> bool:
    try:
        return path.resolve().is_relative_to(root)
    except OSError:  # a circle of links
        return False


def _head(path: Path) -> bytes:
    """A configuration, unless it is too large to be one."""
    with path.open("rb") as stream:
        text = stream.read(MAX_CONFIG + 1)
    if len(text) > MAX_CONFIG:
        raise Refused(f"its {CONFIG} has more than {MAX_CONFIG >> 20} MiB")
    return text
