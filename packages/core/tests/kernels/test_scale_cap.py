# SPDX-License-Identifier: MIT
"""Scaling and soft-capping on the CPU, and the functions that recorded steps compute by themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

pytest.importorskip("numba")

from numba import njit

from candle_vllm.core.kernels.cpu_runtime import emit_functions
from candle_vllm.core.kernels.cpu_runtime.emit import F32, Emitter, Int, emitted, vector
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, address_of, plan_row
from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam
from candle_vllm.core.kernels.scale_cap import clamp_, scale_cap_, scale_cap_arguments, scale_cap_operation


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("columns", [1, 16, 45, 272])
@pytest.mark.parametrize(("scale", "cap"), [(3.5, None), (1.0, 30.0), (0.25, 0.7)])
def test_rows_become_what_the_reference_makes(threads: int, columns: int, scale: float, cap: float | None) -> None:
    rows, stride = 5, -(-columns // 16) * 16 + 16
    x = np.random.default_rng(0).standard_normal((rows + 1, stride)).astype(np.float32) * 10
    before = x.copy()
    wanted = scale_cap_(torch.from_numpy(before[:rows, :columns]).clone(), scale, cap)
    numbers = np.zeros(StepNumber.COUNT, np.int64)
    numbers[StepNumber.LOGIT_ROWS] = rows
    arguments = scale_cap_arguments(
        x=address_of(x), stride=stride, columns=columns, scale=scale, cap=cap, rows_from=StepNumber.LOGIT_ROWS
    )
    team = ThreadTeam(threads)
    operation = scale_cap_operation(int(cap is not None))
    team.run(np.array(plan_row(operation, address_of(numbers), arguments)), 1)
    team.close()
    np.testing.assert_allclose(x[:rows, :columns], wanted.numpy(), rtol=1e-6)
    assert np.array_equal(x[rows], before[rows])
    assert np.array_equal(x[:rows, -16:], before[:rows, -16:])


@pytest.mark.parametrize("columns", [1, 45, 272])
@pytest.mark.parametrize("bounds", [(-0.5, 2.0), (-np.inf, 0.25), (0.5, np.inf)])
def test_clamped_rows_are_within_bounds(columns: int, bounds: tuple[float, float]) -> None:
    rows, stride = 5, -(-columns // 16) * 16 + 16
    x = np.random.default_rng(0).standard_normal((rows + 1, stride)).astype(np.float32)
    before = x.copy()
    wanted = clamp_(torch.from_numpy(before[:rows, :columns]).clone(), *bounds)
    numbers = np.zeros(StepNumber.COUNT, np.int64)
    numbers[StepNumber.TOKENS] = rows
    arguments = scale_cap_arguments(x=address_of(x), stride=stride, columns=columns, scale=bounds[0], cap=None)
    team = ThreadTeam(2)
    team.run(np.array(plan_row(scale_cap_operation(2), address_of(numbers), arguments._replace(cap=bounds[1]))), 1)
    team.close()
    assert np.array_equal(x[:rows, :columns], wanted.numpy())
    assert np.array_equal(x[rows], before[rows])
    assert np.array_equal(x[:rows, -16:], before[:rows, -16:])


def test_a_cap_keeps_small_logits_and_holds_large_ones() -> None:
    x = torch.tensor([[1e-4, -1e-4, 1e9, -1e9]])
    assert torch.allclose(scale_cap_(x, 1.0, 30.0), torch.tensor([[1e-4, -1e-4, 30.0, -30.0]]))


def lanes_of(emit: Callable[[Emitter, Any], Any]) -> Callable[[np.ndarray], np.ndarray]:
    """A function of float32 arrays whose size is a multiple of 16."""

    @emitted
    def sixteen(e: Emitter, address: Int) -> None:
        e.store(address, emit(e, e.load(address, vector(F32))))

    @njit
    def every(address: int, count: int) -> None:
        for n in range(0, count, 16):
            sixteen(address + 4 * n)  # type: ignore[call-arg]

    def function(x: np.ndarray) -> np.ndarray:
        result = x.copy()
        every(address_of(result), result.size)
        return result

    return function


@pytest.mark.parametrize(
    ("name", "wanted", "tolerance"),
    [
        ("emit_exp", torch.exp, 4e-7),
        ("emit_tanh", torch.tanh, 4e-7),
        ("emit_silu", functional.silu, 1e-6),
        ("emit_gelu_tanh", lambda x: x * (math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)).sigmoid(), 8e-6),
        ("emit_quick_gelu", lambda x: x * (1.702 * x).sigmoid(), 2e-6),
        ("emit_relu", functional.relu, 0.0),
    ],
)
def test_functions(name: str, wanted: Callable[[torch.Tensor], torch.Tensor], tolerance: float) -> None:
    """Relative errors, from the smallest numbers to where GELU is nothing in float32."""
    sizes = np.concatenate([np.logspace(-30, math.log10(9), 3999), [0.0]])
    x = np.concatenate([sizes, -sizes]).astype(np.float32)
    exact = wanted(torch.from_numpy(x.astype(np.float64))).numpy()
    got = lanes_of(getattr(emit_functions, name))(x)
    assert (np.abs(got - exact) <= tolerance * np.abs(exact)).all()


def test_gelu() -> None:
    x = np.linspace(-12, 12, 16000).astype(np.float32)
    exact = functional.gelu(torch.from_numpy(x.astype(np.float64))).numpy()
    assert np.abs(lanes_of(emit_functions.emit_gelu)(x) - exact).max() < 2e-6


def test_relu2() -> None:
    x = np.linspace(-12, 12, 16000).astype(np.float32)
    assert np.array_equal(lanes_of(emit_functions.emit_relu2)(x), np.square(np.maximum(x, 0)))


@pytest.mark.parametrize(
    "name",
    ["emit_exp", "emit_tanh", "emit_silu", "emit_gelu_tanh", "emit_gelu", "emit_quick_gelu", "emit_softplus",
     "emit_relu", "emit_relu2"],
)  # fmt: skip
def test_what_is_no_number_stays_none(name: str) -> None:
    x = np.array([math.nan] * 8 + [1.0] * 8, np.float32)
    got = lanes_of(getattr(emit_functions, name))(x)
    assert np.isnan(got[:8]).all()
    assert np.isfinite(got[8:]).all()


def test_large_numbers_stay_in_bounds() -> None:
    x = np.array([1e30, -1e30, math.inf, -math.inf] * 4, np.float32)
    assert lanes_of(emit_functions.emit_tanh)(x).tolist() == [1.0, -1.0] * 8
    got = lanes_of(emit_functions.emit_gelu_tanh)(x[:16])
    assert got[0] == np.float32(1e30)
    assert abs(got[1]) < 1e-6
