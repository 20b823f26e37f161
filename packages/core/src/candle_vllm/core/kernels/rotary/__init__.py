# SPDX-License-Identifier: MIT
"""Rotary position embedding, in the half-split order of GPT-NeoX (pair i is dimensions i and i + R/2).

Contract: for x [T, N, D] of any float dtype, cos and sin [P, R/2] fp32 with R <= D, and positions [T] int64 below P,
the first R dimensions of each head are rotated, and the others copied; the arithmetic is fp32, and y has x's shape and
dtype, in new memory. `rotary_pair` rotates the queries and the keys of a layer together.
Source: Su et al., 2021, arXiv:2104.09864.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

from candle_vllm.core.kernels.dispatch import on_gpu
from candle_vllm.core.kernels.recorded import Recorded, Value

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class Turned:
    """Tables of a rotation, for kernels that rotate heads themselves.

    Attributes:
        places: [T] int64, each token's row of the tables.
        cos, sin: [P, R/2] fp32.
    """

    places: Value
    cos: Value
    sin: Value


class TurnArguments(NamedTuple):
    """Arguments of the operation of `cpu.py`.

    Attributes:
        x, stride: address of float32 rows that begin with the heads, and row stride in floats.
        heads, size: number of heads to rotate, and D.
        positions: address of int64 [T]: the row of the tables for each token.
        turns: address of int64 [T] that is added to `positions`; 0 without M-RoPE.
        cos, sin, half: addresses of float32 [P, R/2], and R/2.
    """

    x: int
    stride: int
    heads: int
    size: int
    positions: int
    turns: int
    cos: int
    sin: int
    half: int


def rotary(x: Value, positions: torch.Tensor, cos: Value, sin: Value) -> Value:
    """Rotate each head of x by its token's position."""
    if isinstance(x, Recorded):
        return x.rotary(cos, sin)
    _check(x, cos, sin)
    if on_gpu(x):
        from candle_vllm.core.kernels.rotary import triton

        return triton.rotary(x, None, positions, cos, sin)[0]
    from candle_vllm.core.kernels.rotary import reference

    return reference.rotary(x, positions, cos, sin)


def rotary_pair(q: Value, k: Value, positions: torch.Tensor, cos: Value, sin: Value) -> tuple[Value, Value]:
    """Return (rotary(q), rotary(k)) for q [T, H, D] and k [T, K, D] of one dtype; one launch on a GPU."""
    if isinstance(q, Recorded):
        return q.rotary(cos, sin), k.rotary(cos, sin)
    _check(q, cos, sin)
    assert k.dtype == q.dtype
    assert (k.shape[0], k.shape[2]) == (q.shape[0], q.shape[2])
    if on_gpu(q):
        from candle_vllm.core.kernels.rotary import triton

        return triton.rotary(q, k, positions, cos, sin)
    from candle_vllm.core.kernels.rotary import reference

    return reference.rotary(q, positions, cos, sin), reference.rotary(k, positions, cos, sin)


def _check(x: torch.Tensor, cos: Value, sin: Value) -> None:
    assert x.dim() == 3
    assert cos.shape == sin.shape
    assert 2 * cos.shape[1] <= x.shape[2]
