# SPDX-License-Identifier: MIT
"""The packed linear layer: packing keeps every number, and each compiled variant gives the same bits as the others."""

from __future__ import annotations

import functools
import importlib
import itertools
import re

import gguf
import numpy as np
import pytest

from candle_vllm.core import threads
from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.kernels.cpu_runtime import weight_memory
from candle_vllm.core.kernels.cpu_runtime.weight_memory import WeightMemory
from candle_vllm.core.kernels.packed_linear import PackedKind, PackedMatrix, grids, host_kind, pack, packed_kind
from candle_vllm.core.quantization import ggml
from candle_vllm.core.quantization.ggml_types import CONTENTS
from candle_vllm.core.quantization.ggml_types import GGMLQuantizationType as GgmlType
from packages.core.tests.kernels import packed_reference as reference
from packages.core.tests.kernels.packed_reference import dequantise

pytest.importorskip("numba")

from candle_vllm.core.kernels.activation_quant import Prologue, QuantiseArguments, quantise_operation
from candle_vllm.core.kernels.cpu_runtime import operation
from candle_vllm.core.kernels.cpu_runtime.compiler import compile_function
from candle_vllm.core.kernels.cpu_runtime.level import LEVELS, Isa, Level, host_isa
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, address_of, embedding_arguments
from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam
from candle_vllm.core.kernels.packed_linear import cpu, layout
from packages.core.tests.kernels.linear_field import (
    LEVELS_HERE,
    PLAIN,
    error,
    make_anew,
    multiply_in_field,
    operation_at,
    run_row,
    same_bits,
)

COLUMNS = 768
each_kind = pytest.mark.parametrize("kind", list(PackedKind), ids=lambda kind: kind.name)
IN_CODES = [PackedKind[f"{name}_CODES"] for name in grids.FORMATS]
USUAL_CODES = (PackedKind.IQ3_S_CODES, PackedKind.IQ2_S_CODES)  # of four bits, and of three with two scales
RARELY = (  # compiled for the exhaustive run alone
    *(PackedKind.Q8_K, PackedKind.TQ2_0, PackedKind.Q1_0, PackedKind.Q5_1, PackedKind.NVFP4),
    *(PackedKind.IQ1_M, PackedKind.IQ2_XS, PackedKind.IQ2_S, PackedKind.IQ3_XXS),
    *(kind for kind in IN_CODES if kind not in USUAL_CODES),
)
each_compiled = pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.every_case if kind in RARELY else ()) for kind in PackedKind],
    ids=lambda kind: kind.name,
)


# Kinds that are multiplied at another level besides the one of this CPU; `every_case` has every kind at every level.
ELSEWHERE = ("Q8_0", "Q4_1", "Q4_K", "Q6_K", "IQ4_NL", "IQ2_XXS", "IQ3_S", "TQ1_0", "MXFP4")


def others(kind: PackedKind) -> list[Level]:
    """The level besides the one of this CPU with which a kind is multiplied: each level has one kind."""
    return [level for name, level in zip(ELSEWHERE, LEVELS_HERE) if name == kind.name]


