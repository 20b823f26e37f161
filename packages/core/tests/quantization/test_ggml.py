# SPDX-License-Identifier: MIT
"""Every ggml tensor type decodes bit for bit as the `gguf` package decodes it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import quants

from candle_vllm.core.assembly.opening import stored_types
from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.kernels.torch_numbers import DTYPES, tensor_of
from candle_vllm.core.quantization import ggml
from candle_vllm.core.quantization.ggml_types import FILE_TYPES, GGMLQuantizationType

T = GGMLQuantizationType
NOT_IN_LIBRARY = {T.Q8_1, T.Q8_K, *(t for t in T if t.name == "Q1_0")}
DECODABLE = [t for t in T if t not in NOT_IN_LIBRARY and t not in ggml.PLAIN_TYPES]
DIRECT = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


def random_bytes(ggml_type: T, blocks: int, seed: int = 0) -> np.ndarray:
    width = ggml_type.block[1]
    return np.random.default_rng(seed).integers(0, 256, (blocks, width), dtype=np.uint8)


def library(raw: np.ndarray, ggml_type: T) -> np.ndarray:
    with np.errstate(all="ignore"):
        return quants.dequantize(raw, ggml_type)


def assert_same_bits(ours: np.ndarray, theirs: np.ndarray) -> None:
    mine, other = ours.reshape(-1), theirs.reshape(-1)
    assert mine.dtype == other.dtype == np.float32
    same = mine.view(np.uint32) == other.view(np.uint32)
    assert (same | (np.isnan(mine) & np.isnan(other))).all()


@pytest.mark.parametrize("ggml_type", DECODABLE, ids=lambda t: t.name)
@pytest.mark.parametrize("rows", [1, 7])
def test_random_blocks_decode_as_the_library_decodes_them(ggml_type: T, rows: int) -> None:
    raw = random_bytes(ggml_type, rows * 3)
    shape = (rows, 3 * ggml_type.block[0])
    ours = ggml.dequantize(raw, ggml_type, shape)
    assert ours.shape == shape
    assert ours.flags["C_CONTIGUOUS"]
    assert_same_bits(ours, library(raw, ggml_type))


def test_types_that_the_library_does_not_decode() -> None:
    """Q8_K and Q1_0 by their definitions in ggml-common.h; Q8_1 never stands in a file."""
    blocks = random_bytes(T.Q8_K, 3)
    blocks[:, :4] = np.array([0.5, -2.0, 3.0], np.float32).view(np.uint8).reshape(3, 4)
    wanted = blocks[:, 4:260].view(np.int8).astype(np.float32) * np.array([[0.5], [-2.0], [3.0]], np.float32)
    assert (ggml.dequantize(blocks, T.Q8_K, (3, 256)) == wanted).all()
    blocks = np.zeros((1, 18), np.uint8)
    blocks[0, :2] = np.array([1.5], np.float16).view(np.uint8)
    blocks[0, 2:4] = [0b00000101, 0b10000000]
    wanted = np.full((1, 128), -1.5, np.float32)
    wanted[0, [0, 2, 15]] = 1.5
    assert (ggml.dequantize(blocks, T["Q1_0"], (1, 128)) == wanted).all()


@pytest.mark.parametrize("name", DIRECT)
def test_many_chunks_join_without_a_seam(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml, "CHUNK", 1024)
    ggml_type = T[name]
    raw = random_bytes(ggml_type, 123, seed=3)
    ours = ggml.dequantize(raw, ggml_type, (123, ggml_type.block[0]))
    assert_same_bits(ours, library(raw, ggml_type))


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_threads_share_a_large_tensor(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = random_bytes(T.Q4_0, 123, seed=4)
    alone = ggml.dequantize(raw, T.Q4_0, (123, 32), dtype)
    monkeypatch.setattr(ggml, "THREAD_ELEMENTS", 32)
    monkeypatch.setattr(ggml, "loading_threads", lambda: 5)
    shared = ggml.dequantize(raw, T.Q4_0, (123, 32), dtype)
    assert shared.tobytes() == alone.tobytes()


def test_the_library_path_is_chunked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml, "CHUNK", 64)
    raw = random_bytes(T.IQ4_NL, 33)
    assert_same_bits(ggml.dequantize(raw, T.IQ4_NL, (33, 32)), library(raw, T.IQ4_NL))


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_plain_floats(name: str) -> None:
    raw = np.random.default_rng(1).integers(0, 256, (5, 64), dtype=np.uint8)
    ours = ggml.dequantize(raw, T[name], (5, 64 // T[name].block[1]))
    assert_same_bits(ours, library(raw, T[name]))


@pytest.mark.parametrize(("name", "numpy_type"), [("I8", "i1"), ("I16", "<i2"), ("I32", "<i4"), ("I64", "<i8")])
def test_integers_keep_their_value_in_their_own_dtype(name: str, numpy_type: str) -> None:
    numbers = np.array([[-128, 127], [0, 5]]).astype(numpy_type)
    if numbers.itemsize == 8:
        numbers[0, 0] = -(2**62) - 1  # would be rounded on a way over float32
    ours = ggml.dequantize(numbers.view(np.uint8), T[name], (2, 2), name)
    assert ours.dtype == numbers.dtype
    assert (ours == numbers).all()


def test_float64() -> None:
    numbers = np.array([1.1, -2.5e300])
    assert (ggml.dequantize(numbers.view(np.uint8), T.F64, (2,), "F64") == numbers).all()
    assert ggml.dequantize(numbers[:1].view(np.uint8), T.F64, (1,)).item() == np.float32(1.1)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("name", ["Q4_1", "Q6_K", "F32", "F16", "IQ4_XS"])
def test_narrow_results_are_rounded_from_float32(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml, "CHUNK", 512)
    raw = random_bytes(T[name], 64 * 9, seed=2)
    shape = (9, 64 * T[name].block[0])
    narrow = ggml.dequantize(raw, T[name], shape, dtype)
    expected = torch.from_numpy(ggml.dequantize(raw, T[name], shape)).to(DTYPES[dtype])
    assert torch.equal(tensor_of(narrow, dtype).nan_to_num(7), expected.nan_to_num(7))


def test_bytes_may_be_unaligned_and_read_only() -> None:
    raw = random_bytes(T.Q4_1, 10)
    shifted = np.frombuffer(b"x" + raw.tobytes(), dtype=np.uint8)[1:]
    assert not shifted.flags.writeable
    assert_same_bits(ggml.dequantize(shifted, T.Q4_1, (10, 32)), library(raw, T.Q4_1))


def test_the_result_has_its_own_memory() -> None:
    raw = np.ones(16, dtype=np.uint8)
    ours = ggml.dequantize(raw, T.F32, (4,))
    before = ours.copy()
    raw[:] = 0
    assert np.array_equal(ours, before)


@pytest.mark.parametrize("ggml_type", [T.Q8_1], ids=lambda t: t.name)
def test_a_type_that_nothing_decodes_is_refused_by_name(ggml_type: T) -> None:
    size, width = ggml_type.block
    with pytest.raises(UnsupportedModelError, match=ggml_type.name):
        ggml.dequantize(np.zeros(width, np.uint8), ggml_type, (size,))
    with pytest.raises(UnsupportedModelError, match=ggml_type.name):
        ggml.check_decodable(ggml_type)


def test_decodable_types_pass_the_check() -> None:
    for ggml_type in [*DECODABLE, *ggml.PLAIN_TYPES]:
        ggml.check_decodable(ggml_type)


def test_the_types_are_those_of_the_gguf_package() -> None:
    theirs = {kind.name: (int(kind), gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    ours = {kind.name: (int(kind), kind.block) for kind in GGMLQuantizationType}
    assert ours.items() >= theirs.items(), "a newer release knows types that belong into ggml_types.py"
    files = {int(kind): kind.name.removeprefix("MOSTLY_") for kind in gguf.LlamaFileType}
    assert dict(FILE_TYPES) == {number: name for number, name in files.items() if name not in _NOT_QUANTISED}


_NOT_QUANTISED = ("ALL_F32", "F16", "BF16", "GUESSED")


@pytest.mark.parametrize(
    ("number", "named"),
    [
        (15, "Q4_K_M (Q5_0 x 2, F32 x 3)"),
        (8, "Q5_0 x 2, F32 x 3"),
        (1024, "Q5_0 x 2, F32 x 3"),
        ([15], "Q5_0 x 2, F32 x 3"),
    ],
)
def test_a_files_own_type_names_its_mixture(number: Any, named: str) -> None:
    kinds = enumerate(["F32", "F32", "F32", "Q5_0", "Q5_0"])
    tensors: Any = SimpleNamespace(tensors={place: SimpleNamespace(type_name=kind) for place, kind in kinds})
    assert stored_types(tensors, {"general.file_type": number}) == named
