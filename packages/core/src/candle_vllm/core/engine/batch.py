"""Step 5: what was scheduled, as arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Seq

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.engine.scheduler import ScheduledSequence

Ints = NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Batch:
    """The numbers of one step, all int64.

    Attributes:
        token_ids, positions, slots: [T]; a slot is block * block size + offset.
        query_start: [R + 1] offsets into T; sequence r has query_start[r]..query_start[r + 1].
        context_lens: [R] tokens of each sequence, the new ones included.
        block_tables: [R, most blocks]; a row's tail beyond its context is not read.
        sample_rows: indices into T of the tokens whose successor is sampled, one per item of `samples`.
        samples: the scheduled sequences that get a new token.
    """

    token_ids: Ints
    positions: Ints
    slots: Ints
    query_start: Ints
    context_lens: Ints
    block_tables: Ints
    sample_rows: Ints
    samples: tuple[ScheduledSequence, ...]


def build_batch(scheduled: Seq[ScheduledSequence], block_size: int) -> Batch:
    """Lays the scheduled tokens of all sequences behind each other."""
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts = [0]
    tables = np.zeros((len(scheduled), max(len(item.sequence.block_table) for item in scheduled)), np.int64)
    for row, item in enumerate(scheduled):
        sequence, start, end = item.sequence, item.start, item.start + item.count
        table = sequence.block_table
        tables[row, : len(table)] = table
        tokens += sequence.tokens[start:end]
        positions += range(start, end)
        slots += [table[at // block_size] * block_size + at % block_size for at in range(start, end)]
        starts.append(len(tokens))
    sampled = [row for row, item in enumerate(scheduled) if item.samples]
    return Batch(
        token_ids=np.array(tokens, np.int64),
        positions=np.array(positions, np.int64),
        slots=np.array(slots, np.int64),
        query_start=np.array(starts, np.int64),
        context_lens=np.array([item.start + item.count for item in scheduled], np.int64),
        block_tables=tables,
        sample_rows=np.array([starts[row + 1] - 1 for row in sampled], np.int64),
        samples=tuple(scheduled[row] for row in sampled),
    )