def random_bytes(kind: PackedKind, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Blocks with random codes and scales of either sign, uint8 [rows * bytes]."""
    random = np.random.default_rng(seed)
    size, width = kind.type.block
    raw = random.integers(0, 256, (rows, columns // size, width), dtype=np.uint8)
    if kind.type is GgmlType.IQ1_M:  # the float is in the highest bits of four words; 1 to 2, of either sign
        words = raw[:, :, 48:].view(np.uint16)
        words[:] = words & 0x0FFF | words & np.array([0xF000, 0xF000, 0xF000, 0x8000], np.uint16)
        words[:, :, 2] = words[:, :, 2] & 0x3FFF | 0xC000
        words[:, :, 3] |= 0x3000
        return raw.reshape(-1)
    contents = CONTENTS.get(kind.type)
    if contents is not None and contents.float in ("e8m0", "e4m3"):  # of no sign; 2^-7 to 2^-3, 2^-5 to 30
        low, high = (122, 126) if contents.float == "e8m0" else (17, 97)
        raw[:, :, slice(*contents.scale)] = random.integers(
            low, high, (*raw.shape[:2], contents.scale[1] - contents.scale[0])
        )
        return raw.reshape(-1)
    if kind is PackedKind.TQ1_0:  # of the bytes that quantisers make, as any reads them
        digits = random.integers(0, 243, (*raw.shape[:2], 52))
        raw[:, :, :52] = (digits * 256 + 242) // 243
    kept = np.float32 if contents is not None and contents.float == "f32" else np.float16
    for start, stop in contents.floats if contents is not None else [(0, 2)]:
        scale = random.uniform(0.5, 1.5, raw.shape[:2]) * random.choice([-1, 1], raw.shape[:2])
        raw[:, :, start:stop] = scale.astype(kept)[..., None].view(np.uint8)
    return raw.reshape(-1)


@functools.cache
def packed(kind: PackedKind, rows: int, columns: int) -> PackedMatrix:
    return pack(random_bytes(kind, rows, columns), kind.type, rows, columns, kind=kind)


@functools.cache
def activations(rows: int, columns: int) -> tuple[np.ndarray, ...]:
    x = np.random.default_rng(1).standard_normal((rows, columns)).astype(np.float32)
    x[rows // 2, :32] = 0  # a group without a scale
    return reference.quantise(x)


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
    matrix: PackedMatrix,
    inputs: tuple[np.ndarray, ...],
    *,
    level: Level | None = None,
    bias: np.ndarray | None = None,
    onto: np.ndarray | None = None,
) -> np.ndarray:
    """See `multiply_in_field`."""
    xq, xs, xsum = (np.ascontiguousarray(part) for part in inputs)
    wanted = operation_at(cpu.make_linear, int(matrix.kind), level) if level else 0
    places = {"x": address_of(xq), "scales": address_of(xs), "sums": address_of(xsum)}
    return multiply_in_field(team, matrix, len(xq), host_isa(), bias, onto, wanted, **places)


def read_rows(team: ThreadTeam, matrix: PackedMatrix, ids: np.ndarray) -> np.ndarray:
    """Rows of a table in the beginning of a field of sevens."""
    field = np.full((len(ids) + 1, matrix.columns + 8), 7, np.float32)
    numbers = np.full(StepNumber.COUNT, len(ids), np.int64)
    places = {"token_ids": address_of(ids), "out": address_of(field), "out_stride": field.shape[1]}
    run_row(
        team,
        operation.operation("packed_linear.cpu:make_embedding", matrix.kind),
        numbers,
        embedding_arguments(matrix, **places),
    )
    return field


# ---- packing ---------------------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize(("rows", "columns"), [(1, 256), (17, 768), (48, 512)])
def test_packing_keeps_every_number(kind, rows, columns):
    raw = random_bytes(kind, rows, columns)
    wanted = ggml.dequantize(raw, kind.type, (rows, columns))
    matrix = pack(raw, kind.type, rows, columns, kind=kind)
    assert np.array_equal(dequantise(matrix), wanted)
    if kind.name not in ("Q8_K", "Q1_0"):  # which the library does not decode
        assert np.array_equal(wanted.reshape(-1), gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(kind.type)))
    assert address_of(matrix.data) % 64 == 0
    assert rows % 16 or kind in IN_CODES or matrix.nbytes <= 1.04 * raw.nbytes


@pytest.mark.one_of_each(3)
@pytest.mark.parametrize("columns", [1280, 5120], ids=["few groups", "fewer panels at once"])
@pytest.mark.parametrize("name", ["Q4_1", "Q6_K", "IQ3_S", "TQ1_0"])
def test_a_row_has_the_bits_that_it_has_alone(name, columns, lone_thread):
    matrix, inputs = packed(PackedKind[name], 33, columns), activations(41, columns)
    alone = np.concatenate(
        [multiply(lone_thread, matrix, tuple(part[row : row + 1] for part in inputs)) for row in range(41)]
    )
    for rows in (8, 9, 16, 17, 24, 33, 40, 41):
        assert same_bits(multiply(lone_thread, matrix, tuple(part[:rows] for part in inputs)), alone[:rows])


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_odd_number_of_groups(name, lone_thread):
    matrix = packed(PackedKind[name], 17, 96)
    inputs = activations(5, 96)
    wanted = reference.linear(dequantise(matrix), *inputs[:2])
    assert error(multiply(lone_thread, matrix, inputs), wanted) < 1e-5


def test_matrices_share_memory_without_overlap():
    memory = WeightMemory(piece_bytes=4096)
    parts = [memory.take(count) for count in (1, 100, 4096, 3900, 65, 9000, 64)]
    for number, part in enumerate(parts):
        part[:] = number
        assert address_of(part) % 64 == 0
    assert all((part == number).all() for number, part in enumerate(parts))
    assert address_of(parts[1]) == address_of(parts[0]) + 64
    raw = random_bytes(PackedKind.Q4_1, 17, 96)
    shared = [pack(raw, GgmlType.Q4_1, 17, 96, memory) for _ in range(3)]
    assert all(np.array_equal(matrix.data, packed(PackedKind.Q4_1, 17, 96).data) for matrix in shared)


def test_chunks_are_packed_alike(monkeypatch):
    raw, whole = random_bytes(PackedKind.Q5_K, 63, 256), packed(PackedKind.Q5_K, 63, 256)
    monkeypatch.setattr(weight_memory, "_CHUNK", 256 * 16)
    monkeypatch.setattr(threads, "loading_threads", lambda: 3)
    assert np.array_equal(pack(raw, GgmlType.Q5_K, 63, 256).data, whole.data)


def test_every_quantised_type_keeps_its_size():
    """But for Q8_1, which stands in no file."""
    for ggml_type in set(GgmlType) - ggml.PLAIN_TYPES - {GgmlType.Q8_1}:
        size, width = ggml_type.block
        matrix = pack(np.zeros(16 * 512 // size * width, np.uint8), ggml_type, 16, 512, kind=packed_kind(ggml_type))
        assert matrix.kind.type is ggml_type
        assert matrix.nbytes <= 1.04 * (16 * 512 // size * width)
    with pytest.raises(UnsupportedModelError, match="Q8_1"):
        packed_kind(GgmlType.Q8_1)


def test_grids_become_codes_where_their_lists_would_be_gathered(monkeypatch):
    for level in LEVELS:
        monkeypatch.setattr(layout, "host_isa", lambda level=level: level.isa)
        for kind in IN_CODES:
            assert host_kind(kind.type) is (packed_kind(kind.type) if level.isa & Isa.VBMI else kind)
        assert host_kind(GgmlType.Q4_K) is PackedKind.Q4_K
    matrix = pack(random_bytes(PackedKind.IQ3_S, 16, 512), GgmlType.IQ3_S, 16, 512)
    assert matrix.kind is PackedKind.IQ3_S_CODES
    assert matrix.nbytes == 16 * 512 * 4.375 / 8
    assert packed(PackedKind.IQ2_XXS_CODES, 16, 512).nbytes == 16 * 512 * 3.375 / 8


@pytest.mark.parametrize("kind", IN_CODES, ids=lambda kind: kind.name)
def test_codes_name_every_number_of_a_list(kind):
    of_codes = layout.LAYOUTS[kind]
    assert isinstance(of_codes, layout.TileLayout)
    assert of_codes.values == tuple(sorted(set(grids.values(kind.type.name)) - {0}))


@pytest.fixture
def no_compiler(monkeypatch):
    importlib.import_module("candle_vllm.core.kernels.packed_linear.pack")._log_rounding.cache_clear()
    monkeypatch.setattr(layout, "has_compiler", lambda: False)


@pytest.mark.parametrize("name", ["IQ2_XXS", "TQ1_0", "NVFP4"])
@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_rare_types_become_eight_bits(name, caplog):
    raw = random_bytes(PackedKind[name], 16, 256)
    with caplog.at_level("INFO"):
        matrix, _ = (pack(raw, GgmlType[name], 16, 256) for _ in range(2))
    assert matrix.kind is PackedKind.Q8_0
    assert [record.args[0] for record in caplog.records] == [name]  # once, however many matrices a model has
    wanted = ggml.dequantize(raw, GgmlType[name], (16, 256))
    groups = np.abs(wanted).reshape(16, -1, 32).max(axis=2, keepdims=True)
    off = np.abs(dequantise(matrix) - wanted).reshape(16, -1, 32)
    assert (off <= 0.0041 * groups + 1e-7).all()
    assert pack(random_bytes(PackedKind.Q4_K, 16, 256), GgmlType.Q4_K, 16, 256).kind is PackedKind.Q4_K


@pytest.mark.usefixtures("no_compiler")
def test_tiny_and_zero_groups_survive_eight_bits():
    raw = np.full((16, 2, 66), 0xAA, np.uint8)  # codes of one scale
    raw[:, 0, 64:] = 0  # a scale of zero
    raw[:, 1, 64:] = np.frombuffer(np.float16(3e-7).tobytes(), np.uint8)
    wanted = ggml.dequantize(raw.reshape(-1), GgmlType.TQ2_0, (16, 512))
    assert wanted.any()
    off = np.abs(dequantise(pack(raw.reshape(-1), GgmlType.TQ2_0, 16, 512)) - wanted)
    assert off.max() < 2**-24  # the smallest scale there is


def test_shapes_and_types_that_cannot_be_packed():
    raw = np.zeros(18 * 3, np.uint8)
    with pytest.raises(UnsupportedModelError, match="multiple of 32"):
        pack(raw, GgmlType.Q4_0, 1, 80)
    with pytest.raises(UnsupportedModelError, match=r"65,536"):
        pack(raw, GgmlType.Q4_0, 1, 1 << 17)
    with pytest.raises(UnsupportedModelError, match="F16"):
        pack(raw, GgmlType.F16, 1, 27)
    with pytest.raises(ValueError, match="54 bytes"):
        pack(raw, GgmlType.Q4_0, 2, 96)


@pytest.mark.parametrize("name", ["MXFP4", "NVFP4"])
def test_every_scale_of_eight_bits(name, lone_thread):
    """Those below float32's normal numbers, the largest, and what is no number."""
    kind, contents = PackedKind[name], CONTENTS[GgmlType[name]]
    raw = np.random.default_rng(3).integers(0, 256, (64, 4 * 64 // kind.type.block[0], kind.type.block[1]), np.uint8)
    scales = raw[:, :, slice(*contents.scale)]
    scales[:] = np.arange(scales.size).reshape(scales.shape)
    matrix = pack(raw.reshape(-1), kind.type, 64, 256)
    with np.errstate(over="ignore"):
        wanted = gguf.quants.dequantize(raw.reshape(64, -1), gguf.GGMLQuantizationType(kind.type))
        assert same_bits(dequantise(matrix), wanted)
    assert same_bits(read_rows(lone_thread, matrix, np.arange(64))[:64, :256].copy(), wanted)


# ---- multiplying -----------------------------------------------------------------------------------------------------


@pytest.mark.one_of_each(3)
@each_compiled
@pytest.mark.parametrize("outputs", [1, 17, 63])
def test_linear_matches_the_reference(kind, outputs, team):
    matrix, inputs = packed(kind, outputs, COLUMNS), activations(63, COLUMNS)
    wanted = reference.linear(dequantise(matrix), *inputs[:2])
    for level in (None, *others(kind)):
        for rows in (1, 3, 8, 63):
            result = multiply(team, matrix, tuple(part[:rows] for part in inputs), level=level)
            assert error(result, wanted[:rows]) < 1e-5


@each_compiled
def test_a_row_has_the_same_bits_everywhere(kind, team):
    matrix, inputs = packed(kind, 63, COLUMNS), activations(63, COLUMNS)
    whole = multiply(team, matrix, inputs)
    for level in others(kind):
        assert same_bits(multiply(team, matrix, inputs, level=level), whole)
    for cuts in ((0, 1, 3, 11, 63), (0, 4, 6, 36, 37, 63)):
        for first, last in itertools.pairwise(cuts):
            part = multiply(team, matrix, tuple(array[first:last] for array in inputs))
            assert same_bits(part, whole[first:last])
    lone = ThreadTeam(1)
    assert same_bits(multiply(lone, matrix, inputs), whole)
    lone.close()


@pytest.mark.every_case
@pytest.mark.parametrize("level", LEVELS_HERE, ids=lambda level: level.name)
@each_kind
def test_every_level_gives_the_same_bits(kind, level, lone_thread):
    matrix, inputs = packed(kind, 63, COLUMNS), activations(63, COLUMNS)
    whole = multiply(lone_thread, matrix, inputs)
    for rows in (63, 1, 3, 8):
        part = multiply(lone_thread, matrix, tuple(array[:rows] for array in inputs), level=level)
        assert same_bits(part, whole[:rows])


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.every_case if kind in RARELY else ()) for kind in IN_CODES],
    ids=lambda kind: kind.name,
)
def test_codes_have_the_bits_of_grids(kind, team):
    raw, inputs = random_bytes(kind, 63, COLUMNS), activations(63, COLUMNS)
    in_grids, in_codes = (pack(raw, kind.type, 63, COLUMNS, kind=each) for each in (packed_kind(kind.type), kind))
    for rows in (1, 4, 8, 63):
        some = tuple(part[:rows] for part in inputs)
        assert same_bits(multiply(team, in_codes, some), multiply(team, in_grids, some))
    ids = np.arange(63)
    assert same_bits(read_rows(team, in_codes, ids), read_rows(team, in_grids, ids))


