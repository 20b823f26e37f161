# SPDX-License-Identifier: MIT
"""Drafts by layers that read the target's hidden states: EAGLE-3 heads and layers for further tokens (behind step 9).

What such a layer is given at position p is token p + 1 and what the target made of p. So it reads each of the target's
steps when that is over and its tokens are drawn, and nothing has to be kept: a prompt's chunk, a token, drafts that
were right. Where it guesses on, it is given its own hidden states in the target's place; those rows are written again
when the target has run them. Its cache has the target's blocks, as that of a model of drafts; the row of p is at p.

What the target did not run has no hidden states: a prompt's beginning that was found in the cache, unless another
sequence left it in the layer's own, and tokens that came while a sequence was not guessed for. A sequence's rows begin
behind that, at the next block, and the layer sees its blocks from there on as if they were all. It may guess worse.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.config import SpeculativeConfig
from candle_vllm.core.engine.drafts.draft_model import Asked, DraftModel, Own
from candle_vllm.core.engine.ranks.ranks import RankedRunner
from candle_vllm.core.engine.runners.model_runner import HeadRunner, StepwiseRunner
from candle_vllm.core.engine.step.batch import Batch
from candle_vllm.core.engine.step.live import LiveSequence
from candle_vllm.core.engine.step.scheduler import Scheduler
from candle_vllm.core.engine.step.sequence import Run
from candle_vllm.core.kernels.recorded import Value


class _Tail:
    """A sequence to the layer: its blocks from one on. Its tokens are named by its runs, as if they were drafts."""

    __slots__ = ("begin", "first", "table", "tokens")
    adapters = ()  # they change the target's hidden states, and nothing here

    def __init__(self, table: array[int], first: int, size: int) -> None:
        self.table, self.first, self.begin = table, first, first * size
        self.tokens: list[int] = []

    @property
    def block_table(self) -> array[int]:
        return self.table[self.first :]

    def run(self, sequence: Any, first: int, tokens: Sequence[int], wanted: bool) -> Run:
        """Rows of positions from `first` on, which are given `tokens`."""
        start, count = first - self.begin, len(tokens)
        return Run(cast("Any", self), start, count, int(wanted), sequence.num_admissions, False, tuple(tokens))


class DraftingHead(DraftModel):
    """Asks layers that read hidden states for guesses; `done` of a sequence is the first position without a row.

    Args:
        head: runs them, in a cache of as many blocks as the target's.
        target: runs the target.
        meant: the target's token of each of the layer's, [words]; None where they are the same.
        config, scheduler, words, longest, most_rows, cost: see `DraftModel`; `words` are rows of the embedding.
        guessed: tokens that it can guess.
    """

    reads_states = True

    def __init__(
        self,
        head: HeadRunner,
        target: StepwiseRunner | RankedRunner,
        meant: NDArray[np.int64] | None,
        config: SpeculativeConfig,
        scheduler: Scheduler,
        words: tuple[int, int],
        longest: int,
        most_rows: int,
        cost: float,
        guessed: int,
    ) -> None:
        super().__init__(head, config, scheduler, words, longest, most_rows, cost)
        self._head, self._target, self._tokens_meant = head, target, meant
        self._drawn_words = guessed
        self._tails: dict[LiveSequence, _Tail] = {}
        self._unread: dict[LiveSequence, tuple[int, int, int]] = {}  # positions, and the row of the first in the step
        self._states: NDArray[np.float32] | None = None  # of the target, for the next step
        self._back: dict[LiveSequence, NDArray[np.float32]] = {}  # what the last step gave, for the next guess

    # ---- what the drafter calls --------------------------------------------------------------------------------------

    def ran(self, batch: Batch, lives: Sequence[LiveSequence | None]) -> None:
        """A step of the target is over and its tokens are known; must be followed by `settle` before the next.

        Args:
            batch: the step.
            lives: the sequence of each of its runs; None of one that is not guessed for.
        """
        self._unread = {}
        if self.hopeless:
            return  # rows of these tokens are missing from now on, which `_start` sees
        for run, offset, live in zip(batch.runs, batch.query_start.tolist(), lives):
            if live is None:
                continue
            own, length = self._follow(live), len(live.sequence.tokens)
            if length < own.until:
                own.done = -1  # it is not worth it, and so not worth reading
                continue
            if own.done != run.start:
                self._start(own, live, run.start)
            first, last = max(run.start, own.done), min(run.start + run.count, length - 1)
            if last - self._tails[live].begin > self._longest:
                own.done = -1
            elif first < last:
                self._unread[live] = first, last, offset + first - run.start

    def settle(self) -> None:
        """Also reads what is not read yet of the target's step."""
        if self._unread and not self.hopeless:
            self._catch_up([], 0)
        for live in self._unread:
            self._owns[live].done = -1
        self._unread = {}
        super().settle()

    def forget(self, live: LiveSequence) -> None:
        """See `DraftModel`."""
        self._tails.pop(live, None)
        self._unread.pop(live, None)
        super().forget(live)

    # ---- what is in its cache ----------------------------------------------------------------------------------------

    def _begin(self, own: Own, live: LiveSequence) -> None:
        del live
        own.done = -1

    def _start(self, own: Own, live: LiveSequence, position: int) -> None:
        """The first row of a sequence with hidden states is that of `position`."""
        size, sequence = self._size, live.sequence
        first = own.full = -(-position // size)
        own.done = first * size
        if own.done == position and self._scheduler.blocks.enable_prefix_caching:
            hashes = sequence.hashes(size)
            while first and self._full.get(sequence.block_table[first - 1]) == hashes[first - 1]:
                first -= 1
        self._tails[live] = _Tail(sequence.block_table, first, size)

    def _judged(self, own: Own, right: int, length: int) -> None:
        del right, length
        own.done = own.base - 1  # what is behind came of guessed states

    def _behind(self, own: Own, length: int) -> int:
        del own, length
        return 0

    # ---- its steps ---------------------------------------------------------------------------------------------------

    def _catch_up(self, asked: list[Asked], lives: int) -> tuple[list[Run], list[Asked]]:
        """Rows of all that the target has run; those of `asked` that are up to date lead to a guess."""
        del lives
        asking = {each.live: each for each in asked}
        runs: list[Run] = []
        ready: list[Asked] = []
        rows: list[NDArray[np.int64]] = []
        unread, self._unread = self._unread, {}
        for live, (first, last, row) in unread.items():
            own, sequence, each = self._owns[live], live.sequence, asking.get(live)
            for place in range(first // self._size, len(sequence.block_table)):
                self._full.pop(sequence.block_table[place], None)
            runs.append(self._tails[live].run(sequence, first, sequence.tokens[first + 1 : last + 1], each is not None))
            rows.append(np.arange(row, row + last - first))
            own.done = last
            self._note_full(live, own)
            if each is not None:
                own.base = len(sequence.tokens)
                ready.append(each)
        if not runs:
            return [], []
        self._states = self._target.hidden_rows(np.concatenate(rows))
        if ready:
            return runs, ready
        began = time.perf_counter()
        self._logits(self._batches.build(runs), [])
        self.seconds += time.perf_counter() - began
        return [], []

    def _next(self, each: Asked) -> Run:
        sequence = each.live.sequence
        position = len(sequence.tokens) + len(each.guesses) - 2
        return self._tails[each.live].run(sequence, position, each.guesses[-1:], wanted=True)

    def _logits(self, batch: Batch, ready: list[Asked]) -> Value:
        if self._words < self._target_words:
            np.minimum(batch.tokens[0], self._words - 1, out=batch.tokens[0])
        states, self._states = self._states, None
        given = np.stack([self._back[each.live] for each in ready]) if states is None else states
        logits = self._head.run_on(batch, given, fused=states is None)
        self._back = {}
        if ready:
            back = self._head.given_back(batch.drawn_rows)
            self._back = {each.live: row for each, row in zip(ready, back, strict=True)}
        return logits

    def _meant(self, tokens: NDArray[np.int64]) -> list[int]:
        return (tokens if self._tokens_meant is None else self._tokens_meant[tokens]).tolist()
