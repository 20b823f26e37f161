# SPDX-License-Identifier: MIT
"""Mixed residual streams, and gates of which little is left: the formulas, and the CPU's operations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, address_of, operation, plan_row
from candle_vllm.core.kernels.scale_cap import ScaleCapArguments, cut_, scale_cap_operation
from candle_vllm.core.kernels.stream_mix import MixArguments, mix_streams

ROWS, NUMBERS = 5, np.zeros(StepNumber.COUNT, np.int64)
NUMBERS[StepNumber.TOKENS] = NUMBERS[StepNumber.LOGIT_ROWS] = ROWS


def run(operation: int, arguments: tuple[Any, ...], threads: int) -> None:
    pytest.importorskip("numba")
    from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam

    team = ThreadTeam(threads)
    team.run(np.array(plan_row(operation, address_of(NUMBERS), arguments)), 1)
    team.close()


def test_a_mix_by_the_definition() -> None:
    x, table = torch.tensor([[1.0, 2.0, 30.0, 40.0]]), torch.tensor([[[1.0, 0.5]], [[0.0, 2.0]]])
    gates, scale = torch.tensor([[0.3]]), torch.tensor([1.0, 10.0])
    second = 0.5 + 2 * math.tanh(0.3)
    wanted = torch.tensor([[1 + second * 30, 10 * (2 + second * 40)]])
    torch.testing.assert_close(mix_streams(x, table, gates, scale, level=False), wanted)


def test_streams_are_brought_to_the_size_of_the_first() -> None:
    x, table = torch.tensor([[3.0, 3.0, 1.0, 7.0, 0.0, 0.001]]), torch.eye(3)[None]
    first, second, third = mix_streams(x, table, level=True).split(2, 1)
    assert torch.equal(first, x[:, :2])
    torch.testing.assert_close(second, torch.tensor([[0.6, 4.2]]))
    torch.testing.assert_close(third, torch.tensor([[0.0, 3 * 0.001 / 1e-5**0.5]]))  # a square below the least


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize(("streams", "made", "gates", "level"), [(4, 4, 4, False), (6, 4, 4, False), (2, 1, 4, False),
                                                                  (4, 4, 0, True), (3, 1, 0, True)])  # fmt: skip
@pytest.mark.parametrize("columns", [16, 48, 2048])
def test_the_operation_mixes_as_the_reference_does(
    threads: int, streams: int, made: int, gates: int, level: bool, columns: int
) -> None:
    generator = np.random.default_rng(streams)
    x = generator.standard_normal((ROWS, streams * columns + 16)).astype(np.float32)
    x[1, columns : 2 * columns] = 0  # a stream of nothing
    table = generator.standard_normal((1 + gates, made, streams)).astype(np.float32)
    gate, scale = generator.standard_normal((ROWS, 16)).astype(np.float32), generator.random(columns, np.float32)
    scaled = made == 1
    out = np.full((ROWS + 1, made * columns + 16), np.nan, np.float32)
    arguments = MixArguments(
        x=address_of(x),
        stride=x.shape[1],
        streams=streams,
        columns=columns,
        table=address_of(table),
        made=made,
        gates=address_of(gate) if gates else 0,
        gate_stride=16,
        gate_count=gates,
        scale=address_of(scale) if scaled else 0,
        level=level,
        out=address_of(out),
        out_stride=out.shape[1],
        rows_from=StepNumber.LOGIT_ROWS,
    )
    run(operation("stream_mix.cpu:mix"), arguments, threads)
    values, tables = torch.from_numpy(x[:, : streams * columns]), torch.from_numpy(table)
    how = torch.from_numpy(gate[:, :gates]) if gates else None
    wanted = mix_streams(values, tables, how, torch.from_numpy(scale) if scaled else None, level=level).numpy()
    assert np.sqrt(np.square(out[:ROWS, : made * columns] - wanted).mean() / np.square(wanted).mean()) < 1e-6
    assert np.isnan(out[:ROWS, made * columns :]).all()
    assert np.isnan(out[ROWS]).all()


@pytest.mark.parametrize("columns", [1, 63, 96, 4097])
@pytest.mark.parametrize("threads", [1, 3])
def test_what_stands_out_of_a_row(threads: int, columns: int) -> None:
    generator = np.random.default_rng(columns)
    x = generator.standard_normal((ROWS, columns + 32)).astype(np.float32) * 3 + 1
    x[2, :columns] = 5  # whose deviation is 0
    before, wide = x.copy(), torch.from_numpy(x[:, :columns].astype(np.float64))
    least = wide.mean(1, keepdim=True) + 0.5 * wide.std(1, correction=0, keepdim=True)
    wanted, plain = (wide - least).clamp(min=0).numpy(), torch.from_numpy(before.copy())
    cut_(plain[:, :columns], 0.5)
    arguments = ScaleCapArguments(address_of(x), x.shape[1], columns, 0.5, 0.0, StepNumber.TOKENS)
    run(scale_cap_operation(3), arguments, threads)
    for made in (x, plain.numpy()):
        np.testing.assert_allclose(made[:, :columns], wanted, rtol=0, atol=1e-5)
        assert np.array_equal(made[:, columns:], before[:, columns:])
