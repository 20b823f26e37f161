# SPDX-License-Identifier: MIT
"""MXFP4 of GGUF files keeps its numbers where its own kernel is not there: on a GPU, and without a compiler."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from gguf import quants

from candle_vllm.core.kernels import gguf_linear, packed_linear
from candle_vllm.core.kernels.gguf_linear.reference import dequantise
from candle_vllm.core.kernels.packed_linear import PackedKind
from candle_vllm.core.quantization.ggml_blocks import as_q5_0
from candle_vllm.core.quantization.ggml_types import GGMLQuantizationType
from packages.core.tests.kernels import packed_reference

MXFP4 = GGMLQuantizationType.MXFP4
ROWS, COLUMNS = 33, 96


def stored(*exponents: int) -> np.ndarray:
    """Random codes, with these exponents in turn."""
    raw = np.random.default_rng(0).integers(0, 256, (ROWS, COLUMNS // 32, 17), dtype=np.uint8)
    raw[:, :, 0] = np.resize(np.array(exponents, np.uint8), raw.shape[:2])
    return raw.reshape(ROWS, -1)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("candle_vllm.core.kernels.packed_linear.layout")
    monkeypatch.setattr(module, "has_compiler", lambda: False)


@pytest.mark.usefixtures("no_compiler")
def test_every_number_is_kept() -> None:
    raw = stored(104, 143, 120, 121, 127)
    wanted = quants.dequantize(raw, MXFP4)
    matrix = packed_linear.pack(raw.reshape(-1), MXFP4, ROWS, COLUMNS)
    assert matrix.kind is PackedKind.Q5_0
    assert np.array_equal(packed_reference.dequantise(matrix), wanted)
    on_device = gguf_linear.pack(raw.reshape(-1), MXFP4, ROWS, COLUMNS, "cpu")
    assert on_device.kind is PackedKind.Q5_0
    assert np.array_equal(dequantise(on_device).numpy(), wanted)


def test_blocks_of_zeros_may_have_any_scale() -> None:
    raw = stored(0, 255, 120)
    blocks = raw.reshape(-1, 17)
    blocks[blocks[:, 0] != 120, 1:] = 0x80  # minus zero and zero
    found = as_q5_0(raw)
    assert found is not None
    decoded = quants.dequantize(found.reshape(ROWS, -1), GGMLQuantizationType.Q5_0)
    assert np.array_equal(decoded.reshape(-1, 32)[blocks[:, 0] != 120], np.zeros((2 * 33, 32)))


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("exponent", [103, 144])
def test_scales_beyond_float16_are_rounded_to_8_bits(exponent: int) -> None:
    raw = stored(120, exponent)
    assert as_q5_0(raw) is None
    assert packed_linear.pack(stored(120, 103).reshape(-1), MXFP4, ROWS, COLUMNS).kind is PackedKind.Q8_0
