# SPDX-License-Identifier: MIT
"""AdapterStore: an engine's LoRA adapters by name, the adapters in memory, and the thread that loads them.

An adapter is on disk only, or also in memory, packed for steps. A thread of the store reads, checks and packs
adapters one after the other: in turn for callers of `add` or `pin`, and for waiting sequences in their order. So no
step waits for a file. If the memory is full, the least recently used adapter that nobody needs is evicted.

A sequence leases its adapters when it is first admitted and holds the lease to its end, also while it is preempted. The
leased weights stay the same even if the name is removed or gets different files; an old entry is dropped with its last
lease.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec

from candle_vllm.core.engine.model_info import AdapterInfo
from candle_vllm.core.engine.requests import AdapterUse
from candle_vllm.core.errors import (
    AdapterError,
    CandleVllmError,
    EngineDeadError,
    EngineOverloadedError,
    InvalidParameterError,
)
from candle_vllm.core.setting_kinds import nearest

logger = logging.getLogger(__name__)

FAILED_FOR = 10.0
"""Seconds after a failed load in which requests do not load the adapter again; `add` and `pin` do."""
PATIENCE = 110.0
"""Seconds for which `AdapterStore.call` waits for an adapter."""
MAX_NAMES = 1 << 20
MAX_LOOSE_NAMES = 10_000
"""Maximum number of names registered only by requests; the least recently used that are not in use are forgotten."""
_SHOWN_NAMES = 10
_CROWDED = "running requests and pinned adapters use all the memory for adapters (lora_memory, max_cpu_loras)"
_PINNED = "pinned adapters use all the memory for adapters: raise max_cpu_loras or lora_memory, or remove one"
_CLOSING = 1.0  # seconds that `close` waits for the loading thread, which a disk may block

Adapter: TypeAlias = Any  # a `PackedAdapter` of `kernels/lora`, which imports numpy


@dataclasses.dataclass(frozen=True)
class LoadedAdapter:
    """A loaded adapter: packed for steps, with the base model that its files name, and notes about its files."""

    packed: Adapter
    base: str | None = None
    notes: tuple[str, ...] = ()


class AdapterCall(msgspec.Struct, frozen=True):
    """An operator's call: add, remove or pin an adapter, or list all adapters."""

    what: Literal["add", "remove", "pin", "list"]
    adapter: AdapterUse | None = None


class Entry:
    """One adapter: a name with its files. A name that gets different files gets a new entry.

    Attributes:
        name, path: the name and path that it was registered with.
        loaded: the loaded adapter; None if it is not in memory.
        error: why its last load failed; None if it has not failed.
        crowded: whether it waits for memory that leased, pinned or more urgent adapters occupy.
        mixed: whether a request has combined it with other adapters.
        attempts: number of loads that have ended, failed loads included.
    """

    __slots__ = (
        "attempts", "crowded", "error", "info", "leases", "loaded", "mixed", "name", "nbytes", "path", "pinned",
        "retry_at", "state",
    )  # fmt: skip

    def __init__(self, name: str, path: str) -> None:
        self.name, self.path = name, path
        self.state = "cold"
        self.loaded: LoadedAdapter | None = None
        self.error: str | None = None
        self.crowded = self.mixed = self.pinned = False
        self.attempts = self.leases = self.nbytes = 0
        self.retry_at = 0.0
        self.info = AdapterInfo(name=name, path=path)


Entries = tuple[tuple[Entry, float], ...]
"""The adapters of a sequence, each with its scale."""


