# SPDX-License-Identifier: MIT
"""Writing new keys and values into the paged cache.

Contract: key and value [T, K, D] of the cache's dtype, key_cache and value_cache [B, S, K, D], slots [T] int64, all
different, slot = block * S + offset; a token whose slot is negative is left out. Writes in place; every other slot
keeps its contents. An exact copy.

A cache of float8_e4m3fn takes key and value of any float dtype with a scale each, [1] float32: what is written is the
number over its scale in fp32, clamped to +-448 and rounded to nearest even; a NaN stays one. Source: Micikevicius et
al., 2022, arXiv:2209.05433.

A cache in which every row has a scale of its own, [B, S, K, D + 4] of one-byte numbers, is that of
`scaled_rows`; it takes key and value of any float dtype and no scales.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, operation
from candle_vllm.core.kernels.dispatch import on_gpu

if TYPE_CHECKING:
    import torch


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
    """Copies each token's key and value to its slot."""
    assert key.shape == value.shape
    assert key_cache.shape == value_cache.shape
    assert key.shape[1] == key_cache.shape[2]
    from candle_vllm.core.kernels.kv_write import reference

    write = reference.kv_write
    if on_gpu(key):
        from candle_vllm.core.kernels.kv_write import triton

        write = triton.kv_write
    write(key, value, key_cache, value_cache, slots, key_scale=key_scale, value_scale=value_scale)


class WriteArguments(NamedTuple):
    """The operation's arguments.

    Attributes:
        qkv: address of float32 rows, `stride` floats apart; the columns are where q, k and v begin.
        heads, kv_heads, head_dim: H, K and D.
        stretch_step: slots from one stretch of the caches to the next.
        block_shift: S is 1 << it.
        half: R / 2; 0 rotates nothing, and `cos` and `sin` are then not read.
        cos, sin: addresses of float32 [P, R/2].
        positions, slots: addresses of int64 [T]; slot = block * S + offset.
        q: address of bfloat16 [T, H, D], or of as many bytes for queries that are quantised as the keys are.
        key_cache, value_cache: addresses of the layer's caches, see `attention/cpu_cache.py`.
        scale: factor of q: softmax scale * log2(e), for `attend` computes powers of two.
        offset: address of float32 [K, D], which is subtracted from keys that are quantised; 0 without an offset.
        turns: address of int64 [T], the distance from a position's row to the token's row in `cos` and `sin`; or 0.
        head_gap: see `attention/cpu_cache.py`.
        picked: address of int64 [T], each row's token, for `positions` and `turns`; 0 for all tokens. Picked rows have
            queries alone.
        rows_from: which of the step's numbers is T.
    """

    qkv: int
    stride: int
    q_column: int
    k_column: int
    v_column: int
    heads: int
    kv_heads: int
    head_dim: int
    stretch_step: int
    block_shift: int
    half: int
    cos: int
    sin: int
    positions: int
    slots: int
    q: int
    key_cache: int
    value_cache: int
    scale: float
    offset: int = 0
    turns: int = 0
    head_gap: int = 0
    picked: int = 0
    rows_from: int = StepNumber.TOKENS


def rotate_and_write_operation(keys: int = 0, values: int = 0) -> int:
    """Address of the compiled operation, for a `CacheKind` of keys and of values."""
    return operation("kv_write.cpu:make_rotate_and_write", keys, values)
