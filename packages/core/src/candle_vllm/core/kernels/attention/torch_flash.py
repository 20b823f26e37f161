# SPDX-License-Identifier: MIT
"""Attention by torch's own FlashAttention, `torch.nn.attention.varlen` (step 6 of a request's life).

From torch 2.13 on it reads pages. FlashAttention 2 needs a multiple of 256 tokens per page. FlashAttention 3 (Hopper)
and 4 (Blackwell) have no such limit, and are used instead if their package is installed and torch supports it.

cuDNN's attention, which torch would prefer, is disabled: it has no windows, and only some versions support single
tokens, so a token might be computed by cuDNN in one step and by FlashAttention in another. Sources:
torch/nn/attention/varlen.py of 2.15; https://github.com/pytorch/torchtitan/issues/3235.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.torch_version import TorchVersion

from candle_vllm.core.kernels.attention.backend import AttentionNeeds, Backend, installed, page_refusal
from candle_vllm.core.kernels.attention.flash_attn import Call, PagedFlash, SequenceGroup
from candle_vllm.core.kernels.attention.rows import ScoreOptions


def make(needs: AttentionNeeds) -> Backend | str:
    """Return the backend, or the reason why it cannot be used."""
    if needs.soft_caps:
        return "torch's FlashAttention has no soft cap"
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return _TOO_OLD
    if not {"block_table", "seqused_k", "num_splits", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys():
        return _TOO_OLD
    capability = needs.capability
    assert capability is not None
    generation = _generation(capability)
    if generation == 2 and (refusal := page_refusal(needs)) is not None:
        return refusal
    if generation > 2:
        from torch.nn.attention import activate_flash_attention_impl

        try:
            activate_flash_attention_impl(f"FA{generation}")
        except (ImportError, OSError, RuntimeError) as error:
            return f"the package of FlashAttention {generation} is installed but cannot be used ({error})"
    attend, note = PagedFlash(paged_call(varlen_attn, generation)), f"FlashAttention {generation}"
    return Backend("torch_flash", attend, capturable=True, finite_cache=generation > 2, note=note)


_TOO_OLD = "torch 2.13 is needed, whose FlashAttention reads pages"


def _generation(capability: tuple[int, int]) -> int:
    """Return the version of FlashAttention that torch should use; 3 and 4 are separate packages."""
    # Older versions of torch pass "no window" to FlashAttention 4 as a window of -1.
    usable = TorchVersion(torch.__version__) >= "2.15"
    if capability[0] == 9 and usable and installed("flash_attn_interface"):
        return 3
    return 4 if capability[0] == 10 and usable and installed("flash_attn.cute") else 2


def paged_call(function: Any, generation: int) -> Call:
    """Call `varlen_attn` with pages."""
    two = generation == 2

    def call(
        q: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, part: SequenceGroup, scores: ScoreOptions
    ) -> torch.Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        assert scores.get("softcap") is None
        window = scores.get("window")
        # Number of keys after the query's position; -1 for all. A single query has no later keys, so -1 means the same
        # as 0, but lets FlashAttention 2 compute the query heads of a KV head together.
        after = -1 if window is None and part.decodes else 0
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return function(
                q,
                key_cache,
                value_cache,
                part.query_start,
                part.key_start() if two else None,  # needed by FlashAttention 2, refused by 3 and 4
                part.most_tokens,
                part.most_context,
                scale=scores["scale"],
                window_size=(-1 if window is None else window - 1, after),
                enable_gqa=q.shape[1] != key_cache.shape[2],
                seqused_k=part.context_lens,
                block_table=part.block_tables,
                # FlashAttention 2 does not write some rows if it splits the keys of pages, see the issue above.
                num_splits=1 if two or not part.decodes else None,
            )

    return call
