# SPDX-License-Identifier: MIT
"""A compiled linear operation run by itself, for the tests of every kind of matrix."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from candle_vllm.core.kernels.cpu_runtime import kernel_cache, machine_code, matrices
from candle_vllm.core.kernels.cpu_runtime.compiler import load_object
from candle_vllm.core.kernels.cpu_runtime.kernel_cache import compiled_address
from candle_vllm.core.kernels.cpu_runtime.level import LEVELS, Isa, Level, host_flags, host_level, links_here, machine
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, address_of, linear_arguments, plan_row
from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam


def run_row(team: ThreadTeam, operation: int, numbers: np.ndarray, arguments: tuple[Any, ...]) -> None:
    """A plan of one operation."""
    team.run(np.array(plan_row(operation, address_of(numbers), arguments), np.int64), 1)


def multiply_in_field(
    team: ThreadTeam,
    matrix: Any,
    rows: int,
    isa: Isa,
    bias: np.ndarray | None,
    onto: np.ndarray | None,
    operation: int = 0,
    **inputs: int,
) -> np.ndarray:
    """Runs the operation into the middle of a field of NaN, checks that the rest stays NaN, returns float32 [T, N].

    Args:
        team: of threads.
        matrix: of its kind.
        rows: T.
        isa: what the CPU can do.
        bias: [N], or None.
        onto: what stands there and is added to, [T, N], or None.
        operation: the compiled operation, if it is not the one of `isa`.
        inputs: what `linear_arguments` calls the activations.
    """
    field = np.full((rows + 2, matrix.rows + 24), np.nan, np.float32)
    view = field[:rows, 5 : 5 + matrix.rows]
    if onto is not None:
        view[:] = onto
    numbers = np.full(StepNumber.COUNT, -1, np.int64)
    numbers[StepNumber.LOGIT_ROWS] = rows
    arguments = linear_arguments(
        matrix,
        **inputs,
        out=address_of(field),
        out_stride=field.shape[1],
        column=5,
        bias=0 if bias is None else address_of(bias),
        accumulate=onto is not None,
        rows_from=StepNumber.LOGIT_ROWS,
    )
    run_row(team, operation or matrices.linear_operation(matrix, isa), numbers, arguments)
    result = view.copy()
    view[:] = np.nan
    assert np.isnan(field).all()
    return result


def make_anew(monkeypatch: pytest.MonkeyPatch, cpu: ModuleType, name: str) -> None:
    """Has a kernel's linear operation made with the numbers that its module has now; the result is kept as `name`."""

    module = cpu.__name__.removeprefix("candle_vllm.core.kernels.")

    def linear_operation(matrix: Any, isa: int) -> int:
        constants = [int(isa)] if module.startswith("word_linear") else [int(matrix.kind), int(isa)]
        return compiled_address(
            f"{module}.tests.{name}.{'.'.join(map(str, constants))}", lambda: cpu.make_linear(*constants)
        )

    monkeypatch.setattr(matrices, "linear_operation", linear_operation)


PLAIN = host_level()._replace(name="plain", isa=Isa.GENERIC)
"""This CPU, of whose instructions none is asked for by name."""

LEVELS_HERE = [PLAIN, *(level for level in LEVELS if level.machine == machine() and level.flags <= host_flags())]
"""What this CPU can run."""


@functools.cache
def operation_at(make_linear: Callable[[int, int], Any], kind: int, level: Level) -> int:
    """A linear operation, compiled for a level, and kept on disk like the kernels of the level of this CPU."""
    module = make_linear.__module__.removeprefix("candle_vllm.core.kernels.")
    name = f"{module}.tests.{level.name}.{int(kind)}.{int(level.isa)}"
    folder = kernel_cache.kernel_cache()
    path = folder and folder / kernel_cache.kept_name(name, level)
    code = kernel_cache._read(path, used=True) if path else None
    if code is None:
        code = kernel_cache.compile_image(make_linear(int(kind), int(level.isa)), level)
        if folder:
            kernel_cache.keep_kernel(folder, name, level, code)
    return machine_code.load(machine_code.from_bytes(code)) if links_here() else load_object(code)


def same_bits(x: np.ndarray, y: np.ndarray) -> bool:
    """NaN of the same bits are equal."""
    return x.shape == y.shape and np.array_equal(x.view(np.uint32), y.view(np.uint32))


def error(result: np.ndarray, wanted: np.ndarray) -> float:
    """RMS(error) / RMS(reference)."""
    return float(np.sqrt(np.mean((result - wanted) ** 2, dtype=np.float64) / np.mean(wanted**2, dtype=np.float64)))
