# SPDX-License-Identifier: MIT
"""Step 4, with adapters: which waiting sequences may begin, as far as their adapters say.

A sequence begins when its adapters are in memory and the step has room for them (`max_loras` different ones). Until
then others pass it. That is cheap where it waits for a load, and unfair where those that pass keep the room taken that
it waits for. So after as many have begun as a step has places, room is made for the first that is held back: no new
sequence begins with those of the running adapters that the fewest sequences have, as many as are in its way, nor with
an adapter that is not running. What runs ends as it would; then the place is its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from candle_vllm.core.engine.adapters.adapter_store import AdapterStore, Entry
from candle_vllm.core.engine.step.sequence import Sequence


class AdapterAdmission:
    """Holds waiting sequences back for their adapters, and lets each of them begin in the end.

    Args:
        store: has the adapters.
        most: different ones in a step.
        patience: sequences that may begin while one is held back, before room is made for it.
    """

    def __init__(self, store: AdapterStore, most: int, patience: int) -> None:
        self.store = store
        self.most = most
        self._patience = patience
        self._running: Counter[Entry] = Counter()  # running sequences of each adapter
        self._begun = 0
        self._first: Sequence | None = None  # of those that were held back in this step
        self._closed: frozenset[Entry] | None = None  # adapters that none may begin with for its sake
        self._stale = False  # others wait than when the store was told

    # ---- a step ------------------------------------------------------------------------------------------------------

    def look(self, waiting: Iterable[Sequence]) -> None:
        """A step is scheduled; `waiting` are in the order in which they should begin."""
        self._first = self._closed = None
        if self._stale:
            self._stale = False
            self.store.want(dict.fromkeys(entry for each in waiting for entry, _ in each.entries))

    def holds_back(self, sequence: Sequence) -> bool:
        """Whether a waiting sequence must wait on for its adapters' sake; if not, they are its own from now on."""
        entries = [entry for entry, _ in sequence.entries]
        closed = self._closed
        # What has been lent its adapters, and waits again or for blocks, holds the memory that the first may wait for.
        if closed is not None and not sequence.adapters and any(e in closed or e not in self._running for e in entries):
            return True
        others = len(self._running) + sum(entry not in self._running for entry in entries) - self.most
        if others <= 0 and self._lent(sequence):
            return False
        if sequence.held_since is None:
            sequence.held_since = self._begun
        if self._first is None:
            self._first = sequence
            crowded = any(entry.crowded for entry in entries)
            if self._begun - sequence.held_since >= self._patience and (others > 0 or crowded):
                self._closed = self._in_the_way(entries, max(1, others))
        return True

    def _lent(self, sequence: Sequence) -> bool:
        if not sequence.adapters:
            packed = self.store.lease(sequence.entries)
            if packed is None:
                return False
            sequence.adapters = packed
        return True

    def _in_the_way(self, entries: list[Entry], count: int) -> frozenset[Entry]:
        """The adapters that are soonest out of the step when none begins with them any more."""
        others = [entry for entry in self._running if entry not in entries]
        return frozenset(sorted(others, key=lambda entry: self._running[entry])[:count])

    # ---- what becomes of sequences -----------------------------------------------------------------------------------

    def waits(self, sequence: Sequence) -> None:
        """A sequence waits, anew or again."""
        self._stale = self._stale or bool(sequence.entries)

    def began(self, sequence: Sequence) -> None:
        """It runs from now on."""
        self._begun += 1
        if sequence.entries:
            self._running.update(entry for entry, _ in sequence.entries)
            self._stale = True

    def stopped(self, sequence: Sequence) -> None:
        """It runs no more: it has ended, or waits again."""
        for entry, _ in sequence.entries:
            self._running[entry] -= 1
            if not self._running[entry]:
                del self._running[entry]

    def ended(self, sequence: Sequence) -> None:
        """It is over; what it was lent is given back."""
        self._stale = self._stale or bool(sequence.entries)
        if sequence.adapters:
            self.store.release(sequence.entries)

    def running(self) -> Counter[str]:
        """Running sequences by adapter; for any thread."""
        counts: Counter[str] = Counter()
        for entry, count in dict(self._running).items():
            counts[entry.name] += count
        return counts