@pytest.mark.one_of_each(2)
@pytest.mark.parametrize("name", ["IQ4_NL", "IQ2_XXS", "IQ2_S_CODES"])
def test_codes_are_looked_up_alike_on_other_processors(name, lone_thread):
    matrix, inputs = packed(PackedKind[name], 17, 256), activations(5, 256)
    wanted = multiply(lone_thread, matrix, inputs)
    assert same_bits(multiply(lone_thread, matrix, inputs, level=PLAIN), wanted)


def test_a_tile_has_the_same_bits_in_any_matrix(lone_thread):
    raw = random_bytes(PackedKind.Q6_K, 48, 512).reshape(48, -1)
    inputs = activations(9, 512)
    whole = multiply(lone_thread, pack(raw, GgmlType.Q6_K, 48, 512), inputs)
    part = multiply(lone_thread, pack(raw[5:22].copy(), GgmlType.Q6_K, 17, 512), inputs)
    assert same_bits(part, whole[:, 5:22].copy())


def test_weights_larger_than_the_cache_are_taken_in_turns(lone_thread, monkeypatch):
    matrix, inputs = packed(PackedKind.Q4_K, 63, COLUMNS), activations(20, COLUMNS)
    whole = multiply(lone_thread, matrix, inputs)
    monkeypatch.setattr(cpu, "CACHED_BYTES", 1)
    make_anew(monkeypatch, cpu, "turns")
    assert same_bits(multiply(lone_thread, matrix, inputs), whole)


