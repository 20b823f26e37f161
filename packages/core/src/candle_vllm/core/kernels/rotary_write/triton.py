# SPDX-License-Identifier: MIT
"""Norms of heads, rotary embedding and the cache write on a GPU (step 6 of a request's life): one launch for a layer.

A program processes some heads of one token: queries, or keys and values.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from candle_vllm.core.kernels.kv_write.scaled_rows import LARGEST, SCALE, has_row_scales
from candle_vllm.core.kernels.kv_write.triton import (
    check_caches,
    for_cache,
    row_codes,
    row_place,
    row_scale,
    row_top,
    scales_place,
)
from candle_vllm.core.kernels.rms_norm import HeadNorms
from candle_vllm.core.kernels.rotary.triton import check_tables
from candle_vllm.core.kernels.triton_build import OPTIONS, cdiv, next_power_of_2

_LARGEST = torch.finfo(torch.float8_e4m3fn).max
_PAIRS = 256  # pairs of a program; not measured yet


@triton.jit
def _heads(
    x,  # a token's heads
    head_stride,
    weight,  # [D] fp32, with NORM
    eps,
    head,  # [HEADS, 1]
    cosines,  # [1, HALVES]
    sines,
    COUNT: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    HALVES: tl.constexpr,
    RESTS: tl.constexpr,
    NORM: tl.constexpr,
):
    """Load heads, normed and rotated: both halves of the rotated part [HEADS, HALVES], and the rest [HEADS, RESTS]."""
    pair = tl.arange(0, HALVES)[None, :]
    beyond = 2 * HALF + tl.arange(0, RESTS)[None, :]
    source = x + head.to(tl.int64) * head_stride
    inside = (head < COUNT) & (pair < HALF)
    a = tl.load(source + pair, mask=inside, other=0.0)
    b = tl.load(source + HALF + pair, mask=inside, other=0.0)
    rest = tl.load(source + beyond, mask=(head < COUNT) & (beyond < D), other=0.0)
    if NORM:
        dtype: tl.constexpr = x.dtype.element_ty
        a, b, rest = a.to(tl.float32), b.to(tl.float32), rest.to(tl.float32)
        squares = tl.sum(a * a, 1) + tl.sum(b * b, 1) + tl.sum(rest * rest, 1)
        scale = tl.rsqrt(squares / D + eps)[:, None]
        a = (a * scale * tl.load(weight + pair, mask=pair < HALF, other=0.0)).to(dtype)
        b = (b * scale * tl.load(weight + HALF + pair, mask=pair < HALF, other=0.0)).to(dtype)
        rest = (rest * scale * tl.load(weight + beyond, mask=beyond < D, other=0.0)).to(dtype)
    a, b = a.to(tl.float32), b.to(tl.float32)
    return a * cosines - b * sines, b * cosines + a * sines, rest


@triton.jit(do_not_specialize=["eps"])
def rotary_write_kernel(
    q,  # [T, H, D]
    k,  # [T, K, D]
    v,  # [T, K, D]
    q_out,  # [T, H, D] contiguous
    key_cache,  # [B * S, K, D], or with EXTRA the layout of `kv_write/scaled_rows`
    value_cache,
    slots,  # [T]
    positions,  # [T]
    cos,  # [P, HALF] contiguous, fp32
    sin,
    q_weight,  # [D] fp32, with NORM
    k_weight,
    key_scale,  # [1] fp32, read with FP8
    value_scale,
    eps,
    q_token,  # strides
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    HALVES: tl.constexpr,  # HALF, D - 2 * HALF and D, rounded up to powers of two
    RESTS: tl.constexpr,
    DP: tl.constexpr,
    HEADS: tl.constexpr,  # heads of a program
    NORM: tl.constexpr,
    FP8: tl.constexpr,
    LARGEST: tl.constexpr,
    S: tl.constexpr,  # slots of a block, with EXTRA
    EXTRA: tl.constexpr,  # bytes of scales in a block
):
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    parts: tl.constexpr = (H + HEADS - 1) // HEADS  # programs for the queries
    dtype: tl.constexpr = q.dtype.element_ty
    pair = tl.arange(0, HALVES)[None, :]
    beyond = 2 * HALF + tl.arange(0, RESTS)[None, :]
    at = tl.load(positions + token).to(tl.int64) * HALF + pair
    cosines = tl.load(cos + at, mask=pair < HALF, other=0.0)
    sines = tl.load(sin + at, mask=pair < HALF, other=0.0)
    if part < parts:
        head = part * HEADS + tl.arange(0, HEADS)[:, None]
        a, b, rest = _heads(
            q + token * q_token, q_head, q_weight, eps, head, cosines, sines, H, D, HALF, HALVES, RESTS, NORM
        )
        there = head < H
        target = q_out + token * (H * D) + head * D
        tl.store(target + pair, a.to(dtype), mask=there & (pair < HALF))
        tl.store(target + HALF + pair, b.to(dtype), mask=there & (pair < HALF))
        tl.store(target + beyond, rest.to(dtype), mask=there & (beyond < D))
    else:
        slot = tl.load(slots + token).to(tl.int64)
        if slot >= 0:
            heads = (part - parts) * HEADS + tl.arange(0, HEADS)
            head = heads[:, None]
            a, b, rest = _heads(
                k + token * k_token, k_head, k_weight, eps, head, cosines, sines, K, D, HALF, HALVES, RESTS, NORM
            )
            there = head < K
            place = row_place(slot, K, D, S, EXTRA) + head * D
            target = key_cache + place
            stored: tl.constexpr = key_cache.dtype.element_ty
            a, b = a.to(dtype), b.to(dtype)
            if EXTRA:
                scale = row_scale(tl.maximum(tl.maximum(row_top(a), row_top(b)), row_top(rest)), LARGEST)
                tl.store(scales_place(key_cache, slot, K, D, S) + heads * S, scale, mask=heads < K)
                a = row_codes(a, scale, stored, LARGEST)
                b = row_codes(b, scale, stored, LARGEST)
                rest = row_codes(rest, scale, stored, LARGEST)
            else:
                a = for_cache(a, key_scale, stored, FP8, LARGEST)
                b = for_cache(b, key_scale, stored, FP8, LARGEST)
                rest = for_cache(rest, key_scale, stored, FP8, LARGEST)
            tl.store(target + pair, a, mask=there & (pair < HALF))
            tl.store(target + HALF + pair, b, mask=there & (pair < HALF))
            tl.store(target + beyond, rest, mask=there & (beyond < D))
            column = tl.arange(0, DP)[None, :]
            inside = there & (column < D)
            values = tl.load(v + token * v_token + head.to(tl.int64) * v_head + column, mask=inside, other=0.0)
            if EXTRA:
                scale = row_scale(row_top(values), LARGEST)
                tl.store(scales_place(value_cache, slot, K, D, S) + heads * S, scale, mask=heads < K)
                values = row_codes(values, scale, stored, LARGEST)
            else:
                values = for_cache(values, value_scale, stored, FP8, LARGEST)
            tl.store(value_cache + place + column, values, mask=inside)


def rotary_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    caches: tuple[torch.Tensor, torch.Tensor],
    slots: torch.Tensor,
    *,
    norms: HeadNorms | None = None,
    cache_scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """See the contract in the package. Positions and slots may also be int32."""
    tokens, heads, dim = q.shape
    _check(q, k, v, positions, tables, caches, slots, norms, cache_scales)
    out = torch.empty((tokens, heads, dim), dtype=q.dtype, device=q.device)
    if not tokens:
        return out
    kv_heads = k.shape[1]
    size = caches[0].shape[1] if has_row_scales(caches[0], dim) else 0
    largest = LARGEST[caches[0].dtype] if size else _LARGEST
    constants = _constants(heads, kv_heads, dim, tables[0].shape[1], norms is not None, cache_scales is not None)
    constants |= _row_constants(kv_heads, size, largest)
    parts = cdiv(heads, constants["HEADS"]) + cdiv(kv_heads, constants["HEADS"])
    tensors = q, k, v, out, *caches, slots, positions, *tables
    weights, eps = (norms[:2], norms.eps) if norms else ((None, None), 0.0)
    scales = cache_scales or (None, None)
    strides = (stride for x in (q, k, v) for stride in x.stride()[:2])
    rotary_write_kernel[(tokens, parts)](
        *tensors, *weights, *scales, eps, *strides, **constants, num_warps=4, **OPTIONS
    )
    return out


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    caches: tuple[torch.Tensor, torch.Tensor],
    slots: torch.Tensor,
    norms: HeadNorms | None,
    cache_scales: tuple[torch.Tensor, torch.Tensor] | None,
) -> None:
    tokens, _, dim = q.shape
    for x in (q, k, v):
        assert x.stride(2) == 1
    check_tables(positions, tables, tokens)
    assert slots.shape == (tokens,)
    assert slots.is_contiguous()
    assert slots.dtype in (torch.int32, torch.int64)
    check_caches(caches, cache_scales, q)
    for weight in norms[:2] if norms else ():
        assert weight.shape == (dim,)
        assert weight.is_contiguous()
        assert weight.dtype == torch.float32
    tensors = (k, v, positions, slots, *tables, *(norms[:2] if norms else ()))
    assert all(x.device == q.device for x in tensors)


def _constants(heads: int, kv_heads: int, dim: int, half: int, norm: bool, fp8: bool) -> dict[str, Any]:
    halves, rests = next_power_of_2(half), next_power_of_2(max(dim - 2 * half, 1))
    return {
        "H": heads,
        "K": kv_heads,
        "D": dim,
        "HALF": half,
        "HALVES": halves,
        "RESTS": rests,
        "DP": next_power_of_2(dim),
        "HEADS": min(max(1, _PAIRS // halves), next_power_of_2(heads)),
        "NORM": norm,
        "FP8": fp8,
    }


def _row_constants(kv_heads: int, size: int, largest: float) -> dict[str, Any]:
    """Return constants; `size` is the block size of a cache whose rows have scales, else 0."""
    return {"LARGEST": largest, "S": size or 1, "EXTRA": SCALE * size * kv_heads}
