# SPDX-License-Identifier: MIT
"""Cache specs: what each layer of a decoder stores for a sequence; the engine allocates and copies caches by them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias, TypeVar

Cache = TypeVar("Cache")


@dataclasses.dataclass(frozen=True)
class PagedSpec:
    """Keys and values of each token, in blocks of the paged cache.

    Attributes:
        kv_heads, key_dim: K and D, the shape of a token's keys.
        value_dim: size of a head's values. In latent attention, whose values are a part of the keys, it is the size of
            a token's index key (sparse attention), stored in the values' place; 0 without an indexer.
        window: number of positions that a token attends to, including itself; None for all.
        exact: the elements are float32 rows, whatever the type of the cache: the keys of an index.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None
    exact: bool = dataclasses.field(default=False, kw_only=True)

    @property
    def shape(self) -> tuple[int, int, int]:
        """K, D and the size of a head's values."""
        return self.kv_heads, self.key_dim, self.value_dim

    @property
    def elements(self) -> int:
        """Number of cached elements of a token."""
        return self.kv_heads * (self.key_dim + self.value_dim)


@dataclasses.dataclass(frozen=True)
class SharedKVSpec:
    """The layer reads the keys and values of an earlier layer, number `layer`, and stores nothing itself.

    If that layer has a window, this layer's window is not larger.
    """

    layer: int


@dataclasses.dataclass(frozen=True)
class StatePart:
    """Part of a layer's state that one kernel uses.

    Attributes:
        shape: shape of the state of a sequence.
        inputs: elements of a token's input to the state; inputs of draft tokens are stored until these are accepted.
        exact: whether the state is float32; otherwise it has the dtype of activations.
    """

    shape: tuple[int, ...]
    inputs: int
    exact: bool = True


@dataclasses.dataclass(frozen=True)
class StateSpec:
    """A state of fixed size; each slot of the state pool holds one, for a running sequence or for a checkpoint."""

    parts: tuple[StatePart, ...]


@dataclasses.dataclass(frozen=True)
class StateRoom:
    """Size of the state pool.

    Attributes:
        running: number of slots for running sequences.
        checkpoints: number of slots for checkpoints, which follow those for running sequences.
        drafts: maximum number of draft tokens of a sequence in a step, whose inputs are stored.
        running_bytes, checkpoint_bytes: bytes of one slot of each kind.
    """

    running: int
    checkpoints: int
    drafts: int
    running_bytes: int = 0
    checkpoint_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all slots."""
        return self.running * self.running_bytes + self.checkpoints * self.checkpoint_bytes

    @property
    def slots(self) -> int:
        """Number of slots for running sequences and for checkpoints."""
        return self.running + self.checkpoints


NO_STATES = StateRoom(0, 0, 0)


@dataclasses.dataclass(frozen=True)
class WindowRoom:
    """The page pool of the layers with one window size; it has fewer pages than the cache has blocks.

    Attributes:
        window: window of these layers in tokens, including the query.
        rows: maximum number of rows of one sequence in all steps that are in flight at the same time.
        pages: number of pages of each of these layers; page 0 is unused.
        page_bytes: bytes of a page of all these layers.
    """

    window: int
    rows: int
    pages: int = 0
    page_bytes: int = 0

    def blocks(self, block_size: int, rows: int | None = None) -> int:
        """Return the maximum number of blocks that `rows` adjacent rows of a sequence access; None is `self.rows`."""
        return (self.window + (self.rows if rows is None else rows) + block_size - 3) // block_size + 1


CacheSpec: TypeAlias = PagedSpec | SharedKVSpec | StateSpec


def paged(specs: Iterable[CacheSpec]) -> list[PagedSpec]:
    """Return the specs of the layers that own pages."""
    return [spec for spec in specs if isinstance(spec, PagedSpec)]


def states(specs: Iterable[CacheSpec]) -> list[StateSpec]:
    """Return the specs of the layers with a state."""
    return [spec for spec in specs if isinstance(spec, StateSpec)]


def windows_of(specs: Iterable[CacheSpec]) -> list[int]:
    """Return the distinct window sizes of the layers whose pages may be freed, sorted."""
    return sorted({spec.window for spec in paged(specs) if spec.window is not None})


def pool_of(spec: PagedSpec, windows: Sequence[WindowRoom]) -> int | None:
    """Return the index of the page pool for a layer with this spec; None for a layer with a page for each block."""
    return next((n for n, room in enumerate(windows) if spec.window == room.window), None)


def pages_of(spec: PagedSpec, windows: Sequence[WindowRoom], blocks: int) -> int:
    """Return the number of pages of a layer with this spec in a cache of `blocks` blocks."""
    pool = pool_of(spec, windows)
    return blocks if pool is None else windows[pool].pages


def layer_caches(specs: Sequence[CacheSpec], make: Callable[[int, PagedSpec | StateSpec], Cache]) -> tuple[Cache, ...]:
    """Return the cache of each layer; a layer with a `SharedKVSpec` gets the cache of the earlier layer.

    `make` makes the cache of a layer with pages or a state, given its index and spec.
    """
    caches: list[Cache] = []
    for number, spec in enumerate(specs):
        caches.append(caches[spec.layer] if isinstance(spec, SharedKVSpec) else make(number, spec))
    return tuple(caches)
