# SPDX-License-Identifier: MIT
"""Map the tokens of a step to sequences, and sequences to their blocks."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any, NamedTuple, Required, TypedDict

if TYPE_CHECKING:
    import torch

    from candle_vllm.core.kernels.attention.cpu_cache import CacheKind


class ScoreOptions(TypedDict, total=False):
    """How queries and keys are scored; see the contract in the package."""

    scale: Required[float]
    window: int | None
    softcap: float | None
    cache_scales: tuple[torch.Tensor, torch.Tensor] | None
    sinks: torch.Tensor | None
    slopes: torch.Tensor | None
    relative: tuple[torch.Tensor, torch.Tensor] | None


class _Arrays(NamedTuple):
    keys: Any
    values: Any = None


class PagedCache(_Arrays):
    """KV cache of a layer.

    Attributes:
        keys, values: [B, S, K, D] each, or D + 4 (`kv_write/scaled_rows`). Latent attention has no values; `values` may
            be an index's keys. For compiled steps on the CPU see `attention/cpu_cache`, `latent_attention/layout`.
        kinds: how compiled steps on the CPU store keys and values; None for latent attention, and elsewhere.
        fit: float32 [K, 3, D] if keys are quantised: an offset of keys, and factors of keys and of queries; see
            `attention/cpu_quantised`.
    """

    kinds: tuple[CacheKind, CacheKind] | None = None
    fit: Any = None


class WindowedCache(PagedCache):
    """KV cache of a layer that keeps only pages of its sliding window; each page pool has block tables and slots.

    Attributes:
        pool: index of the page pool, see `WindowedBlocks`.
    """

    pool: int

    @classmethod
    def of(cls, pool: int, keys: Any, values: Any) -> WindowedCache:
        """Return the cache of a layer whose pages are in pool number `pool`."""
        made = cls(keys, values)
        made.pool = pool
        return made


@dataclasses.dataclass(frozen=True)
class AttentionRows:
    """The step's R sequences, with their lengths on the host: which tokens and which blocks belong to each.

    Attributes:
        query_start: R + 1 offsets into the step's tokens; sequence r has tokens query_start[r]..query_start[r + 1] - 1.
        context_lens: R lengths in tokens, the new tokens included.
        block_tables: [R, maximum blocks] int32 or int64; entries after the end of a sequence's context are not read.
        ahead: [T] int64, number of later positions that each token attends to; None if causal. GPU kernels ignore it.
    """

    query_start: tuple[int, ...]
    context_lens: tuple[int, ...]
    block_tables: torch.Tensor
    ahead: torch.Tensor | None = None

    def causal(self) -> AttentionRows:
        """Return the same rows with causal attention."""
        return self if self.ahead is None else dataclasses.replace(self, ahead=None)

    def on_device(self) -> DeviceRows:
        """Return the rows on the block tables' device; `decodes` is the number of leading sequences with one token."""
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
    """The step's R sequences, as tensors that may be rewritten between replays of a captured step.

    Attributes:
        query_start: [R + 1] int32 or int64; sequence r has tokens query_start[r]..query_start[r + 1] - 1.
        context_lens: [R] int32 or int64 lengths in tokens, the new tokens included.
        block_tables: [R, maximum blocks] int32 or int64; entries after the end of a sequence's context are not read.
        decodes: number of leading sequences that the decode kernel computes: sequence r has one token, token r of the
            step. Later sequences may have any number of tokens.
        most_tokens: maximum tokens of a sequence in this step, or in all replays of a captured step; None for no limit.
        most_context: maximum context length of a sequence in the same step or replays, in tokens; None for no limit.
        host: copy on the host; None for a captured step, or if the values are only on the device.
        decoding: [1] int32, at most `decodes`: the number of leading sequences that the decode kernel computes, read on
            the device; `decodes` is then only the maximum for the launch. None if `decodes` is the number. Only for
            backends that are `mixed`, see `Backend`.
    """

    query_start: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor
    decodes: int
    most_tokens: int | None = None
    most_context: int | None = None
    host: AttentionRows | None = None
    decoding: torch.Tensor | None = None

    def causal(self) -> DeviceRows:
        host = self.host
        return self if host is None or host.ahead is None else dataclasses.replace(self, host=host.causal())

    def on_host(self) -> AttentionRows:
        """Return the copy on the host. Waits for the device if `host` is None."""
        if self.host is not None:
            return self.host
        return AttentionRows(tuple(self.query_start.tolist()), tuple(self.context_lens.tolist()), self.block_tables)
