# SPDX-License-Identifier: MIT
"""Columns in another order: the compiled operation against the reference, however the work is split."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("numba")

from candle_vllm.core.kernels.column_order import OrderArguments
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, address_of, operation, plan_row
from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 96), (2, 33), (7, 77), (63, 64)])
@pytest.mark.parametrize("picked", [False, True])
def test_equals_the_reference(threads: int, rows: int, columns: int, picked: bool) -> None:
    random = np.random.default_rng(columns)
    x = random.standard_normal((rows, columns + 3)).astype(np.float32)
    order = random.permutation(columns).astype(np.int64)
    index = random.integers(0, rows, 5)
    out = np.full(((5 if picked else rows) + 1, columns + 2), np.nan, np.float32)
    numbers = np.zeros(StepNumber.COUNT, np.int64)
    numbers[StepNumber.LOGIT_ROWS if picked else StepNumber.TOKENS] = len(out) - 1
    arguments = OrderArguments(
        x=address_of(x),
        stride=columns + 3,
        order=address_of(order),
        columns=columns,
        out=address_of(out),
        out_stride=columns + 2,
        picked=address_of(index) if picked else 0,
        rows_from=StepNumber.LOGIT_ROWS if picked else StepNumber.TOKENS,
    )
    row = plan_row(operation("column_order.cpu:column_order"), address_of(numbers), arguments)
    team = ThreadTeam(threads)
    try:
        team.run(np.array(row, np.int64), 1)
    finally:
        team.close()
    wanted = torch.from_numpy((x[index] if picked else x)[:, order])
    assert np.array_equal(out[:-1, :columns], wanted.numpy())
    assert np.isnan(out[-1]).all()
    assert np.isnan(out[:, columns:]).all()
