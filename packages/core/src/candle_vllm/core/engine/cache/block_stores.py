# SPDX-License-Identifier: MIT
"""Stores of offloaded KV-cache blocks (KV tiers): a folder, main memory, and a chain of stores.

Data from outside the process is checked: each block has a header with a magic number and the SHA-256 of its hash and
bytes; data that is too short, damaged or of another block is rejected. The store in Redis is in `redis_blocks.py`.

A block's file is `<fingerprint>/<first two digits>/<hash>`: the block's hash, in a folder by its first two digits, in a
folder by the fingerprint, which is a hash of everything else that determines the block's bytes. The file holds the
header and the bytes of all layers in the layout of the runner's cache. Checkpoints of states are stored as blocks.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import stat
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, TypeAlias

from candle_vllm.core.errors import ConfigError

logger = logging.getLogger(__name__)

Bytes: TypeAlias = bytes | bytearray | memoryview

_MAGIC = b"CVKV0001"
HEADER = len(_MAGIC) + hashlib.sha256().digest_size
_LOOKS = 16  # a store lists the folder again after writing 1/16 of the limit
_SILENCE = 60.0  # seconds until a store's failure is logged again
_UNFINISHED = 60.0  # seconds after which an unfinished file is deleted
_NAME = re.compile(r"[0-9a-f]{32}/[0-9a-f]{2}/[0-9a-f]{64}")
_PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # temporary errors, after which the file stays
_READING = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


class BlockError(OSError):
    """A block could not be read, or is damaged."""


class BlockStore(Protocol):
    """Offloaded blocks by hash, for any thread. `has` and `may_have` do not block: the engine's thread calls them."""

    @property
    def num_bytes(self) -> int:
        """Bytes of its blocks."""

    def has(self, digest: bytes) -> bool:
        """Whether the store has a block, as far as it knows, so that the caller need not write it."""

    def may_have(self, digest: bytes) -> bool:
        """Whether the store may have a block, so that the caller should try `read`."""

    def read(self, digest: bytes) -> Bytes | None:
        """Return a block's bytes; None, or an OSError, if the block is absent, could not be read or was damaged; a
        damaged block is deleted."""

    def write(self, digest: bytes, data: Bytes) -> None:
        """Store a block's bytes; raises OSError if the store fails."""

    def forget(self, digest: bytes) -> None:
        """Delete a block."""

    def clear(self) -> None:
        """Delete all blocks of the store's own fingerprint; none of them is found after this call."""

    def close(self) -> None:
        """Free resources; blocks on disk and in Redis stay."""


def own_name(fingerprint: str) -> str:
    """Return a name of 32 characters for a fingerprint."""
    return hashlib.sha256(fingerprint.encode()).hexdigest()[:32]


def sealed(digest: bytes, data: Bytes) -> bytes:
    """Return the header with which a block's bytes are stored outside the process."""
    found = hashlib.sha256(digest)
    found.update(data)
    return _MAGIC + found.digest()


def opened(digest: bytes, data: memoryview, size: int) -> memoryview | None:
    """Return the `size` bytes of a block without its header; None if header or size are wrong."""
    payload = data[HEADER:]
    return payload if len(payload) == size and data[:HEADER] == sealed(digest, payload) else None


