# SPDX-License-Identifier: MIT
"""Allocate state slots for layers that keep a state of fixed size, without torch (step 4 of a request's life).

Unlike cached keys, such a state cannot be truncated to fewer tokens. So each running sequence has its own slot, and a
later prompt with the same prefix starts from a checkpoint: a slot that is never written again, identified by the hash
of the block that ends at the same token. A cached prefix must have all its blocks and a checkpoint at its end.

The state after a row can be written to only one slot: if a run ends with a checkpoint, the sequence's own slot is not
written, and its next run reads the checkpoint. No checkpoint includes a draft token: the state after a draft token is
not written, and the next step first applies the accepted draft tokens.
"""

from __future__ import annotations

import bisect
import itertools
from collections import Counter, OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as Seq

from candle_vllm.core.engine.step.sequence import Run, RunState, Sequence, SequenceState


class StatePool:
    """Allocates slots to sequences and checkpoints, and finds checkpoints by hash.

    Args:
        running: number of slots of running sequences.
        checkpoints: number of slots of checkpoints, numbered after them.
        block_size: tokens of a block.

    Attributes:
        offer: called with the slot and hash of each newly published checkpoint of a prompt.
    """

    def __init__(self, running: int, checkpoints: int, block_size: int) -> None:
        self.num_checkpoint_slots = checkpoints
        self.offer: Callable[[int, bytes], object] | None = None
        self._size = block_size
        self._free_running = list(range(running))[::-1]
        self._free = list(range(running, running + checkpoints))[::-1]
        self._published: OrderedDict[bytes, int] = OrderedDict()  # least recently used first
        self._pins: Counter[int] = Counter()  # checkpoints that the next runs will read, or the last runs have read
        self._gone: set[int] = set()  # pinned slots that are not published; free after their last pin
        self._coming: Counter[bytes] = Counter()  # hashes of announced checkpoints

    def stats(self) -> dict[str, int]:
        """Return the statistics of checkpoints, by field of `EngineStats`."""
        return {"checkpoints": len(self._published), "checkpoint_slots": self.num_checkpoint_slots}

    def depth(self, hashes: Seq[bytes]) -> int:
        """Return the number of blocks before the deepest checkpoint of a prefix; 0 without a checkpoint."""
        return next((count for count in range(len(hashes), 0, -1) if hashes[count - 1] in self._published), 0)

    def lookup(self, hashes: Seq[bytes]) -> list[int]:
        """Return the slots of the published checkpoints for `hashes`, up to the first hash without one."""
        return [self._published[digest] for digest in itertools.takewhile(self._published.__contains__, hashes)]

    def touch(self, hashes: Seq[bytes]) -> None:
        """Make the checkpoints that `lookup` finds the most recently used ones."""
        for digest in itertools.takewhile(self._published.__contains__, hashes):
            self._published.move_to_end(digest)

    def take_in(self, digest: bytes) -> int | None:
        """Publish a slot, whose checkpoint the caller then writes; None if every slot is pinned or pending."""
        slot = self._take()
        if slot is not None:
            self._published[digest] = slot
        return slot

    def num_free_after_sharing(self, slots: Seq[int]) -> int:
        """See `BlockManager`; an upper bound, because slots that runs write count as free."""
        del slots
        return self.num_checkpoint_slots - sum(1 for slot in self._published.values() if self._pins[slot])

    def is_coming(self, hashes: Seq[bytes]) -> bool:
        """Return whether a running sequence will write a checkpoint after one of these blocks."""
        return bool(self._coming) and any(digest in self._coming for digest in hashes)

    def begin(self, sequence: Sequence, cached: int, wanted: Seq[int]) -> None:
        """Allocate a slot to an admitted sequence with `cached` cached blocks, which end with a checkpoint; see
        `SequenceState` for `wanted`."""
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
        """Request a checkpoint after `count` blocks of a sequence; the last block must not be scheduled yet."""
        state = sequence.state
        if state is not None and self.num_checkpoint_slots and count not in state.announced:
            bisect.insort(state.wanted, count)
            digest = state.announced[count] = sequence.hashes(self._size)[count - 1]
            self._coming[digest] += 1

    def end(self, sequence: Sequence) -> None:
        """Free the slots of a sequence that has ended or was preempted."""
        state, sequence.state = sequence.state, None
        if state is None:
            return
        for count in list(state.announced):
            self._came(state, count)
        for slot in state.pending.values():
            self._discard(slot)
        for slot in (state.reading, state.going.source):
            if slot != state.plain.slot:
                self._unpin(slot)
        self._free_running.append(state.plain.slot)

    def plan(self, run: Run, *, generated: bool) -> RunState:
        """Choose the slots that the next run of a sequence reads and writes; `generated` allows checkpoints after
        generated tokens."""
        sequence, state, size = run.sequence, run.sequence.state, self._size
        assert state is not None
        now, slot = state.going, state.plain.slot
        if state.reading >= 0:  # even if the run that reads it is not done: a new owner writes in a later step
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
        """Note that `count` draft tokens of a sequence's last run were accepted."""
        state = sequence.state
        if state is not None and count:
            state.going = RunState(state.plain.slot, state.going.source, count)

    def commit(self, run: Run, *, publish: bool) -> None:
        """Commit a run; if `publish` is set (its blocks are published), publish its checkpoints."""
        sequence, state = run.sequence, run.sequence.state
        if state is None or run.state is None:
            return
        for row, slot in run.state.marks:
            count = (run.start + row + 1) // self._size
            if state.pending.get(count) != slot:
                continue  # the sequence was preempted after this run was scheduled
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
        """Unpublish a checkpoint, if there is one: its block was evicted, or the sequence has a later generated one."""
        slot = self._published.pop(digest, None)
        if slot is not None:
            self._discard(slot)

    def reset(self) -> None:
        """Unpublish all checkpoints, also those without a cached block; runs keep those that they will read."""
        for digest in list(self._published):
            self.forget(digest)

    def _mark(self, run: Run, count: int) -> list[tuple[int, int]]:
        """Return the row and the slot of a checkpoint after `count` blocks; [] if no checkpoint is written."""
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
        """Allocate a slot for a checkpoint: a free one, or the least recently used one that no run will read."""
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
        """Note that a requested checkpoint was written or will not be written: no sequence must wait for it."""
        digest = state.announced.pop(count, None)
        if digest is not None:
            self._coming[digest] -= 1
            if not self._coming[digest]:
                del self._coming[digest]
