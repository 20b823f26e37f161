# SPDX-License-Identifier: MIT
"""The linear layer of small floats: the layout keeps every number, and each compiled variant gives the same bits."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import numpy as np
import pytest
import torch

from candle_vllm.core import threads
from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.kernels.cpu_runtime import weight_memory
from candle_vllm.core.kernels.cpu_runtime.weight_memory import WeightMemory
from candle_vllm.core.kernels.scaled_linear import ScaledKind, ScaledMatrix, pack
from candle_vllm.core.kernels.torch_numbers import DTYPES
from candle_vllm.core.quantization.scaled_codes import FLOAT_NAMES, GROUP, ScaledCodes
from packages.core.tests.kernels.scaled_reference import unpack

pytest.importorskip("numba")

from candle_vllm.core.kernels.activation_rows import row_elements
from candle_vllm.core.kernels.cpu_runtime.level import Isa, host_isa
from candle_vllm.core.kernels.cpu_runtime.matrices import linear_operation
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, address_of, linear_arguments
from candle_vllm.core.kernels.cpu_runtime.recorder import aligned
from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam
from candle_vllm.core.kernels.plain_linear import layout as plain_layout
from candle_vllm.core.kernels.plain_linear import pack as pack_plain
from candle_vllm.core.kernels.scaled_linear import cpu
from packages.core.tests.kernels import plain_reference as plain_reference
from packages.core.tests.kernels.linear_field import error, make_anew, multiply_in_field, run_row, same_bits
from tests.common_run import few

# The generic path runs everywhere; BF16 and AMX only where the CPU has them. With AMX, the instructions are those of
# models, so that other tests need the same kernels.
ISAS = [Isa.GENERIC, *[isa for isa, has in ((Isa.BF16, Isa.BF16), (host_isa(), Isa.AMX)) if host_isa() & has]]
ROWS = (1, 2, 4, 5, 8, 9, 70)
COMMON = (ScaledKind.E4M3, ScaledKind.E2M1)
each_kind = pytest.mark.parametrize("kind", few(ScaledKind, *COMMON), ids=lambda kind: kind.name)


def columns_of(kind: ScaledKind, columns: int) -> int:
    """The next number of columns that the kind can have."""
    return -(-columns // GROUP) * GROUP if kind is ScaledKind.E2M1 else columns


@functools.cache
def codes(kind: ScaledKind, rows: int, columns: int, span: int | None = None, seed: int = 0) -> ScaledCodes:
    """Random weights and scales; without NaN and infinities."""
    columns = columns_of(kind, columns)
    random = np.random.default_rng(seed)
    spans = 1 if span is None else -(-columns // span)
    scales = random.uniform(-0.01, 0.02, (rows, spans)).astype(np.float32)
    span = columns if span is None else span
    if kind is ScaledKind.E2M1:
        groups = torch.from_numpy(random.uniform(0, 300, (rows, columns // GROUP))).to(torch.float8_e4m3fn)
        packed = random.integers(0, 256, (rows, columns // 2), np.uint8)
        return ScaledCodes("e2m1", packed, scales, span, groups.view(torch.uint8).numpy())
    numbers = "e4m3" if kind is ScaledKind.E4M3 else "e5m2"
    weights = torch.from_numpy(random.standard_normal((rows, columns)) * random.uniform(0.001, 90, (rows, 1)))
    return ScaledCodes(numbers, weights.to(DTYPES[FLOAT_NAMES[numbers]]).view(torch.uint8).numpy(), scales, span)


@functools.cache
def packed(kind: ScaledKind, rows: int, columns: int, span: int | None = None) -> ScaledMatrix:
    return pack(codes(kind, rows, columns, span))


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


def bfloat16_rows(x: np.ndarray) -> np.ndarray:
    """Rows as the kernels read them."""
    width = row_elements(x.shape[1])
    rows = aligned(max(len(x), 1) * width, np.int16).reshape(-1, width)
    rows[: len(x), : x.shape[1]] = torch.from_numpy(x).bfloat16().view(torch.int16).numpy()
    return rows


def multiply(
    team: ThreadTeam,
    matrix: ScaledMatrix,
    x: np.ndarray,
    *,
    isa: Isa | None = None,
    bias: np.ndarray | None = None,
    onto: np.ndarray | None = None,
    picked: np.ndarray | None = None,
) -> np.ndarray:
    """See `multiply_in_field`."""
    rows = len(x) if picked is None else len(picked)
    inputs = bfloat16_rows(x)
    wanted = ISAS[-1] if isa is None else isa
    places = {"x": address_of(inputs), "x_bytes": inputs.strides[0]}
    places["picked"] = 0 if picked is None else address_of(picked)
    return multiply_in_field(team, matrix, rows, wanted, bias, onto, **places)


# ---- the layout ------------------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize(("rows", "columns", "span"), [(1, 1, None), (17, 123, 16), (63, 1000, 128), (33, 4097, 384)])
def test_the_layout_keeps_every_number(kind, rows, columns, span):
    found = codes(kind, rows, columns, span)
    matrix = pack(found)
    assert (matrix.rows, matrix.columns, matrix.kind) == (rows, found.columns, kind)
    assert np.array_equal(unpack(matrix), found.dequantise())
    assert address_of(matrix.data) % 64 == 0
    assert matrix.data.shape == (-(-rows // 16), matrix.tile_bytes)


def test_memory_is_that_of_the_codes():
    for kind, bits in ((ScaledKind.E4M3, 8), (ScaledKind.E5M2, 8), (ScaledKind.E2M1, 4.5)):
        for span in (None, 256):
            assert packed(kind, 64, 4096, span).nbytes == 64 * (4096 * bits / 8 + 16 * 4)  # a scale for 256 columns


def test_spans_are_as_long_as_they_can_be():
    for span, turns in ((None, 32), (8, 1), (24, 3), (128, 16), (256, 32), (384, 24), (8 * 37, 1), (1 << 20, 32)):
        assert packed(ScaledKind.E4M3, 3, 4097, span).span_turns == turns


def test_matrices_share_memory_and_chunks_are_alike(monkeypatch):
    memory, found = WeightMemory(piece_bytes=1 << 16), codes(ScaledKind.E2M1, 63, 272, 32)
    whole = pack(found)
    monkeypatch.setattr(weight_memory, "_CHUNK", 272 * 16)
    monkeypatch.setattr(threads, "loading_threads", lambda: 3)
    shared = [pack(found, memory) for _ in range(3)]
    assert all(np.array_equal(matrix.data, whole.data) for matrix in shared)


def test_what_has_no_kernel():
    wide = ScaledCodes("e4m3", np.zeros((1, (1 << 16) + 1), np.uint8), np.ones((1, 1), np.float32), 1 << 17)
    with pytest.raises(UnsupportedModelError, match=r"65,536"):
        pack(wide)
    with pytest.raises(UnsupportedModelError, match=r"a scale for 100 columns has no kernel: .* multiple of 8"):
        pack(codes(ScaledKind.E4M3, 5, 300, 100))
    infinite = dataclasses.replace(codes(ScaledKind.E5M2, 1, 8), codes=np.full((1, 8), 0xFC, np.uint8))
    with pytest.raises(UnsupportedModelError, match="infinite weights have no kernel"):
        pack(infinite)
    huge = dataclasses.replace(codes(ScaledKind.E2M1, 5, 64), scales=np.full((5, 1), 1e33, np.float32))
    with pytest.raises(UnsupportedModelError, match=r"a scale of 1e\+33 is too large"):
        pack(huge)
    for wrong in (
        {"scales": np.ones((5, 2), np.float32)},
        {"scales": np.ones((5, 1))},
        {"groups": None},
        {"groups": np.zeros((5, 3), np.uint8)},
        {"scales": np.ones((5, 3), np.float32), "span": 24},  # a group would have two scales
    ):
        with pytest.raises(ValueError, match="came with scales of shape"):
            pack(dataclasses.replace(codes(ScaledKind.E2M1, 5, 64), **wrong))


# ---- every code ------------------------------------------------------------------------------------------------------


def each_code(kind: ScaledKind) -> tuple[ScaledCodes, np.ndarray]:
    """A matrix [256, 256] with each code of a kind of 8 bits on its diagonal; and torch's numbers."""
    places = np.arange(256)
    everything = np.zeros((256, 256), np.uint8)
    everything[places, places] = places
    numbers = "e4m3" if kind is ScaledKind.E4M3 else "e5m2"
    found = ScaledCodes(numbers, everything, np.ones((256, 1), np.float32), 256)
    return found, torch.arange(256, dtype=torch.uint8).view(DTYPES[FLOAT_NAMES[numbers]]).float().numpy()


