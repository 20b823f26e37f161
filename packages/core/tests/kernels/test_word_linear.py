# SPDX-License-Identifier: MIT
"""F16 weights as whole numbers of 14 bits: what the layout keeps, rows of the same kind, and products of both."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest

from candle_vllm.core.kernels.word_linear import WordMatrix, pack
from packages.core.tests.kernels import word_reference as reference
from packages.core.tests.kernels.word_reference import unpack

pytest.importorskip("numba")

from candle_vllm.core.kernels.activation_quant import Prologue
from candle_vllm.core.kernels.activation_rows import GROUP, WORD, RowForm, RowsArguments, row_bytes, rows_operation
from candle_vllm.core.kernels.cpu_runtime.level import Isa, host_isa
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, address_of
from candle_vllm.core.kernels.cpu_runtime.recorder import aligned
from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam
from candle_vllm.core.kernels.word_linear import cpu
from packages.core.tests.kernels.linear_field import error, make_anew, multiply_in_field, run_row, same_bits

RANDOM = np.random.default_rng(5)
ODD = 301
NAMES = {np.float16: "F16", np.float32: "F32"}


@functools.cache
def weights(rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(rows).standard_normal((rows, columns)).astype(np.float16)


def packed(numbers: np.ndarray) -> WordMatrix:
    made = pack(numbers.view(np.uint8).reshape(-1), NAMES[numbers.dtype.type], *numbers.shape)
    assert made is not None
    return made


@pytest.fixture(scope="module")
def teams():
    made = [ThreadTeam(1), ThreadTeam(2)]
    yield made
    for team in made:
        team.close()


def words(team: ThreadTeam, x: np.ndarray, prologue: Prologue = Prologue.NONE) -> np.ndarray:
    """Rows as the operation makes them, bytes [T, size]."""
    size = row_bytes(RowForm.I16, x.shape[1])
    out = aligned(len(x) * size // 2, np.int16)
    numbers = np.full(StepNumber.COUNT, -1, np.int64)
    numbers[StepNumber.TOKENS] = len(x)
    given = RowsArguments(address_of(x), x.shape[1], x.shape[1], address_of(out))
    run_row(team, rows_operation(prologue, RowForm.I16), numbers, given)
    return out.view(np.uint8).reshape(len(x), size)


def taken(rows: np.ndarray, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers [T, G, 32] and scales [T, G] of rows."""
    groups = -(-columns // GROUP)
    numbers = np.ascontiguousarray(rows[:, : groups * GROUP * 2]).view(np.int16).reshape(len(rows), groups, GROUP)
    return numbers, np.ascontiguousarray(rows[:, groups * GROUP * 2 :]).view(np.float32)[:, :groups]


def multiply(team: ThreadTeam, matrix: WordMatrix, x: np.ndarray, isa: Isa, **more: np.ndarray) -> np.ndarray:
    rows = words(team, x)
    bias, onto = more.get("bias"), more.get("onto")
    at = {"x": address_of(rows), "x_bytes": rows.shape[1]}
    return multiply_in_field(team, matrix, len(x), isa, bias, onto, **at)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (17, 31), (63, 512)])