class AdapterStore:
    """Adapters by name, and the adapters in memory. Thread-safe.

    Args:
        load: reads, checks and packs the files at a path; called in the store's loading thread.
        most: maximum number of adapters in memory; None for no limit.
        most_bytes: maximum bytes of the adapters in memory; a loaded adapter exceeds it if no other can be evicted. The
            adapter that is being loaded takes memory in addition.
        most_at_once: maximum number of different adapters of one request.

    Attributes:
        changes: a counter that grows whenever an adapter was loaded or pinned, or has failed to load.
        on_change: called after each change, in the loading thread.
        counts: counts since the start, by field of `EngineStats`.
    """

    def __init__(
        self,
        load: Callable[[Path], LoadedAdapter],
        *,
        most: int | None = None,
        most_bytes: int = 1 << 62,
        most_at_once: int = 1 << 30,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.changes = 0
        self.on_change: Callable[[], None] = lambda: None
        self.counts = Counter(adapter_loads=0, adapter_load_failures=0, adapter_evictions=0)
        self._load_seconds = 0.0
        self._load, self._clock = load, clock
        self._most, self._most_bytes, self._most_at_once = most or 1 << 62, most_bytes, most_at_once
        self._change = threading.Condition()  # guards everything below, and the entries
        self._entries: dict[str, Entry] = {}
        self._loose: dict[str, None] = {}  # names registered only by requests, least recently used first
        self._coming: dict[str, Entry] = {}  # new entries of known names, whose files are not loaded yet
        self._in_memory: dict[Entry, None] = {}  # in memory, least recently used first
        self._bytes = 0
        self._wanted: tuple[Entry, ...] = ()  # entries of waiting sequences, most urgent first
        self._expected: tuple[Entry, ...] = ()  # entries of requests that are not queued yet, until `want` is called
        self._asked: Counter[Entry] = Counter()  # entries of callers that wait in `_until_loaded`
        self._callers_next = True
        self._thread: threading.Thread | None = None
        self._closed = False

    # ---- names -------------------------------------------------------------------------------------------------------

    def find(self, use: AdapterUse, *, again: bool = False) -> Entry:
        """Return the entry of a name; register a new name, or different files of a known one (`load_inplace`).

        `again` retries a failed adapter at once. Raises InvalidParameterError if no adapter has this name, its path
        differs, it has just failed, or no name is left.
        """
        with self._change:
            entry = self._entries.get(use.name)
            if entry is not None and entry.state == "failed" and not entry.info.digest and use.path != entry.path:
                entry = None if use.path else entry  # files that were never loaded do not occupy a name
            if use.name in self._loose:
                self._loose[use.name] = self._loose.pop(use.name)
            if use.path and (entry is None or use.load_inplace):
                return self._take(use.name, use.path, entry)
            if entry is None:
                raise InvalidParameterError(
                    f"there is no adapter {use.name!r:.80}{self._others(use.name)}: give its path, or add it first",
                    "lora_request",
                )
            if use.path and use.path != entry.path:
                raise InvalidParameterError(
                    f"adapter {use.name!r:.80} was loaded from other files than the request names: send the request "
                    "with its name only, or add the request's files with load_inplace=True",
                    "lora_request",
                )
            if use.load_inplace:
                return self._take(use.name, entry.path, entry)
            if entry.state == "failed":
                if not again and self._clock() < entry.retry_at:
                    raise self.failure(entry)
                entry.state = "cold"
            return entry

    def found(self, uses: Sequence[AdapterUse]) -> Entries:
        """Return the entries of a request's adapters but those of scale 0. Raises as `find`, and for too many."""
        entries = tuple((self.find(use), use.scale) for use in uses)
        acting = tuple((entry, scale) for entry, scale in entries if scale)
        most = min(self._most_at_once, self._most)
        if len(acting) > most:
            raise InvalidParameterError(
                f"the request combines {len(acting)} adapters, and at most {most} are allowed (max_loras, "
                "max_cpu_loras)",
                "lora_request",
            )
        for entry, _ in acting:
            entry.mixed = entry.mixed or len(acting) > 1
        return acting

    def call(self, call: AdapterCall) -> tuple[AdapterInfo, ...]:
        """Carry out an operator's call; for a removed adapter, return an `AdapterInfo` with its name only. Raises as
        `add`, but EngineOverloadedError if the adapter was not loaded in time."""
        if call.what == "list":
            return self.infos()
        assert call.adapter is not None
        name = call.adapter.name
        if call.what == "remove":
            return (AdapterInfo(name=name, path=""),) if self.remove(name) else ()
        try:
            return (self.add(call.adapter, PATIENCE) if call.what == "add" else self.pin(name, PATIENCE),)
        except TimeoutError as error:
            said = f"adapter {name!r:.80} was not loaded within {PATIENCE:.0f} s" + (f": {error}" if str(error) else "")
            raise EngineOverloadedError(f"{said}; try again later") from None

    def add(self, use: AdapterUse, timeout: float) -> AdapterInfo:
        """Register a name and load its adapter, or load a known adapter.

        Raises:
            AdapterError: the adapter cannot be loaded; a new name is dropped.
            InvalidParameterError: see `find`.
            EngineDeadError: the store was closed.
            TimeoutError: it was not loaded in time; it may be loaded later.
        """
        with self._change:
            known = use.name in self._entries
            entry = self.find(use, again=True)
            self._loose.pop(use.name, None)
        try:
            return self._until_loaded(entry, timeout)
        except AdapterError:
            with self._change:
                if not known and self._entries.get(use.name) is entry:
                    del self._entries[use.name]
            raise

    def pin(self, name: str, timeout: float) -> AdapterInfo:
        """Load an adapter and keep it in memory until it is removed. Raises as `add`."""
        with self._change:
            entry = self.find(AdapterUse(name=name), again=True)
            self._loose.pop(name, None)
            entry.pinned = True
            self.changes += 1
        try:
            self._until_loaded(entry, timeout)
        except BaseException:
            with self._change:
                entry.pinned = False
                self._change.notify_all()
            raise
        with self._change:  # a call of `pin` that failed meanwhile has unpinned it
            entry.pinned = self._entries.get(name) is entry
            return _info(entry)

    def remove(self, name: str) -> bool:
        """Drop a name; return whether it was known. Accepted requests continue; the last one frees the memory."""
        with self._change:
            self._loose.pop(name, None)
            removed = [entries.pop(name) for entries in (self._entries, self._coming) if name in entries]
            for entry in removed:
                entry.pinned = False
            self._drop_forgotten()
            self._change.notify_all()
            return bool(removed)

    def infos(self) -> tuple[AdapterInfo, ...]:
        """Return information about all known adapters."""
        with self._change:
            return tuple(_info(entry) for entry in self._entries.values())

    def refusal(self, entries: Entries) -> InvalidParameterError | None:
        """Return why a waiting sequence can never have its adapters, or None: one has failed, or all are too large."""
        if (failed := next((entry for entry, _ in entries if entry.state == "failed"), None)) is not None:
            return self.failure(failed)
        if len(entries) < 2:  # `_next` and `_loaded` refuse a single adapter that is too large
            return None
        with self._change:
            needed = {entry for entry, _ in entries}.union(each for each in self._in_memory if each.pinned)
            nbytes = sum(each.nbytes for each in needed)
        if len(needed) <= self._most and nbytes <= self._most_bytes:
            return None
        said = f"the request's adapters and the pinned ones are {len(needed)} and take {nbytes} bytes"
        return InvalidParameterError(f"{said}: raise max_cpu_loras or lora_memory, or combine fewer", "lora_request")

    def failure(self, entry: Entry) -> InvalidParameterError:
        """Return a request's error for an adapter that failed to load, without the path of its files."""
        reason, place = entry.error or "", Path(entry.path)
        if place.name and place.parent != Path():
            reason = reason.replace(f"{place}/", "").replace(f"{place}: ", "").replace(str(place), place.name)
        return InvalidParameterError(f"adapter {entry.name!r:.80} cannot be used: {reason}", "lora_request")

    def stats(self) -> dict[str, Any]:
        """Return the statistics of the store, by field of `EngineStats`."""
        return {
            **self.counts,
            "adapters": len(self._entries),
            "adapters_in_memory": len(self._in_memory),
            "adapter_bytes": self._bytes,
            "adapter_load_seconds": self._load_seconds,
        }

    # ---- called for sequences ----------------------------------------------------------------------------------------

    def expect(self, entries: Entries) -> None:
        """Load the adapters of a request that is about to be queued, after the adapters of waiting sequences.

        The engine queues the request only after its current step; meanwhile its adapters can be read from disk.
        """
        if any(entry.loaded is None for entry, _ in entries):
            with self._change:
                self._expected += tuple(entry for entry, _ in entries if entry not in self._expected)
                self._begin()

    def want(self, entries: Iterable[Entry]) -> None:
        """Set the adapters of waiting sequences, most urgent first; replaces earlier `want` and `expect` calls."""
        wanted = tuple(entries)
        if wanted != self._wanted or self._expected:
            with self._change:
                self._wanted, self._expected = wanted, ()
                self._drop_forgotten()
                self._begin()

    def lease(self, entries: Entries) -> tuple[tuple[Adapter, float], ...] | None:
        """Lease adapters, which stay in memory until `release`; return None if not all of them are in memory."""
        if any(entry.loaded is None for entry, _ in entries):
            return None
        with self._change:
            packed = tuple((entry.loaded.packed, scale) for entry, scale in entries if entry.loaded is not None)
            if len(packed) < len(entries):  # another thread evicted an adapter
                return None
            for entry, _ in entries:
                entry.leases += 1
                del self._in_memory[entry]
                self._in_memory[entry] = None
        return packed

    def release(self, entries: Entries) -> None:
        """End a lease."""
        with self._change:
            for entry, _ in entries:
                entry.leases -= 1
                assert entry.leases >= 0, f"adapter {entry.name} released twice"
            self._drop_forgotten()
            self._change.notify_all()

    def wait(self, changes: int, timeout: float) -> None:
        """Wait until `self.changes` is no longer `changes`, at most `timeout` seconds."""
        with self._change:
            self._change.wait_for(lambda: self.changes != changes or self._closed, timeout)

    def close(self) -> None:
        """Stop loading; wait only a short time for a load that is running."""
        with self._change:
            self._closed = True
            self._change.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(_CLOSING)
        with self._change:
            for entry in self._in_memory:
                entry.loaded = None
            self._in_memory.clear()

    # ---- with the lock held ------------------------------------------------------------------------------------------

    def _take(self, name: str, path: str, before: Entry | None) -> Entry:
        """Return the entry for files that must be read; several callers may wait for the same load."""
        coming = self._coming.get(name)
        if coming is not None and coming.path == path and coming.state == "cold":
            return coming
        if len(self._entries) >= MAX_NAMES and before is None:
            raise InvalidParameterError(f"the maximum of {MAX_NAMES} adapters is reached: remove some", "lora_request")
        if before is None:
            self._entries[name] = entry = Entry(name, path)
            self._forget_loose()
            self._loose[name] = None
        elif before.path == path and before.state == "cold" and not before.attempts:
            entry = before  # it has not been read yet
        else:
            self._coming[name] = entry = Entry(name, path)
        return entry

    def _forget_loose(self) -> None:
        """Drop names that only requests registered, until there is one less than the limit; names in use stay."""
        many = len(self._loose) + 1 - MAX_LOOSE_NAMES
        if many > 0:
            busy = {*self._wanted, *self._expected, *self._asked, *self._coming.values()}
            known = ((name, self._entries[name]) for name in self._loose)
            idle = (name for name, each in known if not each.leases and each.state != "loading" and each not in busy)
            for name in list(islice(idle, many)):
                del self._loose[name], self._entries[name]
            self._drop_forgotten()

    def _others(self, name: str) -> str:
        if not self._entries:
            return ""
        names = list(self._entries)
        more = ", ..." if len(names) > _SHOWN_NAMES else ""
        return f"{nearest(name, names[:1000])}; there are {', '.join(names[:_SHOWN_NAMES]):.600}{more}"

    def _until_loaded(self, entry: Entry, timeout: float) -> AdapterInfo:
        with self._change:
            self._asked[entry] += 1
            self._begin()
            before = entry.attempts
            try:
                self._change.wait_for(
                    lambda: self._closed or entry.state in ("ready", "failed") or entry.attempts > before, timeout
                )
            finally:
                self._asked[entry] -= 1
                self._asked += Counter()  # drops entries with a count of 0
                self._drop_forgotten()
            if self._closed:
                raise EngineDeadError("the engine is closed")
            tried_in_vain = entry.attempts > before and entry.state != "ready" and entry.error is not None
            if entry.state == "failed" or tried_in_vain:  # another caller may have reset the state since
                raise AdapterError(f"adapter {entry.name!r:.80} cannot be used: {entry.error}")
            if entry.state != "ready" and entry.attempts == before:
                raise TimeoutError(_CROWDED if entry.crowded else "")
            return _info(entry)

    def _begin(self) -> None:
        """Wake the loading thread; start it if necessary."""
        if self._thread is None and not self._closed and self._order():
            self._thread = threading.Thread(target=self._run, name="candle-vllm-adapters", daemon=True)
            self._thread.start()
        self._change.notify_all()

    def _drop_forgotten(self) -> None:
        """Evict entries whose name is removed or has a new entry, if no sequence or caller leases or waits for them."""
        for entry in [each for each in self._in_memory if self._entries.get(each.name) is not each]:
            if not entry.leases and entry not in (*self._asked, *self._wanted, *self._expected):
                self._let_go(entry)

    def _let_go(self, entry: Entry) -> None:
        del self._in_memory[entry]
        self._bytes -= entry.nbytes
        entry.loaded, entry.state = None, "cold"

    def _order(self) -> list[Entry]:
        """Return the entries that callers and sequences wait for, each once; which of the two come first alternates."""
        wanted = dict.fromkeys((*self._wanted, *self._expected))
        asked = [entry for entry in self._asked if entry not in wanted]
        return [*asked, *wanted] if self._callers_next else [*wanted, *asked]

    def _next(self) -> Entry | None:
        """Return the next entry to load, if there is memory for it.

        If there is no memory for a sequence's entry, no entry of a later sequence is loaded, which could take that
        memory. A caller's entry without memory is skipped. An entry fails if pinned adapters leave no memory for it.
        """
        order, wanted, stopped = self._order(), {*self._wanted, *self._expected}, False
        for place, entry in enumerate(order):
            of_caller = entry not in wanted
            if entry.state != "cold" or (stopped and not of_caller):
                continue
            nbytes, behind = self._estimate_bytes(entry), order[place + 1 :]
            entry.crowded = not self._make_room(nbytes, 1, order[:place], behind)
            if entry.crowded and entry.mixed and not entry.nbytes:  # `refusal` needs the sizes of a whole mix
                entry.crowded = not self._make_room(1, 1, (), order[:place] + behind)
            if not entry.crowded:
                self._callers_next = not of_caller
                return entry
            if self._is_pinned_full(entry):
                self._failed(entry, _PINNED)
                self.changes += 1
                self._change.notify_all()
                continue
            stopped = stopped or not of_caller
        return None

    def _estimate_bytes(self, entry: Entry) -> int:
        """Estimate an entry's bytes: its earlier size, or the smallest in memory that pinned adapters leave space for.

        `_loaded` evicts more if the estimate is too low.
        """
        least = min((each.nbytes for each in self._in_memory), default=0)
        return entry.nbytes or min(least, max(self._unpinned_bytes(entry), 1))

    def _unpinned_bytes(self, entry: Entry) -> int:
        """Return the number of bytes that pinned adapters leave for an entry, which may replace one of them."""
        return self._most_bytes - sum(
            each.nbytes for each in self._in_memory if each.pinned and each.name != entry.name
        )

    def _is_pinned_full(self, entry: Entry) -> bool:
        full = sum(each.pinned for each in self._in_memory) >= self._most
        return full or self._unpinned_bytes(entry) < self._estimate_bytes(entry)

    def _make_room(self, nbytes: int, count: int, before: Sequence[Entry], behind: Sequence[Entry]) -> bool:
        """Evict adapters until there is enough memory; return False, without evicting, if that is impossible.

        Args:
            nbytes, count: bytes and number of further adapters that need memory.
            before, behind: entries that are needed sooner (never evicted), and later (evicted last).
        """
        stays = {entry for entry in self._in_memory if entry.leases or entry.pinned}.union(before)
        later = dict.fromkeys(entry for entry in reversed(behind) if entry in self._in_memory)
        leaving = [entry for entry in self._in_memory if entry not in stays and entry not in later]
        leaving += [entry for entry in later if entry not in stays]
        gone, number, size = 0, len(self._in_memory) + count, self._bytes + nbytes
        while number > self._most or size > self._most_bytes:
            if gone == len(leaving):
                return False
            number, size, gone = number - 1, size - leaving[gone].nbytes, gone + 1
        for entry in leaving[:gone]:
            self._let_go(entry)
            self.counts["adapter_evictions"] += 1
        return True

    def _failed(self, entry: Entry, said: str) -> None:
        entry.error, entry.state = said, "failed"
        entry.retry_at = self._clock() + FAILED_FOR
        entry.crowded = False
        self.counts["adapter_load_failures"] += 1
        if self._coming.get(entry.name) is entry:  # the name continues with its earlier files
            del self._coming[entry.name]

    def _loaded(self, entry: Entry, loaded: LoadedAdapter) -> None:
        packed = loaded.packed
        if packed.nbytes > self._most_bytes:
            said = f"it takes {packed.nbytes} bytes, and all adapters together may take at most {self._most_bytes}"
            self._failed(entry, f"{said}: set lora_memory={packed.nbytes} or more")
            return
        if packed.nbytes > self._unpinned_bytes(entry) and not entry.mixed:  # `refusal` counts the bytes of a mix
            self._failed(entry, _PINNED)
            return
        entry.loaded, entry.state, entry.error, entry.nbytes = loaded, "ready", None, packed.nbytes
        entry.info = AdapterInfo(
            name=entry.name, path=entry.path, digest=packed.digest.hex(), rank=packed.rank, modules=packed.modules,
            delta_norm=packed.norm, base=loaded.base, notes=loaded.notes,
        )  # fmt: skip
        self.counts["adapter_loads"] += 1
        self._in_memory[entry] = None
        self._bytes += entry.nbytes
        if self._coming.get(entry.name) is entry:
            del self._coming[entry.name]
            before = self._entries.get(entry.name)
            if before is not None:
                entry.pinned, before.pinned = before.pinned, False
            self._entries[entry.name] = entry
        order = self._order()
        place = order.index(entry) if entry in order else -1
        self._make_room(0, 0, order[: place + 1], order[place + 1 :])
        self._drop_forgotten()

    # ---- in the loading thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._change:
                before, entry = self.changes, self._next()
                while entry is None and self.changes == before and not self._closed:
                    self._change.wait()
                    entry = self._next()
                if self._closed:
                    return
                if entry is not None:
                    entry.state = "loading"
            if entry is not None:
                self._bring(entry)
            self.on_change()

    def _bring(self, entry: Entry) -> None:
        """Load an adapter; any error is a failure of only this adapter."""
        began = time.perf_counter()
        loaded, said = None, ""
        try:
            loaded = self._load(Path(entry.path))
        except CandleVllmError as error:
            said = str(error)
        except Exception as error:
            logger.exception("adapter %r could not be loaded", entry.name)
            said = f"{type(error).__name__}: {error}"
        with self._change:
            self._load_seconds += time.perf_counter() - began
            entry.attempts += 1
            if self._closed:
                return
            if loaded is None:
                logger.warning("adapter %r cannot be used: %s", entry.name, said)
                self._failed(entry, said)
            else:
                self._loaded(entry, loaded)
            self.changes += 1
            self._change.notify_all()


def _info(entry: Entry) -> AdapterInfo:
    now = {"nbytes": entry.nbytes, "state": entry.state, "pinned": entry.pinned, "error": entry.error}
    return msgspec.structs.replace(entry.info, **now)
