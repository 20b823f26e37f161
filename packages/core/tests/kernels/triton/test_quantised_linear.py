# SPDX-License-Identifier: MIT
"""Linear layers with GGUF weights: the layout keeps every number, and the kernels give what the reference gives."""

from __future__ import annotations

import functools
import importlib
import types

import numpy as np
import pytest
import torch

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.kernels.gguf_linear import GgufMatrix, linear, pack, reference, stack, triton
from candle_vllm.core.kernels.gguf_linear.layout import PLANES, gguf_kind
from candle_vllm.core.kernels.linear import linear as plain_linear
from candle_vllm.core.kernels.linear import triton as launches
from candle_vllm.core.kernels.packed_linear.grids import FORMATS
from candle_vllm.core.kernels.packed_linear.layout import PackedKind
from candle_vllm.core.quantization import ggml
from candle_vllm.core.quantization.ggml_types import CONTENTS
from candle_vllm.core.quantization.ggml_types import GGMLQuantizationType as GgmlType
from packages.core.tests.kernels.triton.forms.gguf_linear.triton import OWN_FORMS
from tests.common_run import few

TOLERANCE = 5e-3
each_kind = pytest.mark.parametrize("kind", list(PLANES), ids=lambda kind: kind.name)
each_form = pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=() if kind in OWN_FORMS else pytest.mark.every_case) for kind in PLANES],
    ids=lambda kind: kind.name,
)