def test_the_layout_keeps_fourteen_bits(rows: int, columns: int) -> None:
    numbers = weights(rows, columns)
    matrix = packed(numbers)
    found, scales = unpack(matrix), reference.parts(matrix)[1]
    step = np.repeat(scales, GROUP, 1)[:, :columns]
    assert (np.abs(found - numbers) <= step / 2).all()
    large = np.abs(numbers) >= 1024 * step
    assert np.array_equal(found[large], numbers[large].astype(np.float32))
    assert address_of(matrix.data) % 64 == 0
    assert matrix.nbytes == matrix.tile_bytes * -(-rows // 16)


def test_long_rows_and_numbers_that_are_not_finite_have_no_such_layout() -> None:
    assert pack(np.zeros(4 << 16, np.uint8), "F32", 1, 1 << 16) is not None
    assert pack(np.zeros((2 << 16) + 2, np.uint8), "F16", 1, (1 << 16) + 1) is None, "its panels overflow the stack"
    for value in (np.inf, np.nan):
        numbers = weights(17, 31).copy()
        numbers[16, 3] = value
        assert pack(numbers.view(np.uint8).reshape(-1), "F16", 17, 31) is None
    assert not unpack(packed(np.zeros((3, 40), np.float16))).any()


@pytest.mark.parametrize("columns", [32, ODD])
def test_rows_are_rounded_to_the_nearest(columns: int, teams: list[ThreadTeam]) -> None:
    x = (RANDOM.standard_normal((5, columns)) * 10.0 ** RANDOM.integers(-6, 6, (5, 1))).astype(np.float32)
    x[2] = 0
    each = [words(team, x) for team in teams]
    assert np.array_equal(*each)
    found, scales = taken(each[0], columns)
    padded = np.pad(x, ((0, 0), (0, -columns % GROUP))).reshape(5, -1, GROUP)
    assert np.array_equal(scales, np.abs(padded).max(2) / np.float32(WORD))
    assert np.abs(found).max() == WORD
    assert (np.abs(found * scales[..., None].astype(np.float64) - padded) <= 0.501 * scales[..., None]).all()


def linear(matrix: WordMatrix, x: np.ndarray, scales: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """Multiply weights by integers x int16 [T, G, 32] with scales [T, G], plus bias [N]: float32 [T, N]."""
    words, own = reference.parts(matrix)
    sums = np.einsum("tgk,ngk->tng", x.astype(np.int64), words.astype(np.int64))
    assert np.abs(sums).max(initial=0) < 2**31
    y = (sums * (own[None].astype(np.float64) * scales[:, None])).sum(-1)
    return (y if bias is None else y + bias).astype(np.float32)


@pytest.mark.one_of_each(2)
@pytest.mark.parametrize(("rows", "columns"), [(1, 31), (33, ODD), (63, 800)])
def test_products_are_those_of_the_reference(rows: int, columns: int, teams: list[ThreadTeam]) -> None:
    matrix, bias = packed(weights(rows, columns)), RANDOM.standard_normal(rows).astype(np.float32)
    x = RANDOM.standard_normal((70, columns)).astype(np.float32)
    wanted = linear(matrix, *taken(words(teams[0], x), columns), bias)
    found = multiply(teams[0], matrix, x, Isa.GENERIC, bias=bias)
    assert error(found, wanted) < 1e-5
    assert error(found, x @ weights(rows, columns).astype(np.float32).T + bias) < 3e-4
    for team, count in itertools.product(teams, (1, 7, 9, 70)):
        assert same_bits(multiply(team, matrix, x[:count], host_isa(), bias=bias), found[:count])
    onto = RANDOM.standard_normal(found.shape).astype(np.float32)
    assert error(multiply(teams[0], matrix, x, host_isa(), bias=bias, onto=onto), wanted + onto) < 1e-5


def test_sums_of_the_largest_numbers_do_not_overflow(teams: list[ThreadTeam]) -> None:
    largest = np.full((16, 64), np.float16(2047 / 1024))
    x = np.full((1, 64), 3, np.float32)
    assert np.allclose(multiply(teams[0], packed(largest), x, host_isa()), 64 * 3 * 2047 / 1024, rtol=1e-6)


def test_small_parts_give_the_same_bits(teams: list[ThreadTeam], monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, x = packed(weights(33, 800)), RANDOM.standard_normal((40, 800)).astype(np.float32)
    wanted = multiply(teams[0], matrix, x, Isa.GENERIC)
    for name, value in (("_PART", 3), ("_PANELS", 2)):
        monkeypatch.setattr(cpu, name, value)
    make_anew(monkeypatch, cpu, "small")
    assert same_bits(multiply(teams[0], matrix, x, Isa.GENERIC), wanted)
