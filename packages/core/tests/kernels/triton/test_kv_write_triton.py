# SPDX-License-Identifier: MIT
"""Writing the paged cache: exact copies, nothing beside them, and 8 bits with scales."""

from __future__ import annotations

import math

import pytest
import torch

from candle_vllm.core.kernels.kv_write import reference
from candle_vllm.core.kernels.kv_write.scaled_rows import codes_and_scales, read_blocks
from candle_vllm.core.kernels.kv_write.triton import kv_write


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.one_of_each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("slot_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(1, 1, 80), (5, 3, 96), (7, 9, 123)])
def test_copies_and_touches_nothing_else(
    device: torch.device, dtype: torch.dtype, slot_dtype: torch.dtype, tokens: int, heads: int, dim: int
) -> None:
    caches = [torch.full((3, 16, heads, dim), math.nan, dtype=dtype, device=device) for _ in range(4)]
    fused = random(tokens, 3 * heads, dim, dtype=dtype).to(device)
    key, value = fused[:, :heads], fused[:, heads : 2 * heads]
    slots = torch.randperm(48, generator=torch.Generator().manual_seed(1))[:tokens].to(device)
    reference.kv_write(key, value, caches[0], caches[1], slots)
    kv_write(key, value, caches[2], caches[3], slots.to(slot_dtype))
    for got, wanted in ((caches[2], caches[0]), (caches[3], caches[1])):
        assert torch.equal(got.nan_to_num(7.0), wanted.nan_to_num(7.0))
        assert int(wanted.isnan().sum()) == (48 - tokens) * heads * dim


def test_negative_slots_are_left_out(device: torch.device) -> None:
    key = torch.ones(3, 1, 16, device=device)
    caches = [torch.zeros(1, 4, 1, 16, device=device) for _ in range(2)]
    kv_write(key, key, *caches, torch.tensor([2, -1, -1], device=device))
    assert [int(row.sum()) for row in caches[0][0]] == [0, 0, 16, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_scales_rounds_and_saturates(device: torch.device, dtype: torch.dtype) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("e4m3 needs compute capability 8.9")
    key = (random(5, 2, 33, dtype=torch.float32) * 100).to(dtype)
    key[0, 0, :4] = torch.tensor([1e5, -1e5, 112.0, 0.0])
    key = key.to(device)
    scales = torch.tensor([0.25], device=device), torch.tensor([0.5], device=device)
    got = [torch.zeros(2, 16, 2, 33, dtype=torch.float8_e4m3fn, device=device) for _ in range(2)]
    wanted = [cache.clone() for cache in got]
    slots = torch.tensor([3, 30, 7, 0, 16], device=device)
    kv_write(key, -key * 2, *got, slots, cache_scales=scales)
    reference.kv_write(key, -key * 2, *wanted, slots, cache_scales=scales)
    for a, b in zip(got, wanted):
        assert torch.equal(a.float(), b.float())
    assert got[0][0, 3, 0, :4].tolist() == [448.0, -448.0, 448.0, 0.0]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn, torch.uint8])
def test_rows_with_scales_are_those_of_the_reference(
    device: torch.device, dtype: torch.dtype, kind: torch.dtype
) -> None:
    """To the byte: zeros, halves between two codes, small and large numbers, and rows with what is no number."""
    if kind == torch.float8_e4m3fn and device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("e4m3 needs compute capability 8.9")
    key = random(6, 3, 33, dtype=dtype)
    key[0, 0], key[0, 1], key[0, 2] = 0, 1e-3 * key[0, 1] ** 5, 1e4 * key[0, 2]
    key[1, 0, :6] = torch.tensor([127.0, 0.5, 1.5, -2.5, -0.5, 63.5])  # over a scale of 1 in int8
    key[1, 1, :6] = torch.tensor([448.0, 2**-9, 1.5 * 2**-9, 2**-10, 27 / 16, -29 / 16])
    key[1, 0, 6:] = key[1, 1, 6:] = 0
    key[2, 0, 3], key[2, 1, 4] = math.nan, math.inf
    key = key.to(device)
    got = [torch.full((2, 16, 3, 37), 99, dtype=torch.uint8, device=device).view(kind) for _ in range(2)]
    wanted = [cache.clone() for cache in got]
    slots = torch.tensor([3, 30, 7, 0, 16, -1], device=device)
    kv_write(key, key * 3, *got, slots)
    reference.kv_write(key, key * 3, *wanted, slots)
    for one, other in zip(got, wanted):
        codes, scales = codes_and_scales(one)
        assert torch.equal(codes, codes_and_scales(other)[0])
        assert torch.equal(scales.nan_to_num(7.0), codes_and_scales(other)[1].nan_to_num(7.0))
    rows = read_blocks(got[0], torch.arange(2, device=device)).flatten(0, 1)[slots[:5]].cpu()
    assert rows[2, :2].isnan().all()
    assert (rows[0, 0] == 0).all()
    assert rows[1, 0, :6].tolist() == [127, 0, 2, -2, 0, 64] or kind != torch.int8
    there = torch.ones(5, 3, dtype=torch.bool)
    there[2, :2] = False
    gone = (rows - key[:5].float().cpu())[there].abs().amax(1)
    step = 1 / 250 if kind == torch.int8 else 1 / 27  # half a step of the largest number
    assert (gone <= step * key[:5].float().cpu()[there].abs().amax(1)).all()


def test_a_layout_that_the_kernel_does_not_read_is_refused(device: torch.device) -> None:
    cache = torch.zeros(1, 16, 2, 8, device=device)
    turned = torch.zeros(3, 8, 2, device=device).transpose(1, 2)
    with pytest.raises(AssertionError):
        kv_write(turned, turned, cache, cache, torch.arange(3, device=device))