def random_bytes(kind: PackedKind, rows: int, columns: int, seed: int = 0, octaves: int = 0) -> np.ndarray:
    """Blocks with random codes and small scales of either sign, uint8 [rows * bytes], over some octaves more."""
    random = np.random.default_rng(seed)
    size, width = GgmlType[kind.name].block
    raw = random.integers(0, 256, (rows, columns // size, width), dtype=np.uint8)
    if kind is PackedKind.IQ1_M:  # the float is in the highest bits of four words; 2^-8 to 2^-7, of either sign
        words = raw[:, :, 48:].view(np.uint16)
        words[:] = words & 0x0FFF | words & np.array([0xF000, 0xF000, 0xF000, 0x8000], np.uint16)
        words[:, :, 2] = words[:, :, 2] & 0x3FFF
        words[:, :, 3] |= 0x2000
        return raw.reshape(-1)
    floats = CONTENTS[kind.type].floats if kind.type in CONTENTS else [(0, 2)]
    for start, stop in floats:
        scale = random.uniform(0.5, 1.5, raw.shape[:2]) * random.choice([-1, 1], raw.shape[:2]) / 256
        scale *= 2.0 ** random.integers(-octaves, octaves + 1, raw.shape[:2])
        raw[:, :, start:stop] = scale.astype(np.float16)[..., None].view(np.uint8)
    return raw.reshape(-1)


def widths(kind: PackedKind) -> tuple[int, ...]:
    """K of several steps; for the simple types one that is no whole number of steps too."""
    return (768,) if PLANES[kind].layout.nested else (768, 416)


@functools.cache
def packed(kind: PackedKind, rows: int, columns: int, device: torch.device) -> GgufMatrix:
    return pack(random_bytes(kind, rows, columns), GgmlType[kind.name], rows, columns, device)


def activations(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Rows of a wider tensor."""
    x = torch.randn(rows, columns + 16, generator=torch.Generator().manual_seed(rows)).to(dtype)
    return x.to(device)[:, :columns]


@pytest.fixture(autouse=True)
def nan_where_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' outputs and partial sums are NaN before they run."""

    def empty(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.full(shape, torch.nan, dtype=dtype, device=device)

    stand_in = types.SimpleNamespace(**{name: getattr(torch, name) for name in dir(torch) if name[0] != "_"})
    stand_in.empty = empty
    for module in (triton, launches):
        monkeypatch.setattr(module, "torch", stand_in)


def ratio(got: torch.Tensor, wanted: torch.Tensor) -> float:
    error = got.float() - wanted.float()
    return float(error.pow(2).mean().sqrt() / wanted.float().pow(2).mean().sqrt())


@each_kind
def test_the_layout_keeps_every_number(kind: PackedKind, device: torch.device) -> None:
    for columns in widths(kind):
        raw = random_bytes(kind, 9, columns)
        matrix = pack(raw, GgmlType[kind.name], 9, columns, device)
        wanted = torch.from_numpy(ggml.dequantize(raw, GgmlType[kind.name], (9, columns)))
        assert torch.equal(reference.dequantise(matrix).cpu(), wanted)


@each_kind
def test_takes_little_more_memory_than_the_file(kind: PackedKind, device: torch.device) -> None:
    for columns in (1024, *((960,) if not PLANES[kind].layout.nested else ())):
        raw = random_bytes(kind, 5, columns)
        most = 4.625 / 8 * 5 * columns if kind.name in FORMATS else 1.1 * raw.nbytes
        matrix = pack(raw, GgmlType[kind.name], 5, columns, device)
        assert matrix.nbytes <= most
        assert columns % 256 or matrix.nbytes == 5 * columns * PLANES[kind].bits_each / 8


def test_chunks_of_rows_meet(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = random_bytes(PackedKind.Q5_K, 11, 512)
    whole = reference.dequantise(pack(raw, GgmlType.Q5_K, 11, 512, device))
    monkeypatch.setattr(importlib.import_module(pack.__module__), "CHUNK", 3 * 512)
    assert torch.equal(reference.dequantise(pack(raw, GgmlType.Q5_K, 11, 512, device)), whole)


def test_a_type_without_a_layout_is_rounded_to_8_bits(device: torch.device) -> None:
    size, width = GgmlType.TQ2_0.block
    raw = np.random.default_rng(0).integers(0, 256, (3, 256 // size, width), dtype=np.uint8)
    raw[:, :, 64:] = np.float16(0.7).reshape(1).view(np.uint8)
    assert gguf_kind(GgmlType.TQ2_0) == PackedKind.Q8_0
    wanted = torch.from_numpy(ggml.dequantize(raw, GgmlType.TQ2_0, (3, 256)))
    got = reference.dequantise(pack(raw.reshape(-1), GgmlType.TQ2_0, 3, 256, device)).cpu()
    assert float(wanted.abs().max()) > 0
    assert float((got - wanted).abs().max()) <= 0.004 * float(wanted.abs().max())


def test_what_cannot_be_packed_is_refused(device: torch.device) -> None:
    with pytest.raises(UnsupportedModelError, match="F16 is not a quantised type"):
        pack(np.zeros(64, np.uint8), GgmlType.F16, 1, 32, device)
    with pytest.raises(UnsupportedModelError, match="multiple of 256"):
        pack(np.zeros(144, np.uint8), GgmlType.Q4_K, 1, 128, device)
    with pytest.raises(ValueError, match="10 bytes given"):
        pack(np.zeros(10, np.uint8), GgmlType.Q8_0, 1, 32, device)


@pytest.mark.one_of_each(3)
@each_form
def test_few_rows(kind: PackedKind, device: torch.device) -> None:
    for columns, rows in zip(widths(kind), (77, 19)):
        matrix = packed(kind, rows, columns, device)
        x = activations(3, columns, torch.bfloat16, device)
        assert ratio(triton.linear_exact(x, matrix), reference.linear(x, matrix)) < TOLERANCE


@pytest.mark.one_of_each(7)
@each_form
def test_few_rows_are_exact_but_for_fp32(kind: PackedKind, device: torch.device) -> None:
    """Whole numbers, whose sums are rounded nowhere, show every error of a code, a scale or an offset."""
    matrix = packed(kind, 33, 768, device)
    x = torch.randint(-4, 5, (2, 768), generator=torch.Generator().manual_seed(3)).to(device, torch.float16)
    got, wanted = triton.linear_exact(x, matrix), x.float() @ reference.dequantise(matrix).T
    assert ratio(got, wanted) < 3e-4  # what rounding the result to float16 costs


def test_bias_and_cut_sums(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = packed(PackedKind.Q4_K, 70, 1024, device)
    x, bias = activations(9, 1024, torch.bfloat16, device), activations(1, 70, torch.bfloat16, device)[0] * 50
    bias = bias.contiguous()
    wanted = reference.linear(x, matrix, bias)
    for most in (1, 512):  # the sums in one piece, and in pieces of four steps
        monkeypatch.setattr(triton, "CODED_CUT", triton.CODED_CUT._replace(programs=most))
        assert ratio(triton.linear_exact(x, matrix, bias), wanted) < TOLERANCE
        assert ratio(wanted, reference.linear(x, matrix)) > 0.1
    many = activations(17, 1024, torch.bfloat16, device)
    assert ratio(triton.linear(many, matrix, bias), reference.linear(many, matrix, bias)) < TOLERANCE


@each_form
def test_many_rows(kind: PackedKind, device: torch.device) -> None:
    columns = widths(kind)[-1]
    matrix = packed(kind, 77, columns, device)
    x = activations(37, columns, torch.bfloat16, device)
    assert ratio(triton.linear(x, matrix), reference.linear(x, matrix)) < TOLERANCE


@pytest.mark.parametrize(
    "kind",
    few([PackedKind.Q4_K, PackedKind.Q2_K, PackedKind.Q5_1, PackedKind.IQ4_XS], PackedKind.Q4_K),
    ids=lambda kind: kind.name,
)
@pytest.mark.usefixtures("turing")
def test_without_tensor_cores(kind: PackedKind, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float16: codes that meet x exactly for few rows; for more, pieces of the matrix are decoded for torch."""
    columns = 512 if PLANES[kind].layout.nested else 160
    asked = []
    monkeypatch.setattr(triton, "PIECE", 9 * columns)
    monkeypatch.setattr(triton, "plain_linear", lambda *given, out: asked.append(out) or plain_linear(*given, out=out))
    matrix, bias = packed(kind, 33, columns, device), activations(1, 33, torch.float16, device)[0].contiguous() * 50
    for rows in (3, 12, 17):
        x = activations(rows, columns, torch.float16, device)
        assert ratio(linear(x, matrix, bias), reference.linear(x, matrix, bias)) < TOLERANCE
        assert len(asked) == (0 if rows < 17 else 4)
    assert ratio(linear(x, matrix, invariant=True), reference.linear(x, matrix)) < TOLERANCE
    assert len(asked) == 4


def test_many_tiles_of_rows(device: torch.device) -> None:
    matrix = packed(PackedKind.Q5_0, 1283, 64, device)  # more tiles than are taken together
    x = activations(131, 64, torch.float16, device)
    assert ratio(triton.linear(x, matrix), reference.linear(x, matrix)) < TOLERANCE


@pytest.mark.parametrize("kind", [PackedKind.Q4_K, PackedKind.Q6_K], ids=lambda kind: kind.name)
def test_a_row_does_not_depend_on_the_others(kind: PackedKind, device: torch.device) -> None:
    matrix = packed(kind, 33, 512, device)
    x = activations(16, 512, torch.bfloat16, device).contiguous()
    other = x.clone()
    other[1:] = torch.nan
    for multiply in (triton.linear_exact, triton.linear):
        assert torch.equal(multiply(other, matrix)[0], multiply(x, matrix)[0])


@pytest.mark.one_of_each(1)
@pytest.mark.parametrize("kind", [PackedKind.Q4_1, PackedKind.Q8_0, PackedKind.Q3_K], ids=lambda kind: kind.name)
def test_bits_of_a_row_for_any_number_of_rows(
    kind: PackedKind, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, in batches, and with the stretches of K made side by side or by one program.

    Under the interpreter x is whole numbers: products with codes stay below 2**24 and are exact, and all that rounds is
    what the kernel does itself, in its order. A bias takes off a row's rounded result, so that what float16 hides shows
    as well.
    """
    cut = triton.CODED_CUT._replace(least=1)
    monkeypatch.setattr(triton, "CODED_CUT", cut)
    columns, place = 512, 3
    raw = random_bytes(kind, 33, columns, octaves=4)  # without, most sums of stretches are exact
    matrix = pack(raw, GgmlType[kind.name], 33, columns, device)
    x = activations(70, columns, torch.float16, device)
    if device.type == "cpu":
        x = torch.randint(-200, 201, x.shape, generator=torch.Generator().manual_seed(1)).half()
    alone = x[place : place + 1]
    bias = -linear(alone, matrix, invariant=True)[0]
    wanted = linear(alone, matrix, bias, invariant=True)[0]
    assert int((wanted != 0).sum()) > 20
    for most, counts in ((64, (5, 17, 70)), (0, (1, 70))):  # 0: by one program
        monkeypatch.setattr(triton, "CODED_CUT", cut._replace(few=most, enough=10**9 if most else 0))
        for count in counts:
            some, at = (alone, 0) if count == 1 else (x[:count], place)
            assert torch.equal(linear(some, matrix, bias, invariant=True)[at], wanted)


@pytest.mark.parametrize("kind", [PackedKind.Q4_K, PackedKind.Q6_K, PackedKind.Q8_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize(("rows", "columns"), [(4096, 4096), (1024, 3072)])
def test_bits_at_the_size_of_models(kind: PackedKind, rows: int, columns: int, device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("takes a GPU")
    matrix = pack(random_bytes(kind, rows, columns), GgmlType[kind.name], rows, columns, device)
    x = activations(2048, columns, torch.bfloat16, device)
    whole = linear(x, matrix, invariant=True)
    assert ratio(whole, reference.linear(x, matrix)) < TOLERANCE
    for count in (1, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 700):
        assert torch.equal(linear(x[-count:], matrix, invariant=True), whole[-count:])


def test_matrices_write_side_by_side(device: torch.device) -> None:
    kinds, sizes = (PackedKind.Q4_K, PackedKind.Q6_K), (9, 20)
    for tokens, invariant in ((3, False), (65, False), (66, True)):
        x = activations(tokens, 256, torch.bfloat16, device)
        whole = torch.full((tokens + 2, 35), torch.nan, dtype=torch.bfloat16, device=device)
        start = 0
        for kind, size in zip(kinds, sizes, strict=True):
            matrix, part = packed(kind, size, 256, device), whole[1:-1, start : start + size]
            assert linear(x, matrix, out=part, invariant=invariant) is part
            assert ratio(part, reference.linear(x, matrix)) < TOLERANCE
            start += size
        assert whole[0].isnan().all()
        assert whole[-1].isnan().all()
        assert whole[:, start:].isnan().all()


@pytest.mark.one_of_each(5)
@each_form
def test_embedding_rows(kind: PackedKind, device: torch.device) -> None:
    ids = torch.tensor([5, 0, 5], device=device)
    for columns in widths(kind):
        matrix = packed(kind, 9, columns, device)
        dtype = torch.float32 if columns == 416 else torch.bfloat16
        got, wanted = triton.embedding(ids, matrix, dtype), reference.embedding(ids, matrix, dtype)
        assert got.dtype == dtype
        assert ratio(got, wanted) < (1e-6 if dtype == torch.float32 else 1e-3)


def test_stacked_matrices_are_one(device: torch.device) -> None:
    parts = [packed(PackedKind.Q3_K, rows, 256, device) for rows in (7, 18)]
    both = stack(parts)
    assert both.rows == 25
    assert torch.equal(reference.dequantise(both), torch.cat([reference.dequantise(part) for part in parts]))


def test_no_rows(device: torch.device) -> None:
    matrix = packed(PackedKind.Q4_0, 9, 416, device)
    x = torch.empty(0, 416, dtype=torch.bfloat16, device=device)
    assert triton.linear_exact(x, matrix).shape == triton.linear(x, matrix).shape == (0, 9)
    assert triton.embedding(torch.empty(0, dtype=torch.int64, device=device), matrix, torch.float32).shape == (0, 416)


def test_activations_that_the_kernels_do_not_read_are_refused(device: torch.device) -> None:
    matrix = packed(PackedKind.Q4_0, 9, 416, device)
    for x in (torch.zeros(416, 3, dtype=torch.bfloat16).T, torch.zeros(3, 416)):
        with pytest.raises(AssertionError):
            triton.linear_exact(x.to(device), matrix)
