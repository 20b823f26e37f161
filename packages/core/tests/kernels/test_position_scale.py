# SPDX-License-Identifier: MIT
"""Queries times a number of their position: the formula, the CPU's operation, and when nothing is computed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from candle_vllm.core.kernels.position_scale import position_scale
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.rope import RopeConfig

PLACEMENT = Placement(torch.device("cpu"), "F32")


def rotary(longest: int, growth: float = 0.1) -> Rotary:
    return Rotary(RopeConfig(dim=16, original_max_position=100, query_scale=growth), longest, PLACEMENT)


def test_queries_grow_with_every_original_context_behind_them() -> None:
    positions = torch.tensor([0, 99, 100, 199, 200, 999])
    scaled = rotary(1000).scaled(torch.ones(6, 2, 16), positions)
    wanted = [1 + 0.1 * math.log(1 + position // 100) for position in positions.tolist()]
    torch.testing.assert_close(scaled, torch.tensor(wanted)[:, None, None].expand(6, 2, 16), rtol=1e-6, atol=0)


def test_nothing_is_computed_within_the_original_context() -> None:
    q, positions = torch.ones(2, 1, 16), torch.tensor([0, 99])
    assert rotary(100).scaled(q, positions) is q
    assert rotary(1000, growth=0.0).scaled(q, positions) is q
    short = rotary(1000)
    short.prepare(100)  # what an engine with little memory asks for
    assert short.scaled(q, positions) is q


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_arithmetic_is_fp32(dtype: torch.dtype) -> None:
    q = torch.randn(5, 3, 8).to(dtype)
    table, positions = torch.rand(10) + 1, torch.tensor([3, 3, 9, 0, 1])
    wanted = torch.stack([q[t].float() * table[position] for t, position in enumerate(positions)]).to(dtype)
    assert torch.equal(position_scale(q, positions, table), wanted)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("rows", "columns"), [(1, 16), (5, 24), (63, 48)])
def test_the_operation_makes_what_the_reference_makes(threads: int, rows: int, columns: int) -> None:
    pytest.importorskip("numba")
    from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, address_of, operation, plan_row
    from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam
    from candle_vllm.core.kernels.position_scale import PositionScaleArguments

    generator = np.random.default_rng(0)
    stride = columns + 16
    x = generator.standard_normal((rows + 1, stride)).astype(np.float32)
    before, table = x.copy(), generator.random(100, np.float32) + 1
    positions = generator.integers(0, 100, rows)
    numbers = np.zeros(StepNumber.COUNT, np.int64)
    numbers[StepNumber.TOKENS] = rows
    arguments = PositionScaleArguments(
        x=address_of(x), stride=stride, columns=columns, positions=address_of(positions), table=address_of(table)
    )
    team = ThreadTeam(threads)
    row = plan_row(operation("position_scale.cpu:position_scale"), address_of(numbers), arguments)
    team.run(np.array(row), 1)
    team.close()
    heads = torch.from_numpy(before[:rows, :columns].copy()).unsqueeze(1)
    wanted = position_scale(heads, torch.from_numpy(positions), torch.from_numpy(table)).squeeze(1)
    assert np.array_equal(x[:rows, :columns], wanted.numpy())
    assert np.array_equal(x[:rows, columns:], before[:rows, columns:])
    assert np.array_equal(x[rows], before[rows])
