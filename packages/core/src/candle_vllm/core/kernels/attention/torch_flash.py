"""Attention by the FlashAttention that torch carries, `torch.nn.attention.varlen` (step 6 of a request's life).

From torch 2.13 on it reads pages, FlashAttention 2 those of a multiple of 256 tokens, FlashAttention 3 any, 4 any on
Blackwell. 3 and 4 take 2's place where their package is installed beside a torch that can use it. Where pages are not
read (torch 2.11, or smaller blocks) the keys and values that a prompt sees are copied behind each other for each
call, which is little beside the attention of a long prompt and far too much for a single token: those go to the Triton
kernel.

cuDNN's attention, which torch would take where it can, is kept out: it serves no windows and, for single tokens, only
some versions, so that the same token would be computed by one or the other.
Sources: torch/nn/attention/varlen.py of 2.11 and 2.15; https://github.com/pytorch/torchtitan/issues/3235.
"""

from __future__ import annotations

import dataclasses
import inspect
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.nn import functional
from torch.torch_version import TorchVersion

from candle_vllm.core.kernels.attention.backend import AttentionNeeds, Backend, installed, triton_refusal
from candle_vllm.core.kernels.attention.flash_attn import PAGE_OF_2, PagedFlash, SequenceGroup
from candle_vllm.core.kernels.attention.rows import AttentionRows, DeviceRows

_COPIED = 1 << 16  # most positions copied together, unless one sequence has more: 256 MiB at 8 heads of 128 in bf16


def make(needs: AttentionNeeds) -> Backend | str:
    """The backend, or why it cannot serve."""
    if needs.soft_caps:
        return "torch's FlashAttention has no soft cap"
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return "torch 2.10 is needed, which has torch.nn.attention.varlen"
    names = inspect.signature(varlen_attn).parameters
    capability = needs.capability
    assert capability is not None
    pages = {"block_table", "seqused_k", "num_splits"} <= names.keys()
    generation = _generation(capability)
    paged = pages and _reads_pages(generation, capability, needs.block_size)
    refusal = None if paged else triton_refusal(needs)
    if refusal is not None:
        return f"torch's FlashAttention reads no pages here, and single tokens cannot go to Triton: {refusal}"
    if generation > 2:
        from torch.nn.attention import activate_flash_attention_impl

        try:
            activate_flash_attention_impl(f"FA{generation}")
        except (ImportError, OSError, RuntimeError) as error:
            return f"the package of FlashAttention {generation} is installed and cannot be used ({error})"
    grouped = "enable_gqa" in names
    what = f"FlashAttention {generation}"
    if paged:
        attend = PagedFlash(PagedCall(varlen_attn, generation))
        return Backend("torch_flash", attend, capturable=True, finite_cache=generation > 2, note=what)
    note = f"{what} over a copy of what a prompt sees; single tokens by Triton"
    return Backend("torch_flash", CopiedFlash(varlen_attn, grouped), True, finite_cache=generation > 2, note=note)


def _generation(capability: tuple[int, int]) -> int:
    """Which FlashAttention torch is to use; 3 and 4 are packages of their own."""
    # Older ones hand "no window" on to FlashAttention 4 as a window of -1.
    usable = TorchVersion(torch.__version__) >= "2.15"
    if capability[0] == 9 and usable and installed("flash_attn_interface"):
        return 3
    return 4 if capability[0] in (9, 10) and usable and installed("flash_attn.cute") else 2


def _reads_pages(generation: int, capability: tuple[int, int], block_size: int) -> bool:
    if generation == 2:
        return block_size % PAGE_OF_2 == 0
    return generation == 3 or capability[0] == 10


def _window_size(window: int | None, single: bool = False) -> tuple[int, int]:
    """Keys before and behind a query's own; -1 for all. For a single token, behind which there is none, 2 is told so:
    it then computes the heads of a group together."""
    if window is None:
        return (-1, -1) if single else (-1, 0)
    return (window - 1, 0)


