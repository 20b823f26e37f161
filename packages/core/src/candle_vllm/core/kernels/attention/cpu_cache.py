# SPDX-License-Identifier: MIT
"""Memory layout of the CPU's KV cache, which `kv_write/cpu.py` writes and `attention/cpu.py` reads.

Terms of the CPU's attention modules; T, H, K, D, B, S and R as in `kernels/attention`:

    slot        block * S + offset in the block: where the key and the value of one position are stored
    stretch     1,024 consecutive slots, or one block if a block has more
    strip       the keys of W = min(S, 64) consecutive slots of one KV head
    tile        16 consecutive slots of one KV head
    row         the query of one token and one query head
    row tile    up to `ROW_TILE` rows of one sequence and one KV head
    chunk       64, 128 or 256 consecutive positions of a sequence (`cpu_split.py`)
    unit        a row tile with all or some of the sequence's chunks: the work that a thread claims

Within a stretch the slots of one head of a layer are contiguous, and the heads and layers follow each other. So long
contexts are read sequentially, which the hardware prefetches, and short contexts need few of the system's 2 MiB pages.
If the heads are divided among ranks of threads (`cpu_runtime/numa.py`), all stretches and layers of a head are
contiguous instead, so that a rank's heads are contiguous pages on its NUMA node.
"""

from __future__ import annotations

from typing import Self

import numpy as np

from candle_vllm.core.kernels.cpu_runtime.level import LANES

STRETCH = 1024
STRETCH_SHIFT = STRETCH.bit_length() - 1

BLOCK = 32
"""Elements of a quantised block."""


LEVELS = (-66, -52, -42, -33, -25, -18, -11, -5, 1, 7, 13, 19, 26, 34, 44, 57)
"""What codes of 4 bits with levels stand for: dense near 0, where most of a rotated head's elements are."""


class CacheKind(int):
    """How keys or values are stored: the bits of an element's code, 32 more if blocks have minima, 64 with `LEVELS`.

    Compiled kernels have this number in their names, and do not depend on the table of types, `CACHE_TYPES`.
    """

    @classmethod
    def of(cls, bits: int, minima: bool = False, levels: bool = False) -> Self:
        """Return the kind of a type in `CACHE_TYPES` from its fields `bits`, `minima` and `levels`."""
        return cls(bits + 32 * minima + 64 * levels)

    @property
    def bits(self) -> int:
        """Bits of an element's code: 16, 8, or 2 to 7; `low` and `planes` say how bits are stored."""
        return self % 32

    @property
    def has_minima(self) -> bool:
        """Whether an element is scale * code + minimum, instead of scale * (code - bias)."""
        return self & 32 != 0

    @property
    def has_levels(self) -> bool:
        """Whether an element is scale * `LEVELS`[code]."""
        return self & 64 != 0

    @property
    def is_quantised(self) -> bool:
        """Whether Hadamard-rotated heads are stored as block codes."""
        return self.bits < 16

    @property
    def has_halves(self) -> bool:
        """Whether a code has less than 8 bits, so that a lane's byte is read from half a byte or from planes."""
        return self.bits < 8

    @property
    def low(self) -> int:
        """The lowest bits of a code that are stored together: 8, 4 (two codes in a byte), or 0."""
        return min(self.bits & ~3, 8)

    @property
    def planes(self) -> int:
        """Number of planes of a block: each has one bit of every code, beginning with bit `low`."""
        return self.bits - self.low if self.is_quantised else 0

    @property
    def bias(self) -> int:
        """The number that is added to signed codes before they are stored, or to levels before they are multiplied."""
        return -LEVELS[0] if self.has_levels else 0 if self.has_minima else 1 << self.bits - 1

    @property
    def largest(self) -> int:
        """The largest factor that a code gives in products."""
        return LEVELS[-1] - LEVELS[0] if self.has_levels else (1 << self.bits) - 1

    @property
    def dtype(self) -> type[np.int16 | np.uint8]:
        """Type of the cache's array."""
        return np.uint8 if self.is_quantised else np.int16

    def fits(self, head_dim: int) -> bool:
        """Whether heads of D elements can be stored in this kind."""
        return not self.is_quantised or head_dim % BLOCK == 0


BF16 = CacheKind.of(16)
PLAIN = (BF16, BF16)
"""Keys and values that are not quantised."""


def code_bytes(kind: CacheKind, head_dim: int) -> int:
    """Return the bytes of a slot's codes, without scales and minima."""
    return kind.bits * head_dim // 8


