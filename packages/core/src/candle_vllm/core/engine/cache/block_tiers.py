# SPDX-License-Identifier: MIT
"""KV tiers: offload full blocks of the KV cache to a store, and read them back (step 4 of a request's life).

A thread writes published blocks to the store while steps run, unless the store is too slow or has just failed. A prefix
can be found after its blocks were evicted from the cache, and after a restart if the store is persistent. If the next
blocks of a waiting sequence may be in the store, threads read them, and the engine publishes free blocks and copies
the bytes there; the sequence then finds these blocks in the prefix cache. A block that is too short, damaged or late,
or that cannot be copied, is computed again, and no request fails. Only a rank after the first that cannot copy its part
of a block to its cache ends the engine, because the block is published by then.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Protocol

from candle_vllm.core.assembly.model import LoadedModel
from candle_vllm.core.config import EngineConfig
from candle_vllm.core.devices import device_name
from candle_vllm.core.engine.cache.block_manager import BlockManager
from candle_vllm.core.engine.cache.block_stores import BlockFolder, BlockStore, Bytes, HostBlocks, Tiers
from candle_vllm.core.engine.cache.states import StatePool
from candle_vllm.core.engine.runners.model_runner import ModelRunner
from candle_vllm.core.errors import ConfigError, refuse_settings
from candle_vllm.core.loading.cache_specs import states
from candle_vllm.core.loading.source import files_mark
from candle_vllm.core.threads import default_threads

if TYPE_CHECKING:
    from candle_vllm.core.engine.ranks.ranks import RankedParts

logger = logging.getLogger(__name__)

_WAITING_BYTES = 64 << 20
"""A rank's limit of bytes that wait for the store, and of those that wait for the cache; one block may always wait."""
_Look = Callable[[Sequence[bytes]], None]
_Report = Callable[[int, bool, bool], object]
_PATIENCE = 1.0  # seconds without a new block after which a sequence no longer waits, and a store counts as hanging
_SILENCE = 60.0  # seconds after a failed write without writes, and after a logged failure to read without another
_PAUSE = 0.05  # seconds between two checks of the writing thread while closing
_MOST_READERS = 4
_LOOK = 0.005  # seconds between two checks whether other ranks have written all blocks
_CLOSING = 10.0  # seconds that `close` waits for unwritten blocks


class BlockMemory(Protocol):
    """The cache of a runner. With `state`, its methods copy the layer states of a slot instead of a block."""

    @property
    def block_bytes(self) -> int:
        """Bytes of a block, all layers together."""

    @property
    def state_bytes(self) -> int:
        """Bytes of a slot's states, all layers together."""

    def copy_out(self, place: int, *, state: bool = False) -> Callable[[], Bytes]:
        """Begin to copy a block with the contents that it has after all launched steps.

        Returns a function that waits for the bytes and returns them, in any thread, in the cache's own layout.
        """

    def copy_in(self, place: int, data: Bytes, *, state: bool = False) -> None:
        """Write a block; all steps that are launched later see it."""


class _Copied:
    """A block that is copied out of the cache. Thread-safe."""

    def __init__(self, take: Callable[[], Bytes]) -> None:
        self._take, self._lock = take, threading.Lock()
        self._bytes: Bytes | None = None

    def bytes(self) -> Bytes:
        with self._lock:
            if self._bytes is None:
                self._bytes = self._take()
            return self._bytes


class _PartsRead:
    """One rank's progress with a reading, which is a request to read consecutive blocks of a prefix."""

    def __init__(self, digests: Sequence[bytes]) -> None:
        self.left, self.read = deque(digests), deque[Bytes]()  # blocks to read, and blocks to copy to the cache
        self.done: dict[int, tuple[Bytes | None, bool]] = {}  # results by index that wait for an earlier block
        self.begun = self.reported = self.brought = 0
        self.is_over = False  # no further block is reported
        self.end: int | None = None  # total number of blocks that are copied to the cache; None while unknown


