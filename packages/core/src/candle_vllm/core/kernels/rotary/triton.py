# SPDX-License-Identifier: MIT
"""Rotary position embedding on a GPU (step 6 of a request's life): one launch for the queries and keys of a layer.

A program rotates some heads of one token. All arithmetic is elementwise, so nothing depends on the batch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from candle_vllm.core.kernels.triton_build import OPTIONS, cdiv, next_power_of_2

_PAIRS = 512  # pairs of a program; not measured yet


@triton.jit
def _turn(x, head_stride, y, first, cosines, sines, COUNT, D: tl.constexpr, HALF, HALVES, RESTS, HEADS):
    """Write HEADS heads of x [COUNT, D] from `first` on to y [COUNT, D], their first 2 * HALF dimensions rotated."""
    head = first + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, HALVES)[None, :]
    inside = (head < COUNT) & (pair < HALF)
    source, target = x + head.to(tl.int64) * head_stride, y + head * D
    a = tl.load(source + pair, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + HALF + pair, mask=inside, other=0.0).to(tl.float32)
    tl.store(target + pair, (a * cosines - b * sines).to(y.dtype.element_ty), mask=inside)
    tl.store(target + HALF + pair, (b * cosines + a * sines).to(y.dtype.element_ty), mask=inside)
    if 2 * HALF < D:
        rest = 2 * HALF + tl.arange(0, RESTS)[None, :]
        inside = (head < COUNT) & (rest < D)
        tl.store(target + rest, tl.load(source + rest, mask=inside), mask=inside)


@triton.jit
def rotary_kernel(
    q,  # [T, H, D]
    k,  # [T, K, D]; not read if K is 0
    q_out,  # [T, H, D] contiguous
    k_out,  # [T, K, D] contiguous
    positions,  # [T]
    cos,  # [P, HALF] contiguous, fp32
    sin,
    q_token,  # strides
    q_head,
    k_token,
    k_head,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    HALVES: tl.constexpr,  # HALF and D - 2 * HALF, rounded up to powers of two
    RESTS: tl.constexpr,
    HEADS: tl.constexpr,  # heads of a program
):
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    parts: tl.constexpr = (H + HEADS - 1) // HEADS  # programs for the queries
    pair = tl.arange(0, HALVES)[None, :]
    at = tl.load(positions + token).to(tl.int64) * HALF + pair
    cosines = tl.load(cos + at, mask=pair < HALF, other=0.0)
    sines = tl.load(sin + at, mask=pair < HALF, other=0.0)
    if part < parts:
        x, y = q + token * q_token, q_out + token * H * D
        _turn(x, q_head, y, part * HEADS, cosines, sines, H, D, HALF, HALVES, RESTS, HEADS)
    elif K > 0:
        x, y = k + token * k_token, k_out + token * K * D
        _turn(x, k_head, y, (part - parts) * HEADS, cosines, sines, K, D, HALF, HALVES, RESTS, HEADS)


def rotary(
    q: torch.Tensor, k: torch.Tensor | None, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rotate the heads of q, and of k if there is one; see the contract in the package. Positions may also be int32."""
    tokens, heads, dim = q.shape
    assert q.stride(2) == 1
    check_tables(positions, (cos, sin), tokens)
    assert len({x.device for x in (q, positions, cos, sin)}) == 1
    if k is not None:
        assert k.device == q.device
        assert k.stride(2) == 1
    kv_heads, k_strides = (0, (0, 0)) if k is None else (k.shape[1], k.stride()[:2])
    q_out, k_out = (None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    assert q_out is not None
    if not tokens:
        return q_out, k_out
    constants = _constants(heads, kv_heads, dim, cos.shape[1])
    parts = cdiv(heads, constants["HEADS"]) + cdiv(kv_heads, constants["HEADS"])
    rotary_kernel[(tokens, parts)](
        q, k, q_out, k_out, positions, cos, sin, *q.stride()[:2], *k_strides, **constants, num_warps=4, **OPTIONS
    )
    return q_out, k_out


def check_tables(positions: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor], tokens: int) -> None:
    """Check the positions of a step, and cos and sin."""
    assert positions.shape == (tokens,)
    assert positions.is_contiguous()
    assert positions.dtype in (torch.int32, torch.int64)
    for table in tables:
        assert table.shape == tables[0].shape
        assert table.is_contiguous()
        assert table.dtype == torch.float32


def _constants(heads: int, kv_heads: int, dim: int, half: int) -> dict[str, Any]:
    halves, rests = next_power_of_2(half), next_power_of_2(max(dim - 2 * half, 1))
    sizes = {"H": heads, "K": kv_heads, "D": dim, "HALF": half, "HALVES": halves, "RESTS": rests}
    return sizes | {"HEADS": min(max(1, _PAIRS // halves), next_power_of_2(heads))}
