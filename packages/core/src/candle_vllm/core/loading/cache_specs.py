# SPDX-License-Identifier: MIT
"""Cache specs: what each layer of a decoder stores of a sequence. The engine allocates and copies caches by them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias, TypeVar

Cache = TypeVar("Cache")


@dataclasses.dataclass(frozen=True)
class PagedSpec:
    """Keys and values of each token, in blocks of the paged cache.

    Attributes:
        kv_heads, key_dim: keys [K, D].
        value_dim: values [K, this]; 0 where values are a part of the keys (latent attention).
        window: positions that a token attends to, its own included; None for all.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """K, D and the size of a value, which determine the memory of a token."""
        return self.kv_heads, self.key_dim, self.value_dim

    @property
    def elements(self) -> int:
        """Number of elements of a token."""
        return self.kv_heads * (self.key_dim + self.value_dim)

    @property
    def slides(self) -> bool:
        """Whether pages outside the window may be freed."""
        return self.window is not None and self.value_dim > 0


@dataclasses.dataclass(frozen=True)
class SharedKVSpec:
    """The layer reads the keys and values of an earlier layer, and stores nothing itself.

    Attributes:
        layer: number of the layer that writes them. If that has a window, the reader's window is no larger.
    """

    layer: int


@dataclasses.dataclass(frozen=True)
class StatePart:
    """Part of a layer's state that one kernel uses.

    Attributes:
        shape: of a sequence.
        inputs: elements of a token that update the state. For draft tokens they are kept, and applied on acceptance.
        exact: float32; otherwise the dtype of activations, which its inputs have.
    """

    shape: tuple[int, ...]
    inputs: int
    exact: bool = True


@dataclasses.dataclass(frozen=True)
class StateSpec:
    """A state of fixed size, in slots of the state pool: of a running sequence, or of a checkpoint.

    Attributes:
        parts: its parts.
    """

    parts: tuple[StatePart, ...]


@dataclasses.dataclass(frozen=True)
class StateRoom:
    """Size of the state pool.

    Attributes:
        running: slots of running sequences.
        checkpoints: slots of checkpoints, after those of running sequences.
        drafts: most draft tokens of a sequence in a step, whose inputs are kept.
    """

    running: int
    checkpoints: int
    drafts: int

    @property
    def slots(self) -> int:
        """Number of slots of running sequences and of checkpoints."""
        return self.running + self.checkpoints


NO_STATES = StateRoom(0, 0, 0)


@dataclasses.dataclass(frozen=True)
class WindowRoom:
    """The page pool of the layers with one window, which have fewer pages than the cache has blocks.

    Attributes:
        window: of these layers, in tokens, the query's own included.
        rows: most rows of a sequence in all steps that may overlap.
        pages: pages of each of these layers; page 0 is unused.
    """

    window: int
    rows: int
    pages: int = 0

    def blocks(self, block_size: int, rows: int | None = None) -> int:
        """Return the most blocks that `rows` rows of a sequence read and write; None means `self.rows`."""
        return (self.window + (self.rows if rows is None else rows) + block_size - 3) // block_size + 1


CacheSpec: TypeAlias = PagedSpec | SharedKVSpec | StateSpec


def paged(specs: Iterable[CacheSpec]) -> list[PagedSpec]:
    """Return the specs of the layers that own pages."""
    return [spec for spec in specs if isinstance(spec, PagedSpec)]


def states(specs: Iterable[CacheSpec]) -> list[StateSpec]:
    """Return the specs of the layers with a state."""
    return [spec for spec in specs if isinstance(spec, StateSpec)]


def windows_of(specs: Iterable[CacheSpec]) -> list[int]:
    """Return the distinct window sizes of the layers, in order of size."""
    return sorted({spec.window for spec in paged(specs) if spec.slides and spec.window is not None})


def pool_of(spec: PagedSpec, windows: Sequence[WindowRoom]) -> int | None:
    """Return the page pool's number for a layer with this spec; None for a layer with a page for each block."""
    return next((n for n, room in enumerate(windows) if spec.slides and spec.window == room.window), None)


def pages_of(spec: PagedSpec, windows: Sequence[WindowRoom], blocks: int) -> int:
    """Return the pages of a layer with this spec in a cache of `blocks` blocks."""
    pool = pool_of(spec, windows)
    return blocks if pool is None else windows[pool].pages


def layer_caches(specs: Sequence[CacheSpec], make: Callable[[int, PagedSpec | StateSpec], Cache]) -> tuple[Cache, ...]:
    """Make the cache of each layer.

    Args:
        specs: of all layers.
        make: makes the cache of a layer that owns pages or a state, given its number.
    """
    caches: list[Cache] = []
    for number, spec in enumerate(specs):
        caches.append(caches[spec.layer] if isinstance(spec, SharedKVSpec) else make(number, spec))
    return tuple(caches)
