# SPDX-License-Identifier: MIT
"""Where blocks of the KV cache are kept besides it: a folder, main memory, and several of them one behind another.

A store that is read from elsewhere is not believed: what it gives has a mark and the SHA-256 of hash and bytes before
it, and whatever is short, damaged or another block's is no block. `redis_blocks.py` has one more store.

A block's file has the block's own hash for its name, in a folder of what else decides over its bytes (its fingerprint).
It holds the mark, the SHA-256, and the bytes of all layers: keys, then values.
"""

from __future__ import annotations

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
_LOOKS = 16  # while as many bytes are written as may be there, what others wrote is looked for so often
_SILENCE = 60.0  # seconds in which nothing more is told of a store that fails
_UNFINISHED = 60.0  # seconds, after which what was being written is deleted
_NAME = re.compile(r"[0-9a-f]{32}/[0-9a-f]{2}/[0-9a-f]{64}")
_READING = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


class BlockError(OSError):
    """A block could not be read, or what was read is not what was written."""


class BlockStore(Protocol):
    """Blocks by their hashes, for any thread. `has` and `may_have` are asked in the engine's thread, and wait not."""

    @property
    def num_bytes(self) -> int:
        """That it keeps."""
        ...

    def has(self, digest: bytes) -> bool:
        """Whether it has a block, as far as is known: it need not be written."""
        ...

    def may_have(self, digest: bytes) -> bool:
        """Whether it is worth being asked for a block."""
        ...

    def read(self, digest: bytes) -> Bytes | None:
        """A block's bytes; None where it has none.

        Raises:
            OSError: it could not be read, or was damaged, and is deleted then.
        """
        ...

    def write(self, digest: bytes, data: Bytes) -> None:
        """Keeps a block's bytes; OSError where it cannot."""
        ...

    def forget(self, digest: bytes) -> None:
        """Deletes a block."""
        ...

    def clear(self) -> None:
        """Deletes the blocks of its own fingerprint; from now on it has none."""
        ...

    def close(self) -> None:
        """Lets go of what it uses; blocks stay where that outlives the process."""
        ...


def own_name(fingerprint: str) -> str:
    """Of all that blocks of equal hashes have in common, as a name of 32 characters."""
    return hashlib.sha256(fingerprint.encode()).hexdigest()[:32]


def sealed(digest: bytes, data: Bytes) -> bytes:
    """What stands before a block's bytes where they are kept elsewhere."""
    found = hashlib.sha256(digest)
    found.update(data)
    return _MAGIC + found.digest()


def opened(digest: bytes, data: memoryview, size: int) -> memoryview | None:
    """A block of so many bytes behind its seal; None where it is anything else."""
    payload = data[HEADER:]
    return payload if len(payload) == size and data[:HEADER] == sealed(digest, payload) else None


