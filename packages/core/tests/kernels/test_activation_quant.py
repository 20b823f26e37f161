# SPDX-License-Identifier: MIT
"""Quantised activations against the reference, and the same bits however the work is split."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from candle_vllm.core.kernels.activation_quant import Prologue, QuantiseArguments, quantise_operation
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, address_of, plan_row
from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam
from packages.core.tests.kernels.activation_forms import behind, quantise


def run(
    x: np.ndarray, prologue: Prologue, threads: int, weight: np.ndarray | None = None, picked: list[int] | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    columns = x.shape[1] // (2 if prologue.gated else 1)
    rows = len(picked) if picked else len(x)
    q = np.full((rows, columns), 99, np.int8)
    scales, sums = (np.full((rows, columns // 32), np.nan, np.float32) for _ in range(2))
    numbers = np.zeros(StepNumber.COUNT, np.int64)
    numbers[StepNumber.LOGIT_ROWS if picked else StepNumber.TOKENS] = rows
    index = np.array(picked or [0], np.int64)
    arguments = QuantiseArguments(
        x=address_of(x),
        stride=x.shape[1],
        columns=columns,
        q=address_of(q),
        scales=address_of(scales),
        sums=address_of(sums),
        weight=0 if weight is None else address_of(weight),
        eps=1e-5,
        picked=address_of(index) if picked else 0,
        rows_from=StepNumber.LOGIT_ROWS if picked else StepNumber.TOKENS,
    )
    row = plan_row(quantise_operation(prologue), address_of(numbers), arguments)
    team = ThreadTeam(threads)
    try:
        team.run(np.array(row, np.int64), 1)
    finally:
        team.close()
    return q, scales, sums


def data(rows: int, columns: int) -> np.ndarray:
    x = np.random.default_rng(rows).standard_normal((rows, columns)).astype(np.float32) * 3
    x[0, :32] = 0
    return x


@pytest.mark.parametrize("prologue", list(Prologue))
@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("columns", [32, 96, 576])
def test_equals_the_reference(prologue: Prologue, rows: int, columns: int) -> None:
    x = data(rows, columns * 2 if prologue.gated else columns)
    if prologue in (Prologue.SILU_7, Prologue.SILU_16):
        x *= 4  # some are beyond the limit
    if prologue.norm:
        x += 20  # a mean far beyond the spread
    weight = np.random.default_rng(1).random(2 * columns, dtype=np.float32)
    used = torch.from_numpy(weight[:columns] if prologue is Prologue.NORM else weight)
    y = behind(prologue, torch.from_numpy(x), used, 1e-5)
    wanted_q, wanted_s, wanted_m = (tensor.numpy() for tensor in quantise(y))
    q, scales, sums = run(x, prologue, 2, weight)
    np.testing.assert_allclose(scales, wanted_s, rtol=4e-6 if prologue is Prologue.LAYER_NORM else 1e-6)
    assert np.abs(q.astype(int) - wanted_q).max() <= (0 if prologue == Prologue.NONE else 1)
    assert (q != wanted_q).mean() < 1e-3 or rows * columns < 2000
    exact = q.reshape(rows, -1, 32).astype(np.float32).sum(-1) * scales
    np.testing.assert_allclose(sums, exact, rtol=1e-6)
    assert np.abs(sums - wanted_m).max() <= np.abs(scales).max() * 2
    for threads in (1, 3):
        for again, first in zip(run(x, prologue, threads, weight), (q, scales, sums)):
            assert np.array_equal(again, first)


def test_a_row_does_not_depend_on_its_neighbours_or_place() -> None:
    x, weight = data(5, 96), np.ones(96, np.float32)
    together = run(x, Prologue.NORM, 2, weight)
    picked = run(x, Prologue.NORM, 2, weight, picked=[3, 0, 3])
    for whole, some in zip(together, picked):
        assert np.array_equal(whole[[3, 0, 3]], some)
    alone = run(x[3:4].copy(), Prologue.NORM, 2, weight)
    for whole, one in zip(together, alone):
        assert np.array_equal(whole[3:4], one)


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
def test_a_number_that_is_not_finite_shows_in_its_group_wherever_it_stands(bad: float) -> None:
    x = np.repeat(data(2, 160)[1:], 160, 0)  # four groups at once, and one
    np.fill_diagonal(x, bad)
    _, scales, _ = run(x, Prologue.NONE, 1)
    assert np.array_equal(~np.isfinite(scales), np.arange(160)[:, None] // 32 == np.arange(5))
