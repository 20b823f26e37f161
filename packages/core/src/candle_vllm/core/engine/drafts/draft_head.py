# SPDX-License-Identifier: MIT
"""Drafts by layers that read the target's hidden states: EAGLE-3 heads, multi-token prediction (after a step's commit).

At position p the layer reads token p + 1 and the target's hidden state of position p. So it reads the rows of each
target step (a prompt chunk, a token, accepted drafts) after that step's tokens are sampled. For further draft tokens it
reads its own hidden states instead of the target's. After the target has run these positions, the layer reads their
hidden states and overwrites its cache there. Its cache has the same block numbers and positions as the target's.

Hidden states are not stored, so the layer's cache lacks rows for some tokens: a prefix from the prefix cache, unless
another sequence wrote these rows, and tokens that were appended while the sequence got no drafts. The sequence's rows
then begin at the next block, and the layer attends only to rows from there on, which may make its draft tokens worse.

A head without a cache of its own (Gemma 4's drafter) reads the target's cache instead. It reads only the last row
of a step, and all of its draft tokens have the position of the sequence's last token.
"""

from __future__ import annotations

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
    """The layer's rows of a target sequence, from block `first` on; `run` passes their tokens as `Run.drafts`."""

    __slots__ = ("begin", "first", "table", "tokens")
    answer_window = None

    def __init__(self, table: array[int], first: int, size: int) -> None:
        self.table, self.first, self.begin = table, first, first * size
        self.tokens: list[int] = []

    @property
    def block_table(self) -> array[int]:
        return self.table[self.first :]

    def run(self, sequence: Any, first: int, tokens: Sequence[int], wanted: bool) -> Run:
        """Return a run whose rows have positions from `first` on and read `tokens`."""
        start, count = first - self.begin, len(tokens)
        return Run(cast("Any", self), start, count, int(wanted), sequence.num_admissions, False, tuple(tokens))


