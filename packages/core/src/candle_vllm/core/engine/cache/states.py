# SPDX-License-Identifier: MIT
"""Which slots of the state pool hold what, beside step 4: where layers keep a state of fixed size. No torch here.

Such a state cannot be cut back to fewer tokens as pages can. So a sequence that runs has a slot of its own, and what a
later prompt may go on from are checkpoints: they are never written again, and are named by the hash of the block that
ends where they do. A prefix is found as far as all of its blocks are there, and a checkpoint at their end.

A step writes the state behind a row once. Where that is a checkpoint at the end of a run, the sequence's next run goes
on from it. No checkpoint has taken in a drafted token: the state behind a draft is written nowhere, and the next step
takes in what was right of them.
"""

from __future__ import annotations

import bisect
import itertools
from collections import Counter, OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as Seq

from candle_vllm.core.engine.step.sequence import Run, RunState, Sequence, SequenceState


class StatePool:
    """Hands out slots, and remembers checkpoints.

    Args:
        running: slots of sequences that run.
        checkpoints: slots behind them.
        block_size: tokens of a block.

    Attributes:
        offer: called with the slot and the name of a checkpoint of a prompt that can be found from now on.
    """

    def __init__(self, running: int, checkpoints: int, block_size: int) -> None:
        self.num_checkpoint_slots = checkpoints
        self.offer: Callable[[int, bytes], object] | None = None
        self._size = block_size
        self._free_running = list(range(running))[::-1]
        self._free = list(range(running, running + checkpoints))[::-1]
        self._published: OrderedDict[bytes, int] = OrderedDict()  # least recently used first
        self._pins: Counter[int] = Counter()  # checkpoints that runs are yet to read, or read in the step before
        self._gone: set[int] = set()  # of these, slots that cannot be found any more
        self._coming: Counter[bytes] = Counter()  # checkpoints that running sequences are to write

    @property
    def num_checkpoints(self) -> int:
        """Checkpoints that can be found."""
        return len(self._published)

    def depth(self, hashes: Seq[bytes]) -> int:
        """Behind how many of these blocks the deepest checkpoint is; 0 for none."""
        return next((count for count in range(len(hashes), 0, -1) if hashes[count - 1] in self._published), 0)

    def lookup(self, hashes: Seq[bytes]) -> list[int]:
        """The slots of checkpoints of these names, as far as each of them can be found."""
        return [self._published[digest] for digest in itertools.takewhile(self._published.__contains__, hashes)]

    def take_in(self, digest: bytes) -> int | None:
        """A slot for a checkpoint that is written there at once, and can be found; None where there is no slot."""
        slot = self._take()
        if slot is not None:
            self._published[digest] = slot
        return slot

    @property
    def num_free(self) -> int:
        """Slots that a checkpoint could be taken in to."""
        return self.num_checkpoint_slots - sum(1 for slot in self._published.values() if self._pins[slot])

    def is_coming(self, hashes: Seq[bytes]) -> bool:
        """Whether a running sequence is to write a checkpoint behind one of these blocks."""
        return bool(self._coming) and any(digest in self._coming for digest in hashes)

    def begin(self, sequence: Sequence, cached: int, wanted: Seq[int]) -> None:
        """Gives a sequence that begins to run a slot.

        Args:
            sequence: whose.
            cached: blocks that were found, a checkpoint behind them.
            wanted: see `SequenceState`.
        """
        slot, source = self._free_running.pop(), -1
        if cached:
            digest = sequence.hashes(self._size)[cached - 1]
            source = self._published[digest]
            self._published.move_to_end(digest)
            self._pins[source] += 1
        sequence.state = SequenceState(RunState(slot, slot), RunState(slot, source))
        for count in wanted:
            self.want(sequence, count)

    def want(self, sequence: Sequence, count: int) -> None:
        """Has a checkpoint written behind so many blocks of a sequence, of which the last one is not scheduled yet."""
        state = sequence.state
        if state is not None and self.num_checkpoint_slots and count not in state.told:
            bisect.insort(state.wanted, count)
            digest = state.told[count] = sequence.hashes(self._size)[count - 1]
            self._coming[digest] += 1

    def end(self, sequence: Sequence) -> None:
        """A sequence runs no longer."""
        state, sequence.state = sequence.state, None
        if state is None:
            return
        for count in list(state.told):
            self._came(state, count)
        for slot in state.pending.values():
            self._discard(slot)
        for slot in (state.reading, state.going.source):
            if slot != state.plain.slot:
                self._unpin(slot)
        self._free_running.append(state.plain.slot)

    def plan(self, run: Run, *, generated: bool) -> RunState:
        """What a run does, which is the next one of its sequence.

        Args:
            run: what is scheduled.
            generated: whether checkpoints are written behind what was generated.
        """
        sequence, state, size = run.sequence, run.sequence.state, self._size
        assert state is not None
        now, slot = state.going, state.plain.slot
        if state.reading >= 0:  # steps run in their order: whoever takes that slot writes it behind the last run
            self._unpin(state.reading)
        state.reading = -1 if now.source == slot else now.source
        end, marks = run.start + run.count - len(run.drafts), list[tuple[int, int]]()
        while state.wanted and state.wanted[0] * size <= end:
            marks += self._mark(run, state.wanted.pop(0))
        count, rest = divmod(end, size)
        if not rest and count not in state.pending and (generated or end <= sequence.num_prompt_tokens):
            marks += self._mark(run, count)
        state.going = state.plain
        if not marks:
            return now
        row, last = marks[-1]
        if run.start + row + 1 == end:
            self._pins[last] += 1
            state.going = RunState(slot, last)
        return RunState(slot, now.source, now.replays, tuple(marks))

    def replay(self, sequence: Sequence, count: int) -> None:
        """So many of the drafts of the last run of a sequence were right."""
        state = sequence.state
        if state is not None and count:
            state.going = RunState(state.plain.slot, state.going.source, count)

    def settle(self, run: Run, *, publish: bool) -> None:
        """A run is over: its checkpoints can be found, where its blocks can."""
        sequence, state = run.sequence, run.sequence.state
        if state is None or run.state is None:
            return
        for row, slot in run.state.marks:
            count = (run.start + row + 1) // self._size
            if state.pending.get(count) != slot:
                continue  # the sequence has not run ever since
            del state.pending[count]
            self._came(state, count)
            digest = sequence.hashes(self._size)[count - 1]
            if not publish or digest in self._published:
                self._discard(slot)
                continue
            self._published[digest] = slot
            if count * self._size > sequence.num_prompt_tokens:
                self.forget(state.generated)
                state.generated = digest
            elif self.offer is not None:
                self.offer(slot, digest)

    def forget(self, digest: bytes) -> None:
        """A block has left the cache, or its checkpoint is of no more use."""
        slot = self._published.pop(digest, None)
        if slot is not None:
            self._discard(slot)

    def _mark(self, run: Run, count: int) -> list[tuple[int, int]]:
        """The row of a run behind so many blocks, and a slot for a checkpoint; nothing where none is written."""
        sequence, state = run.sequence, run.sequence.state
        assert state is not None
        known = count * self._size <= sequence.num_prompt_tokens
        there = known and sequence.hashes(self._size)[count - 1] in self._published
        slot = None if there else self._take()
        if slot is None:
            self._came(state, count)
            return []
        state.pending[count] = slot
        return [(count * self._size - run.start - 1, slot)]

    def _take(self) -> int | None:
        """A slot for a checkpoint: a free one, or that of the least recently used one that no run is to read."""
        if self._free:
            return self._free.pop()
        for digest, slot in self._published.items():
            if not self._pins[slot]:
                del self._published[digest]
                return slot
        return None

    def _discard(self, slot: int) -> None:
        if self._pins[slot]:
            self._gone.add(slot)
        else:
            self._free.append(slot)

    def _unpin(self, slot: int) -> None:
        if slot < 0:
            return
        self._pins[slot] -= 1
        if not self._pins[slot]:
            del self._pins[slot]
            if slot in self._gone:
                self._gone.remove(slot)
                self._free.append(slot)

    def _came(self, state: SequenceState, count: int) -> None:
        """Nobody is to wait for a checkpoint any more."""
        digest = state.told.pop(count, None)
        if digest is not None:
            self._coming[digest] -= 1
            if not self._coming[digest]:
                del self._coming[digest]
