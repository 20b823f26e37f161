# SPDX-License-Identifier: MIT
"""Step 4: who runs in the next step, and how many tokens of each. No torch here.

Every step has a budget of tokens. Sequences that decode come first with one token each, then prompts that have begun,
then waiting ones in order of priority and arrival, each with as much of its prompt as the budget still holds. A waiting
prompt of a higher priority comes before prompts that have begun. What the budget counts is rows. A sequence that
decodes may try drafts of its next tokens in rows of their own: a step then gives it as many tokens as were right, and
one more.

- A prompt is admitted when the blocks for all of it are free, so one that has begun never waits for memory.
- A waiting prompt whose next block is being computed by a running one waits for that block and shares it: the `n`
  sequences of one request, or a burst with a common beginning, compute it once.
- Of the `n` sequences of a request only half of all places run while another request waits.
- When a decoding sequence needs a block and none is free, the last in order (lowest priority, youngest) is preempted:
  its blocks are released and it is recomputed later, with the tokens that it already has.
- When a waiting sequence lacks a place or blocks that running sequences of a lower priority hold, these are preempted,
  the last in order first.

Where steps overlap, a step is scheduled while the one before still runs: `launched` books what a step will have done,
`settle` publishes it once it is known. A token that is not known yet counts as one to be run; its sequence is not
admitted anew before it is known. How many tokens come of drafts is known when their step is over, and not before; the
sequence waits for that.

Where a model's layers are divided among stages, as many steps are `in_flight`, so that each stage has one to run. A
sequence that decodes is in one of them at most, and waits for its token; a step takes its share of those that run. The
pieces of a prompt follow each other from step to step, for each stage runs the steps in their order.

A sequence with adapters or pictures, or whose first blocks are on disk, waits for them as well, and others pass it
meanwhile: see `AdapterAdmission`, `ImageStore` and `KeptBlocks`. Where a picture's tokens see each other, those of a
tile are run in one step, which has room for them.

Where layers keep a state (`states.py`), a prefix ends at a checkpoint. One is written behind the last full block of a
prompt, at the end of each of its pieces that ends with a block, behind the last full block of an answer, and where the
prefixes of two prompts part: a waiting prompt asks the running one for it, or takes it itself where the blocks are
there and the checkpoint is not. So pieces end with blocks, and drafts end before the last token of one.

Where layers have a window (`window_pages.py`), a prefix ends where these have the pages that the next token sees. A run
takes pages of these layers when it is scheduled, and gives back those behind its window. A prompt's piece ends where
pages do; a decoding sequence that finds none preempts as one that finds no block does. What lacks a page is not kept
elsewhere; a block whose page has gone is read from there anew.

With `reproducible`, no answer depends on others' memory: a sequence is admitted when blocks for its full length are
free, so that none is preempted, and only blocks of prompts are published, for what was generated was computed by other
kernels than a prompt is.
"""

from __future__ import annotations

import bisect
import collections
import itertools
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from typing import Protocol

import msgspec

from candle_vllm.core.engine.adapters.adapter_admission import AdapterAdmission
from candle_vllm.core.engine.cache.block_manager import BlockManager
from candle_vllm.core.engine.cache.states import StatePool
from candle_vllm.core.engine.cache.window_pages import WindowedBlocks
from candle_vllm.core.engine.step.sequence import Run, Sequence, Step, Tokens


class ImageAdmission(Protocol):
    """What the scheduler knows of an `ImageStore`."""

    def add(self, sequence: Sequence) -> None: ...

    def is_ready(self, sequence: Sequence) -> bool: ...

    def ended(self, sequence: Sequence) -> None: ...


class KeptAdmission(Protocol):
    """What the scheduler knows of `KeptBlocks`."""

    def offer(self, block: int, digest: bytes) -> None: ...

    def may_have(self, digest: bytes) -> bool: ...

    def is_ready(self, sequence: object, hashes: Seq[bytes], num_blocks: int) -> bool: ...

    def left(self, sequence: object) -> None: ...


