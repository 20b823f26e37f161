# SPDX-License-Identifier: MIT
"""Decide which waiting sequences may be admitted, depending on their adapters (step 4 of a request's life).

A sequence is admitted when its adapters are in memory and the step has LoRA slots for them (`max_loras` different
adapters). Until then later sequences overtake it, and may take the slots or the memory that it waits for. So after
`patience` admissions, the running adapters with the fewest sequences are closed: one for each slot that the first
sequence held back lacks, or one for memory. Until then, new sequences whose adapters are closed or not running wait.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import Any, Final

from candle_vllm.core.engine.adapters.adapter_store import AdapterStore, Entry
from candle_vllm.core.engine.step.sequence import Sequence

_MOST_NAMED: Final = 64  # maximum number of adapters in `running_adapters`, and in `waiting_adapters`


class AdapterAdmission:
    """Holds sequences back until their adapters can run, without starvation.

    Args:
        most: maximum number of different adapters in a step (LoRA slots).
        patience: number of other admissions after which slots are freed for a sequence that is held back.
    """

    def __init__(self, store: AdapterStore, most: int, patience: int) -> None:
        self.store = store
        self.most = most
        self._patience = patience
        self._running: Counter[Entry] = Counter()  # running sequences of each adapter
        self._begun = 0  # number of admissions
        self._first: Sequence | None = None  # the first sequence that was held back in this step
        self._closed: frozenset[Entry] | None = None  # no sequence with these adapters is admitted before `_first`
        self._stale = False  # the waiting sequences have changed since the last `AdapterStore.want`

    # ---- a step ------------------------------------------------------------------------------------------------------

    def look(self, waiting: Iterable[Sequence]) -> None:
        """Begin to schedule a step; `waiting` are the waiting sequences in order of admission."""
        self._first = self._closed = None
        if self._stale:
            self._stale = False
            self.store.want(dict.fromkeys(entry for each in waiting for entry, _ in each.entries))

    def holds_back(self, sequence: Sequence) -> bool:
        """Return whether a waiting sequence must wait for its adapters; if not, it holds a lease from now on."""
        entries = [entry for entry, _ in sequence.entries]
        closed = self._closed
        # A sequence with a lease is not held back here: `_first` may wait for the memory of the leased adapters.
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
        """Return the running adapters with the fewest sequences: their slots become free soonest."""
        others = [entry for entry in self._running if entry not in entries]
        return frozenset(sorted(others, key=lambda entry: self._running[entry])[:count])

    # ---- changes of sequences ----------------------------------------------------------------------------------------

    def waits(self, sequence: Sequence) -> None:
        """Note that a sequence waits: it is new, or was preempted."""
        self._stale = self._stale or bool(sequence.entries)

    def began(self, sequence: Sequence) -> None:
        """Note that a sequence was admitted."""
        self._begun += 1
        if sequence.entries:
            self._running.update(entry for entry, _ in sequence.entries)
            self._stale = True

    def stopped(self, sequence: Sequence) -> None:
        """Note that a running sequence has ended or was preempted."""
        for entry, _ in sequence.entries:
            self._running[entry] -= 1
            if not self._running[entry]:
                del self._running[entry]

    def ended(self, sequence: Sequence, waiting: Seq[Sequence]) -> None:
        """Note that a sequence has ended, and end its lease; `waiting` are the sequences that still wait."""
        self._stale = self._stale or bool(sequence.entries)
        if sequence.adapters:
            self.store.release(sequence.entries)
        if not waiting:  # there may be no later step
            self.look(())

    def stats(self, waiting: Iterable[Sequence]) -> dict[str, Any]:
        """Return the statistics of the adapters, by field of `EngineStats`; may be called in any thread."""
        running = Counter[str]()
        for entry, count in dict(self._running).items():
            running[entry.name] += count
        waits = Counter(entry.name for each in list(waiting) for entry, _ in each.entries)
        return {
            **self.store.stats(),
            "max_adapters": self.most,
            "running_adapters": dict(running.most_common(_MOST_NAMED)),
            "waiting_adapters": dict(waits.most_common(_MOST_NAMED)),
        }
