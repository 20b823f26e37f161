"""How keys and values lie in memory on the CPU: what `kv_write/cpu.py` writes and `attention/cpu.py` reads.

A slot is block * S + offset. 1,024 neighbouring slots are a **stretch** (or one block, if that is larger): all that a
layer's head has of them lies side by side, and the layers and heads of a stretch follow each other. So a long context
is read in long runs, which the processor fetches ahead, and a short one touches little memory: the system hands it out
in pages of 2 MiB, and with each head's slots in a place of its own the first token took one page for every head.

In a stretch, keys are in strips and values in pairs of positions, see `cpu_tiles.py`; both take D numbers a slot, so
that one computation of a slot's place serves both.
"""

from __future__ import annotations

from numba import njit

from candle_vllm.core.kernels.attention.cpu_tiles import STRIP
from candle_vllm.core.kernels.cpu_runtime.emit import LANES

STRETCH = 1024
_STRETCH_SHIFT = STRETCH.bit_length() - 1


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


@njit(inline="always")
def place_of(slot: int, head: int, shift: int, stretch_step: int) -> int:
    """Where a layer has a slot of a head, in slots from the layer's beginning.

    S is 1 << shift; `stretch_step` counts the slots of a stretch of all layers and heads.
    """
    bits = max(shift, _STRETCH_SHIFT)
    return (slot >> bits) * stretch_step + (head << bits) + (slot & ((1 << bits) - 1))


def stretch_step(cache_layer_strides: tuple[int, ...], head_dim: int) -> int:
    """Slots from one stretch to the next, from the strides of a layer's cache in bytes."""
    return cache_layer_strides[0] // (2 * head_dim)