class BlockParts:
    """Writes one rank's parts of blocks to its store and reads them back, in threads.

    Several threads read and check consecutive blocks in parallel, so that the disk does not wait for the checks. Blocks
    are reported and copied to the cache in order.

    `offer` and `bring` belong to the thread of the rank's steps; the other methods are for any thread.

    Args:
        memory: the rank's cache.
        state: whether the store holds states instead of blocks.
        report: called for each block of a reading, in order and in any thread, with the reading's number, whether the
            block was read, and whether reading failed. The first block that was not read is the last one reported.
    """

    def __init__(self, store: BlockStore, memory: BlockMemory, report: _Report, *, state: bool = False) -> None:
        self._store, self._memory, self._report, self._state = store, memory, report, state
        self._size = memory.state_bytes if state else memory.block_bytes
        self._readings: dict[int, _PartsRead] = {}
        self._to_read: deque[int] = deque()
        self._num_held = 0  # blocks that are being read, or were read and are not in the cache yet
        self._to_write: OrderedDict[bytes, _Copied] = OrderedDict()
        self._wake = threading.Condition()  # guards what several threads use
        self._asked: dict[int, float] = {}  # start of the running read, by thread
        self._writing: float | None = None  # start of the running write
        self._closing, self._quiet_until, self._warned_until = False, 0.0, 0.0
        self.counts = Counter(kept_blocks_written=0, kept_blocks_skipped=0, kept_block_failures=0)
        readers = min(_MOST_READERS, max(2, default_threads() // 2))
        self._readers = [threading.Thread(target=self._reads, name="candle-vllm-blocks-read") for _ in range(readers)]
        self._writer = threading.Thread(target=self._writes, name="candle-vllm-blocks-write")
        for thread in (*self._readers, self._writer):
            thread.daemon = True
            thread.start()

    @property
    def num_bytes(self) -> int:
        return self._store.num_bytes

    def may_have(self, digest: bytes) -> bool:
        """Whether the store may have a block; does not block."""
        return self._store.may_have(digest) or digest in self._to_write

    def offer(self, block: int, digest: bytes) -> None:
        """Copy a full block for the writing thread, unless the store has it, is too slow or has just failed."""
        if self._store.has(digest) or digest in self._to_write or time.monotonic() < self._quiet_until:
            return
        if self._to_write and (len(self._to_write) + 1) * self._size > _WAITING_BYTES:
            self.counts["kept_blocks_skipped"] += 1  # the store is slower than the model
            return
        try:
            copied = _Copied(self._memory.copy_out(block, state=self._state))
        except Exception as error:  # such as a GPU without memory; a broken one ends the next step
            self.pause(error)
            return
        with self._wake:
            self._to_write[digest] = copied
            self._wake.notify_all()

    def read(self, number: int, digests: Sequence[bytes]) -> None:
        """Begin a reading; `number` must be new."""
        with self._wake:
            reading = self._readings[number] = _PartsRead(digests)
            if time.monotonic() - min(self._asked.values(), default=math.inf) > _PATIENCE:  # the store hangs
                self._finish(reading)
                self._report(number, False, False)
            else:
                self._to_read.append(number)
                self._wake.notify_all()

    def bring(self, number: int, block: int) -> None:
        """Copy the next block of a reading to the cache; with `block` -1 drop it, as the cache has it already."""
        with self._wake:
            reading = self._readings[number]
            data = reading.read.popleft()
            reading.brought += 1
            self._num_held -= 1
            if reading.brought == reading.end:
                del self._readings[number]
            self._wake.notify_all()
        if block >= 0:
            self._memory.copy_in(block, data, state=self._state)

    def end(self, number: int, brought: int) -> None:
        """End a reading of which `brought` blocks in total are copied to the cache; drop the others."""
        with self._wake:
            reading = self._readings[number]
            reading.end = brought
            self._finish(reading)
            while len(reading.read) > brought - reading.brought:
                reading.read.pop()
                self._num_held -= 1
            if reading.brought == brought:
                del self._readings[number]
            self._wake.notify_all()

    def clear(self) -> None:
        """Drop all blocks, also in the store."""
        with self._wake:
            self._to_write.clear()
        self._store.clear()

    def close(self) -> None:
        """Write the remaining blocks, within a time limit, and end the threads."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        until = time.monotonic() + _PATIENCE
        for reader in self._readers:
            reader.join(max(0.0, until - time.monotonic()))
        until = time.monotonic() + _CLOSING
        while self._writer.is_alive() and time.monotonic() < until:
            since = self._writing
            if since is not None and time.monotonic() - since > _PATIENCE:
                break  # the store hangs
            self._writer.join(_PAUSE)
        self._store.close()

    def _next(self) -> tuple[int, _PartsRead] | None:
        while self._to_read:
            reading = self._readings.get(self._to_read[0])
            if reading is not None and reading.left:
                return self._to_read[0], reading
            self._to_read.popleft()
        return None

    def _reads(self) -> None:
        mine = threading.get_ident()
        while True:
            with self._wake:
                while (found := self._next()) is None or self._is_far_ahead or self._closing:
                    if self._closing:
                        return
                    self._wake.wait()
                number, reading = found
                digest, place = reading.left.popleft(), reading.begun
                reading.begun += 1
                self._num_held += 1
                written = self._to_write.get(digest)
                self._asked[mine] = time.monotonic()
            data, failed = None, False
            try:
                if written is not None:
                    data = written.bytes()
                elif self._store.may_have(digest):  # only the first rank has checked this before
                    data = self._store.read(digest)
            except Exception as error:  # a store may raise any exception
                failed = True
                self._warn("a block of the KV cache cannot be read: %s", error)
            with self._wake:
                del self._asked[mine]
                if reading.is_over:  # no sequence waits for this reading any more
                    self._num_held -= 1
                else:
                    reading.done[place] = data, failed
                    self._report_in_order(number, reading)
                self._wake.notify_all()

    def _report_in_order(self, number: int, reading: _PartsRead) -> None:
        while not reading.is_over and reading.reported in reading.done:
            data, failed = reading.done[reading.reported]
            if data is None:  # a prefix ends at its first missing block
                self.counts["kept_block_failures"] += failed
                self._finish(reading)
            else:
                del reading.done[reading.reported]
                reading.reported += 1
                reading.read.append(data)
            self._report(number, data is not None, failed)

    def _finish(self, reading: _PartsRead) -> None:
        reading.is_over = True
        reading.left.clear()
        self._num_held -= len(reading.done)
        reading.done.clear()

    @property
    def _is_far_ahead(self) -> bool:
        """Whether the blocks that wait to be copied to the cache have reached their limit."""
        return self._num_held > 0 and (self._num_held + 1) * self._size > _WAITING_BYTES

    def _warn(self, what: str, error: Exception) -> None:
        """Log a warning, unless one was logged within the last `_SILENCE` seconds."""
        if time.monotonic() >= self._warned_until:
            self._warned_until = time.monotonic() + _SILENCE
            logger.warning(what, error)

    def pause(self, error: Exception) -> None:
        """Count a block that could not be copied or written, and write none for a while."""
        with self._wake:
            self.counts["kept_block_failures"] += 1
        self._quiet_until = time.monotonic() + _SILENCE
        logger.warning("KV blocks cannot be offloaded, and none will be written for %.0f s: %s", _SILENCE, error)

    def _writes(self) -> None:
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
                self.counts["kept_blocks_written"] += 1
            except Exception as error:  # a store may raise any exception
                self.pause(error)
            self._writing = None
            with self._wake:
                forgotten = self._to_write.get(digest) is not copied
                if not forgotten:
                    del self._to_write[digest]
            if forgotten:  # `clear` was called during the write
                self._store.forget(digest)


class _Reading:
    """Blocks that a sequence waits for; by rank, how many blocks were `found`, and whether the rank has `ended`."""

    def __init__(self, number: int, digests: Sequence[bytes], ranks: int) -> None:
        self.number, self.digests = number, digests
        self.found, self.ended = [0] * ranks, [False] * ranks
        self.brought = 0
        self.moved = time.monotonic()  # when the last block of it, or of a reading before it, was copied to the cache
        self.is_over = False

    @property
    def num_ready(self) -> int:
        """Number of blocks that all ranks have read."""
        return min(self.found)

    @property
    def has_ended(self) -> bool:
        """Whether no more than `num_ready` blocks will be read."""
        found = zip(self.found, self.ended, strict=True)
        return any(ended and count == self.num_ready for count, ended in found) or self.num_ready == len(self.digests)


class OffloadedBlocks:
    """Offloads published blocks to a store, and reads the prefixes of waiting sequences back.

    All methods but `heard` and `stats` belong to the engine's thread. If the model is divided among ranks, each rank
    has its parts of the blocks in its own store. The first rank sends the others the blocks to write and to read; a
    block is found if every rank has found its part.

    Args:
        store: the store of this rank's parts.
        memory: this rank's cache.
        blocks: the allocation of blocks or slots.
        others: the parts of the other ranks; None for a single rank.
        state: whether checkpoints of states are offloaded instead of blocks.
    """

    def __init__(
        self,
        store: BlockStore,
        memory: BlockMemory,
        blocks: BlockManager | StatePool,
        others: RankedParts | None = None,
        *,
        state: bool = False,
    ) -> None:
        self._blocks, self._others = blocks, others
        self._readings: dict[object, _Reading] = {}
        self._under_way: dict[int, _Reading] = {}  # by number
        self._numbers = itertools.count()
        self._offered: list[tuple[int, bytes]] = []  # blocks that are not yet offered to the other ranks
        self._wake = threading.Condition()  # guards the ranks' reports on readings
        self._ranks = 1 if others is None else 1 + others.count
        self._counts = Counter(kept_blocks_read=0, kept_block_failures=0)
        self._own = BlockParts(store, memory, partial(self.heard, 0), state=state)
        if others is not None:
            others.listen(self.heard)

    def stats(self) -> dict[str, int]:
        """Return the statistics of offloading, by field of `EngineStats`.

        Failures are blocks that this rank could not read or write, or another rank could not read; and late readings.
        """
        return {**(self._own.counts + self._counts), "kept_block_bytes": self._own.num_bytes}

    @property
    def reads(self) -> bool:
        """Whether a sequence waits for blocks."""
        return any(not reading.is_over for reading in self._readings.values())

    def heard(self, rank: int, number: int, found: bool, failed: bool) -> None:
        """Record a rank's report on the next block of a reading; see `BlockParts`."""
        with self._wake:
            if rank:
                self._counts["kept_block_failures"] += failed
            reading = self._under_way.get(number)
            if reading is None:
                return
            reading.found[rank] += found
            reading.ended[rank] = not found
            self._wake.notify_all()

    def offer(self, block: int, digest: bytes) -> None:
        """Offload a full, published block; see `BlockParts`. The other ranks are notified before the next step."""
        if self._others is not None:
            self._offered.append((block, digest))
        self._own.offer(block, digest)

    def may_have(self, digest: bytes) -> bool:
        return self._own.may_have(digest)

    def is_ready(self, sequence: object, hashes: Sequence[bytes], num_blocks: int) -> bool:
        """Return whether a waiting sequence may be admitted; False while its next blocks are read from the store.
        `hashes` are those of its full blocks that may be shared, and `num_blocks` is the total number that it needs."""
        reading = self._readings.get(sequence)
        if reading is not None:
            if not reading.is_over and time.monotonic() - reading.moved > _PATIENCE:
                self._end(reading)
                with self._wake:
                    self._counts["kept_block_failures"] += 1
            return reading.is_over
        found = self._blocks.lookup(hashes)
        missing = list(itertools.takewhile(self._own.may_have, hashes[len(found) :]))
        if not missing or self._blocks.num_free_after_sharing(found) < num_blocks - len(found):
            return True
        self._blocks.touch(hashes)  # else the blocks that are read would evict them
        reading = self._readings[sequence] = _Reading(next(self._numbers), missing, self._ranks)
        with self._wake:
            self._under_way[reading.number] = reading
        if self._others is not None:
            self._others.read(reading.number, missing)
        self._own.read(reading.number, missing)
        return False

    def left(self, sequence: object) -> None:
        """End the reading of a sequence that was admitted or has ended."""
        reading = self._readings.pop(sequence, None)
        if reading is not None:
            self._end(reading)

    def take(self) -> None:
        """Copy read blocks to the cache, before a step; the limit of waiting bytes also limits the time for this."""
        self._send_offers()
        for reading in list(self._readings.values()):
            if reading.is_over:
                continue
            with self._wake:
                ready, ended = reading.num_ready, reading.has_ended
            ended = not self._bring(reading, ready - reading.brought) or ended
            if ended:
                self._end(reading)

    def _bring(self, reading: _Reading, count: int) -> bool:
        """Copy the next blocks of a reading to the cache; return whether all of them were copied."""
        places: list[int] = []
        for digest in reading.digests[reading.brought : reading.brought + count]:
            place = -1
            if not self._blocks.lookup([digest]):
                taken = self._blocks.take_in(digest)
                if taken is None:
                    break
                place = taken
            try:
                self._own.bring(reading.number, place)
            except Exception as error:
                self._own.pause(error)
                self._blocks.forget(digest)
                places.append(-1)
                count = 0  # the reading ends with this block
                break
            self._counts["kept_blocks_read"] += place >= 0
            places.append(place)
        if places:
            for each in self._readings.values():
                if each.number >= reading.number:
                    each.moved = time.monotonic()
            reading.brought += len(places)
            if self._others is not None:
                self._others.bring(reading.number, places)
        return len(places) == count

    def wait(self, seconds: float) -> None:
        """Wait for a block that is being read, at most `seconds`."""
        with self._wake:
            waiting = [reading for reading in self._readings.values() if not reading.is_over]
            if waiting and not any(each.num_ready > each.brought or each.has_ended for each in waiting):
                self._wake.wait(seconds)

    def rest(self) -> None:
        """End all readings, because the cache is about to be freed."""
        for reading in self._readings.values():
            self._end(reading)
        self._send_offers()

    def reset(self) -> None:
        """Drop all blocks, also in the store."""
        self.rest()
        self._own.clear()
        if self._others is not None:
            self._others.clear()

    def close(self) -> None:
        """Write the remaining blocks, within a time limit, and end the threads."""
        self._send_offers()
        if self._others is not None:
            self._others.close()
        until = time.monotonic() + _CLOSING
        self._own.close()
        while self._others is not None and not self._others.closed() and time.monotonic() < until:
            time.sleep(_LOOK)

    def _send_offers(self) -> None:
        """Send the offered blocks to the other ranks in one message: many might fill a rank's line during a step."""
        if self._offered and self._others is not None:
            self._others.offer(self._offered)
            self._offered = []

    def _end(self, reading: _Reading) -> None:
        if reading.is_over:
            return
        reading.is_over = True
        with self._wake:
            del self._under_way[reading.number]
        self._own.end(reading.number, reading.brought)
        if self._others is not None:
            self._others.end(reading.number, reading.brought)


class OffloadedPrefixes:
    """`OffloadedBlocks` for layers that keep states: a prefix is read back only with the checkpoint at its end.

    Args:
        blocks: the offloaded blocks.
        states: the offloaded checkpoints of prompts.
        pool: the checkpoint slots.
        look: looks up which checkpoints other servers have written; None if no store is shared with other servers.
    """

    def __init__(self, blocks: OffloadedBlocks, states: OffloadedBlocks, pool: StatePool, look: _Look | None) -> None:
        self._blocks, self._states, self._pool, self._look = blocks, states, pool, look
        self._looks: dict[object, Future[None] | None] = {}  # by sequence; None once `take` has seen the end
        self._threads = ThreadPoolExecutor(_MOST_READERS, "candle-vllm-checkpoints-look")
        self._both = blocks, states
        pool.offer = states.offer
        self.offer, self.may_have = blocks.offer, blocks.may_have

    def is_ready(self, sequence: object, hashes: Sequence[bytes], num_blocks: int) -> bool:
        if self._look is not None and sequence not in self._looks:
            self._looks[sequence] = self._threads.submit(self._look, hashes)
        look = self._looks.get(sequence)
        if look is not None and not look.done():
            return False
        there = (n for n in range(len(hashes), 0, -1) if self._is_within_reach(hashes[n - 1]))
        end = next(there, 0)
        if end and not self._states.is_ready(sequence, hashes[end - 1 : end], 1):
            return False
        if end and not self._pool.lookup(hashes[end - 1 : end]):  # the checkpoint was damaged or late
            end = self._pool.depth(hashes)
        return self._blocks.is_ready(sequence, hashes[:end], num_blocks)

    def _is_within_reach(self, digest: bytes) -> bool:
        return bool(self._pool.lookup([digest])) or self._states.may_have(digest)

    def left(self, sequence: object) -> None:
        self._looks.pop(sequence, None)
        for each in self._both:
            each.left(sequence)

    @property
    def reads(self) -> bool:
        return any(each.reads for each in self._both) or any(look is not None for look in self._looks.values())

    def take(self) -> None:
        for sequence, look in self._looks.items():
            if look is not None and look.done():
                self._looks[sequence] = None
        for each in self._both:
            each.take()

    def wait(self, seconds: float) -> None:
        look = next((each for each in self._looks.values() if each is not None), None)
        if look is not None:
            wait([look], seconds)
        else:
            (self._states if self._states.reads else self._blocks).wait(seconds)

    def rest(self) -> None:
        for each in self._both:
            each.rest()

    def reset(self) -> None:
        for each in self._both:
            each.reset()

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for each in self._both:
            each.close()

    def stats(self) -> dict[str, int]:
        """Return the sums of the statistics of blocks and checkpoints, by field of `EngineStats`."""
        blocks, states = (Counter(each.stats()) for each in self._both)
        sums = blocks + states
        if self._look is None:  # blocks and checkpoints share a folder; each statistic counts the whole folder
            sums["kept_block_bytes"] = max(blocks["kept_block_bytes"], states["kept_block_bytes"])
        return sums


def keep_blocks(
    config: EngineConfig,
    loaded: LoadedModel,
    runner: ModelRunner,
    blocks: BlockManager,
    drafts: bool,
    others: RankedParts | None = None,
    pool: StatePool | None = None,
) -> OffloadedBlocks | OffloadedPrefixes | None:
    """Return the KV tiers of the settings; None without KV tiers. Raises ConfigError if they cannot be used."""
    memory: Any = runner
    fit = getattr(runner, "fit_mark", "")
    store = _store(config, loaded, memory.block_bytes, drafts, 0, fit)
    if store is None:
        return None
    offloaded = OffloadedBlocks(store, memory, blocks, others)
    if pool is None:
        return offloaded
    checkpoints = _store(config, loaded, memory.state_bytes, drafts, 0, fit, " states")
    assert checkpoints is not None
    keeps = OffloadedBlocks(checkpoints, memory, pool, state=True)
    return OffloadedPrefixes(offloaded, keeps, pool, getattr(checkpoints, "look", None))


def keep_parts(
    config: EngineConfig, loaded: LoadedModel, runner: ModelRunner, rank: int, report: _Report
) -> BlockParts | None:
    """Return the `BlockParts` of a rank after the first, for the first rank's `OffloadedBlocks`; None without tiers."""
    memory: Any = runner
    store = _store(config, loaded, memory.block_bytes, False, rank)
    return None if store is None else BlockParts(store, memory, report)


def _store(
    config: EngineConfig, loaded: LoadedModel, size: int, drafts: bool, rank: int, fit: str = "", what: str = ""
) -> BlockStore | None:
    """Return the store of a rank's parts of blocks, `size` bytes each, or None; `what` is added to its fingerprint."""
    if config.kv_offloading_size and loaded.placement.device.type == "cpu":
        raise ConfigError(
            "kv_offloading_size is for GPUs: on the CPU the KV cache is in main memory already; set kv_cache_memory "
            "to make it larger",
            "kv_offloading_size",
        )
    set_to_outlive = (name for name in ("prompt_cache_path", "prompt_cache_url") if getattr(config, name) is not None)
    outliving = next(set_to_outlive, None)
    if outliving is None and not config.kv_offloading_size:
        return None
    if states(loaded.config.cache_specs):
        recurrent = "models whose layers have a recurrent state: leave it out"
        refuse_settings(
            ("kv_offloading_size", config.kv_offloading_size, f"kv_offloading_size is not supported for {recurrent}"),
            (outliving, config.ranks > 1, f"{outliving} is not supported with several ranks for {recurrent}"),
        )
    if not config.enable_prefix_caching:
        logger.warning("%s has no effect without enable_prefix_caching", outliving or "kv_offloading_size")
        return None
    stores = list[BlockStore]()
    if config.kv_offloading_size:
        stores.append(HostBlocks(int(config.kv_offloading_size * (1 << 30)) // config.ranks, size))
        logger.info("blocks are offloaded to main memory: at most %g GiB", config.kv_offloading_size)
    if outliving is not None:
        refused = "models that draft" if drafts else "random weights" if not loaded.files else ""
        if refused:
            raise ConfigError(f"{outliving} is not supported for {refused}: leave it out", outliving)
        if config.prompt_cache_path is not None:
            name = _fingerprint(config, loaded, rank, fit) + what
            folder = BlockFolder(config.prompt_cache_path.expanduser(), name, config.prompt_cache_bytes, size)
            logger.info("blocks are offloaded to %s: %.1f MB there", config.prompt_cache_path, folder.num_bytes / 1e6)
            stores.append(folder)
        if config.prompt_cache_url is not None:
            from candle_vllm.core.engine.cache.redis_blocks import RedisBlocks

            halves = 2 if states(loaded.config.cache_specs) else 1  # blocks and checkpoints share the limit
            most = config.prompt_cache_bytes // (config.ranks * halves)
            name = _fingerprint(config, loaded, rank, fit, times=False) + what  # each server may have its own download
            stores.append(RedisBlocks(config.prompt_cache_url, name, most, size, listed=bool(what)))
    return stores[0] if len(stores) == 1 else Tiers(stores)


def _fingerprint(config: EngineConfig, loaded: LoadedModel, rank: int, fit: str = "", *, times: bool = True) -> str:
    """Return everything that determines the bytes of a rank's part of a block except tokens, adapters and images.

    `fit` is `RecordedRunner.fit_mark`; `times` are the modification times of the model's files, see `files_mark`.
    """
    placement = loaded.placement
    if placement.recorded:
        from candle_vllm.core.kernels.cpu_runtime.kernel_cache import fingerprint
        from candle_vllm.core.kernels.cpu_runtime.level import host_level

        kernels = fingerprint(host_level())
    else:
        kernels = f"{version('torch')} {device_name(placement.device)}"
    settings = ("isq", "dtype", "block_size", "kv_cache_dtype", "key_cache_dtype", "value_cache_dtype", "lora_dtype",
                "mm_processor_kwargs", "yarn_scaling_factor", "model_impl", "op_by_op",
                "attention_backend", "deterministic")  # fmt: skip
    if config.ranks > 1:  # a different division has different parts, and sums over machines may round differently
        settings += ("tensor_parallel_size", "pipeline_parallel_size", "enable_expert_parallel", "nnodes",
                     "distributed_executor_backend")  # fmt: skip
    said = [f"{name}={getattr(config, name)}" for name in settings] + [f"rank={rank}"] * (config.ranks > 1)
    said += [f"fit={fit}"] * bool(fit)
    mark = files_mark(loaded.files, times=times)
    about = [version("candle-vllm-core"), kernels, mark, loaded.config.max_position, *said]
    return " ".join(map(str, about))
