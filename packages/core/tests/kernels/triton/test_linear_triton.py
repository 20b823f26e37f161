# SPDX-License-Identifier: MIT
"""Linear layers with plain weights: what the kernels give, and that a row's bits are its own.

Under the interpreter a product of tiles is numpy's, whose order of sums depends on the tile. Whole numbers, which
float32 adds without rounding, leave only what is the kernels' own: which numbers meet, and the order in which
stretches are added. Bits of other numbers are compared on a GPU.
"""

from __future__ import annotations

import types

import pytest
import torch

from candle_vllm.core.kernels.linear import linear, reference, triton

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 5e-3}
DTYPES = list(TOLERANCE)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def numbers(rows: int, columns: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Rows of a wider tensor."""
    wide = torch.randn(rows, columns + 16, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return wide.to(device)[:, :columns]


def ratio(got: torch.Tensor, wanted: torch.Tensor) -> float:
    error = got.float() - wanted.float()
    return float(error.pow(2).mean().sqrt() / wanted.float().pow(2).mean().sqrt())


def exact(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    y = x.double() @ weight.double().T
    return y if bias is None else y + bias.double()


@pytest.fixture(autouse=True)
def nan_where_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' outputs and partial sums are NaN before they run."""

    def empty(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.full(shape, torch.nan, dtype=dtype, device=device)

    stand_in = types.SimpleNamespace(**{name: getattr(torch, name) for name in dir(torch) if name[0] != "_"})
    stand_in.empty = empty
    monkeypatch.setattr(triton, "torch", stand_in)


@pytest.fixture(params=["in parallel", "one after the other"])
def stretches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short stretches, made in both ways whatever the number of tokens is."""
    enough = 10**9 if request.param == "in parallel" else 0
    monkeypatch.setattr(triton, "CUT", triton.CUT._replace(least=1, enough=enough))


@pytest.mark.one_of_each
@each_dtype
@pytest.mark.parametrize(
    ("tokens", "rows", "columns"), [(1, 1, 1), (3, 63, 64), (16, 65, 123), (37, 70, 320), (131, 129, 123)]
)
@pytest.mark.usefixtures("stretches")
def test_any_shape(dtype: torch.dtype, tokens: int, rows: int, columns: int, device: torch.device) -> None:
    x, weight = numbers(tokens, columns, dtype, device), numbers(rows, columns, dtype, device, 1)
    bias = numbers(1, rows, dtype, device, 2)[0] * 30
    assert ratio(triton.linear(x, weight), exact(x, weight)) < TOLERANCE[dtype]
    assert ratio(triton.linear(x, weight, bias), exact(x, weight, bias)) < TOLERANCE[dtype]


@pytest.mark.parametrize(("tokens", "rows", "columns"), [(3, 63, 64), (37, 70, 123)])
@pytest.mark.usefixtures("stretches", "turing")
def test_without_tensor_cores(tokens: int, rows: int, columns: int, device: torch.device) -> None:
    x, weight = numbers(tokens, columns, torch.float16, device), numbers(rows, columns, torch.float16, device, 1)
    assert ratio(triton.linear(x, weight), exact(x, weight)) < TOLERANCE[torch.float16]


def test_more_tiles_of_rows_than_are_taken_together(device: torch.device) -> None:
    x, weight = numbers(131, 40, torch.float16, device), numbers(1283, 40, torch.float16, device, 1)
    for invariant in (False, True):
        got = triton.linear(x, weight, invariant=invariant)
        assert ratio(got, exact(x, weight)) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.usefixtures("stretches")
def test_layers_write_side_by_side(invariant: bool, bias: bool, device: torch.device) -> None:
    dtype, total = torch.bfloat16, 9 + 70 + 33
    x = numbers(5, 128, dtype, device)
    whole = torch.full((7, total), torch.nan, dtype=dtype, device=device)
    start, wanted = 0, []
    for rows in (9, 70, 33):
        weight = numbers(rows, 128, dtype, device, rows)
        b = numbers(1, rows, dtype, device, 2)[0].contiguous() if bias else None
        part = whole[1:6, start : start + rows]
        assert linear(x, weight, b, out=part, invariant=invariant) is part
        wanted.append(exact(x, weight, b))
        start += rows
    assert ratio(whole[1:6], torch.cat(wanted, 1)) < TOLERANCE[dtype]
    assert whole[0].isnan().all()
    assert whole[6].isnan().all()


def test_stretches_are_added_in_order_both_ways(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole numbers of very different size in each stretch: every stretch's sum is exact, their sum is not."""
    cut = triton.CUT
    tokens, rows, splits = 70, 33, 6
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-8, 9, (tokens, splits * 64), generator=generator).float().to(device)
    weight = torch.randint(-8, 9, (rows, splits * 64), generator=generator).float().to(device)
    for split in range(splits):
        weight[:, split * 64 : split * 64 + 64] *= 3.0 ** (7 * (split % 2)) * 2.0 ** (3 * split)
    parts = [x[:, k : k + 64] @ weight[:, k : k + 64].T for k in range(0, splits * 64, 64)]
    wanted, other = torch.zeros_like(parts[0]), torch.zeros_like(parts[0])
    for part, last in zip(parts, reversed(parts), strict=True):
        wanted += part
        other += last
    assert not torch.equal(wanted, other)
    for enough in (10**9, 0):
        monkeypatch.setattr(triton, "CUT", cut._replace(least=1, enough=enough))
        assert torch.equal(triton.linear(x, weight), wanted)
        for first, count in ((0, 1), (3, 5), (40, 17)):
            assert torch.equal(triton.linear(x[first : first + count], weight), wanted[first : first + count])


@each_dtype
def test_a_row_is_its_own_whatever_stands_beside_it(dtype: torch.dtype, device: torch.device) -> None:
    x, weight = numbers(20, 300, dtype, device).clone(), numbers(40, 300, dtype, device, 1)
    wanted = triton.linear(x, weight)[4]
    x[:4], x[5:] = torch.nan, torch.nan
    assert torch.equal(triton.linear(x, weight)[4], wanted)


@each_dtype
@pytest.mark.parametrize(("rows", "columns"), [(129, 1000), (1024, 3072), (6144, 4096)])
def test_bits_of_a_row_for_any_number_of_rows(
    dtype: torch.dtype, rows: int, columns: int, device: torch.device
) -> None:
    """Real numbers: only a GPU's own products can show it."""
    if device.type != "cuda":
        pytest.skip("numpy's products depend on the tile")
    x, weight = numbers(4096, columns, dtype, device), numbers(rows, columns, dtype, device, 1)
    bias = numbers(1, rows, dtype, device, 2)[0].contiguous()
    whole = linear(x, weight, bias, invariant=True)
    for count in (1, 2, 5, 16, 17, 32, 33, 64, 70, 128, 129, 511, 1024):
        for first in (0, 4096 - count):
            some = x[first : first + count]
            assert torch.equal(linear(some, weight, bias, invariant=True), whole[first : first + count])
            packed = some.contiguous()
            assert torch.equal(linear(packed, weight, bias, invariant=True), whole[first : first + count])


def test_the_promise_picks_our_kernel(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[bool] = []

    def stand_in(x: torch.Tensor, *_: object, invariant: bool, **__: object) -> torch.Tensor:
        called.append(invariant)
        return x

    monkeypatch.setattr(triton, "linear", stand_in)
    x, weight = numbers(2, 16, torch.float16, device), numbers(4, 16, torch.float16, device)
    linear(x, weight)
    linear(x, weight, invariant=True)
    assert called == [True]


def test_no_rows(device: torch.device) -> None:
    weight = numbers(4, 16, torch.float16, device)
    assert triton.linear(weight[:0], weight).shape == (0, 4)


def test_what_the_kernel_does_not_read_is_refused(device: torch.device) -> None:
    weight = numbers(4, 16, torch.float16, device)
    x = numbers(16, 3, torch.float16, device).T
    out = numbers(2, 4, torch.float16, device)
    for bad in (
        lambda: triton.linear(x, weight),
        lambda: triton.linear(weight.float(), weight),
        lambda: triton.linear(weight.double(), weight.double()),
        lambda: triton.linear(weight, weight, out=out),
        lambda: triton.linear(weight, weight, out=numbers(4, 4, torch.float32, device)),
        lambda: triton.linear(weight, weight, weight[0]),
    ):
        with pytest.raises(AssertionError):
            bad()


@pytest.mark.parametrize("splits", [1, 7])
def test_merging(splits: int, device: torch.device) -> None:
    partial = numbers(splits * 3, 259, torch.float32, device).contiguous().view(splits, 3, 259)
    bias = numbers(1, 259, torch.float16, device)[0].contiguous()
    out = torch.full((3, 300), torch.nan, dtype=torch.float16, device=device)
    triton.merge(partial, bias, out[:, 20:279])
    wanted = torch.zeros(3, 259, device=device)
    for part in partial:
        wanted += part
    assert torch.equal(out[:, 20:279], (wanted + bias.float()).half())
    assert out[:, :20].isnan().all()
    assert out[:, 279:].isnan().all()


def test_reference_is_what_is_compared_with(device: torch.device) -> None:
    x, weight = numbers(5, 40, torch.float32, device), numbers(7, 40, torch.float32, device, 1)
    assert ratio(reference.linear(x, weight), exact(x, weight)) < 1e-5


@pytest.mark.parametrize(("blocks", "tiles"), [(64, 64), (64, 96), (224, 64), (64, 448), (48, 16), (1, 1), (3, 9)])
def test_sums_are_cut_into_whole_blocks(blocks: int, tiles: int) -> None:
    each = triton.split_blocks(blocks, tiles, 264, 4)
    splits = -(-blocks // each)
    assert min(4, blocks) <= each <= blocks
    assert splits <= triton.MOST_SPLITS
    assert (splits - 1) * each < blocks
    assert splits == 1 or tiles * splits <= 264
