# SPDX-License-Identifier: MIT
"""Arrays of a step's scheduled runs (step 5 of a request's life)."""

from __future__ import annotations

import bisect
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple, Protocol, TypeGuard

import msgspec
import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.engine.step.sequence import Run, Sequence, Step
from candle_vllm.core.kernels.lora import PackedAdapter
from candle_vllm.core.kernels.states import StateRows

Ints = NDArray[np.int64]

_FEW, _FEW_ROWS = 32, 64  # maximum numbers of runs and of their rows that are laid out without numpy


class StepMemory(Protocol):
    """Memory from which a runner reads the arrays of a `Batch`, with room for the largest step.

    Attributes:
        tokens, context_lens, block_tables: the arrays of the same names in `Batch`.
        moved_on: whether the runner has already advanced the arrays of a decoding step to the step that follows it.
        states: the arrays of `Batch.states` except `query_start`.
    """

    @property
    def tokens(self) -> Ints: ...
    @property
    def context_lens(self) -> Ints: ...
    @property
    def block_tables(self) -> Ints: ...
    @property
    def moved_on(self) -> bool: ...
    @property
    def states(self) -> StateRows: ...


class AdapterRows(msgspec.Struct, frozen=True, eq=False):
    """The adapters of a step's rows: N pairs of a row and an adapter, grouped by adapter in order of `digest`.

    Attributes:
        rows: [N] int64, index of each pair's row in the step, or in `wanted` if `among` selected the pairs.
        scales: [N] float32, the scale of the adapter in that row.
        starts: [G + 1] int64, offsets of the G groups into the N pairs.
        adapters: [G] the adapter of each group.
        sources: [N] int64, index of each pair's row in the step.
    """

    rows: Ints
    scales: NDArray[np.float32]
    starts: Ints
    adapters: Seq[PackedAdapter]
    sources: Ints

    def among(self, wanted: Ints) -> AdapterRows | None:
        """Return the pairs of the step's `wanted` rows, or None without pairs; `rows` are indices into `wanted`."""
        places = np.full(max(int(wanted.max(initial=-1)), int(self.sources.max())) + 1, -1)
        places[wanted] = np.arange(len(wanted))
        found = places[self.sources]
        kept = found >= 0
        starts = np.concatenate(([0], np.cumsum(kept)))[self.starts]
        some = np.flatnonzero(np.diff(starts))
        if not len(some):
            return None
        return AdapterRows(
            found[kept],
            self.scales[kept],
            np.append(starts[some], starts[-1]),
            [self.adapters[group] for group in some.tolist()],
            self.sources[kept],
        )


def adapter_rows(scheduled: Seq[Run], query_start: Ints) -> AdapterRows | None:
    """Return the adapters of a step whose runs begin at rows `query_start`; None if no row has an adapter."""
    if not any(run.sequence.adapters for run in scheduled):
        return None
    found: dict[tuple[bytes, int], tuple[PackedAdapter, list[tuple[int, int, float]]]] = {}
    for run, first in zip(scheduled, query_start.tolist()):
        sequence = run.sequence
        for (adapter, scale), start in zip(sequence.adapters, sequence.adapted_from):
            begin = first + max(0, start - run.start)
            if begin < first + run.count:
                key = adapter.digest, adapter.serial  # a row's sum must not depend on which adapter was loaded first
                found.setdefault(key, (adapter, []))[1].append((begin, first + run.count, scale))
    if not found:
        return None
    groups = [found[key] for key in sorted(found)]
    runs = [run for _, group in groups for run in group]
    counts = np.array([end - begin for begin, end, _ in runs])
    begins = np.array([begin for begin, _, _ in runs])
    starts = np.concatenate(([0], np.cumsum(counts)))
    rows = np.arange(starts[-1]) + np.repeat(begins - starts[:-1], counts)
    scales = np.repeat(np.array([scale for *_, scale in runs], np.float32), counts)
    ends = np.concatenate(([0], np.cumsum([len(group) for _, group in groups])))
    return AdapterRows(rows, scales, starts[ends], [adapter for adapter, _ in groups], rows)


