# SPDX-License-Identifier: MIT
"""Writing the paged cache: exact copies, nothing beside them, and fp8 with scales."""

from __future__ import annotations

import math

import pytest
import torch

from candle_vllm.core.kernels.kv_write import reference
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
    scales = [torch.tensor([value], device=device) for value in (0.25, 0.5)]
    got = [torch.zeros(2, 16, 2, 33, dtype=torch.float8_e4m3fn, device=device) for _ in range(2)]
    wanted = [cache.clone() for cache in got]
    slots = torch.tensor([3, 30, 7, 0, 16], device=device)
    kv_write(key, -key * 2, *got, slots, key_scale=scales[0], value_scale=scales[1])
    reference.kv_write(key, -key * 2, *wanted, slots, key_scale=scales[0], value_scale=scales[1])
    for a, b in zip(got, wanted):
        assert torch.equal(a.float(), b.float())
    assert got[0][0, 3, 0, :4].tolist() == [448.0, -448.0, 448.0, 0.0]


def test_a_layout_that_the_kernel_does_not_read_is_refused(device: torch.device) -> None:
    cache = torch.zeros(1, 16, 2, 8, device=device)
    turned = torch.zeros(3, 8, 2, device=device).transpose(1, 2)
    with pytest.raises(AssertionError):
        kv_write(turned, turned, cache, cache, torch.arange(3, device=device))
