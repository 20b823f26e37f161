# SPDX-License-Identifier: MIT
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false
"""Writing the paged cache on a GPU (step 6 of a request's life): one launch copies the keys and values of all tokens.

A program copies one token, all its heads, key and value. Slots are read on the device and tokens whose slot is negative
are left out, so that a captured step may be longer than what is scheduled.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from candle_vllm.core.kernels.triton_build import CAPABILITIES, OPTIONS, Build, cdiv, next_power_of_2

_MOST = 1024  # numbers that a program has in registers at a time


@triton.jit
def for_cache(x, scale, dtype: tl.constexpr, FP8: tl.constexpr, LARGEST: tl.constexpr):
    """Numbers as the cache of `dtype` holds them; `scale` points at one number where FP8."""
    if FP8:
        # Clamped, for a conversion may make a NaN of what is too large.
        x = x.to(tl.float32) / tl.load(scale)
        x = tl.clamp(x, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    return x.to(dtype)


@triton.jit
def kv_write_kernel(
    key,  # [T, W], W = K * D numbers of a token behind each other
    value,  # [T, W]
    key_cache,  # [B * S, W]
    value_cache,  # [B * S, W]
    slots,  # [T]
    key_scale,  # [1] fp32, read where FP8
    value_scale,  # [1] fp32
    key_stride,  # numbers from a token to the next
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
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
) -> None:
    """See the contract in the package. Slots may be int32 too; a token whose slot is negative is left out."""
    tokens, heads, dim = key.shape
    width = heads * dim
    fp8 = key_cache.dtype == torch.float8_e4m3fn
    for rows in (key, value):
        assert rows.stride()[1:] == (dim, 1), "the heads of a token lie behind each other"
    for cache in (key_cache, value_cache):
        assert cache.is_contiguous()
        assert cache.dtype == (torch.float8_e4m3fn if fp8 else key.dtype)
    assert value.dtype == key.dtype
    assert slots.shape == (tokens,)
    assert slots.stride() == (1,)
    assert slots.dtype in (torch.int32, torch.int64)
    assert len({x.device for x in (key, value, key_cache, value_cache, slots)}) == 1
    assert fp8 == (key_scale is not None) == (value_scale is not None), "a cache of fp8 has scales, others have none"
    if not tokens:
        return
    constants = _constants(width, fp8)
    kv_write_kernel[(tokens, cdiv(width, constants["CHUNK"]))](
        key,
        value,
        key_cache,
        value_cache,
        slots,
        key_scale,
        value_scale,
        key.stride(0),
        value.stride(0),
        **constants,
        num_warps=4,
        **OPTIONS,
    )


def _constants(width: int, fp8: bool) -> dict[str, int | float | bool]:
    chunk = min(next_power_of_2(width), _MOST)
    return {"W": width, "CHUNK": chunk, "FP8": fp8, "LARGEST": torch.finfo(torch.float8_e4m3fn).max}


def _build(dtype: str, cache: str, width: int) -> Build:
    fp8 = cache == "fp8e4nv"
    arguments = {"key": f"*{dtype}", "value": f"*{dtype}", "key_cache": f"*{cache}", "value_cache": f"*{cache}"}
    arguments |= {"slots": "*i64", "key_stride": "i32", "value_stride": "i32"}
    scales = ("key_scale", "value_scale")
    constants = {**_constants(width, fp8), **({} if fp8 else dict.fromkeys(scales))}
    return Build(
        kv_write_kernel,
        arguments | (dict.fromkeys(scales, "*fp32") if fp8 else {}),
        constants,
        aligned=("key_stride", "value_stride"),
        label=f"{dtype}-{cache}-{width}",
        # Triton converts to e4m3 from compute capability 8.9 on.
        capabilities=(90, 100, 120) if fp8 else CAPABILITIES,
    )


AOT = (
    _build("bf16", "bf16", 1024),
    _build("fp16", "fp16", 80),
    _build("fp32", "fp32", 640),
    _build("bf16", "fp8e4nv", 1024),
)
