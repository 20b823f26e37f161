# SPDX-License-Identifier: MIT
"""Norms of heads, rotary and the cache write in one launch, against one after the other."""

from __future__ import annotations

import math

import pytest
import torch

from candle_vllm.core.kernels.kv_write.scaled_rows import SCALE, read_blocks
from candle_vllm.core.kernels.rms_norm import HeadNorms
from candle_vllm.core.kernels.rotary_write import reference, rotary_write, triton

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 5e-3}
SIZE, BLOCKS = 4, 5


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(got: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    """RMS(error) / RMS(wanted) is small, and NaN stands where it should."""
    assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
    got, wanted = got.double(), wanted.double()
    assert torch.equal(got.isnan(), wanted.isnan()), "another slot was written, or one was left out"
    error, scale = (x.nan_to_num().square().mean().sqrt() for x in (got - wanted, wanted))
    assert float(error) <= tolerance * float(scale)


@pytest.fixture(autouse=True)
def nan_where_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.full(shape, math.nan, dtype=dtype, device=device)

    monkeypatch.setattr(torch, "empty", full)


@pytest.mark.one_of_each
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "rotated"), [(1, 1, 2, 2), (9, 3, 64, 64), (5, 5, 80, 32), (20, 7, 96, 74)]
)
def test_it_is_the_three_one_after_the_other(
    device: torch.device,
    dtype: torch.dtype,
    normed: bool,
    fp8: bool,
    heads: int,
    kv_heads: int,
    dim: int,
    rotated: int,
) -> None:
    if fp8 and device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("e4m3 needs compute capability 8.9")
    angles = torch.arange(50).unsqueeze(1) * torch.logspace(0, -2, rotated // 2)
    tables = angles.cos().to(device), angles.sin().to(device)
    fused = random(4, (heads + 2 * kv_heads) * dim + 3, dtype=dtype).to(device)[:, : (heads + 2 * kv_heads) * dim]
    q, k, v = (
        part.unflatten(1, (-1, dim)) for part in fused.split([heads * dim, kv_heads * dim, kv_heads * dim], dim=1)
    )
    positions = torch.tensor([49, 0, 7, 7], device=device)
    slots = torch.tensor([19, -1, 0, 6], device=device, dtype=torch.int32)
    norms = HeadNorms(random(dim, seed=1).to(device), random(dim, seed=2).to(device), 1e-5) if normed else None
    scales = tuple(torch.tensor([value], device=device) for value in (0.01, 3.0)) if fp8 else None
    kind = torch.float8_e4m3fn if fp8 else dtype
    results = []
    for write in (triton.rotary_write, reference.rotary_write):
        caches = [torch.full((BLOCKS, SIZE, kv_heads, dim), math.nan, device=device).to(kind) for _ in range(2)]
        out = write(q, k, v, positions, tables, caches, slots, norms=norms, cache_scales=scales)  # type: ignore[arg-type]
        results.append((out, *caches))
    for place, (got, wanted) in enumerate(zip(*results)):
        # A number that a norm's sum rounds differently may become the neighbouring one of the eight bits.
        check(got, wanted, 2e-2 if fp8 and place and normed else TOLERANCE[dtype])
    for row in range(4):
        one = [x[row : row + 1] for x in (q, k, v, positions)]
        nowhere = torch.full((1,), -1, device=device)
        alone = triton.rotary_write(*one, tables, tuple(caches), nowhere, norms=norms, cache_scales=scales)  # type: ignore[arg-type]
        assert torch.equal(alone[0], results[0][0][row]), "neighbours do not matter"


@pytest.mark.one_of_each
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn, torch.uint8])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "rotated"), [(9, 3, 64, 64), (5, 5, 80, 32), (20, 7, 96, 74)])
def test_rows_with_scales(
    device: torch.device,
    dtype: torch.dtype,
    normed: bool,
    kind: torch.dtype,
    heads: int,
    kv_heads: int,
    dim: int,
    rotated: int,
) -> None:
    if kind == torch.float8_e4m3fn and device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("e4m3 needs compute capability 8.9")
    angles = torch.arange(50).unsqueeze(1) * torch.logspace(0, -2, rotated // 2)
    tables = angles.cos().to(device), angles.sin().to(device)
    q, k, v = (random(4, count, dim, dtype=dtype, seed=count).to(device) for count in (heads, kv_heads, kv_heads))
    positions = torch.tensor([49, 0, 7, 7], device=device)
    slots = torch.tensor([19, -1, 0, 6], device=device, dtype=torch.int32)
    norms = HeadNorms(random(dim, seed=1).to(device), random(dim, seed=2).to(device), 1e-5) if normed else None
    results = []
    for write in (triton.rotary_write, reference.rotary_write):
        shape = (BLOCKS, SIZE, kv_heads, dim + SCALE)
        caches = [torch.full(shape, 255, dtype=torch.uint8, device=device).view(kind) for _ in range(2)]  # NaN
        out = write(q, k, v, positions, tables, tuple(caches), slots, norms=norms)
        results.append((out, *(read_blocks(cache, torch.arange(BLOCKS, device=device)) for cache in caches)))
    for place, (got, wanted) in enumerate(zip(*results)):
        # What is rounded differently before it may become the neighbouring code.
        check(got, wanted, 2e-2 if place else TOLERANCE[dtype])


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("fp8", [False, True])
def test_without_tables_nothing_turns(device: torch.device, normed: bool, fp8: bool) -> None:
    if fp8 and device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("e4m3 needs compute capability 8.9")
    heads, kv_heads, dim = 5, 2, 24
    fused = random(4, (heads + 2 * kv_heads) * dim, dtype=torch.bfloat16).to(device)
    q, k, v = (
        part.unflatten(1, (-1, dim)) for part in fused.split([heads * dim, kv_heads * dim, kv_heads * dim], dim=1)
    )
    positions, slots = (torch.tensor(x, device=device, dtype=torch.int32) for x in ([49, 0, 7, 7], [19, -1, 0, 6]))
    norms = HeadNorms(random(dim, seed=1).to(device), random(dim, seed=2).to(device), 1e-5) if normed else None
    scales = tuple(torch.tensor([value], device=device) for value in (0.01, 3.0)) if fp8 else None
    still = torch.ones(50, 1, device=device), torch.zeros(50, 1, device=device)
    kind = torch.float8_e4m3fn if fp8 else torch.bfloat16
    results = []
    for write, tables in ((rotary_write, None), (reference.rotary_write, still)):
        caches = [torch.full((BLOCKS, SIZE, kv_heads, dim), math.nan, device=device).to(kind) for _ in range(2)]
        out = write(q, k, v, positions, tables, caches, slots, norms=norms, cache_scales=scales)  # type: ignore[arg-type]
        results.append((out, *caches))
    for got, wanted in zip(*results):
        check(got, wanted, 2e-2 if fp8 and normed else TOLERANCE[torch.bfloat16])


def test_no_tokens_are_no_work(device: torch.device) -> None:
    none = torch.zeros(0, 2, 8, device=device)
    table, numbers = torch.ones(4, 4, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    cache = torch.zeros(1, 4, 2, 8, device=device)
    assert triton.rotary_write(none, none, none, numbers, (table, table), (cache, cache), numbers).shape == (0, 2, 8)
