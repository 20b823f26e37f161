# SPDX-License-Identifier: MIT
"""Write new keys and values to the paged cache.

Contract: key and value are [T, K, D] in the cache's dtype, key_cache and value_cache [B, S, K, D], slots [T] int64, all
different where not negative (letters as in `kernels/attention`). Slot is block * S + offset; a token with a negative
slot is not written, so a captured step of a GPU may have more tokens than are scheduled. A row is the key or value of
one token and head; rows are copied exactly; no other slot changes.

A cache of float8_e4m3fn takes key and value of any float dtype, with `cache_scales`, a scale [1] float32 for
each of the two: elements are divided by the scale in fp32, clamped to +-448 and rounded to nearest even; NaN stays NaN.
Source: Micikevicius et al., 2022, arXiv:2209.05433.

A cache with a scale for each row, [B, S, K, D + 4] of one-byte elements (`scaled_rows.py`), takes key and value of any
float dtype; `cache_scales` must be None, because each row's scale is computed here.
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
    cache_scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Copy each token's key and value to its slot; see the contract above."""
    assert key.shape == value.shape
    assert key_cache.shape == value_cache.shape
    assert key.shape[1] == key_cache.shape[2]
    from candle_vllm.core.kernels.kv_write import reference

    write = reference.kv_write
    if on_gpu(key):
        from candle_vllm.core.kernels.kv_write import triton

        write = triton.kv_write
    write(key, value, key_cache, value_cache, slots, cache_scales=cache_scales)


class WriteArguments(NamedTuple):
    """Arguments of `rotate_and_write`.

    Attributes:
        qkv: address of float32 rows, `stride` floats apart; q, k and v begin at `q_column`, `k_column` and `v_column`.
        heads, kv_heads, head_dim: H, K and D.
        stretch_step: slots from one stretch of the caches to the next, see `attention/cpu_cache.py`.
        block_shift: the binary logarithm of S.
        half: number of rotated pairs of a head; if 0, `cos` and `sin` are not read.
        cos, sin: addresses of float32 [positions, half], a row for each position.
        positions, slots: addresses of int64 [T]; slot = block * S + offset.
        q: address of the rotated queries, bfloat16 [T, H, D], or int8 as in `attention/cpu_quantised`, 2 D bytes each.
        key_cache, value_cache: addresses of the layer's caches, see `attention/cpu_cache.py`.
        scale: factor of q: softmax scale * log2(e), because `attend` computes powers of two.
        fit: address of the cache's `PagedCache.fit`, if keys are quantised.
        group: number of query heads of a KV head.
        turns: address of int64 [T]: a token's row in `cos` and `sin` minus its position; 0 without M-RoPE.
        head_gap: see `attention/cpu_cache.py`.
        picked: address of int64 [T], the index in `positions` and `turns` of each row; 0 for all tokens. With
            `picked`, `kv_heads` must be 0: no keys or values are written.
        rows_from: the `StepNumber` that is T.
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
    fit: int = 0
    group: int = 1
    turns: int = 0
    head_gap: int = 0
    picked: int = 0
    rows_from: int = StepNumber.TOKENS


def rotate_and_write_operation(keys: int, values: int) -> int:
    """Return the address of the compiled operation, for a `CacheKind` of keys and of values."""
    return operation("kv_write.cpu:make_rotate_and_write", keys, values)
