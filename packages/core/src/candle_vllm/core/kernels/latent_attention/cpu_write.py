# pyright: reportCallIssue=false, reportArgumentType=false
"""What stands between projections and latent attention on the CPU, in one pass over a step.

The cache row of a token: the rotated part of its key, and its latent vector normed, in bfloat16. Of every head's query
[nope | rope]: the rotated part into the queries of `cpu_tiles.py`, times the softmax scale, and the rest as an input
row of `cpu_heads.py`. A unit of work is the cache row, or one head, of a token.

The cache of all layers is [stretches, layers, blocks, S, R + L] bfloat16: slots as `attention/cpu_cache.py` has them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from numba import njit

from candle_vllm.core.kernels.activation_quant.cpu import rms_scale
from candle_vllm.core.kernels.attention.cpu_cache import STRETCH, place_of
from candle_vllm.core.kernels.cpu_runtime.emit import LANES
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, compile_operation, float_bits
from candle_vllm.core.kernels.cpu_runtime.primitives import float32_at, float_from_bits, int64_at
from candle_vllm.core.kernels.kv_write.cpu import store_bf16
from candle_vllm.core.kernels.latent_attention.cpu_tiles import BLOCK, copy_numbers, scaled_to_bf16
from candle_vllm.core.loading.config import LatentSizes

_TOKENS = int(StepNumber.TOKENS)


def supported(sizes: LatentSizes, block_size: int) -> bool:
    """Whether these kernels can compute it: R even, L a multiple of 32, nope one of 16, S a power of two from 16."""
    whole = sizes.rope % 2 == 0 and sizes.latent % BLOCK == 0 and sizes.nope % LANES == 0
    return whole and block_size >= LANES and block_size.bit_count() == 1


def cache_shape(num_blocks: int, block_size: int, layers: int, width: int) -> tuple[int, ...]:
    """Shape of the cache of all layers, 16-bit numbers; element [:, n] is layer n's, which the operations take."""
    blocks = max(1, STRETCH // block_size)
    return (-(-num_blocks // blocks), layers, blocks, block_size, width)


def stretch_step(layer_strides: tuple[int, ...], width: int) -> int:
    """Slots from one stretch to the next, from the strides of a layer's cache in bytes."""
    return layer_strides[0] // (2 * width)


@njit(inline="always")
def _rotate(x: int, half: int, cos: int, sin: int, factor: float, to: int, pair_bytes: int) -> None:
    """R numbers rotated, times a factor, as bfloat16 in pairs of neighbours `pair_bytes` apart."""
    row, c, s = float32_at(x), float32_at(cos), float32_at(sin)
    for i in range(half):
        a, b, j = row[i], row[i + half], i + half
        store_bf16(to + (i >> 1) * pair_bytes + 2 * (i & 1), (a * c[i] - b * s[i]) * factor)
        store_bf16(to + (j >> 1) * pair_bytes + 2 * (j & 1), (b * c[i] + a * s[i]) * factor)


@njit(inline="always")
def _copy_row(x: int, to: int, count: int, padded: int, form: int) -> None:
    """`count` floats to a row of `padded` numbers, zero behind them."""
    for i in range(0, count, LANES):
        copy_numbers(x, to, i, form)
    for i in range(count, padded):
        if form == 0:
            store_bf16(to + 2 * i, float_from_bits(0))
        else:
            float32_at(to)[i] = float_from_bits(0)


def make_prepare(form: int) -> Callable[..., None]:
    """The operation. Arguments: see `prepare_row`; `form` is that of `cpu_tiles.copy_numbers`."""

    def latent_prepare(a, thread, threads):
        tokens = int64_at(a[2])[_TOKENS]
        q, q_stride, kv, kv_stride = a[3], a[4], a[5], a[6]
        heads, nope, rope, latent = a[7], a[8], a[9], a[10]
        weight, eps, scale = a[11], float_from_bits(a[12]), float_from_bits(a[13])
        positions, slots, one = int64_at(a[16]), int64_at(a[17]), float_from_bits(0x3F800000)
        inputs, head_bytes, row_numbers = a[20], a[21], a[22]
        width, half = rope + latent, rope // 2
        groups = (heads + LANES - 1) // LANES
        each = heads + 1
        number_bytes = 2 + 2 * form
        for unit in range(tokens * each * thread // threads, tokens * each * (thread + 1) // threads):
            t, h = unit // each, unit % each
            at = 4 * half * positions[t]
            if h == heads:
                x = kv + 4 * t * kv_stride
                to = a[18] + 2 * width * place_of(slots[t], 0, a[15], a[14])
                _rotate(x + 4 * latent, half, a[23] + at, a[24] + at, one, to, 4)
                scaled_to_bf16(x, weight, rms_scale(x, latent, eps), to + 2 * rope, latent)
            else:
                x = q + 4 * (t * q_stride + h * (nope + rope))
                to = a[19] + 2 * LANES * width * (t * groups + h // LANES) + 4 * (h % LANES)
                _rotate(x + 4 * nope, half, a[23] + at, a[24] + at, scale, to, 4 * LANES)
                to = inputs + h * head_bytes + t * row_numbers * number_bytes
                _copy_row(x, to, nope, row_numbers, form)

    return latent_prepare


@cache
def prepare_operation(form: int) -> int:
    """Address of the compiled operation."""
    return compile_operation(make_prepare(form))


def prepare_row(
    *,
    q: int,
    q_stride: int,
    kv: int,
    kv_stride: int,
    heads: int,
    nope: int,
    rope: int,
    latent: int,
    norm: int,
    eps: float,
    scale: float,
    stretch_step: int,
    block_size: int,
    positions: int,
    slots: int,
    cache: int,
    queries: int,
    inputs: int,
    head_bytes: int,
    row_numbers: int,
    cos: int,
    sin: int,
) -> list[int]:
    """The operation's arguments.

    Args:
        q, q_stride: address of float32 rows of heads [nope | rope], and floats from one row to the next.
        kv, kv_stride: the same of rows [latent | rope].
        heads, nope, rope, latent: H and the sizes of the parts.
        norm, eps: of the latent vector; the address of its weight.
        scale: factor of the queries: softmax scale * log2(e), for `attend` computes powers of two.
        stretch_step, block_size: slots from one stretch of the cache to the next, and S.
        positions, slots: addresses of int64 [T]; slot = block * S + offset.
        cache: address of the layer's cache.
        queries: address of [T, P, D / 2, 16, 2] bfloat16.
        inputs, head_bytes, row_numbers: address of every head's rows of queries without rotation, bytes from one head
            to the next, numbers from one row to the next.
        cos, sin: addresses of float32 [P, R / 2].
    """
    sizes = [heads, nope, rope, latent, norm, float_bits(eps), float_bits(scale), stretch_step]
    places = [block_size.bit_length() - 1, positions, slots, cache, queries, inputs, head_bytes, row_numbers, cos, sin]
    return [q, q_stride, kv, kv_stride, *sizes, *places]
