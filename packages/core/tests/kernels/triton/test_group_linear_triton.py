# SPDX-License-Identifier: MIT
"""Linear layers with codes in groups: the kernels give what the reference gives."""

from __future__ import annotations

import types

import pytest
import torch

from candle_vllm.core.kernels.group_linear import GroupMatrix, pack, reference, triton
from candle_vllm.core.kernels.linear import triton as launches

TOLERANCE = 5e-3
KERNELS = (triton.linear, triton.linear_exact)


@pytest.fixture(autouse=True)
def nan_where_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' outputs and partial sums are NaN before they run."""

    def empty(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.full(shape, torch.nan, dtype=dtype, device=device)

    stand_in = types.SimpleNamespace(**{name: getattr(torch, name) for name in dir(torch) if name[0] != "_"})
    stand_in.empty = empty
    monkeypatch.setattr(launches, "torch", stand_in)


def packed(
    rows: int,
    columns: int,
    group: int,
    bits: int,
    device: torch.device,
    *,
    zeros: bool = True,
    dtype: torch.dtype = torch.float16,
) -> GroupMatrix:
    random = torch.Generator().manual_seed(rows)
    shape = (rows, columns // group)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=random, dtype=torch.uint8)
    offsets = torch.randint(0, (1 << bits) + 1, shape, generator=random, dtype=torch.int32)
    scales = ((torch.rand(shape, generator=random) + 0.5) / (1 << bits)).to(dtype)
    return pack(codes, scales, offsets if zeros else None, bits, device)


def activations(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Rows of a wider tensor."""
    x = torch.randn(rows, columns + 16, generator=torch.Generator().manual_seed(rows)).to(dtype)
    return x.to(device)[:, :columns]


def ratio(got: torch.Tensor, wanted: torch.Tensor) -> float:
    error = got.float() - wanted.float()
    return float(error.pow(2).mean().sqrt() / wanted.float().pow(2).mean().sqrt())


@pytest.mark.one_of_each
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("columns", "group", "zeros", "dtype"),
    [
        (416, 32, True, torch.float16),
        (384, 64, False, torch.bfloat16),
        (256, 128, True, torch.bfloat16),
        (256, 128, False, torch.float16),
        (480, 96, True, torch.float16),
        (77, 77, True, torch.float16),
        (300, 300, False, torch.bfloat16),
    ],
)
def test_few_and_many_rows(
    bits: int, columns: int, group: int, zeros: bool, dtype: torch.dtype, device: torch.device
) -> None:
    matrix = packed(77, columns, group, bits, device, zeros=zeros, dtype=dtype)
    for multiply, rows in ((triton.linear_exact, 3), (triton.linear, 37)):
        x = activations(rows, columns, torch.bfloat16, device)
        assert ratio(multiply(x, matrix), reference.linear(x, matrix)) < TOLERANCE


@pytest.mark.one_of_each
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_few_rows_are_exact_but_for_fp32(bits: int, group: int, device: torch.device) -> None:
    """Whole numbers, whose sums are rounded nowhere, show every error of a code, a scale or a zero."""
    matrix = packed(33, 256, group, bits, device)
    x = torch.randint(-4, 5, (2, 256), generator=torch.Generator().manual_seed(3)).to(device, torch.float16)
    got, wanted = triton.linear_exact(x, matrix), x.float() @ reference.dequantise(matrix).T
    assert ratio(got, wanted) < 3e-4  # what rounding the result to float16 costs


@pytest.mark.parametrize("form", ["one piece", "in parallel", "folded"])
def test_bias_and_cut_sums(form: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = packed(70, 1152, 128, 4, device)
    x, bias = activations(9, 1152, torch.bfloat16, device), activations(1, 70, torch.bfloat16, device)[0] * 50
    bias = bias.contiguous()
    wanted = reference.linear(x, matrix, bias)
    cut = triton.CODED_CUT._replace(programs=1 if form == "one piece" else 512)
    if form == "folded":
        cut = cut._replace(few=0, enough=1)
    monkeypatch.setattr(triton, "CODED_CUT", cut)
    out = torch.full((9, 80), torch.nan, dtype=torch.bfloat16, device=device)
    triton.linear_exact(x, matrix, bias, out[:, 3:73])
    assert ratio(out[:, 3:73], wanted) < TOLERANCE
    assert out[:, :3].isnan().all()
    assert out[:, 73:].isnan().all()
    assert ratio(wanted, reference.linear(x, matrix)) > 0.1


def test_stretches_have_the_same_bits_however_they_are_made(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix, x = packed(40, 1280, 64, 4, device), activations(5, 1280, torch.bfloat16, device)
    side_by_side = triton.linear_exact(x, matrix)
    monkeypatch.setattr(triton, "CODED_CUT", triton.CODED_CUT._replace(few=0, enough=1))
    assert torch.equal(triton.linear_exact(x, matrix), side_by_side)


def test_many_tiles_and_a_bias(device: torch.device) -> None:
    matrix = packed(1283, 64, 32, 4, device)  # more tiles of rows than are taken together
    bias = activations(1, 1283, torch.float16, device)[0].contiguous()
    x = activations(33, 64, torch.float16, device)
    out = torch.full((33, 1300), torch.nan, dtype=torch.float16, device=device)
    triton.linear(x, matrix, bias, out[:, 8:1291])
    assert ratio(out[:, 8:1291], reference.linear(x, matrix, bias)) < TOLERANCE
    assert out[:, :8].isnan().all()
    assert out[:, 1291:].isnan().all()


def test_a_row_does_not_depend_on_the_others(device: torch.device) -> None:
    """To the bit, whatever T is; under the interpreter, whose products are numpy's, with tiles of one size."""
    matrix = packed(65, 320, 32, 4, device)
    x = activations(16, 320, torch.bfloat16, device).contiguous()
    whole = triton.linear_exact(x, matrix)
    for count in (1, 2, 8, 9) if device.type == "cuda" else (12,):
        assert torch.equal(triton.linear_exact(x[:count], matrix), whole[:count])
    if device.type == "cuda":
        many = activations(300, 320, torch.bfloat16, device)
        many[:16] = x
        assert torch.equal(triton.linear_exact(many, matrix)[:16], whole)
    other = x.clone()
    other[1:] = torch.nan
    assert torch.equal(triton.linear_exact(other, matrix)[0], whole[0])
    assert torch.equal(triton.linear(other, matrix)[0], triton.linear(x, matrix)[0])


def test_no_rows(device: torch.device) -> None:
    matrix = packed(9, 96, 32, 4, device)
    x = torch.empty(0, 96, dtype=torch.bfloat16, device=device)
    assert all(multiply(x, matrix).shape == (0, 9) for multiply in KERNELS)


def test_activations_that_the_kernels_do_not_read_are_refused(device: torch.device) -> None:
    matrix = packed(9, 96, 32, 4, device)
    for x in (torch.zeros(96, 3, dtype=torch.bfloat16).T, torch.zeros(3, 96), torch.zeros(3, 95, dtype=torch.float16)):
        for multiply in KERNELS:
            with pytest.raises(AssertionError):
                multiply(x.to(device), matrix)
