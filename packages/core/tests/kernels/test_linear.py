# SPDX-License-Identifier: MIT
"""Linear layers on the CPU: where the result is written, and a row's bits."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from candle_vllm.core.kernels import gguf_linear
from candle_vllm.core.kernels.dispatch import interpreted
from candle_vllm.core.kernels.linear import linear
from candle_vllm.core.quantization.ggml_types import GGMLQuantizationType as GgmlType

pytestmark = pytest.mark.skipif(interpreted(), reason="Triton's kernels take the place of the reference")


def test_the_interpreter_counts_from_the_import_of_triton() -> None:
    """A tensor that is multiplied before the import does not decide for those after it."""
    pytest.importorskip("triton")
    code = """
import sys
from candle_vllm.core.kernels.dispatch import interpreted
assert not interpreted() and "triton" not in sys.modules
import triton
assert interpreted()
"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)


def matrix(rows: int) -> gguf_linear.GgufMatrix:
    raw = np.random.default_rng(rows).integers(0, 256, (rows * 2, 34), dtype=np.uint8)
    raw[:, :2] = np.array([0.01], np.float16).view(np.uint8)
    return gguf_linear.pack(raw.reshape(-1), GgmlType.Q8_0, rows, 64, "cpu")


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_write_side_by_side(dtype: torch.dtype, bias: bool, invariant: bool) -> None:
    x = torch.randn(3, 64).to(dtype)
    b = torch.randn(5).to(dtype) if bias else None
    weight, packed = torch.randn(5, 64).to(dtype), matrix(5)
    whole = torch.full((5, 12), torch.nan, dtype=dtype)
    left, right = whole[1:4, :5], whole[1:4, 6:11]
    assert linear(x, weight, b, out=left, invariant=invariant) is left
    assert gguf_linear.linear(x, packed, b, out=right, invariant=invariant) is right
    assert torch.allclose(left.float(), linear(x, weight, b).float(), rtol=2e-2, atol=1e-4)
    assert torch.equal(right, gguf_linear.linear(x, packed, b, invariant=invariant))
    assert whole[1:4, 5].isnan().all()
    assert whole[1:4, 11].isnan().all()
    assert whole[[0, 4]].isnan().all()


@pytest.mark.parametrize("count", [1, 5, 17, 70])
def test_bits_of_a_row_for_any_number_of_rows(count: int) -> None:
    x, weight, packed = torch.randn(70, 64), torch.randn(129, 64), matrix(33)
    bias = torch.randn(129)
    plain = linear(x, weight, bias, invariant=True)
    quantised = gguf_linear.linear(x, packed, invariant=True)
    for some, at in ((x[:count], slice(0, count)), (x[70 - count :], slice(70 - count, 70))):
        assert torch.equal(linear(some, weight, bias, invariant=True), plain[at])
        assert torch.equal(gguf_linear.linear(some, packed, invariant=True), quantised[at])
    assert torch.allclose(plain, linear(x, weight, bias), atol=1e-4)
    assert linear(x[:0], weight, invariant=True).shape == (0, 129)


def test_what_cannot_be_written_to_is_refused() -> None:
    x, weight = torch.randn(3, 64), torch.randn(5, 64)
    for bad in (torch.empty(3, 6), torch.empty(5, 3).T, torch.empty(3, 5, dtype=torch.bfloat16)):
        with pytest.raises(AssertionError):
            linear(x, weight, out=bad)
        with pytest.raises(AssertionError):
            gguf_linear.linear(x, matrix(5), out=bad)
