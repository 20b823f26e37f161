# SPDX-License-Identifier: MIT
# pyright: reportCallIssue=false
"""The gates of SwiGLU and GeGLU on a GPU (step 6 of a request's life). A program does part of one token's row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from candle_vllm.core.kernels.triton_build import OPTIONS, Build, cdiv, next_power_of_2

_PART = 1024  # numbers of a program; not measured yet


@triton.jit
def gate_mul_kernel(
    x,  # [T, 2F], rows contiguous
    y,  # [T, F] contiguous
    x_stride,  # numbers from a token to the next
    F: tl.constexpr,
    BLOCK: tl.constexpr,
    GELU: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < F
    source = x + token * x_stride
    gate = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + F + at, mask=inside, other=0.0).to(tl.float32)
    inner = gate
    if GELU:
        # 0.5 (1 + tanh(z)) is the sigmoid of 2z; 2 sqrt(2 / pi) = 1.5957...
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    tl.store(y + token * F + at, (gate / (1.0 + tl.exp(-inner)) * up).to(y.dtype.element_ty), mask=inside)


def silu_mul(x: torch.Tensor) -> torch.Tensor:
    """See the contract in the package."""
    return _launch(x, gelu=False)


def gelu_tanh_mul(x: torch.Tensor) -> torch.Tensor:
    """See the contract in the package."""
    return _launch(x, gelu=True)


def _launch(x: torch.Tensor, *, gelu: bool) -> torch.Tensor:
    tokens, width = x.shape
    assert width % 2 == 0
    assert x.stride(1) == 1
    y = torch.empty(tokens, width // 2, dtype=x.dtype, device=x.device)
    if y.numel():
        constants = _constants(width // 2, gelu)
        grid = (tokens, cdiv(width // 2, constants["BLOCK"]))
        gate_mul_kernel[grid](x, y, x.stride(0), **constants, num_warps=4, **OPTIONS)
    return y


def _constants(size: int, gelu: bool) -> dict[str, int]:
    return {"F": size, "BLOCK": min(next_power_of_2(size), _PART), "GELU": gelu}


def _build(dtype: str, size: int, gelu: bool) -> Build:
    arguments = {"x": f"*{dtype}", "y": f"*{dtype}", "x_stride": "i32"}
    label = f"{dtype}-{size}{'-gelu' if gelu else ''}"
    return Build(gate_mul_kernel, arguments, _constants(size, gelu), aligned=("x_stride",), label=label)


AOT = (_build("bf16", 14336, False), _build("fp16", 1536, True), _build("fp32", 123, False))
