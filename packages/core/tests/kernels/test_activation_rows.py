# SPDX-License-Identifier: MIT
"""Rows for plain matrices against the reference, and the same bits however the work is split."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from candle_vllm.core.kernels.activation_quant import Prologue
from candle_vllm.core.kernels.activation_rows import FLOAT_FORMS, SEGMENT, RowForm, row_bytes, row_elements

pytest.importorskip("numba")

from candle_vllm.core.kernels.activation_rows import RowsArguments, rows_operation
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, address_of, plan_row
from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam
from packages.core.tests.kernels import activation_forms


def run(
    x: np.ndarray,
    prologue: Prologue,
    form: RowForm,
    threads: int = 2,
    weight: np.ndarray | None = None,
    picked: list[int] | None = None,
) -> np.ndarray:
    """The result's bits, [T + 1, row_elements], bytes of a row for int8; the last row must stay untouched."""
    columns = x.shape[1] // (2 if prologue.gated else 1)
    rows, bits = len(picked) if picked else len(x), {1: np.uint8, 2: np.uint16, 4: np.uint32}[form.bytes]
    width = row_bytes(form, columns) if form is RowForm.I8 else row_elements(columns)
    out = np.full((rows + 1, width), 77, bits)
    numbers = np.zeros(StepNumber.COUNT, np.int64)
    numbers[StepNumber.LOGIT_ROWS if picked else StepNumber.TOKENS] = rows
    index = np.array(picked or [0], np.int64)
    arguments = RowsArguments(
        x=address_of(x),
        stride=x.shape[1],
        columns=columns,
        out=address_of(out),
        weight=0 if weight is None else address_of(weight),
        eps=1e-5,
        picked=address_of(index) if picked else 0,
        rows_from=StepNumber.LOGIT_ROWS if picked else StepNumber.TOKENS,
    )
    row = plan_row(rows_operation(prologue, form), address_of(numbers), arguments)
    team = ThreadTeam(threads)
    try:
        team.run(np.array(row, np.int64), 1)
    finally:
        team.close()
    assert (out[-1] == 77).all()
    return out[:-1]


def data(rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(rows).standard_normal((rows, columns)).astype(np.float32) * 3


@pytest.mark.one_of_each(57)
@pytest.mark.parametrize("form", FLOAT_FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("prologue", list(Prologue), ids=lambda prologue: prologue.name)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 31), (7, 45), (1, 96), (5, 576)])
def test_equals_the_reference(prologue: Prologue, form: RowForm, rows: int, columns: int) -> None:
    x = data(rows, columns * 2 if prologue.gated else columns)
    weight = np.random.default_rng(1).random(2 * columns, dtype=np.float32)
    used = torch.from_numpy(weight[:columns] if prologue is Prologue.NORM else weight)
    y = activation_forms.behind(prologue, torch.from_numpy(x), used, 1e-5)
    wanted = activation_forms.rows(y, form)
    result = run(x, prologue, form, weight=weight)
    numbers = torch.from_numpy(result.view(np.int16 if form is RowForm.BF16 else np.int32)).view(wanted.dtype)
    assert not result[:, columns:].any()
    if prologue == Prologue.NONE:
        assert torch.equal(numbers, wanted)
    if form is RowForm.F32:
        # Absolute where torch's own GELU loses digits: it computes 1 + tanh of large negative numbers.
        torch.testing.assert_close(numbers, wanted, rtol=4e-6, atol=2e-6)
    else:
        exact = torch.from_numpy(run(x, prologue, RowForm.F32, weight=weight).view(np.float32))
        assert torch.equal(numbers, exact.bfloat16()), "the form alone differs"
    for threads in (1, 3):
        assert np.array_equal(run(x, prologue, form, threads, weight), result)


@pytest.mark.parametrize("prologue", [Prologue.NONE, Prologue.NORM, Prologue.SILU], ids=lambda prologue: prologue.name)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 33), (7, 576), (1, 1344)])
def test_bytes_equal_the_reference(prologue: Prologue, rows: int, columns: int) -> None:
    """Integers, scales and sums are those of the float rows, for any number of threads and in any place."""
    x, weight = data(rows, columns * 2 if prologue.gated else columns), np.ones(columns, np.float32)
    x[0, : SEGMENT // 2] = 0.0
    y = run(x, prologue, RowForm.F32, weight=weight).view(np.float32)
    found, segments = run(x, prologue, RowForm.I8, weight=weight), -(-columns // SEGMENT)
    padded = np.zeros((rows, segments, SEGMENT), np.float32)
    padded.reshape(rows, -1)[:, :columns] = y[:, :columns]
    scales = np.abs(padded).max(2) / np.float32(127)
    factors = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales > 0)
    codes = np.rint(padded * factors[:, :, None])
    size = -(-columns // 64) * 64
    assert np.array_equal(found[:, :size].view(np.int8)[:, :columns], codes.reshape(rows, -1)[:, :columns])
    assert not found[:, columns:size].any()
    tail = np.ascontiguousarray(found[:, size : size + 8 * segments]).reshape(rows, segments, 8)
    assert np.array_equal(tail[:, :, :4].copy().view(np.float32)[:, :, 0], scales)
    assert np.array_equal(tail[:, :, 4:].copy().view(np.int32)[:, :, 0], -128 * codes.sum(2))
    for threads in (1, 3):
        again = run(x, prologue, RowForm.I8, threads, weight)
        assert np.array_equal(again[:, : size + 8 * segments], found[:, : size + 8 * segments])
    last = run(x, prologue, RowForm.I8, weight=weight, picked=[rows - 1])
    assert np.array_equal(last[0, :size], found[-1, :size])


def test_ties_round_to_even() -> None:
    x = np.array([[1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.3e38]], np.float32)
    result = run(x, Prologue.NONE, RowForm.BF16)[:, :4]
    assert np.array_equal(result, torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(np.uint16))


@pytest.mark.parametrize("columns", [45, 96])
def test_a_row_does_not_depend_on_its_neighbours_or_place(columns: int) -> None:
    x, weight = data(5, columns), np.ones(columns, np.float32)
    together = run(x, Prologue.NORM, RowForm.F32, weight=weight)
    assert np.array_equal(run(x, Prologue.NORM, RowForm.F32, weight=weight, picked=[3, 0, 3]), together[[3, 0, 3]])
    assert np.array_equal(run(x[3:4].copy(), Prologue.NORM, RowForm.F32, weight=weight), together[3:4])


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
def test_a_number_that_is_not_finite_shows_in_its_segment_wherever_it_stands(bad: float) -> None:
    columns = SEGMENT + 64
    x = np.repeat(data(1, columns), columns, 0)
    np.fill_diagonal(x, bad)
    tail = np.ascontiguousarray(run(x, Prologue.NONE, RowForm.I8)[:, columns : columns + 16]).view(np.float32)
    assert np.array_equal(~np.isfinite(tail[:, ::2]), np.arange(columns)[:, None] // SEGMENT == np.arange(2))
