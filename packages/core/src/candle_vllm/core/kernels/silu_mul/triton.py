# SPDX-License-Identifier: MIT
"""Activation-and-multiply on a GPU (step 6 of a request's life). A program computes part of one token's row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from candle_vllm.core.kernels.recorded import GateKind
from candle_vllm.core.kernels.triton_build import OPTIONS, cdiv, next_power_of_2

_PART = 1024  # elements of a program; not measured yet
KINDS = ("silu", "gelu_tanh", "sigmoid", "softplus", "swiglu_oai", "silu_7", "silu_16", "silu_10")


@triton.jit
def _limited(gate, up, LIMIT: tl.constexpr):
    """Clamp both factors: gate to at most LIMIT, or SiLU(10) for 10, and up to [-LIMIT, LIMIT]. NaN stays NaN."""
    MOST: tl.constexpr = 9.999546021312976 if LIMIT == 10.0 else LIMIT
    up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    return tl.where(gate > MOST, MOST, gate), up


@triton.jit
def gated_product(gate, up, KIND: tl.constexpr):
    """Return act(gate) * up, both clamped if the kind, an index in KINDS, has a limit."""
    inner = gate
    if KIND == 4:
        gate, up = _limited(gate, up, 7.0)
        inner, up = 1.702 * gate, up + 1.0
    if KIND == 1:
        # 0.5 (1 + tanh(z)) is the sigmoid of 2z; 2 sqrt(2 / pi) = 1.5957...
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    factor = 1.0 if KIND == 2 else gate
    act = factor / (1.0 + tl.exp(-inner))
    if KIND == 3:
        small = tl.exp(-tl.abs(gate))
        whole = 1.0 + small  # its logarithm lacks what this sum rounds off
        act = tl.maximum(gate, 0.0) + tl.log(whole) + (small - (whole - 1.0)) / whole
    if KIND >= 5:
        act, up = _limited(act, up, 7.0 if KIND == 5 else 16.0 if KIND == 6 else 10.0)
    return act * up


@triton.jit
def gate_mul_kernel(
    gate,  # [T, F / SPAN], rows contiguous
    up,  # [T, F], rows contiguous
    y,  # [T, F] contiguous
    gate_stride,  # elements from a token to the next
    up_stride,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,  # columns of a gate
    KIND: tl.constexpr,  # index in KINDS
):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < F
    gates = tl.load(gate + token * gate_stride + at // SPAN, mask=inside, other=0.0).to(tl.float32)
    ups = tl.load(up + token * up_stride + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + token * F + at, gated_product(gates, ups, KIND).to(y.dtype.element_ty), mask=inside)


def gated(up: torch.Tensor, gate: torch.Tensor, kind: GateKind) -> torch.Tensor:
    """See the contract in the package."""
    tokens, size = up.shape
    assert gate.stride(1) == up.stride(1) == 1 or size == 1
    y = torch.empty(tokens, size, dtype=up.dtype, device=up.device)
    if y.numel():
        constants = _constants(size, kind, size // gate.shape[1])
        grid = (tokens, cdiv(size, constants["BLOCK"]))
        gate_mul_kernel[grid](gate, up, y, gate.stride(0), up.stride(0), **constants, num_warps=4, **OPTIONS)
    return y


def _constants(size: int, kind: str, span: int) -> dict[str, int]:
    return {"F": size, "BLOCK": min(next_power_of_2(size), _PART), "SPAN": span, "KIND": KINDS.index(kind)}
