# SPDX-License-Identifier: MIT
"""Linear layers with small floats: the kernels give what the reference gives."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch

from candle_vllm.core.kernels.group_linear import GroupMatrix, pack_floats, reference, triton
from candle_vllm.core.kernels.linear import triton as launches
from candle_vllm.core.kernels.torch_numbers import DTYPES
from candle_vllm.core.quantization.scaled_codes import FLOAT_NAMES, Floats, ScaledCodes

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, of NaN
TOLERANCE = 5e-3
KINDS: tuple[Floats, ...] = ("e4m3", "e5m2", "e2m1")
KERNELS = (triton.linear, triton.linear_exact)


@pytest.fixture(autouse=True)
def nan_where_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' outputs and partial sums are NaN before they run."""

    def empty(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.full(shape, torch.nan, dtype=dtype, device=device)

    stand_in = types.SimpleNamespace(**{name: getattr(torch, name) for name in dir(torch) if name[0] != "_"})
    stand_in.empty = empty
    monkeypatch.setattr(launches, "torch", stand_in)


def packed(rows: int, columns: int, span: int, numbers: Floats, device: torch.device) -> GroupMatrix:
    """Of normally distributed numbers, whose largest is the type's."""
    random = torch.Generator().manual_seed(rows * columns)
    values = torch.randn(rows, columns, generator=random)
    scales = (torch.rand(rows, -(-columns // span), generator=random) + 0.5) / 448
    groups = None
    if numbers == "e2m1":
        codes = torch.randint(0, 256, (rows, columns // 2), generator=random, dtype=torch.uint8)
        groups = torch.randint(0x30, 0x7E, (rows, columns // 16), generator=random, dtype=torch.uint8).numpy()
    else:
        dtype = DTYPES[FLOAT_NAMES[numbers]]
        codes = (values / values.abs().max() * torch.finfo(dtype).max).to(dtype).view(torch.uint8)
    return pack_floats(ScaledCodes(numbers, codes.numpy(), scales.numpy(), span, groups), device)


def activations(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Rows of a wider tensor."""
    x = torch.randn(rows, columns + 16, generator=torch.Generator().manual_seed(rows)).to(dtype)
    return x.to(device)[:, :columns]


def ratio(got: torch.Tensor, wanted: torch.Tensor) -> float:
    error = got.float() - wanted.float()
    return float(error.pow(2).mean().sqrt() / wanted.float().pow(2).mean().sqrt())


@pytest.mark.one_of_each
@pytest.mark.parametrize("numbers", KINDS)
@pytest.mark.parametrize(
    ("columns", "span", "dtype"),
    [
        (416, 32, torch.bfloat16),
        (256, 128, torch.float16),
        (320, 128, torch.bfloat16),
        (480, 96, torch.float16),
        (1, 1, torch.bfloat16),
        (77, 77, torch.float16),
        (304, 304, torch.bfloat16),
    ],
)
def test_few_and_many_rows(columns: int, span: int, dtype: torch.dtype, numbers: Floats, device: torch.device) -> None:
    if numbers == "e2m1" and columns % 16:
        columns = span = 80
    matrix = packed(77, columns, span, numbers, device)
    for multiply, rows in ((triton.linear_exact, 3), (triton.linear, 37)):
        x = activations(rows, columns, dtype, device)
        assert ratio(multiply(x, matrix), reference.linear(x, matrix)) < TOLERANCE


@pytest.mark.one_of_each
@pytest.mark.parametrize("numbers", FLOAT_NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_code_of_8_bits_is_exact(numbers: Floats, dtype: torch.dtype, device: torch.device) -> None:
    """A row for each code, with which a 1 and a 0 meet: the result is the number itself, or NaN, or infinite."""
    codes = torch.zeros(256, 64, dtype=torch.uint8)
    codes[:, 33] = torch.arange(256, dtype=torch.uint8)
    matrix = pack_floats(ScaledCodes(numbers, codes.numpy(), np.ones((256, 1), np.float32), 64), device)
    x = torch.zeros(2, 64, dtype=dtype, device=device)
    x[:, 33], x[:, 2] = 1, 1
    values = codes[:, 33].contiguous().view(DTYPES[FLOAT_NAMES[numbers]]).float()
    for multiply in KERNELS:
        got = multiply(x, matrix)[0].cpu()
        assert torch.equal(got.float().nan_to_num(7.7), values.nan_to_num(7.7))
        assert int(got.isnan().sum()) == (2 if numbers == "e4m3" else 6)
    x[:, 33] = 0
    for multiply in KERNELS:
        got = multiply(x, matrix)[0].cpu()
        assert torch.equal(got.isnan(), ~values.isfinite()), "infinite times 0, and NaN times 0"
        assert not got[values.isfinite()].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_code_of_4_bits_is_exact_with_every_scale(dtype: torch.dtype, device: torch.device) -> None:
    """A row for each scale of 16, a token for each code, at places that differ."""
    codes, groups = np.zeros((256, 64), np.uint8), np.full((256, 8), 0x38, np.uint8)
    places = [7 * code % 16 + 16 * (code % 8) for code in range(16)]
    for code, place in enumerate(places):
        codes[:, place // 2] |= code << 4 * (place % 2)
    groups[:] = np.arange(256, dtype=np.uint8)[:, None]
    found = ScaledCodes("e2m1", codes, np.ones((256, 1), np.float32), 128, groups)
    matrix, x = pack_floats(found, device), torch.zeros(16, 128, dtype=dtype, device=device)
    x[range(16), places] = 1
    wanted = torch.from_numpy(found.dequantise())[:, places].T
    assert len(set(places)) == 16
    assert wanted.isfinite().sum() == 16 * 254
    for multiply in KERNELS:
        got = multiply(x, matrix).cpu().float()
        assert torch.equal(got.isnan(), wanted.isnan())
        assert torch.equal(got.nan_to_num(7.7), wanted.nan_to_num(7.7))


@pytest.mark.parametrize(("span", "numbers"), [(32, "e4m3"), (64, "e4m3"), (128, "e4m3"), (256, "e2m1")])
def test_few_rows_are_exact_but_for_fp32(span: int, numbers: Floats, device: torch.device) -> None:
    """Scales of many digits, which the weights are not rounded with."""
    matrix = packed(33, 256, span, numbers, device)
    x = torch.randint(-4, 5, (2, 256), generator=torch.Generator().manual_seed(3)).to(device, torch.float16)
    got, wanted = triton.linear_exact(x, matrix), x.float() @ reference.dequantise(matrix).T
    assert ratio(got, wanted) < 3e-4  # what rounding the result to float16 costs


@pytest.mark.one_of_each
@pytest.mark.parametrize("numbers", ["e4m3", "e2m1"])
@pytest.mark.parametrize("form", ["one piece", "in parallel", "folded"])
def test_bias_and_cut_sums(form: str, numbers: Floats, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = packed(70, 1152, 128, numbers, device)
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


@pytest.mark.parametrize("numbers", ["e4m3", "e2m1"])
def test_a_row_does_not_depend_on_the_others(
    numbers: Floats, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, whatever T is; under the interpreter, whose products are numpy's, with tiles of one size."""
    matrix = packed(65, 640, 128, numbers, device)
    x = activations(16, 640, torch.bfloat16, device).contiguous()
    whole = triton.linear_exact(x, matrix)
    for count in (1, 2, 8, 9) if device.type == "cuda" else (12,):
        assert torch.equal(triton.linear_exact(x[:count], matrix), whole[:count])
    other = x.clone()
    other[1:] = torch.nan
    assert torch.equal(triton.linear_exact(other, matrix)[0], whole[0])
    assert torch.equal(triton.linear(other, matrix)[0], triton.linear(x, matrix)[0])
    monkeypatch.setattr(triton, "CODED_CUT", triton.CODED_CUT._replace(few=0, enough=1))
    assert torch.equal(triton.linear_exact(x, matrix), whole), "stretches in one program"
