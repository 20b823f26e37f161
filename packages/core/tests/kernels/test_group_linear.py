# SPDX-License-Identifier: MIT
"""Linear layers with codes in groups: the layout keeps every number, and what no kernel reads is refused."""

from __future__ import annotations

import importlib

import pytest
import torch

from candle_vllm.core.kernels.group_linear import GroupMatrix, from_codes, linear, pack, reference, stack
from candle_vllm.core.kernels.matrices import CodeMatrix
from candle_vllm.core.quantization.group_codes import GroupCodes


def numbers(
    rows: int, columns: int, group: int, bits: int, dtype: torch.dtype = torch.float16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and zeros; the largest zero is one that no code has, as in GPTQ's files."""
    random = torch.Generator().manual_seed(bits * columns)
    shape = (rows, columns // group)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=random, dtype=torch.uint8)
    zeros = torch.randint(0, (1 << bits) + 1, shape, generator=random, dtype=torch.int32)
    return codes, (torch.rand(shape, generator=random) + 0.5).to(dtype) * 0.01, zeros


def by_hand(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | int) -> torch.Tensor:
    """The weights, [N, K]."""
    group = codes.shape[1] // scales.shape[1]
    wide = [scales.float().repeat_interleave(group, 1)]
    wide += [zeros.float().repeat_interleave(group, 1) if isinstance(zeros, torch.Tensor) else zeros]
    return (codes.float() - wide[1]) * wide[0]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("columns", "group"), [(32, 32), (384, 32), (96, 96), (192, 64), (416, 416), (384, 128), (960, 320), (77, 77)]
)
def test_the_layout_keeps_every_number(bits: int, columns: int, group: int) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        codes, scales, zeros = numbers(9, columns, group, bits, dtype)
        matrix = pack(codes, scales, zeros, bits, "cpu")
        assert matrix.group == group
        assert matrix.zeros
        assert torch.equal(reference.dequantise(matrix), by_hand(codes, scales, zeros))
        matrix = pack(codes, scales, None, bits, "cpu")
        assert not matrix.zeros
        assert torch.equal(reference.dequantise(matrix), by_hand(codes, scales, 1 << (bits - 1)))


def test_takes_no_more_memory_than_the_numbers() -> None:
    codes, scales, zeros = numbers(64, 1024, 128, 4)
    assert pack(codes, scales, None, 4, "cpu").nbytes == 64 * 1024 // 2 + 64 * 8 * 2
    assert pack(codes, scales, zeros, 4, "cpu").nbytes == 64 * 1024 // 2 + 64 * 8 * 4
    codes, scales, zeros = numbers(64, 1024, 1024, 8)
    assert pack(codes, scales, None, 8, "cpu").nbytes == 64 * 1024 + 64 * 2


def test_chunks_of_rows_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, scales, zeros = numbers(11, 256, 64, 4)
    monkeypatch.setattr(importlib.import_module(pack.__module__), "CHUNK", 3 * 256)
    matrix = pack(codes, scales, zeros, 4, "cpu")
    assert torch.equal(reference.dequantise(matrix), by_hand(codes, scales, zeros))


def test_numbers_that_are_views() -> None:
    codes, scales, zeros = numbers(8, 128, 32, 4)
    matrix = pack(codes.T.contiguous().T, scales.T.contiguous().T, zeros.T.contiguous().T, 4, "cpu")
    assert torch.equal(reference.dequantise(matrix), by_hand(codes, scales, zeros))


def test_the_product() -> None:
    codes, scales, zeros = numbers(12, 96, 32, 4)
    matrix = pack(codes, scales, zeros, 4, "cpu")
    x, bias = torch.randn(5, 96, generator=torch.Generator().manual_seed(0)), torch.arange(12.0)
    wanted = x @ by_hand(codes, scales, zeros).T
    assert torch.allclose(linear(x, matrix), wanted, rtol=1e-5, atol=1e-5)
    out = torch.full((5, 20), torch.nan)
    assert linear(x, matrix, bias, out=out[:, 4:16]).data_ptr() == out[:, 4:16].data_ptr()
    assert torch.allclose(out[:, 4:16], wanted + bias, rtol=1e-5, atol=1e-5)
    assert out[:, :4].isnan().all()
    assert out[:, 16:].isnan().all()


def test_stacked_matrices_are_one() -> None:
    parts = [pack(*numbers(rows, 128, 64, 8), 8, "cpu") for rows in (7, 18)]
    both = stack(parts)
    assert both.rows == 25
    assert torch.equal(reference.dequantise(both), torch.cat([reference.dequantise(part) for part in parts]))
    with pytest.raises(AssertionError):
        stack([parts[0], pack(*numbers(7, 128, 32, 8), 8, "cpu")])


def test_what_no_kernel_multiplies_is_refused() -> None:
    codes, scales, zeros = numbers(4, 96, 32, 4)

    def refused(match: str, *arguments: object) -> None:
        with pytest.raises(ValueError, match=match):
            pack(*arguments, "cpu")

    refused("codes of 3 bits", codes, scales, zeros, 3)
    refused("torch.int32", codes.int(), scales, zeros, 4)
    refused("scales are torch.float32", codes, scales.float(), zeros, 4)
    refused("do not fit a matrix of 4 x 96", codes, scales[:3], zeros, 4)
    refused("do not fit", codes, scales.repeat(1, 2)[:, :5], None, 4)
    refused("groups of 16 weights", codes, scales.repeat(1, 2), None, 4)
    refused("groups of 48 weights", codes, scales[:, :2], None, 4)
    refused("a code is 16; 4 bits hold less", codes + 1, scales, zeros, 4)
    refused("zeros are torch.float16", codes, scales, scales, 4)
    refused("zeros are", codes, scales, zeros[:, :1], 4)
    refused("zeros are -16 to -1", codes, scales, -zeros - 1, 4)
    refused("to 65536", codes, scales, zeros * 0 + 65536, 4)
    assert isinstance(pack(codes, scales, zeros, 4, "cpu"), GroupMatrix)


def test_columns_in_another_order() -> None:
    """Activation order: the groups of a file's columns lie anyhow, and x is brought to the matrix's order."""
    codes, scales, zeros = numbers(12, 96, 32, 4)
    group_of = torch.randperm(96, generator=torch.Generator().manual_seed(1)) // 32
    found = GroupCodes(codes.numpy(), scales.float().numpy(), zeros.numpy(), 4, "F16", group_of.numpy())
    matrix = from_codes(found, "cpu")
    assert matrix is not None
    assert matrix.order is not None
    assert matrix.nbytes == 12 * 128 // 2 + 12 * 4 * 4 + 96 * 8
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    weight = torch.from_numpy(found.dequantise())
    assert torch.allclose(linear(x, matrix), x @ weight.T, rtol=1e-5, atol=1e-5)
    assert torch.allclose(CodeMatrix(matrix).decoded(torch.float32), weight, rtol=1e-5)
    with pytest.raises(AssertionError):
        stack([matrix, matrix])


def test_codes_that_no_kernel_multiplies_are_none() -> None:
    codes, scales, zeros = (part.numpy() for part in numbers(4, 96, 32, 4))
    wide = scales.astype("float32")
    assert from_codes(GroupCodes(codes, wide, zeros, 4, "F16"), "cpu") is not None
    assert from_codes(GroupCodes(codes, wide, zeros, 4, "F32"), "cpu") is None
    assert from_codes(GroupCodes(codes, wide, zeros, 5, "F16"), "cpu") is None
    assert from_codes(GroupCodes(codes, wide, zeros - 16, 4, "F16"), "cpu") is None, "negative zeros"
    assert from_codes(GroupCodes(codes, wide, zeros * 0 + 65536, 4, "F16"), "cpu") is None
    assert from_codes(GroupCodes(codes, wide[:, :2], zeros[:, :2], 4, "F16"), "cpu") is None, "groups of 48"
    assert from_codes(GroupCodes(codes[:, :48], wide, zeros, 4, "F16"), "cpu") is None
    uneven = (torch.arange(96) // 40).numpy()
    assert from_codes(GroupCodes(codes, wide, zeros, 4, "F16", uneven), "cpu") is None