class Scheduler:
    """Decides what runs; owns the queues.

    Args:
        blocks: the cache's block manager.
        max_num_seqs: most sequences in one step.
        max_num_batched_tokens: most tokens in one step; at least `max_num_seqs`.
        reproducible: see above.
        draft_rows: most rows of drafts in one step.
        adapters: says who may begin; None where no sequence has adapters.
        images: has what pictures become; None where no sequence has any.
        kept: has blocks that have left memory; None where they are gone.
        in_flight: steps that may be under way at once; see above.
        states: slots of layers' states; None where no layer keeps one.
    """

    def __init__(
        self,
        blocks: BlockManager,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        *,
        reproducible: bool = False,
        draft_rows: int = 0,
        adapters: AdapterAdmission | None = None,
        images: ImageAdmission | None = None,
        kept: KeptAdmission | None = None,
        in_flight: int = 1,
        states: StatePool | None = None,
    ) -> None:
        assert max_num_batched_tokens >= max_num_seqs
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.reproducible = reproducible
        self.draft_rows = draft_rows
        self.adapters = adapters
        self.images = images
        self.kept = kept
        self.in_flight = in_flight
        self.states = states
        self.windows = blocks if isinstance(blocks, WindowedBlocks) else None  # where pages are scarcer than blocks
        if states is not None:
            blocks.forgot = states.forget
        self.has_drafts = False  # some of `running` have
        self.running: list[Sequence] = []  # both in order of rank
        self.waiting: list[Sequence] = []
        self.num_preemptions = 0
        self._computing: Counter[bytes] = Counter()  # blocks that running prompts are about to publish
        self._going: _Going | None = None  # the step before, while all that runs is what decoded there
        self._all_held: int | None = None  # `changes` of the adapters for which all that wait were held back

    def add(self, sequence: Sequence) -> None:
        """Queues a new sequence."""
        if self.images is not None:
            self.images.add(sequence)
        self._wait(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Takes a finished or aborted sequence out and releases its blocks."""
        if sequence in self.running:
            self._stop(sequence)
        else:
            self.waiting.remove(sequence)
        if self.images is not None:
            self.images.ended(sequence)
        if self.kept is not None:
            self.kept.left(sequence)
        if self.adapters is not None:
            self._all_held = None
            self.adapters.ended(sequence)
            if not self.waiting:  # there may be no step that would tell
                self.adapters.look(())

    def schedule(self) -> Step:
        """What the step behind the one that was launched last runs; empty when there is nothing to do."""
        if self.adapters is not None:
            self.adapters.look(self.waiting)
        if self._going is not None and not self.has_drafts and (step := self._go_on(self._going)) is not None:
            return step
        step = self._schedule()
        decode = len(step) == len(self.running) and step and step[-1].decodes  # so do all before it
        self._going = _Going(step, self.blocks.block_size) if decode and self.in_flight == 1 else None
        return step

    def _go_on(self, going: _Going) -> Step | None:
        """One more token of each sequence; None where not all can go on, or others may join them."""
        if not going.left:
            return None
        if self.waiting and not self._is_all_held and (len(self.running) < self.max_num_seqs or self._is_outranked):
            return None
        begins, fills, size = going.begins(1), going.begins(2), self.blocks.block_size
        for place in begins:
            run = going.step[place]
            if run.start + 1 >= size * len(run.sequence.block_table) and not self._grow(run.sequence):
                return None
            if self.windows is not None and not self.windows.reaches(run.sequence, run.start + 1):
                return None
        runs = [Run(run.sequence, run.start + 1, 1, 1, run.admission, True) for run in going.step]
        runs = self._with_states(runs)
        step = Step(runs, goes_on=True, begins=begins, fills=fills)
        going.move_on(step)
        return step

    def _schedule(self) -> Step:
        """As `schedule`, whatever the step before was."""
        if self._is_outranked:
            collections.deque(self._admit(self.running[-1].request.priority, preempts=True), maxlen=0)
        scheduled, prompts, drafts = self._schedule_decodes()
        budget = self.max_num_batched_tokens - len(scheduled) - drafts
        for sequence in self._in_turn(prompts) if budget else ():
            if count := self._piece(sequence, budget):
                scheduled.append(Run.next(sequence, count))
                budget -= count
            if not budget:
                break
        stalls = self.windows is not None and bool(prompts) and not scheduled and not self._is_under_way
        if stalls and len(self.running) > 1:
            self._preempt(self.running[-1])  # prompts that have all pages, and none of which can go on
            return self._schedule()
        decodes = [item for item in scheduled if item.decodes]
        others = [item for item in scheduled if not item.decodes] if len(decodes) < len(scheduled) else ()
        return Step(self._with_states([*decodes, *others]))

    @property
    def _is_under_way(self) -> bool:
        """A step that was launched has tokens to give, or blocks to publish, whose pages may be free then."""
        size = self.blocks.block_size
        return any(each.num_ahead or each.num_computed_tokens // size > each.num_full_blocks for each in self.running)

    def _piece(self, sequence: Sequence, budget: int) -> int:
        """How many tokens of what a sequence has to run a step takes, at most `budget`."""
        if self.windows is not None:
            start = sequence.num_computed_tokens
            end = start + min(sequence.num_uncomputed_tokens, budget)
            budget = self.windows.advance(sequence, start, end, len(self.running) - 1) - start
        count = sequence.piece(budget)
        if self.states is None or count == sequence.num_uncomputed_tokens:
            return count
        whole = count - (sequence.num_computed_tokens + count) % self.blocks.block_size
        return whole if whole > 0 else count

    def _with_states(self, runs: list[Run]) -> list[Run]:
        """What is scheduled, and what it does with states."""
        states = self.states
        if states is None:
            return runs
        generated = self.blocks.enable_prefix_caching and not self.reproducible
        return [msgspec.structs.replace(run, state=states.plan(run, generated=generated)) for run in runs]

    def launched(self, items: Iterable[Run]) -> None:
        """Books a step that was launched: what is scheduled next comes behind it."""
        for item in items:
            sequence = item.sequence
            if item.wanted:
                sequence.num_ahead += 1  # how many drafts were right is not known ahead
                sequence.num_uncomputed_tokens += 1 - item.count
            else:
                sequence.num_uncomputed_tokens -= item.count

    def settle(self, items: Iterable[Run]) -> None:
        """Publishes the blocks that a launched step has filled; its tokens, but for what it drew, are known."""
        size = self.blocks.block_size
        for item in items:
            sequence, first, last = item.sequence, item.start // size, (item.start + item.count) // size
            holds = item.admission == sequence.num_admissions and bool(sequence.block_table)
            if last > first and holds:  # else nothing is filled, or it has not held its blocks ever since
                self._publish(sequence, first, last)
            if self.states is not None:
                self.states.settle(item, publish=holds and self.blocks.enable_prefix_caching)

    def settle_drafts(self, run: Run) -> None:
        """Settles a run with drafts, when its sequence has taken what was drawn.

        The cache keeps what led to that, and lets go of the other rows and of the blocks that only they needed.
        """
        sequence, size = run.sequence, self.blocks.block_size
        sequence.drafts = ()
        holds, end = run.admission == sequence.num_admissions and bool(sequence.block_table), len(sequence.tokens) - 1
        if holds:
            self._publish(sequence, run.start // size, end // size)
        if self.states is not None:
            self.states.settle(run, publish=holds and self.blocks.enable_prefix_caching)
            self.states.replay(sequence, end - run.start - 1)
        if not holds:
            return
        sequence.num_uncomputed_tokens = 1
        needed = self.blocks.blocks_for(end)
        if self.windows is not None:
            self.windows.cut(sequence, needed)
        if needed < len(sequence.block_table):
            self.blocks.release(sequence.block_table[needed:])
            del sequence.block_table[needed:]
            sequence.num_admissions += 1  # the next block at that place may be another

    def _publish(self, sequence: Sequence, first: int, last: int) -> None:
        """Blocks `first` to `last` of a sequence are full."""
        sequence.num_full_blocks = last
        if not self.blocks.enable_prefix_caching:
            return
        size = self.blocks.block_size
        hashes = sequence.hashes(size)
        for position in range(first, last):
            if not self.reproducible or (position + 1) * size <= sequence.num_prompt_tokens:
                self.blocks.publish(sequence.block_table[position], hashes[position])
                block = sequence.block_table[position]
                if self.kept is not None and (self.windows is None or self.windows.has_pages(block)):
                    self.kept.offer(block, hashes[position])
            self._computed(hashes[position])

    def _schedule_decodes(self) -> tuple[list[Run], list[Sequence], int]:
        """One token for every running sequence that has only one to run, preempting from the end where blocks lack.

        Returns:
            Those, the running sequences that have more to run, and the rows of drafts behind the former.
        """
        scheduled, prompts, tried, tries = [], [], 0, self.draft_rows > 0 and self.has_drafts
        running, size, apart = self.running, self.blocks.block_size, self.in_flight > 1
        share = -(-len(running) // self.in_flight)
        position = 0
        while position < len(running):
            sequence = running[position]
            if apart and (sequence.num_ahead or (sequence.num_uncomputed_tokens == 1 and len(scheduled) >= share)):
                position += 1
                continue
            length, left = len(sequence.tokens) + sequence.num_ahead, sequence.num_uncomputed_tokens
            if left == 1 and length < sequence.max_length:
                start = length - 1
                if (start >= size * len(sequence.block_table) and not self._grow(sequence)) or (
                    self.windows is not None and not self.windows.reaches(sequence, start)
                ):
                    self._preempt(running[-1])
                    continue
                if tries and (drafts := self._tried(sequence, tried)):
                    tried += len(drafts)
                    scheduled.append(Run.next(sequence, 1, drafts))
                elif start >= sequence.num_prompt_tokens:  # nearly always: what `Run.next` would say
                    scheduled.append(Run(sequence, start, 1, 1, sequence.num_admissions, True))
                else:
                    scheduled.append(Run.next(sequence, 1))
            elif left > 1:
                prompts.append(sequence)
            position += 1
        return scheduled, prompts, tried

    def _tried(self, sequence: Sequence, others: int) -> Tokens:
        """The drafts of a sequence that its length, the step and free blocks have room for, `others` taken off.

        Every running sequence keeps its row, and its next block.
        """
        if sequence.num_ahead or not sequence.drafts:
            return ()
        rows = min(self.draft_rows, self.max_num_batched_tokens - len(self.running)) - others
        count = min(len(sequence.drafts), rows, sequence.max_length - len(sequence.tokens) - 1)
        first, size = len(sequence.tokens), self.blocks.block_size
        if self.states is not None:
            count = min(count, size - 1 - first % size)
        end = self.reserve(sequence, first + count)
        if self.windows is not None:
            end = self.windows.advance(sequence, first - 1, end, len(self.running))
        return sequence.drafts[: max(0, end - first)]

    def reserve(self, sequence: Sequence, tokens: int) -> int:
        """Gives a running sequence blocks for so many tokens, while every running sequence keeps its next block.

        Returns:
            For how many of the tokens it has blocks now.
        """
        size = self.blocks.block_size
        while tokens > size * len(sequence.block_table):
            if self.blocks.num_free <= len(self.running) or not self._grow(sequence):
                break
        return min(tokens, size * len(sequence.block_table))

    def give_back(self, sequence: Sequence) -> None:
        """Takes back what was reserved beyond the tokens and drafts that the next step may run."""
        needed = self.blocks.blocks_for(len(sequence.tokens) + len(sequence.drafts))
        if self.windows is not None:
            self.windows.cut(sequence, needed)
        if needed < len(sequence.block_table):
            self.blocks.release(sequence.block_table[needed:])
            del sequence.block_table[needed:]
            sequence.num_admissions += 1  # the next block at that place may be another
            self._going = None  # its runs are of the admission before

    def _grow(self, sequence: Sequence) -> bool:
        """One block more, where one is free."""
        taken = self.blocks.allocate(1)
        if taken is None:
            return False
        sequence.block_table.extend(taken)
        return True

    def _in_turn(self, prompts: Iterable[Sequence]) -> Iterator[Sequence]:
        """Running prompts, and behind them waiting sequences that may begin; before a prompt those of a higher
        priority (a lower number), which would else wait until it is computed."""
        for prompt in prompts:
            if self.waiting and self.waiting[0].request.priority < prompt.request.priority:
                yield from self._admit(prompt.request.priority)
            yield prompt
        yield from self._admit()

    def _admit(self, before: int | None = None, *, preempts: bool = False) -> Iterator[Sequence]:
        """Moves waiting sequences to running, in order, while blocks and places last.

        Args:
            before: only sequences whose priority is a lower number than this.
            preempts: running sequences of a lower priority are preempted for what a waiting one lacks.
        """
        deferred, held = 0, 0
        full: object = None  # a request that has its share of places
        changes = None if self.adapters is None else self.adapters.store.changes
        while len(self.waiting) > deferred and (preempts or len(self.running) < self.max_num_seqs):
            sequence = self.waiting[deferred]
            if before is not None and sequence.request.priority >= before:
                return
            if sequence.request is full or self._has_its_share(sequence):
                full = sequence.request
                deferred += 1
                continue
            if sequence.num_ahead:  # preempted before its last token was known; nobody takes its place
                return
            if self.adapters is not None and sequence.entries and self.adapters.holds_back(sequence):
                deferred, held = deferred + 1, held + 1
                continue
            if self.images is not None and not self.images.is_ready(sequence):
                deferred += 1
                continue
            hashes = self._shareable(sequence)
            needed = self.blocks.blocks_for(sequence.num_tokens)
            if self.kept is not None:
                if self.windows is not None:
                    self.windows.renew(hashes, self.kept.may_have)
                if not self.kept.is_ready(sequence, hashes, needed):
                    deferred += 1
                    continue
            shared = self.blocks.lookup(hashes)
            if self.windows is not None:
                del shared[self.windows.depth(shared) :]
            if len(shared) < len(hashes) and self._computing[hashes[len(shared)]]:
                if self.states is not None and not self.states.is_coming(hashes[-1:]):
                    self._ask_for_checkpoint(hashes, len(shared))
                deferred += 1
                continue
            found = len(shared)
            if self.states is not None:
                while (depth := self.states.depth(hashes[: len(shared)])) < len(shared):
                    del shared[depth if self.windows is None else self.windows.depth(shared[:depth]) :]
                if self.states.is_coming(hashes[len(shared) : found]):
                    deferred += 1
                    continue
            fresh = needed - len(shared)
            while not self._fits(sequence, shared, fresh):
                last = self.running[-1] if preempts and self.running else sequence
                if last.request.priority <= sequence.request.priority:
                    return
                self._preempt(last)
            self.waiting.pop(deferred)
            self._start(sequence, shared, fresh)
            if self.states is not None:
                ends = {found, self._most_to_keep(sequence) // self.blocks.block_size}
                self.states.begin(sequence, len(shared), [end for end in sorted(ends) if end > len(shared)])
            yield sequence
        self._all_held = changes if held and held == len(self.waiting) else None

    def _fits(self, sequence: Sequence, shared: list[int], fresh: int) -> bool:
        """Whether there are a place and blocks for a sequence: blocks of the cache, and so many new ones."""
        if self.windows is not None and not self.windows.has_room(shared, len(shared) + fresh, len(self.running)):
            return False
        free = self.blocks.num_free_after_sharing(shared) - fresh
        return len(self.running) < self.max_num_seqs and free >= self._reserve(sequence)

    @property
    def _is_outranked(self) -> bool:
        """The first that waits has a higher priority than the last that runs, which may be preempted."""
        if self.reproducible or not self.waiting or not self.running:
            return False
        return self.waiting[0].request.priority < self.running[-1].request.priority

    def _has_its_share(self, sequence: Sequence) -> bool:
        """Half of all places are its request's, and another request waits: its other sequences are passed."""
        half = max(1, self.max_num_seqs // 2)
        if sequence.index < half or self.waiting[0].request is self.waiting[-1].request:  # a request's stand together
            return False
        return sum(other.request is sequence.request for other in self.running) >= half

    @property
    def _is_all_held(self) -> bool:
        """Nobody who waits may begin, and nothing has changed since that was seen."""
        return self.adapters is not None and self._all_held == self.adapters.store.changes

    def _reserve(self, sequence: Sequence) -> int:
        """Blocks that must stay free when a sequence is admitted."""
        if not self.reproducible:
            return len(self.running)  # each running sequence may soon need a block
        later = self._blocks_to_come(sequence) - self.blocks.blocks_for(sequence.num_tokens)
        return later + sum(self._blocks_to_come(other) - len(other.block_table) for other in self.running)

    def _blocks_to_come(self, sequence: Sequence) -> int:
        return self.blocks.blocks_for(min(sequence.max_length, self.blocks.num_blocks * self.blocks.block_size))

    def _shareable(self, sequence: Sequence) -> list[bytes]:
        """Hashes of the blocks that could come from the cache; the last token is always computed."""
        params = sequence.request.params
        if not self.blocks.enable_prefix_caching or params.skip_reading_prefix_cache:
            return []
        if params.prompt_logprobs is not None and sequence.index == 0:
            return []  # every position of the prompt has to be run
        size = self.blocks.block_size
        return sequence.hashes(size)[: (sequence.num_tokens - 1) // size]

    def _most_to_keep(self, sequence: Sequence) -> int:
        """Tokens of which checkpoints may be kept when it begins: the last one is always computed."""
        if not self.blocks.enable_prefix_caching:
            return 0
        return (sequence.num_prompt_tokens if self.reproducible else sequence.num_tokens) - 1

    def _ask_for_checkpoint(self, hashes: Seq[bytes], found: int) -> None:
        """Has the running prompt that computes the blocks behind so many write a checkpoint where it leaves these."""
        assert self.states is not None
        for other in self.running:
            theirs = other.hashes(self.blocks.block_size)
            if len(theirs) > found and theirs[found] == hashes[found]:
                alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(theirs, hashes))
                end = sum(1 for _ in alike)
                if end * self.blocks.block_size > other.num_computed_tokens:
                    self.states.want(other, end)
                return

    def _start(self, sequence: Sequence, shared: list[int], fresh: int) -> None:
        self.blocks.share(shared)
        taken = self.blocks.allocate(fresh)
        assert taken is not None
        sequence.block_table = array("i", shared + taken)
        sequence.num_admissions += 1
        if self.windows is not None:
            self.windows.begin(sequence, len(shared))
        cached = len(shared) * self.blocks.block_size
        sequence.num_uncomputed_tokens, sequence.num_full_blocks = sequence.num_tokens - cached, len(shared)
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = cached
        _insert(self.running, sequence)
        self._going = None
        if self.kept is not None:
            self.kept.left(sequence)
        if self.adapters is not None:
            self.adapters.began(sequence)
        if self.blocks.enable_prefix_caching:
            self._computing.update(self._unpublished(sequence))

    def _preempt(self, sequence: Sequence) -> None:
        self._stop(sequence)
        self.num_preemptions += 1
        self._wait(sequence)

    def _wait(self, sequence: Sequence) -> None:
        _insert(self.waiting, sequence)
        if self.adapters is not None:
            self._all_held = None
            self.adapters.waits(sequence)

    def _stop(self, sequence: Sequence) -> None:
        """Takes a sequence out of `running`, back to where nothing of it is computed."""
        self.running.remove(sequence)
        self._going = None
        if self.adapters is not None:
            self._all_held = None
            self.adapters.stopped(sequence)
        if self.blocks.enable_prefix_caching:
            for digest in self._unpublished(sequence):
                self._computed(digest)
        if self.states is not None:
            self.states.end(sequence)
        if self.windows is not None:
            self.windows.cut(sequence, 0)
        self.blocks.release(sequence.block_table)
        sequence.block_table = array("i")
        sequence.num_uncomputed_tokens, sequence.num_full_blocks = sequence.num_tokens, 0

    def _unpublished(self, sequence: Sequence) -> list[bytes]:
        """Hashes of the sequence's full blocks that are not in the cache yet."""
        return sequence.hashes(self.blocks.block_size)[sequence.num_full_blocks :]

    def _computed(self, digest: bytes) -> None:
        if self._computing[digest] > 1:
            self._computing[digest] -= 1
        else:
            del self._computing[digest]


class _Going:
    """Sequences that decode together, step after step.

    Attributes:
        step: the last of their steps.
        left: how many more there may be before one of them has its full length.
    """

    __slots__ = ("_begins", "_count", "_size", "left", "step")

    def __init__(self, step: Step, block_size: int) -> None:
        self.step = step
        self.left = min([run.sequence.max_length - run.start for run in step]) - 2
        self._size, self._count = block_size, 0
        self._begins: dict[int, list[int]] = {}  # who begins a block at which step from the first on, up to a block's
        for place, run in enumerate(step):
            self._begins.setdefault(-run.start % block_size, []).append(place)

    def begins(self, ahead: int) -> Seq[int]:
        """The places of those that begin a block so many steps behind the last."""
        return self._begins.get((self._count + ahead) % self._size, ())

    def move_on(self, step: Step) -> None:
        """The next step has been scheduled."""
        self.step = step
        self._count += 1
        self.left -= 1


class WholeTexts:
    """Who runs in the next step of a model without a cache: waiting texts, each whole and once; `Scheduler`'s twin.

    A text that is longer than the budget alone is run by itself.

    Args:
        max_num_seqs: most texts in one step.
        max_num_batched_tokens: most tokens in one step, but for a text that is longer.
        adapters: as for `Scheduler`.
    """

    num_preemptions = 0
    states = None
    running: tuple[Sequence, ...] = ()  # nothing goes on from step to step

    def __init__(
        self, max_num_seqs: int, max_num_batched_tokens: int, adapters: AdapterAdmission | None = None
    ) -> None:
        self.blocks = BlockManager(0, 1)
        self.adapters = adapters
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Queues a new text."""
        _insert(self.waiting, sequence)
        if self.adapters is not None:
            self.adapters.waits(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Takes a text out that has ended; one that was run waits no more."""
        if not sequence.num_admissions:
            self.waiting.remove(sequence)
        elif self.adapters is not None:
            self.adapters.stopped(sequence)
        if self.adapters is not None:
            self.adapters.ended(sequence)
            if not self.waiting:  # there may be no step that would tell
                self.adapters.look(())

    def schedule(self) -> Step:
        """The next texts in order of rank, as far as the budget goes; those of one length together."""
        adapters, taken, room, held = self.adapters, list[Sequence](), self.max_num_batched_tokens, 0
        if adapters is not None:
            adapters.look(self.waiting)
        while len(taken) < self.max_num_seqs and held < len(self.waiting):
            sequence = self.waiting[held]
            if taken and sequence.num_tokens > room:
                break
            if adapters is not None and sequence.entries and adapters.holds_back(sequence):
                held += 1
                continue
            taken.append(self.waiting.pop(held))
            room -= sequence.num_tokens
            sequence.num_admissions += 1
            if adapters is not None:
                adapters.began(sequence)
        return Step(Run.next(text, text.num_tokens) for text in sorted(taken, key=lambda text: text.num_tokens))

    def launched(self, items: Iterable[Run]) -> None:
        """Nothing comes behind a text."""

    def settle(self, items: Iterable[Run]) -> None:
        """Nothing stays of a text."""


def _insert(queue: list[Sequence], sequence: Sequence) -> None:
    bisect.insort(queue, sequence, key=lambda entry: entry.rank)