@dataclasses.dataclass(frozen=True)
class PagedCall:
    """`varlen_attn` over pages."""

    function: Any
    generation: int

    def __call__(
        self,
        q: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        part: SequenceGroup,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        assert softcap is None
        two = self.generation == 2
        with _flash_alone():
            return self.function(
                q,
                key_cache,
                value_cache,
                part.query_start,
                part.key_start() if two else None,  # 2 asks for it beside seqused_k, the others refuse it
                part.most_tokens,
                part.most_context,
                scale=scale,
                window_size=_window_size(window, part.decodes),
                enable_gqa=q.shape[1] != key_cache.shape[2],
                seqused_k=part.context_lens,
                block_table=part.block_tables,
                # 2 leaves rows unwritten where it splits the keys of pages, see the issue above.
                num_splits=1 if two or not part.decodes else None,
            )


@dataclasses.dataclass(frozen=True)
class CopiedFlash:
    """The contract of `paged_attention` by `varlen_attn` without pages, and Triton for single tokens."""

    function: Any
    grouped: bool  # whether the function wants to be told that query heads share a key-value head

    def __call__(
        self,
        q: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        rows: DeviceRows,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        cache_scales: tuple[torch.Tensor, torch.Tensor] | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert softcap is None
        assert cache_scales is None
        assert sinks is None
        assert rows.decoding is None
        n = rows.decodes
        if len(q) == n:
            return self._decode(q, key_cache, value_cache, rows, scale, window)
        out = q.new_empty(q.shape)
        if n:
            out[:n] = self._decode(q[:n], key_cache, value_cache, rows, scale, window)
        host = rows.on_host()
        for first, last in groups(host, n, window):
            start, end = host.query_start[first], host.query_start[last]
            if start < end:
                keys = _copy(key_cache, value_cache, rows, host, first, last, window)
                out[start:end] = self._prompts(q[start:end], keys, rows, host, first, last, scale, window)
        return out

    def _decode(
        self,
        q: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        rows: DeviceRows,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        from candle_vllm.core.kernels.attention import triton

        n = rows.decodes
        rows = DeviceRows(rows.query_start[: n + 1], rows.context_lens[:n], rows.block_tables[:n], n)
        return triton.paged_attention(q, key_cache, value_cache, rows, scale=scale, window=window)

    def _prompts(
        self,
        q: torch.Tensor,
        copied: Copied,
        rows: DeviceRows,
        host: AttentionRows,
        first: int,
        last: int,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        starts = (rows.query_start[first : last + 1] - rows.query_start[first]).to(torch.int32)
        counts = [host.query_start[row + 1] - host.query_start[row] for row in range(first, last)]
        grouped = {"enable_gqa": q.shape[1] != copied.keys.shape[1]} if self.grouped else {}
        with _flash_alone():
            return self.function(
                q,
                copied.keys,
                copied.values,
                starts,
                copied.starts,
                max(*counts, 2),
                copied.longest,
                scale=scale,
                window_size=_window_size(window),
                **grouped,
            )


@dataclasses.dataclass(frozen=True)
class Copied:
    """What some sequences see, behind each other: keys and values [C, K, D], starts [R + 1] int32."""

    keys: torch.Tensor
    values: torch.Tensor
    starts: torch.Tensor
    longest: int


def seen(host: AttentionRows, row: int, window: int | None) -> int:
    """How many of the last positions of a sequence its tokens see."""
    context, count = host.context_lens[row], host.query_start[row + 1] - host.query_start[row]
    return context if window is None else min(context, count + window - 1)


def groups(host: AttentionRows, first: int, window: int | None) -> list[tuple[int, int]]:
    """Runs of neighbouring sequences from `first` on that are copied together."""
    runs, size = [], 0
    for row in range(first, len(host.context_lens)):
        length = seen(host, row, window)
        if runs and size + length <= _COPIED:
            runs[-1] = (runs[-1][0], row + 1)
            size += length
        else:
            runs.append((row, row + 1))
            size = length
    return runs


def _copy(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    rows: DeviceRows,
    host: AttentionRows,
    first: int,
    last: int,
    window: int | None,
) -> Copied:
    """Keys and values of sequences first..last - 1; the host knows how many, the device which."""
    lengths = [seen(host, row, window) for row in range(first, last)]
    contexts = rows.context_lens[first:last].long()
    counts = rows.query_start[first : last + 1].long().diff()
    ends = (contexts if window is None else torch.minimum(contexts, counts + window - 1)).cumsum(0)
    at = torch.arange(sum(lengths), device=ends.device)
    row = torch.searchsorted(ends, at, right=True)
    position = at - (ends - contexts)[row]
    size = key_cache.shape[1]
    blocks = rows.block_tables[first:last][row, position // size].long()
    slots = blocks * size + position % size
    keys, values = (cache.flatten(0, 1).index_select(0, slots) for cache in (key_cache, value_cache))
    return Copied(keys, values, functional.pad(ends, (1, 0)).to(torch.int32), max(lengths))


def _flash_alone() -> AbstractContextManager[object]:
    """Within this context torch takes FlashAttention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.FLASH_ATTENTION)
