"""Step 5: what was scheduled, as arrays."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import msgspec
import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.engine.sequence import Run, Sequence

Ints = NDArray[np.int64]

_ONE_ON = np.array([[0], [1], [1], [0]])  # what a step's positions and slots are more than those of the step before


class Batch(msgspec.Struct, frozen=True, eq=False):
    """The numbers of one step, all int64.

    Attributes:
        tokens: [4, T] `token_ids`, `positions`, `slots` and `sources`, one below the other.
        query_start: [R + 1] offsets into T; sequence r has query_start[r]..query_start[r + 1].
        context_lens: [R] tokens of each sequence, the new ones included.
        block_tables: [R, most blocks]; a row's tail beyond its context is not read. Valid until the next step is built.
        tables_version: the same object as of the step before where the tables are the same.
        num_decodes: how many sequences at the front have one token that was generated.
        runs: what was scheduled.
        drawing: those of the runs that draw.
        drafted: whether any of the runs has drafts.
        drawn_rows: indices into T of the tokens whose successor is drawn: the last ones that each of `drawing` wants.
    """

    tokens: Ints
    query_start: Ints
    context_lens: Ints
    block_tables: Ints
    tables_version: object
    num_decodes: int
    runs: Seq[Run]
    drawing: Seq[Run]
    drafted: bool
    drawn_rows: Ints

    @property
    def token_ids(self) -> Ints:
        """[T]; 0 where it is not known yet."""
        return self.tokens[0]

    @property
    def positions(self) -> Ints:
        """[T] in their sequences."""
        return self.tokens[1]

    @property
    def slots(self) -> Ints:
        """[T] block * block size + offset."""
        return self.tokens[2]

    @property
    def sources(self) -> Ints:
        """[T] where a token is not known yet: which of the tokens that the step before drew it is; else -1."""
        return self.tokens[3]


class BatchBuilder:
    """Lays out one step after the other.

    Block tables stay from step to step, for most sequences of a step were in the one before: only those that are new,
    or have begun a block since, are written. Where a step is one more token of each sequence of the step before, and
    none begins a block, its arrays are those of that step with one added.

    Args:
        block_size: tokens of a block; 0 where there is no cache, and so no slots and no tables.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._rows: list[tuple[Sequence, int]] = []  # whose each row of the tables is, and since which admission
        self._tables = np.zeros((0, 1), np.int64)
        self._known: list[int] = []  # blocks that stand in each row
        self._version = object()
        self._numbers = np.arange(1)
        self._last: Batch | None = None  # the step before, if all of its sequences decoded
        self._room = 0  # steps until one of them begins a block

    def build(self, scheduled: Seq[Run], before: Seq[Run] = ()) -> Batch:
        """Lays the scheduled tokens of all sequences behind each other.

        Args:
            scheduled: what runs, decoding sequences first.
            before: the sequences whose next token is not known yet, in the order in which the step before drew them.
        """
        last = self._last
        if last is not None and self._room and _goes_on(last, scheduled, before):
            return self._next(last, scheduled, before)
        count = len(scheduled)
        if scheduled[-1].decodes:  # so do all others
            total, decodes = count, count
            rows, query_start = self._up_to(count), self._up_to(count + 1)
            positions = np.array([item.start for item in scheduled])
            contexts = positions + 1
            whole, places, drafted = True, rows, False
        else:
            decodes = sum(item.decodes for item in scheduled)
            starts = np.array([item.start for item in scheduled])
            counts = np.array([item.count for item in scheduled])
            contexts = starts + counts
            query_start = np.concatenate(([0], np.cumsum(counts)))
            total, places = int(query_start[-1]), query_start[1:] - 1  # of each sequence's last token
            rows = np.repeat(self._up_to(count), counts)
            positions = self._up_to(total) + (starts - query_start[:-1])[rows]
            whole, drafted = all(item.wanted for item in scheduled), any(item.drafts for item in scheduled)
        if drafted:
            drawn_rows = _last_rows(scheduled, places)
        else:
            drawn_rows = places if whole else places[[item.wanted > 0 for item in scheduled]]
        tables = self._follow(scheduled) if self._block_size else np.zeros((count, 0), np.int64)
        tokens = np.empty((4, total), np.int64)
        tokens[1] = positions
        if self._block_size:
            blocks = positions // self._block_size
            tokens[2] = (tables[rows, blocks] - blocks) * self._block_size + positions
        else:
            tokens[2] = -1
        tokens[3] = -1
        if before:
            drawn = {item.sequence: place for place, item in enumerate(before)}
            tokens[3, places] = [drawn.get(item.sequence, -1) for item in scheduled]
        self._name_tokens(scheduled, tokens)
        batch = Batch(
            tokens=tokens,
            query_start=query_start,
            context_lens=contexts,
            block_tables=tables,
            tables_version=self._version,
            num_decodes=decodes,
            runs=scheduled,
            drawing=scheduled if whole else [item for item in scheduled if item.wanted],
            drafted=drafted,
            drawn_rows=drawn_rows,
        )
        self._last = batch if decodes == count and self._block_size else None
        if self._last is not None:
            self._room = self._block_size - 1 - int((positions % self._block_size).max())
        return batch

    def _next(self, last: Batch, scheduled: Seq[Run], before: Seq[Run]) -> Batch:
        """The step behind `last`, where `_goes_on` says so."""
        tokens = last.tokens + _ONE_ON
        tokens[0] = 0 if before else [item.sequence.tokens[item.start] for item in scheduled]
        tokens[3] = last.drawn_rows if before else -1  # what the step before drew, all of it and in this order
        self._room -= 1
        self._last = batch = Batch(
            tokens=tokens,
            query_start=last.query_start,
            context_lens=last.context_lens + 1,
            block_tables=last.block_tables,
            tables_version=last.tables_version,
            num_decodes=last.num_decodes,
            runs=scheduled,
            drawing=scheduled,
            drafted=False,
            drawn_rows=last.drawn_rows,
        )
        return batch

    @staticmethod
    def _name_tokens(scheduled: Seq[Run], tokens: Ints) -> None:
        """Writes the ids that are known, and 0 for those that are on their way."""
        if len(scheduled) == tokens.shape[1] and tokens[3].min() >= 0:
            tokens[0] = 0
            return
        ids: list[int] = []
        for item in scheduled:
            known = item.sequence.tokens[item.start : item.start + item.count]
            ids += known
            if len(known) < item.count:
                ids += item.drafts or (0,)
        tokens[0] = ids

    def _follow(self, scheduled: Seq[Run]) -> Ints:
        """The block tables of a step [R, most blocks], kept for the next one."""
        rows = [(item.sequence, item.admission) for item in scheduled]
        if rows != self._rows:
            self._take_over(rows)
        size, known = self._block_size, self._known
        needed = [(item.start + item.count - 1) // size + 1 for item in scheduled]
        most = max(needed)
        if needed != known:
            self._version = object()
            if most > self._tables.shape[1]:
                wider = np.zeros((len(rows), max(most, 2 * self._tables.shape[1])), np.int64)
                wider[:, : self._tables.shape[1]] = self._tables
                self._tables = wider
            for row, (first, last) in enumerate(zip(known, needed)):
                if first < last:
                    self._tables[row, first:last] = scheduled[row].sequence.block_table[first:last]
            self._known = needed
        return self._tables[:, :most]

    def _take_over(self, rows: list[tuple[Sequence, int]]) -> None:
        """Makes the tables those of other rows; of new ones nothing is known."""
        places = {row: place for place, row in enumerate(self._rows)}
        found = [places.get(row, -1) for row in rows]
        self._known = [self._known[place] if place >= 0 else 0 for place in found]
        self._tables = self._tables[found] if self._rows else np.zeros((len(rows), 1), np.int64)
        self._rows, self._version = rows, object()

    def _up_to(self, count: int) -> Ints:
        """0, 1, ... [count]; not to be written to."""
        if count > len(self._numbers):
            self._numbers = np.arange(2 * count)
        return self._numbers[:count]


def _goes_on(last: Batch, scheduled: Seq[Run], before: Seq[Run]) -> bool:
    """Whether a step runs the next token of each sequence of `last`, where all of them decoded, and of no other."""
    if len(scheduled) != len(last.runs) or (before and before is not last.drawing):
        return False
    for item, old in zip(scheduled, last.runs):
        if item.sequence is not old.sequence or item.start != old.start + 1 or not item.decodes:
            return False
        if item.admission != old.admission:
            return False
    return True


def _last_rows(scheduled: Seq[Run], places: Ints) -> Ints:
    """The last rows that each run wants, whose very last one is at `places`."""
    return np.concatenate([np.arange(place + 1 - run.wanted, place + 1) for run, place in zip(scheduled, places)])