class BlockFolder:
    """Files of blocks, the least recently used deleted first where they are more than the bound; for any thread.

    Args:
        folder: where they are; made for this user alone.
        fingerprint: of all that blocks of equal hashes have in common: weights, types, kernels.
        most_bytes: of all files in the folder, those of other fingerprints included. Of engines that write there at the
            same time, each may be a sixteenth of it above.
        block_bytes: of a block.

    Raises:
        ConfigError: the folder cannot be used, or others may read or write it.
    """

    def __init__(self, folder: Path, fingerprint: str, most_bytes: int, block_bytes: int) -> None:
        self._root, self._own = folder, own_name(fingerprint)
        self._block_bytes, self._most_bytes = block_bytes, most_bytes
        if most_bytes < block_bytes + HEADER:
            raise ConfigError(
                f"prompt_cache_bytes {most_bytes} has no room for one block of {block_bytes + HEADER} bytes",
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
        """Whether there was a file of a block when it was last looked."""
        return self._name(digest) in self._sizes

    may_have = has

    def read(self, digest: bytes) -> memoryview | None:
        """See `BlockStore`."""
        name = self._name(digest)
        path = self._root / name
        try:
            with os.fdopen(os.open(path, _READING), "rb") as file:
                data = memoryview(file.read(HEADER + self._block_bytes + 1))
        except OSError as error:
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
        """Keeps a block's bytes; OSError where they cannot be written."""
        name = self._name(digest)
        path = self._root / name
        path.parent.mkdir(mode=0o700, exist_ok=True)
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
        """Counts what is there, and when it was used: other engines, and other ranks, may have the same folder."""
        with self._lock:
            order = {name: number for number, name in enumerate(self._sizes)}
        found = _found(self._root, order)
        with self._lock:
            self._sizes = found
            self.num_bytes, self._written = sum(self._sizes.values()), 0

    def close(self) -> None:
        """Nothing is open."""

    def clear(self) -> None:
        """See `BlockStore`; those that other engines wrote too, as far as the folder can be read."""
        with suppress(OSError):
            self._look()
        with self._lock:
            own = [name for name in self._sizes if name.startswith(self._own)]
        for name in own:
            self._forget(name)

    def forget(self, digest: bytes) -> None:
        """Deletes a block."""
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
    """OSError where somebody else could read or write what is kept: it says what was asked."""
    info = folder.stat()
    if os.name != "nt" and (info.st_uid != os.geteuid() or info.st_mode & (stat.S_IRWXG | stat.S_IRWXO)):
        raise PermissionError("others can use it, and blocks tell what was asked: it must be this user's alone (0700)")


def _found(folder: Path, order: Mapping[str, int] = MappingProxyType({})) -> OrderedDict[str, int]:
    """Sizes of the blocks' files by name, the one used longest ago first; what was being written is deleted.

    `order` says which of some of them was used first, where times are too coarse to tell.
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
    """Blocks in main memory, behind the cache of a GPU; the least recently used go first.

    Args:
        most_bytes: of all of them.
        block_bytes: of a block.

    Raises:
        ConfigError: there is no room for one.
    """

    def __init__(self, most_bytes: int, block_bytes: int) -> None:
        if most_bytes < block_bytes:
            raise ConfigError(
                f"kv_offloading_size {most_bytes / (1 << 30):g} GiB has no room for one block of {block_bytes} bytes",
                "kv_offloading_size",
            )
        self._most, self._block_bytes = most_bytes // block_bytes, block_bytes
        self._blocks: OrderedDict[bytes, Bytes] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """See `BlockStore`."""
        return len(self._blocks) * self._block_bytes

    def has(self, digest: bytes) -> bool:
        """See `BlockStore`."""
        return digest in self._blocks

    may_have = has

    def read(self, digest: bytes) -> Bytes | None:
        """See `BlockStore`."""
        with self._lock:
            if digest in self._blocks:
                self._blocks.move_to_end(digest)
            return self._blocks.get(digest)

    def write(self, digest: bytes, data: Bytes) -> None:
        """See `BlockStore`; the bytes are kept, and must not change."""
        with self._lock:
            self._blocks[digest] = data
            while len(self._blocks) > self._most:
                self._blocks.popitem(last=False)

    def forget(self, digest: bytes) -> None:
        """See `BlockStore`."""
        with self._lock:
            self._blocks.pop(digest, None)

    def clear(self) -> None:
        """See `BlockStore`."""
        with self._lock:
            self._blocks.clear()

    def close(self) -> None:
        """Lets go of all blocks."""
        self.clear()


class Tiers:
    """Several stores, the nearest first: what is found further away is brought nearer, and all are written to."""

    def __init__(self, stores: Sequence[BlockStore]) -> None:
        self._stores, self._told_until = stores, 0.0
        self.look = getattr(stores[-1], "look", None)  # of Redis, which is behind all others

    @property
    def num_bytes(self) -> int:
        """Of all of them together."""
        return sum(store.num_bytes for store in self._stores)

    def has(self, digest: bytes) -> bool:
        """Whether all of them have it."""
        return all(store.has(digest) for store in self._stores)

    def may_have(self, digest: bytes) -> bool:
        """See `BlockStore`."""
        return any(store.may_have(digest) for store in self._stores)

    def read(self, digest: bytes) -> Bytes | None:
        """See `BlockStore`; one that fails does not keep the next from being asked."""
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
        """See `BlockStore`; it fails where nobody takes it."""
        failure, taken = OSError("there is no store"), False
        for store in self._stores:
            try:
                if not store.has(digest):
                    store.write(digest, data)
                taken = True
            except OSError as error:
                failure = error
                if time.monotonic() >= self._told_until:
                    self._told_until = time.monotonic() + _SILENCE
                    logger.warning("blocks of the KV cache cannot be kept in one place of several: %s", error)
        if not taken:
            raise failure

    def forget(self, digest: bytes) -> None:
        """See `BlockStore`."""
        for store in self._stores:
            store.forget(digest)

    def clear(self) -> None:
        """See `BlockStore`."""
        for store in self._stores:
            store.clear()

    def close(self) -> None:
        """Closes all."""
        for store in self._stores:
            store.close()
