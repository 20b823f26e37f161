# SPDX-License-Identifier: MIT
"""Linear layers with small floats: the layout keeps every number, and what no kernel reads is refused."""

from __future__ import annotations

import dataclasses
import importlib

import numpy as np
import pytest
import torch

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.kernels.group_linear import GroupMatrix, linear, pack_floats, reference, stack
from candle_vllm.core.quantization.scaled_codes import Floats, ScaledCodes

KINDS: tuple[Floats, ...] = ("e4m3", "e5m2", "e2m1")


def floats(rows: int, columns: int, span: int, numbers: Floats = "e4m3") -> ScaledCodes:
    """Random codes of either sign, without those of infinity and NaN."""
    random = np.random.default_rng(rows * columns)
    scales = random.uniform(0.5, 1.5, (rows, -(-columns // span))).astype(np.float32)
    if numbers == "e2m1":
        groups = random.integers(0, 0x7F, (rows, columns // 16), np.uint8) | random.integers(0, 2, dtype=np.uint8) << 7
        codes = random.integers(0, 256, (rows, columns // 2), np.uint8)
        return ScaledCodes(numbers, codes, scales, span, groups)
    codes = random.integers(0, 0x7F if numbers == "e4m3" else 0x7C, (rows, columns), np.uint8)
    return ScaledCodes(numbers, codes | random.integers(0, 2, codes.shape, np.uint8) << 7, scales, span)


def weights(found: ScaledCodes) -> torch.Tensor:
    return torch.from_numpy(found.dequantise())


@pytest.mark.parametrize("numbers", KINDS)
@pytest.mark.parametrize(
    ("columns", "span"), [(32, 32), (384, 128), (96, 96), (77, 77), (1, 1), (416, 416), (208, 128), (64, 128)]
)
def test_the_layout_keeps_every_number(columns: int, span: int, numbers: Floats) -> None:
    if numbers == "e2m1" and columns % 16:
        columns = span = 112
    found = floats(9, columns, span, numbers)
    matrix = pack_floats(found, "cpu")
    assert (matrix.group, matrix.numbers, matrix.zeros) == (min(span, columns), numbers, False)
    assert torch.equal(reference.dequantise(matrix), weights(found))


def test_takes_no_more_memory_than_the_numbers() -> None:
    assert pack_floats(floats(64, 1024, 128), "cpu").nbytes == 64 * 1024 + 64 * 8 * 4
    assert pack_floats(floats(64, 1024, 1024, "e5m2"), "cpu").nbytes == 64 * 1024 + 64 * 4
    assert pack_floats(floats(64, 1024, 1024, "e2m1"), "cpu").nbytes == 64 * 1024 // 2 + 64 * 64 + 64 * 4


@pytest.mark.parametrize("numbers", ["e4m3", "e2m1"])
def test_chunks_of_rows_meet(numbers: Floats, monkeypatch: pytest.MonkeyPatch) -> None:
    found = floats(11, 256, 64, numbers)
    meant, scales = weights(found), found.scales.copy()
    if found.groups is None:
        found.codes[7, 130] = 0xFF
    else:
        found.groups[7, 9] = 0x7F
    monkeypatch.setattr(importlib.import_module(pack_floats.__module__), "CHUNK", 3 * 256)
    got = reference.dequantise(pack_floats(found, "cpu"))
    wrong = got.isnan()
    assert wrong[7, 128:192].all(), "a group with a NaN is NaN"
    assert int(wrong.sum()) == 64
    assert torch.equal(got[~wrong], meant[~wrong])
    assert np.array_equal(found.scales, scales), "the caller's own"


def test_infinite_and_nan_weights_make_the_products_that_they_should() -> None:
    cases: list[tuple[Floats, tuple[int, ...]]] = [("e4m3", (0x7F, 0xFF)), ("e5m2", (0x7C, 0xFC, 0x7E, 0xFF))]
    for numbers, strange in cases:
        found = floats(len(strange) + 1, 96, 32, numbers)
        found.codes[range(len(strange)), [5, 40, 95, 64][: len(strange)]] = strange
        x = torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
        got = linear(x, pack_floats(found, "cpu"))
        assert torch.allclose(got, x @ weights(found).T, rtol=1e-5, atol=1e-2, equal_nan=True)
        assert got[:, -1].isfinite().all()
        assert not got[:, :-1].isfinite().any()


@pytest.mark.parametrize("numbers", KINDS)
def test_stacked_matrices_are_one(numbers: Floats) -> None:
    parts = [pack_floats(floats(rows, 128, 64, numbers), "cpu") for rows in (7, 18)]
    both = stack(parts)
    assert (both.rows, both.numbers) == (25, numbers)
    assert torch.equal(reference.dequantise(both), torch.cat([reference.dequantise(part) for part in parts]))
    other: Floats = "e5m2" if numbers == "e4m3" else "e4m3"
    with pytest.raises(AssertionError):
        stack([parts[0], pack_floats(floats(7, 128, 64, other), "cpu")])


def test_what_no_kernel_multiplies_is_refused() -> None:
    found = floats(4, 96, 48)
    with pytest.raises(UnsupportedModelError, match="a scale for 48 columns has no kernel on a GPU"):
        pack_floats(found, "cpu")
    large = dataclasses.replace(floats(4, 96, 32), scales=np.full((4, 3), 1e37, np.float32))
    with pytest.raises(UnsupportedModelError, match="a scale beyond"):
        pack_floats(large, "cpu")
    infinite = dataclasses.replace(large, scales=np.full((4, 3), np.inf, np.float32))
    assert isinstance(pack_floats(infinite, "cpu"), GroupMatrix), "the file's business"
    nibbles = floats(4, 96, 32, "e2m1")
    assert nibbles.groups is not None
    for wrong in (
        dataclasses.replace(found, span=32),
        dataclasses.replace(found, span=0),
        dataclasses.replace(found, scales=found.scales[:3]),
        dataclasses.replace(found, groups=nibbles.groups),
        dataclasses.replace(nibbles, groups=None),
        dataclasses.replace(nibbles, groups=nibbles.groups[:, :5]),
        dataclasses.replace(found, codes=found.codes[:0], scales=found.scales[:0]),
    ):
        with pytest.raises(ValueError, match="parts of shapes"):
            pack_floats(wrong, "cpu")