class EmbeddedRows(msgspec.Struct, frozen=True, eq=False):
    """Rows of a step that read image embeddings instead of the embedding table.

    Attributes:
        rows: [N] int64, indices of these rows in the step.
        vectors: [N, V * E] float32: the embedding [E] of each row, then V - 1 vectors [E] that are added to the outputs
            of the first V - 1 layers.
    """

    rows: Ints
    vectors: NDArray[np.float32]


def embedded_rows(scheduled: Seq[Run], query_start: Ints, token_ids: Ints) -> EmbeddedRows | None:
    """Return the image rows of a step, or None without them; if an image has a `blank`, write it to its `token_ids`."""
    rows: list[Ints] = []
    vectors: list[NDArray[np.float32]] = []
    for run, first in zip(scheduled, query_start.tolist()):
        for image in run.sequence.images if run.start < run.sequence.num_prompt_tokens else ():
            begin, end = (bisect.bisect_left(image.positions, place) for place in (run.start, run.start + run.count))
            if begin < end:
                assert image.rows is not None, "a sequence is admitted after its images are encoded"
                rows.append(np.array(image.positions[begin:end]) + (first - run.start))
                if image.blank is not None:
                    token_ids[rows[-1]] = image.blank
                vectors.append(image.rows[begin:end])
    return EmbeddedRows(np.concatenate(rows), np.concatenate(vectors)) if rows else None


def rows_ahead(scheduled: Seq[Run], query_start: Ints) -> Ints | None:
    """Return how many later positions each row of a step attends to; None if every row is causal."""
    found: Ints | None = None
    for run, first in zip(scheduled, query_start.tolist()):
        for image in run.sequence.images if run.start < run.sequence.num_prompt_tokens else ():
            for begin, end in image.spans:
                begin = max(begin, run.start)
                if begin < min(end, run.start + run.count):
                    assert end <= run.start + run.count, "a step must contain whole spans"
                    found = np.zeros(query_start[-1], np.int64) if found is None else found
                    place = first - run.start
                    found[place + begin : place + end] = np.arange(end - begin)[::-1]
    return found


class RotaryPositions(msgspec.Struct, frozen=True, eq=False):
    """Rotary positions of a step's rows that differ from the positions in the sequence (M-RoPE).

    Attributes:
        shifts: [T] int64, added to the position of each row.
        rows: [N] int64, the rows of images, whose shifts are 0.
        places: [N, 4] int64, the temporal, height and width position of each image row, and the number of its image.
    """

    shifts: Ints
    rows: Ints
    places: Ints


def rotary_positions(scheduled: Seq[Run], query_start: Ints) -> RotaryPositions | None:
    """Return the rotary positions of a step's image tokens; None if all rows rotate by their positions.

    Text continues after an image at the largest of its positions + 1. Source: Wang et al., 2024, arXiv:2409.12191.
    """
    if not any(run.sequence.images for run in scheduled):
        return None
    shifts, rows, places = np.zeros(query_start[-1], np.int64), list[Ints](), list[Ints]()
    for run, first in zip(scheduled, query_start.tolist()):
        last = first + run.count
        for image in run.sequence.images:
            if not len(image.turned):
                continue
            start = image.begin - run.start
            end = start + len(image.turned)
            if end < run.count:
                shifts[first + max(end, 0) : last] = image.shift
            begin, stop = max(start, 0), min(end, run.count)
            if begin < stop:
                shifts[first + begin : first + stop] = 0
                rows.append(np.arange(first + begin, first + stop))
                places.append(image.turned[begin - start : stop - start])
    if not rows:
        return RotaryPositions(shifts, np.zeros(0, np.int64), np.zeros((0, 4), np.int64)) if shifts.any() else None
    return RotaryPositions(shifts, np.concatenate(rows), np.concatenate(places))


