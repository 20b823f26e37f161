"""Step 5: what was scheduled, as tensors on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Seq

import numpy as np
import torch

from candle_vllm.core.engine.scheduler import ScheduledSequence
from candle_vllm.core.kernels.attention import AttentionRows


@dataclasses.dataclass(frozen=True)
class Batch:
    """The tensors of one step.

    Attributes:
        token_ids, positions, slots: [T] int64.
        rows: which tokens belong together.
        sample_rows: indices into T of the tokens whose successor is sampled, one per item of `samples`.
        samples: the scheduled sequences that get a new token.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    rows: AttentionRows
    sample_rows: torch.Tensor
    samples: tuple[ScheduledSequence, ...]


def build_batch(scheduled: Seq[ScheduledSequence], block_size: int, device: torch.device) -> Batch:
    """Lays the scheduled tokens of all sequences behind each other."""
    tokens: list[int] = []
    positions: list[np.ndarray] = []
    slots: list[np.ndarray] = []
    starts = [0]
    longest = max(len(item.sequence.block_table) for item in scheduled)
    tables = np.zeros((len(scheduled), longest), np.int64)
    for row, item in enumerate(scheduled):
        sequence, start, count = item.sequence, item.start, item.count
        tokens += sequence.tokens[start : start + count]
        where = np.arange(start, start + count)
        table = np.asarray(sequence.block_table, np.int64)
        tables[row, : len(table)] = table
        positions.append(where)
        slots.append(table[where // block_size] * block_size + where % block_size)
        starts.append(starts[-1] + count)
    sampled = [row for row, item in enumerate(scheduled) if item.samples]
    return Batch(
        token_ids=torch.tensor(tokens, dtype=torch.int64, device=device),
        positions=torch.from_numpy(np.concatenate(positions)).to(device),
        slots=torch.from_numpy(np.concatenate(slots)).to(device),
        rows=AttentionRows(
            query_start=tuple(starts),
            context_lens=tuple(item.start + item.count for item in scheduled),
            block_tables=torch.from_numpy(tables).to(device),
        ),
        sample_rows=torch.tensor([starts[row + 1] - 1 for row in sampled], dtype=torch.int64, device=device),
        samples=tuple(scheduled[row] for row in sampled),
    )
