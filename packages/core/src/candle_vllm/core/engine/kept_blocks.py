# SPDX-License-Identifier: MIT
"""Full blocks of the KV cache on disk, behind the prefix cache in memory (step 4 of a request's life).

Every block that is published is written behind the steps' back, so that what a prompt began with is there after it has
left memory, and after a restart. A waiting sequence whose next blocks are on disk waits while they are read, in
another thread, into free blocks, which are published; it then finds them as it finds any. What is short, damaged or
late is computed anew, and costs nothing else.

A block's file has the block's own hash for its name, in a folder of what else decides over its bytes (`fingerprint`).
It holds a mark, the SHA-256 of hash and bytes, and the bytes of all layers: keys, then values.
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
from collections import OrderedDict, deque
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.assembly.model import LoadedModel
from candle_vllm.core.config import EngineConfig
from candle_vllm.core.engine.block_manager import BlockManager
from candle_vllm.core.engine.model_runner import ModelRunner, StepwiseRunner
from candle_vllm.core.engine.sleeping import files_mark
from candle_vllm.core.errors import ConfigError

logger = logging.getLogger(__name__)

_MAGIC = b"CVKV0001"
_HEADER = len(_MAGIC) + hashlib.sha256().digest_size
_WAITING_BYTES = 64 << 20
"""Of blocks that are to be written, or were read and are not in the cache yet; each at least one block."""
_LOOKS = 16  # while as many bytes are written as may be there, what others wrote is looked for so often
_PATIENCE = 1.0  # seconds without a block, after which a sequence waits no longer
_SILENCE = 60.0  # seconds in which nothing is written behind a failure, and none is told again
_CLOSING = 10.0  # seconds that an end waits for what is to be written
_NAME = re.compile(r"[0-9a-f]{32}/[0-9a-f]{2}/[0-9a-f]{64}")
_READING = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


class BlockMemory(Protocol):
    """What has the cache: a runner."""

    def block_memory(self, block: int) -> list[NDArray[Any]]:
        """The parts of a block, of all layers, in an order of their own; to be read and written."""
        ...


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
        self._root, self._own = folder, hashlib.sha256(fingerprint.encode()).hexdigest()[:32]
        self._block_bytes, self._most_bytes = block_bytes, most_bytes
        if most_bytes < block_bytes + _HEADER:
            raise ConfigError(
                f"prompt_cache_bytes {most_bytes} has no room for one block of {block_bytes + _HEADER} bytes",
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

    def read(self, digest: bytes) -> memoryview | None:
        """A block's bytes; None where they are not what was written, and their file is deleted."""
        name = self._name(digest)
        path = self._root / name
        try:
            with os.fdopen(os.open(path, _READING), "rb") as file:
                data = memoryview(file.read(_HEADER + self._block_bytes + 1))
        except OSError:
            self._forget(name)
            return None
        payload = data[_HEADER:]
        if len(payload) != self._block_bytes or data[:_HEADER] != _MAGIC + _checksum(digest, payload):
            logger.warning("%s is damaged: it is deleted, and the block computed again", path)
            self._forget(name)
            return None
        with suppress(OSError):
            os.utime(path)
        with self._lock:
            if name in self._sizes:
                self._sizes.move_to_end(name)
        return payload

    def write(self, digest: bytes, data: bytes | bytearray | memoryview) -> None:
        """Keeps a block's bytes; OSError where they cannot be written."""
        name = self._name(digest)
        path = self._root / name
        path.parent.mkdir(mode=0o700, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=path.parent, prefix=".part-")  # mode 0600
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_MAGIC + _checksum(digest, data))
                file.write(data)
            os.replace(part, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(part)
            raise
        with self._lock:
            if name not in self._sizes:
                self._sizes[name] = _HEADER + len(data)
                self.num_bytes += _HEADER + len(data)
            self._written += _HEADER + len(data)
        if self._written > self._most_bytes // _LOOKS:
            self._look()
        self._shrink()

    def _look(self) -> None:
        """Counts what is there: other engines may write to the same folder."""
        found = _found(self._root)
        with self._lock:
            self._sizes = OrderedDict((name, size) for name, size in self._sizes.items() if name in found)
            for name, size in found.items():
                self._sizes.setdefault(name, size)
            self.num_bytes, self._written = sum(self._sizes.values()), 0

    def clear(self) -> None:
        """Deletes the blocks of its own fingerprint, those that other engines wrote too."""
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


def _checksum(digest: bytes, data: bytes | bytearray | memoryview) -> bytes:
    found = hashlib.sha256(digest)
    found.update(data)
    return found.digest()


def _require_own(folder: Path) -> None:
    """OSError where somebody else could read or write what is kept: it says what was asked."""
    info = folder.stat()
    if os.name != "nt" and (info.st_uid != os.geteuid() or info.st_mode & (stat.S_IRWXG | stat.S_IRWXO)):
        raise PermissionError("others can use it, and blocks tell what was asked: it must be this user's alone (0700)")


def _found(folder: Path) -> OrderedDict[str, int]:
    """Sizes of the blocks' files by name, the one used longest ago first; what was being written is deleted."""
    found: list[tuple[float, str, int]] = []
    for path in folder.glob("*/*/*"):
        with suppress(OSError):
            info, name = path.lstat(), "/".join(path.parts[-3:])
            if not stat.S_ISREG(info.st_mode):
                continue
            if _NAME.fullmatch(name):
                found.append((info.st_mtime, name, info.st_size))
            elif path.name.startswith(".part-") and info.st_mtime < time.time() - _SILENCE:
                path.unlink()
    return OrderedDict((name, size) for _, name, size in sorted(found))


class _Reading:
    """Blocks that a sequence waits for."""

    def __init__(self, digests: Sequence[bytes]) -> None:
        self.left = deque(digests)  # to be read
        self.moved = time.monotonic()  # when the last block came
        self.is_over = False


class KeptBlocks:
    """Brings published blocks to disk, and those that waiting sequences begin with back.

    `offer`, `is_ready`, `take`, `left` and `reset` belong to the engine's thread.

    Args:
        folder: where blocks are.
        memory: what has the cache.
        blocks: says which are whose.
    """

    def __init__(self, folder: BlockFolder, memory: BlockMemory, blocks: BlockManager) -> None:
        self._folder, self._memory, self._blocks = folder, memory, blocks
        self._readings: dict[object, _Reading] = {}
        self._to_read: deque[_Reading] = deque()
        self._read: deque[tuple[_Reading, bytes, memoryview]] = deque()
        self._to_write: OrderedDict[bytes, bytearray] = OrderedDict()
        self._wake = threading.Condition()  # guards what both kinds of threads touch
        self._read_bytes = self._written_bytes = 0
        self._closing, self._quiet_until = False, 0.0
        self.num_read = self.num_written = self.num_failed = self.num_skipped = 0
        self._threads = [
            threading.Thread(target=run, name=f"candle-vllm-blocks-{name}", daemon=True)
            for name, run in (("read", self._reads), ("write", self._writes))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        return self._folder.num_bytes

    @property
    def reads(self) -> bool:
        """Whether a sequence waits for blocks."""
        return any(not reading.is_over for reading in self._readings.values())

    def offer(self, block: int, digest: bytes) -> None:
        """A block is full and published; its bytes are copied, to be written where there is nothing of it on disk."""
        if self._folder.has(digest) or digest in self._to_write or time.monotonic() < self._quiet_until:
            return
        parts = self._memory.block_memory(block)
        size = sum(part.nbytes for part in parts)
        if self._to_write and self._written_bytes + size > _WAITING_BYTES:
            self.num_skipped += 1  # the disk is slower than the model
            return
        data, start = bytearray(size), 0
        flat = np.frombuffer(data, np.uint8)
        for part in parts:
            flat[start : start + part.nbytes].view(part.dtype).reshape(part.shape)[...] = part
            start += part.nbytes
        with self._wake:
            self._to_write[digest] = data
            self._written_bytes += size
            self._wake.notify_all()

    def is_ready(self, sequence: object, hashes: Sequence[bytes], num_blocks: int) -> bool:
        """Whether a waiting sequence may begin: nothing of what it begins with is on disk alone.

        Args:
            sequence: whose.
            hashes: of its full blocks, as far as they may be shared.
            num_blocks: that it takes in all.
        """
        reading = self._readings.get(sequence)
        if reading is not None:
            if not reading.is_over and time.monotonic() - reading.moved > _PATIENCE:
                self._end(reading)
                self._failed()
            return reading.is_over
        first = len(self._blocks.lookup(hashes))
        missing: list[bytes] = []
        for digest in hashes[first:]:
            if not self._folder.has(digest) and digest not in self._to_write:
                break
            missing.append(digest)
        if not missing or self._blocks.num_free < num_blocks:
            return True
        reading = self._readings[sequence] = _Reading(missing)
        with self._wake:
            self._to_read.append(reading)
            self._wake.notify_all()
        return False

    def left(self, sequence: object) -> None:
        """A sequence waits no longer: it begins, or is over."""
        reading = self._readings.pop(sequence, None)
        if reading is not None:
            self._end(reading)

    def take(self) -> None:
        """Brings blocks that were read to the cache; the bound on them is what a step waits for at most."""
        if not self._readings and not self._read:
            return
        for _ in range(len(self._read)):
            with self._wake:
                reading, digest, data = self._read.popleft()
                self._read_bytes -= len(data)
                self._wake.notify_all()
            if not reading.is_over:
                self._bring(reading, digest, data)
        with self._wake:
            under_way = [reading for reading, *_ in self._read]
            for reading in self._readings.values():
                reading.is_over = reading.is_over or not (reading.left or reading in under_way)

    def _bring(self, reading: _Reading, digest: bytes, data: memoryview) -> None:
        reading.moved = time.monotonic()
        if self._blocks.lookup([digest]):
            return
        taken = self._blocks.allocate(1)
        if taken is None:
            self._end(reading)
            return
        flat, start = np.frombuffer(data, np.uint8), 0
        for part in self._memory.block_memory(taken[0]):
            part[...] = flat[start : start + part.nbytes].view(part.dtype).reshape(part.shape)
            start += part.nbytes
        self._blocks.publish(taken[0], digest)
        self._blocks.release(taken)  # the one used last: it is the last to be forgotten
        self.num_read += 1

    def wait(self, seconds: float) -> None:
        """Waits for a block that is being read, so long at most."""
        with self._wake:
            if self.reads and not self._read:
                self._wake.wait(seconds)

    def rest(self) -> None:
        """The cache is about to go: what was read for it is not brought there any more."""
        for reading in self._readings.values():
            self._end(reading)
        self.take()

    def reset(self) -> None:
        """Forgets all blocks, on disk too."""
        with self._wake:
            self._to_write.clear()
            self._written_bytes = 0
        for reading in self._readings.values():
            self._end(reading)
        self._folder.clear()

    def close(self) -> None:
        """Writes what is to be written, for a while, and ends the threads."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        for thread in self._threads:
            thread.join(_CLOSING)

    def _failed(self) -> None:
        with self._wake:
            self.num_failed += 1

    def _end(self, reading: _Reading) -> None:
        reading.is_over = True
        with self._wake:
            reading.left.clear()

    def _reads(self) -> None:
        """The thread that reads."""
        while True:
            with self._wake:
                while not self._closing and (not self._to_read or self._read_bytes >= _WAITING_BYTES):
                    self._wake.wait()
                if self._closing:
                    return
                reading = self._to_read[0]
                if not reading.left:
                    self._to_read.popleft()
                    continue
                digest = reading.left[0]
                written = self._to_write.get(digest)
            data = self._folder.read(digest) if written is None else memoryview(written)
            with self._wake:
                if not reading.left:
                    continue
                reading.left.popleft()
                if data is None:  # those behind it are of no use
                    self.num_failed += 1
                    reading.left.clear()
                else:
                    self._read.append((reading, digest, data))
                    self._read_bytes += len(data)
                self._wake.notify_all()

    def _writes(self) -> None:
        """The thread that writes."""
        while True:
            with self._wake:
                while not self._closing and not self._to_write:
                    self._wake.wait()
                if not self._to_write:
                    return
                if time.monotonic() < self._quiet_until:
                    self._to_write.clear()
                    self._written_bytes = 0
                    continue
                digest, data = next(iter(self._to_write.items()))
            try:
                self._folder.write(digest, data)
                self.num_written += 1
            except OSError as error:
                self._failed()
                self._quiet_until = time.monotonic() + _SILENCE
                logger.warning("blocks of the KV cache cannot be kept, for %.0f s none is written: %s", _SILENCE, error)
            with self._wake:
                if self._to_write.get(digest) is data:
                    del self._to_write[digest]
                    self._written_bytes -= len(data)
                else:  # all was forgotten meanwhile
                    self._folder.forget(digest)


def keep_blocks(
    config: EngineConfig, loaded: LoadedModel, runner: ModelRunner, blocks: BlockManager, drafts: bool
) -> KeptBlocks | None:
    """What keeps the cache's blocks on disk, where there is that; ConfigError where it cannot be."""
    assert config.prompt_cache_path is not None
    placement = loaded.placement
    if placement.device.type != "cpu" or not config.enable_prefix_caching:
        why = "on a GPU" if config.enable_prefix_caching else "where nothing is kept in memory"
        logger.warning("prompt_cache_path sets nothing %s", why)
        return None
    refused = "models that draft" if drafts else "random weights" if not loaded.files else ""
    if refused:
        raise ConfigError(f"prompt_cache_path cannot be had with {refused}: leave it out", "prompt_cache_path")
    assert isinstance(runner, StepwiseRunner)
    if placement.recorded:
        from candle_vllm.core.kernels.cpu_runtime.kernel_cache import fingerprint
        from candle_vllm.core.kernels.cpu_runtime.level import host_level

        kernels = fingerprint(host_level())
    else:
        kernels = version("torch")
    settings = ("isq", "dtype", "block_size", "kv_cache_dtype", "key_cache_dtype", "value_cache_dtype", "lora_dtype",
                "mm_processor_kwargs", "yarn_scaling_factor", "enforce_eager")  # fmt: skip
    said = [f"{name}={getattr(config, name)}" for name in settings]
    about = [version("candle-vllm-core"), kernels, files_mark(loaded.files), loaded.config.max_position, *said]
    size = sum(part.nbytes for part in runner.block_memory(0))
    folder = BlockFolder(
        config.prompt_cache_path.expanduser(), " ".join(map(str, about)), config.prompt_cache_bytes, size
    )
    logger.info("blocks are kept in %s: %.1f MB there", config.prompt_cache_path, folder.num_bytes / 1e6)
    return KeptBlocks(folder, runner, blocks)
