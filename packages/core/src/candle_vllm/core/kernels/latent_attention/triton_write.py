# SPDX-License-Identifier: MIT
"""Write latent rows to the cache on a GPU: one program for each token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from candle_vllm.core.kernels.triton_build import OPTIONS, next_power_of_2


@triton.jit
def latent_write_kernel(
    rope,  # [T, R]
    latent,  # [T, L]
    cache,  # [B * S, R + L]
    slots,  # [T]
    rope_stride,
    latent_stride,
    R: tl.constexpr,
    L: tl.constexpr,
    RP: tl.constexpr,  # R rounded up to a power of two
    LP: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if slot >= 0:
        at = tl.arange(0, RP)
        row = cache + slot * (R + L)
        tl.store(row + at, tl.load(rope + token * rope_stride + at, mask=at < R), mask=at < R)
        at = tl.arange(0, LP)
        tl.store(row + R + at, tl.load(latent + token * latent_stride + at, mask=at < L), mask=at < L)


def latent_write(rope: torch.Tensor, latent: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    """See the contract in the package. Slots may also be int32."""
    assert rope.dtype == latent.dtype == cache.dtype
    assert rope.stride(1) == latent.stride(1) == 1
    assert cache.is_contiguous()
    assert slots.is_contiguous()
    assert slots.dtype in (torch.int32, torch.int64)
    assert all(x.device == cache.device for x in (rope, latent, slots))
    if len(slots):
        sizes = _constants(rope.shape[1], latent.shape[1])
        latent_write_kernel[(len(slots),)](
            rope, latent, cache, slots, rope.stride(0), latent.stride(0), **sizes, num_warps=4, **OPTIONS
        )


def _constants(rope: int, latent: int) -> dict[str, int]:
    return {"R": rope, "L": latent, "RP": next_power_of_2(max(1, rope)), "LP": next_power_of_2(latent)}