def answer_positions(scheduled: Seq[Run], query_start: Ints) -> RotaryPositions | None:
    """Return the rotary positions of a step whose generated tokens use slots in turn (`Sequence.place`)."""
    shifts = [run.start - run.sequence.place(run.start) for run in scheduled]
    if not any(shifts):
        return None
    return RotaryPositions(np.repeat(shifts, np.diff(query_start)), np.zeros(0, np.int64), np.zeros((0, 4), np.int64))


def turns(turned: RotaryPositions, positions: Ints, first: int) -> Ints:
    """Return [T]: each token's rotary table row minus its position; image tokens have the rows from `first` on."""
    turns = turned.shifts.copy()
    turns[turned.rows] = first + np.arange(len(turned.rows)) - positions[turned.rows]
    return turns


class Batch(msgspec.Struct, frozen=True, eq=False):
    """The arrays of one step, all int64; they are valid until the step has run or the next batch is built.

    Attributes:
        tokens: [4, T] `token_ids`, `positions`, `slots` and `sources`, one below the other.
        query_start: [R + 1] offsets into T; sequence r has the rows query_start[r]:query_start[r + 1].
        context_lens: [R] tokens of each sequence, the new ones included; fewer with `Sequence.answer_window`.
        block_tables: [R, maximum blocks]; entries after the end of a sequence's context are not read.
        tables_version: the same object as in the previous step if the tables are the same.
        num_decodes: number of decoding runs, which are first and have one row each.
        runs: the scheduled runs.
        drawing: the runs for which tokens are sampled.
        drafted: whether any run has drafts.
        sampled_rows: indices into T of the rows whose next token is sampled: the last `wanted` rows of each run.
        goes_on: whether `Step.goes_on` is set and this builder built the previous step.
        adapters: adapters of rows; None if no row has an adapter. The same object if the step goes on.
        embedded: rows of images; None without image rows.
        ahead: [T] numbers of later positions that each row attends to; None if every row is causal.
        turned: rotary positions of rows in and after images with grids; None if all rows rotate by their positions.
        ends_alone: whether there are rows outside `sampled_rows`, and the model's output for them is not read.
        begun: if the step goes on, the new entries of the tables: row, column and block.
        states: state slots that the step reads and writes; None if no layer keeps a state.
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
    sampled_rows: Ints
    goes_on: bool = False
    adapters: AdapterRows | None = None
    embedded: EmbeddedRows | None = None
    ahead: Ints | None = None
    turned: RotaryPositions | None = None
    ends_alone: bool = False
    begun: Seq[tuple[int, int, int]] = ()
    states: StateRows | None = None

    @property
    def token_ids(self) -> Ints:
        """[T] token ids; 0 for a token that is not known yet."""
        return self.tokens[0]

    @property
    def positions(self) -> Ints:
        """[T] positions in the sequences' block tables; `turned` has what is added for the rotary embedding."""
        return self.tokens[1]

    @property
    def slots(self) -> Ints:
        """[T] block * block size + offset; -1 without a cache."""
        return self.tokens[2]

    @property
    def sources(self) -> Ints:
        """[T] index among the previous step's sampled tokens for a token that is not known yet; else -1."""
        return self.tokens[3]


def in_pages(batch: Batch, page_of: Ints, block_size: int) -> tuple[Ints, Ints]:
    """Return slots [G, T] and block tables [G, R, blocks] for G page pools; block n has page `page_of[g, n]`."""
    blocks = batch.slots // block_size
    return batch.slots + (page_of[:, blocks] - blocks) * block_size, page_of[:, batch.block_tables]


class _Laid(NamedTuple):
    """Positions and cache slots of a step's rows, as in `Batch`."""

    query_start: Ints
    contexts: Ints | list[int]
    positions: Ints | list[int]
    slots: Ints | list[int] | int
    sampled_rows: Ints


