# SPDX-License-Identifier: MIT
"""Full blocks of the KV cache in a store, behind the prefix cache (step 4 of a request's life).

Every block that is published is written behind the steps' back, so that what a prompt began with is there after it has
left the cache, and after a restart where the store outlives that. A waiting sequence whose next blocks may be in the
store waits while they are read, in another thread, into free blocks, which are published; it then finds them as it
finds any. What is short, damaged or late is computed anew, and costs nothing else.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, Protocol

from candle_vllm.core.assembly.model import LoadedModel
from candle_vllm.core.config import EngineConfig
from candle_vllm.core.devices import device_name
from candle_vllm.core.engine.block_manager import BlockManager
from candle_vllm.core.engine.block_stores import BlockFolder, BlockStore, Bytes, HostBlocks, Tiers
from candle_vllm.core.engine.model_runner import ModelRunner
from candle_vllm.core.engine.sleeping import files_mark
from candle_vllm.core.errors import ConfigError

logger = logging.getLogger(__name__)

_WAITING_BYTES = 64 << 20
"""Of blocks that are to be written, or were read and are not in the cache yet; each at least one block."""
_PATIENCE = 1.0  # seconds without a block, after which a sequence waits no longer
_SILENCE = 60.0  # seconds in which nothing is written behind a failure, and none is told again
_PAUSE = 0.05  # seconds between two looks at what is being written
_CLOSING = 10.0  # seconds that an end waits for what is to be written


class BlockMemory(Protocol):
    """What has the cache: a runner."""

    @property
    def block_bytes(self) -> int:
        """Of a block, of all layers."""
        ...

    def copy_out(self, block: int) -> Callable[[], Bytes]:
        """Begins to copy a block, as it is behind all steps that were launched.

        What it gives waits for the bytes, in any thread; they are in an order of the cache's own.
        """
        ...

    def copy_in(self, block: int, data: Bytes) -> None:
        """Writes a block, before all steps that are launched later."""
        ...


class _Reading:
    """Blocks that a sequence waits for."""

    def __init__(self, digests: Sequence[bytes]) -> None:
        self.left = deque(digests)  # to be read
        self.moved = time.monotonic()  # when the last block came
        self.is_over = False


class _Copied:
    """A block on its way out of the cache, for several threads."""

    def __init__(self, take: Callable[[], Bytes]) -> None:
        self._take, self._lock = take, threading.Lock()
        self._bytes: Bytes | None = None

    def bytes(self) -> Bytes:
        """Waits for them."""
        with self._lock:
            if self._bytes is None:
                self._bytes = self._take()
            return self._bytes


class KeptBlocks:
    """Brings published blocks to a store, and those that waiting sequences begin with back.

    `offer`, `is_ready`, `take`, `left` and `reset` belong to the engine's thread.

    Args:
        store: where blocks are.
        memory: what has the cache.
        blocks: says which are whose.
    """

    def __init__(self, store: BlockStore, memory: BlockMemory, blocks: BlockManager) -> None:
        self._store, self._memory, self._blocks = store, memory, blocks
        self._size = memory.block_bytes
        self._readings: dict[object, _Reading] = {}
        self._to_read: deque[_Reading] = deque()
        self._read: deque[tuple[_Reading, bytes, Bytes]] = deque()
        self._to_write: OrderedDict[bytes, _Copied] = OrderedDict()
        self._wake = threading.Condition()  # guards what both kinds of threads touch
        self._asked: float | None = None  # when the store was asked for a block that has not come yet
        self._writing: float | None = None  # when it was given one that it has not taken yet
        self._closing, self._quiet_until, self._told_until = False, 0.0, 0.0
        self.num_read = self.num_written = self.num_failed = self.num_skipped = 0
        self._threads = [
            threading.Thread(target=run, name=f"candle-vllm-blocks-{name}", daemon=True)
            for name, run in (("read", self._reads), ("write", self._writes))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def num_bytes(self) -> int:
        """Bytes in the store."""
        return self._store.num_bytes

    @property
    def reads(self) -> bool:
        """Whether a sequence waits for blocks."""
        return any(not reading.is_over for reading in self._readings.values())

    def offer(self, block: int, digest: bytes) -> None:
        """A block is full and published; its bytes are copied, to be written where the store has not got it."""
        if self._store.has(digest) or digest in self._to_write or time.monotonic() < self._quiet_until:
            return
        if self._to_write and (len(self._to_write) + 1) * self._size > _WAITING_BYTES:
            self.num_skipped += 1  # the store is slower than the model
            return
        copied = _Copied(self._memory.copy_out(block))
        with self._wake:
            self._to_write[digest] = copied
            self._wake.notify_all()

    def is_ready(self, sequence: object, hashes: Sequence[bytes], num_blocks: int) -> bool:
        """Whether a waiting sequence may begin: nothing of what it begins with is in the store alone.

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
        asked = self._asked
        if asked is not None and time.monotonic() - asked > _PATIENCE:
            return True  # the store hangs
        first = len(self._blocks.lookup(hashes))
        missing: list[bytes] = []
        for digest in hashes[first:]:
            if not self._store.may_have(digest) and digest not in self._to_write:
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
                self._wake.notify_all()
            if not reading.is_over:
                self._bring(reading, digest, data)
        with self._wake:
            under_way = [reading for reading, *_ in self._read]
            for reading in self._readings.values():
                reading.is_over = reading.is_over or not (reading.left or reading in under_way)

    def _bring(self, reading: _Reading, digest: bytes, data: Bytes) -> None:
        reading.moved = time.monotonic()
        if self._blocks.lookup([digest]):
            return
        taken = self._blocks.allocate(1)
        if taken is None:
            self._end(reading)
            return
        self._memory.copy_in(taken[0], data)
        self._blocks.publish(taken[0], digest)
        self._blocks.release(taken)  # the one used last: it is the last to be forgotten
        self.num_read += 1

    def wait(self, seconds: float) -> None:
        """Waits for a block that is being read, so long at most."""
        with self._wake:
            if not self._read and any(reading.left for reading in self._readings.values() if not reading.is_over):
                self._wake.wait(seconds)

    def rest(self) -> None:
        """The cache is about to go: what was read for it is not brought there any more."""
        for reading in self._readings.values():
            self._end(reading)
        self.take()

    def reset(self) -> None:
        """Forgets all blocks, those of the store too."""
        with self._wake:
            self._to_write.clear()
        for reading in self._readings.values():
            self._end(reading)
        self._store.clear()

    def close(self) -> None:
        """Writes what is to be written, for a while, and ends the threads."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        reader, writer = self._threads
        reader.join(_PATIENCE)
        until = time.monotonic() + _CLOSING
        while writer.is_alive() and time.monotonic() < until:
            since = self._writing
            if since is not None and time.monotonic() - since > _PATIENCE:
                break  # the store hangs
            writer.join(_PAUSE)
        self._store.close()

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
                while not self._closing and (not self._to_read or self._is_far_ahead):
                    self._wake.wait()
                if self._closing:
                    return
                reading = self._to_read[0]
                if not reading.left:
                    self._to_read.popleft()
                    continue
                digest = reading.left[0]
                written = self._to_write.get(digest)
                self._asked = time.monotonic()
            data, failed = None, False
            try:
                data = self._store.read(digest) if written is None else written.bytes()
            except Exception as error:  # of any store
                failed = True
                self._tell("a block of the KV cache cannot be read: %s", error)
            with self._wake:
                self._asked = None
                if not reading.left:
                    continue
                reading.left.popleft()
                if data is None:  # those behind it are of no use
                    self.num_failed += failed
                    reading.left.clear()
                else:
                    self._read.append((reading, digest, data))
                self._wake.notify_all()

    @property
    def _is_far_ahead(self) -> bool:
        """Whether as much was read as may wait for the cache."""
        return bool(self._read) and (len(self._read) + 1) * self._size > _WAITING_BYTES

    def _tell(self, what: str, error: Exception) -> None:
        """A warning, and none more for a while."""
        if time.monotonic() >= self._told_until:
            self._told_until = time.monotonic() + _SILENCE
            logger.warning(what, error)

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
                    continue
                digest, copied = next(iter(self._to_write.items()))
            self._writing = time.monotonic()
            try:
                self._store.write(digest, copied.bytes())
                self.num_written += 1
            except Exception as error:  # of any store
                self._failed()
                self._quiet_until = time.monotonic() + _SILENCE
                logger.warning("blocks of the KV cache cannot be kept, for %.0f s none is written: %s", _SILENCE, error)
            self._writing = None
            with self._wake:
                forgotten = self._to_write.get(digest) is not copied
                if not forgotten:
                    del self._to_write[digest]
            if forgotten:  # all was, meanwhile
                self._store.forget(digest)


def keep_blocks(
    config: EngineConfig, loaded: LoadedModel, runner: ModelRunner, blocks: BlockManager, drafts: bool
) -> KeptBlocks | None:
    """What keeps the cache's blocks elsewhere, where anything is set for that; ConfigError where it cannot be."""
    placement = loaded.placement
    if config.kv_offloading_size and placement.device.type == "cpu":
        raise ConfigError(
            "kv_offloading_size is of a GPU, behind whose cache it puts main memory: on the CPU the cache is there "
            "already, and kv_cache_memory makes it larger",
            "kv_offloading_size",
        )
    set_to_outlive = (name for name in ("prompt_cache_path", "prompt_cache_url") if getattr(config, name) is not None)
    outliving = next(set_to_outlive, None)
    if outliving is None and not config.kv_offloading_size:
        return None
    if not config.enable_prefix_caching:
        logger.warning("%s sets nothing where nothing is kept in memory", outliving or "kv_offloading_size")
        return None
    memory: Any = runner
    size, stores = memory.block_bytes, list[BlockStore]()
    if config.kv_offloading_size:
        stores.append(HostBlocks(int(config.kv_offloading_size * (1 << 30)), size))
        logger.info("blocks are kept in main memory: at most %g GiB", config.kv_offloading_size)
    if outliving is not None:
        refused = "models that draft" if drafts else "random weights" if not loaded.files else ""
        if refused:
            raise ConfigError(f"{outliving} cannot be had with {refused}: leave it out", outliving)
        name = _fingerprint(config, loaded)
        if config.prompt_cache_path is not None:
            folder = BlockFolder(config.prompt_cache_path.expanduser(), name, config.prompt_cache_bytes, size)
            logger.info("blocks are kept in %s: %.1f MB there", config.prompt_cache_path, folder.num_bytes / 1e6)
            stores.append(folder)
        if config.prompt_cache_url is not None:
            from candle_vllm.core.engine.redis_blocks import RedisBlocks

            stores.append(RedisBlocks(config.prompt_cache_url, name, config.prompt_cache_bytes, size))
    return KeptBlocks(stores[0] if len(stores) == 1 else Tiers(stores), memory, blocks)


def _fingerprint(config: EngineConfig, loaded: LoadedModel) -> str:
    """All that decides over the bytes of a block beside its tokens, adapters and pictures."""
    placement = loaded.placement
    if placement.recorded:
        from candle_vllm.core.kernels.cpu_runtime.kernel_cache import fingerprint
        from candle_vllm.core.kernels.cpu_runtime.level import host_level

        kernels = fingerprint(host_level())
    else:
        kernels = f"{version('torch')} {device_name(placement.device)}"
    settings = ("isq", "dtype", "block_size", "kv_cache_dtype", "key_cache_dtype", "value_cache_dtype", "lora_dtype",
                "mm_processor_kwargs", "yarn_scaling_factor", "enforce_eager", "attention_backend",
                "deterministic")  # fmt: skip
    said = [f"{name}={getattr(config, name)}" for name in settings]
    about = [version("candle-vllm-core"), kernels, files_mark(loaded.files), loaded.config.max_position, *said]
    return " ".join(map(str, about))
