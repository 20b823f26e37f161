# SPDX-License-Identifier: MIT
"""Step 4: choose the sequences of the next step, and the number of tokens of each. This module imports no torch.

Every step has a budget of rows. Decoding sequences come first with one row each, then running prompts, then waiting
sequences in order of rank (`serving_rank`, lowest first) and arrival, each with as large a chunk of its prompt as the
rest of the budget allows. A waiting prompt comes before running prompts of a higher rank. A decoding sequence has one
more row for each draft token: the step then appends the accepted draft tokens and one sampled token.

- A prompt is admitted when the blocks for all of it are free, so a running prompt never waits for blocks.
- A waiting prompt whose next block is being computed by a running one waits for that block and shares it, so the `n`
  sequences of one request, or a burst of requests with a common prefix, compute it once.
- The `n` sequences of one request occupy at most half of `max_num_seqs` while another request waits.
- When a decoding sequence needs a block and no block is free, the last running sequence (highest rank, youngest) is
  preempted: its blocks are freed, and its prompt and generated tokens are recomputed later.
- When a waiting sequence lacks blocks or the batch is full, running sequences that it `may_preempt` are preempted, the
  last one in the order first.

If steps overlap, a step is scheduled while the previous one still runs: `launched` counts its tokens in advance, and
`commit` publishes its blocks later. A sampled token that is not known yet counts as a token to run; a preempted
sequence is not admitted again before its token is known. The number of accepted draft tokens is known only after a
step, so a sequence with drafts waits for its step.

With pipeline parallelism, `in_flight` steps run at once, one on each stage. A decoding sequence is in at most one of
them, because it needs its last token; each step has an equal share of the decoding sequences. Consecutive steps may
have chunks of one prompt, because each stage runs the steps in order.

A sequence with adapters, images or offloaded blocks waits until these are loaded or encoded; others may overtake it:
see `AdapterAdmission`, `ImageStore` and `OffloadedBlocks`. If image tokens attend to each other, all tokens of a tile,
or of the prompt, run in one step.

If layers keep a state (`cache/states.py`), a cached prefix ends at a checkpoint. Checkpoints are written after the last
full block of a prompt, at the end of each prompt chunk that ends with a block, after the last full block of an answer,
and where the prefixes of two prompts diverge: the waiting prompt requests it from the running one, or writes it itself
if the blocks are cached without a checkpoint. So prompt chunks end with a block if possible, and a draft ends before a
block's last token.

If layers have a sliding window (`window_pages.py`), a cached prefix must have the pages that the next token attends to.
A run gets pages of these layers when it is scheduled, and frees pages that have left its window. A prompt chunk ends
where no page is free. If a decoding sequence finds no free page, the last running sequence is preempted. A block
without its page is not offloaded; a cached block that has lost its page is read from the KV tier again.

If layers have a window over the answer alone (`ModelConfig.answer_window`), generated tokens use the same slots in
turn, so a sequence stops growing. Their blocks are not published, and they run one by one, recomputed ones too.

With `reproducible`, no answer depends on the memory that other requests use: a sequence is admitted when blocks for its
full length are free and the pages suffice for all running sequences, so no sequence is preempted. Only blocks of
prompts are published, because the kernels for prompts and for generated tokens differ.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from typing import Any, ClassVar, Protocol

import msgspec

from candle_vllm.core.engine.adapters.adapter_admission import AdapterAdmission
from candle_vllm.core.engine.cache.block_manager import BlockManager
from candle_vllm.core.engine.cache.states import StatePool
from candle_vllm.core.engine.cache.window_pages import WindowedBlocks
from candle_vllm.core.engine.requests import may_preempt
from candle_vllm.core.engine.step.sequence import Run, Sequence, Step, Tokens


class ImageAdmission(Protocol):
    """The methods of `ImageStore` that the scheduler calls."""

    def add(self, sequence: Sequence) -> None: ...

    def is_ready(self, sequence: Sequence) -> bool: ...

    def left(self, sequence: Sequence) -> None: ...


class OffloadedAdmission(Protocol):
    """The methods of `OffloadedBlocks` that the scheduler calls."""

    def offer(self, block: int, digest: bytes) -> None: ...

    def may_have(self, digest: bytes) -> bool: ...

    def is_ready(self, sequence: object, hashes: Seq[bytes], num_blocks: int) -> bool: ...

    def left(self, sequence: object) -> None: ...


@dataclasses.dataclass(eq=False, repr=False)
class Scheduler:
    """Chooses the runs of each step; owns the queues.

    Args:
        blocks: the cache's block manager.
        max_num_seqs: maximum number of sequences in one step.
        max_num_batched_tokens: maximum number of tokens in one step; at least `max_num_seqs`.
        reproducible: see the module's docstring.
        draft_rows: maximum number of draft tokens in one step.
        adapters: admits sequences with adapters; None without LoRA.
        images: encodes images; None for a text-only model.
        offloaded: the offloaded blocks (KV tiers); None without KV offloading.
        in_flight: maximum number of steps that run at once; see the module's docstring.
        states: slots of layers' states; None if no layer keeps a state.
    """

    blocks: BlockManager
    max_num_seqs: int
    max_num_batched_tokens: int
    _: dataclasses.KW_ONLY
    reproducible: bool = False
    draft_rows: int = 0
    adapters: AdapterAdmission | None = None
    images: ImageAdmission | None = None
    offloaded: OffloadedAdmission | None = None
    in_flight: int = 1
    states: StatePool | None = None

    def __post_init__(self) -> None:
        assert self.max_num_batched_tokens >= self.max_num_seqs
        self.windows = self.blocks if isinstance(self.blocks, WindowedBlocks) else None  # None without sliding windows
        if self.states is not None:
            self.blocks.forgot = self.states.forget
        self.has_drafts = False  # whether a running sequence has drafts
        self.running: list[Sequence] = []  # in serving order, like `waiting`
        self.waiting: list[Sequence] = []
        self.num_preemptions = 0
        self._computing: Counter[bytes] = Counter()  # by hash, number of running sequences that will publish the block
        self._going: _Going | None = None  # the last step, if it decoded all running sequences
        self._all_held: int | None = None  # `AdapterStore.changes` when all waiting sequences waited for adapters

    def add(self, sequence: Sequence) -> None:
        """Queue a new or preempted sequence."""
        _insert(self.waiting, sequence)
        if self.images is not None:
            self.images.add(sequence)
        if self.adapters is not None:
            self._all_held = None
            self.adapters.waits(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Remove a finished or aborted sequence and free its blocks."""
        if sequence in self.running:
            self._stop(sequence)
        else:
            self.waiting.remove(sequence)
            if self.offloaded is not None:
                self.offloaded.left(sequence)
        if self.images is not None:
            self.images.left(sequence)
        if self.adapters is not None:
            self._all_held = None
            self.adapters.ended(sequence, self.waiting)

    def schedule(self) -> Step:
        """Return the runs of the next step; empty if there is nothing to do."""
        if self.adapters is not None:
            self.adapters.look(self.waiting)
        if self._going is not None and not self.has_drafts and (step := self._go_on(self._going)) is not None:
            return step
        step = self._schedule()
        decode = len(step) == len(self.running) and step and step[-1].decodes  # decoding runs come first, so all decode
        straight = decode and self.in_flight == 1 and step[0].sequence.answer_window is None
        self._going = _Going(step, self.blocks.block_size) if straight else None
        return step

    def _go_on(self, going: _Going) -> Step | None:
        """Return a step with the next token of the same sequences; None if `_schedule` must choose them."""
        if not going.left:
            return None
        if self.waiting and not self._is_all_held and (len(self.running) < self.max_num_seqs or self._is_outranked):
            return None
        begins = going.begins(1)
        for place in begins:
            run = going.step[place]
            if not self.blocks.extend(run.sequence, run.start + 1):
                return None
        runs = [Run(run.sequence, run.start + 1, 1, 1, run.admission, True) for run in going.step]
        if self.states is not None:
            runs = self._with_states(self.states, runs)
        step = Step(runs, goes_on=True, begins=begins, fills=going.begins(2))
        going.step, going.left = step, going.left - 1
        return step

    def _schedule(self) -> Step:
        if self._is_outranked:
            collections.deque(self._admit(self.running[-1].rank, preempts=True), maxlen=0)
        scheduled, prompts, drafts = self._schedule_decodes()
        budget = self.max_num_batched_tokens - len(scheduled) - drafts
        for sequence in self._prompts_in_order(prompts) if budget else ():
            if count := self._chunk(sequence, budget):
                scheduled.append(Run.next(sequence, count))
                budget -= count
            if not budget:
                break
        if self.windows is not None and prompts and not scheduled and len(self.running) > 1 and not self._is_under_way:
            self._preempt(self.running[-1])  # prompts occupy all pages, and none can continue
            return self._schedule()
        # Drafted runs follow the decoding ones: `by_rows` makes each of their rows a sequence.
        scheduled.sort(key=lambda item: (not item.decodes, not item.drafts))
        return Step(scheduled if self.states is None else self._with_states(self.states, scheduled))

    @property
    def _is_under_way(self) -> bool:
        """Whether a launched step is not committed yet, whose commit may free pages."""
        size = self.blocks.block_size
        return any(each.num_ahead or each.num_computed_tokens // size > each.num_full_blocks for each in self.running)

    def _chunk(self, sequence: Sequence, budget: int) -> int:
        """Return the number of tokens of a sequence that the step runs, at most `budget`."""
        if self.windows is not None:
            start = sequence.num_computed_tokens
            end = start + min(sequence.num_uncomputed_tokens, budget)
            budget = self.windows.advance(sequence, start, end, len(self.running) - 1) - start
        count = sequence.chunk(budget)
        if self.states is None or count == sequence.num_uncomputed_tokens:
            return count
        whole = count - (sequence.num_computed_tokens + count) % self.blocks.block_size
        return whole if whole > 0 else count

    def _with_states(self, states: StatePool, runs: list[Run]) -> list[Run]:
        """Add to each run the state slots that it reads and writes."""
        generated = self.blocks.enable_prefix_caching and not self.reproducible
        return [msgspec.structs.replace(run, state=states.plan(run, generated=generated)) for run in runs]

    def launched(self, items: Iterable[Run]) -> None:
        """Count the tokens of a launched step as computed; drop the embeddings of images whose prompts it completes."""
        for item in items:
            sequence = item.sequence
            if self.images is not None and item.start < sequence.num_prompt_tokens <= item.start + item.count:
                self.images.left(sequence)
            if item.wanted:
                sequence.num_ahead += 1  # the number of accepted drafts is not known yet
                sequence.num_uncomputed_tokens += 1 - item.count
            else:
                sequence.num_uncomputed_tokens -= item.count

    def commit(self, items: Iterable[Run]) -> None:
        """Publish the blocks that a step has filled, and its checkpoints; the tokens of its rows must be known."""
        size = self.blocks.block_size
        for item in items:
            sequence, first, last = item.sequence, item.start // size, (item.start + item.count) // size
            holds = item.admission == sequence.num_admissions and bool(sequence.block_table)
            if last > first and holds:  # not preempted since the launch
                self._publish(sequence, first, last)
            if self.states is not None:
                self.states.commit(item, publish=holds and self.blocks.enable_prefix_caching)

    def commit_drafts(self, run: Run) -> None:
        """Commit a run with drafts after its tokens were appended; drop rejected draft tokens' rows and blocks."""
        sequence, size = run.sequence, self.blocks.block_size
        sequence.drafts = ()
        holds, end = run.admission == sequence.num_admissions and bool(sequence.block_table), len(sequence.tokens) - 1
        if holds:
            self._publish(sequence, run.start // size, end // size)
        if self.states is not None:
            self.states.commit(run, publish=holds and self.blocks.enable_prefix_caching)
            self.states.replay(sequence, end - run.start - 1)
        if not holds:
            return
        sequence.num_uncomputed_tokens = 1
        self._shorten(sequence, end)

    def _publish(self, sequence: Sequence, first: int, last: int) -> None:
        """Publish a sequence's full blocks `first` to `last - 1` in the prefix cache, and offer them to the tiers."""
        sequence.num_full_blocks = last
        if not self.blocks.enable_prefix_caching:
            return
        size = self.blocks.block_size
        hashes = sequence.hashes(size)
        for position in range(first, min(last, len(hashes))):
            if not self.reproducible or (position + 1) * size <= sequence.num_prompt_tokens:
                self.blocks.publish(sequence.block_table[position], hashes[position])
                block = sequence.block_table[position]
                if self.offloaded is not None and (self.windows is None or self.windows.has_pages(block)):
                    self.offloaded.offer(block, hashes[position])
            self._computed(hashes[position])

    def _schedule_decodes(self) -> tuple[list[Run], list[Sequence], int]:
        """Schedule a token and the drafts of each decoding sequence; preempt the last sequences if blocks run out.
        Return the runs, the running prompts, and the number of draft rows in the runs."""
        scheduled, prompts, tried, tries = [], [], 0, self.draft_rows > 0 and self.has_drafts
        running, apart = self.running, self.in_flight > 1
        turns = bool(running) and running[0].answer_window is not None
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
                if not self.blocks.extend(sequence, sequence.place(start) if turns else start):
                    self._preempt(running[-1])
                    continue
                if tries and (drafts := self._fitting_drafts(sequence, tried)):
                    tried += len(drafts)
                    scheduled.append(Run.next(sequence, 1, drafts))
                elif start >= sequence.num_prompt_tokens:  # equal to `Run.next`, but faster
                    scheduled.append(Run(sequence, start, 1, 1, sequence.num_admissions, True))
                else:
                    scheduled.append(Run.next(sequence, 1))
            elif left > 1:
                prompts.append(sequence)
            position += 1
        return scheduled, prompts, tried

    def _fitting_drafts(self, sequence: Sequence, others: int) -> Tokens:
        """Return the drafts of a sequence that its length, the step's rows and the free blocks allow.

        Every running sequence still gets a row and a block; `others` is the number of draft rows of other sequences.
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
        """Allocate blocks to a running sequence for `tokens` tokens, but leave a free block for every running sequence.
        Return the number of tokens, at most `tokens`, for which the sequence has blocks now."""
        size = self.blocks.block_size
        while tokens > size * len(sequence.block_table):
            if self.blocks.num_free <= len(self.running) or not self.blocks.grow(sequence):
                break
        return min(tokens, size * len(sequence.block_table))

    def give_back(self, sequence: Sequence) -> None:
        """Free reserved blocks beyond the sequence's tokens and drafts."""
        if self._shorten(sequence, len(sequence.tokens) + len(sequence.drafts)):
            self._going = None  # its runs have an outdated admission number

    def _shorten(self, sequence: Sequence, tokens: int) -> bool:
        """Free a sequence's blocks beyond `tokens` tokens; return whether it had such blocks."""
        needed = self.blocks.blocks_for(tokens)
        if self.windows is not None:
            self.windows.cut(sequence, needed)
        if needed >= len(sequence.block_table):
            return False
        self.blocks.release(sequence.block_table[needed:])
        del sequence.block_table[needed:]
        sequence.num_admissions += 1  # a launched run must not publish the blocks that replace these
        return True

    def _prompts_in_order(self, prompts: Iterable[Sequence]) -> Iterator[Sequence]:
        """Yield running prompts and newly admitted sequences by rank; of equal rank, running prompts come first."""
        for prompt in prompts:
            if self.waiting and self.waiting[0].rank < prompt.rank:
                yield from self._admit(prompt.rank)
            yield prompt
        yield from self._admit()

    def _admit(self, before: int | None = None, *, preempts: bool = False) -> Iterator[Sequence]:
        """Move waiting sequences to `running` in order, while blocks are free and the batch is not full; yield each.

        Args:
            before: admit only sequences whose rank is lower.
            preempts: preempt running sequences for blocks, or if the batch is full, where `may_preempt` allows it.
        """
        deferred, held = 0, 0
        full: object = None  # a request that has its share of the batch
        changes = None if self.adapters is None else self.adapters.store.changes
        while len(self.waiting) > deferred and (preempts or len(self.running) < self.max_num_seqs):
            sequence = self.waiting[deferred]
            if before is not None and sequence.rank >= before:
                return
            if sequence.request is full or (sequence.index and self._has_its_share(sequence)):
                full = sequence.request
                deferred += 1
                continue
            if sequence.num_ahead:  # preempted before its token was known; it must not be overtaken
                return
            if self.images is not None and not self.images.is_ready(sequence):  # before adapters are leased
                deferred += 1
                continue
            if self.adapters is not None and sequence.entries and self.adapters.holds_back(sequence):
                deferred, held = deferred + 1, held + 1
                continue
            hashes = self._shareable(sequence)
            needed = self.blocks.blocks_for(sequence.num_places(sequence.num_tokens))
            if self.offloaded is not None:
                if self.windows is not None:
                    self.windows.renew(hashes, self.offloaded.may_have)
                if not self.offloaded.is_ready(sequence, hashes, needed):
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
                if not may_preempt(sequence.request, last.request):
                    return
                self._preempt(last)
            self.waiting.pop(deferred)
            self._start(sequence, shared, fresh)
            if self.states is not None:
                ends = {found, self._max_checkpoint(sequence) // self.blocks.block_size}
                self.states.begin(sequence, len(shared), [end for end in sorted(ends) if end > len(shared)])
            yield sequence
        self._all_held = changes if held and held == len(self.waiting) else None

    def _fits(self, sequence: Sequence, shared: list[int], fresh: int) -> bool:
        """Return whether a sequence with `shared` cached blocks and `fresh` new ones fits the batch and memory."""
        if self.windows is not None and not self.windows.has_room(shared, len(shared) + fresh, len(self.running)):
            return False
        if self.windows is not None and self.reproducible and self.running:  # one sequence always has pages
            lengths = [self._blocks_at_full_length(each) for each in (sequence, *self.running)]
            if not self.windows.suffice(lengths):
                return False
        free = self.blocks.num_free_after_sharing(shared) - fresh
        return len(self.running) < self.max_num_seqs and free >= self._reserve(sequence)

    @property
    def _is_outranked(self) -> bool:
        """Whether the first waiting sequence may preempt the last running one."""
        if self.reproducible or not self.waiting or not self.running:
            return False
        return may_preempt(self.waiting[0].request, self.running[-1].request)

    def _has_its_share(self, sequence: Sequence) -> bool:
        """Return whether a sequence's request has half of the batch while another request waits."""
        half = max(1, self.max_num_seqs // 2)
        if sequence.index < half or self.waiting[0].request is self.waiting[-1].request:  # no other request waits
            return False
        return sum(other.request is sequence.request for other in self.running) >= half

    @property
    def _is_all_held(self) -> bool:
        """Whether adapters hold back all waiting sequences; computed again after each change of an adapter."""
        return self.adapters is not None and self._all_held == self.adapters.store.changes

    def _reserve(self, sequence: Sequence) -> int:
        """Return the number of blocks that must stay free when a sequence is admitted."""
        if not self.reproducible:
            return len(self.running)  # each running sequence may soon need a block
        now = self.blocks.blocks_for(sequence.num_places(sequence.num_tokens))
        later = self._blocks_at_full_length(sequence) - now
        return later + sum(self._blocks_at_full_length(other) - len(other.block_table) for other in self.running)

    def _blocks_at_full_length(self, sequence: Sequence) -> int:
        longest = sequence.num_places(sequence.max_length)
        return self.blocks.blocks_for(min(longest, self.blocks.num_blocks * self.blocks.block_size))

    def _shareable(self, sequence: Sequence) -> list[bytes]:
        """Return hashes of the blocks that may come from the prefix cache; the last token is always computed."""
        params = sequence.request.params
        if not self.blocks.enable_prefix_caching or params.skip_reading_prefix_cache:
            return []
        if self.states is not None and not self.states.num_checkpoint_slots:
            return []  # no prefix can be reused, so waiting for its blocks would be useless
        if params.prompt_logprobs is not None and sequence.index == 0:
            return []  # prompt logprobs need every position of the prompt
        size = self.blocks.block_size
        return sequence.hashes(size)[: (sequence.num_tokens - 1) // size]

    def _max_checkpoint(self, sequence: Sequence) -> int:
        """Return the maximum number of tokens before a checkpoint; the last token is always computed."""
        if not self.blocks.enable_prefix_caching:
            return 0
        return (sequence.num_prompt_tokens if self.reproducible else sequence.num_tokens) - 1

    def _ask_for_checkpoint(self, hashes: Seq[bytes], found: int) -> None:
        """Request a checkpoint at the end of the common prefix from the running prompt that computes block `found`."""
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
        self.blocks.begin(sequence, shared, fresh)
        sequence.num_admissions += 1
        cached = len(shared) * self.blocks.block_size
        sequence.num_uncomputed_tokens, sequence.num_full_blocks = sequence.num_tokens - cached, len(shared)
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = cached
        _insert(self.running, sequence)
        self._going = None
        if self.offloaded is not None:
            self.offloaded.left(sequence)
        if self.adapters is not None:
            self.adapters.began(sequence)
        if self.blocks.enable_prefix_caching:
            self._computing.update(self._unpublished(sequence))

    def stats(self: Scheduler | WholeTexts) -> dict[str, Any]:
        """Return the statistics of the queues, the cache and the adapters, by field of `EngineStats`."""
        blocks = self.blocks
        return {
            "num_running": len(self.running),
            "num_waiting": len(self.waiting),
            "num_blocks": blocks.num_blocks,
            "num_free_blocks": blocks.num_free,
            "block_size": blocks.block_size,
            "preemptions": self.num_preemptions,
            **({} if self.states is None else self.states.stats()),
            **({} if self.adapters is None else self.adapters.stats(self.waiting)),
        }

    def _preempt(self, sequence: Sequence) -> None:
        self._stop(sequence)
        self.num_preemptions += 1
        self.add(sequence)

    def _stop(self, sequence: Sequence) -> None:
        """Remove a sequence from `running`, free its blocks, and mark all its tokens as uncomputed."""
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
        self.blocks.end(sequence)
        sequence.num_uncomputed_tokens, sequence.num_full_blocks = sequence.num_tokens, 0

    def _unpublished(self, sequence: Sequence) -> list[bytes]:
        """Return hashes of the sequence's full blocks that are not published yet."""
        return sequence.hashes(self.blocks.block_size)[sequence.num_full_blocks :]

    def _computed(self, digest: bytes) -> None:
        if self._computing[digest] > 1:
            self._computing[digest] -= 1
        else:
            del self._computing[digest]


class _Going:
    """A batch of sequences that decode together for several steps.

    Attributes:
        step: its last step.
        left: number of further steps until a sequence reaches its maximum length.
    """

    __slots__ = ("_begins", "_size", "left", "step")

    def __init__(self, step: Step, block_size: int) -> None:
        self.step = step
        self.left = min([run.sequence.max_length - run.start for run in step]) - 2
        self._size = block_size
        self._begins: dict[int, list[int]] = {}  # runs that begin a block, by the value of `left` modulo block size
        for place, run in enumerate(step):
            self._begins.setdefault((run.start + self.left) % block_size, []).append(place)

    def begins(self, ahead: int) -> Seq[int]:
        """Return the indices of the runs that begin a block `ahead` steps after the last one."""
        return self._begins.get((self.left - ahead) % self._size, ())


@dataclasses.dataclass(eq=False, repr=False)
class WholeTexts:
    """Scheduler of an encoder, which has no cache: each text runs whole, in one step.

    Args:
        max_num_seqs: maximum number of texts in one step.
        max_num_batched_tokens: maximum number of tokens in one step; a longer text runs alone.
        adapters: see `Scheduler`.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    adapters: AdapterAdmission | None = None
    num_preemptions: ClassVar[int] = 0
    states: ClassVar[None] = None
    running: ClassVar[tuple[Sequence, ...]] = ()  # a text runs in one step only
    stats = Scheduler.stats

    def __post_init__(self) -> None:
        self.blocks = BlockManager(0, 1)
        self.waiting: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Queue a new text."""
        _insert(self.waiting, sequence)
        if self.adapters is not None:
            self.adapters.waits(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Remove a finished or aborted text; a text that has run is no longer in the queue."""
        if not sequence.num_admissions:
            self.waiting.remove(sequence)
        elif self.adapters is not None:
            self.adapters.stopped(sequence)
        if self.adapters is not None:
            self.adapters.ended(sequence, self.waiting)

    def schedule(self) -> Step:
        """Return runs of the first texts in serving order that the budget allows, sorted by length."""
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
        """Do nothing: a text has no later step."""

    def commit(self, items: Iterable[Run]) -> None:
        """Do nothing: a text has no blocks to publish."""


def _insert(queue: list[Sequence], sequence: Sequence) -> None:
    bisect.insort(queue, sequence, key=lambda entry: (entry.rank, entry.order))
