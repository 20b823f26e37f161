# SPDX-License-Identifier: MIT
"""Where the tokens of a step belong: which sequence, and where its blocks are."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch


class PagedCache(NamedTuple):
    """Keys and values of a layer.

    Attributes:
        keys, values: [B, S, K, D] each; of latent attention `keys` alone. Where steps are compiled for the CPU, as
            `attention/cpu_cache.py` and `latent_attention/layout.py` say.
    """

    keys: Any
    values: Any = None


class WindowedCache(PagedCache):
    """Keys and values of a layer that has pages for what its window sees alone: its tables and slots name pages.

    Attributes:
        pool: the number of the page pool, see `WindowedBlocks`.
    """

    pool: int

    @classmethod
    def of(cls, pool: int, keys: Any, values: Any) -> WindowedCache:
        """The cache of a layer of a pool."""
        made = cls(keys, values)
        made.pool = pool
        return made


@dataclasses.dataclass(frozen=True)
class AttentionRows:
    """Where the tokens of one step belong.

    Attributes:
        query_start: R + 1 offsets into the step's tokens; sequence r has query_start[r]..query_start[r + 1].
        context_lens: R lengths, in tokens, the new ones included.
        block_tables: [R, most blocks] int64; a row's tail beyond its context is not read.
        ahead: [T] int64, how many positions behind its own a token sees; None where none sees any. On the CPU alone.
    """

    query_start: tuple[int, ...]
    context_lens: tuple[int, ...]
    block_tables: torch.Tensor
    ahead: torch.Tensor | None = None

    def causal(self) -> AttentionRows:
        """The same rows, none of which sees what is behind it."""
        return self if self.ahead is None else dataclasses.replace(self, ahead=None)

    def on_device(self) -> DeviceRows:
        """The same numbers beside the block tables. Leading sequences of one token count as decodes."""
        import torch

        counts = [end - start for start, end in itertools.pairwise(self.query_start)]
        decodes = next((row for row, count in enumerate(counts) if count != 1), len(counts))
        device = self.block_tables.device
        starts, contexts = (torch.tensor(x, dtype=torch.int32) for x in (self.query_start, self.context_lens))
        return DeviceRows(
            starts.to(device),
            contexts.to(device),
            self.block_tables,
            decodes,
            most_tokens=max(counts, default=0),
            most_context=max(self.context_lens, default=0),
            host=self,
        )


@dataclasses.dataclass(frozen=True)
class DeviceRows:
    """Where the tokens of one step belong, as tensors that may be rewritten between replays of a captured step.

    Attributes:
        query_start: [R + 1] int32 or int64; sequence r has tokens query_start[r]..query_start[r + 1].
        context_lens: [R] int32 or int64, in tokens, the new ones included.
        block_tables: [R, most blocks] int32 or int64; a row's tail beyond its context is not read.
        decodes: how many leading sequences are computed by the kernel for one new token each: token r is theirs. The
            others may have any number of tokens.
        most_tokens: no sequence has more tokens in this step, nor in any that a captured one is replayed for; None
            where only the shapes bound them.
        most_context: the same of contexts.
        host: the same numbers on the host; None where they are not known there, and for a step that is captured.
        decoding: [1] int32, at most `decodes`: how many leading sequences are computed by the kernel for one new token
            each, where only the device knows it; `decodes` then is the most of them that a launch is made for. None
            where `decodes` says it. For backends that are `mixed` alone, see `backends`.
        lists: what kernels make of these numbers once a step, for the calls of all layers. An object is thus of one
            step, or of one captured step, and its tensors are rewritten between replays alone.
    """

    query_start: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor
    decodes: int
    most_tokens: int | None = None
    most_context: int | None = None
    host: AttentionRows | None = None
    decoding: torch.Tensor | None = None
    lists: dict[tuple[int, ...], torch.Tensor] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def causal(self) -> DeviceRows:
        """See `AttentionRows.causal`."""
        host = self.host
        return self if host is None or host.ahead is None else dataclasses.replace(self, host=host.causal())

    def on_host(self) -> AttentionRows:
        """The same numbers as tuples. Waits for the device where `host` is None."""
        if self.host is not None:
            return self.host
        return AttentionRows(tuple(self.query_start.tolist()), tuple(self.context_lens.tolist()), self.block_tables)