class BatchBuilder:
    """Builds the `Batch` of each step.

    Block tables are reused: if a step has the same sequences as the previous one, only their new blocks are written. If
    a step goes on, the arrays of the previous step are incremented in place.

    Args:
        block_size: tokens of a block; 0 without a cache, so without slots and tables.
        memory: memory for the arrays; None to allocate them.
        images: whether image embeddings replace image tokens.
        adapters: whether the sequences' adapters apply to the model.
    """

    def __init__(
        self, block_size: int, memory: StepMemory | None = None, *, images: bool = True, adapters: bool = True
    ) -> None:
        self._block_size = block_size
        self._memory = memory
        self._images, self._adapters = images, adapters
        self._rows: list[tuple[Sequence, int]] = []  # sequence and admission of each row of the tables
        self._tables = np.zeros((0, 1), np.int64) if memory is None else memory.block_tables
        self._known: list[int] = []  # number of blocks written in each row
        self._version = object()
        self._numbers = np.arange(1)
        self._last: Batch | None = None  # the previous step, if all its sequences decoded

    def build(self, scheduled: Seq[Run], before: Seq[Run] = (), *, ends_alone: bool = False) -> Batch:
        """Return the batch of a step.

        Args:
            scheduled: the runs, decoding sequences first.
            before: runs of the previous step whose sampled tokens are not known yet, in sampling order.
            ends_alone: see `Batch`."""
        last = self._last
        if last is not None and _goes_on(scheduled, last, before):
            return self._next(last, scheduled, before)
        count, size = len(scheduled), self._block_size
        decodes = count if scheduled[-1].decodes else sum(run.decodes for run in scheduled)  # decoding runs are first
        whole = decodes == count or all(run.wanted for run in scheduled)
        places = None if scheduled[0].sequence.answer_window is None else list(map(_places, scheduled))
        tables = self._follow(scheduled, places) if size else np.zeros((count, 0), np.int64)
        few = count <= _FEW and sum([run.count for run in scheduled]) <= _FEW_ROWS
        laid = _by_hand(scheduled, places, size) if few else self._by_arrays(scheduled, places, tables, whole)
        total = len(laid.positions)
        if self._memory is None:
            tokens, context_lens = np.empty((4, total), np.int64), np.empty(count, np.int64)
        else:
            tokens, context_lens = self._memory.tokens[:, :total], self._memory.context_lens[:count]
        tokens[1], tokens[2], tokens[3], context_lens[:] = laid.positions, laid.slots, -1, laid.contexts
        tokens[0] = _named_tokens(scheduled)
        if before:
            drawn = {item.sequence: place for place, item in enumerate(before)}
            tokens[3, laid.query_start[1:] - 1] = [drawn.get(item.sequence, -1) for item in scheduled]
        special = self._special_rows(scheduled, laid.query_start, tokens[0]) if self._images or self._adapters else {}
        if scheduled[0].sequence.answer_window is not None:
            special["turned"] = answer_positions(scheduled, laid.query_start)
        batch = Batch(
            tokens=tokens,
            query_start=laid.query_start,
            context_lens=context_lens,
            block_tables=tables,
            tables_version=self._version,
            num_decodes=decodes,
            runs=scheduled,
            drawing=scheduled if whole else [item for item in scheduled if item.wanted],
            drafted=decodes < count and any(run.drafts for run in scheduled),
            sampled_rows=laid.sampled_rows,
            ends_alone=ends_alone and len(laid.sampled_rows) < total,
            states=None if scheduled[0].state is None else self._state_rows(scheduled, laid.query_start),
            **special,
        )
        self._last = batch if decodes == count and size else None
        return batch

    def _special_rows(self, scheduled: Seq[Run], query_start: Ints, token_ids: Ints) -> dict[str, Any]:
        """Return the fields of a step's `Batch` about adapters and images; see `embedded_rows` for `token_ids`."""
        rows = {"adapters": adapter_rows(scheduled, query_start) if self._adapters else None}
        if not self._images:
            return rows
        if not scheduled[-1].decodes:
            rows |= {"embedded": embedded_rows(scheduled, query_start, token_ids)}
            rows |= {"ahead": rows_ahead(scheduled, query_start)}
        return {**rows, "turned": rotary_positions(scheduled, query_start)}

    def _state_rows(self, scheduled: Seq[Run], query_start: Ints) -> StateRows:
        count, total = len(scheduled), int(query_start[-1])
        if self._memory is None:
            memory = StateRows(query_start, *np.empty((3, count), np.int64), *np.empty((2, total), np.int64))
        else:
            memory = self._memory.states
        rows = StateRows(
            query_start,
            *(each[:count] for each in (memory.slots, memory.sources, memory.replays)),
            *(each[:total] for each in (memory.stores, memory.keeps)),
        )
        found = [run.state for run in scheduled if run.state is not None]
        rows.slots[:], rows.sources[:] = [each.slot for each in found], [each.source for each in found]
        rows.replays[:] = [each.replays for each in found]
        rows.stores[:] = rows.keeps[:] = -1
        drafts = np.array([len(run.drafts) for run in scheduled])
        rows.stores[query_start[1:] - 1 - drafts] = rows.slots
        for run, state, first in zip(scheduled, found, query_start.tolist(), strict=False):
            for row, slot in state.marks:
                rows.stores[first + row] = slot
            if run.drafts:
                end = first + run.count
                rows.keeps[end - len(run.drafts) : end] = range(len(run.drafts))
        return rows

    def _by_arrays(self, scheduled: Seq[Run], given: Seq[tuple[int, int]] | None, tables: Ints, whole: bool) -> _Laid:
        """Lay out a step with numpy; `whole` is whether a token is sampled for every run."""
        count, size = len(scheduled), self._block_size
        positions = np.array([run.start for run in scheduled] if given is None else [first for first, _ in given])
        if scheduled[-1].decodes:  # decoding runs are first, so all runs decode
            rows = places = self._up_to(count)
            query_start, contexts = self._up_to(count + 1), positions + 1
        else:
            counts = np.array([run.count for run in scheduled])
            contexts = positions + counts
            query_start = np.concatenate(([0], np.cumsum(counts)))
            rows, places = np.repeat(self._up_to(count), counts), query_start[1:] - 1  # rows of sequences' last tokens
            positions = self._up_to(len(rows)) + (positions - query_start[:-1])[rows]
        if given is not None:
            contexts = np.array([end for _, end in given])
        slots: Ints | int = -1
        if size:
            blocks = positions // size
            slots = (tables[rows, blocks] - blocks) * size + positions
        if any(run.wanted > 1 for run in scheduled):
            runs = zip(scheduled, places.tolist())
            drawn = np.concatenate([np.arange(place + 1 - run.wanted, place + 1) for run, place in runs])
        else:
            drawn = places if whole else places[[run.wanted > 0 for run in scheduled]]
        return _Laid(query_start, contexts, positions, slots, drawn)

    def _next(self, last: Batch, step: Step, before: Seq[Run]) -> Batch:
        """Build the step that continues `last`; see `_goes_on`."""
        tokens, tables, begun = last.tokens, last.block_tables, ()
        if self._memory is None or not self._memory.moved_on:
            tokens[1:3] += 1  # positions and slots
            last.context_lens[:] += 1
            if before:  # the tokens of the previous step, in the same order
                tokens[0], tokens[3] = 0, last.sampled_rows
            else:
                tokens[0], tokens[3] = [item.sequence.tokens[item.start] for item in step], -1
        if step.begins:
            tables, begun = self._begin_blocks(step, last)
        self._last = batch = msgspec.structs.replace(
            last,
            block_tables=tables,
            tables_version=self._version,
            runs=step,
            drawing=step,
            goes_on=True,
            begun=begun,
            states=None if last.states is None else self._state_rows(step, last.query_start),
        )
        return batch

    def _begin_blocks(self, step: Step, last: Batch) -> tuple[Ints, Seq[tuple[int, int, int]]]:
        """Write the blocks and slots of the sequences that begin a block; return the tables and the new entries."""
        self._version = object()
        tables, slots, begun = self._tables, last.slots, list[tuple[int, int, int]]()
        for row in step.begins:
            run, number = step[row], self._known[row]
            assert number * self._block_size == run.start
            if number == tables.shape[1]:
                tables = self._widen(len(step), number + 1)
            block = tables[row, number] = run.sequence.block_table[number]
            slots[row] = block * self._block_size
            self._known[row] = number + 1
            begun.append((row, number, block))
        return tables[: len(step), : max(self._known)], begun

    def _follow(self, scheduled: Seq[Run], given: Seq[tuple[int, int]] | None) -> Ints:
        """Update the block tables for a step and return them, [R, maximum blocks]."""
        rows = [(item.sequence, item.admission) for item in scheduled]
        if rows != self._rows:
            self._rows, self._known = rows, [0] * len(rows)
        size = self._block_size
        if given is None:
            needed = [(item.start + item.count - 1) // size + 1 for item in scheduled]
        else:
            needed = [(end - 1) // size + 1 for _, end in given]
        if needed != self._known:
            self._version = object()
            if self._memory is None:
                self._widen(len(rows), max(needed))
            for row, (first, last) in enumerate(zip(self._known, needed)):
                if first < last:
                    self._tables[row, first:last] = scheduled[row].sequence.block_table[first:last]
            self._known = needed
        return self._tables[: len(rows), : max(needed)]

    def _widen(self, rows: int, blocks: int) -> Ints:
        """Allocate larger tables if they have fewer rows or blocks; only for tables that the builder allocated."""
        height, width = self._tables.shape
        if rows > height or blocks > width:
            blocks = width if blocks <= width else max(blocks, 2 * width)
            larger = np.zeros((max(rows, height), blocks), np.int64)
            larger[:height, :width] = self._tables
            self._tables = larger
        return self._tables

    def _up_to(self, count: int) -> Ints:
        """Return the integers below `count`, as a view that must not be written to."""
        if count > len(self._numbers):
            self._numbers = np.arange(2 * count)
        return self._numbers[:count]


def _goes_on(scheduled: Seq[Run], last: Batch, before: Seq[Run]) -> TypeGuard[Step]:
    """Return whether `scheduled` directly follows `last` and has the same sequences."""
    if not (isinstance(scheduled, Step) and scheduled.goes_on) or (before and before is not last.drawing):
        return False
    run, old = scheduled[0], last.runs[0]
    return run.sequence is old.sequence and run.start == old.start + 1 and len(scheduled) == len(last.runs)


def _places(run: Run) -> tuple[int, int]:
    """Return the position in the block table of a run's first row, and the number of those that its last row reads."""
    return run.sequence.place(run.start), run.sequence.num_places(run.start + run.count)


def _by_hand(scheduled: Seq[Run], given: Seq[tuple[int, int]] | None, size: int) -> _Laid:
    """Lay out a few rows as `BatchBuilder._by_arrays` does, but without numpy: reading weights evicts numpy from the
    CPU caches, so one numpy call takes longer than this function."""
    ends, contexts, positions, slots, drawn = [0], list[int](), list[int](), list[int](), list[int]()
    for run in scheduled:
        first = run.start if given is None else given[len(contexts)][0]
        places, table = range(first, first + run.count), run.sequence.block_table
        ends.append(ends[-1] + run.count)
        contexts.append(places.stop if given is None else given[len(contexts)][1])
        positions += places
        slots += [table[place // size] * size + place % size for place in places] if size else [-1] * run.count
        drawn += range(ends[-1] - run.wanted, ends[-1])
    return _Laid(np.array(ends), contexts, positions, slots, np.array(drawn, np.int64))


def _named_tokens(scheduled: Seq[Run]) -> list[int]:
    """Return the token ids of a step's rows; 0 for a token that is not known yet."""
    ids: list[int] = []
    for item in scheduled:
        named = item.sequence.tokens[item.start : item.start + item.count]
        ids += named
        if len(named) < item.count:
            ids += item.drafts or (0,)
    return ids
