# SPDX-License-Identifier: MIT
"""Write the paged cache on a GPU (step 6 of a request's life): one launch copies the keys and values of all tokens.

A program copies up to `_MOST` elements of one token's key and value; in a cache with scaled rows, whole heads.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from candle_vllm.core.kernels.kv_write.scaled_rows import LARGEST, SCALE, has_row_scales
from candle_vllm.core.kernels.triton_build import OPTIONS, cdiv, next_power_of_2

_MOST = 1024  # maximum elements of a program, which are in registers


@triton.jit
def for_cache(x, scale, dtype: tl.constexpr, FP8: tl.constexpr, LARGEST: tl.constexpr):
    """Convert elements to the cache's `dtype`; with FP8, first divide them by the float32 at `scale` and clamp them."""
    if FP8:
        # Clamp, because a conversion may turn values that are too large into NaN.
        x = x.to(tl.float32) / tl.load(scale)
        x = tl.clamp(x, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    return x.to(dtype)


@triton.jit
def row_top(x):
    """Return the largest magnitude of each row of x [N, W] as the bits of float32 [N], which are largest for NaN."""
    return tl.max(x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)


@triton.jit
def row_scale(top, LARGEST: tl.constexpr):
    """Return the scales [N] fp32 of rows from `row_top`; see `scaled_rows`."""
    return tl.div_rn(top.to(tl.float32, bitcast=True), tl.full(top.shape, LARGEST, tl.float32))


@triton.jit
def e4m3_bits(x):
    """Convert float32 from -448 to 448 to the bits of float8_e4m3fn, uint8, nearest even; for GPUs without the type."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    code = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960
    # Below 2^-6 codes count steps of 2^-9, which is the last bit of a float32 from 2^14 on.
    steps = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return (tl.where(size < 0x3C800000, steps, code) | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def row_codes(x, scale, dtype: tl.constexpr, LARGEST: tl.constexpr):
    """Return rows x [N, W] divided by their scales [N], as codes of `dtype`."""
    x = x.to(tl.float32)
    over = tl.where(scale == 0.0, 1.0, scale)[:, None]
    x = tl.div_rn(x, tl.broadcast_to(over, x.shape))
    x = tl.clamp(tl.where(x == x, x, 0.0), -LARGEST, LARGEST)
    if dtype == tl.int8:
        x = x + 12582912.0 - 12582912.0  # rounds to nearest even, because the last bit of 1.5 * 2^23 is 1
    elif dtype == tl.uint8:
        x = e4m3_bits(x)
    return x.to(dtype)


@triton.jit
def row_place(slot, K: tl.constexpr, D: tl.constexpr, S: tl.constexpr, EXTRA: tl.constexpr):
    """Return the offset of a slot's elements; EXTRA bytes of scales follow the codes of each block."""
    place = slot * (K * D)
    if EXTRA:
        place += slot // S * EXTRA
    return place


@triton.jit
def scales_place(cache, slot, K: tl.constexpr, D: tl.constexpr, S: tl.constexpr):
    """Return the address of the scale of a slot's row of head 0; the scale of the next head is S elements later."""
    scales = cache.to(tl.pointer_type(tl.float32), bitcast=True)
    return scales + slot // S * (S * K * D // 4 + S * K) + S * K * D // 4 + slot % S


@triton.jit
def write_rows_kernel(
    key,  # [T, K, D]
    value,  # [T, K, D]
    key_cache,  # [B, S, K, D + 4], see `scaled_rows`
    value_cache,
    slots,  # [T]
    key_stride,  # elements from a token to the next
    value_stride,
    K: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    S: tl.constexpr,
    EXTRA: tl.constexpr,
    HEADS: tl.constexpr,  # heads of a program
    LARGEST: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if slot >= 0:
        heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
        dims = tl.arange(0, DP)[None, :]
        inside = (heads < K)[:, None] & (dims < D)
        at = heads[:, None] * D + dims
        place = row_place(slot, K, D, S, EXTRA)
        k = tl.load(key + token * key_stride + at, mask=inside, other=0.0)
        v = tl.load(value + token * value_stride + at, mask=inside, other=0.0)
        k_scale = row_scale(row_top(k), LARGEST)
        v_scale = row_scale(row_top(v), LARGEST)
        tl.store(key_cache + place + at, row_codes(k, k_scale, key_cache.dtype.element_ty, LARGEST), mask=inside)
        tl.store(value_cache + place + at, row_codes(v, v_scale, value_cache.dtype.element_ty, LARGEST), mask=inside)
        tl.store(scales_place(key_cache, slot, K, D, S) + heads * S, k_scale, mask=heads < K)
        tl.store(scales_place(value_cache, slot, K, D, S) + heads * S, v_scale, mask=heads < K)


@triton.jit
def kv_write_kernel(
    key,  # [T, W], W = K * D contiguous elements of a token
    value,  # [T, W]
    key_cache,  # [B * S, W]
    value_cache,  # [B * S, W]
    slots,  # [T]
    key_scale,  # [1] fp32, read with FP8
    value_scale,  # [1] fp32
    key_stride,  # elements from a token to the next
    value_stride,
    W: tl.constexpr,
    CHUNK: tl.constexpr,
    FP8: tl.constexpr,
    LARGEST: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if slot >= 0:
        at = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
        inside = at < W
        k = tl.load(key + token * key_stride + at, mask=inside, other=0.0)
        v = tl.load(value + token * value_stride + at, mask=inside, other=0.0)
        k = for_cache(k, key_scale, key_cache.dtype.element_ty, FP8, LARGEST)
        v = for_cache(v, value_scale, value_cache.dtype.element_ty, FP8, LARGEST)
        tl.store(key_cache + slot * W + at, k, mask=inside)
        tl.store(value_cache + slot * W + at, v, mask=inside)


def kv_write(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    cache_scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """See the contract in the package. Slots may also be int32; a token with a negative slot is skipped."""
    tokens, heads, dim = key.shape
    for rows in (key, value):
        assert rows.stride()[1:] == (dim, 1), "the heads of a token must be contiguous"
    check_caches((key_cache, value_cache), cache_scales, key)
    assert value.dtype == key.dtype
    assert slots.shape == (tokens,)
    assert slots.stride() == (1,)
    assert slots.dtype in (torch.int32, torch.int64)
    assert len({x.device for x in (key, value, slots)}) == 1
    if not tokens:
        return
    tensors, strides = (key, value, key_cache, value_cache, slots), (key.stride(0), value.stride(0))
    if has_row_scales(key_cache, dim):
        constants = _row_constants(heads, dim, key_cache.shape[1], LARGEST[key_cache.dtype])
        grid = tokens, cdiv(heads, constants["HEADS"])
        write_rows_kernel[grid](*tensors, *strides, **constants, num_warps=4, **OPTIONS)
        return
    constants = _constants(heads * dim, cache_scales is not None)
    grid, scales = (tokens, cdiv(heads * dim, constants["CHUNK"])), cache_scales or (None, None)
    kv_write_kernel[grid](*tensors, *scales, *strides, **constants, num_warps=4, **OPTIONS)


def check_caches(
    caches: tuple[torch.Tensor, torch.Tensor], cache_scales: tuple[torch.Tensor, torch.Tensor] | None, x: torch.Tensor
) -> None:
    """Check the caches of keys and of values, and their scales, for heads x [T, N, D]."""
    cache, dim = caches[0], x.shape[2]
    assert cache.shape == caches[1].shape
    assert cache.dtype == caches[1].dtype
    assert all(each.is_contiguous() for each in caches)
    if has_row_scales(cache, dim):
        assert cache_scales is None
        assert cache.dtype in LARGEST
        assert cache.shape[3] == dim + SCALE
        assert cache.shape[1] * cache.shape[2] * dim % SCALE == 0
    else:
        wanted = torch.float8_e4m3fn if cache_scales else x.dtype
        assert cache.dtype == wanted, "a cache of fp8 has scales, others have none"
    assert all(each.device == x.device for each in (*caches, *(cache_scales or ())))


def _row_constants(heads: int, dim: int, size: int, largest: float) -> dict[str, Any]:
    padded = next_power_of_2(dim)
    return {
        "K": heads,
        "D": dim,
        "DP": padded,
        "S": size,
        "EXTRA": SCALE * size * heads,
        "HEADS": min(max(1, _MOST // padded), next_power_of_2(heads)),
        "LARGEST": largest,
    }


def _constants(width: int, fp8: bool) -> dict[str, Any]:
    chunk = min(next_power_of_2(width), _MOST)
    return {"W": width, "CHUNK": chunk, "FP8": fp8, "LARGEST": torch.finfo(torch.float8_e4m3fn).max}
