# SPDX-License-Identifier: MIT
"""Copies of rows by their numbers, and columns beside those of heads: compiled and in torch, against loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from candle_vllm.core.kernels.cpu_runtime.level import host_isa
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber
from candle_vllm.core.kernels.cpu_runtime.recorder import Recorder, StepLimits
from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam
from candle_vllm.core.kernels.cpu_runtime.values import buffer_of, buffer_value
from candle_vllm.core.models.row_copies import RowNumbers, Runs, Shared, Starts, taken, widened

RANDOM = np.random.default_rng(4)
ROWS = 9


def compiled(given: list[np.ndarray], record: Any, threads: int, rows: int) -> np.ndarray:
    """What recorded operations make of values [ROWS, W] in a step of `rows` rows."""
    limits = StepLimits(tokens=ROWS, sequences=1, logit_rows=1, table_width=1, block_size=16, threads=threads)
    recorder = Recorder(limits, host_isa())
    buffers = [recorder.buffer(each.shape[1]) for each in given]
    for buffer, each in zip(buffers, given):
        buffer.array.reshape(-1, buffer.stride)[:] = np.nan
        buffer.rows[: len(each)] = each
    made = buffer_of(record(*(buffer_value(recorder, buffer) for buffer in buffers)))
    found = made.array.reshape(-1, made.stride)
    found[:] = np.nan
    recorder.arrays.numbers[StepNumber.TOKENS] = rows
    record.fill()
    team = ThreadTeam(threads)
    team.run(np.array(recorder.plan, np.int64), recorder.num_rows)
    team.close()
    assert np.isnan(found[rows:]).all()
    assert np.isnan(found[:, made.width :]).all()
    return found[:rows, : made.width]


class Copies:
    """Fewer rows than a step has; the others are zeros."""

    def __init__(self) -> None:
        self.rows = RowNumbers(ROWS, 2)

    def fill(self) -> None:
        self.rows.fill(np.array([[3, -1, 8, 0, 3], [-1, -1, 1, 2, 7]]))

    def __call__(self, x: Any) -> Any:
        return taken(x, self.rows)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("width", [1, 33])
def test_rows_are_taken_by_their_numbers(threads: int, width: int) -> None:
    x, copies = RANDOM.standard_normal((ROWS, width)).astype(np.float32), Copies()
    copies.fill()
    wanted = np.concatenate([np.where(rows[:, None] < 0, 0, x[rows]) for rows in copies.rows.filled], 1)
    assert np.array_equal(copies(torch.from_numpy(x)).numpy(), wanted)
    found = compiled([x], Copies(), threads, 7)
    assert np.array_equal(found[:5], wanted)
    assert not found[5:].any()


class Wide:
    """Two query heads of 16 elements, and one of keys, with runs of 3 columns and 2 shared columns beside them."""

    def __init__(self) -> None:
        self.rows, self.first = RowNumbers(ROWS), Starts(ROWS)
        self.queries, self.keys = RANDOM.standard_normal((2, 4, 2)).astype(np.float32)
        self.three = RANDOM.standard_normal((4, 3)).astype(np.float32)

    def fill(self) -> None:
        self.rows.fill(np.array([[3, 0, 2, 2, 1, 0, 3]]))
        self.first.fill(np.array([0, 4, 2, 1, 3, 0, 2]))

    def __call__(self, qkv: Any, *runs: Any) -> Any:
        tables = self.queries, self.keys, self.three
        if isinstance(qkv, torch.Tensor):
            tables = tuple(map(torch.from_numpy, tables))
        queries = [Runs(runs, self.first, 3), Shared(tables[0], self.rows)]
        return widened(qkv, (2, 1), 16, queries, [Shared(tables[2], self.rows), Shared(tables[1], self.rows)], 0.5)


@pytest.mark.parametrize("threads", [1, 2])
def test_heads_get_columns_of_their_own_and_shared_ones(threads: int) -> None:
    given = [RANDOM.standard_normal((ROWS, width)).astype(np.float32) for width in (64, 7, 7)]
    wide = Wide()
    wide.fill()
    numbers, first = wide.rows.filled[0], wide.first.columns
    wanted = np.zeros((7, 4, 21), np.float32)
    wanted[:, :, :16] = given[0][:7].reshape(7, 4, 16)
    wanted[:, 2, :16] *= 0.5
    wanted[:, 2, 16:] = np.concatenate([wide.three[numbers], wide.keys[numbers]], 1)
    for head, run in enumerate(given[1:]):
        wanted[:, head, 16:19] = [run[row, first[row] : first[row] + 3] for row in range(7)]
        wanted[:, head, 19:] = wide.queries[numbers]
    theirs = wide(*(torch.from_numpy(each[:7].copy()) for each in given)).numpy().reshape(7, 4, 21)
    ours = compiled(given, wide, threads, 7).reshape(7, 4, 21)
    for found in (theirs, ours):
        assert np.array_equal(found[:, :3], wanted[:, :3])
        assert np.array_equal(found[:, 3, :16], wanted[:, 3, :16])