@pytest.mark.parametrize("kind", few([ScaledKind.E4M3, ScaledKind.E5M2], ScaledKind.E4M3), ids=lambda kind: kind.name)
@pytest.mark.parametrize("rows", [1, 3, 9])
def test_every_float_of_8_bits_is_exact(kind, rows, lone_thread):
    found, wanted = each_code(kind)
    x = np.ones((rows, 256), np.float32)
    infinite = np.isinf(wanted)
    found.codes[infinite] = wanted[infinite] = 0
    for isa in ISAS:
        result = multiply(lone_thread, pack(found), x, isa=isa)
        assert np.array_equal(result, np.broadcast_to(wanted, result.shape), equal_nan=True)
    assert (infinite.sum(), np.isnan(wanted).sum()) == ((0, 2) if kind is ScaledKind.E4M3 else (2, 6))


@pytest.mark.parametrize("rows", [1, 3, 9])
def test_every_float_of_4_bits_with_every_scale_is_exact(rows, lone_thread):
    """A row for each scale; each input picks one of the 16 floats."""
    groups = np.arange(256, dtype=np.uint8)[:, None]
    packed_codes = np.tile(np.arange(0x10, 0x100, 0x22).astype(np.uint8), (256, 1))
    found = ScaledCodes("e2m1", packed_codes, np.ones((256, 1), np.float32), 16, groups)
    positive = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    floats = np.array(positive + [-x for x in positive], np.float32)
    scales = torch.from_numpy(groups).view(torch.float8_e4m3fn).float().numpy()
    x = np.eye(16, dtype=np.float32)
    for first in range(0, 16, rows):
        result = multiply(lone_thread, pack(found), x[first : first + rows])
        wanted = (scales * floats).T[first : first + rows]
        assert np.array_equal(result, wanted, equal_nan=True)