class DraftingHead(DraftModel):
    """Proposes draft tokens by layers that read hidden states; here `Own.done` is the first position without a row.

    Args:
        head: runs the layers, in a cache with as many blocks as the target's.
        target: runs the target model.
        meant: the target's token id for each token id of the head; None if the ids are the same.
        config, scheduler, words, longest, most_rows, cost: see `DraftModel`; `words` are sizes of the embedding tables.
        vocab_size: size of the head's output vocabulary.
        shares: whether the head reads the target's cache instead of its own.
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
        vocab_size: int,
        shares: bool = False,
    ) -> None:
        super().__init__(head, config, scheduler, words, longest, most_rows, cost)
        self._head, self._target, self._tokens_meant = head, target, meant
        self._vocab_size, self._shares = vocab_size, shares
        self._tails: dict[LiveSequence, _Tail] = {}
        self._unread: dict[LiveSequence, tuple[int, int, int]] = {}  # first and end position, row of the first
        self._states: NDArray[np.float32] | None = None  # the target's hidden states, for the layer's next step
        self._back: dict[LiveSequence, NDArray[np.float32]] = {}  # the layer's own hidden states, for its next step

    # ---- called by the drafter ---------------------------------------------------------------------------------------

    def ran(self, batch: Batch, lives: Sequence[LiveSequence | None]) -> None:
        """Record a committed target step's rows to read; the caller calls `release` before the target's next step.

        Args:
            lives: the sequence of each run; None for a sequence that gets no drafts.
        """
        self._unread = {}
        if self.hopeless:
            return  # these tokens get no rows; `_start` begins after them later
        for run, offset, live in zip(batch.runs, batch.query_start.tolist(), lives):
            if live is None:
                continue
            own, length = self._follow(live), len(live.sequence.tokens)
            if length < own.until:
                own.done = -1  # drafting is paused for this sequence, so its rows are not read
                continue
            if own.done != run.start:
                self._start(own, live, run.start)
            first, last = max(run.start, own.done), min(run.start + run.count, length - 1)
            if last - self._tails[live].begin > self._longest:
                own.done = -1
            elif first < last:
                self._unread[live] = first, last, offset + first - run.start

    def release(self) -> None:
        """Read the target's rows that are still unread, then do what `DraftModel.release` does."""
        if self._unread and not self.hopeless:
            self._catch_up([], 0)
        for live in self._unread:
            self._owns[live].done = -1
        self._unread = {}
        super().release()

    def forget(self, live: LiveSequence) -> None:
        self._tails.pop(live, None)
        self._unread.pop(live, None)
        super().forget(live)

    def reset(self) -> None:
        self._unread = {}
        super().reset()

    # ---- contents of the layer's cache -------------------------------------------------------------------------------

    def _begin(self, own: Own, live: LiveSequence) -> None:
        del live
        own.done = -1

    def _start(self, own: Own, live: LiveSequence, position: int) -> None:
        """Choose the block where the sequence's rows begin; `position` is the first with a hidden state."""
        size, sequence = self._size, live.sequence
        first = own.full = 0 if self._shares else -(-position // size)
        own.done = position if self._shares else first * size
        if own.done == position and not self._shares and self._scheduler.blocks.enable_prefix_caching:
            hashes = sequence.hashes(size)
            while first and self._full.get(sequence.block_table[first - 1]) == hashes[first - 1]:
                first -= 1
        self._tails[live] = _Tail(sequence.block_table, first, size)

    def _judged(self, own: Own, right: int, length: int) -> None:
        del right, length
        own.done = own.base - 1  # later rows were made from the head's own hidden states

    def _behind(self, own: Own, length: int) -> int:
        del own, length
        return 0

    # ---- the layer's steps -------------------------------------------------------------------------------------------

    def _catch_up(self, asked: list[Asked], lives: int) -> tuple[list[Run], list[Asked]]:
        """Return runs of unread target rows with their `asked` sequences; without such sequences, run the rows now."""
        del lives
        asking = {each.live: each for each in asked}
        runs: list[Run] = []
        ready: list[Asked] = []
        rows: list[NDArray[np.int64]] = []
        unread, self._unread = self._unread, {}
        for live, (first, last, row) in unread.items():
            own, sequence, each = self._owns[live], live.sequence, asking.get(live)
            if self._shares:
                first, row, own.done = last - 1, row + last - 1 - first, last
                if each is None:
                    continue
            for place in range(first // self._size, len(sequence.block_table)):
                self._full.pop(sequence.block_table[place], None)
            runs.append(self._tails[live].run(sequence, first, sequence.tokens[first + 1 : last + 1], each is not None))
            rows.append(np.arange(row, row + last - first))
            own.done = last
            if not self._shares:
                self._note_full(live, own)
            if each is not None:
                own.base = len(sequence.tokens)
                ready.append(each)
        if not runs:
            return [], []
        self._states = self._target.hidden_rows(np.concatenate(rows))
        if ready:
            return runs, ready
        self._logits(self._batches.build(runs), [])
        return [], []

    def _next(self, each: Asked) -> Run:
        sequence = each.live.sequence
        position = len(sequence.tokens) - 2 + (0 if self._shares else len(each.candidates))
        return self._tails[each.live].run(sequence, position, each.candidates[-1:], wanted=True)

    def _logits(self, batch: Batch, ready: list[Asked]) -> Value:
        if self._words < self._target_words:
            np.minimum(batch.tokens[0], self._words - 1, out=batch.tokens[0])
        batch.tokens[1] += self._shares  # attends to rows before the last token, but rotates by the last position
        states, self._states = self._states, None
        given = np.stack([self._back[each.live] for each in ready]) if states is None else states
        logits = self._head.run_on(batch, given, fused=states is None)
        self._back = {}
        if ready:
            back = self._head.given_back(batch.sampled_rows)
            self._back = {each.live: row for each, row in zip(ready, back, strict=True)}
        return logits

    def _meant(self, tokens: NDArray[np.int64]) -> list[int]:
        return (tokens if self._tokens_meant is None else self._tokens_meant[tokens]).tolist()
