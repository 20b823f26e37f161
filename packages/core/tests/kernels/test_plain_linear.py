# SPDX-License-Identifier: MIT
"""The plain linear layer: the layout keeps every number, and each compiled variant gives the same bits."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch

from candle_vllm.core import threads
from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.kernels.cpu_runtime import weight_memory
from candle_vllm.core.kernels.cpu_runtime.weight_memory import WeightMemory
from candle_vllm.core.kernels.plain_linear import PlainKind, PlainMatrix, pack, pack_rows, plain_kind
from candle_vllm.core.kernels.torch_numbers import DTYPES, NAMES
from candle_vllm.core.kernels.weight_quant.rows import quantise_rows
from candle_vllm.core.quantization import ggml
from candle_vllm.core.quantization.ggml_types import GGMLQuantizationType
from packages.core.tests.kernels import plain_reference as reference
from packages.core.tests.kernels.plain_reference import unpack

pytest.importorskip("numba")

from candle_vllm.core.kernels.activation_quant import Prologue
from candle_vllm.core.kernels.activation_rows import RowForm, RowsArguments, row_bytes, row_elements, rows_operation
from candle_vllm.core.kernels.cpu_runtime.level import Isa, host_isa
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, address_of, embedding_arguments, operation
from candle_vllm.core.kernels.cpu_runtime.recorder import aligned
from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam
from candle_vllm.core.kernels.plain_linear import cpu
from packages.core.tests.kernels.linear_field import error, make_anew, multiply_in_field, run_row, same_bits

# The generic path runs everywhere; the blocks of 24 rows of AVX2, 512 bits and BF16 only where the CPU has them. The
# last of a list is what models use on this CPU, so that other tests need the same kernels.
ISAS = [Isa.GENERIC, *[isa for isa in (Isa.AVX2,) if host_isa() & isa], host_isa()]
BYTES_ISAS = [Isa.GENERIC, *[isa for isa in (Isa.AVX2, Isa.AVX512) if host_isa() & isa], host_isa()]
BF16_ISAS = [Isa.GENERIC, *[isa for isa in (Isa.BF16,) if host_isa() & isa], host_isa()]
ODD = 301
FLOATS = [kind for kind in PlainKind if kind is not PlainKind.W8A8]
each_kind = pytest.mark.parametrize("kind", FLOATS, ids=lambda kind: kind.name)


def isas(kind: PlainKind) -> list[Isa]:
    """Instructions for which a kind of floats has different code."""
    return BF16_ISAS if kind is PlainKind.BF16 else ISAS


def stored(kind: PlainKind, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).to(DTYPES[kind.name])


def raw(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy().reshape(-1)


@functools.cache
def packed(kind: PlainKind, rows: int, columns: int) -> PlainMatrix:
    return pack(raw(stored(kind, rows, columns)), kind.name, rows, columns)


@functools.cache
def activations(rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((rows, columns)).astype(np.float32)


@pytest.fixture(scope="module", params=[1, 2], ids=["1 thread", "2 threads"])
def team(request):
    team = ThreadTeam(request.param)
    yield team
    team.close()


@pytest.fixture(scope="module")
def lone_thread():
    team = ThreadTeam(1)
    yield team
    team.close()


def multiply(
    team: ThreadTeam,
    matrix: PlainMatrix,
    x: np.ndarray,
    *,
    isa: Isa | None = None,
    bias: np.ndarray | None = None,
    onto: np.ndarray | None = None,
) -> np.ndarray:
    """See `multiply_in_field`."""
    rows, width = len(x), row_elements(matrix.columns)
    inputs = aligned(max(rows, 1) * width, np.float32).reshape(-1, width)
    inputs[:rows, : matrix.columns] = x
    x_bytes = 4 * width
    if matrix.kind is PlainKind.BF16:
        halves = torch.from_numpy(inputs).bfloat16().view(torch.int16).numpy()
        inputs = aligned(halves.size, np.int16).reshape(halves.shape)
        inputs[:] = halves
        x_bytes = 2 * width
    wanted = host_isa() if isa is None else isa
    return multiply_in_field(team, matrix, rows, wanted, bias, onto, x=address_of(inputs), x_bytes=x_bytes)


# ---- the layout ------------------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (17, 31), (63, 512)])
def test_the_layout_keeps_every_number(kind, rows, columns):
    tensor = stored(kind, rows, columns)
    matrix = pack(raw(tensor), kind.name, rows, columns)
    assert matrix.kind is plain_kind(kind.name) is kind
    assert np.array_equal(unpack(matrix), tensor.float().numpy())
    assert address_of(matrix.data) % 64 == 0
    assert matrix.nbytes <= -(-rows // 16) * 16 * (columns + (31 if kind is PlainKind.BF16 else 3)) * kind.itemsize


def test_unaligned_bytes():
    tensor = stored(PlainKind.F32, 5, 7)
    shifted = np.concatenate([np.zeros(3, np.uint8), raw(tensor)])[3:]
    assert np.array_equal(unpack(pack(shifted, "F32", 5, 7)), tensor.numpy())


@each_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_numbers_are_converted_on_request(kind, dtype):
    tensor = torch.randn(18, 33, generator=torch.Generator().manual_seed(3)).to(dtype)
    matrix = pack(raw(tensor), NAMES[dtype], 18, 33, kind)
    assert np.array_equal(unpack(matrix), tensor.to(DTYPES[kind.name]).float().numpy())


def test_what_has_no_kind_becomes_f32():
    assert plain_kind("F64") is plain_kind("I8") is PlainKind.F32
    tensor = torch.arange(-12, 12, dtype=torch.int8).view(4, 6)
    assert np.array_equal(unpack(pack(raw(tensor), "I8", 4, 6)), tensor.float().numpy())


@pytest.mark.parametrize("value", [65520.0, -1e6])
def test_a_number_beyond_f16_is_refused(value):
    tensor = stored(PlainKind.F32, 17, 9)
    tensor[16, 3] = value
    with pytest.raises(UnsupportedModelError, match=r"beyond the range of F16, which ends at 65504: .* bf16 or f32"):
        pack(raw(tensor), "F32", 17, 9, PlainKind.F16)
    tensor[16, 3] = 65519.0  # rounds to the largest
    tensor[0, 0] = float("inf")  # was infinite before
    assert unpack(pack(raw(tensor), "F32", 17, 9, PlainKind.F16))[16, 3] == 65504


def test_a_number_beyond_a_wider_type_is_refused_with_advice_that_helps():
    with pytest.raises(UnsupportedModelError, match=r"range of BF16, which ends at 3.38953e\+38: .* or set f32"):
        pack(raw(torch.tensor([[3.4e38]])), "F32", 1, 1, PlainKind.BF16)
    with pytest.raises(UnsupportedModelError, match=r"range of F32, which ends at 3.40282e\+38: the kernels have no"):
        pack(raw(torch.tensor([[1e300]], dtype=torch.float64)), "F64", 1, 1)


def test_subnormal_halves_are_exact(lone_thread):
    tensor = torch.full((16, 4), 2.0**-24, dtype=torch.float16)
    result = multiply(lone_thread, pack(raw(tensor), "F16", 16, 4), np.ones((1, 4), np.float32))
    assert (result == 2.0**-22).all()


def test_matrices_share_memory_and_chunks_are_alike(monkeypatch):
    memory, tensor = WeightMemory(piece_bytes=1 << 16), stored(PlainKind.F16, 63, 257)
    whole = packed(PlainKind.F16, 63, 257)
    monkeypatch.setattr(weight_memory, "_CHUNK", 257 * 16)
    monkeypatch.setattr(threads, "loading_threads", lambda: 3)
    shared = [pack(raw(tensor), "F16", 63, 257, memory=memory) for _ in range(3)]
    assert all(np.array_equal(matrix.data, whole.data) for matrix in shared)


def test_shapes_that_have_no_kernel():
    with pytest.raises(UnsupportedModelError, match=r"65,536"):
        pack(np.zeros(2 << 17, np.uint8), "F16", 1, 1 << 17)
    with pytest.raises(ValueError, match="54 bytes"):
        pack(np.zeros(54, np.uint8), "F16", 2, 14)


# ---- multiplying -----------------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize(("outputs", "columns"), [(1, 1), (17, ODD), (63, 768)])
def test_linear_matches_the_reference(kind, outputs, columns, team):
    matrix, x = packed(kind, outputs, columns), activations(63, columns)
    wanted = reference.linear(unpack(matrix), reference.round_activations(x, kind))
    for isa in isas(kind):
        for rows in (1, 3, 8, 63):
            assert error(multiply(team, matrix, x[:rows], isa=isa), wanted[:rows]) < 1e-5


@each_kind
def test_a_row_has_the_same_bits_everywhere(kind, team):
    matrix, x = packed(kind, 63, ODD), activations(63, ODD)
    for isa in isas(kind):
        whole = multiply(team, matrix, x, isa=isa)
        for cuts in ((0, 1, 3, 11, 63), (0, 4, 6, 36, 37, 63)):
            for first, last in itertools.pairwise(cuts):
                assert same_bits(multiply(team, matrix, x[first:last], isa=isa), whole[first:last])
        lone = ThreadTeam(1)
        assert same_bits(multiply(lone, matrix, x, isa=isa), whole)
        lone.close()


def test_only_bf16_depends_on_the_instructions(lone_thread):
    x = activations(63, ODD)
    for kind in (PlainKind.F16, PlainKind.F32):
        first, *others = [multiply(lone_thread, packed(kind, 63, ODD), x, isa=isa) for isa in ISAS]
        assert all(same_bits(first, other) for other in others)
    results = [multiply(lone_thread, packed(PlainKind.BF16, 63, ODD), x, isa=isa) for isa in BF16_ISAS]
    assert error(results[0], results[-1]) < 1e-6


@each_kind
def test_a_tile_has_the_same_bits_in_any_matrix(kind, lone_thread):
    tensor, x = stored(kind, 48, 96), activations(9, 96)
    whole = multiply(lone_thread, pack(raw(tensor), kind.name, 48, 96), x)
    part = multiply(lone_thread, pack(raw(tensor[5:22]), kind.name, 17, 96), x)
    assert same_bits(part, whole[:, 5:22].copy())


@each_kind
@pytest.mark.parametrize("columns", [31, 777])
def test_groups_of_rows_have_the_bits_of_each_row(kind, columns, lone_thread):
    """Groups end with blocks of every height; K is taken in parts where it is long."""
    matrix, x = packed(kind, 37, columns), activations(141, columns)
    for isa in isas(kind)[1:]:
        alone = np.concatenate([multiply(lone_thread, matrix, x[row : row + 1], isa=isa) for row in range(len(x))])
        for rows in (8, 9, 12, 13, 64, 65, 70, 141):
            assert same_bits(multiply(lone_thread, matrix, x[:rows], isa=isa), alone[:rows])


def test_activations_larger_than_the_cache_are_taken_in_turns(lone_thread, monkeypatch):
    matrix, x = packed(PlainKind.BF16, 63, ODD), activations(20, ODD)
    whole = multiply(lone_thread, matrix, x)
    monkeypatch.setattr(cpu, "CACHED_BYTES", 1)
    make_anew(monkeypatch, cpu, "turns")
    assert same_bits(multiply(lone_thread, matrix, x), whole)


@pytest.mark.parametrize("rows", [1, 3, 11])
def test_bias_and_what_stands_there_are_added(rows, team):
    matrix, x = packed(PlainKind.BF16, 37, 95), activations(11, 95)[:rows]
    random = np.random.default_rng(5)
    bias, onto = (random.standard_normal(shape).astype(np.float32) for shape in (37, (rows, 37)))
    plain = multiply(team, matrix, x)
    assert same_bits(multiply(team, matrix, x, bias=bias), plain + bias)
    assert same_bits(multiply(team, matrix, x, onto=onto), plain + onto)
    assert same_bits(multiply(team, matrix, x, bias=bias, onto=onto), plain + bias + onto)


def test_no_rows_is_no_work(team):
    assert multiply(team, packed(PlainKind.F32, 17, 95), activations(1, 95)[:0]).shape == (0, 17)


# ---- 8 bits ----------------------------------------------------------------------------------------------------------


def blocks_of_rows(weights: np.ndarray) -> np.ndarray:
    """Q8_0 with one scale for each row."""
    plain = np.ascontiguousarray(weights, np.float32)
    return quantise_rows(plain.view(np.uint8).reshape(len(plain), -1), "F32", plain.shape[1])


def multiply_bytes(team: ThreadTeam, matrix: PlainMatrix, x: np.ndarray, isa: Isa, **more: np.ndarray) -> np.ndarray:
    """As `multiply`, for activations that the compiled operation quantises."""
    rows, columns = x.shape
    inputs, size = aligned(x.size, np.float32).reshape(x.shape), row_bytes(RowForm.I8, columns)
    inputs[:] = x
    out, numbers = aligned(rows * size, np.uint8), np.full(StepNumber.COUNT, rows, np.int64)
    given = RowsArguments(x=address_of(inputs), stride=columns, columns=columns, out=address_of(out))
    run_row(team, rows_operation(Prologue.NONE, RowForm.I8), numbers, given)
    bias, onto = more.get("bias"), more.get("onto")
    return multiply_in_field(team, matrix, rows, isa, bias, onto, x=address_of(out), x_bytes=size)


@pytest.mark.parametrize(("outputs", "columns"), [(1, 32), (17, 96), (63, 1344)])
def test_8_bits_have_the_same_bits_on_every_cpu(outputs, columns, team):
    """Integer sums are exact, and floats are added in the same order by every variant."""
    weights, x = activations(64, columns)[:outputs], activations(341, columns) * 3
    x[7] = 0
    raw = blocks_of_rows(weights)
    matrix = pack_rows(raw, outputs, columns)
    assert matrix is not None
    exact = ggml.dequantize(raw, GGMLQuantizationType.Q8_0, (outputs, columns))
    assert np.array_equal(unpack(matrix), exact)
    wanted = reference.linear(exact, reference.round_activations(x, PlainKind.W8A8))
    whole = multiply_bytes(team, matrix, x, Isa.GENERIC)
    assert error(whole, wanted) < 1e-6
    for isa in BYTES_ISAS[1:]:
        for rows in (1, 2, 4, 5, 8, 9, 16, 17, 33, 341):
            assert same_bits(multiply_bytes(team, matrix, x[:rows], isa), whole[:rows])
            assert same_bits(multiply_bytes(team, matrix, x[-rows:], isa), whole[-rows:])


@pytest.mark.parametrize("rows", [3, 19])
def test_8_bits_with_a_bias_and_onto_a_result(rows, team):
    matrix, x = pack_rows(blocks_of_rows(activations(37, 160)), 37, 160), activations(rows, 160)
    random = np.random.default_rng(5)
    bias, onto = (random.standard_normal(shape).astype(np.float32) for shape in (37, (rows, 37)))
    plain = multiply_bytes(team, matrix, x, host_isa())
    assert same_bits(multiply_bytes(team, matrix, x, host_isa(), bias=bias, onto=onto), plain + bias + onto)


def test_only_rows_with_one_scale_become_8_bits():
    raw = blocks_of_rows(activations(17, 96))
    assert pack_rows(raw, 17, 96) is not None
    raw.reshape(17, 3, 34)[16, 1, 0] ^= 1
    assert pack_rows(raw, 17, 96) is None
    zeros = pack_rows(blocks_of_rows(np.zeros((3, 64))), 3, 64)
    assert not unpack(zeros).any()


# ---- embedding rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "columns"), [*itertools.product(FLOATS, (1, ODD)), (PlainKind.W8A8, 96)])
def test_embedding_rows_are_exact(kind, columns, team):
    if kind is PlainKind.W8A8:
        matrix = pack_rows(blocks_of_rows(activations(63, columns)), 63, columns)
    else:
        matrix = packed(kind, 63, columns)
    ids = np.array([0, 62, 17, 17, -1, 63, 1 << 40], np.int64)
    field = np.full((len(ids) + 1, columns + 8), 7, np.float32)
    numbers = np.full(StepNumber.COUNT, len(ids), np.int64)
    arguments = embedding_arguments(matrix, token_ids=address_of(ids), out=address_of(field), out_stride=columns + 8)
    run_row(team, operation("plain_linear.cpu:make_embedding", kind), numbers, arguments)
    assert np.array_equal(field[:4, :columns], unpack(matrix)[ids[:4]])
    assert np.isnan(field[4:7, :columns]).all()  # ids outside of the table
    assert (field[:, columns:] == 7).all()
    assert (field[7] == 7).all()
