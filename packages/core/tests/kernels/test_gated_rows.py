# SPDX-License-Identifier: MIT
"""Rows times act(gate) as the CPU's operation has them: the reference's numbers, and nothing beside them."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch

from candle_vllm.core.kernels.silu_mul import GatedRowsArguments, gated, gated_rows_operation

pytest.importorskip("numba")


@pytest.mark.parametrize("kind", ["sigmoid", "silu", "gelu_tanh", "softplus"])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("rows", "columns", "span"), [(1, 1, 1), (1, 63, 1), (5, 24, 1), (63, 48, 1), (2, 4097, 1), (5, 48, 16), (2, 54, 9)]
)
@pytest.mark.parametrize("picks", [False, True], ids=["all", "picked"])
def test_the_operation_makes_what_the_reference_makes(
    kind: Literal["sigmoid", "silu", "gelu_tanh", "softplus"],
    threads: int,
    rows: int,
    columns: int,
    span: int,
    picks: bool,
) -> None:
    from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, address_of, plan_row
    from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam

    generator = np.random.default_rng(0)
    x = generator.standard_normal((rows + 1, columns + 16)).astype(np.float32)
    gates = 4 * generator.standard_normal((70, columns + 5)).astype(np.float32)
    gates[::3, 0] = np.nan  # a NaN gate gives NaN
    before, picked = x.copy(), generator.integers(0, 70, rows)
    numbers = np.zeros(StepNumber.COUNT, np.int64)
    numbers[StepNumber.LOGIT_ROWS if picks else StepNumber.TOKENS] = rows
    arguments = GatedRowsArguments(
        x=address_of(x),
        stride=columns + 16,
        columns=columns,
        gate=address_of(gates),
        gate_stride=columns + 5,
        span=span,
        picked=address_of(picked) if picks else 0,
        rows_from=StepNumber.LOGIT_ROWS if picks else StepNumber.TOKENS,
    )
    team = ThreadTeam(threads)
    team.run(np.array(plan_row(gated_rows_operation(kind, spread=span > 1), address_of(numbers), arguments)), 1)
    team.close()
    chosen = gates[picked] if picks else gates[:rows]
    wanted = gated(torch.from_numpy(before[:rows, :columns]), torch.from_numpy(chosen[:, : columns // span]), kind)
    rtol, atol = (1e-5, 1e-6) if kind in ("gelu_tanh", "softplus") else (2e-6, 1e-7)  # as `test_functions`
    np.testing.assert_allclose(x[:rows, :columns], wanted.numpy(), rtol=rtol, atol=atol)
    x[:rows, :columns] = before[:rows, :columns]
    assert np.array_equal(x, before)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 24), (2, 4097)])
def test_xielu(threads: int, rows: int, columns: int) -> None:
    """The compiled activation against its definition in float64, and nothing beside the rows is changed."""
    from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, address_of, plan_row
    from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam

    generator = np.random.default_rng(0)
    x = 3 * generator.standard_normal((rows, columns + 16)).astype(np.float32)
    x[0, 0] = -1e-4
    before, (p, n, beta) = x.copy(), (parameters := np.array([0.8, 1.3, 0.5], np.float32)).astype(np.float64)
    numbers = np.zeros(StepNumber.COUNT, np.int64)
    numbers[StepNumber.TOKENS] = rows
    arguments = GatedRowsArguments(address_of(x), columns + 16, columns, address_of(parameters), 0)
    team = ThreadTeam(threads)
    team.run(np.array(plan_row(gated_rows_operation("xielu", spread=False), address_of(numbers), arguments)), 1)
    team.close()
    wide = before[:, :columns].astype(np.float64)
    below = np.minimum(wide, 0)
    wanted = beta * wide + p * np.maximum(wide, 0) ** 2 + n * (np.expm1(below) - below)
    np.testing.assert_allclose(x[:, :columns], wanted, rtol=1e-5, atol=1e-6)
    assert np.array_equal(x[:, columns:], before[:, columns:])