@pytest.mark.one_of_each(2)
@pytest.mark.parametrize("prologue", [Prologue.SILU, Prologue.GELU_GATE], ids=lambda prologue: prologue.name)
@pytest.mark.parametrize("kind", [PackedKind.Q4_1, PackedKind.Q4_K, PackedKind.Q8_0], ids=lambda kind: kind.name)
def test_gated_products_are_quantised_where_they_are_made(kind, prologue, team, lone_thread):
    width = 224
    both, inputs = packed(kind, 2 * width, COLUMNS), activations(15, COLUMNS)
    tiles = width // 16
    gate, other = (PackedMatrix(width, COLUMNS, kind, both.data[at : at + tiles]) for at in (0, tiles))
    sums = multiply(lone_thread, both, inputs)
    for rows in (1, 2, 4, 5, 8, 15):
        wanted = [np.zeros((rows, width), np.int8), *(np.zeros((rows, width // 32), np.float32) for _ in range(2))]
        numbers = np.full(StepNumber.COUNT, rows, np.int64)
        at = dict(zip(("q", "scales", "sums"), map(address_of, wanted)))
        before = QuantiseArguments(x=address_of(sums), stride=2 * width, columns=width, **at)
        run_row(lone_thread, quantise_operation(prologue), numbers, before)
        found = [np.full_like(each, 77) for each in wanted]
        xq, xs, xsum = inputs
        arguments = layout.GatedArguments(
            rows_from=StepNumber.TOKENS,
            gate=address_of(gate.data),
            other=address_of(other.data),
            tile_bytes=gate.tile_bytes,
            outputs=width,
            length=gate.length,
            x=address_of(xq),
            scales=address_of(xs),
            sums=address_of(xsum),
            ahead=0,
            **dict(zip(("q", "q_scales", "q_sums"), map(address_of, found))),
        )
        for isa in sorted({host_isa(), host_isa() & Isa.AVX2, Isa.GENERIC}):
            for each in found:
                each[:] = 77
            run_row(
                team, operation.operation("packed_linear.cpu_gated:make_gated", kind, prologue, isa), numbers, arguments
            )
            for one, true in zip(found, wanted):
                assert np.array_equal(one, true)


@pytest.mark.parametrize("kind", [PackedKind.Q4_1, PackedKind.Q6_K], ids=lambda kind: kind.name)
def test_weights_that_are_asked_for_ahead_change_nothing(kind, lone_thread, monkeypatch):
    matrix, inputs = packed(kind, 63, COLUMNS), activations(13, COLUMNS)
    results = []
    for ahead in (0, 2048, 1 << 42):  # the last is nobody's memory
        monkeypatch.setattr(operation, "bytes_ahead", lambda ahead=ahead: ahead)
        results += [multiply(lone_thread, matrix, tuple(part[:rows] for part in inputs)) for rows in (1, 4, 13)]
    for result, wanted in zip(results, results[:3] * 3):
        assert same_bits(result, wanted)


@pytest.mark.skipif(not operation.IS_X86, reason="instructions of x86")
def test_each_form_asks_for_every_line_of_a_group():
    level = next(level for level in LEVELS if level.name == "avx512-vnni")
    code = compile_function(cpu.make_linear(int(PackedKind.Q4_1), int(level.isa)), level)
    asked = re.findall(rb"\x0f\x18[\x08-\x0f\x48-\x4f\x88-\x8f]", code)  # prefetcht0
    assert len(asked) >= 3 * layout.LAYOUTS[PackedKind.Q4_1].block_bytes // 64


@pytest.mark.parametrize("rows", [1, 3, 11])
def test_bias_and_what_stands_there_are_added(rows, team):
    matrix, inputs = packed(PackedKind.Q4_1, 37, 96), tuple(part[:rows] for part in activations(11, 96))
    random = np.random.default_rng(5)
    bias, onto = (random.standard_normal(shape).astype(np.float32) for shape in (37, (rows, 37)))
    plain = multiply(team, matrix, inputs)
    assert same_bits(multiply(team, matrix, inputs, bias=bias), plain + bias)
    assert same_bits(multiply(team, matrix, inputs, onto=onto), plain + onto)
    assert same_bits(multiply(team, matrix, inputs, bias=bias, onto=onto), plain + bias + onto)


def test_no_rows_is_no_work(team):
    matrix, inputs = packed(PackedKind.Q4_0, 17, 96), activations(1, 96)
    assert multiply(team, matrix, tuple(part[:0] for part in inputs)).shape == (0, 17)


def test_extreme_codes_do_not_overflow(lone_thread):
    raw = random_bytes(PackedKind.Q8_0, 16, 64).reshape(16, 2, 34)
    raw[:, :, 2:] = 0x80  # -128 in every place: two products are 32,512, the most that is added in 16 bits
    inputs = (np.full((1, 64), 127, np.int8), np.ones((1, 2), np.float32), np.full((1, 2), 4064, np.float32))
    matrix = pack(raw.reshape(-1), GgmlType.Q8_0, 16, 64)
    for level in (None, *(level for level in LEVELS_HERE if level.name in ("avx2", "neon"))):
        result = multiply(lone_thread, matrix, inputs, level=level)
        assert error(result, reference.linear(dequantise(matrix), *inputs[:2])) < 1e-6


# ---- embedding rows --------------------------------------------------------------------------------------------------


@pytest.mark.one_of_each(20)
@each_compiled
def test_embedding_rows_are_exact(kind, team):
    matrix = packed(kind, 63, 512)
    ids = np.array([0, 62, 17, 17, -1, 63, 1 << 40], np.int64)
    field = read_rows(team, matrix, ids)
    assert np.array_equal(field[:4, :512], dequantise(matrix)[ids[:4]])
    assert np.isnan(field[4:7, :512]).all()  # ids outside of the table
    assert (field[:, 512:] == 7).all()
    assert (field[7] == 7).all()
