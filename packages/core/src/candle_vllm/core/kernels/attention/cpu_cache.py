"""How keys and values lie in memory on the CPU: what `kv_write/cpu.py` writes and `attention/cpu.py` reads.

A slot is block * S + offset. 1,024 neighbouring slots are a **stretch** (or one block, if that is larger): all that a
layer's head has of them lies side by side, and the layers and heads of a stretch follow each other. So a long context
is read in long runs, which the processor fetches ahead, and a short one touches little memory: the system hands it out
in pages of 2 MiB, and with each head's slots in a place of its own the first token took one page for every head.

In a stretch, keys are in strips and values in pairs of positions, see `cpu_tiles.py`; both take D numbers a slot, so
that one computation of a slot's place serves both.
"""

from __future__ import annotations

from candle_vllm.core.kernels.cpu_runtime.level import LANES

STRETCH = 1024
STRETCH_SHIFT = STRETCH.bit_length() - 1


def supported(head_dim: int, block_size: int) -> bool:
    """Whether these kernels can compute it: D even, from 16 to 256, S a power of two from 16."""
    return head_dim % 2 == 0 and LANES <= head_dim <= 256 and block_size >= LANES and block_size.bit_count() == 1


def key_cache_shape(num_blocks: int, block_size: int, layers: int, kv_heads: int, head_dim: int) -> tuple[int, ...]:
    """Shape of the key cache, 16-bit numbers: [stretches, layers, heads, blocks, strips, D / 2, W, 2].

    It begins at a multiple of 64 bytes and need not be cleared. Element [:, n] is layer n's, which is what the
    operations take. For speed S should be 64 or more.
    """
    strip = min(block_size, STRIP)
    blocks = max(1, STRETCH // block_size)
    places = (-(-num_blocks // blocks), layers, kv_heads, blocks)
    return (*places, block_size // strip, head_dim // 2, strip, 2)


def value_cache_shape(num_blocks: int, block_size: int, layers: int, kv_heads: int, head_dim: int) -> tuple[int, ...]:
    """Shape of the value cache: [stretches, layers, heads, blocks, S / 2, D, 2]. See `key_cache_shape`."""
    return (*key_cache_shape(num_blocks, block_size, layers, kv_heads, head_dim)[:4], block_size // 2, head_dim, 2)


def stretch_step(cache_layer_strides: tuple[int, ...], head_dim: int) -> int:
    """Slots from one stretch to the next, from the strides of a layer's cache in bytes."""
    return cache_layer_strides[0] // (2 * head_dim)


ROWS = 4  # query rows that share a load


SQUARE = 16  # query rows of AMX's registers


STRIP = 64  # most key positions whose pairs of one dimension lie side by side


CHUNK = 256  # most keys at a time


SCORE_STRIDE = 4 * (CHUNK + LANES)  # bytes from one row's scores to the next; the extra lanes avoid cache set conflicts


PROBABILITY_STRIDE = SCORE_STRIDE // 2


def state_at(head_dim: int) -> int:
    """Where m stands in a partial result, in floats; s is behind it."""
    return -(-head_dim // LANES) * LANES


def partial_floats(head_dim: int) -> int:
    """Size of a partial result, in floats."""
    return state_at(head_dim) + LANES


ROW_TILE = 64  # query rows of a unit


_SPLIT_STREAMS = 16  # sequences whose partial results fit in scratch memory


_MOST_PARTIALS = 32 << 20  # bytes, where one sequence needs no more


HEADER = 64  # bytes before the threads' scratch memory: the counter, on a cache line of its own


TILE_LIST = 16 * (CHUNK // LANES)  # bytes of the addresses of a chunk's tiles, keys and values


def chunk_of(position: int) -> int:
    """The chunk that a position belongs to."""
    if position < 256:
        return position >> 6
    if position < 1024:
        return 2 + (position >> 7)
    return 6 + (position >> 8)


def scratch_per_thread(head_dim: int) -> int:
    """Scratch memory of one thread: what `cpu.make_attend` puts there, in its order."""
    row = 4 * partial_floats(head_dim)
    rows = ROW_TILE * (8 + 2 * head_dim + row) + SQUARE * (SCORE_STRIDE + PROBABILITY_STRIDE + row)
    return -(-(TILE_LIST + rows + 2 * LANES * head_dim + 64) // 128) * 128


def scratch_bytes(*, max_tokens: int, max_seqs: int, heads: int, head_dim: int, max_context: int, threads: int) -> int:
    """Size of the scratch memory that all layers share, in bytes; it begins zeroed, at a multiple of 64.

    Args:
        max_tokens, max_seqs, max_context: most tokens and sequences of a step, longest sequence.
        heads, head_dim: H and D.
        threads: of the team.
    """
    chunks = chunk_of(max_context) + 1
    stream = heads * chunks * 4 * partial_floats(head_dim)
    streams = max(1, min(max_tokens, max_seqs, _SPLIT_STREAMS))
    return HEADER + threads * scratch_per_thread(head_dim) + max(stream, min(streams * stream, _MOST_PARTIALS))
