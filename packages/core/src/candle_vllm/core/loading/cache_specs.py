# SPDX-License-Identifier: MIT
"""What each layer of a decoder keeps of a sequence. The engine plans, hands out and moves caches by these alone."""

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
        window: positions that a token sees, its own included; None is all.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """What decides over the memory of a token: K, D and the size of a value."""
        return self.kv_heads, self.key_dim, self.value_dim

    @property
    def elements(self) -> int:
        """Elements of a token."""
        return self.kv_heads * (self.key_dim + self.value_dim)

    @property
    def slides(self) -> bool:
        """Whether pages behind the window may be freed."""
        return self.window is not None and self.value_dim > 0


@dataclasses.dataclass(frozen=True)
class SharedKVSpec:
    """The layer reads the keys and values of an earlier layer, and keeps none of its own.

    Attributes:
        layer: number of the layer that writes them. Where that has a window, the reader has one that is no larger.
    """

    layer: int


@dataclasses.dataclass(frozen=True)
class StatePart:
    """A part of a layer's state, of one kernel.

    Attributes:
        shape: of a sequence.
        inputs: numbers of a token that change it. Those of a draft are kept, to be taken in if it is right.
        exact: float32; else of the type of activations, in which its numbers are given.
    """

    shape: tuple[int, ...]
    inputs: int
    exact: bool = True


@dataclasses.dataclass(frozen=True)
class StateSpec:
    """A state of fixed size, in slots of the state pool: of a sequence that runs, or a checkpoint.

    Attributes:
        parts: what it consists of.
    """

    parts: tuple[StatePart, ...]


@dataclasses.dataclass(frozen=True)
class StateRoom:
    """How many states there is room for.

    Attributes:
        running: slots of running sequences.
        checkpoints: slots of checkpoints, behind those.
        drafts: the most drafted tokens of a sequence in a step, whose inputs are kept.
    """

    running: int
    checkpoints: int
    drafts: int

    @property
    def slots(self) -> int:
        """Slots of running sequences and of checkpoints."""
        return self.running + self.checkpoints


NO_STATES = StateRoom(0, 0, 0)


@dataclasses.dataclass(frozen=True)
class WindowRoom:
    """The page pool of the layers with one window, which have fewer pages than the cache has blocks.

    Attributes:
        window: of these layers, in tokens, the query's own included.
        rows: most rows of a sequence in the steps that may be under way at once.
        pages: of each of these layers; page 0 holds nothing.
    """

    window: int
    rows: int
    pages: int = 0

    def blocks(self, block_size: int, rows: int | None = None) -> int:
        """Return the most blocks that `rows` rows of a sequence read and write; None means `self.rows`."""
        return (self.window + (self.rows if rows is None else rows) + block_size - 3) // block_size + 1


CacheSpec: TypeAlias = PagedSpec | SharedKVSpec | StateSpec


def paged(specs: Iterable[CacheSpec]) -> list[PagedSpec]:
    """The specs of the layers that own pages."""
    return [spec for spec in specs if isinstance(spec, PagedSpec)]


def states(specs: Iterable[CacheSpec]) -> list[StateSpec]:
    """The specs of the layers that keep a state."""
    return [spec for spec in specs if isinstance(spec, StateSpec)]


def windows_of(specs: Iterable[CacheSpec]) -> list[int]:
    """The windows of the layers that have one, each once, in order of size."""
    return sorted({spec.window for spec in paged(specs) if spec.slides and spec.window is not None})


def pool_of(spec: PagedSpec, windows: Sequence[WindowRoom]) -> int | None:
    """The number of the page pool of the layer with this spec; None where it has a page for each block."""
    return next((n for n, room in enumerate(windows) if spec.slides and spec.window == room.window), None)


def pages_of(spec: PagedSpec, windows: Sequence[WindowRoom], blocks: int) -> int:
    """Pages of the layer with this spec in a cache of so many blocks."""
    pool = pool_of(spec, windows)
    return blocks if pool is None else windows[pool].pages


def layer_caches(specs: Sequence[CacheSpec], make: Callable[[int, PagedSpec | StateSpec], Cache]) -> tuple[Cache, ...]:
    """The cache of each layer.

    Args:
        specs: of all layers.
        make: makes the cache of a layer that owns pages or a state, given its number.
    """
    caches: list[Cache] = []
    for number, spec in enumerate(specs):
        caches.append(caches[spec.layer] if isinstance(spec, SharedKVSpec) else make(number, spec))
    return tuple(caches)