def test_weights_that_are_no_numbers_make_their_own_sums(lone_thread):
    found = codes(ScaledKind.E4M3, 40, 512, 128)
    broken = found.codes.copy()
    broken[7, 300], broken[20, 511] = 0x7F, 0xFF
    for rows in (1, 5, 20):
        x = activations(70, 512)[:rows]
        result = multiply(lone_thread, pack(dataclasses.replace(found, codes=broken)), x)
        wanted = multiply(lone_thread, pack(found), x)
        assert np.isnan(result[:, [7, 20]]).all()
        rest = np.delete(np.arange(40), [7, 20])
        assert same_bits(result[:, rest], wanted[:, rest])


def test_scales_that_are_no_numbers(lone_thread):
    found = codes(ScaledKind.E2M1, 17, 64)
    assert found.groups is not None
    groups, scales = found.groups.copy(), found.scales.copy()
    groups[3, 1], scales[5], scales[6] = 0x7F, np.inf, np.nan
    result = multiply(lone_thread, pack(dataclasses.replace(found, groups=groups, scales=scales)), activations(1, 64))
    assert np.isnan(result[0, [3, 6]]).all()
    assert np.isinf(result[0, 5])
    assert np.isfinite(np.delete(result[0], [3, 5, 6])).all()


def test_small_numbers_of_a_span_are_raised():
    """The kernels would multiply subnormal numbers, which some CPUs do slowly; the weights stay what they are."""
    found = codes(ScaledKind.E4M3, 40, 512, 128)
    small = found.codes & 0x87  # each is subnormal, or zero
    matrix = pack(dataclasses.replace(found, codes=small))
    stored = matrix.data[:, 128 : 128 + 4096] & 0x7F  # the turns of the first two spans
    assert ((stored == 0) | (stored > 7)).all()
    assert np.array_equal(unpack(matrix), dataclasses.replace(found, codes=small).dequantise())
    assert (small & 7 > 0).any(axis=1).all()


@pytest.mark.parametrize("scale", [0.0, 2.0**-140, 2.0**-100, -(2.0**127), np.inf])
def test_scales_that_cannot_be_divided(scale, lone_thread):
    found = codes(ScaledKind.E4M3, 17, 64)
    found = dataclasses.replace(found, codes=found.codes & 0x9F, scales=np.full((17, 1), scale, np.float32))
    with np.errstate(all="ignore"):
        wanted = found.dequantise()
    assert np.array_equal(unpack(pack(found)), wanted, equal_nan=True)
    x = np.eye(64, dtype=np.float32)[:20]
    if np.isfinite(scale):
        assert np.array_equal(multiply(lone_thread, pack(found), x), wanted.T[:20])


