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
from typing import NamedTuple

from numba import njit

from candle_vllm.core.kernels.activation_quant.cpu import rms_scale
from candle_vllm.core.kernels.attention.cpu_cache import STRETCH, place_of
from candle_vllm.core.kernels.cpu_runtime.emit import LANES
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, compile_operation, read, step_number
from candle_vllm.core.kernels.cpu_runtime.primitives import float32_at, float_from_bits, int64_at
from candle_vllm.core.kernels.kv_write.cpu import store_bf16
from candle_vllm.core.kernels.latent_attention.cpu_tiles import BLOCK, copy_numbers, scaled_to_bf16
from candle_vllm.core.loading.config import LatentSizes


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


class PrepareArguments(NamedTuple):
    """The operation's arguments.

    Attributes:
        q, q_stride: address of float32 rows of heads [nope | rope], and floats from one row to the next.
        kv, kv_stride: the same of rows [latent | rope].
        heads, nope, rope, latent: H and the sizes of the parts.
        norm, eps: of the latent vector; the address of its weight.
        scale: factor of the queries: softmax scale * log2(e), for `attend` computes powers of two.
        stretch_step: slots from one stretch of the cache to the next.
        block_shift: S is 1 << it.
        positions, slots: addresses of int64 [T]; slot = block * S + offset.
        cache: address of the layer's cache.
        queries: address of [T, P, D / 2, 16, 2] bfloat16.
        inputs, head_bytes, row_numbers: address of every head's rows of queries without rotation, bytes from one head
            to the next, numbers from one row to the next.
        cos, sin: addresses of float32 [P, R / 2].
    """

    q: int
    q_stride: int
    kv: int
    kv_stride: int
    heads: int
    nope: int
    rope: int
    latent: int
    norm: int
    eps: float
    scale: float
    stretch_step: int
    block_shift: int
    positions: int
    slots: int
    cache: int
    queries: int
    inputs: int
    head_bytes: int
    row_numbers: int
    cos: int
    sin: int


def make_prepare(form: int) -> Callable[..., None]:
    """The operation; `form` is that of `cpu_tiles.copy_numbers`."""

    def latent_prepare(row, thread, threads):
        given = read(PrepareArguments, row)
        tokens = step_number(row, StepNumber.TOKENS.value)
        heads, nope, rope, latent = given.heads, given.nope, given.rope, given.latent
        positions, slots, one = int64_at(given.positions), int64_at(given.slots), float_from_bits(0x3F800000)
        width, half = rope + latent, rope // 2
        groups = (heads + LANES - 1) // LANES
        each = heads + 1
        number_bytes = 2 + 2 * form
        for unit in range(tokens * each * thread // threads, tokens * each * (thread + 1) // threads):
            t, h = unit // each, unit % each
            at = 4 * half * positions[t]
            if h == heads:
                x = given.kv + 4 * t * given.kv_stride
                to = given.cache + 2 * width * place_of(slots[t], 0, given.block_shift, given.stretch_step)
                _rotate(x + 4 * latent, half, given.cos + at, given.sin + at, one, to, 4)
                scaled_to_bf16(x, given.norm, rms_scale(x, latent, given.eps), to + 2 * rope, latent)
            else:
                x = given.q + 4 * (t * given.q_stride + h * (nope + rope))
                to = given.queries + 2 * LANES * width * (t * groups + h // LANES) + 4 * (h % LANES)
                _rotate(x + 4 * nope, half, given.cos + at, given.sin + at, given.scale, to, 4 * LANES)
                to = given.inputs + h * given.head_bytes + t * given.row_numbers * number_bytes
                _copy_row(x, to, nope, given.row_numbers, form)

    return latent_prepare


@cache
def prepare_operation(form: int) -> int:
    """Address of the compiled operation."""
    return compile_operation(make_prepare(form))