def key_bytes(kind: CacheKind, head_dim: int) -> int:
    """Return the bytes of a slot's key; a 4-byte word has two blocks' scales, or one block's scale and minimum."""
    words = -(-head_dim // (BLOCK if kind.has_minima else 2 * BLOCK)) if kind.is_quantised else 0
    return code_bytes(kind, head_dim) + 4 * words


def value_bytes(kind: CacheKind, head_dim: int) -> int:
    halves = head_dim // BLOCK * (1 + kind.has_minima) if kind.is_quantised else 0
    return code_bytes(kind, head_dim) + 2 * halves


MOST_DIM = 512


def supported(head_dim: int, block_size: int) -> bool:
    """Whether these kernels support a head size and block size: D even, from 16 to 512, S a power of two from 16."""
    return head_dim % 2 == 0 and LANES <= head_dim <= MOST_DIM and block_size >= LANES and block_size.bit_count() == 1


def number_bytes(head_dim: int, kinds: tuple[CacheKind, CacheKind]) -> float:
    """Return the average bytes of an element of keys and values, scales and minima included."""
    return (key_bytes(kinds[0], head_dim) + value_bytes(kinds[1], head_dim)) / (2 * head_dim)


def key_cache_shape(
    num_blocks: int, block_size: int, layers: int, kv_heads: int, head_dim: int, kind: CacheKind = BF16
) -> tuple[int, ...]:
    """Return the shape of the key cache: [stretches, layers, heads, blocks, strips, D / 2, W, 2] 16-bit elements, or
    [stretches, layers, heads, blocks, strips, bytes of a strip] if it is quantised.

    The cache must begin at a multiple of 64 bytes and need not be cleared. The operations take the part of layer n,
    cache[:, n]. For speed S should be at least 64.
    """
    strip = min(block_size, STRIP)
    blocks = max(1, STRETCH // block_size)
    places = (-(-num_blocks // blocks), layers, kv_heads, blocks, block_size // strip)
    return (*places, strip * key_bytes(kind, head_dim)) if kind.is_quantised else (*places, head_dim // 2, strip, 2)


def value_cache_shape(
    num_blocks: int, block_size: int, layers: int, kv_heads: int, head_dim: int, kind: CacheKind = BF16
) -> tuple[int, ...]:
    """Return the shape of the value cache: [stretches, layers, heads, blocks, S / 2, D, 2] 16-bit elements, or
    [stretches, layers, heads, blocks, S / 16, bytes of a tile]. See `key_cache_shape`."""
    places = key_cache_shape(num_blocks, block_size, layers, kv_heads, head_dim)[:4]
    if kind.is_quantised:
        return (*places, block_size // LANES, LANES * value_bytes(kind, head_dim))
    return (*places, block_size // 2, head_dim, 2)


def stretch_step(key_layer_strides: tuple[int, ...], head_dim: int, kind: CacheKind = BF16) -> int:
    """Return the number of slots from one stretch to the next, from the byte strides of a layer's keys."""
    return key_layer_strides[0] // key_bytes(kind, head_dim)


def head_gap(key_layer_strides: tuple[int, ...], block_size: int, head_dim: int, kind: CacheKind = BF16) -> int:
    """Return the slots from the end of a head's part of a stretch to the next head's part; 0 if they are adjacent."""
    return key_layer_strides[1] // key_bytes(kind, head_dim) - max(STRETCH, block_size)


ROWS = 4  # rows that share a load of keys
TILES = 4  # key tiles that share a load of queries
SQUARE = 16  # rows of AMX's registers
STRIP = 64  # maximum slots of a strip
CHUNK = 256  # maximum number of keys of a chunk
SCORE_STRIDE = 4 * (CHUNK + LANES)  # bytes from one row's scores to the next; the extra lanes avoid cache set conflicts
PROBABILITY_STRIDE = SCORE_STRIDE // 2


def state_at(head_dim: int) -> int:
    """Return the index, in floats, of the maximum m in a partial result; the sum s follows it (`cpu_tiles.py`)."""
    return -(-head_dim // LANES) * LANES


def partial_floats(head_dim: int) -> int:
    return state_at(head_dim) + LANES


ROW_TILE = 64  # maximum rows of a unit
_SPLIT_STREAMS = 16  # maximum decoding sequences of maximum length whose partial results fit in scratch memory
_MOST_PARTIALS = 32 << 20  # maximum bytes of partial results, unless one sequence needs more
HEADER = 64  # bytes before the threads' scratch memory: a cache line for the unit counter
VALUE_TILES = 8 * (CHUNK // LANES)  # byte offset of the value tiles' addresses in a chunk's list of tiles
TILE_LIST = 2 * VALUE_TILES  # bytes of a list of tiles; a thread has two, for the current and the next chunk


def chunk_of(position: int) -> int:
    if position < 256:
        return position >> 6
    if position < 1024:
        return 2 + (position >> 7)
    return 6 + (position >> 8)


def scratch_per_thread(head_dim: int) -> int:
    """Return the bytes of a thread's scratch memory; `cpu.make_attend` divides it into arrays."""
    row = 4 * partial_floats(head_dim)
    rows = ROW_TILE * (16 + 4 * head_dim + row) + SQUARE * (SCORE_STRIDE + PROBABILITY_STRIDE + row)
    return -(-(2 * TILE_LIST + rows + 2 * LANES * head_dim + 64) // 128) * 128


def scratch_bytes(
    *, max_tokens: int, max_seqs: int, heads: int, head_dim: int, max_context: int, threads: int, per_thread: int = 0
) -> int:
    """Return the bytes of the scratch memory that all layers share; it must be zeroed and begin at a multiple of 64.

    Args:
        max_tokens, max_seqs, max_context: maximum tokens and sequences of a step, and tokens of a sequence.
        heads, head_dim: H and D.
        threads: number of threads of the team.
        per_thread: bytes of a thread's memory; 0 for `scratch_per_thread`.
    """
    chunks = chunk_of(max_context) + 1
    stream = heads * chunks * 4 * partial_floats(head_dim)
    streams = max(1, min(max_tokens, max_seqs, _SPLIT_STREAMS))
    own = threads * (per_thread or scratch_per_thread(head_dim))
    return HEADER + own + max(stream, min(streams * stream, _MOST_PARTIALS))