# ---- multiplying -----------------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize(
    ("outputs", "columns", "span"), [(1, 1, None), (17, 63, None), (63, 123, 48), (33, 4097, 128), (48, 1536, None)]
)
def test_linear_matches_the_reference(kind, outputs, columns, span, team):
    matrix = packed(kind, outputs, columns, span)
    x = activations(70, matrix.columns)
    wanted = plain_reference.linear(unpack(matrix), plain_reference.round_activations(x, plain_layout.PlainKind.BF16))
    for isa in ISAS:
        for rows in ROWS:
            assert error(multiply(team, matrix, x[:rows], isa=isa), wanted[:rows]) < 1e-5


@each_kind
@pytest.mark.parametrize("span", [None, 128])
def test_a_row_has_the_same_bits_everywhere(kind, span, team):
    matrix = packed(kind, 63, 1072, span)
    x = activations(70, 1072)
    for isa in ISAS:
        whole = multiply(team, matrix, x, isa=isa)
        for cuts in ((0, 1, 3, 11, 70), (0, 4, 6, 36, 37, 70), (0, 8, 17, 22, 70)):
            for first, last in itertools.pairwise(cuts):
                assert same_bits(multiply(team, matrix, x[first:last], isa=isa), whole[first:last])
        lone = ThreadTeam(1)
        assert same_bits(multiply(lone, matrix, x, isa=isa), whole)
        lone.close()


@each_kind
def test_a_tile_has_the_same_bits_in_any_matrix(kind, lone_thread):
    found, x = codes(kind, 48, 320, 64), activations(9, 320)
    whole = multiply(lone_thread, pack(found), x)
    part = multiply(lone_thread, pack(found.take(np.arange(5, 22))), x)
    assert same_bits(part, whole[:, 5:22].copy())


@pytest.mark.parametrize("rows", [1, 5, 20])
def test_sums_within_a_span_are_those_of_bfloat16_weights(rows, lone_thread):
    """With scales of 1 and one span the bits are those of `plain_linear`."""
    found = codes(ScaledKind.E4M3, 37, 256)
    found = dataclasses.replace(found, scales=np.ones_like(found.scales))
    weights = torch.from_numpy(found.dequantise()).bfloat16()
    plain = pack_plain(weights.view(torch.uint8).numpy().reshape(-1), "BF16", 37, 256)
    x = activations(20, 256)[:rows]
    inputs, out = bfloat16_rows(x), np.full((rows, 37), np.nan, np.float32)
    arguments = linear_arguments(
        plain, x=address_of(inputs), x_bytes=inputs.strides[0], out=address_of(out), out_stride=37
    )
    numbers = np.full(StepNumber.COUNT, rows, np.int64)
    run_row(lone_thread, linear_operation(plain, ISAS[-1]), numbers, arguments)
    assert same_bits(multiply(lone_thread, pack(found), x), out)


@pytest.mark.every_case
@pytest.mark.parametrize("limit", ["CACHED_BYTES", "_MOST_BYTES"])
def test_weights_larger_than_the_cache_are_taken_in_turns(limit, lone_thread, monkeypatch):
    matrix, x = packed(ScaledKind.E4M3, 63, 301), activations(20, 301)
    whole = multiply(lone_thread, matrix, x)
    monkeypatch.setattr(cpu, limit, 1)
    make_anew(monkeypatch, cpu, f"turns{limit}")
    assert same_bits(multiply(lone_thread, matrix, x), whole)


@pytest.mark.parametrize("rows", [1, 3, 11])
def test_bias_and_what_stands_there_are_added(rows, team):
    matrix, x = packed(ScaledKind.E4M3, 37, 95), activations(11, 95)[:rows]
    random = np.random.default_rng(5)
    bias, onto = (random.standard_normal(shape).astype(np.float32) for shape in (37, (rows, 37)))
    plain = multiply(team, matrix, x)
    assert same_bits(multiply(team, matrix, x, bias=bias), plain + bias)
    assert same_bits(multiply(team, matrix, x, onto=onto), plain + onto)
    assert same_bits(multiply(team, matrix, x, bias=bias, onto=onto), plain + bias + onto)


@pytest.mark.parametrize("rows", [1, 4, 11])
def test_picked_rows(rows, team):
    x, picked = activations(11, 95), np.random.default_rng(2).integers(0, 11, rows)
    for kind, isa in ((ScaledKind.E4M3, ISAS[-1]), (ScaledKind.E5M2, ISAS[:2][-1])):
        matrix = packed(kind, 37, 95)
        assert same_bits(multiply(team, matrix, x, isa=isa, picked=picked), multiply(team, matrix, x, isa=isa)[picked])


def test_no_rows_is_no_work(team):
    assert multiply(team, packed(ScaledKind.E4M3, 17, 95), activations(1, 95)[:0]).shape == (0, 17)
