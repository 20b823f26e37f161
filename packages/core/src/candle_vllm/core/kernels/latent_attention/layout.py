# SPDX-License-Identifier: MIT
"""Weights of a layer with latent attention, or of its indexer, on the CPU; sizes of the cache and of scratch memory."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from candle_vllm.core.kernels.attention.cpu_cache import CHUNK, HEADER, ROW_TILE, STRETCH, partial_floats
from candle_vllm.core.kernels.cpu_runtime.level import LANES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from candle_vllm.core.kernels.plain_linear.layout import PlainMatrix
    from candle_vllm.core.loading.config import LatentSizes


@dataclasses.dataclass(frozen=True)
class LatentParts:
    """A layer's weights and tables for latent attention.

    Attributes:
        norm, eps: norm of the latent vector; the weight is [L] float32. Not used for an indexer.
        cos, sin: tables of the rotary embedding, [positions, R / 2].
        keys: for each head the matrix [L, nope] that maps the head's queries to latent space; empty for an indexer.
        values: for each head the matrix [V, L] from weighted latent vectors to the head's result; empty for an indexer.
        chosen: positions that tokens attend to, a result of `record_choice`; None for all positions.
        pool: number of neighbouring positions that an indexer chooses together.
        places: float32 [pool, D], added to the gates of an indexer's pooled keys; None without pooled keys.
    """

    sizes: LatentSizes
    norm: NDArray[np.float32]
    eps: float
    cos: NDArray[np.float32]
    sin: NDArray[np.float32]
    keys: tuple[PlainMatrix, ...]
    values: tuple[PlainMatrix, ...]
    chosen: NDArray[np.int32] | None = None
    pool: int = 1
    places: NDArray[np.float32] | None = None


def attended(seen: int, top: int, pool: int) -> int:
    """Return the number of positions that a token with `seen` visible ones attends to: whole groups, and the rest."""
    return min(seen, top // pool * pool + seen % pool)


def supported(sizes: LatentSizes, block_size: int) -> bool:
    """Whether the kernels support the sizes: R even, L % 32 == 0, nope % 16 == 0, S a power of two and at least 16."""
    whole = sizes.rope % 2 == 0 and sizes.latent % BLOCK == 0 and sizes.nope % LANES == 0
    return whole and block_size >= LANES and block_size.bit_count() == 1


def choice_supported(index: LatentSizes) -> bool:
    """Whether the kernels support a sparse-attention indexer: H % 16 == 0, R even, nope (unrotated) % 16 == 0."""
    return index.heads % LANES == 0 and index.rope % 2 == 0 and index.nope % LANES == 0


def cache_shape(num_blocks: int, block_size: int, layers: int, width: int) -> tuple[int, ...]:
    """Return the shape of the cache of all layers, 16-bit elements; operations read [:, n], the part of layer n."""
    blocks = max(1, STRETCH // block_size)
    return (-(-num_blocks // blocks), layers, blocks, block_size, width)


def stretch_step(layer_strides: tuple[int, ...], width: int) -> int:
    """Return the slots from a stretch to the next (`attention/cpu_cache.py`), from a layer's strides in bytes."""
    return layer_strides[0] // (2 * width)


GROUPS = 4  # groups of 16 heads in a row tile, which share the loads of keys
BLOCK = 32  # dimensions of the values that are summed at a time
OCTET = 8  # heads that share the loads of values
SCORE_BYTES = CHUNK * 4 * LANES  # bytes from one group's scores to the next
PROBABILITY_BYTES = SCORE_BYTES // 2
STATE_BYTES = 2 * 4 * LANES  # a group's maxima and sums
TILE_LIST = 8 * (CHUNK // LANES)  # bytes of the addresses of a chunk's tiles
FEW_TOKENS = 16  # up to this number of tokens in a step, threads divide each token's indexer scores; above it, tokens
CHOICE_BYTES = TILE_LIST + GROUPS * SCORE_BYTES  # bytes of a thread in a choice: addresses of tiles, scores of a chunk


def groups_of(heads: int) -> int:
    """Return P, the number of groups of 16 heads of a token."""
    return -(-heads // LANES)


def scratch_per_thread(latent: int) -> int:
    """Return the bytes of a thread's scratch memory; `cpu.make_attend` divides it into arrays."""
    rows = 2 * ROW_TILE * 4 * partial_floats(latent) + GROUPS * (SCORE_BYTES + PROBABILITY_BYTES)
    return -(-(TILE_LIST + STATE_BYTES + rows) // 128) * 128


def choice_scratch(max_context: int, threads: int, pooled: int = 0) -> int:
    """Return the bytes of scratch memory of a choice, with the scores of the tokens that are computed at a time.

    `pooled` is the number of elements of a pooled key, of which each thread copies a chunk; 0 without pooled keys.
    """
    each = CHOICE_BYTES + 2 * CHUNK * pooled
    return HEADER + threads * each + max(FEW_TOKENS, threads) * 4 * max_context
