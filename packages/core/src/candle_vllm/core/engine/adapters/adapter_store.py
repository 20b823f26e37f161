# SPDX-License-Identifier: MIT
"""AdapterStore: the adapters that an engine knows by name, those of them in memory, and the thread that loads them.

Beside step 4 of a request's life. An adapter lies on disk, or in memory as steps want it. What sequences wait for is
read, checked and packed by a thread of its own, one adapter after the other in the order of the waiting sequences, so
that no step waits for a file; what has not been used for longest leaves when there is no more room.

A sequence that begins to run takes a lease of its adapters and keeps it to its end, through preemptions as well: what
it began with is what it ends with, whatever becomes of the name meanwhile. A name that is removed, or whose files are
read anew, is forgotten at once; its entry goes when the last lease does.
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
from typing import Literal, Protocol

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
"""Seconds for which an adapter that could not be loaded is not tried again."""
PATIENCE = 110.0
"""Seconds for which a caller waits for an adapter."""
MAX_NAMES = 1 << 20
MAX_LOOSE_NAMES = 10_000
"""Names that requests alone have given, with a path; those that none has used for longest are forgotten."""
_SHOWN_NAMES = 10
_CLOSING = 1.0  # seconds that the loading thread is waited for: files may lie on a disk that does not answer


class Adapter(Protocol):
    """What is known here of an adapter that steps can take; see `PackedAdapter` in `kernels/lora`."""

    @property
    def digest(self) -> bytes: ...
    @property
    def alora(self) -> tuple[int, ...] | None: ...
    @property
    def rank(self) -> int: ...
    @property
    def norm(self) -> float: ...
    @property
    def modules(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def serial(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class LoadedAdapter:
    """What a load gives: the adapter as steps want it, the base that its files name, and what else they say."""

    packed: Adapter
    base: str | None = None
    notes: tuple[str, ...] = ()


class AdapterCall(msgspec.Struct, frozen=True):
    """What is asked of a store by hand: to add, remove or pin an adapter, or to list all."""

    what: Literal["add", "remove", "pin", "list"]
    adapter: AdapterUse | None = None


class Entry:
    """What a name stands for, from the day it is given to the day it is given to other files.

    Attributes:
        name, path: as they were given.
        state: as in `AdapterInfo`.
        loaded: what was loaded; None where it is not in memory.
        error: why it could not be loaded.
        crowded: it waits for room in memory that leases hold.
    """

    __slots__ = (
        "crowded", "error", "info", "leases", "loaded", "loads", "name", "nbytes", "path", "pinned", "retry_at",
        "state",
    )  # fmt: skip

    def __init__(self, name: str, path: str) -> None:
        self.name, self.path = name, path
        self.state = "cold"
        self.loaded: LoadedAdapter | None = None
        self.error: str | None = None
        self.crowded = self.pinned = False
        self.leases = self.loads = self.nbytes = 0
        self.retry_at = 0.0
        self.info = AdapterInfo(name=name, path=path)


Entries = tuple[tuple[Entry, float], ...]
"""Adapters of a sequence, and how much each acts."""


@dataclasses.dataclass
class StoreCounts:
    """What a store has done since the start; `seconds` are those of its loads."""

    loads: int = 0
    failures: int = 0
    evictions: int = 0
    seconds: float = 0.0


class AdapterStore:
    """Adapters by name, and the memory that they may take. Thread-safe.

    Args:
        load: reads, checks and packs the files at a path; called in a thread of the store's own.
        most: adapters in memory; None is no limit.
        most_bytes: of theirs. While one is loaded it is there beside them.
        most_at_once: different adapters of one request.

    Attributes:
        changes: grows whenever an adapter has come to memory, or could not be loaded.
        on_change: called behind that, in the loading thread.
        counts: of loads.
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
        self.counts = StoreCounts()
        self._load, self._clock = load, clock
        self._most, self._most_bytes, self._most_at_once = most or 1 << 62, most_bytes, most_at_once
        self._change = threading.Condition()  # guards everything below, and the entries
        self._entries: dict[str, Entry] = {}
        self._loose: dict[str, None] = {}  # names that nobody has added by hand, least recently used first
        self._coming: dict[str, Entry] = {}  # files that are to be read anew, by the name that they will have
        self._held: dict[Entry, None] = {}  # in memory, least recently used first
        self._bytes = 0
        self._wanted: tuple[Entry, ...] = ()  # by waiting sequences, most urgent first
        self._expected: tuple[Entry, ...] = ()  # by requests that are on their way, until `want` says who waits
        self._asked: Counter[Entry] = Counter()  # by callers who wait in `_until_loaded`
        self._callers_next = True
        self._thread: threading.Thread | None = None
        self._closed = False

    # ---- names -------------------------------------------------------------------------------------------------------

    def find(self, use: AdapterUse, *, again: bool = False) -> Entry:
        """What a request means by a name; with a path, a name that is new is taken.

        Args:
            use: the name.
            again: one that could not be loaded is tried again at once.

        Raises:
            InvalidParameterError: no adapter has this name, its files are others, or could not be loaded just now.
        """
        with self._change:
            entry = self._entries.get(use.name)
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
                    f"adapter {use.name!r:.80} has other files now than the request names: ask again by its name, or "
                    "add the request's files with load_inplace=True",
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
        """What a request's adapters are; those that act by nothing are left out. Errors as of `find`."""
        entries = tuple((self.find(use), use.scale) for use in uses)
        acting = tuple((entry, scale) for entry, scale in entries if scale)
        most = min(self._most_at_once, self._most)
        if len(acting) > most:
            raise InvalidParameterError(
                f"{len(acting)} adapters at once; a step may have {most} (max_loras, max_cpu_loras)", "lora_request"
            )
        return acting

    def call(self, call: AdapterCall) -> tuple[AdapterInfo, ...]:
        """Carries out what is asked by hand; of what is removed the name is told.

        Raises:
            AdapterError, InvalidParameterError: as of `add`.
            EngineOverloadedError: it was not loaded in time.
        """
        if call.what == "list":
            return self.infos()
        assert call.adapter is not None
        name = call.adapter.name
        if call.what == "remove":
            return (AdapterInfo(name=name, path=""),) if self.remove(name) else ()
        try:
            return (self.add(call.adapter, PATIENCE) if call.what == "add" else self.pin(name, PATIENCE),)
        except TimeoutError:
            raise EngineOverloadedError(
                f"adapter {name!r:.80} was not loaded within {PATIENCE:.0f} s: requests need the memory; try again "
                "later, or give adapters more (lora_memory, max_cpu_loras)"
            ) from None

    def add(self, use: AdapterUse, timeout: float) -> AdapterInfo:
        """Takes a name and loads its adapter, or loads one that is known.

        Raises:
            AdapterError: it cannot be loaded; a name that is new is forgotten then.
            InvalidParameterError: as of `find`.
            TimeoutError: it was not loaded in time; it may be later.
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
        """Loads an adapter and keeps it in memory until it is removed. Errors as of `add`."""
        with self._change:
            entry = self.find(AdapterUse(name=name), again=True)
            self._loose.pop(name, None)
            entry.pinned = True
        try:
            return self._until_loaded(entry, timeout)
        except BaseException:
            with self._change:
                entry.pinned = False
                self._change.notify_all()
            raise

    def remove(self, name: str) -> bool:
        """Forgets a name: requests that were taken go on, and the memory is free when the last of them has ended."""
        with self._change:
            entry = self._entries.pop(name, None)
            self._loose.pop(name, None)
            coming = self._coming.pop(name, None)
            for each in (entry, coming):
                if each is not None:
                    each.pinned = False
            self._drop_forgotten()
            self._change.notify_all()
            return entry is not None or coming is not None

    def infos(self) -> tuple[AdapterInfo, ...]:
        """All names that are known."""
        with self._change:
            return tuple(_told(entry) for entry in self._entries.values())

    def failure(self, entry: Entry) -> InvalidParameterError:
        """What a request hears of an adapter that could not be loaded; where its files lie, the log says."""
        reason, place = entry.error or "", Path(entry.path)
        if place.name and place.parent != Path():
            reason = reason.replace(f"{place}/", "").replace(f"{place}: ", "").replace(str(place), place.name)
        return InvalidParameterError(f"adapter {entry.name!r:.80} cannot be used: {reason}", "lora_request")

    @property
    def numbers(self) -> tuple[int, int, int]:
        """Names, adapters in memory, and their bytes."""
        return len(self._entries), len(self._held), self._bytes

    # ---- what sequences need -----------------------------------------------------------------------------------------

    def expect(self, entries: Entries) -> None:
        """A request for these is on its way to those that wait: they are loaded behind what is wanted already.

        The engine may be in a step, behind which it hears of the request; until then the disk need not be idle.
        """
        if any(entry.loaded is None for entry, _ in entries):
            with self._change:
                self._expected += tuple(entry for entry, _ in entries if entry not in self._expected)
                self._begin()

    def want(self, entries: Iterable[Entry]) -> None:
        """What is to be in memory next, most urgent first; in the place of what was said or expected before."""
        wanted = tuple(entries)
        if wanted != self._wanted or self._expected:
            with self._change:
                self._wanted, self._expected = wanted, ()
                self._drop_forgotten()
                self._begin()

    def lease(self, entries: Entries) -> tuple[tuple[Adapter, float], ...] | None:
        """The adapters, which stay in memory until they are released; None where not all of them are there."""
        if any(entry.loaded is None for entry, _ in entries):
            return None
        with self._change:
            packed = []
            for entry, scale in entries:
                if entry.loaded is None:  # it has left meanwhile
                    return None
                packed.append((entry.loaded.packed, scale))
            for entry, _ in entries:
                entry.leases += 1
                del self._held[entry]
                self._held[entry] = None
        return tuple(packed)

    def release(self, entries: Entries) -> None:
        """Gives a lease back."""
        with self._change:
            for entry, _ in entries:
                entry.leases -= 1
                assert entry.leases >= 0, f"adapter {entry.name} released twice"
            self._drop_forgotten()
            self._change.notify_all()

    def wait(self, changes: int, timeout: float) -> None:
        """Waits until something was loaded, or could not be, since `changes`."""
        with self._change:
            self._change.wait_for(lambda: self.changes != changes or self._closed, timeout)

    def close(self) -> None:
        """Loads nothing more; a load that goes on is left to itself."""
        with self._change:
            self._closed = True
            self._change.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(_CLOSING)
        with self._change:
            for entry in self._held:
                entry.loaded = None
            self._held.clear()

    # ---- with the lock -----------------------------------------------------------------------------------------------

    def _take(self, name: str, path: str, before: Entry | None) -> Entry:
        """The entry of files that are to be read; several callers may wait for the same reading."""
        coming = self._coming.get(name)
        if coming is not None and coming.path == path and coming.state == "cold":
            return coming
        if len(self._entries) >= MAX_NAMES and before is None:
            raise InvalidParameterError(f"{MAX_NAMES} adapters are known, and may be: remove some", "lora_request")
        if before is None:
            self._entries[name] = entry = Entry(name, path)
            self._forget_loose()
            self._loose[name] = None
        elif before.path == path and before.state == "cold" and not before.loads:
            entry = before  # it has not been read yet
        else:
            self._coming[name] = entry = Entry(name, path)
        return entry

    def _forget_loose(self) -> None:
        """Makes room for a name among those that requests alone have given; what is used by anybody stays."""
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
            return ", nor any other"
        names = list(self._entries)
        more = ", ..." if len(names) > _SHOWN_NAMES else ""
        return f"{nearest(name, names[:1000])}; there are {', '.join(names[:_SHOWN_NAMES]):.600}{more}"

    def _until_loaded(self, entry: Entry, timeout: float) -> AdapterInfo:
        with self._change:
            self._asked[entry] += 1
            self._begin()
            before = entry.loads
            try:
                self._change.wait_for(
                    lambda: self._closed or entry.state in ("ready", "failed") or entry.loads > before, timeout
                )
            finally:
                self._asked[entry] -= 1
                self._asked += Counter()  # what nobody asks for any more goes
            if self._closed:
                raise EngineDeadError("the engine is closed")
            tried_in_vain = entry.loads > before and entry.state != "ready" and entry.error is not None
            if entry.state == "failed" or tried_in_vain:  # another may have asked for it again since
                raise AdapterError(f"adapter {entry.name!r:.80} cannot be used: {entry.error}")
            if entry.state != "ready" and entry.loads == before:
                raise TimeoutError
            return _told(entry)

    def _begin(self) -> None:
        """Has the loading thread look what there is to do."""
        if self._thread is None and not self._closed and self._order():
            self._thread = threading.Thread(target=self._run, name="candle-vllm-adapters", daemon=True)
            self._thread.start()
        self._change.notify_all()

    def _drop_forgotten(self) -> None:
        """Lets go of what no name stands for, no sequence has and none waits for."""
        for entry in [each for each in self._held if not each.leases and not self._is_known(each)]:
            if entry not in (*self._asked, *self._wanted, *self._expected):
                self._let_go(entry)

    def _is_known(self, entry: Entry) -> bool:
        return self._entries.get(entry.name) is entry

    def _let_go(self, entry: Entry) -> None:
        del self._held[entry]
        self._bytes -= entry.nbytes
        entry.loaded, entry.state = None, "cold"

    def _order(self) -> list[Entry]:
        """What callers wait for and what sequences do, whose turn it is first; what both do is the sequences'."""
        wanted = dict.fromkeys((*self._wanted, *self._expected))
        asked = [entry for entry in self._asked if entry not in wanted]
        return [*asked, *wanted] if self._callers_next else [*wanted, *asked]

    def _next(self) -> Entry | None:
        """What is loaded next, when there is room for it.

        Of what sequences wait for that is the most urgent, for a later one would take its room. What a caller waits for
        holds up nobody: it takes turns with those, and where there is no room for it others pass.
        """
        order, wanted, stopped = self._order(), {*self._wanted, *self._expected}, False
        for place, entry in enumerate(order):
            of_caller = entry not in wanted
            if entry.state != "cold" or (stopped and not of_caller):
                continue
            entry.crowded = not self._make_room(self._guess(entry), 1, order[:place], order[place + 1 :])
            if not entry.crowded:
                self._callers_next = not of_caller
                return entry
            if self._is_pinned_full(entry):
                self._failed(entry, "all memory for adapters is taken by pinned ones: raise max_cpu_loras or "
                                    "lora_memory, or remove one")  # fmt: skip
                self.changes += 1
                self._change.notify_all()
                continue
            stopped = stopped or not of_caller
        return None

    def _guess(self, entry: Entry) -> int:
        """Bytes that it will take: as it did before, or as the smallest does; the rest is seen when it is there."""
        return entry.nbytes or min((each.nbytes for each in self._held), default=0)

    def _is_pinned_full(self, entry: Entry) -> bool:
        pinned = [each for each in self._held if each.pinned]
        room = self._most_bytes - sum(each.nbytes for each in pinned)
        return len(pinned) >= self._most or room < self._guess(entry)

    def _make_room(self, nbytes: int, count: int, before: Sequence[Entry], behind: Sequence[Entry]) -> bool:
        """Lets go of what is not needed until there is room; of nothing where that would not do.

        Args:
            nbytes, count: what room is needed for.
            before, behind: what is wanted sooner, which stays, and later, which goes last.
        """
        stays = {entry for entry in self._held if entry.leases or entry.pinned}.union(before)
        later = dict.fromkeys(entry for entry in reversed(behind) if entry in self._held)
        leaving = [entry for entry in self._held if entry not in stays and entry not in later]
        leaving += [entry for entry in later if entry not in stays]
        gone, number, size = 0, len(self._held) + count, self._bytes + nbytes
        while number > self._most or size > self._most_bytes:
            if gone == len(leaving):
                return False
            number, size, gone = number - 1, size - leaving[gone].nbytes, gone + 1
        for entry in leaving[:gone]:
            self._let_go(entry)
            self.counts.evictions += 1
        return True

    def _failed(self, entry: Entry, said: str) -> None:
        entry.error, entry.state = said, "failed"
        entry.retry_at = self._clock() + FAILED_FOR
        entry.crowded = False
        self.counts.failures += 1
        if self._coming.get(entry.name) is entry:  # what was there stays
            del self._coming[entry.name]

    def _loaded(self, entry: Entry, loaded: LoadedAdapter) -> None:
        packed = loaded.packed
        if packed.nbytes > self._most_bytes:
            self._failed(
                entry,
                f"it takes {packed.nbytes} bytes, and all adapters together may take {self._most_bytes}: set "
                f"lora_memory={packed.nbytes} or more",
            )
            return
        entry.loaded, entry.state, entry.error, entry.nbytes = loaded, "ready", None, packed.nbytes
        entry.info = AdapterInfo(
            name=entry.name, path=entry.path, digest=packed.digest.hex(), rank=packed.rank, modules=packed.modules,
            delta_norm=packed.norm, base=loaded.base, notes=loaded.notes,
        )  # fmt: skip
        self.counts.loads += 1
        self._held[entry] = None
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
        """Loads an adapter; whatever goes wrong is this adapter's failure."""
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
            self.counts.seconds += time.perf_counter() - began
            entry.loads += 1
            if self._closed:
                return
            if loaded is None:
                logger.warning("adapter %r cannot be used: %s", entry.name, said)
                self._failed(entry, said)
            else:
                self._loaded(entry, loaded)
            self.changes += 1
            self._change.notify_all()


def _told(entry: Entry) -> AdapterInfo:
    return AdapterInfo(
        name=entry.name, path=entry.path, digest=entry.info.digest, rank=entry.info.rank, modules=entry.info.modules,
        delta_norm=entry.info.delta_norm, nbytes=entry.nbytes, state=entry.state,  # type: ignore[arg-type]
        pinned=entry.pinned, base=entry.info.base, notes=entry.info.notes, error=entry.error,
    )  # fmt: skip
