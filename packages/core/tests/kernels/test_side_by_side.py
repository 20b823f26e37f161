# SPDX-License-Identifier: MIT
"""Rows side by side: exact copies, whatever stands beside them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from candle_vllm.core.kernels.cpu_runtime.level import host_isa
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber
from candle_vllm.core.kernels.cpu_runtime.recorder import Recorder, StepLimits
from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam
from candle_vllm.core.kernels.cpu_runtime.values import buffer_of, buffer_value
from candle_vllm.core.kernels.rms_norm import rms_norm
from candle_vllm.core.kernels.side_by_side import first_of_heads, side_by_side


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("widths", [(1,), (63, 123), (64, 5, 64)])
def test_the_operation_makes_what_the_reference_makes(threads: int, widths: tuple[int, ...]) -> None:
    """Of values, of columns of one and of a norm, which is written where it belongs."""
    limits = StepLimits(tokens=9, sequences=1, logit_rows=1, table_width=1, block_size=16, threads=threads)
    recorder, rng, rows = Recorder(limits, host_isa()), np.random.default_rng(1), 7
    buffers = [recorder.buffer(width) for width in widths]
    given = [buffer_value(recorder, buffer) for buffer in buffers]
    weight = rng.standard_normal(widths[-1]).astype(np.float32)
    made = buffer_of(side_by_side(*given, given[0].split([1, widths[0] - 1], -1)[0], rms_norm(given[-1], weight, 1e-5)))
    arrays = [buffer.array.reshape(-1, buffer.stride) for buffer in (*buffers, made)]
    for array in arrays:
        array[:] = np.nan
    for array, width in zip(arrays, widths):
        array[:rows, :width] = rng.standard_normal((rows, width))
    recorder.arrays.numbers[StepNumber.TOKENS] = rows
    team = ThreadTeam(threads)
    team.run(np.array(recorder.plan, np.int64), recorder.num_rows)
    team.close()
    values = [torch.from_numpy(array[:rows, :width]) for array, width in zip(arrays, widths)]
    wanted = side_by_side(*values, values[0][:, :1], rms_norm(values[-1], torch.from_numpy(weight), 1e-5)).numpy()
    copied = sum(widths) + 1
    assert np.array_equal(arrays[-1][:rows, :copied], wanted[:, :copied])
    np.testing.assert_allclose(arrays[-1][:rows, copied : made.width], wanted[:, copied:], rtol=1e-5)
    assert np.isnan(arrays[-1][rows:]).all()
    assert np.isnan(arrays[-1][:, made.width :]).all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("heads", "dim", "size"), [(1, 3, 1), (5, 48, 32)])
def test_first_columns_of_heads(threads: int, heads: int, dim: int, size: int) -> None:
    """The compiled copy and the one in torch are those columns, and nothing beside them is written."""
    limits = StepLimits(tokens=9, sequences=1, logit_rows=1, table_width=1, block_size=16, threads=threads)
    recorder, rng, rows = Recorder(limits, host_isa()), np.random.default_rng(1), 7
    buffer = recorder.buffer(heads * dim)
    made = buffer_of(first_of_heads(buffer_value(recorder, buffer).unflatten(-1, (-1, dim)), size))
    given, found = (each.array.reshape(-1, each.stride) for each in (buffer, made))
    given[:], found[:] = rng.standard_normal(given.shape), np.nan
    recorder.arrays.numbers[StepNumber.TOKENS] = rows
    team = ThreadTeam(threads)
    team.run(np.array(recorder.plan, np.int64), recorder.num_rows)
    team.close()
    values = given[:rows, : heads * dim].reshape(rows, heads, dim)
    wanted = values[:, :, :size].reshape(rows, -1)
    assert np.array_equal(found[:rows, : heads * size], wanted)
    assert np.array_equal(first_of_heads(torch.from_numpy(values), size).numpy(), wanted)
    assert np.isnan(found[rows:]).all()
    assert np.isnan(found[:, heads * size :]).all()