class BlockFolder:
    """A `BlockStore` of files; above the limit, the least recently used are deleted first. Thread-safe.

    Args:
        folder: the folder of the files; created with access for this user only.
        fingerprint: everything that determines a block's bytes, apart from its hash: weights, types, kernels.
        most_bytes: limit of the bytes of all files in the folder, whatever their fingerprint. Each engine that writes
            to the folder at the same time may exceed it by a sixteenth.
        block_bytes: size of a block.

    Raises:
        ConfigError: the folder cannot be used, other users may access it, or the limit is less than one block.
    """

    def __init__(self, folder: Path, fingerprint: str, most_bytes: int, block_bytes: int) -> None:
        self._root, self._own = folder, own_name(fingerprint)
        self._block_bytes, self._most_bytes = block_bytes, most_bytes
        if most_bytes < block_bytes + HEADER:
            raise ConfigError(
                f"prompt_cache_bytes {most_bytes} is too small for one block of {block_bytes + HEADER} bytes",
                "prompt_cache_bytes",
            )
        self._lock = threading.Lock()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _require_own(folder)
            (folder / self._own).mkdir(mode=0o700, exist_ok=True)
            self._sizes = _found(folder)
        except OSError as error:
            text = f"prompt_cache_path {str(folder)!r} cannot be used: {error}"
            raise ConfigError(text, "prompt_cache_path") from error
        self.num_bytes, self._written = sum(self._sizes.values()), 0
        self._shrink()

    def _name(self, digest: bytes) -> str:
        return f"{self._own}/{digest.hex()[:2]}/{digest.hex()}"

    def has(self, digest: bytes) -> bool:
        """Whether the block has a file, as far as the last listing of the folder and this store's own writes show."""
        return self._name(digest) in self._sizes

    may_have = has

    def read(self, digest: bytes) -> memoryview | None:
        name = self._name(digest)
        path = self._root / name
        try:
            with os.fdopen(os.open(path, _READING), "rb") as file:
                data = memoryview(file.read(HEADER + self._block_bytes + 1))
        except OSError as error:
            if error.errno == errno.ENOENT:  # deleted from outside, and maybe not alone
                with suppress(OSError):
                    self._look()
            elif error.errno not in _PASSING:
                self._forget(name)
            raise BlockError(f"{path} cannot be read: {error}") from error
        payload = opened(digest, data, self._block_bytes)
        if payload is None:
            self._forget(name)
            raise BlockError(f"{path} is damaged: it is deleted, and the block computed again")
        with suppress(OSError):
            os.utime(path)
        with self._lock:
            if name in self._sizes:
                self._sizes.move_to_end(name)
        return payload

    def write(self, digest: bytes, data: Bytes) -> None:
        name = self._name(digest)
        path = self._root / name
        for folder in (path.parent.parent, path.parent):
            folder.mkdir(mode=0o700, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=path.parent, prefix=".part-")  # mode 0600
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(sealed(digest, data))
                file.write(data)
            os.replace(part, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(part)
            raise
        with self._lock:
            if name not in self._sizes:
                self._sizes[name] = HEADER + len(data)
                self.num_bytes += HEADER + len(data)
            self._written += HEADER + len(data)
        if self._written > self._most_bytes // _LOOKS:
            self._look()
        self._shrink()

    def _look(self) -> None:
        """List the folder and the times of use again, because other engines and ranks may use it, too."""
        with self._lock:
            order = {name: number for number, name in enumerate(self._sizes)}
        found = _found(self._root, order)
        with self._lock:
            for name in order.keys() - self._sizes.keys():  # forgotten since the listing began
                found.pop(name, None)
            for name in self._sizes.keys() - order.keys():  # written since then
                found.setdefault(name, self._sizes[name])
            self._sizes = found
            self.num_bytes, self._written = sum(self._sizes.values()), 0

    def close(self) -> None:
        """Do nothing: no file is open."""

    def clear(self) -> None:
        """See `BlockStore`; includes the blocks that other engines have written, if the folder can be listed."""
        with suppress(OSError):
            self._look()
        with self._lock:
            own = [name for name in self._sizes if name.startswith(self._own)]
        for name in own:
            self._forget(name)

    def forget(self, digest: bytes) -> None:
        self._forget(self._name(digest))

    def _shrink(self) -> None:
        while self.num_bytes > self._most_bytes:
            with self._lock:
                name = next(iter(self._sizes), None)
            if name is None:
                return
            self._forget(name)

    def _forget(self, name: str) -> None:
        with self._lock:
            self.num_bytes -= self._sizes.pop(name, 0)
        with suppress(OSError):
            os.unlink(self._root / name)


def _require_own(folder: Path) -> None:
    """Raise OSError if other users may access the folder, because blocks reveal prompts."""
    info = folder.stat()
    if os.name != "nt" and (info.st_uid != os.geteuid() or info.st_mode & (stat.S_IRWXG | stat.S_IRWXO)):
        raise PermissionError("other users can access it, and blocks reveal prompts: allow this user only (chmod 0700)")


def _found(folder: Path, order: Mapping[str, int] = MappingProxyType({})) -> OrderedDict[str, int]:
    """Return the sizes of the blocks' files by name, least recently used first; delete old unfinished files.

    `order` has the order of use of known files, because file times may be too coarse.
    """
    found: list[tuple[float, int, str, int]] = []
    for path in folder.glob("*/*/*"):
        with suppress(OSError):
            info, name = path.lstat(), "/".join(path.parts[-3:])
            if not stat.S_ISREG(info.st_mode):
                continue
            if _NAME.fullmatch(name):
                found.append((info.st_mtime, order.get(name, len(order)), name, info.st_size))
            elif path.name.startswith(".part-") and info.st_mtime < time.time() - _UNFINISHED:
                path.unlink()
    return OrderedDict((name, size) for _, _, name, size in sorted(found))


class HostBlocks:
    """A `BlockStore` in main memory, as a tier below a GPU's cache; the least recently used blocks are dropped first.
    Raises ConfigError if `most_bytes`, the limit of the bytes of all blocks, is less than one block."""

    def __init__(self, most_bytes: int, block_bytes: int) -> None:
        if most_bytes < block_bytes:
            raise ConfigError(
                f"a rank's kv_offloading_size of {most_bytes} bytes is too small for one block of {block_bytes} bytes",
                "kv_offloading_size",
            )
        self._most, self._block_bytes = most_bytes // block_bytes, block_bytes
        self._blocks: OrderedDict[bytes, Bytes] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        return len(self._blocks) * self._block_bytes

    def has(self, digest: bytes) -> bool:
        return digest in self._blocks

    may_have = has

    def read(self, digest: bytes) -> Bytes | None:
        with self._lock:
            if digest in self._blocks:
                self._blocks.move_to_end(digest)
            return self._blocks.get(digest)

    def write(self, digest: bytes, data: Bytes) -> None:
        """See `BlockStore`; the bytes are not copied, and must not change."""
        with self._lock:
            self._blocks[digest] = data
            self._blocks.move_to_end(digest)
            while len(self._blocks) > self._most:
                self._blocks.popitem(last=False)

    def forget(self, digest: bytes) -> None:
        with self._lock:
            self._blocks.pop(digest, None)

    def clear(self) -> None:
        with self._lock:
            self._blocks.clear()

    def close(self) -> None:
        self.clear()


class Tiers:
    """Several stores as a `BlockStore`, fastest first: blocks are written to all, and copied to faster ones if read."""

    def __init__(self, stores: Sequence[BlockStore]) -> None:
        self._stores, self._warned_until = stores, 0.0
        self.look = getattr(stores[-1], "look", None)  # a method of `RedisBlocks` only, which is the last store

    @property
    def num_bytes(self) -> int:
        return sum(store.num_bytes for store in self._stores)

    def has(self, digest: bytes) -> bool:
        """Whether all stores have the block."""
        return all(store.has(digest) for store in self._stores)

    def may_have(self, digest: bytes) -> bool:
        return any(store.may_have(digest) for store in self._stores)

    def read(self, digest: bytes) -> Bytes | None:
        """See `BlockStore`; if a store fails, the next one is tried."""
        failure: OSError | None = None
        for number, store in enumerate(self._stores):
            if not store.may_have(digest):
                continue
            try:
                data = store.read(digest)
            except OSError as error:
                failure = error
                continue
            if data is not None:
                for nearer in self._stores[:number]:
                    with suppress(OSError):
                        nearer.write(digest, data)
                return data
        if failure is not None:
            raise failure
        return None

    def write(self, digest: bytes, data: Bytes) -> None:
        """See `BlockStore`; fails only if every store fails."""
        failure, taken = OSError("there is no store"), False
        for store in self._stores:
            try:
                if not store.has(digest):
                    store.write(digest, data)
                taken = True
            except OSError as error:
                failure = error
                if time.monotonic() >= self._warned_until:
                    self._warned_until = time.monotonic() + _SILENCE
                    logger.warning("KV blocks cannot be offloaded to one of several tiers: %s", error)
        if not taken:
            raise failure

    def forget(self, digest: bytes) -> None:
        for store in self._stores:
            store.forget(digest)

    def clear(self) -> None:
        for store in self._stores:
            store.clear()

    def close(self) -> None:
        for store in self._stores:
            store.close()
