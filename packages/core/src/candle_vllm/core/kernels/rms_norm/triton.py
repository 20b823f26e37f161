# SPDX-License-Identifier: MIT
"""RMSNorm on a GPU, also of sums and of heads (step 6 of a request's life).

A program has one row, or several short rows such as heads, in registers; rows beyond `_MOST` are read twice. The number
of rows of a program, and the order of a row's sum, depend on the length of a row alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from candle_vllm.core.kernels.triton_build import OPTIONS, cdiv, next_power_of_2

_MOST = 16384  # the longest row that is kept in registers
_PART = 4096  # elements of a longer row that are processed at a time
_SHORT = 1024  # elements of a program that has several rows


@triton.jit
def _total(x, residual, at_x, at_residual, inside, ADD: tl.constexpr):
    """Load the elements to normalise, fp32; with ADD, residual + x rounded to x's dtype."""
    values = tl.load(x + at_x, mask=inside, other=0.0)
    if ADD:
        more = tl.load(residual + at_residual, mask=inside, other=0.0)
        values = (values.to(tl.float32) + more.to(tl.float32)).to(values.dtype)
    return values.to(tl.float32)


@triton.jit(do_not_specialize=["rows", "eps"])
def rms_norm_kernel(
    x,  # [T, N, E], of any strides but the last
    residual,  # [T, N, E] as x, with ADD
    weight,  # [E], or [N, E] with APART
    y,  # [T, N, E] contiguous
    total,  # [T, N, E] contiguous, with ADD: residual + x
    x_token,  # strides
    x_head,
    residual_token,
    residual_head,
    rows,  # T * N
    eps,
    N: tl.constexpr,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    APART: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token, head, column = row // N, row % N, tl.arange(0, BLOCK)
    there = (row < rows)[:, None]
    from_x = (token * x_token + head * x_head)[:, None]
    from_residual = from_x
    if ADD:
        from_residual = (token * residual_token + head * residual_head)[:, None]
    to = row[:, None] * E
    own = weight + (head * E)[:, None] if APART else weight
    if BLOCK >= E:
        at = column[None, :]
        inside = there & (at < E)
        values = _total(x, residual, from_x + at, from_residual + at, inside, ADD)
        scale = tl.rsqrt(tl.sum(values * values, axis=1) / E + eps)
        factor = tl.load(own + at, mask=at < E, other=0.0).to(tl.float32)
        tl.store(y + to + at, (values * scale[:, None] * factor).to(y.dtype.element_ty), mask=inside)
        if ADD:
            tl.store(total + to + at, values.to(y.dtype.element_ty), mask=inside)
    else:
        squares = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in tl.range(0, E, BLOCK):
            at = start + column[None, :]
            values = _total(x, residual, from_x + at, from_residual + at, there & (at < E), ADD)
            squares += values * values
        scale = tl.rsqrt(tl.sum(squares, axis=1) / E + eps)
        for start in tl.range(0, E, BLOCK):
            at = start + column[None, :]
            inside = there & (at < E)
            values = _total(x, residual, from_x + at, from_residual + at, inside, ADD)
            factor = tl.load(own + at, mask=at < E, other=0.0).to(tl.float32)
            tl.store(y + to + at, (values * scale[:, None] * factor).to(y.dtype.element_ty), mask=inside)
            if ADD:
                tl.store(total + to + at, values.to(y.dtype.element_ty), mask=inside)


def rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the norm of x, or of residual + x, and this sum; see the contract in the package."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total, residual_strides = None, (0, 0)
    assert weight.is_contiguous()
    assert weight.ndim <= 2
    assert x.device == weight.device
    if residual is not None:
        assert residual.device == x.device
        total, residual = torch.empty_like(y), _as_heads(residual)
        residual_strides = residual.stride()[:2]
    x = _as_heads(x)
    tokens, heads, size = x.shape
    if x.numel():
        constants, num_warps = _form(heads, size, residual is not None, apart=weight.ndim == 2)
        rms_norm_kernel[(cdiv(tokens * heads, constants["ROWS"]),)](
            x,
            residual,
            weight,
            y,
            total,
            *x.stride()[:2],
            *residual_strides,
            tokens * heads,
            eps,
            **constants,
            num_warps=num_warps,
            **OPTIONS,
        )
    return y, total


def _as_heads(x: torch.Tensor) -> torch.Tensor:
    """Return x as [T, N, E] with contiguous rows, without a copy if possible."""
    x = x.unsqueeze(1) if x.dim() == 2 else x.reshape(x.shape[0], -1, x.shape[-1]) if x.dim() != 3 else x
    assert x.stride(2) == 1 or x.shape[2] == 1, "the elements of a row must be contiguous"
    return x


def _form(heads: int, size: int, add: bool, *, apart: bool = False) -> tuple[dict[str, Any], int]:
    """Return constants and warps: eight elements for each thread, sixteen in a block of 16384; not measured yet."""
    block = next_power_of_2(size) if size <= _MOST else _PART
    rows = max(1, _SHORT // block)
    constants = {"N": heads, "E": size, "ROWS": rows, "BLOCK": block, "ADD": add, "APART": apart}
    return constants, min(max(rows * block // 256, 4), 32 if size <= _MOST else 16)
