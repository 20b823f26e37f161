"""Step 5: what was scheduled, as arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.engine.scheduler import ScheduledSequence
from candle_vllm.core.engine.sequence import Sequence

Ints = NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Batch:
    """The numbers of one step, all int64.

    Attributes:
        token_ids, positions, slots: [T]; a slot is block * block size + offset.
        query_start: [R + 1] offsets into T; sequence r has query_start[r]..query_start[r + 1].
        context_lens: [R] tokens of each sequence, the new ones included.
        block_tables: [R, most blocks]; a row's tail beyond its context is not read.
        sources: [T] where a token is not known yet: which of the tokens that the step before drew it is; else -1.
        num_decodes: how many sequences at the front have one token that was generated.
        sample_rows: indices into T of the tokens whose successor is sampled, one per item of `samples`.
        samples: the scheduled sequences that get a new token.
    """

    token_ids: Ints
    positions: Ints
    slots: Ints
    query_start: Ints
    context_lens: Ints
    block_tables: Ints
    sources: Ints
    num_decodes: int
    sample_rows: Ints
    samples: tuple[ScheduledSequence, ...]


def build_batch(
    scheduled: Seq[ScheduledSequence], block_size: int, drawn: Mapping[Sequence, int] = MappingProxyType({})
) -> Batch:
    """Lays the scheduled tokens of all sequences behind each other.

    Args:
        scheduled: what runs, decoding sequences first.
        block_size: tokens of a block.
        drawn: for sequences whose last token is not known yet, its place among those that the step before drew.
    """
    tokens: list[int] = []
    sources: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts = [0]
    tables = np.zeros((len(scheduled), max(len(item.sequence.block_table) for item in scheduled)), np.int64)
    for row, item in enumerate(scheduled):
        sequence, start, end = item.sequence, item.start, item.start + item.count
        table = sequence.block_table
        tables[row, : len(table)] = np.frombuffer(table, np.int32)
        known = sequence.tokens[start:end]
        tokens += known
        sources += [-1] * len(known)
        if len(known) < item.count:  # the one behind them is on its way
            tokens.append(0)
            sources.append(drawn[sequence])
        assert len(tokens) == starts[-1] + item.count
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
        sources=np.array(sources, np.int64),
        num_decodes=sum(item.decodes for item in scheduled),
        sample_rows=np.array([starts[row + 1] - 1 for row in sampled], np.int64),
        samples=tuple(scheduled[row] for row in sampled),
    )
