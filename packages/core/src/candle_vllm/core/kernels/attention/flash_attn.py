# SPDX-License-Identifier: MIT
"""Attention by the FlashAttention packages (step 6 of a request's life): flash-attn 2.x and flash-attn-4.

Both read the paged cache by `flash_attn_varlen_func`, in one call for sequences with one token and one for others.
flash-attn-4 (CuTe DSL, Hopper and Blackwell) is used if it is installed and supports the model, else flash-attn.

`flash_attn_with_kvcache` is not used: from 2.8.4 on it reads the lengths on the host, so each layer would wait for the
GPU and no step could be captured.
Sources: Dao, 2023, arXiv:2307.08691; `flash_attn_interface.py` of flash-attn 2.8.3 and `cute/interface.py` of
flash-attn-4 4.0.0b36.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any, Unpack

import torch
from torch.nn import functional

from candle_vllm.core.kernels.attention.backend import AttentionNeeds, Backend, installed, page_refusal
from candle_vllm.core.kernels.attention.rows import DeviceRows, ScoreOptions

_FOUR, _TWO = "flash_attn.cute", "flash_attn_2_cuda"  # modules by which the two packages are recognised


@dataclasses.dataclass(frozen=True)
class SequenceGroup:
    """Consecutive sequences of a step as arguments of FlashAttention; tensors are int32.

    Attributes:
        query_start: [R + 1] offsets into the queries of the call; the first need not be 0.
        context_lens: [R] lengths of the contexts.
        block_tables: [R, maximum blocks of a sequence] block tables.
        most_tokens, most_context: upper bounds of the tokens and of the context of every sequence.
        decodes: whether each sequence has one token.
    """

    query_start: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor
    most_tokens: int
    most_context: int
    decodes: bool

    def key_start(self) -> torch.Tensor:
        """Return [R + 1] cumulative sums of the contexts."""
        return functional.pad(self.context_lens.cumsum(0, dtype=torch.int32), (1, 0))


Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, SequenceGroup, ScoreOptions], torch.Tensor]
"""Attention of the sequences of a group: q [T, H, D], caches -> [T, H, D]; rows of other sequences are undefined."""


def make(needs: AttentionNeeds) -> Backend | str:
    """Return the backend that uses one of the two packages, or the reason why neither can be used."""
    four, two = _refusal_of_4(needs), _refusal_of_2(needs)
    if four is not None and two is not None:
        return f"flash-attn-4: {four}; flash-attn: {two}"
    module = "flash_attn" if four is not None else _FOUR
    try:
        function = importlib.import_module(module).flash_attn_varlen_func
    except (ImportError, OSError, AttributeError) as error:
        return f"{module} cannot be imported ({error})"
    if four is not None:
        return Backend("flash_attn", PagedFlash(call_of_2(function)), capturable=True, note="flash-attn 2")
    assert needs.capability is not None
    splits = needs.capability[0] >= 10
    note = "flash-attn-4" if splits else "flash-attn-4, slow on this GPU where few sequences with long contexts decode"
    return Backend("flash_attn", PagedFlash(call_of_4(function, splits)), True, finite_cache=True, note=note)


def _refusal_of_4(needs: AttentionNeeds) -> str | None:
    major = needs.capability[0] if needs.capability else 0
    if major not in (9, 10, 11):
        return "its pages need a Hopper or Blackwell data-centre GPU"
    if major > 9 and 128 < needs.head_dim < 256:
        return f"head size {needs.head_dim} is not supported on this GPU"
    return None if installed(_FOUR) else "it is not installed"


def _refusal_of_2(needs: AttentionNeeds) -> str | None:
    if not installed(_TWO):
        return "it is not installed"
    if (refusal := page_refusal(needs)) is not None:
        return refusal
    version = importlib.metadata.version("flash-attn")
    if tuple(int(part) for part in version.split(".")[:2]) < (2, 6):
        return f"version 2.6 is needed, and {version} is installed"
    return None


@dataclasses.dataclass(frozen=True)
class PagedFlash:
    """`paged_attention` by a function that reads pages, with one call for decodes and one for the other sequences."""

    call: Call

    def __call__(
        self,
        q: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        rows: DeviceRows,
        **scores: Unpack[ScoreOptions],
    ) -> torch.Tensor:
        assert all(scores.get(each) is None for each in ("cache_scales", "sinks", "slopes"))
        assert rows.decoding is None
        assert key_cache.dtype == value_cache.dtype == q.dtype
        decodes, others = split(rows, len(q), key_cache.shape[1])
        out = None if others is None else self.call(q, key_cache, value_cache, others, scores)
        if decodes is None:
            return q.new_empty(q.shape) if out is None else out
        single = self.call(q[: rows.decodes], key_cache, value_cache, decodes, scores)
        if out is None:
            return single
        out[: rows.decodes] = single
        return out


def split(rows: DeviceRows, tokens: int, block_size: int) -> tuple[SequenceGroup | None, SequenceGroup | None]:
    """Return the first `decodes` sequences and the later ones, each None if empty; does not read the device."""
    n = rows.decodes
    contexts, tables = rows.context_lens.to(torch.int32), rows.block_tables.to(torch.int32)
    room = tables.shape[1] * block_size
    most_context = room if rows.most_context is None else min(rows.most_context, room)
    decodes = others = None
    if n:
        # Not `query_start`, in which padding sequences may have no tokens.
        starts = torch.arange(n + 1, dtype=torch.int32, device=contexts.device)
        decodes = SequenceGroup(starts, contexts[:n], tables[:n], 1, most_context, True)
    if tokens > n:
        most = tokens - n if rows.most_tokens is None else min(rows.most_tokens, tokens - n)
        # With a maximum of 1 token, FlashAttention 2 assumes that there are as many tokens as sequences.
        starts = rows.query_start[n:].to(torch.int32)
        others = SequenceGroup(starts, contexts[n:], tables[n:], max(most, 2), most_context, False)
    return decodes, others


def call_of_2(function: Any) -> Call:
    """Call `flash_attn_varlen_func` of flash-attn 2.x; its window_size does not count the query's own position."""

    def call(
        q: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, part: SequenceGroup, scores: ScoreOptions
    ) -> torch.Tensor:
        window = scores.get("window")
        return function(
            q,
            key_cache,
            value_cache,
            part.query_start,
            part.key_start(),
            part.most_tokens,
            part.most_context,
            softmax_scale=scores["scale"],
            causal=True,
            window_size=(-1, -1) if window is None else (window - 1, 0),
            softcap=scores.get("softcap") or 0.0,
            block_table=part.block_tables,
        )

    return call


def call_of_4(function: Any, splits: bool) -> Call:
    """Call `flash_attn_varlen_func` of flash-attn-4; `splits` is whether the GPU's kernel may split a context."""

    def call(
        q: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, part: SequenceGroup, scores: ScoreOptions
    ) -> torch.Tensor:
        window = scores.get("window")
        out, _ = function(
            q,
            key_cache,
            value_cache,
            cu_seqlens_q=part.query_start,
            seqused_k=part.context_lens,
            max_seqlen_q=part.most_tokens,
            max_seqlen_k=part.most_context,
            page_table=part.block_tables,
            softmax_scale=scores["scale"],
            causal=True,
            window_size=(None, None) if window is None else (window - 1, 0),
            softcap=scores.get("softcap") or 0.0,
            num_splits=0 if splits and part.decodes else 1,  # 0: as many splits as fill the GPU
        )
        return out

    return call
